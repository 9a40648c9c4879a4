"""Rows travel to the devices of their experts and back, and are worked on there: all at once, or in pieces.

In pieces: a piece is some of the rows that each device has for each expert. While one is worked on, the results of the piece
before travel home, and then the next one travels here, each beneath its share of the work: a TPU has one all-to-all under way
at a time. What nothing hides is the first piece's way here and the last one's way home.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.plan.experts import ExpertPlan
from ringmoe.schedule import windows


def visit(plan: ExpertPlan, work: Callable, sums: Callable, rows, weights, counts=None):
    """`work(rows, weights)` where the experts are, of rows that are sent there, and its results sent home.

    Args:
        work: rows [e, R, ...] by own expert, the experts' arrays, None -> (results, kept): pytrees of which the results travel
            and what is kept stays. Of sorted rows: [n, ...], the arrays, and how many each expert has, [e].
        sums: a list of what was kept -> a pytree of arrays that are added up, over all rows.
        rows: a tuple of pytrees of [v, r, ...] by visible expert; sorted, with `counts` [v]: of [1, r, ...]. Of a piece each
            member travels beneath a part of the work of its own.

    Returns:
        `(results, sums)`: the results as `rows` lie.
    """
    if counts is not None:
        return _of_sorted(plan, work, sums, rows, weights, counts)
    if plan.pieces > 1:
        results, kept = _in_pieces(plan, work, rows, weights)
    else:
        results, kept = _worked(work, _by_expert(plan, _to_experts(plan, rows)), weights, None)
        results, kept = _to_tokens(plan, results), [kept]
    with jax.named_scope("experts"):
        return results, sums(kept)


def _of_sorted(plan: ExpertPlan, work: Callable, sums: Callable, rows, weights, counts):
    def run(rows, counts):
        results, kept = _worked(work, rows, weights, counts)
        with jax.named_scope("experts"):
            return results, sums([kept])

    rows = jax.tree.map(lambda a: a[0], rows)
    results, found = windows.visit(plan, counts, run, rows) if plan.exchange_axes else run(rows, counts)
    return jax.tree.map(lambda a: a[None], results), found


def _worked(work, rows, weights, counts):
    with jax.named_scope("experts"):
        return work(rows, weights, counts)


def _in_pieces(plan: ExpertPlan, work: Callable, rows, weights):
    """(results, what was kept of each part of each piece).

    The barriers keep order: XLA would send all before any work, wait for what is under way before the work that hides it, and
    make one matmul of those that share weights.
    """
    pieces, kept, home = _split(rows, plan.pieces), [], []

    def part(came, after):
        came, now, _ = lax.optimization_barrier((came, weights, after))
        out, kept_of_it = _worked(work, came, now, None)
        kept.append(kept_of_it)
        return out

    here, done = _to_experts(plan, pieces[0]), None
    for following in (*pieces[1:], None):
        if done is not None:
            here, done = lax.optimization_barrier((here, done))
            home.append(_to_tokens(plan, done))
        first, *parts = _split(_by_expert(plan, here), 1 + len(rows))
        outs, arrived = [part(first, ())], []
        for i, came in enumerate(parts):
            after = _corner(outs[-1])
            if following is not None:  # once the transfer before it has come; what isn't taken out, XLA leaves out
                before = arrived or home
                came, leaving, after, before[:] = lax.optimization_barrier((came, following[i], after, before))
                arrived.append(_to_experts(plan, leaving))
            outs.append(part(came, after))
        here, done = tuple(arrived), _together(outs)
    return _together([*home, _to_tokens(plan, done)]), kept


def _to_experts(plan: ExpertPlan, rows):
    """Rows of this device's tokens, [v, r, ...] by visible expert -> rows of this device's experts, from all P devices: [P, e, r,
    ...] by source. Where nothing travels, as they are."""
    return _exchanged(
        plan, lambda a: lax.all_to_all(a.reshape(plan.num_exchange, -1, *a.shape[1:]), plan.exchange_axes, 0, 0), rows
    )


def _by_expert(plan: ExpertPlan, rows):
    """Those rows [e, R, ...], source after source."""
    return _exchanged(plan, lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), rows)


def _to_tokens(plan: ExpertPlan, rows):
    """The inverse of both."""

    def travel(rows):
        rows = jnp.moveaxis(rows.reshape(rows.shape[0], plan.num_exchange, -1, *rows.shape[2:]), 1, 0)
        rows = lax.all_to_all(rows, plan.exchange_axes, 0, 0)
        return rows.reshape(-1, *rows.shape[2:])

    return _exchanged(plan, travel, rows)


def _exchanged(plan: ExpertPlan, travel: Callable, tree):
    if not plan.exchange_axes:
        return tree
    with jax.named_scope("exchange"):
        return jax.tree.map(travel, tree)


def _split(tree, parts: int) -> list:
    """Every array in parts along its rows, dim 1, which may not be equal."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef.unflatten(part) for part in zip(*(jnp.array_split(leaf, parts, axis=1) for leaf in leaves))]


def _together(trees: list):
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *trees)


def _corner(tree):
    """One number of its first array, to wait for."""
    array = jax.tree.leaves(tree)[0]
    return array[(slice(0, 1),) * array.ndim]
