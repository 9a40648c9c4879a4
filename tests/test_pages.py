"""Attention to a cache in pages of a pool, and its update, against attention to the gathered sequences in float64."""

import functools
import itertools

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
    double,
    make_mesh,
    value_and_gradients,
)

FOUND = (TYPES, PARTITIONER, RINGMOE_JIT, EXPLICIT_RINGMOE_JIT)
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


@pytest.mark.oldest
@pytest.mark.parametrize("door", [*FOUND, ONE_DEVICE], ids=str)
@pytest.mark.parametrize(("t", "window"), [(1, None), (1, 3), (5, None), (5, 6)])
def test_equals_attention_to_the_gathered_pages(door, t, window):
    check(door, (2, 4), arrays(t), window=window)
