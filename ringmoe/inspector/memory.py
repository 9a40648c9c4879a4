"""What a program needs of a device's memory, and what stands in the way when that is too much.

XLA:TPU does not finish a program whose peak exceeds the device's memory. Asked to dump what it has, it writes the
schedule all the same, and what is alive at the peak. XLA:GPU and XLA:CPU compile any size.
"""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from typing import Any

import jax

from ringmoe.inspector.reader import Module, Shape

_SHOWN = 20  # buffers that are kept
_AVAILABLE = re.compile(r"(?:exceeds available HBM \(|Used \S+ of )([\d.]+)([KMGT])", re.IGNORECASE)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOTAL = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)
_BUFFER = re.compile(r"\s+(\S+)\{([\d,]*)\}: (\d+) bytes")
_REPORT = "after_optimizations-memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that is alive when most memory is used: its size, the instruction that makes it, its shape, and where
    that is in the JAX code."""

    bytes: int
    name: str
    shape: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Oversize:
    """A program that does not fit: bytes it needs at its peak, bytes there are, and the largest buffers at the peak."""

    needed_bytes: int
    available_bytes: int
    buffers: tuple[Buffer, ...] = ()

    @property
    def excess_bytes(self) -> int:
        """How much too much."""
        return max(0, self.needed_bytes - self.available_bytes)


@dataclasses.dataclass(frozen=True)
class Dump:
    """What the compiler writes of a program whether it fits or not: scheduled text, bytes at the peak, and the buffers
    that are alive then, as (instruction, index of the result, bytes)."""

    text: str
    peak_bytes: int
    alive: tuple[tuple[str, str, int], ...]

    def oversize(self, module: Module, available: int) -> Oversize:
        """Its buffers by shape and place in the code; `module` is the parsed text."""
        instructions = {i.name: i for c in module.computations.values() for i in c.instructions}
        buffers = []
        for name, index, size in self.alive:
            found = instructions.get(name)
            shape = _leaf(found.shape, index) if found else ""
            buffers.append(Buffer(size, name, shape, found.op_name if found else ""))
        return Oversize(self.peak_bytes, available, tuple(buffers))


def lacks_memory(error: Exception) -> bool:
    """Whether a compiler gave up for want of the device's memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text and "hbm" in text.lower()


def available(error: Exception) -> int | None:
    """Bytes that the compiler's message says there are."""
    found = _AVAILABLE.search(str(error))
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()]) if found else None


def dump(lowered: Any) -> Dump | None:
    """Compiles once more for the compiler's own account of memory; None where it leaves none."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_compact_gte": False})
        return read_dump(pathlib.Path(folder))


def read_dump(folder: pathlib.Path) -> Dump | None:
    """The largest program in a folder of XLA's dumps."""
    largest = None
    for report in sorted(folder.glob(f"*{_REPORT}")):
        start = str(report).removesuffix("-memory-usage-report.txt")
        text, alive = pathlib.Path(f"{start}.txt"), pathlib.Path(f"{start}-live-range.txt")
        total = _TOTAL.search(report.read_text(errors="replace"))
        if total and text.is_file() and (largest is None or int(total.group(1)) > largest.peak_bytes):
            peak = _at_peak(alive.read_text(errors="replace")) if alive.is_file() else ()
            largest = Dump(text.read_text(errors="replace"), int(total.group(1)), peak)
    return largest


def _at_peak(text: str) -> tuple[tuple[str, str, int], ...]:
    """The largest buffers of the list headed "Live ranges at N (peak):"."""
    found = []
    _, _, listed = text.partition("(peak):\n")
    for line in listed.splitlines():
        buffer = _BUFFER.match(line)
        if not buffer:
            break
        found.append((buffer.group(1), buffer.group(2), int(buffer.group(3))))
    return tuple(sorted(found, key=lambda entry: -entry[2])[:_SHOWN])


def _leaf(shape: Shape, index: str) -> str:
    """The array at an index of a result, as HLO prints it."""
    for part in (int(n) for n in index.split(",") if n):
        shape = shape.parts[part] if part < len(shape.parts) else shape
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]" if shape.dtype != "tuple" else "tuple"


def parts(executable: Any) -> dict[str, int]:
    """Bytes on one device by part, from the compiler's memory analysis; {} when there is none."""
    stats = executable.memory_analysis() if executable is not None else None
    if stats is None:
        return {}
    return {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,  # aliased ones lie in the arguments
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }


def peak(executable: Any) -> int | None:
    """Most bytes that are in use at once, from the compiler's memory analysis.

    It is this figure, not the sum of the parts, that decides whether XLA:TPU takes a program: on v5e (15.75 GiB of
    16 for programs) one whose parts add up to 16.41 GiB compiles, its peak being 15.74, and 15.75 is refused.
    """
    stats = executable.memory_analysis() if executable is not None else None
    if stats is None:
        return None
    return stats.peak_memory_in_bytes or sum(parts(executable).values())
