"""One new token against a cache that is sharded along the sequence: `python -m bench.decode [TARGET ...]`.

Without a target on 8 CPU devices, a million tokens, side by side: merged shares, a gathered cache, plain `jax.nn` (which XLA
partitions), and the cache's update. With targets what the inspector says of a step there, beside reading the cache once.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import statistics
import time

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.inspector.chips import CHIPS

TOKENS, HEADS, KEY_HEADS, WIDTH, ROUNDS = 2**20, 8, 1, 64, 5
SPEC = P(None, "x")


def plain(query, keys, values, lengths):
    return jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths)


def decode(exchange):
    return lambda q, k, v, n: ringmoe.decode_attention(q, k, v, n, exchange=exchange)


def on_cpu() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    key = jax.random.key(0)
    normal = lambda *shape: jax.random.normal(key, shape)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, SPEC))
    cache = [place(normal(1, TOKENS, KEY_HEADS, WIDTH)) for _ in range(2)]
    query, new, lengths = normal(1, 1, HEADS, WIDTH), normal(1, 1, KEY_HEADS, WIDTH), jnp.array([TOKENS - 5], jnp.int32)
    update = jax.jit(ringmoe.update_cache, donate_argnums=0)
    ours = {name: ringmoe.jit(decode(name)) for name in ("merge", "all_gather")}
    runs = ours | {"plain jax.nn": jax.jit(plain)}
    taken: dict[str, list[float]] = {name: [] for name in (*runs, "update")}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(query, *cache, lengths))
            taken[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        cache[0] = update(cache[0], new, lengths)
        jax.block_until_ready(cache[0])
        taken["update"].append(time.perf_counter() - start)
    table = rich.table.Table(
        "", "ms", "sent a device", title=f"{TOKENS} tokens, N {HEADS}, K {KEY_HEADS}, H {WIDTH}, float32"
    )
    for name, seconds in taken.items():
        sent = ""
        if name in ours:
            (row,) = ringmoe.explain(ours[name], query, *cache, lengths).rows
            sent = f"{row.wire_bytes:,} bytes"
        table.add_row(name, f"{1e3 * statistics.median(seconds[1:]):.1f}", sent)
    rich.console.Console(width=120).print(table)
    (row,) = ringmoe.explain(ringmoe.jit(decode("auto")), query, *cache, lengths).rows
    print(row)


def on(target: str) -> None:
    machine = ringmoe.target(target)
    mesh = machine.mesh({"x": machine.num_devices})
    of = lambda spec, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    batch, heads, key_heads, width = 8, 32, 8, 128
    cache = of(SPEC, jnp.bfloat16, batch, TOKENS, key_heads, width)
    args = of(P(), jnp.bfloat16, batch, 1, heads, width), cache, cache, of(P(), jnp.int32, batch)
    report = ringmoe.inspect(ringmoe.jit(ringmoe.decode_attention), *args, target=target)
    chip = CHIPS[machine.chip]
    read = 2 * batch * TOKENS * key_heads * width * 2 / machine.num_devices
    least = 1e6 * read * chip.devices_per_chip / chip.hbm_bandwidth
    print(f"{target}: {report.us:.0f} us, waiting {report.exposed_us:.0f}; the cache read once: {least:.0f}")
    print(*ringmoe.explain(ringmoe.jit(ringmoe.decode_attention), *args).rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            on(name)
    else:
        on_cpu()
