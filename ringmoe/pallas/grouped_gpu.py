"""`grouped`'s matmuls of sorted rows on Hopper GPUs: one persistent kernel of Mosaic GPU, for all three kinds.

A block a multiprocessor walks tiles of the result. One warpgroup brings the operands' tiles by TMA into a ring of STAGES
in shared memory, and runs on into the next tile; two multiply them by wgmma, each half of a tile's rows, and send the result
out by TMA. Which rows a tile has is in tables that XLA makes: a tile begins with an expert's row, and where it reaches past
the expert's last one, only own rows are sent, by copies of 1, 2, 4, ... rows. `outer` sums over rows instead: of its expert's
last ones it makes those zero, in shared memory, that are others'.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe.pallas.hopper import MULTIPROCESSORS, costing, swizzled

GROUPS = 2  # warpgroups that multiply
ROWS, COLUMNS = 128, 256  # of the result, at once
DEPTH, STAGES = 64, 4  # summed over so many at once, so many of these on their way
TOGETHER = 8  # tiles of rows for every step to the next columns, so that the L2 cache still has their operands
ALIGNED = 8  # rows: a copy of swizzled tiles begins at a multiple of these


def check(a, b, dtype) -> None:
    """Raises NotImplementedError where this kernel can't run; arguments are arrays or their types."""
    halves = jnp.bfloat16, jnp.float16
    if a.dtype != b.dtype or a.dtype not in halves or dtype not in (*halves, jnp.float32):
        raise NotImplementedError(f"{a.dtype} with {b.dtype} to {dtype}, supported: both bfloat16, or float16")


def matmul(kind: str, a: jax.Array, b: jax.Array, counts: jax.Array, dtype) -> jax.Array:
    """`grouped`'s `kind` of a and b in float32, rounded to `dtype`. Rows past the last expert's are not written.

    Cost: 2 D F FLOPs a row; an expert's matrix is read once for TOGETHER tiles of its rows, if L2 holds as much. Rows that
    ALIGNED doesn't divide, and widths that DEPTH doesn't (a bias's is 1), are padded: copies.
    """
    check(a, b, dtype)
    shape, (a, b) = _shape(kind, a, b, counts.size), map(_padded, (a, b))
    found = _matmul(kind, a, b, counts, dtype)
    return found if found.shape == shape else lax.slice(found, [0] * len(shape), shape)


def _shape(kind, a, b, e):
    return (e, a.shape[1], b.shape[1]) if kind == "outer" else (a.shape[0], b.shape[2 if kind == "times" else 1])


def _padded(x):
    """Rows [n, A], or matrices [e, D, F]."""
    steps = (ALIGNED, DEPTH) if x.ndim == 2 else (1, DEPTH, DEPTH)
    more = [(0, -size % step) for size, step in zip(x.shape, steps)]
    return jnp.pad(x, more) if any(after for _, after in more) else x


