"""Writing new tokens into a cache whose sequence may be cut: every device those that fall into its own part."""

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.meshes import Axes


def update(axes: Axes, cache, new, first):
    """cache [*batch, s, K, H] with new [*batch, T, K, H] at the places first [*batch] and after; what is past the end is
    dropped.

    As many rows as are new are read and written, not the cache: in place, where XLA may have it.
    """
    shape, length = cache.shape, cache.shape[-3]
    width = min(length, new.shape[-3])
    flat = lambda x: x.reshape(-1, *x.shape[-3:])
    cache, new = flat(cache), flat(new)
    start = jax.lax.axis_index(axes) * length if axes else np.int32(0)
    firsts = first.reshape(-1) - start
    index = jnp.arange(width, dtype=jnp.int32)

    def one(b, cache):
        at = jnp.clip(firsts[b], 0, length - width)
        row = (at + index - firsts[b])[:, None, None]  # of the new ones
        kept = jax.lax.dynamic_slice_in_dim(cache[b], at, width)
        theirs = new[b].at[row[:, 0, 0]].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        rows = jnp.where((row >= 0) & (row < new.shape[1]), theirs, kept)
        return jax.lax.dynamic_update_slice(cache, rows[None], (b, at, 0, 0))

    return jax.lax.fori_loop(0, cache.shape[0], one, cache).reshape(shape)
