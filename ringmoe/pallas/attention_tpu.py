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

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets
from ringmoe.masks import Places

LANES = 128
LOG2E = math.log2(math.e)
SUBLANES = 16  # of packed bfloat16; float32 needs 8, and takes the same blocks
AHEAD = 2  # chunks scored before the first softmax; with one, v6e and v7x wait 10% longer
MAX_HEAD_DIM = 256  # float32 at 256 needs 32 MiB of VMEM beside dq
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

    def blocks(self, num_queries: int, num_keys: int) -> tuple[int, int]:
        """(block_q, block_k) that divide these lengths; NotImplementedError where the TPU's tiling allows none."""
        return _divisor(num_queries, self.block_q, LANES), _divisor(num_keys, self.block_k, SUBLANES)


FORWARD = Config()
BACKWARD = Config(block_q=512, block_k=512, chunk=512)


class State(NamedTuple):
    """Float32 acc [B, N, H, T] = sum of v^T 2^(s - m), m [B, N, 1, T] = max of s, l [B, N, 1, T] = sum of 2^(s - m).

    The logits s are in units of log 2.
    """

    acc: jax.Array
    m: jax.Array
    l: jax.Array


def check(spec: AttentionSpec, q: jax.Array, k: jax.Array, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks."""
    for name, extra in extras._asdict().items():
        if extra is not None:
            raise _lacks(f"{name} is not supported")
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise _lacks(f"{q.dtype=}, {k.dtype=}, supported: both bfloat16 or both float32")
    (t, h), s = q.shape[2:], k.shape[2]
    if min(t, s) < 8:
        raise _lacks(f"{t} queries, {s} keys, supported: 8 or more")
    if h > MAX_HEAD_DIM:
        raise _lacks(f"head dim {h}, supported: up to {MAX_HEAD_DIM}")
    for config in (FORWARD, BACKWARD):
        block_q, _ = config.blocks(t // spec.pieces, s // spec.pieces)
        if spec.pieces > 1 and block_q % LANES:
            raise _lacks(f"pieces of {t // spec.pieces} tokens, supported: multiples of {LANES}")


def init(spec: AttentionSpec, q: jax.Array) -> State:
    b, n, t, h = q.shape
    row = jnp.zeros((b, n, 1, t), jnp.float32)
    return _varying_like(State(jnp.zeros((b, n, h, t), jnp.float32), row + softmax.initial_max(jnp.float32), row), q)


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
    check(spec, q, k, extras)
    state = _varying_like(state, q, k, v)
    (b, n, t, h), (kv_heads, s) = q.shape, k.shape[1:3]
    block_q, block_k = config.blocks(t // spec.pieces, s // spec.pieces)
    num_q, num_k = t // block_q, s // block_k
    pairs = spec.band.met(t, s, block_q, block_k, _apart(at), spec.pieces)
    places = functools.partial(_places, spec, t, s)

    def q_block(b, n, i, j, offsets):
        return b, n, i, 0

    def k_block(b, n, i, j, offsets):
        rows, keys = places(offsets)
        start = rows.of(i * block_q)
        needed = spec.band.blocks(start, start + block_q, keys, block_k)
        return b, lax.div(n * kv_heads, q.shape[1]), _within(j, needed, num_k), 0

    def state_block(b, n, i, j, offsets):
        return b, n, 0, i

    q_spec = pl.BlockSpec((None, None, block_q, h), q_block)
    k_spec = pl.BlockSpec((None, None, block_k, h), k_block)
    acc_spec = pl.BlockSpec((None, None, h, block_q), state_block)
    row_spec = pl.BlockSpec((None, None, 1, block_q), state_block)
    new = pl.pallas_call(
        functools.partial(_forward_kernel, spec=spec, chunk=config.chunk, places=places),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, n, num_q, num_k),
            in_specs=[q_spec, k_spec, k_spec, acc_spec, row_spec, row_spec],
            out_specs=[acc_spec, row_spec, row_spec],
        ),
        out_shape=[_shape(x) for x in state],
        input_output_aliases={4: 0, 5: 1, 6: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * n * pairs * h,
            transcendentals=b * n * pairs,
            bytes_accessed=_nbytes(q, *state, *state) + n // kv_heads * num_q * _nbytes(k, v),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_forward",
    )(_scalars(*at.query, *at.key), q, k, v, *state)
    return State(*new)


def _apart(at: Offsets) -> int | None:
    """How far the first query is from the first key, None where only the run knows."""
    unknown = any(isinstance(x, jax.core.Tracer) for side in at for x in side)
    return None if unknown else int(at.query[0]) - int(at.key[0])


def _places(spec: AttentionSpec, num_queries: int, num_keys: int, offsets) -> tuple[Places, Places]:
    """Where queries and keys stand, by the scalars that a kernel is given first."""
    starts = [offsets[i] for i in range(2 * spec.pieces)]
    return Offsets(tuple(starts[: spec.pieces]), tuple(starts[spec.pieces :])).places(num_queries, num_keys)


def _forward_kernel(offsets, q_ref, k_ref, v_ref, acc_in, m_in, l_in, acc, m, l, *, spec, chunk, places):
    i, j = pl.program_id(2), pl.program_id(3)
    (block_q, _), (block_k, _) = q_ref.shape, k_ref.shape
    rows, keys = places(offsets)
    q_start, k_start = rows.of(i * block_q), keys.of(j * block_k)

    # Invariant: after step j, (acc, m, l) is the state after the keys that came in with it and those of blocks 0 .. j.
    @pl.when(j == 0)
    def load():
        acc[...], m[...], l[...] = acc_in[...], m_in[...], l_in[...]

    def block(masked: bool):
        def accumulate(c, s):
            m_new, l_new, alpha, p = softmax.step(m[...], l[...], s, axis=0, exp=jnp.exp2)
            v = v_ref[c]
            acc[...] = acc[...] * alpha + _dot(v, p.astype(v.dtype), 0, 0)
            m[...], l[...] = m_new, l_new

        _chunks(block_k, chunk, lambda c: _scores(spec, q_ref, k_ref, c, q_start, k_start, masked), accumulate)

    _if_seen(spec.band, q_start, block_q, k_start, block_k, block)


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
    check(spec, q, k, extras)
    grads = _varying_like(grads, q, k, v, do)
    block_q, _ = config.blocks(q.shape[2] // spec.pieces, k.shape[2] // spec.pieces)
    # A kv head's query blocks, those of its first query head first, are cut into as few runs as VMEM allows.
    rows = q.shape[1] // k.shape[1] * (q.shape[2] // block_q)
    fitting = max(1, config.resident_bytes // (block_q * q.shape[3] * 4))
    run = max(d for d in range(1, min(rows, fitting) + 1) if rows % d == 0)
    add = functools.partial(_backward_run, spec, q, k, v, do, lse[:, :, None], delta[:, :, None], at, config, run)
    if run == rows:
        return add(0, grads)
    return lax.fori_loop(0, rows // run, lambda i, grads: add(i * run, grads), grads)


def _backward_run(spec, q, k, v, do, lse, delta, at, config, run, first, grads):
    """Adds to `grads` what query blocks `first .. first + run` of every kv head give; `first` may be traced."""
    (b, n, t, h), (kv_heads, s) = q.shape, k.shape[1:3]
    block_q, block_k = config.blocks(t // spec.pieces, s // spec.pieces)
    num_q, num_k, group = t // block_q, s // block_k, n // kv_heads
    places, first_row = functools.partial(_places, spec, t, s), 2 * spec.pieces  # in the scalars

    def row(kv, r, offsets):
        """Query head and block of the run's r-th row."""
        r = offsets[first_row] + r
        return kv * group + lax.div(r, num_q), lax.rem(r, num_q)

    def q_block(b, kv, j, r, offsets):
        rows, keys = places(offsets)
        start = keys.of(j * block_k)
        needed = spec.band.transpose().blocks(start, start + block_k, rows, block_q)
        n, i = row(kv, r, offsets)
        return b, n, _within(i, needed, num_q), 0

    def lse_block(*step):
        b, n, i, _ = q_block(*step)
        return b, n, 0, i

    def k_block(b, kv, j, r, offsets):
        return b, kv, j, 0

    def dq_block(b, kv, j, r, offsets):  # stays at the run's first block until the last keys, when each is written once
        n, i = row(kv, jnp.where(j == num_k - 1, r, 0), offsets)
        return b, n, i, 0

    q_spec = pl.BlockSpec((None, None, block_q, h), q_block)
    k_spec = pl.BlockSpec((None, None, block_k, h), k_block)
    row_spec = pl.BlockSpec((None, None, 1, block_q), lse_block)
    dq_spec = pl.BlockSpec((None, None, block_q, h), dq_block)
    dq, dk, dv = grads.dq, grads.dk, grads.dv
    pairs = b * kv_heads * run * block_q * spec.band.met(t, s, block_q, block_k, _apart(at), spec.pieces) // t
    new = pl.pallas_call(
        functools.partial(_backward_kernel, spec=spec, chunk=config.chunk, num_q=num_q, places=places),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, num_k, run),
            in_specs=[q_spec, k_spec, k_spec, q_spec, row_spec, row_spec, dq_spec, k_spec, k_spec],
            out_specs=[dq_spec, k_spec, k_spec],
            scratch_shapes=[pltpu.VMEM((run, h, block_q), jnp.float32), pltpu.VMEM((block_k, h), jnp.float32)],
        ),
        out_shape=[_shape(x) for x in (dq, dk, dv)],
        input_output_aliases={7: 0, 8: 1, 9: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=(8 * q.dtype.itemsize * 2**20) + run * block_q * h * 4,  # blocks, spills; dq
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * h,
            transcendentals=pairs,
            bytes_accessed=_nbytes(k, v, dk, dk, dv, dv)
            + (num_k * _nbytes(q, do) + 2 * _nbytes(dq)) * run // (group * num_q),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_backward",
    )(_scalars(*at.query, *at.key, first), q, k, v, do, lse, delta, dq, dk, dv)
    return Grads(*new)


