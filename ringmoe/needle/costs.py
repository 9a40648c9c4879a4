"""What the reference system's model costs at sizes worth training, on machines that aren't here: by compiler and inspector.

One layer of each kind is compiled by itself, at its full width, and counted as often as the model has it:

    time   = sum over kinds of layers * runs * time of one
    memory = what all layers keep at once + the most that one program needs beside what is kept

So no layer's work hides another's exchanges, and the gradients' norm, one pass over the weights, is left out. Weights and
activations are bfloat16; training keeps float32 weights and Adam's two moments, and makes each layer again going backward.
A token is a byte, a patch or a frame, as in the small model. `resident` tells what is kept before anything is compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.needle import haystack, model
from ringmoe.needle.haystack import Cache
from ringmoe.needle.model import SIGNAL, SYMBOLS, Config, Tokens

AXES = ("fsdp", "expert")  # tokens are cut along both, experts along the second, other dims of weights along the first
CHUNK = 2**18  # tokens that a prefill reads at once, with the halo of the chunk before
CONTEXT = 2**20  # tokens that are read, and asked about
TRAINED = (2**20, 10 * 2**20)  # tokens of a training step: one sequence
ADAM = optax.scale_by_adam(b2=0.98)


class Program(NamedTuple):
    """One layer's program and what it is counted as."""

    function: Callable
    arguments: tuple
    layers: int  # that keep `kept`
    runs: int  # of each; 0: kept, but not run
    kept: Any  # arguments that each layer has for itself
    shared: Any = ()  # arguments that another program keeps
    flops: float = 0.0  # useful ones of a run of a layer, of all devices: what is done twice counts once


def layer_weights(config: Config) -> dict[str, int]:
    """Weights that a token is multiplied by in a layer of each kind."""
    d, n = config.model_dim, config.num_heads
    experts = config.router.top_k * 3 * d * config.expert_hidden_dim + d * config.router.num_experts
    return {
        "local": 4 * d * n * config.local_head_dim + experts,
        "global": 2 * d * n * config.global_head_dim + experts,
    }


def num_weights(config: Config) -> tuple[int, int]:
    """All weights, and those that a token meets that predicts."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    each = layer_weights(config)
    met = config.num_local * each["local"] + config.num_global * each["global"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)), met


def global_layer(
    params: model.Params, x: jax.Array, attend: Callable, seen: jax.Array, config: Config, key: jax.Array | None = None
):
    """Logits after one global layer, in x's dtype: the unembedding to 128 symbols, next to nothing, counts with each."""
    return model.global_layers(params, x, seen, lambda query: attend(query.astype(x.dtype)), config, key)[0]


class Arrays(NamedTuple):
    """Abstract arguments on a mesh with AXES."""

    config: Config
    mesh: Mesh

    def of(self, shape: tuple[int, ...], dtype: Any, *spec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, P(*spec)))

    def weights(self, dtype: Any) -> tuple[model.Params, model.Params, model.Params]:
        """(a local layer's, a global layer's with the unembedding, the embedding's and the cache's)."""
        one = dataclasses.replace(self.config, num_local=1, num_global=1)
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: self.of(x.shape, dtype, *_spec(path[-1].key, x.shape)),
            jax.eval_shape(lambda: model.init(jax.random.key(0), one)),
        )
        (local,), far = (
            params.pop("local"),
            {name: params.pop(name) for name in ("global", "final_norm", "unembedding")},
        )
        return local, far, {**params, "local": []}

    def tokens(self, length: int, *dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        """[1, T, ...], cut along T where there are many."""
        return self.of((1, length, *dims), dtype, None, AXES if length % self.mesh.size == 0 else None)

    def read(self, length: int) -> Tokens:
        numbers = self.tokens(length, dtype=jnp.int32)
        return Tokens(numbers, numbers, self.tokens(length, SIGNAL))


def _spec(name: str, shape: tuple[int, ...]) -> tuple:
    """How weights lie: experts and heads along "expert", what is gathered before it is used along "fsdp"."""
    wide, cut = AXES
    if len(shape) == 3 and shape[1] == 1:  # the cache's one head
        return (AXES,)
    return {"in": (cut, None, wide), "gate": (cut, None, wide), "out": (cut, wide), "output": (cut, None, wide)}.get(
        name, (wide, cut) if len(shape) == 3 else ()
    )


def _step(layer: Callable) -> Callable:
    """A layer's part of a training step: (state, x, more, dy) -> (y, state, dx): forward; later again, backward, Adam."""

    def halved(weights):
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)

    def step(state, x, more, dy):
        weights, moments = state
        y = layer(halved(weights), x, *more)
        x, dy, _ = jax.lax.optimization_barrier((x, dy, y))  # or XLA would keep what the forward pass made
        _, pull = jax.vjp(lambda w, *given: layer(halved(w), *given), weights, x, *more)
        grads, *dx = pull(dy)
        updates, moments = ADAM.update(grads, moments)
        weights = jax.tree.map(lambda w, u: w - 1e-4 * u, weights, updates)
        return y, (weights, moments), [d for d in jax.tree.leaves(dx) if d.dtype != jax.dtypes.float0]

    return ringmoe.jit(step, donate_argnums=0)


