"""Named machines to compile for, none of which has to be present, and what each can do per second.

A name is a TPU slice ("v5p:4x4x4": generation, then chips along each dimension of its torus), a GPU
host ("h200x8"), one GPU ("h200"), or "cpu". `target(name)` gives its figures; `Target.mesh` gives
devices that `jax.jit(f).lower(...)` compiles for. Figures are per device as JAX counts devices: v4
and tpu7x have two devices on a chip.
"""

import dataclasses
import functools
import importlib.resources
import importlib.util
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from ringmoe.inspector.chips import CHIPS

_PIP = "pip install 'ringmoe[targets]'"


@dataclasses.dataclass(frozen=True)
class Target:
    """A named machine: `num_devices` devices of one chip kind.

    Attributes:
      name: as given to `target()`.
      kind: "tpu", "gpu" or "cpu".
      chip: key of `CHIPS`.
      num_devices: as JAX counts them.
      torus: chips along each dimension; empty when a switch or one chip makes every pair of devices
        equal.
      wraps: per dimension of `torus`, whether its ends are joined.
      matmul_flops: FLOP/s of one device by HLO dtype (see `Chip`).
      vector_flops: elementwise operations/s of one device.
      hbm_bytes, hbm_bandwidth: bytes, and bytes/s, of one device.
      num_links, link_bandwidth: links of one chip, and bytes/s of one in one direction.
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
    sources: Mapping[str, str]
    present: tuple[Any, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def devices(self) -> list[Any]:
        """Its devices, in the compiler's own order: those that are present, else compile-only ones.

        Raises:
          ValueError: the compiler does not know the name.
          ImportError: the package with the compiler is missing; the message has the pip command.
        """
        return list(self.present or _topology(self.name).devices)

    def coords(self, devices: list[Any]) -> list[tuple[int, ...]]:
        """Place of each device on the torus; devices of one chip share it. Without a torus, () for
        all."""
        return [tuple(d.coords[: len(self.torus)]) if self.torus else () for d in devices]

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
        shape, devices = tuple(axes.values()), self.devices()
        if self.kind == "tpu" and (CHIPS[self.chip].devices_per_chip == 1 or self.chip == "tpu7x"):
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            # mesh_utils refuses v4's two devices a chip; behind a switch any order is as good.
            grid = np.array(devices).reshape(shape)
        return Mesh(grid, tuple(axes), axis_types=axis_types)


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
      ValueError: unknown name.
    """
    found = re.fullmatch(r"(\w+):(\d{1,3}(?:x\d{1,3}){1,2})|([a-z]+?\d*)(?:x(\d{1,4}))?", name)
    chip = (found.group(1) or found.group(3)) if found else ""
    if not found or chip not in CHIPS or (CHIPS[chip].kind == "tpu") != bool(found.group(1)):
        chips = ", ".join(f"{c}:{s.shapes[3]}" if s.kind == "tpu" else c + s.shapes[-1] for c, s in CHIPS.items())
        raise ValueError(f"target {name!r}, expected one such as {chips}; `ringmoe targets` lists them")
    if found.group(1):
        torus = tuple(int(n) for n in found.group(2).split("x"))
        return _make(name, chip, math.prod(torus) * CHIPS[chip].devices_per_chip, torus)
    return _make(name, chip, int(found.group(4) or 1), ())


def present(devices: list[Any]) -> Target:
    """The target that these devices of the running process are, figures included.

    Raises:
      ValueError: their kind is not in `CHIPS`.
    """
    kind = devices[0].device_kind
    # The longest match: "TPU v5 lite" also begins with "TPU v5".
    names = [(len(k), chip) for chip, spec in CHIPS.items() for k in spec.device_kinds if kind.startswith(k)]
    if not names:
        raise ValueError(
            f"device kind {kind!r}, expected one of "
            f"{[k for s in CHIPS.values() for k in s.device_kinds]}: "
            "pass target= with the name of the closest machine"
        )
    chip = max(names)[1]
    torus: tuple[int, ...] = ()
    if CHIPS[chip].kind == "tpu":
        torus = tuple(int(n) for n in np.max([d.coords for d in devices], axis=0) + 1)
        torus = torus[:2] if CHIPS[chip].num_links == 4 else torus
    name = f"{chip}:{'x'.join(map(str, torus))}" if torus else f"{chip}x{len(devices)}" if len(devices) > 1 else chip
    return dataclasses.replace(_make(name, chip, len(devices), torus), present=tuple(devices))


def _make(name: str, chip: str, num_devices: int, torus: tuple[int, ...]) -> Target:
    spec = CHIPS[chip]
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
        spec.sources,
    )


@functools.cache
def _topology(name: str) -> Any:
    """The compile-only topology of a target's name."""
    machine = target(name)
    chip, kind = machine.chip, machine.kind
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < machine.num_devices:
            raise ValueError(
                f"target {name!r} needs {machine.num_devices} CPU devices, this process has "
                f"{len(devices)}: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={machine.num_devices} before "
                "jax starts"
            )
        return _Present(devices[: machine.num_devices])
    _require(kind)
    # The CUDA plugin refuses to load where cuDNN is missing, which only running a program needs.
    # JAX loads all plugins at once, so this holds for whichever target comes first.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        if kind == "tpu":
            # libtpu asks the cloud's metadata server what machine this is, and lets one process a
            # machine load it, for the sake of devices; a topology opens none.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # of a host that there isn't
            # A slice smaller than a host's 2x2 chips has to say so, to libtpu before 0.0.50.
            host = (min(2, machine.torus[0]), min(2, machine.torus[1]), 1)
            return topologies.get_topology_desc(
                platform="tpu",
                topology_name=name,
                **({} if host == (2, 2, 1) else {"chips_per_host_bounds": host}),
            )
        _find_ptxas()
        spec = importlib.resources.files("ringmoe").joinpath("inspector", "target_specs", f"{chip}.txtpb").read_text()
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            target_config=spec,
            topology=f"1x1x{machine.num_devices}",
        )
    except NotImplementedError as error:
        raise RuntimeError(
            f"target {name!r}: JAX started before it could load its {kind.upper()} compiler; set "
            "JAX_PLATFORMS=cpu or call ringmoe.inspect before anything asks for jax.devices()"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            error.add_note(f"while loading the compiler for target {name!r}")
            raise
        raise ValueError(
            f"target {name!r} is refused by its compiler ({str(error).splitlines()[0]}); "
            "`ringmoe targets` lists names that work"
        ) from error


def _find_ptxas() -> None:
    """Puts the ptxas of the package nvidia-cuda-nvcc on PATH when no other is."""
    if shutil.which("ptxas") is None:
        spec = importlib.util.find_spec("nvidia")
        for root in spec.submodule_search_locations or () if spec else ():
            for folder in sorted(pathlib.Path(root).glob("*/bin/ptxas")):
                os.environ["PATH"] = f"{folder.parent}{os.pathsep}{os.environ.get('PATH', '')}"


@dataclasses.dataclass(frozen=True)
class _Present:
    """Stands where a topology is expected, for devices that need no compile-only client."""

    devices: list[Any]


def _require(kind: str) -> None:
    """Raises ImportError when the package that holds the compiler for `kind` is not installed."""
    package, module = ("libtpu", "libtpu") if kind == "tpu" else ("jax-cuda13-plugin", "jax_plugins.xla_cuda13")
    try:
        missing = importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise ImportError(
            f"compiling for a {kind.upper()} that is not present needs the package "
            f"{package!r}, which is not installed: {_PIP}"
        )
