"""How an attention kernel of Hopper GPUs is laid out: a block of threads has one warpgroup that brings blocks by TMA into rings
in shared memory, and two that multiply."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import compat
from ringmoe.pallas.hopper import costing, swizzled

GROUPS = 2  # warpgroups that multiply
ROWS = 64  # of the result, a warpgroup's in one product
TALL = GROUPS * ROWS  # of a block of threads
HEADS = 16  # whose blocks run at about the same time, so that the L2 cache still has what they share
SHARED = 226 * 2**10  # bytes of shared memory for blocks, of 227 KiB
MOST_STAGES = 4
ALIGNED = 8  # an array's rows, which TMA brings in tiles
WGMMA = plgpu.Layout.WGMMA
BRINGING, MULTIPLYING = 40, 232  # registers of a thread


class Known(NamedTuple):
    """What a kernel is told beside its operands, arrays or refs: the vector of numbers, and by their names segments and
    positions [B, T], slopes [N] or [N, T], and a bias, which the kernel of gradients of keys has [.., S, T]."""

    numbers: Any
    vectors: dict[str, Any]


class Stream(NamedTuple):
    """Blocks on their way: of each step one of every array, each in its own ring, of which the steps take slots in turn."""

    arrays: Sequence[Any]
    rings: Sequence[Any]
    full: Any  # barriers, one a slot
    free: Any  # None, where the warpgroup that multiplies them brings them too

    @property
    def stages(self) -> int:
        return self.rings[0].shape[0]

    def slot(self, step):
        return lax.rem(jnp.int32(step), jnp.int32(self.stages))

    def at(self, step):
        """The blocks of a step, once they are there."""
        slot = self.slot(step)
        return [ring.at[slot] for ring in self.rings]

    def wait(self, step) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def done(self, step) -> None:
        """Says that this warpgroup needs the blocks no more."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def bring(self, step, n, rows) -> None:
        pl.when(step >= self.stages)(lambda: self.wait_until_free(step))
        self.fetch(step, n, rows)

    def fetch(self, step, n, rows) -> None:
        """These rows of a head, into a slot that is known to be free."""
        for array, ring in zip(self.arrays, self.rings):
            fetch(array, n, rows, ring.at[self.slot(step)], self.full.at[self.slot(step)])

    def wait_until_free(self, step) -> None:
        plgpu.barrier_wait(self.free.at[self.slot(step)])


