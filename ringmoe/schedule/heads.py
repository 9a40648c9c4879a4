"""All-to-all over heads: for the work, a device holds some heads of all tokens instead of all heads of some tokens.

Key heads too few for the devices are copied to those that hold queries of their group: each gets the one head that it needs.
Source: Jacobs et al., DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.
"""

import jax
import jax.numpy as jnp

from ringmoe.meshes import Axes


def there(axes: Axes, parts: int, x):
    """An array [B, heads, t, ...] as [B, max(heads, parts) / parts, parts t, ...]."""
    if not axes:
        return x
    x = jnp.repeat(x, max(1, parts // x.shape[1]), axis=1)
    return jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)


def back(axes: Axes, x, copies: int):
    """The transpose of `there`, which copied each head so often: what the copies came to is summed."""
    if not axes:
        return x
    x = jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)
    return x.reshape(x.shape[0], -1, copies, *x.shape[2:]).sum(2)


def mine(axes: Axes, parts: int, x):
    """This device's heads of an array [B|1, heads|1, ...] that has no tokens."""
    if x.shape[1] == 1:
        return x
    size = x.shape[1] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis=1) if axes else x


def put(axes: Axes, x, heads: int):
    """The transpose of `mine`, of an array that had so many heads: zeros at those that are not this device's."""
    if x.shape[1] == heads:
        return x
    zeros = jnp.zeros((x.shape[0], heads, *x.shape[2:]), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, jax.lax.axis_index(axes) * x.shape[1], axis=1)
