"""Attention on Hopper GPUs: the kernel of `interface.py`, in Mosaic GPU, with its running state passed through the kernel.

Forward: a block of threads has BLOCK_Q queries of a head. One warpgroup brings blocks of keys and values by TMA into rings in
shared memory. Two others have half of the queries each: S = Q K^T by wgmma, the softmax in registers, O += P V by wgmma with P
in registers. The product of the last block's P and V goes on during the softmax of the next, and the two take turns in asking
for products, so that one's softmax falls into the other's products. The state is read and written once a block of queries, in
float32; a state that has seen no key yet is no array at all.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets
from ringmoe.pallas.hopper import swizzled
from ringmoe.pallas.logits_gpu import Blocks, numbers

LOG2E = math.log2(math.e)
DTYPES = (jnp.bfloat16, jnp.float16)
GROUPS = 2  # warpgroups that multiply
ROWS = 64  # a warpgroup's, in a product
BLOCK_Q = GROUPS * ROWS
HEADS = 16  # whose blocks run at about the same time, so that the L2 cache still has their keys
WIDTH, WIDEST = 64, 256  # head dims are multiples of the one, which are 128 bytes, up to the other
SHARED = 226 * 2**10  # bytes of shared memory for rings, of 227 KiB
MOST_STAGES = 4
WGMMA = plgpu.Layout.WGMMA
BRINGING, MULTIPLYING = 40, 232  # registers of a thread


@functools.partial(jax.tree_util.register_dataclass, data_fields=("acc", "m", "l"), meta_fields=("length",))
@dataclasses.dataclass(frozen=True)
class State:
    """Float32 acc [B, N, T', V] = sum of 2^(s - m) v, m [B, N, T'] = max of s, l [B, N, T'] = sum of 2^(s - m), where T' is
    `length`, T, in whole blocks. The logits s are in units of log 2."""

    acc: jax.Array
    m: jax.Array
    l: jax.Array
    length: int


def check(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise _lacks(f"{q.dtype=}, {k.dtype=}, {v.dtype=}, supported: all bfloat16 or all float16")
    h, dim = q.shape[3], v.shape[3]
    if h % WIDTH or dim % WIDTH or max(h, dim) > WIDEST:
        raise _lacks(f"head dims {h} and {dim}, supported: multiples of {WIDTH} up to {WIDEST}")
    if min(q.shape[2], k.shape[2]) < ROWS:
        raise _lacks(f"{q.shape[2]} queries, {k.shape[2]} keys, supported: {ROWS} or more")
    if spec.uniform:
        raise _lacks("XLA may have to partition the call further, which it can't a kernel")
    if given := [name for name, x in extras._asdict().items() if x is not None and name != "sinks"]:
        raise _lacks(f"{', '.join(given)}")
    if spec.soft_cap is not None or spec.scale <= 0:
        raise _lacks(f"{spec.soft_cap=}, {spec.scale=}, supported: no cap, a scale above 0")
    pieces = [length // spec.pieces for length in (q.shape[2], k.shape[2])]
    if spec.pieces > 1 and any(piece % BLOCK_Q for piece in pieces):
        raise _lacks(f"pieces of {pieces} tokens, supported: multiples of {BLOCK_Q}")


def init(spec: AttentionSpec, q: jax.Array, v: jax.Array) -> None:
    return None


def finish(spec: AttentionSpec, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
    acc, m, l = (x[:, :, : state.length] for x in (state.acc, state.m, state.l))
    o, lse, tail = softmax.finish(acc, m[..., None] / LOG2E, l[..., None])
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
    (b, n, t, h), s, dim = q.shape, k.shape[2], v.shape[3]
    queries, room = (GROUPS, ROWS, h), SHARED - BLOCK_Q * h * q.dtype.itemsize
    stages = lambda block: room // (block * (h + dim) * q.dtype.itemsize)
    block_k = (
        128 if dim <= 128 and stages(128) >= 2 else 64
    )  # of logits, which with the output fill a thread's registers
    blocks, stages = Blocks(spec, t, s, BLOCK_Q, block_k), min(MOST_STAGES, stages(block_k))
    shared = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=swizzled(q.dtype))
    f32 = lambda *shape: jax.ShapeDtypeStruct(
        (b, n, blocks.num_q * BLOCK_Q, *shape), jnp.float32, manual_axis_type=_mat(q)
    )
    kernel = _kernel(
        functools.partial(_forward_body, blocks, state is None),
        "forward",
        (b * n, blocks.num_q),
        [f32(dim), f32(), f32()],
        [
            shared(*queries),
            shared(stages, block_k, h),
            shared(stages, block_k, dim),
            *(plgpu.Barrier(num_barriers=number) for number in (GROUPS, stages, stages)),
            *(plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages) for _ in "kv"),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
    )
    before = () if state is None else (state.acc, state.m, state.l)
    return State(*kernel(numbers(at), q, k, v, *before), t)


def _kernel(body, name: str, pairs: tuple[int, int], out_type, scratch_types):
    """A kernel of a block of threads for each pair of heads and blocks of rows, heads that are near each other at once."""
    heads, rows = pairs
    near = math.gcd(heads, HEADS)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(heads // near, rows, near),
        grid_names=("run", "rows", "head"),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=f"ringmoe_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _head():
    return lax.axis_index("run") * lax.axis_size("head") + lax.axis_index("head")


def _forward_body(blocks: Blocks, fresh: bool, numbers, q, k, v, *refs):
    before, refs = ((), refs) if fresh else (refs[:3], refs[3:])
    acc_out, m_out, l_out, q_block, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, turn = refs
    (_, num_heads, *_), kv_heads, stages, block_k = q.shape, k.shape[1], k_ring.shape[0], blocks.block_k
    b, n = lax.div(_head(), jnp.int32(num_heads)), lax.rem(_head(), jnp.int32(num_heads))
    group = lax.axis_index("group")
    i = blocks.num_q - 1 - lax.axis_index("rows")  # the last ones first, which have most to do under a causal mask
    first, steps = blocks.keys_met(numbers, i)
    slot = lambda step: lax.rem(step, jnp.int32(stages))

    @pl.when(group == GROUPS)
    def _bring():
        plgpu.set_max_registers(BRINGING, action="decrease")
        for g in range(GROUPS):
            rows = pl.ds(i * BLOCK_Q + g * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q.at[b, n, rows], q_block.at[g], q_full.at[g])

        @pl.loop(0, steps)
        def _(step):
            cut = b, lax.div(n, jnp.int32(num_heads // kv_heads)), pl.ds((first + step) * block_k, block_k)
            for source, ring, full, free in ((k, k_ring, k_full, k_free), (v, v_ring, v_full, v_free)):

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot(step)])

                plgpu.copy_gmem_to_smem(source.at[cut], ring.at[slot(step)], full.at[slot(step)])

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            for free in (k_free, v_free):
                plgpu.barrier_wait(free.at[slot(step)])

    @pl.when(group < GROUPS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        row = pl.multiple_of(i * BLOCK_Q + group * ROWS, ROWS)
        mine = b, n, pl.ds(row, ROWS)
        unit = blocks.spec.scale * LOG2E

        def ask(step, *products):
            """For Q K^T of a step, and other products, once it is this warpgroup's turn."""
            plgpu.barrier_wait(k_full.at[slot(step)])
            plgpu.barrier_wait(turn.at[group])
            for product in products:
                plgpu.wgmma(*product)
            plgpu.barrier_arrive(turn.at[1 - group])

        def scores(step, s):
            return s, q_block.at[group], k_ring.at[slot(step)].transpose((1, 0))

        def soften(step, key, s, m, l):
            plgpu.barrier_arrive(k_free.at[slot(step)])
            s = blocks.masked(s, numbers, row, key)
            m_new = jnp.maximum(m, jnp.max(s, 1) * unit)
            alpha = jnp.exp2(m - m_new)
            p = jnp.exp2(s * unit - _across(m_new, s.shape))
            # Compilers would move this past a wait for O += P V of the step before, if no other wait stood between.
            found = lax.optimization_barrier((m_new, l * alpha + jnp.sum(p, 1), alpha, p))
            plgpu.barrier_wait(v_full.at[slot(step)])
            return found

        def weigh(step, o, p):
            return o, p, v_ring.at[slot(step)]

        def weighed(step):
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(v_free.at[slot(step)])

        logits = plgpu.ACC((ROWS, block_k), jnp.float32)
        m, l = (
            (_filled(ROWS, softmax.initial_max(jnp.float32)), _filled(ROWS, 0.0))
            if fresh
            else (plgpu.load(ref.at[mine], layout=WGMMA.reduce(1)) for ref in before[1:])
        )
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        plgpu.barrier_wait(q_full.at[group])

        def begin(s_acc):
            ask(0, scores(0, s_acc))
            return soften(0, first * block_k, s_acc[...], m, l)

        m, l, alpha, p = pl.run_scoped(begin, logits)
        o = _filled((ROWS, v.shape[3]), 0.0) if fresh else plgpu.load(before[0].at[mine], layout=WGMMA)
        o, p = o * _across(alpha, o.shape), p.astype(q.dtype)

        # Invariant: O is the sum for the keys before this step's last, in units of 2^m; P is the last ones', not yet weighed.
        def step(step, carry):
            o, m, l, p = carry
            key = (first + step) * block_k

            def both(s_acc):
                def work(o_acc, m, l, alpha, p):
                    ask(step, scores(step, s_acc), weigh(step - 1, o_acc, p))
                    m, l, alpha, p = soften(step, key, plgpu.wgmma_accumulator_load(s_acc, wait_n=1), m, l)
                    weighed(step - 1)
                    return m, l, alpha, p.astype(q.dtype)

                return added_to(o, work, m, l, m, p)

            o, m, l, alpha, p = pl.run_scoped(both, logits)
            return o * _across(alpha, o.shape), m, l, p

        o, m, l, p = lax.fori_loop(1, steps, step, (o, m, l, p))

        def last(o_acc):
            plgpu.wgmma(*weigh(steps - 1, o_acc, p))
            weighed(steps - 1)
            return ()

        (acc_out[mine],) = added_to(o, last)
        m_out[mine], l_out[mine] = m, l
        pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))


def added_to(total, work, *kept):
    """`total` and the products that `work(accumulator, *kept)` adds to it, and the arrays it returns, which are like `kept`."""

    def run(refs):
        acc, *refs = refs
        for ref, x in zip(refs, work(acc, *(ref[...] for ref in refs)), strict=True):
            ref[...] = x

    return pl.run_state(run)((plgpu.ACC.init(total), *kept))


def _across(x, shape):
    """A number of each row, along it."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _filled(shape, value):
    layout = WGMMA if isinstance(shape, tuple) else WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _mat(x):
    return jax.typeof(x).mat


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"Hopper attention kernel: {what}")
