"""How long work and exchanges take on a machine: the model by which plans choose, in microseconds.

    work            = max(FLOPs / the matmul rate, bytes / the memory's rate)
    all-to-all      = B L / (4 * links' rate),  half of it where the dim is a ring;  to a switch B (n - 1) / (n * links' rate)
    all-gather      = B (n - 1) / (rate of all links that the devices span)
    reduce-scatter  = B (n - 1) / n / that;  all-reduce twice as much
    to a neighbour  = B / a link's rate
    to the mirror   = B D L / (2 * link's rate),  half of it where the dim is a ring, for D devices of a chip
    a network       = what `inspector.wire` says goes over it / its rate, after the links on TPUs, while they are busy on GPUs

for n devices that have B bytes for all of them, on a torus as compact as n allows, whose longest dim is L: half of all bytes
cross the cut through its middle. It is made to tell which of two is faster: a mesh axis may lie along one dim of the torus,
which nothing here can know. Figures of the chips are those of `inspector.chips` and `inspector.networks`, and the formulas
those of `inspector.wire`, which knows where the devices are.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from ringmoe.inspector.chips import CHIPS, chip_of
from ringmoe.inspector.networks import NETWORKS, Protocol
from ringmoe.inspector.wire import network_bytes

DEFAULT = "v5p"  # where a mesh doesn't tell its devices
DTYPES = {1: "f8", 2: "bf16", 4: "f32", 8: "f32_highest"}
LAUNCH = {"tpu": 5.0, "gpu": 10.0, "cpu": 1000.0}  # of a piece: matmuls that start and end, a transfer
# Devices up to which an all-to-all can be under way during other work, and up to which a TPU has a ragged one, where not always
# (libtpu 0.0.50: "Async all-to-all not supported on limited ICI", and so the ragged one: errors if they are asked for).
ASYNCHRONOUS = {"v5e": 16, "cpu": 0}
CIRCLE = 16  # devices up to which a mesh may have them in a circle: `ring_mesh`
SLICE = {"v5e": 256}  # devices of the largest slice, where that matters: remote DMA reaches no other one


class Span(NamedTuple):
    """So many devices, on so many slices of TPUs or hosts of GPUs, which a network joins."""

    devices: int
    domains: int = 1

    @property
    def within(self) -> int:
        """Of one domain."""
        return -(-self.devices // self.domains)


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device: FLOPs, bytes of memory, and bytes of one link, one way, in a microsecond; or, where `dims` is 0, of all links
    to a switch, and of its share of the network; FLOPs of its vector units; and bytes of memory that there are."""

    kind: str
    flops: float
    vector: float
    memory: float
    capacity: float
    link: float
    dims: int
    per_chip: int
    launch: float
    asynchronous: int
    slice: int
    behind_switch: int
    network: float
    protocols: tuple[Protocol, ...]

    @property
    def is_gpu(self) -> bool:
        return CHIPS[self.kind].kind == "gpu"

    @property
    def block(self) -> int:
        """Queries of a pair of blocks there, and keys: of a pair that a mask cuts all is computed."""
        return 128 if self.is_gpu else 512

    def is_limited(self, devices: int) -> bool:
        """Whether a TPU of so many devices has neither an all-to-all during other work nor a ragged one."""
        return self.dims > 0 and devices > self.asynchronous

    def reaches(self, devices: int, slices: int) -> bool:
        """Whether remote DMA goes from each of a mesh's devices, on so many slices, to every other."""
        return self.dims > 0 and slices == 1 and devices <= self.slice

    def work(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.memory)

    def all_to_all(self, devices: int, sent: float) -> float:
        """Of `sent` bytes that each device has, an equal share for every one."""
        if not self.dims:
            return sent * (devices - 1) / devices / self.link
        longest = max(self._torus(devices))
        return sent * self.per_chip * longest / (8 if self.is_ring(longest) else 4) / self.link

    def steps(self, devices: int) -> int:
        """Links from end to end."""
        if not self.dims:
            return devices - 1
        return sum(n // 2 if self.is_ring(n) else n - 1 for n in self._torus(devices))

    def alone(self, us: float, steps: int, networked: float = 0.0, hops: int = 0) -> float:
        """How long what takes so long at the full rate takes with all that comes with it, over so many links; and so many bytes
        of each device over the network, in so many hops."""
        beyond = networked / self.network
        us = us + beyond if self.dims else max(us, beyond)
        return min(p.launch_us + steps * p.link_us + hops * p.network_us + us / p.share for p in self.protocols)

    def takes(self, kind: str, span: Span, sent: float) -> float:
        """An "all-gather", "reduce-scatter", "all-reduce" or "all-to-all" of `sent` bytes of each device."""
        rates = {"all-gather": self.all_gather, "reduce-scatter": self.reduce_scatter, "all-reduce": self.all_reduce}
        beyond, twice = span.domains - 1, 2 if kind == "all-reduce" else 1
        around = span.domains if kind in ("all-gather", "reduce-scatter") and not self.dims else 1
        steps, hops = twice * around * self.steps(span.within), twice * beyond
        if kind == "all-to-all":
            steps, hops = steps if self.dims else 1, min(beyond, 1)
        here = sent * span.domains if kind == "all-gather" else sent  # what came over the network is gathered too
        us = rates.get(kind, self.all_to_all)(span.within, here) if span.within > 1 else 0.0
        return self.alone(us, steps, network_bytes(kind, sent, span.within, span.domains), hops)

    def domains(self, devices: int, slices: int) -> int:
        """Slices that a mesh of so many devices is over, or hosts of GPUs."""
        return -(-devices // self.behind_switch) if self.behind_switch else slices

    def all_gather(self, devices: int, sent: float) -> float:
        """Of `sent` bytes of each device, to all."""
        rings = [2 if self.is_ring(n) else 1 for n in self._torus(devices) if n > 1] if self.dims else []
        return sent * (devices - 1) / (self.link * max(1, sum(rings)))

    def reduce_scatter(self, devices: int, sent: float) -> float:
        """Of sums of `sent` bytes of each device, an equal share for every one: which XLA cuts out of whole sums on a torus of
        three dims."""
        return self.all_gather(devices, sent / devices) * (2 if self.dims == 3 else 1)

    def all_reduce(self, devices: int, sent: float) -> float:
        """Of sums of `sent` bytes of each device, for all."""
        return 2 * self.all_gather(devices, sent / devices)

    def apart(self, devices: int, far: int) -> int:
        """Links to the device that is `far` on, of so many in rows along the longest dim; as many share each of them, and all
        devices of a chip. The one that is half of all on is at the other side, in whatever order; of few devices, whose order
        may be a circle (`ring_mesh`), at the other end."""
        chips, longest = -(-far // self.per_chip), max(self._torus(devices)) if self.dims else 1
        sharing = self.per_chip if self.dims and far >= self.per_chip else 1
        if 2 * far == devices and longest > 2:
            return longest // (1 if devices <= CIRCLE and not self.is_ring(longest) else 2) * sharing
        for length in sorted(self._torus(devices), reverse=True) if self.dims else (chips,):
            if chips % length:
                return chips * sharing
            chips //= length
        return sharing

    def mirror(self, devices: int, sent: float) -> float:
        """Of `sent` bytes to the device at the other end."""
        longest, sharing = (max(self._torus(devices)), self.per_chip) if self.dims else (1, 1)
        return sent * sharing * max(1, longest / (4 if self.is_ring(longest) else 2)) / self.link

    def _torus(self, devices: int) -> tuple[int, ...]:
        return _compact(-(-devices // self.per_chip), self.dims)

    def is_ring(self, length: int) -> bool:
        return length % 4 == 0 if self.dims == 3 else length == 16


@functools.cache
def machine(device_kind: str, itemsize: int = 2) -> Machine:
    """What JAX calls `device_kind`, for matmuls of numbers of `itemsize` bytes, of 2 at least: those of 1 are widened for them.
    Unknown ones are taken for DEFAULT."""
    name = chip_of(device_kind) or DEFAULT
    chip, per_us = CHIPS[name], 1e-6
    torus = chip.kind == "tpu"
    return Machine(
        name,
        chip.matmul_flops.get(DTYPES[max(2, itemsize)], chip.matmul_flops["f32"]) / chip.devices_per_chip * per_us,
        chip.vector_flops / chip.devices_per_chip * per_us,
        chip.hbm_bandwidth / chip.devices_per_chip * per_us,
        chip.hbm_bytes / chip.devices_per_chip,
        chip.link_bandwidth * NETWORKS[name].link_share * (1 if torus else chip.num_links) * per_us,
        chip.num_links // 2 if torus else 0,
        chip.devices_per_chip,
        LAUNCH[chip.kind],
        ASYNCHRONOUS.get(name, 2**31),
        SLICE.get(name, 2**31),
        NETWORKS[name].domain,
        NETWORKS[name].bandwidth / chip.devices_per_chip * per_us,
        NETWORKS[name].protocols,
    )


def family(device_kind: str) -> str:
    """What its chip is: "tpu", "gpu" or "cpu"; "" for what isn't known."""
    name = chip_of(device_kind)
    return "" if name is None else CHIPS[name].kind


@functools.cache
def _compact(chips: int, dims: int) -> tuple[int, ...]:
    """The most compact torus of so many chips: its dims are products of their prime factors."""
    shape, left = [1] * dims, chips
    for factor in sorted(_primes(left), reverse=True):
        shape[shape.index(min(shape))] *= factor
    return tuple(shape)


def _primes(n: int) -> list[int]:
    for p in range(2, math.isqrt(n) + 1):
        if n % p == 0:
            return [p, *_primes(n // p)]
    return [n] if n > 1 else []
