"""Kinds of experts: activations, biases, the shared expert; against the dense oracle and known blocks written plainly."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference_moe
from ringmoe.ffn import ACTIVATIONS, NEED_A_GATE
from tests.helpers import (
    MANUAL,
    MANUAL_VMA,
    ONE_DEVICE,
    PARTITIONER,
    RINGMOE_JIT,
    SHARDED_DOORS,
    TYPES,
    assert_close,
    double,
    make_mesh,
    put,
    tpu_mesh,
)  # fmt: skip
from tests.test_moe_doors import SHARED, Case, check

EVERY_ARRAY = " ".join(SHARED)
KINDS = {
    "gpt-oss": Case(activation="clamped_silu", biases=True, capacity_factor=0.5),
    "a shared expert": Case(mesh=(2, 4), roles=("batch", "sequence experts"), shared=EVERY_ARRAY, token_mask=True),
    "eight bits": Case(mesh=(2, 2, 2), roles=("sequence experts", "model", "hidden"), scaled=True, biases=True),
    "eight bits, sorted": Case(mesh=(2, 2), roles=("sequence experts", "batch"), scaled=True, capacity_factor=None, experts=8),
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


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "door"), PLACED, ids=str)
def test_every_kind_through_every_door(kind, door):
    check(dataclasses.replace(KINDS[kind], door=door))


@pytest.mark.sampled
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

    return jax.jit(jax.grad(layer, argnums=(0, 1), has_aux=True))({"x": x} | BIASED, shared)


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


@pytest.mark.sampled
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


OWN = {
    "first": draw(E, D, F),
    "norm": [draw(E, F), 1 + draw(E) ** 2],
    "steps": np.array([1, 2, 3, 1]),
}  # the last are integers


def own_experts(rows, weights):
    """Three matmuls, a norm, a residual, an array of integers: nothing `moe_ffn` has."""
    scale, shift = weights["norm"]
    hidden = jnp.tanh(jnp.einsum("erd,edf->erf", rows, weights["first"]))
    hidden = hidden * scale[:, None] / jnp.sqrt(1 + jnp.mean(hidden**2, -1, keepdims=True))
    back = jnp.einsum("erf,edf->erd", hidden * weights["steps"][:, None, None], weights["first"])
    return rows + back * shift[:, None, None]


def own_layer(arrays, axis_name=None):
    y, _ = ringmoe.moe_ffn(
        arrays["x"], ROUTER, expert_fn=own_experts, expert_weights=arrays["own"], config=CONFIG, axis_name=axis_name
    )
    return y


def dense_own_layer(arrays):
    chosen = reference_moe.select(X @ ROUTER, top_k=K, capacity=CONFIG.capacity(4), group_size=4)
    weight = reference_moe.weights(arrays["x"] @ ROUTER, chosen, renormalize=True) * (chosen.slot >= 0)
    every = jnp.broadcast_to(arrays["x"].reshape(1, -1, D), (E, B * T, D))
    out = own_experts(every, arrays["own"]).reshape(E, B, T, D)
    return jnp.einsum("btk,btke,ebtd->btd", weight, jax.nn.one_hot(chosen.expert, E, dtype=weight.dtype), out)


def split(arrays):
    """The arrays that have a gradient, and a function that puts the integers back."""
    own = dict(arrays["own"])
    steps = own.pop("steps")
    return {"x": arrays["x"], "own": own}, lambda a: {"x": a["x"], "own": a["own"] | {"steps": steps}}


def slopes(layer, order, arrays):
    floats, whole = split(arrays)
    loss = lambda a: jnp.sum(jnp.sin(layer(whole(a))))
    first = jax.grad(loss)
    again = jax.grad(lambda a: sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(first(a))))
    return layer(arrays), (first if order == 1 else again)(floats)


@functools.cache
def own_oracle(order):
    with jax.enable_x64(True):
        compiled = jax.jit(functools.partial(slopes, dense_own_layer, order))
        return jax.tree.map(np.asarray, compiled(double({"x": X, "own": OWN})))


OWN_LAYOUTS = {"tokens and experts": (P("a", "b"), P("b")), "experts elsewhere": (P("a"), P("b"))}
OWN_PLACED = [
    (ONE_DEVICE, "tokens and experts", 2), (MANUAL, "tokens and experts", 1), (MANUAL_VMA, "tokens and experts", 1),
    *((door, place, order) for door in (TYPES, PARTITIONER, RINGMOE_JIT) for place in OWN_LAYOUTS for order in (1, 2)),
]  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize(("door", "place", "order"), OWN_PLACED, ids=str)
def test_own_experts(door, place, order):
    tokens, experts = OWN_LAYOUTS[place]
    arrays, fun = {"x": X, "own": OWN}, own_layer
    specs = {"x": tokens, "own": jax.tree.map(lambda _: experts, OWN)}
    if place == "experts elsewhere":  # sharded along a dim of its own, too: gathered
        specs["own"]["first"] = P("b", None, "a")
    mesh = None if door is ONE_DEVICE else make_mesh((2, 2), door.axis_type)
    if mesh is not None:
        arrays = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, specs)
    if door.check_vma is not None:
        local = functools.partial(own_layer, axis_name="b")
        fun = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=tokens, check_vma=door.check_vma)
    y, grads = door.jit(functools.partial(slopes, fun, order))(arrays)
    want_y, want = own_oracle(order)
    assert_close(y, want_y, 1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        scale = np.abs(expected).max()
        assert_close(np.asarray(got) / scale, expected / scale, 1e-4)


def test_weights_of_eight_bits_are_gathered_in_eight_bits():
    """On a v6e, by its compiler: weights sharded along D are gathered before they are widened."""
    mesh = tpu_mesh("v6e:2x4", (2, 4), RINGMOE_JIT.axis_type)
    case = Case(RINGMOE_JIT, (2, 4), ("model", "sequence experts"), scaled=True, d=128, f=256, groups=4, group_size=32)
    arrays = {name: x for name, x in case.arrays()[0].items() if x is not None}
    shaped = lambda name, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, case.specs[name]))
    layer = ringmoe.jit(lambda arrays: ringmoe.moe_ffn(**arrays, config=case.config)[0])
    text = layer.lower({name: shaped(name, x) for name, x in arrays.items()}).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[[\d,]+\]\S* (?:\S+ )?all-gather(?:-start)?\(", text)
    assert gathered.count("f8e4m3fn") == 3, gathered


def test_weights_of_eight_bits_are_a_kind_of_own_experts():
    """The same by the caller's own function."""
    w_in, w_out = (BIASED[name].astype(jnp.float8_e4m3fn) for name in ("w_in", "w_out"))
    scales = 1 + draw(2, E) ** 2

    def quantised(rows, weights):
        (w_in, in_scale), (w_out, out_scale) = ((w.astype(rows.dtype), s[:, None, None]) for w, s in weights)
        return (
            jnp.einsum("erf,efd->erd", jax.nn.gelu(jnp.einsum("erd,edf->erf", rows, w_in) * in_scale), w_out)
            * out_scale
        )

    mesh = make_mesh((2, 2), RINGMOE_JIT.axis_type)
    arrays = (
        *put(mesh, (X,), (P("a", "b"),)),
        tuple(put(mesh, (w, s), (P("b"),) * 2) for w, s in zip((w_in, w_out), scales)),
    )
    layer = lambda x, own: ringmoe.moe_ffn(x, ROUTER, expert_fn=quantised, expert_weights=own, config=CONFIG)[0]
    wide = (w.astype(jnp.float32) * s[:, None, None] for w, s in zip((w_in, w_out), scales))
    assert_close(ringmoe.jit(layer)(*arrays), ringmoe.moe_ffn(X, ROUTER, *wide, config=CONFIG)[0], 1e-4)


@pytest.mark.parametrize("door", [ONE_DEVICE, RINGMOE_JIT], ids=str)
def test_own_experts_under_vmap(door):
    """Over the experts' arrays alone."""
    mesh = None if door is ONE_DEVICE else make_mesh((2, 2), door.axis_type)
    (x,), (scales,) = put(mesh, (X,), (P("a", "b"),)), put(mesh, (draw(3, E, D),), (P(None, "b"),))
    scaled = lambda rows, scale: rows * scale[:, None]
    one = lambda x, scale: ringmoe.moe_ffn(x, ROUTER, expert_fn=scaled, expert_weights=scale, config=CONFIG)[0]
    square = lambda run: door.jit(jax.grad(lambda x, scales: jnp.sum(run(x, scales) ** 2), (0, 1)))
    got = square(jax.vmap(one, (None, 0)))(x, scales)
    want = square(lambda x, scales: jnp.stack([one(x, scales[i]) for i in range(3)]))(x, scales)
    jax.tree.map(lambda g, w: assert_close(g, w, 1e-4), got, want)
