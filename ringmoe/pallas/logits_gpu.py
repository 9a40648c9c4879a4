"""What the attention kernels of Hopper GPUs share: which pairs of blocks meet, what is masked of one, and how a kernel is laid
out: one warpgroup that brings blocks by TMA into rings in shared memory, and two that multiply.

`Blocks` lays a call out; the numbers that only the run knows, where pieces start and how long sequences are, are one int32
vector.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe import compat, softmax
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import FAR, Band, Places, is_open
from ringmoe.pallas.hopper import swizzled

LOG2E = math.log2(math.e)
GROUPS = 2  # warpgroups that multiply
LENGTHS = ("query_lengths", "key_lengths")
ROWS = 64  # of the result, a warpgroup's in one product
TALL = GROUPS * ROWS  # of a block of threads
HEADS = 16  # whose blocks run at about the same time, so that the L2 cache still has what they share
SHARED = 226 * 2**10  # bytes of shared memory for blocks, of 227 KiB
MOST_STAGES = 4
ALIGNED = 8  # an array's rows, which TMA brings in tiles
WGMMA = plgpu.Layout.WGMMA
BRINGING, MULTIPLYING = 40, 232  # registers of a thread


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of so many queries and keys, of which the last ones may end after the array does; `heads` of a sequence, `lengths`
    those of `Extras` that are given. In methods `numbers` is the ref, and `n` a head, of all sequences'."""

    spec: AttentionSpec
    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    heads: int
    lengths: tuple[str, ...]

    @property
    def num_q(self) -> int:
        return -(-self.num_queries // self.block_q)

    @property
    def num_k(self) -> int:
        return -(-self.num_keys // self.block_k)

    def numbers(self, extras: Extras, at: Offsets) -> jax.Array:
        """The vector: where pieces start, and the sequences' lengths."""
        starts = [jnp.asarray(x, jnp.int32) for side in at for x in side]
        return jnp.concatenate([jnp.stack(starts), *(getattr(extras, name) for name in self.lengths)])

    def _here(self, numbers, n) -> tuple[Band, Places, Places]:
        """What is seen in a head's sequence, whose ends only the run knows; and where queries and keys stand."""
        band, starts = self.spec.band, [numbers[i] for i in range(2 * self.spec.pieces)]
        at = Offsets(tuple(starts[: self.spec.pieces]), tuple(starts[self.spec.pieces :]))
        queries, keys = at.places(self.num_queries, self.num_keys)
        ends: dict[str, list] = {"query": [band.queries], "key": [band.keys]}
        if self.num_keys % self.block_k:  # of one piece then
            ends["key"].append(keys.starts[0] + self.num_keys)
        for i, name in enumerate(self.lengths):
            sequence, sequences = (
                lax.div(n, jnp.int32(self.heads)),
                (numbers.shape[0] - len(starts)) // len(self.lengths),
            )
            ends[name.removesuffix("_lengths")].append(numbers[len(starts) + i * sequences + sequence])
        given = ([x for x in found if x is not None] for found in ends.values())
        last_query, last_key = (functools.reduce(jnp.minimum, found) if found else None for found in given)
        return dataclasses.replace(band, queries=last_query, keys=last_key), queries, keys

    def keys_met(self, numbers, n, i):
        """The first block of keys that query block i meets, and how many more there are."""
        band, queries, keys = self._here(numbers, n)
        return self._met(band.keys_met, queries.of(i * self.block_q), self.block_q, keys, self.block_k, self.num_k)

    def queries_met(self, numbers, n, j):
        """The same of blocks of queries, for key block j."""
        band, queries, keys = self._here(numbers, n)
        return self._met(band.queries_met, keys.of(j * self.block_k), self.block_k, queries, self.block_q, self.num_q)

    @staticmethod
    def _met(met, start, length: int, other: Places, block: int, most: int):
        first, last = met(start, start + length, other, block)
        # One at least, of which then nothing is seen: a kernel needs no way around its loop.
        first = jnp.minimum(jnp.asarray(first, jnp.int32), most - 1)
        return first, jnp.maximum(jnp.asarray(last, jnp.int32) - first, 1)

    def masked(self, s, numbers, n, row, key, turned: bool = False):
        """The logits `s` of queries from `row` and keys from `key` on, with those hidden that aren't seen.

        turned: whether it is keys by queries, not queries by keys.
        """
        if self.spec.band.is_full and not self.lengths and self.num_keys % self.block_k == 0:
            return s
        # Anew in every step: what is the same in all would wait in registers, for which there is no room.
        n, row, key = lax.optimization_barrier((n, row, key))
        band, queries, keys = self._here(numbers, n)
        height, width = s.shape[::-1] if turned else s.shape
        q_start, k_start = queries.of(row), keys.of(key)

        def hide(s):
            # Two numbers a row, of which a thread has two, say what is seen of it: a comparison or two for each logit.
            rows = plgpu.broadcasted_iota(jnp.int32, s.shape[:1], 0, layout=WGMMA.reduce(1))
            columns = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA) + (q_start if turned else k_start)
            of_rows = lambda bound: across(bound, s.shape) if jnp.ndim(bound) else bound
            seen = []
            for low, high in band.queries_seen(k_start + rows) if turned else band.keys_seen(q_start + rows):
                sides = [] if is_open(low, -FAR) else [columns >= of_rows(low)]
                sides += [] if is_open(high, FAR) else [columns < of_rows(high)]
                seen.append(functools.reduce(operator.and_, sides) if sides else columns >= -FAR)
            return jnp.where(functools.reduce(operator.or_, seen), s, softmax.MASKED)

        full = band.is_full_block(q_start, q_start + height, k_start, k_start + width)
        return lax.cond(full, lambda s: s, hide, s)


def lengths_of(extras: Extras) -> tuple[str, ...]:
    return tuple(name for name in LENGTHS if getattr(extras, name) is not None)


def cleared(x, places: Places, lengths):
    """[B, N, T, ...] with zeros past each sequence's length: whatever is there, 0 times it must be 0."""
    if lengths is None:
        return x
    inside = places.of(jnp.arange(x.shape[2], dtype=jnp.int32)) < lengths[:, None]
    return jnp.where(inside.reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3)), x, jnp.zeros_like(x))


