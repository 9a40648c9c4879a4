"""The cases of `tests/test_attention_gpu.py`, which interprets them, on a GPU against the oracle in float64."""

import jax
import numpy as np
import pytest

from ringmoe.pallas import attention_gpu
from tests.test_attention_gpu import CASES, assert_is_the_oracles
from tests.test_attention_tpu_features import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
def test_each_is_the_oracles(name):
    assert_is_the_oracles(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_bits_repeat(name):
    first, second = (jax.tree.leaves(run(CASES[name], attention_gpu)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
