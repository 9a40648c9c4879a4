"""Finding every op's sharding with Shardy, before XLA runs.

jaxpr ─► ops replaced by probes ─► lowered ─► Shardy's propagation ─► axes of each operand ─► factors of each op
"""

import itertools
from collections.abc import Callable

from jax.extend.mlir import passmanager
from jax.sharding import AbstractMesh

from ringmoe.lowering.walk import map_ops, ops
from ringmoe.plan import freeze
from ringmoe.primitives import probe
from ringmoe.primitives.doors import OPS, Placement, factors_in_types

PIPELINE = "builtin.module(sdy-propagation-pipeline)"


def propagate(jaxpr, mesh: AbstractMesh, lower: Callable):
    """`jaxpr` with a `Placement` in every op that needs one.

    `lower(jaxpr)` lowers a jaxpr as the caller will at last: same shardings of arguments and results. Ops whose operand
    types tell their sharding (Explicit axes) keep `placement=None`.
    """
    numbers = itertools.count()
    module = lower(map_ops(jaxpr, lambda eqn: None if _typed(eqn) else probe.Probe(next(numbers)))).compiler_ir(
        "stablehlo"
    )
    with module.context:
        passmanager.PassManager.parse(PIPELINE).run(module.operation)
        found = probe.read(module)
    numbers = itertools.count()

    def place(eqn):
        return None if _typed(eqn) else _placement(eqn, next(numbers), mesh, found)

    return map_ops(jaxpr, place)


def needs(jaxpr) -> bool:
    """Whether the jaxpr holds an op whose sharding isn't in its operands' types."""
    return any(not _typed(eqn) for eqn in ops(jaxpr))


def _typed(eqn) -> bool:
    avals = [var.aval for var in eqn.invars]
    return factors_in_types(OPS[eqn.primitive].rule(avals, eqn.params), avals) is not None


def _placement(eqn, number: int, mesh: AbstractMesh, found) -> Placement:
    op, avals = OPS[eqn.primitive], [var.aval for var in eqn.invars]
    outs = [var.aval for var in eqn.outvars]
    nowhere = lambda aval: ((),) * aval.ndim
    specs = [found.get((number, i), nowhere(aval)) for i, aval in enumerate(avals)]
    specs += [found.get((number, -1 - i), nowhere(aval)) for i, aval in enumerate(outs)]
    return Placement(mesh, freeze(op.rule(avals, eqn.params).factor_axes(specs, mesh.shape)))
