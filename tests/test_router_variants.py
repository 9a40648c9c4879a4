"""Every kind of router against its formula in float64 numpy, written as its paper or its released code has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, logsumexp, softmax
from scipy.stats import norm

import ringmoe
from ringmoe.router import RouterConfig, hash_experts, metrics, route, update_selection_bias

T, E = 24, 16
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, T, E)).astype(np.float32)
BIAS, SCALE = RNG.normal(size=E).astype(np.float32), RNG.uniform(0.5, 2, size=E).astype(np.float32)


def largest(values, k):
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


def pick(values, expert):
    return np.take_along_axis(np.broadcast_to(values, (*expert.shape[:-1], E)), expert, -1)


def over_sum(w):
    return w / w.sum(-1, keepdims=True)


def mixtral(x):
    expert = largest(x, 2)
    return expert, softmax(pick(x, expert), -1)


def qwen3(x):
    expert = largest(x, 8)
    return expert, over_sum(pick(softmax(x, -1), expert))


def olmoe(x):
    expert = largest(x, 8)
    return expert, pick(softmax(x, -1), expert)


def deepseek_v2(x):
    scores = softmax(x, -1)
    best = largest(scores.reshape(2, T, 8, -1).max(-1), 3)
    inside = (np.arange(8) == best[..., None]).any(-2)
    scores = np.where(np.repeat(inside, E // 8, -1), scores, 0)
    expert = largest(scores, 6)
    return expert, 16 * pick(scores, expert)


def deepseek_v3(x, excluded=-np.inf):
    scores = expit(x)
    biased = scores + BIAS
    top_two = np.sort(biased.reshape(2, T, 8, -1), -1)[..., -2:].sum(-1)
    inside = (np.arange(8) == largest(top_two, 4)[..., None]).any(-2)
    expert = largest(np.where(np.repeat(inside, E // 8, -1), biased, excluded), 8)
    return expert, 2.5 * over_sum(pick(scores, expert))


def gpt_oss(x):
    expert = largest(x, 4)
    return expert, softmax(pick(x, expert), -1)


def llama4(x):
    expert = largest(x, 1)
    return expert, expit(pick(x, expert))


def switch(x):
    expert = largest(x, 1)
    return expert, pick(softmax(x, -1), expert)


def gemma4(x):
    expert = largest(x, 8)
    return expert, over_sum(pick(softmax(x, -1), expert)) * pick(SCALE, expert)


def sqrt_softplus(x):
    expert = largest(x, 8)
    return expert, over_sum(pick(np.sqrt(np.logaddexp(0, x)), expert))


V3 = RouterConfig.preset("deepseek_v3", num_experts=E)
PUBLISHED = {
    "mixtral": (mixtral, RouterConfig.preset("mixtral", num_experts=E), {}),
    "qwen3": (qwen3, RouterConfig.preset("qwen3", num_experts=E), {}),
    "olmoe": (olmoe, RouterConfig.preset("olmoe", num_experts=E), {}),
    "deepseek_v2": (deepseek_v2, RouterConfig.preset("deepseek_v2", num_experts=E), {}),
    "deepseek_v3": (deepseek_v3, V3, dict(selection_bias=BIAS)),
    "deepseek_v3, excluded by 0": (
        functools.partial(deepseek_v3, excluded=0.0),
        RouterConfig.preset("deepseek_v3", num_experts=E, excluded=0.0),
        dict(selection_bias=BIAS),
    ),
    "gpt_oss": (gpt_oss, RouterConfig.preset("gpt_oss", num_experts=E), {}),
    "llama4": (llama4, RouterConfig.preset("llama4"), {}),
    "switch": (switch, RouterConfig.preset("switch", num_experts=E, capacity_factor=None), {}),
    "gemma4": (gemma4, RouterConfig(E, 8, None), dict(expert_scale=SCALE)),
    "deepseek_v4": (sqrt_softplus, RouterConfig(E, 8, None, score="sqrt_softplus"), {}),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_router(name):
    """Choices exactly, weights, and the weights' gradient by finite differences in float64."""
    formula, config, arrays = PUBLISHED[name]
    expert, weight = formula(LOGITS.astype(np.float64))
    routing = jax.jit(lambda x: route(x, config, **arrays))(LOGITS)
    np.testing.assert_array_equal(routing.expert, expert)
    np.testing.assert_allclose(routing.weight, weight, rtol=2e-6)
    assert (routing.slot >= 0).all()

    direction, upstream = RNG.normal(size=LOGITS.shape), RNG.normal(size=weight.shape)
    of = lambda x: (formula(x)[1] * upstream).sum()
    step = 1e-6 * direction
    want = (of(LOGITS + step) - of(LOGITS - step)) / 2e-6
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(route(x, config, **arrays).weight * upstream)))(LOGITS)
    assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(want, rel=1e-4)


