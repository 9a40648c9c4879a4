"""The online-softmax step, shared by every attention kernel.

    m' = max(m, max_j s_j)      p_j = exp(s_j - m')      alpha = exp(m - m')      l' = alpha l + sum_j p_j

The running maximum starts at a finite value and masked logits are -inf, so that a row without keys keeps l = 0 and no
inf - inf is ever formed. Source: Milakov & Gimelshein, https://arxiv.org/abs/1805.02867.
"""

import jax
import jax.numpy as jnp

INITIAL_MAX = (
    -1e30
)  # finite: exp(-inf - INITIAL_MAX) == 0, and alpha of a first block is exp(-huge) == 0 or exp(0) == 1
MASKED = -jnp.inf


def step(m: jax.Array, l: jax.Array, s: jax.Array, axis: int, exp=jnp.exp):
    """One block: returns `(m', l', alpha, p)`. `m` and `l` keep `axis` with length 1.

    `exp=jnp.exp2` takes `s` and keeps `m` in units of log 2 (logits times log2 e): a multiplication less on TPU.
    """
    m_new = jnp.maximum(m, jnp.max(s, axis, keepdims=True))
    alpha = exp(m - m_new)
    p = exp(s - m_new)
    return m_new, l * alpha + jnp.sum(p, axis, keepdims=True), alpha, p


def finish(acc: jax.Array, m: jax.Array, l: jax.Array):
    """Unnormalised state to `(output, lse)`: rows that met no key give 0 and -inf. `m`, `l` broadcast against `acc`."""
    empty = l == 0
    safe = jnp.where(empty, 1, l)
    return jnp.where(empty, 0, acc / safe), jnp.where(empty, -jnp.inf, m + jnp.log(safe))


def finite_lse(lse: jax.Array) -> jax.Array:
    """The LSE to subtract in a backward pass: exp(-inf - 0) == 0 for rows without keys, never inf - inf."""
    return jnp.where(jnp.isneginf(lse), 0, lse)
