"""Balanced places: a causal ring in which every device has as much to do in every hop.

Of blocks in natural order the first device's queries see one block and the last one's all P. So device i swaps the second half
of its block with device P - 1 - i, and holds chunks 2 i and 2 (P - 1 - i) + 1 of the 2 P, in ascending order: their numbers add
up to 2 P - 1 on every device. Of two devices one's chunks then lie about the other's, a < c < d < b: queries a see none of the
keys c and d, b sees both; c and d see keys a and not b. In every hop but the first half of all pairs are seen.
Half of an array is sent, once there and once back; on P devices in a circle the farthest are P / 2 links apart.
"""

import jax
import jax.numpy as jnp

from ringmoe.plan.base import Ring
from ringmoe.schedule.ring import exchange, place


def starts(ring: Ring, device, length: int):
    """Where the two chunks of a device's `length` begin."""
    kept, received = device * length, (ring.size - 1 - device) * length + length // 2
    low = _low(ring, device)
    return jnp.where(low, kept, received), jnp.where(low, received, kept)


def there(ring: Ring, tree, axis: int):
    """Arrays whose dim `axis` is this device's block, with the device's two chunks there instead."""

    def one(x):
        kept, second = jnp.split(x, 2, axis)
        return jnp.concatenate(_swapped(ring, kept, _mirrored(ring, second)), axis)

    return jax.tree.map(one, tree)


def back(ring: Ring, tree, axis: int):
    """The inverse of `there`."""

    def one(x):
        kept, received = _swapped(ring, *jnp.split(x, 2, axis))
        return jnp.concatenate([kept, _mirrored(ring, received)], axis)

    return jax.tree.map(one, tree)


def _low(ring: Ring, device):
    """Whether what the device keeps comes before what it receives."""
    return 2 * device < ring.size


def _swapped(ring: Ring, x, y):
    """What this device keeps and what it receives, in ascending order; and the way back."""
    low = _low(ring, place(ring))
    return jnp.where(low, x, y), jnp.where(low, y, x)


def _mirrored(ring: Ring, x):
    with jax.named_scope("balance"):
        return exchange(ring, x, lambda i: ring.size - 1 - i)
