"""From a bound op to per-device code: one room, and the doors that find how its operands are sharded.

lowering ─► a door finds factor -> mesh axes ─► op.plan ─► arrays padded to what the axes divide
         ─► op.body(plan) inside a shard_map whose specs are the plan's factors ─► padding cut off

ringmoe.jit  wrote the factors into the parameter `placement`
manual       inside the user's shard_map: `axis_name`, and the types of axes that are still Explicit there
types        Explicit axes: the operands' types tell
partitioner  Auto axes under plain jax.jit: custom_partitioning asks back when XLA has propagated; not on TPU
whole        one device; or the fallback on TPU: XLA's partitioner gathers what it must, with a warning
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from ringmoe import compat, meshes, pallas, rules
from ringmoe.errors import check, warn_once
from ringmoe.inspector.chips import chip_of
from ringmoe.meshes import Axes
from ringmoe.plan.base import Factors
from ringmoe.primitives import probe

NO_MESH = AbstractMesh((), ())
BETTER_DOORS = (
    "compile with ringmoe.jit as the outermost transformation, as in ringmoe.jit(jax.grad(f)), or make the mesh axes "
    "Explicit (jax.make_mesh's default)"
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one call is spread over a mesh, found before lowering."""

    mesh: AbstractMesh
    factors: Factors
    slices: int = 1  # of TPUs


class Found(NamedTuple):
    """What a door found: the plan on `mesh`, the axes of it that are still to be split, and the door's name."""

    plan: Any
    mesh: AbstractMesh
    free: frozenset[str]
    door: str

    @property
    def xla_knows_more(self) -> bool:
        """Whether there are Auto axes left, inside the user's shard_map, of which only XLA will know what they split."""
        return not self.free and set(self.mesh.axis_names) > set(self.mesh.manual_axes)


def mesh_of(avals) -> AbstractMesh:
    """The mesh in the operands' types. An operand made inside the function may have none, unless the mesh is set."""
    found = [aval.sharding.mesh for aval in avals]
    return next((mesh for mesh in found if not mesh.empty), found[0])


def explicit_only(factors: Mapping[str, Axes], mesh: AbstractMesh) -> dict[str, Axes]:
    """The factors' axes that types may name."""
    explicit = {a for a, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    return {factor: tuple(a for a in axes if a in explicit) for factor, axes in factors.items()}


def factors_in_types(rule: rules.Rule, avals) -> dict[str, Axes] | None:
    """The types' door: each factor's axes, or None where no operand's type tells."""
    mesh = mesh_of(avals)
    if AxisType.Explicit not in mesh.axis_types:
        return None
    return rule.factor_axes([rules.axes_of(a.sharding.spec, a.ndim) for a in avals], mesh.shape)


def find(op, avals, params) -> Found | None:
    """The plan of a bound op as far as it is known before XLA runs; None: the partitioner decides."""
    rule, mesh, placement = op.rule(avals, params), mesh_of(avals), params["placement"]
    free, known, door = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes), factors_in_types(rule, avals), "types"
    if isinstance(placement, Placement):
        known, door = dict(placement.factors), "ringmoe.jit"
        if not mesh.manual_axes:
            mesh, free = placement.mesh, frozenset(placement.mesh.axis_names)
    if params["axis_name"] or mesh.manual_axes:
        # The device's own slices: what `axis_name` splits comes first, then what the axes that are left split of a slice.
        names = cut(op, params)
        inner = rule.evenly(names, known or {}, mesh.shape)
        rule = rule.scaled(names, math.prod(mesh.shape[a] for a in params["axis_name"]))
        factors = inner | {f: params["axis_name"] + inner.get(f, ()) for f in names}
        free, known, door = frozenset() if known is None else free, factors, "manual"
    if known is None:
        return None
    placed = isinstance(placement, Placement)
    slices = placement.slices if placed else meshes.slices(compat.with_its_devices(mesh))
    return Found(op.plan(rule, known, mesh, avals, params | {"slices": slices}), mesh, free, door)


def cut(op, params) -> tuple[str, ...]:
    """The factors that `axis_name` splits, inside the user's shard_map."""
    return params.get("cut", rules.MANUAL[op.family]) if params["axis_name"] else ()


