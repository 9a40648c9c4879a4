"""`ringmoe.explain`: how every op of a function was partitioned, over which axes, and why."""

import collections
import dataclasses
import io
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from ringmoe.lowering.jit import jit
from ringmoe.lowering.rows import Row, read


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
    return Explanation(read(jitted.trace(*args, **kwargs).jaxpr))
