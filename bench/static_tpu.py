"""What the attention kernels cost a TPU for a pair of blocks, by its compiler: ours beside JAX's splash attention
and, where it is installed, tokamax's.

    python -m bench.static_tpu [TARGET ...]

Needs libtpu, and no TPU. A TPU issues its bundles in order, so they are cycles but for waits for memory. Counted are those from
the first to the last that uses a matrix unit, of 512 queries and 1024 keys: of a block that nothing is hidden of, of one that
is masked by a causal boundary, and of one with segments besides. `causal call` is all blocks of 8192 tokens as they occur, in
kilobundles: of those along the diagonal ours computes little more than what is seen.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import functools
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ringmoe.inspector import kernels
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band
from ringmoe.pallas import attention_tpu, tiles_tpu
from ringmoe.pallas.logits_tpu import Pair
from ringmoe.pallas.tiles_tpu import Config

TARGETS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2")
ROWS, KEYS, LENGTH = 512, 1024, 8192  # of the pair that is counted; of the call
HEADS = 4


def bundles(target: str, fun, *args) -> list[kernels.Kernel]:
    """The compiler's schedules of the Pallas kernels in `fun`."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), args)
    with kernels.dumping(tpu=True) as dumps:
        jax.jit(fun).lower(*args).compile()
        return [
            kernel
            for path in sorted(set(dumps.tpu.glob(kernels._SCHEDULE)) - dumps.before)
            if (kernel := kernels.tpu_kernel(path.name, path.read_text())).units.get("MXU", 0) > 0.02
        ]


def shapes(length: int, head_dim: int, dtype: str):
    """q, k, v, do [1, N, T, H], lse and delta."""
    one = jax.ShapeDtypeStruct((1, HEADS, length, head_dim), dtype)
    row = jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32)
    return one, one, one, one, row, row


def ours(
    target: str,
    head_dim: int,
    dtype: str,
    direction: str,
    masked: bool,
    segments: bool = False,
    diagonal: int | None = None,
    config: Config | None = None,
) -> float:
    """Bundles of one pair of blocks, in which the boundary begins at the key `diagonal`, if that isn't None; of blocks of
    another size, of as many as make up a pair."""
    config = config or config_of(target, head_dim, dtype, direction)
    spec, at = AttentionSpec(head_dim**-0.5, Band(right=0)), Offsets((0,), (0,))
    ids = (jax.ShapeDtypeStruct((1, 2048), jnp.int32),) * 2 if segments else ()

    def forward(q, k, v, do, lse, delta, *ids):
        extras = Extras(query_segments=ids[0], key_segments=ids[1]) if ids else Extras()
        if direction == "forward":
            return attention_tpu.forward(spec, attention_tpu.init(spec, q, v), q, k, v, extras, at, config)
        return attention_tpu.backward(spec, None, q, k, v, do, lse, delta, extras, at, config)

    def run(self, block):
        self._seen_and_full()
        block(masked, 0, config.block_k if diagonal is None else diagonal + config.block_q, diagonal)

    with mock.patch.object(Pair, "run", run):
        (kernel,) = bundles(target, forward, *shapes(2048, head_dim, dtype), *ids)
    return kernel.busy_bundles * (ROWS * KEYS) / (config.block_q * config.block_k)


def config_of(target: str, head_dim: int, dtype: str, direction: str) -> Config:
    """What the kernel takes there."""
    q, *_ = shapes(LENGTH, head_dim, dtype)
    return tiles_tpu.best(direction, AttentionSpec(1.0, chip=target.split(":")[0]), q, q)


