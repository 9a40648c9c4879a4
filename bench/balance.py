"""A causal ring on eight CPU devices, balanced and not: `python -m bench.balance [TOKENS]`.

Ratios side by side, each the least of several runs in turn: devices share the machine's cores, so what is seen here is the sum
of all work and the price of the swap, not what a device waits for another. bench/README.md has the figures, and those of TPUs.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe

ROUNDS = 5


def main(tokens: int) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    one = np.random.default_rng(0).normal(size=(3, 1, tokens, 4, 64)).astype(np.float32)
    qkv = [jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in one]
    ways = {
        "balanced ring": {"is_causal": True},
        "ring in natural order": {"is_causal": True, "local_window_size": (tokens - 1, 0)},
        "all-gather": {"is_causal": True, "exchange": "all_gather"},
    }

    def attend(backward, **how):
        run = lambda *qkv: ringmoe.dot_product_attention(*qkv, **how)
        return ringmoe.jit(jax.grad(lambda *qkv: jnp.sum(run(*qkv) ** 2), (0, 1, 2)) if backward else run)

    dense = jax.jit(lambda *qkv: ringmoe.dot_product_attention(*qkv, is_causal=True))
    for backward in (False, True):
        runs = {name: (attend(backward, **how), qkv) for name, how in ways.items()}
        if not backward:
            runs["one device"] = dense, list(one)
        took = {name: np.inf for name in runs}
        for _ in range(ROUNDS):
            for name, (run, arrays) in runs.items():
                jax.block_until_ready(run(*arrays))
                start = time.perf_counter()
                jax.block_until_ready(run(*arrays))
                took[name] = min(took[name], time.perf_counter() - start)
        for name, seconds in took.items():
            print(f"{'gradient' if backward else 'forward':9} {name:22} {1e3 * seconds:8.0f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16384)
