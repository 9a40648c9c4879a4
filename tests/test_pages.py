"""Attention to a cache in pages of a pool, and its update, against attention to the gathered sequences in float64."""

import functools
import itertools

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
    PARTITIONER,
    RINGMOE_JIT,
    TOLERANCE,
    TYPES,
    WITHOUT_SHRINKING,
    assert_close,
    collectives,
    double,
    make_mesh,
    put,
    sent,
    value_and_gradients,
)

POOL, SEQUENCES = P("b"), P("a")
SPECS = {"query": SEQUENCES, "key_cache": POOL, "value_cache": POOL, "lengths": SEQUENCES, "page_indices": SEQUENCES}
SPECS |= {"key_scales": POOL, "value_scales": POOL, "sinks": P(), "alibi_slopes": P()}
SINGLE = TOLERANCE[jnp.dtype(jnp.float32)]


def arrays(t=1, size=4, most=8, num_pages=24, lengths=(29, 7), seed=0, k=2, n=4, h=4, shared=0):
    """Pools and a table of permuted pages, the first `shared` of all sequences; NaN, and any numbers, where nobody looks."""
    rng, b = np.random.default_rng(seed), len(lengths)
    lengths = np.asarray(lengths, np.int32)
    needed = -(-lengths // size)
    free = iter(rng.permutation(num_pages))
    prefix = [next(free) for _ in range(min(shared, needed.max()))]
    table = rng.choice([-(2**31), -1, 0, num_pages, 2**31 - 1], (b, most)).astype(np.int32)
    written = np.zeros((num_pages, size), bool)
    for row, count, length in zip(table, needed, lengths):
        row[:count] = [*prefix[:count], *itertools.islice(free, max(0, count - len(prefix)))]
        written[row[:count].repeat(size)[:length], np.arange(length) % size] = True
    pools = [rng.normal(size=(num_pages, size, k, h)).astype(np.float32) for _ in range(2)]
    key, value = (np.where(written[..., None, None], pool, np.float32(np.nan)) for pool in pools)
    query = rng.normal(size=(b, t, n, h)).astype(np.float32)
    return dict(query=query, key_cache=key, value_cache=value, lengths=lengths, page_indices=table)


def gathered(pool, table, lengths):
    """[num_pages, size, ...] as [B, M size, ...], zeros past the lengths; to both pools NumPy's and JAX's."""
    size, most = pool.shape[1], table.shape[1]
    kept = np.arange(most * size) < np.asarray(lengths)[:, None]
    pages = np.where(kept[:, ::size], table, 0)
    found = pool[pages].reshape(len(lengths), most * size, *pool.shape[2:])
    return jnp.where(kept.reshape(*kept.shape, *[1] * (pool.ndim - 2)), found, 0)


def dense(
    query,
    key_cache,
    value_cache,
    lengths,
    page_indices,
    local_window_size=None,
    key_scales=None,
    value_scales=None,
    **features,
):
    """Each token by itself: a query at place p of its own sequence sees the keys up to p."""
    lengths, table = np.asarray(lengths), np.asarray(page_indices)
    wide = lambda pool, scales: pool if scales is None else pool * scales[..., None]
    key, value = (gathered(wide(*x), table, lengths) for x in ((key_cache, key_scales), (value_cache, value_scales)))
    place, keys = lengths[:, None] - query.shape[1] + np.arange(query.shape[1]), np.arange(key.shape[1])
    seen = keys <= place[..., None]
    if local_window_size is not None:
        seen &= keys >= place[..., None] - local_window_size
    return reference.dot_product_attention(
        query, key, value, mask=seen[:, None], query_positions=place.astype(np.int32), **features
    )


INPUTS = ("query", "key_cache", "value_cache")


def check(door, mesh, made, specs=SPECS, window=None, exchange="auto", wanted=INPUTS, **features):
    """Results, and gradients."""
    fun = functools.partial(
        ringmoe.decode_attention, return_residual=True, local_window_size=window, exchange=exchange, **features
    )
    cotangents = np.random.default_rng(1).normal(size=made["query"].shape).astype(np.float32)
    loss = lambda out, cotangents: jnp.sum(out[0] * cotangents)
    grid = None if door is ONE_DEVICE else make_mesh(mesh, door.axis_type)
    (out, lse), grads = value_and_gradients(fun, loss, wanted, door, grid, made, specs, cotangents)
    tables = {name: made[name] for name in ("lengths", "page_indices")}
    rest = {name: x for name, x in made.items() if name not in tables}
    with jax.enable_x64(True):
        oracle = functools.partial(dense, local_window_size=window, **tables, **features)
        (want, want_lse), want_grads = value_and_gradients(
            oracle, loss, wanted, ONE_DEVICE, None, double(rest), {}, double(cotangents)
        )
    assert_close(out, want, SINGLE[0])
    assert_close(lse, want_lse, SINGLE[0])
    for name in wanted:
        assert_close(grads[name], want_grads[name], SINGLE[1], name)


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("door", [*FOUND, ONE_DEVICE], ids=str)
@pytest.mark.parametrize(("t", "window"), [(1, None), (1, 3), (5, None), (5, 6)])
def test_equals_attention_to_the_gathered_pages(door, t, window):
    check(door, (2, 4), arrays(t), window=window)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("mesh", "specs"),
    [
        ((8,), {"query": P(), "pool": P("a")}),
        ((2, 4), {"query": P(None, None, "a"), "pool": P("b", None, "a")}),
        ((2, 4), {"query": P("a", None, "b"), "pool": P(("b", "a"))}),  # whatever of queries lies along the pages' axes
        ((2, 4), {"query": P("b", "a"), "pool": P(("a", "b"))}),
        ((2, 2, 2), {"query": P("a", "b"), "pool": P("b", None, "c")}),
        ((2, 4), {"query": P("a", "b"), "pool": P()}),
    ],
    ids=str,
)
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
def test_a_pool_stays_where_it_is(door, mesh, specs):
    """Its pages and heads along any axes, sequences, tokens and heads of queries along any: nothing of its size is sent."""
    made = arrays(4, num_pages=512, size=8, k=2, n=8, lengths=(29, 7, 0, 60))
    sequences = P(*specs["query"][:1])
    specs = {"query": specs["query"], "key_cache": specs["pool"], "value_cache": specs["pool"]} | dict.fromkeys(
        ("lengths", "page_indices"), sequences
    )
    check(door, mesh, made, specs, wanted=())
    grid = make_mesh(mesh, door.axis_type)
    text = door.jit(ringmoe.decode_attention).lower(**put(grid, made, specs)).compile().as_text()
    own = made["key_cache"].size // grid.size
    assert all(size < own for _, size in sent(text)), sent(text)


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT, ONE_DEVICE], ids=str)
@pytest.mark.parametrize("t", [1, 3])
def test_features(door, t):
    """Sinks, slopes, a soft cap, and eight bits with scales that lie where their pages do."""
    made, rng = arrays(t, h=8), np.random.default_rng(3)
    plain = made | {"sinks": rng.normal(size=4).astype(np.float32), "alibi_slopes": rng.random(4).astype(np.float32)}
    check(door, (2, 4), plain, wanted=("query", "sinks"), logits_soft_cap=1.5)
    pools = {name: made[name].astype(jnp.float8_e4m3fn) for name in ("key_cache", "value_cache")}
    scales = {
        name: rng.uniform(0.5, 2, pools["key_cache"].shape[:3]).astype(np.float32)
        for name in ("key_scales", "value_scales")
    }
    check(door, (2, 4), made | pools | scales, wanted=("query",))


