"""What one collective puts on the wire, and how long the wire of a target takes for it.

Bytes per device and exchange, n devices in a group, B bytes of operands:

    collective-permute, collective-broadcast, recv    B
    all-to-all, ragged-all-to-all, reduce-scatter     B (n - 1) / n
    all-gather                                        B (n - 1)
    all-reduce                                        2 B (n - 1) / n

Behind a switch, time is bytes over all links of a device. On a torus a permute is routed dimension
by dimension, the shorter way round, and the fullest link decides; a gather or reduction streams
over every link that its group spans; an all-to-all is bound by the cut through the middle of its
longest dimension. Latency is not modelled: a transfer of a few kilobytes takes longer than said
here. A ragged-all-to-all counts as if its buffers were full and even.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from ringmoe.inspector.machines import Target
from ringmoe.inspector.reader import PERMUTE, Computation, Instruction

_MESH_AXIS = re.compile(r"'([^']*)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_PAIR = re.compile(r"\{(\d+),\s*(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One exchange of one device: bytes sent, microseconds alone on the wire, the links it keeps
    busy, and its route."""

    wire_bytes: float
    us: float
    lane: str
    route: str


def replica_groups(text: str, num_devices: int) -> list[tuple[int, ...]]:
    """Device groups of a `replica_groups=` value in any of its printed forms.

    Forms: "{{0,1},{2,3}}"; "{}" (all devices); "[2,4]<=[4,2]T(1,0)" (an iota, reshaped,
      transposed);
    "mesh['a'=2,'b'=4] {'b'}" (the devices that differ in axis b only). An unknown form counts as
    all devices.
    """
    if text.startswith("mesh["):
        return _mesh_groups(text, num_devices)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        if math.prod(shape) == math.prod(dims) <= 2**24:
            ids = np.arange(math.prod(dims)).reshape(dims)
            ids = ids.transpose(order) if sorted(order) == list(range(len(dims))) else ids
            return [tuple(row) for row in ids.reshape(shape[0], -1).tolist()]
    groups = [tuple(int(n) for n in re.findall(r"\d+", part)) for part in re.findall(r"\{([\d,\s]+)\}", text)]
    return groups or [tuple(range(num_devices))]


