"""The expert FFN on any backend: batched matmuls left to XLA. What an expert kernel is, too:

    check(rows, w_in, w_gate, w_out)                          raises NotImplementedError with what it lacks
    forward(rows, w_in, w_gate, w_out) -> out
    backward(rows, weight, w_in, w_gate, w_out, dy) -> Grads

on one device's arrays: rows, dy [e, R, D]; weight [e, R]; w_in, w_gate [e, D, F]; w_out [e, F, D]; w_gate is None without a
gate. `out` is the sum over this device's share of F, in float32 (float64 for float64 inputs).

    hidden = silu(rows w_gate) * (rows w_in), with a gate (SwiGLU);  gelu(rows w_in), tanh form, without
    out = hidden w_out

Matmuls accumulate in float32; hidden is rounded to the rows' dtype before the second matmul. A row of zeros, an empty slot,
gives zeros. Source: SwiGLU, https://arxiv.org/abs/2002.05202.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grads(NamedTuple):
    """Gradients of sum(weight * out * dy), all in float32 (float64): drows [e, R, D], dweight [e, R], dW like their W."""

    drows: jax.Array
    dweight: jax.Array
    dw_in: jax.Array
    dw_gate: jax.Array | None
    dw_out: jax.Array


def check(rows, w_in, w_gate, w_out) -> None:
    """Raises NotImplementedError for what this kernel lacks: nothing, it takes every floating dtype and shape."""
    del rows, w_in, w_gate, w_out


def forward(rows: jax.Array, w_in: jax.Array, w_gate: jax.Array | None, w_out: jax.Array) -> jax.Array:
    """out = FFN_e(rows[e]) for every expert e; [e, R, D]. 2 e R F D FLOPs per matmul; keeps hidden, [e, R, F]."""
    pre = _hidden_inputs(rows, w_in, w_gate)
    return _matmul("erf,efd->erd", _activation(*pre).astype(rows.dtype), w_out)


def backward(
    rows: jax.Array, weight: jax.Array, w_in: jax.Array, w_gate: jax.Array | None, w_out: jax.Array, dy: jax.Array
) -> Grads:
    """All gradients of y = weight * FFN(rows), with the hidden values recomputed.

    With g = dy w_out^T: dweight = <g, hidden> = <dy, out> and dhidden = weight * g, so `out` itself is never recomputed.
    """
    hidden, pullback = jax.vjp(_activation, *_hidden_inputs(rows, w_in, w_gate))
    weight = weight[..., None].astype(hidden.dtype)
    g = _matmul("erd,efd->erf", dy, w_out)
    dweight = jnp.sum(g * hidden, axis=-1)
    dw_out = _matmul("erf,erd->efd", (weight * hidden).astype(rows.dtype), dy)
    dpre = [d.astype(rows.dtype) for d in pullback(weight * g)]
    drows = [_matmul("erf,edf->erd", d, w) for d, w in zip(dpre, (w_in, w_gate), strict=False)]
    dws = [_matmul("erd,erf->edf", rows, d) for d in dpre]
    return Grads(sum(drows[1:], drows[0]), dweight, dws[0], dws[1] if w_gate is not None else None, dw_out)


def _activation(u, v=None):
    """hidden from u = rows w_in and v = rows w_gate, elementwise."""
    return jax.nn.gelu(u, approximate=True) if v is None else jax.nn.silu(v) * u


def _hidden_inputs(rows, w_in, w_gate):
    return [_matmul("erd,edf->erf", rows, w) for w in (w_in, w_gate) if w is not None]


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
