"""What a ring waits for its keys and values: `python -m bench.ring [TARGET ...]`.

By the compilers and the inspector, no machines: one axis over all devices for the sequence, bf16, head dim 128; forward, and
the gradient compiled by itself, as in a loop over layers. bench/README.md has the table.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import itertools

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe

TARGETS = ("v5e:2x4", "v5e:16x16", "v5p:2x2x2", "v6e:2x4", "v6e:16x16", "tpu7x:2x2x2", "h200x8")
HEAD_DIM = 128
MASKS = {"full": {}, "causal": {"is_causal": True}, "window": {"is_causal": True, "local_window_size": (4095, 0)}}


def inspected(target: str, mask: str, backward: bool, tokens: int = 4096, heads: int = 8, key_heads: int = 8, **how):
    """The inspector's report of one op, `tokens` a device."""
    machine = ringmoe.target(target)
    mesh = machine.mesh({"x": machine.num_devices})
    of = lambda n: jax.ShapeDtypeStruct(
        (1, tokens * machine.num_devices, n, HEAD_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "x"))
    )
    attend = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, **MASKS[mask], **how)
    q, k = of(heads), of(key_heads)
    if not backward:
        return ringmoe.inspect(ringmoe.jit(attend), q, k, k, target=target)
    return ringmoe.inspect(ringmoe.jit(lambda do, *qkv: jax.vjp(attend, *qkv)[1](do)), q, q, k, k, target=target)


def main(targets: list[str]) -> None:
    table = rich.table.Table("", "mask", "", "run", "waiting", "of a run", "memory", title="ms; MiB of temporaries")
    console = rich.console.Console(width=120)
    rows = [*itertools.product(targets or TARGETS, MASKS, (False, True))]
    for target, mask, backward in rich.progress.track(rows, "compiling", console=rich.console.Console(stderr=True)):
        found = inspected(target, mask, backward)
        direction = "gradient" if backward else "forward"
        figures = f"{found.us / 1e3:.2f}", f"{found.exposed_us / 1e3:.2f}", f"{found.exposed_us / found.us:.0%}"
        table.add_row(target, mask, direction, *figures, f"{found.memory['temporaries'] / 2**20:.0f}")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
