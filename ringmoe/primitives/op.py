"""One primitive of RingMoE, and what JAX asks of a primitive: its results' types, its batching, its lowering.

Every primitive's parameters: `operands`, `results` (names in rules.FAMILIES), `sizes` (factor lengths no shape tells),
`mapped` (leading dims that a vmap added to every array), `axis_name` (tuple, inside the user's shard_map), perhaps `cut` (which
factors that splits, where not those of `rules.MANUAL`),
`implementation`, `placement`, and the op's own static `spec`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding

from ringmoe import rules
from ringmoe.primitives import doors

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BROADCASTING = ("bias", "mask")  # operands whose dims of length 1 stand for any length


@dataclasses.dataclass(frozen=True)
class Op:
    """One primitive, and what the doors need to know of it."""

    name: str
    family: str  # in rules.FAMILIES
    plan: Callable[..., Any]  # (rule, factors, mesh, avals, params) -> plan with .factors
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
            mlir.register_lowering(primitive, functools.partial(doors.lower, self, platform), platform=platform)
        OPS[primitive] = self
        return primitive

    def bind(self, *arrays, **params) -> list[jax.Array]:
        return self.primitive.bind(*arrays, **{"placement": None, "mapped": 0, **params})

    def rule(self, avals, params) -> rules.Rule:
        operands = tuple((name, tuple(aval.shape)) for name, aval in zip(params["operands"], avals, strict=True))
        return rules.make(self.table(params), operands, params["results"], params["sizes"], params["mapped"])

    def table(self, params) -> str:
        """The name of the rules of a call, in rules.FAMILIES."""
        return self.family + (rules.IN_PAGES if "pages" in params["operands"] else "")

    def derive(self, jvp: Callable, transpose: Callable | None = None) -> None:
        """Gives the primitive its derivative rules, as JAX's interpreters call them:

        `jvp(primals, tangents, **params) -> (results, tangents)`;
        `transpose(cotangents, *operands, **params) -> cotangents`, of the operands in which the op is linear.
        """
        ad.primitive_jvps[self.primitive] = jvp
        if transpose is not None:
            ad.primitive_transposes[self.primitive] = transpose

    def differentiate_plainly(self, primals, tangents, **params):
        """A jvp rule: JAX differentiates the op's own schedule, in plain operations, to any order.

        The sharding is what is known while tracing; where only XLA's partitioner would know it, XLA partitions.
        """
        avals = [jax.typeof(x) for x in primals]
        run = doors.plain(self, avals, params, _abstract_eval(self, *avals, **params))
        inexact = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.inexact)]

        def of_inexact(*xs):
            arrays = list(primals)
            for i, x in zip(inexact, xs):
                arrays[i] = x
            return run(*arrays)

        instantiated = [ad.instantiate_zeros(tangents[i]) for i in inexact]
        return jax.jvp(of_inexact, [primals[i] for i in inexact], instantiated)


OPS: dict[Primitive, Op] = {}


def _impl(op: Op, *arrays, **params):
    # A primitive is compiled even where functions are not. jax_debug_nans would run it again without jit, which ends here:
    # what is not finite is seen in the next operation (an LSE of -inf, of a row without keys, is no mistake).
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _jitted(op, tuple(params.items()))(*arrays)


@functools.cache
def _jitted(op: Op, params):
    return jax.jit(functools.partial(op.primitive.bind, **dict(params)))


def _abstract_eval(op: Op, *avals, **params):
    rule = op.rule(avals, params)
    mesh, factors = doors.mesh_of(avals), doors.factors_in_types(rule, avals)
    found = None if factors is None else doors.find(op, avals, params)
    plan_factors = {} if found is None else dict(found.plan.factors)

    def result(name, dims):
        if name in params["operands"]:
            return avals[params["operands"].index(name)].strip_weak_type()
        shape = rule.shape(dims)
        spec = rules.spec_of(dims, doors.explicit_only(plan_factors, mesh))
        sharding = NamedSharding(mesh, rules.dividing(spec, shape, mesh.shape))
        manual, theirs = avals[0].manual_axis_type, {factor for dim in dims for factor in dim}
        if params["axis_name"] and not theirs & {*doors.cut(op, params)}:  # alike on all these devices
            manual = manual.update(varying=manual.varying - {*params["axis_name"]})
        return avals[0].update(
            shape=shape, dtype=op.dtype(name, avals), weak_type=False, sharding=sharding, manual_axis_type=manual
        )

    return [result(name, dims) for name, dims in zip(params["results"], rule.results)]


def _batch(op: Op, arrays, dims, **params):
    """A mapped axis becomes one more batch dim; or, where an array has none (weights), one dim in front of every array."""
    words = lambda name: rules.text(op.table(params), name)
    bare = [name for name, dim in zip(params["operands"], dims) if dim is not None and "..." not in words(name)]
    in_front = params["mapped"] > 0 or bare or any("..." not in words(name) for name in params["results"])
    (length,) = {x.shape[dim] for x, dim in zip(arrays, dims) if dim is not None}

    def lead(name, x, dim):
        if dim is not None:
            return jnp.moveaxis(x, dim, 0)
        if not in_front and "..." not in words(name):
            return x
        once = not in_front and name in BROADCASTING and name not in params["results"]
        return jnp.broadcast_to(x[None], (1 if once else length, *x.shape))

    params |= {"mapped": params["mapped"] + bool(in_front)}
    outs = op.primitive.bind(*map(lead, params["operands"], arrays, dims), **params)
    return outs, [0] * len(outs)
