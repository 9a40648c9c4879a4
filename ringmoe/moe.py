"""Public MoE ops: docstring, checks, one bind each."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ringmoe import compat, pallas, router, rules
from ringmoe.errors import check
from ringmoe.primitives import experts as primitive
from ringmoe.router import MoeMetrics, RouterConfig, Routing


def moe_ffn(
    x: ArrayLike,
    router_weight: ArrayLike,
    w_in: ArrayLike,
    w_out: ArrayLike,
    *,
    w_gate: ArrayLike | None = None,
    config: RouterConfig,
    token_mask: ArrayLike | None = None,
    implementation: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, MoeMetrics]:
    """A sparse feed-forward layer: every token goes to its `top_k` experts and comes back.

        y = sum_j weight_j FFN_{expert_j}(x),   weight, expert = route(x router_weight)
        FFN_e(x) = (silu(x w_gate_e) * (x w_in_e)) w_out_e, with a gate (SwiGLU);  gelu(x w_in_e) w_out_e without

    Where the mesh axes that shard the experts also shard tokens, rows travel there and back by all-to-all; forward, where the
    matmuls of a wide F outlast the wire, in pieces, each under way during the matmuls of others. Where they don't, each
    device serves its own experts and the outputs are summed. Weights sharded along D, or along F over an axis that
    shards tokens, are gathered first; F over another axis stays sharded and outputs are summed.

    Letters: T tokens of a sequence, D model dim, F hidden dim, E experts.

    Args:
      x: [..., T, D]; bf16, fp16, fp32 or fp64. Sharded by batch, by sequence, by both or not at all.
      router_weight: [D, E]; logits are computed in fp32 at highest precision, whatever the dtypes.
      w_in, w_gate: [E, D, F]; w_out: [E, F, D], of x's dtype. w_gate None: GELU (tanh form) instead of SwiGLU.
      config: see `RouterConfig`. Tokens compete for slots within groups of `config.group_size` consecutive tokens, so
        which of them are dropped doesn't depend on the mesh; devices may cut groups.
      token_mask: [..., T] bool, False for padding: takes no slot, counts in no metric, gives zeros.
      implementation: "xla" or None, the best for the platform.
      axis_name: inside the caller's own `jax.shard_map`, the mesh axis (or axes) that shards both tokens and experts: x holds
        one device's tokens, the weights its experts, router_weight all of them; metrics are then one device's. None: found.

    Returns:
      `(y, metrics)`: y like x, and `MoeMetrics`. A token that was dropped by all its experts gives zeros; a token that holds
      a NaN gives NaN and leaves every other token as it was.

    Raises:
      ValueError: shapes, dtypes or names that don't fit, with what was expected.

    Cost per device of P: about 2 T k capacity_factor D F / P multiply-adds a matrix; 2 (P - 1) / P of its rows of D elements
    sent, forward; rows and their outputs in memory. Where slots are many more than rows, as without a capacity_factor, rows are
    sorted and only those there are multiplied; sent and kept is room for all of a device's rows to and from each other one.
    Source: GShard, https://arxiv.org/abs/2006.16668; Switch Transformer, https://arxiv.org/abs/2101.03961.
    """
    x, router_weight, w_in, w_out = (jnp.asarray(a) for a in (x, router_weight, w_in, w_out))
    w_gate = None if w_gate is None else jnp.asarray(w_gate)
    token_mask = None if token_mask is None else jnp.asarray(token_mask)
    axes = compat.check_axis_name(axis_name)
    router.check_mask(token_mask, x.shape[:-1])
    _check_layer(x, router_weight, w_in, w_out, w_gate, config, axes)
    pallas.check_implementation("experts", implementation)
    acc = jnp.promote_types(x.dtype, jnp.float32)
    with jax.named_scope("router"):
        token_mask = router.lie_alike(token_mask, x)
        # A masked token may hold anything: it must not reach the router weight's gradient.
        seen = x if token_mask is None else jnp.where(token_mask[..., None], x, 0)
        logits = _logits(seen.astype(acc), router_weight.astype(acc))
        routing = router.route(logits, config, token_mask=token_mask)
        metrics = router.metrics(routing, logits)
    arrays = compat.vary_alike((x, routing.expert, routing.slot, routing.weight, w_in, w_gate, w_out))
    return primitive.experts(_call(routing, implementation, axes), *arrays), metrics


def _logits(x, router_weight):
    """x router_weight at highest precision. With Explicit axes the result lies as the tokens do, whatever the weight does."""
    product = functools.partial(jnp.einsum, "...d,de->...e", precision=jax.lax.Precision.HIGHEST)
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return product(x, router_weight)
    *tokens, model = rules.axes_of(jax.typeof(x).sharding.spec, x.ndim)
    spec = lambda *axes: NamedSharding(mesh, PartitionSpec(*(a or None for a in axes)))
    return product(x, jax.sharding.reshard(router_weight, spec(model, ())), out_sharding=spec(*tokens, ()))


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
    rows = primitive.dispatch(_call(routing), *compat.vary_alike((x, routing.expert, routing.slot)))
    rows = _mergeable(rows)
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
    *batch, num_tokens, _ = routing.expert.shape
    groups = num_tokens // routing.group_size
    expected = (routing.num_experts, math.prod(batch) * groups * routing.capacity)
    check(
        rows.ndim == 3 and rows.shape[:2] == expected,
        f"expert_out has shape {rows.shape}, expected [E, C, D] with E, C = {expected}: rows as dispatch gave them",
    )
    rows = rows.reshape(routing.num_experts, *batch, groups, routing.capacity, rows.shape[-1])
    arrays = compat.vary_alike((rows, routing.expert, routing.slot, routing.weight))
    return primitive.combine(_call(routing), *arrays)


def _call(routing: Routing, implementation=None, axes=()) -> primitive.Call:
    return primitive.Call(routing.num_experts, routing.capacity, routing.group_size, implementation, axes)


def _mergeable(rows):
    """With Explicit axes, rows [E, b0, ..., D] sharded along E and b0 alone: what merging b0, ... into C can express."""
    sharding = jax.typeof(rows).sharding
    spec = sharding.spec
    if not any(spec[2:-1]):
        return rows
    return jax.sharding.reshard(
        rows, NamedSharding(sharding.mesh, PartitionSpec(*spec[:2], *(None,) * (rows.ndim - 2)))
    )


def _check_layer(x, router_weight, w_in, w_out, w_gate, config: RouterConfig, axes):
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
    check(
        not axes or config.group_size is not None,
        f"config.group_size=None with {axes=}, expected a number: inside a shard_map the default would depend on the mesh",
    )
    check(e % parts == 0, f"config.num_experts={e} over axis_name={axes} of {parts} devices, expected a multiple")
    f = w_in.shape[-1] if w_in.ndim else 0
    shapes = {"w_in": (e // parts, d, f), "w_gate": (e // parts, d, f), "w_out": (e // parts, f, d)}
    for name, w in (("w_in", w_in), ("w_gate", w_gate), ("w_out", w_out)):
        check(
            w is None or w.shape == shapes[name],
            f"{name} has shape {None if w is None else w.shape}, expected {shapes[name]} ([E, D, F]; w_out [E, F, D]): "
            f"E={e} experts{f' over {parts} devices' * (parts > 1)}, D={d} of x, F={f} of w_in",
        )
        check(
            w is None or w.dtype == x.dtype,
            f"{name} has dtype {None if w is None else w.dtype}, expected x's {x.dtype}: cast one",
        )
