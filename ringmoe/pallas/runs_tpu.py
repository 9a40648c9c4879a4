"""Sums of rows on TPU whose rows lie in a few runs: `rows_tpu.sum_of_rows`, where a block of sums needs few of many rows.

An expert's rows stand in the order of their tokens, so those of a block of tokens are one run of each expert's. While one
block of sums is worked on, a DMA for each run brings what the next one needs, whole tiles, all columns if VMEM holds them: a
row is found once for many columns, and what no sum needs is not read. The tile in which one block's run ends and the next
one's begins comes with the former: three blocks' rows are in VMEM, the one being worked on, the one before it and the next.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe.pallas import rows_tpu
from ringmoe.pallas.rows_tpu import LANES, MIB, MIN_BYTES, SUBLANES, Chip, height, lacks

BLOCKS = (128, 256, 512, 1024)  # sums in one grid step
LONG = 16  # rows of a run of a block: of shorter ones too many tiles are read twice
REGIONS = 3


def check(x, index, runs: int, dtype, chip: Chip) -> None:
    """Raises NotImplementedError where this kernel can't run; arguments are arrays or their types."""
    rows_tpu.check_arrays(x, index, dtype)
    if not runs or not _sizes(x, index, runs, chip)[1]:
        raise lacks(
            f"{len(index)} sums of {index.shape[1]} rows in {runs} runs: too few sums, or too much to hold of each"
        )


