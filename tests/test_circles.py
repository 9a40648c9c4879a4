"""Meshes whose ring follows the links of a torus: every device once, neighbours next to each other, both ways without a shared
link, as the inspector's router sees it."""

import itertools
import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, Mesh

import ringmoe
from bench import ring
from ringmoe import circles
from ringmoe.inspector.machines import slice_of
from ringmoe.inspector.wire import Wire


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_a_circle_visits_each_chip_of_a_block_once_and_closes(block):
    found = circles._circle(block)
    if found is None:
        assert all(n % 2 for n in block) or max(block) == math.prod(block)
        return
    assert sorted(found) == sorted(itertools.product(*map(range, block)))
    steps = [np.abs(np.subtract(a, b)).sum() for a, b in zip(found, (*found[1:], found[0]))]
    assert steps == [1] * len(found)


def links(machine, mesh, axis: str):
    """Which links a ring's two directions share, by the inspector: (the most that one takes of one, microseconds in common)."""
    dim, ids = mesh.axis_names.index(axis), {d: n for n, d in enumerate(mesh.devices.flat)}
    rows = np.moveaxis(mesh.devices, dim, -1).reshape(-1, mesh.devices.shape[dim])
    wire = Wire(machine, machine.coords(list(mesh.devices.flat)))

    def sent(by: int):
        pairs = [(ids[a], ids[b]) for row in rows for a, b in zip(row, np.roll(row, by))]
        return wire.permute(1e6, "{" + ",".join(f"{{{a},{b}}}" for a, b in pairs) + "}")

    ways = [sent(by) for by in (1, -1)]
    return max(wire._routes(way.lane).load for way in ways), wire.contended_us(*ways)


@pytest.mark.parametrize(
    ("target", "axes", "closes"),
    [
        ("v6e:2x4", {"x": 8}, True),
        ("v5e:2x4", {"d": 2, "x": 4}, True),
        ("v5e:4x8", {"x": 32}, True),
        ("v5e:4x8", {"x": 8, "d": 4}, True),
        ("v6e:8x8", {"d": 2, "x": 8, "e": 4}, True),
        ("v5p:4x4x4", {"d": 8, "x": 8}, True),
        ("tpu7x:2x2x2", {"x": 16}, True),
        ("2*v6e:2x4", {"d": 2, "x": 8}, True),
        ("2*v6e:2x4", {"x": 16}, False),
        ("v5p:2x2x2", {"d": 4, "x": 2}, False),
    ],
)
def test_a_ring_has_every_link_for_itself(target, axes, closes):
    pytest.importorskip("libtpu")
    machine = ringmoe.target(target)
    types = tuple(AxisType.Explicit if name == "x" else AxisType.Auto for name in axes)
    before = machine.mesh(axes, types)
    mesh = ringmoe.ring_mesh(before, "x")
    assert (mesh.axis_names, mesh.devices.shape, mesh.axis_types) == (tuple(axes), tuple(axes.values()), types)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in before.devices.flat)
    assert [slice_of(d) for d in mesh.devices.flat] == [slice_of(d) for d in before.devices.flat]
    if not closes:
        assert mesh is before
    else:
        assert links(machine, mesh, "x") == (1, 0.0)
        assert ringmoe.ring_mesh(mesh, "x") is mesh


def test_jaxs_order_stays_where_it_is_as_good_and_where_there_is_no_torus():
    pytest.importorskip("libtpu")
    whole = ringmoe.target("v5p:4x4x4").mesh({"x": 64})
    assert ringmoe.ring_mesh(whole, "x") is whole
    part = Mesh(ringmoe.target("v6e:2x4").mesh({"x": 8}).devices[:6], ("x",))  # not all of a slice
    assert ringmoe.ring_mesh(part, "x") is part
    cpu = jax.make_mesh((2, 4), ("a", "b"))
    assert ringmoe.ring_mesh(cpu, "b") is cpu


def test_a_ring_in_a_circle_waits_less(monkeypatch):
    """By the compiler's schedule, of a gradient on 2x4 chips, where JAX's order has every second neighbour two links away."""
    pytest.importorskip("libtpu")
    waits = lambda: (found := ring.inspected("v6e:2x4", "full", True, exchange="ring")).exposed_us / found.us
    inside = waits()
    monkeypatch.setattr(ringmoe, "ring_mesh", lambda mesh, axis: mesh)
    assert inside <= 0.03 < 0.1 < waits()
