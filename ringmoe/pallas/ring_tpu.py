"""A ring's hops by remote DMA on TPUs, under way during other work, where XLA's permutes are not: see `remote_tpu.py`.

Only neighbours wait for each other: a device tells each that sends to it that it has room, and waits to be told as much. None
is told so too early: who is in the next hop has had what this device sends in this one.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe.pallas import remote_tpu
from ringmoe.pallas.remote_tpu import Axes

STEPS = 1, -1  # places on that the first and the second tree go, or back
KINDS = {(1,): 1, (-1,): 2, (-1, 1): 3}  # of exchange, by where its arrays go: see `remote_tpu.barrier`


def start(names: tuple[str, ...], trees: Sequence, others, distance: int = 1):
    """(what is under way, the trees, `others` held back until it is): each tree goes to a neighbour along the axes `names`: so
    many of STEPS on, 1 or -1.

    The trees that it gives are those to work on meanwhile: the memory of those that it took is theirs.
    """
    arrays, tree = jax.tree.flatten(list(trees))
    if not arrays:
        return (tree, None), trees, others
    mesh, steps = jax.sharding.get_abstract_mesh(), steps_of(trees, distance)
    axes, ways = tuple((name, mesh.shape[name]) for name in names), tuple(sorted(set(steps)))
    flying, others = remote_tpu.start(
        functools.partial(_start_kernel, steps=steps, names=mesh.axis_names),
        axes,
        arrays,
        others,
        sent=sum(a.size * a.dtype.itemsize for a in arrays),
        kind=KINDS[ways],
        metadata={"collective": "collective-permute", "source_target_pairs": _pairs(axes, ways)},
        name="ring_start",
    )
    return (tree, flying), tree.unflatten(flying[0][: len(arrays)]), others


def finish(under_way, after):
    """(what came in each array's place, `after`): waited for once `after` is there."""
    tree, flying = under_way
    if flying is None:
        return tree.unflatten([]), after
    kernel = functools.partial(_finish_kernel, half=len(flying[0]) // 2)
    arrays, after = remote_tpu.finish(kernel, flying, after, name="ring_done")
    return tree.unflatten(arrays), after


def steps_of(trees: Sequence, distance: int = 1) -> tuple[int, ...]:
    """Places on that each array goes."""
    return tuple(step * distance for step, one in zip(STEPS, trees) for _ in jax.tree.leaves(one))


def _start_kernel(*refs, steps: tuple[int, ...], names: tuple[str, ...]):
    """`devices`, of a mesh with these axes; arrays; the same, as results; where those that come go; semaphores of what went and
    of what came."""
    half = len(steps)
    places, *refs = refs
    arrays, buffers, (sent, came) = refs[:half], refs[2 * half : 3 * half], refs[3 * half :]
    peers = places.shape[1] - 1
    me = places[0, peers]

    def device(step: int):
        number = lax.rem(me + jnp.int32(step % peers), jnp.int32(peers))
        return {name: places[i, number] for i, name in enumerate(names)}

    ready, ways = pltpu.get_barrier_semaphore(), sorted(set(steps))
    for step in ways:
        pl.semaphore_signal(ready, 1, device_id=device(-step))
    pl.semaphore_wait(ready, len(ways))
    for array, buffer, step in zip(arrays, buffers, steps):
        pltpu.make_async_remote_copy(array, buffer, sent, came, device_id=device(step)).start()


def _finish_kernel(*refs, half: int):
    """The same arrays and buffers; the semaphores; the buffers again, as results. A wait is for as many bytes as a ref has."""
    arrays, buffers, (sent, came) = refs[:half], refs[half : 2 * half], refs[2 * half : 2 * half + 2]
    for array, buffer in zip(arrays, buffers):
        pltpu.make_async_copy(buffer, buffer, came).wait()
        pltpu.make_async_copy(array, array, sent).wait()


def _pairs(axes: Axes, ways: tuple[int, ...]) -> str:
    """Who sends to whom, as HLO prints it: what the inspector reads."""
    mesh = jax.sharding.get_abstract_mesh()
    numbers = np.arange(mesh.size).reshape(mesh.axis_sizes)
    along = [mesh.axis_names.index(name) for name, _ in axes]
    rows = np.moveaxis(numbers, along, range(-len(along), 0)).reshape(-1, np.prod([size for _, size in axes]))
    pairs = [pair for way in ways for row in rows for pair in zip(row, np.roll(row, -way))]
    return "{" + ",".join(f"{{{source},{target}}}" for source, target in pairs) + "}"
