"""A ring beside tokamax's, by the compilers and the inspector: `python -m bench.peer_ring [TARGET ...]`, where it is installed.

The op of `bench.ring` with a full mask, K 8; of tokamax the ring of its splash kernels, which is unrolled, with blocks of 1024
queries by 1024 keys, 512 at once. For each: ms a run, of them waiting; MiB of temporaries a device.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from bench.ring import HEAD_DIM, HEADS, TARGETS, inspected, mesh_of

ROWS, KEYS, COMPUTE = 1024, 1024, 512


def tokamax(target: str, backward: bool, tokens: int):
    """The inspector's report of its ring, over the same mesh of the same devices."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        ring_attention_kernel,
        splash_attention_kernel,
        splash_attention_mask,
    )

    machine = ringmoe.target(target)
    mesh = mesh_of(machine)
    total = tokens * machine.num_devices
    config = splash_attention_kernel.SplashConfig(
        block_q=ROWS, block_kv=KEYS, block_kv_compute=COMPUTE, block_q_dkv=ROWS, block_kv_dkv=KEYS,
        block_kv_dkv_compute=COMPUTE,
    )  # fmt: skip
    kernel = ring_attention_kernel.make_ring_attention(
        splash_attention_mask.FullMask((total, total)),
        config=config,
        is_mqa=False,
        ring_axis="x",
        q_seq_shards=machine.num_devices,
        kv_seq_shards=machine.num_devices,
    )
    split = P(None, "x")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(kernel.manual_sharding_spec(), *[split] * 3),
        out_specs=split,
        check_vma=False,
    )
    def ring(kernel, q, k, v):
        return kernel(q, k, v)

    attend = functools.partial(ring, kernel)
    x = jax.ShapeDtypeStruct((HEADS, total, HEAD_DIM), jnp.bfloat16, sharding=NamedSharding(mesh, split))
    if not backward:
        return ringmoe.inspect(jax.jit(attend), x, x, x, target=target)
    return ringmoe.inspect(jax.jit(lambda do, *qkv: jax.vjp(attend, *qkv)[1](do)), x, x, x, x, target=target)


def told(report) -> str:
    if report.peak_bytes > report.hbm_bytes:
        return f"does not fit: {report.peak_bytes / 2**30:.0f} of {report.hbm_bytes / 2**30:.0f} GiB"
    return f"{report.us / 1e3:.4g} ({report.exposed_us / 1e3:.3g}), {report.memory['temporaries'] / 2**20:,.0f} MiB"


def main(targets: list[str]) -> None:
    print("| target | tokens a device | | ours | tokamax |")
    print("|---|---|---|---|---|")
    for target in targets or TARGETS[:-1]:
        for tokens in (4096, 32768):
            for backward in (False, True):
                cells = []
                for of in (lambda *how: inspected(how[0], "full", *how[1:], exchange="ring"), tokamax):
                    try:
                        cells.append(told(of(target, backward, tokens)))
                    except Exception as error:
                        cells.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}")
                print(
                    f"| {target} | {tokens:,} | {'gradient' if backward else 'forward'} | {' | '.join(cells)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
