"""The ring: arrays travel from neighbour to neighbour while each device works on what it holds.

Hop h, device i: holds the block of device i - h, works on it, and meanwhile sends it to i + 1. The last hop sends nothing.
Where a block is cut in two, its second part goes the other way round: the one of device i + h is here in hop h, and goes to
i - 1, so that both links of a device carry, and a hop takes half the time. Where only neighbours on both sides are met, the
whole block goes both ways.
What a device owes the owner of a block (its gradients) travels one hop behind the block, so that its transfer too goes on
during the work: what arrived is added to this device's share and sent on at the start of the next hop.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.plan.base import Ring

WAYS = (1, -1)
"""Places that the first and the second part of a block move on in a hop."""


def place(ring: Ring):
    """This device's."""
    if ring.size == 1:
        return np.int32(0)  # a number, for what a kernel reckons with
    index = jax.lax.axis_index(ring.axes)
    return index // np.int32(ring.abreast) if ring.abreast > 1 else index


def exchange(ring: Ring, tree, to: Callable[[int], int]):
    """Every device's arrays to another: place i's to place `to(i)`."""
    devices = np.reshape(ring.devices, (ring.size, ring.abreast)).tolist()
    pairs = [pair for i in range(ring.size) for pair in zip(devices[i], devices[to(i)])]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.mesh_order, pairs), tree)


def send(ring: Ring, tree, distance: int = 1):
    """Every device's arrays to the device `distance` places on; what it gets is from the one as far back."""
    return exchange(ring, tree, lambda i: (i + distance) % ring.size)


class Travel(NamedTuple):
    """How a hop's blocks, and what is owed, travel: lists of pytrees, one for each of WAYS.

    start(ring, trees, others) -> (what is under way, trees, others): `others` is there only once all are on their way, and the
    trees are those to work on meanwhile.
    beside(under way, others) -> (under way, others), between two kernels of one hop.
    finish(ring, under way, after) -> (trees, after): waited for only once `after` is there.
    """

    start: Callable
    beside: Callable
    finish: Callable


def _start(ring: Ring, trees, others):
    """Sends start before the work and nothing but the work follows them: XLA's schedulers hide them behind it."""
    return [send(ring, tree, way) for way, tree in zip(WAYS, trees)], trees, others


def _beside(under_way, others):
    """Else XLA starts half of the sends late, and waits for them: blocks first."""
    (blocks, others) = jax.lax.optimization_barrier(([tree[-1] for tree in under_way], others))
    return [(*tree[:-1], block) for tree, block in zip(under_way, blocks)], others


BY_XLA = Travel(_start, _beside, lambda ring, under_way, after: (under_way, after))


class _Train(NamedTuple):
    """What goes one way: the part of a block that is here, what is owed its owner, and this device's last share of that."""

    block: Any
    owed: Any
    share: Any


def walk(
    step: Callable, ring: Ring, hops: int, state, parts: Sequence, owed: Sequence = ((), ()), travel: Travel = BY_XLA
):
    """Walks `hops` blocks past every device.

    Args:
      step: `(state, part, owner, n) -> (state, share)`: the work on part n of the block of the device whose int32 place is
        `owner`; `share` is a pytree like `owed[n]` that is summed at the owner.
      ring: the devices in the order in which blocks pass them.
      hops: blocks each device meets, 1 <= hops <= ring.size, its own first and then those of its predecessors; and, where
        there are two parts, of its successors.
      state: stays on its device; may begin as a pytree without arrays.
      parts: this device's own block in one or two parts, pytrees that travel in opposite directions; of fewer hops than devices
        two parts are the same whole block, which the first hop works on once.
      owed: zeros, a pytree for each part; () when nothing is owed.
      travel: how they do.

    Returns:
      `(state, owed)`: the last state, and for each part what all devices owed this one.

    Per hop and device, `parts` go over the wire once, `owed` once from the second hop on and once at the end.
    """
    size = ring.size
    twice = len(parts) == 2 and hops < size
    assert not twice or 1 < hops <= (size + 1) // 2, (hops, size)
    me = place(ring)
    owes = bool(jax.tree.leaves(owed))

    def hop(carry, h, first=False, last=False):
        state, trains = carry
        with jax.named_scope("ring_send"):
            total = [() if first else jax.tree.map(jnp.add, train.owed, train.share) for train in trains]
            leaving = [(sums, () if last else train.block) for sums, train in zip(total, trains)]
            under_way, leaving, state = travel.start(ring, leaving, state)
            here = [train.block if last else block for train, (_, block) in zip(trains, leaving)]
        with jax.named_scope("ring_work"):
            shares = []
            for n, block in enumerate(here):
                if n and first and twice:
                    shares.append(owed[n])
                    continue
                if n and owes and not last:
                    under_way, state = travel.beside(under_way, state)
                state, share = step(state, block, (me - WAYS[n] * h) % size, n)
                shares.append(share)
        with jax.named_scope("ring_send"):
            arrived, (state, shares) = travel.finish(ring, under_way, (state, shares))
        trains = [
            _Train(here[n] if last else block, trains[n].owed if first else sums, shares[n])
            for n, (sums, block) in enumerate(arrived)
        ]
        return state, trains

    carry = (state, [_Train(part, zeros, zeros) for part, zeros in zip(parts, owed)])
    if hops > 1:
        start = 0
        # In the first hop nothing is owed yet, and a state may be nothing: no zeros.
        if owes or twice or not jax.tree.leaves(state):
            carry, start = hop(carry, 0, first=True), 1
        carry, _ = jax.lax.scan(lambda carry, h: (hop(carry, h), None), carry, jnp.arange(start, hops - 1))
    state, trains = hop(carry, hops - 1, first=hops == 1, last=True)
    total = [jax.tree.map(jnp.add, train.owed, train.share) for train in trains]
    return state, [send(ring, x, -way * (hops - 1)) if hops > 1 else x for way, x in zip(WAYS, total)]
