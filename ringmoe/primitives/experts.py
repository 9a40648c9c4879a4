"""The expert-layer primitives: the whole layer forward and backward, and its two halves, dispatch and combine."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ringmoe import pallas, plan
from ringmoe.primitives.doors import Op
from ringmoe.schedule import experts as schedule

WEIGHTS = ("w_in", "w_gate", "w_out")
LAYER = ("tokens", "expert", "slot", "weight", *WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call."""

    num_experts: int
    capacity: int
    group_size: int
    implementation: str | None = None
    axis_name: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def experts(call: Call, x, expert, slot, weight, w_in, w_gate, w_out):
    """y like x: sum over each token's choices of weight * FFN of that expert. x [*batch, T, D]; w_gate may be None."""
    return _experts_forward(call, x, expert, slot, weight, w_in, w_gate, w_out)[0]


def _experts_forward(call: Call, *arrays):
    (y,) = _bind(FORWARD, call, dict(zip(LAYER, arrays)), ("tokens",))
    return y, arrays


def _experts_backward(call: Call, arrays, dy):
    named = dict(zip(LAYER, arrays))
    wanted = [name for name in ("tokens", "weight", *WEIGHTS) if named[name] is not None]
    grads = dict(zip(wanted, _bind(BACKWARD, call, named | {"tokens_cotangent": dy}, tuple(wanted))))
    return tuple(grads.get(name) for name in LAYER)


experts.defvjp(_experts_forward, _experts_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Sharding:
    """The sharding in an array's type, as a residual: with Explicit axes its gradient must have the same."""

    sharding: Any

    def place(self, grad):
        mesh = self.sharding.mesh
        explicit = AxisType.Explicit in mesh.axis_types and not mesh.manual_axes
        return jax.sharding.reshard(grad, self.sharding) if explicit else grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(call: Call, x, expert, slot):
    """Rows [E, *batch, G, C, D] of tokens x [*batch, T, D]; zeros where a slot is empty."""
    return _dispatch(call, x, expert, slot, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(call: Call, rows, expert, slot, weight):
    """Tokens [*batch, T, D] of rows [E, *batch, G, C, D]: sum over each token's choices of weight * row."""
    return _combine(call, rows, expert, slot, weight)


def _dispatch(call, x, expert, slot, weight):
    return _bind(DISPATCH, call, {"tokens": x, "expert": expert, "slot": slot, "weight": weight}, ("rows",))[0]


def _combine(call, rows, expert, slot, weight):
    return _bind(COMBINE, call, {"rows": rows, "expert": expert, "slot": slot, "weight": weight}, ("tokens",))[0]


def _dispatch_forward(call, x, expert, slot):
    return dispatch(call, x, expert, slot), (_Sharding(jax.typeof(x).sharding), (expert, slot))


def _dispatch_backward(call, residuals, drows):
    like, (expert, slot) = residuals
    return like.place(_combine(call, drows, expert, slot, None)), None, None


def _combine_backward(call, residuals, dy):
    rows, expert, slot, weight = residuals
    dweight = [  # one choice at a time: the k rows of a token are never held together
        jnp.sum(
            (dy * _combine(call, rows, expert[..., j : j + 1], slot[..., j : j + 1], None)).astype(weight.dtype), -1
        )
        for j in range(expert.shape[-1])
    ]
    place = lambda grad, like: _Sharding(jax.typeof(like).sharding).place(grad)
    return place(_dispatch(call, dy, expert, slot, weight), rows), None, None, place(jnp.stack(dweight, -1), weight)


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(lambda call, *arrays: (combine(call, *arrays), arrays), _combine_backward)


def _bind(op: Op, call: Call, arrays, results):
    present = {name: x for name, x in arrays.items() if x is not None}
    sizes = (("e", call.num_experts), ("i", call.group_size), ("r", call.capacity))
    if op in (FORWARD, BACKWARD):
        sizes = (("i", call.group_size),)
    return op.bind(
        *present.values(),
        operands=tuple(present),
        results=results,
        sizes=sizes,
        axis_name=call.axis_name,
        implementation=call.implementation,
        spec=call,
    )


def _plan(rule, factors, mesh_shape, avals, params) -> plan.ExpertPlan:
    exchanges = 3 if "tokens_cotangent" in params["operands"] else 2
    mesh_items, itemsize = tuple(mesh_shape.items()), avals[0].dtype.itemsize
    return plan.experts(rule, plan.freeze(factors), mesh_items, params["spec"].capacity, itemsize, exchanges)


def _kernel(platform: str, params, named):
    weights = (named[name] for name in WEIGHTS)
    check = lambda kernel: kernel.check(named["tokens"], *weights)
    return pallas.pick("experts", platform, params["implementation"], check)


def _body(run):
    """The body of an op: `run(plan, platform, params, named arrays)`; what the call left out is None."""

    def body(plan: plan.ExpertPlan, platform: str, params):
        absent = dict.fromkeys(("weight", *WEIGHTS))
        return lambda *arrays: run(plan, platform, params, absent | dict(zip(params["operands"], arrays)))

    return body


def _forward_body(plan, platform, params, named):
    layer = (named[name] for name in LAYER)
    return [schedule.forward(plan, _kernel(platform, params, named), *layer)]


def _backward_body(plan, platform, params, named):
    layer = (named[name] for name in (*LAYER, "tokens_cotangent"))
    grads = schedule.backward(plan, _kernel(platform, params, named), *layer)
    return [grad for grad in grads if grad is not None]


def _dispatch_body(plan, platform, params, named):
    return [schedule.dispatch(plan, *(named[name] for name in ("tokens", "expert", "slot", "weight")))]


def _combine_body(plan, platform, params, named):
    return [schedule.combine(plan, *(named[name] for name in ("rows", "expert", "slot", "weight")))]


FORWARD = Op("experts", "experts", _plan, _body(_forward_body))
BACKWARD = Op("experts_backward", "experts", _plan, _body(_backward_body))
DISPATCH = Op("dispatch", "experts", _plan, _body(_dispatch_body))
COMBINE = Op("combine", "experts", _plan, _body(_combine_body))