def fetch(array, n, rows, block, full) -> None:
    """Has rows of head n, of all sequences', brought into `block`: of an array [B, T, heads width], or numbers [B heads, T]."""
    at, width = (n, rows), block.shape[-1]
    if array.shape[2:] not in ((), (width,)):
        heads = jnp.int32(array.shape[2] // width)
        at = lax.div(n, heads), rows, pl.ds(pl.multiple_of(lax.rem(n, heads) * width, width), width)
    plgpu.copy_gmem_to_smem(array.at[at], block, full)


class Sums(NamedTuple):
    """Blocks on their way into an array that several blocks of threads add to, one after another."""

    total: Any  # [B n, T, H]
    ring: Any  # [slots, GROUPS, ROWS, H / GROUPS]
    full: Any
    free: Any

    def slot(self, step):
        return lax.rem(jnp.int32(step), jnp.int32(self.ring.shape[0]))

    def give(self, step, group, x) -> None:
        pl.when(step >= self.ring.shape[0])(lambda: plgpu.barrier_wait(self.free.at[self.slot(step)]))
        self.ring.at[self.slot(step), group][...] = x
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[self.slot(step)])

    def add(self, step, n, row, turn) -> None:
        heads, length, _ = self.total.shape
        of_block = pl.get_global(plgpu.SemaphoreType.REGULAR((heads * (length // ROWS),))).at[
            n * (length // ROWS) + lax.div(row, jnp.int32(ROWS))
        ]
        plgpu.barrier_wait(self.full.at[self.slot(step)])
        pl.semaphore_wait(of_block, turn, decrement=False)
        width = self.ring.shape[3]
        for group in range(GROUPS):
            plgpu.copy_smem_to_gmem(
                self.ring.at[self.slot(step), group],
                self.total.at[n, pl.ds(row, ROWS), pl.ds(group * width, width)],
                reduction_op="add",
            )
        plgpu.wait_smem_to_gmem(0)
        pl.semaphore_signal(of_block, 1)
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def bring(streams: Sequence[Stream], steps, at: Callable, *later: tuple[int, Callable]) -> None:
    """Brings every stream's blocks, (head, rows) `at(step)`, and returns once all are done with.

    later: what is to be done of a step so many steps after it."""

    @pl.loop(0, steps + max((lag for lag, _ in later), default=0))
    def _(step):
        def blocks():
            for stream in streams:
                stream.bring(step, *at(step))

        if later:
            pl.when(step < steps)(blocks)
        else:
            blocks()
        for lag, work in later:
            pl.when(step >= lag)(functools.partial(work, step - lag))

    for stream in streams:
        pl.loop(jnp.maximum(steps - stream.stages, 0), steps)(stream.wait_until_free)


def by_token(x):
    """[B, N, T, H] as [B, 1, T, N H], for TMA to bring a head's rows out of: as public arrays lie in memory. To have a head's
    tokens next to each other XLA would copy them."""
    return x.swapaxes(1, 2).reshape(x.shape[0], 1, x.shape[2], -1)


def sharing(q, k) -> int:
    """Query heads of a key head, of arrays by token or head by head, as kernels see them."""
    return q.shape[0] * q.shape[2] // (k.shape[0] * k.shape[2])


def launch(
    body,
    name: str,
    heads: int,
    rows: int,
    out,
    scratch_types,
    known: Known,
    *arrays,
    pairs: int,
    width: int,
    warpgroups=GROUPS + 1,
    into=None,
):
    """Runs a kernel with a block of `warpgroups` for each of so many heads of a sequence, and each block of rows.

    Kernels see what is known, and arrays [B, n, T, ...] as [B n, T, ...]; `out` are the dims of each result, [B, heads, *dims],
    which is float32. A head's products sum over `width` numbers for each of its `pairs`.
    """
    known, *arrays = compat.vary_alike((known, *arrays))
    names = tuple(known.vectors)

    def run(numbers, *refs):
        return body(Known(numbers, dict(zip(names, refs))), *refs[len(names) :])

    batch, like = arrays[0].shape[0], jax.typeof(arrays[0]).mat
    near = math.gcd(batch * heads, HEADS)
    kernel = plgpu.kernel(
        run,
        out_type=[jax.ShapeDtypeStruct((batch * heads, *dims), jnp.float32, manual_axis_type=like) for dims in out],
        scratch_types=scratch_types,
        grid=(batch * heads // near, rows, near),
        grid_names=("run", "rows", "head"),
        num_threads=warpgroups,
        thread_name="group",
        kernel_name=f"ringmoe_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    arrays = [padded(x, ALIGNED) for x in arrays]
    moved = sum(x.nbytes for x in arrays) + 4 * batch * heads * sum(map(math.prod, out))
    with costing(2 * batch * heads * pairs * width, batch * heads * pairs, moved):
        flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
        if into is not None:
            total = jax.new_ref(into.reshape(-1, *into.shape[2:]))
            found = kernel(known.numbers, *known.vectors.values(), *flat, total)
            found = [jax.freeze(total), *found]
            return compat.vary_alike(([x.reshape(batch, -1, *x.shape[1:]) for x in found], arrays[0]))[0]
        found = kernel(known.numbers, *known.vectors.values(), *flat)
    # A Mosaic GPU kernel forgets over which axes of a shard_map that checks its results vary, and a loop's carry may not.
    return compat.vary_alike(([x.reshape(batch, heads, *x.shape[1:]) for x in found], arrays[0]))[0]


def anew(group):
    """A warpgroup's number, of which a step reckons its addresses: else those of all its products would wait in registers, for
    which there is no room."""
    return lax.optimization_barrier(group)


def padded(x, unit: int, value: float = 0):
    """[B, N, T, ...] with values up to a multiple of so many T: a copy, where it isn't one."""
    more = -x.shape[2] % unit
    pads = [(0, more if dim == 2 else 0) for dim in range(x.ndim)]
    return jnp.pad(x, pads, constant_values=value) if more else x


def head():
    """The one that a block of threads works on, of all sequences'."""
    return lax.axis_index("run") * lax.axis_size("head") + lax.axis_index("head")


def shared(dtype):
    """What makes a buffer of tiles in shared memory, of a shape."""
    return lambda *shape: plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


def barriers(number: int, arrivals: int = 1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
