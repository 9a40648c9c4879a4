"""`ringmoe.explain`: how every op of a function was partitioned, over which axes, and why."""

import collections
import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from rich.console import Console
from rich.table import Table

from ringmoe.lowering.jit import Jitted, jit
from ringmoe.lowering.rows import Row, read

JITTED = (Jitted, type(jax.jit(lambda: None)))  # they trace by themselves, as they will when called


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
      fun: a function, `jax.jit(fun)`, `ringmoe.jit(fun)`, or what another library's jit made of it (Flax's `nnx.jit`,
        Equinox's `eqx.filter_jit`). A plain function is taken as `ringmoe.jit(fun)`.
      args, kwargs: as for a call; arrays or `jax.ShapeDtypeStruct`s with shardings. Models that are pytrees (of Flax NNX,
        Equinox) may hold leaves of any type, which stay as they are, unless jax.jit or ringmoe.jit would refuse the call.

    Returns:
      An `Explanation`; print it. Under `jax.jit` with Auto axes the rows say "partitioner": XLA decides while it compiles.

    Raises what tracing `fun` raises.
    """
    while isinstance(fun, functools.partial):
        fun, args, kwargs = fun.func, (*fun.args, *args), {**fun.keywords, **kwargs}
    traced = fun.trace(*args, **kwargs) if isinstance(fun, JITTED) else _trace_arrays(fun, args, kwargs)
    return Explanation(read(traced.jaxpr))


def _trace_arrays(fun: Any, args, kwargs) -> jax.stages.Traced:
    """Traces `fun` over the array leaves of itself and its arguments; other leaves are closed over."""
    leaves, tree = jax.tree.flatten((fun, args, kwargs))
    is_array = lambda leaf: hasattr(leaf, "shape") and hasattr(leaf, "dtype")

    def of_arrays(*arrays):
        remaining = iter(arrays)
        fun, args, kwargs = tree.unflatten(next(remaining) if is_array(leaf) else leaf for leaf in leaves)
        out = fun(*args, **kwargs)
        # What the call changed in place (a Flax NNX model) is a result too: the ops that made it would be dead code.
        changed = [x for x in jax.tree.leaves((fun, args, kwargs)) if not any(x is array for array in arrays)]
        return [x for x in jax.tree.leaves(out) + changed if isinstance(x, jax.core.Tracer)]

    # What can be lowered is compiled by its library's jit, which is jax.jit underneath: its ops are placed as there.
    wrap = jax.jit if hasattr(fun, "lower") else jit
    return wrap(of_arrays).trace(*filter(is_array, leaves))