def splash(compute: int):
    """JAX's splash attention, whose backward pass is two kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    sizes = splash_attention_kernel.BlockSizes(
        block_q=ROWS, block_kv=KEYS, block_kv_compute=compute, block_q_dkv=ROWS, block_kv_dkv=KEYS,
        block_kv_dkv_compute=compute, block_q_dq=ROWS, block_kv_dq=KEYS,
    )  # fmt: skip
    masks = [splash_attention_mask.CausalMask((2048, 2048)) for _ in range(HEADS)]
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask(masks), block_sizes=sizes
    )


def tokamax(compute: int):
    """tokamax's, descended from that. Its backward pass is one kernel, and a sum over parts of dq that isn't counted."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    config = splash_attention_kernel.SplashConfig(
        block_q=ROWS, block_kv=KEYS, block_kv_compute=compute, block_q_dkv=ROWS, block_kv_dkv=KEYS,
        block_kv_dkv_compute=compute,
    )  # fmt: skip
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.CausalMask((2048, 2048)), config=config
    )


@functools.cache
def fewest(make, target: str, head_dim: int, dtype: str, direction: str) -> float | None:
    """Bundles of a pair by a peer, over some of its block sizes, its backward kernels together; None where it isn't installed.

    tokamax's kernels hold two bodies, for a block of which all is seen and for another: a pair is half of both.
    """

    def call(compute: int, q, k, v, do):
        kernel = make(compute)
        if direction == "forward":
            return kernel(q[0], k[0], v[0])
        return jax.vjp(kernel, q[0], k[0], v[0])[1](do[0].astype(q.dtype))

    found = []
    for compute in (256, 512, 1024):
        try:
            every = bundles(target, functools.partial(call, compute), *shapes(2048, head_dim, dtype)[:4])
        except ImportError:
            return None
        except Exception as error:  # too large for VMEM, say
            print(f"{make.__name__} {compute}: {str(error)[:80]}", file=sys.stderr)
            continue
        backward = [kernel for kernel in every if "dq" in kernel.name or "dkv" in kernel.name]
        found.append(sum(kernel.busy_bundles for kernel in (every if direction == "forward" else backward)))
    return min(found) / (2 if make is tokamax else 1)


def call(full: float, crossed: Sequence[float], rows: int = ROWS, keys: int = KEYS) -> float:
    """Kilobundles of a causal call in blocks of so many queries and keys, of which a pair of ROWS and KEYS takes so many:
    `full` before the boundary, `crossed[n]` where it begins n blocks of queries after the first key."""
    cost = sum(start // keys * full + crossed[start % keys // rows] for start in range(0, LENGTH, rows))
    return cost * rows / ROWS * keys / KEYS / 1000


def causal_call(target: str, head_dim: int, dtype: str, direction: str, config: Config) -> tuple[float, float]:
    """Bundles of a full pair of our blocks, and kilobundles of the call."""
    count = functools.partial(ours, target, head_dim, dtype, direction, config=config)
    full, diagonals = count(False), range(0, config.block_k, config.block_q)
    return full, call(full, [count(True, diagonal=n) for n in diagonals], config.block_q, config.block_k)


def main() -> None:
    kernels.request()  # before libtpu starts
    print(
        "| target | H | dtype | direction | full | masked | segments | causal call | splash | ratio | tokamax | ratio |"
    )
    print("|---" * 12 + "|")
    for target in sys.argv[1:] or TARGETS:
        for head_dim, dtype in ((128, "bfloat16"), (64, "bfloat16"), (256, "bfloat16"), (128, "float32")):
            for direction in ("forward", "backward"):
                what = target, head_dim, dtype, direction
                full, mine = causal_call(*what, config_of(*what))
                masked, packed = (ours(*what, True, segments=segments) for segments in (False, True))
                words = [*what, *(f"{x:.0f}" for x in (full, masked, packed, mine))]
                for make in (splash, tokamax):
                    pair = fewest(make, *what)
                    theirs = None if pair is None else call(pair, (pair, pair))
                    words += ["-", "-"] if theirs is None else [f"{theirs:.0f}", f"{mine / theirs:.2f}"]
                print("|", " | ".join(map(str, words)), "|", flush=True)


if __name__ == "__main__":
    main()
