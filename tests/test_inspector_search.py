"""The search over mesh shapes, as a function and on the command line."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from ringmoe import inspector
from ringmoe.inspector.memory import Oversize
from ringmoe.inspector.search import Trial
from tests import inspector_programs as programs
from tests.test_inspector_command import here, run  # noqa: F401  a fixture
from tests.test_inspector_report import looped


def matmul(mesh):
    """Sums over "seq": refuses to be cut in 8."""
    axes = dict(mesh.shape)
    if axes["seq"] == 8:
        raise TypeError("seq=8 is too much\nof a good thing")
    x = programs.spec((1024, 1024), jnp.bfloat16, axes, "data")
    w = programs.spec((1024, 1024), jnp.bfloat16, axes, "seq")
    return (lambda a, b: a @ b), x, w


def test_every_shape_is_tried_and_the_fastest_comes_first():
    steps = []
    trials = inspector.search(matmul, "v5p:2x2x2", ["data", "seq"], progress=lambda *step: steps.append(step))
    assert sorted(t.mesh["data"] for t in trials) == [1, 2, 4, 8] and all(
        t.mesh["data"] * t.mesh["seq"] == 8 for t in trials
    )
    *good, bad = trials
    assert [t.report.us for t in good] == sorted(t.report.us for t in good) and {
        t.report.mesh["data"] for t in good
    } == {2, 4, 8}
    assert bad.report is None and bad.reason == bad.error == "TypeError: seq=8 is too much"
    assert [s[:2] for s in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)] and steps[0][2] == "data=1, seq=8"
    waiting = next(t for t in good if t.mesh["seq"] == 4)
    assert "for all-reduces over seq" in waiting.reason and waiting.reason.startswith("waits ")


def test_a_limit_spreads_over_the_shapes():
    seen = []
    make = lambda mesh: seen.append(dict(mesh.shape)) or (lambda: 0,)
    inspector.search(make, "v5e:2x4", ["a", "b", "c"], limit=3)
    assert seen == [{"a": 1, "b": 1, "c": 8}, {"a": 2, "b": 1, "c": 4}, {"a": 8, "b": 1, "c": 1}]
    del seen[:]
    inspector.search(make, "v5e:2x4", ["a", "b"], limit=1)
    assert seen == [{"a": 1, "b": 8}]


def test_reasons():
    report = looped()
    assert Trial({}, report).reason.startswith("waits ") and "collective-permutes over seq" in Trial({}, report).reason
    large = dataclasses.replace(report, peak_bytes=2 * report.hbm_bytes, oversize=Oversize(2, 1))
    assert Trial({}, large).reason.startswith("does not fit: needs ")
    calm = dataclasses.replace(report, collectives=())
    assert Trial({}, calm).reason == "computes: bound by matrix"
    assert Trial({}, dataclasses.replace(calm, bound_us={})).reason == "does nothing that takes time"


def test_shapes_that_do_not_fit_come_after_those_that_do():
    def make(mesh):
        big = (8, 2**33) if mesh.shape["data"] == 1 else (8, 1024)
        return (lambda a: a), programs.spec(big, jnp.bfloat16, dict(mesh.shape), "data")

    trials = inspector.search(make, "v5p:2x1x1", ["data", "seq"])
    assert trials[0].mesh == {"data": 2, "seq": 1} and trials[0].report.fits


@pytest.mark.parametrize(
    ("axes", "limit", "message"),
    [
        ([], None, r"axes \[\], expected names"),
        (["a", "a"], None, "each once"),
        (["a", ""], None, "expected names"),
        (["a"], 0, "limit=0, expected a number of shapes above 0"),
    ],
)
def test_mistakes(axes, limit, message):
    with pytest.raises(ValueError, match=message):
        inspector.search(matmul, "v5p:2x2x2", axes, limit=limit)


def test_on_the_command_line(here, capsys):  # noqa: F811
    words = ("cases:matmul", "--target", "v5p:2x2x2", "--search", "data,seq")
    (here / "cases.py").write_text("from tests.test_inspector_search import matmul\n")
    assert run(*words, "--json", "o.json", "--html", "o.html", "--fail-if-waiting", "100%") == 0
    out = capsys.readouterr().out
    assert "data=8, seq=1" in out and "TypeError: seq=8 is too much" in out and "all-reduces over seq" in out
    records = json.loads((here / "o.json").read_text())
    assert len(records) == 3 and records[0]["us"] == min(r["us"] for r in records) and (here / "o.html").exists()
    assert run("cases:matmul", "--target", "v5p:2x2x2", "--search", "data") == 2
    assert "compiles for no shape" in " ".join(capsys.readouterr().err.split())
    assert run(*words, "--mesh", "data=8") == 2 and "takes no --mesh" in " ".join(capsys.readouterr().err.split())
