"""Attention's gradients on Hopper GPUs.

    P = 2^(S - lse)    dP = dO V^T    dS = P (dP - delta)    dQ = dS K    dK = dS^T Q    dV = P^T dO

One kernel, by blocks of keys, has dK and dV in registers, as keys by queries: the left side of their products is there too.
Of each block of queries that it meets it adds its keys' share of dQ to what the blocks of keys before have (`Sums`): five
products for a pair of blocks, and bits repeat. dS gets to both warpgroups through shared memory.

Where registers don't suffice dQ has a kernel of its own, by blocks of queries, and of wide heads dK and dV have one each.
Each of them makes P and dS anew.
"""

import functools
from typing import Any, NamedTuple

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
    FEWEST,
    GROUPS,
    MOST,
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
    slot_of,
)

# Head dims whose dQ, dK and dV are one kernel, where logits depend on distances and ends.
TOGETHER = ((64, 64), (128, 128))
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
    dq, few, found = padded(dq, TALL), are_few(spec, extras), {}
    # Spans of a mask like a prefix beside a window, made longer for the turns, would be of all queries.
    if few and spec.band.also is None and (h, dim) in TOGETHER:
        runs = (("dq", "dk", "dv"),)
    elif h + dim <= (BESIDE if few else BESIDE // 2):
        runs = (("dk", "dv"),)
    else:
        runs = ("dk",), ("dv",)
    for names in runs:
        found |= zip(names, _keys(spec, extras, at, arrays, names, dq), strict=True)
    if "dq" not in found:
        found["dq"] = _queries(spec, extras, at, arrays, dq)
    return Grads(found["dq"][:, :, :t], *(found[name][:, :, :s] for name in ("dk", "dv")))


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
    (found,) = launch(
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
    return found


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


class Exchange(NamedTuple):
    """dS of a step from each warpgroup's keys, in shared memory, for the products of dQ: [2, GROUPS, ROWS, ROWS], the steps
    taking turns. Once a warpgroup says that its own of a step is there, it is done with that of the step before."""

    ring: Any
    full: Any  # barriers, one a slot
    sums: Sums  # dQ's

    def give(self, step, group, x) -> None:
        slot = slot_of(step, self.ring)
        self.ring.at[slot, group][...] = x
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])

    def queries(self, step, group, keys, scale) -> None:
        """Makes this warpgroup's share of dQ: its columns, or, where one has all of them, those of every second step."""
        slot, (_, shares, rows, width) = slot_of(step, self.ring), self.sums.ring.shape
        share = group if shares == GROUPS else 0

        def multiply(acc):
            columns = pl.ds(pl.multiple_of(share * width, width), width) if shares > 1 else slice(None)
            for g in range(GROUPS):
                plgpu.wgmma(acc, self.ring.at[slot, g].transpose((1, 0)), keys.at[g, :, columns])
            self.sums.give(step, share, acc[...] * scale)

        def run():
            plgpu.barrier_wait(self.full.at[slot])
            pl.run_scoped(multiply, plgpu.ACC((rows, width), jnp.float32))

        run() if shares == GROUPS else pl.when(group == slot)(run)


def _keys(spec: AttentionSpec, extras: Extras, at: Offsets, arrays, wanted: tuple[str, ...], dq):
    """`wanted`, of which a dQ is added to dq."""
    q, k, v, do, *numbers = arrays
    h, dim, together = q.shape[3], v.shape[3], "dq" in wanted
    blocks, known = Blocks.make(spec, q, k, extras, at, ROWS, rows="key", in_turn=together)
    held, widths, tiles = (h, dim) if "dk" in wanted else (h,), {"dq": h, "dk": h, "dv": dim}, shared(q.dtype)
    own, shares = TALL * sum(held), h // WIDTH
    exchange = []
    if together:
        exchange = [
            tiles(2, GROUPS, ROWS, ROWS),
            barriers(2, GROUPS),
            shared(jnp.float32)(2, shares, ROWS, WIDTH),
            barriers(2, shares),
            barriers(2),
        ]
        own += 2 * TALL * ROWS + 2 * 2 * ROWS * h
    stages = _stages(q, own, ROWS * (h + 2), ROWS * (dim + 2))
    return launch(
        functools.partial(_keys_body, blocks, wanted),
        f"backward_{'_'.join(wanted)}",
        k.shape[1],
        blocks.num_rows,
        [(blocks.height, widths[name]) for name in wanted if name != "dq"],
        [
            *(tiles(GROUPS, ROWS, width) for width in held),
            barriers(1, GROUPS * len(held)),
            *(tiles(n, ROWS, width) for n, width in zip(stages, (h, dim))),
            *(plgpu.SMEM((n, ROWS), jnp.float32) for n in stages),
            *(barriers(n, arrivals) for n in stages for arrivals in (2, GROUPS)),
            *exchange,
        ],
        known,
        *map(by_token, (k, v, q, do)),
        *numbers,
        pairs=q.shape[1] // k.shape[1] * blocks.pairs(at),
        width=h + dim + sum(widths[name] for name in wanted) if "dk" in wanted else h + dim,
        into=dq if together else None,
    )


