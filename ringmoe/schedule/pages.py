"""The pages of a pool that lie on one device, as each sequence's own: a table to fetch them by."""

import jax
import jax.numpy as jnp

from ringmoe.interface import Extras
from ringmoe.masks import FAR, Band


def table(band: Band, extras: Extras, first, count: int, size: int) -> Extras:
    """The extras of a device that holds `count` pages, of `size` tokens each, from page `first` of the pool on.

    `extras.pages` [B, M] are numbers in the whole pool, key_lengths those of the sequences. What comes back knows of the pages
    that lie here and have a key that some query may see: their local numbers in ascending order of their places, page_starts,
    and as key_lengths how many keys they hold. Only the sequence's last page isn't full, and it is the last one here too, so
    these keys follow each other without a gap. The other pages stand after them, under numbers that exist, and have no keys.
    """
    assert extras.pages is not None and extras.key_lengths is not None and extras.query_positions is not None, extras
    number, starts = extras.pages - first, size * jnp.arange(extras.pages.shape[1], dtype=jnp.int32)
    lengths, queries = extras.key_lengths[:, None], extras.query_positions
    low, high = queries.min(1, keepdims=True), queries.max(1, keepdims=True) + 1
    here = band.window.meets(low, high, starts, starts + size) & (number >= 0) & (number < count)
    held = jnp.where(here, jnp.clip(lengths - starts, 0, size), 0).sum(1, dtype=jnp.int32)
    starts, number = jax.lax.sort((jnp.where(here, starts, FAR), number), num_keys=1)
    return extras._replace(key_lengths=held, pages=jnp.clip(number, 0, count - 1), page_starts=starts)
