"""The cases of `tests/test_rows_gpu.py`, which interprets them, and a layer's, on a GPU against numpy."""

import pytest

from tests.test_rows_gpu import CASES, assert_equals_the_loop, small

__all__ = ["small"]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [*CASES, (8192, 2048, 8, 2**16 + 64, "bfloat16")], ids=str)
@pytest.mark.parametrize("everywhere", [True, False])
def test_equals_the_loop(small, case, everywhere):
    assert_equals_the_loop(*case, everywhere)
