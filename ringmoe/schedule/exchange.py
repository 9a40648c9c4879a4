"""Rows travel to the devices of their experts and back, and are worked on there: all at once, or in pieces.

In pieces: a piece is some of the rows that each device has for each expert. While one is worked on, the results of the piece
before travel home and the next piece travels here, in one all-to-all: a TPU has no second one under way. What nothing hides is
the first piece's way here and the last one's way home.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.plan.experts import ExpertPlan
from ringmoe.schedule import windows


class Travel(NamedTuple):
    """How pieces travel, an all-to-all of [P, ...] by destination to the same by source.

    start(axes, arrays, others) -> (what is under way, others); `others` is there only once the arrays are on their way.
    finish(axes, under way, after) -> (arrays, after); they are waited for only once `after` is there.
    """

    start: Callable
    finish: Callable


def _start(axes, arrays, others):
    """One all-to-all for all; XLA's scheduler itself starts it before what doesn't need it."""
    together = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)
    came = jnp.split(lax.all_to_all(together, tuple(axis for axis, _ in axes), 0, 0), len(arrays), axis=1)
    return came, lax.optimization_barrier(others)


def _finish(axes, under_way, after):
    del axes
    return lax.optimization_barrier((under_way, after))


BY_XLA = Travel(_start, _finish)


def visit(plan: ExpertPlan, travel: Travel, work: Callable, sums: Callable, rows, weights, counts=None):
    """`work(rows, weights)` where the experts are, of rows that are sent there, and its results sent home.

    Args:
        travel: how rows in pieces travel; all else is sent by XLA.
        work: rows [e, R, ...] by own expert, the experts' arrays, None -> (results, kept): pytrees of which the results travel
            and what is kept stays. Of sorted rows: [n, ...], the arrays, and how many each expert has, [e].
        sums: a list of what was kept -> a pytree of arrays that are added up, over all rows.
        rows: a pytree of [v, r, D] and [v, r] by visible expert; sorted, with `counts` [v]: of [1, r, ...].

    Returns:
        `(results, sums)`: the results as `rows` lie.
    """
    work, sums = (jax.named_scope("experts")(f) for f in (work, sums))
    if counts is not None:
        return _of_sorted(plan, work, sums, rows, weights, counts)
    if plan.pieces > 1:
        return _in_pieces(plan, travel, work, sums, rows, weights)
    here = jax.tree.map(lambda a: _by_expert(plan, _at_once(plan, _by_device(plan, a))), rows)
    results, kept = work(here, weights, None)
    return jax.tree.map(lambda a: _as_sent(plan, _at_once(plan, _by_source(plan, a))), results), sums([kept])


def _of_sorted(plan: ExpertPlan, work: Callable, sums: Callable, rows, weights, counts):
    def run(rows, counts):
        results, kept = work(rows, weights, counts)
        return results, sums([kept])

    rows = jax.tree.map(lambda a: a[0], rows)
    results, found = windows.visit(plan, counts, run, rows) if plan.exchange_axes else run(rows, counts)
    return jax.tree.map(lambda a: a[None], results), found


def _in_pieces(plan: ExpertPlan, travel: Travel, work: Callable, sums: Callable, rows, weights):
    """(results, sums). Numbers, one a row, travel all at once: before the first piece, after the last.

    Both ends of a transfer keep order: XLA would send all before any work, wait for what is under way before the work that
    hides it, and make one matmul of those that share weights. Sums are of all pieces together, beneath the last way home; or,
    with `sums_each`, of each piece beneath the work on the next, and added up.
    """
    axes = tuple((axis, size) for axis, size in plan.expert_axes if axis in plan.exchange_axes)
    at_once = lambda arrays: [a if a.ndim == 4 else _at_once(plan, a) for a in arrays]

    @jax.named_scope("exchange")
    def depart(arrays, others):
        under_way, others = travel.start(axes, [a for a in arrays if a.ndim == 4], others)
        return (under_way, arrays), others

    @jax.named_scope("exchange")
    def arrive(under_way, after):
        under_way, arrays = under_way
        came, after = travel.finish(axes, under_way, after)
        came = iter(came)
        return [next(came) if a.ndim == 4 else a for a in arrays], after

    leaves, tree = jax.tree.flatten(rows)
    sent = at_once([_by_device(plan, a) for a in leaves])
    pieces = list(zip(*(jnp.split(a, plan.pieces, axis=2) for a in sent)))
    here, _ = arrive(*depart(pieces[0], ()))
    home, results, results_tree = [], [], None
    kept, total = [], None
    for following in (*pieces[1:], ()):
        ready, kept = (kept, []) if plan.sums_each else ([], kept)
        under_way, (here, now, ready) = depart([*results, *following], (here, weights, ready))
        total = _added(total, sums(ready)) if ready else total
        out, kept_of_it = work(tree.unflatten([_by_expert(plan, a) for a in here]), now, None)
        kept.append(kept_of_it)
        out, results_tree = jax.tree.flatten(out)
        came, (out, total) = arrive(under_way, ([_by_source(plan, a) for a in out], total))
        home.append(came[: len(results)])
        here, results = came[len(results) :], out
    under_way, kept[-1:] = depart(results, kept[-1:])  # the last alone: XLA would copy what it concatenates
    total = _added(total, sums(kept))
    # XLA waits for its own as late as it can, and what is held back it doesn't fuse with the sums' conversion.
    came, total = arrive(under_way, total) if plan.remote else (arrive(under_way, ())[0], total)
    results = at_once([jnp.concatenate(parts, axis=2) for parts in zip(*home[1:], came)])
    return jax.tree.unflatten(results_tree, [_as_sent(plan, a) for a in results]), total


def _added(total, more):
    return more if total is None else jax.tree.map(jnp.add, total, more)


def _at_once(plan: ExpertPlan, a):
    """[P, e, r, ...] by destination -> the same by source."""
    if not plan.exchange_axes:
        return a
    with jax.named_scope("exchange"):
        return lax.all_to_all(a, plan.exchange_axes, 0, 0)


def _by_device(plan: ExpertPlan, a):
    """[v, r, ...] by visible expert -> [P, e, r, ...], by the device that holds it."""
    return a.reshape(plan.num_exchange, -1, *a.shape[1:])


def _as_sent(plan: ExpertPlan, a):
    """The inverse."""
    return a.reshape(-1, *a.shape[2:])


def _by_expert(plan: ExpertPlan, a):
    """[P, e, r, ...] -> [e, R, ...], source after source."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])


def _by_source(plan: ExpertPlan, a):
    """The inverse."""
    return jnp.moveaxis(a.reshape(a.shape[0], plan.num_exchange, -1, *a.shape[2:]), 1, 0)
