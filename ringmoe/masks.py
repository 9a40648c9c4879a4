"""Structural masks: which keys a query sees, told from their positions alone.

A mask that is a rule rather than an array costs no memory, and whole blocks of it can be proved empty (skipped) or full
(not masked). Positions are global: a device that holds rows `offset .. offset + t` of a sequence passes `offset`.

`Causal`, `Window`, `Prefix` and `Chunks` are for `mask_fn=` of `ringmoe.dot_product_attention`, joined by `&` and `|`:
prefix-LM is `Causal() | Prefix(256)`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.errors import check

FAR = 2**30  # nothing is longer: positions and distances below it add up within int32


class Places(NamedTuple):
    """Where the elements of a local array stand in the whole sequence: equal pieces, each of consecutive places, one after
    another in ascending order.

    starts: of each piece, Python ints or traced int32. length: of a piece.
    """

    starts: tuple
    length: int

    def of(self, index):
        """The place of an element, or of each of an array of them."""
        place = self.starts[0] + index
        for n in range(1, len(self.starts)):
            jump = self.starts[n] - self.starts[n - 1] - self.length
            place = place + jnp.where(index < n * self.length, 0, jump)
        return place

    def before(self, place):
        """How many elements stand before a place."""
        return functools.reduce(operator.add, (jnp.clip(place - start, 0, self.length) for start in self.starts))


class Mask:
    """A mask that knows more than its pairs: what rows can meet, and which blocks it hides nothing of."""

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """No query sees keys farther to the left, to the right; None: any."""
        return None, None

    def __call__(self, query_positions, key_positions):
        """True where the key is seen, of the two (broadcast) arrays of positions."""
        raise NotImplementedError

    def keys_of(self, start, stop):
        """`(low, high)`: no query at `start .. stop` sees a key outside `low .. high`. Python ints or traced int32.

        A query alone, with `stop = start + 1`, sees all of these; what doesn't hold to that has a `keys_seen` of its own.
        """
        raise NotImplementedError

    def queries_of(self, start, stop):
        """`(low, high)`: no key at `start .. stop` is seen by a query outside `low .. high`."""
        raise NotImplementedError

    def keys_seen(self, query):
        """The spans `(low, high)` that together are the keys that one query sees, or that each of an array of them does."""
        return [self.keys_of(query, query + 1)]

    def queries_seen(self, key):
        """The same the other way round."""
        return [self.queries_of(key, key + 1)]

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        """True where every query of the block sees every key of it (no masking needed)."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other) if isinstance(other, Mask) else NotImplemented


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A query sees so many keys to its left and to its right, and the one at its own place; None: all of that side."""

    left: int | None = None
    right: int | None = None

    def __post_init__(self):
        fits = all(side is None or (isinstance(side, int) and side >= 0) for side in (self.left, self.right))
        check(fits, f"{self}, expected how many keys are seen on either side, >= 0, or None")

    @property
    def reach(self):
        return self.left, self.right

    def __call__(self, query_positions, key_positions):
        return Band(self.left, self.right)(query_positions, key_positions)

    def keys_of(self, start, stop):
        return -FAR if self.left is None else start - self.left, FAR if self.right is None else stop + self.right

    def queries_of(self, start, stop):
        return Window(self.right, self.left).keys_of(start, stop)

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        return Band(self.left, self.right).is_full_block(q_start, q_stop, k_start, k_stop)


def Causal() -> Window:
    """A query sees the keys up to its own place."""
    return Window(None, 0)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first `length` keys, and no other."""

    length: int

    def __post_init__(self):
        check(isinstance(self.length, int) and self.length >= 0, f"{self}, expected a number of keys, >= 0")

    def __call__(self, query_positions, key_positions):
        shape = jnp.broadcast_shapes(query_positions.shape, key_positions.shape)
        return jnp.broadcast_to(key_positions < self.length, shape)

    def keys_of(self, start, stop):
        return -FAR, self.length

    def queries_of(self, start, stop):
        return jnp.where(start < self.length, -FAR, FAR), FAR

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        return k_stop <= self.length


