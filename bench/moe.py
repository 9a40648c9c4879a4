"""One expert layer, ours beside five ways to write it in plain JAX: `python -m bench.moe [--quick]`, on CPU.

Float32, SwiGLU, T 8192, D 512; every implementation makes its own logits and routing, so a layer is timed whole, `forward`
and with all gradients. Logits are normal; "skewed" ones add log(1/rank), so that experts are asked about as Zipf's law has
it. `ours 1.25` and `one-hot` (GShard's groups of 256 tokens) and `loop` have capacity for 1.25 times an even share and drop
the rest, in the table; the others drop nothing. First, all are held against each other with room for everything.

Times are of rounds in which each implementation runs once: process time of all cores, and wall time; least and median. The
share of the matmul limit is of the work that was asked for (T k rows, whatever is padded or dropped), against the largest
rate of a plain float32 matmul in this same run; both by process time, which others' work on the machine changes least.
Memory is the compiler's count of a program's temporaries; what needs more than MOST_BYTES is compiled and not run.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

import ringmoe
from bench.specs import LAYERS, ExpertsShape
from ringmoe.router import RouterConfig, route


def make_inputs(spec: ExpertsShape, skew: float = 0.0, dtype=jnp.float32):
    """x, router_weight, w_in, w_gate, w_out. The first of x's columns is 1; there the router has its preferences."""
    keys = jax.random.split(jax.random.key(0), 5)
    normal = functools.partial(jax.random.normal, dtype=dtype)
    num_experts, dim, hidden = spec.num_experts, spec.model_dim, spec.hidden_dim
    router_weight = normal(keys[1], (dim, num_experts)) / math.sqrt(dim)
    preference = -skew * jnp.log(jnp.arange(1, num_experts + 1, dtype=jnp.float32))
    return (
        normal(keys[0], (1, spec.num_tokens, dim)).at[..., 0].set(1),
        router_weight.at[0].set(preference.astype(dtype)),
        normal(keys[2], (num_experts, dim, hidden)) / math.sqrt(dim),
        normal(keys[3], (num_experts, dim, hidden)) / math.sqrt(dim),
        normal(keys[4], (num_experts, hidden, dim)) / math.sqrt(hidden),
    )


def config_of(spec: ExpertsShape) -> RouterConfig:
    return RouterConfig(spec.num_experts, spec.top_k, spec.capacity_factor, spec.group_size)


def ours(spec, x, router_weight, w_in, w_gate, w_out):
    return ringmoe.moe_ffn(x, router_weight, w_in, w_out, w_gate=w_gate, config=config_of(spec))[0]


def one_hot(spec, x, router_weight, w_in, w_gate, w_out):
    """Dispatch and combine as einsums with one-hot tensors [groups, i, E, C], after GShard."""
    routing = route(logits_of(x, router_weight), config_of(spec))
    arrays = (routing.expert, routing.slot, routing.weight, x)
    expert, slot, weight, tokens = (a.reshape(-1, routing.group_size, a.shape[-1]) for a in arrays)

    def place(scale):
        of_expert = jax.nn.one_hot(expert, spec.num_experts) * scale[..., None]
        return jnp.einsum("gike,gikc->giec", of_expert, jax.nn.one_hot(slot, routing.capacity)).astype(x.dtype)

    rows = jnp.einsum("giec,gid->egcd", place(jnp.ones_like(weight)), tokens)
    hidden = jax.nn.silu(jnp.einsum("egcd,edf->egcf", rows, w_gate)) * jnp.einsum("egcd,edf->egcf", rows, w_in)
    out = jnp.einsum("egcf,efd->egcd", hidden, w_out)
    return jnp.einsum("giec,egcd->gid", place(weight), out).reshape(x.shape)


def logits_of(x, router_weight):
    return jnp.matmul(x, router_weight, preferred_element_type=jnp.float32)


def chosen(spec, x, router_weight):
    """What the dropless peers share: (weight, expert), [T, k]."""
    weight, expert = lax.top_k(jax.nn.softmax(logits_of(x[0], router_weight)), spec.top_k)
    return (weight / weight.sum(-1, keepdims=True)).astype(x.dtype), expert


