"""`route`: which experts each token goes to, with which weights, and whether there is a slot for it.

Plain jnp, so that it partitions over batch and sequence in every sharding mode and never moves a token.
Symbols: T tokens, E experts, k choices per token, groups of i tokens, C slots per group and expert.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ringmoe import compat, meshes
from ringmoe.errors import check
from ringmoe.meshes import Axes
from ringmoe.router import choose
from ringmoe.router.config import RouterConfig
from ringmoe.router.places import places, places_by_value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes: what `dispatch` and `combine` need, and what `metrics` needs.

    Attributes:
        expert: [*B, T, k] int32, the chosen experts, best first, distinct. With expert choice k is E.
        slot: [*B, T, k] int32, place in that expert's queue within the token's group, in [0, capacity); -1: no slot.
            The slots taken of one queue are 0, 1, 2, ... without gaps.
        weight: [*B, T, k] float32 (float64 for float64 logits). NaN for a token with non-finite scores, 0 for a masked one.
        scores: [*B, T, E] as weight, each token's scores over their sum (softmax's are); 0 for tokens that don't take part.
        active: [*B, T] bool, the token takes part: not masked, and its scores are finite.
        threshold: [*B, T, 2], the k-th and the next largest logit, noise included, for the load loss; None without noise.
        num_experts, capacity, group_size: E, C, i (of all tokens, if all compete); static.
    """

    expert: jax.Array
    slot: jax.Array
    weight: jax.Array
    scores: jax.Array
    active: jax.Array
    threshold: jax.Array | None
    num_experts: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})


