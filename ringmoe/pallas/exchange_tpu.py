"""All-to-alls by remote DMA on TPUs, under way during other work, where XLA can't do that: see `remote_tpu.py`.

Every device first waits until all have come to the same start: only then is there room for what they send.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe.pallas import remote_tpu
from ringmoe.pallas.remote_tpu import Axes

KIND = 0  # of exchange: see `remote_tpu.barrier`


def start(axes: Axes, arrays: list[jax.Array], others):
    """(what is under way, `others` held back until it is): slice d of every [P, ...] goes to device d of the P along `axes`."""
    peers, total = arrays[0].shape[0], sum(a.size * a.dtype.itemsize for a in arrays)
    names = jax.sharding.get_abstract_mesh().axis_names
    return remote_tpu.start(
        functools.partial(_start_kernel, half=len(arrays), names=names),
        axes,
        arrays,
        others,
        sent=total * (peers - 1) // peers,
        kind=KIND,
        metadata={"collective": "all-to-all", "replica_groups": _groups(axes)},
        name="all_to_all_start",
    )


def finish(axes: Axes, under_way, after):
    """(slice s of each from device s, `after`): waited for once `after` is there."""
    del axes
    kernel = functools.partial(_finish_kernel, half=len(under_way[0]) // 2)
    return remote_tpu.finish(kernel, under_way, after, name="all_to_all_done")


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


def _groups(axes: Axes) -> str:
    """The groups of devices as HLO prints them, an iota over the mesh: what the inspector reads."""
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name, _ in axes]
    order = sorted(range(len(mesh.axis_names)), key=lambda i: (mesh.axis_names[i] in names, i))
    peers = math.prod(size for _, size in axes)
    dims, order = (",".join(map(str, numbers)) for numbers in (mesh.axis_sizes, order))
    return f"[{mesh.size // peers},{peers}]<=[{dims}]T({order})"
