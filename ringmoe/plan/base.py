"""What all plans are made of: which axes split which factor, and devices in a circle."""

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
class Ring:
    """Devices in a circle: place i is device `devices[i]` of those on the axes, counted in the mesh's order."""

    axes: Axes = ()  # major to minor: a device's index along them is its place
    mesh_order: Axes = ()  # the same axes as the mesh orders them, which is how ppermute counts devices
    devices: tuple[int, ...] = (0,)

    @classmethod
    def make(cls, axes: Axes, mesh_shape: Mapping[str, int]) -> "Ring":
        """The circle that follows the blocks of a dim that is split over `axes`."""
        ordered = tuple(a for a in mesh_shape if a in axes)
        numbers = np.arange(math.prod(mesh_shape[a] for a in axes)).reshape([mesh_shape[a] for a in ordered])
        by_place = numbers.transpose([ordered.index(a) for a in axes]).reshape(-1)
        return cls(axes, ordered, tuple(by_place.tolist()))

    @property
    def size(self) -> int:
        return len(self.devices)
