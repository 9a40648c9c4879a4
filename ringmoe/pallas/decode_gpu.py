"""Attention of few queries to a long cache on Hopper GPUs: the kernel of `interface.py` for decoding, forward only.

The queries of all heads that share a key head, and all tokens, are the rows of one product, 64 at a time. Each key head's keys
are split among blocks of threads, so that one token keeps all processors busy, and the splits' shares of the softmax are merged
in float32 after the kernel. With C = 132 processors, each of which has r blocks of threads at a time (2 where the shared memory
of two suffices, head dims of up to 320 together, else 1), and tiles = ceil(N / K T / 64),

    splits = clip(floor(r C / (B K tiles)), 1, ceil(S / 64))

and a split has an equal share of the blocks of keys that its own sequence meets: those past its length, or before its window,
are neither fetched nor computed. The cache [B, S, K, H] is read as it lies in memory, by TMA.

A block of threads is one warpgroup, which asks for the blocks of keys and values that it will need as soon as a slot of its
rings is free, and multiplies those that are there. While it waits for memory the other one on its processor multiplies. Only
where a key head has rows of several tiles are keys read again, from the L2 cache.

Source: Dao et al., Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import softmax
from ringmoe.errors import Unsuited
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.pallas import decode_tpu
from ringmoe.pallas.hopper import MULTIPROCESSORS, added_to
from ringmoe.pallas.logits_gpu import WIDTH, Blocks, across, check_products, filled, given, kinds_of_logits, lacks
from ringmoe.pallas.streams_gpu import (
    GROUPS,
    MOST_STAGES,
    ROWS,
    SHARED,
    WGMMA,
    Stream,
    barriers,
    by_token,
    head,
    launch,
    padded,
    shared,
)

TAKEN = ("key_lengths", "query_positions", "slopes")  # of Extras
KEYS = 64  # of a block
WIDE = 192  # values of more fill so many of a thread's registers that one kind of logits fits beside them

init, finish = decode_tpu.init, decode_tpu.finish


def check(spec: AttentionSpec, q, k, v, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks: Unsuited where the call isn't one of decoding."""
    if spec.pieces > 1 or k.shape[2] < KEYS:
        raise Unsuited(
            f"Hopper decode kernel: {k.shape[2]} keys in {spec.pieces} pieces, supported: {KEYS} or more, in one"
        )
    check_products(spec, q, k, v)
    if more := [name for name in given(extras) if name not in TAKEN]:
        raise lacks(f"{', '.join(more)} given with few queries, supported: {', '.join(TAKEN)}")
    kinds = set(kinds_of_logits(spec, extras)) - {"positions"}
    if v.shape[3] > WIDE and (len(kinds) > 1 or "slopes" in kinds):
        raise lacks(
            f"{', '.join(sorted(kinds))} with few queries and values of {v.shape[3]}, supported: one above {WIDE}, "
            "and no slopes, for registers"
        )


