"""Attention to a sharded cache, and its update, against attention to the whole sequence in float64."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference
from tests.helpers import (
    FOUND,
    ONE_DEVICE,
    RINGMOE_JIT,
    TOLERANCE,
    TYPES,
    WITHOUT_SHRINKING,
    assert_close,
    collectives,
    double,
    make_mesh,
    put,
    value_and_gradients,
)

SPECS = {"query": P("a"), "key_cache": P("a", "b"), "value_cache": P("a", "b"), "lengths": P("a")}


def arrays(t=1, s=32, lengths=(32, 7), seed=0, k=2, n=4, h=4):
    rng = np.random.default_rng(seed)
    b = len(lengths)
    shapes = {"query": (b, t, n, h), "key_cache": (b, s, k, h), "value_cache": (b, s, k, h)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"lengths": np.asarray(lengths, np.int32)}


def dense(query, key_cache, value_cache, lengths, local_window_size=None):
    """Each token by itself: a query at place p of its own sequence sees the keys up to p."""
    t, s = query.shape[1], key_cache.shape[1]
    place = lengths[:, None] - t + np.arange(t)
    keys = np.arange(s)
    seen = keys <= place[..., None]
    if local_window_size is not None:
        seen &= keys >= place[..., None] - local_window_size
    return reference.dot_product_attention(query, key_cache, value_cache, mask=seen[:, None])


def check(door, mesh, specs=SPECS, window=None, exchange="auto", **given_):
    made = arrays(**given_)
    fun = functools.partial(ringmoe.decode_attention, return_residual=True, local_window_size=window, exchange=exchange)
    rng = np.random.default_rng(1)
    cotangents = rng.normal(size=made["query"].shape).astype(np.float32)
    loss = lambda out, cotangents: jnp.sum(out[0] * cotangents)
    wanted = ("query", "key_cache", "value_cache")
    grid = None if door is ONE_DEVICE else make_mesh(mesh, door.axis_type)
    (out, lse), grads = value_and_gradients(fun, loss, wanted, door, grid, made, specs, cotangents)
    with jax.enable_x64(True):
        oracle = functools.partial(dense, local_window_size=window)
        (want, want_lse), want_grads = value_and_gradients(
            oracle, loss, wanted, ONE_DEVICE, None, double(made), {}, double(cotangents)
        )
    forward, gradient = TOLERANCE[jnp.dtype(jnp.float32)]
    assert_close(out, want, forward)
    assert_close(lse, want_lse, forward)
    for name in wanted:
        assert_close(grads[name], want_grads[name], gradient, name)


@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT], ids=str)
def test_a_cache_in_float8_stays_where_it_is(door):
    """Written with its scales, one for each token and head; little travels, and the cache is never widened whole."""
    mesh, rng = make_mesh((8,), door.axis_type), np.random.default_rng(0)
    b, s, k, h, lengths = 1, 16384, 2, 16, np.asarray([12001], np.int32)
    made = {name: rng.normal(size=(b, s, k, h)).astype(jnp.float8_e4m3fn) for name in ("key", "value")}
    scales = {name: rng.uniform(0.5, 2, (b, s, k)).astype(np.float32) for name in made}
    query, new = (rng.normal(size=(b, 1, n, h)).astype(np.float32) for n in (4, 2))

    def step(query, new, caches, scales, lengths):
        write = lambda cache, new: ringmoe.update_cache(cache, new, lengths - 1)
        ones = jnp.full((b, 1, k, 1), 2.0)
        caches = {name: write(x, (new / 2).astype(x.dtype)) for name, x in caches.items()}
        scales = {f"{name}_scales": write(x[..., None], ones)[..., 0] for name, x in scales.items()}
        return ringmoe.decode_attention(query, caches["key"], caches["value"], lengths, **scales)

    spec = P(None, "a")
    sharded = [put(mesh, x, dict.fromkeys(x, spec)) for x in (made, scales)]
    whole = put(mesh, {"query": query, "new": new, "lengths": lengths}, dict.fromkeys(("query", "new", "lengths"), P()))
    jitted = door.jit(step)
    got = jitted(whole["query"], whole["new"], *sharded, whole["lengths"])
    for name, x in made.items():
        x[:, 12000:12001], scales[name][:, 12000] = (new / 2).astype(x.dtype), 2
    with jax.enable_x64(True):
        key, value = (double(made[name]) * double(scales[name])[..., None] for name in made)
        want, _ = dense(double(query), key, value, lengths)
    assert_close(got, want, TOLERANCE[jnp.dtype(jnp.float32)][0])
    text = jitted.lower(whole["query"], whole["new"], *sharded, whole["lengths"]).compile().as_text()
    assert "all-gather" not in collectives(text) and f"f32[{b},{k},{s // 8},{h}]" not in text


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("door", [*FOUND, ONE_DEVICE], ids=str)
@pytest.mark.parametrize(("t", "window"), [(1, None), (1, 3), (5, None), (5, 2)])
def test_equals_attention_to_the_whole_sequence(door, t, window):
    check(door, (2, 4), t=t, window=window)


@pytest.mark.parametrize("door", [RINGMOE_JIT, ONE_DEVICE], ids=str)
def test_of_many_blocks(door):
    """Those that a sequence ends in, and those that a window begins in, are more than the first."""
    check(door, (2, 4), t=3, s=8192, lengths=(7000, 900))
    check(door, (2, 4), t=3, s=8192, lengths=(7000, 900), window=1500)


def test_shares_of_logits_however_low():
    """log l is less than one rounding of an LSE of -1e9, and tells how many keys a device has: it is kept beside it."""
    mesh = make_mesh((8,), TYPES.axis_type)
    q, k = (np.random.default_rng(i).normal(size=(1, n, 2, 8)).astype(np.float32) for i, n in enumerate((1, 64)))
    q, k = put(mesh, (q, k), (P(), P(None, "a")))
    bias, lengths = jnp.full((1, 1, 1, 64), -1e9), jnp.array([37], jnp.int32)
    got, want = (
        jax.jit(functools.partial(ringmoe.dot_product_attention, key_value_seq_lengths=lengths, exchange=how))(
            q, k, k, bias
        )
        for how in ("merge", "all_gather")
    )
    assert_close(got, want, TOLERANCE[jnp.dtype(jnp.float32)][0])


@given(
    st.sampled_from(FOUND), st.integers(1, 9), st.integers(1, 33), st.data(),
    st.sampled_from(("auto", "ring", "all_gather", "merge")), st.none() | st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=12, phases=WITHOUT_SHRINKING)
def test_of_any_lengths(door, t, s, data, exchange, window):
    """No key, fewer keys than queries, a full cache; devices that hold none of a sequence."""
    lengths = data.draw(st.lists(st.integers(0, s), min_size=2, max_size=2))
    check(door, (2, 4), window=window, exchange=exchange, t=t, s=4 * -(-s // 4), lengths=lengths)


@pytest.mark.sampled
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("axes", ["b", ("a", "b")], ids=str)
@pytest.mark.parametrize(("exchange", "window", "t"), [("auto", None, 1), ("merge", 5, 3), ("all_gather", 3, 2)])
def test_inside_a_shard_map_of_the_users_own(axes, check_vma, exchange, window, t):
    """Two steps: new tokens are written into the slices that own them, and attended to; what comes out is alike everywhere."""
    made, rng = arrays(t, lengths=(19, 27)), np.random.default_rng(1)
    new = {
        name: rng.normal(size=(2, t, *made[name].shape[2:])).astype(np.float32) for name in ("key_cache", "value_cache")
    }
    mesh, batch = make_mesh((2, 4), AxisType.Auto), P("a") if axes == "b" else P(None)
    cache = P(*batch, axes)

    def step(query, key_cache, value_cache, lengths, new):
        first = lengths - t
        caches = [ringmoe.update_cache(x, y, first, axis_name=axes) for x, y in zip((key_cache, value_cache), new)]
        return ringmoe.decode_attention(
            query, *caches, lengths, axis_name=axes, local_window_size=window, exchange=exchange, return_residual=True
        ), caches

    run = jax.shard_map(
        step, mesh=mesh, in_specs=(batch, cache, cache, batch, batch), out_specs=(batch, cache), check_vma=check_vma
    )
    (out, lse), caches = jax.jit(run)(*made.values(), list(new.values()))
    first = made["lengths"] - t
    want = [written(made[name], new[name], first) for name in new]
    for got, exactly in zip(caches, want):
        np.testing.assert_array_equal(got, exactly)
    with jax.enable_x64(True):
        query, lengths = double(made["query"]), made["lengths"]
        want_out, want_lse = dense(query, *map(double, want), lengths, window)
    assert_close(out, want_out, TOLERANCE[jnp.dtype(jnp.float32)][0])
    assert_close(lse, want_lse, TOLERANCE[jnp.dtype(jnp.float32)][0])
    text = jax.jit(run).lower(*made.values(), list(new.values())).compile().as_text()
    assert ("all-gather" in collectives(text)) == (exchange == "all_gather")


def test_inside_a_shard_map_there_are_no_derivatives():
    made, mesh = arrays(), make_mesh((2, 4), AxisType.Auto)
    step = functools.partial(ringmoe.decode_attention, axis_name="b")
    run = jax.shard_map(step, mesh=mesh, in_specs=tuple(SPECS.values()), out_specs=P("a"))
    with pytest.raises(NotImplementedError, match=r"has no derivatives: inside .* Call it outside of the shard_map"):
        jax.eval_shape(jax.grad(lambda *xs: run(*xs).sum()), *made.values())


@pytest.mark.parametrize("door", FOUND, ids=str)
def test_a_long_cache_is_never_gathered(door):
    mesh, shapes = (
        make_mesh((2, 4), door.axis_type),
        {"lengths": ((8,), jnp.int32), "query": ((8, 1, 4, 64), jnp.float32)},
    )
    shapes |= dict.fromkeys(("key_cache", "value_cache"), ((8, 2**17, 2, 64), jnp.float32))
    args = [jax.ShapeDtypeStruct(*shapes[name], sharding=NamedSharding(mesh, SPECS[name])) for name in SPECS]
    text = door.jit(ringmoe.decode_attention).lower(*args).compile().as_text()
    assert collectives(text) and not {"all-gather", "collective-permute", "all-to-all"} & set(collectives(text))


def test_what_is_past_the_end_is_not_read():
    made = arrays(s=32, lengths=(9, 7))
    for name in ("key_cache", "value_cache"):
        made[name][0, 9:], made[name][1, 7:] = np.nan, np.inf
    mesh = make_mesh((2, 4), RINGMOE_JIT.axis_type)
    out = ringmoe.jit(ringmoe.decode_attention)(*(put(mesh, made, SPECS)[name] for name in SPECS))
    assert np.isfinite(out).all()


def written(cache, new, first):
    """By a loop over tokens."""
    cache = np.array(cache)
    for b, i in np.ndindex(*new.shape[:2]):
        if 0 <= first[b] + i < cache.shape[1]:
            cache[b, first[b] + i] = new[b, i]
    return cache


@pytest.mark.parametrize("door", [*FOUND, ONE_DEVICE], ids=str)
@pytest.mark.parametrize(("s", "t", "first"), [(16, 1, (0, 15)), (16, 6, (2, 11)), (8, 5, (-2, 6)), (10, 3, (5, 20))])
def test_new_tokens_are_written_by_their_owners(door, s, t, first):
    """Over the border of two devices, longer than a device's part, partly outside."""
    rng = np.random.default_rng(0)
    cache, new = (rng.normal(size=(2, length, 2, 3)).astype(np.float32) for length in (s, t))
    first = np.asarray(first, np.int32)
    args, specs = (cache, new, first), (P("a", "b" if s % 4 == 0 else None), P("a"), P("a"))
    if door is not ONE_DEVICE:
        args = put(make_mesh((2, 4), door.axis_type), args, specs)
    jitted = door.jit(ringmoe.update_cache)
    np.testing.assert_array_equal(jitted(*args), written(cache, new, first))
    if door is not ONE_DEVICE:
        assert not collectives(jitted.lower(*args).compile().as_text())


