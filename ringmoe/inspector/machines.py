"""Named machines to compile for, none of which has to be present, and what each can do per second.

A name is a TPU slice ("v5p:4x4x4": generation, then chips along each dimension of its torus), slices
joined by the data-centre network ("2*v5p:4x4x4"), GPUs ("h200", "h200x8", "h200x64": behind one
switch as far as it reaches, the rest over the network), or "cpu". `target(name)` gives its figures;
`Target.mesh` gives devices that `jax.jit(f).lower(...)` compiles for. Figures are per device as JAX
counts devices: v4 and tpu7x have two devices on a chip.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ringmoe.inspector import topology
from ringmoe.inspector.chips import CHIPS, chip_of
from ringmoe.inspector.networks import NETWORKS, Protocol


@dataclasses.dataclass(frozen=True)
class Target:
    """A named machine: `num_devices` devices of one chip kind.

    Attributes:
      name: as given to `target()`.
      kind: "tpu", "gpu" or "cpu".
      chip: key of `CHIPS`.
      num_devices: as JAX counts them.
      torus: chips along each dimension of a slice; empty when a switch or one chip makes every pair
        of devices equal.
      wraps: per dimension of `torus`, whether its ends are joined.
      matmul_flops: FLOP/s of one device by HLO dtype (see `Chip`).
      vector_flops: elementwise operations/s of one device.
      hbm_bytes, hbm_bandwidth: bytes, and bytes/s, of one device.
      num_links, link_bandwidth: links of one chip, and bytes/s of one in one direction.
      domain: devices of one slice, or behind one switch; the network joins such domains.
      network_bandwidth: bytes/s of one device into that network, one way.
      link_share: the part of the links' bandwidth that collectives reach.
      protocols: ways to move data, with their latencies.
      sources: figure name -> where it comes from.
    """

    name: str
    kind: str
    chip: str
    num_devices: int
    torus: tuple[int, ...]
    wraps: tuple[bool, ...]
    matmul_flops: Mapping[str, float]
    vector_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    num_links: int
    link_bandwidth: float
    domain: int
    network_bandwidth: float
    link_share: float
    protocols: tuple[Protocol, ...]
    sources: Mapping[str, str]
    present: tuple[Any, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def devices(self) -> list[Any]:
        """Its devices, in the compiler's own order: those that are present, else compile-only ones.

        Raises:
          ValueError: the compiler does not know the name.
          ImportError: the package with the compiler is missing; the message has the pip command.
        """
        if self.present:
            return list(self.present)
        if self.kind == "cpu":
            return topology.cpus(self.num_devices)
        if self.kind == "gpu":
            return list(topology.gpus(self.chip, self.num_devices, self.domain))
        return list(topology.tpu(self.name.rpartition("*")[2], self.num_domains))

    @property
    def num_domains(self) -> int:
        """Slices, or groups of GPUs behind one switch."""
        return self.num_devices // self.domain

    def coords(self, devices: list[Any] | None = None) -> list[tuple[int, ...]]:
        """Place of each device: its domain, then its chip on the torus if there is one. Without
        `devices`, of all in the compiler's order."""
        if not self.torus:
            numbers = range(self.num_devices) if devices is None else [d.id for d in devices]
            return [(number // self.domain,) for number in numbers]
        devices = self.devices() if devices is None else devices
        return [(slice_of(d), *d.coords[: len(self.torus)]) for d in devices]

    def mesh(self, axes: Mapping[str, int] | None = None, axis_types: tuple[AxisType, ...] | None = None) -> Mesh:
        """A mesh over all its devices, neighbours on the wire being neighbours on the mesh where
        that is possible.

        Args:
          axes: size by axis name; None is one axis "devices" over all of them.
          axis_types: as for `jax.sharding.Mesh`; default Auto.

        Raises:
          ValueError: the sizes' product is not `num_devices`.
        """
        axes = {"devices": self.num_devices} if axes is None else dict(axes)
        if math.prod(axes.values()) != self.num_devices:
            raise ValueError(
                f"mesh {axes} has {math.prod(axes.values())} devices, expected {self.num_devices} "
                "for target "
                f"{self.name!r}: change an axis or the target"
            )
        return Mesh(self._grid(tuple(axes.values())), tuple(axes), axis_types=axis_types)

    def _grid(self, shape: tuple[int, ...]) -> np.ndarray:
        """Devices in this shape, domains along the outermost dims that divide into them."""
        outer, rest = [], self.num_domains
        for size in shape:
            outer.append(math.gcd(size, rest))
            rest //= outer[-1]
        inner = [size // part for size, part in zip(shape, outer, strict=True)]
        devices = self.devices()
        blocks = [self._block(inner, devices[i : i + self.domain]) for i in range(0, len(devices), self.domain)]
        grid = np.stack(blocks).reshape(*outer, *inner)
        turn = [
            axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair
        ]
        return grid.transpose(turn).reshape(shape)

    def _block(self, shape: list[int], devices: list[Any]) -> np.ndarray:
        """Devices of one domain in this shape."""
        if self.kind == "tpu" and (CHIPS[self.chip].devices_per_chip == 1 or self.chip == "tpu7x"):
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        # mesh_utils refuses v4's two devices a chip; behind a switch any order is as good.
        return np.array(devices).reshape(shape)


def targets() -> list[str]:
    """Names that `target=` accepts, by chip. libtpu accepts further TPU shapes; `target()` passes
    those on to it."""
    return [
        f"{chip}:{shape}" if spec.kind == "tpu" else chip + shape
        for chip, spec in CHIPS.items()
        for shape in spec.shapes
    ]


def target(name: str) -> Target:
    """The machine of that name.

    Raises:
      ValueError: unknown name; GPUs that don't fill their hosts.
    """
    found = re.fullmatch(
        r"(?:([1-9]\d{0,2})\*)?(\w+):([1-9]\d{0,2}(?:x[1-9]\d{0,2}){1,2})|([a-z]+?\d*)(?:x([1-9]\d{0,4}))?", name
    )
    chip = (found.group(2) or found.group(4)) if found else ""
    if not found or chip not in CHIPS or (CHIPS[chip].kind == "tpu") != bool(found.group(2)):
        chips = ", ".join(f"{c}:{s.shapes[3]}" if s.kind == "tpu" else c + s.shapes[-1] for c, s in CHIPS.items())
        raise ValueError(
            f"target {name!r}, expected one such as {chips}, or 2*v5p:4x4x4 for two slices; `ringmoe targets` lists them"
        )
    if found.group(2):
        torus = tuple(int(n) for n in found.group(3).split("x"))
        size = math.prod(torus) * CHIPS[chip].devices_per_chip
        return _make(name, chip, int(found.group(1) or 1) * size, size, torus)
    count = int(found.group(5) or 1)
    domain = min(count, NETWORKS[chip].domain or count)
    if count % domain:
        raise ValueError(
            f"target {name!r} has {count} GPUs, expected at most {domain} or a multiple of it: "
            f"{domain} share a switch, and only whole groups are joined"
        )
    return _make(name, chip, count, domain, ())


def present(devices: list[Any]) -> Target:
    """The target that these devices of the running process are, figures included.

    Raises:
      ValueError: their kind is not in `CHIPS`.
    """
    kind = devices[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        raise ValueError(
            f"device kind {kind!r}, expected one of "
            f"{[k for s in CHIPS.values() for k in s.device_kinds]}: "
            "pass target= with the name of the closest machine"
        )
    if CHIPS[chip].kind != "tpu":
        domain = min(len(devices), NETWORKS[chip].domain or len(devices))
        name = f"{chip}x{len(devices)}" if len(devices) > 1 else chip
        return dataclasses.replace(
            _make(name, chip, len(devices), math.gcd(len(devices), domain), ()), present=tuple(devices)
        )
    torus = tuple(int(n) for n in np.max([d.coords for d in devices], axis=0) + 1)
    torus = torus[:2] if CHIPS[chip].num_links == 4 else torus
    slices = len({slice_of(d) for d in devices})
    name = f"{f'{slices}*' if slices > 1 else ''}{chip}:{'x'.join(map(str, torus))}"
    return dataclasses.replace(_make(name, chip, len(devices), len(devices) // slices, torus), present=tuple(devices))


def slice_of(device: Any) -> int:
    """Number of the slice that a TPU device is on; one that stands alone has none."""
    return getattr(device, "slice_index", 0)


def _make(name: str, chip: str, num_devices: int, domain: int, torus: tuple[int, ...]) -> Target:
    spec, network = CHIPS[chip], NETWORKS[chip]
    share = 1 / spec.devices_per_chip
    # 3D generations join the ends of every dimension made of whole 4x4x4 cubes; 2D ones only those
    # of a full pod.
    wraps = tuple(n == 16 if spec.num_links == 4 else n % 4 == 0 for n in torus)
    return Target(
        name,
        spec.kind,
        chip,
        num_devices,
        torus,
        wraps,
        MappingProxyType({dtype: rate * share for dtype, rate in spec.matmul_flops.items()}),
        spec.vector_flops * share,
        int(spec.hbm_bytes * share),
        spec.hbm_bandwidth * share,
        spec.num_links,
        spec.link_bandwidth,
        domain,
        network.bandwidth * share,
        network.link_share,
        network.protocols,
        MappingProxyType({**spec.sources, **network.sources}),
    )
