"""The router against the counting loop: choices, slots, weights, drops, bad tokens, metrics, sharding modes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference_moe
from ringmoe.router import RouterConfig, choose, metrics, route

# (config, batch): few shapes, so that each compiles once; hypothesis draws the values
LAYOUTS = (
    (RouterConfig(1, 1, 1.0, 4), ()),
    (RouterConfig(2, 2, 0.3, 6, False), (1,)),
    (RouterConfig(3, 1, 1.25, 4), (2, 1)),
    (RouterConfig(5, 3, 9.0, 12, False), (2,)),
    (RouterConfig(5, 3, None, 1), ()),
    (RouterConfig(8, 2, 1.0, 6), (2,)),
    (RouterConfig(8, 3, 0.3, 12), (2, 2)),
    (RouterConfig(8, 2, 0.5), (2,)),
    (RouterConfig(5, 2, 0.7, 6, priority="position"), (2,)),
    (RouterConfig(7, 3, 0.7, priority="position", scope="global"), (2,)),
    (RouterConfig(4, 2, 0.6, 6, priority="probability"), (2,)),
    (RouterConfig(130, 2, 4.0, priority="probability", scope="global"), (2,)),
    (RouterConfig(6, 3, 0.5, priority="batch", scope="sequence"), (2,)),
    (RouterConfig(256, 2, 0.5, scope="global"), (3, 2)),
)


@st.composite
def problems(draw):
    """(config, logits, token_mask): few distinct logits make ties common."""
    config, batch = draw(st.sampled_from(LAYOUTS))
    shape = (*batch, 12, config.num_experts)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    logits = rng.integers(0, 4, shape) if draw(st.booleans()) else rng.normal(size=shape)
    logits = np.where(rng.random(shape) < draw(st.sampled_from([0, 0.1])), -np.inf, logits)
    bad = rng.random(shape) < draw(st.sampled_from([0, 0.1]))
    logits = np.where(bad, rng.choice([np.nan, np.inf], shape), logits)
    return config, logits.astype(np.float32), rng.random(shape[:-1]) < draw(st.sampled_from([1.0, 0.7]))


@functools.partial(jax.jit, static_argnums=1)
def routed(logits, config, mask=None):
    """(routing, metrics)"""
    routing = route(logits, config, token_mask=mask)
    return routing, metrics(routing, logits)


def order_of(config, logits):
    """Which choice comes first, as reference_moe.select reads it."""
    scores = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    shape = (*logits.shape[:-1], config.top_k)
    if config.priority == "choice":
        return None
    if config.priority == "position":
        return np.zeros(shape)
    if config.priority == "probability":
        return -np.asarray(route(jnp.asarray(logits), config).weight)  # as rounded there
    best = -scores.max(-1).reshape(-1, config.group(*logits.shape[:-1]))
    rank = np.argsort(np.argsort(best, -1, kind="stable"), -1).reshape(shape[:-1])
    return np.arange(config.top_k) * logits.size + rank[..., None]


@given(problems())
def test_equals_the_counting_loop(problem):
    config, logits, mask = problem
    group_size = config.group(*logits.shape[:-1])
    capacity = config.capacity(group_size)
    routing, got = routed(logits, config, mask)
    order = order_of(config, np.where(mask[..., None], logits, 0))
    want = reference_moe.select(
        logits, top_k=config.top_k, capacity=capacity, group_size=group_size, token_mask=mask, order=order
    )
    active = want.active
    np.testing.assert_array_equal(routing.active, active)
    np.testing.assert_array_equal(np.asarray(routing.expert)[active], want.expert[active])
    np.testing.assert_array_equal(routing.slot, want.slot)
    weight = reference_weights(logits, want, config.renormalize)
    np.testing.assert_allclose(routing.weight, np.where(mask[..., None], weight, 0), rtol=1e-6)
    asked = np.bincount(want.expert[active].reshape(-1), minlength=config.num_experts)
    np.testing.assert_array_equal(got.expert_load, asked)
    assert got.dropped == ((want.slot < 0) & active[..., None]).sum()
    assert got.drop_fraction == pytest.approx(int(got.dropped) / max(asked.sum(), 1))
    assert got.nonfinite == (~active & mask).sum() and got.masked == (~mask).sum()
    assert got.unused_experts == (asked == 0).sum()
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(got))


@functools.partial(jax.jit, static_argnums=2)
def reference_weights(logits, selection, renormalize):
    return reference_moe.weights(logits, selection, renormalize=renormalize)


def test_worked_example_of_the_article():
    x = jnp.array([0.4, 0.7, 0.2, 0.5])
    gate = jnp.array([[0.6, 0.1, 0.3, 0.2], [0.1, 0.5, 0.2, 0.6], [0.3, 0.4, 0.6, 0.1], [0.2, 0.3, 0.1, 0.5]])
    routing = route((gate @ x)[None], RouterConfig(4))
    np.testing.assert_allclose(routing.scores[0], [0.2224, 0.2884, 0.2458, 0.2434], atol=5e-5)
    np.testing.assert_array_equal(routing.expert[0], [1, 2])
    np.testing.assert_allclose(routing.weight[0], [0.5399, 0.4601], atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_lowest_index_wins_a_tie(dtype):
    routing, _ = routed(jnp.zeros((6, 5), dtype), RouterConfig(5, top_k=3))
    np.testing.assert_array_equal(routing.expert, np.tile([0, 1, 2], (6, 1)))
    logits = jnp.tile(jnp.array([1, 2, 1, 2, 2], dtype), (6, 1))
    np.testing.assert_array_equal(routed(logits, RouterConfig(5, top_k=4))[0].expert, np.tile([1, 3, 4, 0], (6, 1)))


def test_logits_that_round_to_one_score_are_still_told_apart():
    logits = jnp.array([[0.0, 1e-9, 1e-8, 0.0]])
    assert len(set(np.asarray(jax.nn.softmax(logits))[0])) == 1
    np.testing.assert_array_equal(route(logits, RouterConfig(4)).expert, [[2, 1]])


def test_first_choices_go_before_second_choices():
    # Tokens 0 and 1 have expert 0 second; tokens 2 and 3 have it first, and there is room for two.
    logits = jnp.array([[1.0, 2, 0], [1, 2, 0], [2, 0, 1], [2, 0, 1]])
    routing = route(logits, RouterConfig(3, top_k=2, capacity_factor=0.75, group_size=4))
    assert routing.capacity == 2
    np.testing.assert_array_equal(routing.slot, [[0, -1], [1, -1], [0, 0], [1, 1]])


def test_dropless_drops_nothing():
    logits = jnp.tile(jnp.array([3.0, 2, 1, 0]), (8, 1))
    routing, measured = routed(logits, RouterConfig(4, capacity_factor=None, group_size=8))
    assert routing.capacity == 8 and measured.dropped == 0


def test_a_nan_token_changes_no_other():
    logits = jax.random.normal(jax.random.key(0), (2, 16, 4))
    config = RouterConfig(4, capacity_factor=0.5, group_size=8)
    mask = jnp.ones((2, 16), bool).at[0, 3].set(False)
    without, _ = routed(logits, config, mask)
    for bad in (jnp.nan, jnp.inf):
        routing, _ = routed(logits.at[0, 3, 2].set(bad), config)
        for name in ("expert", "slot", "weight", "scores"):
            got, want = (np.delete(np.asarray(getattr(r, name)).reshape(32, -1), 3, 0) for r in (routing, without))
            np.testing.assert_array_equal(got, want)
        assert np.isnan(routing.weight[0, 3]).all() and (routing.slot[0, 3] == -1).all()
    assert (without.weight[0, 3] == 0).all()
    masked, _ = routed(logits.at[0, 3].set(jnp.nan), config, mask)
    jax.tree.map(np.testing.assert_array_equal, masked, without)


def test_minus_infinity_is_chosen_last_with_weight_zero():
    routing = route(jnp.array([[-jnp.inf, 0.0, -jnp.inf]]), RouterConfig(3, top_k=2))
    np.testing.assert_array_equal(routing.expert, [[1, 0]])
    np.testing.assert_array_equal(routing.weight, [[1, 0]])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradient_of_the_weights(renormalize, top_k):
    config = RouterConfig(5, top_k=top_k, group_size=4, renormalize=renormalize)
    logits = jax.random.normal(jax.random.key(1), (2, 8, 5))
    scale = jax.random.normal(jax.random.key(2), (2, 8, top_k))
    selection = reference_moe.select(logits, top_k=top_k, capacity=4, group_size=4)
    gradient = jax.jit(jax.grad(lambda logits: jnp.sum(route(logits, config).weight * scale)))
    reference_gradient = jax.jit(
        jax.grad(lambda logits: jnp.sum(reference_weights(logits, selection, renormalize) * scale))
    )
    np.testing.assert_allclose(gradient(logits), reference_gradient(logits), atol=1e-6)
    assert "stablehlo.scatter" not in gradient.lower(logits).as_text()


def test_padding_has_no_gradient_even_where_it_is_nan():
    logits = jax.random.normal(jax.random.key(1), (8, 4)).at[3].set(jnp.nan)
    mask = jnp.arange(8) != 3

    def loss(logits):
        routing = route(logits, RouterConfig(4), token_mask=mask)
        measured = metrics(routing, logits)
        return jnp.sum(routing.weight**2) + measured.load_balance_loss + measured.z_loss

    grad = jax.jit(jax.grad(loss))(logits)
    assert np.isfinite(grad).all() and (grad[3] == 0).all() and (grad[2] != 0).any()


def test_losses():
    uniform, eye = jnp.zeros((16, 4)), jnp.tile(10.0 * jnp.eye(4), (4, 1))
    for top_k, logits in ((1, uniform), (2, uniform), (4, uniform), (1, eye)):
        assert routed(logits, RouterConfig(4, top_k=top_k))[1].load_balance_loss == pytest.approx(1)
    collapsed = jnp.tile(jnp.array([99.0, 0, 0, 0]), (16, 1))
    all_in_one = routed(collapsed, RouterConfig(4, top_k=1))[1]
    assert all_in_one.load_balance_loss == pytest.approx(4) and all_in_one.z_loss == pytest.approx(99**2)


def test_the_share_in_the_balance_loss_is_a_constant_to_gradients():
    logits, config = jax.random.normal(jax.random.key(0), (16, 4)), RouterConfig(4, top_k=1)
    share = routed(logits, config)[1].expert_load / 16
    got = jax.jit(jax.grad(lambda logits: routed(logits, config)[1].load_balance_loss))(logits)
    want = jax.jit(jax.grad(lambda logits: 4 * jnp.sum(share * jax.nn.softmax(logits).mean(0))))(logits)
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_log_sum_exp_and_its_derivatives():
    """Of two orders; nothing reaches a row whose softmax is not finite."""
    logits = 30 * jax.random.normal(jax.random.key(0), (5, 7)).at[2, 3].set(-jnp.inf)
    bad = logits.at[1, 4].set(jnp.nan).at[3, 0].set(jnp.inf)
    total = lambda logits: jnp.sum(jnp.nan_to_num(sum(choose.log_sum_exp(logits)), posinf=0) ** 2)
    want_total = lambda logits: jnp.sum(jax.nn.logsumexp(logits[::2], -1) ** 2)
    moved = jax.random.normal(jax.random.key(1), logits.shape)
    for of in (lambda f: f, jax.grad, lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (moved,))[1]):
        got, want = of(total)(bad), of(want_total)(logits)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[1::2] if got.ndim else 0, 0)
        np.testing.assert_allclose(got[::2] if got.ndim else got, want[::2] if got.ndim else want, rtol=1e-5, atol=1e-4)


def test_float64_stays():
    with jax.enable_x64(True):
        routing, measured = routed(jnp.zeros((4, 4), jnp.float64), RouterConfig(4))
        assert routing.weight.dtype == jnp.float64
        assert {a.dtype for a in (routing.expert, routing.slot, measured.expert_load)} == {jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("mode", ["explicit", "auto", "manual"])
def test_sharded_tokens_route_alike_and_locally(mode):
    config = RouterConfig(8, capacity_factor=0.7, group_size=4)
    logits = jax.random.normal(jax.random.key(0), (4, 32, 8)).at[1, 3, 2].set(jnp.nan)
    mask = jax.random.bernoulli(jax.random.key(1), 0.8, (4, 32))
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(axis_type,) * 2)

    def f(logits, mask):
        return route(logits, config, token_mask=mask)

    def loss(logits, mask):
        routing = f(logits, mask)
        return jnp.nansum(routing.weight**2) + metrics(routing, logits).load_balance_loss

    want, want_metrics = routed(logits, config, mask)
    want_grad = jax.jit(jax.grad(loss))(logits, mask)
    spec = P("data", "seq")
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (logits, mask)]
        if mode == "manual":
            f = jax.shard_map(f, in_specs=(spec, spec), out_specs=spec)
        compiled = jax.jit(f).lower(*args).compile()
        got = compiled(*args)
        got_metrics = jax.jit(metrics)(got, args[0])
        got_grad = jax.jit(jax.grad(loss))(*args) if mode != "manual" else None
    for name in ("expert", "slot", "active", "weight", "scores"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got_metrics, want_metrics)
    if got_grad is not None:
        np.testing.assert_allclose(got_grad, want_grad, atol=1e-6)
    text = compiled.as_text()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "scatter", " sort"):
        assert f"{word}(" not in text, word


@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (5, 3), (8, 8), (128, 8), (130, 2), (256, 4)])
def test_choosing_in_rounds_is_choosing_by_insertion(num_experts, k):
    """What GPUs do, with equal values, both zeros and infinities of either sign; even where there is nothing else."""
    rng = np.random.default_rng(0)
    values = rng.integers(-2, 3, (2, 64, num_experts)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = -np.inf
    values[rng.random(values.shape) < 0.05] = np.inf
    values[rng.random(values.shape) < 0.1] = -0.0
    values[0, :2] = [[-np.inf], [np.inf]]
    found = jax.jit(choose._in_rounds, static_argnums=1)(values, k)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, choose.top_k(jnp.asarray(values), k))
    np.testing.assert_array_equal(found, np.argsort(-values, -1, stable=True)[..., :k])


def test_choosing_has_no_derivative():
    values = jax.random.normal(jax.random.key(0), (4, 8))
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(choose.is_chosen(x, choose.top_k(x, 2)), x, 0)))(values)
    np.testing.assert_array_equal(gradient, choose.is_chosen(values, lax.top_k(values, 2)[1]))


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (128, 8)])
def test_on_a_gpu_a_choice_is_a_kernel(num_experts, k):
    """And one puts them together; an insertion is a loop there, of E / 2 steps of two."""
    try:
        sharding = SingleDeviceSharding(ringmoe.target("h200").devices()[0])
    except ImportError as error:
        pytest.skip(f"no compiler for h200: {error}")
    logits = jax.ShapeDtypeStruct((1024, num_experts), jnp.float32, sharding=sharding)
    text = jax.jit(lambda x: choose.top_k(x, k)).lower(logits).compile().as_text() or ""
    entry = text[text.index("\nENTRY") :]
    assert len(re.findall(r" (?:fusion|while|custom-call|sort)\(", entry)) == entry.count(" fusion(") <= k + 1


@pytest.mark.parametrize("choice", [choose.top_k, choose._in_rounds])
@pytest.mark.parametrize("mode", ["explicit", "auto", "manual", "partly manual"])
def test_the_chosen_numbers_are_where_their_tokens_are(mode, choice):
    """Of many experts, under vmap, with gradients of two orders; nobody sends or scatters anything."""
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    k, mesh = 3, jax.make_mesh((2, 4), ("data", "seq"), axis_types=(axis_type,) * 2)
    values, scale = jax.random.normal(jax.random.key(0), (2, 4, 32, 128)), jnp.arange(3.0).reshape(1, 1, 3)

    def found(values):
        expert = jax.vmap(lambda x: choice(x, k))(lax.stop_gradient(values))
        one = lambda values: jax.vmap(choose.at_experts)(values, expert)
        gradient = lambda values: jax.grad(lambda v: jnp.sum(scale * one(v) ** 3))(values)
        return expert, one(values), gradient(values), jax.jvp(gradient, (values,), (values,))[1]

    largest, expert = lax.top_k(values, k)
    hot = scale[..., None] * jax.nn.one_hot(expert, 128)
    want = (
        expert,
        largest,
        jnp.sum(3 * largest[..., None] ** 2 * hot, -2),
        jnp.sum(6 * largest[..., None] ** 2 * hot, -2),
    )
    spec = P(None, "data", "seq")
    with jax.set_mesh(mesh):
        if "manual" in mode:
            inside = P(None, "data") if "partly" in mode else spec
            found = jax.shard_map(
                found, in_specs=inside, out_specs=inside, axis_names=set(mesh.axis_names[: len(inside) - 1])
            )
        compiled = jax.jit(found).lower(jax.device_put(values, NamedSharding(mesh, spec))).compile()
        got = compiled(jax.device_put(values, NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(got[0], want[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[1:], want[1:])
    assert not re.search(r" (all-\w+|collective-permute|scatter)\(", compiled.as_text())


def test_a_cpu_alone_gathers_the_chosen_numbers():
    traced = jax.jit(choose.at_experts).trace(jnp.zeros((4, 8)), jnp.zeros((4, 2), jnp.int32))
    gathers = {p: "gather" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert gathers == {"cpu": True, "tpu": False, "cuda": False}


def test_capacity_formula():
    assert RouterConfig(8).capacity(256) == 80
    assert RouterConfig(10, top_k=1, capacity_factor=1.1).capacity(100) == 11  # 11.000000000000002 in floating point
    assert RouterConfig(8, capacity_factor=0.01).capacity(4) == 1
    assert RouterConfig(8, capacity_factor=100.0).capacity(16) == 16
    assert RouterConfig(8, capacity_factor=None).capacity(16) == 16


def test_rounding_and_minimum():
    asked = dict(num_experts=8, top_k=1, capacity_factor=1.0)
    for rounding, slots in (("ceil", 2), ("floor", 1), ("nearest", 2)):
        assert RouterConfig(**asked, rounding=rounding).capacity(12) == slots
    assert RouterConfig(**asked, rounding="nearest").capacity(11) == 1
    assert RouterConfig(**asked, min_capacity=4).capacity(12) == 4
    assert RouterConfig(**asked, min_capacity=40).capacity(12) == 12
    assert RouterConfig(8, capacity_factor=1e-9).capacity(12) == 1


def test_who_competes():
    for num_tokens, default in (
        (100, 100),
        (4096, 4096),
        (8192, 4096),
        (10_000, 2500),
        (4099, 4099),
        (10_000_000, 4000),
    ):
        assert RouterConfig(4).group(3, num_tokens) == default
        assert RouterConfig(4, scope="sequence").group(3, num_tokens) == num_tokens
    assert RouterConfig(4, group_size=20).group(3, 100) == 20
    assert RouterConfig(4, scope="global").group(3, 100) == 300


def test_no_tokens():
    logits = jnp.zeros((2, 0, 4))
    routing = route(logits, RouterConfig(4))
    assert routing.slot.shape == (2, 0, 2) and metrics(routing, logits).drop_fraction == 0


BAD_FIELDS = [
    (dict(num_experts=0), "num_experts=0"),
    (dict(num_experts=4, top_k=5), "top_k=5 with num_experts=4"),
    (dict(num_experts=4, top_k=0), "top_k=0"),
    (dict(num_experts=4, capacity_factor=0.0), "capacity_factor=0.0"),
    (dict(num_experts=4, capacity_factor=-1.0), "capacity_factor=-1.0"),
    (dict(num_experts=4, capacity_factor=math.nan), "capacity_factor=nan"),
    (dict(num_experts=4, capacity_factor=math.inf), "capacity_factor=inf"),
    (dict(num_experts=4, group_size=0), "group_size=0"),
    (dict(num_experts=4, group_size=4, scope="global"), "group_size=4 with scope='global'"),
    (dict(num_experts=4, min_capacity=0), "min_capacity=0"),
    (dict(num_experts=4, priority="first"), "priority='first', expected one of"),
    (dict(num_experts=4, renormalize="later"), "renormalize='later', expected one of"),
    (dict(num_experts=4, noise_scale=0.1), "noise_scale=0.1 with noise=None"),
    (dict(num_experts=4, noise="gaussian", noise_scale=-1.0), "noise_scale=-1.0"),
    (dict(num_experts=4, sinkhorn_iterations=0), "sinkhorn_iterations=0"),
    (dict(num_experts=8, expert_groups=3), "expert_groups=3 with num_experts=8"),
    (dict(num_experts=8, expert_groups=4, top_groups=1, top_k=3), "top_groups=1 of 4 groups of 2 experts"),
    (dict(num_experts=8, expert_groups=4, top_groups=2, group_top=3), "group_top=3 with groups of 2 experts"),
    (dict(num_experts=8, score="sigmoid", select_first=True), "select_first=True with score='sigmoid'"),
    (dict(num_experts=8, scale_input=True), "scale_input=True with top_k=2"),
    (dict(num_experts=8, method="expert_choice", select_first=True), "an expert chooses among all tokens"),
    (dict(num_experts=8, method="expert_choice", capacity_factor=None), "capacity_factor=None with method="),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_config_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**fields)


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (jnp.zeros((8, 4), jnp.int32), None, "int32, expected a floating dtype"),
        (jnp.zeros((8, 5)), None, r"\(8, 5\) with num_experts=4"),
        (jnp.zeros(4), None, r"\(4,\) with num_experts=4"),
        (jnp.zeros((6, 4)), None, "6 tokens along the sequence with group_size=4"),
        (jnp.zeros((8, 4)), jnp.ones((8,)), r"float32\(8,\), expected bool\(8,\)"),
        (jnp.zeros((2, 8, 4)), jnp.ones((8,), bool), r"bool\(8,\), expected bool\(2, 8\)"),
    ],
)
def test_route_checks_its_input(logits, mask, message):
    with pytest.raises(ValueError, match=message):
        route(logits, RouterConfig(4, group_size=4), token_mask=mask)
