"""Attention of few queries to a long cache on TPU: the kernel of `interface.py` for decoding, forward only.

All query heads and tokens of a sequence are the rows of one product, and each key head of each key is a column of its own,
s = q k^T [N T, S K], as the cache [S, K, H] lies in memory, so nothing of it is moved. A row sees the columns of its own key
head; the others are masked like keys that it doesn't see. These K - 1 of K products are wasted, and cost nothing: rows are too
few to fill the matrix unit, which is busy taking the keys in, once each, and the call takes as long as reading the cache does.
Blocks past a sequence's length, or before its window, are neither fetched nor computed. A value that is no finite number makes
NaN of all heads of the rows whose blocks hold it.

Of keys in pages of a pool a block is part of a page, or some pages, each fetched by itself from where the table says.

Source: Dao et al., Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import softmax
from ringmoe.errors import Unsuited
from ringmoe.interface import AttentionSpec, Extras, Offsets, is_float8
from ringmoe.masks import FAR
from ringmoe.pallas import attention_xla
from ringmoe.pallas.logits_tpu import LANES, LOG2E, Blocks, Pair
from ringmoe.pallas.tiles_tpu import Config, block_of, dot, nbytes, shape_of, varying_like, walk, within

ROWS = 256  # most rows: with more the softmax takes longer than the memory
BLOCK_BYTES = 2 * 2**20  # of keys, and of values: four of them are in VMEM
TAKEN = {
    "key_lengths",
    "query_positions",
    "key_scales",
    "value_scales",
    "slopes",
    "sinks",
    "pages",
    "page_starts",
}  # of Extras; sinks come after it
SUBLANES = 8  # rows are padded to these
MOST_PAGES = 16  # of a block
TABLE_BYTES = 2**19  # most of pages' numbers and starts: half of a TPU's scalar memory


def check(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks: Unsuited where the call isn't one of decoding."""
    rows, key_heads = q.shape[1] * q.shape[2], k.shape[1]
    if rows > ROWS or spec.pieces > 1:
        raise Unsuited(f"TPU decode kernel: {rows} rows in {spec.pieces} pieces, supported: up to {ROWS}, in one")
    if q.dtype not in (jnp.bfloat16, jnp.float32) or (k.dtype != q.dtype and extras.key_scales is None):
        raise _lacks(f"{q.dtype=}, {k.dtype=}, supported: both bfloat16, both float32, or keys in float8 with scales")
    given = {name for name, x in extras._asdict().items() if x is not None}
    if spec.dropout_rate or given - TAKEN:
        raise _lacks(f"{sorted(given - TAKEN)}, {spec.dropout_rate=}, supported: {sorted(TAKEN)}, no dropout")
    for x in (k, v):
        # Then XLA keeps the heads of a token beside each other, in the order of the rows of [S K, H]; else it would copy all.
        beside = (1, 4, *(() if is_float8(x.dtype) else (2,))) if x.shape[3] == LANES else (1,)
        if x.shape[3] % LANES or (key_heads not in beside and key_heads % SUBLANES):
            multiples = f"{beside} of them or a multiple of {SUBLANES}"
            raise _lacks(f"{key_heads} key heads of {x.shape[3]}, supported: {multiples}, each a multiple of {LANES}")
    if extras.pages is not None:
        size, longest = k.shape[2], _config(rows, k, v).block_k
        if size * key_heads % LANES or (size > longest and size % LANES):
            multiples = f"tokens times heads a multiple of {LANES}, and tokens too above {longest}"
            raise _lacks(f"pages of {size} tokens of {key_heads} key heads, supported: {multiples}")
        if extras.pages.shape[-1] > _most_pages():
            raise _lacks(f"{extras.pages.shape[-1]} pages of a sequence, supported: up to {_most_pages()}")


def _most_pages() -> int:
    """Of all sequences of one call of the kernel: each has a number and a start."""
    return TABLE_BYTES // 8


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU decode kernel: {what}")


def query_positions(extras: Extras, at: Offsets, batch: int, tokens: int) -> jax.Array:
    """[B, T]: as given, or in order."""
    if extras.query_positions is not None:
        return extras.query_positions
    return jnp.broadcast_to(at.query[0] + jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))