@meshes.in_the_mesh_of_its_operand
def route(
    logits: jax.Array,
    config: RouterConfig,
    *,
    token_mask: jax.Array | None = None,
    selection_bias: jax.Array | None = None,
    expert_scale: jax.Array | None = None,
    noise_logits: jax.Array | None = None,
    expert: jax.Array | None = None,
    key: jax.Array | None = None,
    train: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Routing:
    """Chooses k experts per token and gives every choice a slot, or drops it.

        s = score(logits + noise);  expert = the k largest logits, or s + selection_bias; lowest index first among equals
        weight_j = weight_scale * s[expert_j] / (sum_j s[expert_j] if renormalize else 1)
        slot_j = how many choices of the same group and expert come before it, if that is < C, else -1

    What "before" means is the config's priority; by default all first choices of a group come before all second choices, and
    so on; within a choice, in token order. Softmax and sigmoid are monotone, so choosing by logits is choosing by scores,
    without the ties that rounding adds; equal logits are decided by index alone, on every backend. -inf is allowed: that
    expert is chosen last, with weight 0. Gradients reach the logits, the noise and the scale through `weight` and `scores`.

    Args:
        logits: [*B, T, E] floating; cast up to float32 (float64 stays). A router's bias is the caller's to add.
        config: see `RouterConfig`.
        token_mask: [*B, T] bool, False for padding: such a token takes no slot, counts nowhere and has weight 0.
            Default None: every token takes part. A token whose softmax is not finite (a NaN or +inf among its logits) takes
            no slot either; its weights are NaN, so its own output is NaN and nobody else's.
        selection_bias: [E], added to the scores for the choice alone, without gradient (DeepSeek-V3); see
            `update_selection_bias`.
        expert_scale: [E], factors of the weights, trainable (Gemma 4).
        noise_logits: [*B, T, E] = x W_noise, for noise="learned".
        expert: [*B, T, k] int32, experts that were chosen elsewhere (a replay, `hash_experts`); only weights and slots are
            found. The caller sees to it that they are distinct and in [0, E).
        key: a jax.random key: for noise in training, and for priority="random". train: noise is on. Default False.
        axis_name: inside the caller's own `jax.shard_map`, the axes that split the sequence, where groups reach further than
            a device. Noise and random priorities are then those of the whole sequence.

    Returns:
        `Routing`.

    Raises:
        ValueError: logits not floating or of another E, T not a multiple of the group size, arrays of another shape or
            dtype, a missing key or noise.

    Cost: O(T E k) elementwise, O(T k sqrt(E)) on the matrix unit; no bytes on the wire if groups are whole on their devices,
    else T k E / 256 counts are gathered (by "probability", "batch" and "random" T k experts); a few [*B, T, E] temporaries.
    Source: top-k gating with capacity and choice-major priority, GShard, https://arxiv.org/abs/2006.16668.
    """
    axes = compat.check_axis_name(axis_name)
    _check(logits, config, token_mask, selection_bias, expert_scale, noise_logits, expert, key, train)
    *batch, num_tokens, _ = logits.shape
    group_size = config.group(*batch, num_tokens * math.prod(lax.axis_size(a) for a in axes))
    capacity = config.capacity(group_size)
    token_mask = lie_alike(token_mask, logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    noise_key, order_key = (None, None) if key is None else jax.random.split(key)
    noisy = train and config.noise_on_logits
    if noisy:
        logits = choose.noisy(logits, config, noise_logits, noise_key, axes)
    if token_mask is not None:
        logits = jnp.where(token_mask[..., None], logits, 0)
    score, finite = choose.scoring(logits, config)
    active = finite if token_mask is None else finite & token_mask

    chosen = expert
    if chosen is None:
        chosen = _chosen(lax.stop_gradient(logits), score, active, config, selection_bias, train, axes)
        anything = np.arange(chosen.shape[-1], dtype=np.int32).reshape(*(1,) * (chosen.ndim - 1), -1)
        chosen = jnp.where(finite[..., None], chosen, anything)
    chosen = lax.optimization_barrier(chosen)  # made once: XLA would, for every use, and one number at a time
    weight = _weights(logits, score, chosen, config, expert_scale)
    scores = score(logits)
    slot = _slots(chosen, active, lax.stop_gradient(weight), scores, config, group_size, capacity, order_key, axes)
    if config.renormalize == "after_drops":
        weight = _over_sum(jnp.where(slot >= 0, weight, 0))
    weight = jnp.where(finite[..., None], weight, jnp.nan)
    if token_mask is not None:
        weight = jnp.where(token_mask[..., None], weight, 0)
    threshold = _threshold(logits, config) if noisy else None
    if config.score != "softmax":
        scores = _over_sum(scores)
    scores = jnp.where(active[..., None], scores, 0)
    return Routing(chosen, slot, weight, scores, active, threshold, config.num_experts, capacity, group_size)


def _chosen(logits, score, active, config: RouterConfig, bias, train, axes: Axes):
    """The experts of each token, [*B, T, k] int32."""
    if config.method == "expert_choice":
        return jnp.zeros_like(logits, jnp.int32) + choose.numbered(logits)
    values = logits
    if config.method == "sinkhorn" and train:
        values = jnp.where(active[..., None], choose.sinkhorn(logits, active, config, axes), logits)
    elif bias is not None or config.expert_groups > 1:
        values = lax.stop_gradient(score(logits))
        if bias is not None:
            values += lax.broadcast_to_rank(lax.stop_gradient(bias.astype(values.dtype)), values.ndim)
        values = choose.without_poor_groups(values, config)
    return choose.top_k(values, config.top_k)


def _weights(logits, score, expert, config: RouterConfig, expert_scale):
    some = logits if config.method == "expert_choice" else choose.at_experts(logits, expert)
    weight = jax.nn.softmax(some, axis=-1) if config.select_first else score(some)
    if config.renormalize is True and config.method != "expert_choice":
        weight = _over_sum(weight)
    if expert_scale is not None:
        scale = lax.broadcast_to_rank(expert_scale.astype(weight.dtype), logits.ndim)
        weight = weight * choose.at_experts(scale, expert)
    return weight if config.weight_scale == 1 else weight * config.weight_scale


def _over_sum(weight):
    """Each token's weights over their sum; zeros stay zeros."""
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total == 0, 1, total)


def _slots(expert, active, weight, scores, config: RouterConfig, group_size, capacity, key, axes: Axes):
    """[*B, T, k] int32: place in the queue of (group, expert); -1 where there is none."""
    expert = jnp.where(active[..., None], expert, -1)
    by_weight = config.priority == "probability" or config.method == "expert_choice"
    if by_weight:
        k, each = expert.shape[-1], (*expert.shape[:-2], -1)
        place = places_by_value(
            expert.reshape(*each, 1), weight.reshape(each), config.num_experts, group_size * k, False, axes
        ).reshape(expert.shape)
    elif config.priority in ("batch", "random"):
        value = jnp.max(lax.stop_gradient(scores), -1)
        if config.priority == "random":
            value = choose.drawn(jax.random.uniform, key, value, -1, axes)
        place = places_by_value(expert, value, config.num_experts, group_size, True, axes)
    else:
        place = places(expert, config.num_experts, group_size, config.priority == "choice", axes)
    return jnp.where((expert >= 0) & (place < capacity), place, -1)


def _threshold(logits, config: RouterConfig):
    """The k-th and the (k + 1)-th largest logit of each token: [*B, T, 2]; -inf where there are only k."""
    k = config.top_k
    both = choose.top_k(lax.stop_gradient(logits), min(k + 1, config.num_experts))[..., k - 1 :]
    found = choose.at_experts(logits, both)
    return jnp.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, 2 - found.shape[-1])], constant_values=-jnp.inf)