def _mesh_groups(text: str, num_devices: int) -> list[tuple[int, ...]]:
    """Groups of the form "mesh['a'=2,'b'=4] {'b'}"; "'b':(2)2" is the part of b that has size 2
    below a part of size 2."""
    description, _, chosen = text.rpartition("{")
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(description)}
    total = math.prod(sizes.values())
    listed = re.search(r"device_ids=\(?\[?([\d,\s]+)", description)
    ids = [int(n) for n in listed.group(1).split(",") if n.strip()] if listed else []
    grid = np.array(ids) if len(ids) == total else np.arange(min(total, 2**24))
    if not sizes or len(grid) != total:
        return [tuple(range(num_devices))]
    axes, dims = [], []
    picked = {
        name: (int(before or 1), int(size or sizes.get(name, 1))) for name, before, size in _GROUP_AXIS.findall(chosen)
    }
    for name, size in sizes.items():
        before, part = picked.get(name, (1, 1))
        if size % (before * part):
            before, part = 1, size
        dims += [before, part, size // before // part]
        axes.append(len(dims) - 2)
    groups = np.moveaxis(grid.reshape(dims), axes, range(-len(axes), 0))
    return [tuple(row) for row in groups.reshape(-1, math.prod(dims[axis] for axis in axes)).tolist()]


class Wire:
    """Times transfers on one target.

    Args:
      target: whose links.
      coords: place on the torus of each device, in the order of the program's device numbers; see
        `Target.coords`.
    """

    def __init__(self, target: Target, coords: list[tuple[int, ...]]):
        self.target = target
        self.coords = coords
        self._permute_load = functools.cache(self._permute_load_uncached)
        self._span = functools.cache(self._span_uncached)

    def transfer(self, instruction: Instruction, computation: Computation, kind: str) -> Transfer:
        """The transfer that one collective instruction of this kind starts."""
        attributes = instruction.attributes
        sizes = (computation.by_name[name].shape.bytes for name in instruction.operands if name in computation.by_name)
        size = sum(sizes)
        if kind in (PERMUTE, "recv") or "source_target_pairs" in attributes:
            if kind == "recv":
                # A device of a ring gets what it sends; counted here, where the program waits.
                size = next((leaf.bytes for leaf in instruction.shape.leaves()), 0.0)
            pairs = attributes.get("source_target_pairs") or attributes.get("frontend_attributes", "")
            return self.permute(size, pairs)
        if kind == "send":
            return Transfer(0.0, 0.0, "", "counted with its recv")
        if kind == "ragged-all-to-all" and instruction.operands:
            size = computation.by_name[instruction.operands[0]].shape.bytes
        return self.exchange(kind, size, attributes.get("replica_groups", "{}"))

    def permute(self, size: float, pairs: str) -> Transfer:
        """`size` bytes from each source to its target; `pairs` as printed, "{{0,1},{1,0}}"."""
        hops, load = self._permute_load(pairs)
        if not self.target.torus:
            return Transfer(size, _us(size, self._all_links()), "switch", "switch")
        if hops == 0:
            return Transfer(size, _us(size, self.target.hbm_bandwidth), "chip", "same chip")
        route = "neighbours" if hops == 1 else f"up to {hops} hops"
        route += f", {load} share a link" if load > 1 else ""
        return Transfer(size, _us(size * load, self.target.link_bandwidth), pairs, route)

    def exchange(self, kind: str, size: float, groups: str) -> Transfer:
        """A collective of `kind` over `groups` (as printed) whose operands hold `size` bytes."""
        n, bandwidth, cut, spans = self._span(groups)
        factor = {
            "all-gather": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-broadcast": float(n > 1),
        }
        wire_bytes = size * factor.get(kind, (n - 1) / n)
        if kind.endswith("all-to-all") and self.target.torus and cut:
            return Transfer(wire_bytes, _us(size * cut, self.target.link_bandwidth), "all", spans)
        return Transfer(wire_bytes, _us(wire_bytes, bandwidth), "all" if self.target.torus else "switch", spans)

    def _all_links(self) -> float:
        return self.target.num_links * self.target.link_bandwidth

    def _permute_load_uncached(self, pairs: str) -> tuple[int, int]:
        """Longest route in hops, and how many routes share the fullest link."""
        links: collections.Counter = collections.Counter()
        longest = 0
        for source, destination in _PAIR.findall(pairs):
            if max(int(source), int(destination)) >= len(self.coords):
                continue
            place, end, hops = list(self.coords[int(source)]), self.coords[int(destination)], 0
            for dim, length in enumerate(self.target.torus):
                distance = end[dim] - place[dim]
                if self.target.wraps[dim]:
                    distance = (distance + (length - 1) // 2) % length - (length - 1) // 2
                step = 1 if distance > 0 else -1
                for _ in range(abs(distance)):
                    links[(*place, dim, step)] += 1
                    place[dim] = (place[dim] + step) % length
                hops += abs(distance)
            longest = max(longest, hops)
        return longest, max(links.values(), default=0)

    def _span_uncached(self, groups: str) -> tuple[int, float, float, str]:
        """Group size, bytes/s into a device, all-to-all cut load per operand byte, and words; of
        the slowest group."""
        slowest = None
        for group in replica_groups(groups, len(self.coords)):
            places = [self.coords[i] for i in group if i < len(self.coords)]
            found = (max(len(group), 1), *self._reach(places))
            slowest = min(slowest, found, key=lambda f: f[1]) if slowest else found
        return slowest or (1, self._all_links(), 0.0, "")

    def _reach(self, places: list[tuple[int, ...]]) -> tuple[float, float, str]:
        """Bytes/s, cut load and words for one group of devices at these places."""
        if not self.target.torus or not places:
            return self._all_links(), 0.0, "switch"
        links, cut, words = 0, 0.0, []
        per_chip = len(places) / len(set(places))
        for dim, length in enumerate(self.target.torus):
            extent = len({place[dim] for place in places})
            if extent > 1:
                ring = self.target.wraps[dim] and extent == length
                links += 2 if ring else 1
                cut = max(cut, per_chip * extent / (8 if ring else 4))
                words.append(f"{'ring' if ring else 'line'} of {extent}")
        if not links:
            return self.target.hbm_bandwidth, 0.0, "same chip"
        return links * self.target.link_bandwidth, cut, " x ".join(words)


def _us(size: float, bandwidth: float) -> float:
    return size / bandwidth * 1e6