@pytest.mark.sampled
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("door", [RINGMOE_JIT, ONE_DEVICE], ids=str)
def test_pages_longer_than_a_block(door, window):
    check(door, (2, 4), arrays(2, size=1040, most=4, num_pages=8, lengths=(3900, 900)), window=window)


@given(
    st.sampled_from((*FOUND, ONE_DEVICE)), st.sampled_from(((2, 4), (8,), (2, 2, 2))), st.integers(1, 9), st.integers(1, 7),
    st.integers(0, 3), st.data(), st.none() | st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=10, phases=WITHOUT_SHRINKING)
def test_of_any_tables(door, mesh, t, size, shared, data, window):
    """Pages of any size, one of several sequences or of none; devices that hold none of a sequence."""
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=2))
    needed = [-(-length // size) for length in lengths]
    parts = 1 if len(mesh) == 1 else mesh[1]
    num_pages = parts * -(-(max(1, sum(needed)) + data.draw(st.integers(0, 3))) // parts)
    made = arrays(t, size, max(1, *needed) + data.draw(st.integers(0, 2)), num_pages, lengths, shared=shared)
    check(door, mesh, made, SPECS if len(mesh) > 1 else dict.fromkeys(SPECS, P()), window=window, wanted=INPUTS[:1])


@pytest.mark.parametrize("door", [RINGMOE_JIT, PARTITIONER], ids=str)
def test_pages_that_devices_do_not_divide(door):
    """A padded pool has no more pages than there are: a number past its end is none's."""
    made = arrays(2, lengths=(29, 7))
    made["page_indices"] = np.where(made["page_indices"] >= 22, 3, made["page_indices"])
    made["page_indices"][0, :2] = 22, 23
    for name in INPUTS[1:]:
        made[name] = np.nan_to_num(made[name])
    cut = lambda query, key_cache, value_cache, lengths, page_indices: ringmoe.decode_attention(
        query, key_cache[:22], value_cache[:22], lengths, page_indices=page_indices
    )
    got = door.jit(cut)(**put(make_mesh((2, 4), door.axis_type), made, SPECS))
    want = jax.jit(cut)(**made)
    assert_close(got, want, SINGLE[0])
    made["page_indices"][0, :2], made["key_cache"][22:], made["value_cache"][22:] = -1, np.nan, np.nan
    assert_close(got, jax.jit(cut)(**made), SINGLE[0])


@pytest.mark.sampled
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("axes", ["b", ("a", "b")], ids=str)
@pytest.mark.parametrize(("window", "t"), [(None, 1), (5, 3)])
def test_inside_a_shard_map_of_the_users_own(axes, check_vma, window, t):
    """New tokens go into the pages that own their places, and are attended to; what comes out is alike everywhere."""
    made, rng = arrays(t, lengths=(19, 27)), np.random.default_rng(1)
    new = [rng.normal(size=(2, t, *made[name].shape[2:])).astype(np.float32) for name in INPUTS[1:]]
    mesh, pool = make_mesh((2, 4), AxisType.Auto), P(axes)

    def step(query, key_cache, value_cache, lengths, page_indices, new):
        where = dict(page_indices=page_indices, axis_name=axes)
        caches = [ringmoe.update_cache(x, y, lengths - t, **where) for x, y in zip((key_cache, value_cache), new)]
        return ringmoe.decode_attention(
            query, *caches, lengths, local_window_size=window, return_residual=True, **where
        ), caches

    run = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), pool, pool, P(), P(), P()), out_specs=(P(), pool), check_vma=check_vma
    )
    (out, lse), caches = jax.jit(run)(*made.values(), new)
    for name, x, got in zip(INPUTS[1:], new, caches):
        made[name] = written(made[name], x, made["lengths"] - t, made["page_indices"])
        np.testing.assert_array_equal(got, made[name])
    with jax.enable_x64(True):
        tables = {name: made[name] for name in ("lengths", "page_indices")}
        want, want_lse = dense(*(double(made[name]) for name in INPUTS), **tables, local_window_size=window)
    assert_close(out, want, SINGLE[0])
    assert_close(lse, want_lse, SINGLE[0])
    assert set(collectives(jax.jit(run).lower(*made.values(), new).compile().as_text())) == {"all-reduce"}


