"""ringmoe.jit takes what jax.jit takes, finds every op, places each by itself, and leaves an ordinary program."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.lowering.walk import ops
from ringmoe.primitives.doors import Placement
from tests.helpers import TOLERANCE, assert_close, collectives, make_mesh, put

FORWARD, GRADIENT = TOLERANCE[jnp.dtype(jnp.float32)]
B, T, N, H = 2, 8, 2, 4
SPEC = P("a", "b")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((2, 4), AxisType.Auto)


def arrays():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(3))


@pytest.fixture
def placed(mesh):
    return put(mesh, arrays(), (SPEC,) * 3)


def attend(q, k, v, **kwargs):
    return ringmoe.dot_product_attention(q, k, v, **kwargs)


def want(**kwargs):
    return ringmoe.dot_product_attention(*arrays(), **kwargs)


def placements(jitted, *args, **kwargs):
    return [eqn.params["placement"] for eqn in ops(jitted.trace(*args, **kwargs).jaxpr)]


# What jax.jit takes.


@pytest.mark.parametrize(("options", "call"), [
    ({"static_argnums": 3}, lambda f, q, k, v: f(q, k, v, True)),
    ({"static_argnames": "causal"}, lambda f, q, k, v: f(q, k, v, causal=True)),
    ({"static_argnums": (3, 4)}, lambda f, q, k, v: f(q, k, v, True, "unused")),
    ({"static_argnums": -1}, lambda f, q, k, v: f(q, k, v, True)),
], ids=["number", "name", "two numbers", "number from the end"])  # fmt: skip
def test_static_arguments(placed, options, call):
    calls = []

    def fun(q, k, v, causal, *more):
        calls.append(causal)
        return attend(q, k, v, is_causal=causal)

    jitted = ringmoe.jit(fun, **options)
    assert_close(call(jitted, *placed), want(is_causal=True), FORWARD)
    traced = len(calls)
    call(jitted, *placed)
    assert set(calls) == {True} and len(calls) == traced, "the second call traced again"


def test_another_static_value_is_another_program(placed):
    jitted = ringmoe.jit(lambda q, k, v, causal: attend(q, k, v, is_causal=causal), static_argnames="causal")
    for causal in (True, False, True):
        assert_close(jitted(*placed, causal=causal), want(is_causal=causal), FORWARD)


@pytest.mark.parametrize("options", [{"donate_argnums": (0,)}, {"donate_argnames": "q"}], ids=str)
def test_donated_buffers_are_gone(placed, options):
    q, k, v = placed
    fun = ringmoe.jit(lambda q, k, v: attend(q, k, v), **options)
    assert_close(fun(q, k, v), want(), FORWARD)
    assert q.is_deleted() and not k.is_deleted() and not v.is_deleted()


def test_in_and_out_shardings(mesh):
    """The arguments come without a sharding: in_shardings alone tells where they go."""
    sharding, heads = NamedSharding(mesh, SPEC), NamedSharding(mesh, P(None, None, "a"))
    jitted = ringmoe.jit(attend, in_shardings=(sharding,) * 3, out_shardings=heads)
    out = jitted(*arrays())
    assert out.sharding.is_equivalent_to(heads, out.ndim)
    assert_close(out, want(), FORWARD)
    (placement,) = placements(jitted, *arrays())
    assert dict(placement.factors)["s"] == ("b",)


def test_a_sharding_that_comes_from_out_shardings_alone(mesh):
    jitted = ringmoe.jit(attend, out_shardings=NamedSharding(mesh, SPEC))
    assert_close(jitted(*arrays()), want(), FORWARD)
    assert jitted(*arrays()).sharding.spec == SPEC


def test_a_sharding_from_a_constraint_inside(mesh):
    def fun(q, k, v):
        q, k, v = (jax.lax.with_sharding_constraint(x, NamedSharding(mesh, SPEC)) for x in (q, k, v))
        return attend(q, k, v)

    jitted = ringmoe.jit(fun)
    args = put(mesh, arrays(), (P(),) * 3)
    assert_close(jitted(*args), want(), FORWARD)
    assert dict(placements(jitted, *args)[0].factors)["t"] == ("b",)


def test_pytrees_and_keywords_and_outputs_of_any_structure(placed):
    q, k, v = placed

    def fun(tree, *, value, extra=None):
        out, lse = attend(tree["q"], tree["k"][0], value, return_residual=True)
        return {"out": out, "rest": (lse, None, [out.sum()])}

    got = ringmoe.jit(fun)({"q": q, "k": [k]}, value=v)
    assert sorted(got) == ["out", "rest"] and got["rest"][1] is None
    out, lse = want(return_residual=True)
    assert_close(got["out"], out, FORWARD)
    assert_close(got["rest"][0], lse, FORWARD)
    assert_close(ringmoe.jit(fun)({"q": q, "k": [k]}, value=v, extra=3)["out"], out, FORWARD)


def test_as_a_decorator_with_and_without_arguments(placed):
    @ringmoe.jit
    def plain(q, k, v):
        """Docs."""
        return attend(q, k, v)

    @ringmoe.jit(static_argnames=("causal",))
    def optional(q, k, v, *, causal=False):
        return attend(q, k, v, is_causal=causal)

    assert plain.__name__ == "plain" and plain.__doc__ == "Docs."
    assert_close(plain(*placed), want(), FORWARD)
    assert_close(optional(*placed, causal=True), want(is_causal=True), FORWARD)


def test_scalars_numpy_arrays_and_weak_types_are_arguments(placed):
    jitted = ringmoe.jit(lambda q, k, v, x, y: attend(q, k, v) * x + y)
    for x, y in ((2, 1.0), (np.float32(3), jnp.float32(0)), (2.0, 5)):
        assert_close(jitted(*placed, x, y), want() * x + y, FORWARD)
    assert jitted(*placed, 2, 1).dtype == jnp.float32


def test_lower_compile_and_call(placed):
    compiled = ringmoe.jit(attend).lower(*placed).compile()
    assert_close(compiled(*placed), want(), FORWARD)
    text = compiled.as_text()
    assert "CustomSPMDPartitioning" not in text
    assert "collective-permute" in collectives(text) and "all-gather" not in collectives(text)
    # The same function under plain jax.jit is the partitioner's: what the assertion above would see.
    assert "CustomSPMDPartitioning" in jax.jit(attend).lower(*placed).as_text()
    assert "CustomSPMDPartitioning" not in ringmoe.jit(attend).lower(*placed).as_text()


def test_lowering_for_arrays_that_are_not_there(mesh):
    shapes = [jax.ShapeDtypeStruct((B, T, N, H), jnp.float32, sharding=NamedSharding(mesh, SPEC))] * 3
    compiled = ringmoe.jit(attend).lower(*shapes).compile()
    assert_close(compiled(*put(mesh, arrays(), (SPEC,) * 3)), want(), FORWARD)


def test_trace_and_eval_shape(placed):
    jitted = ringmoe.jit(attend)
    traced = jitted.trace(*placed)
    assert [type(eqn.params["placement"]) for eqn in ops(traced.jaxpr)] == [Placement]
    assert_close(traced.lower().compile()(*placed), want(), FORWARD)
    shape = jitted.eval_shape(*placed)
    assert (shape.shape, shape.dtype) == ((B, T, N, H), jnp.float32)


def test_a_second_call_neither_traces_nor_compiles(placed):
    traced = []
    jitted = ringmoe.jit(lambda q, k, v: (traced.append(1), attend(q, k, v))[1])
    jitted(*placed)
    before = len(traced)
    with jax.log_compiles(False):
        jitted(*placed)
    assert len(traced) == before == 1
    jitted.clear_cache()
    assert_close(jitted(*placed), want(), FORWARD)


def test_other_shapes_and_shardings_are_placed_anew(mesh):
    jitted = ringmoe.jit(attend)
    for spec, factors in ((SPEC, {"b0", "t", "s"}), (P("a"), {"b0"}), (P(None, None, "a"), {"k"})):
        args = put(mesh, arrays(), (spec,) * 3)
        assert_close(jitted(*args), want(), FORWARD)
        assert set(dict(placements(jitted, *args)[0].factors)) == factors


def test_without_a_mesh_and_without_an_op():
    assert_close(ringmoe.jit(attend)(*arrays()), want(), FORWARD)
    assert ringmoe.jit(lambda x: x + 1)(1.0) == 2.0


# Where ops hide.


def test_one_inner_function_called_with_two_shardings_is_placed_twice(mesh):
    inner = jax.jit(attend)
    sequence, batch = put(mesh, arrays(), (P(None, "b"),) * 3), put(mesh, arrays(), (P("a"),) * 3)
    jitted = ringmoe.jit(lambda xs, ys: (inner(*xs), inner(*ys)))
    for got in jitted(sequence, batch):
        assert_close(got, want(), FORWARD)
    assert [dict(p.factors) for p in placements(jitted, sequence, batch)] == [
        {"s": ("b",), "t": ("b",)},
        {"b0": ("a",)},
    ]


def body(x, _=None):
    return attend(x, x, x) + x


HIDDEN = {
    "scan": lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, length=2)[0],
    "fori_loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, x: body(x), x),
    "while_loop": lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, body(c[1])), (0, x))[1],
    "cond": lambda x: jax.lax.cond(x.sum() > -1e9, lambda x: body(body(x)), lambda x: x, x),
    "switch": lambda x: jax.lax.switch(1, [lambda x: x, lambda x: body(body(x))], x),
    "remat": lambda x: jax.checkpoint(lambda x: body(body(x)))(x),
    "nested jit": lambda x: jax.jit(jax.jit(lambda x: body(body(x))))(x),
    "nested ringmoe.jit": lambda x: ringmoe.jit(lambda x: body(body(x)))(x),
    "custom_vjp": lambda x: hidden_in_custom_vjp(x),
    "scan in remat in jit": lambda x: jax.jit(jax.checkpoint(HIDDEN["scan"]))(x),
}


@jax.custom_vjp
def hidden_in_custom_vjp(x):
    return body(body(x))


hidden_in_custom_vjp.defvjp(
    lambda x: (hidden_in_custom_vjp(x), x), lambda x, d: jax.vjp(lambda x: body(body(x)), x)[1](d)
)


@pytest.mark.oldest
@pytest.mark.parametrize("place", HIDDEN)
def test_ops_are_found_wherever_they_hide(mesh, place):
    x = arrays()[0]
    sharded = put(mesh, (x,), (SPEC,))[0]
    jitted = ringmoe.jit(HIDDEN[place])
    found = placements(jitted, sharded)
    assert found and all(dict(p.factors) == {"b0": ("a",), "t": ("b",), "s": ("b",)} for p in found), found
    text = jitted.lower(sharded).compile().as_text()
    assert "CustomSPMDPartitioning" not in text and "all-gather" not in collectives(text)
    assert_close(jitted(sharded), body(body(x)), 10 * FORWARD)


@pytest.mark.oldest
def test_value_and_grad_inside(mesh, placed):
    loss = lambda q, k, v: jnp.sum(attend(q, k, v, is_causal=True) ** 2)
    gradient = jax.value_and_grad(loss, (0, 1, 2))
    jitted = ringmoe.jit(gradient)
    value, grads = jitted(*placed)
    want_value, want_grads = gradient(*arrays())
    assert_close(value, want_value, GRADIENT)
    for got, expected in zip(grads, want_grads, strict=True):
        assert_close(got, expected, GRADIENT)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 4)
    assert len(placements(jitted, *placed)) == 2


def test_ops_in_a_users_shard_map_are_left_to_the_user(mesh, placed):
    local = functools.partial(attend, axis_name="b", is_causal=True)
    mapped = jax.shard_map(lambda q, k, v: local(q, k, v), mesh=mesh, in_specs=(SPEC,) * 3, out_specs=SPEC)

    def fun(q, k, v):
        return mapped(q, k, v), attend(q, k, v, is_causal=True)

    for got in ringmoe.jit(fun)(*placed):
        assert_close(got, want(is_causal=True), FORWARD)


def test_a_closure_is_a_constant(mesh, placed):
    q, k, v = placed
    scale = jnp.asarray(np.linspace(1, 2, N), jnp.float32)[:, None]
    assert_close(ringmoe.jit(lambda q, k, v: attend(q, k, v) * scale)(q, k, v), want() * scale, FORWARD)


# explain


@pytest.mark.parametrize(("types", "jit", "door", "exchange"), [
    (AxisType.Auto, ringmoe.jit, "ringmoe.jit", "ring"),
    (AxisType.Auto, lambda fun: fun, "ringmoe.jit", "ring"),  # a plain function is taken as ringmoe.jit's
    (AxisType.Explicit, jax.jit, "types", "ring"),
    (AxisType.Explicit, ringmoe.jit, "types", "ring"),
    (AxisType.Auto, jax.jit, "partitioner", "partitioner"),
])  # fmt: skip
def test_explain_tells_the_door_and_the_exchange(types, jit, door, exchange):
    config = ringmoe.RouterConfig(4, group_size=2)

    def fun(q, k, v, x, w):
        return attend(q, k, v), ringmoe.moe_ffn(x, w[0], w[1], w[2], config=config)[0]

    mesh = make_mesh((2, 4), types)
    q, k, v = put(mesh, arrays(), (SPEC,) * 3)
    x = put(mesh, (np.zeros((2, 8, 4), np.float32),), (SPEC,))[0]
    shapes = (4, 4), (4, 4, 6), (4, 6, 4)
    w = put(mesh, tuple(np.zeros(s, np.float32) for s in shapes), (P(), P("b"), P("b")))
    explanation = ringmoe.explain(jit(fun), q, k, v, x, w)
    first, second = explanation.rows
    assert (first.op, first.door, first.exchange) == ("attention", door, exchange)
    assert (second.op, second.door) == ("experts", door)
    assert "test_jit.py" in first.where and "query float32[2,8,2,4]" in first.shapes
    if door == "partitioner":
        assert first.axes == () and "ringmoe.jit" in first.reason
    else:
        assert first.axes == ("b",) and first.wire_bytes == 3 * (2 * B * T * N * H // 8) * 4
        assert second.exchange == "all_to_all" and second.axes == ("b",)
    text = str(explanation)
    assert "RingMoE ops" in text and "attention" in text and door in text


def test_explain_inside_a_users_shard_map():
    mesh = make_mesh((8,), AxisType.Auto)
    local = lambda q: attend(q, q, q, axis_name="a", exchange="ring")
    fun = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a")))
    (row,) = ringmoe.explain(fun, arrays()[0]).rows
    assert (row.door, row.exchange, row.axes) == ("manual", "ring", ("a",))
    assert "no RingMoE op found" in str(ringmoe.explain(lambda x: x + 1, 1.0))


@pytest.mark.sampled
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2", "h200x4"])
def test_explain_tells_what_each_op_takes_on_a_machine(target):
    """Of a layer seen on eight CPU devices: the times of its ops are within the step's, and what they wait is all it waits."""
    config = ringmoe.RouterConfig(4, group_size=256)  # whole on its device: the router exchanges nothing

    def loss(x, router, w_in, w_out):
        q = x.reshape(2, -1, 2, 128)
        y = attend(q, q, q).reshape(x.shape)
        return jnp.sum(ringmoe.moe_ffn(y, router, w_in, w_out, config=config)[0].astype(jnp.float32) ** 2)

    mesh = make_mesh((2, 4), AxisType.Auto)
    of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    x, weights = of((2, 2048, 256), "a", "b"), (of((256, 4)), of((4, 256, 512), "b"), of((4, 512, 256), "b"))
    explanation = ringmoe.explain(ringmoe.jit(jax.grad(loss)), x, *weights, target=target, mesh={"a": 1, "b": 4})
    report, rows = explanation.report, explanation.rows
    assert [row.op for row in rows] == ["attention", "experts", "experts_backward", "attention_backward"]
    assert all(row.us > 0 and row.us >= row.exposed_us for row in rows)
    assert 0.3 * report.us < sum(row.us for row in rows) <= report.us
    assert sum(row.exposed_us for row in rows) == pytest.approx(report.exposed_us)
    text = str(explanation)
    assert report.target in text and "waits" in text
    with pytest.raises(ValueError, match="mesh= without target="):
        ringmoe.explain(loss, x, *weights, mesh={"a": 1, "b": 4})


