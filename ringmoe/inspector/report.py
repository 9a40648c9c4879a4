"""What `inspect` found, to read, to store and to look at."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.text import Text

from ringmoe.inspector import html, record, tables, trace, words
from ringmoe.inspector.kernels import Kernel
from ringmoe.inspector.memory import Oversize
from ringmoe.inspector.timeline import Choice, Collective, Operation, Timeline

SCHEMA = "ringmoe.report/2"  # of the JSON; report.schema.json describes it
_SHOWN, _OPERATIONS, _NOTES = 30, 10, 8  # rows of the text; the JSON and the HTML have more


@dataclasses.dataclass(frozen=True)
class OverlapReport:
    """Cost of one compiled program on one target, per device and run. Times are microseconds.

    Attributes:
      program: HLO module name.
      target: target name, and mesh: its axes ({} when unknown). num_devices: of the target.
      collectives: every exchange, in schedule order; its times are of one execution, see
        `Collective`.
      us: estimated time of one run (a step, of a train step): compute plus exposed wire time.
      wire_us, compute_us, exposed_us: sums over the run, loops multiplied out.
      flops: FLOPs of one device in the matmuls of the compiled program, kernels by their cost
        estimates; what is computed again for a backward pass counts each time.
      peak_flops: bf16 matmul FLOP/s of one device.
      bound_us: compute time by the roof it touches: "matrix", "vector", "memory".
      operations: the longest operations and waits, those that take most of the run first.
      peak_bytes: most bytes in use at once by the compiler's memory analysis, which decides whether the program fits;
        None for text.
      hbm_bytes: memory of one device. fits: whether the peak does, None when it is unknown.
      memory: arguments, results, temporaries and code; they may add up to more than the peak, as not all of them are
        alive at once. {} when the compiler gave up.
      unestimated: instruction -> why its time or bytes had no model (it is timed by the bytes it
        touches).
      unknown_loops: loops whose trip count the text does not tell; counted once.
      xla_optimal_us: XLA's own `optimal_seconds`; it counts every loop body once, so compare with
        `once_us`.
      once_us: our compute time with every loop counted once.
      timelines: one per computation that runs, callees first, the entry last; () when read from
        JSON.
      choices: conditionals whose branches differ; the slowest branch counts, see `Choice`.
      kernels: static cost of each Pallas kernel, when asked for.
      compile_seconds: time the compiler took; None when given compiled.
      model_flops: FLOPs that the model itself needs for one run on all devices, when the user
        tells: `dataclasses.replace(report, model_flops=1.2e15)`.
      oversize: of a program that does not fit, how much too much and what is alive at the peak.
    """

    program: str
    target: str
    mesh: dict[str, int]
    num_devices: int
    collectives: tuple[Collective, ...]
    us: float
    wire_us: float
    compute_us: float
    exposed_us: float
    flops: float
    peak_flops: float
    bound_us: dict[str, float]
    operations: tuple[Operation, ...]
    peak_bytes: int | None
    hbm_bytes: int
    memory: dict[str, int]
    unestimated: dict[str, str]
    unknown_loops: tuple[str, ...]
    xla_optimal_us: float | None
    once_us: float
    timelines: tuple[Timeline, ...] = dataclasses.field(default=(), repr=False)
    kernels: tuple[Kernel, ...] = ()
    choices: tuple[Choice, ...] = ()
    compile_seconds: float | None = None
    model_flops: float | None = None
    oversize: Oversize | None = None

    @classmethod
    def from_json(cls, text: str) -> "OverlapReport":
        """The report that `to_json` wrote, without its timelines.

        Raises:
          ValueError: it is not such JSON, is of another version, or a field is missing or of another type.
        """
        data = record.load(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = record.shown(data.get("schema") if isinstance(data, dict) else data)
            raise ValueError(
                f"the report's schema is {found}, expected {SCHEMA!r}: write the report again with "
                "`ringmoe inspect --json`, by the version that reads it"
            )
        return record.decode(cls, {key: value for key, value in data.items() if key != "timelines"}, "report")

    @property
    def exposed_share(self) -> float:
        """Part of the run that is spent waiting for the wire."""
        return self.exposed_us / self.us if self.us else 0.0

    @property
    def exposed_fraction(self) -> float:
        """Exposed wire time over all wire time; 0 when nothing is sent."""
        return self.exposed_us / self.wire_us if self.wire_us else 0.0

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, `flops` over what the device's bf16 matmul rate does in the time of a run. What is
        computed twice counts twice; fp8 and int8 can pass 1."""
        return self._utilisation(self.flops)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, the same of a device's share of `model_flops`; None when that is not given."""
        return None if self.model_flops is None else self._utilisation(self.model_flops / max(self.num_devices, 1))

    def _utilisation(self, flops: float) -> float:
        possible = self.us * 1e-6 * self.peak_flops
        return flops / possible if possible else 0.0

    @property
    def fits(self) -> bool | None:
        """Whether the program's memory fits the device's; None when the memory is not known."""
        return None if self.peak_bytes is None else self.oversize is None

    @property
    def by_kind(self) -> tuple[dict[str, Any], ...]:
        """All executions of the counted collectives, by kind; of each `kind`, `executions`, `bytes` of a device, `wire_us`,
        `exposed_us`; the longest waited for first."""
        kinds: dict[str, dict[str, Any]] = {}
        for c in self.collectives:
            if c.counted:
                empty = {"kind": c.kind, "executions": 0, "bytes": 0.0, "wire_us": 0.0, "exposed_us": 0.0}
                row = kinds.setdefault(c.kind, empty)
                row["executions"] += c.trip_count
                row["bytes"] += c.trip_count * c.wire_bytes
                row["wire_us"] += c.trip_count * c.wire_us
                row["exposed_us"] += c.trip_count * c.exposed_us
        return tuple(sorted(kinds.values(), key=lambda row: (-row["exposed_us"], -row["wire_us"])))

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything above but the timelines, as JSON; `from_json` reads it, `inspector/report.schema.json` describes it."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The fields and properties as plain data."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "timelines"}
        for name in ("collectives", "operations", "kernels", "choices"):
            fields[name] = [dataclasses.asdict(entry) for entry in fields[name]]
        fields["oversize"] = dataclasses.asdict(self.oversize) if self.oversize else None
        derived = ("exposed_share", "exposed_fraction", "hfu", "mfu", "fits", "by_kind")
        return {"schema": SCHEMA} | fields | {name: getattr(self, name) for name in derived}

    def to_html(self) -> str:
        """One self-contained page: verdict, memory bar, timelines to click through, sortable tables."""
        return html.page(self.to_dict(), self.timelines)

    def to_trace(self) -> str:
        """The run and each computation as Chrome trace events, JSON that ui.perfetto.dev and others open.

        Raises:
          ValueError: the report has no timelines, for it was read from JSON.
        """
        return trace.chrome(f"{self.program} on {self.target}", self.timelines)

    def __str__(self) -> str:
        return tables.text(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        wide = options.max_width >= tables.WIDE
        yield Text(words.plain(f"{self.program} on {self.target}{words.mesh(self.mesh)}"), style="bold")
        yield Text(self.headline(), style="green" if self.exposed_share < 0.05 else "red")
        yield Text(self.verdict())
        yield Text(self.utilisation_line())
        yield Text(self.memory_line(), style="red" if self.fits is False else "")
        if self.oversize is not None and self.oversize.buffers:
            yield tables.buffers(self.oversize.buffers[:_OPERATIONS])
        if self.collectives:
            yield tables.kinds(self.by_kind, self.us)
            waited = sorted(self.collectives, key=lambda c: -c.total_us)
            yield tables.collectives(waited[:_SHOWN], wide)
            if len(waited) > _SHOWN:
                yield Text(f"... and {len(waited) - _SHOWN} more: see the JSON or the HTML")
        if self.operations:
            yield tables.operations(self.operations[:_OPERATIONS], self.us, wide)
        if self.kernels:
            yield tables.kernels(self.kernels)
        yield from (Text(words.plain(note), style="yellow") for note in self._notes())
        if self.xla_optimal_us is not None:
            ours, theirs = words.time(self.once_us), words.time(self.xla_optimal_us)
            line = f"compute with every loop counted once: {ours}; XLA's own optimal_seconds: {theirs}"
            yield Text(line, style="dim")

    def headline(self) -> str:
        """One line: the part of a run that is spent waiting."""
        if not self.collectives:
            return "no time is spent waiting for the wire: nothing is sent between devices"
        waiting = f"{words.time(self.exposed_us)} of {words.time(self.us)}"
        return f"{words.percent(self.exposed_share)} of a step is spent waiting for the wire ({waiting})"

    def verdict(self) -> str:
        """One line: the time of a run, and how much of the wire is exposed."""
        parts = f"{words.time(self.compute_us)} compute + {words.time(self.exposed_us)} waiting"
        line = f"{words.time(self.us)} a step = {parts}"
        if self.wire_us:
            return f"{line}; {self.exposed_fraction:.1%} of {words.time(self.wire_us)} wire time is exposed"
        return line + ("; no collective is timed or counted" if self.collectives else "")

    def utilisation_line(self) -> str:
        """One line: how well the matrix units are used, and what bounds the rest."""
        peak = f"{words.count(self.peak_flops)}FLOP/s a device"
        if self.mfu is None:
            line = f"HFU {words.percent(self.hfu)}: {words.count(self.flops)}FLOP in the compiled program, of {peak}"
        else:
            line = (
                f"MFU {words.percent(self.mfu)}: {words.count(self.model_flops or 0)}FLOP of the model on "
                f"{self.num_devices} devices, of {peak}; HFU {words.percent(self.hfu)}"
            )
        bounds = sorted(((us, name) for name, us in self.bound_us.items() if us > 0), reverse=True)
        total = sum(us for us, _ in bounds)
        parts = ", ".join(f"{name} {words.percent(us / total)}" for us, name in bounds if us >= 0.0005 * total)
        return f"{line}; compute is bound by {parts}" if parts else line

    def memory_line(self) -> str:
        """One line: the peak against the device's memory."""
        if self.peak_bytes is None:
            return f"memory not known from text; a device has {words.size(self.hbm_bytes)}"
        parts = ", ".join(f"{name} {words.size(size)}" for name, size in self.memory.items() if size)
        if self.oversize is not None:
            least = f"{words.size(self.oversize.needed_bytes)} of {words.size(self.oversize.available_bytes)} a device"
            return f"{least}: DOES NOT FIT, {words.size(self.oversize.excess_bytes)} too much{f' ({parts})' if parts else ''}"
        return (
            f"{words.size(self.peak_bytes)} of {words.size(self.hbm_bytes)} a device: "
            f"{'fits' if self.fits else 'DOES NOT FIT'} ({parts})"
        )

    def _notes(self) -> list[str]:
        """What the figures leave out."""
        notes = [f"not estimated: {name}: {reason}" for name, reason in list(self.unestimated.items())[:_NOTES]]
        if len(self.unestimated) > _NOTES:
            notes.append(f"... and {len(self.unestimated) - _NOTES} more not estimated")
        if self.unknown_loops:
            notes.append(f"trip count not in the text, counted once: {', '.join(self.unknown_loops)}")
        notes += [_choice_line(choice) for choice in self.choices[:_NOTES]]
        if len(self.choices) > _NOTES:
            notes.append(f"... and {len(self.choices) - _NOTES} more conditionals whose branches differ")
        return notes


def _choice_line(choice: Choice) -> str:
    """A conditional: the time of each branch, and those that send and are not counted."""
    times = ", ".join(f"{name} {words.time(us)}" for name, us, _ in choice.branches)
    unsaid = f"; NOT counted though sending: {', '.join(choice.uncounted)}" if choice.uncounted else ""
    return f"at most: {choice.name} counts its slowest branch of {times}{unsaid}"
