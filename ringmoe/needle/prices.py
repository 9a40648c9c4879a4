"""The table of `costs`: configurations, machines, the rows; and what finding chunks instead of reading all would take."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rich.table import Table

import ringmoe
from ringmoe.needle import costs, machines
from ringmoe.needle.costs import CONTEXT, TRAINED, Program
from ringmoe.needle.model import Config

_config = functools.partial(
    Config,
    local_head_dim=128,
    global_head_dim=128,
    window=1023,
    rope_base=10000.0,
    router=ringmoe.RouterConfig(num_experts=32, noise="learned"),
)
# A global layer's work grows with the square of the tokens, so three layers of four are local. Experts as wide as the model
# (twice as wide) keep matrix units busy; 2 of 32 are used, so a token meets a tenth of the weights.
SIZES = {
    "Pro": _config(num_local=24, num_global=8, model_dim=8192, num_heads=64, expert_hidden_dim=8192),
    "Flash": _config(num_local=12, num_global=4, model_dim=2048, num_heads=16, expert_hidden_dim=4096),
}
TARGETS = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4", "h200x8")
EXPERT_AXIS = 16  # devices at most that experts are spread over: more would leave fewer than two on one
WORK = {
    f"reading {CONTEXT:,} tokens": (costs.prefill, CONTEXT),
    f"a byte after {CONTEXT:,} tokens": (costs.decode, CONTEXT),
    **{f"a training step of {n:,} tokens": (costs.training, n) for n in TRAINED},
}


class Cost(NamedTuple):
    """A row: a piece of work on a machine, per device."""

    size: str
    work: str
    target: str
    memory: int  # bytes; where it does not fit before anything is compiled, of what is kept alone
    hbm: int  # bytes
    us: float | None  # None: it does not fit
    exposed_us: float | None
    utilisation: (
        float | None
    )  # useful FLOPs of all that could be done in that time; None where they weren't counted too
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory <= self.hbm


def measure(size: str, work: str, target: str) -> Cost:
    """Compiles one layer of each kind, and sums up; of what cannot fit nothing is compiled."""
    machine = ringmoe.target(target)
    cut = min(EXPERT_AXIS, machine.num_devices)
    mesh = machine.mesh(dict(zip(costs.AXES, (machine.num_devices // cut, cut))))
    make, length = WORK[work]
    programs = make(SIZES[size], mesh, length)
    kept = costs.resident(programs)
    if kept > machine.hbm_bytes:
        return Cost(size, work, target, kept, machine.hbm_bytes, None, None, None, 0.0)
    reports = {
        name: ringmoe.inspect(program.function, *program.arguments, target=target, mesh=mesh)
        for name, program in programs.items()
        if program.runs
    }
    return summed(size, work, target, programs, reports)


def summed(
    size: str, work: str, target: str, programs: dict[str, Program], reports: dict[str, ringmoe.OverlapReport]
) -> Cost:
    """The row of one layer's reports of each kind."""
    beside = [
        (report.peak_bytes or 0) - costs.shard_bytes((programs[name].kept, programs[name].shared))
        for name, report in reports.items()
    ]
    any_report = next(iter(reports.values()))
    memory, hbm = costs.resident(programs) + max(beside), any_report.hbm_bytes
    times = {name: programs[name].layers * programs[name].runs for name in reports}
    us = sum(n * reports[name].us for name, n in times.items())
    seconds = sum(report.compile_seconds or 0.0 for report in reports.values())
    if memory > hbm:
        return Cost(size, work, target, memory, hbm, None, None, None, seconds)
    exposed = sum(n * reports[name].exposed_us for name, n in times.items())
    useful = sum(n * programs[name].flops for name, n in times.items())
    rate = any_report.peak_flops * any_report.num_devices
    # A kernel without a cost estimate is timed by its bytes: the time is then a lower bound, and a share of it no use.
    counted = all(report.flops * report.num_devices >= programs[name].flops for name, report in reports.items())
    return Cost(size, work, target, memory, hbm, us, exposed, useful / rate / us * 1e6 if counted else None, seconds)


