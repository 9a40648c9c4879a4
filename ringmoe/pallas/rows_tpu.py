"""Sums of rows at given places on TPU: `out[n] = sum over j of weight[n, j] * x[index[n, j]]`, the sum of `schedule/gather.py`.

The rows of some columns of `x` lie whole in VMEM, where a row of packed bfloat16 can be read from the middle of a tile; a DMA
out of HBM moves 32-bit words, which hold two rows of it, and would read each row twice. So HBM is read once, in long runs,
whatever the order of the rows and however often they repeat: k times fewer bytes than a dispatch of k choices writes. While
one block of columns is worked on, a DMA brings the next. Rows are handled as words, and a word's two halves are float32's
upper bits: nothing changes its layout between a strided load and a strided store. A row costs six or seven bundles, most of
them address arithmetic on scalars, so columns must be many: `check` refuses what XLA's own gather does faster.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
BLOCK = 256  # rows of `out` in one grid step
RESIDENT_BYTES = 44 * 2**20  # VMEM for two blocks of columns; v5p and tpu7x have 64 MiB in all
MAX_COLUMNS = 4096  # of one block; more would leave no VMEM for those of `out`
MIN_BYTES = 2048  # of a row's piece, the columns of one block: a vector register of bfloat16, or half of one of float32
MAX_CHOICES = 2  # of more, XLA's gathers are the faster ones on most chips: their sums are fused into one pass
DTYPES = (jnp.bfloat16, jnp.float32)
HALF, UPPER, NAN = (np.uint32(bits) for bits in (16, 0xFFFF0000, 0x7FC00000))


def check(x, index, dtype) -> None:
    """Raises NotImplementedError where this kernel can't run, or is the slower one; arguments are arrays or their types."""
    if x.dtype not in DTYPES or dtype not in DTYPES or x.ndim != 2 or index.ndim != 2:
        raise _lacks(f"{x.dtype}{list(x.shape)} at {list(index.shape)} to {dtype}, supported: 2-D bfloat16 or float32")
    (m, d), (n, k) = x.shape, index.shape
    if m % SUBLANES or d % LANES:
        raise _lacks(f"{m} rows of {d}, supported: multiples of {SUBLANES} and of {LANES}")
    if n < BLOCK or k > MAX_CHOICES or m > 2 * n * k:
        raise _lacks(
            f"{n} sums of {k} of {m} rows, supported: {BLOCK} or more, up to {MAX_CHOICES}, not far fewer than rows"
        )
    _, columns = _split(x)
    if columns * x.dtype.itemsize < MIN_BYTES:
        raise _lacks(f"{columns} columns of {m} rows fit VMEM at a time, supported: {MIN_BYTES} bytes of a row or more")


