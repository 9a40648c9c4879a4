"""What one collective puts on the wire, and how long the wire of a target takes for it.

    us = min over protocols( launch + links x link_us + hops x network_us + max(L / links' rate, N / network's rate) / share )

for n devices in a group, m of them in each of d domains (slices, or GPUs behind one switch), B bytes of operands:

    kind                                      L: on links     N: on the network    links: steps    hops
    collective-permute, recv                  B x load        B                    longest route   1
    collective-broadcast                      B               B / m                reach           1
    all-to-all, ragged-all-to-all             B (n - 1) / n   B (d - 1) / d        reach           1
    reduce-scatter                            B (n - 1) / n   B (d - 1) / (m d)    reach           d - 1
    all-gather                                B (n - 1)       B (d - 1)            reach           d - 1
    all-reduce                                twice reduce-scatter's               2 x reach       2 log2 d

Without a second domain N and hops are 0. L is also what is reported as bytes sent by a device, or N where only the
network is used.

Behind a switch L goes over all links of a device; reach is 1 for a broadcast and an all-to-all, else the n - d steps of
a ring (of an all-reduce m - 1: its domains are joined by a tree). On a torus a permute is routed dimension by dimension,
the shorter way round, and the fullest link decides; a gather or reduction streams over every link that its group spans;
an all-to-all is bound by the cut through the middle of its longest dimension; reach is the sum over dimensions of half a
ring or all of a line. Each device has its share of its host's network, even when its neighbours send nothing.

XLA:TPU splits what spans slices by itself: links inside, and a transfer by the host between slices (`_between_slices`),
which is all network, in one hop, an all-reduce in two. A ragged-all-to-all counts as if its buffers were full and even.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ringmoe.inspector.collectives import SliceExchange, slice_exchange
from ringmoe.inspector.machines import Target
from ringmoe.inspector.reader import PERMUTE, Computation, Instruction

_MESH_AXIS = re.compile(r"'([^']*)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_PAIR = re.compile(r"\{(\d+),\s*(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One exchange of one device: bytes sent, microseconds alone on the wire, the links it keeps
    busy ("all" of a torus, the "network", ..., or of a permute its pairs), and its route."""

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
        if 0 < math.prod(shape) == math.prod(dims) <= 2**24:
            ids = np.arange(math.prod(dims)).reshape(dims)
            ids = ids.transpose(order) if sorted(order) == list(range(len(dims))) else ids
            return [tuple(row) for row in ids.reshape(shape[0], -1).tolist()]
    groups = [tuple(int(n) for n in re.findall(r"\d+", part)) for part in re.findall(r"\{([\d,\s]+)\}", text)]
    return groups or [tuple(range(num_devices))]


def source_target_pairs(text: str) -> list[tuple[int, int]]:
    """Sources and targets of a permute, as printed: "{{0,1},{1,0}}"."""
    return [(int(source), int(target)) for source, target in _PAIR.findall(text)]


