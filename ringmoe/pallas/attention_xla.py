"""Block-wise attention in plain XLA: every platform, every shape, and never a T x S array.

Forward walks row blocks and, inside, the key blocks they can see; backward walks key blocks and, inside, row blocks.
The inner loop's bounds are dynamic: blocks that the band or the lengths empty cost nothing, and blocks seen whole are
not masked.

A block starts where it still fits, so the last one of a length that is no multiple overlaps its neighbour; pairs the
neighbour did are masked, and a masked pair changes nothing. A non-finite query, key or value makes NaN of the rows that
see it and touches no other, forward and backward.

Inside, heads are [K, G] (G = N // K query heads share a key head) and einsum letters name dimensions:
b batch, k key heads, g group, t queries, s keys, h head dim, v that of values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe import dropout, softmax
from ringmoe.interface import AttentionSpec, Extras, Grads, Offsets, widened
from ringmoe.masks import Band, Places
from ringmoe.pallas.pages import Pages

DTYPES = tuple(jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64))
BLOCK = 512  # longest block, also of the G * t rows that share a key head
NARROW = (
    128  # longest block where a window is no wider: a block meets as much again as it is long, or as the window is wide
)
TILE = BLOCK**2  # most logits held at once: 1 MiB in float32, a core's L2; eight times as much measured 1.2-1.5x slower


@dataclasses.dataclass(frozen=True)
class Config:
    """A block's length along batch, key heads, queries and keys; the first two divide their dimension."""

    b: int
    k: int
    t: int
    s: int

    def __post_init__(self):
        assert min(dataclasses.astuple(self)) >= 1, self

    @classmethod
    def choose(cls, q_shape: tuple[int, ...], k_shape: tuple[int, ...], band: Band = Band()) -> "Config":
        """The blocks for q [B, N, T, H] and k [B, K, S, H], of which a query sees those in the band."""
        (batch, num_heads, t, _), (_, key_heads, s, _) = q_shape, k_shape
        group = num_heads // key_heads
        longest = BLOCK if band.left is None or band.right is None else min(BLOCK, max(NARROW, band.left + band.right))
        t, s = max(1, min(t, longest, BLOCK // group)), max(1, min(s, longest))
        room = max(1, TILE // (group * t * s))
        heads = _divisor(key_heads, room)
        return cls(_divisor(batch, room // key_heads), heads, t, s)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`, or 1."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)


def check(spec: AttentionSpec, q, k, v, extras: Extras) -> None:
    if q.dtype not in DTYPES:
        raise NotImplementedError(f"{q.dtype=}, expected one of {[d.name for d in DTYPES]}")


def init(spec: AttentionSpec, q, v):
    """The state `(acc, m, l)`: unnormalised output [B, N, T, V], running maximum and sum [B, N, T, 1]."""
    dtype = _acc_dtype(q)
    row = jnp.zeros((*q.shape[:-1], 1), dtype)
    acc = jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype)
    return _same_varying((acc, row + softmax.initial_max(dtype), row), q, v)[0]


def finish(spec: AttentionSpec, state):
    o, lse, tail = softmax.finish(*state)
    return o, lse[..., 0], tail[..., 0]


def forward(spec: AttentionSpec, state, q, k, v, extras: Extras, at: Offsets, config: Config | None = None):
    state, q, k, v, extras, at = _same_varying(state, q, k, v, extras, at)
    walk = _Walk.make(spec, config, q, k, extras, at)
    state, q = jax.tree.map(walk.group, (state, q))

    def step(carry, tile, masked):
        acc, m, l = carry
        k_tile, v_tile = walk.keys(k, v, tile)
        s, seen = walk.logits(_cut(q, "bkgth", tile), k_tile, tile, masked)
        if seen is not None:
            poison = jnp.where(jnp.all(jnp.isfinite(v_tile), -1), 0, jnp.nan).astype(s.dtype)
            s = jnp.where(seen, s + poison[:, :, None, None], softmax.MASKED)
            v_tile = _finite(v_tile)
        m, l, alpha, p = softmax.step(m, l, s, -1)
        p = dropout.drop(p, spec.dropout_rate, walk.kept(tile))
        return acc * alpha + _dot("bkgts,bksv->bkgtv", p.astype(v_tile.dtype), v_tile), m, l

    def rows(n, state):
        tile = walk.tile(n, "t")

        def keys(j, carry):
            return walk.at_block(step, carry, tile | {"s": walk.span("s", j)}, carry)

        carry = tuple(_cut(x, "bkgth", tile) for x in state)
        carry = _for(walk.bounds(tile, "s"), keys, carry)
        return tuple(_put(x, block, "bkgth", tile) for x, block in zip(state, carry))

    state = _for((0, walk.num_tiles("t")), rows, state)
    return jax.tree.map(_ungroup, state)


def backward(
    spec: AttentionSpec,
    dq,
    q,
    k,
    v,
    do,
    lse,
    delta,
    extras: Extras,
    at: Offsets,
    config: Config | None = None,
) -> Grads:
    zeros = lambda x: jnp.zeros(x.shape, _acc_dtype(q))
    bias = extras.bias if spec.bias_gradient else None
    start = Grads(zeros(q) if dq is None else dq, zeros(k), zeros(v), None if bias is None else zeros(bias))
    start, q, k, v, do, lse, delta, extras, at = _same_varying(start, q, k, v, do, lse, delta, extras, at)
    walk = _Walk.make(spec, config, q, k, extras, at)
    q, do = map(walk.group, (q, do))
    lse, delta = (walk.group(x[..., None]) for x in (softmax.finite_lse(lse), delta))
    dbias = None if start.dbias is None else walk.group_pairs(start.dbias)

    def share(tile, masked):
        q_tile, do_tile, lse_tile, delta_tile = (_cut(x, "bkgth", tile) for x in (q, do, lse, delta))
        k_tile, v_tile = walk.keys(k, v, tile)
        s, seen = walk.logits(q_tile, k_tile, tile, masked)
        p = jnp.exp(s - lse_tile)
        kept = walk.kept(tile)
        dp = dropout.drop(_dot("bkgtv,bksv->bkgts", do_tile, v_tile), spec.dropout_rate, kept)
        ds = p * (dp - delta_tile) * walk.slope_of_cap(s)
        p = dropout.drop(p, spec.dropout_rate, kept)
        if seen is not None:
            # A row whose do is not finite has such a delta too: adding it keeps the NaN that `_finite` takes from dv.
            p = jnp.where(seen, p + 0 * delta_tile, 0)
            ds = jnp.where(seen, ds, 0)
            q_tile, k_tile, do_tile = _finite(q_tile), _finite(k_tile), _finite(do_tile)
        low = ds.astype(q.dtype)
        return Grads(
            _dot("bkgts,bksh->bkgth", low, k_tile) * spec.scale,
            _dot("bkgth,bkgts->bkhs", q_tile, low) * spec.scale,
            _dot("bkgtv,bkgts->bkvs", do_tile, p.astype(do.dtype)),
            None if dbias is None else _sum_to(ds, dbias.shape),
        )

    def keys(n, grads):
        tile = walk.tile(n, "s")

        def rows(i, carry):
            inner = tile | {"t": walk.span("t", i)}
            none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: share(inner, False)))
            none, _ = _same_varying(none, carry)
            new = walk.at_block(lambda _, tile, masked: share(tile, masked), None, inner, none)
            dq = _put(carry.dq, _cut(carry.dq, "bkgth", inner) + new.dq, "bkgth", inner)
            dbias = carry.dbias
            if dbias is not None and new.dbias is not None:
                dbias = _put(dbias, _cut(dbias, "bkgts", inner) + new.dbias, "bkgts", inner)
            return Grads(dq, carry.dk + new.dk, carry.dv + new.dv, dbias)

        # Within the loop dk and dv are [b, k, h, s]: the other way round XLA would transpose p and ds, far larger.
        own = grads._replace(dk=_cut(grads.dk, "bksh", tile).mT, dv=_cut(grads.dv, "bksh", tile).mT)
        # Next to the product XLA would turn that round instead, into a form that its CPUs lack in bfloat16 (jaxlib 0.12.0.1).
        own = lax.optimization_barrier(_for(walk.bounds(tile, "t"), rows, own))
        return own._replace(dk=_put(grads.dk, own.dk.mT, "bksh", tile), dv=_put(grads.dv, own.dv.mT, "bksh", tile))

    out = _for((0, walk.num_tiles("s")), keys, start._replace(dq=walk.group(start.dq), dbias=dbias))
    if bias is not None and out.dbias is not None:
        out = out._replace(dbias=out.dbias.reshape(bias.shape))
    return out._replace(dq=_ungroup(out.dq))


class _Span(NamedTuple):
    """A block along one dimension: `size` elements from `start`, of which `first .. stop` are its own."""

    start: jax.Array
    first: jax.Array
    stop: jax.Array
    size: int


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The blocks of one call: where they are, which meet, and the logits of a pair of them."""

    spec: AttentionSpec
    config: Config
    dtype: Any  # in which queries and keys meet
    sizes: dict[str, int]
    places: dict[str, Places]
    lengths: dict[str, jax.Array]  # [B, 1, 1, 1, 1]; only those given
    segments: dict[str, jax.Array]  # queries' [B, 1, 1, T, 1], keys' [B, 1, 1, 1, S]; both or none
    positions: dict[str, Callable]  # of a tile, in the same shapes; only those given
    bias: jax.Array | None = None  # [B|1, K|1, G|1, T|1, S|1]
    mask: jax.Array | None = None
    slopes: jax.Array | None = None  # [1, K, G, 1, 1]
    seeds: jax.Array | None = None  # [B, K, G, 1, 1]
    scales: tuple[jax.Array | None, ...] = ()  # of keys and of values, [B, K, S]
    pages: Pages | None = None  # that keys, values and their scales lie in

    @classmethod
    def make(cls, spec, config, q, k, extras: Extras, at: Offsets) -> "_Walk":
        (batch, num_heads, t, _), (_, key_heads, s, _) = q.shape, k.shape
        pages = None if extras.pages is None else Pages.make(extras, s)
        s = s if pages is None else pages.keys
        sizes = {"b": batch, "k": key_heads, "g": num_heads // key_heads, "t": t, "s": s}
        lengths = {"t": extras.query_lengths, "s": extras.key_lengths}
        rows, columns = (lambda x: x[:, None, None, :, None]), (lambda x: x[:, None, None, None, :])
        along = lambda t, s: {d: shape(x) for d, shape, x in (("t", rows, t), ("s", columns, s)) if x is not None}
        places = along(extras.query_positions, extras.key_positions)
        positions = {d: functools.partial(_cut, x, "bkgts") for d, x in places.items()}
        positions |= {} if pages is None else {"s": pages.positions}
        if config is None:  # with positions no block is skipped
            config = Config.choose(q.shape, (batch, key_heads, s, k.shape[3]), Band() if positions else spec.band)
        walk = cls(
            spec,
            config if pages is None else dataclasses.replace(config, s=pages.block(config.s)),
            q.dtype,
            sizes,
            dict(zip("ts", at.places(t, s))),
            {d: x[:, None, None, None, None] for d, x in lengths.items() if x is not None},
            along(extras.query_segments, extras.key_segments),
            positions,
            scales=(extras.key_scales, extras.value_scales),
            pages=pages,
        )
        per_head = lambda x: None if x is None else walk.group(x)[..., None, None]
        bias, mask = (None if x is None else walk.group_pairs(x) for x in (extras.bias, extras.mask))
        slopes = None if extras.slopes is None else per_head(extras.slopes[None])
        return dataclasses.replace(walk, bias=bias, mask=mask, slopes=slopes, seeds=per_head(extras.seeds))

    def keys(self, k, v, tile):
        """The tile's, in the queries' dtype."""
        of = functools.partial(_cut, dims="bks") if self.pages is None else self.pages.cut
        of = functools.partial(of, tile=tile)
        scales = [None if x is None else of(x) for x in self.scales]
        return [widened(of(x), scale, self.dtype) for x, scale in zip((k, v), scales)]

    def group(self, x):
        """[B, N, ...] to [B, K, G, ...]."""
        return x.reshape(x.shape[0], self.sizes["k"], self.sizes["g"], *x.shape[2:])

    def group_pairs(self, x):
        """[B|1, N|1, T|1, S|1] to [B|1, K|1, G|1, T|1, S|1]."""
        return self.group(x) if x.shape[1] > 1 else x[:, :, None]

    def num_blocks(self, dim: str) -> int:
        return -(-self.sizes[dim] // getattr(self.config, dim))

    def num_tiles(self, dim: str) -> int:
        return self.num_blocks("b") * self.num_blocks("k") * self.num_blocks(dim)

    def span(self, dim: str, i) -> _Span:
        size = getattr(self.config, dim)
        first, length = i * size, self.sizes[dim]
        return _Span(jnp.minimum(first, length - size), first, jnp.minimum(first + size, length), size)

    def tile(self, n, dim: str) -> dict[str, _Span]:
        """The n-th block of batch x heads x `dim`."""
        n, i = n // self.num_blocks(dim), n % self.num_blocks(dim)
        return {
            "b": self.span("b", n // self.num_blocks("k")),
            "k": self.span("k", n % self.num_blocks("k")),
            dim: self.span(dim, i),
        }

    def bounds(self, tile, dim: str):
        """First and last (exclusive) block along `dim` that the tile can meet."""
        if self.spec.uniform:
            return 0, self.num_blocks(dim)
        other = "s" if dim == "t" else "t"
        blocks_of = Band.keys_met if dim == "s" else Band.queries_met
        band, size = self.spec.band, getattr(self.config, dim)
        own = band.ends if self.positions else band
        first, last = blocks_of(own, *self.ends(tile, other), self.places[dim], size)
        if self.positions and dim not in self.positions:  # else in no order, and any block may be met
            nearest, farthest = blocks_of(band.window, *self.compared(tile, other), self.places[dim], size)
            first, last = jnp.maximum(first, nearest), jnp.minimum(last, farthest)
        for side, lengths in self.lengths.items():
            longest = self.places[side].before(jnp.max(_cut(lengths, "b", tile)))
            if side == dim:
                last = jnp.minimum(last, -(-longest // getattr(self.config, dim)))
            else:
                last = jnp.where(tile[other].first < longest, last, 0)
        return jnp.int32(first), jnp.int32(last)

    def ends(self, tile, dim: str):
        """The place of the tile's first element along `dim`, and the one after its last's."""
        return self.places[dim].of(tile[dim].first), self.places[dim].of(tile[dim].stop - 1) + 1

    def compared(self, tile, dim: str):
        """The least of the positions that the band compares, and the one after the greatest."""
        if dim not in self.positions:
            return self.ends(tile, dim)
        found = self.positions[dim](tile)
        return jnp.min(found), jnp.max(found) + 1

    def is_full(self, tile):
        """Whether every query of the tile sees every key of it, as far as the band says."""
        ends, band = [*self.ends(tile, "t"), *self.ends(tile, "s")], self.spec.band
        if not self.positions:
            return band.is_full_block(*ends)
        compared = [*self.compared(tile, "t"), *self.compared(tile, "s")]
        return band.ends.is_full_block(*ends) & band.window.is_full_block(*compared)

    def at_block(self, fun, carry, tile, hidden):
        """`fun(carry, tile, masked)`, with `masked` (static) false where every pair of the block is seen; `hidden` where
        segments leave none of them."""
        t, s = tile["t"], tile["s"]
        even = all(self.sizes[dim] % getattr(self.config, dim) == 0 for dim in "ts")
        if even and self.spec.band.is_full and not self.lengths and not self.segments and self.mask is None:
            return fun(carry, tile, False)
        if self.spec.uniform or (self.mask is not None and not self.segments):
            return fun(carry, tile, True)
        full = self.is_full(tile) & (t.start == t.first) & (s.start == s.first) & (self.mask is None)
        for side, lengths in self.lengths.items():
            full &= self.ends(tile, side)[1] <= jnp.min(_cut(lengths, "b", tile))
        whole, partly = (lambda carry: fun(carry, tile, False)), (lambda carry: fun(carry, tile, True))
        if not self.segments:
            return lax.cond(full, whole, partly, carry)
        ids = [_cut(self.segments[dim], "bkgts", tile) for dim in "ts"]
        (t_low, t_high), (s_low, s_high) = ((jnp.min(x), jnp.max(x)) for x in ids)
        met, one = (t_low <= s_high) & (s_low <= t_high), (t_low == t_high) & (s_low == s_high)
        which = jnp.where(met, jnp.where(full & one, 1, 2), 0)
        return lax.switch(which, [lambda _: hidden, whole, partly], carry)

    def logits(self, q_tile, k_tile, tile, masked: bool):
        """The logits of a block, not masked yet, and which pairs are seen (None where `masked` is false)."""
        s = _dot("bkgth,bksh->bkgts", q_tile, k_tile) * self.spec.scale
        if self.bias is not None:
            s = s + _cut(self.bias, "bkgts", tile).astype(s.dtype)
        rows, keys = self.indices(tile)
        position = {"t": self.places["t"].of(rows), "s": self.places["s"].of(keys)}
        compared = position | {dim: of(tile) for dim, of in self.positions.items()}
        if self.slopes is not None:
            apart = jnp.abs(compared["t"] - compared["s"]).astype(s.dtype)
            s = s - _cut(self.slopes, "bkgts", tile).astype(s.dtype) * apart
        if self.spec.soft_cap is not None:
            s = self.spec.soft_cap * jnp.tanh(s / self.spec.soft_cap)
        if not masked:
            return s, None
        seen = (rows >= tile["t"].first) & (keys >= tile["s"].first)
        seen &= self.spec.band.ends(position["t"], position["s"])
        seen = seen & self.spec.band.window(compared["t"], compared["s"])
        for side, lengths in self.lengths.items():
            seen = seen & (position[side] < _cut(lengths, "b", tile))
        if self.segments:
            seen = seen & (_cut(self.segments["t"], "bkgts", tile) == _cut(self.segments["s"], "bkgts", tile))
        if self.mask is not None:
            seen = seen & _cut(self.mask, "bkgts", tile)
        return s, seen

    def indices(self, tile):
        """Of a tile's rows, as a column, and of its keys."""
        rows, keys = (tile[dim].start + jnp.arange(tile[dim].size, dtype=jnp.int32) for dim in "ts")
        return rows[:, None], keys

    def kept(self, tile):
        """Which pairs [b, k, g, t, s] dropout keeps; None without it."""
        if self.seeds is None:
            return None
        rows, keys = self.indices(tile)
        seeds = _cut(self.seeds, "bkgts", tile)
        return dropout.kept(self.spec.dropout_rate, seeds, self.places["t"].of(rows), self.places["s"].of(keys))

    def slope_of_cap(self, s):
        """The derivative of the capped logits `s` by those before the cap."""
        return 1.0 if self.spec.soft_cap is None else 1 - (s / self.spec.soft_cap) ** 2


def _for(bounds, fun, carry):
    """`fun(i, carry)` for i in the bounds; of a fixed length, and so differentiable, where they are Python ints."""
    first, last = bounds
    if isinstance(last, int):
        return lax.scan(lambda c, i: (fun(i, c), None), carry, jnp.arange(first, last, dtype=jnp.int32))[0]
    return lax.fori_loop(first, last, fun, carry)


def _place(x, dims: str, tile):
    """Where the tile lies in `x`, whose leading dimensions are `dims`: those not tiled or of length 1 are whole."""
    spans = [tile.get(d) if n > 1 else None for d, n in zip(dims.ljust(x.ndim), x.shape)]
    starts = [jnp.int32(0 if span is None else span.start) for span in spans]
    return starts, [n if span is None else span.size for span, n in zip(spans, x.shape)]


def _cut(x, dims: str, tile):
    return lax.dynamic_slice(x, *_place(x, dims, tile))


def _put(x, block, dims: str, tile):
    return lax.dynamic_update_slice(x, block, _place(x, dims, tile)[0])


def _dot(subscripts: str, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=_acc_dtype(x))


def _acc_dtype(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _sum_to(x, shape):
    """Sums the dimensions that have length 1 in `shape`."""
    return jnp.sum(x, [d for d, n in enumerate(shape) if n == 1], keepdims=True)


def _ungroup(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _same_varying(*trees):
    """Gives every leaf the mesh axes over which any of them varies: under shard_map's check_vma, loops need it."""
    trees = jax.tree.map(jnp.asarray, trees)
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(trees)))

    def cast(x):
        missing = tuple(axes - _varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, trees)


def _varying(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
