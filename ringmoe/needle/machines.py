"""The same programs, dense and sharded, and compiled for machines that aren't here."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.needle import data, model, train
from ringmoe.needle.haystack import AXIS, TOGETHER, Cache, Reader
from ringmoe.needle.model import SIGNAL, Config, Params, Tokens

TARGETS = ("v5p:4x4x8", "h200x8")


class Agreement(NamedTuple):
    """How logits compare after one context, of one program over the whole sequence and of others that read it in chunks."""

    length: int  # tokens
    questions: int
    largest: float  # logit
    chunks: float  # largest difference of one device that reads chunks into a cache, from one program over all
    sharded: float  # of the same over a mesh, from one program over all
    devices: float  # of the two that read chunks, over a mesh and on one device


def agreement(
    config: Config, params: Params, mesh: Mesh | None, length: int, chunk: int, seed: int, count: int = 8
) -> Agreement:
    """Logits after each of `count` questions about a context of mixed modalities: float32, largest differences.

    The reference is `model.forward` on the whole sequence, one device and no cache: the context, then one question.
    """
    rng = np.random.default_rng(seed)
    stretch = data.haystack(length, None, rng)
    made = data.chains(count, 1, rng)
    for i, ((one,), _) in enumerate(made):
        data.put(stretch, (2 * i + 1) * (length // (2 * count)), i % len(model.KINDS), one)
    written = [asked.question for _, asked in made]
    readers = [Reader(config, length, chunk, m, jnp.float32) for m in (None, mesh)]
    logits = []
    for reader in readers:
        cache, context = reader.prefill(params, reader.empty(), stretch, np.random.default_rng(seed))
        logits.append(reader.logits(params, cache, context, written))
    chunks = [tokens for tokens in readers[0].chunks(stretch, np.random.default_rng(seed))]
    whole = Tokens(*(np.concatenate([t[i][:, skip:] for _, skip, t in chunks], 1)[:, :length] for i in range(3)))
    forward = jax.jit(functools.partial(model.forward, num_queries=1, config=config))
    expected = np.concatenate([forward(params, _after(whole, one))[0][:, 0] for one in written])
    apart = lambda a, b: float(np.abs(a - b).max())
    dense, sharded = logits
    return Agreement(
        length,
        count,
        float(np.abs(expected).max()),
        apart(dense, expected),
        apart(sharded, expected),
        apart(sharded, dense),
    )


def _after(context: Tokens, written: bytes) -> Tokens:
    """[1, T] tokens of a context and a text."""
    own = data.as_text(written)
    return Tokens(*(np.concatenate([a, b[None]], 1) for a, b in zip(context, own)))


def programs(
    config: Config, mesh: Mesh, capacity: int, chunk: int, batch: int = 1
) -> dict[str, tuple[Any, tuple, dict]]:
    """The programs of the reference system on a mesh with the axis "seq": function, abstract arguments, keywords.

    Reading one more chunk of a context, TOGETHER questions after `capacity` tokens of it, and a step of training on `batch`
    sequences of as many.
    """
    placed = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    everywhere = lambda tree: jax.tree.map(lambda x: placed(x.shape, x.dtype), tree)

    def tokens(rows: int, length: int, *spec) -> Tokens:
        numbers = placed((rows, length), jnp.int32, *spec)
        return Tokens(numbers, numbers, placed((rows, length, SIGNAL), jnp.float32, *spec))

    reader = Reader(config, capacity, chunk, mesh)
    state = everywhere(jax.eval_shape(lambda: train.init_state(0, config, train.STEPS)))
    cache = Cache(*[placed((1, capacity, 1, config.global_head_dim), reader.dtype, None, AXIS)] * 2)
    one = placed((1,), jnp.int32)
    shown, room = placed((batch, capacity), jnp.int32, None, AXIS), placed((batch, 256), jnp.int32)
    example = data.Example(tokens(batch, capacity, None, AXIS), shown, room)
    step = ringmoe.jit(functools.partial(train.train_step, config=config, steps=train.STEPS), donate_argnums=0)
    questions = (state.params, cache, one, tokens(TOGETHER, reader.room), placed((TOGETHER,), jnp.int32))
    return {
        f"reading {chunk:,} tokens": (
            reader.reading,
            (state.params, cache, tokens(1, chunk, None, AXIS), one),
            {"skip": config.halo},
        ),
        f"a byte of {TOGETHER} answers": (reader.answering, questions, {}),
        f"a training step of {capacity:,} tokens": (step, (state, example), {}),
    }


def compiled(config: Config, target: str, capacity: int, chunk: int) -> dict[str, ringmoe.OverlapReport]:
    """What the inspector says of each program, compiled for all chips of a machine that need not be here."""
    machine = ringmoe.target(target)
    mesh = machine.mesh({AXIS: machine.num_devices})
    return {
        name: ringmoe.inspect(program, *args, target=target, mesh=mesh, **keywords)
        for name, (program, args, keywords) in programs(config, mesh, capacity, chunk).items()
    }


def seconds(us: float) -> str:
    """A time to read: "17.1 s", "3.2 ms", "70 us"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:,.1f} {unit}"
    return f"{us:.0f} us"
