"""The attention kernels' blocks for each TPU and head dim: those of the fewest bundles, by the compiler's schedule.

    python -m bench.blocks_tpu [TARGET ...]

prints the table of `tiles_tpu.BEST`: a causal call of bfloat16 in every size that is tried, as `bench.static_tpu` counts it,
in kilobundles, and the best of each as Python, where it isn't the default. Needs libtpu, and no TPU.
"""

import itertools
import sys

from bench import static_tpu
from ringmoe.inspector import kernels
from ringmoe.pallas.tiles_tpu import DEFAULT, Config

HEAD_DIMS = (64, 128, 256)
TRIED = {  # wider ones lose more in blocks that the boundary crosses
    "forward": [Config(512, 1024, chunk, ahead) for chunk, ahead in itertools.product((256, 512), (1, 2, 3))],
    "backward": [
        Config(512, k, chunk, ahead) for k, chunk, ahead in itertools.product((512, 1024), (256, 512), (1, 2))
    ],
}


def kilobundles(target: str, head_dim: int, direction: str, config: Config) -> float | None:
    """Of a causal call; None where the blocks don't fit."""
    try:
        return static_tpu.causal_call(target, head_dim, "bfloat16", direction, config)[1]
    except Exception as error:  # too large for VMEM, say
        print(f"{target} {head_dim} {direction} {config}: {str(error)[:80]}", file=sys.stderr, flush=True)
        return None


def main() -> None:
    kernels.request()  # before libtpu starts
    for target, head_dim, direction in itertools.product(sys.argv[1:] or static_tpu.TARGETS, HEAD_DIMS, TRIED):
        found = {config: kilobundles(target, head_dim, direction, config) for config in TRIED[direction]}
        found = {config: count for config, count in found.items() if count is not None}
        for config, count in sorted(found.items(), key=lambda item: item[1]):
            print(f"# {count:.1f} {config.block_q} {config.block_k} {config.chunk} {config.ahead}")
        best = min(found, key=found.__getitem__)
        if found[best] < found[DEFAULT[direction]]:
            print(f'("{target.split(":")[0]}", {head_dim}, "{direction}"): {best!r},', flush=True)


if __name__ == "__main__":
    main()
