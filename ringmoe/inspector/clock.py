"""Walks a scheduled module and times it: what computes while which collective is on the wire.

One device runs its instructions in program order on a compute lane. A collective is on the wire
from the moment it starts, sharing the bandwidth of links that others use too; whatever is left of
it when the program waits for it is exposed. A loop body is walked once, as in the middle of the
run, and counted as often as it runs. Of a conditional the slowest branch is taken (an upper bound);
collectives of the others are listed but not counted, and `Schedule.choices` has the times of each.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator

from ringmoe.inspector.axes import Axes
from ringmoe.inspector.collectives import (
    collective_kind,
    flow,
    post_order,
    slice_exchange,
    wrapped,
)
from ringmoe.inspector.estimate import Cost, Roofline
from ringmoe.inspector.flops import cost_estimate
from ringmoe.inspector.loops import trip_counts
from ringmoe.inspector.reader import PERMUTE, REMOTE_DMA, UNKNOWN, Computation, Instruction, Module, number
from ringmoe.inspector.timeline import Choice, Collective, Operation, Span, Timeline
from ringmoe.inspector.wire import Transfer, Wire, source_target_pairs

_HIDERS = 6  # names kept in `hidden_by`; the time counts them all
_LATEST = 4096  # instructions among which they are looked for
_SHARERS = 64  # transfers in the air at once that one is compared with, the latest
_LONGEST = 64  # operations of a computation that are kept by name; the sums count them all
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
    key: str = ""  # its name in `flights` when that isn't the instruction's
    source: str = ""
    axes: tuple[str, ...] = ()
    blamed: float = 0.0  # time that others waited because this held their links


class Schedule:
    """Timelines of every computation that the entry runs, in the order callees first.

    Raises:
      ValueError: the module is not scheduled, or a computation calls itself.
    """

    def __init__(self, module: Module, roofline: Roofline, wire: Wire, axes: Axes):
        if not module.is_scheduled:
            raise ValueError(
                f"HLO module {module.name!r} is not scheduled, expected 'is_scheduled=true' in "
                "its first line: "
                "pass the text of a compiled program, `lowered.compile().as_text()`"
            )
        self.module, self.roofline, self.wire, self.axes = module, roofline, wire, axes
        self.unknown_loops: list[str] = []
        self.timelines: dict[str, Timeline] = {}
        self.choices: list[Choice] = []
        self._wire: dict[str, float] = {}  # of one run of each computation, all that it calls included
        order = post_order(module)
        self._trips = trip_counts(module)
        for computation in order:
            self.timelines[computation.name] = _Walk(self, computation).run()
            self._wire[computation.name] = self._wire_us(computation)
        self._count(order)

    def _wire_us(self, computation: Computation) -> float:
        """Wire time of one run of a computation."""
        total = sum(c.wire_us for c in self.timelines[computation.name].collectives)
        for instruction in computation.instructions:
            inside = self.taken(instruction)
            total += self.times(instruction, computation) * sum(self._wire[name] for name in inside)
        return total

    def taken(self, instruction: Instruction) -> tuple[str, ...]:
        """Computations that count as run by this instruction: of a conditional, its slowest branch."""
        inside = flow(self.module, instruction)
        if instruction.opcode == "conditional":
            return tuple(sorted(inside, key=lambda name: -self.timelines[name].us)[:1])
        return inside

    def _count(self, order: list[Computation]) -> None:
        """Sets how often each computation runs, callers first, and stamps it on its collectives. What
        only branches that aren't taken run has the count it would have if they were."""
        runs = {computation.name: 0.0 for computation in order}
        possible = dict(runs)
        runs[self.module.entry.name] = possible[self.module.entry.name] = 1.0
        for computation in reversed(order):
            here, timeline = runs[computation.name], self.timelines[computation.name]
            most = here or possible[computation.name]
            timeline.stamp(int(most) if most.is_integer() else most, here > 0 or not most)
            for instruction in computation.instructions:
                inside, taken = flow(self.module, instruction), self.taken(instruction)
                times = self.times(instruction, computation) if inside else 0
                for name in inside:
                    runs[name] += here * times * (name in taken)
                    possible[name] += most * times
                if len(inside) > 1 and instruction.opcode == "conditional":
                    self._choose(instruction, timeline, inside, taken[0])

    def _choose(self, instruction: Instruction, timeline: Timeline, inside: tuple[str, ...], taken: str) -> None:
        """Notes a conditional whose branches differ in time or in what they send."""
        branches = tuple((name, self.timelines[name].us, self._wire[name]) for name in inside)
        if len({figures[1:] for figures in branches}) > 1:
            self.choices.append(Choice(instruction.name, timeline.computation, branches, taken, timeline.trip_count))

    def times(self, instruction: Instruction, caller: Computation) -> float:
        """How often one run of the instruction runs what it calls."""
        return self.trips(instruction, caller) if instruction.opcode == "while" else 1

    def trips(self, loop: Instruction, caller: Computation) -> float:
        """Iterations of a loop; one whose text does not tell counts once and is named in
        `unknown_loops`."""
        count = self._trips.get((caller.name, loop.name))
        if count is None and loop.name not in self.unknown_loops:
            self.unknown_loops.append(loop.name)
        return 1 if count is None else count


