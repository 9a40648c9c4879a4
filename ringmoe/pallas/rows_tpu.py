"""Sums of rows at given places on TPU: `out[n] = sum over j of weight[n, j] * x[index[n, j]]`, the sum of `schedule/gather.py`.

The rows of some columns of `x` lie whole in VMEM, where a row of packed bfloat16 can be read from the middle of a tile; a DMA
out of HBM moves 32-bit words, which hold two rows of it, and would read each row twice. So HBM is read once, in long runs,
whatever the order of the rows and however often they repeat: k times fewer bytes than a dispatch of k choices writes. While
one block of columns is worked on, a DMA brings the next. `runs_tpu.py` sums the rows of longer sums, of which fewer are needed
at a time.

Arrays are seen as HBM has them, tile after tile: [m, D] is [m / 8, D / 128 * 8, 128], which moves nothing. So the words of a
row are 128 lanes each some sublanes, a tile, apart, wherever the row is, and a place is one number, the sublane of the first:
nothing is left to compute of it. A word's two halves are float32's upper bits. A row of 2048 columns costs four bundles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
BLOCK = 256  # rows of `out` in one grid step
MAX_COLUMNS = 2048  # of one block; before the first has come there is nothing to do
MIN_BYTES = 2048  # of a row's piece, the columns of one block: a vector register of bfloat16, or half of one of float32
MAX_CHOICES = 2  # of more, XLA's gathers are the faster ones: their sums are fused into one pass
DTYPES = (jnp.bfloat16, jnp.float32)
MIB = 2**20


class Chip(NamedTuple):
    """What a kernel may use of a device."""

    vmem: int  # bytes, of one core
    cores: int


# By `device_kind`: those whose schedules `bench/static_rows.py` compared with XLA's. Older ones have 16 MiB.
CHIPS = {
    "TPU v5 lite": Chip(128 * MIB, 1),
    "TPU v5e": Chip(128 * MIB, 1),
    "TPU v5": Chip(64 * MIB, 2),
    "TPU v5p": Chip(64 * MIB, 2),
    "TPU v6 lite": Chip(128 * MIB, 1),
    "TPU v6e": Chip(128 * MIB, 1),
    "TPU7x": Chip(64 * MIB, 1),
}
HALF, UPPER, NAN = (np.uint32(bits) for bits in (16, 0xFFFF0000, 0x7FC00000))


def check(x, index, dtype, chip: Chip) -> None:
    """Raises NotImplementedError where this kernel can't run, or is the slower one; arguments are arrays or their types."""
    check_arrays(x, index, dtype)
    m, (n, k) = x.shape[0], index.shape
    if n < BLOCK or k > MAX_CHOICES or m > 2 * n * k:
        raise lacks(
            f"{n} sums of {k} of {m} rows, supported: {BLOCK} or more, up to {MAX_CHOICES}, not far fewer than rows"
        )
    _, columns = _split(x, chip)
    if columns * x.dtype.itemsize < MIN_BYTES:
        raise lacks(f"{columns} columns of {m} rows fit VMEM at a time, supported: {MIN_BYTES} bytes of a row or more")


def check_arrays(x, index, dtype) -> None:
    """What is asked of a call whichever way its rows come."""
    if x.dtype not in DTYPES or dtype not in DTYPES or x.ndim != 2 or index.ndim != 2:
        raise lacks(f"{x.dtype}{list(x.shape)} at {list(index.shape)} to {dtype}, supported: 2-D bfloat16 or float32")
    (m, d), n = x.shape, len(index)
    if m % SUBLANES or n % SUBLANES or d % narrowest(x):
        raise lacks(f"{n} sums of {m} rows of {d}, supported: multiples of {SUBLANES} and of {narrowest(x)}")


