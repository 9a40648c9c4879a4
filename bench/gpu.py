"""One expert layer on a GPU that is there, beside ways to write it in plain JAX: `python -m bench.gpu [OUT.json [NAME ...]]`.

bfloat16, SwiGLU, 8192 tokens, whole models' layers (of DeepSeek-V3 32 of its experts), forward, and with all gradients where
a way serves training; ours with skewed routing too (as in `bench.moe`). First every implementation is held against all
experts on all tokens in float32. Times are medians over rounds in which each implementation runs once, a few calls back to
back; the share is of the rate of a large bfloat16 matmul in this same run, for the work that was asked for. Then rows moved,
beside a plain copy of as many bytes.
"""

import concurrent.futures
import dataclasses
import functools
import json
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
from ringmoe.schedule import rows

LAYERS = (
    ExpertsShape("Mixtral 8x7B", 8192, 4096, 14336, 8, 2),
    ExpertsShape("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
    ExpertsShape("DeepSeek-V3, 32 experts", 8192, 7168, 2048, 32, 8),
)
OURS = ("ours 1.25", "ours dropless")
TRAINED = (*OURS, "one-hot", "loop")  # with gradients too
CALLS, ROUNDS = 3, 5
MOST_BYTES = 40 * 2**30
RAGGED_EXPERTS = 32  # with more, ragged_dot needs over MOST_BYTES, which takes minutes to find out


def compiled(f, *arrays):
    return jax.jit(f).lower(*arrays).compile()


def each(f, names):
    """{name: f(name)}, at once: XLA compiles, and tries its matmuls' tiles, with one thread for a program."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(f, names)))


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

    def program(name, *inputs):
        layer = functools.partial(ENTRIES[name].layer, spec)
        return compiled(lambda *a: (layer(*a), with_gradients(layer)(*a)), *inputs)

    values = lambda program, *inputs: [np.asarray(x, np.float32) for x in jax.tree.leaves(program(*inputs))]
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    with jax.default_matmul_precision("highest"):
        want = values(program("every expert", *exact), *exact)
    found = {}
    for name, of in each(lambda name: program(name, *inputs), TRAINED).items():
        off = [float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(values(of, *inputs), want)]
        found[name] = off[0], max(off[1:])
    return found


def layer(spec: ExpertsShape, backward: bool, names) -> dict[tuple[str, str], tuple[float | None, int, float]]:
    """(ids, name) -> (ms or None, temporary bytes, share of choices dropped); skewed ids for ours alone."""
    inputs = {ids: make_inputs(spec, skew, jnp.bfloat16) for ids, skew in (("even", 0.0), ("skewed", 1.0))}

    def program(name):
        run = functools.partial(ENTRIES[name].layer, ENTRIES[name].of(spec))
        return compiled(with_gradients(run) if backward else run, *inputs["even"])

    programs, found = each(program, names), {}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    for ids, among in (("even", names), ("skewed", OURS)):
        fitting = (name for name in among if memory[name] <= MOST_BYTES)
        times = milliseconds({name: functools.partial(programs[name], *inputs[ids]) for name in fitting})
        for name in among:
            found[ids, name] = times.get(name), memory[name], dropped(spec, inputs[ids], ENTRIES[name].group_size)
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


def main(out: str | None = None, *names: str) -> None:
    began = time.perf_counter()
    console, record = Console(width=120), {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    flops, bandwidth = peaks()
    record["peaks"] = flops, bandwidth
    title = f"{record['device']}, jax {jax.__version__}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s"
    console.print(title)
    table = Table("layer", "ids", "pass", "implementation", "ms", "of limit", "temp GiB", "dropped")
    parts = Table("layer", "piece", "ms", "of limit")
    for spec in (s for s in LAYERS if not names or any(name in s.name for name in names)):
        record[spec.name] = found = {"errors": errors(spec), "moved": moved(spec)}
        console.print(spec.name, {n: f"{a:.1e} {b:.1e}" for n, (a, b) in found["errors"].items()})
        for name, (ms, size) in found["moved"].items():
            parts.add_row(spec.name, name, f"{ms:.3f}", f"{size / bandwidth / ms * 1e3:.0%}")
        forward = [n for n in ENTRIES if n != "ragged_dot" or spec.num_experts <= RAGGED_EXPERTS]
        for part, matmuls, among in (("forward", 3, forward), ("both", 9, TRAINED)):
            work = 2 * matmuls * spec.num_tokens * spec.top_k * spec.model_dim * spec.hidden_dim
            for (ids, name), (ms, memory, lost) in layer(spec, part == "both", among).items():
                found[f"{part}, {ids}, {name}"] = ms, memory, lost
                share = "" if ms is None else f"{work / flops / ms * 1e3:.0%}"
                time_of = "not run" if ms is None else f"{ms:.2f}"
                table.add_row(spec.name, ids, part, name, time_of, share, f"{memory / 2**30:.2f}", f"{lost:.1%}")
            console.print(f"{part}: {time.perf_counter() - began:.0f} s")
        if out:
            with open(out, "w") as file:
                json.dump(record, file, indent=1, default=str)
    console.print(table)
    console.print(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
