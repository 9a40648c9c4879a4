"""Places in the experts' queues: how many choices of the same expert come before a choice.

A group's choices stand in a sequence, which is cut into blocks of a few tokens. A choice's place is how many of its block come
before it, plus how many of its expert are in earlier blocks: an exclusive prefix sum of the blocks' counts, the one step that
looks beyond a block. So where a group is cut by devices all that they exchange is counts, and places are integers, the same
on every mesh. A block's counts are a product of one-hot digits, on the matrix unit.
Symbols: T tokens, k choices of each, E experts, n tokens of a block, m choices of a block, e = high * radix + low.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ringmoe import rules
from ringmoe.meshes import Axes
from ringmoe.router.choose import at_experts

MOST_TOKENS = 32  # of a block: m^2 comparisons each, against E counts
FEW = 8  # blocks, each of which adds up those before it


def histogram(expert: jax.Array, num_experts: int, weights: jax.Array | None = None) -> jax.Array:
    """[*, m] int32 -> [*, E]: how often each expert occurs, int32; anything else counts nowhere.

    Of weights [*, s, m] their sums, float32 [*, s, E].
    """
    high, low = _digits(expert, num_experts)
    if weights is None:
        counts = jnp.einsum("...mh,...ml->...hl", high, low).astype(jnp.int32)
    else:
        high = high[..., None, :, :] * weights[..., None]
        counts = jnp.einsum("...smh,...ml->...shl", high, low, precision=lax.Precision.HIGHEST)
    return counts.reshape(*counts.shape[:-2], high.shape[-1] ** 2)[..., :num_experts]


def _digits(expert, num_experts):
    """One-hot (high, low), zeros for no expert."""
    radix = math.isqrt(num_experts - 1) + 1
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, -1)
    hot = lambda digit: jax.nn.one_hot(digit, radix, dtype=jnp.float32)
    return hot(jnp.where(expert < 0, -1, lax.div(expert, jnp.int32(radix)))), hot(lax.rem(expert, jnp.int32(radix)))


def places(expert: jax.Array, num_experts: int, group_size: int, by_choice: bool, axes: Axes = ()) -> jax.Array:
    """Place of each choice in the queue of its group and expert: [*B, T, k] int32, of [*B, T, k] int32, -1 for no choice.

    Args:
        group_size: consecutive tokens of a sequence, or all B * T.
        by_choice: all first choices of a group come before all second ones; else a token's choices follow each other.
        axes: mesh axes over which the caller's shard_map splits the sequence.
    """
    if expert.size == 0:
        return expert
    blocks = in_blocks(expert, group_size)
    shape, n, k = blocks.shape, *blocks.shape[-2:]
    blocks = jnp.swapaxes(blocks, -1, -2) if by_choice else blocks.reshape(*shape[:-2], 1, n * k)
    before = _before(histogram(blocks, num_experts), group_size // n, axes)
    m = blocks.shape[-1]
    earlier = lax.broadcast_to_rank(jnp.tri(m, k=-1, dtype=bool), blocks.ndim + 1)
    same = (blocks[..., :, None] == blocks[..., None, :]) & earlier
    place = jnp.sum(same, -1, dtype=jnp.int32) + at_experts(before, blocks)
    return (jnp.swapaxes(place, -1, -2) if by_choice else place.reshape(shape)).reshape(expert.shape)


def places_by_value(
    expert: jax.Array, value: jax.Array, num_experts: int, group_size: int, by_choice: bool, axes: Axes = ()
) -> jax.Array:
    """The same with a group's tokens in the order of `value` [*B, T], the largest first. Two sorts, and no gather."""
    together, put_back = _together(jnp.concatenate([expert, _sortable(value)[..., None]], -1), -2, group_size, axes)
    grouped = _grouped(together, -2, group_size)
    *columns, key = jnp.unstack(grouped, axis=-1)
    here = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1) + 0 * key  # lies as the key does
    _, here, *columns = lax.sort((key, here, *columns), num_keys=2, is_stable=False)
    found = places(jnp.stack(columns, -1), num_experts, group_size, by_choice)
    _, *columns = lax.sort((here, *jnp.unstack(found, axis=-1)), num_keys=1, is_stable=False)
    return put_back(jnp.stack(columns, -1).reshape(*together.shape[:-1], -1))


