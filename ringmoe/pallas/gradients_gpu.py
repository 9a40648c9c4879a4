"""Attention's gradients on Hopper GPUs: one kernel for dQ, by blocks of queries, and one for dK and dV, by blocks of keys, so
that every sum is a block of threads' own, and bits repeat.

    P = 2^(S - lse)    dP = dO V^T    dS = P (dP - delta)    dQ = dS K    dK = dS^T Q    dV = P^T dO

P and dS are made anew in each, for dK and dV as keys by queries: the left side of the last three products is in registers. Of
wide heads dK and dV are two kernels, for both don't fit there.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets
from ringmoe.masks import Band
from ringmoe.pallas.hopper import added_to
from ringmoe.pallas.logits_gpu import WIDEST, WIDTH, Blocks, across, are_few, cleared, filled, given
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
    Sums,
    anew,
    barriers,
    bring,
    by_token,
    fetch,
    head,
    launch,
    padded,
    shared,
    sharing,
)

BESIDE = 256  # of head dims whose dK and dV a thread's registers hold together; half, where logits take more than a few


def backward(spec: AttentionSpec, dq, q, k, v, do, lse, delta, extras: Extras, at: Offsets) -> Grads:
    """`attention_gpu.backward` of what its check takes."""
    t, s, h, dim = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    queries, keys = at.places(t, s)
    k, v = (cleared(x, keys, extras.key_lengths) for x in (k, v))
    q, do, delta = (cleared(x, queries, extras.query_lengths) for x in (q, do, delta))
    # Of queries past the end every P is 0, whatever slopes make of their places.
    log2 = Blocks(spec, t, s, ROWS, ROWS, has_bias=extras.bias is not None).log2
    lse, delta = padded(softmax.finite_lse(lse) * log2, TALL, float(jnp.finfo(jnp.float32).max)), padded(delta, TALL)
    arrays = q, k, v, do, lse, delta
    dq, found = padded(dq, TALL), {}
    most = BESIDE if are_few(spec, extras) else BESIDE // 2
    if h + dim > most:
        runs = ("dk",), ("dv",)
    else:
        runs = ((("dq", "dk", "dv") if FUSED(h, dim) else ("dk", "dv")),)
    for names in runs:
        found |= zip(names, _keys(spec, extras, at, arrays, names, dq), strict=True)
    if "dq" not in found:
        found["dq"] = _queries(spec, extras, at, arrays, dq)
    lengths = {"dq": t, "dk": s, "dv": s}
    return Grads(**{name: found[name][:, :, :length] for name, length in lengths.items()})


FUSED = lambda h, dim: h == dim == 128


def _stages(q, own: int, first: int, second: int) -> tuple[int, int]:
    """How many blocks of each of two streams fit beside those that stay; numbers of elements. The first is needed longer."""
    room = SHARED // q.dtype.itemsize - own
    both = min(MOST_STAGES, room // (first + second))
    return max(both, min(2, (room - second) // first)), both


def _queries(spec: AttentionSpec, extras: Extras, at: Offsets, arrays, dq):
    q, k, v, do, *numbers = arrays
    h, s, dim = q.shape[3], k.shape[2], v.shape[3]
    stages = lambda block_k: _stages(q, TALL * (h + dim), block_k * h, block_k * dim)
    # 128 logits a row, their gradients, and dQ's sum leave a thread few registers: enough to mask by distances alone.
    distances = spec.band == Band(spec.band.left, spec.band.right) and s % 128 == 0 and not given(extras)
    few = are_few(spec, extras)
    block_k = 128 if few and h <= (128 if distances else 64) and min(stages(128)) >= 2 else 64
    (blocks, known), tiles = Blocks.make(spec, q, k, extras, at, block_k), shared(q.dtype)
    # Of the widest heads one coordinate more for TMA is one register too many: XLA copies those to lie head by head.
    as_read = by_token if h + dim < 2 * WIDEST else lambda x: x
    (dq,) = launch(
        functools.partial(_queries_body, blocks, few),
        "backward_queries",
        q.shape[1],
        blocks.num_rows,
        [dq.shape[2:]],
        [
            *(tiles(GROUPS, ROWS, width) for width in (h, dim)),
            barriers(GROUPS, 2),
            *(tiles(n, block_k, width) for n, width in zip(stages(block_k), (h, dim))),
            *(barriers(n, arrivals) for n in stages(block_k) for arrivals in (1, GROUPS)),
        ],
        known,
        *map(as_read, (q, k, v, do)),
        *numbers,
        dq,
        pairs=blocks.pairs(at),
        width=2 * h + dim,
    )
    return dq


def _queries_body(
    blocks: Blocks, early, known, q, k, v, do, lse, delta, dq_in, dq_out,
    queries, outs, q_full, k_ring, v_ring, k_full, k_free, v_full, v_free,
):  # fmt: skip
    keys, values = Stream([k], [k_ring], k_full, k_free), Stream([v], [v_ring], v_full, v_free)
    n, block_k, group = head(), blocks.block_k, lax.axis_index("group")
    i = blocks.num_rows - 1 - lax.axis_index("rows")
    first, steps = blocks.met(known, n, i)

    @pl.when(group == GROUPS)
    def _bring():
        plgpu.set_max_registers(BRINGING, action="decrease")
        for g in range(GROUPS):
            for source, own in ((q, queries), (do, outs)):
                fetch(source, n, pl.ds(i * TALL + g * ROWS, ROWS), own.at[g], q_full.at[g])
        kv = lax.div(n, jnp.int32(sharing(q, k)))
        bring([keys, values], steps, lambda step: (kv, pl.ds((first + step) * block_k, block_k)))

    @pl.when(group < GROUPS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        row = pl.multiple_of(i * TALL + group * ROWS, ROWS)
        mine, scale = (n, pl.ds(row, ROWS)), blocks.spec.scale
        lse_rows, delta_rows = (
            plgpu.load(ref.at[mine], layout=WGMMA.reduce(1), optimized=False) for ref in (lse, delta)
        )
        plgpu.barrier_wait(q_full.at[group])

        def step(j, dq):
            (key,), (value,), own = keys.at(j), values.at(j), anew(group)

            def ask_slopes(dp_acc):
                values.wait(j)
                plgpu.wgmma(dp_acc, outs.at[own], value.transpose((1, 0)))

            def slopes(s_acc, dp_acc):
                keys.wait(j)
                plgpu.wgmma(s_acc, queries.at[own], key.transpose((1, 0)))
                if early:
                    ask_slopes(dp_acc)
                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=int(early))
                s = blocks.logits(s, known, n, row, (first + j) * block_k)
                _, factor = blocks.weights(s, across(lse_rows, s.shape))
                if not early:
                    factor = lax.optimization_barrier(factor)
                    ask_slopes(dp_acc)
                dp = dp_acc[...]
                values.done(j)
                return (factor * (dp - across(delta_rows, s.shape))).astype(q.dtype)

            ds = pl.run_scoped(slopes, *[plgpu.ACC((ROWS, block_k), jnp.float32)] * 2)

            def add(dq_acc):
                plgpu.wgmma(dq_acc, ds, key)
                plgpu.wgmma_wait(0)
                keys.done(j)
                return ()

            return added_to([dq], add)[0]

        dq = lax.fori_loop(0, steps, step, filled((ROWS, queries.shape[2]), 0.0))
        dq_out[mine] = plgpu.load(dq_in.at[mine], layout=WGMMA, optimized=False) + dq * scale


def _keys(spec: AttentionSpec, extras: Extras, at: Offsets, arrays, wanted: tuple[str, ...], dq):
    q, k, v, do, *numbers = arrays
    h, dim = q.shape[3], v.shape[3]
    blocks, known = Blocks.make(spec, q, k, extras, at, ROWS, rows="key", in_turn="dq" in wanted)
    held, widths, tiles = (h, dim) if "dk" in wanted else (h,), {"dk": h, "dv": dim}, shared(q.dtype)
    own, scratch = TALL * sum(held), []
    if "dq" in wanted:
        scratch = [
            tiles(2, GROUPS, ROWS, ROWS),
            barriers(1, GROUPS),
            shared(jnp.float32)(SUMS, GROUPS, ROWS, h // GROUPS),
            barriers(SUMS, GROUPS),
            barriers(SUMS),
        ]
        own += 2 * GROUPS * ROWS * ROWS + SUMS * ROWS * h * 2
    stages = _stages(q, own, ROWS * (h + 2), ROWS * (dim + 2))
    return launch(
        functools.partial(_keys_body, blocks, wanted),
        f"backward_{'_'.join(wanted)}",
        k.shape[1],
        blocks.num_rows,
        [(blocks.height, widths[name]) for name in wanted if name != "dq"],
        [
            *(tiles(GROUPS, ROWS, width) for width in held),
            barriers(GROUPS, len(held)),
            *(tiles(n, ROWS, width) for n, width in zip(stages, (h, dim))),
            *(plgpu.SMEM((n, ROWS), jnp.float32) for n in stages),
            *(barriers(n, arrivals) for n in stages for arrivals in (2, GROUPS)),
            *scratch,
        ],
        known,
        *map(by_token, (k, v, q, do)),
        *numbers,
        pairs=q.shape[1] // k.shape[1] * blocks.pairs(at),
        width=h + dim + sum({"dq": h, **widths}[name] for name in wanted) if "dk" in wanted else h + dim,
        into=dq if "dq" in wanted else None,
    )


SUMS = 2


def _keys_body(blocks: Blocks, wanted, known, k, v, q, do, lse, delta, *refs):
    fused = "dq" in wanted
    if fused:
        total, *refs = refs
        *refs, slopes_ring, slopes_full, sum_ring, sum_full, sum_free = refs
        sums = Sums(total, sum_ring, sum_full, sum_free)
        wanted = wanted[1:]
    outs, refs = refs[: len(wanted)], refs[len(wanted) :]
    *held, k_full, q_ring, do_ring, lse_ring, delta_ring, q_full, q_free, do_full, do_free = refs
    queries, slopes = (
        Stream([q, lse], [q_ring, lse_ring], q_full, q_free),
        Stream([do, delta], [do_ring, delta_ring], do_full, do_free),
    )
    kv, j, group = head(), lax.axis_index("rows"), lax.axis_index("group")
    heads = sharing(q, k)
    first, met = blocks.met(known, kv * heads, j)
    # From the last on: under a causal mask all blocks of threads begin at the same one.
    of_step = lambda step: (kv * heads + lax.div(step, met), (first + met - 1 - lax.rem(step, met)) * ROWS)

    @pl.when(group == GROUPS)
    def _bring():
        plgpu.set_max_registers(BRINGING, action="decrease")
        for g in range(GROUPS):
            for source, own in zip((k, v), held):
                fetch(source, kv, pl.ds(j * TALL + g * ROWS, ROWS), own.at[g], k_full.at[g])

        def cut(step):
            n, row = of_step(step)
            return n, pl.ds(row, ROWS)

        def add(step):
            n, row = of_step(step)
            sums.add(step, n, row, blocks.turn(known, n, row, j))

        bring([queries, slopes], met * heads, cut, *[(SUMS, add)] * fused)

    @pl.when(group < GROUPS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        key = pl.multiple_of(j * TALL + group * ROWS, ROWS)
        scale, logits = blocks.spec.scale, plgpu.ACC((ROWS, ROWS), jnp.float32)
        # What more than distances and ends tells leaves no registers for dP to be under way meanwhile.
        early = blocks.spec.band.also is None and blocks.spec.soft_cap is None and not known.vectors
        plgpu.barrier_wait(k_full.at[group])
        if fused:
            plgpu.barrier_wait(k_full.at[1 - group])

        def step(n, totals):
            (query, lses), (out, deltas), own = queries.at(n), slopes.at(n), anew(group)
            head_of_step, row = of_step(n)

            def ask_slopes(dp_acc):
                slopes.wait(n)
                if "dk" in wanted:
                    plgpu.wgmma(dp_acc, held[1].at[own], out.transpose((1, 0)))

            def both(s_acc, dp_acc):
                def work(*accs):
                    of_column = lambda ref: across(plgpu.load(ref, layout=WGMMA.reduce(0)), (ROWS, ROWS), 1)
                    acc = dict(zip(wanted, accs))
                    queries.wait(n)
                    plgpu.wgmma(s_acc, held[0].at[own], query.transpose((1, 0)))
                    if early:
                        ask_slopes(dp_acc)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=int(early and "dk" in wanted))
                    s = blocks.logits(s, known, head_of_step, row, key)
                    p, factor = blocks.weights(s, of_column(lses))
                    if not early:
                        p, factor = lax.optimization_barrier((p, factor))
                        ask_slopes(dp_acc)
                    if "dv" in wanted:
                        plgpu.wgmma(acc["dv"], p.astype(q.dtype), out)
                    if "dk" in wanted:
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=len(wanted) - 1)
                        ds = (factor * (dp - of_column(deltas))).astype(q.dtype)
                        if fused:
                            slot = lax.rem(n, jnp.int32(2))
                            slopes_ring.at[slot, own][...] = ds
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(slopes_full.at[0])
                            plgpu.barrier_wait(slopes_full.at[0])
                            columns = pl.ds(pl.multiple_of(own * (q_ring.shape[2] // GROUPS), WIDTH), q_ring.shape[2] // GROUPS)

                            def product(dq_acc):
                                for g in range(GROUPS):
                                    plgpu.wgmma(
                                        dq_acc, slopes_ring.at[slot, g].transpose((1, 0)), held[0].at[g, :, columns]
                                    )
                                plgpu.wgmma(acc["dk"], ds, query)
                                dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
                                sums.give(n, own, dq * scale)

                            pl.run_scoped(product, plgpu.ACC((ROWS, q_ring.shape[2] // GROUPS), jnp.float32))
                        else:
                            plgpu.wgmma(acc["dk"], ds, query)
                    plgpu.wgmma_wait(0)
                    queries.done(n)
                    slopes.done(n)
                    return ()

                return added_to(totals, work)

            return tuple(pl.run_scoped(both, logits, logits))

        totals = tuple(filled((ROWS, out.shape[2]), 0.0) for out in outs)
        totals = lax.fori_loop(0, met * heads, step, totals)
        for name, out, total in zip(wanted, outs, totals):
            out[kv, pl.ds(key, ROWS)] = total * scale if name == "dk" else total