init = attention_xla.init
"""The state `(acc, m, l)` [B, N, T, V or 1], in float32; logits, and so m, are in units of log 2."""


def finish(spec: AttentionSpec, state):
    acc, m, l = state
    return attention_xla.finish(spec, (acc, m / LOG2E, l))


@jax.named_scope("ringmoe_attention_decode")
def forward(
    spec: AttentionSpec,
    state,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    at: Offsets,
    config: Config | None = None,
):
    check(spec, q, k, v, extras)
    state = varying_like(state, q, k, v)
    if extras.pages is not None and extras.pages.size > _most_pages():
        return _by_sequences(spec, state, q, k, v, extras, at, config)
    (b, n, t, _), key_heads = q.shape, k.shape[1]
    config = config or _config(n * t, k, v)
    positions = query_positions(extras, at, b, t)
    blocks, scalars = KeyBlocks.of(spec, q, k, extras._replace(query_positions=positions), at, config.block_k)
    columns = blocks.part * key_heads

    vectors = {"row_position": _rows(jnp.broadcast_to(positions[:, None], (b, n, t)))}
    if key_heads > 1:
        head = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None] // (n // key_heads), (1, n, t))
        vectors["row_head"] = _rows(head, -1)
    if extras.slopes is not None:
        vectors["row_slope"] = _rows(jnp.broadcast_to(extras.slopes[None, :, None], (1, n, t)))
    column = jnp.arange(columns, dtype=jnp.int32)[None, None]
    vectors |= {"column_head": column % key_heads, "column_key": column // key_heads}
    scales = {"key_scales": extras.key_scales, "value_scales": extras.value_scales}
    scales = {name: _columns(x)[:, :, 0][:, None] for name, x in scales.items() if x is not None}

    def row_block(b, j, scalars):
        return b, 0, 0

    def parts(shape, axis):
        """The specs of a block's parts, which are columns along an axis of an array."""

        def place(part, b, j, scalars):
            j = within(j, blocks.keys_met(scalars, b, 0), blocks.num_k)
            row, along = blocks.row(scalars, b, j, part)
            return (row, along, 0) if axis == 1 else (row, 0, along)

        return [pl.BlockSpec((None, *shape), functools.partial(place, part)) for part in range(blocks.parts)]

    def vector_spec(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, j, scalars: (b if x.shape[0] > 1 else 0, 0, 0))

    rows, keys, values, state_ = _rows(q), _columns(k), _columns(v), [_rows(x) for x in state]
    state_specs = [pl.BlockSpec((None, *x.shape[1:]), row_block) for x in state_]
    fetched = [[x] * blocks.parts for x in (keys, values)], {name: [x] * blocks.parts for name, x in scales.items()}
    operands = (scalars, rows, *fetched, vectors)
    met = b * blocks.num_keys if blocks.page == 0 else min(b * blocks.num_keys, k.shape[0] * blocks.page)
    new = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, config=config, key_heads=key_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, blocks.steps(extras)),
            in_specs=[
                pl.BlockSpec((None, *rows.shape[1:]), row_block),
                [parts((columns, x.shape[2]), 1) for x in (keys, values)],
                {name: parts((1, columns), 2) for name in scales},
                {name: vector_spec(x) for name, x in vectors.items()},
                *state_specs,
            ],
            out_specs=state_specs,
        ),
        out_shape=[shape_of(x) for x in state_],
        input_output_aliases={len(jax.tree.leaves(operands)) + i: i for i in range(3)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * t * key_heads * met * (q.shape[3] + v.shape[3]),
            transcendentals=n * t * key_heads * met,
            bytes_accessed=nbytes(q, k, v, *state, *state),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_decode",
    )(*operands, *state_)
    return tuple(x[:, : n * t].reshape(b, n, t, -1) for x in new)


