"""Which axes of the mesh a collective goes over, read from its device groups or pairs."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from ringmoe.inspector.collectives import slice_exchange
from ringmoe.inspector.reader import Instruction
from ringmoe.inspector.wire import replica_groups, source_target_pairs


class Axes:
    """Names axes of one mesh; a program's device numbers count through the mesh in order.

    Args:
      shape: size by axis name; {} when the mesh is not known, and then nothing is named.
      slices: numbers of the mesh's devices, slice by slice, when the program is one that all slices run, each counting its
        own devices.
    """

    def __init__(self, shape: Mapping[str, int], slices: Sequence[Sequence[int]] = ()):
        self.names, self.sizes = tuple(shape), tuple(shape.values())
        self._slices = slices or [range(int(np.prod(self.sizes)))]
        self._spanned = functools.cache(self._spanned_uncached)

    def of(self, instruction: Instruction) -> tuple[str, ...]:
        """The axes along which the devices that exchange with each other differ."""
        if not self.names:
            return ()
        between = slice_exchange(instruction)
        if between is not None:
            return self._differing([between.devices])
        attributes = instruction.attributes
        pairs = attributes.get("source_target_pairs") or attributes.get("frontend_attributes", "")
        groups = instruction.groups
        return self._spanned(groups or pairs, bool(groups))

    def _spanned_uncached(self, text: str, grouped: bool) -> tuple[str, ...]:
        exchanges = replica_groups(text, len(self._slices[0]))[:1] if grouped else source_target_pairs(text)
        return self._differing([[(0, device) for device in devices] for devices in exchanges])

    def _differing(self, exchanges: Sequence[Sequence[tuple[int, int]]]) -> tuple[str, ...]:
        """The axes along which (slice, device) of an exchange differ; none for devices that are not on the mesh."""
        spanned: set[str] = set()
        for places in exchanges:
            if places and all(s < len(self._slices) and d < len(self._slices[s]) for s, d in places):
                devices = [self._slices[s][d] for s, d in places]
                indices = np.array(np.unravel_index(devices, self.sizes))
                spanned.update(name for name, differs in zip(self.names, np.ptp(indices, axis=1)) if differs)
        return tuple(name for name in self.names if name in spanned)
