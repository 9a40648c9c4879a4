"""From a primitive to per-device code: one room, and the doors that find how its operands are sharded.

    bind ─► abstract_eval (Explicit axes: the result's sharding) ─► lowering ─► a door finds factor -> mesh axes
         ─► op.plan ─► op.body(plan) inside a shard_map whose specs are the plan's factors

    ringmoe.jit  wrote the factors into the parameter `placement`
    manual       inside the user's shard_map: `axis_name`
    types        Explicit axes: the operands' types tell
    partitioner  Auto axes under plain jax.jit: custom_partitioning asks back when XLA has propagated; not on TPU
    whole        one device; or the fallback on TPU: XLA's partitioner gathers what it must, with a warning

Every primitive's parameters: `operands`, `results` (names in rules.FAMILIES), `sizes` (factor lengths no shape tells),
`axis_name` (tuple, inside the user's shard_map), `implementation`, `placement`, and the op's own static `spec`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from ringmoe import compat, rules
from ringmoe.errors import warn_once
from ringmoe.plan import Factors
from ringmoe.primitives import probe

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BROADCASTING = ("bias", "mask")  # operands whose dims of length 1 stand for any length


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one call is spread over a mesh, found before lowering."""

    mesh: AbstractMesh
    factors: Factors


@dataclasses.dataclass(frozen=True)
class Op:
    """One primitive, and what the doors need to know of it."""

    name: str
    family: str  # in rules.FAMILIES
    plan: Callable[..., Any]  # (rule, factors, mesh_shape, avals, params) -> plan with .factors
    body: Callable[[Any, str, dict], Callable]  # (plan, platform, params) -> function of one device's arrays
    dtype: Callable[[str, Sequence[Any]], Any] = lambda result, avals: avals[0].dtype  # of results no operand names

    @functools.cached_property
    def primitive(self) -> Primitive:
        primitive = Primitive(f"ringmoe_{self.name}")
        primitive.multiple_results = True
        primitive.def_impl(functools.partial(_impl, self))
        primitive.def_abstract_eval(functools.partial(_abstract_eval, self))
        batching.primitive_batchers[primitive] = functools.partial(_batch, self)
        for platform in PLATFORMS:
            mlir.register_lowering(primitive, functools.partial(_lower, self, platform), platform=platform)
        compat.require_devices(primitive)
        OPS[primitive] = self
        return primitive

    def bind(self, *arrays, **params) -> list[jax.Array]:
        return self.primitive.bind(*arrays, placement=None, **params)

    def rule(self, avals, params) -> rules.Rule:
        operands = tuple((name, tuple(aval.shape)) for name, aval in zip(params["operands"], avals, strict=True))
        return rules.make(self.family, operands, params["results"], params["sizes"])


OPS: dict[Primitive, Op] = {}


def mesh_of(avals) -> AbstractMesh:
    """The mesh in the operands' types. An operand made inside the function may have none, unless the mesh is set."""
    meshes = [aval.sharding.mesh for aval in avals]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def factors_in_types(rule: rules.Rule, avals) -> dict[str, rules.Axes] | None:
    """The types' door: each factor's axes, or None where no operand's type tells."""
    mesh = mesh_of(avals)
    if AxisType.Explicit not in mesh.axis_types or mesh.manual_axes:
        return None
    return rule.factor_axes([rules.axes_of(a.sharding.spec, a.ndim) for a in avals], mesh.shape)


def find_plan(op: Op, avals, params):
    """The plan of a bound op as far as it is known before XLA runs: `(plan, door)`; plan None: the partitioner decides."""
    rule = op.rule(avals, params)
    placement, mesh = params["placement"], mesh_of(avals)
    if params["axis_name"] or mesh.manual_axes:
        size = math.prod(mesh.shape[a] for a in params["axis_name"])
        split = rules.MANUAL[op.family] if params["axis_name"] else ()
        factors = {factor: params["axis_name"] for factor in split}
        return op.plan(rule.scaled(split, size), factors, dict(mesh.shape), avals, params), "manual"
    if isinstance(placement, Placement):
        return op.plan(rule, dict(placement.factors), dict(placement.mesh.shape), avals, params), "ringmoe.jit"
    factors = factors_in_types(rule, avals)
    if factors is not None:
        return op.plan(rule, factors, dict(mesh.shape), avals, params), "types"
    return None, "partitioner"


def _impl(op: Op, *arrays, **params):
    with jax.disable_jit(False):  # a primitive is compiled even where functions are not
        return _jitted(op, tuple(params.items()))(*arrays)


@functools.cache
def _jitted(op: Op, params):
    return jax.jit(functools.partial(op.primitive.bind, **dict(params)))


def _abstract_eval(op: Op, *avals, **params):
    rule = op.rule(avals, params)
    mesh, factors = mesh_of(avals), None if params["axis_name"] else factors_in_types(rule, avals)
    plan = None if factors is None else op.plan(rule, factors, dict(mesh.shape), avals, params)

    def result(name, dims):
        if name in params["operands"]:
            return avals[params["operands"].index(name)].strip_weak_type()
        shape = rule.shape(dims)
        spec = rules.spec_of(dims, dict(plan.factors) if plan else {})
        dtype = op.dtype(name, avals)
        return avals[0].update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(mesh, spec))

    return [result(name, dims) for name, dims in zip(params["results"], rule.results)]


