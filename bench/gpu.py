"""One expert layer on a GPU that is there, beside the ways to write it in plain JAX: `python -m bench.gpu [OUT.json [NAME ...]]`.

bfloat16, SwiGLU, 8192 tokens, whole models' layers (of DeepSeek-V3 32 of its experts), even and skewed routing as in
`bench.moe`, forward and with all gradients. First every implementation is held against all experts on all tokens in float32.
Times are medians over rounds in which each implementation runs once, a few calls back to back; the share is of the rate of a
large bfloat16 matmul in this same run, for the work that was asked for. Then the pieces: rows moved, beside a plain copy of as
many bytes; sorted rows multiplied by each way there is.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from bench.moe import ENTRIES, ExpertsShape, dropped, make_inputs, with_gradients
from ringmoe.pallas import grouped
from ringmoe.schedule import rows

LAYERS = (
    ExpertsShape("Mixtral 8x7B", 8192, 4096, 14336, 8, 2),
    ExpertsShape("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
    ExpertsShape("DeepSeek-V3, 32 experts", 8192, 7168, 2048, 32, 8),
)
CALLS, ROUNDS = 3, 5
MOST_BYTES = 40 * 2**30


def compiled(f, *arrays, **options):
    return jax.jit(f, compiler_options=options or None).lower(*arrays).compile()


def milliseconds(programs: dict) -> dict[str, float]:
    """The median over rounds of each program's time a call; programs take nothing."""
    found = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            results = [program() for _ in range(CALLS)]
            jax.block_until_ready(results[-1])
            found[name].append((time.perf_counter() - start) / CALLS * 1e3)
            del results
    return {name: statistics.median(times) for name, times in found.items()}


def peaks() -> tuple[float, float]:
    """FLOPs and bytes (read and written) a second, of a large matmul and of a large copy."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    long = jax.random.normal(jax.random.key(1), (2**30,), jnp.bfloat16)
    product, copy = compiled(jnp.matmul, a, a), compiled(lambda x: x + 1, long)
    found = milliseconds({"matmul": lambda: product(a, a), "copy": lambda: copy(long)})
    return 2 * 8192**3 / found["matmul"] * 1e3, 2 * long.nbytes / found["copy"] * 1e3


def errors(spec: ExpertsShape) -> dict[str, tuple[float, float]]:
    """||got - want|| / ||want||, of the output and the worst gradient, where nothing is dropped."""
    factor = spec.num_experts / spec.top_k
    spec = dataclasses.replace(spec, num_tokens=512, capacity_factor=factor, group_size=256)
    inputs = make_inputs(spec, skew=1, dtype=jnp.bfloat16)

    def of(layer, *inputs):
        layer = functools.partial(layer, spec)
        run = lambda *a: (layer(*a), with_gradients(layer)(*a))
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(run, *inputs)(*inputs))]

    with jax.default_matmul_precision("highest"):
        want = of(ENTRIES["every expert"].layer, *jax.tree.map(lambda x: x.astype(jnp.float32), inputs))
    found = {}
    for name in ENTRIES:
        got = of(ENTRIES[name].layer, *inputs)
        each = [float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(got, want)]
        found[name] = each[0], max(each[1:])
    return found


def layer(spec: ExpertsShape, backward: bool, ids: dict[str, float]):
    """By the kind of ids: name -> (ms or None, temporary bytes, share of choices dropped)."""
    inputs = {kind: make_inputs(spec, skew, jnp.bfloat16) for kind, skew in ids.items()}

    def program(entry):
        run = functools.partial(entry.layer, entry.of(spec))
        return compiled(with_gradients(run) if backward else run, *inputs["even"])

    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(ENTRIES, pool.map(program, ENTRIES.values())))
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    fitting = {name: program for name, program in programs.items() if memory[name] <= MOST_BYTES}
    found = {}
    for kind, arrays in inputs.items():
        times = milliseconds({name: functools.partial(program, *arrays) for name, program in fitting.items()})
        lost = {name: dropped(spec, arrays, entry.group_size) for name, entry in ENTRIES.items()}
        found[kind] = {name: (times.get(name), memory[name], lost[name]) for name in ENTRIES}
    return found


def moved(spec: ExpertsShape) -> dict[str, tuple[float, float]]:
    """name -> (ms, bytes that must move): dispatch and combine of sorted rows."""
    x, router_weight, *_ = make_inputs(dataclasses.replace(spec, hidden_dim=8), dtype=jnp.bfloat16)
    t, k, d = spec.num_tokens, spec.top_k, spec.model_dim
    _, expert = lax.top_k((x @ router_weight)[0], k)
    weight = jnp.full(expert.shape, 1 / k, jnp.float32)
    slots_of = lambda expert: rows.packed(expert, spec.num_experts, 1, t * k)[0]
    dispatch = compiled(lambda x, e: rows.dispatch_local(x[0], slots_of(e)), x, expert)
    there = dispatch(x, expert)
    combine = compiled(lambda r, e, w: rows.combine_local(r, slots_of(e), w, jnp.bfloat16), there, expert, weight)
    sort = compiled(lambda e: jax.tree.leaves(slots_of(e)), expert)
    found = milliseconds(
        {
            "places": lambda: sort(expert),
            "places, dispatch": lambda: dispatch(x, expert),
            "places, combine": lambda: combine(there, expert, weight),
        }
    )
    size = 2 * d * (t + t * k)
    return {name: (ms, 0 if name == "places" else size) for name, ms in found.items()}


def multiplied(spec: ExpertsShape) -> dict[str, tuple[float, float, str]]:
    """name -> (ms, FLOPs, "" or why not) of sorted rows [T k, D] times their experts' [D, F]."""
    n, d, f, e = spec.num_tokens * spec.top_k, spec.model_dim, spec.hidden_dim, spec.num_experts
    x = jax.random.normal(jax.random.key(0), (n, d), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (e, d, f), jnp.bfloat16) / math.sqrt(d)
    counts = jnp.bincount(jax.random.randint(jax.random.key(2), (n,), 0, e), length=e).astype(jnp.int32)
    half = lambda x, w, counts: lax.ragged_dot(x, w, counts)
    ways = {
        "batched, even": (lambda x, w, _: jnp.einsum("erd,edf->erf", x.reshape(e, -1, d), w), {}),
        "ours": (lambda x, w, c: grouped.times(x, w, c).astype(x.dtype), {}),
        "ragged_dot": (half, {}),
        "ragged_dot, fusion": (half, {"xla_gpu_experimental_use_ragged_dot_fusion": True}),
        "ragged_dot, grouped GEMM": (half, {"xla_gpu_experimental_use_ragged_dot_grouped_gemm": True}),
        "mgpu": (mosaic, {}),
    }
    want, programs, failed = None, {}, {}
    for name, (run, options) in ways.items():
        try:
            program = compiled(run, x, w, counts, **options)
            if name != "batched, even":
                got = np.asarray(program(x, w, counts)[:4096:7], np.float32)
                want = got if want is None else want
                failed_by = np.linalg.norm(got - want) / np.linalg.norm(want)
                if not failed_by < 1e-2:
                    raise ValueError(f"off by {failed_by:.1e}")
            programs[name] = functools.partial(program, x, w, counts)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:160]
    times = milliseconds(programs)
    return {name: (times.get(name, math.nan), 2.0 * n * d * f, failed.get(name, "")) for name in ways}


