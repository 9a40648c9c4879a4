"""What all plans are made of: which axes split which factor, devices in groups, and in a circle."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from ringmoe.meshes import Axes

Factors = tuple[tuple[str, Axes], ...]  # a dict of factor -> axes, sorted, hashable


def freeze(factors: Mapping[str, Axes]) -> Factors:
    """The hashable form of a factor -> axes mapping."""
    return tuple(sorted((factor, axes) for factor, axes in factors.items() if axes))


@dataclasses.dataclass(frozen=True)
class Group:
    """`size` devices with consecutive indices along `axes` (major to minor), of `total` there: groups lie side by side."""

    axes: Axes = ()
    size: int = 1
    total: int = 1

    @classmethod
    def last(cls, axes: Axes, size: int, mesh_shape: Mapping[str, int]) -> "Group":
        """Of so many devices, along as few of the last axes as hold them; `size` divides the number of all."""
        totals = [math.prod(mesh_shape[a] for a in axes[first:]) for first in range(len(axes) + 1)]
        first = max(first for first, total in enumerate(totals) if total % size == 0)
        return cls(axes[first:], size, totals[first])

    @property
    def indices(self) -> list[list[int]] | None:
        """Of each group, for a collective's `axis_index_groups`; None where there is one."""
        starts = range(0, self.total, self.size)
        return None if self.size == self.total else [[*range(i, i + self.size)] for i in starts]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Devices in a circle, or in `abreast` circles side by side: device i along the axes, which is `devices[i]` in the mesh's
    order, is at place i // abreast of one of them."""

    axes: Axes = ()  # major to minor
    mesh_order: Axes = ()  # the same axes as the mesh orders them, which is how ppermute counts devices
    devices: tuple[int, ...] = (0,)
    abreast: int = 1

    @classmethod
    def make(cls, axes: Axes, mesh_shape: Mapping[str, int], inner: int = 1) -> "Ring":
        """The circle that follows the blocks of a dim that is split over `axes`, whose last `inner` devices share a block."""
        while axes and inner % mesh_shape[axes[-1]] == 0:
            axes, inner = axes[:-1], inner // mesh_shape[axes[-1]]
        ordered = tuple(a for a in mesh_shape if a in axes)
        numbers = np.arange(math.prod(mesh_shape[a] for a in axes)).reshape([mesh_shape[a] for a in ordered])
        by_place = numbers.transpose([ordered.index(a) for a in axes]).reshape(-1)
        return cls(axes, ordered, tuple(by_place.tolist()), inner)

    @property
    def size(self) -> int:
        """Places of one circle."""
        return len(self.devices) // self.abreast
