"""All that is measured on a Hopper GPU, in one command: `python -m bench.gpu [PART ...] [--out OUT.json] [--minutes 10]`.

Parts are attention, hop, rows, grouped, layer: each way to do a thing is compiled, held against what is right, and timed
beside the others. Of the time every part may use its share, and what the ones before it left; cases that it doesn't suffice
for are named as such. A share of the limit is of the rate of an 8192^3 bfloat16 matmul, or of a large copy, in this same run;
"beside" is the best other way's time over ours.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from bench.gpu import attention, grouped, hop, layer, rows
from bench.gpu.case import Case, Limits, Row, attempt, limits, measure, programs_of, unmeasured
from ringmoe.pallas.hopper import is_hopper

PARTS = {  # what makes the cases, and the share of the time
    "attention": (attention.cases, 0.5),
    "hop": (hop.cases, 0.05),
    "rows": (rows.cases, 0.1),
    "grouped": (grouped.cases, 0.1),
    "layer": (layer.cases, 0.25),
}
AT_ONCE = 4  # cases whose programs are compiled together
LATE = "not reached in the time given"


def run(
    parts: Mapping[str, tuple[Callable[[], list[Case]], float]], limits: Limits, seconds: float, show=print
) -> list[Row]:
    """The rows of all parts; `show` gets those of each case."""
    found, shares, began = [], sum(share for _, share in parts.values()), time.perf_counter()
    until = began
    for part, (cases, share) in parts.items():
        until += seconds * share / shares
        in_time = lambda until=until: time.perf_counter() < until
        for batch in itertools.batched(cases(), AT_ONCE):
            programs = attempt(programs_of, batch) if in_time() else LATE
            for number, case in enumerate(batch):
                why = programs if isinstance(programs, str) else "" if in_time() else LATE
                new = unmeasured(part, case, why) if why else measure(part, case, programs[number], limits)
                found += new
                show(new)
    return found


def table(rows: list[Row]) -> Table:
    number = lambda x, form, unit=1.0: "" if x is None else format(x / unit, form)
    drawn = Table("part", "case", "way", "ms", "T/s", "of limit", "beside", "temp GiB", "off by", "")
    for row in rows:
        drawn.add_row(
            row.part, row.case, row.way, number(row.ms, ".3f"), number(row.rate, ".3g", 1e12),
            number(row.of_limit, ".0%"), number(row.beside, ".2f"), number(row.temporary, ".2f", 2**30),
            number(row.off, ".1e"), row.said,
        )  # fmt: skip
    return drawn


def record(device: str, limits: Limits, rows: list[Row]) -> dict[str, Any]:
    """What the JSON says."""
    return {
        "device": device,
        "jax": jax.__version__,
        "matmul_flops_per_second": limits.flops,
        "copy_bytes_per_second": limits.bandwidth,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="what is measured on a Hopper GPU")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--out", help="a JSON file for all of it, written after every case")
    parser.add_argument("--minutes", type=float, default=10.0, help="that all may take")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    began, device = time.perf_counter(), jax.devices()[0].device_kind
    if not is_hopper(device):
        sys.exit(
            f"bench.gpu: the first device is {device!r}, expected a Hopper GPU; on a host with one, set JAX_PLATFORMS=cuda"
        )
    console, reached, found = Console(width=160), limits(), []
    console.print(
        f"{device}, jax {jax.__version__}: {reached.flops / 1e12:.0f} TFLOP/s, {reached.bandwidth / 1e12:.2f} TB/s"
    )

    def show(new: list[Row]) -> None:
        found.extend(new)
        for row in new:
            ms = "-" if row.ms is None else f"{row.ms:.3f} ms"
            console.print(f"{time.perf_counter() - began:4.0f} s  {row.part}: {row.case}: {row.way}: {ms} {row.said}")
        if options.out:
            with open(options.out, "w") as file:
                json.dump(record(device, reached, found), file, indent=1)

    chosen = {name: PARTS[name] for name in options.parts or PARTS}
    run(chosen, reached, 60 * options.minutes - (time.perf_counter() - began), show)
    console.print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
