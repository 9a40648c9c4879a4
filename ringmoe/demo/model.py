"""A decoder-only byte model as plain functions over a pytree of arrays.

No function here knows of a mesh: on one device it is the dense model; compiled by `ringmoe.jit` with its arguments
placed on a mesh it is the sharded one. Layers alternate between a dense SwiGLU and a mixture of SwiGLU experts.
B batch, T bytes, D model dim, N query heads, K key/value heads, H head dim, F hidden dim, E experts, V byte values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import ringmoe

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; hashable, so that it can be a static argument."""

    num_layers: int = 4
    model_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 384
    expert_hidden_dim: int = 192
    # The bytes of a sequence share an expert's capacity: which of them are dropped is the same on any mesh. None: a dense
    # model, of equal work for each byte where hidden_dim is top_k times expert_hidden_dim.
    router: ringmoe.RouterConfig | None = ringmoe.RouterConfig.preset("top2_noisy")
    num_bytes: int = 256
    rope_base: float = 10_000.0
    load_balance_weight: float = 0.1

    def has_experts(self, layer: int) -> bool:
        return self.router is not None and layer % 2 == 1

    @property
    def experts(self) -> ringmoe.RouterConfig:
        """How bytes choose among the experts of a model that has some."""
        assert self.router is not None, "a dense model"
        return self.router


def init(key: jax.Array, config: Config) -> Params:
    """Float32 weights, normal with variance 1 / fan-in; what a layer adds to the residual is smaller by its depth."""
    d, n, k, h = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
    f, fe = config.hidden_dim, config.expert_hidden_dim
    residual = (2 * config.num_layers) ** -0.5
    keys = iter(jax.random.split(key, 2 + 8 * config.num_layers))

    def normal(shape, fan_in, scale=1.0):
        return scale * fan_in**-0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    layers = []
    for i in range(config.num_layers):
        layer = {
            "attention_norm": jnp.ones(d),
            "query": normal((d, n, h), d),
            "key": normal((d, k, h), d),
            "value": normal((d, k, h), d),
            "output": normal((n, h, d), n * h, residual),
            "ffn_norm": jnp.ones(d),
        }
        if config.has_experts(i):
            e = config.experts.num_experts
            layer["router"], layer["router_noise"] = normal((d, e), d), jnp.zeros((d, e))
            layer["experts"] = {
                "gate": normal((e, d, fe), d),
                "in": normal((e, d, fe), d),
                "out": normal((e, fe, d), fe, residual),
            }
        else:
            layer["ffn"] = {
                "gate": normal((d, f), d),
                "in": normal((d, f), d),
                "out": normal((f, d), f, residual),
            }
        layers.append(layer)
    return {
        "embedding": normal((config.num_bytes, d), 1),
        "layers": layers,
        "final_norm": jnp.ones(d),
        "unembedding": normal((d, config.num_bytes), d, 0.1),  # nearly even at first: loss starts at log(256)
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / sqrt(mean(x^2)) * scale`, x [B, T, D], scale [D]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]


def rope(x: jax.Array, base: float) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]) by an angle that grows with the position: x [B, T, N, H].

    The dot product of a rotated query and key depends on their distance alone. Source: RoFormer,
    https://arxiv.org/abs/2104.09864.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), frequency)[None, :, None]  # [1, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(layer: Params, x: jax.Array, config: Config) -> jax.Array:
    """Causal grouped-query attention of the normed x [B, T, D], to be added to x."""
    y = rms_norm(x, layer["attention_norm"])
    query = rope(jnp.einsum("btd,dnh->btnh", y, layer["query"]), config.rope_base)
    key = rope(jnp.einsum("btd,dkh->btkh", y, layer["key"]), config.rope_base)
    value = jnp.einsum("btd,dkh->btkh", y, layer["value"])
    out = ringmoe.dot_product_attention(query, key, value, is_causal=True)
    return jnp.einsum("btnh,nhd->btd", out, layer["output"])


def feed_forward(layer: Params, x: jax.Array, config: Config, key: jax.Array | None = None):
    """SwiGLU of the normed x [B, T, D], to be added to x, by one dense layer or by each byte's top experts.

    With a key, in training, the router's logits are noisy.
    Returns `(y, metrics)`: `metrics` is what `ringmoe.moe_ffn` says of its routing, None for a dense layer.
    """
    y = rms_norm(x, layer["ffn_norm"])
    if "experts" in layer:
        experts = layer["experts"]
        return ringmoe.moe_ffn(
            y,
            layer["router"],
            experts["in"],
            experts["out"],
            w_gate=experts["gate"],
            config=config.experts,
            noise_weight=layer["router_noise"],
            key=key,
            train=key is not None,
        )
    ffn = layer["ffn"]
    return (jax.nn.silu(y @ ffn["gate"]) * (y @ ffn["in"])) @ ffn["out"], None


def forward(params: Params, tokens: jax.Array, config: Config, key: jax.Array | None = None):
    """`(logits [B, T, V] of each next byte, the metrics of every MoE layer)` for tokens [B, T] int32; a key is for training."""
    x = params["embedding"][tokens]
    metrics = []
    for i, layer in enumerate(params["layers"]):
        x = x + attend(layer, x, config)
        y, routing = feed_forward(layer, x, config, None if key is None else jax.random.fold_in(key, i))
        x = x + y
        if routing is not None:
            metrics.append(routing)
    return rms_norm(x, params["final_norm"]) @ params["unembedding"], metrics


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean nats per byte: logits [B, T, V] float32, targets [B, T] int32."""
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def loss(params: Params, inputs: jax.Array, targets: jax.Array, config: Config, key: jax.Array):
    """What training minimises, and what it reports: `(cross entropy + load-balance loss, report)`.

    `report` holds `loss` (nats per byte) and, of a model with experts, `load_balance` (1 where experts are used evenly),
    `dropped` (fraction of the expert assignments for which the capacity had no room) and `expert_load` [MoE layers, E] int32.
    """
    logits, metrics = forward(params, inputs, config, key)
    nats = cross_entropy(logits, targets)
    if not metrics:
        return nats, {"loss": nats}
    balance = jnp.mean(jnp.stack([m.load_balance_loss for m in metrics]))
    report = {
        "loss": nats,
        "load_balance": balance,
        "dropped": jnp.mean(jnp.stack([m.drop_fraction for m in metrics])),
        "expert_load": jnp.stack([m.expert_load for m in metrics]),
    }
    return nats + config.load_balance_weight * balance, report