def lower(op, platform: str, ctx, *operands, **params):
    """The lowering rule of every op."""
    avals, placement = ctx.avals_in, params["placement"]
    rule, params = op.rule(avals, params), params | {"chip": chip_of(compat.device_kind(ctx)) or ""}
    if isinstance(placement, probe.Probe):
        return probe.emit(placement, rule, operands, ctx.avals_out)
    found, platform = find(op, avals, params), pallas.platform_of(platform, compat.device_kind(ctx))
    if found is not None:
        if found.xla_knows_more:
            params = params | _for_xla_inside(op, found.plan, platform)
        # The mesh that is set may be another: a coarser one, or none while lowering.
        run = functools.partial(
            _in_mesh, found.mesh, _sharded(op, rule, found, platform, params, ctx.avals_out, checked=False)
        )
    elif (getattr(ctx.module_context.axis_context, "num_devices", None) or 1) == 1:
        run = body(op, op.plan(rule, {}, NO_MESH, avals, params), platform, params)
    elif platform == "tpu":
        run = _whole(op, rule, avals, platform, params)
    else:
        check(not ctx.module_context.lowering_parameters.for_export, _not_serializable(op))
        run, ctx = _partitioned(op, rule, avals, platform, params), compat.with_device_assignment(ctx)
    # The compiled program's instructions tell which op they are of: `explain` adds their times up.
    return mlir.lower_fun(jax.named_scope(scope(op.name))(run), multiple_results=True)(ctx, *operands)


def scope(name: str) -> str:
    """What the compiled instructions of an op have in their names."""
    return f"ringmoe.{name}"


def _in_mesh(mesh: AbstractMesh, run: Callable, *arrays):
    with jax.sharding.use_abstract_mesh(compat.in_the_mesh_that_is_set(mesh).abstract_mesh):
        return run(*arrays)


def plain(op, avals, params, avals_out) -> Callable:
    """The op as an ordinary function that JAX can differentiate, called while tracing."""
    params = params | {"implementation": "xla", "uniform": True}
    rule, found = op.rule(avals, params), find(op, avals, params)
    if found is not None:
        return _sharded(op, rule, found, "cpu", params, avals_out, checked=True)
    return body(op, op.plan(rule, {}, NO_MESH, avals, params), "cpu", params)


def body(op, plan, platform: str, params) -> Callable:
    """The function of one device's arrays, mapped as often as the op was."""
    run = op.body(plan, platform, params)
    for _ in range(params["mapped"]):
        run = jax.vmap(run)

    def unprompted(*arrays):
        with jax.numpy_rank_promotion("allow"):  # what a user asks of user code is nothing to ours
            return run(*arrays)

    return unprompted


def _sharded(op, rule, found: Found, platform: str, params, avals_out, checked: bool) -> Callable:
    """The op as a shard_map over the mesh's free axes: operands are brought to the plan's specs, results to their types.

    A shard_map has no transpose inside one of the user's that checks what varies, unless it is `checked` too; what is only
    lowered needs none, and has bodies whose results JAX can't see to be alike on all devices.
    """
    run, mesh = body(op, found.plan, platform, params), found.mesh
    if not found.free:
        return run
    factors = {f: tuple(a for a in axes if a in found.free) for f, axes in found.plan.factors}
    old, new = dict(rule.sizes), dict(rule.fitted(factors, mesh.shape).sizes)
    in_specs = [rules.spec_of(dims, factors) for dims in rule.operands]
    out_specs = [rules.spec_of(dims, factors) for dims in rule.results]
    explicit = AxisType.Explicit in mesh.axis_types
    local = functools.partial(
        jax.shard_map, run, mesh=compat.in_the_mesh_that_is_set(mesh), in_specs=tuple(in_specs), out_specs=out_specs,
        axis_names=found.free,
    )  # fmt: skip

    def place(x, spec):
        return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if explicit else x

    def resting(dims):  # a dim is whole while its length changes: no type tells of uneven parts
        return rules.spec_of([() if rules.changes(dim, old, new) else dim for dim in dims], factors)

    def placed(*arrays):
        grown = []
        for x, name, dims, spec in zip(arrays, params["operands"], rule.operands, in_specs):
            x = rules.grow(place(x, resting(dims)), dims, old, new, rules.FILL.get(name, 0))
            grown.append(place(x, spec))
        results = local(check_vma=checked and compat.varies(arrays))(*grown)
        outs = [rules.shrink(place(x, resting(dims)), dims, old, new) for x, dims in zip(results, rule.results)]
        return [x if aval.sharding.mesh.empty else place(x, aval.sharding.spec) for x, aval in zip(outs, avals_out)]

    return placed


