"""Walks a scheduled module and times it: what computes while which collective is on the wire.

One device runs its instructions in program order on a compute lane. A collective is on the wire
from the moment it starts, sharing the bandwidth of links that others use too; whatever is left of
it when the program waits for it is exposed. A loop body is walked once, as in the middle of the
run, and counted as often as it runs. Of a conditional the slowest branch is taken; collectives of
the others are listed but not counted.
"""

import dataclasses
import heapq

from ringmoe.inspector.collectives import (
    collective_kind,
    flow,
    holds,
    is_host_transfer,
    post_order,
    slice_exchange,
    wrapped,
)
from ringmoe.inspector.estimate import Roofline
from ringmoe.inspector.flops import cost_estimate
from ringmoe.inspector.loops import trip_count
from ringmoe.inspector.reader import Computation, Instruction, Module
from ringmoe.inspector.timeline import Collective, Span, Timeline
from ringmoe.inspector.wire import Transfer, Wire

_HIDERS = 6  # names kept in `hidden_by`; the time counts them all
_FORWARDS = frozenset({"get-tuple-element", "bitcast", "copy", "tuple", "fusion", "custom-call", "opt-barrier"})


@dataclasses.dataclass
class _Flight:
    """Something started and not yet waited for. `collective` is None for copies and compute on
    another queue."""

    instruction: Instruction
    start: float
    end: float
    first: int
    compute_at_start: float
    transfer: Transfer | None = None
    kind: str = ""
    asynchronous: bool = True
    op_name: str = ""
    blamed: float = 0.0  # time that others waited because this held their links


class Schedule:
    """Timelines of every computation that the entry runs, in the order callees first.

    Raises:
      ValueError: the module is not scheduled, or a computation calls itself.
    """

    def __init__(self, module: Module, roofline: Roofline, wire: Wire):
        if not module.is_scheduled:
            raise ValueError(
                f"HLO module {module.name!r} is not scheduled, expected 'is_scheduled=true' in "
                "its first line: "
                "pass the text of a compiled program, `lowered.compile().as_text()`"
            )
        self.module, self.roofline, self.wire = module, roofline, wire
        self.unknown_loops: list[str] = []
        self.timelines: dict[str, Timeline] = {}
        order = post_order(module)
        for computation in order:
            self.timelines[computation.name] = _Walk(self, computation).run()
        self._count(order)

    def _count(self, order: list[Computation]) -> None:
        """Sets how often each computation runs, callers first, and stamps it on its collectives."""
        runs = {computation.name: 0 for computation in order}
        counted = {computation.name: False for computation in order}
        runs[self.module.entry.name], counted[self.module.entry.name] = 1, True
        for computation in reversed(order):
            for instruction in computation.instructions:
                callees = [name for name in flow(self.module, instruction) if name in runs]
                slowest = max(callees, key=lambda name: self.timelines[name].us, default="")
                for name in callees:
                    times = self.trips(instruction, computation) if instruction.opcode == "while" else 1
                    runs[name] += runs[computation.name] * times
                    taken = instruction.opcode != "conditional" or name == slowest
                    counted[name] |= counted[computation.name] and taken
        for name, timeline in self.timelines.items():
            timeline.trip_count, timeline.counted = runs[name], counted[name]
            timeline.collectives = [
                dataclasses.replace(c, trip_count=runs[name], counted=counted[name]) for c in timeline.collectives
            ]

    def trips(self, loop: Instruction, caller: Computation) -> int:
        """Iterations of a loop; one whose text does not tell counts once and is named in
        `unknown_loops`."""
        count = trip_count(self.module, loop, caller)
        if count is None and loop.name not in self.unknown_loops:
            self.unknown_loops.append(loop.name)
        return 1 if count is None else count


