"""A sparse multimodal decoder whose prefill is linear in the context, as plain functions over a pytree of arrays.

    tokens -> local layers: short convolution, attention in a window, top-2 experts      every token
           -> keys and values, once: the cache                                            every token
           -> global layers: attention to that cache without positions, top-2 experts     tokens that predict

It is a decoder-decoder (Sun et al., You Only Cache Once, https://arxiv.org/abs/2405.05254): every global layer reads the same
cache, which depends on the local layers alone. So a token whose prediction nobody needs never enters a global layer, and
reading T tokens costs T times a constant. Tokens of text, images and audio are interleaved; each has one linear embedding.

No function here knows of a mesh: on one device it is the dense model; compiled by `ringmoe.jit` with its arguments placed on a
mesh it is the sharded one. B batch, T tokens, D model dim, N query heads, H head dim, F hidden dim of an expert, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ringmoe
from ringmoe.demo.model import rms_norm

Params = dict[str, Any]
KINDS = ("text", "image", "audio")
SIGNAL = 64  # numbers in an image patch or an audio frame
SYMBOLS = 128  # of text


class Tokens(NamedTuple):
    """Interleaved tokens of every modality."""

    kind: Any  # [B, T] int32, index into KINDS
    byte: Any  # [B, T] int32, of text; 0 elsewhere
    signal: Any  # [B, T, SIGNAL] float32, a patch's pixels or a frame's energies; 0 of text


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; hashable, so that it can be a static argument."""

    num_local: int = 2
    num_global: int = 2
    model_dim: int = 64
    num_heads: int = 4
    local_head_dim: int = 16
    global_head_dim: int = 64  # of the one key head that all global layers' heads share
    convolution: int = 4  # tokens that a short convolution sees, its own included
    window: int = 32  # tokens before its own that a local head sees
    expert_hidden_dim: int = 64
    router: ringmoe.RouterConfig = ringmoe.RouterConfig.preset("top2_noisy")
    rope_base: float = 100.0  # of local layers
    global_rope_base: float | None = None  # of global layers; None: they have no positions
    temperature: bool = True  # logits of global layers times log n, n the keys that a query sees
    load_balance_weight: float = 0.05

    @property
    def halo(self) -> int:
        """How many tokens before its own a token's keys and values depend on, at most."""
        return self.num_local * (self.window + self.convolution - 1) + 1


def init(key: jax.Array, config: Config) -> Params:
    """Float32 weights, normal with variance 1 / fan-in; what a layer adds to the residual is smaller by the depth."""
    d, n, e, f = config.model_dim, config.num_heads, config.router.num_experts, config.expert_hidden_dim
    local, wide = config.local_head_dim, config.global_head_dim
    residual = (2 * (config.num_local + config.num_global)) ** -0.5
    keys = iter(jax.random.split(key, 16 * (config.num_local + config.num_global + 1)))

    def normal(*shape, fan_in, scale=1.0):
        return scale * fan_in**-0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    def experts():
        return {
            "norm": jnp.ones(d),
            "router": normal(d, e, fan_in=d),
            "router_noise": jnp.zeros((d, e)),
            "experts": {
                "gate": normal(e, d, f, fan_in=d),
                "in": normal(e, d, f, fan_in=d),
                "out": normal(e, f, d, fan_in=f, scale=residual),
            },
        }

    def local_layer():
        return {
            "convolution": normal(config.convolution, d, fan_in=config.convolution),
            "norm": jnp.ones(d),
            **{name: normal(d, n, local, fan_in=d) for name in ("query", "key", "value")},
            "output": normal(n, local, d, fan_in=n * local, scale=residual),
            "ffn": experts(),
        }

    key = normal(d, 1, wide, fan_in=d)

    def global_layer():
        return {
            "norm": jnp.ones(d),
            "query": jnp.repeat(key, n, 1),  # at first each token attends to what is like itself
            "sharpness": jnp.ones(n),
            "output": normal(n, wide, d, fan_in=n * wide, scale=residual),
            "ffn": experts(),
        }

    return {
        "kind": normal(len(KINDS), d, fan_in=1, scale=0.1),
        "byte": normal(SYMBOLS, d, fan_in=1),
        "patch": normal(SIGNAL, d, fan_in=SIGNAL, scale=2.0),
        "frame": normal(SIGNAL, d, fan_in=SIGNAL, scale=2.0),
        "local": [local_layer() for _ in range(config.num_local)],
        "cache_norm": jnp.ones(d),
        "key": key,
        "value": normal(d, 1, wide, fan_in=d),
        "global": [global_layer() for _ in range(config.num_global)],
        "final_norm": jnp.ones(d),
        "unembedding": normal(d, SYMBOLS, fan_in=d, scale=0.1),  # nearly even at first
    }


