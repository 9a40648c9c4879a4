"""The ring: arrays travel from neighbour to neighbour while each device works on what it holds.

Hop h, device i: holds the block of device i - h, works on it, and meanwhile sends it to i + 1. The last hop sends nothing.
Where a block is cut in two, its second part goes the other way round: the one of device i + h is here in hop h, and goes to
i - 1, so that both links of a device carry, and a hop takes half the time. Where only neighbours on both sides are met, the
whole block goes both ways.
What a device owes the owner of a block (its gradients) travels one hop behind the block, so that its transfer too goes on
during the work: what arrived is added to this device's share and sent on at the start of the next hop. What a device owes
itself stays. After the last hop all goes home, behind a part of the device's own block that hop 0 left undone.
"""

import dataclasses
import functools
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

    start(ring, trees, others, distance) -> (what is under way, trees, others): the trees go `distance` places on, 1 where it is
    left out, each its way; `others` is there only once all are on their way, and the trees are those to work on meanwhile.
    finish(ring, under way, after) -> (trees, after): waited for only once `after` is there, and before anything is made of it.
    unroll: hops in one turn of a loop.
    """

    start: Callable
    finish: Callable
    unroll: int = 1


def _start(ring: Ring, trees, others, distance: int = 1):
    """Sends start before the work and nothing but the work follows them: XLA's schedulers hide them behind it."""
    return [send(ring, tree, way * distance) for way, tree in zip(WAYS, trees)], trees, others


def _finish(ring: Ring, under_way, after):
    """Else XLA hides a send behind whatever comes later, starts it accordingly late, and waits where that doesn't suffice."""
    return jax.lax.optimization_barrier((under_way, after)) if jax.tree.leaves(under_way) else (under_way, after)


BY_XLA = Travel(_start, _finish)
BY_XLA_IN_PAIRS = BY_XLA._replace(unroll=2)
"""In a loop of single hops XLA copies what a kernel wrote, and on TPU what arrived, to where that was which was read."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("n", "of"))
@dataclasses.dataclass(frozen=True)
class Part:
    """The nth of so many equal parts of a block; or what is owed its owner."""

    arrays: Any
    n: int = 0
    of: int = 1


class _Train(NamedTuple):
    """What goes one way: the part of a block that is here, what is owed its owner, and this device's last share of that."""

    block: Any
    owed: Any
    share: Any

    @property
    def total(self):
        return jax.tree.map(jnp.add, self.owed, self.share) if jax.tree.leaves(self.owed) else self.share


def _dealt(trees: Sequence, loads: int) -> list[list[list]]:
    """Arrays of trees, every so manieth of each, in so many loads."""
    return [[jax.tree.leaves(tree)[n::loads] for tree in trees] for n in range(loads)]


def _gathered(loads: Sequence[Sequence[list]], like: Sequence) -> list:
    """The inverse of `_dealt`, for trees like these."""
    found = [[None] * len(jax.tree.leaves(tree)) for tree in like]
    for n, load in enumerate(loads):
        for arrays, some in zip(found, load):
            arrays[n :: len(loads)] = some
    return [jax.tree.structure(tree).unflatten(arrays) for tree, arrays in zip(like, found)]


def walk(
    step: Callable,
    ring: Ring,
    hops: int,
    state,
    parts: Sequence[Part],
    own: Callable[[list[Part]], list[Part]],
    owed: Sequence = (),
    travel: Travel = BY_XLA,
):
    """Walks `hops` blocks past every device.

    Args:
      step: `(state, part, owner, back) -> (state, share)`: the work on a part of the block of the device whose int32 place is
        `owner`; `share` is a pytree that is summed there. That is so many places back, but where the ring closes: None in a
        loop.
      ring: the devices in the order in which blocks pass them.
      hops: blocks each device meets, 1 <= hops <= ring.size, its own first and then those of its predecessors; and, where
        two parts travel, of its successors.
      state: stays on its device; may begin as a pytree without arrays.
      parts: of this device's own block, one or two that travel in opposite directions; of fewer hops than devices two are the
        same whole block.
      own: what of `parts` the device itself works on: all of its block once, in one part or two.
      owed: zeros like the share of each of `parts`; () when nothing is owed.
      travel: how they do.

    Returns:
      `(state, owed)`: the last state, and all that is owed this device, by itself first.

    Per hop and device, `parts` go over the wire once, `owed` once from the second hop on and, of more than one hop, once at
    the end: of two hops, in which a neighbour alone owes something, only then. Where a hop works on two parts, every second
    array travels behind the second: else XLA:TPU, which starts a send as late as it thinks will do, has all of them behind it.
    """
    size, me = ring.size, place(ring)
    twice = len(parts) == 2 and hops < size
    assert not twice or 1 < hops <= (size + 1) // 2, (hops, size)

    def meanwhile(state, trees, here, h, travel=travel, distance=1):
        """(state, shares, what arrived): trees leave during the work on `here(trees)`, a load of them behind each part."""
        shares, arrived, loads = [], [], _dealt(trees, max(1, len(here(trees))))
        for n in range(len(loads)):
            with jax.named_scope("ring_send"):
                under_way, loads[n], state = travel.start(ring, loads[n], state, distance)
            back = WAYS[n] * h
            with jax.named_scope("ring_work"):
                for part in here(_gathered(loads, trees))[n : n + 1]:
                    state, share = step(state, part, (me - back) % size, back if isinstance(h, int) else None)
                    shares.append(share)
            with jax.named_scope("ring_send"):
                after = state, shares, loads[n + 1 :], arrived
                load, (state, shares, loads[n + 1 :], arrived) = travel.finish(ring, under_way, after)
            arrived.append(load)
        return state, shares, _gathered(arrived, trees)

    def hop(carry, h, last=False):
        state, trains = carry
        leaving = [(train.total, () if last else train.block) for train in trains]
        here = lambda trees: [train.block if last else block for train, (_, block) in zip(trains, trees)]
        state, shares, arrived = meanwhile(state, leaving, here, h)
        return state, [_Train(block, sums, share) for (sums, block), share in zip(arrived, shares)]

    if hops == 1:
        return meanwhile(state, [], lambda _: own(list(parts)), 0)[:2]
    trains, start, mine, left = [_Train(part, (), ()) for part in parts], 0, [], []
    # In the first hop nothing is owed yet, the own block may be cut otherwise, and a state may be nothing: no zeros.
    if owed or twice or not jax.tree.leaves(state):
        now = 1 if owed else 2
        left = own(list(parts))[now:]
        state, mine, blocks = meanwhile(state, list(parts), lambda trees: own(trees)[:now], 0)
        nothing = owed if owed and hops > 2 else [()] * len(parts)
        trains, start = [_Train(block, zeros, zeros) for block, zeros in zip(blocks, nothing)], 1
    carry = state, trains
    if start == hops - 2:
        carry = hop(carry, start)
    elif start < hops - 2:
        first, last = np.int32(start), np.int32(hops - 1)
        carry = jax.lax.fori_loop(first, last, lambda h, carry: hop(carry, h), carry, unroll=travel.unroll)
    state, trains = hop(carry, hops - 1, last=True)
    if not owed:
        return state, []
    distance = 1 if hops == size else 1 - hops  # to the owner
    home = travel if abs(distance) == 1 else BY_XLA
    totals = [train.total for train in trains]
    state, shares, arrived = meanwhile(state, totals, lambda _: left, 0, home, distance)
    return state, [*mine, *shares, *arrived]
