"""Dropout by a counter: the right share, no pattern, and the same whoever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringmoe
from ringmoe import dropout


def kept(rate, seed, rows, keys):
    return np.asarray(dropout.kept(rate, jnp.uint32(seed), jnp.asarray(rows)[:, None], jnp.asarray(keys)))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("first", [0, 10_000_000, 2**30])
def test_the_share_that_is_left_out(rate, first):
    left_out = 1 - kept(rate, 5, first + np.arange(512), first + np.arange(2048)).mean()
    assert abs(left_out - rate) < 5 * np.sqrt(rate * (1 - rate) / 2**20)


def test_neighbours_know_nothing_of_each_other():
    """The correlation of kept pairs with those beside, below, and of the next seed; and rows and columns are even."""
    at, n = np.arange(1024), 1024
    of = lambda seed, rows, keys: kept(0.5, seed, rows, keys) - 0.5
    here = of(5, at, at)
    for other in (of(5, at, at + 1), of(5, at + 1, at), of(5, at + 1, at + 1), of(6, at, at), of(5, at, at).T):
        assert abs((here * other).mean() * 4) < 6 / n
    for axis in (0, 1):
        spread = (here.sum(axis) / np.sqrt(n / 4)).std()
        assert abs(spread - 1) < 0.15


def test_it_is_the_same_in_any_block_and_for_ever():
    whole = kept(0.3, 7, np.arange(64), np.arange(64))
    np.testing.assert_array_equal(whole[16:32, 48:], kept(0.3, 7, np.arange(16, 32), np.arange(48, 64)))
    # By the formula, in Python's integers; a model that is trained on must not be dropped otherwise by the next release.
    assert np.packbits(kept(0.5, 123, np.arange(2), np.arange(16))).tolist() == [201, 36, 39, 62]


def test_its_mean_is_attention_without_it():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 1, 4))
    of = jax.jit(lambda key: ringmoe.dot_product_attention(q, k, v, dropout_rate=0.5, dropout_key=key))
    mean = np.mean([of(jax.random.key(i)) for i in range(400)], axis=0)
    np.testing.assert_allclose(mean, ringmoe.dot_product_attention(q, k, v), atol=0.2)
    assert not np.array_equal(of(jax.random.key(0)), of(jax.random.key(1)))
    np.testing.assert_array_equal(
        ringmoe.dot_product_attention(q, k, v, dropout_rate=0.0, dropout_key=jax.random.key(0)),
        ringmoe.dot_product_attention(q, k, v),
    )


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_mapped_rematerialised_and_pushed_forward(implementation):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 2, 8))
    keys = jax.random.split(jax.random.key(1), 3)

    def drop(key, q=q):
        return ringmoe.dot_product_attention(
            q, k, v, dropout_rate=0.5, dropout_key=key, implementation=implementation, is_causal=True
        )

    np.testing.assert_allclose(jax.vmap(drop)(keys), jnp.stack(list(map(drop, keys))), atol=1e-6)
    loss = lambda q: jnp.sum(jnp.sin(drop(keys[0], q)))
    gradient = jax.grad(loss)(q)
    np.testing.assert_array_equal(gradient, jax.grad(jax.checkpoint(loss))(q))
    np.testing.assert_allclose(jax.jvp(loss, (q,), (k,))[1], jnp.vdot(gradient, k), rtol=1e-4)
