"""Attention on TPU: the kernel of `interface.py`, in Pallas, with its running state passed through the kernel.

Scores are computed transposed, `s = k q^T` [block_k, block_q]: the softmax reduces over sublanes, its statistics are
row vectors `[1, block_q]` that cost no padding in HBM, and the accumulator is `[H, block_q]`, turned round once, in
`finish`. State and gradients are read and written in place (aliased), so nothing of XLA's stands between two hops of a
ring and its scheduler has only the kernel to hide the exchange behind. Backward is one kernel of five matmuls a block
pair: dk and dv stay in VMEM while the queries go by, dq (transposed) stays there while the keys do.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import dropout, softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets
from ringmoe.pallas.logits_tpu import LANES, LOG2E, Blocks, Pair

SUBLANES = 16  # of packed bfloat16; float32 needs 8, and takes the same blocks
AHEAD = 2  # chunks scored before the first softmax; with one, v6e and v7x wait 10% longer
WIDE, MAX_HEAD_DIM = 256, 576  # above WIDE blocks are smaller; float32 at 256 needs 32 MiB of VMEM beside dq
DTYPES = (jnp.bfloat16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of one kernel: upper bounds, from which blocks that divide the shapes are chosen.

    block_q, block_k: queries and keys of one grid step.
    chunk: keys scored at once; the next chunks are scored while this one's softmax is taken.
    resident_bytes: VMEM for the dq of all queries that one backward call covers; more queries take more calls.
    """

    block_q: int = 512
    block_k: int = 1024
    chunk: int = 256
    resident_bytes: int = 16 * 2**20

    def __post_init__(self):
        for name, unit in (("block_q", LANES), ("block_k", SUBLANES), ("chunk", 2 * SUBLANES), ("resident_bytes", 1)):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"{name}={value}, expected a positive multiple of {unit}")

    def blocks(self, spec: AttentionSpec, q, k, v) -> tuple[int, int]:
        """(block_q, block_k); of several pieces they divide a piece, else the last one may end after the array."""
        smaller = 1 if max(q.shape[3], v.shape[3]) <= WIDE else 2
        of = lambda length, limit: _block(length // spec.pieces, limit // smaller, exact=spec.pieces > 1)
        return of(q.shape[2], self.block_q), of(k.shape[2], self.block_k)


FORWARD = Config()
BACKWARD = Config(block_q=512, block_k=512, chunk=512)


class State(NamedTuple):
    """Float32 acc [B, N, V, T] = sum of v^T 2^(s - m), m [B, N, 1, T] = max of s, l [B, N, 1, T] = sum of 2^(s - m).

    The logits s are in units of log 2.
    """

    acc: jax.Array
    m: jax.Array
    l: jax.Array


def check(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks."""
    if spec.bias_gradient:
        raise _lacks("the gradient of a bias is not supported; one under jax.lax.stop_gradient is")
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise _lacks(f"{q.dtype=}, {k.dtype=}, supported: both bfloat16 or both float32")
    (t, h), s = q.shape[2:], k.shape[2]
    if min(t, s) < 8:
        raise _lacks(f"{t} queries, {s} keys, supported: 8 or more")
    if max(h, v.shape[3]) > MAX_HEAD_DIM:
        raise _lacks(f"head dims {h} and {v.shape[3]}, supported: up to {MAX_HEAD_DIM}")
    for config in (FORWARD, BACKWARD):
        block_q, _ = config.blocks(spec, q, k, v)
        if spec.pieces > 1 and block_q % LANES:
            raise _lacks(f"pieces of {t // spec.pieces} tokens, supported: multiples of {LANES}")


def init(spec: AttentionSpec, q: jax.Array, v: jax.Array) -> State:
    b, n, t, _ = q.shape
    row = jnp.zeros((b, n, 1, t), jnp.float32)
    acc = jnp.zeros((b, n, v.shape[3], t), jnp.float32)
    return _varying_like(State(acc, row + softmax.initial_max(jnp.float32), row), q, v)


def finish(spec: AttentionSpec, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
    o, lse, tail = softmax.finish(state.acc, state.m / LOG2E, state.l)
    return jnp.swapaxes(o, -1, -2), lse[..., 0, :], tail[..., 0, :]


@jax.named_scope("ringmoe_attention_forward")
def forward(
    spec: AttentionSpec,
    state: State,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    at: Offsets,
    config: Config = FORWARD,
) -> State:
    check(spec, q, k, v, extras)
    state = _varying_like(state, q, k, v)
    (b, n, t, h), (kv_heads, s) = q.shape, k.shape[1:3]
    blocks, scalars, vectors = Blocks.make(spec, q, k, extras, at, *config.blocks(spec, q, k, v))
    block_q, block_k = blocks.block_q, blocks.block_k
    pairs = spec.band.met(t, s, block_q, block_k, _apart(at), spec.pieces)

    def q_block(b, n, i, j, scalars):
        return b, n, i, 0

    def k_block(b, n, i, j, scalars):
        return b, lax.div(n * kv_heads, q.shape[1]), _within(j, blocks.keys_met(scalars, b, i), blocks.num_k), 0

    def state_block(b, n, i, j, scalars):
        return b, n, 0, i

    k_spec, v_spec = (pl.BlockSpec((None, None, block_k, x.shape[3]), k_block) for x in (k, v))
    acc_spec = pl.BlockSpec((None, None, v.shape[3], block_q), state_block)
    row_spec = pl.BlockSpec((None, None, 1, block_q), state_block)
    pair = lambda *step: (*step[:3], k_block(*step)[2])
    new = pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, chunk=config.chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, n, blocks.num_q, blocks.num_k),
            in_specs=[
                pl.BlockSpec((None, None, block_q, h), q_block),
                k_spec,
                v_spec,
                blocks.specs(vectors, pair),
                acc_spec,
                row_spec,
                row_spec,
            ],
            out_specs=[acc_spec, row_spec, row_spec],
        ),
        out_shape=[_shape(x) for x in state],
        input_output_aliases={4 + len(vectors) + n: n for n in range(3)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * n * pairs * (h + v.shape[3]),
            transcendentals=b * n * pairs,
            bytes_accessed=_nbytes(q, *state, *state) + n // kv_heads * blocks.num_q * _nbytes(k, v),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_forward",
    )(scalars, q, k, v, vectors, *state)
    return State(*new)


def _apart(at: Offsets) -> int | None:
    """How far the first query is from the first key, None where only the run knows."""
    unknown = any(isinstance(x, jax.core.Tracer) for side in at for x in side)
    return None if unknown else int(at.query[0]) - int(at.key[0])


def _forward_kernel(scalars, q_ref, k_ref, v_ref, vectors, acc_in, m_in, l_in, acc, m, l, *, blocks: Blocks, chunk):
    b, n, i, j = map(pl.program_id, range(4))
    pair, rate = Pair(blocks, scalars, vectors, b, n, i, j), blocks.spec.dropout_rate

    # Invariant: after step j, (acc, m, l) is the state after the keys that came in with it and those of blocks 0 .. j.
    @pl.when(j == 0)
    def load():
        acc[...], m[...], l[...] = acc_in[...], m_in[...], l_in[...]

    def block(masked: bool, first, keys: int):
        def scores(c):
            return pair.logits(_dot(k_ref[c], q_ref[...], 1, 1), c, masked)[0]

        def accumulate(c, s):
            m_new, l_new, alpha, p = softmax.step(m[...], l[...], s, axis=0, exp=jnp.exp2)
            v = pair.inside(v_ref[c], "key", c.start) if masked else v_ref[c]
            acc[...] = acc[...] * alpha + _dot(v, dropout.drop(p, rate, pair.kept(c)).astype(v.dtype), 0, 0)
            m[...], l[...] = m_new, l_new

        _chunks(first, keys, chunk, scores, accumulate)

    pair.run(block)


@jax.named_scope("ringmoe_attention_backward")
def backward(
    spec: AttentionSpec,
    grads: Grads,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    extras: Extras,
    at: Offsets,
    config: Config = BACKWARD,
) -> Grads:
    check(spec, q, k, v, extras)
    grads = _varying_like(grads, q, k, v, do)
    blocks, scalars, vectors = Blocks.make(spec, q, k, extras, at, *config.blocks(spec, q, k, v))
    # A kv head's query blocks, those of its first query head first, are cut into as few runs as VMEM allows.
    rows = q.shape[1] // k.shape[1] * blocks.num_q
    fitting = max(1, config.resident_bytes // (blocks.block_q * q.shape[3] * 4))
    run = max(d for d in range(1, min(rows, fitting) + 1) if rows % d == 0)
    arrays = q, k, v, do, lse[:, :, None], delta[:, :, None]
    add = lambda first, grads: _backward_run(
        blocks, blocks.starting(scalars, first), vectors, config.chunk, run, arrays, grads, _apart(at)
    )
    if run == rows:
        return add(0, grads)
    return lax.fori_loop(0, rows // run, lambda i, grads: add(i * run, grads), grads)


def _backward_run(blocks: Blocks, scalars, vectors, chunk: int, run: int, arrays, grads: Grads, apart) -> Grads:
    """Adds to `grads` what so many query blocks of every kv head give, from the one on that `scalars` say."""
    q, k, v, do = arrays[:4]
    (b, n, t, h), (kv_heads, s), spec = q.shape, k.shape[1:3], blocks.spec
    block_q, block_k, num_q, num_k, group = blocks.block_q, blocks.block_k, blocks.num_q, blocks.num_k, n // kv_heads

    def row(kv, r, scalars):
        """Query head and block of the run's r-th row."""
        r = blocks.number(scalars, "first") + r
        return kv * group + lax.div(r, num_q), lax.rem(r, num_q)

    def q_block(b, kv, j, r, scalars):
        n, i = row(kv, r, scalars)
        return b, n, _within(i, blocks.queries_met(scalars, b, j), num_q), 0

    def lse_block(*step):
        b, n, i, _ = q_block(*step)
        return b, n, 0, i

    def k_block(b, kv, j, r, scalars):
        return b, kv, j, 0

    def dq_block(b, kv, j, r, scalars):  # stays at the run's first block until the last keys, when each is written once
        n, i = row(kv, jnp.where(j == num_k - 1, r, 0), scalars)
        return b, n, i, 0

    of_rows = lambda x, index: pl.BlockSpec((None, None, block_q, x.shape[3]), index)
    k_spec, v_spec = (pl.BlockSpec((None, None, block_k, x.shape[3]), k_block) for x in (k, v))
    row_spec, dq_spec = pl.BlockSpec((None, None, 1, block_q), lse_block), of_rows(q, dq_block)
    pair = lambda *step: (*q_block(*step)[:3], step[2])
    dq, dk, dv = grads.dq, grads.dk, grads.dv
    pairs = b * kv_heads * run * block_q * spec.band.met(t, s, block_q, block_k, apart, spec.pieces) // t
    wide = max(1, -(-max(h, v.shape[3]) // (2 * LANES)))
    new = pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks, group=group, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, num_k, run),
            in_specs=[
                of_rows(q, q_block),
                k_spec,
                v_spec,
                of_rows(do, q_block),
                row_spec,
                row_spec,
                blocks.specs(vectors, pair),
                dq_spec,
                k_spec,
                v_spec,
            ],
            out_specs=[dq_spec, k_spec, v_spec],
            scratch_shapes=[pltpu.VMEM((run, h, block_q), jnp.float32), pltpu.VMEM((block_k, h), jnp.float32)],
        ),
        out_shape=[_shape(x) for x in (dq, dk, dv)],
        input_output_aliases={7 + len(vectors) + n: n for n in range(3)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=(8 * q.dtype.itemsize * wide * 2**20) + run * block_q * h * 4,  # blocks, spills; dq
        ),
        cost_estimate=pl.CostEstimate(
            flops=pairs * (6 * h + 4 * v.shape[3]),
            transcendentals=pairs,
            bytes_accessed=_nbytes(k, v, dk, dk, dv, dv)
            + (num_k * _nbytes(q, do) + 2 * _nbytes(dq)) * run // (group * num_q),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_backward",
    )(scalars, *arrays, vectors, dq, dk, dv)
    return Grads(*new)


def _backward_kernel(
    scalars, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, vectors, dq_in, dk_in, dv_in, dq_ref, dk_ref, dv_ref, dq, dk,
    *, blocks: Blocks, group: int, chunk: int,
):  # fmt: skip
    b, kv, j, r = map(pl.program_id, range(4))
    row = blocks.number(scalars, "first") + r
    n, i = kv * group + lax.div(row, blocks.num_q), lax.rem(row, blocks.num_q)
    pair, scale, rate = Pair(blocks, scalars, vectors, b, n, i, j), blocks.spec.scale, blocks.spec.dropout_rate

    # Invariant: after step (j, r), dq[r] is the unscaled transposed sum over key blocks 0 .. j, and dk and dv_ref are
    # the sums over rows 0 .. r for key block j; dv_ref began with what came in.
    @pl.when(j == 0)
    def clear_dq():
        dq[r] = jnp.zeros_like(dq[r])

    @pl.when(r == 0)
    def clear_dk():
        dk[...] = jnp.zeros_like(dk)
        dv_ref[...] = dv_in[...]

    def block(masked: bool, first, size: int):
        inside = pair.inside if masked else lambda x, *_: x
        q, do = lambda: inside(q_ref[...], "query"), lambda: inside(do_ref[...], "query")
        lse, delta = (inside(ref[...], "query", 0, 1) for ref in (lse_ref, delta_ref))
        lse = softmax.finite_lse(lse) * LOG2E
        keys = lambda ref, c: inside(ref[c], "key", c.start)

        def scores(c):
            return pair.logits(_dot(keys(k_ref, c), q(), 1, 1), c, masked), _dot(keys(v_ref, c), do(), 1, 1)

        def accumulate(c, found):
            (s, slope), dp = found
            p, kept = jnp.exp2(s - lse), pair.kept(c)
            ds = p * (dropout.drop(dp, rate, kept) - delta)
            ds = (ds if slope is None else ds * slope).astype(q_ref.dtype)
            dv_ref[c] += _dot(dropout.drop(p, rate, kept).astype(do_ref.dtype), do(), 1, 0)
            dk[c] += _dot(ds, q(), 1, 0)
            dq[r] += _dot(keys(k_ref, c), ds, 0, 0)

        _chunks(first, size, chunk, scores, accumulate)

    pair.run(block)

    @pl.when(r == pl.num_programs(3) - 1)
    def store_dk():
        dk_ref[...] = dk_in[...] + dk[...] * scale

    @pl.when(j == pl.num_programs(2) - 1)
    def store_dq():
        dq_ref[...] = dq_in[...] + dq[r].T * scale


def _chunks(first, size: int, chunk: int, start, finish) -> None:
    """Calls `finish(c, start(c))` for each chunk `c` of so many keys, two starts ahead: the MXU works during the softmax.

    The first and the last chunk are half ones, since nothing else runs beside the first start and the last finish.
    """
    edges = [0, *range(chunk // 2, size - SUBLANES + 1, chunk), size]
    at = lambda low: low if isinstance(first, int) else pl.multiple_of(first + low, math.gcd(low, LANES))
    chunks = [pl.ds(at(low), high - low) for low, high in itertools.pairwise(edges)]
    started = [start(c) for c in chunks[:AHEAD]]
    for i, c in enumerate(chunks):
        if i + AHEAD < len(chunks):
            started.append(start(chunks[i + AHEAD]))
        finish(c, started.pop(0))


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b.astype(a.dtype), dims, precision=precision, preferred_element_type=jnp.float32)


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU attention kernel: {what}")


def _block(length: int, limit: int, exact: bool) -> int:
    """A block up to `limit`: the largest in lanes that divides `length`, or, where that is small and needn't be, one whose last
    ends after the array does."""
    if length <= limit:
        return length
    dividing = next((block for block in range(limit, 0, -LANES) if length % block == 0), None)
    if dividing is not None and (exact or dividing >= limit // 2):
        return dividing
    if exact:
        raise _lacks(f"{length} tokens, more than {limit} and in no blocks of {LANES}")
    return -(-length // -(-length // limit) // LANES) * LANES


def _within(i, needed, num_blocks: int):
    """Block `i` clamped to those needed, so that a skipped step fetches nothing new."""
    first, last = needed
    return jnp.clip(jnp.clip(i, first, last - 1), 0, num_blocks - 1)


def _varying_like(tree, *operands: jax.Array):
    """`tree` made to vary over the manual mesh axes that any operand varies over (where shard_map checks that)."""
    axes = frozenset().union(*(jax.typeof(y).mat.varying for y in operands))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(sorted(axes - jax.typeof(x).mat.varying)), to="varying"), tree)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)


def _nbytes(*arrays: jax.Array) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
