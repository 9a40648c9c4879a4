"""How long work and exchanges take on a machine: the model by which plans choose, in microseconds.

    work        = max(FLOPs / the matmul rate, bytes / the memory's rate)
    all-to-all  = B L / (4 * links' rate),  half of it where the dim is a ring;  behind a switch B (n - 1) / (n * links' rate)

for n devices that have B bytes for all of them, on a torus as compact as n allows, whose longest dim is L: half of all bytes
cross the cut through its middle. It is made to tell which of two is faster: a mesh axis may lie along one dim of the torus,
which nothing here can know. Figures of the chips are those of `inspector.chips`, and the formulas those of `inspector.wire`,
which knows where the devices are.
"""

import dataclasses
import functools
import math

from ringmoe.inspector.chips import CHIPS, chip_of

DEFAULT = "v5p"  # where a mesh doesn't tell its devices
DTYPES = {1: "f8", 2: "bf16", 4: "f32", 8: "f32_highest"}
LAUNCH = {"tpu": 5.0, "gpu": 10.0, "cpu": 1000.0}  # of a piece: matmuls that start and end, a transfer
# Devices up to which an all-to-all can be under way during other work, and up to which a TPU has a ragged one, where not always
# (libtpu 0.0.50: "Async all-to-all not supported on limited ICI", and so the ragged one: errors if they are asked for).
ASYNCHRONOUS = {"v5e": 16, "cpu": 0}
SLICE = {"v5e": 256}  # devices of the largest slice, where that matters: remote DMA reaches no other one


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device: FLOPs, bytes of memory, and bytes of one link, one way, in a microsecond; or, where `dims` is 0, of all links
    to a switch."""

    kind: str
    flops: float
    memory: float
    link: float
    dims: int
    per_chip: int
    launch: float
    asynchronous: int
    slice: int

    def is_limited(self, devices: int) -> bool:
        """Whether a TPU of so many devices has neither an all-to-all during other work nor a ragged one."""
        return self.dims > 0 and devices > self.asynchronous

    def work(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.memory)

    def all_to_all(self, devices: int, sent: float) -> float:
        """Of `sent` bytes that each device has, an equal share for every one."""
        if not self.dims:
            return sent * (devices - 1) / devices / self.link
        longest = _longest(-(-devices // self.per_chip), self.dims)
        closed = longest % 4 == 0 if self.dims == 3 else longest == 16
        return sent * self.per_chip * longest / (8 if closed else 4) / self.link


@functools.cache
def machine(device_kind: str, itemsize: int = 2) -> Machine:
    """What JAX calls `device_kind`, for matmuls of numbers of `itemsize` bytes; unknown ones are taken for DEFAULT."""
    name = chip_of(device_kind) or DEFAULT
    chip, per_us = CHIPS[name], 1e-6
    torus = chip.kind == "tpu"
    return Machine(
        name,
        chip.matmul_flops.get(DTYPES[itemsize], chip.matmul_flops["f32"]) / chip.devices_per_chip * per_us,
        chip.hbm_bandwidth / chip.devices_per_chip * per_us,
        chip.link_bandwidth * (1 if torus else chip.num_links) * per_us,
        chip.num_links // 2 if torus else 0,
        chip.devices_per_chip,
        LAUNCH[chip.kind],
        ASYNCHRONOUS.get(name, 2**31),
        SLICE.get(name, 2**31),
    )


def family(device_kind: str) -> str:
    """What its chip is: "tpu", "gpu" or "cpu"; "" for what isn't known."""
    name = chip_of(device_kind)
    return "" if name is None else CHIPS[name].kind


def _longest(chips: int, dims: int) -> int:
    """The longest dim of the most compact torus of so many chips: its dims are products of their prime factors."""
    shape, left = [1] * dims, chips
    for factor in sorted(_primes(left), reverse=True):
        shape[shape.index(min(shape))] *= factor
    return max(shape)


def _primes(n: int) -> list[int]:
    for p in range(2, math.isqrt(n) + 1):
        if n % p == 0:
            return [p, *_primes(n // p)]
    return [n] if n > 1 else []
