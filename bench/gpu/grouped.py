"""Sorted rows multiplied with their experts' matrices.

Every way is held against the tiled one, with uneven counts, an expert without rows, and NaN in the rows past the last
expert's. The batched matmul has as many rows of every expert; "shipped" is JAX's own kernel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.case import Case
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
    found = {}
    for name, dtype in (("ours", jnp.float32), ("ours, bf16", jnp.bfloat16)):
        found[name] = lambda *arrays, dtype=dtype: grouped_gpu.matmul(kind, *arrays, dtype)
    if e <= 32:  # it unrolls a loop over the experts
        found["shipped, bf16"] = functools.partial(shipped, kind)
    return found | {"batched": functools.partial(batched, kind), "tiled": functools.partial(grouped._tiled, kind)}


def case(name, kind, n, d, f, e) -> Case:
    return Case(
        f"{name}, {kind}",
        ways(kind, e),
        functools.partial(operands, kind, n, d, f, e),
        functools.partial(grouped._tiled, kind),
        lambda result: result if kind == "outer" else result[: n - PAST],
        wrong=lambda way: 1e-2 if "bf16" in way else 1e-4,
        unchecked=("batched",),
        flops=2 * n * d * f,
    )


def cases() -> list[Case]:
    return [case(name, kind, *shape) for name, shape in SHAPES.items() for kind in ("times", "back", "outer")]
