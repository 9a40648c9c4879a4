"""Keys in pages of a pool, for the kernel in plain XLA operations: a tile's pages are fetched when it is met."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.interface import Extras


class Pages(NamedTuple):
    """Those of each sequence, by `Extras`' table, how many tokens they hold together, and how many one has room for."""

    numbers: jax.Array  # [B, M]
    starts: jax.Array
    lengths: jax.Array  # [B]
    size: int

    @classmethod
    def make(cls, extras: Extras, size: int) -> "Pages":
        assert extras.pages is not None and extras.page_starts is not None and extras.key_lengths is not None, extras
        return cls(extras.pages, extras.page_starts, extras.key_lengths, size)

    @property
    def keys(self) -> int:
        """Of a sequence, where all of its pages are met."""
        return self.numbers.shape[1] * self.size

    def block(self, longest: int) -> int:
        """Of so many keys at most: of whole pages, or the largest equal part of a page."""
        if longest >= self.size:
            return longest // self.size * self.size
        return next(n for n in range(longest, 0, -1) if self.size % n == 0)

    def cut(self, pool, tile):
        """A tile [b, k, s, ...] of its keys, of a pool [P, K, S, ...]; zeros past the lengths: gradients multiply them."""
        pool = pool.swapaxes(1, 2)  # as it lies in memory, and as XLA has it then
        numbers, offset, length = self._of(self.numbers, tile)
        heads, rest = tile["k"], pool.shape[3:]
        start, sizes = (offset, heads.start, *(jnp.int32(0) for _ in rest)), (1, length, heads.size, *rest)
        fetch = lambda page: lax.dynamic_slice(pool, (page, *start), sizes)[0]
        found = jax.vmap(jax.vmap(fetch))(numbers)
        found = found.reshape(found.shape[0], -1, *found.shape[3:])
        place = tile["s"].start + jnp.arange(found.shape[1], dtype=jnp.int32)
        inside = place < lax.dynamic_slice(self.lengths, (tile["b"].start,), (tile["b"].size,))[:, None]
        inside = inside.reshape(*inside.shape, *(1 for _ in found.shape[2:]))
        return jnp.where(inside, found, jnp.zeros((), found.dtype)).swapaxes(1, 2)

    def positions(self, tile):
        """Of its keys, [b, 1, 1, 1, s]."""
        starts, offset, length = self._of(self.starts, tile)
        found = starts[..., None] + offset + jnp.arange(length, dtype=jnp.int32)
        return found.reshape(found.shape[0], 1, 1, 1, math.prod(found.shape[1:]))

    def _of(self, table, tile):
        """A tile's part of a table, and which tokens of each page there are its: so many from one on."""
        sequences, keys = tile["b"], tile["s"]
        count, length = max(1, keys.size // self.size), min(keys.size, self.size)
        found = lax.dynamic_slice(table, (sequences.start, keys.start // self.size), (sequences.size, count))
        return found, keys.start % self.size, length
