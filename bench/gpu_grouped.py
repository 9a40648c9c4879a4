"""Sorted rows multiplied with their experts' matrices on a Hopper GPU that is there: `python -m bench.gpu_grouped`.

Every way is held against `grouped._tiled`, with uneven counts, an expert without rows, and NaN in the rows past the last
expert's. The batched matmul has as many rows of every expert. The share is of the rate of an 8192^3 bfloat16 matmul.
"""

import concurrent.futures
import functools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu import milliseconds, peaks
from ringmoe.pallas import grouped, grouped_gpu

SHAPES = {  # rows, D, F, experts
    "Mixtral": (16384, 4096, 14336, 8),
    "Qwen3-30B": (65536, 2048, 768, 128),
    "DeepSeek-V3, 32": (65536, 7168, 2048, 32),
}
PAST = 100  # rows past the last expert's


def operands(kind, n, d, f, e):
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(e, 4.0))
    share[1] = 0
    counts = rng.multinomial(n - PAST, share / share.sum())
    normal = lambda key, *shape: jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)
    a = normal(0, n, f if kind == "back" else d).at[n - PAST :].set(jnp.nan)
    b = normal(1, n, f).at[n - PAST :].set(jnp.nan) if kind == "outer" else normal(1, e, d, f)
    return a, b, jnp.asarray(counts, jnp.int32)


def batched(kind, a, b, counts):
    by_expert = lambda x: x.reshape(counts.size, -1, x.shape[-1])
    b = by_expert(b) if kind == "outer" else b
    how = {"times": "erd,edf->erf", "back": "erf,edf->erd", "outer": "erd,erf->edf"}[kind]
    return jnp.einsum(how, by_expert(a), b, preferred_element_type=jnp.float32)


def shipped(kind, a, b, counts):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    options = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4)
    if kind == "outer":
        return transposed_ragged_dot_mgpu.transposed_ragged_dot(a, b, group_sizes=counts, **options)
    return ragged_dot_mgpu.ragged_dot(a, b, group_sizes=counts, transpose_rhs=kind == "back", **options)


def ways(kind, e):
    """name -> what it is, of (a, b, counts)."""
    found = {"batched": functools.partial(batched, kind), "tiled": functools.partial(grouped._tiled, kind)}
    if e <= 32:  # it unrolls a loop over the experts
        found["shipped, bf16"] = functools.partial(shipped, kind)
    for name, dtype in (("ours", jnp.float32), ("ours, bf16", jnp.bfloat16)):
        found[name] = lambda *arrays, dtype=dtype: grouped_gpu.matmul(kind, *arrays, dtype)
    return found


def distance(kind, program, arrays, want):
    """||got - want|| / ||want||, past rows apart."""

    @jax.jit
    def norms(got, want):
        rows = want.shape[0] - (0 if kind == "outer" else PAST)
        got, want = got[:rows].astype(jnp.float32), want[:rows]
        return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

    return float(norms(program(*arrays), want))


def attempt(run, *arrays):
    try:
        return run(*arrays)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


def measure(name, kind, peak, programs, arrays):
    n, d, f, _ = SHAPES[name]
    want = programs["tiled"](*arrays)
    wrong = {way: program for way, program in programs.items() if isinstance(program, str)}
    for way, program in programs.items():
        if way in ("batched", "tiled") or way in wrong:
            continue
        print(f"{way}, ", end="", flush=True)  # what hangs, if one does
        off = attempt(distance, kind, program, arrays, want)
        if isinstance(off, str) or not off < (1e-2 if "bf16" in way else 1e-4):
            wrong[way] = f"off by {off}"
    print("checked", flush=True)
    del want
    good = {way: functools.partial(program, *arrays) for way, program in programs.items() if way not in wrong}
    times = milliseconds(good)
    for way in programs:
        ms = times.get(way, math.nan)
        rate = 2 * n * d * f / ms / 1e9
        print(
            f"{name:16} {kind:6} {way:14} {ms:8.3f} ms {rate:6.0f} TFLOP/s {rate / peak:5.0%} {wrong.get(way, '')}",
            flush=True,
        )


def main(*names: str) -> None:
    began = time.perf_counter()
    peak = peaks()[0] / 1e12
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {peak:.0f} TFLOP/s", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name in names or SHAPES:
            for kind in ("times", "back", "outer"):
                arrays = operands(kind, *SHAPES[name])
                program_of = lambda run, arrays=arrays: jax.jit(run).lower(*arrays).compile()
                compiling = {
                    way: pool.submit(attempt, program_of, run) for way, run in ways(kind, SHAPES[name][3]).items()
                }
                programs = {way: future.result() for way, future in compiling.items()}
                if failed := attempt(measure, name, kind, peak, programs, arrays):
                    print(name, kind, failed, flush=True)
            print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