# A second process finds the program in the persistent cache.

SCRIPT = """
import json, os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import ringmoe
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
x = jax.ShapeDtypeStruct((2, 8, 2, 4), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
loss = lambda x: jnp.sum(ringmoe.dot_product_attention(x, x, x, is_causal=True) ** 2)
ringmoe.jit(jax.grad(loss)).lower(x).compile()
count = lambda end: sum(name.endswith(end) for name in events)
counts = {"hits": count("/cache_hits"), "misses": count("/cache_misses")}
print(json.dumps(counts | {"files": len(os.listdir(sys.argv[1]))}))
"""


@pytest.mark.oldest
def test_a_second_process_gets_a_cache_hit(tmp_path):
    def once():
        env = os.environ | {"PYTHONPATH": str(pathlib.Path(ringmoe.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, second = once(), once()
    assert first["misses"] >= 1 and first["hits"] == 0
    assert second["hits"] == first["misses"] and second["misses"] == 0 and second["files"] == first["files"]


# What is around the call.


def test_another_precision_is_another_program():
    mesh = make_mesh((2, 4), AxisType.Auto)
    q = jax.device_put(jnp.ones((2, 16, 2, 4)), NamedSharding(mesh, P("a", "b")))
    attend = ringmoe.jit(lambda q: ringmoe.dot_product_attention(q @ jnp.eye(4), q, q))
    default = attend.lower(q).as_text()
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in attend.lower(q).as_text() and "HIGHEST" not in default


def test_without_jit_it_still_runs():
    q = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
    with jax.disable_jit():
        out = ringmoe.jit(lambda q: ringmoe.dot_product_attention(q, q, q))(q)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, q, q), rtol=1e-5, atol=1e-5)
