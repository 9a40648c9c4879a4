"""What moving the rows of an expert layer costs a TPU, by its compiler: our kernel beside XLA's own gathers.

    python -m bench.static_rows [TARGET ...]

Needs libtpu, and no TPU. The kernel's time is the larger of its bundles (TPUs issue in order, so they are cycles but for waits)
and of its bytes at the memory's full speed, after the first columns have come. XLA's is the sum of what its own model says
of the fusions (`estimated_cycles`), and of the gathers, of which it says nothing: on the SparseCore their bytes at full speed,
else the bundles of their loop; `at least` is all of XLA's bytes at full speed.
"""

import os
import re
import sys
import tempfile

if __name__ == "__main__":
    FOLDER = tempfile.TemporaryDirectory(prefix="ringmoe-rows-")
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={FOLDER.name} --xla_jf_dump_llo_text=true"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import dataclasses
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import ringmoe.primitives.experts  # noqa: F401  registers the kernel
from ringmoe.inspector.chips import CHIPS
from ringmoe.pallas import rows_tpu
from ringmoe.schedule.rows import Slots, combine_local, dispatch_local

TARGETS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2")
CORES = {"v5p": 2}  # of one device; the others have one


@dataclasses.dataclass(frozen=True)
class Layer:
    """One device's tokens and experts; capacity factor 1.25, bfloat16."""

    name: str
    num_tokens: int
    dim: int
    num_experts: int
    top_k: int

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k * 5 // 4

    @property
    def num_choices(self) -> int:
        return self.num_tokens * self.top_k


LAYERS = (
    Layer("Mixtral 8x7B", 4096, 4096, 8, 2),
    Layer("Qwen3-30B-A3B", 4096, 2048, 128, 8),
    Layer("DeepSeek-V3", 4096, 7168, 256, 8),
    Layer("Qwen3-30B-A3B, 1024 tokens", 1024, 2048, 128, 8),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program; `at_least` are its bytes at full speed."""

    bytes: float
    seconds: float
    at_least: float
    bundles: float = 0.0


def compiled(layer: Layer, combine: bool, device):
    """The program's text, and the dumped schedules of its instructions."""
    sharding = SingleDeviceSharding(device)
    array = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    assignment, place = (
        array((layer.num_experts, layer.num_rows // layer.num_experts)),
        array((layer.num_tokens, layer.top_k)),
    )
    if combine:
        fun = lambda rows, weight, *slots: combine_local(rows, Slots(*slots), weight, rows.dtype)
        arrays = (array((*assignment.shape, layer.dim), jnp.bfloat16), array(place.shape, jnp.float32))
    else:
        fun = lambda x, *slots: dispatch_local(x, Slots(*slots))
        arrays = (array((layer.num_tokens, layer.dim), jnp.bfloat16),)
    program = jax.jit(fun).lower(*arrays, assignment, place).compile()
    texts = {}
    for path in pathlib.Path(FOLDER.name).iterdir():  # gigabytes, were they left to the next program
        if path.name.endswith("-final_bundles.txt") and "schedule-" not in path.name:
            texts[path.name] = path.read_text()
        path.unlink()
    return program.as_text() or "", texts


def depths(text: str) -> list[int]:
    """Bundles by how many loops they are in; of inner loops the last counts as such, any before it runs (almost) never."""
    found = [0, 0, 0]
    for mark, loops in re.findall(r"^\s*0x[0-9a-f]+ +([A-Z]*) *: (>*) ?\{", text, re.MULTILINE):
        if mark == "LB" and len(loops) == 2:
            found = [found[0], found[1] + found[2], 0]
        found[len(loops)] += 1
    return found


def ours(layer: Layer, combine: bool, device, chip: str) -> Cost:
    """The kernel's, also where `check` leaves the call to XLA."""
    with mock.patch.object(rows_tpu, "MIN_BYTES", 256), mock.patch.object(rows_tpu, "MAX_CHOICES", 8):
        _, dumps = compiled(layer, combine, device)
        m, n = (layer.num_rows, layer.num_tokens) if combine else (layer.num_tokens, layer.num_rows)
        parts, columns = rows_tpu._split(jax.ShapeDtypeStruct((m, layer.dim), jnp.bfloat16))
    (text,) = (text for name, text in dumps.items() if "ringmoe_sum_of_rows" in name)
    once, step, tile = depths(text)
    steps = layer.dim // columns * -(-n // rows_tpu.BLOCK)
    bundles = once + steps * (step + tile * rows_tpu.BLOCK // rows_tpu.SUBLANES)
    row, rate, cores = 2 * layer.dim, speed(chip), CORES.get(chip, 1)
    k = layer.top_k if combine else 1
    scalars = (
        n * k * 4 * (1 + combine) * (layer.dim // columns)
    )  # the places and weights come once for each block of columns
    moved = (m + n) * row + scalars
    first = parts // cores * m * columns * 2 / rate
    busy = bundles / cores / CHIPS[chip].clock_hz
    return Cost(moved, first + max(busy, moved / rate - first), moved / rate, bundles)


def speed(chip: str) -> float:
    return CHIPS[chip].hbm_bandwidth / CHIPS[chip].devices_per_chip


def xlas(layer: Layer, combine: bool, device, chip: str) -> Cost:
    with mock.patch.object(rows_tpu, "MIN_BYTES", 2**30):
        text, dumps = compiled(layer, combine, device)
    assert "tpu_custom_call" not in text
    modelled = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    seconds = sum(n for n in modelled if n < 2**62) / CHIPS[chip].clock_hz
    row, on_sparse_core = 2 * layer.dim, "gather_offload" in text
    gathered = layer.num_choices if combine else layer.num_rows
    if on_sparse_core:
        seconds += 2 * gathered * row / speed(chip)
    for name, dump in dumps.items():
        if "gather_fusion" in name:
            (times,) = map(int, set(re.findall(r"iteration_bounds: \((\d+)\)", dump)))
            seconds += depths(dump)[1] * times / CHIPS[chip].clock_hz
    moved = (3 * gathered + (layer.num_tokens if combine else layer.num_rows)) * row
    return Cost(moved, seconds, moved / speed(chip))


def main(targets) -> None:
    print("| target | layer | | columns | bytes / minimum | bundles | us | XLA us | (at least) | faster | picked |")
    for target in targets:
        chip = target.split(":")[0]
        device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
        for layer in LAYERS:
            for combine in (False, True):
                kernel, xla = (cost(layer, combine, device, chip) for cost in (ours, xlas))
                m, n = (layer.num_rows, layer.num_tokens) if combine else (layer.num_tokens, layer.num_rows)
                minimum = (layer.num_choices + n) * 2 * layer.dim
                _, columns = rows_tpu._split(jax.ShapeDtypeStruct((m, layer.dim), jnp.bfloat16))
                picked = (
                    "kernel"
                    if columns * 2 >= rows_tpu.MIN_BYTES and combine * layer.top_k <= rows_tpu.MAX_CHOICES
                    else "XLA"
                )
                us = [f"{1e6 * s:.0f}" for s in (kernel.seconds, xla.seconds, xla.at_least)]
                print(
                    f"| {target} | {layer.name} | {'combine' if combine else 'dispatch'} | {columns} "
                    f"| {kernel.bytes / minimum:.2f} | {kernel.bundles:,.0f} | {us[0]} | {us[1]} | {us[2]} "
                    f"| {xla.seconds / kernel.seconds:.2f} | {picked} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
