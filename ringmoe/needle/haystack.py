"""Reading a long context into a cache, chunk by chunk, and asking questions about it.

The cache is one array of keys and one of values for all global layers, sharded along the sequence where a mesh is given.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

import ringmoe
from ringmoe.needle import data, model
from ringmoe.needle.model import Config, Params, Tokens

AXIS = "seq"  # of the mesh: along it the context is cut
OWN = 32  # tokens of a question and its answer, at most
TOGETHER = 32  # questions that are asked at once


class Cache(NamedTuple):
    """Keys and values of S tokens, [1, S, 1, H] each."""

    keys: Any
    values: Any


class Context(NamedTuple):
    """What was read: its last tokens and how many there are."""

    end: Tokens
    length: int


def read(params: Params, cache: Cache, tokens: Tokens, first: jax.Array, skip: int, config: Config) -> Cache:
    """The cache with a chunk [1, T] written from place `first` on, but for its `skip` first tokens, which were there."""
    x, _ = model.local_layers(params, model.embed(params, tokens), config)
    positions = first + jnp.arange(x.shape[1])
    new = (a[:, skip:].astype(cache.keys.dtype) for a in model.keys_values(params, x, positions, config))
    return Cache(*(ringmoe.update_cache(old, a, first + skip) for old, a in zip(cache, new)))


def merged(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Attention to two sets of keys from that to each: outputs [..., H] and their LSEs [...]."""
    (out, lse), (out_, lse_) = one, other
    share = jax.nn.sigmoid(lse - lse_)[..., None]
    return out.astype(out_.dtype) * share + out_ * (1 - share)


def answer(
    params: Params, cache: Cache, length: jax.Array, tokens: Tokens, own: jax.Array, config: Config
) -> jax.Array:
    """Logits [Q, SYMBOLS] of what follows each of Q questions, each asked by itself after the same context.

    All of them pass over the cache at once: their heads stand side by side as heads of one query (attention to a shared
    prefix, Juravsky et al., Hydragen, https://arxiv.org/abs/2402.05099), and each one's share of its own tokens is merged.

    Args:
      length: [1] int32, tokens of the context.
      tokens: [Q, L], the context's end followed by the question; `own`: [Q] int32, how many of them are the question's.
    """
    x, _ = model.local_layers(params, model.embed(params, tokens), config)
    positions = (length + own)[:, None] - jnp.arange(tokens.kind.shape[1])[::-1] - 1
    keys, values = (a[:, -OWN:] for a in model.keys_values(params, x, positions, config))
    is_own = jnp.arange(OWN) >= OWN - own[:, None]

    def attend(query):
        q, _, n, h = query.shape
        side_by_side = query.reshape(1, 1, q * n, h).astype(cache.keys.dtype)
        far, far_lse = ringmoe.decode_attention(side_by_side, *cache, length, return_residual=True)
        near = ringmoe.dot_product_attention(query, keys, values, mask=is_own[:, None, None], return_residual=True)
        return merged((far.reshape(query.shape), far_lse.reshape(query.shape[:-1])), near)

    logits, _ = model.global_layers(params, x[:, -1:], (length + own)[:, None], attend, config)
    return logits[:, 0]