@pytest.mark.parametrize("door", [RINGMOE_JIT, TYPES], ids=str)
def test_the_gradient_of_an_update_is_the_cotangent_where_it_went(door):
    rng = np.random.default_rng(0)
    cache, new, ct = (rng.normal(size=(2, n, 2, 3)).astype(np.float32) for n in (16, 3, 16))
    first = np.asarray((3, 10), np.int32)
    specs = (P("a", "b"), P("a"), P("a"), P("a", "b"))
    args = put(make_mesh((2, 4), door.axis_type), (cache, new, first, ct), specs)

    def loss(cache, new, first, ct):
        return jnp.sum(ringmoe.update_cache(cache, new, first) * ct)

    of_cache, of_new = door.jit(jax.grad(loss, (0, 1)))(*args)
    np.testing.assert_allclose(of_cache, written(ct, np.zeros_like(new), first), rtol=1e-6)
    np.testing.assert_allclose(of_new, np.stack([c[f : f + 3] for c, f in zip(ct, first)]), rtol=1e-6)


@pytest.mark.parametrize("door", [RINGMOE_JIT, TYPES], ids=str)
def test_a_prompt_in_chunks_and_tokens_one_by_one(door):
    """Every token's output is that of attention to the whole sequence."""
    rng = np.random.default_rng(0)
    length, chunks = 22, (8, 8, 3, 1, 1, 1)
    q = rng.normal(size=(2, length, 4, 4)).astype(np.float32)
    k, v = (rng.normal(size=(2, length, 2, 4)).astype(np.float32) for _ in range(2))
    mesh = make_mesh((2, 4), door.axis_type)
    caches = put(mesh, [np.zeros((2, 32, 2, 4), np.float32)] * 2, [P("a", "b")] * 2)

    @door.jit
    def step(caches, q, k, v, first):
        caches = [ringmoe.update_cache(cache, x, first) for cache, x in zip(caches, (k, v))]
        return caches, ringmoe.decode_attention(q, *caches, first + q.shape[1])

    outs, at = [], 0
    for size in chunks:
        here = [x[:, at : at + size] for x in (q, k, v)]
        args = put(mesh, [*here, np.full(2, at, np.int32)], [P("a")] * 4)
        caches, out = step(caches, *args)
        outs.append(np.asarray(out))
        at += size
    with jax.enable_x64(True):
        want, _ = reference.dot_product_attention(*double((q, k, v)), is_causal=True)
    assert_close(np.concatenate(outs, 1), want, TOLERANCE[jnp.dtype(jnp.float32)][0])