def _batch(op: Op, arrays, dims, **params):
    """A mapped axis becomes one more leading batch dim; ops on arrays without batch dims (weights) are looped."""
    table = rules.FAMILIES[op.family]
    bare = [name for name, dim in zip(params["operands"], dims) if dim is not None and "..." not in table[name]]
    if bare or any("..." not in table[name] for name in params["results"]):
        mapped = [jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims) if dim is not None]

        def one(slices):
            slices = iter(slices)
            full = [x if dim is None else next(slices) for x, dim in zip(arrays, dims)]
            return op.primitive.bind(*full, **params)

        outs = jax.lax.map(one, mapped)
        return outs, [0] * len(outs)
    (length,) = {x.shape[dim] for x, dim in zip(arrays, dims) if dim is not None}

    def lead(name, x, dim):
        if dim is not None:
            return jnp.moveaxis(x, dim, 0)
        if "..." not in table[name]:
            return x
        once = name in BROADCASTING and name not in params["results"]
        return jnp.broadcast_to(x[None], (1 if once else length, *x.shape))

    outs = op.primitive.bind(*map(lead, params["operands"], arrays, dims), **params)
    return outs, [0] * len(outs)


def _lower(op: Op, platform: str, ctx, *operands, **params):
    avals, placement = ctx.avals_in, params["placement"]
    rule = op.rule(avals, params)
    if isinstance(placement, probe.Probe):
        return probe.emit(placement, rule, operands, ctx.avals_out)
    plan, door = find_plan(op, avals, params)
    if door == "manual":
        run = op.body(plan, platform, params)
    elif plan is not None:
        mesh = placement.mesh if door == "ringmoe.jit" else mesh_of(avals)
        run = _sharded(op, rule, plan, mesh, platform, params, ctx.avals_out)
    elif (getattr(ctx.module_context.axis_context, "num_devices", None) or 1) == 1:
        run = op.body(op.plan(rule, {}, {}, avals, params), platform, params)
    elif platform == "tpu" or mesh_of(avals).empty:
        run = _whole(op, rule, avals, platform, params)
    else:
        run = _partitioned(op, rule, avals, platform, params)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _sharded(op: Op, rule, plan, mesh: AbstractMesh, platform: str, params, avals_out) -> Callable:
    """The op as a shard_map over `mesh`; operands are moved to the plan's specs first, results to their types' after."""
    factors = dict(plan.factors)
    in_specs = tuple(rules.spec_of(dims, factors) for dims in rule.operands)
    out_specs = [rules.spec_of(dims, factors) for dims in rule.results]
    local = jax.shard_map(
        op.body(plan, platform, params), mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    explicit = AxisType.Explicit in mesh.axis_types

    def run(*arrays):
        if not explicit:
            return local(*arrays)
        moved = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, in_specs)]
        placed = zip(local(*moved), avals_out)
        return [x if aval.sharding.mesh.empty else jax.sharding.reshard(x, aval.sharding) for x, aval in placed]

    return run


def _partitioned(op: Op, rule, avals, platform: str, params) -> Callable:
    """The op as a custom_partitioning call: XLA tells the shardings while it partitions."""

    def partition(mesh, operands, results):
        specs = [rules.axes_of(x.sharding.spec, len(x.shape)) for x in (*operands, *results)]
        # XLA's partitioner may split a dim in a way nobody asked for: such a dim is gathered, which is said, not refused.
        plan = op.plan(rule, rule.factor_axes(specs, mesh.shape, strict=False), dict(mesh.shape), avals, params)
        factors = dict(plan.factors)
        place = lambda arrays: tuple(NamedSharding(mesh, rules.spec_of(dims, factors)) for dims in arrays)
        body = op.body(plan, platform, params)
        return mesh, lambda *arrays: tuple(body(*arrays)), place(rule.results), place(rule.operands)

    whole = op.body(op.plan(rule, {}, {}, avals, params), platform, params)
    call = custom_partitioning(lambda *arrays: tuple(whole(*arrays)))
    call.def_partition(partition=partition, sharding_rule=str(rule), **rule.compound_sizes)
    return call


def _whole(op: Op, rule, avals, platform: str, params) -> Callable:
    """The op left to XLA's partitioner, in plain XLA operations (a Pallas kernel can't be partitioned)."""
    warn_once(
        f"{op.name} gathered",
        f"on {platform} plain jax.jit can't tell this op how its operands are sharded, so XLA partitions it and may gather "
        "them whole. Compile with ringmoe.jit, or make the mesh axes Explicit (jax.make_mesh's default), to exchange instead",
    )
    return op.body(op.plan(rule, {}, {}, avals, params), platform, params | {"implementation": "xla"})