def sum_of_rows(x: jax.Array, index: jax.Array, weight: jax.Array | None, dtype, chip: Chip) -> jax.Array:
    """[n, D] in `dtype`, summed in float32 in the order of j; x [m, D], index [n, k], past the end for a row of zeros.

    Cost: x is read and the result written once; n * k * D / columns rows are moved inside VMEM.
    """
    check(x, index, dtype, chip)
    (m, d), (n, k), (parts, columns) = x.shape, index.shape, _split(x, chip)
    steps, num_blocks, out = pl.cdiv(n, BLOCK), d // parts // columns, out_type(x, n, dtype)

    def blocks(a, fill):
        return jnp.pad(a, ((0, steps * BLOCK - n), (0, 0)), constant_values=fill).reshape(steps, 1, BLOCK * k)

    scalars = [blocks(sublane(jnp.minimum(index, m), columns, x.dtype), int(sublane(m, columns, x.dtype)))]
    scalars += [] if weight is None else [blocks(weight.astype(jnp.float32), 0)]
    scalar_spec = pl.BlockSpec((None, 1, BLOCK * k), lambda p, c, b: (b, 0, 0), memory_space=pltpu.SMEM)
    out_block = (BLOCK // SUBLANES, out.shape[1] * columns // d, LANES)
    y = pl.pallas_call(
        functools.partial(_kernel, k=k, num_blocks=num_blocks, weighted=weight is not None, dtypes=(x.dtype, dtype)),
        grid=(parts, num_blocks, steps),
        in_specs=[scalar_spec] * len(scalars) + [pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec(out_block, lambda p, c, b: (b, p * num_blocks + c, 0)),
        out_shape=out,
        scratch_shapes=[
            pltpu.VMEM((2, m // SUBLANES + 1, columns // LANES * height(x.dtype), LANES), jnp.uint32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_resident_bytes(chip) + 2 * BLOCK * columns * 4 + MIB,
        ),
        cost_estimate=cost(x, index, dtype, m),
        name="ringmoe_sum_of_rows",
    )(*scalars, tiles(x))
    return rows_of(y, n, d, dtype)


def _kernel(*refs, k, num_blocks, weighted, dtypes):
    place, *weight = refs[: 1 + weighted]
    x, out, rows, fetched = refs[1 + weighted :]
    part, c, b = (pl.program_id(dim) for dim in range(3))
    _, m, sublanes = (n - (dim == 1) for dim, n in enumerate(rows.shape[:3]))

    def fetch(c):
        at = lax.rem(c, 2)
        start = pl.multiple_of((part * num_blocks + c) * sublanes, sublanes)
        return pltpu.make_async_copy(words(x).at[:, pl.ds(start, sublanes)], rows.at[at, pl.ds(0, m)], fetched.at[at])

    # Invariant: from step (c, 0) on, rows[c % 2] holds block c of the columns, and a tile of zeros after it.
    @pl.when((c == 0) & (b == 0))
    def first():
        fetch(c).start()
        rows[:, pl.ds(m, 1)] = jnp.zeros((2, 1, *rows.shape[2:]), rows.dtype)

    @pl.when(b == 0)
    def next_columns():
        @pl.when(c + 1 < num_blocks)
        def ahead():
            fetch(c + 1).start()

        fetch(c).wait()

    add_up(rows.at[lax.rem(c, 2)], place, *weight, out=out, k=k, dtypes=dtypes)


def add_up(rows, place, weight=None, *, out, k, dtypes):
    """A block of sums.

    Args:
        rows: words [.., columns / 128 * height, 128] in VMEM, tile after tile; `out`: tiles of sums.
        place, weight: [1, sums * k] in SMEM: what `sublane` says of each row, and what the row is multiplied by.
        dtypes: of the rows, and of the sums.
    """
    step, columns = height(dtypes[0]), rows.shape[1] // height(dtypes[0])
    out = words(out)
    in_order, packing = k == 1 and weight is None, SUBLANES // height(dtypes[1])

    def row(i):
        """The bits of a row as float32: [columns / 128, 128]."""
        at = place[0, i]
        word = load(rows, lax.shift_right_logical(at, 5), columns, step)
        return word if dtypes[0] == jnp.float32 else (word << (at & 16).astype(jnp.uint32)) & UPPER

    def total(n):
        """The bits of the n-th sum as float32, rounded to the dtype of `out`: of bfloat16 the upper half counts."""
        if in_order:
            return row(n)
        terms = (lax.bitcast_convert_type(row(n * k + j), jnp.float32) for j in range(k))
        if weight is not None:
            terms = (term * weight[0, n * k + j] for j, term in enumerate(terms))
        y = functools.reduce(jnp.add, terms)
        bits = lax.bitcast_convert_type(y, jnp.uint32)
        return bits if packing == 1 else jnp.where(y != y, NAN, _to_nearest_even(bits))

    @pl.loop(0, out.shape[0])
    def tile(i):
        for word in range(SUBLANES // packing):
            n = i * SUBLANES + word * packing
            bits = total(n) if packing == 1 else total(n) >> HALF | total(n + 1) & UPPER
            out[i, pl.ds(word, columns, stride=SUBLANES // packing), :] = bits


def load(rows, at, columns: int, step: int):
    """A row of words from sublane `at` on, counted through all tiles."""
    return rows.reshape(-1, LANES)[pl.ds(at, columns, stride=step), :]


def words(ref):
    """Tiles as 32-bit words: one of float32, or rows 2 i and 2 i + 1 of bfloat16, the former in the lower half."""
    return ref if ref.dtype == jnp.uint32 else ref.bitcast(jnp.uint32)


def height(dtype) -> int:
    """How many rows of words a tile has."""
    return SUBLANES * jnp.dtype(dtype).itemsize // 4


def sublane(row, columns: int, dtype):
    """Where in VMEM a row of tiles of `columns` begins: 32 * sublane + how far to shift the words left."""
    packing = SUBLANES // height(dtype)
    at = row // SUBLANES * (columns // LANES * height(dtype)) + row % SUBLANES // packing
    return at * 32 + (packing - 1 - row % packing) * 16


def tiles(x):
    """[m, D] as it lies in HBM: [m / 8, D / 128 * 8, 128]."""
    m, d = x.shape
    by_tile = x.reshape(m // SUBLANES, SUBLANES, d // LANES, LANES).swapaxes(1, 2)
    return by_tile.reshape(m // SUBLANES, d // LANES * SUBLANES, LANES)


def rows_of(y, n: int, d: int, dtype):
    """The inverse of `tiles`: [n, D] of `dtype`."""
    return y.astype(dtype).reshape(-1, d // LANES, SUBLANES, LANES).swapaxes(1, 2).reshape(n, d)


def out_type(x, n: int, dtype):
    shape = (n // SUBLANES, x.shape[1] // LANES * SUBLANES, LANES)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)


def cost(x, index, dtype, rows_read: int) -> pl.CostEstimate:
    (n, k), d = index.shape, x.shape[1]
    moved = (rows_read * x.dtype.itemsize + n * jnp.dtype(dtype).itemsize) * d
    return pl.CostEstimate(flops=2 * n * k * d, transcendentals=0, bytes_accessed=moved)


def narrowest(x) -> int:
    """Columns of the narrowest block: whole tiles in VMEM, which are twice as high as HBM's where two rows are a word."""
    return LANES * 4 // x.dtype.itemsize


def _split(x, chip: Chip) -> tuple[int, int]:
    """(parts, columns): the columns of `x` in parts, one for each core; and those of one block."""
    (m, d), itemsize = x.shape, x.dtype.itemsize
    parts = chip.cores if d % (chip.cores * narrowest(x)) == 0 and d * itemsize >= chip.cores * MIN_BYTES else 1
    fitting = min(MAX_COLUMNS, _resident_bytes(chip) // (2 * (m + SUBLANES) * itemsize))
    return parts, widest(x, fitting, parts)


def _resident_bytes(chip: Chip) -> int:
    """VMEM for two blocks of columns: the rest is for those of `out`, and XLA's."""
    return chip.vmem * 11 // 16


def widest(x, fitting: int, parts: int = 1) -> int:
    """The most columns, up to `fitting`, of which several blocks make up a part; 0 if none."""
    return max((c for c in range(narrowest(x), fitting + 1, narrowest(x)) if x.shape[1] // parts % c == 0), default=0)


def _to_nearest_even(bits):
    """Bits of finite float32 whose upper half is the nearest bfloat16; so are infinite ones."""
    return bits + (np.uint32(0x7FFF) + (bits >> HALF & np.uint32(1)))


def lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU row kernel: {what}")
