"""Public MoE ops: docstring, checks, one bind each."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ringmoe import compat, dense, pallas, router
from ringmoe.dense import SharedExpert
from ringmoe.errors import check
from ringmoe.ffn import ACTIVATIONS, NEED_A_GATE, Weights
from ringmoe.interface import is_float8
from ringmoe.pallas.experts_own import OwnExperts
from ringmoe.plan.experts import EXCHANGES
from ringmoe.primitives import experts as primitive
from ringmoe.router import MoeMetrics, RouterConfig, Routing


def moe_ffn(
    x: ArrayLike,
    router_weight: ArrayLike,
    w_in: ArrayLike | None = None,
    w_out: ArrayLike | None = None,
    *,
    w_gate: ArrayLike | None = None,
    b_in: ArrayLike | None = None,
    b_gate: ArrayLike | None = None,
    b_out: ArrayLike | None = None,
    s_in: ArrayLike | None = None,
    s_gate: ArrayLike | None = None,
    s_out: ArrayLike | None = None,
    activation: str | None = None,
    expert_fn: Callable | None = None,
    expert_weights: Any = None,
    shared: SharedExpert | None = None,
    config: RouterConfig,
    router_bias: ArrayLike | None = None,
    selection_bias: ArrayLike | None = None,
    expert_scale: ArrayLike | None = None,
    noise_weight: ArrayLike | None = None,
    expert: ArrayLike | None = None,
    key: jax.Array | None = None,
    train: bool = False,
    token_mask: ArrayLike | None = None,
    implementation: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    exchange: str = "auto",
) -> tuple[jax.Array, MoeMetrics]:
    """A sparse feed-forward layer: every token goes to its `top_k` experts and comes back.

        y = sum_j weight_j FFN_{expert_j}(x),   weight, expert = route(x router_weight + router_bias)
        FFN_e(x) = (act(v) * u) w_out_e + b_out_e,   u = x w_in_e + b_in_e,   v = x w_gate_e + b_gate_e
        FFN_e(x) = act(u) w_out_e + b_out_e without a gate;  expert_fn's, of any shape

    Where the mesh axes that shard the experts also shard tokens, rows travel there and back, all at once or in pieces, each
    under way during the matmuls of others; of a dropless layer only the rows that there are, however uneven. Where they don't,
    each device serves its own experts and the outputs are summed. Weights sharded along D, or along F over an axis that shards
    tokens, are gathered first; F over another axis stays sharded and outputs are summed.

    Letters: T tokens of a sequence, D model dim, F hidden dim, E experts.

    Args:
      x: [..., T, D]; bf16, fp16, fp32 or fp64. Sharded by batch, by sequence, by both or not at all.
      router_weight: [D, E]; logits are computed in fp32 at highest precision, whatever the dtypes.
      w_in, w_gate: [E, D, F]; w_out: [E, F, D], of x's dtype. w_gate None: no gate.
      b_in, b_gate: [E, F]; b_out: [E, D], of x's dtype, sharded as the weights are; each may be None. b_gate needs w_gate.
      s_in, s_gate: [E, F]; s_out: [E, D], floating, for weights in float8: w_in then stands for w_in * s_in[:, None], and so
        on. Eight bits are kept, and travel where weights do; a device widens its own, in fp32, rounded once to x's dtype.
        The scales have gradients; those of the weights are rounded to float8. One scale an expert: broadcast it. Scales of
        blocks of D: `expert_fn`.
      activation: act. "silu" (SwiGLU with a gate), "gelu" (tanh form; GeGLU), "gelu_exact" (of erf), "relu" (ReGLU), "relu2"
        (ReLU squared), or "clamped_silu", gpt-oss's: hidden = g sigmoid(1.702 g) (clip(u, -7, 7) + 1), g = min(v, 7), which
        needs a gate. None: "silu" with a gate, "gelu" without. With `expert_fn` it is that of `shared` alone.
      expert_fn, expert_weights: your own experts instead of w_in, w_out, ...: `expert_fn(rows, weights) -> rows` for any pytree
        of arrays [E, ...], sharded along E or not at all (other dims are gathered). It is given one device's experts, their
        arrays and rows [e, R, D], and differentiated by JAX; each row's result must come of that row alone. Empty slots are
        rows of zeros, at which its derivatives must be finite. A function defined once (a new one is compiled anew) that
        closes over no traced array.
      shared: one more expert that every token visits, of the same activation; see `SharedExpert`. None: there is none.
      config: see `RouterConfig`. Tokens compete for slots within groups of consecutive tokens, or a sequence, or all
        together; which of them are dropped doesn't depend on the mesh.
      router_bias: [E], added to the logits. selection_bias, expert_scale: [E]; expert: [..., T, k] int32: see `route`.
      noise_weight: [D, E], for noise="learned": logits + n * softplus(x noise_weight), n normal. key, train: see `route`.
      token_mask: [..., T] bool, False for padding: takes no slot, counts in no metric, gives zeros.
      implementation: "xla" or None, the best for the platform.
      axis_name: inside the caller's own `jax.shard_map`, the mesh axis (or axes) that shards both tokens and experts: x holds
        one device's tokens, the weights its experts, router_weight all of them; metrics are then one device's. None: found.
      exchange: how rows travel, forward and backward: "all_to_all", all at once, before and after the matmuls; "pieces", some
        of each expert's rows at a time, hidden by the matmuls of others, with as much room for every expert; "remote", pieces
        by remote DMA, for TPUs (elsewhere as "pieces", which is said), within one slice; "auto", the fastest by a model of the
        machine (`plan/cost.py`), whose times `explain` tells: "remote" only where XLA's all-to-all can't be hidden, on v5e
        from 32 chips on. On other TPUs that needs the compiler's option xla_tpu_enable_async_all_to_all, which `ringmoe.jit`
        sets. No matter where nothing travels.

    Returns:
      `(y, metrics)`: y like x, and `MoeMetrics`. A token that was dropped by all its experts gives zeros (or what the shared
      one gives); a token that holds a NaN gives NaN and leaves every other token as it was.

    Raises:
      ValueError: shapes, dtypes or names that don't fit, with what was expected.

    Cost per device of P: about 2 T k capacity_factor D F / P multiply-adds a matrix; 2 (P - 1) / P of its rows of D elements
    sent, forward; rows and their outputs in memory. Dropless, 1 stands for the factor in what is done and sent, 1.25 in memory;
    a device to which more comes takes it in turns.
    Source: GShard, https://arxiv.org/abs/2006.16668; Switch Transformer, https://arxiv.org/abs/2101.03961; gated activations,
    https://arxiv.org/abs/2002.05202; ReLU squared, https://arxiv.org/abs/2109.08668; gpt-oss, https://arxiv.org/abs/2508.10925.
    """
    x, router_weight = jnp.asarray(x), jnp.asarray(router_weight)
    weights = Weights(*map(_asarray, (w_in, w_gate, w_out, b_in, b_gate, b_out, s_in, s_gate, s_out)))
    routers = tuple(map(_asarray, (router_bias, selection_bias, expert_scale, noise_weight, expert)))
    shared, mask = None if shared is None else SharedExpert(*map(_asarray, shared)), _asarray(token_mask)
    if activation is None:
        gate = shared.w_gate if expert_fn is not None and shared is not None else w_gate
        activation = "gelu" if gate is None else "silu"
    axes = compat.check_axis_name(axis_name)
    router.check_mask(mask, x.shape[:-1])
    local_experts = _check_layer(x, router_weight, config, axes)
    kind, weights = _kind(weights, activation, expert_fn, expert_weights, x, local_experts)
    dense.check_shared(shared, x, activation)
    pallas.check_implementation("experts", implementation)
    check(exchange in EXCHANGES, f"{exchange=}, expected one of {EXCHANGES}")
    with jax.named_scope("router"):
        mask = router.lie_alike(mask, x)
        # A masked token may hold anything: it must not reach the router weight's gradient.
        seen = x if mask is None else jnp.where(mask[..., None], x, 0)
        routing, metrics = _route(seen, (router_weight, *routers), config, mask, key, train, axes)
    weight = routing.weight
    if config.scale_input:
        x = (seen * weight).astype(x.dtype)  # not what a mask hides
        weight = jnp.where(routing.active[..., None], 1, weight)
    # Where nothing can be dropped places are of no interest: XLA leaves out the counting, and its exchange.
    kept = routing.slot if routing.capacity < routing.group_size else jnp.where(routing.active[..., None], 0, -1)
    kept = jnp.broadcast_to(kept, routing.expert.shape)
    arrays = compat.vary_alike((x, routing.expert, kept, weight, weights))
    y = primitive.experts(_call(routing, implementation, axes, exchange=exchange, **kind), *arrays)
    return dense.add_shared(y, seen, shared, activation), metrics


def _asarray(x: ArrayLike | None) -> Any:
    return None if x is None else jnp.asarray(x)


def _route(x, weights, config: RouterConfig, token_mask, key, train, axes) -> tuple[Routing, MoeMetrics]:
    """The routing of tokens x that holds nothing masked, and its metrics."""
    router_weight, router_bias, selection_bias, expert_scale, noise_weight, expert = weights
    d, e = router_weight.shape
    check(
        router_bias is None or router_bias.shape == (e,),
        f"router_bias of shape {getattr(router_bias, 'shape', None)}, expected ({e},): one number per expert",
    )
    check(
        noise_weight is None or noise_weight.shape == (d, e),
        f"noise_weight of shape {getattr(noise_weight, 'shape', None)}, expected router_weight's {(d, e)}",
    )
    check(
        key is not None or not (train and config.noise == "jitter"),
        "key=None with noise='jitter', train=True, expected a jax.random key",
    )
    acc = jnp.promote_types(x.dtype, jnp.float32)
    x, jitter_key = x.astype(acc), None
    if key is not None:
        key, jitter_key = jax.random.split(key)
    if train and config.noise == "jitter":
        x = router.jittered(x, config, jitter_key, axes)
    logits = dense.logits(x, router_weight)
    if router_bias is not None:
        logits = logits + jax.lax.broadcast_to_rank(router_bias.astype(acc), logits.ndim)
    noise_logits = None if noise_weight is None else dense.logits(x, noise_weight)
    routing = router.route(
        logits, config, token_mask=token_mask, selection_bias=selection_bias, expert_scale=expert_scale,
        noise_logits=noise_logits, expert=expert, key=key, train=train, axis_name=axes,
    )  # fmt: skip
    return routing, router.metrics(routing, logits, config, noise_logits=noise_logits)


def dispatch(x: ArrayLike, routing: Routing) -> jax.Array:
    """Gathers each expert's tokens: `rows[e, slot of (t, j)] = x[t]` for every choice j of token t that e took.

    Args:
      x: [*batch, T, D] tokens. routing: what `route` gave for logits [*batch, T, E].

    Returns:
      [E, C, D] in x's dtype, C = groups * routing.capacity: group after group of consecutive tokens; empty slots are zeros.

    Raises:
      ValueError: x's leading dims are not the routing's.

    Cost: one gather of E * C * D elements; nothing moves between devices. With Explicit axes and tokens sharded along more
    than the first dim, the rows are gathered along C, which no sharding could express. Differentiable in x.
    """
    x = jnp.asarray(x)
    check(
        x.shape[:-1] == routing.expert.shape[:-1],
        f"{x.shape=} with a routing of tokens {routing.expert.shape[:-1]}, expected x [*tokens, D]: route and dispatch "
        "the same tokens",
    )
    arrays = _in_groups(routing, x, routing.expert, routing.slot)
    rows = _mergeable(primitive.dispatch(_call(routing), *compat.vary_alike(arrays)))
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def combine(expert_out: ArrayLike, routing: Routing) -> jax.Array:
    """Brings rows back to their tokens: `y[t] = sum_j weight_j expert_out[expert_j, slot_j]`, in the order of the choices.

    Args:
      expert_out: [E, C, D] rows in the order of `dispatch`. routing: the one they were dispatched with.

    Returns:
      [*batch, T, D] in expert_out's dtype, accumulated in fp32. A choice without a slot adds nothing.

    Raises:
      ValueError: rows that aren't [E, C, D] of this routing.

    Cost: k gathers of T * D elements. No scatter: results repeat bit for bit. Differentiable in expert_out and the weights.
    """
    rows = jnp.asarray(expert_out)
    expert, slot, weight = _in_groups(routing, routing.expert, routing.slot, routing.weight)
    *batch, num_tokens, _ = expert.shape
    groups = num_tokens // routing.group_size
    expected = (routing.num_experts, math.prod(batch) * groups * routing.capacity)
    check(
        rows.ndim == 3 and rows.shape[:2] == expected,
        f"expert_out has shape {rows.shape}, expected [E, C, D] with E, C = {expected}: rows as dispatch gave them",
    )
    rows = rows.reshape(routing.num_experts, *batch, groups, routing.capacity, rows.shape[-1])
    y = primitive.combine(_call(routing), *compat.vary_alike((rows, expert, slot, weight)))
    return y.reshape(*routing.expert.shape[:-1], y.shape[-1])


def _in_groups(routing: Routing, *arrays):
    """Arrays [*B, T, ...] as they are, or as one sequence where all tokens compete."""
    num_tokens = routing.expert.shape[-2]
    if num_tokens % routing.group_size == 0:
        return arrays
    return tuple(_replicated(a).reshape(-1, a.shape[-1]) for a in arrays)


def _replicated(x):
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else x


def _call(routing: Routing, implementation=None, axes=(), **kind) -> primitive.Call:
    return primitive.Call(routing.num_experts, routing.capacity, routing.group_size, implementation, axes, **kind)


def _mergeable(rows):
    """With Explicit axes, rows [E, b0, ..., D] sharded along E and b0 alone: what merging b0, ... into C can express."""
    sharding = jax.typeof(rows).sharding
    spec = sharding.spec
    if not any(spec[2:-1]):
        return rows
    return jax.sharding.reshard(
        rows, NamedSharding(sharding.mesh, PartitionSpec(*spec[:2], *(None,) * (rows.ndim - 2)))
    )


def _kind(
    weights: Weights, activation: str, fn: Callable | None, own_weights, x: jax.Array, e: int
) -> tuple[dict, Any]:
    """What the primitive's call says of the experts, e of them on one device, and their arrays: checked."""
    check(activation in ACTIVATIONS, f"{activation=}, expected None or one of {tuple(ACTIVATIONS)}")
    given = [name for name, w in weights._asdict().items() if w is not None]
    check(
        fn is None or not given,
        f"expert_fn and {given} were given, expected one or the other: pass your own experts' arrays as expert_weights",
    )
    check(fn is not None or own_weights is None, "expert_weights without expert_fn, expected both: pass expert_fn")
    if fn is not None:
        leaves, tree = jax.tree.flatten(own_weights)
        leaves = list(map(jnp.asarray, leaves))
        _check_own(fn, leaves, tree, x, e)
        return {"own": OwnExperts(fn, tree)}, leaves
    check(
        {"w_in", "w_out"} <= {*given},
        f"{given} of the experts' arrays were given, expected at least w_in and w_out, or expert_fn",
    )
    _check_weights(weights, x, e)
    _check_activation(activation, weights)
    return {"activation": activation}, weights


