"""Sorted rows of several devices, in as many windows as they need: against the dense layer in float64, and compiled for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.schedule import ragged
from tests.helpers import collectives, make_mesh, put

T, D, F, E = 64, 4, 6, 8
CONFIG = ringmoe.RouterConfig(E, top_k=2, capacity_factor=None)
NAMES = ("x", "router", "w_in", "w_gate", "w_out", "b_in", "b_out")
RNG = np.random.default_rng(0)
ARRAYS = tuple(RNG.normal(size=s) for s in ((T, D), (D, E), (E, D, F), (E, D, F), (E, F, D), (E, F), (E, D)))
ANY = np.argsort(RNG.normal(size=(T, E)), -1)[:, :2]
MASK = RNG.random(T) < 0.7
NONE_MASKED = np.ones(T, bool)
# What every token chooses, and which tokens there are.
ROUTINGS = {
    "even": (np.arange(2 * T).reshape(T, 2) % E, NONE_MASKED),
    "random": (ANY, NONE_MASKED),
    "some masked": (ANY, MASK),
    "all to two experts": (
        np.tile([5, 2], (T, 1)),
        NONE_MASKED,
    ),  # of as many devices, which need every window there is
    "all to one device, some masked": (np.tile([7, 6], (T, 1)), MASK),
    "the last device has none": (ANY % 2 + np.array([0, 2]), NONE_MASKED),
    "nothing": (ANY, ~NONE_MASKED),
}


def layer(x, router, w_in, w_gate, w_out, b_in, b_out, expert, mask, axis_name=None):
    return ringmoe.moe_ffn(
        x[None], router, w_in, w_out, w_gate=w_gate, b_in=b_in, b_out=b_out, config=CONFIG, expert=expert[None],
        token_mask=mask[None], axis_name=axis_name,
    )[0][0]  # fmt: skip


def dense(x, router, w_in, w_gate, w_out, b_in, b_out, expert, mask):
    weight = ringmoe.route((x @ router)[None], CONFIG, expert=expert[None], token_mask=mask[None]).weight[0]
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, w_gate)) * (jnp.einsum("td,edf->tef", x, w_in) + b_in)
    out = jnp.einsum("tef,efd->ted", hidden, w_out) + b_out
    chosen = weight[..., None] * jnp.take_along_axis(out, expert[..., None], 1)
    return jnp.where(mask[:, None], jnp.sum(chosen, 1), 0)


def with_gradients(fun, order=1):
    """The result and all gradients of its sum of squares; of order 2, of the sum of squares of those."""
    energy = lambda *arrays: jnp.sum(fun(*arrays) ** 2)
    for _ in range(order - 1):
        slope = jax.grad(energy, tuple(range(len(NAMES))))
        energy = lambda *arrays, slope=slope: sum(jnp.sum(g**2) for g in slope(*arrays))
    return lambda *arrays: (fun(*arrays), *jax.grad(energy, tuple(range(len(NAMES))))(*arrays))


@functools.cache
def expected(routing, order=1):
    expert, mask = ROUTINGS[routing]
    with jax.enable_x64(True):
        arrays = (*map(jnp.asarray, ARRAYS), jnp.asarray(expert, jnp.int32), jnp.asarray(mask))
        return [np.asarray(a) for a in _dense(order)(*arrays)]


@functools.cache
def _dense(order):
    return jax.jit(with_gradients(dense, order))


def assert_dense(program, mesh, specs, routings, order=1):
    for name in routings:
        expert, mask = ROUTINGS[name]
        with jax.enable_x64(True):
            got = program(*put(mesh, (*ARRAYS, np.asarray(expert, np.int32), mask), specs))
        for of, g, want in zip(("y", *NAMES), got, expected(name, order), strict=True):
            np.testing.assert_allclose(
                g, want, rtol=0, atol=1e-11 * max(1, np.abs(want).max()), err_msg=f"{name}: {of}"
            )


@pytest.mark.sampled
@pytest.mark.parametrize(("door", "shape", "tokens", "experts"), [
    ("types", (2,), "a", "a"), ("manual", (4,), "a", "a"), ("types", (8,), "a", "a"),
    ("types", (2, 4), ("a", "b"), ("b", "a")), ("ringmoe.jit", (2, 2, 2), ("c", "a"), ("a", "b")),
])  # fmt: skip
def test_nothing_is_lost_however_uneven(door, shape, tokens, experts):
    """Several axes exchange, in any order; and with one that shards experts alone."""
    mesh = make_mesh(shape, AxisType.Explicit if door == "types" else AxisType.Auto)
    specs = (P(tokens), P(), *(P(experts),) * 5, P(tokens), P(tokens))
    fun = layer
    if door == "manual":
        fun = jax.shard_map(
            functools.partial(layer, axis_name="a"), mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=True
        )
    jit = ringmoe.jit if door == "ringmoe.jit" else jax.jit
    assert_dense(jit(with_gradients(fun)), mesh, specs, ROUTINGS)


def test_a_second_derivative():
    mesh = make_mesh((4,), AxisType.Explicit)
    specs = (P("a"), P(), *(P("a"),) * 5, P("a"), P("a"))
    assert_dense(jax.jit(with_gradients(layer, 2)), mesh, specs, ("random", "all to two experts"), 2)


def test_the_plan_says_what_travels():
    mesh = make_mesh((8,), AxisType.Explicit)
    specs = (P("a"), P(), *(P("a"),) * 5, P("a"), P("a"))
    expert, mask = ROUTINGS["even"]
    arrays = put(mesh, (*(a.astype(np.float32) for a in ARRAYS), expert.astype(np.int32), mask), specs)
    (row,) = ringmoe.explain(jax.jit(layer), *arrays).rows
    assert "only rows travel, 24 at a time: bytes are of even routing" in row.reason
    assert row.wire_bytes == 2 * 16 * D * 4 * 7 // 8  # both choices of eight tokens, there and back


def test_slices_go_where_they_are_sent_and_back():
    """Any slices, in any order and with gaps; the transpose, of every order, is the way back."""
    devices, of_each, length = 4, 3, 64
    rng = np.random.default_rng(1)
    size = rng.integers(0, 5, (devices, devices, of_each))
    size[1] = size[:, 2] = 0  # one sends nothing, one gets nothing

    def places(size):  # of one device's slices, in a random order, with gaps
        order = rng.permutation(size.size)
        lies = np.empty(size.size, int)
        lies[order] = np.cumsum(size.reshape(-1)[order] + 1) - size.reshape(-1)[order]
        return lies.reshape(size.shape)

    here = np.stack([places(s) for s in size])
    there = np.stack([places(size[:, p]) for p in range(devices)], 1)
    rows = rng.normal(size=(devices, length, 2)).astype(np.float32)
    want = np.zeros((devices, length + 6, 2), np.float32)
    for (s, p, i), n in np.ndenumerate(size):
        want[p, there[s, p, i] : there[s, p, i] + n] = rows[s, here[s, p, i] : here[s, p, i] + n]
    sent = ragged.Slices(*(jnp.asarray(a, jnp.int32) for a in (size, here, there)))
    came = ragged.Slices(*(jnp.asarray(a.swapaxes(0, 1), jnp.int32) for a in (size, there, here)))

    def local(rows, sent, came):
        of_one = lambda slices: ragged.Slices(*(a[0] for a in slices))
        return ragged.exchange(rows[0], of_one(sent), of_one(came), length + 6, ("a",))[None]

    mesh = make_mesh((devices,), AxisType.Auto)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("a"),) * 3, out_specs=P("a")))
    np.testing.assert_array_equal(run(rows, sent, came), want)
    other = rng.normal(size=want.shape).astype(np.float32)
    back = jax.jit(lambda rows: jax.vjp(lambda rows: run(rows, sent, came), rows)[1](other)[0])(rows)
    np.testing.assert_allclose(np.vdot(back, rows), np.vdot(other, want), rtol=1e-5)
    _, moved = jax.jit(lambda rows: jax.jvp(lambda rows: run(rows, sent, came), (rows,), (2 * rows,)))(rows)
    np.testing.assert_array_equal(moved, 2 * want)
    both = jax.jit(jax.vmap(lambda rows: run(rows, sent, came)))(np.stack([rows, 2 * rows]))
    np.testing.assert_array_equal(both, np.stack([want, 2 * want]))


@pytest.mark.sampled
@pytest.mark.parametrize(("target", "devices", "door"), [
    ("v5e:2x4", 8, "types"), ("v5p:2x2x2", 8, "ringmoe.jit"), ("v6e:2x4", 8, "ringmoe.jit"), ("tpu7x:2x2x2", 16, "types"),
    ("h200x8", 8, "ringmoe.jit"),
])  # fmt: skip
def test_compiled_for_a_machine_only_rows_are_on_the_wire(target, devices, door):
    kind = AxisType.Explicit if door == "types" else AxisType.Auto
    mesh = ringmoe.target(target).mesh({"a": devices}, axis_types=(kind,))
    d, e = 256, devices
    shapes = (1, 128 * devices, d), (d, e), (e, d, d), (e, d, d)
    specs = P(None, "a"), P(), P("a"), P("a")
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    config = ringmoe.RouterConfig(e, top_k=2, capacity_factor=None)
    loss = lambda *a: jnp.sum(ringmoe.moe_ffn(*a, config=config)[0].astype(jnp.float32) ** 2)
    jit = jax.jit if door == "types" else ringmoe.jit
    found = collectives(jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays).compile().as_text() or "")
    assert "ragged-all-to-all" in found and "all-to-all" not in found
