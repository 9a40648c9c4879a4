"""Bands against brute force: who sees whom, and which blocks are met or full."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from ringmoe.masks import Band, Places

SIDES = st.none() | st.integers(0, 9)
BANDS = st.builds(Band, SIDES, st.none() | st.integers(-3, 9))


def sees(band: Band, i: int, j: int) -> bool:
    return (band.left is None or j >= i - band.left) and (band.right is None or j <= i + band.right)


@given(BANDS, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=40)
def test_positions(band, q0, k0):
    queries, keys = q0 + np.arange(6), k0 + np.arange(7)
    want = [[sees(band, i, j) for j in keys] for i in queries]
    np.testing.assert_array_equal(band(jnp.asarray(queries)[:, None], jnp.asarray(keys)), want)
    transposed = band.transpose()(jnp.asarray(keys)[:, None], jnp.asarray(queries))
    np.testing.assert_array_equal(transposed, np.transpose(want))


@given(BANDS, *map(st.integers, (0, 1, 0, 1, 1), (20, 6, 20, 5, 5)), st.booleans(), st.booleans())
@settings(max_examples=150)
def test_blocks_are_those_that_are_met(band, start, rows, offset, block, num_blocks, traced, wide):
    """Every block outside (first, last) is empty; both ends are met, where any block is."""
    bounds = lambda start, offset: band.blocks(start, start + rows, Places((offset,), block * num_blocks), block)
    with jax.enable_x64(wide):
        positions = (jnp.int32(start), jnp.int32(offset)) if traced else (start, offset)
        first, last = (jax.jit(bounds) if traced else bounds)(*positions)
    met = [
        any(
            sees(band, i, j)
            for i in range(start, start + rows)
            for j in range(offset + n * block, offset + (n + 1) * block)
        )
        for n in range(num_blocks)
    ]
    inside = [int(first) <= n < int(last) for n in range(num_blocks)]
    assert all(a <= b for a, b in zip(met, inside)), (met, first, last)
    if any(met):
        assert inside == met
    else:
        assert sum(inside) <= 1  # a block that only touches may be named; never more than that


@given(BANDS, st.integers(0, 9), st.integers(1, 5), st.integers(0, 9), st.integers(1, 5))
@settings(max_examples=150)
def test_full_blocks_are_full(band, q_start, rows, k_start, keys):
    got = band.is_full_block(q_start, q_start + rows, k_start, k_start + keys)
    want = all(sees(band, i, j) for i in range(q_start, q_start + rows) for j in range(k_start, k_start + keys))
    assert bool(got) == want


@pytest.mark.parametrize(("is_causal", "window", "band", "text"), [
    (False, None, Band(), "full"),
    (True, None, Band(None, 0), "causal"),
    (False, 3, Band(3, 3), "window(3, 3)"),
    (True, 3, Band(3, 0), "window(3, 0)"),
    (False, (2, 5), Band(2, 5), "window(2, 5)"),
    (True, (2, 5), Band(2, 0), "window(2, 0)"),
    (False, (0, 0), Band(0, 0), "window(0, 0)"),
])  # fmt: skip
def test_band_of_the_two_arguments_of_jax_nn(is_causal, window, band, text):
    assert Band.make(is_causal, window) == band
    assert str(band) == text
    assert band.is_full == (text == "full")
