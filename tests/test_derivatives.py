"""Derivatives of every order through every door, against the dense oracle's in float64; what a remat keeps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import errors, reference, reference_moe
from ringmoe.primitives import doors
from tests.helpers import (
    EXPLICIT_RINGMOE_JIT,
    ONE_DEVICE,
    PARTITIONER,
    RINGMOE_JIT,
    TYPES,
    assert_close,
    double,
    make_mesh,
    put,
    tpu_mesh,
)  # fmt: skip

B, T, N, K, H = 2, 8, 4, 2, 4
RNG = np.random.default_rng(0)
draw = lambda *shape, scale=1.0: (scale * RNG.normal(size=shape)).astype(np.float32)
ATTENTION = {"query": draw(B, T, N, H), "key": draw(B, T, K, H), "value": draw(B, T, K, H), "bias": draw(1, N, 1, T)}
ATTENTION_SPECS = {"query": P("a", "b"), "key": P("a", "b"), "value": P("a", "b"), "bias": P()}
E, D, F, GROUP = 4, 4, 6, 2
CONFIG = ringmoe.RouterConfig(E, top_k=2, group_size=GROUP)
EXPERTS = {
    "x": draw(B, T, D),
    "router": draw(D, E),
    "w_in": draw(E, D, F),
    "w_out": draw(E, F, D),
    "w_gate": draw(E, D, F),
}
BIASES = {"b_in": draw(E, F), "b_gate": draw(E, F), "b_out": draw(E, D)}
EXPERTS |= BIASES
EXPERT_SPECS = {"x": P("a", "b"), "router": P(), "w_in": P("b"), "w_out": P("b"), "w_gate": P("b")}
EXPERT_SPECS |= {name: P("b") for name in BIASES}


def attend(query, key, value, bias, axis_name=None):
    out, lse = ringmoe.dot_product_attention(
        query, key, value, bias, is_causal=True, return_residual=True, axis_name=axis_name
    )
    return out, lse


def dense_attend(query, key, value, bias):
    return reference.dot_product_attention(query, key, value, bias, is_causal=True)


def layer(x, router, w_in, w_out, **rest):
    return ringmoe.moe_ffn(x, router, w_in, w_out, config=CONFIG, **rest)[0]


def dense_layer(x, router, w_in, w_out, **rest):
    chosen = reference_moe.select(
        np.asarray(EXPERTS["x"] @ EXPERTS["router"]), top_k=2, capacity=CONFIG.capacity(GROUP), group_size=GROUP
    )
    return reference_moe.moe_ffn(x, router, w_in, w_out, selection=chosen, **rest)


def scalar(fun):
    """Some number of all results that is linear in none of them."""
    return lambda arrays: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(fun(**arrays)))


def along(arrays, seed=7):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in arrays.items()}


def jvp(fun):
    return lambda arrays, direction: jax.jvp(scalar(fun), (arrays,), (direction,))[1]


def linearize(fun):
    return lambda arrays, direction: jax.linearize(scalar(fun), arrays)[1](direction)


def grad_of_grad(fun):
    slope = lambda arrays, direction: sum(
        jnp.sum(g * d) for g, d in zip(jax.tree.leaves(jax.grad(scalar(fun))(arrays)), jax.tree.leaves(direction))
    )
    return jax.grad(slope)


def forward_over_reverse(fun):
    return lambda arrays, direction: jax.jvp(jax.grad(scalar(fun)), (arrays,), (direction,))[1]


def third(fun):
    return lambda arrays, direction: jax.jvp(lambda a: grad_of_grad(fun)(a, direction), (arrays,), (direction,))[1]


ORDERS = (jvp, linearize, grad_of_grad, forward_over_reverse)
OPS = {
    "attention": (attend, dense_attend, ATTENTION, ATTENTION_SPECS),
    "experts": (layer, dense_layer, EXPERTS, EXPERT_SPECS),
}


@functools.cache
def expected(op, order):
    _, dense, arrays, _ = OPS[op]
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(order(dense))(double(arrays), double(along(arrays))))


def assert_derivatives(got, op, order):
    want = expected(op, order)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(np.asarray(g) / largest, w / largest, 1e-5, order.__name__)


@pytest.mark.sampled
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, EXPLICIT_RINGMOE_JIT, ONE_DEVICE], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_order_through_every_door(op, door, order):
    fun, _, arrays, specs = OPS[op]
    mesh = None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)
    got = door.jit(order(fun))(put(mesh, arrays, specs), put(mesh, along(arrays), specs))
    assert_derivatives(got, op, order)


@pytest.mark.parametrize("order", [jvp, grad_of_grad], ids=lambda order: order.__name__)
def test_inside_a_users_shard_map(order):
    fun, _, arrays, specs = OPS["attention"]
    mesh = make_mesh((2, 4), AxisType.Auto)
    names, out = tuple(arrays), (P("a", "b"), P("a", "b"))
    local = lambda *xs: fun(**dict(zip(names, xs)), axis_name="b")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs[n] for n in names), out_specs=out, check_vma=False)
    got = jax.jit(order(lambda **arrays: sharded(*(arrays[n] for n in names))))(
        put(mesh, arrays, specs), put(mesh, along(arrays), specs)
    )
    assert_derivatives(got, "attention", order)


@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT], ids=str)
def test_a_second_derivative_with_the_hidden_dim_sharded(door):
    """One device adds the outputs' bias: in every order it is counted once."""
    mesh, hidden = make_mesh((2, 2), door.axis_type), P(None, "b")
    specs = {"x": P("a"), "router": P(), "w_in": P(None, None, "b"), "w_gate": P(None, None, "b"), "w_out": hidden}
    specs |= {"b_in": hidden, "b_gate": hidden, "b_out": P()}
    got = door.jit(grad_of_grad(layer))(put(mesh, EXPERTS, specs), put(mesh, along(EXPERTS), specs))
    assert_derivatives(got, "experts", grad_of_grad)


