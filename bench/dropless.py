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

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe

TOKENS = 4096  # a device
TARGETS = {"v5e:2x4": 8, "v5p:2x2x2": 8, "v6e:2x4": 8, "tpu7x:2x2x2": 16, "v5p:4x4x4": 64}


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    dim: int
    hidden: int
    num_experts: int
    top_k: int


LAYERS = (
    Layer("Mixtral 8x7B", 4096, 14336, 8, 2),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Layer("DeepSeek-V3", 7168, 2048, 256, 8),
)


def inspected(layer: Layer, target: str, gradient: bool):
    """The inspector's report of the layer, or of the gradients of its outputs' sum of squares."""
    devices, machine = TARGETS[target], ringmoe.target(target)
    mesh = machine.mesh({"x": devices})
    d, f, e = layer.dim, layer.hidden, layer.num_experts
    shapes = {(1, TOKENS * devices, d): P(None, "x"), (d, e): P(), (e, d, f): P("x"), (e, f, d): P("x")}
    x, router, w_in, w_out = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes.items()
    )
    config = ringmoe.RouterConfig(e, layer.top_k, None)

    def forward(x, router, w_in, w_out, w_gate):
        return ringmoe.moe_ffn(x, router, w_in, w_out, w_gate=w_gate, config=config)[0]

    loss = lambda *arrays: jnp.sum(forward(*arrays).astype(jnp.float32) ** 2)
    fun = ringmoe.jit(jax.grad(loss, tuple(range(5))) if gradient else forward)
    return ringmoe.inspect(fun, x, router, w_in, w_out, w_in, target=target)


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
            if layer.num_experts % TARGETS[target] == 0:
                for gradient in (False, True):
                    report = inspected(layer, target, gradient)
                    memory = f"{report.memory['temporaries'] / 2**30:.2f}" if report.memory else _too_much(report)
                    of, (run, waits) = "gradient" if gradient else "forward", _without_loops(report)
                    print(
                        f"| {target} | {layer.name} | {of} | {memory} GiB | {run:.2f} ms | {waits:.2f} ms |", flush=True
                    )


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
