"""Rows travel to the devices of their experts and back: all at once, or in pieces, each under way during the work on others.

In pieces: piece s of a device is what it has for the device s places on. Its own piece, 0, is worked on first, while the
farthest travel, s and n - s together, the two ways round; then those are, while the next travel; and so on, the neighbours'
last. What was worked on goes home at once. So the wire is in use during all of the work, the longest ways during the first,
and a neighbour's way home is all that nothing hides.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.plan import ExpertPlan, Ring
from ringmoe.schedule.gather import staircase, sum_of_rows
from ringmoe.schedule.ring import send


class Sorted(NamedTuple):
    """How sorted rows lie where their experts are: rows that came, P parts of r by source, are brought together by expert."""

    counts: jax.Array  # [e] int32: how many rows each of this device's experts has
    came: jax.Array  # [P * r] int32: which of those that came lies there; past the end: none. Empty if nothing travels
    went: jax.Array  # [P * r] int32: the inverse


def sort(plan: ExpertPlan, counts) -> Sorted:
    """Of `counts` [v], the rows that this device has for each visible expert. The counts travel, as a few numbers."""
    if not plan.exchange_axes:
        return Sorted(counts, *[jnp.zeros(0, jnp.int32)] * 2)
    with jax.named_scope("exchange"):
        counts = lax.all_to_all(counts.reshape(plan.num_exchange, -1), plan.exchange_axes, 0, 0)  # [source, expert]
    length = counts.shape[0] * plan.rows
    by_source = jnp.cumsum(counts, 1, dtype=jnp.int32) - counts
    by_source += plan.rows * lax.broadcasted_iota(jnp.int32, counts.shape, 0)
    by_expert = (jnp.cumsum(counts.T, dtype=jnp.int32) - counts.T.reshape(-1)).reshape(counts.T.shape)
    at = lax.broadcasted_iota(jnp.int32, (length,), 0)
    from_source = at + staircase(by_expert.reshape(-1), (by_source.T - by_expert).reshape(-1), at)
    to_expert = at + staircase(by_source.reshape(-1), (by_expert.T - by_source).reshape(-1), at)
    filled = lax.broadcasted_iota(jnp.int32, (counts.shape[0], plan.rows), 1) < jnp.sum(counts, 1, keepdims=True)
    came = jnp.where(at < jnp.sum(counts), from_source, length)
    went = jnp.where(filled.reshape(-1), to_expert, length)
    return Sorted(jnp.sum(counts, 0, dtype=jnp.int32), came, went)


def to_experts(plan: ExpertPlan, rows, order: Sorted | None = None):
    """Rows of this device's tokens -> rows of this device's experts, from all P devices.

    Fixed: [v, r, ...] by visible expert -> [e, R, ...] by own expert, source after source.
    Sorted, with `order`: [P, r, ...] by destination -> [P * r, ...] by own expert, without gaps.
    """
    if not plan.exchange_axes:
        return rows if order is None else rows[0]
    with jax.named_scope("exchange"):
        rows = rows.reshape(plan.num_exchange, -1, *rows.shape[1:])
        rows = lax.all_to_all(rows, plan.exchange_axes, 0, 0)
        if order is None:
            return jnp.moveaxis(rows, 0, 1).reshape(rows.shape[1], -1, *rows.shape[3:])
        starts = plan.rows * lax.iota(jnp.int32, plan.num_exchange)
        rows = rows.reshape(-1, *rows.shape[3:])
        return sum_of_rows(rows, order.came[:, None], order.went[:, None], starts=starts)


def to_tokens(plan: ExpertPlan, rows, dtype, order: Sorted | None = None):
    """The inverse of `to_experts`; rows travel in `dtype`, and stay in float32 where they don't travel."""
    if not plan.exchange_axes:
        return rows if order is None else rows[None]
    with jax.named_scope("exchange"):
        rows = rows.astype(dtype)
        if order is None:
            rows = jnp.moveaxis(rows.reshape(rows.shape[0], plan.num_exchange, -1, *rows.shape[2:]), 1, 0)
        else:
            starts = jnp.cumsum(order.counts, dtype=jnp.int32) - order.counts
            rows = sum_of_rows(rows, order.went[:, None], order.came[:, None], starts=starts)
            rows = rows.reshape(plan.num_exchange, 1, -1, *rows.shape[1:])
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
