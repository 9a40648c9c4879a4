"""The ring: arrays travel from neighbour to neighbour while each device works on what it holds.

Hop h, device i: holds the block of device i - h, works on it, and meanwhile sends it to i + 1. The last hop sends nothing.
What a device owes the owner of a block (its gradients) travels one hop behind the block, so that its transfer too goes on
during the work: what arrived is added to this device's share and sent on at the start of the next hop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.plan.base import Ring


def send(ring: Ring, tree, distance: int = 1):
    """Every device's arrays to the device `distance` places on; what it gets is from the one as far back."""
    size, devices = ring.size, ring.devices
    pairs = [(devices[i], devices[(i + distance) % size]) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.mesh_order, pairs), tree)


def walk(step: Callable, ring: Ring, hops: int, state, block, owed=()):
    """Walks `hops` blocks past every device.

    Args:
      step: `(state, block, owner) -> (state, share)`: the work on one block; `owner` is the int32 index of the device whose
        block it is, `share` a pytree like `owed` that is summed at the owner.
      ring: the devices in the order in which blocks pass them.
      hops: blocks each device meets, 1 <= hops <= ring.size, its own first and then those of its predecessors.
      state: stays on its device. block: this device's own block, a pytree. owed: zeros, a pytree; () when nothing is owed.

    Returns:
      `(state, owed)`: the last state, and what all devices owed this one.

    Per hop and device, `block` goes over the wire once, `owed` once from the second hop on and once at the end.
    """
    size = ring.size
    me = jax.lax.axis_index(ring.axes) if size > 1 else np.int32(0)  # a number, for what a kernel reckons with

    def hop(carry, h, first=False, last=False):
        state, block, owed, share = carry
        # Sends start before the work and nothing but the work follows them: schedulers hide them behind it.
        with jax.named_scope("ring_send"):
            owed = owed if first else send(ring, jax.tree.map(jnp.add, owed, share))
            arrived = block if last else send(ring, block)
        with jax.named_scope("ring_work"):
            state, share = step(state, block, (me - h) % size)
        return state, arrived, owed, share

    carry = (state, block, owed, owed)
    if hops > 1:
        start = 0
        if jax.tree.leaves(owed):  # nothing is owed yet in the first hop: taken out of the loop, it sends no zeros
            carry, start = hop(carry, 0, first=True), 1
        carry, _ = jax.lax.scan(lambda carry, h: (hop(carry, h), None), carry, jnp.arange(start, hops - 1))
    state, _, owed, share = hop(carry, hops - 1, first=hops == 1, last=True)
    total = jax.tree.map(jnp.add, owed, share)
    return state, send(ring, total, -(hops - 1)) if hops > 1 else total
