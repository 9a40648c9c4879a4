"""A fuzzer of sharded programs: `make fuzz N=1000`, or `python -m tests.fuzz --case "Case(...)"` for one of them again.

Each case runs in a process of its own kind, so that a crash of XLA is a result too. What failed is written to out/.
"""

import argparse
import ast
import collections
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

import tests.conftest  # noqa: F401  eight devices
from ringmoe import errors
from tests import fuzz_cases, fuzz_programs, fuzz_shrink
from tests.fuzz_cases import Case, Operand
from tests.helpers import TOLERANCE

AGREES = "agrees"
GROUPS = "refused by design: groups"  # a group of tokens split between devices
RING = "refused by design: a ring that was asked for"  # where queries and keys lie over unlike axes
NO_PROGRAM = "no program without the op either"  # JAX refuses what stands around it
BOTH = "both refuse"
WRONG = "wrong numbers"
REFUSED = "refused where the plain op runs"
DIED = "the process died"
HUNG = "no end"
BOTH_DIE = "the process dies without our op too"
FAILURES = (WRONG, REFUSED, DIED, HUNG)
SECONDS = 90  # after which a case hangs; most take two
CASES_OF_A_PROCESS = 60  # compiled programs stay in memory


@dataclasses.dataclass(frozen=True)
class Verdict:
    outcome: str
    kind: str = ""  # of error, without numbers
    message: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def compare(case: Case, got, want) -> str:
    """What differs, or nothing.

    Tolerances are those of every test. Where two layers or two derivatives multiply numbers larger than one, rounding is
    relative to the largest of an array and not to each element: that largest is then the unit.
    """
    forward, gradient = TOLERANCE[jnp.dtype(case.dtype)]
    if sorted(got) != sorted(want):
        return f"results {sorted(got)}, expected {sorted(want)}"
    for name in sorted(want, key=lambda name: (" of " in name, name)):  # results before derivatives
        expected = want[name]
        actual, expected = got[name].astype(np.float64), expected.astype(np.float64)
        tolerance = gradient if " of " in name else forward
        if np.isnan(expected).any():
            return f"the oracle's own {name}: NaN"
        if actual.shape != expected.shape:
            return f"{name}: shape {actual.shape}, expected {expected.shape}"
        finite = np.abs(expected[np.isfinite(expected)])
        unit = max(1.0, finite.max(initial=0.0)) if case.transform.startswith(("scan", "hvp")) else 1.0
        if not np.allclose(actual, expected, rtol=tolerance, atol=tolerance * unit):
            off = np.abs(actual - expected)
            return f"{name}: off by {np.nanmax(np.where(np.isfinite(off), off, 0)):.3g}, {np.isnan(off).sum()} NaN"
    return ""


def examine(case: Case) -> Verdict:
    """Runs one case."""
    start = time.monotonic()
    errors.forget_warnings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = fuzz_programs.run(case)
        except Exception as error:
            verdict = refusal(case, error)
        else:
            difference = compare(case, got, fuzz_programs.oracle(case))
            verdict = Verdict(WRONG if difference else AGREES, pattern(difference.split(":")[0]), difference)
    names = {str(w.message).split(":")[0] for w in caught if issubclass(w.category, errors.CostWarning)}
    return dataclasses.replace(verdict, warnings=tuple(sorted(names)), seconds=time.monotonic() - start)


def refusal(case: Case, error: Exception) -> Verdict:
    """Who else refuses this program?"""
    text = str(error)
    kind = f"{type(error).__name__}: {pattern(text)}"
    frames = "".join(traceback.format_exception(error)[-8:])
    if "whole groups of" in text:
        return Verdict(GROUPS, kind, text)
    if "exchange='ring' was asked for" in text:
        return Verdict(RING, kind, text)
    plain = refuses(case, fuzz_programs.PLAIN)
    if not plain:
        return Verdict(REFUSED, kind, frames[-4000:])
    around = refuses(case, fuzz_programs.NOTHING)
    theirs = f"\n-- the plain op: {plain}\n-- no op: {around or 'runs'}"
    return Verdict(NO_PROGRAM if around else BOTH, kind, frames[-3000:] + theirs)


