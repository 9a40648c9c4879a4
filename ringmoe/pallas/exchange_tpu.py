"""All-to-alls by remote DMA on TPUs, under way during other work, where XLA can't do that.

Two Pallas kernels: one starts the copies and gives the semaphores they will raise, another waits for them; what stands between
the two in the program runs meanwhile. Every device first waits until all have come to the same start: only then is there room
for what they send. The buffers are pinned to HBM, so that XLA moves none while it is being written.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import compat

BARRIER = (
    7  # first number of the semaphores by which devices wait for each other; those of this library's kernels alone
)
HBM, SEMAPHORE = (pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.SEMAPHORE))

type Axes = tuple[tuple[str, int], ...]  # of the mesh, manual here, and their sizes, major to minor


def start(axes: Axes, arrays: list[jax.Array], others):
    """(what is under way, `others` held back until it is): slice d of every [P, ...] goes to device d of the P along `axes`."""
    half = len(arrays)
    peers, total = arrays[0].shape[0], sum(a.size * a.dtype.itemsize for a in arrays)
    places, *arrays = compat.vary_alike((devices(axes), *arrays))
    names = jax.sharding.get_abstract_mesh().axis_names
    *buffers, sent, came = pl.pallas_call(
        functools.partial(_start_kernel, half=half, names=names),
        out_shape=(*map(pinned, arrays * 2), *(pltpu.SemaphoreType.DMA(()),) * 2),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + [HBM] * half,
        out_specs=(*(HBM,) * (2 * half), SEMAPHORE, SEMAPHORE),
        input_output_aliases={1 + i: i for i in range(half)},
        compiler_params=pltpu.CompilerParams(collective_id=barrier(axes), has_side_effects=True),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=0, remote_bytes_transferred=total * (peers - 1) // peers
        ),
        metadata={"collective": "all-to-all", "replica_groups": _groups(axes)},
        name="all_to_all_start",
    )(places, *(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in arrays))
    buffers, others = lax.optimization_barrier((buffers, others))
    return (buffers, sent, came), others


def finish(axes: Axes, under_way, after):
    """(slice s of each from device s, `after`): waited for once `after` is there."""
    del axes
    buffers, sent, came = under_way
    buffers, after = lax.optimization_barrier((buffers, after))
    half = len(buffers) // 2
    arrays = pl.pallas_call(
        functools.partial(_finish_kernel, half=half),
        out_shape=tuple(map(pinned, buffers[half:])),
        in_specs=[HBM] * (2 * half) + [SEMAPHORE] * 2,
        out_specs=(HBM,) * half,
        input_output_aliases={half + i: i for i in range(half)},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        name="all_to_all_done",
    )(*(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in buffers), sent, came)
    return list(arrays), after


def barrier(axes: Axes, kind: int = 0) -> int:
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


def _start_kernel(*refs, half: int, names: tuple[str, ...]):
    """`devices`, of a mesh with these axes; arrays [P, ...]; the same, as results; where those of the others go; semaphores of
    what went and of what came."""
    places, *refs = refs
    arrays, buffers, (sent, came) = refs[:half], refs[2 * half : 3 * half], refs[3 * half :]
    peers = arrays[0].shape[0]
    me = places[0, peers]

    def device(number):
        return {name: places[i, number] for i, name in enumerate(names)}

    def greet(step, barrier):
        pl.semaphore_signal(barrier, 1, device_id=device(lax.rem(me + step, peers)))
        return barrier

    def send(step, _):
        to = lax.rem(me + step, peers)
        for array, buffer in zip(arrays, buffers):
            pltpu.make_async_remote_copy(array.at[to], buffer.at[me], sent, came, device_id=device(to)).start()
        return _

    barrier = pltpu.get_barrier_semaphore()
    lax.fori_loop(1, peers, greet, barrier)
    pl.semaphore_wait(barrier, peers - 1)
    for array, buffer in zip(arrays, buffers):
        pltpu.make_async_copy(array.at[me], buffer.at[me], came).start()
    lax.fori_loop(1, peers, send, 0)


def _finish_kernel(*refs, half: int):
    """The same arrays and buffers; the semaphores; the buffers again, as results. A wait is for as many bytes as a ref has."""
    arrays, buffers, (sent, came) = refs[:half], refs[half : 2 * half], refs[2 * half : 2 * half + 2]
    for array, buffer in zip(arrays, buffers):
        others = array.at[pl.ds(1, array.shape[0] - 1)]
        pltpu.make_async_copy(buffer, buffer, came).wait()
        pltpu.make_async_copy(others, others, sent).wait()


def pinned(a: jax.Array):
    return pltpu.HBM(a.shape, a.dtype)


def _groups(axes: Axes) -> str:
    """The groups of devices as HLO prints them, an iota over the mesh: what the inspector reads."""
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name, _ in axes]
    order = sorted(range(len(mesh.axis_names)), key=lambda i: (mesh.axis_names[i] in names, i))
    peers = math.prod(size for _, size in axes)
    dims, order = (",".join(map(str, numbers)) for numbers in (mesh.axis_sizes, order))
    return f"[{mesh.size // peers},{peers}]<=[{dims}]T({order})"
