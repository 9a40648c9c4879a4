"""Structural masks: which keys a query sees, told from their positions alone.

A mask that is a rule rather than an array costs no memory, and whole blocks of it can be proved empty (skipped) or full
(not masked). Positions are global: a device that holds rows `offset .. offset + t` of a sequence passes `offset`.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.errors import check


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


@dataclasses.dataclass(frozen=True)
class Band:
    """Query i sees key j if and only if `i - left <= j <= i + right`; None leaves that side open.

    Causal attention is `Band(right=0)`; a sliding window of w keys is `Band(w - 1, 0)`; no mask is `Band()`.
    Where a sequence was padded, `queries` and `keys` are its lengths before: only `i < queries` and `j < keys` take part.
    """

    left: int | None = None
    right: int | None = None
    queries: int | None = None
    keys: int | None = None

    @classmethod
    def make(cls, is_causal: bool, local_window_size: int | tuple[int, int] | None) -> "Band":
        """The band that `jax.nn.dot_product_attention`'s two arguments describe together."""
        if isinstance(local_window_size, int):
            local_window_size = (local_window_size, local_window_size)
        left, right = local_window_size if local_window_size is not None else (None, None)
        check(
            (left is None or left >= 0) and (right is None or right >= 0),
            f"{local_window_size=}, expected how many keys to the left and to the right are seen, both >= 0",
        )
        # Nothing is longer than 2 ** 30: such a side is open, and no position plus a window leaves int32.
        left, right = (None if side is None or side >= 2**30 else side for side in (left, right))
        return cls(left, 0 if is_causal else right)

    @property
    def is_full(self) -> bool:
        return self == Band()

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Boolean mask of the two (broadcast) position arrays: True where the key is seen."""
        seen = jnp.ones(jnp.broadcast_shapes(query_positions.shape, key_positions.shape), bool)
        if self.right is not None:
            seen &= key_positions <= query_positions + self.right
        if self.left is not None:
            seen &= key_positions >= query_positions - self.left
        if self.queries is not None:
            seen &= query_positions < self.queries
        if self.keys is not None:
            seen &= key_positions < self.keys
        return seen

    @property
    def window(self) -> "Band":
        """What it says of pairs."""
        return Band(self.left, self.right)

    @property
    def ends(self) -> "Band":
        """What it says of where sequences end."""
        return Band(queries=self.queries, keys=self.keys)

    def transpose(self) -> "Band":
        """The same mask with the roles swapped: which queries see a key."""
        return Band(self.right, self.left, self.keys, self.queries)

    def blocks(self, start, stop, other: Places, block: int):
        """The blocks of the other side that rows `start .. stop` can meet: `(first, last)`, last exclusive.

        Args:
          start, stop: positions of the rows, python ints or traced int32.
          other: where the other side stands. block: its block length, which divides a piece.
        """
        first, last = 0, -(-len(other.starts) * other.length // block)
        # lax.div, not //: the sign fix-ups of a floor division don't lower in a TPU kernel compiled on another platform;
        # of one dtype, which with 64-bit types a Python int would not be.
        div = lambda x: jax.lax.div(x, x.dtype.type(block))
        if self.left is not None:
            first = div(other.before(start - self.left))
        if self.right is not None:
            last = div(other.before(stop + self.right) + block - 1)
        if self.keys is not None:
            last = jnp.minimum(last, div(other.before(self.keys) + block - 1))
        if self.queries is not None:
            last = jnp.where(start < self.queries, jnp.asarray(last, jnp.int32), 0)
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
            return queries * min(keys, (1 + -(-(block_q + self.left + self.right) // block_k)) * block_k)
        start = np.arange(0, queries, block_q) + apart
        first = 0 if self.left is None else (start - self.left) // block_k * block_k
        last = keys if self.right is None else -(-(start + block_q + self.right) // block_k) * block_k
        return block_q * int(np.maximum(np.clip(last, 0, keys) - np.clip(first, 0, keys), 0).sum())

    def is_full_block(self, q_start, q_stop, k_start, k_stop):
        """True where every query of the block sees every key of it (no masking needed)."""
        full = jnp.bool_(True)
        if self.right is not None:
            full &= k_stop - 1 <= q_start + self.right
        if self.left is not None:
            full &= k_start >= q_stop - 1 - self.left
        if self.queries is not None:
            full &= q_stop <= self.queries
        if self.keys is not None:
            full &= k_stop <= self.keys
        return full

    def __str__(self) -> str:
        if self.left is None and self.right is None:
            return "full"
        if self.left is None and self.right == 0:
            return "causal"
        left, right = ("all" if side is None else side for side in (self.left, self.right))
        return f"window({left}, {right})"
