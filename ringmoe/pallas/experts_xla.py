"""The expert FFN on any backend: matmuls left to XLA. What an expert kernel is, too:

    check(rows, w_in, w_gate, w_out)                          raises NotImplementedError with what it lacks
    forward(rows, w_in, w_gate, w_out, counts) -> out
    backward(rows, weight, w_in, w_gate, w_out, dy, counts) -> Grads

on one device's arrays: rows, dy [e, R, D]; weight [e, R]; w_in, w_gate [e, D, F]; w_out [e, F, D]; w_gate is None without a
gate. With `counts` [e] the rows are sorted by expert instead of apart: rows, dy [n, D], weight [n], the first counts[0] of
them expert 0's; those past the last expert's give anything. `out` is the sum over this device's share of F, in float32
(float64 for float64 inputs).

    hidden = silu(rows w_gate) * (rows w_in), with a gate (SwiGLU);  gelu(rows w_in), tanh form, without
    out = hidden w_out

Matmuls accumulate in float32; hidden is rounded to the rows' dtype before the second matmul. A row of zeros, an empty slot,
gives zeros. Source: SwiGLU, https://arxiv.org/abs/2002.05202.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ringmoe.pallas import grouped


class Grads(NamedTuple):
    """Gradients of sum(weight * out * dy), all in float32 (float64): each of the shape of what it is the gradient of."""

    drows: jax.Array
    dweight: jax.Array
    dw_in: jax.Array
    dw_gate: jax.Array | None
    dw_out: jax.Array


def check(rows, w_in, w_gate, w_out) -> None:
    """Raises NotImplementedError for what this kernel lacks: nothing, it takes every floating dtype and shape."""
    del rows, w_in, w_gate, w_out


def forward(
    rows: jax.Array, w_in: jax.Array, w_gate: jax.Array | None, w_out: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """out = FFN_e(row) for every row of every expert e; like rows. 2 F D FLOPs a row and matmul; keeps hidden."""
    pre = _hidden_inputs(rows, w_in, w_gate, counts)
    return _times(_activation(*pre).astype(rows.dtype), w_out, counts)


def backward(
    rows: jax.Array, weight: jax.Array, w_in: jax.Array, w_gate: jax.Array | None, w_out: jax.Array, dy: jax.Array,
    counts: jax.Array | None = None,
) -> Grads:  # fmt: skip
    """All gradients of y = weight * FFN(rows), with the hidden values recomputed.

    With g = dy w_out^T: dweight = <g, hidden> = <dy, out> and dhidden = weight * g, so `out` itself is never recomputed.
    """
    hidden, pullback = jax.vjp(_activation, *_hidden_inputs(rows, w_in, w_gate, counts))
    weight = weight[..., None].astype(hidden.dtype)
    g = _back(dy, w_out, counts)
    dweight = jnp.sum(g * hidden, axis=-1)
    dw_out = _outer((weight * hidden).astype(rows.dtype), dy, counts)
    dpre = [d.astype(rows.dtype) for d in pullback(weight * g)]
    drows = [_back(d, w, counts) for d, w in zip(dpre, (w_in, w_gate), strict=False)]
    dws = [_outer(rows, d, counts) for d in dpre]
    return Grads(sum(drows[1:], drows[0]), dweight, dws[0], dws[1] if w_gate is not None else None, dw_out)


def _activation(u, v=None):
    """hidden from u = rows w_in and v = rows w_gate, elementwise."""
    return jax.nn.gelu(u, approximate=True) if v is None else jax.nn.silu(v) * u


def _hidden_inputs(rows, w_in, w_gate, counts):
    return [_times(rows, w, counts) for w in (w_in, w_gate) if w is not None]


def _times(rows, w, counts):
    return _matmul("eri,eio->ero", rows, w) if counts is None else grouped.times(rows, w, counts)


def _back(rows, w, counts):
    return _matmul("ero,eio->eri", rows, w) if counts is None else grouped.back(rows, w, counts)


def _outer(rows, others, counts):
    return _matmul("eri,ero->eio", rows, others) if counts is None else grouped.outer(rows, others, counts)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