def _check_own(fn: Callable, leaves, tree, x, e: int):
    for leaf in leaves:
        check(
            leaf.shape[:1] == (e,),
            f"expert_weights has an array of shape {leaf.shape}, expected [E, ...] with E={e} experts, inside a shard_map one "
            "device's",
        )
    rows = jax.ShapeDtypeStruct((e, 1, x.shape[-1]), x.dtype)
    bare = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    out = jax.eval_shape(fn, rows, tree.unflatten(bare))
    check(
        getattr(out, "shape", None) == rows.shape and jnp.issubdtype(out.dtype, jnp.floating),
        f"expert_fn makes {out} of rows {rows.dtype}{rows.shape}, expected floating rows of the same shape [e, R, D]",
    )


def _check_layer(x, router_weight, config: RouterConfig, axes) -> int:
    """The experts of one device, of those that `axes` share."""
    check(
        x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating),
        f"x has shape {x.shape} and dtype {x.dtype}, expected floating [..., T, D]",
    )
    check(min(x.shape) > 0, f"{x.shape=}, expected no dim of length 0")
    d, e = x.shape[-1], config.num_experts
    check(
        router_weight.shape == (d, e),
        f"{router_weight.shape=}, expected [D, E] = ({d}, {e}): D is x's last dim, E is config.num_experts",
    )
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
    check(e % parts == 0, f"config.num_experts={e} over axis_name={axes} of {parts} devices, expected a multiple")
    return e // parts