class _Walk:
    """Runs one computation on a clock."""

    def __init__(self, schedule: Schedule, computation: Computation):
        self.schedule, self.computation = schedule, computation
        self.timeline = Timeline(computation.name)
        self.now = 0.0
        self.local: dict[str, float] = {}  # when the device's copy queue and its other cores are free again
        self.flights: dict[str, _Flight] = {}
        self.work: list[tuple[float, str]] = []
        self.spent: list[tuple[Instruction, Cost]] = []
        self.orphans: list[Instruction] = []
        # Starts that get their operands, and so begin, only by an update: the SparseCore's.
        self.later = {
            i.operands[0] for i in computation.instructions if i.opcode.endswith("-update") and len(i.operands) > 1
        }

    def run(self) -> Timeline:
        for instruction in self.computation.instructions:
            self.step(instruction)
        if self.orphans and self.flights:
            self._second_iteration()
        for flight in list(self.flights.values()):  # nothing below waits for it, so the end of the computation does
            self.wait(flight)
        self.timeline.us = self.now
        longest = heapq.nlargest(_LONGEST, self.spent, key=lambda spent: spent[1].us)
        self.timeline.operations = [self._operation(instruction, cost) for instruction, cost in longest]
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
                key=name,
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
        index = number(source.attributes.get("index", "0"))
        return self._flight_of(root.operands[index]) if index < len(root.operands) else None

    def step(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode.endswith("-update"):
            if len(instruction.operands) > 1:
                self._launch(self.computation.by_name[instruction.operands[0]])
        elif instruction.name in self.later:
            return
        elif instruction.is_host_transfer:
            self._by_host(instruction)
        elif opcode.endswith("-done") or self._is_fused_done(instruction):
            self._finish(instruction)
        elif flight := self._waited_for(instruction):
            self.wait(flight)
            self._work(instruction)
        elif opcode in ("while", "conditional", "call"):
            self._enter(instruction)
        elif not self._launch(instruction):
            self.timeline.own_us += self._work(instruction)

    def _launch(self, instruction: Instruction) -> bool:
        """Runs or starts a collective, or starts work beside the program; False when it is neither."""
        if kind := collective_kind(self.schedule.module, instruction):
            self._communicate(instruction, kind)
        elif instruction.opcode.endswith("-start"):
            self._start_local(instruction)
        else:
            return False
        return True

    def _work(self, instruction: Instruction) -> float:
        """Computes an instruction; returns its microseconds."""
        cost = self.schedule.roofline.cost(instruction, self.computation)
        self._compute(instruction.name, cost.us)
        self._spend(instruction, cost)
        return cost.us

    def _spend(self, instruction: Instruction, cost: Cost) -> None:
        """Writes down what the time went into."""
        self.timeline.flops += cost.flops
        if cost.us > 0:
            self.timeline.bound_us[cost.bound] = self.timeline.bound_us.get(cost.bound, 0.0) + cost.us
            self.spent.append((instruction, cost))

    def _operation(self, instruction: Instruction, cost: Cost) -> Operation:
        named = self.schedule.module.named(instruction)
        return Operation(
            instruction.name,
            instruction.opcode,
            cost.bound,
            cost.us,
            cost.flops,
            computation=self.computation.name,
            op_name=named.op_name,
            source=self.schedule.module.source(named),
        )

    def _compute(
        self, name: str, us: float, stalled: float = 0.0, inside: tuple[str, ...] = (), times: float = 1
    ) -> None:
        """Advances by `us`, of which `stalled` were already spent waiting inside."""
        if us > 0:
            self.timeline.spans.append(Span("compute", name, self.now, self.now + us, inside, times))
            self.work.append((us - stalled, name))
            self.timeline.compute_us += us - stalled
            self.now += us

    def _enter(self, instruction: Instruction) -> None:
        """Runs a loop, a branch or a call whose timeline is known already."""
        schedule = self.schedule
        inside = [schedule.timelines[name] for name in schedule.taken(instruction)]
        times = schedule.times(instruction, self.computation)
        us, busy = times * sum(t.us for t in inside), times * sum(t.compute_us for t in inside)
        self._compute(instruction.name, us, us - busy, tuple(t.computation for t in inside), times)

    def _communicate(self, instruction: Instruction, kind: str) -> None:
        inner, home = wrapped(self.schedule.module, instruction) or (instruction, self.computation)
        if instruction.is_sending_kernel:
            self._by_kernel(instruction, kind)
            return
        transfer = self.schedule.wire.transfer(inner, home, kind)
        if kind == UNKNOWN:
            what = inner.target or inner.opcode
            self.schedule.roofline.name(
                instruction.name,
                f"{what!r} looks like communication of a kind that isn't known: timed as if its operands were sent once",
            )
        queue = inner.config.get("collective_backend_config")
        asynchronous = instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv")
        if instruction.opcode == "fusion":
            asynchronous = "AsyncCollectiveStart" in home.targets
            if self.schedule.roofline.work(instruction, self.computation).flops:
                self._work(instruction)
        asynchronous &= not (isinstance(queue, dict) and queue.get("is_sync"))
        flight = self._flight(instruction, inner, kind, transfer, asynchronous)
        self._depart(flight)
        if not asynchronous:
            self.wait(flight)

    def _flight(
        self, instruction: Instruction, inner: Instruction, kind: str, transfer: Transfer, asynchronous: bool
    ) -> _Flight:
        """What this instruction, or the `inner` one that it wraps, has put on its way by now."""
        return _Flight(
            instruction,
            self.now,
            0.0,
            len(self.work),
            self.timeline.compute_us,
            transfer,
            kind,
            asynchronous,
            instruction.op_name or inner.op_name,
            source=self.schedule.module.source(instruction) or self.schedule.module.source(inner),
            axes=self.schedule.axes.of(inner),
        )

    def _by_host(self, instruction: Instruction) -> None:
        """A transfer with the host. Exchanges between slices go that way, under way from their send to their
        recv-done; others have no figure."""
        ends = self.computation.by_name.get(instruction.operands[0]) if instruction.operands else None
        exchange = slice_exchange(instruction) or (ends and slice_exchange(ends))
        if not exchange:
            self.schedule.roofline.name(instruction.name, "transfer to or from the host: no figure for that link")
        elif instruction.opcode == "send":
            self._communicate(instruction, exchange.kind)
            flight = self.flights.pop(instruction.name)
            flight.key = exchange.key
            self.flights[exchange.key] = flight
        elif instruction.opcode == "recv-done":
            if exchange.key in self.flights:
                self.wait(self.flights[exchange.key])

    def _by_kernel(self, instruction: Instruction, kind: str) -> None:
        """A Pallas kernel that sends data itself. What it sends is under way until another kernel takes its semaphores; without
        any it takes as long as the slower of its compute and its wire."""
        transfer, start, busy = self._of_kernel(instruction, kind), self.now, self._work(instruction)
        flight = self._flight(instruction, instruction, kind, transfer, True)
        if not instruction.has_semaphores:  # what it computes hides what it sends
            flight.start, flight.first = start, flight.first - (busy > 0)
            flight.compute_at_start -= busy
        self._depart(flight)
        if not instruction.has_semaphores:
            flight.end -= self.now - start
            self.wait(flight)

    def _of_kernel(self, instruction: Instruction, kind: str) -> Transfer:
        """What a kernel puts on the wire: as many bytes as its author says, else, of a collective, its operands'."""
        wire, from_author = self.schedule.wire, (cost_estimate(instruction) or {}).get("remote_bytes_transferred")
        pairs = instruction.kernel_metadata.get("source_target_pairs", "")
        if kind == PERMUTE and from_author and pairs:
            ends = source_target_pairs(pairs)  # of all that it sends, as much to each
            one = wire.permute(from_author * len({source for source, _ in ends}) / max(1, len(ends)), pairs)
            return dataclasses.replace(one, wire_bytes=from_author)
        if kind != REMOTE_DMA:
            sent = wire.exchange(kind, 1.0, instruction.groups).wire_bytes  # of a byte of the operands
            if from_author and sent:
                return wire.exchange(kind, from_author / sent, instruction.groups)
            return wire.transfer(instruction, self.computation, kind)
        if from_author is None:
            self.schedule.roofline.name(
                instruction.name,
                "kernel moves data between devices but its cost estimate has no remote_bytes_transferred: wire time 0",
            )
        us = wire.neighbour(from_author).us if from_author else 0.0
        return Transfer(from_author or 0.0, us, "", "one link, neighbours assumed")

    def _waited_for(self, instruction: Instruction) -> _Flight | None:
        """What a kernel waits for: another one gave it the semaphores."""
        if instruction.opcode == "custom-call":
            for operand in map(self.computation.by_name.get, instruction.operands):
                if operand is not None and operand.has_semaphores and (flight := self._flight_of(operand.name)):
                    return flight
        return None

    def _depart(self, flight: _Flight) -> None:
        """Puts a transfer on the wire. Those that share links share their bandwidth: each delays
        the other by the time the shorter of the two needs."""
        assert flight.transfer is not None
        flight.end = self.now + flight.transfer.us
        for other, common in self._sharing(flight):
            delay = max(0.0, min(common, other.end - self.now))
            other.end += delay
            flight.end += delay
        self.flights[flight.instruction.name] = flight

    def _sharing(self, flight: _Flight) -> Iterator[tuple[_Flight, float]]:
        """Transfers in the air that use links of this one, and for how long both need one."""
        assert flight.transfer is not None
        for other in itertools.islice(reversed(self.flights.values()), _SHARERS):
            common = self.schedule.wire.contended_us(flight.transfer, other.transfer) if other.transfer else 0.0
            if common:
                yield other, common

    def _start_local(self, instruction: Instruction) -> None:
        """A copy, a slice or compute on another queue of the same device: the copies' or a core's own."""
        roofline, called = self.schedule.roofline, flow(self.schedule.module, instruction)
        cost = roofline.cost(instruction, self.computation)
        self.timeline.flops += cost.flops
        us = sum(self.schedule.timelines[name].us for name in called) or cost.us
        queue = instruction.attributes.get("async_execution_thread", "")
        self.local[queue] = end = max(self.now, self.local.get(queue, 0.0)) + us
        self.flights[instruction.name] = _Flight(instruction, self.now, end, len(self.work), self.timeline.compute_us)

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
            and "AsyncCollectiveDone" in self.schedule.module.computations[instruction.called[0]].targets
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
        del self.flights[flight.key or flight.instruction.name]
        exposed = max(0.0, flight.end - self.now)
        self._stall(flight.instruction.name, exposed, local=flight.transfer is None)
        if flight.transfer is None:
            if not flow(self.schedule.module, flight.instruction):  # else its own timeline has its operations
                self._spend(flight.instruction, Cost(exposed, "memory", 0.0))
            return
        if flight.transfer.us > 0:
            self.timeline.spans.append(Span("wire", flight.instruction.name, flight.start, flight.end))
        hiders = heapq.nlargest(_HIDERS, self.work[max(flight.first, len(self.work) - _LATEST) :])
        hidden_by = tuple(dict.fromkeys(name for us, name in hiders if us > 0.01 * hiders[0][0]))
        self.timeline.collectives.append(
            Collective(
                flight.instruction.name,
                flight.kind,
                flight.asynchronous,
                flight.transfer.wire_bytes,
                1,
                hidden_by,
                flight.transfer.us,
                self.timeline.compute_us - flight.compute_at_start,
                self._charge(flight, exposed),
                self.computation.name,
                flight.transfer.route,
                flight.op_name,
                source=flight.source,
                axes=flight.axes,
                hidden_by_ops=tuple(
                    self.schedule.module.named(self.computation.by_name[name]).op_name for name in hidden_by
                ),
            )
        )

    def _charge(self, flight: _Flight, us: float) -> float:
        """Exposed time of a flight that the program waited `us` for: at most its own time on the
        wire; what it waited beyond that is charged to those it shares links with, and what was
        charged to it before counts."""
        assert flight.transfer is not None
        rest = us - max(0.0, min(us, flight.transfer.us - flight.blamed))
        own = flight.blamed + us - rest
        for other, common in self._sharing(flight):
            if rest <= 0:
                break
            part = max(0.0, min(rest, common - other.blamed))
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
