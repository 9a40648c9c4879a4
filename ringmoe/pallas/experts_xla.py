"""The expert FFN on any backend: matmuls left to XLA. What an expert kernel is, too:

    check(rows, weights, activation)                          raises NotImplementedError with what it lacks
    forward(rows, weights, activation, counts) -> out
    backward(rows, weight, weights, activation, dy, counts) -> Grads

on one device's arrays: rows, dy [e, R, D]; weight [e, R]; weights: `ffn.Weights`, None where absent; activation: a name in
`ffn.ACTIVATIONS`. With `counts` [e] the rows are sorted by expert instead of apart: rows, dy [n, D], weight [n], the first
counts[0] of them expert 0's; those past the last expert's give anything. `out` is the sum over this device's share of F, in
float32 (float64 for float64 inputs).

    hidden = act(rows w_gate + b_gate) * (rows w_in + b_in), with a gate;  act(rows w_in + b_in) without
    out = hidden w_out + b_out

Matmuls accumulate in float32; hidden is rounded to the rows' dtype before the second matmul. A row of zeros, an empty slot,
gives what the biases make of it; its weight and its dy are 0, so that no gradient counts it.
Source: SwiGLU and its kin, https://arxiv.org/abs/2002.05202.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ringmoe.ffn import ACTIVATIONS, Weights
from ringmoe.pallas import grouped


class Grads(NamedTuple):
    """Gradients of sum(weight * out * dy), all in float32 (float64): each of the shape of what it is the gradient of."""

    drows: jax.Array
    dweight: jax.Array
    weights: Any


def check(rows: jax.Array, weights: Weights, activation: str) -> None:
    """Raises NotImplementedError for what this kernel lacks: nothing, it takes every floating dtype, shape and activation."""
    del rows, weights, activation


def forward(rows: jax.Array, weights: Weights, activation: str, counts: jax.Array | None = None) -> jax.Array:
    """out = FFN_e(row) for every row of every expert e; like rows. 2 F D FLOPs a row and matmul; keeps hidden."""
    hidden = ACTIVATIONS[activation](*_hidden_inputs(rows, weights, counts))
    return _plus(_times(hidden.astype(rows.dtype), weights.w_out, counts), weights.b_out, counts)


def backward(
    rows: jax.Array,
    weight: jax.Array,
    weights: Weights,
    activation: str,
    dy: jax.Array,
    counts: jax.Array | None = None,
) -> Grads:
    """All gradients of y = weight * FFN(rows), with the hidden values recomputed.

    With g = dy w_out^T: dweight = <g, hidden> + <dy, b_out> = <dy, out> and dhidden = weight * g, so `out` itself is never
    recomputed. Bias gradients are sums of the same rows that the matmuls take, in float32.
    """
    hidden, pullback = jax.vjp(ACTIVATIONS[activation], *_hidden_inputs(rows, weights, counts))
    weight = weight[..., None].astype(hidden.dtype)
    g = _back(dy, weights.w_out, counts)
    dweight = jnp.sum(g * hidden, axis=-1)
    if weights.b_out is not None:
        dweight += _back(dy, weights.b_out[:, None], counts)[..., 0]
    found = {"w_out": _outer((weight * hidden).astype(rows.dtype), dy, counts), "b_out": _sum(weight * dy, counts)}
    drows = []
    for side, w, d in zip(("in", "gate"), (weights.w_in, weights.w_gate), pullback(weight * g)):
        rounded = d.astype(rows.dtype)
        drows.append(_back(rounded, w, counts))
        found |= {f"w_{side}": _outer(rows, rounded, counts), f"b_{side}": _sum(d, counts)}
    dweights = {name: None if w is None else found[name] for name, w in weights._asdict().items()}
    return Grads(sum(drows[1:], drows[0]), dweight, Weights(**dweights))


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


def _sum(rows, counts):
    """Each expert's rows added up: [e, A]."""
    return jnp.sum(rows, axis=1) if counts is None else _outer(_ones(rows), rows, counts)[:, 0]


def _ones(rows):
    return jnp.ones((rows.shape[0], 1), rows.dtype)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
