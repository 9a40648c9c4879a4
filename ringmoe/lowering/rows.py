"""One row for each op of a traced function: what `explain` tabulates and `ringmoe.jit` logs."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from absl import logging
from jax.extend import source_info_util

from ringmoe.inspector.report import OverlapReport
from ringmoe.inspector.timeline import Collective
from ringmoe.lowering.walk import ops
from ringmoe.primitives.doors import find, scope
from ringmoe.primitives.op import OPS


@dataclasses.dataclass(frozen=True)
class Row:
    """One op of the traced function (one line in a scan's body is one row, however often it runs)."""

    op: str
    where: str  # folder/file:line:column (function) of the caller
    shapes: str
    exchange: (
        str  # "ring", "all_gather", "all_to_all", "merge", "sum", "local", or "partitioner" where XLA decides later
    )
    axes: tuple[str, ...]
    door: str  # which door found the sharding, see ringmoe/primitives/doors.py
    wire_bytes: int  # sent per device in one forward pass of the op
    reason: str
    # For a target: what all calls of the op in that line take of a device in a run, waiting included, and the waiting.
    us: float | None = None
    exposed_us: float | None = None

    def __str__(self) -> str:
        over = f" over {', '.join(self.axes)}" if self.axes else ""
        return f"{self.op} at {self.where}: {self.exchange}{over}: {self.reason} (found by: {self.door})"


def read(jaxpr) -> tuple[Row, ...]:
    """A row for each op of `jaxpr`, nested ones too, in program order."""
    return tuple(_row(eqn) for eqn in ops(jaxpr))


def timed(rows: Iterable[Row], report: OverlapReport) -> tuple[Row, ...]:
    """The rows with the times that the report has for their ops; without, where the program tells of none of its own."""
    return tuple(_timed(row, report) for row in rows)


def _timed(row: Row, report: OverlapReport) -> Row:
    line = re.match(r".*?:\d+", row.where)  # of "folder/file:line:column (function)"
    mine = [
        entry
        for timeline in report.timelines
        for entry in (*timeline.operations, *timeline.collectives)
        if f"/{scope(row.op)}/" in entry.op_name and line and f"/{entry.source}".endswith(f"/{line[0]}")
    ]
    waits = sum(entry.total_us for entry in mine if isinstance(entry, Collective))
    us = sum(entry.total_us for entry in mine)
    return dataclasses.replace(row, us=us, exposed_us=waits) if mine else row


def log(jitted: Any, args, kwargs) -> None:
    """At absl's verbosity 1: what `ringmoe.jit` found in a function and did with it, a line for each op."""
    if logging.vlog_is_on(1):
        traced = jitted.trace(*args, **kwargs)
        for line in read(traced.jaxpr) or ("no RingMoE op found",):
            logging.vlog(1, "ringmoe.jit %s: %s", traced.fun_name, line)


def _row(eqn) -> Row:
    op, avals = OPS[eqn.primitive], [var.aval for var in eqn.invars]
    found = find(op, avals, eqn.params)
    shown = [
        (name, a)
        for name, a in zip(eqn.params["operands"], avals)
        if name in ("query", "key", "tokens", "w_in", "rows")
    ]
    shapes = ", ".join(f"{name} {a.dtype.name}[{','.join(map(str, a.shape))}]" for name, a in shown)
    *_, folder, file = ("", *source_info_util.summarize(eqn.source_info).split("/"))
    where = f"{folder}/{file}".lstrip("/")
    if found is None:
        why = "XLA tells while it compiles; ringmoe.jit knows before, of arguments that lie on a mesh"
        return Row(op.name, where, shapes, "partitioner", (), "partitioner", 0, why)
    plan = found.plan
    return Row(op.name, where, shapes, plan.exchange, tuple(plan.axes), found.door, plan.wire_bytes, plan.reason)