def embed(params: Params, tokens: Tokens) -> jax.Array:
    """[B, T, D]: a row for a byte; a linear map of a patch's pixels or a frame's energies; and a row for the modality."""
    is_kind = [(tokens.kind == i)[..., None] for i in range(len(KINDS))]
    text = params["byte"][tokens.byte]
    x = jnp.where(
        is_kind[1], tokens.signal @ params["patch"], jnp.where(is_kind[2], tokens.signal @ params["frame"], text)
    )
    return x + params["kind"][tokens.kind]


def unit(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2)) along the last dim: what bounds logits, so that a temperature means something."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]) by position * base^(-2i / H): x [B, T, N, H], positions int32 [T] or [B, T].

    Source: RoFormer, https://arxiv.org/abs/2104.09864. Angles are counted in 2^-24 turns, modulo one turn: so a distance is the
    same after ten million tokens as after ten, where float32's product of position and frequency is off by its last bits.
    """
    half, turn = x.shape[-1] // 2, 2**24
    frequency = np.round(base ** -(np.arange(half) / half) * turn / (2 * np.pi)).astype(np.int32)
    parts = (positions[..., None, None] * frequency) & (turn - 1)  # exact: int32's wrapping is a whole number of turns
    angle = parts.astype(jnp.float32) * (2 * np.pi / turn)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def convolve(weight: jax.Array, x: jax.Array) -> jax.Array:
    """sum_i weight_i x_{t - i}, each feature by itself: weight [W, D], x [B, T, D]; zeros before the start."""
    padded = jnp.pad(x, ((0, 0), (len(weight) - 1, 0), (0, 0)))
    last = len(weight) - 1
    moved = [weight[i] * padded[:, last - i : last - i + x.shape[1]] for i in range(len(weight))]
    return jnp.sum(jnp.stack(moved), 0)


def experts(layer: Params, x: jax.Array, config: Config, key: jax.Array | None):
    """Top-2 experts' sum for the normed x [B, T, D], to be added to x, and `MoeMetrics`.

    With a key, in training, the router's logits are noisy and experts have a capacity. Without, nobody is dropped: what a token
    becomes depends on no other's choice, however the context is cut into chunks.
    """
    router = config.router if key is not None else dataclasses.replace(config.router, capacity_factor=None)
    weights = layer["experts"]
    return ringmoe.moe_ffn(
        rms_norm(x, layer["norm"]),
        layer["router"],
        weights["in"],
        weights["out"],
        w_gate=weights["gate"],
        config=router,
        noise_weight=layer["router_noise"] if router.noise == "learned" else None,
        key=key,
        train=key is not None,
    )


def local_layers(params: Params, x: jax.Array, config: Config, key: jax.Array | None = None):
    """`(x [B, T, D], metrics of each layer)` of embedded tokens: what each of them and the `halo` before it are."""
    metrics = []
    for i, layer in enumerate(params["local"]):
        one = None if key is None else jax.random.fold_in(key, i)
        x, routing = local_layer(layer, x, windowed(config), config, one)
        metrics.append(routing)
    return x, metrics


def windowed(config: Config) -> Callable:
    """Attention in the window, of a whole sequence."""
    return functools.partial(ringmoe.dot_product_attention, is_causal=True, local_window_size=(config.window, 0))


def local_layer(layer: Params, x: jax.Array, attend: Callable, config: Config, key: jax.Array | None = None):
    """`(x [B, T, D], metrics)` after one; `attend` of query, key and value [B, T, N, H] may be to a cache of them."""
    x = x + convolve(layer["convolution"], x)
    y, positions = rms_norm(x, layer["norm"]), jnp.arange(x.shape[1])  # from anywhere: only distances matter
    query, key_, value = (jnp.einsum("btd,dnh->btnh", y, layer[name]) for name in ("query", "key", "value"))
    out = attend(*(rope(a, positions, config.rope_base) for a in (query, key_)), value)
    x = x + jnp.einsum("btnh,nhd->btd", out, layer["output"])
    y, metrics = experts(layer["ffn"], x, config, key)
    return x + y, metrics


def keys_values(params: Params, x: jax.Array, positions: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """What the cache holds of x [B, T, D] at positions [T] or [B, T]: keys and values, [B, T, 1, H] each.

    A token's key is made of the token before it: its value answers "what came after something like this?", which is what
    a token that predicts asks (KV shifting, Xu et al., https://arxiv.org/abs/2411.19574).
    """
    y = rms_norm(x, params["cache_norm"])
    before = jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    key, value = (jnp.einsum("btd,dkh->btkh", a, params[name]) for a, name in ((before, "key"), (y, "value")))
    return placed(unit(key), positions, config), unit(value)


def placed(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """A global layer's queries or keys, which know where they are only if the model is made so."""
    return x if config.global_rope_base is None else rope(x, positions, config.global_rope_base)


def global_layers(
    params: Params,
    x: jax.Array,
    num_keys: jax.Array,
    attend: Callable[[jax.Array], jax.Array],
    config: Config,
    key: jax.Array | None = None,
):
    """`(logits [B, T, SYMBOLS] of each next byte, metrics of each layer)`.

    Args:
      x: [B, T, D], of `local_layers`, of the tokens that predict.
      num_keys: [T] or [B, T], how many keys each of them sees. The logits' scale is log n: softmax over n keys must tell one
        from n - 1 others, so its logits have to grow as fast (Nakanishi, Scalable-Softmax, https://arxiv.org/abs/2501.19399).
      attend: of queries [B, T, N, H] to the keys and values of everything before them, and their own.
    """
    count = num_keys.astype(jnp.float32) if config.temperature else jnp.full(num_keys.shape, 512.0)
    metrics = []
    for i, layer in enumerate(params["global"]):
        query = unit(jnp.einsum("btd,dnh->btnh", rms_norm(x, layer["norm"]), layer["query"]))
        query = placed(query, num_keys - 1, config)
        query = query * layer["sharpness"][:, None] * jnp.log(count)[..., None, None]
        x = x + jnp.einsum("btnh,nhd->btd", attend(query), layer["output"])
        y, routing = experts(layer["ffn"], x, config, None if key is None else jax.random.fold_in(key, 100 + i))
        x = x + y
        metrics.append(routing)
    return rms_norm(x, params["final_norm"]) @ params["unembedding"], metrics


def forward(params: Params, tokens: Tokens, num_queries: int, config: Config, key: jax.Array | None = None):
    """`(logits [B, num_queries, SYMBOLS] of what follows each of the last tokens, metrics)`; a key is for training."""
    return _forward(params, embed(params, tokens), num_queries, config, key)


def _forward(params: Params, x: jax.Array, num_queries: int, config: Config, key: jax.Array | None):
    batch, length, _ = x.shape
    x, metrics = local_layers(params, x, config, key)
    keys, values = keys_values(params, x, jnp.arange(length), config)
    lengths = jnp.full(batch, length, jnp.int32)
    attend = lambda query: ringmoe.decode_attention(query, keys, values, lengths)
    seen = jnp.arange(length - num_queries, length) + 1
    logits, more = global_layers(params, x[:, -num_queries:], seen, attend, config, key)
    return logits, metrics + more


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean nats, and the share of right ones, where targets [B, T] are >= 0; logits [B, T, SYMBOLS]."""
    asked = targets >= 0
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    count = jnp.maximum(jnp.sum(asked), 1)
    nats = jnp.sum(jnp.where(asked, jax.nn.logsumexp(logits, -1) - chosen, 0)) / count
    return nats, jnp.sum(asked & (jnp.argmax(logits, -1) == targets)) / count


def loss(params: Params, tokens: Tokens, shown: jax.Array, targets: jax.Array, config: Config, key: jax.Array):
    """What training minimises, and what it reports.

        nats of answers + nats of reading + load_balance_weight * load-balance loss

    Reading ties modalities together: of all bytes' embeddings that of a patch or frame should be most like the one of the
    symbol that it shows. Without it a fact in one modality is not found by a question in another for thousands of steps.

    Args:
      shown: [B, T] int32, the symbol that each patch or frame shows, or -1.
      targets: [B, num_queries] int32, what follows each of the last tokens, or -1 where nothing is asked.
    """
    x = embed(params, tokens)
    reading, _ = cross_entropy(x @ params["byte"].T * config.model_dim**-0.5, shown)
    logits, metrics = _forward(params, x, targets.shape[1], config, key)
    nats, accuracy = cross_entropy(logits, targets)
    balance = jnp.mean(jnp.stack([m.load_balance_loss for m in metrics]))
    report = {
        "loss": nats,
        "accuracy": accuracy,
        "reading": reading,
        "load_balance": balance,
        "dropped": jnp.mean(jnp.stack([m.drop_fraction for m in metrics])),
        "expert_load": jnp.stack([m.expert_load for m in metrics]),
    }
    return nats + reading + config.load_balance_weight * balance, report
