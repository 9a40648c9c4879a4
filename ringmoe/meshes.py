"""Meshes as digits: one device order, cut finely enough for every sharding in sight.

Number the devices of a mesh in its order. A mesh axis is then a digit `(size, stride)` of the device's number, as in a
mixed-radix numeral, and so is a part of an axis: reshaping a dim that is split eight ways into (2, 4) splits its two parts
by the digits (2, 4) and (4, 1). `refine` names the digits: a mesh of the same devices, in the same order, whose axes are
fine enough to tell every array's sharding. An axis `a` that is cut in two becomes `a.0` and `a.1`, major to minor.
"""

import collections
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.core
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from ringmoe.inspector.machines import slice_of

Axes = tuple[str, ...]
Digit = tuple[int, int]  # size, and how far apart two neighbours are in the device order
Digits = tuple[tuple[Digit, ...], ...]  # of each dim of an array, major to minor


def of_mesh(mesh_shape: Mapping[str, int]) -> dict[str, Digit]:
    """Each axis's digit."""
    digits, stride = {}, math.prod(mesh_shape.values())
    for axis, size in mesh_shape.items():
        stride //= size
        digits[axis] = (size, stride)
    return digits


def of_tiles(tiles: np.ndarray) -> Digits | None:
    """The digits of each dim of `tiles`, where devices `0 .. n - 1` stand in it; None where no digits tell.

    `tiles[i, j, ...]` is the number of the device that holds block (i, j, ...); a last dim may hold the replicas.
    """
    dims, numbers = [], np.zeros(tiles.shape, tiles.dtype)
    for dim in range(tiles.ndim):
        column = np.moveaxis(tiles, dim, 0).reshape(tiles.shape[dim], -1)[:, 0]
        offsets = column - column[0]
        dims.append(_digits(offsets))
        numbers += offsets.reshape([-1 if d == dim else 1 for d in range(tiles.ndim)])
    told = all(digits is not None for digits in dims) and np.array_equal(numbers, tiles)
    return tuple(digits or () for digits in dims) if told else None


def _digits(offsets: np.ndarray) -> tuple[Digit, ...] | None:
    """`offsets[i]` as a sum of the digits of i times strides: those digits, major to minor."""
    if len(offsets) == 1:
        return ()
    stride = int(offsets[1])
    run = next((i for i in range(1, len(offsets)) if offsets[i] != i * stride), len(offsets))
    if stride <= 0 or len(offsets) % run or not np.array_equal(
        offsets, np.add.outer(offsets[::run], np.arange(run) * stride).reshape(-1)
    ):  # fmt: skip
        return None
    major = _digits(offsets[::run])
    return None if major is None else (*major, (run, stride))


def refine(
    mesh_shape: Mapping[str, int], arrays: Sequence[Digits | None], device=None
) -> tuple[AbstractMesh, list[tuple[Axes, ...] | None]]:
    """A mesh of Auto axes that is `mesh_shape` with axes cut where the arrays need it, and each array's axes by dim.

    An array that is None, or that cuts the device order in a way that doesn't go with the cuts before it, gets None: no
    axes tell its sharding. `device` is the mesh's `abstract_device`.
    """
    named, size = of_mesh(mesh_shape), math.prod(mesh_shape.values())
    cuts = _cuts({1, size}, named.values())
    assert cuts is not None, mesh_shape
    fitting = []
    for array in arrays:
        more = None if array is None else _cuts(cuts, [digit for dim in array for digit in dim])
        fitting.append(more is not None)
        cuts = more or cuts
    pieces = _name_pieces(sorted(cuts), named)
    axes = lambda digit: tuple(
        axis for axis, (n, low) in pieces.items() if n > 1 and digit[1] <= low < digit[0] * digit[1]
    )
    told = [
        tuple(tuple(a for digit in dim for a in axes(digit)) for dim in array) if fits and array is not None else None
        for array, fits in zip(arrays, fitting)
    ]
    shape = tuple(n for n, _ in pieces.values())
    return AbstractMesh(shape, tuple(pieces), axis_types=(AxisType.Auto,) * len(shape), abstract_device=device), told


def _cuts(cuts: set[int], digits) -> set[int] | None:
    """`cuts` and the edges of the digits, if each divides the next."""
    more = sorted(cuts | {edge for size, stride in digits for edge in (stride, size * stride)})
    return set(more) if all(high % low == 0 for low, high in itertools.pairwise(more)) else None


def _name_pieces(cuts: list[int], named: Mapping[str, Digit]) -> dict[str, Digit]:
    """The digits between neighbouring cuts, major to minor, named after the axes that they are parts of."""
    pieces = {}
    for axis, (size, stride) in named.items():
        inner = [cut for cut in cuts if stride <= cut <= size * stride][::-1]
        parts = [(high // low, low) for high, low in itertools.pairwise(inner)] or [(1, stride)]
        for i, part in enumerate(parts):
            pieces[axis if len(parts) == 1 else f"{axis}.{i}"] = part
    return pieces


def device_kind(mesh: AbstractMesh) -> str:
    """What JAX calls its devices; "" where the mesh was made without any."""
    return mesh.abstract_device.device_kind if mesh.abstract_device else ""


def slices(mesh: Mesh | AbstractMesh) -> int:
    """Over how many slices of TPUs, which only a network joins, a mesh is. One that doesn't tell its devices is over as many as
    so many of those that are here would take; where there are none of its kind, over one."""
    if isinstance(mesh, Mesh):
        return len({slice_of(device) for device in mesh.devices.flat})
    kind = device_kind(mesh)
    if not kind.startswith("TPU"):
        return 1
    here = collections.Counter(slice_of(device) for device in jax.devices() if device.device_kind == kind)
    return -(-mesh.size // max(here.values())) if here else 1


def in_the_mesh_of_its_operand(fun):
    """`fun(x, ...)` with the Explicit mesh of x's type set, where the user set none and x is being traced.

    Without it jax.numpy's jitted functions lose, under vmap along a sharded dim, the mesh of arrays made inside. It is
    set inside a jit: outside, operations that run one by one would have to compile for a mesh without devices.
    """

    @functools.wraps(fun)
    def wrapped(x, *args, **kwargs):
        mesh = jax.typeof(x).sharding.mesh
        unset = jax.sharding.get_abstract_mesh().empty and AxisType.Explicit in mesh.axis_types
        if not (unset and isinstance(x, jax.core.Tracer)):
            return fun(x, *args, **kwargs)

        @jax.jit
        def inside(x):
            with jax.sharding.use_abstract_mesh(mesh):
                return fun(x, *args, **kwargs)

        return inside(x)

    return wrapped