@pytest.mark.sampled
@pytest.mark.parametrize("op", OPS)
def test_a_third_derivative(op):
    fun, _, arrays, specs = OPS[op]
    mesh = make_mesh((2, 4), AxisType.Auto)
    got = ringmoe.jit(third(fun))(put(mesh, arrays, specs), put(mesh, along(arrays), specs))
    assert_derivatives(got, op, third)


def test_jacobian_and_hessian():
    """jacfwd == jacrev, and hessian of a small call, element by element."""
    q, k, v = draw(2, 1, 2), draw(3, 1, 2), draw(3, 1, 2)
    fun = lambda q: ringmoe.dot_product_attention(q, k, v)
    dense = lambda q: reference.dot_product_attention(q[None], k[None].astype(q.dtype), v[None].astype(q.dtype))[0][0]
    with jax.enable_x64(True):
        both = lambda q: (jax.jacrev(dense)(q), jax.hessian(lambda q: jnp.sum(dense(q) ** 2))(q))
        want, want_hessian = jax.jit(both)(double(q))
    assert_close(jax.jacfwd(fun)(q), want, 1e-5)
    assert_close(jax.jacrev(fun)(q), want, 1e-5)
    assert_close(jax.jit(jax.hessian(lambda q: jnp.sum(fun(q) ** 2)))(q), want_hessian, 1e-4)


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_outside_ringmoe_jit_is_placed(op, monkeypatch):
    """jax.grad(ringmoe.jit(f)): the forward op's placement is its derivatives', too, and XLA is never left to decide."""
    fun, _, arrays, specs = OPS[op]
    arrays = put(make_mesh((2, 4), AxisType.Auto), arrays, specs)
    want = ringmoe.jit(jax.grad(scalar(fun)))(arrays)
    monkeypatch.setattr(doors, "_partitioned", None)
    got = jax.grad(ringmoe.jit(scalar(fun)))(arrays)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, 1e-5)


def tpu_counts(fun, *arrays):
    text = fun.lower(*arrays).compile().as_text()
    count = lambda name: len(re.findall(rf"\s{name}(?:-start)?\(", text))
    return count("collective-permute"), text.count('"tpu_custom_call"'), count("all-gather")


