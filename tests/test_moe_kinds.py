"""Kinds of experts: activations, biases, the shared expert; against the dense oracle and known blocks written plainly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.ffn import ACTIVATIONS, NEED_A_GATE
from tests.helpers import ONE_DEVICE, RINGMOE_JIT, SHARDED_DOORS, TYPES, assert_close, make_mesh, put
from tests.test_moe_doors import SHARED, Case, check

EVERY_ARRAY = " ".join(SHARED)
KINDS = {
    "gpt-oss": Case(activation="clamped_silu", biases=True, capacity_factor=0.5),
    "a shared expert": Case(mesh=(2, 4), roles=("batch", "sequence experts"), shared=EVERY_ARRAY, token_mask=True),
    "hidden": Case(
        mesh=(2, 2, 2), roles=("sequence experts", "hidden", "hidden"), biases=True, shared=EVERY_ARRAY,
        capacity_factor=0.5,
    ),
    "experts and hidden elsewhere": Case(
        mesh=(2, 2, 2), roles=("sequence", "experts", "hidden"), gate=False, activation="relu2", biases=True,
        shared="w_in w_out", capacity_factor=0.5,
    ),
    "model dim": Case(mesh=(2, 4), roles=("sequence experts", "model"), biases=True, shared=EVERY_ARRAY, token_mask=True),
}  # fmt: skip
PLACED = [
    (kind, door)
    for kind, case in KINDS.items()
    for door in SHARDED_DOORS
    if door.check_vma is None or not {"hidden", "model", "experts"} & {*case.roles}
]


@pytest.mark.parametrize(("kind", "door"), PLACED, ids=str)
def test_every_kind_through_every_door(kind, door):
    check(dataclasses.replace(KINDS[kind], door=door))


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gate):
    if gate or activation not in NEED_A_GATE:
        kind = {"activation": activation, "gate": gate, "biases": True, "shared": "w_in w_out" + " w_gate" * gate}
        check(Case(ONE_DEVICE, (), (), **kind, groups=4, experts=3, capacity_factor=0.5, dtype="float64"))


B, T, D, F, E, K = 2, 8, 6, 10, 4, 2
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
X, ROUTER = draw(B, T, D), draw(D, E)
CONFIG = ringmoe.RouterConfig(E, top_k=K, capacity_factor=0.75, group_size=4)
DROPLESS = ringmoe.RouterConfig(E, top_k=K, capacity_factor=None)
sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def test_gpt_oss_block():
    """Softmax over the chosen logits, interleaved gate and up, both clamped, biases everywhere; of sizes that are clamped."""
    mlp1, mlp1_bias, mlp2, mlp2_bias = 4 * draw(E, 2 * F, D), 3 * draw(E, 2 * F), draw(E, D, F), draw(E, D)
    want, clamped = np.zeros_like(X), 0
    for index in np.ndindex(B, T):
        logits = X[index] @ ROUTER
        chosen = np.argsort(-logits)[:K]
        for e, weight in zip(chosen, softmax(logits[chosen])):
            both = mlp1[e] @ X[index] + mlp1_bias[e]
            glu, linear = np.minimum(both[::2], 7), np.clip(both[1::2], -7, 7)
            clamped += (glu == 7).sum() * (linear == 7).sum() * (linear == -7).sum()
            want[index] += weight * (mlp2[e] @ (glu * sigmoid(1.702 * glu) * (linear + 1)) + mlp2_bias[e])
    assert clamped > 0
    transposed = lambda w: np.swapaxes(w, 1, 2)
    got, _ = ringmoe.moe_ffn(
        X,
        ROUTER,
        transposed(mlp1[:, 1::2]),
        transposed(mlp2),
        w_gate=transposed(mlp1[:, ::2]),
        b_in=mlp1_bias[:, 1::2],
        b_gate=mlp1_bias[:, ::2],
        b_out=mlp2_bias,
        activation="clamped_silu",
        config=DROPLESS,
    )
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("routed", [False, True], ids=["DeepSeek", "Qwen2"])
def test_block_with_shared_experts(routed):
    """Experts' scores not renormalised; DeepSeek adds two shared experts, Qwen2 one times a sigmoid."""
    w_in, w_gate, w_out, shared_in, shared_gate = draw(E, D, F), draw(E, D, F), draw(E, F, D), draw(D, 6), draw(D, 6)
    shared_out, gate = draw(6, D), draw(D)
    want = np.zeros_like(X)
    for index in np.ndindex(B, T):
        x = X[index]
        scores = softmax(x @ ROUTER)
        for e in np.argsort(-scores)[:K]:
            want[index] += scores[e] * (silu(x @ w_gate[e]) * (x @ w_in[e])) @ w_out[e]
        if routed:
            want[index] += sigmoid(x @ gate) * ((silu(x @ shared_gate) * (x @ shared_in)) @ shared_out)
        else:
            for half in (slice(0, 3), slice(3, 6)):
                hidden = silu(x @ shared_gate[:, half]) * (x @ shared_in[:, half])
                want[index] += hidden @ shared_out[half]
    shared = ringmoe.SharedExpert(shared_in, shared_out, shared_gate, gate if routed else None)
    config = dataclasses.replace(DROPLESS, renormalize=False)
    got, _ = ringmoe.moe_ffn(X, ROUTER, w_in, w_out, w_gate=w_gate, shared=shared, config=config)
    assert_close(got, want, 1e-5)


