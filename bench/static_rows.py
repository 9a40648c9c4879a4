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
import functools
import math
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

import ringmoe.primitives.experts  # noqa: F401  registers the kernel
from ringmoe.inspector.chips import CHIPS
from ringmoe.pallas import rows_tpu, runs_tpu
from ringmoe.primitives import rows as lowering
from ringmoe.schedule.rows import Slots, combine_local, dispatch_local, packed

TARGETS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2")


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
        fun = lambda rows, weight, a, p: combine_local(rows, Slots(a, p, _starts(layer)), weight, rows.dtype)
        arrays = (array((*assignment.shape, layer.dim), jnp.bfloat16), array(place.shape, jnp.float32))
    else:
        fun = lambda x, a, p: dispatch_local(x, Slots(a, p))
        arrays = (array((layer.num_tokens, layer.dim), jnp.bfloat16),)
    program = jax.jit(fun).lower(*arrays, assignment, place).compile()
    texts = {}
    for path in pathlib.Path(FOLDER.name).iterdir():  # gigabytes, were they left to the next program
        if path.name.endswith("-final_bundles.txt") and "schedule-" not in path.name:
            texts[path.name] = path.read_text()
        path.unlink()
    return program.as_text() or "", texts


def depths(text: str) -> tuple[int, int, list[int]]:
    """Bundles outside of loops, of a grid step outside of inner loops, and of each inner loop."""
    once, step, inner = 0, 0, []
    for mark, loops in re.findall(r"^\s*0x[0-9a-f]+ +([A-Z]*) *: (>*) ?\{", text, re.MULTILINE):
        inner += [0] * (mark == "LB" and len(loops) == 2)
        if len(loops) == 2:
            inner[-1] += 1
        once, step = once + (not loops), step + (len(loops) == 1)
    return once, step, inner


def _starts(layer: Layer):
    """A number that XLA can't tell before it runs; an expert's rows begin at these multiples."""
    return jnp.arange(layer.num_experts, dtype=jnp.int32) * (layer.num_rows // layer.num_experts)


def ours(layer: Layer, combine: bool, device, chip: str) -> Cost:
    """The kernel's, and of combine what finds its rows before."""
    text, dumps = compiled(layer, combine, device)
    (kernel,) = (dump for name, dump in dumps.items() if "ringmoe_sum_of_r" in name)
    if not combine:
        return _resident(layer, kernel, chip, rows_tpu.CHIPS[device.device_kind])
    cycles = sum(n for n in map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)) if n < 2**62)
    (before,) = (dump for name, dump in dumps.items() if "ringmoe_runs" in name)
    once, step, (count, find) = depths(before)
    sizes = block, _ = _sizes(layer, rows_tpu.CHIPS[device.device_kind])
    cycles += once + layer.num_tokens // block * (step + (count + find) * block * layer.top_k // rows_tpu.LANES)
    cost = _by_runs(layer, sizes, kernel, chip, rows_tpu.CHIPS[device.device_kind].cores)
    return dataclasses.replace(cost, seconds=cost.seconds + cycles / CHIPS[chip].clock_hz)


def _resident(layer: Layer, text: str, chip: str, has: rows_tpu.Chip) -> Cost:
    parts, columns = rows_tpu._split(jax.ShapeDtypeStruct((layer.num_tokens, layer.dim), jnp.bfloat16), has)
    (once, step, inner), steps = depths(text), -(-layer.num_rows // rows_tpu.BLOCK)
    bundles = once + layer.dim // columns * steps * (step + inner[-1] * rows_tpu.BLOCK // rows_tpu.SUBLANES)
    # Of the bytes: the places come once for each block of columns.
    moved = (layer.num_tokens + layer.num_rows) * 2 * layer.dim + layer.num_rows * 4 * (layer.dim // columns)
    return _cost(moved, bundles, layer.num_tokens * columns * 2 * parts, chip, has.cores)


def _by_runs(layer: Layer, sizes: tuple[int, int], text: str, chip: str, cores: int) -> Cost:
    (once, step, (_, fetch, tile)), (block, columns) = depths(text), sizes
    steps, passes = layer.num_tokens // block, layer.dim // columns
    bundles = once + passes * steps * (step + fetch * layer.num_experts + tile * block // rows_tpu.SUBLANES)
    parts = math.gcd(steps, cores)
    rows = fetched(layer, block, steps // parts)
    scalars = layer.num_choices * 8 + steps * layer.num_experts * 24
    moved = (rows + layer.num_tokens) * 2 * layer.dim + scalars * passes
    return _cost(moved, bundles, rows / steps * columns * 2 * parts, chip, cores)


def _cost(moved, bundles, first, chip: str, cores: int) -> Cost:
    """`first`: bytes that have to come before there is anything to do."""
    rate = speed(chip)
    wait = first / rate
    busy = bundles / cores / CHIPS[chip].clock_hz
    return Cost(moved, wait + max(busy, moved / rate - wait), moved / rate, bundles)


def _sizes(layer: Layer, has: rows_tpu.Chip) -> tuple[int, int]:
    rows = jax.ShapeDtypeStruct((layer.num_rows, layer.dim), jnp.bfloat16)
    return runs_tpu._sizes(rows, np.empty((layer.num_tokens, layer.top_k)), layer.num_experts, has)


@functools.cache
def fetched(layer: Layer, block: int, steps: int) -> int:
    """Rows that combine fetches where experts are chosen at random: as the kernel's own table says."""
    rng = np.random.default_rng(0)
    expert = np.argsort(rng.random((layer.num_tokens, layer.num_experts)), axis=1)[:, : layer.top_k]
    slots, _ = packed(jnp.asarray(expert, jnp.int32), layer.num_experts, layer.num_experts, layer.num_tokens)
    index = slots.place.reshape(layer.num_tokens // block, -1, rows_tpu.LANES)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        _, fetch = jax.jit(runs_tpu._table, static_argnums=2)(index, slots.starts, steps)
    return rows_tpu.SUBLANES * int(fetch[..., 2].sum())


def speed(chip: str) -> float:
    return CHIPS[chip].hbm_bandwidth / CHIPS[chip].devices_per_chip


def xlas(layer: Layer, combine: bool, device, chip: str) -> Cost:
    with mock.patch.object(lowering, "pick", return_value=None):
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
            times = max(map(int, re.findall(r"iteration_bounds: \((\d+)\)", dump)))  # its loop's, of copies in it 1
            seconds += depths(dump)[1] * times / CHIPS[chip].clock_hz
    moved = (3 * gathered + (layer.num_tokens if combine else layer.num_rows)) * row
    return Cost(moved, seconds, moved / speed(chip))


def main(targets) -> None:
    print("| target | layer | | bytes / minimum | bundles | us | XLA us | (at least) | faster |")
    for target in targets:
        chip = target.split(":")[0]
        device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
        for layer in LAYERS:
            for combine in (False, True):
                kernel, xla = (cost(layer, combine, device, chip) for cost in (ours, xlas))
                minimum = (layer.num_choices + (layer.num_tokens if combine else layer.num_rows)) * 2 * layer.dim
                us = [f"{1e6 * s:.0f}" for s in (kernel.seconds, xla.seconds, xla.at_least)]
                print(
                    f"| {target} | {layer.name} | {'combine' if combine else 'dispatch'} "
                    f"| {kernel.bytes / minimum:.2f} | {kernel.bundles:,.0f} | {us[0]} | {us[1]} | {us[2]} "
                    f"| {xla.seconds / kernel.seconds:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
