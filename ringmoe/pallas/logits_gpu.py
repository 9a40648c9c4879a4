"""The logits of a pair of blocks in an attention kernel of Hopper GPUs: which pairs meet, and what of one is seen.

`Blocks` lays a call out. Segments and positions are vectors that a thread reads its rows' and columns' of; what they say of
whole blocks is among the numbers, by which blocks are skipped, or not masked.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import ClosedJaxpr, Literal

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import FAR, Band, Mask, Places, is_open
from ringmoe.pallas import blocks
from ringmoe.pallas.blocks import LENGTHS, LOG2E, POSITIONS, SEGMENTS
from ringmoe.pallas.streams_gpu import GROUPS, PLACES, ROWS, TALL, WGMMA, Known

DTYPES = (jnp.bfloat16, jnp.float16)
WIDTH, WIDEST = 64, 256  # head dims are multiples of the one, which are 128 bytes, up to the other

# What a mask_fn may do, in TYPES, with numbers that each pair of a query and a key has its own of.
ON_REGISTERS = frozenset(
    "abs add and broadcast_in_dim convert_element_type div eq ge gt jit le lt max min mul ne neg not or pjit rem select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sub xor".split()
)
TYPES = (jnp.int32, jnp.uint32, jnp.bool_)
# What Mosaic has for numbers only (jax 0.12.0.1), in other words for booleans; the conversion is one to them.
OF_BOOLEANS = {
    "not": lambda x: x ^ True,
    "max": operator.or_,
    "min": operator.and_,
    "convert_element_type": lambda x: x != jnp.zeros((), x.dtype),
}


@dataclasses.dataclass(frozen=True)
class Blocks(blocks.Blocks):
    """Of the side `rows`, "query" or "key", a block of threads has GROUPS blocks, and it meets those of the other one by one.

    heads: of queries, of a sequence. In methods `n` is one of them, of all sequences'.
    """

    rows: str = "query"
    heads: int = 1
    has_bias: bool = False

    @classmethod
    def make(
        cls, spec, q, k, extras: Extras, at: Offsets, block_k: int, rows: str = "query", in_turn: bool = False
    ) -> "tuple[Blocks, Known]":
        """Of queries [B, N, T, H] and keys [B, K, S, H]; slopes may be each query's own, [N, T]. With `in_turn`, for a kernel
        whose blocks of threads, of keys, take turns at a block of queries."""
        # Whole blocks of threads read them.
        whole = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % TALL)), mode="edge")
        of_tokens = {name: getattr(extras, name) for name in (*SEGMENTS, *POSITIONS)}
        of_tokens = {name: None if x is None else whole(x) for name, x in of_tokens.items()}
        numbers = blocks.known(extras._replace(**of_tokens, slopes=None), at, ROWS, block_k)
        made = cls(
            spec, q.shape[2], k.shape[2], ROWS, block_k, rows=rows, heads=q.shape[1], has_bias=extras.bias is not None
        )
        vectors: dict[str, jax.Array] = {name: x for name, x in of_tokens.items() if x is not None}
        if vectors:
            numbers["met"] = made._first_and_last(numbers)
        if extras.slopes is not None:
            slopes = extras.slopes.astype(jnp.float32) / spec.scale
            vectors["slopes"] = slopes if slopes.ndim == 1 else whole(slopes)
        if extras.bias is not None:
            more = [(0, -x % TALL if x > 1 else 0) for x in extras.bias.shape[2:]]
            bias = jnp.pad(extras.bias, ((0, 0), (0, 0), *more)) if any(map(max, more)) else extras.bias
            vectors["bias"] = bias if rows == "query" else bias.mT
        layout, vector = blocks.packed(numbers)
        made = dataclasses.replace(made, layout=layout)
        if in_turn:
            layout, vector = blocks.packed(numbers | made._turns(vector, q.shape[0]))
            made = dataclasses.replace(made, layout=layout)
            here = at.places(q.shape[2], k.shape[2])[0].of(jnp.arange(made.num_q * ROWS, dtype=jnp.int32))
            vectors[PLACES] = jnp.broadcast_to(here, (q.shape[0], here.size))
        return made, Known(vector, vectors)

    @property
    def num_rows(self) -> int:
        """Blocks of threads of a head."""
        return -(-(self.num_queries if self.rows == "query" else self.num_keys) // TALL)

    @property
    def height(self) -> int:
        """Of the result, of a block of threads."""
        return self.num_rows * TALL

    @property
    def unit(self) -> float:
        """Of `logits`, in those of maxima and LSEs."""
        if self.spec.soft_cap is not None:
            return LOG2E * self.spec.soft_cap
        return 1.0 if self.has_bias else LOG2E * self.spec.scale

    @property
    def log2(self) -> float:
        """Of what maxima and LSEs are in units of: log 2, but beside a bias none, for a low one's product would be rounded."""
        return 1.0 if self.has_bias and self.spec.soft_cap is None else LOG2E

    def exp(self, x):
        """Of differences to a maximum or an LSE."""
        return jnp.exp2(x if self.log2 == LOG2E else x * LOG2E)

    def _first_and_last(self, numbers):
        """Of each block of threads the first and the last (exclusive) block that it meets, as segments and positions tell."""
        at = Offsets(tuple(numbers["query"]), tuple(numbers["key"])).places(self.num_queries, self.num_keys)
        sides = (self.block_q, self.num_queries, at[0], 2), (self.block_k, self.num_keys, at[1], 1)

        def of(name, block, length, places, dim):
            """(start, stop) of each block, [B or 1, query blocks or 1, key blocks or 1]."""
            start = places.of(jnp.arange(0, length + -length % TALL, block, dtype=jnp.int32))[None]
            found = numbers.get(name, jnp.stack([start, start + block], -1))
            return [jnp.expand_dims(found[..., end], dim) for end in range(2)]

        queries, keys = (of(name, *side) for name, side in zip(POSITIONS, sides))
        seen = (queries[0] < queries[1]) & (keys[0] < keys[1])
        if any(name in numbers for name in POSITIONS):
            seen &= self.spec.band.window.meets(*queries, *keys)
        if SEGMENTS[0] in numbers:
            seen &= blocks.share_segments(*(of(name, *side) for name, side in zip(SEGMENTS, sides)))
        seen = seen if self.rows == "query" else seen.mT
        most = seen.shape[2]
        each = jnp.arange(most, dtype=jnp.int32)
        first, last = jnp.where(seen, each, most).min(2), jnp.where(seen, each + 1, 0).max(2)
        first, last = (x.reshape(x.shape[0], -1, GROUPS) for x in (first, last))
        return jnp.stack([first.min(2), last.max(2)], -1)

    def _here(self, numbers, n) -> tuple[Band, Places, Places]:
        """What is seen in a head's sequence, whose ends only the run knows; and where queries and keys stand."""
        band, (queries, keys) = self.spec.band, self.places(numbers)
        ends: dict[str, list] = {"query": [band.queries], "key": [band.keys]}
        if self.num_keys % self.block_k:  # of one piece then
            ends["key"].append(keys.starts[0] + self.num_keys)
        for side in ends:
            if self.has(f"{side}_lengths"):
                ends[side].append(self.number(numbers, f"{side}_lengths", self._sequence(n)))
        given = {side: [x for x in found if x is not None] for side, found in ends.items()}
        says = given["key"] or isinstance(band.also, Mask)
        if says and not given["query"] and (self.has(*POSITIONS) or not self._tells_rows(band)):
            # Else nothing depends on the row, and Mosaic finds no layouts.
            given["query"].append(queries.starts[-1] + queries.length)
        last_query, last_key = (functools.reduce(jnp.minimum, found) if found else None for found in given.values())
        return dataclasses.replace(band, queries=last_query, keys=last_key), queries, keys

    def _tells_rows(self, band: Band) -> bool:
        """Whether what it says of spans is not the same for all rows."""
        window = band.window if isinstance(band.also, Mask) else Band(band.left, band.right)
        seen = window.keys_seen if self.rows == "query" else window.queries_seen
        return any(x.shape for x in jax.tree.leaves(jax.eval_shape(seen, jax.ShapeDtypeStruct((1,), jnp.int32))))

    def _sequence(self, n):
        return lax.div(n, jnp.int32(self.heads))

    @property
    def _others(self) -> int:
        """Blocks of the side that is met one by one."""
        return self.num_k if self.rows == "query" else self.num_q

    def _span(self, numbers, n, i):
        """The first block of the other side that those of block i of threads meet, and the last, exclusive."""
        band, queries, keys = self._here(numbers, n)
        band = band.ends if self.has(*POSITIONS) else band
        if self.rows == "query":
            own, other, meets, block = queries, keys, band.keys_met, self.block_k
        else:
            own, other, meets, block = keys, queries, band.queries_met, self.block_q
        start = own.of(i * TALL)
        first, last = (jnp.asarray(x, jnp.int32) for x in meets(start, start + TALL, other, block))
        if self.has("met"):
            nearest, farthest = (self.number(numbers, "met", self._sequence(n), i, end) for end in range(2))
            first, last = jnp.maximum(first, nearest), jnp.minimum(last, farthest)
        return first, last

    def _turns(self, numbers, batch: int) -> dict[str, jax.Array]:
        """Of each block of threads the span of what it meets, made longer so that neither end of it comes before that of the
        block before; and of each block of the other side how many blocks of threads end before they would meet it.

        So those that meet one are neighbours, and a block of threads' turn at it is told by subtraction.
        """
        own, other = (jnp.arange(number, dtype=jnp.int32) for number in (self.num_rows, self._others))
        of_block = jax.vmap(lambda b, i: self._span(numbers, b * self.heads, i), (None, 0))
        first, last = jax.vmap(of_block, (0, None))(jnp.arange(batch, dtype=jnp.int32), own)
        # One that meets nothing has the place between its neighbours, and one block: a kernel needs no way around its loop.
        some, until = (first < last)[:, None], own[:, None] >= own[None]
        first = jnp.where(some & until.T, first[:, None], self._others - 1).min(2)
        last = jnp.maximum(jnp.where(some & until, last[:, None], 0).max(2), first + 1)
        before = jnp.sum(last[:, None] <= other[:, None], 2, dtype=jnp.int32)
        return {"span": jnp.stack([first, last], -1), "before": before}

    def turn(self, known: Known, n, i, row):
        """How many blocks of threads add to a block of the other side before block i does."""
        return i - self.number(known.numbers, "before", self._sequence(n), lax.div(row, jnp.int32(ROWS)))

    def met(self, known: Known, n, i):
        """The first block of the other side that those of block i of threads meet, and how many more there are."""
        if self.has("span"):
            first, last = (self.number(known.numbers, "span", self._sequence(n), i, end) for end in range(2))
            return first, last - first
        first, last = self._span(known.numbers, n, i)
        # One at least, of which then nothing is seen.
        first = jnp.minimum(first, self._others - 1)
        return first, jnp.maximum(last - first, 1)

    @property
    def is_plain(self) -> bool:
        """Whether every query sees every key, as is known before the run."""
        return self.spec.band.is_full and self.num_keys % self.block_k == 0 and not self.has(*LENGTHS, *SEGMENTS)

    def logits(self, s, known: Known, n, row, key):
        """Products `s` of queries from `row` and keys from `key` on as logits, of which 1 is `unit`: -inf if not seen."""
        if self.is_plain and not known.vectors.keys() & {"slopes", "bias"} and self.spec.soft_cap is None:
            return s
        # Anew in every step: what is the same in all would wait in registers, for which there is no room.
        n, row, key = lax.optimization_barrier((n, row, key))
        band, queries, keys = self._here(known.numbers, n)
        starts = queries.of(row), keys.of(key)
        if "slopes" in known.vectors:
            rows, columns = self._sides(known, n, (row, key), starts, s.shape, "positions")
            apart = jnp.abs(across(rows, s.shape) - columns).astype(jnp.float32)
            s = s - self._slope(known, n, row, s.shape) * apart
            s, n, row, key = lax.optimization_barrier((s, n, row, key))
        if "bias" in known.vectors:
            s = s * self.spec.scale + self._bias(known, n, (row, key), s.shape)
            s, n, row, key = lax.optimization_barrier((s, n, row, key))
        if self.spec.soft_cap is not None:
            s = tanh(s * ((1 if "bias" in known.vectors else self.spec.scale) / self.spec.soft_cap))
        if self.is_plain:
            return s
        if known.is_read:
            pair = lax.div(row, jnp.int32(self.block_q)), lax.div(key, jnp.int32(self.block_k))
            _, full = self.seen_and_full(known.numbers, self._sequence(n), *pair)
        else:
            full = band.is_full_block(starts[0], starts[0] + self.block_q, starts[1], starts[1] + self.block_k)

        def hide(s, n=n, row=row, key=key):
            for number, seen in enumerate(self._conditions(band)):
                if number:  # What one reads is forgotten before the next reads: else all of it would be in registers.
                    s, n, row, key = lax.optimization_barrier((s, n, row, key))
                s = jnp.where(
                    seen(functools.partial(self._sides, known, n, (row, key), starts, s.shape)), s, softmax.MASKED
                )
            return s

        return lax.cond(full, lambda s: s, hide, s)

    def softened(self, s, m, l):
        """What `softmax.step` gives of logits `s`, [rows, columns], m and l [rows], m in units of `log2`."""
        m_new = jnp.maximum(m, jnp.max(s, 1) * self.unit)
        alpha = self.exp(m - m_new)
        p = self.exp(s * self.unit - across(m_new, s.shape))
        return m_new, l * alpha + jnp.sum(p, 1), alpha, p

    def weights(self, s, lse):
        """P of logits `s`, and what dP less delta is multiplied with for the gradient of the scaled products."""
        p = self.exp(s * self.unit - lse)
        # Where P is 0 `s` may be -inf, of which no tanh is.
        return p, p if self.spec.soft_cap is None else p * (1 - jnp.square(jnp.maximum(s, -1.0)))

    def _slope(self, known: Known, n, row, shape):
        slopes, own = known.vectors["slopes"], lax.rem(n, jnp.int32(self.heads))
        if len(slopes.shape) == 1:
            return slopes[own]
        return across(plgpu.load(slopes.at[own, pl.ds(row, shape[0])], layout=WGMMA.reduce(1), optimized=False), shape)

    def _bias(self, known: Known, n, tokens, shape):
        """Of a pair's rows and columns, queries by keys or the other way round."""
        bias = known.vectors["bias"]
        own = [
            x if size > 1 else 0 for x, size in zip((self._sequence(n), lax.rem(n, jnp.int32(self.heads))), bias.shape)
        ]
        tokens, dims = tokens if self.rows == "query" else tokens[::-1], [d for d in range(2) if bias.shape[2 + d] > 1]
        at = [pl.ds(tokens[d], shape[d]) if d in dims else 0 for d in range(2)]
        layout = WGMMA if len(dims) == 2 else WGMMA.reduce(1 - dims[0]) if dims else None
        x = plgpu.load(bias.at[(*own, *at)], layout=layout, optimized=False).astype(jnp.float32)
        return lax.broadcast_in_dim(x, shape, dims)

    def _conditions(self, band: Band) -> list[Callable]:
        """Of which each, of a function that gives rows and columns by name, tells which pairs of a pair of blocks it leaves."""
        also = None if isinstance(band.also, Mask) else band.also
        band = dataclasses.replace(band, also=None) if also is not None else band

        def inside(part: Band, of: str, sides):
            rows, columns = sides(of)
            # Two numbers a row, of which a thread has two, say what is seen of it: a comparison or two for each logit.
            return _inside(part.keys_seen(rows) if self.rows == "query" else part.queries_seen(rows), columns)

        def same(sides):
            rows, columns = sides("segments")
            return across(rows, columns.shape) == columns

        def free(also: Callable, sides):
            rows, columns = sides("positions")
            # Said here, for Mosaic finds no layouts of a longer function's numbers.
            pair = [plgpu.layout_cast(x, WGMMA) for x in (across(rows, columns.shape), columns)]
            pair = pair if self.rows == "query" else pair[::-1]
            return _on_registers(jax.make_jaxpr(also)(*pair), *pair)[0]

        parts = [(band.ends, "places"), (band.window, "positions")] if self.has(*POSITIONS) else [(band, "places")]
        says = lambda part: any(getattr(part, field.name) is not None for field in dataclasses.fields(Band))
        found: list[Callable] = [functools.partial(inside, *part) for part in parts if says(part[0])]
        found += [same] if self.has(*SEGMENTS) else []
        return found + ([functools.partial(free, also)] if also is not None else [])

    def _sides(self, known: Known, n, tokens, starts, shape, of: str):
        """Of a pair's rows and columns [rows], [rows, columns], queries by keys or the other way round, the numbers `of` it:
        "places", "segments", or "positions", which are places where none are given."""
        sides = list(zip(("query", "key"), tokens, starts))
        if self.rows == "key":
            sides.reverse()

        def of_dim(dim: int):
            side, token, start = sides[dim]
            vector = known.vectors.get(f"{side}_{of}")
            if vector is not None:
                at = self._sequence(n), pl.ds(token, shape[dim])
                x = plgpu.load(vector.at[at], layout=WGMMA.reduce(1 - dim), optimized=False)
                return across(x, shape, 1) if dim else x
            if dim:
                return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + start
            return plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=WGMMA.reduce(1)) + start

        # In this order ptxas spills nothing.
        columns, rows = of_dim(1), of_dim(0)
        return rows, columns


