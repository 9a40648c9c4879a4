"""Blocks of queries and keys, and what is known of a pair of them before it is computed: what kernels of TPUs and GPUs share.

Numbers that a kernel is given first are one int32 vector: where queries and keys stand, lengths, the least and the greatest
segment and position of each block, and what is a head's own.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Places

LENGTHS = ("query_lengths", "key_lengths")
SEGMENTS = ("query_segments", "key_segments")
POSITIONS = ("query_positions", "key_positions")
LOG2E = math.log2(math.e)

Layout = tuple[tuple[str, int, tuple[int, ...]], ...]  # name, place in the vector, shape


def known(extras: Extras, at: Offsets, block_q: int, block_k: int) -> dict[str, jax.Array]:
    """The numbers of a call, by name; those of segments and positions are `ranges` of blocks."""
    numbers = {side: jnp.stack([jnp.asarray(x, jnp.int32) for x in getattr(at, side)]) for side in ("query", "key")}
    for name in (*LENGTHS, "slopes", "seeds", "pages", "page_starts", *SEGMENTS, *POSITIONS):
        x = getattr(extras, name)
        if x is not None:
            of_blocks = name in (*SEGMENTS, *POSITIONS)
            numbers[name] = ranges(x, block_q if name.startswith("query") else block_k) if of_blocks else x
    return numbers


def packed(numbers: dict[str, jax.Array]) -> tuple[Layout, jax.Array]:
    """The vector, and where in it each is."""
    layout, place = [], 0
    for name, x in numbers.items():
        layout.append((name, place, x.shape))
        place += x.size
    return tuple(layout), jnp.concatenate([_as_int32(x).reshape(-1) for x in numbers.values()])


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Of so many queries and keys, of which the last ones may end after the array does. Of a pair of them, which `b`, `i` and
    `j` name by its sequence, query block and key block, `scalars`, the vector or its ref, tell what may be seen."""

    spec: AttentionSpec
    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    layout: Layout = ()

    def side(self, name: str) -> tuple[int, int]:
        """How long a block of "query" or "key" is, and all of them together."""
        return (self.block_q, self.num_queries) if name == "query" else (self.block_k, self.num_keys)

    @property
    def num_q(self) -> int:
        return -(-self.num_queries // self.block_q)

    @property
    def num_k(self) -> int:
        return -(-self.num_keys // self.block_k)

    @functools.cached_property
    def _at(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        return {name: (place, shape) for name, place, shape in self.layout}

    def pairs(self, at: Offsets) -> int:
        """How many are met, as far as is known before the run: `Band.met`."""
        return self.spec.band.met(
            self.num_queries, self.num_keys, self.block_q, self.block_k, apart(at), self.spec.pieces
        )

    def has(self, *names: str) -> bool:
        return any(name in self._at for name in names)

    def number(self, scalars, name: str, *index):
        place, shape = self._at[name]
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        steps = (n * stride if stride > 1 else n for n, stride in zip(index, strides, strict=True))
        return scalars[functools.reduce(operator.add, steps, place)]

    def places(self, scalars) -> tuple[Places, Places]:
        """Where queries and keys stand."""
        pieces = range(self.spec.pieces)
        query, key = (tuple(self.number(scalars, side, n) for n in pieces) for side in ("query", "key"))
        return Offsets(query, key).places(self.num_queries, self.num_keys)

    def span(self, scalars, side: str, index):
        """The places of a block of "query" or "key": (start, stop)."""
        block, _ = self.side(side)
        start = self.places(scalars)[side == "key"].of(index * block)
        return start, start + block

    def compared(self, scalars, b, i, j):
        """What the band compares of a pair: the queries' and the keys' (start, stop)."""
        pairs = zip(POSITIONS, (("query", i), ("key", j)))
        return [self._range(scalars, x, b, of[1]) if self.has(x) else self.span(scalars, *of) for x, of in pairs]

    def _range(self, scalars, name: str, b, index):
        return self.number(scalars, name, b, index, 0), self.number(scalars, name, b, index, 1)

    def seen_and_full(self, scalars, b, i, j):
        """Whether any query of a pair may see any key of it, and whether every one sees every one."""
        queries, keys = self.span(scalars, "query", i), self.span(scalars, "key", j)
        compared, window, ends = self.compared(scalars, b, i, j), self.spec.band.window, self.spec.band.ends
        seen = window.meets(*compared[0], *compared[1]) & ends.meets(*queries, *keys)
        full = window.is_full_block(*compared[0], *compared[1]) & ends.is_full_block(*queries, *keys)
        for name, (start, stop) in zip(LENGTHS, (queries, keys)):
            if self.has(name):
                length = self.number(scalars, name, b)
                seen, full = seen & (start < length), full & (stop <= length)
        if self.has(*SEGMENTS):
            ids = [self._range(scalars, name, b, index) for name, index in zip(SEGMENTS, (i, j))]
            seen, full = seen & share_segments(*ids), full & are_one_segment(*ids)
        for side, index in (("query", i), ("key", j)):
            block, length = self.side(side)
            if length % block:
                full &= (index + 1) * block <= length
        return seen, full


def apart(at: Offsets) -> int | None:
    """How far the first query is from the first key, None where only the run knows."""
    if at.apart is not None:
        return at.apart
    unknown = any(isinstance(x, jax.core.Tracer) for side in at[:2] for x in side)
    return None if unknown else int(at.query[0]) - int(at.key[0])


def share_segments(queries, keys):
    """False only where no query of a pair is of a key's segment, told from (least, greatest + 1) of each."""
    return (queries[0] < keys[1]) & (keys[0] < queries[1])


def are_one_segment(queries, keys):
    """Whether all of them are of one segment."""
    return (queries[0] == keys[0]) & (queries[1] == keys[1]) & (queries[1] == queries[0] + 1)


def ranges(x, block: int):
    """The least of each block of the last dim of [B, T], and one more than the greatest: [B, blocks, 2]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge").reshape(x.shape[0], -1, block)
    return jnp.stack([x.min(-1), x.max(-1) + 1], -1)


def _as_int32(x):
    """Its bits, where it is no integer."""
    if x.dtype == jnp.int32:
        return x
    return lax.bitcast_convert_type(x if x.dtype == jnp.uint32 else x.astype(jnp.float32), jnp.int32)