def mosaic(x, w, counts):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
        x, w, group_sizes=counts, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
    )


def main(out: str | None = None, *names: str) -> None:
    began = time.perf_counter()
    console, record = Console(width=120), {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    flops, bandwidth = peaks()
    record["peaks"] = flops, bandwidth
    title = f"{record['device']}, jax {jax.__version__}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s"
    console.print(title)
    table = Table("layer", "ids", "pass", "implementation", "ms", "of limit", "temp GiB", "dropped")
    parts = Table("layer", "piece", "ms", "of limit", "")
    for spec in (s for s in LAYERS if not names or any(name in s.name for name in names)):
        record[spec.name] = found = {"moved": moved(spec), "multiplied": multiplied(spec)}
        for name, (ms, size) in found["moved"].items():
            parts.add_row(spec.name, name, f"{ms:.3f}", f"{size / bandwidth / ms * 1e3:.0%}", "")
        for name, (ms, work, why) in found["multiplied"].items():
            parts.add_row(spec.name, name, f"{ms:.3f}", f"{work / flops / ms * 1e3:.0%}", why)
        work = 6 * spec.num_tokens * spec.top_k * spec.model_dim * spec.hidden_dim
        for backward in (False, True):
            found["both" if backward else "forward"] = measured = layer(spec, backward, {"even": 0.0, "skewed": 1.0})
            for ids, by_name in measured.items():
                for name, (ms, memory, lost) in by_name.items():
                    share = "" if ms is None else f"{(3 if backward else 1) * work / flops / ms * 1e3:.0%}"
                    time_of = "not run" if ms is None else f"{ms:.2f}"
                    cells = time_of, share, f"{memory / 2**30:.2f}", f"{lost:.1%}"
                    table.add_row(spec.name, ids, "both" if backward else "forward", name, *cells)
        found["errors"] = errors(spec)
        console.print(spec.name, {n: f"{a:.1e} {b:.1e}" for n, (a, b) in found["errors"].items()})
        console.print(f"{time.perf_counter() - began:.0f} s")
        if out:
            with open(out, "w") as file:
                json.dump(record, file, indent=1, default=str)
    console.print(table)
    console.print(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