def _matmul(kind, a, b, counts, dtype):
    e, outer, shape = counts.size, kind == "outer", _shape(kind, a, b, counts.size)
    tables = _tables(counts, None, e) if outer else _tables(counts, ROWS, pl.cdiv(a.shape[0], ROWS) + e)
    half, piece = ROWS // GROUPS, 128 // jnp.dtype(dtype).itemsize
    ring = lambda *block: plgpu.SMEM((STAGES, *block), a.dtype, transforms=swizzled(a.dtype))
    out = lambda **layout: plgpu.SMEM((GROUPS, 2, half, piece), dtype, **layout)
    kernel = plgpu.kernel(
        functools.partial(_body, kind),
        out_type=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(a).mat),
        scratch_types=[
            ring(*(DEPTH, ROWS) if outer else (ROWS, DEPTH)),
            ring(*(COLUMNS, DEPTH) if kind == "back" else (DEPTH, COLUMNS)),
            plgpu.RefUnion(out(transforms=swizzled(dtype)), out()),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        grid=(MULTIPROCESSORS,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=f"ringmoe_grouped_{kind}",
    )
    with costing(2 * a.size * shape[-1], 0, a.nbytes + b.nbytes + math.prod(shape) * jnp.dtype(dtype).itemsize):
        return kernel(*tables, a, b)


def _tables(counts, rows, most):
    """Of each of at most `most` tiles of `rows` rows (None: all of an expert's) its expert, its first row, a multiple of
    ALIGNED, and from which row of the tile to which they are its expert's; and how many tiles there are, [1]. All int32."""
    e, i = jnp.arange(counts.size, dtype=jnp.int32), jnp.arange(most, dtype=jnp.int32)
    up_to = lambda x: jnp.sum(jnp.where(e <= e[:, None], x, 0), 1, dtype=jnp.int32)
    counts = counts.astype(jnp.int32)
    firsts = up_to(counts) - counts
    low = firsts % ALIGNED
    high, starts = jnp.where(counts > 0, low + counts, 0), firsts - low
    if rows is None:
        return e, starts, low, high, jnp.full(1, most, jnp.int32)
    tiles = pl.cdiv(high, rows)
    ends = up_to(tiles)
    expert = jnp.minimum(jnp.sum(ends <= i[:, None], 1, dtype=jnp.int32), counts.size - 1)
    done = (i - (ends - tiles)[expert]) * rows
    return expert, starts[expert] + done, jnp.maximum(low[expert] - done, 0), high[expert] - done, ends[-1:]


def _body(kind, experts, starts, lows, highs, number, a, b, out, a_ring, b_ring, out_pieces, full, free, edge):
    group = lax.axis_index("group")
    outer = kind == "outer"
    wide = pl.cdiv(out.shape[-1], COLUMNS)
    tall = pl.cdiv(out.shape[1], ROWS) if outer else number[0]

    def walk(of_tile):
        """of_tile(its expert, first row, own rows from and to, its tile of rows and of columns, steps before it, its own)."""

        @plgpu.nd_loop((number[0], tall * wide) if outer else (1, tall * wide), collective_axes="block", init_carry=0)
        def steps_done(loop, carry):
            i, j = plgpu.planar_snake(loop.index[1], (tall, wide), 0, TOGETHER)
            at = loop.index[0] if outer else i
            high = highs[at]
            steps = lax.div(high + DEPTH - 1, DEPTH) if outer else a.shape[1] // DEPTH
            of_tile(experts[at], pl.multiple_of(starts[at], ALIGNED), lows[at], high, i, j, carry, steps)
            return carry + steps

        return steps_done

    @pl.when(group == GROUPS)
    def _bring():
        plgpu.set_max_registers(40, action="decrease")

        @walk
        def brought(expert, first, _low, _high, i, j, before, steps):
            columns = pl.ds(j * COLUMNS, COLUMNS)

            @pl.loop(0, steps)
            def _(k):
                slot = lax.rem(before + k, STAGES)
                depth = pl.ds(k * DEPTH, DEPTH)
                if outer:
                    rows = pl.ds(first + k * DEPTH, DEPTH)
                    cut_a, cut_b = a.at[rows, pl.ds(i * ROWS, ROWS)], b.at[rows, columns]
                else:
                    cut_a = a.at[pl.ds(first, ROWS), depth]
                    cut_b = b.at[expert, columns, depth] if kind == "back" else b.at[expert, depth, columns]

                @pl.when(before + k >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(cut_a, a_ring.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(cut_b, b_ring.at[slot], full.at[slot])

        @pl.loop(jnp.maximum(brought - STAGES, 0), brought)
        def _(k):
            plgpu.barrier_wait(free.at[lax.rem(k, STAGES)])

    @pl.when(group < GROUPS)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        half = ROWS // GROUPS
        part = lambda size: pl.ds(pl.multiple_of(group * size, size), size)
        rows, columns = part(half), part(COLUMNS // GROUPS)

        @walk
        def _(expert, first, low, high, i, j, before, steps):
            def summed(acc):
                @pl.loop(0, steps)
                def _(k):
                    slot = lax.rem(before + k, STAGES)
                    plgpu.barrier_wait(full.at[slot])
                    left, right = a_ring.at[slot], b_ring.at[slot]
                    if outer:

                        @pl.when(((k == 0) & (low > 0)) | ((k == steps - 1) & (high < steps * DEPTH)))
                        def _():
                            for ref in (left.at[:, rows], right.at[:, columns]):
                                row = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
                                mine = (low <= row + k * DEPTH) & (row + k * DEPTH < high)
                                ref[...] = jnp.where(mine, ref[...], 0).astype(ref.dtype)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(edge)
                            plgpu.barrier_wait(edge)

                        left = left.at[:, rows].transpose((1, 0))
                    else:
                        left = left.at[rows]
                    plgpu.wgmma(acc, left, right.transpose((1, 0)) if kind == "back" else right)
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(before + k - 1, STAGES)])

                return acc[...]

            acc = pl.run_scoped(summed, plgpu.ACC((half, COLUMNS), jnp.float32))

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(before + steps - 1, STAGES)])

            send = functools.partial(_send, acc, group=group, column=pl.multiple_of(j * COLUMNS, COLUMNS))
            if outer:
                send(out_pieces[0], out.at[expert], pl.multiple_of(i * ROWS + group * half, half))
                return
            row = pl.multiple_of(first + group * half, ALIGNED)
            low, high = (jnp.clip(x - group * half, 0, half) for x in (low, high))
            whole = high - low == half

            @pl.when(whole)
            def _():
                send(out_pieces[0], out, row)

            @pl.when(jnp.logical_not(whole) & (low < high))
            def _():
                send(out_pieces[1], out, row, only=(low, high))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _send(acc, pieces, out, row, *, group, column, only=None):
    """acc (`only` some of its rows) into `out` from (row, column) on, by a warpgroup, through its two pieces."""
    _, slots, height, width = pieces.shape
    for n in range(acc.shape[1] // width):
        piece = pieces.at[group, n % slots]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        piece[...] = acc[:, n * width : (n + 1) * width].astype(piece.dtype)
        plgpu.commit_smem()
        columns = pl.ds(column + n * width, width)
        if only is None:
            plgpu.copy_smem_to_gmem(piece, out.at[pl.ds(row, height), columns])
            continue
        at, rows = only[0], only[1] - only[0]
        size = height // 2
        while size:
            some = lax.bitwise_and(rows, jnp.int32(size))
            source, target = piece.at[pl.ds(at, size)], out.at[pl.ds(row + at, size), columns]
            copy = functools.partial(plgpu.copy_smem_to_gmem, source, target, commit_group=False)
            pl.when(some > 0)(copy)
            at, size = at + some, size // 2
        plgpu.commit_smem_to_gmem_group()