def test_renormalised_after_drops():
    config = RouterConfig(E, 2, 0.4, renormalize="after_drops")
    routing = route(LOGITS, config)
    kept = np.asarray(routing.slot) >= 0
    assert (kept.sum(-1) == 1).any() and (kept.sum(-1) == 0).any()
    raw = np.where(kept, pick(softmax(LOGITS.astype(np.float64), -1), np.asarray(routing.expert)), 0)
    total = raw.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.weight, raw / np.where(total == 0, 1, total), rtol=2e-6)


def test_bias_has_no_gradient_and_scale_has():
    def loss(bias, scale):
        return jnp.sum(route(LOGITS, V3, selection_bias=bias, expert_scale=scale).weight ** 2)

    of_bias, of_scale = jax.jit(jax.grad(loss, (0, 1)))(BIAS, SCALE)
    assert not of_bias.any() and of_scale.any()


def test_bias_moves_towards_balance():
    """Repeated, the rule brings a router that prefers some experts to a load that is nearly even."""
    logits = jnp.asarray(LOGITS + np.linspace(0, 2, E, dtype=np.float32))
    config = RouterConfig(E, 2, None, score="sigmoid")

    def step(bias, _):
        load = metrics(route(logits, config, selection_bias=bias), logits).expert_load
        return update_selection_bias(bias, load, 0.01), load

    _, loads = jax.lax.scan(step, jnp.zeros(E), None, 200)
    mean = 2 * 2 * T / E
    assert abs(np.asarray(loads[0]) - mean).max() > 1.2 * mean and abs(np.asarray(loads[-1]) - mean).max() <= 0.5 * mean
    np.testing.assert_allclose(update_selection_bias(jnp.zeros(3), jnp.array([1, 2, 3]), 0.1), [0.1, 0, -0.1])


NOISE = RNG.normal(size=LOGITS.shape).astype(np.float32)
DRAWN = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order():
    """Of a choice that changes within a step, finite differences say nothing: no test's numbers hang on those before it."""
    RNG.bit_generator.state = DRAWN


def noise_of(key):
    return np.asarray(jax.random.normal(jax.random.split(key)[0], LOGITS.shape))


def test_learned_noise():
    config, key = RouterConfig.preset("top2_noisy", num_experts=E), jax.random.key(5)
    run = lambda noise, train: route(LOGITS, config, noise_logits=noise, key=key, train=train)
    routing = run(NOISE, True)
    noisy = LOGITS + noise_of(key) * np.logaddexp(0, NOISE)
    np.testing.assert_array_equal(routing.expert, largest(noisy, 2))
    np.testing.assert_allclose(routing.weight, softmax(pick(noisy, largest(noisy, 2)), -1), rtol=1e-5)
    np.testing.assert_array_equal(run(NOISE, False).expert, largest(LOGITS, 2))

    upstream, direction = RNG.normal(size=routing.weight.shape), RNG.normal(size=NOISE.shape)
    gradient = jax.grad(lambda noise: jnp.sum(run(noise, True).weight * upstream))(NOISE)

    def of(noise):
        return (softmax(pick(LOGITS + noise_of(key) * np.logaddexp(0, noise), largest(noisy, 2)), -1) * upstream).sum()

    want = (of(NOISE + 1e-6 * direction) - of(NOISE - 1e-6 * direction)) / 2e-6
    assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(want, rel=1e-4)


def test_gaussian_noise():
    config, key = RouterConfig(E, noise="gaussian", noise_scale=0.5), jax.random.key(6)
    noisy = LOGITS + 0.5 * noise_of(key)
    np.testing.assert_array_equal(route(LOGITS, config, key=key, train=True).expert, largest(noisy, 2))


