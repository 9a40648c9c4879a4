"""What several test files share: tolerances and comparisons."""

import jax.numpy as jnp
import numpy as np

# Largest allowed difference, absolute and relative, of a result and of a gradient computed from inputs of this dtype.
TOLERANCE = {
    jnp.dtype(jnp.bfloat16): (2e-2, 6e-2),
    jnp.dtype(jnp.float16): (2e-3, 8e-3),
    jnp.dtype(jnp.float32): (1e-5, 1e-4),
    jnp.dtype(jnp.float64): (1e-12, 1e-11),
}


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Equal shapes, equal infinities, no NaN where none is expected, and close elsewhere."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: {actual.shape=}, {expected.shape=}"
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=name)