def every_expert(spec, x, router_weight, w_in, w_gate, w_out):
    """All experts on all tokens, one after another, each token's output times its weight for the expert, mostly 0."""
    weight, expert = chosen(spec, x, router_weight)
    of_expert = jnp.sum(jax.nn.one_hot(expert, spec.num_experts, dtype=x.dtype) * weight[..., None], 1).T

    def add(y, one):
        scale, w_in, w_gate, w_out = one
        return y + scale[:, None] * (jax.nn.silu(x[0] @ w_gate) * (x[0] @ w_in) @ w_out), None

    return lax.scan(add, jnp.zeros_like(x[0]), (of_expert, w_in, w_gate, w_out))[0][None]


def loop(spec, x, router_weight, w_in, w_gate, w_out):
    """Sorted by expert; then expert after expert its first C choices; back by each choice's place."""
    weight, expert = chosen(spec, x, router_weight)
    flat, capacity = expert.reshape(-1), capacity_of(spec, spec.num_tokens)
    order = jnp.argsort(flat)
    ends = jnp.cumsum(jnp.bincount(flat, length=spec.num_experts))
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    token = jnp.pad(order // spec.top_k, (0, capacity))

    def one(arrays):
        start, w_in, w_gate, w_out = arrays
        rows = x[0][lax.dynamic_slice_in_dim(token, start, capacity)]
        return jax.nn.silu(rows @ w_gate) * (rows @ w_in) @ w_out

    out = lax.map(one, (starts, w_in, w_gate, w_out)).reshape(-1, spec.model_dim)
    place = (jnp.argsort(order) - starts[flat]).reshape(expert.shape)
    rows = out[expert * capacity + jnp.minimum(place, capacity - 1)]
    return jnp.einsum("tk,tkd->td", jnp.where(place < capacity, weight, 0), rows)[None]


def ragged(spec, x, router_weight, w_in, w_gate, w_out):
    """Dropless: assignments sorted by expert, grouped matmuls by lax.ragged_dot, back by the inverse permutation."""
    weight, expert = chosen(spec, x, router_weight)
    order = jnp.argsort(expert.reshape(-1))
    sizes = jnp.bincount(expert.reshape(-1), length=spec.num_experts).astype(jnp.int32)
    rows = x[0][order // spec.top_k]
    hidden = jax.nn.silu(lax.ragged_dot(rows, w_gate, sizes)) * lax.ragged_dot(rows, w_in, sizes)
    out = lax.ragged_dot(hidden, w_out, sizes)[jnp.argsort(order)].reshape(*weight.shape, -1)
    return jnp.einsum("tk,tkd->td", weight, out)[None]


MOST_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Entry:
    """An implementation as it stands in the table; group_size: among how many tokens it drops, 0 if it drops nothing."""

    layer: Callable
    group_size: int

    def of(self, spec: ExpertsShape) -> ExpertsShape:
        factor = spec.capacity_factor if self.group_size else None
        return dataclasses.replace(spec, capacity_factor=factor, group_size=self.group_size or None)


ENTRIES = {
    "ours 1.25": Entry(ours, 4096),
    "ours dropless": Entry(ours, 0),
    "one-hot": Entry(one_hot, 256),
    "every expert": Entry(every_expert, 0),
    "loop": Entry(loop, 8192),
    "ragged_dot": Entry(ragged, 0),
}


def capacity_of(spec: ExpertsShape, group_size: int) -> int:
    return math.ceil(group_size * spec.top_k * spec.capacity_factor / spec.num_experts)


def with_gradients(layer: Callable) -> Callable:
    """All gradients of some number of the layer's output."""
    return jax.grad(lambda *inputs: jnp.sum(jnp.sin(layer(*inputs))), argnums=(0, 1, 2, 3, 4))


def check(spec: ExpertsShape) -> None:
    """All implementations agree, outputs and gradients, where there is room for every choice."""
    spec = dataclasses.replace(spec, num_tokens=256, capacity_factor=spec.num_experts / spec.top_k, group_size=256)
    inputs = make_inputs(spec, skew=1)
    for backward in (False, True):
        found = {}
        for name, entry in ENTRIES.items():
            layer = functools.partial(entry.layer, spec)
            found[name] = jax.jit(with_gradients(layer) if backward else layer)(*inputs)
        want = found.pop("every expert")
        for name, got in found.items():
            for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
                np.testing.assert_allclose(g, w, atol=1e-4 * float(jnp.abs(w).max()), err_msg=name)


def dropped(spec: ExpertsShape, inputs, group_size: int) -> float:
    """The share of choices that find no room."""
    if not group_size:
        return 0.0
    expert = np.asarray(chosen(spec, *inputs[:2])[1]).reshape(-1, group_size * spec.top_k)
    counts = np.stack([np.bincount(group, minlength=spec.num_experts) for group in expert])
    return np.maximum(counts - capacity_of(spec, group_size), 0).sum() / expert.size


def timed(programs: dict[str, Callable], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(process, wall) seconds of each program in each round."""
    found = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(rounds):
        for name, program in programs.items():
            process, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(program())
            found[name].append((time.process_time() - process, time.perf_counter() - wall))
    return found


def matmul_limit(rounds: int = 8) -> float:
    """The largest rate of a float32 matmul here, FLOP per second of one core's process time."""
    best = 0.0
    for n in (1024, 2048, 3072):
        a = jnp.ones((n, n), jnp.float32)
        product = jax.jit(jnp.matmul).lower(a, a).compile()
        times = timed({"": functools.partial(product, a, a)}, rounds)[""]
        best = max(best, 2 * n**3 / min(process for process, _ in times))
    return best


def measure(spec: ExpertsShape, skew: float, backward: bool, rounds: int, names):
    """For each implementation its times, temporary bytes and drops."""
    inputs = make_inputs(spec, skew)
    programs, memory = {}, {}
    for name in names:
        entry = ENTRIES[name]
        layer = functools.partial(entry.layer, entry.of(spec))
        compiled = jax.jit(with_gradients(layer) if backward else layer).lower(*inputs).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        if memory[name] <= MOST_BYTES:
            programs[name] = functools.partial(compiled, *inputs)
    times = timed(programs, rounds)
    return {name: (times.get(name), memory[name], dropped(spec, inputs, ENTRIES[name].group_size)) for name in names}


def row(times, memory: int, lost: float, work: float, limit: float) -> list[str]:
    """The cells after an implementation's name."""
    cells = ["", "", "", "", "not run"]
    if times is not None:
        process, wall = zip(*times)
        cells = [f"{1e3 * f(side):.0f}" for side in (process, wall) for f in (min, statistics.median)]
        cells.append(f"{100 * work / (limit * min(process)):.0f}%")
    return [*cells, f"{memory / 2**20:.0f}", f"{100 * lost:.1f}%"]


def main() -> None:
    parser = argparse.ArgumentParser(description="one expert layer beside five ways to write it in plain JAX")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds, even routing alone, nothing that is always slow"
    )
    parser.add_argument("--experts", type=int, help="only the shape with so many experts")
    args = parser.parse_args()
    console, limit = Console(width=130), matmul_limit()
    columns = ("pass", "ids", "layer", "process ms", "median", "wall ms", "median", "of limit", "MiB", "dropped")
    names = [n for n in ENTRIES if not args.quick or n not in ("every expert", "ragged_dot")]
    for spec in LAYERS:
        if args.experts not in (None, spec.num_experts):
            continue
        check(spec)
        shape = f"T {spec.num_tokens}, D {spec.model_dim}, F {spec.hidden_dim}, E {spec.num_experts}, k {spec.top_k}"
        table = Table(*columns, title=f"{shape}; a matmul reaches {limit / 1e9:.0f} GF/s a core")
        for backward in (False, True):
            work = (3 if backward else 1) * 6 * spec.num_tokens * spec.top_k * spec.model_dim * spec.hidden_dim
            for ids, skew in (("even", 0.0), ("skewed", 1.0))[: 1 if args.quick else 2]:
                for name, found in measure(spec, skew, backward, 2 if args.quick else 5, names).items():
                    table.add_row("both" if backward else "forward", ids, name, *row(*found, work, limit))
        console.print(table)


if __name__ == "__main__":
    main()
