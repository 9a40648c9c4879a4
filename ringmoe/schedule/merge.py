"""Merge: keys stay, every device attends from all queries to its own keys, and the shares are added up.

    M = max_i lse_i      w_i = exp(lse_i - M)      O = sum_i w_i O_i / sum_i w_i      lse = M + log sum_i w_i

For queries that are few beside the keys, in decoding or for a chunk of a prompt: what is sent knows no length of the keys.
Queries that are sharded like the keys are gathered first, along `joint` axes, and sums are scattered to them.
"""

import jax
import jax.numpy as jnp

from ringmoe import softmax
from ringmoe.meshes import Axes
from ringmoe.schedule.sums import sum_over


def gather(axes: Axes, x, axis: int):
    """An array with the rows of all devices along these axes."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def total(axes: Axes, joint: Axes, tree):
    """Sums over `axes` of arrays [B, N, rows, ...], each device's own rows of them: the way back from `gather`."""
    if joint:
        tree = jax.tree.map(lambda x: jax.lax.psum_scatter(x, joint, scatter_dimension=2, tiled=True), tree)
    return sum_over(tree, tuple(a for a in axes if a not in joint))


def shares(axes: Axes, joint: Axes, output, lse, tail):
    """The three of the whole softmax, from each device's: [B, N, rows, H] and [B, N, rows], see softmax.finish."""
    # To derivatives the maximum is a constant, as in softmax.step; and finite, so that -inf of a device without keys is 0.
    most = jax.lax.pmax(jax.lax.stop_gradient(lse), axes)
    most = jnp.maximum(most, softmax.initial_max(lse.dtype))
    weight = jnp.exp(lse - most + tail)
    output, weight = total(axes, joint, (output * weight[..., None], weight))
    if joint:
        rows = weight.shape[2]
        most = jax.lax.dynamic_slice_in_dim(most, jax.lax.axis_index(joint) * rows, rows, axis=2)
    output, lse, tail = softmax.finish(output, most[..., None], weight[..., None])
    return output, lse[..., 0], tail[..., 0]