def _inside(spans, columns):
    """Which columns are in one of the spans of their row."""
    of_rows = lambda bound: across(bound, columns.shape) if jnp.ndim(bound) else bound
    seen = []
    for low, high in spans:
        sides = [] if is_open(low, -FAR) else [columns >= of_rows(low)]
        sides += [] if is_open(high, FAR) else [columns < of_rows(high)]
        seen.append(functools.reduce(operator.and_, sides) if sides else columns >= -FAR)
    return functools.reduce(operator.or_, seen)


def tanh(x):
    """1 - 2 / (1 + e^2x), right to float32's last bits of 1; the chip's own tanh has eleven."""
    root = lax.rsqrt(1 + jnp.exp2(x * (2 * LOG2E)))
    return 1 - 2 * (root * root)


def kinds_of_logits(spec: AttentionSpec, extras: Extras) -> list[str]:
    """What of them takes registers beside products that are hidden by spans of places."""
    free = spec.band.also is not None and not isinstance(spec.band.also, Mask)
    kinds = {name.removeprefix("query_").removeprefix("key_") for name in given(extras) if name not in LENGTHS}
    return sorted(kinds | ({"soft_cap"} if spec.soft_cap is not None else set()) | ({"mask_fn"} if free else set()))


def are_few(spec: AttentionSpec, extras: Extras) -> bool:
    """Whether few of a thread's registers are enough for logits."""
    return not kinds_of_logits(spec, extras)


