"""Attention of few queries to a long cache on TPU: the kernel of `interface.py` for decoding, forward only.

All query heads and tokens of a sequence are the rows of one product, and each key head of each key is a column of its own,
s = q k^T [N T, S K], as the cache [S, K, H] lies in memory, so nothing of it is moved. A row sees the columns of its own key
head; the others are masked like keys that it doesn't see. These K - 1 of K products are wasted, and cost nothing: rows are too
few to fill the matrix unit, which is busy taking the keys in, once each, and the call takes as long as reading the cache does.
Blocks past a sequence's length, or before its window, are neither fetched nor computed. A value that is no finite number makes
NaN of all heads of the rows whose blocks hold it.

Source: Dao et al., Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import softmax
from ringmoe.errors import Unsuited
from ringmoe.interface import AttentionSpec, Extras, Offsets, is_float8
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
}  # of Extras; sinks come after it
SUBLANES = 8  # rows are padded to these


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


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU decode kernel: {what}")


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
    (b, n, t, _), (key_heads, s) = q.shape, k.shape[1:3]
    config = config or _config(n * t, k, v)
    positions = extras.query_positions
    if positions is None:
        positions = jnp.broadcast_to(at.query[0] + jnp.arange(t, dtype=jnp.int32), (b, t))
    known = Extras(key_lengths=extras.key_lengths, query_positions=positions)
    block_k = block_of(s, config.block_k, exact=False)
    blocks, scalars, _ = Blocks.make(spec, q, k, known, at, t, block_k)

    vectors = {"row_position": _rows(jnp.broadcast_to(positions[:, None], (b, n, t)))}
    if key_heads > 1:
        head = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None] // (n // key_heads), (1, n, t))
        vectors["row_head"] = _rows(head, -1)
    if extras.slopes is not None:
        vectors["row_slope"] = _rows(jnp.broadcast_to(extras.slopes[None, :, None], (1, n, t)))
    column = jnp.arange(block_k * key_heads, dtype=jnp.int32)[None, None]
    vectors |= {"column_head": column % key_heads, "column_key": column // key_heads}
    scales = {"key_scales": extras.key_scales, "value_scales": extras.value_scales}
    vectors |= {name: _columns(x)[:, :, 0][:, None] for name, x in scales.items() if x is not None}

    def row_block(b, j, scalars):
        return b, 0, 0

    def key_block(b, j, scalars):
        return b, within(j, blocks.keys_met(scalars, b, 0), blocks.num_k), 0

    def vector_spec(name, x):
        if name in scales:
            return pl.BlockSpec((None, 1, block_k * key_heads), lambda *step: (step[0], 0, key_block(*step)[1]))
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, j, scalars: (b if x.shape[0] > 1 else 0, 0, 0))

    rows, keys, values, state_ = _rows(q), _columns(k), _columns(v), [_rows(x) for x in state]
    state_specs = [pl.BlockSpec((None, *x.shape[1:]), row_block) for x in state_]
    new = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, config=config, key_heads=key_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, blocks.num_k),
            in_specs=[
                pl.BlockSpec((None, *rows.shape[1:]), row_block),
                *(pl.BlockSpec((None, block_k * key_heads, x.shape[2]), key_block) for x in (keys, values)),
                {name: vector_spec(name, x) for name, x in vectors.items()},
                *state_specs,
            ],
            out_specs=state_specs,
        ),
        out_shape=[shape_of(x) for x in state_],
        input_output_aliases={4 + len(vectors) + i: i for i in range(3)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * t * keys.shape[1] * b * (q.shape[3] + v.shape[3]),
            transcendentals=n * t * keys.shape[1] * b,
            bytes_accessed=nbytes(q, k, v, *state, *state),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_decode",
    )(scalars, rows, keys, values, vectors, *state_)
    return tuple(x[:, : n * t].reshape(b, n, t, -1) for x in new)


def _kernel(scalars, q_ref, k_ref, v_ref, vectors, acc_in, m_in, l_in, acc, m, l, *, blocks: Blocks, config, key_heads):
    b, j = map(pl.program_id, range(2))
    pair = Pair(blocks, scalars, {}, b, jnp.int32(0), jnp.int32(0), j)

    # Invariant: after step j, (acc, m, l) is the state after the keys that came in with it and those of blocks 0 .. j.
    @pl.when(j == 0)
    def load():
        acc[...], m[...], l[...] = acc_in[...], m_in[...], l_in[...]

    def scaled(x, name, c):
        return x * vectors[name][:, c.keys].astype(jnp.float32) if name in vectors else x

    def block(masked: bool, first, keys: int):
        spec, (start, _) = blocks.spec, pair.spans[1]
        real = _real_columns(blocks, scalars, b, j, start) * key_heads

        def scores(c):
            s = scaled(dot(q_ref[...], k_ref[c.keys].astype(q_ref.dtype), 1, 1), "key_scales", c) * spec.scale
            seen = []
            query, key = vectors["row_position"][...], start + vectors["column_key"][:, c.keys]
            if "row_slope" in vectors:
                s = s - vectors["row_slope"][...] * jnp.abs(query - key).astype(jnp.float32)
            if spec.soft_cap is not None:
                s = jnp.tanh(s * (1 / spec.soft_cap)) * spec.soft_cap
            if key_heads > 1:
                seen.append(vectors["row_head"][...] == vectors["column_head"][:, c.keys])
            if masked:
                seen.append(c.keys.start + lax.broadcasted_iota(jnp.int32, (1, c.keys.size), 1) < real)
                seen.append(spec.band.window(query, key))
            s = s * LOG2E
            return jnp.where(functools.reduce(jnp.logical_and, seen), s, softmax.MASKED) if seen else s

        def accumulate(c, s):
            m_new, l_new, alpha, p = softmax.step(m[...], l[...], s, axis=1, exp=jnp.exp2)
            v = v_ref[c.keys].astype(q_ref.dtype)
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