def sum_of_rows(x: jax.Array, index: jax.Array, weight: jax.Array | None, dtype) -> jax.Array:
    """[n, D] in `dtype`, summed in float32 in the order of j; x [m, D], index [n, k], past the end for a row of zeros.

    Cost: x is read and the result written once; n * k * D / columns rows are moved inside VMEM.
    """
    check(x, index, dtype)
    (m, d), (n, k), (parts, columns) = x.shape, index.shape, _split(x)
    steps, packing = pl.cdiv(n, BLOCK), 4 // x.dtype.itemsize
    num_blocks = d // parts // columns

    def blocks(a, fill):
        return jnp.pad(a, ((0, steps * BLOCK - n), (0, 0)), constant_values=fill).reshape(steps, 1, BLOCK * k)

    # Of each row: which row of words, and by how much to shift the words left; rows past the end are the first of zeros.
    row = blocks(jnp.minimum(index, m), m)
    place = row // packing * 32 + (packing - 1 - row % packing) * 16
    scalars = [place] if weight is None else [place, blocks(weight.astype(jnp.float32), 0)]
    scalar_spec = pl.BlockSpec((None, 1, BLOCK * k), lambda p, c, b: (b, 0, 0), memory_space=pltpu.SMEM)
    return pl.pallas_call(
        functools.partial(_kernel, k=k, num_blocks=num_blocks, weighted=weight is not None),
        grid=(parts, num_blocks, steps),
        in_specs=[scalar_spec] * len(scalars) + [pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec((BLOCK, columns), lambda p, c, b: (b, p * num_blocks + c)),
        out_shape=jax.ShapeDtypeStruct((n, d), dtype, manual_axis_type=jax.typeof(x).mat),
        scratch_shapes=[pltpu.VMEM((2, m + SUBLANES, columns), x.dtype), pltpu.SemaphoreType.DMA((2,))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=RESIDENT_BYTES + 2 * BLOCK * columns * 4 + 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * k * d,
            transcendentals=0,
            bytes_accessed=x.size * x.dtype.itemsize + n * d * jnp.dtype(dtype).itemsize,
        ),
        name="ringmoe_sum_of_rows",
    )(*scalars, x)


def _kernel(*refs, k, num_blocks, weighted):
    place, *weight = refs[: 1 + weighted]
    x, out, rows, fetched = refs[1 + weighted :]
    (m, _), (_, columns) = x.shape, out.shape
    part, c, b = (pl.program_id(dim) for dim in range(3))

    def fetch(c):
        at = lax.rem(c, 2)
        start = pl.multiple_of((part * num_blocks + c) * columns, LANES)
        return pltpu.make_async_copy(x.at[:, pl.ds(start, columns)], rows.at[at, pl.ds(0, m)], fetched.at[at])

    # Invariant: from step (c, 0) on, rows[c % 2] holds block c of the columns, and rows of zeros after it.
    @pl.when((c == 0) & (b == 0))
    def first():
        fetch(c).start()
        rows[:, pl.ds(m, SUBLANES)] = jnp.zeros((2, SUBLANES, columns), rows.dtype)

    @pl.when(b == 0)
    def next_columns():
        @pl.when(c + 1 < num_blocks)
        def ahead():
            fetch(c + 1).start()

        fetch(c).wait()

    words, out_words = _words(rows.at[lax.rem(c, 2)]), _words(out)
    exact = k == 1 and not weighted

    def row(i):
        """The bits of a row as float32; over eight sublanes, which is how a strided load brings them."""
        at = place[0, i]
        word = words[pl.ds(lax.shift_right_logical(at, 5), 1), :].reshape(-1, LANES)
        return word if rows.dtype == jnp.float32 else (word << (at & 16).astype(jnp.uint32)) & UPPER

    def total(n):
        """The bits of the n-th sum as float32, rounded to the dtype of `out`."""
        if exact:
            return row(n)
        terms = (lax.bitcast_convert_type(row(n * k + j), jnp.float32) for j in range(k))
        if weighted:
            terms = (term * weight[0][0, n * k + j] for j, term in enumerate(terms))
        y = functools.reduce(jnp.add, terms)
        bits = lax.bitcast_convert_type(y, jnp.uint32)
        return bits if out.dtype == jnp.float32 else jnp.where(y != y, NAN, _to_nearest_even(bits) & UPPER)

    packing = 4 // out.dtype.itemsize

    @pl.loop(0, BLOCK // SUBLANES)
    def tile(i):
        for word in range(SUBLANES // packing):
            n = i * SUBLANES + word * packing
            bits = total(n) if packing == 1 else total(n) >> HALF | total(n + 1)
            out_words[pl.ds(i * (SUBLANES // packing) + word, 1), :] = bits.reshape(1, columns)


def _split(x) -> tuple[int, int]:
    """(parts, columns): the columns of `x` in two parts, one for each core where a device has two; and those of one block."""
    (m, d), itemsize = x.shape, x.dtype.itemsize
    parts = 2 if d % (2 * LANES) == 0 and d * itemsize >= 2 * MIN_BYTES else 1
    fitting = min(MAX_COLUMNS, RESIDENT_BYTES // (2 * (m + SUBLANES) * itemsize))
    return parts, max((c for c in range(LANES, fitting + 1, LANES) if d // parts % c == 0), default=0)


def _words(ref):
    """A matrix in VMEM as 32-bit words: one of float32, or rows 2 i and 2 i + 1 of bfloat16, the former in the lower half."""
    return ref.bitcast(jnp.uint32)


def _to_nearest_even(bits):
    """Bits of finite float32 whose upper half is the nearest bfloat16; so are infinite ones."""
    return bits + (np.uint32(0x7FFF) + (bits >> HALF & np.uint32(1)))


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"TPU row kernel: {what}")