def check_products(spec: AttentionSpec, q, k, v) -> None:
    """Raises NotImplementedError for operands, or logits, that no kernel here multiplies."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise lacks(f"{q.dtype=}, {k.dtype=}, {v.dtype=}, supported: all bfloat16 or all float16")
    h, dim = q.shape[3], v.shape[3]
    if h % WIDTH or dim % WIDTH or max(h, dim) > WIDEST:
        raise lacks(f"head dims {h} and {dim}, supported: multiples of {WIDTH} up to {WIDEST}")
    if spec.uniform:
        raise lacks("XLA may have to partition the call further, which it can't a kernel")
    if spec.band.also is not None and not isinstance(spec.band.also, Mask):
        check_mask(spec.band.also)
    if spec.scale <= 0:
        raise lacks(f"{spec.scale=}, supported: above 0")


def check_mask(mask_fn: Callable) -> None:
    """Raises NotImplementedError for a function of positions that is not evaluated on registers."""
    positions = jax.ShapeDtypeStruct((ROWS, ROWS), jnp.int32)
    _check_on_registers(jax.make_jaxpr(mask_fn)(positions, positions))


def _check_on_registers(closed) -> None:
    variables = [*closed.jaxpr.invars, *(x for eqn in closed.eqns for x in eqn.outvars)]
    if any(jnp.ndim(x) for x in closed.consts) or closed.jaxpr.constvars:
        raise lacks("a mask_fn with arrays of its own, supported: one of positions alone")
    if odd := sorted({str(x.aval.dtype) for x in variables if x.aval.dtype not in TYPES}):
        raise lacks(f"a mask_fn with {', '.join(odd)}, supported: int32, uint32 and bool")
    if odd := sorted({eqn.primitive.name for eqn in closed.eqns} - ON_REGISTERS):
        raise lacks(f"a mask_fn with {', '.join(odd)}, supported: what is done number by number")
    for eqn in closed.eqns:
        if eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape:
            raise lacks("a mask_fn that broadcasts arrays, supported: numbers")
        for inner in eqn.params.values():
            if isinstance(inner, ClosedJaxpr):
                _check_on_registers(inner)


def _on_registers(closed: ClosedJaxpr, *args) -> list:
    """The results of what `check_mask` takes."""
    found = dict(zip(closed.jaxpr.invars, args, strict=True))
    for eqn in closed.eqns:
        operands = [x.val if isinstance(x, Literal) else found[x] for x in eqn.invars]
        inner = [x for x in eqn.params.values() if isinstance(x, ClosedJaxpr)]
        if inner:
            results = _on_registers(inner[0], *operands)
        elif eqn.primitive.name in OF_BOOLEANS and getattr(eqn.outvars[0].aval, "dtype", None) == jnp.bool_:
            results = [OF_BOOLEANS[eqn.primitive.name](*operands)]
        else:
            results = [eqn.primitive.bind(*operands, **eqn.params)]
        found |= zip(eqn.outvars, results, strict=True)
    return [x.val if isinstance(x, Literal) else found[x] for x in closed.jaxpr.outvars]


def lacks(what: str) -> NotImplementedError:
    return NotImplementedError(f"Hopper attention kernel: {what}")


def given(extras: Extras) -> tuple[str, ...]:
    """What a kernel is given of them."""
    return tuple(name for name, x in extras._asdict().items() if x is not None and name != "sinks")


def cleared(x, places: Places, lengths):
    """[B, N, T, ...] with zeros past each sequence's length: whatever is there, 0 times it must be 0."""
    if lengths is None:
        return x
    inside = places.of(jnp.arange(x.shape[2], dtype=jnp.int32)) < lengths[:, None]
    return jnp.where(inside.reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3)), x, jnp.zeros_like(x))


def across(x, shape, dim: int = 0):
    """A number of each row (dim 0) along it; of each column (1)."""
    return lax.broadcast_in_dim(x, shape, (dim,))


def filled(shape: tuple[int, ...], value: float):
    """In the layout of a product's rows, or of a product."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), WGMMA if len(shape) > 1 else WGMMA.reduce(1))
