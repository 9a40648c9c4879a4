"""Static cost of Pallas kernels, as their compilers write it to disk when asked.

XLA:TPU writes the final schedule of each kernel, bundle by bundle; TPUs issue in order, so bundles
are cycles up to waits for memory. Mosaic GPU keeps what ptxas says. Both are asked by environment
variables that libtpu reads once, when it starts, and Mosaic GPU at each compilation.
"""

import atexit
import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

_OWN = "ringmoe-kernels-"  # how our folders' names begin
_SCHEDULE = "*final_hlo-static-per-bundle-utilization.txt"
_SPILL, _FILL = "VSTORE:SPILL", "VLOAD:FILL"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a compiler says about one kernel.

    Attributes:
      name: the HLO instruction's on TPU, the kernel's on GPU.
      bundles: TPU: VLIW bundles in the whole schedule, each counted once however often its loop
        runs.
      busy_bundles: TPU: those from the first to the last that uses a matrix unit (all, when none
        does).
      units: TPU: part of each unit's issue slots used in the busy bundles, 0 to 1.
      spills, fills: TPU: vector registers stored and loaded again; GPU: bytes.
      registers, shared_bytes: GPU: per thread, and per block including what the kernel allocates
        itself.
    """

    name: str
    bundles: int | None = None
    busy_bundles: int | None = None
    units: dict[str, float] = dataclasses.field(default_factory=dict)
    spills: int = 0
    fills: int = 0
    registers: int | None = None
    shared_bytes: int | None = None

    def summary(self) -> str:
        """One line."""
        if self.bundles is None:
            return (
                f"{self.registers} registers a thread, {self.spills} B spilled, {self.fills} B "
                "filled, "
                f"{self.shared_bytes} B shared memory a block"
            )
        use = ", ".join(f"{unit} {part:.0%}" for unit, part in self.units.items() if part >= 0.005)
        return (
            f"{self.bundles} bundles, {self.busy_bundles} around the matrix unit: {use}; "
            f"{self.spills} spills, "
            f"{self.fills} fills"
        )


@dataclasses.dataclass(frozen=True)
class _Dumps:
    """Folders of both compilers, and the schedules that lay in libtpu's before; None where it wasn't asked."""

    tpu: pathlib.Path | None
    gpu: pathlib.Path
    before: frozenset[pathlib.Path]


def request() -> pathlib.Path:
    """Asks libtpu, which reads its arguments when JAX starts, to write its schedules; returns the
    folder it writes to. It then does so, slowly, for all that the process compiles."""
    marker = "--xla_jf_dump_to="
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    for argument in arguments.split():
        if argument.startswith(marker):
            return pathlib.Path(argument.removeprefix(marker))
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_OWN))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} {marker}{folder} --xla_jf_dump_llo_text=true".strip()
    return folder


@contextlib.contextmanager
def dumping(tpu: bool) -> Iterator[_Dumps]:
    """Asks the compilers, libtpu only with `tpu`, for their dumps while the block runs; yields where they go."""
    schedules = request() if tpu else None
    with tempfile.TemporaryDirectory(prefix=_OWN) as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
        before = set(schedules.glob(_SCHEDULE)) if schedules else ()
        try:
            yield _Dumps(schedules, pathlib.Path(folder), frozenset(before))
        finally:
            del os.environ["MOSAIC_GPU_DUMP_PTXAS"], os.environ["MOSAIC_GPU_DUMP_TO"]
            if schedules and schedules.name.startswith(_OWN):  # hundreds of MB for one attention kernel
                for file in schedules.iterdir():
                    file.unlink()


def read(dumps: _Dumps, names: frozenset[str]) -> tuple[Kernel, ...]:
    """Kernels dumped while `dumping` ran.

    Args:
      dumps: from `dumping`.
      names: HLO names of the TPU kernels to pick out of the program's other fusions.

    Raises:
      RuntimeError: there are TPU kernels and libtpu wrote nothing, having started before it was
        asked.
    """
    found: dict[str, Kernel] = {}
    for file in sorted(set(dumps.tpu.glob(_SCHEDULE)) - dumps.before) if dumps.tpu else ():
        name = re.sub(r"^\d+-|-\d+-final_hlo-.*$", "", file.name)
        if name in names:
            found[name] = tpu_kernel(name, file.read_text())
    # The number at a name's end counts what was lowered there and what was compiled here: among kernels of a name only is the
    # order the same.
    resources = collections.defaultdict(list)
    for file in _in_order(dumps.gpu, ".resources.txt"):
        resources[_unnumbered(file.name.removesuffix(".resources.txt"))].append(file.read_text())
    for file in _in_order(dumps.gpu, ".ptxas"):
        own = resources[_unnumbered(file.stem)]
        found[file.stem] = gpu_kernel(file.stem, file.read_text(), own.pop(0) if own else "")
    if names and not found:
        raise RuntimeError(
            "JAX started before kernels=True could ask libtpu for its schedules: call inspect "
            "before anything "
            "asks for jax.devices() or makes an array, or run `ringmoe inspect --kernels`"
        )
    return tuple(found.values())


def _in_order(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """Mosaic GPU's files of a kind, by their number."""
    number = lambda file: int((re.findall(r"_(\d+)$", file.name.removesuffix(suffix)) or [0])[0])
    return sorted(folder.glob(f"*{suffix}"), key=number)


def _unnumbered(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def tpu_kernel(name: str, text: str) -> Kernel:
    """Reads a static-per-bundle-utilization file: unit names, their capacity, then slots used by
    each bundle.

    Raises:
      ValueError: the file has another form.
    """
    units: list[str] = []
    rows: list[list[int]] = []
    for line in text.splitlines():
        if line.startswith("MXU"):
            units = [unit.strip() for unit in line.split(",")]
        elif units and len(cells := line.split()) == len(units) and all(cell.isdigit() for cell in cells):
            rows.append([int(cell) for cell in cells])
    if len(rows) < 2:
        raise ValueError(
            f"schedule of kernel {name!r} begins {text[:60]!r}, expected a line of units 'MXU, "
            "XLU, ...' and rows "
            "of numbers: this libtpu writes another form"
        )
    capacity, bundles = rows[0], rows[1:]
    matrix = [index for index, row in enumerate(bundles) if row[0]]
    busy = bundles[matrix[0] : matrix[-1] + 1] if matrix else bundles
    used = [sum(column) for column in zip(*busy, strict=True)]
    parts = {
        unit: total / (slots * len(busy)) for unit, total, slots in zip(units, used, capacity, strict=True) if slots
    }
    totals = collections.Counter(dict(zip(units, (sum(column) for column in zip(*bundles, strict=True)), strict=True)))
    return Kernel(name, len(bundles), len(busy), parts, totals[_SPILL], totals[_FILL])


def gpu_kernel(name: str, ptxas: str, resources: str) -> Kernel:
    """Reads what ptxas printed for one kernel, and Mosaic GPU's own list of resources."""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found.group(1)) if found else 0

    shared = number(r"(\d+) bytes smem", ptxas) + number(r"smem_scratch_bytes=(\d+)", resources)
    return Kernel(
        name,
        spills=number(r"(\d+) bytes spill stores", ptxas),
        fills=number(r"(\d+) bytes spill loads", ptxas),
        registers=number(r"Used (\d+) registers", ptxas),
        shared_bytes=shared,
    )