def test_a_gradient_outside_ringmoe_jit_on_tpu():
    """An outer jit hides the shardings unless the inner one was given them; then forward and backward are placed."""
    mesh = tpu_mesh("v5e:2x4", (2, 4), AxisType.Auto)
    sharding = NamedSharding(mesh, P("a", "b"))
    arrays = [jax.ShapeDtypeStruct((4, 512, n, 128), jnp.bfloat16, sharding=sharding) for n in (4, 2, 2)]
    ring = functools.partial(ringmoe.dot_product_attention, is_causal=True, exchange="ring")
    loss = lambda q, k, v: jnp.sum(ring(q, k, v).astype(jnp.float32) ** 2)
    inner = ringmoe.jit(loss, in_shardings=(sharding,) * 3)
    outside = tpu_counts(jax.jit(jax.grad(inner, (0, 1, 2))), *arrays)
    assert outside == tpu_counts(ringmoe.jit(jax.grad(loss, (0, 1, 2))), *arrays)
    permutes, kernels, gathers = outside
    assert permutes and kernels and not gathers
    errors.forget_warnings()
    with pytest.warns(errors.CostWarning, match=r"called inside another jit.* as in ringmoe.jit\(jax.grad\(f\)\)"):
        jax.jit(jax.grad(ringmoe.jit(loss), (0, 1, 2))).lower(*arrays)


# What a rematerialised layer keeps.


def stack(policy, moe):
    """The gradient of three layers, scanned and rematerialised."""

    def one(x, w):
        q = jnp.einsum("btd,dnh->btnh", x, w["q"])
        attended = ringmoe.dot_product_attention(q, q, q, is_causal=True, exchange="ring")
        x = x + jnp.einsum("btnh,dnh->btd", attended, w["q"])
        if moe:
            x = x + ringmoe.moe_ffn(x, w["router"], w["in"], w["out"], config=CONFIG)[0]
        return x, None

    body = one if policy == "no remat" else jax.checkpoint(one, policy=policy)
    return jax.grad(lambda ws, x: jnp.sum(jax.lax.scan(body, x, ws)[0] ** 2), (0, 1))


def bound(name, jaxpr):
    return len(re.findall(rf"\bringmoe_{name}\[", str(jaxpr)))


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT], ids=str)
@pytest.mark.parametrize("moe", [False, True])
def test_a_rematerialised_layer_runs_its_ring_once(door, moe):
    mesh, rng = make_mesh((2, 4), door.axis_type), np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 3  # larger ones grow from layer to layer
    ws = {"q": draw(3, D, 2, 4), "router": draw(3, D, E), "in": draw(3, E, D, F), "out": draw(3, E, F, D)}
    specs = {"q": P(), "router": P(), "in": P(None, "b"), "out": P(None, "b")}
    ws, (x,) = put(mesh, ws, specs), put(mesh, (draw(B, T, D),), (P("a", "b"),))
    names = ("ringmoe_attention_output", "ringmoe_attention_lse", "ringmoe_moe_output")
    assert set(names) == set(ringmoe.RESIDUAL_NAMES)
    kept = jax.checkpoint_policies.save_only_these_names(*names)
    with jax.set_mesh(mesh):
        programs = {policy: door.jit(stack(policy, moe)) for policy in (None, kept, "no remat")}
        counts = {p: bound("attention", program.trace(ws, x).jaxpr) for p, program in programs.items()}
        assert counts == {None: 2, kept: 1, "no remat": 1}
        if moe:
            counts = {p: bound("experts", program.trace(ws, x).jaxpr) for p, program in programs.items()}
            assert counts[kept] == 1
        compiled = {policy: program.lower(ws, x).compile() for policy, program in programs.items()}
        sent = {policy: program.as_text().count("collective-permute(") for policy, program in compiled.items()}
        assert sent[kept] == sent["no remat"] < sent[None], sent
        want = compiled["no remat"](ws, x)
        for got in (compiled[None](ws, x), compiled[kept](ws, x)):
            for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                assert_close(g, w, 1e-4)
