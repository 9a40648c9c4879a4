"""What a call means where jax.nn's own means something: scales, biases, dims, and the user's strictness about ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference
from tests.helpers import (
    ONE_DEVICE,
    PARTITIONER,
    RINGMOE_JIT,
    TYPES,
    assert_close,
    double,
    make_mesh,
    put,
)  # fmt: skip

B, T, N, K, H = 2, 8, 4, 2, 4
RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
QKV = draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, H)
SPECS = (P("a", "b"),) * 3
LOWEST = float(np.finfo(np.float32).min)


def loss(attend):
    return lambda *args: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(attend(*args)))


def value_and_gradients(attend, args, argnums):
    return jax.value_and_grad(loss(attend), argnums)(*args)


def in_double(attend, args, argnums):
    with jax.enable_x64(True):
        return jax.jit(lambda *args: value_and_gradients(attend, args, argnums))(*double(args))


def assert_all_close(got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, tolerance)


@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, ONE_DEVICE], ids=str)
def test_a_learned_temperature(door):
    """A traced scale, its gradient, and those of what it scales."""
    mesh = None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)
    args = (*QKV, np.float32(0.7))
    fun = lambda q, k, v, scale: ringmoe.dot_product_attention(q, k, v, scale=scale, is_causal=True)
    dense = lambda q, k, v, scale: reference.dot_product_attention(q, k, v, scale=scale, is_causal=True)[0]
    got = door.jit(lambda *args: value_and_gradients(fun, args, (0, 1, 2, 3)))(*put(mesh, args, (*SPECS, P())))
    assert_all_close(got, in_double(dense, args, (0, 1, 2, 3)), 1e-4)


def test_a_scale_that_is_an_array_but_known_is_a_number():
    q, k, v = QKV
    for scale in (jnp.float32(0.7), np.float64(0.7), np.array(0.7, np.float32)):
        got = ringmoe.dot_product_attention(q, k, v, scale=scale)
        assert_close(got, ringmoe.dot_product_attention(q, k, v, scale=0.7), 1e-6)


@pytest.mark.parametrize("low", [LOWEST, -1e30, -1e9, 3e38])
@pytest.mark.parametrize("implementation", ["xla"])
def test_a_finite_bias_is_a_number_however_low(low, implementation):
    """The same number everywhere changes nothing: softmax of what remains after rounding, forward and backward."""
    q, k, v = QKV
    bias = np.full((1, 1, 1, T), low, np.float32)
    fun = lambda q, k, v, bias: ringmoe.dot_product_attention(q, k, v, bias, implementation=implementation)
    got = value_and_gradients(fun, (q, k, v, bias), (0, 1, 2, 3))
    rounded = lambda q, k, v, bias: jax.nn.dot_product_attention(q, k, v, bias)
    assert_all_close(got, value_and_gradients(rounded, (q, k, v, bias), (0, 1, 2, 3)), 1e-5)
    uniform = np.repeat(v.mean(1, keepdims=True), N // K, 2)
    assert_close(fun(0 * q, k, v, bias), np.broadcast_to(uniform, q.shape), 1e-6)


@pytest.mark.parametrize("window", [2**31 - 1, (2**31 - 1, 0), (0, 2**31 - 1), (2**40, 2**40), (2**30, 3)])
def test_a_window_longer_than_any_sequence_is_open(window):
    left, right = (window, window) if isinstance(window, int) else window
    small = tuple(min(side, 100) for side in (left, right))
    fun = lambda window: lambda *args: ringmoe.dot_product_attention(*args, local_window_size=window)
    assert_all_close(
        value_and_gradients(fun(window), QKV, (0, 1, 2)), value_and_gradients(fun(small), QKV, (0, 1, 2)), 1e-6
    )


def test_debug_nans_finds_a_nan_and_does_not_run_for_ever():
    q, k, v = QKV
    with jax.debug_nans(True):
        assert np.isfinite(ringmoe.dot_product_attention(q, k, v)).all()
        with pytest.raises(FloatingPointError):
            jnp.sum(ringmoe.dot_product_attention(np.full_like(q, np.nan), k, v))
    with jax.debug_infs(True):
        seen = ringmoe.dot_product_attention(q, k, v, key_value_seq_lengths=np.array([0, T], np.int32))
    assert (np.asarray(seen)[0] == 0).all()


@pytest.mark.parametrize("low", [LOWEST, -1e9])
def test_a_low_bias_beside_an_ordinary_one_is_a_mask(low):
    q, k, v = QKV
    some = np.where(np.arange(T) < 3, 0, low).astype(np.float32)[None, None, None]
    got = value_and_gradients(lambda *args: ringmoe.dot_product_attention(*args), (q, k, v, some), (0, 1, 2))
    cut = lambda q, k, v: ringmoe.dot_product_attention(q, k[:, :3], v[:, :3])
    assert_all_close(got, value_and_gradients(cut, (q, k, v), (0, 1, 2)), 1e-5)


def test_minus_infinity_masks_and_gives_zeros():
    q, k, v = QKV
    out, lse = ringmoe.dot_product_attention(q, k, v, np.full((1, 1, 1, T), -np.inf, np.float32), return_residual=True)
    assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, ONE_DEVICE], ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3), (2, 1, 3)])
def test_any_number_of_batch_dims(door, batch):
    q, k, v = draw(*batch, T, N, H), draw(*batch, T, K, H), draw(*batch, T, K, H)
    bias, mask = draw(*batch[:1], *(1 for _ in batch[1:]), N, T, T), RNG.random((*batch, 1, T, T)) < 0.8
    mask |= np.eye(T, dtype=bool)
    lengths = np.full(batch, 6, np.int32) if batch else None
    segments = np.broadcast_to(np.arange(T) // 5, (*batch, T)).astype(np.int32)

    def fun(q, k, v, bias):
        return ringmoe.dot_product_attention(
            q, k, v, bias, mask, is_causal=True, key_value_seq_lengths=lengths, query_segment_ids=segments if batch else None,
            key_value_segment_ids=segments if batch else None, return_residual=True,
        )  # fmt: skip

    def dense(q, k, v, bias):
        flat = lambda x, rest: np.broadcast_to(x, (*batch, *rest)).reshape(-1, *rest) if isinstance(x, np.ndarray) else (
            jnp.broadcast_to(x, (*batch, *rest)).reshape(-1, *rest))  # fmt: skip
        out, lse = reference.dot_product_attention(
            flat(q, (T, N, H)), flat(k, (T, K, H)), flat(v, (T, K, H)), flat(bias, (N, T, T)), flat(mask, (1, T, T)),
            is_causal=True, key_value_seq_lengths=None if lengths is None else lengths.reshape(-1),
            query_segment_ids=flat(segments, (T,)) if batch else None,
            key_value_segment_ids=flat(segments, (T,)) if batch else None,
        )  # fmt: skip
        return out.reshape(q.shape), lse.reshape(q.shape[:-1])

    mesh = None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)
    spec = P("a", *(None for _ in batch[1:]), "b") if batch else P("b")
    args = (q, k, v, bias)
    got = door.jit(lambda *args: value_and_gradients(fun, args, (0, 1, 2, 3)))(
        *put(mesh, args, (spec, spec, spec, P()))
    )
    assert_all_close(got, in_double(dense, args, (0, 1, 2, 3)), 1e-4)


def scaled_rows(rows, scale):
    return rows * scale[:, None]


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, ONE_DEVICE], ids=str)
def test_ranks_are_never_promoted_in_silence(door):
    """With jax_numpy_rank_promotion="raise" every line of ours says what it broadcasts, or is out of the user's sight."""
    mesh = None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)
    config = ringmoe.RouterConfig(4, group_size=2)
    arrays = {
        "q": QKV[0], "k": QKV[1], "v": QKV[2], "bias": draw(1, N, 1, T), "mask": np.ones((1, 1, T, T), bool),
        "x": draw(B, T, H), "router": draw(H, 4), "w_in": draw(4, H, 6), "w_out": draw(4, 6, H), "w_gate": draw(4, H, 6),
        "b_in": draw(4, 6), "b_gate": draw(4, 6), "b_out": draw(4, H), "own": draw(4, H),
        "shared_in": draw(H, 6), "shared_out": draw(6, H), "shared_router": draw(H),
        "seen": np.arange(B * T).reshape(B, T) % 5 > 0, "lengths": np.full(B, 6, np.int32),
    }  # fmt: skip
    specs = {name: P("a", "b") if name in ("q", "k", "v", "x", "seen") else P() for name in arrays}

    def fun(arrays):
        a = arrays
        lengths = a["lengths"]
        out, _ = ringmoe.dot_product_attention(
            a["q"], a["k"], a["v"], a["bias"], a["mask"], is_causal=True, local_window_size=5, return_residual=True,
            query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        )  # fmt: skip
        y, metrics = ringmoe.moe_ffn(
            a["x"], a["router"], a["w_in"], a["w_out"], w_gate=a["w_gate"], config=config, token_mask=a["seen"],
            shared=ringmoe.SharedExpert(a["shared_in"], a["shared_out"], router=a["shared_router"]),
            **{name: a[name] for name in ("b_in", "b_gate", "b_out")},
        )  # fmt: skip
        scaled, _ = ringmoe.moe_ffn(a["x"], a["router"], expert_fn=scaled_rows, expert_weights=a["own"], config=config)
        routing = ringmoe.route(jnp.einsum("btd,de->bte", a["x"], a["router"]), config)
        back = ringmoe.combine(jnp.tanh(ringmoe.dispatch(a["x"], routing)), routing)
        return jnp.sum(out) + jnp.sum(y + scaled) + jnp.sum(back) + metrics.load_balance_loss + metrics.z_loss

    def both(floats, rest):
        value, grads = jax.value_and_grad(lambda floats: fun(floats | rest))(floats)
        curve = jax.jvp(jax.grad(lambda q: fun(floats | rest | {"q": q})), (floats["q"],), (floats["q"],))[1]
        return value, grads, curve

    arrays = put(mesh, arrays, specs)
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    with jax.numpy_rank_promotion("raise"):
        lowered = door.jit(both).lower(floats, rest)
        if door is PARTITIONER:  # asks for the program of one device when XLA compiles
            lowered.compile()
