"""The online-softmax step, shared by every attention kernel.

    m' = max(m, max_j s_j)      p_j = exp(s_j - m')      alpha = exp(m - m')      l' = alpha l + sum_j p_j

The running maximum starts at the lowest finite number and masked logits are -inf, so that a row without keys keeps l = 0,
no inf - inf is ever formed, and a bias is the number it is, however low. Source: Milakov & Gimelshein,
https://arxiv.org/abs/1805.02867.
"""

import jax
import jax.numpy as jnp

MASKED = -jnp.inf


def initial_max(dtype) -> float:
    """Where the running maximum starts: exp(-inf - it) == 0, and alpha of a first block is 0 or 1."""
    return float(jnp.finfo(dtype).min)


def step(m: jax.Array, l: jax.Array, s: jax.Array, axis: int, exp=jnp.exp):
    """One block: returns `(m', l', alpha, p)`. `m` and `l` keep `axis` with length 1.

    `exp=jnp.exp2` takes `s` and keeps `m` in units of log 2 (logits times log2 e): a multiplication less on TPU.
    """
    # Any number in its place would give the same results: to derivatives the maximum is a constant.
    m_new = jax.lax.stop_gradient(jnp.maximum(m, jnp.max(s, axis, keepdims=True)))
    alpha = exp(m - m_new)
    p = exp(s - m_new)
    return m_new, l * alpha + jnp.sum(p, axis, keepdims=True), alpha, p


def finish(acc: jax.Array, m: jax.Array, l: jax.Array):
    """Unnormalised state to `(output, lse, tail)`: rows that met no key give 0, -inf and 0.

    `lse + tail` is the log-sum-exp: `tail` is what rounding took from `lse = m + log l`, next to nothing for logits of an
    ordinary size, all of log l where they are about -1e9. `m`, `l` broadcast against `acc`.
    """
    empty = l == 0
    log_sum = jnp.log(jnp.where(empty, 1, l))
    lse = m + log_sum
    tail = jnp.where(empty, 0, log_sum - (lse - m))
    return jnp.where(empty, 0, acc / jnp.where(empty, 1, l)), jnp.where(empty, -jnp.inf, lse), tail


def with_sink(o: jax.Array, lse: jax.Array, tail: jax.Array, sink: jax.Array):
    """What `finish` gave, with one more logit in the sum, `sink`, that has no value: all weights are less for it.

    `lse` and `tail` are without the dim of `o` that holds values; `sink` broadcasts against them.
    """
    most = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(lse, sink), initial_max(lse.dtype)))
    weight = jnp.exp(lse - most + tail)
    o, lse, tail = finish(o * weight[..., None], most[..., None], (weight + jnp.exp(sink - most))[..., None])
    return o, lse[..., 0], tail[..., 0]


def finite_lse(lse: jax.Array) -> jax.Array:
    """The LSE to subtract in a backward pass: exp(-inf - 0) == 0 for rows without keys, never inf - inf."""
    return jnp.where(jnp.isneginf(lse), 0, lse)
