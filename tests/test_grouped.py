"""Matmuls of sorted rows, in both forms, against loops over the experts; their derivatives of two orders, vmap, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmoe.pallas import grouped

D, F, TILE = 3, 5, 4
FORMS = {"tiled": grouped._tiled, "ragged": grouped._ragged}
KINDS = {"times": grouped.times, "back": grouped.back, "outer": grouped.outer}
# Rows, and how many each expert has of them: none, all, fewer than a tile or more, the last expert's up to the end or not.
COUNTS = (
    (12, (3, 0, 5, 4)),
    (12, (0, 0, 0, 0)),
    (12, (0, 12, 0, 0)),
    (14, (9, 1, 1, 1)),
    (3, (1, 1, 0, 1)),
    (9, (0, 0, 1, 8)),
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(grouped, "TILE", TILE)


def operands(kind, n, e, dtype=np.float32):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, F if kind == "back" else D))
    b = rng.normal(size=(n, F) if kind == "outer" else (e, D, F))
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def loop(kind, a, b, counts):
    """By expert; rows past the last expert's are zeros."""
    ends = np.cumsum(counts)
    parts = [slice(end - count, end) for end, count in zip(ends, counts)]
    if kind == "outer":
        return jnp.stack([a[part].T @ b[part] for part in parts])
    rows = [a[part] @ (w.T if kind == "back" else w) for part, w in zip(parts, b)]
    return jnp.concatenate([*rows, jnp.zeros((len(a) - ends[-1], rows[0].shape[-1]), a.dtype)])


@pytest.mark.parametrize(("n", "counts"), COUNTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop(kind, form, n, counts):
    a, b = operands(kind, n, len(counts))
    rows = n if kind == "outer" else sum(counts)
    a = a.at[sum(counts) :].set(jnp.nan)  # what lies past the last expert's rows reaches nobody's
    got = np.asarray(jax.jit(functools.partial(FORMS[form], kind))(a, b, jnp.asarray(counts, jnp.int32)))
    want = loop(kind, a, b, counts)
    assert np.isfinite(want[:rows]).all()
    np.testing.assert_allclose(got[:rows], want[:rows], atol=1e-5)


@given(st.data())
@settings(max_examples=15)
def test_any_counts(data):
    n, kind = data.draw(st.sampled_from([11, 16])), data.draw(st.sampled_from(sorted(KINDS)))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), min_size=5, max_size=5)))
    counts = np.diff(cuts).astype(np.int32)
    a, b = operands(kind, n, 4)
    rows = 4 if kind == "outer" else counts.sum()
    got = jax.jit(functools.partial(grouped._tiled, kind))(a, b, counts)
    np.testing.assert_allclose(got[:rows], loop(kind, a, b, counts)[:rows], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_two_orders(kind):
    n, counts = COUNTS[0]
    a, b = operands(kind, n, len(counts))
    energy = lambda run: lambda a, b: jnp.sum(jnp.sin(run(a, b, jnp.asarray(counts, jnp.int32))))
    loops = lambda a, b, _: loop(kind, a, b, counts)
    for derivative in (
        jax.grad,
        jax.jacfwd,
        lambda f, at: jax.grad(lambda *x: sum(jnp.sum(g**2) for g in jax.grad(f, at)(*x)), at),
    ):
        got, want = (jax.jit(derivative(energy(run), (0, 1)))(a, b) for run in (KINDS[kind], loops))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind):
    n, counts = COUNTS[0]
    a, b = operands(kind, n, len(counts))
    pair, both = jnp.stack([a, a[::-1]]), jnp.asarray([counts, counts[::-1]], jnp.int32)
    got = jax.jit(jax.vmap(KINDS[kind], (0, None, 0)))(pair, b, both)
    for i in range(2):
        np.testing.assert_allclose(got[i], loop(kind, pair[i], b, np.asarray(both[i])), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind):
    n, counts = COUNTS[0]
    a, b = operands(kind, n, len(counts), jnp.bfloat16)
    run = functools.partial(KINDS[kind], counts=jnp.asarray(counts, jnp.int32))
    assert run(a, b).dtype == jnp.float32
    grads = jax.grad(lambda a, b: jnp.sum(run(a, b)), (0, 1))(a, b)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    text = jax.jit(jax.grad(lambda a, b: jnp.sum(run(a, b) ** 2), (0, 1))).lower(a, b).as_text()
    assert "stablehlo.while" in text and "stablehlo.scatter" not in text