def test_inside_a_shard_map_there_are_no_derivatives():
    made, mesh = arrays(), make_mesh((2, 4), AxisType.Auto)

    def step(query, key_cache, value_cache, lengths, page_indices):
        return ringmoe.decode_attention(
            query, key_cache, value_cache, lengths, page_indices=page_indices, axis_name="b"
        )

    run = jax.shard_map(step, mesh=mesh, in_specs=tuple(SPECS[name] for name in made), out_specs=P("a"))
    with pytest.raises(NotImplementedError, match=r"has no derivatives: inside .* Call it outside of the shard_map"):
        jax.eval_shape(jax.grad(lambda *xs: run(*xs).sum()), *made.values())


def test_a_vmap_over_sequences_or_pools():
    made = arrays(2)
    one = functools.partial(ringmoe.decode_attention, key_cache=made["key_cache"], value_cache=made["value_cache"])
    run = lambda query, lengths, page_indices: one(query[None], lengths=lengths[None], page_indices=page_indices[None])[
        0
    ]
    names = ("query", "lengths", "page_indices")
    with jax.enable_x64(True):
        tables = {name: made[name] for name in ("lengths", "page_indices")}
        want, _ = dense(*(double(made[name]) for name in INPUTS), **tables)
    assert_close(jax.jit(jax.vmap(run))(*(made[name] for name in names)), want, SINGLE[0])
    both = {name: np.stack([x, x]) for name, x in made.items()}
    got = jax.jit(jax.vmap(lambda made: ringmoe.decode_attention(**made)))(both)
    assert_close(got, np.stack([want, want]), SINGLE[0])