def _by_sequences(spec: AttentionSpec, state, q, k, v, extras: Extras, at: Offsets, config):
    """`forward` of as many sequences at a time as their table has room for."""
    own = {name: getattr(extras, name) for name in ("key_lengths", "query_positions", "pages", "page_starts")}
    most = _most_pages() // own["pages"].shape[1]

    def some(first: int):
        state_, q_, own_ = jax.tree.map(lambda x: x[first : first + most], (state, q, own))
        return forward(spec, state_, q_, k, v, extras._replace(**own_), at, config)

    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *map(some, range(0, q.shape[0], most)))


@dataclasses.dataclass(frozen=True)
class KeyBlocks(Blocks):
    """Blocks of keys that follow each other in an array of their sequence; or that lie in pages of `page` tokens, of a pool:
    then a block is some pages of its sequence, its parts, or a part of one."""

    page: int = 0

    @classmethod
    def of(cls, spec, q, k, extras: Extras, at: Offsets, longest: int):
        """`(blocks, scalars)` of a call, with blocks of so many keys at most."""
        names = ("key_lengths", "query_positions", "pages", "page_starts")
        known, size = Extras(**{name: getattr(extras, name) for name in names}), k.shape[2]
        if known.pages is None or known.page_starts is None:
            return cls.make(spec, q, k, known, at, q.shape[2], block_of(size, longest, exact=False))[:2]
        parts = min(MOST_PAGES, longest // size, known.pages.shape[1])
        ends = (0, 0), (0, -known.pages.shape[1] % max(1, parts))
        pages, starts = jnp.pad(known.pages, ends), jnp.pad(known.page_starts, ends, constant_values=FAR)
        known = known._replace(pages=pages, page_starts=starts)
        keys = jax.ShapeDtypeStruct((1, 1, pages.shape[1] * size, 1), k.dtype)
        block_k = parts * size or block_of(size, longest, exact=True)
        blocks, scalars, _ = cls.make(spec, q, keys, known, at, q.shape[2], block_k)
        return dataclasses.replace(blocks, page=size), scalars

    @property
    def parts(self) -> int:
        """In how many places a block lies."""
        return max(1, self.block_k // self.page) if self.page else 1

    @property
    def part(self) -> int:
        """Keys of one."""
        return self.block_k // self.parts

    def steps(self, extras: Extras):
        """Of the grid, for a sequence: of pages, as many as the longest has here."""
        if not self.page or extras.key_lengths is None:
            return self.num_k
        return jnp.maximum(1, jnp.max(-(-extras.key_lengths // self.block_k)))

    def _in_pages(self, j, part: int):
        """Which of its sequence's pages a part of block j is of, and how many such parts come before it there."""
        if self.block_k >= self.page:
            return j * self.parts + part, 0
        parts = jnp.int32(self.page // self.block_k)
        return lax.div(j, parts), lax.rem(j, parts)

    def row(self, scalars, b, j, part: int):
        """Where a part is in the array of the keys: its sequence or page, and which part of that it is."""
        if not self.page:
            return b, j
        page, before = self._in_pages(j, part)
        return self.number(scalars, "pages", b, page), before

    def start(self, scalars, b, j, part: int):
        """The position of a part's first key."""
        if not self.page:
            return self.span(scalars, "key", j)[0]
        page, before = self._in_pages(j, part)
        return self.number(scalars, "page_starts", b, page) + before * self.block_k

    def has(self, *names: str) -> bool:
        return super().has(*names) or (self.page > 0 and "key_positions" in names)

    def _range(self, scalars, name: str, b, index):
        if name != "key_positions":
            return super()._range(scalars, name, b, index)
        return self.start(scalars, b, index, 0), self.start(scalars, b, index, self.parts - 1) + self.part


def _kernel(
    scalars, q_ref, keys_values, scales, vectors, acc_in, m_in, l_in, acc, m, l, *, blocks: KeyBlocks, config, key_heads
):
    b, j = map(pl.program_id, range(2))
    pair = Pair(blocks, scalars, {}, b, jnp.int32(0), jnp.int32(0), j)
    k_refs, v_refs = keys_values

    # Invariant: after step j, (acc, m, l) is the state after the keys that came in with it and those of blocks 0 .. j.
    @pl.when(j == 0)
    def load():
        acc[...], m[...], l[...] = acc_in[...], m_in[...], l_in[...]

    def joined(of, c, axis: int):
        """`of(part, slice)` of the parts' columns that a tile has, along an axis."""
        if blocks.parts == 1:
            return of(0, c.keys)
        first, last, columns = c.keys.start, c.keys.start + c.keys.size, blocks.part * key_heads
        cuts = [(n, max(first - n * columns, 0), min(last - n * columns, columns)) for n in range(blocks.parts)]
        return jnp.concatenate([of(n, pl.ds(low, high - low)) for n, low, high in cuts if low < high], axis)

    def scaled(x, name, c):
        return x * joined(lambda n, cut: scales[name][n][:, cut], c, 1).astype(jnp.float32) if name in scales else x

    def block(masked: bool, first, keys: int):
        spec, (place, _) = blocks.spec, pair.spans[1]
        starts = [blocks.start(scalars, b, j, n) for n in range(blocks.parts)]
        real = _real_columns(blocks, scalars, b, j, place) * key_heads

        def scores(c):
            k = joined(lambda n, cut: k_refs[n][cut], c, 0)
            s = scaled(dot(q_ref[...], k.astype(q_ref.dtype), 1, 1), "key_scales", c) * spec.scale
            seen = []
            query, key = (
                vectors["row_position"][...],
                joined(lambda n, cut: starts[n] + vectors["column_key"][:, cut], c, 1),
            )
            if "row_slope" in vectors:
                s = s - vectors["row_slope"][...] * jnp.abs(query - key).astype(jnp.float32)
            if spec.soft_cap is not None:
                s = jnp.tanh(s * (1 / spec.soft_cap)) * spec.soft_cap
            if key_heads > 1:
                seen.append(vectors["row_head"][...] == joined(lambda _, cut: vectors["column_head"][:, cut], c, 1))
            if masked:
                seen.append(c.keys.start + lax.broadcasted_iota(jnp.int32, (1, c.keys.size), 1) < real)
                seen.append(spec.band.window(query, key))
            s = s * LOG2E
            return jnp.where(functools.reduce(jnp.logical_and, seen), s, softmax.MASKED) if seen else s

        def accumulate(c, s):
            m_new, l_new, alpha, p = softmax.step(m[...], l[...], s, axis=1, exp=jnp.exp2)
            v = joined(lambda n, cut: v_refs[n][cut], c, 0).astype(q_ref.dtype)
            if masked:  # whatever is past the end, 0 times it must be 0
                v = jnp.where(c.keys.start + lax.broadcasted_iota(jnp.int32, v.shape, 0) < real, v, jnp.zeros_like(v))
            acc[...] = acc[...] * alpha + dot(scaled(p, "value_scales", c).astype(v.dtype), v, 1, 0)
            m[...], l[...] = m_new, l_new

        walk(config, q_ref.shape[0], first * key_heads, keys * key_heads, None, scores, accumulate)

    pair.run(block)


def _real_columns(blocks: Blocks, scalars, b, j, start):
    """How many keys of block j there are: the array, the sequence and what was no padding may end in it."""
    real = blocks.num_keys - j * blocks.block_k
    if blocks.has("key_lengths"):
        real = jnp.minimum(real, blocks.number(scalars, "key_lengths", b) - start)
    return real if blocks.spec.band.keys is None else jnp.minimum(real, blocks.spec.band.keys - start)


def _config(rows: int, k, v) -> Config:
    """Blocks of BLOCK_BYTES, in chunks of so many columns: of fewer the softmax waits longer, more have no room in VMEM."""
    of_key = max(k.shape[1] * x.shape[3] * x.dtype.itemsize for x in (k, v))
    chunk = 2048 if rows <= ROWS // 2 else 1024
    return Config(block_k=max(LANES, BLOCK_BYTES // of_key // LANES * LANES), chunk=chunk, ahead=1)


def _rows(x, fill=0):
    """[B, N, T, ...] as rows [B, N T, ...], of numbers [B, N T, 1], padded to whole sublanes."""
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % SUBLANES), (0, 0)), constant_values=fill)


def _columns(x):
    """[B, K, S, ...] as [B, S K, ...]."""
    x = x.swapaxes(1, 2)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *(x.shape[3:] or (1,)))
