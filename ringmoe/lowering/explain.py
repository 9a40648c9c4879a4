"""`ringmoe.explain`: how every op of a function was partitioned, over which axes, and why."""

import collections
import dataclasses
import io
from collections.abc import Callable
from typing import Any

from jax.extend import source_info_util
from rich.console import Console
from rich.table import Table

from ringmoe.lowering.jit import jit
from ringmoe.lowering.walk import ops
from ringmoe.primitives.doors import find
from ringmoe.primitives.op import OPS


@dataclasses.dataclass(frozen=True)
class Row:
    """One op of the traced function (one line in a scan's body is one row, however often it runs)."""

    op: str
    where: str  # folder/file:line:column (function) of the caller
    shapes: str
    exchange: str  # "ring", "all_gather", "all_to_all", "sum", "local", or "partitioner" where XLA decides later
    axes: tuple[str, ...]
    door: str  # which door found the sharding, see ringmoe/primitives/doors.py
    wire_bytes: int  # sent per device in one forward pass of the op
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `rows` in program order; `str()` is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = Table("op", "calls", "where", "operands", "exchange", "over", "sends", "why", title="RingMoE ops")
        for row, count in collections.Counter(self.rows).items():
            sends = f"{row.wire_bytes / 2**20:.2f} MiB" if row.wire_bytes else "-"
            why = f"{row.reason} (found by: {row.door})"
            over = ", ".join(row.axes) or "-"
            table.add_row(row.op, str(count), row.where, row.shapes, row.exchange, over, sends, why)
        out = Console(file=io.StringIO(), width=160)
        out.print(table if self.rows else "no RingMoE op found")
        return out.file.getvalue()  # type: ignore[attr-defined]


def explain(fun: Callable, *args, **kwargs) -> Explanation:
    """Tells what was found in `fun` and how each op is partitioned, without compiling it.

    Args:
      fun: a function, `jax.jit(fun)` or `ringmoe.jit(fun)`. A plain function is taken as `ringmoe.jit(fun)`.
      args, kwargs: as for a call; arrays or `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      An `Explanation`; print it. Under `jax.jit` with Auto axes the rows say "partitioner": XLA decides while it compiles.

    Raises what tracing `fun` raises.
    """
    jitted: Any = fun if hasattr(fun, "trace") else jit(fun)
    return Explanation(tuple(_row(eqn) for eqn in ops(jitted.trace(*args, **kwargs).jaxpr)))


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
        why = "XLA tells while it compiles; ringmoe.jit knows before"
        return Row(op.name, where, shapes, "partitioner", (), "partitioner", 0, why)
    plan = found.plan
    return Row(op.name, where, shapes, plan.exchange, tuple(plan.axes), found.door, plan.wire_bytes, plan.reason)