def training(config: Config, mesh: Mesh, length: int) -> dict[str, Program]:
    """A step on one sequence, every token of which predicts the next."""
    arrays = Arrays(config, mesh)
    x, head = arrays.tokens(length, config.model_dim), arrays.tokens(length, 1, config.global_head_dim)

    def near(layer, x):
        return model.local_layer(layer, x, model.windowed(config), config, jax.random.key(0))[0]

    def far(params, x, keys, values):
        attend = lambda query: ringmoe.dot_product_attention(query, keys, values, is_causal=True)
        return global_layer(params, x, attend, jnp.arange(length) + 1, config, jax.random.key(0))

    def ends(params, tokens):
        y = model.embed(params, tokens)
        return y, model.keys_values(params, y, jnp.arange(y.shape[1]), config)

    def program(layer, weights, x, more, dy, layers, flops):
        state = weights, optax.ScaleByAdamState(arrays.of((), jnp.int32), weights, weights)  # pyright: ignore[reportArgumentType]
        return Program(_step(layer), (state, x, more, dy), layers, 1, (state, x), more, flops)

    local, away, rest = arrays.weights(jnp.float32)
    each, n = layer_weights(config), config.num_heads
    flops = {
        "local": 6 * each["local"] * length + 12 * n * config.local_head_dim * length * (config.window + 1),
        "global": 6 * each["global"] * length + 6 * n * config.global_head_dim * length**2,
    }
    logits = arrays.tokens(length, SYMBOLS)
    return {
        "local": program(near, local, x, (), x, config.num_local, flops["local"]),
        "global": program(far, away, x, (head, head), logits, config.num_global, flops["global"]),
        "ends": program(ends, rest, arrays.read(length), (), (x, (head, head)), 1, 0.0),
    }


def num_chunks(config: Config, length: int) -> int:
    """How many chunks a context is read in, each beginning with the halo of the one before."""
    return 1 + max(0, -(-(length - CHUNK) // (CHUNK - config.halo)))


def _writing(config: Config, arrays: Arrays, rest: model.Params, new: int, skip: int, runs: int) -> Program:
    """`haystack.read` without its local layers: embedding, keys and values, and their place in the cache."""
    head = arrays.of((1, CONTEXT, 1, config.global_head_dim), jnp.bfloat16, None, AXES)
    write = functools.partial(haystack.read, skip=skip, config=config)
    arguments = (rest, Cache(head, head), arrays.read(new), arrays.of((1,), jnp.int32))
    return Program(ringmoe.jit(write, donate_argnums=1), arguments, 1, runs, arguments[:2])


def prefill(config: Config, mesh: Mesh, length: int) -> dict[str, Program]:
    """A context read into the cache, chunk by chunk: local layers alone."""
    arrays, chunks = Arrays(config, mesh), num_chunks(config, length)
    local, far, rest = arrays.weights(jnp.bfloat16)
    size = min(CHUNK, length)
    read = ringmoe.jit(lambda layer, x: model.local_layer(layer, x, model.windowed(config), config)[0])
    pairs = 4 * config.num_heads * config.local_head_dim * (config.window + 1)
    flops = (2 * layer_weights(config)["local"] + pairs) * length / chunks
    x = arrays.tokens(size, config.model_dim)
    return {
        "local": Program(read, (local, x), config.num_local, chunks, local, (), flops),
        "global": Program(read, (), config.num_global, 0, far),
        "ends": _writing(config, arrays, rest, size, config.halo if chunks > 1 else 0, chunks),
    }


def decode(config: Config, mesh: Mesh, length: int) -> dict[str, Program]:
    """One token after a context of so many: its window's keys and values are kept, a layer's own, its heads apart."""
    arrays = Arrays(config, mesh)
    local, far, rest = arrays.weights(jnp.bfloat16)
    lay = lambda name, *spec: arrays.of(far["global"][0][name].shape, jnp.bfloat16, *spec)
    # Every device has keys for all heads: were heads cut too, the cache would be gathered along their axis.
    far["global"][0].update(query=lay("query", AXES), output=lay("output", None, None, AXES))
    x, number, n = arrays.tokens(1, config.model_dim), arrays.of((1,), jnp.int32), config.num_heads
    window = arrays.of((1, config.window + 1, n, config.local_head_dim), jnp.bfloat16, None, None, AXES[1])
    writing = _writing(config, arrays, rest, 1, 0, 1)
    cache = writing.arguments[1]

    def near(layer, x, before, last):
        after = []

        def attend(query, *new):
            keys, values = (ringmoe.update_cache(old, a, last) for old, a in zip(before, new))
            after.extend((keys, values))
            return ringmoe.decode_attention(query, keys, values, last + 1)

        return model.local_layer(layer, x, attend, config)[0], after

    def away(params, x, cache, count):
        attend = lambda query: ringmoe.decode_attention(query, cache.keys, cache.values, count)
        return global_layer(params, x, attend, count, config)

    each, before = layer_weights(config), (window, window)
    flops = 2 * each["local"] + 4 * n * config.local_head_dim * (config.window + 1)
    far_flops = 2 * each["global"] + 4 * n * config.global_head_dim * length
    near, away = ringmoe.jit(near, donate_argnums=2), ringmoe.jit(away)
    return {
        "local": Program(near, (local, x, before, number), config.num_local, 1, (local, before), (), flops),
        "global": Program(away, (far, x, cache, number), config.num_global, 1, far, cache, far_flops),
        "ends": writing,
    }


def shard_bytes(tree: Any) -> int:
    """Bytes of a device's part of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def resident(programs: dict[str, Program]) -> int:
    """Bytes a device that all layers keep at once."""
    return sum(program.layers * shard_bytes(program.kept) for program in programs.values())
