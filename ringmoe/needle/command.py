"""`ringmoe needle`: trains the reference system, hides facts in long contexts and asks for them.

ringmoe needle --quick
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

try:
    import matplotlib  # noqa: F401  (pictures and glyphs need it)
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"ringmoe needle needs {error.name!r}, which is not installed: pip install 'ringmoe[examples]'", name=error.name
    ) from error

from ringmoe.demo import placement
from ringmoe.needle import evaluate, experts, machines, model, picture, positions, prices, train
from ringmoe.needle.haystack import AXIS, Reader

WEIGHTS = pathlib.Path(__file__).parent / "weights.npz"
QUICK = tuple(2**i for i in (10, 14, 18, 20))
SHORTEST = 1024
POSITIONED = (2**10, 2**14, 2**18)  # where positions are compared
FULL = (*(2**i for i in (10, 12, 14, 16, 18, 20)), 4 * 2**20, 10 * 2**20)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ringmoe needle",
        description="Trains a small sparse model of text, images and audio on contexts of at most 2048 tokens, and measures "
        f"what it recalls from contexts of up to {FULL[-1]:,}, whose cache is sharded over {placement.NUM_DEVICES} CPU "
        "devices.",
        epilog="With --quick the weights that come with RingMoE, made by this command, are measured up to a million tokens: "
        "four minutes on two cores.",
    )
    parser.add_argument("--quick", action="store_true", help="don't train; up to a million tokens")
    parser.add_argument("--steps", type=int, default=train.STEPS, help="of training (default %(default)s)")
    parser.add_argument("--trials", type=int, help="facts of each modality at each depth (default 4; quick 2)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of context (default 1024 ... 10485760)")
    parser.add_argument(
        "--devices", type=int, default=placement.NUM_DEVICES, help="that the cache is cut into (default %(default)s)"
    )
    parser.add_argument("--weights", type=pathlib.Path, help="measure these weights, don't train")
    parser.add_argument(
        "--checkpoints", type=pathlib.Path, help="folder to keep training's state in, and to resume it from"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/needle"), help="folder (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and haystacks (default %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="what to measure (default all but costs; quick: recall cipher agree)"
    )
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts or (
        ("recall", "cipher", "agree") if arguments.quick else tuple(p for p in PARTS if p != "costs")
    )
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}, expected at least 1")
    if arguments.weights and not arguments.weights.is_file():
        parser.error(f"--weights {arguments.weights}, expected a file that training wrote")
    if arguments.trials is not None and arguments.trials < 1:
        parser.error(f"--trials {arguments.trials}, expected at least 1")
    if arguments.lengths and min(arguments.lengths) < SHORTEST:
        parser.error(
            f"--lengths {min(arguments.lengths)}, expected at least {SHORTEST}, which have room for what is asked"
        )
    if not 1 <= arguments.devices <= placement.NUM_DEVICES:
        parser.error(f"--devices {arguments.devices}, expected 1 to {placement.NUM_DEVICES}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = parse(argv)
    console = Console(soft_wrap=True)
    start = time.perf_counter()
    try:
        placement.use_cpu_devices()
    except RuntimeError as error:  # of the caller's making; those of a run below keep their traceback
        console.print(f"ringmoe needle failed: {error}", style="bold red", markup=False)
        return 1
    try:
        run(arguments, console)
    except (train.Diverged, train.NotWeights) as error:
        console.print(f"ringmoe needle failed: {error}", style="bold red", markup=False)
        return 1
    console.print(f"done in {time.perf_counter() - start:.0f} s", style="bold green")
    return 0


def make_mesh(devices: int) -> Mesh | None:
    """One axis, along which a context is cut; None for one device."""
    if devices == 1:
        return None
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def run(arguments: argparse.Namespace, console: Console) -> None:
    config = model.Config()
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = arguments.weights or (WEIGHTS if arguments.quick else trained(config, arguments, console))
    params = train.load(weights, config)
    arguments.lengths = arguments.lengths or (QUICK if arguments.quick else FULL)
    longest = max(arguments.lengths)
    reader = Reader(config, longest, min(32768, longest), make_mesh(arguments.devices))
    results = Results(arguments.out / "results.json", hashlib.sha256(weights.read_bytes()).hexdigest())
    for name in arguments.parts:
        PARTS[name](reader, params, arguments, console, results)
    console.print(f"pictures, and every trial: {arguments.out}")


class Results:
    """What was measured of one file of weights: written part by part; a later run adds to it, one of other weights
    begins anew."""

    def __init__(self, path: pathlib.Path, weights: str):
        self.path = path
        self.parts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if self.parts.get("weights") != weights:
            self.parts = {"weights": weights}

    def keep(self, name: str, found: Any) -> None:
        self.parts[name] = found
        self.path.write_text(json.dumps(self.parts, indent=1))


def recall(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """Facts at every depth of every length, and chains of facts."""
    told = lambda line: console.print(line, markup=False)
    trials = arguments.trials or (2 if arguments.quick else 4)
    done = [evaluate.Trial(**t) for t in results.parts.get("trials", ()) if t["length"] not in arguments.lengths]
    costs = [evaluate.Cost(**c) for c in results.parts.get("costs", ()) if c["length"] not in arguments.lengths]
    for length, kind in itertools.product(arguments.lengths, range(len(model.KINDS))):
        more, taken = evaluate.measure(reader, params, (length,), trials, arguments.seed, told, (kind,))
        done, costs = done + more, costs + taken
        results.keep("trials", [t._asdict() for t in done])
        results.keep("costs", [c._asdict() for c in costs])
    picture.heat_map(arguments.out / "recall.png", done, train.LONGEST)
    console.print(recall_table(done), cost_table(costs))


def cipher(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """Ciphers that nobody has seen, with their dictionaries in the context and without."""
    told = lambda line: console.print(line, markup=False)
    short = [length for length in arguments.lengths if length <= 2**20]
    found = evaluate.translate(reader, params, short, 2 if arguments.quick else 4, 16, arguments.seed, told)
    picture.cipher(arguments.out / "cipher.png", found, train.LONGEST)
    results.keep("ciphers", [t._asdict() for t in found])


def served(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """Which experts serve which modality."""
    found = experts.served(params, reader.config)
    picture.experts(arguments.out / "experts.png", found.load, found.dropped)
    results.keep("experts", {"load": found.load.tolist(), "dropped": found.dropped.tolist()})


def balance(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """What the balance loss and the noise are good for: four short trainings."""
    found = experts.balance(reader.config, steps := max(1, arguments.steps // 8), arguments.seed, console)
    title = f"use of {reader.config.router.num_experts} experts, after {steps} steps"
    table = Table("trained with", "busiest / mean", "unused", "dropped", "bytes right", title=title)
    for one in found:
        table.add_row(one.what, f"{one.busiest:.2f}", f"{one.unused:.2f}", f"{one.dropped:.1%}", f"{one.accuracy:.1%}")
    console.print(table)
    results.keep("balance", {"steps": steps, "found": [one._asdict() for one in found]})


def placed(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """What positions and temperature of global layers are good for: three short trainings, then facts in text."""
    lengths = [length for length in arguments.lengths if length in POSITIONED] or arguments.lengths
    steps = max(1, arguments.steps // 8)
    found = positions.compare(reader.config, steps, lengths, 2 * (arguments.trials or 4), arguments.seed, console)
    table = Table("global layers", *(f"{length:,}" for length in lengths), title=f"facts in text, after {steps} steps")
    for what in positions.variants(reader.config):
        table.add_row(what, *(f"{one.right}/{one.asked}" for one in found if one.what == what))
    console.print(table)
    results.keep("positions", {"steps": steps, "found": [one._asdict() for one in found]})


def agree(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """Logits of one program over a whole sequence against those after reading it in chunks, on one device and eight."""
    mesh = make_mesh(placement.NUM_DEVICES)
    found = machines.agreement(reader.config, params, mesh, min(16384, max(arguments.lengths)), 4096, arguments.seed)
    console.print(
        f"{found.length:,} tokens, {found.questions} questions, float32, logits up to {found.largest:.1f}: largest difference "
        f"{found.devices:.1e} between one device and {placement.NUM_DEVICES}, {found.chunks:.1e} between reading in chunks "
        "and one program over the whole sequence"
    )
    results.keep("agreement", found._asdict())


def targets(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """The same programs on machines that are not here."""
    rows = {}
    table = Table(
        "program",
        "machine",
        "time",
        "waiting",
        "memory",
        title=f"compiled, {max(arguments.lengths):,} tokens of context",
    )
    for target in machines.TARGETS:
        for name, report in machines.compiled(reader.config, target, max(arguments.lengths), 32768).items():
            memory = (report.peak_bytes or 0) / 2**20
            table.add_row(
                name, target, *(f"{us:,.0f} us" for us in (report.us, report.exposed_us)), f"{memory:,.0f} MiB"
            )
            rows[f"{name} on {target}"] = {"us": report.us, "exposed_us": report.exposed_us, "MiB": memory}
    console.print(table)
    results.keep("targets", rows)


def costs(reader: Reader, params: model.Params, arguments, console: Console, results: Results) -> None:
    """A large and a light configuration on machines that are not here, row by row: what was found before is kept."""
    found = {row[:3]: row for row in (prices.Cost(**kept) for kept in results.parts.get("machine_costs", ()))}
    for row in prices.rows(found):
        found[row[:3]] = row
        console.print(f"{row.size}, {row.work}, {row.target}: compiled in {row.compile_seconds:.0f} s", markup=False)
        results.keep("machine_costs", [one._asdict() for one in found.values()])
    console.print(prices.table(found.values()), prices.retrieval_table())


PARTS = {
    "recall": recall,
    "cipher": cipher,
    "experts": served,
    "balance": balance,
    "positions": placed,
    "agree": agree,
    "targets": targets,
    "costs": costs,
}


def trained(config: model.Config, arguments: argparse.Namespace, console: Console) -> pathlib.Path:
    """A file of weights after training, in the folder of results."""
    state = train.init_state(arguments.seed, config, arguments.steps)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    start = time.perf_counter()
    state, _ = train.fit(state, config, arguments.steps, arguments.checkpoints, console)
    path = arguments.out / "weights.npz"
    train.save(path, state.params)
    console.print(f"{count:,} weights trained in {time.perf_counter() - start:.0f} s: {path}")
    return path


def recall_table(trials: Sequence[evaluate.Trial]) -> Table:
    """Of each length, right answers of all, and the interval of the rate at 95%: single facts, and chains apart."""
    kinds = (1, *evaluate.CHAINS)
    table = Table(
        "tokens", *("one fact" if n == 1 else f"chain of {n}" for n in kinds), title="right answers, 95% interval"
    )
    for length in sorted({t.length for t in trials}):
        cells = []
        for links in kinds:
            right = [t.right for t in trials if t.length == length and t.links == links]
            low, high = evaluate.wilson(sum(right), len(right))
            cells.append(f"{sum(right)}/{len(right)} ({low:.1%} to {high:.1%})")
        table.add_row(f"{length:,}", *cells)
    return table


def cost_table(costs: Sequence[evaluate.Cost]) -> Table:
    """Of each length, what a haystack took, the mean of all."""
    table = Table("tokens", "cache", "prefill", "tokens/s", "a question", title="cost, of a haystack")
    for length in sorted({c.length for c in costs}):
        here = [c for c in costs if c.length == length]
        seconds = sum(c.prefill_seconds for c in here) / len(here)
        question = sum(c.ask_seconds for c in here) / sum(c.questions for c in here)
        table.add_row(
            f"{length:,}",
            f"{here[0].cache_bytes:,} bytes",
            f"{seconds:.1f} s",
            f"{length / seconds:,.0f}",
            f"{question:.3f} s",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
