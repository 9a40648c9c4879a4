"""Bands and masks against brute force: who sees whom, and which blocks are met or full."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from ringmoe.masks import Band, Both, Causal, Chunks, Either, Mask, Places, Prefix, Window

SIDES = st.none() | st.integers(0, 9)
MASKS = st.recursive(
    st.builds(Window, SIDES, SIDES) | st.builds(Prefix, st.integers(0, 20)) | st.builds(Chunks, st.integers(1, 9)),
    lambda masks: st.builds(Both, masks, masks) | st.builds(Either, masks, masks),
    max_leaves=4,
)
PLAIN = st.builds(Band, SIDES, st.none() | st.integers(-3, 9))
BANDS = PLAIN | st.builds(Band, SIDES, SIDES, also=MASKS)


def shows(mask: Mask, i: int, j: int) -> bool:
    match mask:
        case Both(a, b):
            return shows(a, i, j) and shows(b, i, j)
        case Either(a, b):
            return shows(a, i, j) or shows(b, i, j)
        case Prefix(length):
            return j < length
        case Chunks(length):
            return i // length == j // length
        case Window(left, right):
            return (left is None or i - j <= left) and (right is None or j - i <= right)
    raise AssertionError(mask)


def sees(band: Band, i: int, j: int) -> bool:
    near = (band.left is None or j >= i - band.left) and (band.right is None or j <= i + band.right)
    return near and (band.also is None or shows(band.also, i, j))


@given(BANDS, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=40)
def test_positions(band, q0, k0):
    queries, keys = q0 + np.arange(6), k0 + np.arange(7)
    want = [[sees(band, i, j) for j in keys] for i in queries]
    np.testing.assert_array_equal(band(jnp.asarray(queries)[:, None], jnp.asarray(keys)), want)


@given(BANDS, *[st.none() | st.integers(0, 9)] * 2, st.booleans())
@settings(max_examples=100)
def test_spans_are_what_is_seen(band, queries, keys, of_keys):
    """Of each row, together, with where sequences end."""
    band = dataclasses.replace(band, queries=queries, keys=keys)
    at = np.arange(12, dtype=np.int32)
    spans = (band.keys_seen if of_keys else band.queries_seen)(jnp.asarray(at))
    column = lambda bound: np.broadcast_to(np.asarray(bound), at.shape)[:, None]
    got = np.any([(at >= column(low)) & (at < column(high)) for low, high in spans], 0)
    want = np.asarray(band(jnp.asarray(at)[:, None], jnp.asarray(at)))
    np.testing.assert_array_equal(got, want if of_keys else want.T)


@given(BANDS, *map(st.integers, (0, 1, 0, 1, 1), (20, 6, 20, 5, 5)), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_blocks_are_those_that_are_met(band, start, rows, offset, block, num_blocks, traced, wide, of_keys):
    """Every block outside (first, last) is empty; of a plain band both ends are met, where any block is."""
    met_by = band.keys_met if of_keys else band.queries_met
    bounds = lambda start, offset: met_by(start, start + rows, Places((offset,), block * num_blocks), block)
    sees_ = sees if of_keys else lambda band, i, j: sees(band, j, i)
    with jax.enable_x64(wide):
        positions = (jnp.int32(start), jnp.int32(offset)) if traced else (start, offset)
        first, last = (jax.jit(bounds) if traced else bounds)(*positions)
    met = [
        any(
            sees_(band, i, j)
            for i in range(start, start + rows)
            for j in range(offset + n * block, offset + (n + 1) * block)
        )
        for n in range(num_blocks)
    ]
    inside = [int(first) <= n < int(last) for n in range(num_blocks)]
    assert all(a <= b for a, b in zip(met, inside)), (met, first, last)
    if band.also is not None:
        return
    if any(met):
        assert inside == met
    else:
        assert sum(inside) <= 1  # a block that only touches may be named; never more than that


@given(BANDS, st.integers(0, 9), st.integers(1, 5), st.integers(0, 9), st.integers(1, 5))
@settings(max_examples=150)
def test_full_blocks_are_full(band, q_start, rows, k_start, keys):
    """None that isn't is said to be full, or empty; of a plain band it is always known."""
    block = q_start, q_start + rows, k_start, k_start + keys
    seen = [sees(band, i, j) for i in range(q_start, q_start + rows) for j in range(k_start, k_start + keys)]
    full, met = bool(band.is_full_block(*block)), bool(band.meets(*block))
    assert full <= all(seen) and met >= any(seen)
    if band.also is None and (None in (band.left, band.right) or band.left + band.right >= 0):
        assert full == all(seen) and met == any(seen)


def test_a_mask_as_one_expects_it_to_skip():
    """Prefix-LM: of queries 512 .. 1024 no key from 1024 on is met, and the prefix is full; chunks leave all others out."""
    prefix = Band.make(False, None, Causal() | Prefix(256))
    first, last = prefix.keys_met(512, 1024, Places((0,), 4096), 256)
    assert (int(first), int(last)) == (0, 4)
    assert prefix.is_full_block(512, 1024, 0, 256) and not prefix.is_full_block(512, 1024, 512, 768)
    first, last = prefix.queries_met(512, 768, Places((0,), 4096), 256)
    assert (int(first), int(last)) == (2, 16)
    chunks = Band.make(True, None, Chunks(1024))
    first, last = chunks.keys_met(2048, 2304, Places((0,), 4096), 256)
    assert (int(first), int(last)) == (8, 9) and (chunks.left, chunks.right) == (1023, 0)


def test_a_band_says_what_it_is():
    assert str(Band.make(True, None, Chunks(8))) == "window(7, 0) & Chunks(length=8)"
    assert str(Band.make(False, None, Causal() | Prefix(3))) == "(Window(left=None, right=0) | Prefix(length=3))"
    assert str(Band.make(True, None, lambda q, k: q == k)) == "causal & <lambda>"
    assert Band.make(False, None, Causal()) == Band.make(True, None)


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


@pytest.mark.parametrize("apart", [-8, 0, 12])
@pytest.mark.parametrize("sides", [(None, None), (None, 0), (3, 0), (None, 5), (4, None)], ids=str)
def test_pairs_are_those_of_the_blocks_with_a_seen_one(sides, apart):
    left, right = sides
    query, key = np.arange(16)[:, None] + apart, np.arange(32)
    seen = (key >= query - (100 if left is None else left)) & (key <= query + (100 if right is None else right))
    met = seen.reshape(4, 4, 4, 8).any((1, 3))
    assert Band(left, right).met(16, 32, 4, 8, apart) == 4 * 8 * met.sum()
