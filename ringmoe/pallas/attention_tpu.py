"""Attention on TPU: the kernel of `interface.py`, in Pallas, with its running state passed through the kernel.

Scores are computed transposed, `s = k q^T` [block_k, block_q]: the softmax reduces over sublanes, its statistics are
row vectors `[1, block_q]` that cost no padding in HBM, and the accumulator is `[H, block_q]`, turned round once, in
`finish`. The state and dq are read and written in place (aliased), so nothing of XLA's stands between two hops of a
ring and its scheduler has only the kernel to hide the exchange behind. Backward is one kernel of five matmuls a block
pair: dk and dv stay in VMEM while the queries go by, dq (transposed) stays there while the keys do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import dropout, softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets, widened
from ringmoe.pallas import backward_tpu
from ringmoe.pallas.blocks import apart
from ringmoe.pallas.logits_tpu import LANES, LOG2E, Blocks, Pair
from ringmoe.pallas.tiles_tpu import (
    Config,
    best,
    dot,
    lacks,
    nbytes,
    new,
    row_bytes,
    varying_like,
    walk,
    within,
)

MAX_HEAD_DIM = 576
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class State(NamedTuple):
    """None before any key. Float32 acc [B, N, V, T] = sum of v^T 2^(s - m), m [B, N, 1, T] = max of s, l [B, N, 1, T] = sum of
    2^(s - m).

    The logits s are in units of log 2.
    """

    acc: jax.Array
    m: jax.Array
    l: jax.Array


def check(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras) -> None:
    """Raises NotImplementedError, naming what this kernel lacks."""
    if q.dtype not in DTYPES or (k.dtype != q.dtype and extras.key_scales is None):
        raise lacks(f"{q.dtype=}, {k.dtype=}, supported: both bfloat16, both float16 or both float32")
    if extras.pages is not None:
        raise lacks("keys in pages of a pool")
    t, h = q.shape[2:]
    if max(h, v.shape[3]) > MAX_HEAD_DIM:
        raise lacks(f"head dims {h} and {v.shape[3]}, supported: up to {MAX_HEAD_DIM}")
    for direction in ("forward", "backward"):
        block_q, _ = best(direction, spec, q, v).blocks(spec, q, k, v)
        if spec.pieces > 1 and block_q % LANES:
            raise lacks(f"pieces of {t // spec.pieces} tokens, supported: multiples of {LANES}")


def init(spec: AttentionSpec, q: jax.Array, v: jax.Array) -> None:
    return None


def finish(spec: AttentionSpec, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
    o, lse, tail = softmax.finish(state.acc, state.m / LOG2E, state.l)
    return jnp.swapaxes(o, -1, -2), lse[..., 0, :], tail[..., 0, :]


@jax.named_scope("ringmoe_attention_forward")
def forward(
    spec: AttentionSpec,
    state: State | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    at: Offsets,
    config: Config | None = None,
) -> State:
    check(spec, q, k, v, extras)
    q, k, v = _multipliable(q), *_multipliable_keys(q, k, v, extras)
    config = config or best("forward", spec, q, v)
    (b, n, t, h), kv_heads = q.shape, k.shape[1]
    after = [new((b, n, rows, t), q, k, v) for rows in (v.shape[3], 1, 1)]
    before = [] if state is None else [*varying_like(state, q, k, v)]
    blocks, scalars, vectors = Blocks.make(spec, q, k, extras, at, *config.blocks(spec, q, k, v))
    block_q, block_k = blocks.block_q, blocks.block_k
    pairs = b * n * blocks.pairs(at)

    def q_block(b, n, i, j, scalars):
        return b, n, i, 0

    def k_block(b, n, i, j, scalars):
        return b, lax.div(n * kv_heads, q.shape[1]), within(j, blocks.keys_met(scalars, b, i), blocks.num_k), 0

    def state_block(b, n, i, j, scalars):
        return b, n, 0, i

    k_spec, v_spec = (pl.BlockSpec((None, None, block_k, x.shape[3]), k_block) for x in (k, v))
    acc_spec = pl.BlockSpec((None, None, v.shape[3], block_q), state_block)
    row_spec = pl.BlockSpec((None, None, 1, block_q), state_block)
    pair = lambda *step: (*step[:3], k_block(*step)[2])
    state_specs = [acc_spec, row_spec, row_spec]
    found = pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, n, blocks.num_q, blocks.num_k),
            in_specs=[
                pl.BlockSpec((None, None, block_q, h), q_block),
                k_spec,
                v_spec,
                blocks.specs(vectors, pair),
                state_specs[: len(before)],
            ],
            out_specs=state_specs,
        ),
        out_shape=after,
        input_output_aliases={4 + len(vectors) + n: n for n in range(len(before))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (h + v.shape[3]),
            transcendentals=pairs,
            bytes_accessed=nbytes(q, *before, *after) + pairs // block_q * row_bytes(k, v),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_forward",
    )(scalars, q, k, v, vectors, before)
    return State(*found)


def _forward_kernel(scalars, q_ref, k_ref, v_ref, vectors, before, acc, m, l, *, blocks: Blocks, config):
    b, n, i, j = map(pl.program_id, range(4))
    pair, rate = Pair(blocks, scalars, vectors, b, n, i, j), blocks.spec.dropout_rate

    # Invariant: after step j, (acc, m, l) is the state after the keys that came in with it and those of blocks 0 .. j.
    @pl.when(j == 0)
    def load():
        if before:
            acc[...], m[...], l[...] = (ref[...] for ref in before)
        else:
            acc[...], l[...] = jnp.zeros_like(acc), jnp.zeros_like(l)
            m[...] = jnp.full_like(m, softmax.initial_max(m.dtype))

    def block(masked: bool, first, keys: int, diagonal: int | None = None):
        def scores(c):
            return pair.logits(dot(k_ref[c.keys], q_ref[c.queries], 1, 1), c, masked)[0]

        def accumulate(c, s):
            rows = slice(None), c.queries
            m[rows], l[rows], alpha, p = softmax.step(m[rows], l[rows], s, axis=0, exp=jnp.exp2)
            v = pair.inside(v_ref[c.keys], "key", c.keys.start) if masked else v_ref[c.keys]
            acc[rows] = acc[rows] * alpha + dot(v, dropout.drop(p, rate, pair.kept(c)).astype(v.dtype), 0, 0)

        walk(config, blocks.block_q, first, keys, diagonal, scores, accumulate)

    pair.run(block)


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
    config: Config | None = None,
) -> Grads:
    check(spec, q, k, v, extras)
    q, k, v, do = _multipliable(q), *_multipliable_keys(q, k, v, extras), _multipliable(do)
    config = config or best("backward", spec, q, v)
    call = Blocks.make(spec, q, k, extras, at, *config.blocks(spec, q, k, v))
    arrays = q, k, v, do, lse[:, :, None], delta[:, :, None]
    grads = backward_tpu.of_operands(call, config, dq, arrays, apart(at))
    return grads._replace(dbias=backward_tpu.of_bias(call, config, arrays)) if spec.bias_gradient else grads


def _multipliable(x: jax.Array) -> jax.Array:
    """No TPU multiplies float16: its numbers are float32's too."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _multipliable_keys(q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras) -> tuple[jax.Array, jax.Array]:
    """Float8 is widened here, a block of keys at a time: in the kernel every block of queries would do it again."""
    scaled = (k, extras.key_scales), (v, extras.value_scales)
    k, v = (_multipliable(widened(x, scales, q.dtype)) for x, scales in scaled)
    return k, v