def _mesh_groups(text: str, num_devices: int) -> list[tuple[int, ...]]:
    """Groups of the form "mesh['a'=2,'b'=4] {'b'}"; "'b':(2)2" is the part of b that has size 2
    below a part of size 2."""
    description, _, chosen = text.rpartition("{")
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(description)}
    total = math.prod(sizes.values())
    listed = re.search(r"device_ids=\(?\[?([\d,\s]+)", description)
    ids = [int(n) for n in listed.group(1).split(",") if n.strip()] if listed else []
    grid = np.array(ids) if len(ids) == total else np.arange(min(total, 2**24))
    if not sizes or not total or len(grid) != total:
        return [tuple(range(num_devices))]
    axes, dims = [], []
    picked = {
        name: (int(before or 1), int(size or sizes.get(name, 1))) for name, before, size in _GROUP_AXIS.findall(chosen)
    }
    for name, size in sizes.items():
        before, part = picked.get(name, (1, 1))
        if not before * part or size % (before * part):
            before, part = 1, size
        dims += [before, part, size // before // part]
        axes.append(len(dims) - 2)
    groups = np.moveaxis(grid.reshape(dims), axes, range(-len(axes), 0))
    return [tuple(row) for row in groups.reshape(-1, math.prod(dims[axis] for axis in axes)).tolist()]


def route(
    start: Sequence[int], end: Sequence[int], torus: Sequence[int], wraps: Sequence[bool]
) -> Iterator[tuple[int, ...]]:
    """The links from one chip of a torus to another, each its place, dim and direction: dim by dim, the shorter way round."""
    place = list(start)
    for dim, length in enumerate(torus):
        distance = end[dim] - place[dim]
        if wraps[dim]:
            distance = (distance + (length - 1) // 2) % length - (length - 1) // 2
        step = 1 if distance > 0 else -1
        for _ in range(abs(distance)):
            yield (*place, dim, step)
            place[dim] = (place[dim] + step) % length


class Wire:
    """Times transfers on one target.

    Args:
      target: whose links.
      coords: place of each device, in the order of the program's device numbers; see `Target.coords`.
    """

    def __init__(self, target: Target, coords: list[tuple[int, ...]]):
        self.target = target
        self.coords = coords
        self._routes = functools.cache(self._routes_uncached)
        self._common_load = functools.cache(self._common_load_uncached)
        self._span = functools.cache(self._span_uncached)

    def transfer(self, instruction: Instruction, computation: Computation, kind: str) -> Transfer:
        """The transfer that one collective instruction of this kind starts."""
        attributes, between = instruction.attributes, slice_exchange(instruction)
        sizes = (computation.by_name[name].shape.bytes for name in instruction.operands if name in computation.by_name)
        size = sum(sizes)
        if between is not None:
            return self._between_slices(size, between)
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
        return self.exchange(kind, size, instruction.groups or "{}")

    def permute(self, size: float, pairs: str) -> Transfer:
        """`size` bytes from each source to its target; `pairs` as printed, "{{0,1},{1,0}}"."""
        hops, load, crosses, _ = self._routes(pairs)
        if crosses:
            us = self._us(size / self._links_rate(), size / self.target.network_bandwidth, 0, 1)
            return Transfer(size, us, "network", "network")
        if not self.target.torus:
            return Transfer(size, self._us(size / self._links_rate(), 0.0, 1, 0), "switch", "switch")
        if hops == 0:
            return Transfer(size, self._us(size / self.target.hbm_bandwidth, 0.0, 0, 0), "chip", "same chip")
        if hops == load == 1:
            return self.neighbour(size, pairs)
        route = f"up to {hops} hops" + (f", {load} share a link" if load > 1 else "")
        return Transfer(size, self._us(size * load / self._link_rate(), 0.0, hops, 0), pairs, route)

    def contended_us(self, one: Transfer, other: Transfer) -> float:
        """How long two transfers that are under way together delay each other: the time that both need some link."""
        lanes = {one.lane, other.lane}
        if len(lanes) == 1 or ("all" in lanes and "network" not in lanes):
            return min(one.us, other.us)
        if not all(lane.startswith("{") for lane in lanes):
            return 0.0
        loads = self._common_load(one.lane, other.lane)
        return max(
            (1e6 * min(a * one.wire_bytes, b * other.wire_bytes) / self._link_rate() for a, b in loads), default=0.0
        )

    def _common_load_uncached(self, one: str, other: str) -> frozenset[tuple[int, int]]:
        """How often each link that two permutes have in common is used by either."""
        mine, theirs = self._routes(one).links, self._routes(other).links
        return frozenset((mine[link], theirs[link]) for link in mine.keys() & theirs.keys())

    def neighbour(self, size: float, lane: str = "") -> Transfer:
        """`size` bytes over one link."""
        return Transfer(size, self._us(size / self._link_rate(), 0.0, 1, 0), lane, "neighbours")

    def exchange(self, kind: str, size: float, groups: str) -> Transfer:
        """A collective of `kind` over `groups` (as printed) whose operands hold `size` bytes."""
        span = self._span(groups)
        n, domains, twice = span.size, span.domains, 2 if kind == "all-reduce" else 1
        spread = {"all-gather": n - 1, "collective-broadcast": float(n > 1)}
        wire_bytes = twice * size * spread.get(kind, (n - 1) / n)
        lane = "network" if domains > 1 else "all" if self.target.torus else "switch"
        if n == 1:
            return Transfer(0.0, 0.0, lane, span.route)
        hops = math.ceil(math.log2(domains)) if kind == "all-reduce" else domains - 1
        links = span.reach
        if not self.target.torus:
            links = n // domains - 1 if kind == "all-reduce" else n - domains
        if kind.endswith("all-to-all") or kind == "collective-broadcast":
            links, hops = links if self.target.torus else 1, min(hops, 1)
        seconds = wire_bytes / span.rate
        if kind.endswith("all-to-all") and span.cut:
            seconds = size * span.cut / self._link_rate()
        network = network_bytes(kind, size, n // domains, domains) / self.target.network_bandwidth
        return Transfer(wire_bytes, self._us(seconds, network, twice * links, twice * hops), lane, span.route)

    def _between_slices(self, size: float, between: SliceExchange) -> Transfer:
        """An exchange of `size` bytes a device that goes over the network alone."""
        sent = network_bytes(between.kind, size, 1, between.slices)
        hops = 2 if between.kind == "all-reduce" else 1
        us = self._us(0.0, sent / self.target.network_bandwidth, 0, hops)
        return Transfer(sent, us, "network", f"network, {between.slices} slices")

    def _us(self, link_seconds: float, network_seconds: float, links: int, hops: int) -> float:
        """Microseconds by the protocol that is fastest for these times at full rate, and these steps."""
        us = 1e6 * max(link_seconds, network_seconds)
        return min(p.launch_us + links * p.link_us + hops * p.network_us + us / p.share for p in self.target.protocols)

    def _link_rate(self) -> float:
        return self.target.link_bandwidth * self.target.link_share

    def _links_rate(self) -> float:
        return self.target.num_links * self._link_rate()

    def _routes_uncached(self, pairs: str) -> "_Routes":
        links: collections.Counter = collections.Counter()
        longest, crosses = 0, False
        for source, destination in source_target_pairs(pairs):
            if max(source, destination) >= len(self.coords):
                continue
            (domain, *place), (other, *end) = self.coords[source], self.coords[destination]
            if domain != other:
                crosses = True
                continue
            ways = [(domain, *link) for link in route(place, end, self.target.torus, self.target.wraps)]
            links.update(ways)
            longest = max(longest, len(ways))
        return _Routes(longest, max(links.values(), default=0), crosses, links)

    def _span_uncached(self, groups: str) -> "_Span":
        """The slowest group."""
        spans = []
        for group in replica_groups(groups, len(self.coords)):
            places = [self.coords[i] for i in group if i < len(self.coords)]
            spans.append(self._reach(max(len(group), 1), places))
        return min(spans, key=lambda span: (-span.domains, span.rate, -span.size, -span.reach))

    def _reach(self, size: int, places: list[tuple[int, ...]]) -> "_Span":
        """The span of one group of devices at these places."""
        domains = len({place[0] for place in places}) or 1
        beyond = f"network, {domains} {'slices' if self.target.torus else 'hosts'}"
        if not self.target.torus or not places:
            return _Span(size, domains, self._links_rate(), route=beyond if domains > 1 else "switch")
        links, cut, reach, words = 0, 0.0, 0, []
        per_chip = len(places) / len(set(places))
        for dim, length in enumerate(self.target.torus, 1):
            extent = len({place[dim] for place in places})
            if extent > 1:
                ring = self.target.wraps[dim - 1] and extent == length
                links += 2 if ring else 1
                reach += extent // 2 if ring else extent - 1
                cut = max(cut, per_chip * extent / (8 if ring else 4))
                words.append(f"{'ring' if ring else 'line'} of {extent}")
        words += [beyond] if domains > 1 else []
        rate = links * self._link_rate() if links else self.target.hbm_bandwidth
        return _Span(size, domains, rate, cut, reach, " x ".join(words) or "same chip")


@dataclasses.dataclass(frozen=True)
class _Span:
    """How far a group of devices reaches: bytes/s into a device, an all-to-all's load on the fullest cut per operand
    byte, and links from end to end (of a torus)."""

    size: int
    domains: int
    rate: float
    cut: float = 0.0
    reach: int = 0
    route: str = ""


class _Routes(NamedTuple):
    """Of a permute: the longest route in hops, how many share the fullest link, whether any leaves its domain, and how many
    use each link."""

    hops: int
    load: int
    crosses: bool
    links: Mapping[tuple[int, ...], int]


def network_bytes(kind: str, size: float, each: int, domains: int) -> float:
    """Bytes that one device puts on the network, `each` devices of the group being in every domain."""
    if domains == 1:
        return 0.0
    return size * {
        "all-gather": domains - 1,
        "reduce-scatter": (domains - 1) / (each * domains),
        "all-reduce": 2 * (domains - 1) / (each * domains),
        "collective-broadcast": 1 / each,
        "collective-permute": 1,
    }.get(kind, (domains - 1) / domains)
