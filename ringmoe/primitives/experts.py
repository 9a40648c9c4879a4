"""The expert-layer primitives: the whole layer forward and backward, and its two halves, dispatch and combine."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, mlir
from jax.sharding import AxisType

from ringmoe import meshes, pallas, rules
from ringmoe.errors import warn_once
from ringmoe.ffn import Weights
from ringmoe.interface import MOE_OUTPUT
from ringmoe.pallas import exchange_tpu
from ringmoe.pallas.experts_own import OwnExperts
from ringmoe.plan import experts as plan
from ringmoe.plan.base import freeze
from ringmoe.plan.experts import ExpertPlan
from ringmoe.primitives.op import Op
from ringmoe.primitives.rows import lower_on_cuda, lower_on_tpu
from ringmoe.schedule import experts as schedule
from ringmoe.schedule import gather
from ringmoe.schedule.exchange import BY_XLA, Travel

WEIGHTS = Weights._fields
ROUTED = ("tokens", "expert", "slot", "weight")


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call."""

    num_experts: int
    capacity: int
    group_size: int
    implementation: str | None = None
    axis_name: tuple[str, ...] = ()
    activation: str | None = None  # in ffn.ACTIVATIONS; None: a half of the layer, which has no experts, or `own` ones
    own: OwnExperts | None = None
    exchange: str = "auto"  # in plan.experts.EXCHANGES


def experts(call: Call, x, expert, slot, weight, weights: Weights | Sequence[jax.Array]):
    """y like x: sum over each token's choices of weight * FFN of that expert. x [*batch, T, D]; absent weights are None.

    `weights` are the leaves of the caller's own where `call.own` is given.

    Differentiable to any order: FORWARD's jvp is TANGENT, a linear op; TANGENT's transpose is BACKWARD; the derivatives of
    those two are left to JAX.
    """
    names = WEIGHTS if call.own is None else [f"own{i}_{w.ndim}" for i, w in enumerate(weights)]
    layer = dict(zip((*ROUTED, *names), (x, expert, slot, weight, *weights), strict=True))
    return _bind(FORWARD, call, layer, ("tokens",))[0]


def _bind(op: Op, call: Call, arrays, results):
    present = {name: x for name, x in arrays.items() if x is not None}
    by_slot = (("e", call.num_experts), ("i", call.group_size), ("r", call.capacity))
    return op.bind(
        *present.values(),
        operands=tuple(present),
        results=results,
        sizes=by_slot if op.family == "movers" else (),  # what the operands' shapes don't tell
        axis_name=call.axis_name,
        implementation=call.implementation,
        spec=call,
    )


def _layer_jvp(primals, tangents, **params):
    (y,) = FORWARD.primitive.bind(*primals, **params)
    names = params["operands"]
    moving = {f"{name}_tangent": t for name, t in zip(names, tangents) if type(t) is not ad.Zero}
    moved = params | {"operands": (*names, *moving), "results": ("tokens",)}
    # A rematerialised layer that keeps y under this name does not send its rows twice.
    return [checkpoint_name(y, MOE_OUTPUT)], TANGENT.primitive.bind(*primals, *moving.values(), **moved)


def _tangent_transpose(cotangents, *arrays, **params):
    named = dict(zip(params["operands"], arrays))
    asked = [name for name, x in named.items() if ad.is_undefined_primal(x)]
    layer = {name: x for name, x in named.items() if not name.endswith("_tangent")}
    wanted = tuple(name for name, x in layer.items() if jnp.issubdtype(x.dtype, jnp.inexact))
    operands = layer | {"tokens_cotangent": ad.instantiate_zeros(cotangents[0])}
    grads = BACKWARD.primitive.bind(*operands.values(), **params | {"operands": tuple(operands), "results": wanted})
    found = {f"{name}_tangent": grad for name, grad in zip(wanted, grads)}
    return [found[name] if name in asked else None for name in named]


def dispatch(call: Call, x, expert, slot):
    """Rows [E, *batch, G, C, D] of tokens x [*batch, T, D]; zeros where a slot is empty."""
    return _bind(DISPATCH, call, {"tokens": x, "expert": expert, "slot": slot}, ("rows",))[0]


def combine(call: Call, rows, expert, slot, weight):
    """Tokens [*batch, T, D] of rows [E, *batch, G, C, D]: sum over each token's choices of weight * row."""
    return _bind(COMBINE, call, {"rows": rows, "expert": expert, "slot": slot, "weight": weight}, ("tokens",))[0]


def _mover_jvp(op: Op, primals, tangents, **params):
    """Rows and weights are moved linearly: one move for each of them that has a tangent."""
    moves = []
    for i, tangent in enumerate(tangents):
        if type(tangent) is not ad.Zero:
            moves.append(op.primitive.bind(*primals[:i], tangent, *primals[i + 1 :], **params)[0])
    return op.primitive.bind(*primals, **params), [functools.reduce(ad.add_tangents, moves)]