@pytest.mark.parametrize("door", FOUND, ids=str)
def test_a_long_pool_is_never_gathered(door):
    """Of 2**20 tokens a device sends the shares of its queries and no more, as the plan says; it keeps no copy of a page."""
    mesh, (b, n, h, k, size) = make_mesh((8,), door.axis_type), (4, 4, 64, 2, 16)
    pages, most = 2**20 // size, 2**17 // size
    shapes = {"lengths": (b,), "query": (b, 1, n, h), "page_indices": (b, most)}
    shapes |= dict.fromkeys(("key_cache", "value_cache"), (pages, size, k, h))
    integers, pools = ("lengths", "page_indices"), {"key_cache": P("a"), "value_cache": P("a")}
    args = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.int32 if name in integers else jnp.float32, sharding=NamedSharding(mesh, pools.get(name, P()))
        )
        for name, shape in shapes.items()
    }
    compiled = door.jit(ringmoe.decode_attention).lower(**args).compile()
    found = sent(compiled.as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(count for _, count in found) == b * n * (
        h + 2
    )  # of the output, of the sum of weights, of the greatest logit
    own = pages // 8 * size * k * h * 4
    assert compiled.memory_analysis().temp_size_in_bytes < own / 16
    if door is RINGMOE_JIT:
        (row,) = ringmoe.explain(door.jit(ringmoe.decode_attention), **args).rows
        assert row.exchange == "merge" and row.wire_bytes == 2 * 7 * b * n * h * 4 // 8


def written(pool, new, first, table):
    """By a loop over tokens."""
    pool = np.array(pool)
    for b, i in np.ndindex(*new.shape[:2]):
        page, place = divmod(first[b] + i, pool.shape[1])
        if 0 <= page < table.shape[1] and 0 <= table[b, page] < len(pool):
            pool[table[b, page], place] = new[b, i]
    return pool


@pytest.mark.parametrize("door", [*FOUND, ONE_DEVICE], ids=str)
@pytest.mark.parametrize(
    ("size", "t", "first"), [(4, 1, (0, 15)), (4, 6, (2, 11)), (2, 5, (-2, 6)), (3, 7, (5, 20)), (1, 3, (4, 0))]
)
def test_new_tokens_are_written_into_their_pages(door, size, t, first):
    """Over the border of two pages, more than a page, partly outside; into the same pool, which is changed in place."""
    rng = np.random.default_rng(0)
    pool, new = (rng.normal(size=(*shape, 2, 3)).astype(np.float32) for shape in ((16, size), (2, t)))
    table = rng.permutation(16).reshape(2, 8).astype(np.int32)
    table[1, 3] = 99
    args, specs = (pool, new, np.asarray(first, np.int32), table), (P("b"), P(), P(), P())
    if door is not ONE_DEVICE:
        args = put(make_mesh((2, 4), door.axis_type), args, specs)
    update = lambda pool, new, first, table: ringmoe.update_cache(pool, new, first, page_indices=table)
    jitted = door.jit(update)
    np.testing.assert_array_equal(jitted(*args), written(*(np.asarray(x) for x in args)))
    if door is not ONE_DEVICE:
        assert not collectives(jitted.lower(*args).compile().as_text())


@pytest.mark.parametrize("door", FOUND, ids=str)
def test_a_pool_is_updated_where_it_is(door):
    """Donated it isn't copied, and of sequences along other axes the new tokens alone are sent to all."""
    mesh = make_mesh((2, 4), door.axis_type)
    of = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    pool, new = of((4096, 16, 2, 64), jnp.float32, "b"), of((4, 1, 2, 64), jnp.float32, "a")
    args = pool, new, of((4,), jnp.int32, "a"), of((4, 512), jnp.int32, "a")
    update = lambda pool, new, first, table: ringmoe.update_cache(pool, new, first, page_indices=table)
    compiled = door.jit(update, donate_argnums=0).lower(*args).compile()
    own, memory = pool.size * 4 // 4, compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= own > 16 * memory.temp_size_in_bytes
    assert max(count for _, count in sent(compiled.as_text())) <= 4 * 512
    assert f"copy(f32[{4096 // 4},16,2,64]" not in compiled.as_text()


@pytest.mark.parametrize("door", [RINGMOE_JIT, TYPES], ids=str)
def test_the_gradient_of_an_update_is_the_cotangent_where_it_went(door):
    rng = np.random.default_rng(0)
    pool, new, ct = (rng.normal(size=(n, size, 2, 3)).astype(np.float32) for n, size in ((16, 4), (2, 6), (16, 4)))
    first, table = np.asarray((3, 10), np.int32), rng.permutation(16).reshape(2, 8).astype(np.int32)
    args = put(make_mesh((2, 4), door.axis_type), (pool, new, first, table, ct), (P("b"), P(), P(), P(), P("b")))

    def loss(pool, new, first, table, ct):
        return jnp.sum(ringmoe.update_cache(pool, new, first, page_indices=table) * ct)

    of_pool, of_new = door.jit(jax.grad(loss, (0, 1)))(*args)
    np.testing.assert_allclose(of_pool, written(ct, np.zeros_like(new), first, table), rtol=1e-6)
    whole = ct[table].reshape(2, 32, 2, 3)
    np.testing.assert_allclose(of_new, np.stack([c[f : f + 6] for c, f in zip(whole, first)]), rtol=1e-6)


@pytest.mark.parametrize("door", [RINGMOE_JIT, TYPES], ids=str)
def test_a_prompt_in_chunks_and_tokens_one_by_one(door):
    """Pages are handed out as sequences grow, and every token's output is that of attention to the whole sequence."""
    rng = np.random.default_rng(0)
    length, chunks, size = 22, (8, 8, 3, 1, 1, 1), 4
    q = rng.normal(size=(2, length, 4, 4)).astype(np.float32)
    k, v = (rng.normal(size=(2, length, 2, 4)).astype(np.float32) for _ in range(2))
    mesh = make_mesh((2, 4), door.axis_type)
    caches = put(mesh, [np.full((16, size, 2, 4), np.nan, np.float32)] * 2, [P("b")] * 2)
    free, table = iter(rng.permutation(16)), np.full((2, 8), -1, np.int32)

    @door.jit
    def step(caches, q, k, v, first, table):
        caches = [ringmoe.update_cache(cache, x, first, page_indices=table) for cache, x in zip(caches, (k, v))]
        return caches, ringmoe.decode_attention(q, *caches, first + q.shape[1], page_indices=table)

    outs, at = [], 0
    for tokens in chunks:
        for page in range(-(-at // size), -(-(at + tokens) // size)):
            table[:, page] = next(free), next(free)
        here = [x[:, at : at + tokens] for x in (q, k, v)]
        caches, out = step(caches, *put(mesh, [*here, np.full(2, at, np.int32), table], [P("a")] * 5))
        outs.append(np.asarray(out))
        at += tokens
    with jax.enable_x64(True):
        want, _ = reference.dot_product_attention(*double((q, k, v)), is_causal=True)
    assert_close(np.concatenate(outs, 1), want, SINGLE[0])
