"""The layouts of `inspector_layouts`, compiled for three machines and for several slices and hosts: what the inspector finds
is what was counted by hand."""

import jax
import pytest

from ringmoe import inspector
from ringmoe.inspector import machines
from tests import inspector_layouts as layouts
from tests.inspector_layouts import SCATTER, SUM

PROGRAMS = [(target, name, 1) for target in ("v5p:2x2x2", "v6e:2x4", "h200x8") for name in layouts.ONE_AXIS]
PROGRAMS += [
    (target, name, 2) for target in ("v5p:2x2x2", "2*v5e:2x2", "2*v6e:2x4", "h200x16") for name in layouts.TWO_AXES
]


def test_they_are_many():
    assert len(PROGRAMS) >= 50


def as_compiled(layout, report):
    """What a device sends, and how often: XLA:TPU may write a small scatter as a sum, of which each device keeps its part."""
    sent, times = dict(layout.sent), dict(layout.times)
    if SCATTER in sent and all(c.kind != SCATTER for c in report.collectives):
        sent[SUM] = sent.get(SUM, 0) + 2 * sent.pop(SCATTER)
        times[SUM] = times.get(SUM, 0) + times.pop(SCATTER)
    return sent, times


@pytest.mark.sampled
@pytest.mark.parametrize(("target", "name", "outer"), PROGRAMS)
def test_bytes_runs_and_flops_are_those_counted_by_hand(target, name, outer):
    machine = machines.target(target)
    axes = {"x": machine.num_devices} if outer == 1 else {"y": outer, "x": machine.num_devices // outer}
    layout = (layouts.ONE_AXIS | layouts.TWO_AXES)[name](axes)
    report = inspector.inspect(jax.jit(layout.function), *layout.args, target=target, mesh=axes)
    sent, times = as_compiled(layout, report)
    assert {row["kind"]: row["bytes"] for row in report.by_kind} == pytest.approx(sent)
    found = {row["kind"]: row["executions"] for row in report.by_kind}
    assert {kind: found[kind] for kind in times} == times
    assert report.flops == pytest.approx(layout.flops)
    assert report.unknown_loops == () and report.unestimated == {}


@pytest.mark.parametrize("first", ["x", "y"])
@pytest.mark.parametrize("target", ["2*v5e:2x2", "h200x16"])
def test_only_what_must_leaves_the_slice(target, first):
    """Weights are gathered inside, on links; their gradients' parts are summed over the network."""
    sizes = {"y": 2, "x": machines.target(target).num_devices // 2}
    mesh = machines.target(target).mesh(sizes)
    if first == "x":  # slices innermost
        mesh = jax.sharding.Mesh(mesh.devices.T, ("x", "y"))
    layout = layouts.hybrid({name: sizes[name] for name in mesh.axis_names})
    report = inspector.inspect(jax.jit(layout.function), *layout.args, target=target, mesh=mesh)
    assert {c.kind: c.axes for c in report.collectives} == {layouts.GATHER: ("x",), SCATTER: ("x",), SUM: ("y",)}
    assert {c.kind for c in report.collectives if "network" in c.route} == {SUM}
