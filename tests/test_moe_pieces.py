"""Rows that travel in pieces, through every door, against the float64 oracle; and hidden on a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference_moe
from tests.exchanges import lowered
from tests.helpers import collectives, make_mesh, put

T, D, F, E = 64, 8, 24, 4
CONFIG = ringmoe.RouterConfig(E, group_size=16)


def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return normal(2, T, D), normal(D, E), *(normal(E, D, F) / D**0.5 for _ in range(2)), normal(E, F, D) / F**0.5


def layer(x, router_weight, w_in, w_gate, w_out, axis_name=None):
    y, _ = ringmoe.moe_ffn(
        x, router_weight, w_in, w_out, w_gate=w_gate, config=CONFIG, axis_name=axis_name, exchange="pieces"
    )
    return y


@functools.cache
def oracle():
    """Output and gradients of its sum of squares, in float64."""
    with jax.enable_x64(True):
        arrays64 = [np.asarray(a, np.float64) for a in arrays()]
        capacity = CONFIG.capacity(CONFIG.group_size)
        logits = arrays64[0] @ arrays64[1]
        choices = reference_moe.select(logits, top_k=2, capacity=capacity, group_size=CONFIG.group_size)

        def of(x, router_weight, w_in, w_gate, w_out):
            weight = ringmoe.route(x @ router_weight, CONFIG).weight
            return reference_moe.experts(x, choices, weight, w_in, w_out, w_gate)

        y, pullback = jax.vjp(of, *map(jnp.asarray, arrays64))
        return np.asarray(y), [np.asarray(g) for g in pullback(2 * y)]


@pytest.mark.sampled
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("door", ["ringmoe.jit", "types", "partitioner", "manual"])
def test_through_every_door_it_is_the_dense_layer(door, size):
    mesh = make_mesh((size,), AxisType.Explicit if door == "types" else AxisType.Auto)
    specs = P(None, "a"), P(), *(P("a"),) * 3
    placed = put(mesh, arrays(), specs)
    fun = layer
    if door == "manual":
        local = lambda *args: layer(*args, axis_name="a")
        fun = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])
    jit = ringmoe.jit if door == "ringmoe.jit" else jax.jit
    with jax.set_mesh(mesh):
        y = jit(fun)(*placed)
        grads = jit(jax.grad(lambda *a: jnp.sum(fun(*a) ** 2), argnums=(0, 1, 2, 3, 4)))(*placed)
        if door != "partitioner":
            rows = ringmoe.explain(jit(fun), *placed).rows
            assert [row.exchange for row in rows] == ["pieces"] and "in pieces, as asked for" in rows[0].reason
    want, want_grads = oracle()
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("target", "backward"), [("v5p:2x2x1", False), ("v5p:2x2x1", True), ("v6e:2x2", False), ("h200x8", True)]
)
def test_a_machine_hides_all_but_the_first_piece_and_the_last(target, backward):
    """Before the first piece there is no work, and after the last none but, backward, that of the weights' gradients."""
    report = ringmoe.inspect(lowered(target, 8 if target == "h200x8" else 4, backward, "pieces"), target=target)
    wires = [c.wire_us for c in report.collectives if c.kind == "all-to-all" and c.wire_us > 10]
    ends = (2 if backward else 1) + 1  # arrays of one piece, there and home
    assert len(wires) > 2 and max(wires) > 1.5 * min(wires)
    assert sum(c.exposed_us for c in report.collectives) <= 1.1 * ends * min(wires) + 10


def test_without_its_option_a_tpu_waits_for_each_piece():
    """So `ringmoe.jit` gives it, unless the caller does."""
    off = functools.partial(ringmoe.jit, compiler_options={"xla_tpu_enable_async_all_to_all": "false"})
    text = lowered("v6e:2x2", 4, False, "pieces", tokens=128, jit=off).compile().as_text()
    assert "all-to-all-start" not in text and "all-to-all" in collectives(text)


def test_of_more_chips_than_it_can_the_option_is_not_given():
    """On v5e from 32 chips on it is an error: "Async all-to-all not supported on limited ICI"."""
    text = lowered("v5e:4x8", 32, False, "pieces", tokens=128).compile().as_text()
    assert "all-to-all-start" not in text and "all-to-all" in collectives(text)
