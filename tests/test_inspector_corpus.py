"""Programs of every kind, compiled by three compilers: each is read, timed and drawn, and the sums
agree."""

import collections
import json
import re

import jax
import pytest

from ringmoe import inspector
from ringmoe.inspector import machines, reader
from tests import inspector_programs as programs

MACHINES = {"cpux8": {"seq": 8}, "v5p:2x2x2": {"seq": 8}, "h200x8": {"seq": 8}}
NAMES = list(programs.corpus({"seq": 8}))
# What a compiler itself refuses, which is not the inspector's concern.
REFUSED = {("cpux8", "ragged")}


@pytest.fixture(scope="session")
def compiled():
    """(target, name) -> compiled program, each compiled once."""
    cache = {}

    def get(target, name):
        if (target, name) not in cache:
            mesh = machines.target(target).mesh(MACHINES[target])
            function, *args = programs.corpus(MACHINES[target])[name]
            args = [
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, a.sharding.spec)) for a in args
            ]
            with jax.set_mesh(mesh):
                cache[target, name] = jax.jit(function).lower(*args).compile()
        return cache[target, name]

    return get


def test_the_corpus_is_large():
    assert len(NAMES) * len(MACHINES) - len(REFUSED) >= 40


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", MACHINES)
def test_reads_and_times_it(compiled, target, name):
    if (target, name) in REFUSED:
        with pytest.raises(Exception, match="not supported"):
            compiled(target, name)
        return
    program = compiled(target, name)
    text = program.as_text()
    report = inspector.inspect(program, target=target)
    assert report.us == pytest.approx(report.compute_us + report.exposed_us)
    assert -1e-9 <= report.exposed_us <= report.wire_us * (1 + 1e-9)
    assert report.peak_bytes is not None and report.fits
    assert {c.name for c in report.collectives} >= entry_collectives(text)
    for c in report.collectives:
        assert c.kind in reader.COLLECTIVES and c.wire_us >= 0 and c.wire_bytes >= 0 and c.trip_count >= 0
        assert -1e-9 <= c.exposed_us <= c.wire_us * (1 + 1e-6) + 1e-9 and (c.asynchronous or not c.compute_us)
    assert json.loads(report.to_json())["exposed_fraction"] == report.exposed_fraction
    assert report.program in report.to_html() and report.target in str(report)
    assert inspector.inspect(text, target=target).compute_us == pytest.approx(report.compute_us)


def entry_collectives(text):
    """Names of the collectives that stand in the entry computation, found without the reader."""
    entry = text[text.index("\nENTRY ") :]
    kinds = "|".join(reader.COLLECTIVES)
    return set(re.findall(rf"%([\w.\-]+) = [^\n]*? (?:{kinds})(?:-start)?\(", entry))


@pytest.mark.parametrize(("name", "trips"), [("nested", 15), ("down_loop", 7)])
@pytest.mark.parametrize("target", MACHINES)
def test_every_trip_counts(compiled, target, name, trips):
    report = inspector.inspect(compiled(target, name), target=target)
    assert sum(c.trip_count for c in report.collectives) == trips and report.unknown_loops == ()


@pytest.mark.parametrize("target", MACHINES)
def test_each_kind_is_found_by_its_name(compiled, target):
    expected = {
        "permute": "collective-permute",
        "all_to_all": "all-to-all",
        "all_gather": "all-gather",
        "all_reduce": "all-reduce",
        "all_max": "all-reduce",
        "ragged": "ragged-all-to-all",
        "calls": "collective-permute",
    }
    for name, kind in expected.items():
        if (target, name) not in REFUSED:
            kinds = collections.Counter(
                c.kind for c in inspector.inspect(compiled(target, name), target=target).collectives
            )
            assert kinds[kind] == 1, (name, kinds)


@pytest.mark.parametrize("name", ["nested", "fsdp", "switch"])
def test_cut_anywhere_it_is_refused(compiled, name):
    text = compiled("v5p:2x2x2", name).as_text().rstrip()
    for end in range(0, len(text) - 1, len(text) // 60):
        with pytest.raises(ValueError, match="HLO"):
            inspector.inspect(text[:end], target="v5p:2x2x2")
