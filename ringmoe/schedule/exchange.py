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

from ringmoe.plan.base import Ring
from ringmoe.plan.experts import MOST_ROUNDS, ExpertPlan
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


def visit(plan: ExpertPlan, work: Callable, rows, weights, order: Sorted | None = None):
    """`work(rows, weights)` where the experts are, of rows that are sent there, and its results sent home.

    Args:
        work: rows [e, R, ...] by own expert (sorted: [n, ...]), the experts' arrays -> (results, kept): pytrees of the same
            leading dims, of which the results travel and what is kept stays.
        rows: a pytree of [v, r, ...] by visible expert; sorted, with `order`: of [P, r, ...] by destination.

    Returns:
        `(results, kept)`: the results as `rows` lie; a list of what was kept, of each piece or of all.
    """
    if plan.ring.size > 1:
        return _in_pieces(plan.ring, work, rows, weights)
    rows = jax.tree.map(lambda a: _to_experts(plan, a, order), rows)
    with jax.named_scope("experts"):
        results, kept = work(rows, weights)
    return jax.tree.map(lambda a: _to_tokens(plan, a, order), results), [kept]


def _to_experts(plan: ExpertPlan, rows, order: Sorted | None):
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
        return sum_of_rows(rows.reshape(-1, *rows.shape[3:]), order.came[:, None], order.went[:, None])


def _to_tokens(plan: ExpertPlan, rows, order: Sorted | None):
    """The inverse of `_to_experts`."""
    if not plan.exchange_axes:
        return rows if order is None else rows[None]
    with jax.named_scope("exchange"):
        if order is None:
            rows = jnp.moveaxis(rows.reshape(rows.shape[0], plan.num_exchange, -1, *rows.shape[2:]), 1, 0)
        else:
            rows = sum_of_rows(rows, order.went[:, None], order.came[:, None])
            rows = rows.reshape(plan.num_exchange, 1, -1, *rows.shape[1:])
        rows = lax.all_to_all(rows, plan.exchange_axes, 0, 0)
        return rows.reshape(-1, *rows.shape[2:])


def _in_pieces(ring: Ring, work: Callable, rows, weights):
    """`visit`, piece after piece: rows [v, r, ...] are those of this device's own experts first, then those of the devices after
    it on the ring.

    The barriers keep order: XLA would start all sends before any work, and make one matmul of those that share weights.
    """
    pieces, rounds, all_kept = _split(rows, ring.size), ring.rounds(MOST_ROUNDS), []

    def travel(way, pieces, homewards=False):
        with jax.named_scope("exchange"):
            return [send(ring, piece, -s if homewards else s) for s, piece in zip(way, pieces, strict=True)]

    def step(came, after):
        came, now, _ = lax.optimization_barrier((came, weights, after))
        with jax.named_scope("experts"):
            out, kept = work(_together(came, axis=1), now)
        all_kept.append(kept)
        return _split(out, len(came), axis=1)

    under_way = [travel(way, [pieces[s] for s in way]) for way in rounds[0]]
    home = {0: step([pieces[0]], ())[0]}
    after = _corner(home[0])
    for ways, following in zip(rounds, (*rounds[1:], ())):
        leaving = [[pieces[s] for s in way] for way in following]
        arrived, leaving, _ = lax.optimization_barrier((under_way, leaving, after))
        under_way = [travel(way, those) for way, those in zip(following, leaving)]
        for way, came in zip(ways, arrived):
            out = step(came, after)
            after = _corner(out)
            home |= zip(way, travel(way, out, homewards=True))
    return _together([home[s] for s in range(ring.size)], axis=0), all_kept


def _together(trees: list, axis: int):
    return jax.tree.map(lambda *parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis), *trees)


def _split(tree, n: int, axis: int = 0) -> list:
    """Every array in n pieces along a dim."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef.unflatten(piece) for piece in zip(*(jnp.split(leaf, n, axis) for leaf in leaves))]


def _corner(tree):
    """One number of its first array, to wait for."""
    array = jax.tree.leaves(tree)[0]
    return array[(slice(0, 1),) * array.ndim]