def test_jitter_is_on_the_routers_input():
    x = RNG.normal(size=(2, T, 8)).astype(np.float32)
    weights = [RNG.normal(size=shape).astype(np.float32) for shape in ((8, E), (E, 8, 4), (E, 4, 8))]
    config = RouterConfig(E, noise="jitter", noise_scale=0.3)
    run = functools.partial(ringmoe.moe_ffn, x, *weights, config=config)
    calm, shaken = run()[1], run(key=jax.random.key(0), train=True)[1]
    assert (calm.expert_load != shaken.expert_load).any()
    jax.tree.map(np.testing.assert_array_equal, run(key=jax.random.key(0))[1], calm)


def test_noise_weights_learn_through_the_layer():
    x = RNG.normal(size=(2, T, 8)).astype(np.float32)
    router_weight, w_in, w_out = [RNG.normal(size=s).astype(np.float32) for s in ((8, E), (E, 8, 4), (E, 4, 8))]
    config = RouterConfig.preset("top2_noisy", num_experts=E)

    def loss(noise_weight):
        y, _ = ringmoe.moe_ffn(
            x, router_weight, w_in, w_out, config=config, noise_weight=noise_weight, key=jax.random.key(0), train=True
        )
        return jnp.mean(y**2)

    start = jnp.zeros((8, E))
    direction = RNG.normal(size=(8, E)).astype(np.float32)
    got = float(jnp.sum(jax.jit(jax.grad(loss))(start) * direction))
    step = 1e-2 * direction
    assert got == pytest.approx(float(loss(start + step) - loss(start - step)) / 2e-2, rel=3e-2) and abs(got) > 1e-4


def test_expert_choice():
    """Each expert takes the tokens with the largest scores of its column, as many as it has slots."""
    config = RouterConfig(E, 2, 1.0, 12, method="expert_choice")
    mask = RNG.random((2, T)) < 0.8
    routing = route(LOGITS, config, token_mask=mask)
    assert routing.capacity == 2 and routing.expert.shape == (2, T, E)
    scores = np.where(mask[..., None], softmax(np.where(mask[..., None], LOGITS, 0), -1), -1).reshape(4, 12, E)
    slot = np.full((4, 12, E), -1)
    for g, e in np.ndindex(4, E):
        for place, t in enumerate(np.argsort(-scores[g, :, e], kind="stable")[:2]):
            slot[g, t, e] = place if scores[g, t, e] >= 0 else -1
    np.testing.assert_array_equal(routing.slot, slot.reshape(2, T, E))
    np.testing.assert_allclose(routing.weight, np.where(mask[..., None], softmax(LOGITS, -1), 0), rtol=1e-5)
    x = RNG.normal(size=(2, T, 4)).astype(np.float32)
    kept = np.where(np.asarray(routing.slot) >= 0, routing.weight, 0).sum(-1, keepdims=True)
    np.testing.assert_allclose(ringmoe.combine(ringmoe.dispatch(x, routing), routing), x * kept, rtol=1e-5, atol=1e-6)


def test_sinkhorn_balances():
    logits = LOGITS + np.linspace(0, 3, E, dtype=np.float32)
    config = RouterConfig(E, 1, None, method="sinkhorn", sinkhorn_iterations=50, renormalize=False)
    greedy, balanced = (metrics(route(logits, config, train=train), logits).expert_load for train in (False, True))
    assert balanced.max() < 0.6 * greedy.max()
    x = logits.astype(np.float64)  # the iteration, written out
    for _ in range(50):
        x = x - logsumexp(x, -2, keepdims=True) + np.log(T / E)
        x = log_softmax(x, -1)
    routing = route(logits, config, train=True)
    np.testing.assert_array_equal(routing.expert, largest(x, 1))
    np.testing.assert_allclose(routing.weight, pick(softmax(logits, -1), largest(x, 1)), rtol=1e-5)


def test_hash_and_replay():
    ids = jnp.arange(4000).reshape(4, 1000)
    expert = hash_experts(ids, 8, 3)
    assert expert.shape == (4, 1000, 3) and expert.min() >= 0 and expert.max() < 8
    assert all(len(set(row)) == 3 for row in np.asarray(expert).reshape(-1, 3).tolist())
    for j in range(3):
        assert abs(np.bincount(np.asarray(expert)[..., j].reshape(-1)) - 500).max() < 100
    assert (hash_experts(ids, 8, 3, seed=1) != expert).any()
    routing = route(LOGITS, RouterConfig(E, 2))
    logits = LOGITS + NOISE
    again = route(logits, RouterConfig(E, 2), expert=routing.expert)
    np.testing.assert_array_equal(again.expert, routing.expert)
    np.testing.assert_array_equal(again.slot, routing.slot)
    np.testing.assert_allclose(again.weight, softmax(pick(logits, np.asarray(routing.expert)), -1), rtol=1e-5)


