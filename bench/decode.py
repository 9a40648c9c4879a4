"""One new token against a cache that is sharded along the sequence: `python -m bench.decode [TARGET ...]`.

Without a target on 8 CPU devices, a million tokens, side by side: merged shares, those of pages in any order, a gathered cache,
plain `jax.nn` (which XLA partitions), and the cache's update. With targets what the inspector says of a step there, of a cache
and of pages, beside reading the cache once.
"""

import functools
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
PAGES = (16, 128)  # tokens of one
SPEC = P(None, "x")


def plain(query, keys, values, lengths):
    return jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths)


def decode(exchange="auto", pages=None):
    return lambda q, k, v, n: ringmoe.decode_attention(q, k, v, n, exchange=exchange, page_indices=pages)


def in_pages(cache, size: int):
    """The cache as a pool, and a table by which its pages have any order."""
    pool = cache.reshape(-1, size, *cache.shape[2:])
    return jax.device_put(pool, NamedSharding(cache.sharding.mesh, P("x"))), jax.random.permutation(
        jax.random.key(1), len(pool)
    ).astype(jnp.int32)[None]


def on_cpu() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    key = jax.random.key(0)
    normal = lambda *shape: jax.random.normal(key, shape)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, SPEC))
    cache = [place(normal(1, TOKENS, KEY_HEADS, WIDTH)) for _ in range(2)]
    query, new, lengths = normal(1, 1, HEADS, WIDTH), normal(1, 1, KEY_HEADS, WIDTH), jnp.array([TOKENS - 5], jnp.int32)
    update = jax.jit(ringmoe.update_cache, donate_argnums=0)
    ours = {name: (ringmoe.jit(decode(name)), cache) for name in ("merge", "all_gather")}
    updates = {"update": (update, jnp.copy(cache[0]))}
    for size in PAGES:
        (keys, table), (values, _) = (in_pages(x, size) for x in cache)
        ours[f"pages of {size}"] = ringmoe.jit(decode(pages=table)), (keys, values)
        by_pages = functools.partial(ringmoe.update_cache, page_indices=table)
        updates[f"update, pages of {size}"] = jax.jit(by_pages, donate_argnums=0), jnp.copy(keys)
    runs = ours | {"plain jax.nn": (jax.jit(plain), cache)}
    taken: dict[str, list[float]] = {name: [] for name in (*runs, *updates)}
    for name, (run, caches) in runs.items():  # one after another: a gathered cache would push the others' out of memory
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            jax.block_until_ready(run(query, *caches, lengths))
            taken[name].append(time.perf_counter() - start)
    for name, (run, old) in updates.items():
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            old = jax.block_until_ready(run(old, new, lengths))
            taken[name].append(time.perf_counter() - start)
    table = rich.table.Table(
        "", "ms", "sent a device", title=f"{TOKENS} tokens, N {HEADS}, K {KEY_HEADS}, H {WIDTH}, float32"
    )
    for name, seconds in taken.items():
        sent = ""
        if name in ours:
            run, caches = ours[name]
            (row,) = ringmoe.explain(run, query, *caches, lengths).rows
            sent = f"{row.wire_bytes:,} bytes"
        table.add_row(name, f"{1e3 * statistics.median(seconds[1:]):.1f}", sent)
    rich.console.Console(width=120).print(table)
    (row,) = ringmoe.explain(ringmoe.jit(decode()), query, *cache, lengths).rows
    print(row)


def on(target: str) -> None:
    machine = ringmoe.target(target)
    mesh = machine.mesh({"x": machine.num_devices})
    of = lambda spec, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    batch, heads, key_heads, width = 8, 32, 8, 128
    tokens, query, lengths = TOKENS // batch, of(P(), jnp.bfloat16, batch, 1, heads, width), of(P(), jnp.int32, batch)
    chip, run = CHIPS[machine.chip], ringmoe.jit(ringmoe.decode_attention)
    read = 2 * TOKENS * key_heads * width * 2 / machine.num_devices
    least = 1e6 * read * chip.devices_per_chip / chip.hbm_bandwidth
    for size in (None, *PAGES):
        shape = (batch, tokens) if size is None else (TOKENS // size, size)
        cache = of(SPEC if size is None else P("x"), jnp.bfloat16, *shape, key_heads, width)
        table = {} if size is None else {"page_indices": of(P(), jnp.int32, batch, tokens // size)}
        report = ringmoe.inspect(run, query, cache, cache, lengths, target=target, **table)
        what = "a cache" if size is None else f"pages of {size}"
        print(f"{target}, {what}: {report.us:.0f} us, waiting {report.exposed_us:.0f}; read once: {least:.0f}")
        print(*ringmoe.explain(run, query, cache, cache, lengths, **table).rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            on(name)
    else:
        on_cpu()
