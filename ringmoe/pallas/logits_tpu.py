"""The logits of a pair of blocks in a TPU's attention kernel, and what is known of them before they are computed.

`Blocks` lays a call out: numbers that a kernel is given first (where blocks stand, lengths, the least and greatest segment
and position of each block, a head's slope and dropout seed) in one int32 vector, numbers of queries and keys as `[B, 1, T]`
and `[B, 1, S]`, and a bias and a mask as they are. By the numbers a block pair is skipped, or computed without a mask, or
with one. A `Pair` is one such pair within a kernel, computed by `Tile`s. Logits are transposed, keys by queries, and in units
of log 2.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ringmoe import dropout, softmax
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band
from ringmoe.pallas import blocks
from ringmoe.pallas.blocks import LOG2E, POSITIONS, SEGMENTS

LANES = 128
ROWS, COLUMNS = zip(SEGMENTS, POSITIONS)
PAIRS = ("bias", "mask")


class Tile(NamedTuple):
    """Part of a pair of blocks: some of its keys, and the queries from one on.

    From the first `crossed` of these the band may hide some of the keys, from the others none.
    """

    keys: Any  # of pl.ds
    queries: Any
    crossed: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.keys.size, self.queries.size

    def within(self, rows: int, columns: int) -> tuple:
        """Where it is in an array of the pair, which has one row or one column where they are alike."""
        return self.queries if rows > 1 else slice(None), self.keys if columns > 1 else slice(None)


@dataclasses.dataclass(frozen=True)
class Blocks(blocks.Blocks):
    """Where the numbers of a call are, all static; `scalars` is always the vector or its ref."""

    @classmethod
    def make(cls, spec, q, k, extras: Extras, at: Offsets, block_q: int, block_k: int):
        """`(blocks, scalars, vectors)` of a call."""
        numbers = blocks.known(extras, at, block_q, block_k) | {"first": jnp.int32(0)}  # query block of a backward run
        found = {name: x for name, x in extras._asdict().items() if x is not None}
        vectors = {name: found[name][:, None] for name in (*ROWS, *COLUMNS) if name in found}
        vectors |= {name: found[name] for name in PAIRS if name in found}
        if "mask" in vectors:  # of bytes, where there are many
            vectors["mask"] = vectors["mask"].astype(jnp.int8 if min(vectors["mask"].shape[2:]) > 1 else jnp.int32)
        layout, scalars = blocks.packed(numbers)
        return cls(spec, q.shape[2], k.shape[2], block_q, block_k, layout), scalars, vectors

    def starting(self, scalars, first):
        """The vector for a backward run that begins at query block `first`."""
        return scalars.at[self._at["first"][0]].set(first)

    @property
    def ragged(self) -> bool:
        """Whether a last block ends after the array does; what is there then is no number that anybody wrote."""
        return self.num_queries % self.block_q > 0 or self.num_keys % self.block_k > 0

    @property
    def halves(self) -> bool:
        """Whether a boundary can leave half of a block's keys unseen by all of its queries, and is no diagonal."""
        narrow = self.block_k >= 2 * self.block_q and self.block_k % (2 * LANES) == 0 and not self.diagonals
        return narrow and not self.spec.band.window.is_full and not self.has("key_positions")

    @property
    def diagonals(self) -> range:
        """Keys of a block with which the queries' may begin, so that the causal boundary is the diagonal from there on.

        Each is one more body of the kernel.
        """
        few = self.block_q % LANES == 0 and self.block_k in (self.block_q, 2 * self.block_q)
        alone = self.spec.band.window == Band(right=0) and not self.has("query_positions", "key_positions")
        return range(0, self.block_k if few and alone else 0, self.block_q)

    def keys_met(self, scalars, b, i):
        """First and last (exclusive) block of keys that query block i of sequence b needs, as far as places tell."""
        first, last = self._met(scalars, Band.keys_met, "key", b, self.span(scalars, "query", i))
        if self.has("query_positions") and not self.has("key_positions"):  # else in no order, and any block may be met
            start, stop = (self.number(scalars, "query_positions", b, i, end) for end in range(2))
            nearest, farthest = self.spec.band.window.keys_met(start, stop, self.places(scalars)[1], self.block_k)
            first, last = jnp.maximum(first, nearest), jnp.minimum(last, farthest)
        return first, last

    def queries_met(self, scalars, b, j):
        """The same of query blocks, for key block j."""
        return self._met(scalars, Band.queries_met, "query", b, self.span(scalars, "key", j))

    def _met(self, scalars, met, side: str, b, span):
        band = self.spec.band.ends if self.has("query_positions", "key_positions") else self.spec.band
        places, (block, _) = self.places(scalars)[side == "key"], self.side(side)
        first, last = met(band, *span, places, block)
        if self.has(f"{side}_lengths"):
            real = places.before(self.number(scalars, f"{side}_lengths", b))
            last = jnp.minimum(last, lax.div(real + block - 1, jnp.int32(block)))
        return first, last

    def specs(self, vectors, pair: Callable) -> dict[str, pl.BlockSpec]:
        """Of the vectors and arrays; `pair(*step)` is (b, n, i, j), the sequence, query head and blocks of a grid's step."""

        def of(name: str, x):
            if name not in PAIRS:
                which, block = (2, self.block_q) if name in ROWS else (3, self.block_k)
                return pl.BlockSpec((None, 1, block), lambda *step: (pair(*step)[0], 0, pair(*step)[which]))
            block = (None, None, *(1 if n == 1 else size for n, size in zip(x.shape[2:], (self.block_q, self.block_k))))
            whole = [n == 1 for n in x.shape]
            return pl.BlockSpec(block, lambda *step: tuple(0 if one else at for one, at in zip(whole, pair(*step))))

        return {name: of(name, x) for name, x in vectors.items()}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Query block i and key block j of sequence b, for query head n, inside a kernel."""

    blocks: Blocks
    scalars: Any
    vectors: dict[str, Any]  # refs [1, block] of its rows and columns
    b: Any
    n: Any
    i: Any
    j: Any

    @property
    def spec(self) -> AttentionSpec:
        return self.blocks.spec

    @functools.cached_property
    def spans(self):
        """Places of the queries and of the keys: (start, stop) of each."""
        span = functools.partial(self.blocks.span, self.scalars)
        return span("query", self.i), span("key", self.j)

    def run(self, block: Callable[..., None]) -> None:
        """Calls `block(masked, first, keys)` of so many keys from `first` on; not at all where no query sees any of them.

        A block of which nothing is hidden isn't masked, and of one whose other half nobody sees only a half is computed.
        `block(True, 0, keys, diagonal)`: the key `diagonal` stands where the first query does, and the boundary is causal.
        """
        blocks, band, size = self.blocks, self.spec.band, self.blocks.block_k
        extras = ("query_lengths", "key_lengths", *ROWS, *COLUMNS)
        if band.is_full and not blocks.has(*extras) and not blocks.ragged and "mask" not in self.vectors:
            block(False, 0, size)
            return
        (first, _), (start, _) = self.spans  # kept: found in a branch they would be that branch's
        seen, full = self._seen_and_full()
        pl.when(full)(lambda: block(False, 0, size))
        crossed = seen & ~full
        for diagonal in blocks.diagonals:
            here = first == start + diagonal
            pl.when(crossed & here)(functools.partial(block, True, 0, diagonal + blocks.block_q, diagonal))
            crossed &= ~here
        if not blocks.halves:
            pl.when(crossed)(lambda: block(True, 0, size))
            return
        queries, half = blocks.compared(self.scalars, self.b, self.i, self.j)[0], size // 2
        earlier, later = (band.window.meets(*queries, at, at + half) for at in (start, start + half))
        pl.when(crossed & earlier & later)(lambda: block(True, 0, size))
        pl.when(crossed & (earlier ^ later))(lambda: block(True, jnp.where(later, half, 0), half))

    def _seen_and_full(self):
        seen, full = self.blocks.seen_and_full(self.scalars, self.b, self.i, self.j)
        return seen, full & ("mask" not in self.vectors)

    def logits(self, dot, c: Tile, masked: bool):
        """`(s, slope)` of a tile: logits [keys, queries], and the derivative of a soft cap there, or None."""
        spec, slope = self.spec, None
        if not self.blocks.has("slopes") and "bias" not in self.vectors and spec.soft_cap is None:
            s = dot * (spec.scale * LOG2E)
        else:
            s = dot * spec.scale
            if "bias" in self.vectors:
                s = s + self._turned("bias", c)
            if self.blocks.has("slopes"):
                key, query = self._compared_within(c)
                per_head = lax.bitcast_convert_type(self.blocks.number(self.scalars, "slopes", self.n), jnp.float32)
                s = s - per_head * jnp.abs(query - key).astype(jnp.float32)
            if spec.soft_cap is not None:
                tanh = jnp.tanh(s * (1 / spec.soft_cap))
                s, slope = tanh * spec.soft_cap, 1 - tanh * tanh
            s = s * LOG2E
        if not masked:
            return s, slope
        seen = self._seen(c)
        # A slope of what a block's last rows hold may be NaN.
        return jnp.where(seen, s, softmax.MASKED), None if slope is None else jnp.where(seen, slope, 0.0)

    def kept(self, c: Tile):
        """Which pairs of a tile dropout keeps; None without it."""
        if not self.blocks.has("seeds"):
            return None
        key, query = self._places_within(c)
        seed = lax.bitcast_convert_type(self.blocks.number(self.scalars, "seeds", self.b, self.n), jnp.uint32)
        return dropout.kept(self.spec.dropout_rate, seed, query, key)

    def inside(self, x, side: str, start=0, axis: int = 0):
        """A block of an array of the side "query" or "key" from `start` on, with zeros past the array's end and past the
        sequence's length: whatever is there, 0 times it must be 0."""
        blocks, of_query, (block, length) = self.blocks, side == "query", self.blocks.side(side)
        local, real = start + lax.broadcasted_iota(jnp.int32, x.shape, axis), []
        if length % block:
            real.append((self.i if of_query else self.j) * block + local < length)
        if blocks.has(f"{side}_lengths"):
            place = self.spans[0 if of_query else 1][0] + local
            real.append(place < blocks.number(self.scalars, f"{side}_lengths", self.b))
        return jnp.where(functools.reduce(operator.and_, real), x, jnp.zeros_like(x)) if real else x

    def _places_within(self, c: Tile):
        """Places of its keys [keys, 1] and of its queries [1, queries]."""
        (q_start, _), (k_start, _) = self.spans
        return k_start + _along(c, 0), q_start + _along(c, 1)

    def _compared_within(self, c: Tile):
        """What the band compares of them."""
        key, query = self._places_within(c)
        if "key_positions" in self.vectors:
            key = self._column("key_positions", c)
        if "query_positions" in self.vectors:
            query = self.vectors["query_positions"][:, c.queries]
        return key, query

    def _seen(self, c: Tile):
        """Which pairs take part, [keys, queries]."""
        blocks, band = self.blocks, self.spec.band
        key, query = self._compared_within(c)
        seen = []
        if c.crossed and band.window != Band():
            crossed = jnp.broadcast_to(band.window(query[:, : c.crossed], key), (c.keys.size, c.crossed))
            rest = jnp.ones((c.keys.size, c.queries.size - c.crossed), bool)
            seen.append(jnp.concatenate([crossed, rest], 1) if rest.size else crossed)
        key, query = self._places_within(c)
        seen += [band.ends(query, key)] if band.ends != Band() else []
        for name, place in (("query_lengths", query), ("key_lengths", key)):
            if blocks.has(name):
                seen.append(place < blocks.number(self.scalars, name, self.b))
        if "query_segments" in self.vectors:
            seen.append(self._column("key_segments", c) == self.vectors["query_segments"][:, c.queries])
        if blocks.num_keys % blocks.block_k:
            seen.append(self.j * blocks.block_k + _along(c, 0) < blocks.num_keys)
        if blocks.num_queries % blocks.block_q:
            seen.append(self.i * blocks.block_q + _along(c, 1) < blocks.num_queries)
        if "mask" in self.vectors:
            seen.append(self._turned("mask", c) != 0)
        return jnp.broadcast_to(functools.reduce(operator.and_, seen, jnp.bool_(True)), c.shape)

    def _column(self, name: str, c: Tile):
        """Numbers of its keys, turned from a row into [keys, queries], alike in every lane."""
        return _across(self.vectors[name][:, c.keys], c.queries.size)

    def _turned(self, name: str, c: Tile):
        """A bias or a mask of it, [1 or keys, 1 or queries]."""
        ref = self.vectors[name]
        rows, columns = ref.shape
        x = ref[c.within(*ref.shape)]
        x = x.astype(jnp.float32 if name == "bias" else jnp.int32)
        if rows == columns == 1:
            return x
        if columns == 1:
            return jnp.broadcast_to(x, (rows, LANES)).T[:1]
        return _across(x, c.queries.size) if rows == 1 else x.T


def _along(c: Tile, dim: int):
    """Where its keys (dim 0) or queries (dim 1) are within the blocks, [keys, 1] or [1, queries]."""
    shape = (c.keys.size, 1) if dim == 0 else (1, c.queries.size)
    return (c.queries if dim else c.keys).start + lax.broadcasted_iota(jnp.int32, shape, dim)


def _across(row, width: int):
    """A row [1, n] as [n, width], alike in every lane."""
    tile = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.concatenate([tile] * -(-width // LANES), axis=1)[:, :width]
