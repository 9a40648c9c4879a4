"""How many choices a capacity drops, by scope: `python -m bench.drops`. A table in percent; bench/README.md has it.

Logits are normal; "clustered" ones share half of their variance over 64 consecutive tokens, as text's neighbours do. In the
long run every expert is asked as often as every other, so that all that is dropped is a scope's doing.
"""

import functools

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from ringmoe.router import RouterConfig, metrics, route

BATCH, T, RUN = 8, 8192, 64
SHAPES = ((8, 2), (16, 1), (64, 8), (128, 8), (256, 8))
SCOPES = {
    "256": dict(group_size=256), "1024": dict(group_size=1024), "4096": dict(group_size=4096),
    "sequence": dict(scope="sequence"), "global": dict(scope="global"),
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=(1, 2))
def dropped(key, config, clustered):
    shared, own = (
        jax.random.normal(k, (BATCH, T // r, config.num_experts)) for k, r in zip(jax.random.split(key), (RUN, 1))
    )
    logits = (own + jnp.repeat(shared, RUN, 1)) / 2**0.5 if clustered else own
    return 100 * metrics(route(logits, config), logits).drop_fraction


def main():
    table = Table("logits", "E, k", "factor", *SCOPES, title=f"% of choices dropped, {BATCH} sequences of {T} tokens")
    for clustered in (False, True):
        for num_experts, k in SHAPES:
            for factor in (1.0, 1.25, 2.0):
                row = [
                    float(dropped(jax.random.key(0), RouterConfig(num_experts, k, factor, **scope), clustered))
                    for scope in SCOPES.values()
                ]
                name = "clustered" if clustered else "independent"
                table.add_row(name, f"{num_experts}, {k}", str(factor), *(f"{x:.1f}" for x in row))
    Console().print(table)


if __name__ == "__main__":
    main()
