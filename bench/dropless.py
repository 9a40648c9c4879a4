"""What a dropless expert layer asks of each device, compiled for machines that aren't there: `python -m bench.dropless`.

A table: temporary memory a device by the compiler, and by the inspector the time and the wait for the wire of a run whose
routing is near even: without the loop over further windows, but with a window that is full, a quarter more than comes.
Forward and gradient of one layer with its router, 4096 tokens a device, bfloat16, one axis for tokens and experts;
bench/README.md has it.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp

from bench.overlap import DEEPSEEK, DEVICES, MIXTRAL, QWEN, inspected

TARGETS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2", "v5p:4x4x4")
LAYERS = (MIXTRAL, QWEN, DEEPSEEK)


def gradients(forward, _, *arrays):
    """Of the sum of the outputs' squares, forward and backward in one program."""
    loss = lambda *arrays: jnp.sum(forward(*arrays).astype(jnp.float32) ** 2)
    return jax.grad(loss, tuple(range(len(arrays))))(*arrays)


def _without_loops(report) -> tuple[float, float]:
    """Milliseconds of a run, and of waiting in it, but for loops whose turns the text doesn't tell."""
    entry = report.timelines[-1]
    loops = sum(span.end - span.start for span in entry.spans if span.name in report.unknown_loops)
    waits = sum(c.exposed_us for c in entry.collectives)
    return (entry.us - loops) / 1e3, waits / 1e3


def _too_much(report) -> str:
    return f"over {report.hbm_bytes / 2**30:.0f}: at the peak {report.oversize.needed_bytes / 2**30:.1f}"


def main(targets) -> None:
    print("| target | layer | | temporary memory | run | waiting for the wire |")
    print("|---|---|---|---|---|---|")
    for target in targets:
        for layer in LAYERS:
            if layer.num_experts % DEVICES[target] == 0:
                for gradient in (False, True):
                    report = inspected(layer, target, gradients if gradient else None, capacity_factor=None)
                    memory = f"{report.memory['temporaries'] / 2**30:.2f}" if report.memory else _too_much(report)
                    of, (run, waits) = "gradient" if gradient else "forward", _without_loops(report)
                    print(
                        f"| {target} | {layer.name} | {of} | {memory} GiB | {run:.2f} ms | {waits:.2f} ms |", flush=True
                    )


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