class Retrieval(NamedTuple):
    """What finding chunks instead takes, microseconds: an estimate from the figures of `retrieve`, nothing is compiled."""

    index_us: float  # once: every chunk embedded
    index_bytes: int
    lookup_us: float  # a question: it is embedded, and compared with every chunk
    read_us: float  # a question: the chunks found are read into a cache


def retrieve(
    config: Config,
    target: str,
    length: int,
    *,
    chunk: int = 512,
    found: int = 16,
    embedder: float = 1.1e8,
    vector: int = 1024,
    question: int = 32,
    reached: float = 0.4,
) -> Retrieval:
    """The time of retrieval over a context of `length` tokens on all devices of a machine.

        index  = 2 embedder length / (reached rate)
        lookup = max(2 embedder question / (reached rate of one device), 2 embedder / bandwidth of one device)
                 + 2 vector (length / chunk) / bandwidth
        read   = max(2 local weights met chunk found / (reached rate), 2 local weights / bandwidth)

    Args:
      chunk: tokens of a piece. found: pieces that are read for a question. embedder: weights of the model that embeds.
      vector: numbers of an embedding, bfloat16; all are compared, exactly. question: its tokens.
      reached: share of the matrix units' rate. What networks and hosts add is left out, and so is what is not found.
    """
    machine = ringmoe.target(target)
    rate, bandwidth = reached * machine.matmul_flops["bf16"], machine.hbm_bandwidth
    devices, tokens = machine.num_devices, found * chunk
    size = 2 * vector * -(-length // chunk)
    met = config.num_local * costs.layer_weights(config)["local"]
    everything, _ = costs.num_weights(config)
    local = everything * config.num_local / (config.num_local + config.num_global)
    return Retrieval(
        1e6 * 2 * embedder * length / (rate * devices),
        size,
        1e6 * (max(2 * embedder * question / rate, 2 * embedder / bandwidth) + size / (bandwidth * devices)),
        1e6 * max(2 * met * tokens / rate, 2 * local / bandwidth) / devices,
    )


def rows(known: Mapping[tuple[str, str, str], Cost]) -> Iterator[Cost]:
    """The table; rows that are known by (size, work, target) as they are. The longest to compile come last."""
    for work, size, target in itertools.product(WORK, SIZES, TARGETS):
        yield known.get((size, work, target)) or measure(size, work, target)


def table(found: Iterable[Cost]) -> Table:
    """Time, waiting, utilisation and memory of each row; what does not fit says so."""
    out = Table(
        "", "", "machine", "time", "waiting", "useful", "memory a device", title="one layer of each kind, compiled"
    )
    for row in found:
        gib = f"{row.memory / 2**30:.1f} of {row.hbm / 2**30:.0f} GiB"
        times = ("-", "-", "-")
        if row.us is not None and row.exposed_us is not None:
            at_least, useful = (">= ", "-") if row.utilisation is None else ("", f"{row.utilisation:.1%}")
            times = (at_least + machines.seconds(row.us), f"{row.exposed_us / row.us:.0%}", useful)
        note = (
            "" if row.fits else ": does not fit" + ("" if row.compile_seconds else ", weights and what is saved alone")
        )
        out.add_row(row.size, row.work, row.target, *times, gib + note)
    return out


def retrieval_table() -> Table:
    """What finding 16 chunks of 512 tokens takes, by `retrieve`."""
    out = Table(
        "", "machine", "index, once", "its bytes", "a lookup", "reading 16 chunks", title="retrieval: an estimate"
    )
    for size, target in itertools.product(SIZES, TARGETS):
        found = retrieve(SIZES[size], target, CONTEXT)
        times = map(machines.seconds, (found.index_us, found.lookup_us, found.read_us))
        index, lookup, read = times
        out.add_row(size, target, index, f"{found.index_bytes:,}", lookup, read)
    return out
