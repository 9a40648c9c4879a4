"""`ringmoe.explain`: how every op of a function was partitioned, over which axes, why, and what it takes on a machine."""

import collections
import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from ringmoe.errors import check
from ringmoe.inspector.inspect import arrange, inspect
from ringmoe.inspector.report import OverlapReport
from ringmoe.inspector.words import time
from ringmoe.lowering.jit import Jitted, jit
from ringmoe.lowering.rows import Row, read, timed

JITTED = (Jitted, type(jax.jit(lambda: None)))  # they trace by themselves, as they will when called


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `rows` in program order, and with a target the `report` of the whole; `str()` is a table."""

    rows: tuple[Row, ...]
    report: OverlapReport | None = None

    def __str__(self) -> str:
        words = ["op", "calls", "where", "operands", "exchange", "over", "sends", "why"]
        title = "RingMoE ops"
        if self.report is not None:
            words[7:7] = ["takes", "waits"]
            title += f" in a step of {time(self.report.us)} on {self.report.target}"
        table = Table(*words, title=title)
        for row, count in collections.Counter(self.rows).items():
            sends = f"{row.wire_bytes / 2**20:.2f} MiB" if row.wire_bytes else "-"
            cells = [row.op, str(count), row.where, row.shapes, row.exchange, ", ".join(row.axes) or "-", sends]
            if self.report is not None:
                cells += ["-" if us is None else time(us) for us in (row.us, row.exposed_us)]
            table.add_row(*cells, f"{row.reason} (found by: {row.door})")
        out = Console(file=io.StringIO(), width=160)
        out.print(table if self.rows else "no RingMoE op found")
        return out.file.getvalue()  # type: ignore[attr-defined]


def explain(
    fun: Callable,
    *args: Any,
    target: str | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    **kwargs: Any,
) -> Explanation:
    """Tells what was found in `fun` and how each op is partitioned; for a target also what each takes there.

    Args:
      fun: a function, `jax.jit(fun)`, `ringmoe.jit(fun)`, or what another library's jit made of it (Flax's `nnx.jit`,
        Equinox's `eqx.filter_jit`). A plain function is taken as `ringmoe.jit(fun)`.
      args, kwargs: as for a call; arrays or `jax.ShapeDtypeStruct`s with shardings. Models that are pytrees (of Flax NNX,
        Equinox) may hold leaves of any type, which stay as they are, unless jax.jit or ringmoe.jit would refuse the call.
      target, mesh: a machine to compile for and axis sizes over it, as of `ringmoe.inspect`; None compiles nothing.

    Returns:
      An `Explanation`; print it. Under `jax.jit` with Auto axes the rows say "partitioner": XLA decides while it compiles.
      With a target each row has `us` and `exposed_us`, microseconds of a device in one run that `fun`'s instructions of that
      op and line take and wait, and the explanation the `report` of the whole run.

    Raises:
      ValueError: a mesh without a target.
      Exception: what tracing `fun` raises, and compiling it for a target.
    """
    check(
        mesh is None or target is not None,
        "mesh= without target=, expected the machine that it is a mesh of: pass both",
    )
    while isinstance(fun, functools.partial):
        fun, args, kwargs = fun.func, (*fun.args, *args), {**fun.keywords, **kwargs}
    if target is None:
        return Explanation(read(_trace(fun, args, kwargs).jaxpr))
    machine, grid, (fun, args, kwargs) = arrange(target, mesh, (fun, args, kwargs))
    with jax.set_mesh(grid):
        traced = _trace(fun, args, kwargs)
        report = inspect(traced.lower(), target=machine.name, mesh=grid)
    return Explanation(timed(read(traced.jaxpr), report), report)


def _trace(fun: Any, args, kwargs) -> jax.stages.Traced:
    return fun.trace(*args, **kwargs) if isinstance(fun, JITTED) else _trace_arrays(fun, args, kwargs)


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
