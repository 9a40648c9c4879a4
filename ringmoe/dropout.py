"""Dropout of attention's weights by a counter: whether a pair is kept is a hash of its sequence, head and places.

    keep_ij = hash(seed, i, j) >= rate 2^32      o_i = sum_j keep_ij / (1 - rate) p_ij v_j

So it is the same on any mesh and in any block, forward and backward, and no mask is ever kept. One seed for each sequence and
head; the hash is the finalizer of MurmurHash3, whose every output bit depends on every input bit
(https://github.com/aappleby/smhasher).
"""

import jax
import jax.numpy as jnp
from jax import lax

ROW, KEY = 0x9E3779B9, 0x85EBCA77  # odd: different places never hash alike


def seeds(key: jax.Array, batch: tuple[int, ...], num_heads: int) -> jax.Array:
    """Of each sequence and head, [*batch, N] uint32."""
    return jax.random.bits(key, (*batch, num_heads), jnp.uint32)


def kept(rate: float, seed: jax.Array, rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Which pairs are kept.

    Args:
      rate: 0 <= rate < 1. seed: uint32. rows, keys: int32 places of queries and keys. All broadcast against each other.
    """
    bits = _mix(_mix(seed ^ _times(rows, ROW)) + _mix(_times(keys, KEY)))
    # Compared as int32, which a TPU's vector unit can do: both sides less 2^31.
    return lax.bitcast_convert_type(bits ^ jnp.uint32(1 << 31), jnp.int32) >= round(rate * 2**32) - 2**31


def drop(x: jax.Array, rate: float, kept: jax.Array | None) -> jax.Array:
    """What belongs to pairs: 0 where one is left out, times 1 / (1 - rate) where it is kept; without dropout, as it is."""
    return x if kept is None else jnp.where(kept, x * (1 / (1 - rate)), 0)


def _times(places, odd: int):
    return lax.bitcast_convert_type(places.astype(jnp.int32), jnp.uint32) * jnp.uint32(odd)


def _mix(x):
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = x ^ lax.shift_right_logical(x, jnp.uint32(shift))
        x = x * jnp.uint32(odd) if odd > 1 else x
    return x
