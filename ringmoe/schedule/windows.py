"""Sorted rows at the devices of their experts, a window at a time: however many come to one device, its memory is bounded.

What comes to a device are the rows of all that exchange, by expert and then by source. Window w is the next `plan.window` of
them, room for somewhat more than come where routing is even: so there is one window then, and few elsewhere. Each slice, of a
source and an expert, lands where it belongs: nothing is sorted on arrival. As windows follow the experts, all devices send in
each, and one reads few experts' weights. All places follow from the counts of every device, which travel first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.plan.experts import ExpertPlan
from ringmoe.schedule.ragged import Slices, exchange


def visit(plan: ExpertPlan, counts, work: Callable, rows) -> tuple[Any, Any]:
    """`work` on the rows where their experts are, and what it makes of them back where they came from.

    Args:
        counts: [v] int32, the rows that this device has for each visible expert.
        work: rows [window, ...] by own expert, their counts [e] -> (results [window, ...], sums).
        rows: [n, ...] by visible expert. Rows, results and sums are pytrees.

    Returns:
        (results, each [n, ...] as the rows lie and zeros past them; the sums, added over all windows)

    The first window is no part of the loop over the others: so XLA may send its rows during other work, and the sums of a
    loop that doesn't run cost nothing.
    """
    routes, length = _routes(plan, counts), jax.tree.leaves(rows)[0].shape[0]

    def travel(tree, sent, came, length):
        with jax.named_scope("exchange"):
            return jax.tree.map(lambda a: exchange(a, sent, came, length, plan.exchange_axes), tree)

    def run(number):
        sent, came = routes.of_window(number, plan)
        here = travel(rows, sent, came, plan.window)
        results, sums = work(here, jnp.sum(came.size, 0, dtype=jnp.int32))
        return travel(results, came, sent, length), sums

    def another(carry):
        number, found = carry
        return number + 1, jax.tree.map(jnp.add, found, run(number))

    found = run(jnp.int32(0))
    if plan.most > plan.window:
        more = lambda carry: carry[0] < routes.windows
        _, found = lax.while_loop(more, another, (jnp.int32(1), found))
    return found


class _Routes(NamedTuple):
    """What every device knows of all rows, [s, p, e] int32: of source s for expert e of device p."""

    counts: jax.Array  # how many
    here: jax.Array  # at which of the source's rows they begin
    there: jax.Array  # and at which of all that come to the device
    windows: jax.Array  # the most that one device of these needs

    def of_window(self, number, plan: ExpertPlan) -> tuple[Slices, Slices]:
        """The part of window `number`: what this device sends, and what comes to it."""
        first, me = number * plan.window, lax.axis_index(plan.exchange_axes)
        inside = lambda row: jnp.clip(row, first, first + plan.window)
        start = inside(self.there)
        size = inside(self.there + self.counts) - start
        here, there = (jnp.where(size > 0, row, 0) for row in (self.here + start - self.there, start - first))
        mine = lambda axis, *each: Slices(*(lax.dynamic_index_in_dim(a, me, axis, keepdims=False) for a in each))
        return mine(0, size, here, there), mine(1, size, there, here)


def _routes(plan: ExpertPlan, counts) -> _Routes:
    with jax.named_scope("exchange"):
        counts = lax.all_gather(counts.reshape(plan.num_exchange, -1), plan.exchange_axes)
    by_expert = jnp.transpose(counts, (1, 2, 0))
    before = lambda a: jnp.cumsum(a.reshape(a.shape[0], -1), 1, dtype=jnp.int32).reshape(a.shape) - a
    most = jnp.max(jnp.sum(counts, (0, 2), dtype=jnp.int32))
    windows = (most + (plan.window - 1)) // plan.window
    return _Routes(counts, before(counts), jnp.transpose(before(by_expert), (2, 0, 1)), windows)