@jax.named_scope("ringmoe_attention_decode")
def forward(spec: AttentionSpec, state, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, at: Offsets):
    check(spec, q, k, v, extras)
    (b, n, t, h), (key_heads, s), dim, size = q.shape, k.shape[1:3], v.shape[3], q.dtype.itemsize
    rows = n // key_heads * t
    packed = lambda x: x.reshape(b, key_heads, rows, *x.shape[3:])
    slopes = extras.slopes
    known = Extras(
        key_lengths=extras.key_lengths,
        query_positions=jnp.tile(decode_tpu.query_positions(extras, at, b, t), (1, rows // t)),
        slopes=None if slopes is None else jnp.repeat(slopes, t).reshape(key_heads, rows),
    )
    queries = padded(packed(q), ROWS)
    blocks, known = Blocks.make(spec, queries, k, known, Offsets((0,), at.key), KEYS)

    fitting = lambda room: min(MOST_STAGES, (room - ROWS * h * size) // (KEYS * (h + dim) * size))
    resident = 2 if fitting(SHARED // 2) >= 2 else 1
    stages, tiles = fitting(SHARED // resident), queries.shape[2] // ROWS
    splits = min(max(1, resident * MULTIPROCESSORS // (b * key_heads * tiles)), blocks.num_k)
    ring, dims = shared(q.dtype), (splits, queries.shape[2])
    shares = launch(
        functools.partial(_body, blocks, splits),
        "decode",
        key_heads,
        splits * tiles,
        [(*dims, dim), dims, dims],
        [
            ring(ROWS, h),
            barriers(1),
            *(x for width in (h, dim) for x in (ring(stages, KEYS, width), barriers(stages))),
        ],
        known,
        queries,
        *map(by_token, (k, v)),
        pairs=rows * s,
        width=h + dim,
        warpgroups=1,
    )
    acc, m, l = _merged(
        [packed(x) for x in state], [x[:, :, :, :rows].reshape(b, key_heads, splits, rows, -1) for x in shares]
    )
    return tuple(x.reshape(b, n, t, -1) for x in (acc, m, l))


def _merged(state, shares):
    """(acc, m, l) of the keys of a state, [..., rows, V or 1], and of several shares of others, [..., splits, rows, V or 1]."""
    (acc, m, l), (accs, ms, ls) = state, shares
    most = jnp.maximum(m, ms.max(2))
    weight, weights = jnp.exp2(m - most), jnp.exp2(ms - most[:, :, None])
    return acc * weight + (accs * weights).sum(2), most, l * weight + (ls * weights).sum(2)


def _body(
    blocks: Blocks, splits, known, q, k, v, acc_out, m_out, l_out, queries, q_full, k_ring, k_full, v_ring, v_full
):  # fmt: skip
    keys, values = Stream([k], [k_ring], k_full, None), Stream([v], [v_ring], v_full, None)
    n, tile = head(), lax.rem(lax.axis_index("rows"), jnp.int32(q.shape[1] // ROWS))
    split = lax.div(lax.axis_index("rows"), jnp.int32(q.shape[1] // ROWS))
    first, steps = blocks.met(known, n, lax.div(tile, jnp.int32(GROUPS)))
    each = lax.div(steps + splits - 1, jnp.int32(splits))
    first, steps = first + split * each, jnp.clip(steps - split * each, 0, each)
    row = pl.multiple_of(tile * ROWS, ROWS)

    def fetch(stream: Stream, step):
        pl.when(step < steps)(lambda: stream.fetch(step, n, pl.ds((first + step) * KEYS, KEYS)))

    plgpu.copy_gmem_to_smem(q.at[n, pl.ds(row, ROWS)], queries, q_full.at[0])
    for early in range(keys.stages):
        fetch(keys, early)
        fetch(values, early)
    plgpu.barrier_wait(q_full.at[0])

    # Invariant: O is the sum for the keys before this step's, in units of 2^m.
    def step(j, carry):
        o, m, l = carry
        key = (first + j) * KEYS

        def weights(s_acc):
            keys.wait(j)
            plgpu.wgmma(s_acc, queries, keys.at(j)[0].transpose((1, 0)))
            s = s_acc[...]
            fetch(keys, j + keys.stages)
            return blocks.softened(blocks.logits(s, known, n, row, key), m, l)

        m, l, alpha, p = pl.run_scoped(weights, plgpu.ACC((ROWS, KEYS), jnp.float32))
        values.wait(j)
        value = values.at(j)[0]
        _clear(blocks, known, n, key, value)

        def add(o_acc):
            plgpu.wgmma(o_acc, p.astype(q.dtype), value)
            plgpu.wgmma_wait(0)
            return ()

        (o,) = added_to([o * across(alpha, o.shape)], add)
        fetch(values, j + values.stages)
        return o, m, l

    none = (
        filled((ROWS, acc_out.shape[3]), 0.0),
        filled((ROWS,), softmax.initial_max(jnp.float32)),
        filled((ROWS,), 0.0),
    )
    mine = n, split, pl.ds(row, ROWS)
    acc_out[mine], m_out[mine], l_out[mine] = lax.fori_loop(0, steps, step, none)


def _clear(blocks: Blocks, known, n, key, value):
    """Zeros for the values past the sequence's length, in shared memory: whatever is there, 0 times it must be 0."""
    if not blocks.has("key_lengths"):
        return
    real = blocks.number(known.numbers, "key_lengths", lax.div(n, jnp.int32(blocks.heads)))
    real = real - blocks.places(known.numbers)[1].of(key)

    @pl.when(real < KEYS)
    def _():
        for column in range(0, value.shape[1], WIDTH):  # of all at once a thread's registers would hold too much
            some = value.at[:, pl.ds(column, WIDTH)]
            at = plgpu.broadcasted_iota(jnp.int32, some.shape, 0, layout=WGMMA)
            some[...] = jnp.where(at < real, some[...], 0).astype(value.dtype)
        plgpu.commit_smem()