BIASED = {
    "router_weight": ROUTER,
    "w_in": draw(E, D, F),
    "w_out": draw(E, F, D),
    "b_in": draw(E, F),
    "b_out": draw(E, D),
}


def gradients(x, config, token_mask=None):
    """Of the sum of y in all arrays of a layer with biases and a shared expert; and y."""
    rng = np.random.default_rng(1)
    shared = ringmoe.SharedExpert(
        *(rng.normal(size=shape).astype(np.float32) for shape in ((D, F), (F, D))), router=X[0, 0]
    )

    def layer(arrays, shared):
        y, _ = ringmoe.moe_ffn(**arrays, shared=shared, config=config, token_mask=token_mask)
        return jnp.sum(y), y

    return jax.grad(layer, argnums=(0, 1), has_aux=True)({"x": x} | BIASED, shared)


def test_only_filled_slots_count_in_a_biass_gradient():
    """The gradient of b_out is the sum of the weights of the choices that have a slot: no empty one, none that was dropped."""
    (grads, _), _ = gradients(X, CONFIG)
    routing = ringmoe.route(jnp.asarray(X @ ROUTER), CONFIG)
    kept = np.asarray(routing.slot) >= 0
    slots = E * routing.capacity * B * T // 4
    assert kept.sum() < min(kept.size, slots), "nothing is dropped or no slot is empty: the test would show nothing"
    want = [np.sum(np.asarray(routing.weight)[kept & (np.asarray(routing.expert) == e)]) for e in range(E)]
    assert_close(grads["b_out"], np.repeat(want, D).reshape(E, D), 1e-5)


def test_a_masked_token_is_nowhere():
    """Whatever it holds: zeros in y, and the gradients are those of the batch without it."""
    mask = np.arange(T) < T // 2
    (grads, shared), y = gradients(np.where(mask[:, None], X, np.nan), DROPLESS, np.broadcast_to(mask, (B, T)))
    (want, want_shared), want_y = gradients(X[:, mask], DROPLESS)
    for got, expected in ((y, want_y), (grads.pop("x"), want.pop("x"))):
        assert (np.asarray(got)[:, ~mask] == 0).all()
        assert_close(got[:, mask], expected, 1e-5)
    jax.tree.map(lambda g, w: assert_close(g, w, 1e-5), (grads, shared), (want, want_shared))


@pytest.mark.parametrize("door", [ONE_DEVICE, TYPES, RINGMOE_JIT], ids=str)
def test_biases_under_vmap(door):
    """One bias is mapped and nothing else is; forward and gradient against one call per slice."""
    mesh = None if door is ONE_DEVICE else make_mesh((2, 2), door.axis_type)
    specs = {"router_weight": P(), "w_in": P("b"), "w_out": P("b"), "b_in": P("b")}
    fixed = put(mesh, {name: BIASED[name] for name in specs} | {"x": X}, specs | {"x": P("a", "b")})
    (b_outs,) = put(mesh, (draw(3, E, D),), (P(None, "b"),))
    one = lambda fixed, b_out: ringmoe.moe_ffn(**fixed, b_out=b_out, config=CONFIG)[0]
    square = lambda run: door.jit(jax.grad(lambda fixed, b_outs: jnp.sum(run(fixed, b_outs) ** 2), (0, 1)))
    got = square(jax.vmap(one, (None, 0)))(fixed, b_outs)
    want = square(lambda fixed, b_outs: jnp.stack([one(fixed, b_outs[i]) for i in range(3)]))(fixed, b_outs)
    jax.tree.map(lambda g, w: assert_close(g, w, 1e-4), got, want)
