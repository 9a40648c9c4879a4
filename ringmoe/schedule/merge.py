"""Merge: keys stay, every device attends from all queries to its own keys, and the shares are added up.

    M = max_i lse_i      w_i = exp(lse_i - M)      O = sum_i w_i O_i / sum_i w_i      lse = M + log sum_i w_i

For queries that are few beside the keys, in decoding or for a chunk of a prompt: what is sent knows no length of the keys.
Queries that are sharded like the keys are gathered first, along `joint` axes, and sums are scattered to them.
"""

import jax
import jax.numpy as jnp

from ringmoe import softmax
from ringmoe.meshes import Axes


def gather(joint: Axes, tree, axis: int = 2):
    """Arrays with the rows of all devices along the `joint` axes."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, joint, axis=axis, tiled=True), tree) if joint else tree


def total(axes: Axes, joint: Axes, x):
    """Sums over `axes` of [B, N, rows, ...], each device's own rows of it: the way back from `gather`."""
    if joint:
        x = jax.lax.psum_scatter(x, joint, scatter_dimension=2, tiled=True)
    rest = tuple(a for a in axes if a not in joint)
    return jax.lax.psum(x, rest) if rest else x


def shares(axes: Axes, joint: Axes, output, lse, tail):
    """The three of the whole softmax, from each device's: [B, N, rows, H] and [B, N, rows], see softmax.finish."""
    # To derivatives the maximum is a constant, as in softmax.step; and finite, so that -inf of a device without keys is 0.
    most = jax.lax.pmax(jax.lax.stop_gradient(lse), axes)
    most = jnp.maximum(most, softmax.initial_max(lse.dtype))
    weight = jnp.exp(lse - most + tail)[..., None]
    both = total(axes, joint, jnp.concatenate([output * weight, weight], -1))
    if joint:
        rows = both.shape[2]
        most = jax.lax.dynamic_slice_in_dim(most, jax.lax.axis_index(joint) * rows, rows, axis=2)
    output, lse, tail = softmax.finish(both[..., :-1], most[..., None], both[..., -1:])
    return output, lse[..., 0], tail[..., 0]
