"""Attention on one device of a mesh: which blocks of keys meet the local queries, and in which order.

Arrays are local and in the public layouts: query [*batch, t, N, H], key and value [*batch, s, K, H], lse and delta
[*batch, t, N]. Extras come whole along the keys and are cut to each hop's columns here. `_Moves` brings arrays to where the
plan has them worked on, and results back: kernels are told where pieces stand, and know no more.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.plan.attention import AttentionPlan
from ringmoe.schedule import balance, heads, merge, pages
from ringmoe.schedule.ring import BY_XLA, Part, Travel, place, walk
from ringmoe.schedule.sums import sum_over


def forward(
    plan: AttentionPlan,
    kernel: ModuleType,
    spec: AttentionSpec,
    query,
    key,
    value,
    extras: Extras,
    travel: Travel = BY_XLA,
):
    """Returns output [*batch, t, N, V] in query's dtype, and in the accumulator's the LSE [*batch, t, N] and its tail: see
    softmax.finish."""
    moves = _Moves(plan)
    q, k, v = moves.queries(_head_major(query)), *map(moves.keys, map(_head_major, (key, value)))
    blocks = _Blocks(plan, query, key, q, k, extras)

    def step(state, part, owner, back):
        k, v, scales = part.arrays
        here, at = blocks.here(owner, part, back)
        return kernel.forward(spec, state, q, k, v, here._replace(**scales), at), ()

    parts = blocks.travelling(blocks.gather((k, v, moves.scales(extras))))
    state, _ = walk(step, plan.ring, plan.hops, kernel.init(spec, q, v), parts, blocks.own, travel=travel)
    output, lse, tail = kernel.finish(spec, state)
    if plan.exchange == "merge":
        output, lse, tail = merge.shares(plan.axes, plan.joint_axes, output, lse, tail)
    if blocks.sinks is not None:
        output, lse, tail = softmax.with_sink(output, lse, tail, blocks.sinks[:, :, None].astype(lse.dtype))
    per_row = lambda x: moves.back(x, x.dtype).swapaxes(1, 2).reshape(*query.shape[:-1])
    return _public(moves.back(output, query.dtype), query), *map(per_row, (lse, tail))


def backward(
    plan: AttentionPlan,
    kernel: ModuleType,
    spec: AttentionSpec,
    query,
    key,
    value,
    lse,
    tail,
    do,
    delta,
    extras: Extras,
    travel: Travel = BY_XLA,
):
    """Returns dq, dk, dv in the dtypes of query, key and value, and dbias or None.

    `lse` and `delta` (sum(do * output) - dlse) are those of the whole softmax: each hop's share is then final.
    """
    # p = exp(s - lse - tail), and all gradients are linear in p do and p delta: the tail's factor goes to do and delta.
    factor = jnp.exp(-tail)
    do, delta = (do * factor[..., None]).astype(do.dtype), delta * factor
    moves = _Moves(plan)
    q, do_ = (moves.queries(_head_major(x)) for x in (query, do))
    k, v = (moves.keys(_head_major(x)) for x in (key, value))
    lse_, delta_ = (moves.queries(x.reshape(-1, *x.shape[-2:]).swapaxes(1, 2)) for x in (lse, delta))
    blocks = _Blocks(plan, query, key, q, k, extras)
    acc = lambda x: jnp.zeros_like(x, jnp.promote_types(query.dtype, jnp.float32))
    parts = blocks.travelling(blocks.gather((k, v, moves.scales(extras))))

    def step(state, part, owner, back):
        dq, dbias = state
        k, v, scales = part.arrays
        here, at = blocks.here(owner, part, back)
        here = here._replace(**scales)
        grads = kernel.backward(spec, dq, q, k, v, do_, lse_, delta_, here, at)
        # Of two hops a neighbour's share is all that goes home, and rounded once, as the sum of both is there.
        sent = query.dtype if plan.hops == 2 and back else grads.dk.dtype
        share = dataclasses.replace(part, arrays=(grads.dk.astype(sent), grads.dv.astype(sent)))
        return (grads.dq, blocks.add_columns(dbias, grads.dbias, at.key)), share

    dbias = acc(blocks.whole.bias) if spec.bias_gradient else None
    owed = [dataclasses.replace(part, arrays=jax.tree.map(acc, part.arrays[:2])) for part in parts]
    (dq, dbias), dkv = walk(step, plan.ring, plan.hops, (None, dbias), parts, blocks.own, owed, travel)
    dq = merge.total(plan.axes, plan.joint_axes, dq) if plan.exchange == "merge" else dq
    dbias = None if dbias is None else blocks.bias_gradient(dbias, extras.bias)
    like = (query, key, value)
    grads = (moves.back(grad, x.dtype, x.shape[-2]) for grad, x in zip((dq, *blocks.reduce(blocks.join(dkv))), like))
    return *map(_public, grads, like), dbias


PER_HEAD = ("slopes", "sinks")  # extras without batch dims
WITH_KEYS = ("key_scales", "value_scales")  # those that travel


class _Moves:
    """Arrays [B, N, t, ...] on their way to where the plan has them worked on, and back."""

    def __init__(self, plan: AttentionPlan):
        self.plan = plan

    def queries(self, x):
        """What belongs to queries: gathered, where they are merged."""
        return self.keys(merge.gather(self.plan.joint_axes, x, 2))

    def keys(self, x):
        """What belongs to keys: some heads of more tokens, at balanced places."""
        plan = self.plan
        x = heads.there(plan.heads, x)
        return balance.there(plan.ring, x, 2) if plan.pieces > 1 else x

    def scales(self, extras: Extras):
        """Those of keys and values, [*batch, t, K] as [B, K, t], by name: they travel with them."""
        named = {name: getattr(extras, name) for name in WITH_KEYS}
        change = lambda x: self.keys(x.reshape(-1, *x.shape[-2:]).swapaxes(1, 2))
        return {name: change(x) for name, x in named.items() if x is not None}

    def back(self, x, dtype, num_heads: int | None = None):
        """A result from there, in `dtype`; only what copies of a head came to is rounded after it is summed, and so sent wider.

        Of a gathered query it has its own rows already: see `merge.total`.
        """
        plan, copies = self.plan, 1 if num_heads is None else max(1, self.plan.heads.size // num_heads)
        x = x if copies > 1 else x.astype(dtype)
        if plan.pieces > 1:
            x = balance.back(plan.ring, x, 2)
        return heads.back(plan.heads, x, copies).astype(dtype)

    def row_numbers(self, x):
        """Numbers of queries, [B, t]: of their segments, their positions."""
        plan = self.plan
        x = heads.tokens(plan.heads, merge.gather(plan.joint_axes, x, 1), 1)
        return balance.there(plan.ring, x, 1) if plan.pieces > 1 else x


class _Blocks:
    """Where the local queries and each block of keys stand in the sequence, and the extras that belong to them."""

    def __init__(self, plan: AttentionPlan, query, key, q, k, extras: Extras):
        self.plan = plan
        self.gathered = plan.exchange == "all_gather"
        self.columns = key.shape[-3] * plan.size  # of all devices together
        self.keys = k.shape[2] * (plan.size if self.gathered else 1)  # of one block
        self.first_queries = self._starts(place(plan.rows), q.shape[2])
        self.batch = query.shape[:-3]
        here = extras._replace(**dict.fromkeys((*PER_HEAD, *WITH_KEYS)))
        whole = _along_keys(self._padded, Extras(*(None if x is None else self._flat(x) for x in here)))
        rows = lambda x: None if x is None else _Moves(plan).row_numbers(x)
        mine = lambda x: heads.mine(plan.heads, x)
        if_given = lambda x: None if x is None else mine(x)
        self.whole = whole._replace(
            bias=if_given(whole.bias),
            mask=if_given(whole.mask),
            query_segments=rows(whole.query_segments),
            query_positions=rows(whole.query_positions),
            seeds=if_given(whole.seeds),
            slopes=None if extras.slopes is None else mine(extras.slopes[None])[0],
        )
        self.sinks = None if extras.sinks is None else mine(extras.sinks[None])  # [1, heads]

    def _starts(self, device, length: int) -> tuple:
        """Where the pieces of a device's block begin."""
        return balance.starts(self.plan.ring, device, length) if self.plan.pieces > 1 else (device * length,)

    def here(self, owner, part: Part, back: int | None) -> tuple[Extras, Offsets]:
        """What belongs to a part of the block of `owner`, so many places back, and where it stands; or of a pool of pages
        [pages, K, s, H]."""
        if self.whole.pages is not None:
            count, _, size, _ = part.arrays[0].shape
            table = pages.table(self.plan.band, self.whole, owner * count, count, size)
            return table, Offsets(self.first_queries, (0,))
        piece = self.keys // part.of // self.plan.pieces
        first = tuple(start + part.n * piece for start in self._starts(owner, self.keys))
        known = back is not None and self.plan.rows == self.plan.ring and self.plan.pieces == 1
        at = Offsets(self.first_queries, first, back * self.keys - part.n * piece if known else None)
        return _along_keys(functools.partial(self._columns, first, piece), self.whole), at

    def travelling(self, kv) -> list[Part]:
        """What goes each way of one block: the whole, or parts of it."""
        plan = self.plan
        return self._cut(kv, plan.parts) if plan.parts > 1 else [Part(kv)] * plan.ways

    def own(self, parts: list[Part]) -> list[Part]:
        """Those of what travels that the device itself works on, one by one: the later one first, of which a causal mask leaves
        less, for what is owed is sent as float32 and takes longer than the keys and values before."""
        plan = self.plan
        if plan.parts == plan.own_parts:
            return parts[: plan.parts]
        return self._cut(parts[0].arrays, plan.own_parts)[::-1]

    def _cut(self, kv, of: int) -> list[Part]:
        """Parts that have their share of every piece of a block."""

        def part(x, n):
            cut = x.reshape(*x.shape[:2], self.plan.pieces, of, -1, *x.shape[3:])
            return cut[:, :, :, n].reshape(*x.shape[:2], -1, *x.shape[3:])

        return [Part(jax.tree.map(lambda x, n=n: part(x, n), kv), n, of) for n in range(of)]

    def join(self, parts: list[Part]):
        """The sum of all, each at its own place in the block."""
        cut = max(part.of for part in parts)

        def one(*xs):
            at = lambda of, n: [x for part, x in zip(parts, xs) if (part.of, part.n) == (of, n)]
            shape = *xs[0].shape[:2], self.plan.pieces, -1, xs[0].shape[-1]
            pieces = [functools.reduce(jnp.add, at(cut, n)).reshape(shape) for n in range(cut)]
            joined = jnp.concatenate(pieces, axis=3).reshape(*shape[:2], -1, shape[-1])
            return functools.reduce(jnp.add, at(1, 0), joined) if cut > 1 else joined

        return jax.tree.map(one, *(part.arrays for part in parts))

    def gather(self, kv):
        """K and V whole along the keys where the plan gathers them; as they are where they travel."""
        if not self.gathered:
            return kv
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.plan.axes, axis=2, tiled=True), kv)

    def reduce(self, dkv):
        """The transpose of `gather`, and the sum over devices whose queries met the same keys."""
        plan, sum_axes = self.plan, self.plan.key_sum_axes
        if self.gathered and set(plan.axes) <= set(sum_axes):
            scatter = functools.partial(jax.lax.psum_scatter, axis_name=plan.axes, scatter_dimension=2, tiled=True)
            dkv, sum_axes = jax.tree.map(scatter, dkv), tuple(a for a in sum_axes if a not in plan.axes)
        elif self.gathered:
            # Devices along an axis of the keys cut different slices: what is summed over it is summed before the cut.
            shared = tuple(a for a in sum_axes if a in plan.axes)
            dkv, sum_axes = sum_over(dkv, shared), tuple(a for a in sum_axes if a not in shared)
            size = self.keys // plan.size
            start = jax.lax.axis_index(plan.axes) * size
            dkv = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2), dkv)
        return sum_over(dkv, sum_axes)

    def _padded(self, x):
        """`x` with a column for every key that there is once the keys are padded: a slice past the end would be moved."""
        if not 1 < x.shape[-1] < self.columns:
            return x
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.columns - x.shape[-1])])

    def _columns(self, first: tuple, piece: int, x):
        """`x` at the columns of so many keys from each place of `first` on."""
        if x.shape[-1] == 1 or (len(first) == 1 and x.shape[-1] == piece):
            return x
        cut = [jax.lax.dynamic_slice_in_dim(x, start, piece, axis=-1) for start in first]
        return jnp.concatenate(cut, axis=-1)

    def add_columns(self, total, part, first: tuple):
        """`total` plus `part` at the columns of the keys that begin at `first`: the transpose of cutting them."""
        if total is None or total.shape == part.shape:
            return None if total is None else total + part
        for start, x in zip(first, jnp.split(part, len(first), -1)):
            here = jax.lax.dynamic_slice_in_dim(total, start, x.shape[-1], axis=-1)
            total = jax.lax.dynamic_update_slice_in_dim(total, here + x, start, axis=-1)
        return total

    def _flat(self, x):
        """Batch dims made one; the bias and the mask may have 1 in place of all of them, or of some."""
        rest = x.shape[len(self.batch) :]
        if all(n == 1 for n in x.shape[: len(self.batch)]):
            return x.reshape(1, *rest)
        return jnp.broadcast_to(x, (*self.batch, *rest)).reshape(-1, *rest)

    def bias_gradient(self, dbias, bias):
        """`dbias` of the flattened bias, in the bias's own shape: summed over what the bias broadcasts over."""
        dbias = heads.put(self.plan.heads, dbias[..., : bias.shape[-1]], bias.shape[-3])
        if dbias.shape[0] > 1:
            dbias = dbias.reshape(*self.batch, *dbias.shape[1:])
            broadcast = tuple(i for i, n in enumerate(self.batch) if bias.shape[i] < n)
            dbias = dbias.sum(broadcast, keepdims=True)
        return sum_over(dbias.reshape(bias.shape), self.plan.bias_sum_axes).astype(bias.dtype)


def _along_keys(change, extras: Extras) -> Extras:
    """`extras` with `change` made to those that are there and whose last dim is the keys."""
    found = {name: getattr(extras, name) for name in ("bias", "mask", "key_segments", "key_positions")}
    return extras._replace(**{name: change(x) for name, x in found.items() if x is not None})


def _head_major(x):
    """[*batch, t, N, H] -> [B, N, t, H]."""
    return x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)


def _public(x, like):
    """[B, N, t, ...] -> [*batch, t, N, ...] in the dtype of `like`; the inverse of `_head_major`."""
    x = x.swapaxes(1, 2)
    return x.reshape(*like.shape[:-3], *x.shape[1:]).astype(like.dtype)
