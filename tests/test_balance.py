"""Balanced places: chunks from both ends, as much to do on every device in every hop, and all back where they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.masks import Band, Places
from ringmoe.plan.base import Ring
from ringmoe.schedule import balance
from tests.helpers import make_mesh


def chunks(size, length):
    """Of each device, the places of its two chunks."""
    ring = Ring(("x",), ("x",), tuple(range(size)))
    for device in range(size):
        starts = tuple(int(x) for x in balance.starts(ring, device, length))
        yield np.concatenate([start + np.arange(length // 2) for start in starts])


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
def test_every_device_has_as_much_to_do_in_every_hop(size):
    length = 4
    places = list(chunks(size, length))
    assert sorted(np.concatenate(places)) == list(range(size * length))
    for h in range(1, size):
        seen = [(places[i][:, None] >= places[(i - h) % size]).sum() for i in range(size)]
        assert seen == [length * length // 2] * size
    own = [(places[i][:, None] >= places[i]).sum() for i in range(size)]
    assert len(set(own)) == 1


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_there_and_back(size):
    mesh = jax.make_mesh((size,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
    ring, length = Ring.make(("x",), {"x": size}), 6
    x = jnp.arange(size * length * 2.0).reshape(2, -1)
    there = functools.partial(balance.there, ring, axis=1)
    local = lambda x: (there(x), balance.back(ring, there(x), 1))
    moved, same = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(None, "x"), out_specs=P(None, "x")))(x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(moved, x[:, np.concatenate(list(chunks(size, length)))])


@given(st.integers(1, 5), st.integers(0, 9), st.integers(0, 4), st.integers(-3, 30))
def test_places_of_two_pieces(length, first, gap, place):
    places = Places((first, first + length + gap), length)
    stand = [first + i for i in range(length)] + [first + length + gap + i for i in range(length)]
    np.testing.assert_array_equal(places.of(np.arange(2 * length)), stand)
    assert int(places.before(place)) == sum(x < place for x in stand)


@given(st.integers(0, 7), st.integers(0, 7), st.none() | st.integers(0, 40), st.sampled_from((1, 2, 4)))
def test_blocks_of_two_pieces_are_those_that_are_met(i, j, left, block):
    """Rows of one device's chunks, keys of another's: every block outside (first, last) is empty."""
    places = list(chunks(8, 8))
    band, starts = Band(left, 0), (int(places[j][0]), int(places[j][4]))
    for row in range(0, 8, 2):
        rows = places[i][row : row + 2]
        first, last = band.keys_met(int(rows[0]), int(rows[-1]) + 1, Places(starts, 4), block)
        seen = np.asarray(band(jnp.asarray(rows)[:, None], jnp.asarray(places[j])))
        met = seen.any(0).reshape(-1, block).any(1)
        inside = [int(first) <= n < int(last) for n in range(8 // block)]
        assert all(a <= b for a, b in zip(met, inside)), (met, first, last)
        assert not met.any() or list(met) == inside


@pytest.mark.parametrize(("given_", "pieces"), [
    ({"is_causal": True}, True), ({}, False), ({"is_causal": True, "local_window_size": (40, 0)}, False),
    ({"is_causal": True, "bias": np.zeros((128, 128), np.float32)}, False),
])  # fmt: skip
def test_explain_says_when_it_is_balanced(given_, pieces):
    """Not where nothing is causal, nor where a window evens it out, nor where a bias would have to follow its rows."""
    mesh = make_mesh((4,), AxisType.Explicit)
    q = jax.device_put(np.ones((1, 128, 2, 4), np.float32), jax.sharding.NamedSharding(mesh, P(None, "a")))
    with jax.set_mesh(mesh):
        attend = functools.partial(ringmoe.dot_product_attention, exchange="ring", **given_)
        rows = ringmoe.explain(jax.jit(lambda q: attend(q, q, q)), q).rows
    assert ("two chunks a device" in rows[0].reason) == pieces


@pytest.mark.parametrize(("size", "length"), [(2, 63), (8, 250)])
def test_of_a_length_that_devices_do_not_divide(size, length):
    """The last device's chunks, one of them in front, end with padding."""
    mesh = make_mesh((size,), AxisType.Auto)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    loss = lambda attend: jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, is_causal=True))), (0, 1, 2))
    ring = functools.partial(ringmoe.dot_product_attention, exchange="ring")
    padded = lambda q, k, v, **how: ring(q[:, :length], k[:, :length], v[:, :length], **how)
    longer = [np.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))) for x in (q, k, v)]
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, P(None, "a"))) for x in longer]
    fun = ringmoe.jit(loss(padded))
    assert any("two chunks" in row.reason for row in ringmoe.explain(fun, *placed).rows)
    (got, grads), (want, want_grads) = fun(*placed), jax.jit(loss(jax.nn.dot_product_attention))(q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-4)
    for grad, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad[:, :length], expected, atol=5e-5)


@pytest.mark.sampled
@pytest.mark.parametrize(("target", "tokens", "causal"), [("v5p:2x2x1", 128, False), ("v6e:2x2", 2048, True)])
def test_auto_is_near_the_fastest_by_the_inspector(target, tokens, causal):
    """The model that chooses, against what the compiler made of each exchange."""
    machine = ringmoe.target(target)
    mesh = machine.mesh({"x": machine.num_devices})
    sharding = jax.sharding.NamedSharding(mesh, P(None, "x"))
    q = jax.ShapeDtypeStruct((1, tokens * machine.num_devices, 8, 128), jnp.bfloat16, sharding=sharding)

    def us(exchange):
        attend = functools.partial(ringmoe.dot_product_attention, is_causal=causal, exchange=exchange)
        return ringmoe.inspect(ringmoe.jit(lambda q: attend(q, q, q)), q, target=target).us

    times = {name: us(name) for name in ("auto", "ring", "all_gather", "all_to_all", "merge")}
    assert times["auto"] <= 1.1 * min(times.values()), times
    assert max(times.values()) > 1.3 * times["auto"]  # it matters


@pytest.mark.sampled
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2"])
def test_on_a_machine_its_work_is_little_more_than_half(target):
    """Of that of the same ring unbalanced, which a window as long as the sequence makes of it."""
    machine = ringmoe.target(target)
    mesh, length = machine.mesh({"x": machine.num_devices}), 16384 * machine.num_devices
    q = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, P(None, "x")))

    def work(**window):
        attend = ringmoe.jit(
            lambda q: ringmoe.dot_product_attention(q, q, q, is_causal=True, exchange="ring", **window)
        )
        return ringmoe.inspect(attend, q, target=target).compute_us

    assert work() < 0.58 * work(local_window_size=(length - 1, 0))
