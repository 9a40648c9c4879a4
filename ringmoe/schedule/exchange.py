"""Rows travel to the devices of their experts and back: all at once, or in pieces, each under way during the work on others.

In pieces: piece s of a device is what it has for the device s places on. Its own piece, 0, is worked on first, while the
farthest travel, s and n - s together, the two ways round; then those are, while the next travel; and so on, the neighbours'
last. What was worked on goes home at once. So the wire is in use during all of the work, the longest ways during the first,
and a neighbour's way home is all that nothing hides.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.plan import ExpertPlan, Ring
from ringmoe.schedule.ring import send


def to_experts(plan: ExpertPlan, rows):
    """Rows of this device's tokens, [v, r, ...] by visible expert -> rows of this device's experts, [e, R, ...] by own expert
    and source after source, from all P devices."""
    if not plan.exchange_axes:
        return rows
    with jax.named_scope("exchange"):
        rows = rows.reshape(plan.num_exchange, -1, *rows.shape[1:])
        rows = lax.all_to_all(rows, plan.exchange_axes, 0, 0)
        return jnp.moveaxis(rows, 0, 1).reshape(rows.shape[1], -1, *rows.shape[3:])


def to_tokens(plan: ExpertPlan, rows, dtype):
    """The inverse of `to_experts`; rows travel in `dtype`, and stay in float32 where they don't travel."""
    if not plan.exchange_axes:
        return rows
    with jax.named_scope("exchange"):
        rows = rows.astype(dtype)
        rows = jnp.moveaxis(rows.reshape(rows.shape[0], plan.num_exchange, -1, *rows.shape[2:]), 1, 0)
        rows = lax.all_to_all(rows, plan.exchange_axes, 0, 0)
        return rows.reshape(-1, *rows.shape[2:])


def visit_in_pieces(ring: Ring, work: Callable, rows, weights):
    """`work(rows, weights)` of each piece where its experts are.

    Args:
        work: [e, r, D] rows, the experts' arrays -> [e, r, D] in the dtype that travels.
        rows: [v, r, D] by visible expert, this device's own ones first and then those of the devices after it on the ring.

    Returns:
        [v, r, D] in the order of the rows.

    The barriers keep order: XLA would start all sends before any work, and make one matmul of those that share weights.
    """
    n = ring.size
    pieces = jnp.split(rows, n)
    both_ways = [tuple(dict.fromkeys((s, n - s))) for s in range(n // 2, 0, -1)]

    def travel(piece, distance):
        with jax.named_scope("exchange"):
            return send(ring, piece, distance)

    def step(piece, after):
        piece, now, _ = lax.optimization_barrier((piece, weights, after))
        with jax.named_scope("experts"):
            return work(piece, now)

    arrived = [travel(pieces[s], s) for s in both_ways[0]]
    home = {0: step(pieces[0], ())}
    after = _corner(home[0])
    for pair, following in zip(both_ways, (*both_ways[1:], ())):
        leaving = [pieces[s] for s in following]
        here, leaving, _ = lax.optimization_barrier((arrived, leaving, after))
        arrived = [travel(piece, s) for s, piece in zip(following, leaving)]
        for s, piece in zip(pair, here):
            out = step(piece, after)
            after, home[s] = _corner(out), travel(out, -s)
    return jnp.concatenate([home[s] for s in range(n)])


def _corner(array):
    """One number of it, to wait for."""
    return array[(slice(0, 1),) * array.ndim]
