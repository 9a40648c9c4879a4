"""The backward pass of the TPU attention kernel, see attention_tpu.py."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import dropout, softmax
from ringmoe.interface import Grads
from ringmoe.pallas.logits_tpu import LANES, LOG2E, Blocks, Pair
from ringmoe.pallas.tiles_tpu import Config, dot, nbytes, new, row_bytes, varying_like, walk, within


def of_operands(call, config: Config, dq, arrays, apart: int | None) -> Grads:
    """A block pair's dq, with the given one's sum if that is not None, dk and dv: one kernel of five matmuls. `call` is what
    `Blocks.make` gave; `arrays` are q, k, v, do, and lse and delta [B, N, 1, T]."""
    (blocks, scalars, vectors), (q, k, v) = call, arrays[:3]
    before = {} if dq is None else {"dq": varying_like(dq, *arrays)}
    # A kv head's query blocks, those of its first query head first, are cut into as few runs as VMEM allows.
    rows = q.shape[1] // k.shape[1] * blocks.num_q
    fitting = max(1, config.resident_bytes // (blocks.block_q * q.shape[3] * 4))
    run = max(d for d in range(1, min(rows, fitting) + 1) if rows % d == 0)
    add = lambda first, before: _run(
        config, blocks, blocks.starting(scalars, first), vectors, run, arrays, before, apart
    )
    if run == rows:
        return add(0, before)
    # A run writes its own rows of dq alone, and adds to dk and dv.
    zeros = varying_like(
        {name: jnp.zeros(x.shape, jnp.float32) for name, x in (("dq", q), ("dk", k), ("dv", v))}, *arrays
    )
    add_to = lambda i, grads: add(i * run, {name: getattr(grads, name) for name in zeros})
    return lax.fori_loop(0, rows // run, add_to, Grads(**zeros | before))


def _run(config: Config, blocks: Blocks, scalars, vectors, run: int, arrays, before: dict, apart) -> Grads:
    """What so many query blocks of every kv head give, from the one on that `scalars` say, and the sums with what was `before`,
    by name."""
    q, k, v, do = arrays[:4]
    (b, n, t, h), (kv_heads, s), spec = q.shape, k.shape[1:3], blocks.spec
    block_q, block_k, num_q, num_k, group = blocks.block_q, blocks.block_k, blocks.num_q, blocks.num_k, n // kv_heads

    def row(kv, r, scalars):
        """Query head and block of the run's r-th row."""
        r = blocks.number(scalars, "first") + r
        return kv * group + lax.div(r, num_q), lax.rem(r, num_q)

    def q_block(b, kv, j, r, scalars):
        n, i = row(kv, r, scalars)
        return b, n, within(i, blocks.queries_met(scalars, b, j), num_q), 0

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
    grads = {"dq": dq_spec, "dk": k_spec, "dv": v_spec}
    dq, dk, dv = after = [new(x.shape, *arrays) for x in (q, k, v)]
    pairs = b * kv_heads * run * block_q * spec.band.met(t, s, block_q, block_k, apart, spec.pieces) // t
    found = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, group=group, config=config),
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
                {name: grads[name] for name in before},
            ],
            out_specs=[*grads.values()],
            scratch_shapes=[pltpu.VMEM((run, h, block_q), jnp.float32), pltpu.VMEM((block_k, h), jnp.float32)],
        ),
        out_shape=after,
        # Of a dict operands come in the order of their names, which is that of the results.
        input_output_aliases={7 + len(vectors) + n: [*grads].index(name) for n, name in enumerate(sorted(before))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(q, v) + run * block_q * h * 4,
        ),
        cost_estimate=pl.CostEstimate(
            flops=pairs * (6 * h + 4 * v.shape[3]),
            transcendentals=pairs,
            bytes_accessed=nbytes(k, v, dk, dv, *(before[name] for name in before if name != "dq"))
            + pairs // block_k * row_bytes(q, do)
            + (1 + ("dq" in before)) * nbytes(dq) * run // (group * num_q),
        ),
        interpret=spec.interpret,
        name="ringmoe_attention_backward",
    )(scalars, *arrays, vectors, before)
    return Grads(*found)


