"""Devices that only compile, from the TPU or GPU compiler of a machine that need not be present.

libtpu ends the process when it meets a shape that cannot be. So a shape that isn't known to work is
tried first in a process of its own, `python -m ringmoe.inspector.topology v5e:3x5 1`.
"""

import functools
import importlib.resources
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringmoe.inspector.chips import CHIPS

_PIP = "pip install 'ringmoe[targets]'"
_PATIENCE = 60  # seconds for a shape to prove itself; the largest that work take half of that


@functools.cache
def tpu(shape: str, slices: int) -> list[Any]:
    """Devices of `slices` slices of this shape ("v5p:4x4x4"), slice by slice.

    Raises:
      ValueError: the compiler refuses the shape, or dies of it.
      ImportError: libtpu is missing; the message has the pip command.
    """
    _require("tpu")
    chip, _, sizes = shape.partition(":")
    if sizes not in CHIPS[chip].shapes and (reason := _refusal(shape, slices)):
        names = ", ".join(f"{chip}:{sizes}" for sizes in CHIPS[chip].shapes)
        raise ValueError(f"target {shape!r} is refused by its compiler ({reason}), expected a shape such as {names}")
    return _load_tpu(shape, slices)


@functools.cache
def gpus(chip: str, count: int, domain: int) -> list[Any]:
    """`count` GPUs of which every `domain` share a switch.

    Raises:
      ImportError: the CUDA compiler is missing; the message has the pip command.
    """
    _require("gpu")
    _find_ptxas()
    spec = importlib.resources.files("ringmoe").joinpath("inspector", "target_specs", f"{chip}.txtpb").read_text()
    # XLA's string is domains x hosts of each x GPUs of each host; a rack of 72 counts as one host.
    shape = f"{count // domain}x1x{domain}"
    return _describe(f"{chip}x{count}", platform="cuda", topology_name=chip, target_config=spec, topology=shape)


def cpus(count: int) -> list[Any]:
    """CPU devices of this process.

    Raises:
      ValueError: there are fewer.
    """
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"the target needs {count} CPU devices, this process has {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before jax starts"
        )
    return devices[:count]


def _load_tpu(shape: str, slices: int) -> list[Any]:
    # libtpu asks the cloud's metadata server what machine this is, and lets one process a machine
    # load it, for the sake of devices; a topology opens none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # of a host that there isn't
    # A slice smaller than a host's 2x2 chips has to say so, to libtpu before 0.0.50.
    x, y = (min(2, int(n)) for n in shape.partition(":")[2].split("x")[:2])
    options: dict[str, Any] = {} if (x, y) == (2, 2) else {"chips_per_host_bounds": (x, y, 1)}
    if slices > 1:
        options["num_slices"] = slices
    return _describe(shape, platform="tpu", topology_name=shape, **options)


def _describe(shape: str, **options: Any) -> list[Any]:
    # The CUDA plugin refuses to load where cuDNN is missing, which only running a program needs.
    # JAX loads all plugins at once, so this holds for whichever target comes first.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except NotImplementedError as error:
        raise RuntimeError(
            f"target {shape!r}: JAX started before it could load its {options['platform'].upper()} compiler; set "
            "JAX_PLATFORMS=cpu or call ringmoe.inspect before anything asks for jax.devices()"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        error.add_note(f"while loading the compiler for target {shape!r}")
        raise


@functools.cache
def _refusal(shape: str, slices: int) -> str:
    """Why the compiler does not take a shape, found out by a process that may die of it; "" if it does."""
    root = pathlib.Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ringmoe.inspector.topology", shape, str(slices)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_PATIENCE} s"
    if done.returncode == 0:
        return ""
    if done.returncode > 0:  # an exception; its message is the last line that is not a note
        found = [line for line in done.stderr.splitlines() if line.startswith("jax.errors")]
        return found[-1].partition(": ")[2] if found else f"exit status {done.returncode}"
    failed = [line.partition("Check failed: ")[2] for line in done.stderr.splitlines() if "Check failed: " in line]
    return f"it died: {failed[-1].strip() if failed else f'signal {-done.returncode}'}"


def _try(shape: str, slices: int) -> None:
    """Compiles a sum over all devices of such a machine."""
    mesh = Mesh(np.array(_load_tpu(shape, slices)), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    jax.jit(lambda a: a.sum()).lower(jax.ShapeDtypeStruct((8 * mesh.size, 128), "float32", sharding=sharding)).compile()


def _find_ptxas() -> None:
    """Puts the ptxas of the package nvidia-cuda-nvcc on PATH when no other is."""
    if shutil.which("ptxas") is None:
        spec = importlib.util.find_spec("nvidia")
        for root in spec.submodule_search_locations or () if spec else ():
            for folder in sorted(pathlib.Path(root).glob("*/bin/ptxas")):
                os.environ["PATH"] = f"{folder.parent}{os.pathsep}{os.environ.get('PATH', '')}"


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


if __name__ == "__main__":
    _try(sys.argv[1], int(sys.argv[2]))