def _backward_kernel(
    offsets, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_in, dk_in, dv_in, dq_ref, dk_ref, dv_ref, dq, dk,
    *, spec, chunk, num_q, places,
):  # fmt: skip
    j, r = pl.program_id(2), pl.program_id(3)
    (block_q, _), (block_k, _) = q_ref.shape, k_ref.shape
    rows, keys = places(offsets)
    q_start = rows.of(lax.rem(offsets[2 * spec.pieces] + r, num_q) * block_q)
    k_start = keys.of(j * block_k)

    # Invariant: after step (j, r), dq[r] is the unscaled transposed sum over key blocks 0 .. j, and dk and dv_ref are
    # the sums over rows 0 .. r for key block j; dv_ref began with what came in.
    @pl.when(j == 0)
    def clear_dq():
        dq[r] = jnp.zeros_like(dq[r])

    @pl.when(r == 0)
    def clear_dk():
        dk[...] = jnp.zeros_like(dk)
        dv_ref[...] = dv_in[...]

    def block(masked: bool):
        lse = softmax.finite_lse(lse_ref[...]) * LOG2E

        def scores(c):
            return _scores(spec, q_ref, k_ref, c, q_start, k_start, masked), _dot(v_ref[c], do_ref[...], 1, 1)

        def accumulate(c, s_and_dp):
            s, dp = s_and_dp
            p = jnp.exp2(s - lse)
            ds = (p * (dp - delta_ref[...])).astype(q_ref.dtype)
            dv_ref[c] += _dot(p.astype(do_ref.dtype), do_ref[...], 1, 0)
            dk[c] += _dot(ds, q_ref[...], 1, 0)
            dq[r] += _dot(k_ref[c], ds, 0, 0)

        _chunks(block_k, chunk, scores, accumulate)

    _if_seen(spec.band, q_start, block_q, k_start, block_k, block)

    @pl.when(r == pl.num_programs(3) - 1)
    def store_dk():
        dk_ref[...] = dk_in[...] + dk[...] * spec.scale

    @pl.when(j == pl.num_programs(2) - 1)
    def store_dq():
        dq_ref[...] = dq_in[...] + dq[r].T * spec.scale


