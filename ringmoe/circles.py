"""Meshes along one axis of which devices stand in circles of a TPU's links: a ring sends from each device to the next one, both
ways at once, and where two of these ways share a link it takes twice as long."""

import collections
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ringmoe.errors import check
from ringmoe.inspector.machines import slice_of
from ringmoe.inspector.wire import route
from ringmoe.plan import cost


def ring_mesh(mesh: Mesh, axis: str) -> Mesh:
    """The same mesh with the devices along one axis in circles, where the links of the machine have any.

    `jax.make_mesh` lays an axis along rows of a slice. Where these don't close (a TPU of two dims has rings from 16 chips on,
    one of three dims where a dim is a multiple of 4) the way from the last device to the first leads back over all the others'
    links, and in JAX's order of 2x4 chips every second neighbour is two links away. Here an axis of 8 goes round a block of
    2x4 chips instead, one of 32 round 4x8. Of the order there is and these circles the one is taken in which the fullest link
    carries least, the one there is among equals.

    It is made for rings. Heads that are exchanged over a part of a longer axis are better off in rows, and
    `exchange="auto"`, which knows no places of devices, counts on these: in circles of more than 16 name `exchange="ring"`.

        mesh = ringmoe.ring_mesh(jax.make_mesh((8,), ("seq",)), "seq")

    Args:
      mesh: of real devices, or of those of a `ringmoe.target`.
      axis: along which blocks travel, that of a sequence.

    Returns:
      A mesh of the same shape, names and axis types. It is `mesh` on what has no torus (GPUs, CPUs), where the axis leads from
      slice to slice, and where not all of a slice is there.

    Raises:
      ValueError: `axis` is none of the mesh's.

    Cost: at start, milliseconds for a thousand devices. The programs are the same.
    """
    check(axis in mesh.axis_names, f"{axis=} is none of the mesh's {mesh.axis_names}: name the one of the sequence")
    dim, slices = mesh.axis_names.index(axis), _slices(mesh.devices)
    found = [_placed(rows, mesh.devices.shape, dim) for rows in _circles(slices, mesh.shape[axis])]
    where = lambda grid: [slice_of(device) for device in grid.flat]
    grids = [mesh.devices, *(grid for grid in found if where(grid) == where(mesh.devices))]
    best = min(grids, key=lambda grid: _load(slices, np.moveaxis(grid, dim, -1))) if len(grids) > 1 else mesh.devices
    return mesh if best is mesh.devices else Mesh(best, mesh.axis_names, axis_types=mesh.axis_types)


class _Slice:
    """Devices by the place of their chip, in a torus of the lengths `dims`."""

    def __init__(self, devices: list[Any]):
        self.at: dict[tuple[int, ...], list[Any]] = collections.defaultdict(list)
        for device in devices:
            self.at[tuple(device.coords)].append(device)
        self.low = tuple(map(min, zip(*self.at)))
        self.dims = tuple(high - low + 1 for low, high in zip(self.low, map(max, zip(*self.at))))
        self.wraps = tuple(map(cost.machine(devices[0].device_kind).is_ring, self.dims))
        self.per_chip = len(next(iter(self.at.values())))

    @property
    def is_full(self) -> bool:
        return len(self.at) == math.prod(self.dims) and all(len(x) == self.per_chip for x in self.at.values())

    def here(self, place: Sequence[int]) -> list[Any]:
        return self.at[tuple(a + b for a, b in zip(self.low, place))]


def _slices(grid: np.ndarray) -> list[_Slice]:
    """Those of a mesh; none where its devices are in no torus, or not all of one are there."""
    devices = sorted(grid.flat, key=lambda device: (slice_of(device), device.id))
    if devices[0].platform != "tpu":
        return []
    slices = [_Slice(list(group)) for _, group in itertools.groupby(devices, slice_of)]
    return slices if all(x.is_full and x.dims == slices[0].dims for x in slices) else []


def _circles(slices: list[_Slice], size: int) -> Iterator[list[list[Any]]]:
    """All devices in circles of so many, for each shape of a block that these can fill."""
    if not slices:
        return
    dims = slices[0].dims
    for block in itertools.product(*([b for b in range(1, n + 1) if n % b == 0] for n in dims)):
        if math.prod(block) * slices[0].per_chip != size or (circle := _circle(block)) is None:
            continue
        corners = itertools.product(*(range(0, n, b) for n, b in zip(dims, block)))
        rows = [[tuple(map(sum, zip(corner, chip))) for chip in circle] for corner in corners]
        yield [[device for place in row for device in one.here(place)] for one in slices for row in rows]


def _circle(block: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """The chips of a block so that each is next to the one before and the last to the first: up along the first dim of an even
    length as a comb whose teeth go through all other dims, which are one path, and straight back. None where there is none."""
    even = next((dim for dim, n in enumerate(block) if n % 2 == 0), None)
    if even is None or math.prod(block) == block[even]:
        return None
    path = list(_path([n for dim, n in enumerate(block) if dim != even]))
    rows, last = block[even], len(path)
    comb = [(r, c) for r in range(rows) for c in (range(1, last) if r % 2 == 0 else range(last - 1, 0, -1))]
    return [(*path[c][:even], r, *path[c][even:]) for r, c in [*comb, *((r, 0) for r in range(rows - 1, -1, -1))]]


def _path(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The places of a box, each next to the one before."""
    if not lengths:
        yield ()
        return
    rest = list(_path(lengths[1:]))
    for n in range(lengths[0]):
        yield from ((n, *place) for place in (rest if n % 2 == 0 else reversed(rest)))


def _placed(rows: list[list[Any]], shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Rows of devices along an axis of a mesh."""
    others = [n for dim, n in enumerate(shape) if dim != axis]
    return np.moveaxis(np.array(rows).reshape(*others, shape[axis]), -1, axis)


def _load(slices: list[_Slice], rows: np.ndarray) -> int:
    """How many of the ways from each device of a row to the next one and to the one before share the fullest link."""
    places = {device: (n, *place) for n, one in enumerate(slices) for place, chip in one.at.items() for device in chip}
    links: collections.Counter = collections.Counter()
    for row in rows.reshape(-1, rows.shape[-1]):
        for near, far in zip(row, np.roll(row, 1)):
            for (n, *place), (other, *end) in itertools.permutations((places[near], places[far])):
                if n != other:
                    return rows.size  # over the network
                links.update((n, *link) for link in route(place, end, slices[0].dims, slices[0].wraps))
    return max(links.values(), default=0)