def held(x: jax.Array) -> tuple[int, ...]:
    """The shape of one device's part, as far as the type tells."""
    sharding = jax.typeof(x).sharding  # whose shard_shape fails where some axes are manual
    parts = [math.prod(sharding.mesh.shape[a] for a in axes) for axes in rules.axes_of(sharding.spec, x.ndim)]
    return tuple(n // k for n, k in zip(x.shape, parts))


def largest_divisor(of: int, most: int) -> int:
    return max(n for n in range(1, min(of, most) + 1) if of % n == 0)


def in_blocks(x: jax.Array, group_size: int, most: int = MOST_TOKENS) -> jax.Array:
    """[*B, T, k] -> [*B, blocks, n, k]: n is the largest divisor of the group and of a device's tokens up to `most`."""
    n = largest_divisor(math.gcd(held(x)[-2], group_size) or 1, most)  # 0 tokens are divided by all
    return x.reshape(*x.shape[:-2], x.shape[-2] // n, n, x.shape[-1])


def _sortable(value):
    """float32 -> int32 that grows as the value falls."""
    bits = lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits & jnp.int32(0x7FFFFFFF), ~bits)


def _before(counts, per_group, axes):
    """Counts [*B, blocks, c, E] of the blocks' choices -> how many of their group come before, c-major within a group.

    Within a few blocks by as many sums; of the few, whose totals are what devices exchange, by one prefix sum.
    """
    few = largest_divisor(math.gcd(held(counts)[-3], per_group), FEW)
    fews = counts.reshape(*counts.shape[:-3], -1, few, *counts.shape[-2:])
    earlier = lax.broadcast_to_rank(np.tri(few, k=-1, dtype=bool)[..., None, None], fews.ndim + 1)
    inside = jnp.sum(jnp.where(earlier, fews[..., None, :, :, :], 0), -3, dtype=jnp.int32)
    totals, put_back = _together(jnp.sum(fews, -3, dtype=jnp.int32), -3, per_group // few, axes)
    order = jnp.swapaxes(_grouped(totals, -3, per_group // few), -2, -3)
    flat = order.reshape(*order.shape[:-3], -1, order.shape[-1])
    prefix = (jnp.cumsum(flat, -2, dtype=jnp.int32) - flat).reshape(order.shape)
    outside = put_back(jnp.swapaxes(prefix, -2, -3).reshape(totals.shape))
    return (inside + outside[..., None, :, :]).reshape(counts.shape)


def _grouped(x, dim, per_group):
    """`x` [*B, n, ...] with n at `dim` -> [*B, n / per_group, per_group, ...], or [1, per_group, ...] if all compete."""
    *batch, n = x.shape[: x.ndim + dim + 1]
    groups = (*batch, n // per_group) if n % per_group == 0 else (1,)
    return x.reshape(*groups, per_group, *x.shape[x.ndim + dim + 1 :])


def _together(x, dim, per_group, axes):
    """`x` where the whole of a group is in reach, and the way back to each device's own part. `x` is small."""
    dim, mine = dim % x.ndim, x.shape[dim]
    if axes and mine % per_group:
        gathered = lax.all_gather(x, axes, axis=dim, tiled=True)
        return gathered, lambda y: lax.dynamic_slice_in_dim(y, lax.axis_index(axes) * mine, mine, dim)
    sharding, local = jax.typeof(x).sharding, held(x)
    cut = local[dim] % per_group if mine % per_group == 0 else local != x.shape
    if not cut:
        return x, lambda y: y
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(x, everywhere), lambda y: jax.sharding.reshard(y, sharding)
