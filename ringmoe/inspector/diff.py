"""What changed from one report to another."""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from ringmoe.inspector import tables, words
from ringmoe.inspector.report import OverlapReport
from ringmoe.inspector.timeline import Collective, Operation

SCHEMA = "ringmoe.diff/1"
_NOTICED = 0.01  # a smaller part of itself, or of a tenth of the run, is no change of an operation
_SHOWN = 10
# Name, unit and value of each figure that is compared; None where a report doesn't know it.
_FIGURES: tuple[tuple[str, Callable[[float], str], Callable[[OverlapReport], float | None]], ...] = (
    ("us", words.time, lambda report: report.us),
    ("compute_us", words.time, lambda report: report.compute_us),
    ("exposed_us", words.time, lambda report: report.exposed_us),
    ("exposed_share", words.percent, lambda report: report.exposed_share),
    ("wire_us", words.time, lambda report: report.wire_us),
    ("peak_bytes", words.size, lambda report: report.peak_bytes),
    ("flops", lambda flops: f"{words.count(flops)}FLOP", lambda report: report.flops),
)
_TITLES = {
    "us": "a step",
    "compute_us": "compute",
    "exposed_us": "waiting",
    "exposed_share": "waiting, of a step",
    "wire_us": "on the wire",
    "peak_bytes": "memory a device",
    "flops": "matmuls a device",
}


@dataclasses.dataclass(frozen=True)
class Diff:
    """Two reports beside each other.

    Attributes:
      before, after: the reports.
      added, removed: collectives that only the one after, or before, has.
      changed: pairs of a collective before and after whose bytes, executions, wait or asynchrony differ.
      operations: (name, time in all before, after) of the operations that got slower or faster, the largest change first. Of
        what is not among the longest operations of a report its time there counts as 0.
    """

    before: OverlapReport
    after: OverlapReport
    added: tuple[Collective, ...]
    removed: tuple[Collective, ...]
    changed: tuple[tuple[Collective, Collective], ...]
    operations: tuple[tuple[str, float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema": SCHEMA,
            "programs": [self.before.program, self.after.program],
            "targets": [self.before.target, self.after.target],
            "figures": {name: [value(self.before), value(self.after)] for name, _, value in _FIGURES},
            "added": [dataclasses.asdict(c) for c in self.added],
            "removed": [dataclasses.asdict(c) for c in self.removed],
            "changed": [[dataclasses.asdict(c) for c in pair] for pair in self.changed],
            "operations": [list(operation) for operation in self.operations],
        }

    def __str__(self) -> str:
        return tables.text(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        names = [f"{r.program} on {r.target}{words.mesh(r.mesh)}" for r in (self.before, self.after)]
        yield Text(words.plain(" -> ".join(dict.fromkeys(names))), style="bold")
        figures = [(_TITLES[name], say, value(self.before), value(self.after)) for name, say, value in _FIGURES]
        yield tables.changes("", [f for f in figures if f[2] is not None or f[3] is not None])
        for title, found, style in (("added", self.added, "red"), ("removed", self.removed, "green")):
            yield from (Text(words.plain(f"{title}: {_described(c)}"), style=style) for c in found[:_SHOWN])
            yield from _rest(found)
        for one, other in self.changed[:_SHOWN]:
            style = "red" if other.total_us > one.total_us else "green"
            yield Text(words.plain(f"changed: {_described(one)} -> {_described(other)}"), style=style)
        yield from _rest(self.changed)
        if self.operations:
            yield tables.changes("operation, in all", [(n, words.time, b, a) for n, b, a in self.operations[:_SHOWN]])
        if not (self.added or self.removed or self.changed):
            yield Text("the same collectives, each as long as before")


def diff(before: OverlapReport, after: OverlapReport) -> Diff:
    """What changed from one report to another, of two programs or of one on two targets.

    Collectives are matched by kind, place in the JAX code and bytes; what is left by two of the three, in order. Operations
    by place and opcode, their times added up.
    """
    pairs, removed, added = _matched(
        before.collectives,
        after.collectives,
        lambda c: (c.kind, c.op_name, c.wire_bytes),
        lambda c: (c.kind, c.op_name),
        lambda c: (c.kind, c.wire_bytes),
    )
    changed = tuple(pair for pair in pairs if _differs(*pair))
    return Diff(before, after, tuple(added), tuple(removed), changed, _operations(before, after))


def _matched(
    before: Iterable[Collective], after: Iterable[Collective], *keys: Callable[[Collective], Any]
) -> tuple[list[tuple[Collective, Collective]], list[Collective], list[Collective]]:
    """Pairs with an equal key, the first key first and in order; and what is left of both."""
    pairs, left, right = [], list(before), list(after)
    for key in keys:
        places = collections.defaultdict(collections.deque)
        for c in right:
            places[key(c)].append(c)
        found = [(c, places[key(c)].popleft() if places[key(c)] else None) for c in left]
        pairs += [(c, other) for c, other in found if other is not None]
        left = [c for c, other in found if other is None]
        right = [c for queue in places.values() for c in queue]
    return pairs, left, right


def _differs(one: Collective, other: Collective) -> bool:
    slack = _NOTICED * max(one.total_us, other.total_us)
    same = [(c.wire_bytes, c.trip_count, c.asynchronous, c.counted) for c in (one, other)]
    return same[0] != same[1] or abs(one.total_us - other.total_us) > slack


def _operations(before: OverlapReport, after: OverlapReport) -> tuple[tuple[str, float, float], ...]:
    one, other = _by_place(before.operations), _by_place(after.operations)
    least = _NOTICED * max(before.us, after.us) / 10
    found = [(words.label(*key[:2]), one.get(key, 0.0), other.get(key, 0.0)) for key in dict.fromkeys([*one, *other])]
    found = [f for f in found if abs(f[1] - f[2]) > max(least, _NOTICED * max(f[1:]))]
    return tuple(sorted(found, key=lambda f: -abs(f[1] - f[2])))


def _by_place(operations: Iterable[Operation]) -> dict[tuple[str, str, str], float]:
    """Time in all by place in the code, HLO name where that is unknown, and opcode; waits are the collectives' business."""
    total: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for o in operations:
        if o.bound != "wire":
            total[o.op_name, "" if o.op_name else o.name, o.opcode] += o.total_us
    return total


def _described(c: Collective) -> str:
    over = f" over {'+'.join(c.axes)}" if c.axes else ""
    what = f"{c.kind}{over} of {words.size(c.wire_bytes)}, {words.runs(c.trip_count)}, waits {words.time(c.total_us)}"
    return what + ("" if c.asynchronous else ", synchronous") + (f" ({words.label(c.op_name, c.name)})")


def _rest(found: tuple[Any, ...]) -> list[Text]:
    return [Text(f"... and {len(found) - _SHOWN} more", style="dim")] if len(found) > _SHOWN else []