class _Partition:
    """What XLA's partitioner calls: the shardings it found -> the op's local program, and the shardings that it wants.

    JAX hands over XLA's own tilings: a mesh axis that is split over two dims has no name in the user's mesh. XLA pads
    what its tiles don't divide, with anything, so the padding is cleared first.
    """

    def __init__(self, op, rule, avals, platform: str, params):
        self.op, self.rule, self.avals, self.platform, self.params = op, rule, avals, platform, params

    def __call__(self, _, operands, results):
        arrays = [*operands, *results]
        mesh, size = mesh_of(self.avals), arrays[0].sharding.num_devices
        named = mesh.shape if mesh.size == size else {"devices": size}
        digits = [compat.digits_of(x.sharding, len(x.shape)) for x in arrays]
        fine, told = meshes.refine(named, self.rule.cut(digits), mesh.abstract_device)
        specs = [((),) * len(x.shape) if spec is None else spec for x, spec in zip(arrays, told)]
        found = self.rule.factor_axes(specs, fine.shape)
        kept = {f: axes for f, axes in found.items() if not self.rule.splits_a_compound_unevenly(f, axes, fine.shape)}
        plan = self.op.plan(self.rule, kept, fine, self.avals, self.params)
        factors, run = dict(plan.factors), body(self.op, plan, self.platform, self.params)
        place = lambda arrays: tuple(NamedSharding(fine, rules.spec_of(dims, factors)) for dims in arrays)

        def local(*arrays):
            return tuple(run(*(self._cleared(i, x, factors, fine.shape) for i, x in enumerate(arrays))))

        return fine, local, place(self.rule.results), place(self.rule.operands)

    def _cleared(self, index: int, x, factors, mesh_shape):
        """One device's part of an operand with zeros (or what its padding holds) where it ends before the part does."""
        name, dims = self.params["operands"][index], self.rule.operands[index]
        for axis, (dim, length) in enumerate(zip(dims, self.rule.shape(dims))):
            axes = tuple(a for f in dim for a in factors.get(f, ()))
            if x.shape[axis] * math.prod(mesh_shape[a] for a in axes) > length:
                start = jax.lax.axis_index(axes) * x.shape[axis]
                inside = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < length
                x = jnp.where(inside, x, jnp.asarray(rules.FILL.get(name, 0), x.dtype))
        return x

    def __reduce__(self):
        raise TypeError(_not_serializable(self.op))


def _partitioned(op, rule, avals, platform: str, params) -> Callable:
    """The op as a custom_partitioning call: XLA tells the shardings while it partitions."""
    whole = body(op, op.plan(rule, {}, NO_MESH, avals, params), platform, params)
    call = custom_partitioning(lambda *arrays: tuple(whole(*arrays)))
    partition = _Partition(op, rule, avals, platform, params)
    call.def_partition(partition=partition, decode_shardings=False, sharding_rule=str(rule), **rule.compound_sizes)
    return call


def _not_serializable(op) -> str:
    return (
        f"{op.name}: a program with Auto mesh axes under plain jax.jit, which can't be exported or serialized: it holds a "
        f"callback that XLA asks for this op's partitioning. To get one that can, {BETTER_DOORS}"
    )


def _whole(op, rule, avals, platform: str, params) -> Callable:
    """The op as one device would run it, in operations that XLA can partition."""
    params = params | {"implementation": _left_to_xla(op, platform)}
    return body(op, op.plan(rule, {}, NO_MESH, avals, params), platform, params)


def _for_xla_inside(op, plan, platform: str) -> dict:
    """The parameters of a body that XLA partitions further, inside a shard_map over some of the mesh's axes.

    What XLA inserts must run on every device: in a branch that some devices skip, the others would wait for ever.
    """
    uniform = {"uniform": True}
    if platform == "tpu":
        return uniform | {"implementation": _left_to_xla(op, platform)}
    if hasattr(plan, "band") and not plan.band.is_full:
        warn_once(
            f"{op.name} left to XLA",
            "inside a shard_map over some of the mesh's axes XLA may split the work along the others, so pairs that no query "
            f"sees are computed and masked where they would be skipped. To skip them, {BETTER_DOORS}",
        )
    return uniform


def _left_to_xla(op, platform: str) -> str:
    """The implementation in plain XLA operations, which XLA can partition as it can't a Pallas kernel; it warns."""
    warn_once(
        f"{op.name} gathered",
        f"on {platform} plain jax.jit can't tell this op how its operands are sharded (nor can a ringmoe.jit that is called "
        f"inside another jit), so XLA partitions it and may gather them whole. To exchange instead, {BETTER_DOORS}",
    )
    return "xla"