def _vmem_bytes(q, v) -> int:
    """For blocks and what is spilled."""
    return 8 * q.dtype.itemsize * max(1, -(-max(q.shape[3], v.shape[3]) // (2 * LANES))) * 2**20


class _Weights:
    """The softmax's weights of a pair of blocks, and the gradient of its logits, by tiles."""

    def __init__(self, pair: Pair, masked: bool, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref):
        self.pair, self.refs = pair, (q_ref, k_ref, v_ref, do_ref)
        self.inside = pair.inside if masked else lambda x, *_: x
        self.masked = masked
        lse, self.delta = (self.inside(ref[...], "query", 0, 1) for ref in (lse_ref, delta_ref))
        self.lse = softmax.finite_lse(lse) * LOG2E

    def q(self, c):
        return self.inside(self.refs[0][c.queries], "query", c.queries.start)

    def do(self, c):
        return self.inside(self.refs[3][c.queries], "query", c.queries.start)

    def k(self, c):
        return self.inside(self.refs[1][c.keys], "key", c.keys.start)

    def scores(self, c):
        """Two products: the logits, and the gradient of the weights."""
        v = self.inside(self.refs[2][c.keys], "key", c.keys.start)
        return self.pair.logits(dot(self.k(c), self.q(c), 1, 1), c, self.masked), dot(v, self.do(c), 1, 1)

    def finish(self, c, found):
        """`(p, ds)` [keys, queries] in float32: the weights after dropout, and the gradient of logits before a cap."""
        (s, slope), dp = found
        lse, delta = (x[:, c.queries.start :] for x in (self.lse, self.delta))
        p, kept, rate = jnp.exp2(s - lse), self.pair.kept(c), self.pair.spec.dropout_rate
        ds = p * (dropout.drop(dp, rate, kept) - delta)
        return dropout.drop(p, rate, kept), ds if slope is None else ds * slope


def _kernel(
    scalars, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, vectors, before, dq_ref, dk_ref, dv_ref, dq, dk,
    *, blocks: Blocks, group: int, config: Config,
):  # fmt: skip
    b, kv, j, r = map(pl.program_id, range(4))
    row = blocks.number(scalars, "first") + r
    n, i = kv * group + lax.div(row, blocks.num_q), lax.rem(row, blocks.num_q)
    pair, scale = Pair(blocks, scalars, vectors, b, n, i, j), blocks.spec.scale
    total = lambda name, share: before[name][...] + share if name in before else share

    # Invariant: after step (j, r), dq[r] is the unscaled transposed sum over key blocks 0 .. j, and dk and dv_ref are
    # the sums over rows 0 .. r for key block j; dv_ref began with what came in.
    @pl.when(j == 0)
    def clear_dq():
        dq[r] = jnp.zeros_like(dq[r])

    @pl.when(r == 0)
    def clear_dk():
        dk[...] = jnp.zeros_like(dk)
        dv_ref[...] = before["dv"][...] if "dv" in before else jnp.zeros_like(dv_ref)

    def block(masked: bool, first, keys: int, diagonal: int | None = None):
        weights = _Weights(pair, masked, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref)

        def accumulate(c, found):
            p, ds = (x.astype(q_ref.dtype) for x in weights.finish(c, found))
            dv_ref[c.keys] += dot(p, weights.do(c), 1, 0)
            dk[c.keys] += dot(ds, weights.q(c), 1, 0)
            dq[r, :, c.queries] += dot(weights.k(c), ds, 0, 0)

        walk(config, blocks.block_q, first, keys, diagonal, weights.scores, accumulate)

    pair.run(block)

    @pl.when(r == pl.num_programs(3) - 1)
    def store_dk():
        dk_ref[...] = total("dk", dk[...] * scale)

    @pl.when(j == pl.num_programs(2) - 1)
    def store_dq():
        dq_ref[...] = total("dq", dq[r].T * scale)


def of_bias(call, config: Config, arrays):
    """A block pair's dbias [B|1, N|1, T|1, S|1]: the gradient of the logits, summed over dims that the bias lacks.

    A kernel of its own, whose steps go first over the dims that the bias has and last over those it lacks: so what a block of
    dbias sums over comes at a stretch, in any case, for two of the five matmuls once more.
    """
    (blocks, scalars, vectors), (q, k, v, do) = call, arrays[:4]
    dbias = new(vectors["bias"].shape, *arrays)
    sizes = *q.shape[:2], blocks.num_q, blocks.num_k
    lacking = [d for d in range(4) if dbias.shape[d] == 1]
    order = [d for d in range(4) if d not in lacking] + lacking

    def pair(*step):
        return tuple(step[order.index(d)] for d in range(4))

    def q_block(*step):
        b, n, i, _ = pair(*step)
        return b, n, i, 0

    def row_block(*step):
        b, n, i, _ = pair(*step)
        return b, n, 0, i

    def k_block(*step):
        b, n, i, j = pair(*step)
        return b, lax.div(n * k.shape[1], q.shape[1]), within(j, blocks.keys_met(step[4], b, i), blocks.num_k), 0

    rows, keys = (
        [pl.BlockSpec((None, None, size, x.shape[3]), index) for x in xs]
        for size, index, xs in ((blocks.block_q, q_block, (q, do)), (blocks.block_k, k_block, (k, v)))
    )
    row = pl.BlockSpec((None, None, 1, blocks.block_q), row_block)
    own = blocks.specs({"bias": dbias}, pair)["bias"]
    return pl.pallas_call(
        functools.partial(_bias_kernel, blocks=blocks, config=config, order=order, lacking=len(lacking)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(sizes[d] for d in order),
            in_specs=[rows[0], *keys, rows[1], row, row, blocks.specs(vectors, pair)],
            out_specs=own,
        ),
        out_shape=dbias,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (4 - len(lacking)) + ("arbitrary",) * len(lacking),
            vmem_limit_bytes=2 * _vmem_bytes(q, v),
        ),
        interpret=blocks.spec.interpret,
        name="ringmoe_attention_bias_gradient",
    )(scalars, *arrays, vectors)


def _bias_kernel(
    scalars, q, k, v, do, lse, delta, vectors, dbias, *, blocks: Blocks, config: Config, order, lacking: int
):
    step = [pl.program_id(order.index(d)) for d in range(4)]
    pair = Pair(blocks, scalars, vectors, *step)

    # Invariant: dbias is the sum over the steps so far of the dims that it lacks.
    @pl.when(sum((pl.program_id(4 - 1 - d) for d in range(lacking)), jnp.int32(0)) == 0)
    def clear():
        dbias[...] = jnp.zeros_like(dbias)

    def block(masked: bool, first, keys: int, diagonal: int | None = None):
        weights = _Weights(pair, masked, q, k, v, do, lse, delta)

        def accumulate(c, found):
            ds = weights.finish(c, found)[1].T
            alike = tuple(dim for dim, n in enumerate(dbias.shape) if n == 1)
            dbias[c.within(*dbias.shape)] += jnp.sum(ds, alike, keepdims=True) if alike else ds

        walk(config, blocks.block_q, first, keys, diagonal, weights.scores, accumulate)

    pair.run(block)