def refuses(case: Case, ops) -> str:
    """Why the case with these ops doesn't run; nothing if it does."""
    try:
        fuzz_programs.run(case, ops)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def pattern(text: str) -> str:
    """A message's first line without what differs from case to case."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = re.sub(r"\[[^\]]*\]|\([^)]*\)|\{[^}]*\}", "()", line)
    return re.sub(r"-?\d+(\.\d+)?", "#", line)[:140]


def draw(number: int, seed: int, strategy=None) -> list[Case]:
    """The cases of a seed."""
    found: list[Case] = []
    # Hypothesis starts with the simplest example and later varies those it had: of each run we want the second, whose first
    # choice is never the simplest, so that choice is a number nobody reads.
    numbered = st.tuples(st.integers(0, 2**32), fuzz_cases.cases() if strategy is None else strategy)
    for i in range(number):
        settings = hypothesis.settings(
            max_examples=2, phases=[hypothesis.Phase.generate], database=None, derandomize=False, deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        run = hypothesis.given(numbered)(lambda drawn: found.append(drawn[1]))
        hypothesis.seed(f"{seed} {i}")(settings(run))()
        del found[i:-1]
    return found


def read_case(text: str) -> Case:
    return _build(ast.parse(text.strip(), mode="eval").body)


def _build(node):
    """What `repr` wrote of a case: calls of the two classes, tuples and literals, and nothing else."""
    if isinstance(node, ast.Call):
        kind = {"Case": Case, "Operand": Operand}[ast.unparse(node.func)]
        return kind(**{str(keyword.arg): _build(keyword.value) for keyword in node.keywords})
    return tuple(map(_build, node.elts)) if isinstance(node, ast.Tuple) else ast.literal_eval(node)


def read_cases(path: pathlib.Path) -> list[Case]:
    return [read_case(line) for line in path.read_text().splitlines() if line.startswith("Case(")]


def work() -> None:
    """The worker: a case a line in, a verdict a line out; `plain` or `nothing` before a case asks for that op."""
    for i, line in enumerate(sys.stdin):
        asked, case = line.split(" ", 1)
        if asked != "ours":
            ops = {"plain": fuzz_programs.PLAIN, "nothing": fuzz_programs.NOTHING}[asked]
            verdict = Verdict(AGREES, refuses(read_case(case), ops))
        else:
            verdict = examine(read_case(case))
        print(json.dumps(dataclasses.asdict(verdict)), flush=True)
        if i % 10 == 9:
            jax.clear_caches()


class Worker:
    """Another process, which may die."""

    def __init__(self):
        self.process, self.served = None, 0

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()
        self.process, self.served = None, 0

    def ask(self, question: str) -> Verdict:
        if self.served == CASES_OF_A_PROCESS:
            self.close()
        if self.process is None:
            command = [sys.executable, "-m", "tests.fuzz", "--worker"]
            pipe = subprocess.PIPE
            self.log = tempfile.TemporaryFile("w+")
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self.served += 1
        started, alarm = time.monotonic(), threading.Timer(SECONDS, self.process.kill)
        alarm.start()
        try:
            print(question, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        alarm.cancel()
        if line:
            fields = json.loads(line)
            return Verdict(**(fields | {"warnings": tuple(fields["warnings"])}))
        code, seconds = self.process.wait(), time.monotonic() - started
        self.log.seek(0)
        said = [x for x in self.log.read().splitlines() if re.match(r"F\d+ |Fatal|.*Error", x)]
        self.close()
        last = pattern(said[0].split("] ", 1)[-1]) if said else ""
        return Verdict(HUNG if seconds >= SECONDS else DIED, f"exit code {code} {last}", seconds=seconds)

    def verdict(self, case: Case) -> Verdict:
        """`examine`, or that the process died, where it doesn't with the plain op or without any."""
        verdict = self.ask(f"ours {case!r}")
        if verdict.outcome in (DIED, HUNG):
            others = (self.ask(f"{asked} {case!r}").outcome for asked in ("plain", "nothing"))
            if any(outcome in (DIED, HUNG) for outcome in others):
                return dataclasses.replace(verdict, outcome=BOTH_DIE)
        return verdict


def report(case: Case, verdict: Verdict) -> str:
    return f"# {verdict.outcome}: {verdict.kind}\n{case!r}\n" + "".join(
        f"#   {line}\n" for line in verdict.message.splitlines()
    )


def one_case(case: Case, simplify: bool) -> int:
    """Runs a case again."""
    worker = Worker()
    verdict = worker.verdict(case)
    if simplify and verdict.outcome != AGREES:
        alike = lambda other: (other.outcome, other.kind.split(" ")[0]) == (verdict.outcome, verdict.kind.split(" ")[0])
        case = fuzz_shrink.shrink(case, lambda smaller: alike(worker.verdict(smaller)))
        verdict = worker.verdict(case)
    worker.close()
    print(report(case, verdict))
    return int(verdict.outcome in FAILURES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", nargs="?", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="run this one here, with its traceback")
    parser.add_argument("--again", type=pathlib.Path, help="run the cases of a file of this fuzzer")
    parser.add_argument("--shrink", action="store_true", help="with --case: look for a simpler one that fails alike")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    if options.case:
        return one_case(read_case(options.case), options.shrink)
    console, counts, warned = Console(), collections.Counter(), collections.Counter()
    kinds: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    options.out.mkdir(exist_ok=True)
    stem = "fuzz-again" if options.again else f"fuzz-{options.seed}"
    failed, others = (options.out / f"{stem}{name}.txt" for name in ("", "-refused"))
    worker, seconds = Worker(), 0.0
    with failed.open("w") as failures, others.open("w") as refusals:
        cases = read_cases(options.again) if options.again else draw(options.number, options.seed)
        for case in track(cases, console=console, description="cases"):
            verdict = worker.verdict(case)
            counts[verdict.outcome] += 1
            kinds[verdict.outcome][verdict.kind] += verdict.outcome != AGREES
            warned.update(verdict.warnings)
            seconds += verdict.seconds
            if verdict.outcome != AGREES:
                file = failures if verdict.outcome in FAILURES else refusals
                print(report(case, verdict), file=file, flush=True)
    worker.close()
    console.print(
        f"{len(cases)} cases of {options.again or f'seed {options.seed}'}, {seconds / max(1, len(cases)):.1f} s each"
    )
    for outcome, count in counts.most_common():
        console.print(f"{count:6}  {outcome}")
        for kind, share in kinds[outcome].most_common():
            console.print(f"{share:14}  {kind}" if share else "", markup=False, highlight=False)
    for name, count in warned.most_common():
        console.print(f"{count:6}  warned: {name}", markup=False)
    bad = sum(counts[outcome] for outcome in FAILURES)
    console.print(f"{bad} failures" + (f", in {failed}" if bad else ""))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