def _check(logits, config, token_mask, selection_bias, expert_scale, noise_logits, expert, key, train):
    num_experts = config.num_experts
    check(jnp.issubdtype(logits.dtype, jnp.floating), f"logits of dtype {logits.dtype}, expected a floating dtype")
    check(
        logits.ndim >= 2 and logits.shape[-1] == num_experts,
        f"logits of shape {logits.shape} with num_experts={num_experts}, expected [..., T, num_experts]",
    )
    check_mask(token_mask, logits.shape[:-1])
    for name, x in (("selection_bias", selection_bias), ("expert_scale", expert_scale)):
        check(
            x is None or x.shape == (num_experts,),
            f"{name} of shape {getattr(x, 'shape', None)}, expected ({num_experts},): one per expert",
        )
    check(
        selection_bias is None or (config.method == "top_k" and not config.select_first),
        f"selection_bias with method={config.method!r}, select_first={config.select_first}: it is added to scores that a "
        "top-k is taken of; expected method='top_k', select_first=False",
    )
    learned = train and config.noise == "learned"
    check(
        noise_logits is not None or not learned,
        "noise='learned' in training without noise_logits, expected x W_noise of the logits' shape (moe_ffn: noise_weight)",
    )
    check(
        noise_logits is None or (config.noise == "learned" and noise_logits.shape == logits.shape),
        f"noise_logits of shape {getattr(noise_logits, 'shape', None)} with noise={config.noise!r} and logits "
        f"{logits.shape}, expected noise='learned' and the logits' shape",
    )
    check(
        expert is None
        or (
            expert.shape == (*logits.shape[:-1], config.top_k)
            and expert.dtype == jnp.int32
            and config.method == "top_k"
        ),
        f"expert {getattr(expert, 'dtype', None)}{getattr(expert, 'shape', None)} with method={config.method!r}, expected "
        f"int32{(*logits.shape[:-1], config.top_k)} and method='top_k': top_k experts per token",
    )
    check(
        key is not None or not ((train and config.noise_on_logits) or config.priority == "random"),
        f"key=None with noise={config.noise!r}, train={train}, priority={config.priority!r}, expected a jax.random key",
    )


def lie_alike(token_mask: jax.Array | None, tokens: jax.Array) -> jax.Array | None:
    """With Explicit axes the mask must lie as the tokens [..., T, D] (or their logits) that it masks."""
    mesh = jax.typeof(tokens).sharding.mesh
    if token_mask is None or AxisType.Explicit not in mesh.axis_types:
        return token_mask
    return jax.sharding.reshard(token_mask, NamedSharding(mesh, PartitionSpec(*jax.typeof(tokens).sharding.spec[:-1])))


def check_mask(token_mask, tokens: tuple[int, ...]) -> None:
    """Raises ValueError unless the mask is None or one flag for each of the tokens."""
    check(
        token_mask is None or (token_mask.shape == tokens and token_mask.dtype == jnp.bool_),
        f"token_mask {getattr(token_mask, 'dtype', None)}{getattr(token_mask, 'shape', None)}, expected bool{tokens}: "
        "one flag per token, True where the token takes part",
    )
