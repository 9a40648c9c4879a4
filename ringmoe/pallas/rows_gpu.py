"""Rows sent to several places each on Hopper GPUs, the sum of `schedule/gather.py` that dispatch is, in Mosaic GPU:

    out[place[t, j]] = x[t];   rows that no place names are 0

XLA's gather goes through `out`, and reads a row of x for each of its k places. In the order of the experts these are about
2 |x| bytes of other rows apart, |x| read and |x| written: where the L2 cache doesn't hold as many, memory is read k times.
Here a block of threads takes tokens in turn. TMA brings a row into shared memory, and sends it from there to all its places:
x is read once and `out` written once, in pieces as long as a row, several of them on their ways, and no thread touches a
number. What isn't asked for is written as zeros in between, by the same block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe.pallas.hopper import MULTIPROCESSORS, costing

BLOCKS = 2 * MULTIPROCESSORS  # two on each at once
SHARED = 110 * 2**10  # bytes of shared memory that a block may have for rows
MOST_SLOTS = 8
L2 = 50 * 2**20  # bytes, of an H100 and an H200
MOST_PLACES = 16  # of a row, each of which is an instruction of its own
LONGEST = 256  # of a dim of what TMA moves at once
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check(x, place, n: int) -> None:
    """Raises NotImplementedError where this kernel can't run, or gains nothing; arguments are arrays or their types."""
    if x.dtype not in DTYPES or x.ndim != 2 or x.shape[1] * x.dtype.itemsize % 128:
        raise _lacks(f"{x.dtype}{list(x.shape)}, supported: 2-D, 2 or 4 bytes, rows of a multiple of 128 bytes")
    (m, d), k = x.shape, place.shape[1]
    if _slots(x) < 2 or d // _width(x) > LONGEST:
        raise _lacks(
            f"rows of {d}, supported: up to {SHARED // (3 * x.dtype.itemsize)}, products of two up to {LONGEST}"
        )
    if not 2 <= k <= MOST_PLACES or pl.cdiv(n, m) > 2 * k:
        raise _lacks(f"{k} places of each of {m} rows among {n}, supported: 2 to {MOST_PLACES}, half of {n} at least")
    if 2 * m * d * x.dtype.itemsize <= L2:
        raise _lacks(f"{m} rows of {d} stay in the L2 cache, where XLA's gather finds them again")


def spread(x: jax.Array, place: jax.Array, source: jax.Array) -> jax.Array:
    """out [n, D] of x [m, D]; place [m, k], a row of `out`, past the end for none; source [n], past m k where it is nobody's.

    Cost: x and both tables are read once, `out` is written once.
    """
    (m, d), (n,), width = x.shape, source.shape, _width(x)
    check(x, place, n)
    by_width = lambda rows: rows.reshape(-1, d // width, width)
    kernel = plgpu.kernel(
        functools.partial(_body, place.shape[1]),
        out_type=jax.ShapeDtypeStruct((n, d // width, width), x.dtype, manual_axis_type=jax.typeof(x).mat),
        scratch_types=[
            plgpu.SMEM((_slots(x), d // width, width), x.dtype),
            plgpu.SMEM((d // width, width), x.dtype),
            plgpu.Barrier(num_barriers=_slots(x)),
            plgpu.Barrier(),
        ],
        grid=(BLOCKS,),
        grid_names=("block",),
        kernel_name="ringmoe_spread_rows",
    )
    zeros = jnp.full_like(x, 0, shape=(d // width, width))
    with costing(0, 0, (m + n) * d * x.dtype.itemsize + place.nbytes + source.nbytes):
        return kernel(place.reshape(-1), source, zeros, by_width(x)).reshape(n, d)


def _body(k: int, place, source, zeros, x, out, rows, nothing, full, ready):
    (m, *_), (n, *_), (slots, *_) = x.shape, out.shape, rows.shape
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    steps = lax.div(m - block + blocks - 1, jnp.int32(blocks))
    share = pl.cdiv(n, m)  # rows of `out` that are looked at with each of x, whether they are somebody's
    token = lambda i: block + i * blocks

    def bring(i):
        slot = lax.rem(i, jnp.int32(slots))
        plgpu.copy_gmem_to_smem(x.at[token(i)], rows.at[slot], full.at[slot])

    def numbers(i):
        """Of a step: the places of its row, and the sources of its share of `out`."""
        at = jnp.minimum(token(i), m - 1)
        places = [place[at * k + j] for j in range(k)]
        return (*places, *(source[jnp.minimum(at * share + j, n - 1)] for j in range(share)))

    plgpu.copy_gmem_to_smem(zeros, nothing, ready)
    pl.loop(0, jnp.minimum(steps, slots - 1))(bring)
    plgpu.barrier_wait(ready)

    # Invariant: the rows up to step i + slots - 2 are there or on their way; of those before i - 1 all copies were sent.
    def step(i, known):
        ahead = numbers(i + 1)  # a step before they are needed
        slot = lax.rem(i, jnp.int32(slots))
        plgpu.barrier_wait(full.at[slot])
        send = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)
        for there in known[:k]:
            pl.when(there < n)(functools.partial(send, rows.at[slot], out.at[there]))
        for j, origin in enumerate(known[k:]):
            row = token(i) * share + j
            pl.when((row < n) & (origin >= m * k))(functools.partial(send, nothing, out.at[row]))
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        pl.when(i + slots - 1 < steps)(lambda: bring(i + slots - 1))
        return ahead

    lax.fori_loop(0, steps, step, numbers(0))
    plgpu.wait_smem_to_gmem(0)


def _width(x) -> int:
    """Of the pieces that a row is seen as: TMA takes up to LONGEST of up to LONGEST numbers, of a multiple of 16 bytes."""
    unit = 16 // x.dtype.itemsize
    return unit * max(n for n in range(1, LONGEST // unit + 1) if x.shape[1] // unit % n == 0)


def _slots(x) -> int:
    """Rows that a block of threads has on their way, beside the one of zeros."""
    return min(MOST_SLOTS, SHARED // (x.shape[1] * x.dtype.itemsize) - 1)


def _lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"Hopper row kernel: {what}")