def _check_weights(weights: Weights, x, e: int):
    d, f = x.shape[-1], weights.w_in.shape[-1] if weights.w_in.ndim else 0
    by_hidden, by_model = (e, f), (e, d)
    shapes = Weights((e, d, f), (e, d, f), (e, f, d), *(by_hidden, by_hidden, by_model) * 2)
    for name, w, shape in zip(Weights._fields, weights, shapes):
        check(
            w is None or w.shape == shape,
            f"{name} has shape {None if w is None else w.shape}, expected {shape} ([E, D, F]; w_out [E, F, D]; b_in, b_gate "
            f"[E, F]; b_out [E, D]; s_ as b_): E={e} experts, inside a shard_map one device's, D={d} of x, F={f} of w_in",
        )
        if w is not None:
            _check_dtype(name, w, x, weights)


def _check_dtype(name: str, w, x, weights: Weights):
    kind, side = name.split("_")
    scale = getattr(weights, f"s_{side}")
    if kind == "s":
        check(
            jnp.issubdtype(w.dtype, jnp.floating) and getattr(weights, f"w_{side}") is not None,
            f"{name} has dtype {w.dtype}, w_{side} is {getattr(weights, f'w_{side}')}, expected floating scales of a w_{side}",
        )
    elif kind == "w" and is_float8(w.dtype):
        check(
            scale is not None, f"{name} has dtype {w.dtype} and no scale, expected s_{side}: pass it; ones, if need be"
        )
    else:
        check(w.dtype == x.dtype, f"{name} has dtype {w.dtype}, expected x's {x.dtype}: cast one")


def _check_activation(activation: str, weights: Weights):
    check(
        weights.w_gate is not None or activation not in NEED_A_GATE,
        f"{activation=} without w_gate, expected a gate [E, D, F]: pass w_gate, or another activation",
    )
    check(
        weights.w_gate is not None or weights.b_gate is None,
        "b_gate without w_gate, expected both: a gate's bias is added to x w_gate; pass w_gate, or leave b_gate out",
    )
