"""The expert FFN on any backend: batched matmuls left to XLA. What an expert kernel is, too:

    check(rows, weights, activation)                          raises NotImplementedError with what it lacks
    forward(rows, weights, activation) -> out
    backward(rows, weight, weights, activation, dy) -> Grads

on one device's arrays: rows, dy [e, R, D]; weight [e, R]; weights: `ffn.Weights`, None where absent; activation: a name in
`ffn.ACTIVATIONS`. `out` is the sum over this device's share of F, in float32 (float64 for float64 inputs).

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


class Grads(NamedTuple):
    """Gradients of sum(weight * out * dy), all in float32 (float64): drows [e, R, D], dweight [e, R], weights like theirs."""

    drows: jax.Array
    dweight: jax.Array
    weights: Any


def check(rows: jax.Array, weights: Weights, activation: str) -> None:
    """Raises NotImplementedError for what this kernel lacks: nothing, it takes every floating dtype, shape and activation."""
    del rows, weights, activation


def forward(rows: jax.Array, weights: Weights, activation: str) -> jax.Array:
    """out = FFN_e(rows[e]) for every expert e; [e, R, D]. 2 e R F D FLOPs per matmul; keeps hidden, [e, R, F]."""
    hidden = ACTIVATIONS[activation](*_hidden_inputs(rows, weights))
    return _plus(_times(hidden.astype(rows.dtype), weights.w_out), weights.b_out)


def backward(rows: jax.Array, weight: jax.Array, weights: Weights, activation: str, dy: jax.Array) -> Grads:
    """All gradients of y = weight * FFN(rows), with the hidden values recomputed.

    With g = dy w_out^T: dweight = <g, hidden> + <dy, b_out> = <dy, out> and dhidden = weight * g, so `out` itself is never
    recomputed. Bias gradients are sums of the same rows that the matmuls take, in float32.
    """
    hidden, pullback = jax.vjp(ACTIVATIONS[activation], *_hidden_inputs(rows, weights))
    weight = weight[..., None].astype(hidden.dtype)
    g = _times_transposed(dy, weights.w_out)
    dweight = jnp.sum(g * hidden, axis=-1)
    if weights.b_out is not None:
        dweight += _times_transposed(dy, weights.b_out[:, None])[..., 0]
    found = {"w_out": _outer((weight * hidden).astype(rows.dtype), dy), "b_out": _sum_of_rows(weight * dy)}
    drows = []
    for side, w, d in zip(("in", "gate"), (weights.w_in, weights.w_gate), pullback(weight * g)):
        rounded = d.astype(rows.dtype)
        drows.append(_times_transposed(rounded, w))
        found |= {f"w_{side}": _outer(rows, rounded), f"b_{side}": _sum_of_rows(d)}
    dweights = {name: None if w is None else found[name] for name, w in weights._asdict().items()}
    return Grads(sum(drows[1:], drows[0]), dweight, Weights(**dweights))


def _hidden_inputs(rows, weights: Weights):
    """[u], or [u, v] with a gate: what goes into the activation."""
    pairs = ((weights.w_in, weights.b_in), (weights.w_gate, weights.b_gate))
    return [_plus(_times(rows, w), b) for w, b in pairs if w is not None]


def _times(rows, w):
    """rows w of each expert: [e, R, A] [e, A, B] -> [e, R, B]."""
    return _matmul("era,eab->erb", rows, w)


def _times_transposed(rows, w):
    """rows w^T of each expert: [e, R, B] [e, A, B] -> [e, R, A]."""
    return _matmul("erb,eab->era", rows, w)


def _outer(rows, g):
    """rows^T g of each expert: [e, R, A] [e, R, B] -> [e, A, B]."""
    return _matmul("era,erb->eab", rows, g)


def _plus(rows, bias):
    """Each expert's bias [e, A] on its rows [e, R, A]; None is none."""
    return rows if bias is None else rows + bias[:, None].astype(rows.dtype)


def _sum_of_rows(rows):
    """Each expert's rows [e, R, A] added up: [e, A]."""
    return jnp.sum(rows, axis=1)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
