"""What a sharded sequence waits for its keys and values: `python -m bench.ring [TARGET ...]`.

By the compilers and the inspector, no machines: one axis over all devices for the sequence, bf16, 8 query heads of 128, 8 key
heads and 2; forward, and the gradient compiled by itself, as in a loop over layers; the exchange is "auto"'s. Beside a run
stand its attention kernels, and what it sends, over all links of a chip: no schedule can beat the longer of the two. A run
should take at most 10% more, and where kernels take longer, wait at most 3% of its time. bench/README.md has the table.
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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.inspector.chips import CHIPS
from ringmoe.plan.cost import CIRCLE

TARGETS = ("v4:2x2x4", "v5e:2x4", "v5e:16x16", "v5p:2x2x2", "v5p:8x8x16", "v6e:16x16", "tpu7x:4x4x8", "h200x8")
HEADS, HEAD_DIM = 8, 128
MASKS = {"full": {}, "causal": {"is_causal": True}, "window": {"is_causal": True, "local_window_size": (4095, 0)}}
KEY_HEADS, TOKENS = (8, 2), (4096, 32768)  # tokens a device


def mesh_of(machine: ringmoe.Target):
    """One axis over all devices, in circles where it is short: of longer ones rows serve the exchange of heads."""
    mesh = machine.mesh({"x": machine.num_devices})
    return ringmoe.ring_mesh(mesh, "x") if mesh.size <= CIRCLE else mesh


def inspected(
    target: str, mask: str, backward: bool, tokens: int = 4096, heads: int = HEADS, key_heads: int = 8, **how
):
    """The inspector's report of one op, `tokens` a device."""
    machine = ringmoe.target(target)
    mesh = mesh_of(machine)
    of = lambda n: jax.ShapeDtypeStruct(
        (1, tokens * machine.num_devices, n, HEAD_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "x"))
    )
    attend = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, **MASKS[mask], **how)
    q, k = of(heads), of(key_heads)
    if not backward:
        return ringmoe.inspect(ringmoe.jit(attend), q, k, k, target=target)
    return ringmoe.inspect(ringmoe.jit(lambda do, *qkv: jax.vjp(attend, *qkv)[1](do)), q, q, k, k, target=target)


def bounds(report, target: str) -> tuple[float, float]:
    """(attention kernels, wire over all links), microseconds a run."""
    chip = CHIPS[ringmoe.target(target).chip]
    kernels = sum(o.total_us for o in report.operations if "ringmoe_attention" in o.op_name)
    sent = sum(c.wire_bytes * c.trip_count for c in report.collectives)
    return kernels, 1e6 * sent / (chip.link_bandwidth * chip.num_links / chip.devices_per_chip)


def row(target: str, mask: str, key_heads: int, tokens: int, backward: bool) -> str:
    """One of the table, in Markdown."""
    found = inspected(target, mask, backward, tokens, key_heads=key_heads)
    kernels, wire = bounds(found, target)
    reached = found.us <= 1.1 * max(kernels, wire) and (kernels < wire or found.exposed_us <= 0.03 * found.us)
    ms = " | ".join(f"{us / 1e3:.4g}" for us in (found.us, kernels, wire, found.exposed_us))
    over, waits = found.us / max(kernels, wire), found.exposed_us / found.us
    case = f"{target} | {mask} | {key_heads} | {tokens} | {'gradient' if backward else 'forward'}"
    memory = f"{found.memory['temporaries'] / 2**20:.0f}"
    return f"| {case} | {ms} | {over:.2f} | {waits:.1%} | {memory} | {'yes' if reached else 'no'} |"


def main(targets: list[str]) -> None:
    console = rich.console.Console(stderr=True)
    print("| | mask | K | tokens | | run, ms | kernels | wire | waiting | run / bound | waits | MiB | reached |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    rows = [*itertools.product(targets or TARGETS, MASKS, KEY_HEADS, TOKENS, (False, True))]
    for case in rich.progress.track(rows, "compiling", console=console):
        print(row(*case), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
