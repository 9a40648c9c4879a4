"""Row movers: tokens to expert slots and back, on one device's arrays, by gathers alone.

The two are each other's transposes and undo each other when weights sum to one and nothing is dropped.
Layout of rows: [E, R, D], R = groups * C; row (e, g * C + c) is slot c of expert e in group g. All groups are local.
x is [*B, T, D]; expert, slot, weight are [*B, T, k] as in `router.Routing`; slot -1 means no row.
"""

import jax
import jax.numpy as jnp
from jax import lax


def slot_table(expert: jax.Array, slot: jax.Array, num_experts: int, capacity: int, group_size: int) -> jax.Array:
    """The inverse of (expert, slot): which assignment fills each slot, [E, R] int32; n (their number) where none does.

    Assignments are counted flat over [*B, T, k]. The slots taken of one (group, expert) are 0, 1, 2, ... without gaps, so
    after one sort by (expert, slot) the filled slots of an expert are neighbours and a start offset finds them: no scatter.
    """
    assert expert.shape[-2] % group_size == 0, f"{expert.shape}: groups of {group_size} tokens would straddle sequences"
    per_group = group_size * expert.shape[-1]
    expert, slot = expert.reshape(-1, per_group), slot.reshape(-1, per_group)
    num_groups, num_slots = expert.shape[0], num_experts * capacity
    key = jnp.where(slot >= 0, expert * capacity + slot, num_slots)
    _, order = lax.sort((key, lax.broadcasted_iota(jnp.int32, key.shape, 1)), num_keys=1)
    kept = (slot >= 0)[:, None, :] & (expert[:, None, :] == lax.broadcasted_iota(jnp.int32, (1, num_experts, 1), 1))
    count = jnp.sum(kept, axis=-1, dtype=jnp.int32).T  # [E, G]
    first = (
        jnp.cumsum(count, axis=0, dtype=jnp.int32)
        - count
        + lax.broadcasted_iota(jnp.int32, (1, num_groups), 1) * per_group
    )
    place = lax.broadcasted_iota(jnp.int32, (1, 1, capacity), 2)
    filled = place < count[..., None]
    order = order + lax.broadcasted_iota(jnp.int32, (num_groups, 1), 0) * per_group
    table = _take(order.reshape(-1), jnp.where(filled, first[..., None] + place, order.size))
    return jnp.where(filled, table, order.size).reshape(num_experts, num_groups * capacity)


def dispatch_local(x: jax.Array, table: jax.Array, num_choices: int) -> jax.Array:
    """Rows by slot: out[e, r] = x[token of table[e, r]], 0 where the slot is empty; [E, R, D] in x's dtype."""
    return _take(x.reshape(-1, x.shape[-1]), lax.div(table, jnp.int32(num_choices)))


def dispatch_scalars(values: jax.Array, table: jax.Array) -> jax.Array:
    """One number per assignment [*B, T, k] to its slot: [E, R], 0 where the slot is empty."""
    return _take(values.reshape(-1), table)


def combine_local(
    rows: jax.Array, expert: jax.Array, slot: jax.Array, weight: jax.Array | None, capacity: int, group_size: int
) -> jax.Array:
    """y[t] = sum over j = 0..k-1, in that order, of weight[t, j] * rows[slot of (t, j)]; [*B, T, D], float32 or float64.

    A choice without a slot adds exactly 0, unless its weight is NaN: then the token's output is NaN, and only its own.
    `weight=None` is 1 for every choice, which makes it the transpose of `dispatch_local`.
    """
    acc = jnp.promote_types(rows.dtype, jnp.float32)
    flat, index = rows.reshape(-1, rows.shape[-1]), _row_index(rows, expert, slot, capacity, group_size)
    y = jnp.zeros((), acc)
    for j in range(expert.shape[-1]):
        row = _take(flat, index[..., j]).astype(acc)
        y = y + (row if weight is None else row * weight[..., j, None].astype(acc))
    return y


def combine_scalars(values: jax.Array, expert: jax.Array, slot: jax.Array, capacity: int, group_size: int) -> jax.Array:
    """One number per slot [E, R] back to its assignment: [*B, T, k], 0 where it has no slot."""
    return _take(values.reshape(-1), _row_index(values, expert, slot, capacity, group_size))


def _row_index(rows, expert, slot, capacity, group_size):
    """[*B, T, k] int32: where each choice's row lies in `rows` flattened; past the end without a slot."""
    num_rows = rows.shape[1]
    num_choices = expert.shape[-1]
    groups = (expert.size // num_choices // group_size, group_size)
    group = lax.broadcasted_iota(jnp.int32, groups, 0).reshape(*expert.shape[:-1], 1)
    index = expert * num_rows + group * capacity + slot
    return jnp.where(slot >= 0, index, rows.shape[0] * num_rows)


def _take(x, index):
    """x[index] along the first dim; 0 where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
