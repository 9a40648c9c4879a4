"""The tables of a report, for a terminal."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ringmoe.inspector.kernels import Kernel
from ringmoe.inspector.memory import Buffer
from ringmoe.inspector.timeline import Collective, Operation
from ringmoe.inspector.words import count, label, mesh, percent, plain, runs, size, time

WIDE = 110  # columns from which a terminal has room for every column of a table


def text(found: Any) -> str:
    """What a terminal of 132 columns shows, without colours."""
    out = io.StringIO()
    Console(file=out, width=132, color_system=None).print(found)
    return out.getvalue().rstrip()


def kinds(rows: Iterable[dict[str, Any]], us: float) -> Table:
    """All executions of the program's collectives, by kind; see `OverlapReport.by_kind`."""
    table = _table("in all", "runs>", "bytes>", "wire>", "exposed>", "of a step>")
    for row in rows:
        exposed = row["exposed_us"]
        values = (runs(row["executions"]), size(row["bytes"]), time(row["wire_us"]), time(exposed))
        share = percent(exposed / us if us else 0.0)
        _add(table, row["kind"], *values, share, style=_tone(exposed, row["wire_us"]))
    return table


def collectives(rows: Sequence[Collective], wide: bool) -> Table:
    """One execution of each collective on one device, those first that are waited for longest in all."""
    table = _table("collective", *(() if wide else ("async",)), "bytes>", "runs>", "wire>", "exposed>")
    for title in ("hides behind", "over", "in the code") if wide else ("over",):
        table.add_column(title, overflow="ellipsis")
    for c in rows:
        row = [c.name if c.name.startswith(c.kind) else f"{c.kind} {c.name}"]
        row += [] if wide else ["yes" if c.asynchronous else "NO"]
        row += [size(c.wire_bytes), runs(c.trip_count), time(c.wire_us), time(c.exposed_us)]
        if wide:
            row.append(
                f"{time(c.compute_us)}, {', '.join(behind(c))}" if c.compute_us else "" if c.asynchronous else "SYNC"
            )
        row += [": ".join(filter(None, ("+".join(c.axes), c.route))), *([label(c.op_name, "")] if wide else [])]
        _add(table, *row, style="dim" if not c.counted else _tone(c.exposed_us, c.wire_us))
    return table


def behind(collective: Collective) -> list[str]:
    """What computes beside a collective, by its names in the JAX code, each once."""
    names = zip(collective.hidden_by_ops, collective.hidden_by, strict=False)
    return list(dict.fromkeys(label(op_name, name) for op_name, name in names))


def operations(rows: Iterable[Operation], us: float, wide: bool) -> Table:
    """The longest operations of the program, with their share of a step."""
    table = _table("operation", "in all>", "of a step>", "bound by", *(("once>", "runs>", "FLOP/s>") if wide else ()))
    if wide:
        table.add_column("instruction", overflow="ellipsis", max_width=30)
    table.add_column("source", overflow="ellipsis")
    for o in rows:
        row = [label(o.op_name, o.name), time(o.total_us), percent(o.total_us / us if us else 0.0), o.bound]
        if wide:
            rate = count(o.flops / o.us * 1e6).strip() if o.flops and o.us else ""
            row += [time(o.us), runs(o.trip_count), rate, o.name]
        _add(table, *row, o.source, style="red" if o.bound == "wire" else "")
    return table


def changes(title: str, rows: Iterable[tuple[str, Callable[[float], str], float | None, float | None]]) -> Table:
    """Figures before and after: name, how to say one, both values (None: not known)."""
    table = _table(title, "before>", "after>", "change>")
    for name, say, before, after in rows:
        change, style = "", ""
        if before is not None and after is not None and before != after:
            change = f"{100 * (after - before):+.1f} points" if say is percent else "new"
            change = f"{after / before - 1:+.1%}" if before and say is not percent else change
            style = "red" if after > before else "green"
        _add(table, name, *("not known" if v is None else say(v) for v in (before, after)), change, style=style)
    return table


def trials(rows: Sequence[Any], shown: int = 12) -> Table:
    """The best shapes of a search (`search.Trial`), and why each is not better."""
    table = _table("mesh", "a step>", "waiting>", "memory>", "fits")
    table.add_column("why", overflow="fold")
    for trial in rows[:shown]:
        r = trial.report
        cells = [time(r.us), percent(r.exposed_share), size(r.peak_bytes or 0), str(r.fits)] if r else ["", "", "", ""]
        cells = [cell.replace("True", "yes").replace("False", "NO").replace("None", "?") for cell in cells]
        style = "red" if not r or r.fits is False else ""
        cells.insert(0, mesh(trial.mesh).removeprefix(", mesh "))
        table.add_row(*(Text(cell, no_wrap=True) for cell in cells), Text(plain(trial.reason)), style=style)
    if len(rows) > shown:
        table.caption = f"... and {len(rows) - shown} more"
    return table


def buffers(rows: Iterable[Buffer]) -> Table:
    """What is alive at the peak of a program that doesn't fit."""
    table = _table("made by", "alive at the peak>", "shape")
    for buffer in rows:
        _add(table, label(buffer.op_name, buffer.name), size(buffer.bytes), buffer.shape)
    return table


def kernels(rows: Iterable[Kernel]) -> Table:
    """Static cost of Pallas kernels."""
    table = _table("kernel")
    table.add_column("static cost", overflow="fold")
    for kernel in rows:
        table.add_row(Text(plain(kernel.name), no_wrap=True), Text(plain(kernel.summary())))
    return table


def _tone(exposed: float, wire: float) -> str:
    return "red" if exposed > 0.05 * wire else "green"


def _add(table: Table, *cells: str, style: str = "") -> None:
    """A row of plain text, for names may look like markup."""
    table.add_row(*(Text(plain(cell), no_wrap=True) for cell in cells), style=style)


def _table(first: str, *titles: str) -> Table:
    """A table whose first column is cut where there is no room; > after a title aligns to the right."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="ellipsis", min_width=16)
    for title in titles:
        right = title.endswith(">")
        table.add_column(title.removesuffix(">"), justify="right" if right else "left", no_wrap=True)
    return table