def _scores(spec, q_ref, k_ref, c, q_start, k_start, masked):
    """Logits [chunk, block_q] of the keys `c` of the block, in units of log 2."""
    s = _dot(k_ref[c], q_ref[...], 1, 1) * (spec.scale * LOG2E)
    if masked:
        key = k_start + c.start + lax.broadcasted_iota(jnp.int32, s.shape, 0)
        query = q_start + lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s = jnp.where(spec.band(query, key), s, softmax.MASKED)
    return s


def _chunks(block: int, chunk: int, start, finish) -> None:
    """Calls `finish(c, start(c))` for each chunk `c` of the block, two starts ahead: the MXU works during the softmax.

    The first and the last chunk are half ones, since nothing else runs beside the first start and the last finish.
    """
    edges = [0, *range(chunk // 2, block - SUBLANES + 1, chunk), block]
    chunks = [pl.ds(low, high - low) for low, high in itertools.pairwise(edges)]
    started = [start(c) for c in chunks[:AHEAD]]
    for i, c in enumerate(chunks):
        if i + AHEAD < len(chunks):
            started.append(start(chunks[i + AHEAD]))
        finish(c, started.pop(0))


def _if_seen(band, q_start, block_q, k_start, block_k, block) -> None:
    """Runs `block(masked)` unless the band hides all of it; one that it hides nothing of isn't masked."""
    if band.is_full:
        block(False)
        return
    hidden, seen = band.blocks(q_start, q_start + block_q, Places((k_start,), block_k), block_k)
    full = band.is_full_block(q_start, q_start + block_q, k_start, k_start + block_k)
    pl.when(full)(lambda: block(False))
    pl.when((hidden < seen) & ~full)(lambda: block(True))


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b.astype(a.dtype), dims, precision=precision, preferred_element_type=jnp.float32)


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU attention kernel: {what}")


def _divisor(length: int, limit: int, unit: int) -> int:
    """The largest block up to `limit` that divides `length`, whole or in units."""
    if length <= limit:
        return length
    for block in range(limit, 0, -unit):
        if length % block == 0:
            return block
    raise _lacks(f"{length} tokens, more than {limit} and in no blocks of {unit}; pad them to a multiple of {LANES}")


def _within(i, needed, num_blocks: int):
    """Block `i` clamped to those needed, so that a skipped step fetches nothing new."""
    first, last = needed
    return jnp.clip(jnp.clip(i, first, last - 1), 0, num_blocks - 1)


def _scalars(*values) -> jax.Array:
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in values])


def _varying_like(tree, *operands: jax.Array):
    """`tree` made to vary over the manual mesh axes that any operand varies over (where shard_map checks that)."""
    axes = frozenset().union(*(jax.typeof(y).mat.varying for y in operands))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(sorted(axes - jax.typeof(x).mat.varying)), to="varying"), tree)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).mat)


def _nbytes(*arrays: jax.Array) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