class _Walk:
    """Runs one computation on a clock."""

    def __init__(self, schedule: Schedule, computation: Computation):
        self.schedule, self.computation = schedule, computation
        self.timeline = Timeline(computation.name)
        self.now = 0.0
        self.local = 0.0  # when the device's copy queue is free again
        self.flights: dict[str, _Flight] = {}
        self.work: list[tuple[float, str]] = []
        self.orphans: list[Instruction] = []

    def run(self) -> Timeline:
        for instruction in self.computation.instructions:
            self.step(instruction)
        if self.orphans and self.flights:
            self._second_iteration()
        for flight in list(self.flights.values()):  # nothing below waits for it, so the end of the computation does
            self.wait(flight)
        self.timeline.us = self.now
        return self.timeline

    def _second_iteration(self) -> None:
        """Walks again when a loop waits for what its last iteration started, with those flights in
        the air."""
        carried = {
            orphan.name: flight
            for orphan, flight in ((orphan, self._carried(orphan)) for orphan in self.orphans)
            if flight
        }
        if not carried:
            return
        again = _Walk(self.schedule, self.computation)
        again.work = list(self.work)
        for name, flight in carried.items():
            again.flights[name] = dataclasses.replace(
                flight,
                start=0.0,
                end=flight.end - self.now,
                compute_at_start=(flight.compute_at_start - self.timeline.compute_us),
            )
        for instruction in self.computation.instructions:
            again.step(instruction)
        for name in [
            key
            for key, flight in again.flights.items()
            if any(flight.instruction is f.instruction for f in carried.values())
        ]:
            del again.flights[name]  # the next iteration waits for these
        self.__dict__.update(again.__dict__)

    def _carried(self, orphan: Instruction) -> _Flight | None:
        """The flight that this done waits for when it comes round through the loop's state."""
        source, by_name = orphan, self.computation.by_name
        while source is not None and source.operands and source.opcode != "get-tuple-element":
            source = by_name.get(source.operands[0])
        root = self.computation.root
        if source is None or source.opcode != "get-tuple-element" or root is None or root.opcode != "tuple":
            return None
        index = int(source.attributes.get("index", "0"))
        return self._flight_of(root.operands[index]) if index < len(root.operands) else None

    def step(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode.endswith("-update") and opcode.startswith("async"):
            return
        if is_host_transfer(instruction):
            self._by_host(instruction)
            return
        if opcode.endswith("-done") or self._is_fused_done(instruction):
            self._finish(instruction)
        elif opcode in ("while", "conditional", "call"):
            self._enter(instruction)
        elif kind := collective_kind(self.schedule.module, instruction):
            self._communicate(instruction, kind)
        elif opcode.endswith("-start"):
            self._start_local(instruction)
        else:
            us = self.schedule.roofline.us(instruction, self.computation)
            self.timeline.own_us += us
            self._compute(instruction.name, us)

    def _compute(self, name: str, us: float, stalled: float = 0.0) -> None:
        """Advances by `us`, of which `stalled` were already spent waiting inside."""
        if us > 0:
            self.timeline.spans.append(Span("compute", name, self.now, self.now + us))
            self.work.append((us - stalled, name))
            self.timeline.compute_us += us - stalled
            self.now += us

    def _enter(self, instruction: Instruction) -> None:
        """Runs a loop, a branch or a call whose timeline is known already."""
        timelines = self.schedule.timelines
        inside = [timelines[name] for name in flow(self.schedule.module, instruction)]
        if instruction.opcode == "while":
            times = self.schedule.trips(instruction, self.computation)
            us, busy = (
                times * sum(t.us for t in inside),
                times * sum(t.compute_us for t in inside),
            )
        else:
            slowest = max(inside, key=lambda t: t.us, default=Timeline(""))
            us, busy = slowest.us, slowest.compute_us
        self._compute(instruction.name, us, us - busy)

    def _communicate(self, instruction: Instruction, kind: str) -> None:
        inner, home = wrapped(self.schedule.module, instruction) or (instruction, self.computation)
        if kind == "remote-dma":
            self._remote_dma(instruction)
            return
        transfer = self.schedule.wire.transfer(inner, home, kind)
        queue = inner.config.get("collective_backend_config")
        asynchronous = instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv")
        if instruction.opcode == "fusion":
            asynchronous = holds(home, "AsyncCollectiveStart")
            if self.schedule.roofline.work(instruction, self.computation).flops:
                self._compute(instruction.name, self.schedule.roofline.us(instruction, self.computation))
        asynchronous &= not (isinstance(queue, dict) and queue.get("is_sync"))
        flight = _Flight(
            instruction,
            self.now,
            0.0,
            len(self.work),
            self.timeline.compute_us,
            transfer,
            kind,
            asynchronous,
            instruction.op_name or inner.op_name,
        )
        self._depart(flight)
        if not asynchronous:
            self.wait(flight)

    def _by_host(self, instruction: Instruction) -> None:
        """A transfer with the host. Exchanges between slices go that way, under way from their send to their
        recv-done; others have no figure."""
        ends = self.computation.by_name.get(instruction.operands[0]) if instruction.operands else None
        exchange = slice_exchange(instruction) or (ends and slice_exchange(ends))
        if not exchange:
            self.schedule.roofline.name(instruction.name, "transfer to or from the host: no figure for that link")
        elif instruction.opcode == "send":
            self._communicate(instruction, exchange.kind)
            self.flights[exchange.key] = self.flights.pop(instruction.name)
        elif instruction.opcode == "recv-done":
            if exchange.key in self.flights:
                self.wait(self.flights[exchange.key])

    def _remote_dma(self, instruction: Instruction) -> None:
        """A Pallas kernel that sends data itself: it takes as long as the slower of its compute and
        its wire."""
        from_author = (cost_estimate(instruction) or {}).get("remote_bytes_transferred")
        if from_author is None:
            self.schedule.roofline.name(
                instruction.name,
                "kernel moves data between devices but its cost estimate has no remote_bytes_transferred: wire time 0",
            )
        us = self.schedule.wire.neighbour(from_author).us if from_author else 0.0
        busy = self.schedule.roofline.us(instruction, self.computation)
        exposed = max(0.0, us - busy)
        self.timeline.spans.append(Span("wire", instruction.name, self.now, self.now + us))
        self._compute(instruction.name, busy)
        self._stall(instruction.name, exposed)
        self.timeline.collectives.append(
            Collective(
                instruction.name,
                "remote-dma",
                True,
                from_author or 0.0,
                1,
                (instruction.name,) if busy else (),
                us,
                busy,
                exposed,
                self.computation.name,
                "one link, neighbours assumed",
                instruction.op_name,
            )
        )

    def _depart(self, flight: _Flight) -> None:
        """Puts a transfer on the wire. Those that share links share their bandwidth: each delays
        the other by the time the shorter of the two needs."""
        assert flight.transfer is not None
        flight.end = self.now + flight.transfer.us
        for other in self.flights.values():
            if other.transfer is not None and _share(flight.transfer, other.transfer):
                delay = max(0.0, min(flight.transfer.us, other.transfer.us, other.end - self.now))
                other.end += delay
                flight.end += delay
        self.flights[flight.instruction.name] = flight

    def _start_local(self, instruction: Instruction) -> None:
        """A copy, a slice or compute on another queue of the same device; they share one lane."""
        roofline, called = self.schedule.roofline, flow(self.schedule.module, instruction)
        us = sum(self.schedule.timelines[name].us for name in called) or roofline.us(instruction, self.computation)
        self.local = max(self.now, self.local) + us
        self.flights[instruction.name] = _Flight(
            instruction, self.now, self.local, len(self.work), self.timeline.compute_us
        )

    def _finish(self, instruction: Instruction) -> None:
        flight = self.flights.get(instruction.name) or self._flight_of(instruction.name)
        if flight is None:
            self.orphans.append(instruction)
        else:
            self.wait(flight)

    def _is_fused_done(self, instruction: Instruction) -> bool:
        return (
            instruction.opcode == "fusion"
            and bool(instruction.called)
            and holds(self.schedule.module.computations[instruction.called[0]], "AsyncCollectiveDone")
        )

    def _flight_of(self, name: str) -> _Flight | None:
        """The flight whose value reaches the instruction of this name."""
        seen, stack = set(), [name]
        while stack:
            current = stack.pop()
            if current in self.flights:
                return self.flights[current]
            instruction = self.computation.by_name.get(current)
            if instruction is None or current in seen:
                continue
            seen.add(current)
            if current == name or instruction.opcode in _FORWARDS or instruction.opcode.endswith("-update"):
                stack.extend(instruction.operands)
        return None

    def wait(self, flight: _Flight) -> None:
        """Stops the clock until the flight has landed, and writes down what hid it."""
        for key in [key for key, value in self.flights.items() if value is flight]:
            del self.flights[key]
        exposed = max(0.0, flight.end - self.now)
        self._stall(flight.instruction.name, exposed, local=flight.transfer is None)
        if flight.transfer is None:
            return
        if flight.transfer.us > 0:
            self.timeline.spans.append(Span("wire", flight.instruction.name, flight.start, flight.end))
        hiders = heapq.nlargest(_HIDERS, self.work[flight.first :])
        hiders = [(us, name) for us, name in hiders if us > 0.01 * hiders[0][0]]
        self.timeline.collectives.append(
            Collective(
                flight.instruction.name,
                flight.kind,
                flight.asynchronous,
                flight.transfer.wire_bytes,
                1,
                tuple(dict.fromkeys(name for _, name in hiders)),
                flight.transfer.us,
                self.timeline.compute_us - flight.compute_at_start,
                self._charge(flight, exposed),
                self.computation.name,
                flight.transfer.route,
                flight.op_name,
            )
        )

    def _charge(self, flight: _Flight, us: float) -> float:
        """Exposed time of a flight that the program waited `us` for: at most its own time on the
        wire; what it waited beyond that is charged to those it shares links with, and what was
        charged to it before counts."""
        assert flight.transfer is not None
        rest = us - max(0.0, min(us, flight.transfer.us - flight.blamed))
        own = flight.blamed + us - rest
        for other in self.flights.values():
            if rest > 0 and other.transfer is not None and _share(flight.transfer, other.transfer):
                part = max(0.0, min(rest, other.transfer.us - other.blamed))
                other.blamed += part
                rest -= part
        return own + rest

    def _stall(self, name: str, us: float, local: bool = False) -> None:
        """The program waits: for the wire, or (local) for a copy, which counts as compute."""
        if us <= 0:
            return
        if local:
            self._compute(name, us)
        else:
            self.timeline.spans.append(Span("wait", name, self.now, self.now + us))
            self.now += us


def _share(one: Transfer, other: Transfer) -> bool:
    """Whether two transfers use the same links. Permutes by different pairs are taken to use
    different ones."""
    lanes = {one.lane, other.lane}
    return len(lanes) == 1 or ("all" in lanes and "network" not in lanes)