@dataclasses.dataclass(frozen=True)
class Chunks(Mask):
    """A query sees the keys of its own chunk of `length` consecutive places."""

    length: int

    def __post_init__(self):
        check(isinstance(self.length, int) and self.length > 0, f"{self}, expected the length of a chunk, > 0")

    @property
    def reach(self):
        return self.length - 1, self.length - 1

    def _chunk(self, place):
        # lax.div, not //: the sign fix-ups of a floor division don't lower in a TPU kernel compiled on another platform.
        place = jnp.asarray(place)
        return jax.lax.div(place, place.dtype.type(self.length))

    def __call__(self, query_positions, key_positions):
        return self._chunk(query_positions) == self._chunk(key_positions)

    def keys_of(self, start, stop):
        return self._chunk(start) * self.length, (self._chunk(stop - 1) + 1) * self.length

    queries_of = keys_of

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        first = self._chunk(q_start)
        return functools.reduce(operator.and_, (first == self._chunk(x) for x in (q_stop - 1, k_start, k_stop - 1)))


def _nearer(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _farther(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _common(a, b):
    """What is in both spans; a side that is open in both, -FAR or FAR itself, stays it."""
    return _nearest(jnp.maximum, -FAR, a[0], b[0]), _nearest(jnp.minimum, FAR, a[1], b[1])


def _nearest(of, far: int, *bounds):
    return functools.reduce(of, [x for x in bounds if not is_open(x, far)] or [far])


def is_open(bound, far: int) -> bool:
    """Whether a side of a span leaves everything on it in, as is known before the run."""
    return isinstance(bound, int) and bound == far


def _hull(*spans):
    """The least span that has both; one that is empty counts for nothing."""
    low = [jnp.where(low < high, low, FAR) for low, high in spans]
    high = [jnp.where(low < high, high, -FAR) for low, high in spans]
    return jnp.minimum(*low), jnp.maximum(*high)


@dataclasses.dataclass(frozen=True)
class _Joined(Mask):
    """Two masks, and how each kind of what they know is joined: pairs and blocks, spans, reach."""

    a: Mask
    b: Mask
    _pairs: ClassVar[Callable]
    _spans: ClassVar[Callable]
    _sides: ClassVar[Callable]
    _sign: ClassVar[str]

    @property
    def reach(self):
        (left, right), (other_left, other_right) = self.a.reach, self.b.reach
        return self._sides(left, other_left), self._sides(right, other_right)

    def __call__(self, query_positions, key_positions):
        return self._pairs(self.a(query_positions, key_positions), self.b(query_positions, key_positions))

    def keys_of(self, start, stop):
        return self._spans(self.a.keys_of(start, stop), self.b.keys_of(start, stop))

    def queries_of(self, start, stop):
        return self._spans(self.a.queries_of(start, stop), self.b.queries_of(start, stop))

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        block = q_start, q_stop, k_start, k_stop
        return self._pairs(self.a.is_full_block(*block), self.b.is_full_block(*block))

    def __str__(self) -> str:
        return f"({self.a} {self._sign} {self.b})"


class Both(_Joined):
    """What both masks show: `a & b`."""

    _pairs, _spans, _sides = map(staticmethod, (operator.and_, _common, _nearer))
    _sign = "&"

    def keys_seen(self, query):
        return [_common(x, y) for x in self.a.keys_seen(query) for y in self.b.keys_seen(query)]

    def queries_seen(self, key):
        return [_common(x, y) for x in self.a.queries_seen(key) for y in self.b.queries_seen(key)]


class Either(_Joined):
    """What either mask shows: `a | b`. That a block is full by the two together only is not seen."""

    _pairs, _spans, _sides = map(staticmethod, (operator.or_, _hull, _farther))
    _sign = "|"

    def keys_seen(self, query):
        return self.a.keys_seen(query) + self.b.keys_seen(query)

    def queries_seen(self, key):
        return self.a.queries_seen(key) + self.b.queries_seen(key)


@dataclasses.dataclass(frozen=True)
class Band:
    """Query i sees key j if and only if `i - left <= j <= i + right`; None leaves that side open.

    Causal attention is `Band(right=0)`; a sliding window of w keys is `Band(w - 1, 0)`; no mask is `Band()`.
    Where a sequence was padded, `queries` and `keys` are its lengths before: only `i < queries` and `j < keys` take part.
    `also` is one more condition on positions, of which blocks can be skipped where it is a `Mask`.
    """

    left: int | None = None
    right: int | None = None
    queries: int | None = None
    keys: int | None = None
    also: Callable | None = None

    @classmethod
    def make(cls, is_causal: bool, local_window_size: int | tuple[int, int] | None, mask_fn=None) -> "Band":
        """The band that the arguments of `dot_product_attention` describe together."""
        if isinstance(local_window_size, int):
            local_window_size = (local_window_size, local_window_size)
        left, right = local_window_size if local_window_size is not None else (None, None)
        check(
            (left is None or left >= 0) and (right is None or right >= 0),
            f"{local_window_size=}, expected how many keys to the left and to the right are seen, both >= 0",
        )
        if is_causal:
            right = 0
        if isinstance(mask_fn, Mask):  # so that a mask that reaches no farther stops a ring as a window does
            left, right = map(_nearer, (left, right), mask_fn.reach)
        left, right = (None if side is None or side >= FAR else side for side in (left, right))
        return cls(left, right, also=None if isinstance(mask_fn, Window) else mask_fn)

    @property
    def is_full(self) -> bool:
        return self == Band()

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Boolean mask of the two (broadcast) position arrays: True where the key is seen."""
        shape = jnp.broadcast_shapes(query_positions.shape, key_positions.shape)
        conditions = []
        if self.right is not None:
            conditions.append(key_positions <= query_positions + self.right)
        if self.left is not None:
            conditions.append(key_positions >= query_positions - self.left)
        if self.also is not None:
            conditions.append(self.also(query_positions, key_positions))
        if self.queries is not None:
            conditions.append(query_positions < self.queries)
        if self.keys is not None:
            conditions.append(key_positions < self.keys)
        if not conditions:
            return jnp.ones(shape, bool)
        return jnp.broadcast_to(functools.reduce(operator.and_, conditions), shape)

    def keys_seen(self, query):
        """As of a `Mask`, which `also` has to be, if it is given."""
        assert self.also is None or isinstance(self.also, Mask), self.also
        spans = [] if self.also is None else self.also.keys_seen(query)
        return self._seen(query, (self.left, self.right), (self.queries, self.keys), spans)

    def queries_seen(self, key):
        """The same the other way round."""
        assert self.also is None or isinstance(self.also, Mask), self.also
        spans = [] if self.also is None else self.also.queries_seen(key)
        return self._seen(key, (self.right, self.left), (self.keys, self.queries), spans)

    @staticmethod
    def _seen(place, sides, ends, spans):
        (before, after), (own_end, end) = sides, ends
        low, high = -FAR if before is None else place - before, FAR if after is None else place + (after + 1)
        if end is not None:
            high = _nearest(jnp.minimum, FAR, high, end)
        if own_end is not None:
            high = jnp.where(place < own_end, high, -FAR)
        return [_common((low, high), span) for span in spans] or [(low, high)]

    @property
    def window(self) -> "Band":
        """What it says of pairs."""
        return Band(self.left, self.right, also=self.also)

    @property
    def ends(self) -> "Band":
        """What it says of where sequences end."""
        return Band(queries=self.queries, keys=self.keys)

    def keys_met(self, start, stop, keys: Places, block: int):
        """The blocks of keys that queries `start .. stop` can meet: `(first, last)`, last exclusive.

        Args:
          start, stop: positions of the rows, python ints or traced int32.
          keys: where the keys stand. block: their block length, which divides a piece.
        """
        span = self.also.keys_of(start, stop) if isinstance(self.also, Mask) else None
        return self._met(start, stop, (self.left, self.right), (self.queries, self.keys), span, keys, block)

    def queries_met(self, start, stop, queries: Places, block: int):
        """The same the other way round: the blocks of queries that can meet keys `start .. stop`."""
        span = self.also.queries_of(start, stop) if isinstance(self.also, Mask) else None
        return self._met(start, stop, (self.right, self.left), (self.keys, self.queries), span, queries, block)

    @staticmethod
    def _met(start, stop, sides, ends, span, other: Places, block: int):
        first, last = 0, -(-len(other.starts) * other.length // block)
        # lax.div, not //: the sign fix-ups of a floor division don't lower in a TPU kernel compiled on another platform;
        # of one dtype, which with 64-bit types a Python int would not be.
        div = lambda x: jax.lax.div(x, x.dtype.type(block))
        (before, after), (own_end, end) = sides, ends
        if before is not None:
            first = div(other.before(start - before))
        if after is not None:
            last = div(other.before(stop + after) + block - 1)
        if span is not None:
            first = jnp.maximum(first, div(other.before(jnp.asarray(span[0], jnp.int32))))
            last = jnp.minimum(last, div(other.before(jnp.asarray(span[1], jnp.int32)) + block - 1))
        if end is not None:
            last = jnp.minimum(last, div(other.before(end) + block - 1))
        if own_end is not None:
            last = jnp.where(start < own_end, jnp.asarray(last, jnp.int32), 0)
        return first, last

    def met(self, queries: int, keys: int, block_q: int, block_k: int, apart: int | None, pieces: int = 1) -> int:
        """Pairs in the blocks that have a seen pair, of so many queries and keys.

        Args:
          apart: position of the first query less that of the first key; None where only the run knows, for the most there are.
          pieces: 2 where queries and keys are two each, and one's lie about the other's (`schedule/balance.py`) or are its own.
        """
        if pieces == 2 and self.left is None and self.right == 0:
            return queries // 2 * (keys + block_k // 2)
        if apart is None:
            if self.left is None or self.right is None:
                return queries * keys
            of_block = lambda block, other: (1 + -(-(block + self.left + self.right) // other)) * other
            return min(queries * min(keys, of_block(block_q, block_k)), keys * min(queries, of_block(block_k, block_q)))
        start = np.arange(0, queries, block_q) + apart
        first = 0 * start if self.left is None else (start - self.left) // block_k * block_k
        last = 0 * start + keys if self.right is None else -(-(start + block_q + self.right) // block_k) * block_k
        return block_q * int(np.maximum(np.clip(last, 0, keys) - np.clip(first, 0, keys), 0).sum())

    def meets(self, q_start, q_stop, k_start, k_stop):
        """False only where no query of the block sees any key of it."""
        met = jnp.bool_(True)
        if self.right is not None:
            met &= k_start <= q_stop - 1 + self.right
        if self.left is not None:
            met &= k_stop - 1 >= q_start - self.left
        if isinstance(self.also, Mask):
            low, high = self.also.keys_of(q_start, q_stop)
            met &= (k_start < high) & (k_stop > low)
        if self.queries is not None:
            met &= q_start < self.queries
        if self.keys is not None:
            met &= k_start < self.keys
        return met

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        """True where every query of the block sees every key of it (no masking needed)."""
        full = jnp.bool_(True)
        if self.right is not None:
            full &= k_stop - 1 <= q_start + self.right
        if self.left is not None:
            full &= k_start >= q_stop - 1 - self.left
        if self.also is not None:
            full &= self.also.is_full_block(q_start, q_stop, k_start, k_stop) if isinstance(self.also, Mask) else False
        if self.queries is not None:
            full &= q_stop <= self.queries
        if self.keys is not None:
            full &= k_stop <= self.keys
        return full

    def __str__(self) -> str:
        if self.left is None and self.right is None:
            text = "full"
        elif self.left is None and self.right == 0:
            text = "causal"
        else:
            left, right = ("all" if side is None else side for side in (self.left, self.right))
            text = f"window({left}, {right})"
        if self.also is None:
            return text
        also = (
            str(self.also) if isinstance(self.also, Mask) else getattr(self.also, "__name__", type(self.also).__name__)
        )
        return also if text == "full" else f"{text} & {also}"
