"""How an attention kernel of Hopper GPUs is laid out: a block of threads has one warpgroup that brings blocks by TMA into rings
in shared memory, and two that multiply.

`Sums` are for what several blocks of threads add to. The sum's order is that of the blocks of threads, so bits repeat. One
waits for those before it alone, which the GPU starts before it: they end, whatever waits.
"""

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
PLACES = "query_places"  # where queries stand: read, where numbers that are reckoned would wait in registers
WGMMA = plgpu.Layout.WGMMA
BRINGING, MULTIPLYING = 40, 232  # registers of a thread
FEWEST, MOST = 32, 240  # where the latter need all there are


class Known(NamedTuple):
    """What a kernel is told beside its operands, arrays or refs: the vector of numbers, and by their names segments and
    positions [B, T], slopes [N] or [N, T], a bias, which the kernel of gradients of keys has [.., S, T], and PLACES [B, T]."""

    numbers: Any
    vectors: dict[str, Any]

    @property
    def is_read(self) -> bool:
        """Whether logits depend on more than places."""
        return bool(self.vectors.keys() - {PLACES})


def slot_of(step, ring):
    """The place of a step in a ring, whose first dim is the places that steps take in turn."""
    return lax.rem(jnp.int32(step), jnp.int32(ring.shape[0]))


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
        return slot_of(step, self.rings[0])

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
    """Float32 blocks on their way into an array that other blocks of threads add to as well, in slots that steps take in turn.

    total: [B n, T, H].
    ring: [slots, shares, ROWS, H / shares], of which warpgroups have a share each, or take turns.
    """

    total: Any
    ring: Any
    full: Any  # barriers, one a slot
    free: Any

    @property
    def slots(self) -> int:
        return self.ring.shape[0]

    def give(self, step, share, x) -> None:
        """A share of a step's, [ROWS, H / shares]."""
        slot = slot_of(step, self.ring)
        pl.when(step >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        self.ring.at[slot, share][...] = x
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])

    def finish(self, steps, group) -> None:
        """Waits until all that this warpgroup gave is added."""
        shares = self.ring.shape[1]

        @pl.loop(jnp.maximum(steps - self.slots, 0), steps)
        def _(step):
            slot = slot_of(step, self.ring)
            wait = lambda: plgpu.barrier_wait(self.free.at[slot])
            wait() if shares == GROUPS else pl.when(slot == group)(wait)

    def add(self, step, n, row, turn) -> None:
        """Adds a step's to ROWS of head n, once so many blocks of threads have."""
        slot = slot_of(step, self.ring)
        plgpu.barrier_wait(self.full.at[slot])
        add_in_turn(self.ring.at[slot], self.total, n, row, turn)
        plgpu.barrier_arrive(self.free.at[slot])


def add_in_turn(blocks, total, n, row, turn) -> None:
    """Adds blocks [shares, ROWS, H / shares] to rows of `total` [B n, T, H], once the rows' counter, which the launch begins
    at 0, is `turn`; and counts."""
    heads, length, _ = total.shape
    shares, rows, width = blocks.shape
    counts = pl.get_global(plgpu.SemaphoreType.REGULAR((heads * (length // rows),)))
    count = counts.at[n * (length // rows) + lax.div(row, jnp.int32(rows))]
    pl.semaphore_wait(count, turn, decrement=False)
    for share in range(shares):
        place = total.at[n, pl.ds(row, rows), pl.ds(share * width, width)]
        plgpu.copy_smem_to_gmem(blocks.at[share], place, reduction_op="add")
    plgpu.wait_smem_to_gmem(0)
    pl.semaphore_signal(count, 1)


def bring(streams: Sequence[Stream], steps, at: Callable, add: Callable | None = None) -> None:
    """Brings every stream's blocks, (head, rows) `at(step)`, and returns once all are done with, and `add(step)` was called
    of each: once what is multiplied two steps later is under way."""

    def blocks(step):
        for stream in streams:
            stream.bring(step, *at(step))

    def both(step, add: Callable):
        pl.when(step < steps)(lambda: blocks(step))
        pl.when(step >= 2)(lambda: add(step - 2))

    if add is None:
        pl.loop(0, steps)(blocks)
    else:
        pl.loop(0, steps + 2)(functools.partial(both, add=add))

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
    which is float32. A head's products sum over `width` numbers for each of its `pairs`. An array `into` [B, n, T, H] is seen
    after the others: the kernel adds to it, and it is the first result.
    """
    known, into, *arrays = compat.vary_alike((known, into, *arrays))
    names = tuple(known.vectors)

    def run(numbers, *refs):
        return body(Known(numbers, dict(zip(names, refs))), *refs[len(names) :])

    batch, like = arrays[0].shape[0], jax.typeof(arrays[0]).mat
    near = math.gcd(batch * heads, HEADS)
    kinds = [jax.ShapeDtypeStruct((batch * heads, *dims), jnp.float32, manual_axis_type=like) for dims in out]
    kernel = plgpu.kernel(
        run,
        out_type=kinds,
        scratch_types=scratch_types,
        grid=(batch * heads // near, rows, near),
        grid_names=("run", "rows", "head"),
        num_threads=warpgroups,
        thread_name="group",
        kernel_name=f"ringmoe_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    arrays, flat = [padded(x, ALIGNED) for x in arrays], lambda x: x.reshape(-1, *x.shape[2:])
    moved = sum(x.nbytes for x in arrays) + 4 * batch * heads * sum(map(math.prod, out))
    moved += 0 if into is None else 2 * into.nbytes
    with costing(2 * batch * heads * pairs * width, batch * heads * pairs, moved):
        kernel = functools.partial(kernel, known.numbers, *known.vectors.values(), *map(flat, arrays))
        found = kernel() if into is None else _adding(kernel, compat.unmarked(flat(into)), kinds)
    # A Mosaic GPU kernel forgets over which axes of a shard_map that checks its results vary, and a loop's carry may not.
    return compat.vary_alike(([x.reshape(batch, -1, *x.shape[1:]) for x in found], arrays[0]))[0]


def _adding(kernel, total, kinds):
    """What a kernel that adds to its last operand, in its place, makes of it, and what it returns, which is of these kinds."""

    def run(refs):
        for ref, x in zip(refs[1:], kernel(refs[0]), strict=True):
            ref[...] = x

    # No Ref of `jax.new_ref`: `custom_partitioning` lowers no program with its effect.
    return pl.run_state(run)((total, *(jnp.zeros(x.shape, x.dtype) for x in kinds)))


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
