"""Ten million tokens: the gradient of one attention layer, by compiler and inspector: `python -m bench.long [TARGET ...]`.

Causal, N 16, K 4, H 128, bf16, 10,485,760 tokens over all devices. Useful FLOPs are those of the pairs that the mask leaves,
4 H forward and 10 H backward, of what the chips' matrix units can do in that time.
"""

import sys

from bench.ring import HEAD_DIM, inspected
from ringmoe.inspector.chips import CHIPS
from ringmoe.inspector.machines import target

TOKENS, HEADS, KEY_HEADS = 10 * 2**20, 16, 4


def main(targets: list[str]) -> None:
    for name in targets or ("v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x8"):
        machine = target(name)
        devices, chip = machine.num_devices, CHIPS[machine.chip]
        found = inspected(name, "causal", True, TOKENS // devices, HEADS, KEY_HEADS)
        useful = 14 * HEAD_DIM * HEADS * TOKENS**2 / 2 / devices
        rate = chip.matmul_flops["bf16"] / chip.devices_per_chip
        print(
            f"{name}: {found.us / 1e6:.2f} s, waiting {found.exposed_us / 1e6:.3f} s, "
            f"{found.peak_bytes / 2**30:.2f} GiB a device, useful FLOPs {useful / rate / found.us * 1e6:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
