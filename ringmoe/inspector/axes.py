"""Which axes of the mesh a collective goes over, read from its device groups or pairs."""

import functools
from collections.abc import Mapping

import numpy as np

from ringmoe.inspector.reader import Instruction
from ringmoe.inspector.wire import replica_groups, source_target_pairs


class Axes:
    """Names axes of one mesh; a program's device numbers count through the mesh in order.

    Args:
      shape: size by axis name; {} when the mesh is not known, and then nothing is named.
    """

    def __init__(self, shape: Mapping[str, int]):
        self.names, self.sizes = tuple(shape), tuple(shape.values())
        self._spanned = functools.cache(self._spanned_uncached)

    def of(self, instruction: Instruction) -> tuple[str, ...]:
        """The axes along which the devices that exchange with each other differ."""
        if not self.names:
            return ()
        attributes = instruction.attributes
        pairs = attributes.get("source_target_pairs") or attributes.get("frontend_attributes", "")
        groups = attributes.get("replica_groups", "")
        return self._spanned(groups or pairs, bool(groups))

    def _spanned_uncached(self, text: str, grouped: bool) -> tuple[str, ...]:
        total = int(np.prod(self.sizes))
        exchanges = replica_groups(text, total)[:1] if grouped else source_target_pairs(text)
        spanned: set[str] = set()
        for devices in exchanges:
            if max(devices) < total:
                places = np.array(np.unravel_index(devices, self.sizes))
                spanned.update(name for name, differs in zip(self.names, np.ptp(places, axis=1)) if differs)
        return tuple(name for name in self.names if name in spanned)