@dataclasses.dataclass(frozen=True)
class Reader:
    """The programs that read and answer, for caches of one size; compiled once for every length up to it.

    Args:
      capacity: S, tokens. chunk: tokens that are read at once, the `halo` of the chunk before included.
      mesh: one axis, "seq"; None: one device.
    """

    config: Config
    capacity: int
    chunk: int = 32768
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.bfloat16

    @functools.cached_property
    def reading(self) -> Callable:
        """`read`, compiled: (params, cache, tokens, first, skip=) -> cache; the cache is overwritten."""
        return ringmoe.jit(functools.partial(read, config=self.config), donate_argnames="cache", static_argnames="skip")

    @functools.cached_property
    def answering(self) -> Callable:
        """`answer`, compiled: (params, cache, length, tokens, own) -> logits."""
        return ringmoe.jit(functools.partial(answer, config=self.config))

    def _placed(self, x, *spec):
        return x if self.mesh is None else jax.device_put(x, NamedSharding(self.mesh, P(*spec)))

    def empty(self) -> Cache:
        """A cache that holds nothing yet, born in its place."""
        shape = (1, self.capacity, 1, self.config.global_head_dim)
        sharding = None if self.mesh is None else NamedSharding(self.mesh, P(None, AXIS))
        zeros = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=sharding)
        return Cache(zeros(), zeros())

    def cache_bytes(self, length: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * length * self.config.global_head_dim * jnp.dtype(self.dtype).itemsize

    def chunks(self, stretch: data.Stretch, rng: np.random.Generator) -> Iterator[tuple[int, int, Tokens]]:
        """`(first, skip, tokens [1, T])`: chunk after chunk, each with the halo of the one before in front."""
        length = len(stretch.kind)
        size, halo = min(self.chunk, self.capacity), self.config.halo
        before, at = None, 0
        while at < length:
            new = data.Stretch(*(a[at : at + size - (halo if at else 0)] for a in stretch))
            tokens = data.render(new, rng)
            if before is not None:
                tokens = Tokens(*(np.concatenate(pair) for pair in zip(before, tokens)))
            first, skip = (at - halo, halo) if at else (0, 0)
            at += len(new.kind)
            before = Tokens(*(a[-halo:] for a in tokens))
            padding = size - len(tokens.kind)  # what is written past the end is not read
            yield first, skip, Tokens(*(np.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1)))[None] for a in tokens))

    def prefill(
        self, params: Params, cache: Cache, stretch: data.Stretch, rng: np.random.Generator
    ) -> tuple[Cache, Context]:
        """The cache with the whole stretch read, the old one being overwritten; and what a question needs to follow it."""
        length = len(stretch.kind)
        assert length <= self.capacity, (length, self.capacity)
        end = None
        for first, skip, tokens in self.chunks(stretch, rng):
            seen = Tokens(*(a[0, : length - first] for a in tokens))
            end = seen if end is None else Tokens(*(np.concatenate([a, b[skip:]]) for a, b in zip(end, seen)))
            end = Tokens(*(a[-self.room :] for a in end))
            placed = Tokens(*(self._placed(a, None, AXIS) for a in tokens))
            cache = self.reading(params, cache, placed, np.full(1, first, np.int32), skip=skip)
        assert end is not None
        return cache, Context(end, length)

    @property
    def room(self) -> int:
        """Tokens of a question with so much of what was before it as it depends on."""
        return self.config.halo + OWN

    def ask(self, params: Params, cache: Cache, context: Context, asked: Sequence[data.Asked]) -> list[bytes]:
        """What the model says to each question, as long as the answer is; the likeliest byte each time.

        Up to TOGETHER questions with answers of one length pass over the cache at once.
        """
        said = [b""] * len(asked)
        for size in sorted({len(one.answer) for one in asked}):
            alike = [i for i, one in enumerate(asked) if len(one.answer) == size]
            for group in (alike[i : i + TOGETHER] for i in range(0, len(alike), TOGETHER)):
                room = min(TOGETHER, 1 << (len(group) - 1).bit_length())  # few programs: powers of two
                for _ in range(size):
                    written = [asked[i].question + said[i] for i in group]
                    logits = self.logits(params, cache, context, written + written[:1] * (room - len(group)))
                    for i, one in zip(group, logits, strict=False):
                        said[i] += bytes([np.argmax(one)])
        return said

    def logits(self, params: Params, cache: Cache, context: Context, written: Sequence[bytes]) -> np.ndarray:
        """Logits [Q, SYMBOLS] of what follows each of some texts after the context."""
        tokens = Tokens(*map(np.stack, zip(*(_followed(context.end, one, self.room) for one in written))))
        own = np.array([len(one) for one in written], np.int32)
        return np.asarray(self.answering(params, cache, np.full(1, context.length, np.int32), tokens, own))


def _followed(end: Tokens, written: bytes, room: int) -> Tokens:
    """The last `room` tokens of a context's end and a text after it."""
    assert len(written) <= OWN, written
    own = data.as_text(written)
    return Tokens(*(np.concatenate([a, b])[-room:] for a, b in zip(end, own)))
