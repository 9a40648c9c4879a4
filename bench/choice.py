"""Whether "auto" takes the fastest exchange: `python -m bench.choice [TARGET ...]`.

Every exchange of attention is compiled and read by the inspector, over targets, tokens a device, heads, masks and directions,
and "auto", which may take one forward and another backward, is compared with the fastest. bench/README.md has the table.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import itertools

import rich.console
import rich.progress
import rich.table

from bench.ring import inspected
from ringmoe.plan.attention import EXCHANGES

TARGETS = ("v5e:4x8", "v5p:2x2x2", "v5p:4x4x4", "v6e:2x4", "tpu7x:2x2x2", "h200x8")
TOKENS = (128, 1024, 4096)
HEADS = ((8, 8), (16, 2))


def times(*setting) -> dict[str, float]:
    """Microseconds of each exchange that the setting can have, and of "auto"."""
    found = {}
    for exchange in EXCHANGES:
        try:
            found[exchange] = inspected(*setting, exchange=exchange).us
        except ValueError as error:
            if "was asked for, but" not in str(error):
                raise
    return found


def main(targets: list[str]) -> None:
    console, losses = rich.console.Console(width=150), []
    table = rich.table.Table(
        "",
        "mask",
        "",
        "tokens",
        "N",
        "K",
        *EXCHANGES[1:],
        "auto",
        "over the best",
        title="microseconds by the inspector",
    )
    settings = [*itertools.product(targets or TARGETS, ("full", "causal"), (False, True), TOKENS, HEADS)]
    for target, mask, backward, tokens, heads in rich.progress.track(
        settings, "compiling", console=rich.console.Console(stderr=True)
    ):
        found = times(target, mask, backward, tokens, *heads)
        auto = found.pop("auto")
        losses.append(auto / min(found.values()) - 1)
        columns = [f"{found[name]:.0f}" if name in found else "-" for name in EXCHANGES[1:]]
        direction = "gradient" if backward else "forward"
        table.add_row(
            target, mask, direction, str(tokens), *map(str, heads), *columns, f"{auto:.0f}", f"{losses[-1]:.0%}"
        )
    console.print(table)
    console.print(
        f"{len(losses)} settings, {sum(x > 0.1 for x in losses)} more than 10% over the best, most {max(losses):.0%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
