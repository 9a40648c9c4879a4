"""The expert FFN on any backend: matmuls left to XLA. What an expert kernel is, too:

    check(rows, weights, activation)                          raises NotImplementedError with what it lacks
    forward(rows, weights, activation, counts) -> out
    backward_rows(rows, weight, weights, activation, dy, counts) -> (Grads, kept)
    backward_weights([kept, ...], weights, counts) -> the weights' gradients

on one device's arrays: rows, dy [e, R, D]; weight [e, R]; weights: `ffn.Weights`, None where absent; activation: a name in
`ffn.ACTIVATIONS`. With `counts` [e] the rows are sorted by expert instead of apart: rows, dy [n, D], weight [n], the first
counts[0] of them expert 0's; those past the last expert's give anything. `out` is the sum over this device's share of F, in
float32 (float64 for float64 inputs). The backward pass is in two, since rows can go home after the first; the second takes what
that `kept` of every piece in which they came. All gradients are those of sum(weight * out * dy), in float32 (float64).

    hidden = act(rows w_gate + b_gate) * (rows w_in + b_in), with a gate;  act(rows w_in + b_in) without
    out = hidden w_out + b_out

Matmuls accumulate in float32; hidden is rounded to the rows' dtype before the second matmul. A row of zeros, an empty slot,
gives what the biases make of it; its weight and its dy are 0, so that no gradient counts it.
Source: SwiGLU and its kin, https://arxiv.org/abs/2002.05202.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.ffn import ACTIVATIONS, Weights
from ringmoe.pallas import grouped


class Grads(NamedTuple):
    """What goes home with a row: gradients in float32 (float64), each of the shape of what it is the gradient of."""

    drows: jax.Array
    dweight: jax.Array


class Kept(NamedTuple):
    """The sides of the products that the weights' gradients are, in the rows' dtype; weight [e, R], else [e, R, D or F]."""

    rows: jax.Array
    weight: jax.Array
    dy: jax.Array
    hidden: jax.Array  # times weight
    din: jax.Array  # of what w_in gives
    dgate: jax.Array | None  # of what w_gate gives


def check(rows: jax.Array, weights: Weights, activation: str) -> None:
    """Raises NotImplementedError for what this kernel lacks: nothing, it takes every floating dtype, shape and activation."""
    del rows, weights, activation


def forward(rows: jax.Array, weights: Weights, activation: str, counts: jax.Array | None = None) -> jax.Array:
    """out = FFN_e(row) for every row of every expert e; like rows. 2 F D FLOPs a row and matmul; keeps hidden."""
    hidden = ACTIVATIONS[activation](*_hidden_inputs(rows, weights, counts))
    return _plus(_times(hidden.astype(rows.dtype), weights.w_out, counts), weights.b_out, counts)


def backward_rows(
    rows: jax.Array,
    weight: jax.Array,
    weights: Weights,
    activation: str,
    dy: jax.Array,
    counts: jax.Array | None = None,
) -> tuple[Grads, Kept]:
    """The gradients of y = weight * FFN(rows) that go home, with the hidden values recomputed: 5 matmuls with a gate, else 3.

    With g = dy w_out^T: dweight = <g, hidden> + <dy, b_out> = <dy, out> and dhidden = weight * g, so `out` itself is never
    recomputed.
    """
    hidden, pullback = jax.vjp(ACTIVATIONS[activation], *_hidden_inputs(rows, weights, counts))
    factor = weight[..., None].astype(hidden.dtype)
    g = _back(dy, weights.w_out, counts)
    dweight = jnp.sum(g * hidden, axis=-1)
    if weights.b_out is not None:
        dweight += _back(dy, weights.b_out[:, None], counts)[..., 0]
    sides = [side.astype(rows.dtype) for side in (factor * hidden, *pullback(factor * g))]
    # Written once: XLA would make them anew, of float32, for every tile of the matmuls that take them.
    hidden, *douts = lax.optimization_barrier(sides)
    drows = [_back(d, w, counts) for d, w in zip(douts, (weights.w_in, weights.w_gate))]
    kept = Kept(rows, weight, dy, hidden, *douts, *[None] * (2 - len(douts)))
    return Grads(sum(drows[1:], drows[0]), dweight), kept


def backward_weights(pieces: Sequence[Kept], weights: Weights, counts: jax.Array | None = None) -> Weights:
    """The weights' gradients: a matmul each, of all pieces together. Those of biases are sums of the same rows, in float32."""
    kept = jax.tree.map(lambda *parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1), *pieces)
    found = {"w_out": lambda: _outer(kept.hidden, kept.dy, counts), "b_out": lambda: _sum(kept.dy, counts, kept.weight)}
    for side, d in (("in", kept.din), ("gate", kept.dgate)):
        found[f"w_{side}"] = lambda d=d: _outer(kept.rows, d, counts)
        found[f"b_{side}"] = lambda d=d: _sum(d, counts)
    return Weights(**{name: None if w is None else found[name]() for name, w in weights._asdict().items()})


def _hidden_inputs(rows, weights: Weights, counts):
    """[u], or [u, v] with a gate: what goes into the activation."""
    pairs = ((weights.w_in, weights.b_in), (weights.w_gate, weights.b_gate))
    return [_plus(_times(rows, w, counts), b, counts) for w, b in pairs if w is not None]


def _times(rows, w, counts):
    """rows w of each expert."""
    return _matmul("eri,eio->ero", rows, w) if counts is None else grouped.times(rows, w, counts)


def _back(rows, w, counts):
    """rows w^T of each expert."""
    return _matmul("ero,eio->eri", rows, w) if counts is None else grouped.back(rows, w, counts)


def _outer(rows, others, counts):
    """rows^T others of each expert."""
    return _matmul("eri,ero->eio", rows, others) if counts is None else grouped.outer(rows, others, counts)


def _plus(rows, bias, counts):
    """Each expert's bias [e, A] on its rows; None is none. To sorted rows it comes as a matmul of ones."""
    if bias is None:
        return rows
    return rows + (bias[:, None].astype(rows.dtype) if counts is None else _times(_ones(rows), bias[:, None], counts))


def _sum(rows, counts, weight=None):
    """Each expert's rows, times their weights, added up: [e, A]. Of rows that lie apart not by a matmul, which may round."""
    weight = jnp.ones(rows.shape[:-1], rows.dtype) if weight is None else weight
    if counts is not None:
        return _outer(weight[..., None], rows, counts)[:, 0]
    return jnp.sum(weight[..., None] * rows.astype(jnp.promote_types(rows.dtype, jnp.float32)), axis=1)


def _ones(rows):
    return jnp.ones((rows.shape[0], 1), rows.dtype)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