class Stream(NamedTuple):
    """Blocks on their way: of each step one of every array, each in its own ring, of which the steps take slots in turn."""

    arrays: Sequence[Any]
    rings: Sequence[Any]
    full: Any  # barriers, one a slot
    free: Any

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

    def bring(self, step, cut) -> None:
        pl.when(step >= self.stages)(lambda: self.wait_until_free(step))
        for array, ring in zip(self.arrays, self.rings):
            plgpu.copy_gmem_to_smem(array.at[cut], ring.at[self.slot(step)], self.full.at[self.slot(step)])

    def wait_until_free(self, step) -> None:
        plgpu.barrier_wait(self.free.at[self.slot(step)])


def bring(streams: Sequence[Stream], steps, cut: Callable) -> None:
    """Brings every stream's blocks `cut(step)`, and returns once all are done with."""

    @pl.loop(0, steps)
    def _(step):
        for stream in streams:
            stream.bring(step, cut(step))

    for stream in streams:
        pl.loop(jnp.maximum(steps - stream.stages, 0), steps)(stream.wait_until_free)


def launch(body, name: str, rows: int, out, scratch_types, numbers, *arrays):
    """Runs a kernel with a block of threads for every head and block of rows; results have the head's dims of `arrays[0]`.

    Kernels see arrays [B N, T, ...]; `out` are the other dims of each result, which is float32.
    """
    numbers, *arrays = compat.vary_alike((numbers, *arrays))
    (batch, heads), like = arrays[0].shape[:2], jax.typeof(arrays[0]).mat
    near = math.gcd(batch * heads, HEADS)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((batch * heads, *dims), jnp.float32, manual_axis_type=like) for dims in out],
        scratch_types=scratch_types,
        grid=(batch * heads // near, rows, near),
        grid_names=("run", "rows", "head"),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=f"ringmoe_attention_{name}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    arrays = (padded(x, ALIGNED) for x in arrays)
    found = kernel(numbers, *(x.reshape(-1, *x.shape[2:]) for x in arrays))
    return [x.reshape(batch, heads, *x.shape[1:]) for x in found]


def anew(group):
    """A warpgroup's number, of which a step reckons its addresses: else those of all its products would wait in registers, for
    which there is no room."""
    return lax.optimization_barrier(group)


def padded(x, unit: int):
    """[B, N, T, ...] with zeros up to a multiple of so many T: a copy, where it isn't one."""
    more = -x.shape[2] % unit
    return jnp.pad(x, [(0, more if dim == 2 else 0) for dim in range(x.ndim)]) if more else x


def head():
    """The one that a block of threads works on, of all sequences'."""
    return lax.axis_index("run") * lax.axis_size("head") + lax.axis_index("head")


def shared(dtype):
    """What makes a buffer of tiles in shared memory, of a shape."""
    return lambda *shape: plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


def barriers(number: int, arrivals: int = 1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)


def across(x, shape, dim: int = 0):
    """A number of each row (dim 0) along it; of each column (1)."""
    return lax.broadcast_in_dim(x, shape, (dim,))


def filled(shape: tuple[int, ...], value: float):
    """In the layout of a product's rows, or of a product."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), WGMMA if len(shape) > 1 else WGMMA.reduce(1))
