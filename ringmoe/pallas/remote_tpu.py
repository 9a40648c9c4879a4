"""What every exchange by remote DMA on TPUs has: two Pallas kernels, and who waits for whom.

One kernel starts the copies and gives the semaphores they will raise, another waits for them; what stands between the two in
the program runs meanwhile. The buffers are pinned to HBM, so that XLA moves none while it is being written.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import compat

BARRIER = 7  # first of the semaphores by which devices wait for each other: this library's kernels alone use these
HBM, SEMAPHORE = (pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.SEMAPHORE))

type Axes = tuple[tuple[str, int], ...]  # of the mesh, manual here, and their sizes, major to minor


def start(
    kernel: Callable, axes: Axes, arrays: list[jax.Array], others, *, sent: int, kind: int, metadata: dict, name: str
) -> tuple[Any, Any]:
    """(what is under way, `others` held back until it is).

    `kernel` gets `devices`, the arrays, the same as results, the buffers for what comes, and the semaphores of what went and of
    what came. `sent`: bytes. kind: see `barrier`. metadata: what the inspector reads.
    """
    half = len(arrays)
    places, *arrays = compat.vary_alike((devices(axes), *arrays))
    *buffers, went, came = pl.pallas_call(
        kernel,
        out_shape=(*map(_pinned, arrays * 2), *(pltpu.SemaphoreType.DMA(()),) * 2),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + [HBM] * half,
        out_specs=(*(HBM,) * (2 * half), SEMAPHORE, SEMAPHORE),
        input_output_aliases={1 + i: i for i in range(half)},
        compiler_params=pltpu.CompilerParams(collective_id=barrier(axes, kind), has_side_effects=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0, remote_bytes_transferred=sent),
        metadata=metadata,
        name=name,
    )(places, *(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in arrays))
    buffers, others = lax.optimization_barrier((buffers, others))
    return (buffers, went, came), others


def finish(kernel: Callable, under_way, after, *, name: str) -> tuple[list[jax.Array], Any]:
    """(what came in each array's place, `after`): waited for once `after` is there.

    `kernel` gets the arrays and buffers, the semaphores, and the buffers again, as results.
    """
    buffers, went, came = under_way
    buffers, after = lax.optimization_barrier((buffers, after))
    half = len(buffers) // 2
    arrays = pl.pallas_call(
        kernel,
        out_shape=tuple(map(_pinned, buffers[half:])),
        in_specs=[HBM] * (2 * half) + [SEMAPHORE] * 2,
        out_specs=(HBM,) * half,
        input_output_aliases={half + i: i for i in range(half)},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        name=name,
    )(*(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in buffers), went, came)
    return list(arrays), after


def barrier(axes: Axes, kind: int) -> int:
    """The number of the semaphore of an exchange along these axes, of one of four kinds.

    Others have others: a device that has gone on to an exchange with other devices would be taken there for one of these.
    """
    names = jax.sharding.get_abstract_mesh().axis_names
    return BARRIER + 4 * sum(2 ** names.index(name) for name, _ in axes) + kind


def devices(axes: Axes) -> jax.Array:
    """[mesh axes, P + 1] int32: where on the mesh the P devices along `axes` are; last which of them this one is, in every row.

    Found outside of the kernels: inside, JAX (0.12) can't add what the other axes have to it, in a shard_map that checks what
    varies.
    """
    names, found = jax.sharding.get_abstract_mesh().axis_names, {}
    place = lax.iota(jnp.int32, math.prod(size for _, size in axes))
    for name, size in reversed(axes):
        found[name], place = lax.rem(place, jnp.int32(size)), lax.div(place, jnp.int32(size))
    me = lax.axis_index(tuple(name for name, _ in axes))
    rows = [found[name] if name in found else jnp.full_like(place, lax.axis_index(name)) for name in names]
    return jnp.stack(compat.vary_alike([jnp.append(row, me) for row in rows]))


def _pinned(a: jax.Array):
    return pltpu.HBM(a.shape, a.dtype)
