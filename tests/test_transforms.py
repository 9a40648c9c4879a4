"""Both ops under JAX's transformations, sharded and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference
from tests.helpers import (
    EXPLICIT_RINGMOE_JIT,
    ONE_DEVICE,
    PARTITIONER,
    RINGMOE_JIT,
    TOLERANCE,
    TYPES,
    assert_close,
    make_mesh,
    put,
)  # fmt: skip

FORWARD, GRADIENT = TOLERANCE[jnp.dtype(jnp.float32)]
DOORS = (ONE_DEVICE, TYPES, PARTITIONER, RINGMOE_JIT)
every_door = pytest.mark.parametrize("door", DOORS, ids=str)

B, T, N, K, H, D, F, E = 2, 8, 4, 2, 4, 4, 6, 4
CONFIG = ringmoe.RouterConfig(E, top_k=2, capacity_factor=0.75, group_size=2)
SPEC = P("a", "b")


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def mesh_of(door):
    return None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)


def attend(q, k, v, **kwargs):
    return ringmoe.dot_product_attention(q, k, v, is_causal=True, **kwargs)


def dense(q, k, v, bias=None):
    """The oracle, in the dtype it is given."""
    return reference.dot_product_attention(q, k, v, bias, is_causal=True)[0]


def qkv():
    return normal(B, T, N, H, seed=1), normal(B, T, K, H, seed=2), normal(B, T, K, H, seed=3)


def layer(x, weights):
    return ringmoe.moe_ffn(x, *weights, config=CONFIG)[0]


def weights():
    return normal(D, E, seed=4), normal(E, D, F, seed=5), normal(E, F, D, seed=6)


WEIGHT_SPECS = (P(), P("b"), P("b"))


def same(got, want, tolerance=GRADIENT):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.sampled
@every_door
@pytest.mark.parametrize("mapped", ["all", "keys and values", "bias", "query"])
def test_attention_under_vmap(door, mapped):
    """vmap over one more leading dim, of some operands; forward and gradient against one call per slice."""
    mesh, num = mesh_of(door), 3
    shapes = {"query": (B, T, N, H), "key": (B, T, K, H), "value": (B, T, K, H), "bias": (1, N, T, T)}
    on = {"all": set(shapes), "keys and values": {"key", "value"}, "bias": {"bias"}, "query": {"query"}}[mapped]
    arrays = {name: normal(*(num,) * (name in on), *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    specs = {"query": SPEC, "key": SPEC, "value": SPEC, "bias": P(None, None, "b")}
    specs = {name: P(None, *spec) if name in on else spec for name, spec in specs.items()}
    axes = {name: 0 if name in on else None for name in shapes}
    cotangent = normal(num, B, T, N, H, seed=9)

    def loss(attention, arrays):
        out = jax.vmap(
            lambda arrays: attention(arrays["query"], arrays["key"], arrays["value"], bias=arrays["bias"]), (axes,)
        )(arrays)
        return jnp.sum(out * cotangent), out

    got = door.jit(jax.value_and_grad(functools.partial(loss, attend), has_aux=True))(put(mesh, arrays, specs))
    want = jax.jit(jax.value_and_grad(functools.partial(loss, dense), has_aux=True))(arrays)
    same(got[0][1], want[0][1], FORWARD)
    same(got[1], want[1])


@pytest.mark.sampled
@every_door
@pytest.mark.parametrize("mapped", ["tokens", "expert weights", "both"])
def test_experts_under_vmap(door, mapped):
    mesh, num = mesh_of(door), 2
    over_x, over_w = mapped != "expert weights", mapped != "tokens"
    x = normal(*(num,) * over_x, B, T, D)
    router, *experts = weights()
    experts = [np.stack([w, 0.5 * w]) if over_w else w for w in experts]
    specs = (P(None, *SPEC) if over_x else SPEC, P(), *(P(*(None,) * over_w, "b"),) * 2)
    cotangent = normal(num, B, T, D, seed=9)

    def loss(x, router, w_in, w_out):
        one = lambda x, w_in, w_out: layer(x, (router, w_in, w_out))
        out = jax.vmap(one, (0 if over_x else None, *(0 if over_w else None,) * 2))(x, w_in, w_out)
        return jnp.sum(out * cotangent), out

    gradient = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    got = door.jit(gradient)(*put(mesh, (x, router, *experts), specs))
    outs, grads = [], []
    for i in range(num):
        xi = x[i] if over_x else x
        wi = [w[i] if over_w else w for w in experts]
        y, pullback = jax.vjp(lambda x, *w: layer(x, w), jnp.asarray(xi), router, *wi)
        outs.append(y)
        grads.append(pullback(jnp.asarray(cotangent[i])))
    want = [[g[j] for g in grads] for j in range(4)]
    stacked = (over_x, False, over_w, over_w)
    want = [np.stack(gs) if stack else sum(gs) for gs, stack in zip(want, stacked)]
    same(got[0][1], np.stack(outs), FORWARD)
    same(got[1], want)


WRAPS = {
    "scan": lambda step: lambda x, ws: jax.lax.scan(lambda x, w: (step(x, w), None), x, ws)[0],
    "checkpointed scan": lambda step: WRAPS["scan"](jax.checkpoint(step)),
    "nested jit": lambda step: lambda x, ws: functools.reduce(jax.jit(step), ws, x),
    "cond": lambda step: lambda x, ws: functools.reduce(
        lambda x, w: jax.lax.cond(jnp.sum(x) > -1e9, step, lambda x, w: x, x, w), ws, x),
}  # fmt: skip


def model_step(x, w):
    """Attention over the sequence, then experts; w: [D, N * H] projections and an expert layer, all sharded."""
    q = jnp.einsum("btd,dnh->btnh", x, w["q"])
    x = x + jnp.einsum("btnh,dnh->btd", attend(q, q[:, :, ::2], q[:, :, ::2]), w["q"])
    return x + layer(x, (w["router"], w["w_in"], w["w_out"]))


def model_inputs(layers=2):
    router, w_in, w_out = weights()
    w = {"q": 0.3 * normal(D, N, H), "router": router, "w_in": w_in, "w_out": 0.3 * w_out}
    ws = {name: np.stack([x, 0.7 * x][:layers]) for name, x in w.items()}
    return normal(B, T, D, seed=7), ws


MODEL_SPECS = {"q": P(), "router": P(), "w_in": P(None, "b"), "w_out": P(None, "b")}


def unstacked(ws):
    return [{name: x[i] for name, x in ws.items()} for i in range(2)]


def gradient_of(wrap):
    def loss(x, ws):
        ws = ws if "scan" in wrap else unstacked(ws)
        out = WRAPS[wrap](model_step)(x, ws)
        return jnp.sum(out**2), out

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@functools.cache
def plain_model():
    """Layer after layer, eagerly on one device: each op alone is compared with the oracle elsewhere."""

    def loss(x, ws):
        out = functools.reduce(model_step, unstacked(ws), x)
        return jnp.sum(out**2), out

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(*model_inputs())


@pytest.mark.sampled
@every_door
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_model_under_control_flow(door, wrap):
    x, ws = model_inputs()
    mesh = mesh_of(door)
    got = door.jit(gradient_of(wrap))(
        *((x, ws) if mesh is None else (put(mesh, (x,), (SPEC,))[0], put(mesh, ws, MODEL_SPECS)))
    )
    want = plain_model()
    same(got[0], want[0], 10 * FORWARD)
    # A model's gradients are as large as its loss: the table's tolerance is relative to the largest of each.
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        scale = max(1, float(np.abs(w).max()))
        assert_close(np.asarray(g) / scale, np.asarray(w) / scale, GRADIENT)


@pytest.mark.parametrize("door", [RINGMOE_JIT, EXPLICIT_RINGMOE_JIT], ids=str)
def test_grad_of_ringmoe_jit(door):
    """Not how to write it, but right all the same."""
    arrays = qkv()
    loss = lambda attention, *xs: jnp.sum(attention(*xs) ** 2)
    jitted = ringmoe.jit(functools.partial(loss, attend))
    mesh = make_mesh((2, 4), door.axis_type)
    placed = put(mesh, arrays, (SPEC,) * 3)
    with jax.set_mesh(mesh):  # JAX wants it of any gradient taken eagerly with Explicit axes
        got = jax.grad(jitted, (0, 1, 2))(*placed)
    same(got, jax.grad(functools.partial(loss, dense), (0, 1, 2))(*arrays))


@pytest.mark.parametrize("sharded", [False, True])
def test_eager(sharded):
    arrays = qkv()
    want = dense(*arrays)
    placed = put(make_mesh((2, 4), TYPES.axis_type), arrays, (SPEC,) * 3) if sharded else arrays
    same(attend(*placed), want, FORWARD)
    x, w = normal(B, T, D), weights()
    want = layer(x, w)
    gradient = jax.grad(lambda x, w: jnp.sum(layer(x, w) ** 2), (0, 1))
    want_grads = jax.jit(gradient)(x, w)
    if sharded:
        mesh = make_mesh((2, 4), TYPES.axis_type)
        x, *w = put(mesh, (x, *w), (SPEC, *WEIGHT_SPECS))
        same(layer(x, w), want, FORWARD)
        with jax.set_mesh(mesh):
            grads = gradient(x, tuple(w))
    else:
        grads = gradient(x, w)
    same(grads, want_grads)


def test_eager_with_auto_axes():
    arrays = qkv()
    placed = put(make_mesh((2, 4), PARTITIONER.axis_type), arrays, (SPEC,) * 3)
    same(attend(*placed), dense(*arrays), FORWARD)


@every_door
def test_linearity_in_the_cotangent(door):
    """A vjp is linear: pulling back the sum of two cotangents gives the sum of what they pull back."""
    placed = put(mesh_of(door), qkv(), (SPEC,) * 3)
    both = normal(2, B, T, N, H, seed=8)

    def pull(cotangent, *arrays):
        out, pullback = jax.vjp(attend, *arrays)
        like = out * 0 + cotangent
        return pullback(like)

    fun = door.jit(pull)
    one, other, total = (fun(c, *placed) for c in (both[0], both[1], both[0] + both[1]))
    same(total, jax.tree.map(lambda a, b: np.asarray(a) + np.asarray(b), one, other))


def test_inside_a_set_mesh():
    mesh = make_mesh((2, 4), TYPES.axis_type)
    arrays = qkv()
    with jax.set_mesh(mesh):
        placed = tuple(jax.device_put(x, SPEC) for x in arrays)
        out = jax.jit(attend)(*placed)
        assert out.sharding.spec == P("a", "b", None, None)
    same(out, dense(*arrays), FORWARD)
