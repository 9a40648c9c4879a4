"""Attention on Hopper GPUs: the kernel of `interface.py`, in Mosaic GPU, with its running state passed through the kernel.

Forward: a block of threads has TALL queries of a head, each of two warpgroups half of them: S = Q K^T by wgmma, the softmax in
registers, O += P V by wgmma with P in registers. The product of the last block's P and V goes on during the softmax of the
next, and the two take turns in asking for products, so that one's softmax falls into the other's products. The state is read
and written once a block of queries, in float32; a state that has seen no key yet is no array at all. `gradients_gpu.py` is
the backward pass.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets
from ringmoe.pallas import gradients_gpu
from ringmoe.pallas.blocks import LENGTHS, LOG2E, POSITIONS, SEGMENTS
from ringmoe.pallas.hopper import added_to
from ringmoe.pallas.logits_gpu import (
    Blocks,
    across,
    are_few,
    check_products,
    cleared,
    filled,
    given,
    kinds_of_logits,
    lacks,
)
from ringmoe.pallas.streams_gpu import (
    BRINGING,
    GROUPS,
    MOST_STAGES,
    MULTIPLYING,
    ROWS,
    SHARED,
    TALL,
    WGMMA,
    Stream,
    anew,
    barriers,
    bring,
    by_token,
    fetch,
    head,
    launch,
    shared,
    sharing,
)

TAKEN = (*LENGTHS, *SEGMENTS, *POSITIONS, "slopes", "bias")  # of Extras


@functools.partial(jax.tree_util.register_dataclass, data_fields=("acc", "m", "l"), meta_fields=("length", "log2"))
@dataclasses.dataclass(frozen=True)
class State:
    """Float32 acc [B, N, T', V] = sum of 2^(s - m) v, m [B, N, T'] = max of s, l [B, N, T'] = sum of 2^(s - m), where T' is
    `length`, T, in whole blocks. The logits s are in units of log 2; where `log2` is 1, m is not."""

    acc: jax.Array
    m: jax.Array
    l: jax.Array
    length: int
    log2: float = LOG2E


def check(spec: AttentionSpec, q, k, v, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks; arguments are arrays or their types."""
    check_products(spec, q, k, v)
    (lengths, (h, dim)) = ((a.shape[d], b.shape[d]) for d, a, b in ((2, q, k), (3, q, v)))
    if min(lengths) < ROWS:
        raise lacks(f"{lengths[0]} queries, {lengths[1]} keys, supported: {ROWS} or more")
    if spec.pieces > 1 and any(length // spec.pieces % TALL for length in lengths):
        raise lacks(f"{spec.pieces} pieces of {lengths} tokens, supported: multiples of {TALL} each")
    if more := [name for name in given(extras) if name not in TAKEN]:
        raise lacks(f"{', '.join(more)} given, supported: {', '.join(TAKEN)}")
    if spec.bias_gradient:
        raise lacks("the bias's gradient, supported: a bias of which none is asked for")
    if "positions" in (kinds := kinds_of_logits(spec, extras)) and max(h, dim) > 192:
        raise lacks(f"positions with head dims {h} and {dim}, supported: up to 192, for registers")
    if len(kinds) > 1 and max(h, dim) > 128:
        raise lacks(f"{', '.join(kinds)} with head dims {h} and {dim}, supported: one of them above 128, for registers")


def init(spec: AttentionSpec, q: jax.Array, v: jax.Array) -> None:
    return None


def finish(spec: AttentionSpec, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
    acc, m, l = (x[:, :, : state.length] for x in (state.acc, state.m, state.l))
    o, lse, tail = softmax.finish(acc, m[..., None] / state.log2, l[..., None])
    return o, lse[..., 0], tail[..., 0]


@jax.named_scope("ringmoe_attention_forward")
def forward(
    spec: AttentionSpec,
    state: State | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    at: Offsets,
) -> State:
    check(spec, q, k, v, extras)
    (t, h), dim, size = q.shape[2:], v.shape[3], q.dtype.itemsize
    fitting = lambda block_k: (SHARED - TALL * h * size) // (block_k * (h + dim) * size)
    # Of logits, which with the output fill a thread's registers.
    block_k = 128 if dim <= 128 and fitting(128) >= 2 and are_few(spec, extras) else 64
    blocks, known = Blocks.make(spec, q, k, extras, at, block_k)
    stages, (_, keys) = min(MOST_STAGES, fitting(block_k)), at.places(t, k.shape[2])
    tiles, rows, before = shared(q.dtype), blocks.height, () if state is None else (state.acc, state.m, state.l)
    acc, m, l = launch(
        functools.partial(_body, blocks, state is None),
        "forward",
        blocks.heads,
        blocks.num_rows,
        [(rows, dim), (rows,), (rows,)],
        [
            tiles(GROUPS, ROWS, h),
            barriers(GROUPS),
            *(
                x
                for width in (h, dim)
                for x in (tiles(stages, block_k, width), barriers(stages), barriers(stages, GROUPS))
            ),
            barriers(GROUPS),
        ],
        known,
        *map(by_token, (q, *(cleared(x, keys, extras.key_lengths) for x in (k, v)))),
        *before,
        pairs=blocks.pairs(at),
        width=h + dim,
    )
    return State(acc, m, l, t, blocks.log2)


def _body(blocks: Blocks, fresh: bool, known, q, k, v, *refs):
    given = 0 if fresh else 3
    before, refs = refs[:given], refs[given:]
    acc_out, m_out, l_out, queries, q_full, k_ring, k_full, k_free, v_ring, v_full, v_free, turn = refs
    keys, values = Stream([k], [k_ring], k_full, k_free), Stream([v], [v_ring], v_full, v_free)
    n, block_k, group = head(), blocks.block_k, lax.axis_index("group")
    i = blocks.num_rows - 1 - lax.axis_index("rows")  # the last ones first, which have most to do under a causal mask
    first, steps = blocks.met(known, n, i)

    @pl.when(group == GROUPS)
    def _bring():
        plgpu.set_max_registers(BRINGING, action="decrease")
        for g in range(GROUPS):
            fetch(q, n, pl.ds(i * TALL + g * ROWS, ROWS), queries.at[g], q_full.at[g])
        kv = lax.div(n, jnp.int32(sharing(q, k)))
        bring([keys, values], steps, lambda step: (kv, pl.ds((first + step) * block_k, block_k)))

    @pl.when(group < GROUPS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        row = pl.multiple_of(i * TALL + group * ROWS, ROWS)
        mine = n, pl.ds(row, ROWS)

        def ask(step, s_acc, *more):
            """For Q K^T of a step, and another product, once it is this warpgroup's turn."""
            keys.wait(step)
            plgpu.barrier_wait(turn.at[group])
            plgpu.wgmma(s_acc, queries.at[anew(group)], keys.at(step)[0].transpose((1, 0)))
            if more:
                plgpu.wgmma(*more)
            plgpu.barrier_arrive(turn.at[1 - group])

        def soften(step, key, s, m, l):
            keys.done(step)
            s = blocks.logits(s, known, n, row, key)
            # ptxas would move this behind the wait for the last step's P V, if no wait of another kind stood between.
            found = lax.optimization_barrier(blocks.softened(s, m, l))
            values.wait(step)
            return found

        logits = plgpu.ACC((ROWS, block_k), jnp.float32)
        if fresh:
            m, l = filled((ROWS,), softmax.initial_max(jnp.float32)), filled((ROWS,), 0.0)
        else:
            m, l = (plgpu.load(ref.at[mine], layout=WGMMA.reduce(1), optimized=False) for ref in before[1:])
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        plgpu.barrier_wait(q_full.at[group])

        def begin(s_acc):
            ask(0, s_acc)
            return soften(0, first * block_k, s_acc[...], m, l)

        m, l, alpha, p = pl.run_scoped(begin, logits)
        o = (
            filled((ROWS, v_ring.shape[2]), 0.0)
            if fresh
            else plgpu.load(before[0].at[mine], layout=WGMMA, optimized=False)
        )
        o, p = o * across(alpha, o.shape), p.astype(q.dtype)

        # Invariant: O is the sum for the keys before the last step's, in units of 2^m; P is of the last step's.
        def step(j, carry):
            o, m, l, p = carry
            key = (first + j) * block_k

            def both(s_acc):
                def work(o_acc, m, l, alpha, p):
                    ask(j, s_acc, o_acc, p, values.at(j - 1)[0])
                    m, l, alpha, p = soften(j, key, plgpu.wgmma_accumulator_load(s_acc, wait_n=1), m, l)
                    plgpu.wgmma_wait(0)
                    values.done(j - 1)
                    return m, l, alpha, p.astype(q.dtype)

                return added_to([o], work, m, l, m, p)

            o, m, l, alpha, p = pl.run_scoped(both, logits)
            return o * across(alpha, o.shape), m, l, p

        o, m, l, p = lax.fori_loop(1, steps, step, (o, m, l, p))

        def last(o_acc):
            plgpu.wgmma(o_acc, p, values.at(steps - 1)[0])
            plgpu.wgmma_wait(0)
            values.done(steps - 1)
            return ()

        (acc_out[mine],) = added_to([o], last)
        m_out[mine], l_out[mine] = m, l
        pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))


@jax.named_scope("ringmoe_attention_backward")
def backward(
    spec: AttentionSpec,
    dq: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    extras: Extras,
    at: Offsets,
) -> Grads:
    check(spec, q, k, v, extras)
    dq = jnp.zeros_like(q, jnp.float32) if dq is None else dq
    return gradients_gpu.backward(spec, dq, q, k, v, do, lse, delta, extras, at)