def _keys_body(blocks: Blocks, wanted, known, k, v, q, do, lse, delta, *refs):
    exchange = None
    if "dq" in wanted:
        (total, *refs), wanted = refs, wanted[1:]
        *refs, slopes_ring, slopes_full, sums_ring, sums_full, sums_free = refs
        exchange = Exchange(slopes_ring, slopes_full, Sums(total, sums_ring, sums_full, sums_free))
    outs, refs = refs[: len(wanted)], refs[len(wanted) :]
    *held, k_full, q_ring, do_ring, lse_ring, delta_ring, q_full, q_free, do_full, do_free = refs
    queries, slopes = (
        Stream([q, lse], [q_ring, lse_ring], q_full, q_free),
        Stream([do, delta], [do_ring, delta_ring], do_full, do_free),
    )
    kv, j, group = head(), lax.axis_index("rows"), lax.axis_index("group")
    heads = sharing(q, k)
    first, met = blocks.met(known, kv * heads, j)
    # The last ones first: with those, under a causal mask, all blocks of threads begin.
    of_step = lambda step: (kv * heads + lax.div(step, met), (first + met - 1 - lax.rem(step, met)) * ROWS)

    @pl.when(group == GROUPS)
    def _bring():
        plgpu.set_max_registers(FEWEST, action="decrease")
        for g in range(GROUPS):
            for source, own in zip((k, v), held):
                fetch(source, kv, pl.ds(j * TALL + g * ROWS, ROWS), own.at[g], k_full.at[0])

        def cut(step):
            n, row = of_step(step)
            return n, pl.ds(row, ROWS)

        def add(sums: Sums, step):
            n, row = of_step(step)
            sums.add(step, n, row, blocks.turn(known, n, j, row))

        bring([queries, slopes], met * heads, cut, functools.partial(add, exchange.sums) if exchange else None)

    @pl.when(group < GROUPS)
    def _multiply():
        plgpu.set_max_registers(MOST, action="increase")
        key = pl.multiple_of(j * TALL + group * ROWS, ROWS)
        scale, logits = blocks.spec.scale, plgpu.ACC((ROWS, ROWS), jnp.float32)
        # What more than distances and ends tells leaves no registers for dP to be under way meanwhile.
        early = blocks.spec.band.also is None and blocks.spec.soft_cap is None and not known.is_read
        plgpu.barrier_wait(k_full.at[0])

        def step(n, totals):
            (query, lses), (out, deltas), own = queries.at(n), slopes.at(n), anew(group)
            head_of_step, row = of_step(n)
            of_column = lambda ref: across(plgpu.load(ref, layout=WGMMA.reduce(0)), (ROWS, ROWS), 1)

            def ask_slopes(dp_acc):
                if exchange is None:
                    slopes.wait(n)
                if "dk" in wanted:
                    plgpu.wgmma(dp_acc, held[1].at[own], out.transpose((1, 0)))

            def work(s_acc, dp_acc, *accs):
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
                    ds = (factor * (dp if exchange else dp - of_column(deltas))).astype(q.dtype)
                    if exchange:
                        exchange.give(n, own, ds)
                    plgpu.wgmma(acc["dk"], ds, query)
                    if exchange:
                        exchange.queries(n, own, held[0], scale)
                plgpu.wgmma_wait(0)
                queries.done(n)
                slopes.done(n)
                return ()

            if exchange is None:
                both = lambda *accs: added_to(totals, functools.partial(work, *accs))
                return tuple(pl.run_scoped(both, logits, logits))

            def from_delta(s_acc):
                """A thread's registers don't hold delta beside P and dP: dP's sum begins with it."""
                slopes.wait(n)
                return added_to([-of_column(deltas), *totals], functools.partial(work, s_acc))[1:]

            return tuple(pl.run_scoped(from_delta, logits))

        totals = tuple(filled((ROWS, out.shape[2]), 0.0) for out in outs)
        totals = lax.fori_loop(0, met * heads, step, totals)
        if exchange:
            exchange.sums.finish(met * heads, group)
        for name, out, total in zip(wanted, outs, totals):
            out[kv, pl.ds(key, ROWS)] = total * scale if name == "dk" else total
