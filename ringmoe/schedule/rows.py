"""Row movers: tokens to expert slots and back, on one device's arrays, by gathers alone, to any order of derivative.

The two are each other's transposes and undo each other when weights sum to one and nothing is dropped.
x is [*B, T, D]; expert, slot, weight are [*B, T, k] as in `router.Routing`; slot -1 means no row. Rows lie
    by slot, [E, R, D], R = groups * C: row (e, g * C + c) is slot c of expert e in group g; groups are whole: `slots_of`;
    packed, [P, R, D]: part p has the rows of the p-th share of the experts, by expert and in the order of the assignments,
    from row 0 on and without gaps: `packed`.

What sorts compare differs, or nobody asks in which order it comes out: a stable sort would cost XLA:TPU one more array, and
three times as long to compile (16,384 numbers, v5p: 3.2 for 0.7 s; twice that for twice as many).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.schedule.gather import count_below, staircase, sum_of_rows, take

LARGEST = 2**31 - 1


class Slots(NamedTuple):
    """Which assignment has which row, and the inverse. Assignments are counted flat over [*B, T, k], rows over [E or P, R]."""

    assignment: jax.Array  # [E or P, R] int32: what fills each row; the number of assignments where nothing does
    place: jax.Array  # [*B, T, k] int32: where each assignment's row lies; the number of rows where it has none
    starts: jax.Array | None = None  # [E] int32: where each expert's rows start, if in the order of the assignments


def slots_of(expert: jax.Array, slot: jax.Array, num_experts: int, capacity: int, group_size: int) -> Slots:
    """Both sides of (expert, slot), over `num_experts` experts.

    The slots taken of one (group, expert) are 0, 1, 2, ... without gaps, so after one sort by (expert, slot) the filled
    slots of an expert are neighbours and a start offset finds them: no scatter.
    """
    assert expert.shape[-2] % group_size == 0, f"{expert.shape}: groups of {group_size} tokens would straddle sequences"
    shape, per_group = expert.shape, group_size * expert.shape[-1]
    expert, slot = expert.reshape(-1, per_group), slot.reshape(-1, per_group)
    num_groups, num_slots = expert.shape[0], num_experts * capacity
    key = jnp.where(slot >= 0, expert * capacity + slot, num_slots)
    _, order = lax.sort((key, lax.broadcasted_iota(jnp.int32, key.shape, 1)), num_keys=1, is_stable=False)
    kept = (slot >= 0)[:, None, :] & (expert[:, None, :] == lax.broadcasted_iota(jnp.int32, (1, num_experts, 1), 1))
    count = jnp.sum(kept, axis=-1, dtype=jnp.int32).T  # [E, G]
    group = lax.broadcasted_iota(jnp.int32, (num_groups, 1), 0)
    first = jnp.cumsum(count, axis=0, dtype=jnp.int32) - count + group.T * per_group
    number = lax.broadcasted_iota(jnp.int32, (1, 1, capacity), 2)
    filled = number < count[..., None]
    order = (order + group * per_group).reshape(-1)
    assignment = jnp.where(filled, take(order, jnp.where(filled, first[..., None] + number, order.size)), order.size)
    place = jnp.where(slot >= 0, (expert * num_groups + group) * capacity + slot, num_groups * num_slots)
    return Slots(assignment.reshape(num_experts, num_groups * capacity), place.reshape(shape))


def packed(expert: jax.Array, num_experts: int, parts: int, length: int) -> tuple[Slots, jax.Array]:
    """Rows packed into `parts` parts, an equal share of the experts each, and how many rows each expert has: [E] int32.

    An assignment whose `expert` is `num_experts` has no row. No part may get more than `length`. One sort brings the
    assignments into the order of the rows, another brings each one's place back: no scatter.
    """
    flat = expert.reshape(-1)
    order, ends = _in_order(flat, num_experts)
    counts = jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))
    taken = jnp.sum(counts.reshape(parts, -1), axis=1, dtype=jnp.int32)
    first = jnp.cumsum(taken, dtype=jnp.int32) - taken
    row = lax.broadcasted_iota(jnp.int32, (parts, length), 1)
    filled = row < taken[:, None]
    assignment = jnp.where(filled, take(order, jnp.where(filled, first[:, None] + row, flat.size)), flat.size)
    rank = lax.broadcasted_iota(jnp.int32, flat.shape, 0)
    gaps = length * lax.broadcasted_iota(jnp.int32, (parts,), 0) - first  # before each part
    lies = jnp.where(rank < ends[-1], rank + staircase(first, gaps, rank), parts * length)
    _, place = lax.sort((order, lies), num_keys=1, is_stable=False)
    starts = (ends - counts).reshape(parts, -1) + gaps[:, None]
    return Slots(assignment, place.reshape(expert.shape), starts.reshape(-1)), counts


def _in_order(keys: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
    """The places of `keys`, int32 in [0, bound], in ascending order, equals as they were; where each key < bound ends there."""
    n, place = keys.size, lax.iota(jnp.int32, keys.size)
    after = lax.iota(jnp.int32, bound) + 1
    if (bound + 1) * n <= LARGEST:  # one array sorts faster than two
        both = lax.sort(keys * n + place, is_stable=False)
        return lax.rem(both, jnp.int32(n)), count_below(both, after * n)
    keys, order = lax.sort((keys, place), num_keys=2, is_stable=False)
    return order, count_below(keys, after)


def dispatch_local(x: jax.Array, slots: Slots) -> jax.Array:
    """Rows: out[e, r] = x[token of assignment[e, r]], 0 where nothing fills it; [E or P, R, D] in x's dtype."""
    return sum_of_rows(x, slots.assignment[..., None], slots.place)


def dispatch_scalars(values: jax.Array, slots: Slots) -> jax.Array:
    """One number per assignment [*B, T, k] to its row: [E or P, R], 0 where nothing fills it."""
    return sum_of_rows(values, slots.assignment[..., None], slots.place[..., None])


def combine_local(rows: jax.Array, slots: Slots, weight: jax.Array | None, dtype=None) -> jax.Array:
    """y[t] = sum over j = 0..k-1, in that order, of weight[t, j] * rows[place of (t, j)]; [*B, T, D], summed in float32 or
    float64, and returned so unless `dtype` says otherwise.

    A choice without a row adds exactly 0, unless its weight is NaN: then the token's output is NaN, and only its own.
    `weight=None` is 1 for every choice, which makes it the transpose of `dispatch_local`.
    """
    dtype = dtype or jnp.promote_types(rows.dtype, jnp.float32)
    return sum_of_rows(rows, slots.place, slots.assignment[..., None], weight, dtype, slots.starts)


def combine_scalars(values: jax.Array, slots: Slots) -> jax.Array:
    """One number per row [E or P, R] back to its assignment: [*B, T, k], 0 where it has no row."""
    return sum_of_rows(values, slots.place[..., None], slots.assignment[..., None])
