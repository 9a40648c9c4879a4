"""What an expert layer waits for its exchange, all at once and chosen: `python -m bench.overlap [MODEL ...]`.

By the compilers and the inspector, no machines: 4096 tokens a device, capacity factor 1.25, bfloat16, one axis for tokens
and experts; forward, and backward compiled by itself, as in a loop over layers. The wire and the experts' matmuls are those
of the layer all at once: where matmuls take longer, at most 5% of a run should be waiting, else at most 1.1 (wire - matmuls).
bench/README.md has the table.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import dataclasses

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import rich.table
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe

TOKENS = 4096  # a device
DEVICES = {
    "v5e:2x4": 8,
    "v5p:2x2x2": 8,
    "v6e:2x4": 8,
    "tpu7x:2x2x2": 16,
    "v5p:4x4x4": 64,
    "v5e:16x16": 256,
    "h200x8": 8,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    name: str
    dim: int
    hidden: int
    num_experts: int
    top_k: int


MIXTRAL = Layer("Mixtral 8x7B", 4096, 14336, 8, 2)
QWEN = Layer("Qwen3-30B-A3B", 2048, 768, 128, 8)
DEEPSEEK = Layer("DeepSeek-V3", 7168, 2048, 256, 8)
ROWS = (
    (MIXTRAL, "v5p:2x2x2"), (MIXTRAL, "v6e:2x4"), (MIXTRAL, "v5e:2x4"), (MIXTRAL, "h200x8"), (QWEN, "tpu7x:2x2x2"),
    (QWEN, "h200x8"), (DEEPSEEK, "v5p:4x4x4"), (DEEPSEEK, "v5e:16x16"),
)  # fmt: skip


def inspected(layer: Layer, target: str, pullback, capacity_factor=1.25, exchange="auto"):
    """The inspector's report of the layer, or, of a function (layer, dy, arrays) -> gradients, of that."""
    devices = DEVICES[target]
    mesh = ringmoe.target(target).mesh({"x": devices})
    d, f, e = layer.dim, layer.hidden, layer.num_experts
    shapes = {(1, TOKENS * devices, d): P(None, "x"), (d, e): P(), (e, d, f): P("x"), (e, f, d): P("x")}
    x, router, w_in, w_out = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes.items()
    )
    config = ringmoe.RouterConfig(e, layer.top_k, capacity_factor)

    def forward(x, router, w_in, w_out, w_gate):
        return ringmoe.moe_ffn(x, router, w_in, w_out, w_gate=w_gate, config=config, exchange=exchange)[0]

    arrays = x, router, w_in, w_out, w_in
    if pullback is None:
        return ringmoe.inspect(ringmoe.jit(forward), *arrays, target=target)
    return ringmoe.inspect(ringmoe.jit(lambda dy, *arrays: pullback(forward, dy, *arrays)), x, *arrays, target=target)


def backward(forward, dy, *arrays):
    """All gradients, given y's."""
    return jax.vjp(forward, *arrays)[1](dy)


def exchanged(report) -> tuple[float, float]:
    """(on the wire, waited for), microseconds, of all but the router's sums."""
    ours = [c for c in report.collectives if "router" not in c.op_name]
    return sum(c.wire_us * c.trip_count for c in ours), sum(c.exposed_us * c.trip_count for c in ours)


def matmuls(report) -> float:
    """Microseconds of the experts' own."""
    ours = (o for o in report.operations if "experts/" in o.op_name and "dot_general" in o.op_name)
    return sum(o.total_us for o in ours)


def row(layer: Layer, target: str, pullback) -> tuple[str, ...]:
    once, chosen = (inspected(layer, target, pullback, exchange=how) for how in ("all_to_all", "auto"))
    (wire, waited_once), (_, waited), work = exchanged(once), exchanged(chosen), matmuls(once)
    if work > wire:
        goal, reached = "5% of a run", waited <= 0.05 * chosen.us
    else:
        goal, reached = f"{1.1 * (wire - work) / 1e3:.2f} ms", waited <= 1.1 * (wire - work)
    ms = lambda *us: " -> ".join(f"{t / 1e3:.2f}" for t in us)
    return (
        f"{layer.name}, {target}", "backward" if pullback else "forward", ms(wire), ms(work), ms(once.us, chosen.us),
        ms(waited_once, waited), f"{waited / chosen.us:.1%}", f"{goal}: {'yes' if reached else 'no'}",
    )  # fmt: skip


def main(names) -> None:
    columns = "layer", "pass", "wire, ms", "matmuls, ms", "a run, ms", "waiting, ms", "of a run", "at most"
    table = rich.table.Table(*columns, title="All at once -> as chosen")
    chosen = [r for r in ROWS if not names or any(name in f"{r[0].name}, {r[1]}" for name in names)]
    for layer, target in rich.progress.track(chosen, "compiling"):
        for pullback in (None, backward):
            table.add_row(*row(layer, target, pullback))
    rich.console.Console(width=150).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
