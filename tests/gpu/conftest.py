"""Kernels of Hopper GPUs on one that is there: `JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu`; skipped elsewhere."""

import jax
import pytest

from ringmoe.pallas.hopper import is_hopper


@pytest.fixture(autouse=True, scope="session")
def hopper():
    device = jax.devices()[0].device_kind
    if not is_hopper(device):
        pytest.skip(f"needs a Hopper GPU (with JAX_PLATFORMS=cuda,cpu), the first device is {device!r}")
