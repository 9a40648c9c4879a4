"""How ways to do one thing are compared on a GPU: compiled at once, held against what is right, timed in turns.

A call's time is the median over rounds in which each way runs once, as many calls back to back as fill SPAN.
"""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SPAN, MOST_CALLS, ROUNDS = 0.02, 200, 5  # of a round: seconds, calls at most; how many rounds
MOST_BYTES = 40 * 2**30  # of temporaries: what needs more is not run
OURS = "ours"  # ways of this library, whose names begin so, stand beside the best of the others


class Limits(NamedTuple):
    """What this GPU reached in this run: FLOPs a second of a large bfloat16 matmul, bytes read and written of a large copy."""

    flops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Case:
    """Ways to do one thing. All functions are compiled; `arrays()` makes the operands that ways and `exact` take.

    Attributes:
        ways: name -> function.
        exact: what is right, in float32 where that matters; None where nothing is checked.
        seen: of a way's result what `exact` gives. probed: of the operands those that are checked.
        wrong: way -> ||got - want|| / ||want|| of an array, from which on it is not timed.
        unchecked: ways whose result is another thing. repeats: whether two runs must give the same bits.
        flops, moved: what must be multiplied (2 a multiplication), or bytes that must be read or written; one is 0.
        note: (way, operands) -> what else there is to say.
    """

    name: str
    ways: Mapping[str, Callable]
    arrays: Callable[[], tuple]
    exact: Callable | None = None
    seen: Callable[[Any], Any] = lambda result: result
    probed: Callable[[tuple], tuple] = lambda arrays: arrays
    wrong: Callable[[str], float] = lambda way: 1e-2
    unchecked: tuple[str, ...] = ()
    repeats: bool = True
    flops: int = 0
    moved: int = 0
    note: Callable[[str, tuple], str] = lambda way, arrays: ""

    def types(self, sharding=None) -> tuple:
        """Of the operands."""
        of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(of, jax.eval_shape(self.arrays))


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of a way; None where nothing was."""

    part: str
    case: str
    way: str
    ms: float | None = None
    rate: float | None = None  # FLOPs or bytes a second
    of_limit: float | None = None
    beside: float | None = None  # the best other way's time over this one's
    temporary: int | None = None  # bytes
    off: float | None = None  # the worst array's ||got - want|| / ||want||
    said: str = ""


def compiled(f: Callable, *types):
    return jax.jit(f).lower(*types).compile()


def attempt(run: Callable, *arrays):
    """What `run` gives, or in words why it can't."""
    try:
        return run(*arrays)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


def programs_of(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Of each case its programs, or why there is none: the ways', "" for the operands, and "exact"."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = []
        for case in cases:
            types = case.types()
            functions = {"exact": case.exact} if case.exact else {}
            programs = {
                way: pool.submit(attempt, compiled, f, *types) for way, f in (*case.ways.items(), *functions.items())
            }
            found.append(programs | {"": pool.submit(attempt, compiled, case.arrays)})
        return [{name: future.result() for name, future in programs.items()} for programs in found]


def milliseconds(programs: Mapping[str, Callable]) -> dict[str, float]:
    """Of each program a call's; programs take nothing."""
    calls, found = {}, {name: [] for name in programs}
    for name, program in programs.items():
        jax.block_until_ready(program())
        start = time.perf_counter()
        jax.block_until_ready(program())
        calls[name] = max(1, min(MOST_CALLS, int(SPAN / (time.perf_counter() - start))))
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(calls[name] - 1):
                program()
            jax.block_until_ready(program())
            found[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def limits(size: int = 8192) -> Limits:
    """Of a matmul of size^3, and a copy of 16 size^2 numbers."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    long = jnp.ones(16 * size**2, jnp.bfloat16)
    product, copy = compiled(jnp.matmul, a, a), compiled(lambda x: x + 1, long)
    found = milliseconds({"matmul": lambda: product(a, a), "copy": lambda: copy(long)})
    return Limits(2 * size**3 / found["matmul"] * 1e3, 2 * long.nbytes / found["copy"] * 1e3)


@jax.jit
def _distances(got, want):
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).reshape(-1))
    return jax.tree.map(lambda a, b: norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / norm(b), got, want)


@jax.jit
def _differ(a, b):
    return functools.reduce(jnp.logical_or, jax.tree.leaves(jax.tree.map(lambda x, y: jnp.any(x != y), a, b)))


def _checked(case: Case, way: str, program, arrays, want) -> tuple[float | None, str]:
    """(how far off, what is wrong)."""
    if program.memory_analysis().temp_size_in_bytes > MOST_BYTES:
        return None, "not run: needs too much memory"
    got = jax.block_until_ready(program(*arrays))
    if want is None or way in case.unchecked:
        return None, ""
    off = max(map(float, jax.tree.leaves(_distances(case.seen(got), want))))
    if not off < case.wrong(way):
        return off, "WRONG"
    if case.repeats and bool(_differ(case.seen(got), case.seen(program(*arrays)))):
        return off, "WRONG: bits differ between runs"
    return off, ""


def unmeasured(part: str, case: Case, why: str) -> list[Row]:
    return [Row(part, case.name, way, said=why) for way in case.ways]


def measure(part: str, case: Case, programs: dict[str, Any], limits: Limits) -> list[Row]:
    """A row for each way; only what is right is timed."""
    failed = functools.partial(unmeasured, part, case)
    for needed in ("", "exact"):
        if isinstance(programs.get(needed), str):
            return failed(f"{needed or 'operands'}: {programs[needed]}")
    arrays = attempt(programs[""])
    if isinstance(arrays, str):
        return failed(arrays)
    probed = case.probed(arrays)
    want = attempt(programs["exact"], *probed) if case.exact else None
    if isinstance(want, str):
        return failed(f"exact: {want}")
    off, said = {}, {}
    for way in case.ways:
        off[way], said[way] = None, programs[way]
        if not isinstance(programs[way], str):
            found = attempt(_checked, case, way, programs[way], probed, want)
            off[way], said[way] = (None, found) if isinstance(found, str) else found
    del want, probed
    good = {way: functools.partial(programs[way], *arrays) for way, word in said.items() if not word}
    times = attempt(milliseconds, good)
    if isinstance(times, str):
        return failed(times)
    return [_row(part, case, way, programs[way], arrays, times, off[way], said[way], limits) for way in case.ways]


def _row(part, case: Case, way, program, arrays, times, off, said, limits: Limits) -> Row:
    temporary = None if isinstance(program, str) else program.memory_analysis().temp_size_in_bytes
    note, ms = "; ".join(filter(None, (said, attempt(case.note, way, arrays)))), times.get(way)
    if ms is None:
        return Row(part, case.name, way, temporary=temporary, off=off, said=note)
    rate = (case.flops or case.moved) / ms * 1e3
    others = [time for name, time in times.items() if not name.startswith(OURS) and name not in case.unchecked]
    beside = min(others) / ms if others and way.startswith(OURS) else None
    of_limit = rate / (limits.flops if case.flops else limits.bandwidth)
    return Row(part, case.name, way, ms, rate, of_limit, beside, temporary, off, note)
