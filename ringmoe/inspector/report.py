"""What `inspect` found, to read, to store and to look at."""

import dataclasses
import io
import json
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ringmoe.inspector import html
from ringmoe.inspector.kernels import Kernel
from ringmoe.inspector.memory import Oversize
from ringmoe.inspector.timeline import Collective, Timeline

_BUFFERS = 10
_SHOWN = 30  # rows of the text table; the JSON and the HTML have them all


@dataclasses.dataclass(frozen=True)
class OverlapReport:
    """Cost of one compiled program on one target, per device and run. Times are microseconds.

    Attributes:
      program: HLO module name.
      target: target name, and mesh: its axes ({} when unknown).
      collectives: every exchange, in schedule order; its times are of one execution, see
        `Collective`.
      us: estimated time of one run: compute plus exposed wire time.
      wire_us, compute_us, exposed_us: sums over the run, loops multiplied out.
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
      timelines: one per computation that runs, for pictures.
      kernels: static cost of each Pallas kernel, when asked for.
      compile_seconds: time the compiler took; None when given compiled.
      oversize: of a program that does not fit, how much too much and what is alive at the peak.
    """

    program: str
    target: str
    mesh: dict[str, int]
    collectives: tuple[Collective, ...]
    us: float
    wire_us: float
    compute_us: float
    exposed_us: float
    peak_bytes: int | None
    hbm_bytes: int
    memory: dict[str, int]
    unestimated: dict[str, str]
    unknown_loops: tuple[str, ...]
    xla_optimal_us: float | None
    once_us: float
    timelines: tuple[Timeline, ...] = dataclasses.field(repr=False)
    kernels: tuple[Kernel, ...] = ()
    compile_seconds: float | None = None
    oversize: Oversize | None = None

    @property
    def exposed_fraction(self) -> float:
        """Exposed wire time over all wire time; 0 when nothing is sent."""
        return self.exposed_us / self.wire_us if self.wire_us else 0.0

    @property
    def fits(self) -> bool | None:
        """Whether the program's memory fits the device's; None when the memory is not known."""
        return None if self.peak_bytes is None else self.oversize is None

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything above but the timelines, as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The fields and properties as plain data."""
        record = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "timelines"
        }
        record["collectives"] = [dataclasses.asdict(c) for c in self.collectives]
        record["kernels"] = [dataclasses.asdict(k) for k in self.kernels]
        record["oversize"] = dataclasses.asdict(self.oversize) if self.oversize else None
        return record | {"exposed_fraction": self.exposed_fraction, "fits": self.fits}

    def to_html(self) -> str:
        """One self-contained page: verdict, memory bar, timeline of each loop, sortable tables."""
        return html.page(self.to_dict(), self.timelines)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=132, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # pyright: ignore[reportAttributeAccessIssue]

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield Text(
            f"{self.program} on {self.target}"
            + (f", mesh {', '.join(f'{a}={n}' for a, n in self.mesh.items())}" if self.mesh else ""),
            style="bold",
        )
        yield Text(self.verdict(), style="green" if self.exposed_fraction < 0.05 else "red")
        yield Text(self.memory_line(), style="red" if self.fits is False else "")
        if self.oversize is not None and self.oversize.buffers:
            yield _buffer_table(self.oversize)
        if self.collectives:
            yield _collective_table(self.collectives)
            if len(self.collectives) > _SHOWN:
                yield Text(f"... and {len(self.collectives) - _SHOWN} more: see the JSON or the HTML")
        if self.kernels:
            yield _kernel_table(self.kernels)
        for name, reason in list(self.unestimated.items())[:8]:
            yield Text(f"not estimated: {name}: {reason}", style="yellow")
        if len(self.unestimated) > 8:
            yield Text(f"... and {len(self.unestimated) - 8} more not estimated", style="yellow")
        if self.unknown_loops:
            yield Text(
                f"trip count not in the text, counted once: {', '.join(self.unknown_loops)}",
                style="yellow",
            )
        if self.xla_optimal_us is not None:
            yield Text(
                f"compute with every loop counted once: {_time(self.once_us)}; XLA's own "
                "optimal_seconds: "
                f"{_time(self.xla_optimal_us)}",
                style="dim",
            )

    def verdict(self) -> str:
        """One line: the time of a run, and how much of the wire is exposed."""
        parts = f"{_time(self.compute_us)} compute + {_time(self.exposed_us)} waiting"
        start = f"{_time(self.us)} a run = {parts}"
        if not self.wire_us:
            return f"{start}; nothing is sent between devices"
        return f"{start}; {self.exposed_fraction:.1%} of {_time(self.wire_us)} wire time is exposed"

    def memory_line(self) -> str:
        """One line: the peak against the device's memory."""
        if self.peak_bytes is None:
            return f"memory not known from text; a device has {_size(self.hbm_bytes)}"
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.memory.items() if size)
        if self.oversize is not None:
            least = f"{_size(self.oversize.needed_bytes)} of {_size(self.oversize.available_bytes)} a device"
            return (
                f"{least}: DOES NOT FIT, {_size(self.oversize.excess_bytes)} too much{f' ({parts})' if parts else ''}"
            )
        return (
            f"{_size(self.peak_bytes)} of {_size(self.hbm_bytes)} a device: "
            f"{'fits' if self.fits else 'DOES NOT FIT'} ({parts})"
        )


def _collective_table(collectives: tuple[Collective, ...]) -> Table:
    """The rows that wait longest first."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (
        ("collective", "left"),
        ("kind", "left"),
        ("async", "left"),
        ("bytes", "right"),
        ("runs", "right"),
        ("wire", "right"),
        ("hidden by", "right"),
        ("exposed", "right"),
        ("route", "left"),
    ):
        table.add_column(
            name,
            justify="right" if justify == "right" else "left",
            no_wrap=name != "route",
            overflow="ellipsis" if name == "collective" else "fold",
            min_width=26 if name == "collective" else None,
        )
    rows = sorted(collectives, key=lambda c: -c.exposed_us * c.trip_count * c.counted)[:_SHOWN]
    for c in rows:
        style = "dim" if not c.counted else "red" if c.exposed_us > 0.05 * c.wire_us else "green"
        table.add_row(
            c.name,
            c.kind,
            "yes" if c.asynchronous else "NO",
            _size(c.wire_bytes),
            f"{c.trip_count}x",
            _time(c.wire_us),
            _time(c.compute_us),
            _time(c.exposed_us),
            c.route,
            style=style,
        )
    return table


def _buffer_table(oversize: Oversize) -> Table:
    """What is alive at the peak, largest first."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in ("alive at the peak", "shape", "made by"):
        table.add_column(name, justify="right" if name == "alive at the peak" else "left", overflow="fold")
    for buffer in oversize.buffers[:_BUFFERS]:
        table.add_row(_size(buffer.bytes), buffer.shape, buffer.op_name or buffer.name)
    return table


def _kernel_table(kernels: tuple[Kernel, ...]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "static cost"):
        table.add_column(name, overflow="fold")
    for kernel in kernels:
        table.add_row(kernel.name, kernel.summary())
    return table


def _time(us: float) -> str:
    """Microseconds in the unit that reads best."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("us", 1.0)):
        if us >= size:
            return f"{us / size:.3g} {unit}" if us / size < 999.5 else f"{us / size:.0f} {unit}"
    return f"{us:.2g} us" if us else "0"


def _size(size: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size / scale < 999.5 else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"