def test_importance_and_load_losses():
    config, key = RouterConfig.preset("top2_noisy", num_experts=E), jax.random.key(5)
    routing = route(LOGITS, config, noise_logits=NOISE, key=key, train=True)
    got = metrics(routing, LOGITS, config, noise_logits=NOISE)
    sums = np.zeros(E)
    np.add.at(sums, np.asarray(routing.expert), np.asarray(routing.weight, np.float64))
    assert got.importance_loss == pytest.approx(sums.var() / sums.mean() ** 2, rel=1e-5)
    std = np.logaddexp(0, NOISE.astype(np.float64))
    noisy = LOGITS + noise_of(key) * std
    load = np.zeros(E)
    for b, t, e in np.ndindex(*LOGITS.shape):
        others = np.sort(np.delete(noisy[b, t], e))
        load[e] += norm.cdf((LOGITS[b, t, e] - others[-2]) / std[b, t, e])
    assert got.load_loss == pytest.approx(load.var() / load.mean() ** 2, rel=1e-4)
    gradient = jax.grad(lambda noise: metrics(route(LOGITS, config, noise_logits=noise, key=key, train=True), LOGITS,
                                              config, noise_logits=noise).load_loss)(NOISE)  # fmt: skip
    assert np.isfinite(gradient).all() and np.asarray(gradient).any()
    assert metrics(route(LOGITS, config), LOGITS, config).load_loss == 0


def test_balance_over_sequences_and_entropy():
    """Each sequence uses half of the experts: balanced together, unbalanced apart."""
    halves = np.zeros((2, E, E), np.float32)
    for t in range(E):
        for b in range(2):
            halves[b, t, b * E // 2 + t % (E // 2)] = 30
    got = metrics(route(halves, RouterConfig(E, 1)), halves)
    assert got.load_balance_loss == pytest.approx(1) and got.sequence_balance_loss == pytest.approx(2)
    assert got.entropy == pytest.approx(0, abs=1e-5) and got.unused_experts == 0
    even = np.zeros((2, E, E), np.float32)
    flat = metrics(route(even, RouterConfig(E, 1)), even)
    assert flat.entropy == pytest.approx(np.log(E), rel=1e-5) and flat.unused_experts == E - 1
    sigmoid = metrics(route(even, RouterConfig(E, 2, score="sigmoid")), even)
    assert sigmoid.load_balance_loss == pytest.approx(1)


KEYS = dict(key=jax.random.key(0), train=True)


BAD_ARRAYS = [
    (RouterConfig(E), dict(selection_bias=jnp.zeros(3)), r"selection_bias of shape \(3,\), expected \(16,\)"),
    (RouterConfig(E), dict(expert_scale=jnp.zeros(3)), r"expert_scale of shape \(3,\), expected \(16,\)"),
    (
        RouterConfig(E, select_first=True),
        dict(selection_bias=BIAS),
        "selection_bias with method='top_k', select_first",
    ),
    (RouterConfig(E, noise="learned"), KEYS, "noise='learned' in training without noise_logits"),
    (RouterConfig(E), dict(noise_logits=NOISE), r"noise_logits of shape \(2, 24, 16\) with noise=None"),
    (
        RouterConfig(E),
        dict(expert=jnp.zeros((2, T, 1), jnp.int32)),
        r"expert int32\(2, 24, 1\) .* int32\(2, 24, 2\)",
    ),
    (RouterConfig(E), dict(expert=jnp.zeros((2, T, 2))), r"expert float32\(2, 24, 2\)"),
    (RouterConfig(E, noise="gaussian"), dict(train=True), "key=None with noise='gaussian', train=True"),
    (RouterConfig(E, priority="random"), {}, "key=None with noise=None, train=False, priority='random'"),
]


@pytest.mark.parametrize(("config", "arrays", "message"), BAD_ARRAYS)
def test_arrays_that_do_not_fit(config, arrays, message):
    with pytest.raises(ValueError, match=message):
        route(LOGITS, config, **arrays)
