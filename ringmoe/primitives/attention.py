"""The two attention primitives and the derivative that ties them together."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ringmoe import pallas, plan
from ringmoe.interface import AttentionSpec, Extras
from ringmoe.primitives.doors import Op
from ringmoe.schedule import attention as schedule

INPUTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call."""

    spec: AttentionSpec
    exchange: str = "auto"
    implementation: str | None = None
    axis_name: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, query, key, value, extras: Extras):
    """`(output, lse)` of checked operands [*batch, T, N, H], [*batch, S, K, H]; lse [*batch, T, N]. Differentiable."""
    return _forward(call, query, key, value, extras)[0]


def _forward(call: Call, query, key, value, extras: Extras):
    output, lse = _bind(FORWARD, call, (query, key, value), extras, ("output", "lse"))
    return (output, lse), (query, key, value, extras, output, lse)


def _backward(call: Call, residuals, cotangents):
    query, key, value, extras, output, lse = residuals
    do, dlse = cotangents
    # ds = p (dp - delta) with delta = sum_h do o - dlse: a cotangent of the LSE is one more term of delta.
    delta = jnp.sum(do.astype(lse.dtype) * output.astype(lse.dtype), -1) - dlse
    wanted = INPUTS + (("bias",) if extras.bias is not None else ())
    dq, dk, dv, *dbias = _bind(BACKWARD, call, (query, key, value, lse, do, delta), extras, wanted)
    return dq, dk, dv, Extras(*dbias)


attention.defvjp(_forward, _backward)


def _bind(op: Op, call: Call, arrays, extras: Extras, results):
    names = INPUTS if op is FORWARD else (*INPUTS, "lse", "output_cotangent", "delta")
    present = {name: x for name, x in extras._asdict().items() if x is not None}
    return op.bind(
        *arrays,
        *present.values(),
        operands=(*names, *present),
        results=results,
        sizes=(),
        axis_name=call.axis_name,
        implementation=call.implementation,
        spec=call.spec,
        exchange=call.exchange,
    )


def _plan(rule, factors, mesh_shape, avals, params) -> plan.AttentionPlan:
    operands = params["operands"]
    # Inside the user's shard_map a gradient is one device's share: the shard_map's own transpose adds the shares up.
    bias = operands.index("bias") if "bias" in operands and not params["axis_name"] else None
    owed = jnp.promote_types(avals[1].dtype, jnp.float32).itemsize if "key" in params["results"] else 0
    return plan.attention(
        rule,
        plan.freeze(factors),
        tuple(mesh_shape.items()),
        params["spec"].band,
        params["exchange"],
        avals[1].dtype.itemsize,
        bias,
        owed,
    )


def _kernel(plan: plan.AttentionPlan, platform: str, params, query, key, extras: Extras):
    """The kernel for one device's arrays, and the spec it runs with."""
    spec = dataclasses.replace(params["spec"], interpret=platform != "tpu")
    head_major = lambda x, length: jax.ShapeDtypeStruct(
        (math.prod(x.shape[:-3]), x.shape[-2], length, x.shape[-1]), x.dtype
    )
    q = head_major(query, query.shape[-3])
    k = head_major(key, key.shape[-3] * (plan.size if plan.exchange == "all_gather" else 1))
    return pallas.pick(
        "attention", platform, params["implementation"], lambda kernel: kernel.check(spec, q, k, extras)
    ), spec


def _forward_body(plan: plan.AttentionPlan, platform: str, params):
    def run(query, key, value, *rest):
        extras = Extras(**dict(zip(params["operands"][3:], rest)))
        kernel, spec = _kernel(plan, platform, params, query, key, extras)
        return list(schedule.forward(plan, kernel, spec, query, key, value, extras))

    return run


def _backward_body(plan: plan.AttentionPlan, platform: str, params):
    def run(query, key, value, lse, do, delta, *rest):
        extras = Extras(**dict(zip(params["operands"][6:], rest)))
        kernel, spec = _kernel(plan, platform, params, query, key, extras)
        *grads, dbias = schedule.backward(plan, kernel, spec, query, key, value, lse, do, delta, extras)
        return grads if dbias is None else [*grads, dbias]

    return run


def _dtype(result: str, avals):
    return jnp.promote_types(avals[0].dtype, jnp.float32) if result == "lse" else avals[0].dtype


FORWARD = Op("attention", "attention", _plan, _forward_body, _dtype)
BACKWARD = Op("attention_backward", "attention", _plan, _backward_body)
