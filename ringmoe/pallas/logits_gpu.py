"""The logits of a pair of blocks in a Hopper GPU's attention kernel: which pairs of blocks meet, and what is masked of one.

`Blocks` lays a call out; the numbers that only the run knows, where the pieces of queries and keys start, are one int32 vector.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Offsets
from ringmoe.masks import Band, Places


def numbers(at: Offsets) -> jax.Array:
    """The vector."""
    return jnp.stack([jnp.asarray(x, jnp.int32) for side in at for x in side])


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of so many queries and keys, of which the last ones may end after the array does; `numbers` is always the ref."""

    spec: AttentionSpec
    num_queries: int
    num_keys: int
    block_q: int
    block_k: int

    @property
    def num_q(self) -> int:
        return -(-self.num_queries // self.block_q)

    @property
    def num_k(self) -> int:
        return -(-self.num_keys // self.block_k)

    def places(self, numbers) -> tuple[Places, Places]:
        """Where queries and keys stand."""
        pieces = self.spec.pieces
        starts = [numbers[n] for n in range(2 * pieces)]
        return Offsets(tuple(starts[:pieces]), tuple(starts[pieces:])).places(self.num_queries, self.num_keys)

    def keys_met(self, numbers, i):
        """The first block of keys that query block i meets, and how many more there are."""
        queries, keys = self.places(numbers)
        return self._met(Band.keys_met, queries.of(i * self.block_q), self.block_q, keys, self.block_k, self.num_k)

    def queries_met(self, numbers, j):
        """The same of blocks of queries, for key block j."""
        queries, keys = self.places(numbers)
        return self._met(Band.queries_met, keys.of(j * self.block_k), self.block_k, queries, self.block_q, self.num_q)

    def _met(self, met, start, length: int, other: Places, block: int, most: int):
        first, last = met(self.spec.band, start, start + length, other, block)
        # One at least, of which then nothing is seen: a kernel needs no way around its loop.
        first = jnp.minimum(jnp.asarray(first, jnp.int32), most - 1)
        return first, jnp.maximum(jnp.asarray(last, jnp.int32) - first, 1)

    def masked(self, s, numbers, row, key, turned: bool = False):
        """The logits `s` of queries from `row` and keys from `key` on, with those hidden that aren't seen.

        turned: whether it is keys by queries, not queries by keys.
        """
        band, (queries, keys) = self.spec.band, self.places(numbers)
        ragged = self.num_keys % self.block_k > 0
        if band.is_full and not ragged:
            return s
        height, width = s.shape[::-1] if turned else s.shape
        q_start, k_start = queries.of(row), keys.of(key)
        full = band.is_full_block(q_start, q_start + height, k_start, k_start + width)
        if ragged:
            full &= key + width <= self.num_keys

        def hide(s):
            along = lambda dim: plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=plgpu.Layout.WGMMA)
            query, other = (along(1), along(0)) if turned else (along(0), along(1))
            seen = band(q_start + query, k_start + other)
            if ragged:
                seen &= other < self.num_keys - key
            return jnp.where(seen, s, softmax.MASKED)

        return lax.cond(full, lambda s: s, hide, s)
