"""The dense oracle of the expert layer: loops that count, and every expert applied to every token. For tests and docs.

Everything runs in the dtype of its inputs; give float64 for an oracle. Shapes: x [*B, T, D], logits [*B, T, E].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Selection(NamedTuple):
    """numpy arrays: expert, slot [*B, T, k] int (slot -1: dropped or not taking part); active [*B, T] bool."""

    expert: np.ndarray
    slot: np.ndarray
    active: np.ndarray


def select(
    logits, *, top_k: int, capacity: int, group_size: int, token_mask=None, chosen_by=None, order=None
) -> Selection:
    """Who goes where, by counting: for each group of consecutive tokens, choice after choice takes its expert's next slot.

    The largest of `chosen_by` (default: the logits) win, the lowest index among equals. Masked tokens, and tokens with a
    NaN, a +inf or nothing but -inf, are passed over. `order` [*B, T, k]: small ones come first, then early tokens, then early
    choices; default: the number of the choice. A group may be as large as all sequences together.
    """
    logits = np.asarray(logits)
    *tokens, num_experts = logits.shape
    flat = logits.reshape(-1, num_experts)
    chosen_by = flat if chosen_by is None else np.asarray(chosen_by).reshape(flat.shape)
    with np.errstate(invalid="ignore"):
        finite = ~np.isnan(flat).any(-1) & ~np.isposinf(flat).any(-1) & ~np.isneginf(flat).all(-1)
    active = finite if token_mask is None else finite & np.asarray(token_mask).reshape(-1)
    expert = np.zeros((len(flat), top_k), np.int32)
    slot = np.full(expert.shape, -1, np.int32)
    order = (
        np.broadcast_to(np.arange(top_k), expert.shape) if order is None else np.asarray(order).reshape(expert.shape)
    )
    for t in range(len(flat)):
        row = chosen_by[t] if active[t] else np.zeros(num_experts)
        expert[t] = sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k]
    for start in range(0, len(flat), group_size):
        taken = [0] * num_experts
        group = [(t, j) for t in range(start, start + group_size) for j in range(top_k) if active[t]]
        for t, j in sorted(group, key=lambda choice: (order[choice], *choice)):
            e = expert[t, j]
            slot[t, j] = taken[e] if taken[e] < capacity else -1
            taken[e] += 1
    shape = (*tokens, top_k)
    return Selection(expert.reshape(shape), slot.reshape(shape), active.reshape(tokens))


def weights(logits, selection: Selection, *, renormalize: bool) -> jax.Array:
    """[*B, T, k] softmax scores of the chosen experts, divided by their sum before any drop if `renormalize`."""
    chosen = jax.nn.one_hot(selection.expert, logits.shape[-1], dtype=logits.dtype)
    weight = jnp.einsum("...tke,...te->...tk", chosen, jax.nn.softmax(logits, axis=-1))
    return weight / weight.sum(-1, keepdims=True) if renormalize else weight


def hidden(u, v=None, activation: str | None = None) -> jax.Array:
    """What a feed-forward network has between its matmuls, from u = x w_in and v = x w_gate; None is SwiGLU or tanh-GELU."""
    if activation == "clamped_silu":
        assert v is not None
        v = jnp.where(v > 7, 7, v)
        return v / (1 + jnp.exp(-1.702 * v)) * (1 + jnp.where(u > 7, 7, jnp.where(u < -7, -7, u)))
    act = {
        "silu": lambda a: a / (1 + jnp.exp(-a)),
        "gelu": lambda a: a / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
        "gelu_exact": lambda a: a / 2 * (1 + jax.lax.erf(a / math.sqrt(2))),
        "relu": lambda a: jnp.where(a > 0, a, 0),
        "relu2": lambda a: jnp.where(a > 0, a**2, 0),
    }[activation or ("gelu" if v is None else "silu")]
    return act(u) if v is None else act(v) * u


def experts(
    x, selection: Selection, weight, w_in, w_out, w_gate=None, b_in=0, b_gate=0, b_out=0, activation=None
) -> jax.Array:
    """y = sum over the choices that have a slot of weight * FFN_expert(x); differentiable in all arrays.

    A token whose weights are NaN gives NaN.
    """
    times = lambda w, b: jnp.einsum("...td,edf->...tef", x, w) + b
    u, v = times(w_in, b_in), None if w_gate is None else times(w_gate, b_gate)
    out = jnp.einsum("...tef,efd->...ted", hidden(u, v, activation), w_out) + b_out
    chosen = jax.nn.one_hot(selection.expert, w_in.shape[0], dtype=x.dtype) * (selection.slot >= 0)[..., None]
    return jnp.einsum("...tk,...tke,...ted->...td", weight, chosen, out)


def shared(x, w_in, w_out, w_gate=None, router=None, activation=None) -> jax.Array:
    """The expert that every token visits: sigmoid(x router) FFN(x), or FFN(x)."""
    out = hidden(x @ w_in, None if w_gate is None else x @ w_gate, activation) @ w_out
    return out if router is None else out / (1 + jnp.exp(-x @ router.reshape(-1, 1)))


def moe_ffn(
    x, router_weight, w_in, w_out, w_gate=None, *, selection: Selection, renormalize: bool = True, **kind
) -> jax.Array:
    """The whole layer, differentiable, with the choices of `select(x @ router_weight, ...)` held fixed.

    `kind`: the biases and the activation of `experts`.
    """
    weight = weights(x @ router_weight, selection, renormalize=renormalize)
    return experts(x, selection, weight, w_in, w_out, w_gate, **kind)
