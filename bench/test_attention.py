"""Attention on one device against `jax.nn.dot_product_attention`: `pytest bench/test_attention.py`, JAX_PLATFORMS=cpu.

Each round times jax.nn and then ours, so that a machine that is busy for a while is busy for both; ratios are of the
fastest rounds. `extra_info` (in --benchmark-json, and printed) holds both sides' time and temporary memory.
"""

import time

import jax
import jax.numpy as jnp
import pytest

import ringmoe
from bench.specs import ATTENTION, AttentionShape


def ours(q, k, v):
    return ringmoe.dot_product_attention(q, k, v, is_causal=True)


def theirs(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _output_and_gradients(attend):
    def run(q, k, v, do):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(do)

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: shape.name)
def test_attention(benchmark, shape: AttentionShape, backward: bool):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.n, shape.k, shape.k, shape.n)
    arrays = [jax.random.normal(key, (shape.b, shape.t, n, shape.h)) for key, n in zip(keys, heads)]
    arrays = arrays if backward else arrays[:3]
    compiled = {
        name: jax.jit(_output_and_gradients(attend) if backward else attend).lower(*arrays).compile()
        for name, attend in (("ours", ours), ("jax_nn", theirs))
    }
    run = lambda name: jax.block_until_ready(compiled[name](*arrays))
    for actual, expected in zip(jax.tree.leaves(run("ours")), jax.tree.leaves(run("jax_nn"))):
        assert jnp.allclose(actual, expected, rtol=1e-4, atol=1e-4)

    seconds = {"jax_nn": [], "ours": []}

    def timed(name):
        start = time.perf_counter()
        run(name)
        seconds[name].append(time.perf_counter() - start)

    benchmark.group = f"{shape.name} {'forward+backward' if backward else 'forward'}"
    benchmark.pedantic(timed, args=("ours",), setup=lambda: timed("jax_nn"), rounds=shape.rounds)
    info = {name: min(times) for name, times in seconds.items()}
    info = {f"{name}_ms": round(1e3 * t, 1) for name, t in info.items()} | {
        "times_faster": round(info["jax_nn"] / info["ours"], 2),
        "gflops_per_s": round(shape.flops(backward) / info["ours"] / 1e9, 1),
    }
    for name, program in compiled.items():
        info[f"{name}_temp_mib"] = round(program.memory_analysis().temp_size_in_bytes / 2**20, 1)
    benchmark.extra_info.update(info)
    print(f"\n{benchmark.group}: {info}")
