"""Writing new tokens into a cache whose sequence or pages may be cut: every device those that fall into its own part."""

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.meshes import Axes


def update(axes: Axes, cache, new, first, pages=None):
    """cache [*batch, s, K, H] with new [*batch, T, K, H] at the places first [*batch] and after; what is past the end is
    dropped. With `pages` [*batch, M] the cache is this device's part of a pool [pages, s, K, H].

    As many rows as are new are read and written, or a page's, not the cache: in place, where XLA may have it.
    """
    shape, length, (tokens, *rest) = cache.shape, cache.shape[-3], new.shape[-3:]
    width = min(length, tokens)
    cache, new = cache.reshape(-1, length, *rest), new.reshape(-1, tokens, *rest)
    own = _own_rows if pages is None else _own_pages
    count, write = own(axes, cache.shape, tokens, first.reshape(-1), pages)
    index = jnp.arange(width, dtype=jnp.int32)

    def one(n, cache):
        b, row, start = write(n)
        at = jnp.clip(start, 0, length - width)
        token = (at + index - start)[:, None, None]  # of the new ones
        kept = jax.lax.dynamic_slice(cache, (row, at, 0, 0), (1, width, *rest))[0]
        theirs = new[b].at[token[:, 0, 0]].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        rows = jnp.where((token >= 0) & (token < tokens), theirs, kept)
        return jax.lax.dynamic_update_slice(cache, rows[None], (row, at, 0, 0))

    return jax.lax.fori_loop(0, count, one, cache).reshape(shape)


def _own_rows(axes: Axes, shape, tokens: int, first, _):
    """How many writes there are, and of the nth: the sequence, its row in the cache, and where its new tokens start there."""
    begin = jax.lax.axis_index(axes) * shape[1] if axes else np.int32(0)
    return shape[0], lambda n: (n, n, first[n] - begin)


def _own_pages(axes: Axes, shape, tokens: int, first, pages):
    """The same of a pool: each sequence's tokens lie in so many pages at most, of which others may hold some."""
    held, size, pages = *shape[:2], pages.reshape(first.size, -1)
    touched = 1 + -(-(tokens - 1) // size)
    begin = jax.lax.axis_index(axes) * held if axes else np.int32(0)

    def write(n):
        b, place = n // touched, first[n // touched] // size + n % touched
        number = pages[b].at[place].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
        row = jnp.where(number >= 0, number - begin, -1)
        here = (row >= 0) & (row < held)
        return b, jnp.clip(row, 0, held - 1), jnp.where(here, first[b] - place * size, size)

    return first.size * touched, write
