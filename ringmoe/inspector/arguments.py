"""What the words of the command line mean: programs, meshes, arguments, limits."""

import argparse
import importlib
import inspect as python_inspect
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringmoe.inspector.machines import Target

_DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "s8": "int8",
    "s32": "int32",
    "u8": "uint8",
    "u32": "uint32",
    "pred": "bool",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}
_SECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6}
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def function(name: str) -> Any:
    """The function that MODULE:FUNCTION names."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"PROGRAM {name!r} is no file, expected one of HLO text, or MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"PROGRAM {name!r} cannot be loaded ({error}), expected MODULE:FUNCTION importable from here"
        ) from error
    finally:
        sys.path.pop(0)
    return found


def program(name: str, specs: list[str], mesh: Mesh) -> tuple[Any, ...]:
    """The function to inspect and its arguments, from MODULE:FUNCTION and those of --arg."""
    found = function(name)
    if specs:
        return (found, *(argument(spec, mesh) for spec in specs))
    made = found(mesh) if python_inspect.signature(found).parameters else found()
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise ValueError(
            f"{name} returned a {type(made).__name__}, expected a tuple of the function to "
            "inspect and its arguments; or give the arguments with --arg"
        )
    return made


def argument(spec: str, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """bf16[8,4096]@data,seq -> a ShapeDtypeStruct sharded over the mesh."""
    found = re.fullmatch(r"(\w+)\[([\d,]*)\](?:@([\w,+]*))?", spec)
    if not found or found.group(1) not in _DTYPES:
        raise ValueError(
            f"--arg {spec!r}, expected DTYPE[DIMS]@AXES such as bf16[8,4096,128]@data,seq, with a "
            f"dtype of {', '.join(_DTYPES)}"
        )
    shape = tuple(int(dim) for dim in found.group(2).split(",") if dim)
    axes = [tuple(axis for axis in part.split("+") if axis) for part in (found.group(3) or "").split(",")]
    unknown = {axis for part in axes for axis in part} - set(mesh.axis_names)
    if unknown:
        raise ValueError(f"--arg {spec!r} names the axes {sorted(unknown)}, the mesh has {list(mesh.axis_names)}")
    return jax.ShapeDtypeStruct(
        shape,
        _DTYPES[found.group(1)],
        sharding=NamedSharding(mesh, PartitionSpec(*(part or None for part in axes))),
    )


def mesh_axes(text: str | None, machine: Target) -> dict[str, int] | None:
    """data=2,seq=* -> axis sizes; * is what the others leave of the target's devices."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not axis or not (size.isdecimal() or size == "*") for axis, _, size in pairs) or text.count("*") > 1:
        raise ValueError(f"--mesh {text!r}, expected AXIS=SIZE,... such as data=2,seq=32, with at most one size *")
    sizes = {axis: int(size) if size != "*" else 0 for axis, _, size in pairs}
    rest = machine.num_devices // max(1, math.prod(size for size in sizes.values() if size))
    return {axis: size or rest for axis, size in sizes.items()}


def percent(text: str) -> float:
    """5% or 0.05 -> 0.05."""
    value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a part such as 5% or 0.05")
    return value


def duration(text: str) -> float:
    """12ms -> microseconds."""
    return _with_unit(text, _SECONDS, "a time such as 12ms, 800us or 1.5s")


def memory(text: str) -> Callable[[int], float]:
    """90% or 28GiB -> the limit in bytes, given a device's memory."""
    if text.endswith("%"):
        part = percent(text)
        return lambda hbm_bytes: part * hbm_bytes
    size = _with_unit(text, _BYTES, "a size such as 28GiB, or a part of the device's memory such as 90%")
    return lambda hbm_bytes: size


def positive(text: str) -> float:
    """A number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 such as 1.2e15")
    return value


def gib(text: str) -> float:
    """GiB for a process that has to hold a compiler."""
    value = positive(text)
    if value < 1 or not hasattr(resource, "prlimit"):
        raise argparse.ArgumentTypeError(
            f"{text}, expected 1 or more, on Linux: compilers need half of that for themselves"
        )
    return value


def _number(text: str) -> float:
    """A number, or nan for any other text, which no range holds."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _with_unit(text: str, units: dict[str, float] | dict[str, int], expected: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if not found or found.group(2) not in units:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return float(found.group(1)) * units[found.group(2)]
