"""Rows that travel in pieces: which layers do, through every door, against the float64 oracle; and hidden on a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference_moe
from tests.helpers import make_mesh, put

T, D, F, E = 64, 8, 12288, 4  # of a wide hidden dim, so that in fp32 too the matmuls outlast the wire
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
        x, router_weight, w_in, w_gate, w_out = (np.asarray(a, np.float64) for a in arrays())
        routing = ringmoe.route(jnp.asarray(x @ router_weight), CONFIG)
        choices = reference_moe.select(
            x @ router_weight, top_k=2, capacity=routing.capacity, group_size=CONFIG.group_size
        )
        of = lambda x, w_in, w_gate, w_out: reference_moe.experts(x, choices, routing.weight, w_in, w_out, w_gate)
        y, pullback = jax.vjp(of, x, w_in, w_gate, w_out)
        return np.asarray(y), [np.asarray(g) for g in pullback(2 * y)]


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
        router_is_given = lambda x, w_in, w_gate, w_out: fun(x, placed[1], w_in, w_gate, w_out)
        grads = jit(jax.grad(lambda *a: jnp.sum(router_is_given(*a) ** 2), argnums=(1, 2, 3)))(placed[0], *placed[2:])
        if door != "partitioner":
            rows = ringmoe.explain(jit(fun), *placed).rows
            assert [row.exchange for row in rows] == ["pieces"] and "in pieces, as asked for" in rows[0].reason
    want, want_grads = oracle()
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())
    for got, expected in zip(grads, want_grads[1:], strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2"])
def test_on_a_tpu_the_matmuls_hide_the_wire(target):
    """Every permute is asynchronous, and of all only the last piece's way home is waited for."""
    mesh = ringmoe.target(target).mesh({"a": 4})
    of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    d, f = 2048, 8192
    weights = of((d, E)), of((E, d, f), "a"), of((E, d, f), "a"), of((E, f, d), "a")
    report = ringmoe.inspect(ringmoe.jit(layer), of((4, 4096, d), None, "a"), *weights, target=target, mesh=mesh)
    assert {c.kind for c in report.collectives} == {"collective-permute"} and len(report.collectives) == 6
    assert all(c.asynchronous for c in report.collectives)
    assert report.exposed_us <= 1.05 * min(c.wire_us for c in report.collectives)
