"""The attention primitives and the derivatives that tie them together."""

import dataclasses
import math
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from ringmoe import meshes, pallas, rules
from ringmoe.errors import Unsuited
from ringmoe.interface import ATTENTION_LSE, ATTENTION_OUTPUT, AttentionSpec, Extras
from ringmoe.pallas import ring_tpu
from ringmoe.pallas.hopper import is_hopper
from ringmoe.plan import attention as plan
from ringmoe.plan import cost
from ringmoe.plan.attention import AttentionPlan
from ringmoe.plan.base import freeze
from ringmoe.primitives.op import Op
from ringmoe.schedule import attention as schedule
from ringmoe.schedule.ring import BY_XLA, BY_XLA_IN_PAIRS, Travel

INPUTS = ("query", "key", "value")
FEW = 32  # queries for which a kernel for many, made for 128 and more, takes longer than one for few, or XLA's
RESULTS = ("output", "lse", "lse_tail")
SAVED = ("lse", "lse_tail", "output_cotangent", "delta")  # what BACKWARD takes after the inputs
RESIDUALS = (ATTENTION_OUTPUT, ATTENTION_LSE, ATTENTION_LSE)  # of RESULTS


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call."""

    spec: AttentionSpec
    exchange: str = "auto"
    implementation: str | None = None
    axis_name: tuple[str, ...] = ()
    cut: tuple[str, ...] = rules.MANUAL["attention"]  # what axis_name splits


def attention(call: Call, query, key, value, extras: Extras):
    """`(output, lse)` of checked operands [*batch, T, N, H], [*batch, S, K, H]; lse [*batch, T, N].

    Differentiable to any order: FORWARD's jvp is TANGENT, a linear op; TANGENT's transpose is BACKWARD; the derivatives of
    those two are left to JAX.
    """
    present = {name: x for name, x in extras._asdict().items() if x is not None}
    output, lse, _ = FORWARD.bind(
        query,
        key,
        value,
        *present.values(),
        operands=(*INPUTS, *present),
        results=RESULTS,
        sizes=(),
        axis_name=call.axis_name,
        cut=call.cut,
        implementation=call.implementation,
        spec=call.spec,
        exchange=call.exchange,
    )
    return output, lse


def _forward_jvp(primals, tangents, **params):
    if params["axis_name"] and params["cut"] != rules.MANUAL["attention"]:
        raise NotImplementedError(
            "decode_attention(axis_name=...) has no derivatives: inside a shard_map queries that all devices have, and their "
            "cotangents, count once or once a device, which nothing here can know. Call it outside of the shard_map"
        )
    if "pages" in params["operands"]:
        return FORWARD.differentiate_plainly(primals, tangents, **params)
    results = FORWARD.primitive.bind(*primals, **params)
    # Under these names a rematerialised layer may keep what its backward pass needs, and not run the ring again.
    results = [checkpoint_name(x, name) for x, name in zip(results, RESIDUALS)]
    names = params["operands"]
    moving = {f"{name}_tangent": t for name, t in zip(names, tangents) if type(t) is not ad.Zero}
    operands = (*names, *RESULTS, *moving)
    output, lse = TANGENT.primitive.bind(
        *primals, *results, *moving.values(), **params | {"operands": operands, "results": RESULTS[:2]}
    )
    return results, [output, lse, ad.Zero(jax.typeof(results[2]).to_tangent_aval())]


def _tangent_transpose(cotangents, *arrays, **params):
    named = dict(zip(params["operands"], arrays))
    asked = [name for name, x in named.items() if ad.is_undefined_primal(x)]
    assert all(name.endswith("_tangent") for name in asked), asked
    do, dlse = (ad.instantiate_zeros(ct) for ct in cotangents)
    lse, output = named["lse"], named["output"]
    # ds = p (dp - delta) with delta = sum_h do o - dlse: a cotangent of the LSE is one more term of delta.
    delta = jnp.sum(do.astype(lse.dtype) * output.astype(lse.dtype), -1) - dlse
    kept = {n: x for n, x in named.items() if not n.endswith("_tangent") and n not in RESULTS}
    inputs, sinks = {name: kept.pop(name) for name in INPUTS}, kept.pop("sinks", None)
    operands = inputs | dict(zip(SAVED, (lse, named["lse_tail"], do, delta))) | kept
    wanted = INPUTS + (("bias",) if "bias_tangent" in asked else ())
    grads = BACKWARD.primitive.bind(*operands.values(), **params | {"operands": tuple(operands), "results": wanted})
    found = {f"{name}_tangent": grad for name, grad in zip(wanted, grads)}
    if "sinks_tangent" in asked:
        found["sinks_tangent"] = _sinks_gradient(sinks, lse, named["lse_tail"], delta)
    return [found[name] if name in asked else None for name in named]


def _sinks_gradient(sinks, lse, tail, delta):
    """A sink is a logit whose value is 0: its ds = p (0 - delta), summed over all rows [*batch, T, N]."""
    share = jnp.where(jnp.isneginf(sinks), 0, jnp.exp(sinks.astype(lse.dtype) - lse - tail))
    return -jnp.sum(share * delta, range(lse.ndim - 1)).astype(sinks.dtype)


def _plan(rule, factors, mesh, avals, params) -> AttentionPlan:
    operands = params["operands"]
    bias = operands.index("bias") if "bias" in operands else None
    owed = jnp.promote_types(avals[0].dtype, jnp.float32).itemsize if "key" in params["results"] else 0
    kind = meshes.device_kind(mesh)
    found = plan.make(
        rule,
        freeze(factors),
        tuple(mesh.shape.items()),
        params["spec"].band,
        params["exchange"],
        avals[1].dtype.itemsize,
        bias,
        owed,
        kind,
        rows_stay=any(("t",) in dims for name, dims in zip(operands, rule.operands) if name in ("bias", "mask")),
        in_order=not {"query_positions", "key_positions"} & {*operands},
        in_tiles=_in_tiles(params["implementation"], kind),
        slices=params.get("slices", 1),
    )
    # Along axes of the user's shard_map a gradient is one device's share: the shard_map's own transpose adds these up.
    summed = tuple(axis for axis in found.bias_sum_axes if axis not in params["axis_name"])
    return dataclasses.replace(found, bias_sum_axes=summed)


def _in_tiles(implementation: str | None, device_kind: str) -> bool:
    """Whether the kernel will be one in Pallas, as far as is known."""
    chosen = cost.family(device_kind) == "tpu" or is_hopper(device_kind)
    return implementation in ("tpu", "gpu") or (implementation is None and chosen)


def _kernel(plan: AttentionPlan, platform: str, params, query, key, value, extras: Extras):
    """The kernel for one device's arrays, and the spec it runs with."""
    spec = dataclasses.replace(
        params["spec"],
        band=plan.band,
        interpret=platform != "tpu",
        chip=params.get("chip", ""),
        uniform=params.get("uniform", False),
        pieces=plan.pieces,
        bias_gradient="bias" in params["results"],
    )
    head_major = lambda x, heads, length: jax.ShapeDtypeStruct(
        (math.prod(x.shape[:-3]), heads // plan.heads.size, length * plan.heads.size, x.shape[-1]), x.dtype
    )
    q = head_major(query, query.shape[-2], query.shape[-3] * plan.joint_parts)
    met = key.shape[-3] * (plan.size if plan.exchange == "all_gather" else 1) // max(plan.parts, plan.own_parts)
    k, v = (head_major(x, max(x.shape[-2], plan.heads.size), met) for x in (key, value))

    def accepts(kernel: ModuleType):
        kernel.check(spec, q, k, v, extras)
        if params["results"] != RESULTS and not hasattr(kernel, "backward"):
            raise Unsuited(f"{kernel.__name__} has no backward pass")

    keys = k.shape[2] * (1 if extras.pages is None else extras.pages.shape[-1])
    few = q.shape[2] < FEW and 8 * q.shape[2] <= keys
    return pallas.pick("attention", platform, params["implementation"], accepts, few), spec


def _travel(plan: AttentionPlan, platform: str, params) -> Travel:
    """By remote DMA where the plan says so, but not in what JAX differentiates or XLA partitions further, nor where the same
    call is lowered for another platform too."""
    if platform == "cpu" or params.get("uniform"):
        return BY_XLA
    if platform != "tpu" or not plan.remote:
        return BY_XLA_IN_PAIRS
    return Travel(
        lambda ring, trees, others, distance=1: ring_tpu.start(ring.axes, trees, others, distance),
        lambda ring, under_way, after: ring_tpu.finish(under_way, after),
    )


def _forward_body(plan: AttentionPlan, platform: str, params):
    def run(query, key, value, *rest):
        extras = Extras(**dict(zip(params["operands"][3:], rest)))
        kernel, spec = _kernel(plan, platform, params, query, key, value, extras)
        travel = _travel(plan, platform, params)
        return list(schedule.forward(plan, kernel, spec, query, key, value, extras, travel))

    return run


def _backward_body(plan: AttentionPlan, platform: str, params):
    def run(query, key, value, lse, tail, do, delta, *rest):
        extras = Extras(**dict(zip(params["operands"][len(INPUTS) + len(SAVED) :], rest)))
        kernel, spec = _kernel(plan, platform, params, query, key, value, extras)
        travel = _travel(plan, platform, params)
        *grads, dbias = schedule.backward(plan, kernel, spec, query, key, value, lse, tail, do, delta, extras, travel)
        return grads if dbias is None else [*grads, dbias]

    return run


def _tangent_body(plan: AttentionPlan, platform: str, params):
    """The forward body pushed forward by JAX: plain operations, one walk round the same ring."""
    names = tuple(n for n in params["operands"] if not n.endswith("_tangent") and n not in RESULTS)
    forward = _forward_body(
        dataclasses.replace(plan, remote=False), platform, params | {"operands": names, "implementation": "xla"}
    )

    def run(*arrays):
        named = dict(zip(params["operands"], arrays))
        moving = {n: named[f"{n}_tangent"] for n in names if f"{n}_tangent" in named}
        of_moving = lambda *xs: forward(*(dict(zip(moving, xs)).get(n, named[n]) for n in names))
        _, tangents = jax.jvp(of_moving, [named[n] for n in moving], list(moving.values()))
        return tangents[:2]

    return run


def _dtype(result: str, avals):
    return avals[0].dtype if result == "output" else jnp.promote_types(avals[0].dtype, jnp.float32)


FORWARD = Op("attention", "attention", _plan, _forward_body, _dtype)
TANGENT = Op("attention_tangent", "attention", _plan, _tangent_body, _dtype)
BACKWARD = Op("attention_backward", "attention", _plan, _backward_body)
FORWARD.derive(_forward_jvp)
TANGENT.derive(TANGENT.differentiate_plainly, _tangent_transpose)
BACKWARD.derive(BACKWARD.differentiate_plainly)