def _mover_transpose(op: Op, cotangents, *arrays, **params):
    """Dispatch and combine are each other's transposes; a weight's cotangent is the product of its row and its token."""
    named = dict(zip(params["operands"], arrays))
    (asked,) = [name for name, x in named.items() if ad.is_undefined_primal(x)]
    (cotangent,) = (ad.instantiate_zeros(ct) for ct in cotangents)
    tokens, rows = (cotangent, named["rows"]) if op is COMBINE else (named["tokens"], cotangent)
    if asked != "weight":
        back, moved, result = (DISPATCH, "tokens", "rows") if op is COMBINE else (COMBINE, "rows", "tokens")
        operands = {moved: cotangent} | {name: named[name] for name in ("expert", "slot", "weight") if name in named}
        (grad,) = back.primitive.bind(
            *operands.values(), **params | {"operands": tuple(operands), "results": (result,)}
        )
    else:
        choices = named["expert"].shape[-1]
        one = lambda x, j: jax.lax.slice_in_dim(x, j, j + 1, axis=-1)
        grad = []
        for j in range(choices):  # one choice at a time: the k rows of a token are never held together
            operands = {"rows": rows, "expert": one(named["expert"], j), "slot": one(named["slot"], j)}
            (row,) = COMBINE.primitive.bind(
                *operands.values(), **params | {"operands": tuple(operands), "results": ("tokens",)}
            )
            grad.append(jnp.sum((tokens * row).astype(named["weight"].aval.dtype), -1))
        grad = jnp.stack(grad, -1)
    grad = _placed_like(grad, named[asked].aval)
    return [grad if name == asked else None for name in named]


def _placed_like(grad, aval):
    """With Explicit axes a gradient must lie as what it is the gradient of."""
    mesh = aval.sharding.mesh
    if AxisType.Explicit not in mesh.axis_types or jax.typeof(grad).sharding == aval.sharding:
        return grad
    return jax.sharding.reshard(grad, aval.sharding)


def _plan(rule, factors, mesh, avals, params) -> ExpertPlan:
    call, backward = params["spec"], "tokens_cotangent" in params["operands"]
    how = call.capacity, call.group_size, avals[0].dtype.itemsize, backward, call.own is None, call.exchange
    return plan.make(
        rule, freeze(factors), tuple(mesh.shape.items()), *how, meshes.device_kind(mesh), params.get("slices", 1)
    )


def _kernel(platform: str, params, named):
    if params["spec"].own is not None:
        return params["spec"].own
    check = lambda kernel: kernel.check(named["tokens"], _weights(params, named), params["spec"].activation)
    return pallas.pick("experts", platform, params["implementation"], check)


def _travel(plan: ExpertPlan, platform: str) -> Travel:
    if plan.remote and platform == "tpu":
        return Travel(exchange_tpu.start, exchange_tpu.finish)
    if plan.remote:
        warn_once("remote DMA", f"no remote DMA between devices on {platform}: pieces travel by XLA's all-to-all")
    return BY_XLA


def _weights(params, named) -> Weights | tuple:
    if params["spec"].own is not None:
        return tuple(x for name, x in named.items() if rules.OWN.fullmatch(name))
    return Weights(*(named[name] for name in WEIGHTS))


def _layer(params, named) -> tuple:
    """What the schedule takes after its kernel."""
    return *(named[name] for name in ROUTED), _weights(params, named), params["spec"].activation


def _body(run):
    """The body of an op: `run(plan, platform, params, named arrays)`; what the call left out is None.

    What JAX differentiates, or XLA partitions further, has no loop that depends on the routing.
    """

    def body(plan: ExpertPlan, platform: str, params):
        absent = dict.fromkeys(("weight", *WEIGHTS))
        plan = plan.at_once if params.get("uniform") else plan
        return lambda *arrays: run(plan, platform, params, absent | dict(zip(params["operands"], arrays)))

    return body


def _forward_body(plan, platform, params, named):
    return [schedule.forward(plan, _kernel(platform, params, named), _travel(plan, platform), *_layer(params, named))]


def _backward_body(plan, platform, params, named):
    kernel, dy = _kernel(platform, params, named), named["tokens_cotangent"]
    return jax.tree.leaves(schedule.backward(plan, kernel, _travel(plan, platform), *_layer(params, named), dy=dy))


def _dispatch_body(plan, platform, params, named):
    call = params["spec"]
    arrays = (named[name] for name in ("tokens", "expert", "slot", "weight"))
    return [schedule.dispatch(plan, call.capacity, call.group_size, *arrays)]


def _combine_body(plan, platform, params, named):
    call = params["spec"]
    arrays = (named[name] for name in ("rows", "expert", "slot", "weight"))
    return [schedule.combine(plan, call.capacity, call.group_size, *arrays)]


def _tangent_body(plan, platform, params, named):
    """The forward body pushed forward by JAX."""
    layer = {name: x for name, x in named.items() if not name.endswith("_tangent")}
    moving = {name: named[f"{name}_tangent"] for name in layer if f"{name}_tangent" in named}
    of_moving = lambda xs: _forward_body(plan.by_xla, platform, params | {"implementation": "xla"}, layer | xs)
    return jax.jvp(of_moving, ({name: layer[name] for name in moving},), (moving,))[1]


FORWARD = Op("experts", "experts", _plan, _body(_forward_body))
TANGENT = Op("experts_tangent", "experts", _plan, _body(_tangent_body))
BACKWARD = Op("experts_backward", "experts", _plan, _body(_backward_body))
DISPATCH = Op("dispatch", "movers", _plan, _body(_dispatch_body))
COMBINE = Op("combine", "movers", _plan, _body(_combine_body))
FORWARD.derive(_layer_jvp)
TANGENT.derive(TANGENT.differentiate_plainly, _tangent_transpose)
BACKWARD.derive(BACKWARD.differentiate_plainly)
for mover in (DISPATCH, COMBINE):
    mover.derive(functools.partial(_mover_jvp, mover), functools.partial(_mover_transpose, mover))
mlir.register_lowering(gather.PRIMITIVE, lower_on_tpu, platform="tpu")
mlir.register_lowering(gather.PRIMITIVE, lower_on_cuda, platform="cuda")