def sum_of_rows(x, index, starts, weight, dtype, chip: Chip) -> jax.Array:
    """[n, D] in `dtype`, summed in float32 in the order of j; x [m, D], index [n, k], past the end for a row of zeros.

    starts [runs] ascend: from each on, up to the next, the rows that are asked for lie without gaps in the order of `index`.

    Cost: HBM is read once where rows are needed, and about one tile of 8 rows for each run and block; n * k * runs / 100
    vector operations to find where the rows come to lie.
    """
    check(x, index, starts.size, dtype, chip)
    (n, k), d, (block, columns) = index.shape, x.shape[1], _sizes(x, index, starts.size, chip)
    blocks, out = pl.cdiv(n, block), rows_tpu.out_type(x, n, dtype)
    parts = math.gcd(blocks, chip.cores)
    steps = blocks // parts
    by_block = lambda a, fill: jnp.pad(a, ((0, blocks * block - n), (0, 0)), constant_values=fill)
    index = by_block(jnp.where(index < x.shape[0], index, -1), -1).reshape(blocks, -1, LANES)
    place, fetch = _table(index, starts, steps)
    room = _room(block * k, starts.size)
    place = jnp.where(place < 0, REGIONS * room * SUBLANES, place)
    scalars = [rows_tpu.sublane(place, columns, x.dtype)]
    scalars += [] if weight is None else [by_block(weight.astype(jnp.float32), 0)]
    scalars = [a.reshape(blocks, 1, block * k) for a in scalars]
    real = lambda p, c, b: p * steps + lax.min(b, steps - 1)
    scalar_spec = pl.BlockSpec((None, 1, block * k), lambda p, c, b: (real(p, c, b), 0, 0), memory_space=pltpu.SMEM)
    fetch = fetch.reshape(parts, steps, 1, -1)
    fetch = jnp.pad(
        fetch, ((0, 0), (0, -steps % REGIONS), (0, 0), (0, 0))
    )  # a part's steps are a multiple of the regions
    around = fetch.shape[1]
    table = lambda ahead: pl.BlockSpec(
        (None, None, 1, fetch.shape[-1]), lambda p, c, b: (p, lax.rem(b + ahead, around), 0, 0), memory_space=pltpu.SMEM
    )
    y = pl.pallas_call(
        functools.partial(_kernel, k=k, steps=steps, weighted=weight is not None, dtypes=(x.dtype, dtype)),
        grid=(parts, d // columns, around),
        in_specs=[table(0), table(1)] + [scalar_spec] * len(scalars) + [pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec(
            (block // SUBLANES, out.shape[1] * columns // d, LANES), lambda p, c, b: (real(p, c, b), c, 0)
        ),
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((REGIONS * room + 1, columns // LANES * height(x.dtype), LANES), jnp.uint32),
            pltpu.SMEM((REGIONS,), jnp.int32),
            pltpu.SemaphoreType.DMA((REGIONS,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_bytes_for_rows_and_sums(chip) + MIB,
            disable_bounds_checks=True,
        ),
        cost_estimate=rows_tpu.cost(x, jax.ShapeDtypeStruct((n, k), jnp.int32), dtype, n * k),
        name="ringmoe_sum_of_runs",
    )(fetch, fetch, *scalars, rows_tpu.tiles(x))
    return rows_tpu.rows_of(y, n, d, dtype)


def _kernel(this, following, *refs, k, steps, weighted, dtypes):
    place, *weight = refs[: 1 + weighted]
    x, out, rows, tiles, fetched = refs[1 + weighted :]
    c, b = pl.program_id(1), pl.program_id(2)
    num_columns, around = pl.num_programs(1), pl.num_programs(2)
    sublanes, runs = rows.shape[1], this.shape[1] // 3

    def fetch(table, c, region):
        columns = pl.ds(pl.multiple_of(c * sublanes, sublanes), sublanes)

        def run(e, total):
            begin, to, count = (table[0, 3 * e + i] for i in range(3))

            @pl.when(count > 0)
            def some():
                come = rows_tpu.words(x).at[pl.ds(begin, count), columns]
                pltpu.make_async_copy(come, rows.at[pl.ds(to, count)], fetched.at[region]).start()

            return total + count

        tiles[region] = lax.fori_loop(0, runs, run, 0)

    # Invariant: at step b, region b % 3 holds, or is about to hold, what was fetched for it, and the one before what b - 1 had.
    @pl.when((c == 0) & (b == 0))
    def first():
        fetch(this, 0, 0)
        rows[pl.ds(rows.shape[0] - 1, 1)] = jnp.zeros((1, *rows.shape[1:]), rows.dtype)

    last = b == around - 1

    @pl.when((c < num_columns - 1) | ~last)
    def ahead():
        fetch(following, c + last.astype(jnp.int32), lax.rem(b + 1, REGIONS))

    region = lax.rem(b, REGIONS)

    @pl.when(tiles[region] > 0)
    def come():
        all_of_it = rows.at[pl.ds(0, tiles[region])]
        pltpu.make_async_copy(all_of_it, all_of_it, fetched.at[region]).wait()

    @pl.when(b < steps)
    def work():
        rows_tpu.add_up(rows, place, *weight, out=out, k=k, dtypes=dtypes)


def _table(index, starts, steps: int):
    """Where in VMEM the rows come to lie, and what brings them there.

    Args:
        index: [blocks, places / 128, 128] int32; -1 for none. starts: [runs].
        steps: blocks of a part, before the first of which nothing was fetched.

    Returns:
        place: like `index`, a row of VMEM; -1 for none.
        fetch: [blocks, runs, 3] int32: of each run its first tile in x, that in VMEM, and how many tiles.
    """
    (blocks, *width), runs = index.shape, starts.size
    padded = -(-runs // SUBLANES) * SUBLANES
    bounds = jnp.pad(starts, (0, padded + 1 - runs), constant_values=jnp.iinfo(jnp.int32).max)
    bounds = jnp.stack([bounds[:-1], bounds[1:]], axis=-1)
    typed = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, manual_axis_type=jax.typeof(index).mat)
    by_block = lambda *shape: pl.BlockSpec((None, *shape), lambda b: (b, *(0 for _ in shape)))
    place, fetch = pl.pallas_call(
        functools.partial(_table_kernel, room=_room(width[0] * LANES, runs), steps=steps),
        grid=(blocks,),
        in_specs=[by_block(*width), pl.BlockSpec((padded, 2), lambda b: (0, 0))],
        out_specs=[by_block(*width), by_block(padded, 3)],
        out_shape=[typed(*index.shape), typed(blocks, padded, 3)],
        scratch_shapes=[pltpu.VMEM((padded, LANES), jnp.int32)] * 3,
        name="ringmoe_runs",
    )(index, bounds)
    return place, fetch[:, :runs]


def _table_kernel(index, bounds, place, fetch, first, after, moved, *, room, steps):
    """Of a block; everything is [runs, 128], the same in all lanes, but for what is asked of 128 places."""
    b, shape = pl.program_id(0), first.shape
    begins, ends = (jnp.broadcast_to(bounds[:, i : i + 1], shape) for i in range(2))
    up = lambda row: row + (SUBLANES - 1) >> 3
    total = lambda a, axis: jnp.broadcast_to(jnp.sum(a, axis=axis, keepdims=True), shape)

    def by_run(i):
        row = jnp.broadcast_to(index[pl.ds(i, 1), :], shape)
        return row, (row >= begins) & (row < ends)

    @pl.when(b == 0)
    def start():
        first[...], after[...], moved[...] = begins, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)

    add = lambda i, count: count + by_run(i)[1].astype(jnp.int32)
    count = total(lax.fori_loop(0, index.shape[0], add, jnp.zeros(shape, jnp.int32)), 1)
    row, part_begins = first[...], lax.rem(b, steps) == 0
    came = ((row >> 3) >= after[...]) & ~part_begins  # the first tile, with the block before
    begin = jnp.where(came, up(row), row >> 3)
    tiles = jnp.where(count > 0, jnp.maximum(up(row + count) - begin, 0), 0)
    ends_at = _prefix_sums(tiles)
    to = room * lax.rem(lax.rem(b, steps), REGIONS) + ends_at - tiles

    @pl.loop(0, index.shape[0])
    def places(i):
        row, here = by_run(i)
        move = jnp.where(row < begin * SUBLANES, moved[...], to - begin)
        moves = jnp.sum(jnp.where(here, move, 0), axis=0, keepdims=True)
        row = row[:1]
        place[pl.ds(i, 1), :] = jnp.where(row >= 0, row + moves * SUBLANES, -1)

    for i, column in enumerate((begin, to, tiles)):
        fetch[:, i : i + 1] = column[:, :1]
    first[...], after[...], moved[...] = row + count, up(row), to - begin


def _prefix_sums(a):
    """Of each lane, down the rows, the row's own included."""
    number = lax.broadcasted_iota(jnp.int32, a.shape, 0)
    step = 1
    while step < len(a):
        a += jnp.where(number >= step, pltpu.roll(a, step, 0), 0)
        step *= 2
    return a


def _room(width: int, runs: int) -> int:
    """How many tiles a block of `width` places may need: a run of l rows touches (l + 14) / 8, and one row is in one."""
    return min(width, (width + 14 * min(runs, width)) // SUBLANES)


def _sizes(x, index, runs: int, chip: Chip) -> tuple[int, int]:
    """(block, columns): how many sums and how much of a row are worked on at a time; columns 0 if that is too little."""
    (n, k), itemsize, found = index.shape, x.dtype.itemsize, (0, 0)
    for block in BLOCKS:
        rows = SUBLANES * (REGIONS * _room(block * k, runs) + 1)
        columns = rows_tpu.widest(x, _bytes_for_rows_and_sums(chip) // (rows * itemsize + 2 * block * 4))
        if block <= n and columns * itemsize >= MIN_BYTES:
            found = block, columns
            if block * k >= LONG * runs:
                break
    return found


def _bytes_for_rows_and_sums(chip: Chip) -> int:
    return chip.vmem * 13 // 16
