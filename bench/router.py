"""What routing costs beside `jax.lax.top_k` alone: `python -m bench.router`, on CPU. bench/README.md has the table.

`route` gives experts, slots and weights, what a layer takes of a routing; `route + metrics` these and all of `MoeMetrics`.
Process time of all threads, which others' work on the machine changes least, and the least of rounds in which each program runs
about LEAST seconds, in turn with the others.
"""

import functools
import time
from collections.abc import Callable

import jax
from jax import lax
from rich.console import Console
from rich.table import Table

from ringmoe.router import RouterConfig, metrics, route

T, ROUNDS, LEAST = 8192, 9, 0.05
SHAPES = ((8, 2), (64, 4), (128, 8), (1024, 8))


def programs(config: RouterConfig) -> dict[str, Callable]:
    def routed(logits):
        routing = route(logits, config)
        return routing, (routing.expert, routing.slot, routing.weight)

    def measured(logits):
        routing, used = routed(logits)
        return used, metrics(routing, logits, config)

    return {
        "lax.top_k": lambda logits: lax.top_k(logits, config.top_k),
        "route": lambda logits: routed(logits)[1],
        "route + metrics": measured,
    }


def milliseconds(calls: dict[str, Callable]) -> dict[str, float]:
    """The least process time of one call of each."""
    repeats, found = {}, dict.fromkeys(calls, float("inf"))
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        repeats[name] = 1 + int(LEAST / (time.perf_counter() - start))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                jax.block_until_ready(call())
            found[name] = min(found[name], 1e3 * (time.process_time() - start) / repeats[name])
    return found


def main() -> None:
    table = Table("E, k", "lax.top_k", "route", "route + metrics", title=f"process ms, fp32 logits [{T}, E]")
    for num_experts, k in SHAPES:
        logits = jax.random.normal(jax.random.key(0), (1, T, num_experts))
        compiled = {name: jax.jit(f) for name, f in programs(RouterConfig(num_experts, k)).items()}
        found = milliseconds({name: functools.partial(f, logits) for name, f in compiled.items()})
        alone = found.pop("lax.top_k")
        table.add_row(f"{num_experts}, {k}", f"{alone:.2f}", *(f"{x:.2f} ({x / alone:.2f}x)" for x in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
