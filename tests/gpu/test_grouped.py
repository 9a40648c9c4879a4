"""The cases of `tests/test_grouped_gpu.py`, which interprets them, on a GPU against float64."""

import pytest

from tests.test_grouped_gpu import COUNTS, KINDS, assert_equals_the_loop, assert_is_padded, assert_is_rounded_once

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kind", KINDS)]


@pytest.mark.parametrize(("n", "counts"), COUNTS)
def test_equals_the_loop(kind, n, counts):
    assert_equals_the_loop(kind, n, counts)


def test_sums_are_rounded_once(kind):
    assert_is_rounded_once(kind)


def test_what_tiles_do_not_divide_is_padded(kind):
    assert_is_padded(kind)
