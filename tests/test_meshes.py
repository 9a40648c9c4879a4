"""Meshes as digits: every sharding that JAX can express is read back, and a finer mesh tells it by name."""

import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import compat, meshes
from tests.helpers import make_mesh


def blocks(mesh_shape, axes_by_dim):
    """Which block of each dim every device holds, devices in the mesh's order: counted from coordinates."""

    def index(at, axes):
        return int(np.ravel_multi_index([at[a] for a in axes], [mesh_shape[a] for a in axes])) if axes else 0

    devices = [dict(zip(mesh_shape, coordinates)) for coordinates in np.ndindex(*mesh_shape.values())]
    return [tuple(index(at, axes) for axes in axes_by_dim) for at in devices]


@st.composite
def shardings(draw):
    """A mesh of at most 8 devices and the axes of two dims, each axis used once at most, in any order."""
    shape = draw(st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (2, 3), (6,), (1, 4)]))
    names = "abc"[: len(shape)]
    order = draw(st.permutations(names))
    first = draw(st.integers(0, len(order)))
    last = draw(st.integers(first, len(order)))
    return dict(zip(names, shape)), (tuple(order[:first]), tuple(order[first:last]))


@given(shardings())
@settings(max_examples=60)
def test_a_sharding_is_read_back_from_xlas_tiles(case):
    shape, axes = case
    mesh = make_mesh(tuple(shape.values()), AxisType.Auto)
    digits = compat.digits_of(NamedSharding(mesh, P(*(a or None for a in axes))), 2)
    fine, (told,) = meshes.refine(shape, [digits])
    assert blocks(dict(fine.shape), told) == blocks(shape, axes)
    assert math.prod(fine.shape.values()) == math.prod(shape.values())


@given(shardings(), shardings())
@settings(max_examples=60)
def test_one_mesh_tells_both_of_two_meshes_shardings(one, other):
    if math.prod(one[0].values()) != math.prod(other[0].values()):
        return
    named = lambda shape, axes: tuple(tuple(meshes.of_mesh(shape)[a] for a in dim if shape[a] > 1) for dim in axes)
    fine, told = meshes.refine(one[0], [named(*one), named(*other)])
    for (shape, axes), spec in zip((one, other), told):
        assert spec is None or blocks(dict(fine.shape), spec) == blocks(shape, axes)
    assert told[0] is not None
    assert (
        told[1] is not None
        or 3 in (*one[0].values(), *other[0].values())
        or 6 in (*one[0].values(), *other[0].values())
    )


def test_a_cut_axis_is_named_after_what_it_was():
    fine, told = meshes.refine({"a": 8, "b": 2}, [(((2, 8),), ((4, 2),)), (((2, 1),), ())])
    assert dict(fine.shape) == {"a.0": 2, "a.1": 4, "b": 2}
    assert told == [(("a.0",), ("a.1",)), (("b",), ())]


@pytest.mark.parametrize("tiles", [[0, 1, 3, 2], [3, 2, 1, 0], [0, 3, 1, 2], [0, 1, 2, 3, 7, 6, 5, 4]])
def test_an_order_that_no_digits_tell(tiles):
    assert meshes.of_tiles(np.array(tiles)) is None


def test_cuts_that_go_with_no_others_are_left_out():
    fine, told = meshes.refine({"a": 6}, [(((3, 1),),), (((2, 1),),)])  # every third, every second
    assert dict(fine.shape) == {"a.0": 2, "a.1": 3} and told == [(("a.1",),), None]


def test_replicas_and_whole_arrays():
    mesh = make_mesh((2, 4), AxisType.Auto)
    assert compat.digits_of(NamedSharding(mesh, P(None, "a")), 2) == ((), ((2, 4),))
    assert compat.digits_of(NamedSharding(mesh, P()), 2) == ((), ())
    assert compat.digits_of(jax.sharding.SingleDeviceSharding(jax.devices()[0]), 1) in (((),), None)


def test_over_how_many_slices_a_mesh_is(monkeypatch):
    whole = lambda name: ringmoe.target(name).mesh()
    assert [meshes.slices(whole(name)) for name in ("v5e:4x4", "2*v5e:4x4", "h200x8")] == [1, 2, 1]
    abstract = whole("2*v5e:4x4").abstract_mesh
    assert meshes.slices(abstract) == meshes.slices(make_mesh((8,), AxisType.Auto).abstract_mesh) == 1  # none are here
    for name, slices in (("2*v5e:4x4", 2), ("4*v5e:2x4", 4), ("v5e:4x8", 1), ("2*v5e:4x8", 1), ("v5p:2x2x2", 1)):
        monkeypatch.setattr(jax, "devices", lambda name=name: list(whole(name).devices.flat))
        assert meshes.slices(abstract) == slices, name
