"""Finding every op's sharding with Shardy, before XLA runs.

jaxpr ─► ops replaced by probes ─► lowered ─► Shardy's propagation ─► axes of each operand ─► factors of each op
"""

import itertools
from collections.abc import Callable
from typing import Any

from jax.extend.mlir import passmanager
from jax.sharding import AbstractMesh, PartitionSpec

from ringmoe import meshes
from ringmoe.lowering.walk import map_ops, ops
from ringmoe.plan.base import freeze
from ringmoe.primitives import probe
from ringmoe.primitives.doors import Placement, factors_in_types, mesh_of
from ringmoe.primitives.op import OPS

PIPELINE = "builtin.module(sdy-propagation-pipeline)"


def propagate(
    jaxpr, mesh: AbstractMesh, lower: Callable, parts: bool = True, slices: int = 1
) -> tuple[Any, dict[int, PartitionSpec]]:
    """`(jaxpr, specs)`: `jaxpr` with a `Placement` in every op that needs one, and specs for its results.

    There are specs only where an op is placed along a part of a mesh axis: JAX can't name the sharding of a result that
    would lie so, and it gets one of whole axes. `lower(jaxpr)` lowers a jaxpr as the caller will at last: same shardings
    of arguments and results. Ops whose operand types tell their sharding (Explicit axes) keep `placement=None`. Without
    `parts` no op is placed along a part of an axis: what the program hands on is not only its results. `slices` of TPUs are
    what the mesh is over.
    """
    numbers = itertools.count()
    module = lower(map_ops(jaxpr, lambda eqn: None if _typed(eqn) else probe.Probe(next(numbers)))).compiler_ir(
        "stablehlo"
    )
    with module.context:
        passmanager.PassManager.parse(PIPELINE).run(module.operation)
        found, results = probe.read(module), probe.read_results(module)
    numbers = itertools.count()

    def place(eqn):
        return None if _typed(eqn) else _placement(eqn, next(numbers), mesh, found, parts, slices)

    jaxpr = map_ops(jaxpr, place)
    placed = (eqn.params["placement"] for eqn in ops(jaxpr))
    if all(p is None or set(p.mesh.shape) <= set(mesh.shape) for p in placed):
        return jaxpr, {}
    return jaxpr, {i: _whole_axes(mesh, results.get(i)) for i in range(len(jaxpr.outvars))}


def _whole_axes(mesh: AbstractMesh, digits: meshes.Digits | None) -> PartitionSpec:
    """The sharding along those axes of which no part is needed elsewhere."""
    _, (told,) = meshes.refine(mesh.shape, [digits])
    return PartitionSpec(*(tuple(a for a in axes if a in mesh.shape) or None for axes in told or ()))


def needs(jaxpr) -> bool:
    """Whether the jaxpr holds an op whose sharding isn't in its operands' types."""
    return any(not _typed(eqn) for eqn in ops(jaxpr))


def _typed(eqn) -> bool:
    """Whether no propagation is needed: the operands' types tell, or all axes are manual."""
    avals = [var.aval for var in eqn.invars]
    mesh = mesh_of(avals)
    if mesh.manual_axes and set(mesh.manual_axes) == set(mesh.axis_names):
        return True
    return factors_in_types(OPS[eqn.primitive].rule(avals, eqn.params), avals) is not None


def _placement(eqn, number: int, mesh: AbstractMesh, found, parts: bool, slices: int) -> Placement:
    op, avals = OPS[eqn.primitive], [var.aval for var in eqn.invars]
    outs = [var.aval for var in eqn.outvars]
    nowhere = lambda aval: ((),) * aval.ndim
    digits = [found.get((number, i), nowhere(aval)) for i, aval in enumerate(avals)]
    digits += [found.get((number, -1 - i), nowhere(aval)) for i, aval in enumerate(outs)]
    own, rule = mesh_of(avals), op.rule(avals, eqn.params)
    mesh = own if own.manual_axes else mesh  # inside the user's shard_map the mesh is theirs, whole axes alone
    fine, told = meshes.refine(mesh.shape, rule.cut(digits), mesh.abstract_device)
    specs = [nowhere(aval) if spec is None else spec for aval, spec in zip((*avals, *outs), told)]
    if own.manual_axes or not parts:
        free = set(mesh.axis_names) - set(mesh.manual_axes)
        fine, specs = mesh, [tuple(tuple(a for a in axes if a in free) for axes in spec) for spec in specs]
    return Placement(fine, freeze(rule.factor_axes(specs, fine.shape)), slices)
