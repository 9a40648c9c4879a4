"""All-to-all over heads: for the work, a device holds some heads of all tokens instead of all heads of some tokens.

Key heads too few for the devices are copied to those that hold queries of their group: each gets the one head that it needs.
Source: Jacobs et al., DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.
"""

import jax
import jax.numpy as jnp

from ringmoe.plan.base import Group


def there(group: Group, x):
    """An array [B, heads, t, ...] as [B, max(heads, parts) / parts, parts t, ...], of a group of so many parts."""
    if group.size == 1:
        return x
    x = jnp.repeat(x, max(1, group.size // x.shape[1]), axis=1)
    return _exchanged(group, x, 1, 2)


def back(group: Group, x, copies: int):
    """The transpose of `there`, which copied each head so often: what the copies came to is summed."""
    if group.size == 1:
        return x
    x = _exchanged(group, x, 2, 1)
    return x.reshape(x.shape[0], -1, copies, *x.shape[2:]).sum(2)


def tokens(group: Group, x, axis: int):
    """Of an array without heads, what all devices of the group hold."""
    if group.size == 1:
        return x
    return jax.lax.all_gather(x, group.axes, axis_index_groups=group.indices, axis=axis, tiled=True)


def mine(group: Group, x):
    """This device's heads of an array [B|1, heads|1, ...] that has no tokens."""
    if x.shape[1] == 1 or group.size == 1:
        return x
    size = x.shape[1] // group.size
    return jax.lax.dynamic_slice_in_dim(x, _part(group) * size, size, axis=1)


def put(group: Group, x, heads: int):
    """The transpose of `mine`, of an array that had so many heads: zeros at those that are not this device's."""
    if x.shape[1] == heads:
        return x
    zeros = jnp.zeros((x.shape[0], heads, *x.shape[2:]), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, _part(group) * x.shape[1], axis=1)


def _exchanged(group: Group, x, split: int, concat: int):
    groups = group.indices
    return jax.lax.all_to_all(x, group.axes, split, concat, axis_index_groups=groups, tiled=True)


def _part(group: Group):
    """Which part of the heads is this device's."""
    return jax.lax.axis_index(group.axes) % group.size
