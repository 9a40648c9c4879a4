"""The router: scores, top-k, slots under a capacity, losses and metrics.

Plain jnp, elementwise ops and reductions only (no sort, no gather, no scatter), so that it partitions over batch and sequence
in every sharding mode and never moves a token: a group of tokens lives on one device, and only groups compete for slots.
Symbols: T tokens, E experts, k choices per token, G groups of i consecutive tokens (G * i = T), C slots per group and expert.
"""

import dataclasses
import fractions
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ringmoe import meshes, rules
from ringmoe.errors import check

MAX_DEFAULT_GROUP = 256


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts and how many tokens an expert takes.

    Args:
        num_experts: E >= 1.
        top_k: k, distinct experts per token, 1 <= k <= E. Default 2.
        capacity_factor: slots offered over slots asked if routing were even; > 0. Default 1.25. None: dropless, every expert
            has a slot for every token of a group. That is always enough, because a token's choices are distinct, and it
            costs E / (k * capacity_factor) times the expert FLOPs and rows of a factor: meant for few experts, evaluation
            and tests.
        group_size: i, consecutive tokens along T that compete for slots; T must be a multiple of it, and so should be the
            tokens one device holds, or some devices work on padding. Default None: the largest divisor of T up to 256.
        renormalize: divide the k weights by their sum, before anything is dropped. Default True.

    Raises:
        ValueError: a field out of the ranges above.
    """

    num_experts: int
    top_k: int = 2
    capacity_factor: float | None = 1.25
    group_size: int | None = None
    renormalize: bool = True

    def __post_init__(self):
        check(
            self.num_experts >= 1, f"num_experts={self.num_experts}, expected at least 1: give the number of experts E"
        )
        check(
            1 <= self.top_k <= self.num_experts,
            f"top_k={self.top_k} with num_experts={self.num_experts}, expected 1 <= top_k <= num_experts: "
            "a token's choices are distinct experts, so lower top_k or add experts",
        )
        factor = self.capacity_factor
        check(
            factor is None or (math.isfinite(factor) and factor > 0),
            f"capacity_factor={factor}, expected a finite number > 0 or None: pass None if no token may be dropped",
        )
        check(
            self.group_size is None or self.group_size >= 1,
            f"group_size={self.group_size}, expected at least 1 or None: None takes the largest divisor of T up to 256",
        )

    def group(self, num_tokens: int) -> int:
        """The group size i for T = `num_tokens` along the sequence; ValueError if T is not a multiple of it.

        With `group_size=None` it depends on T: inside a user's own `shard_map`, where T is the local length, give
        `group_size` a number, or what is dropped would depend on the mesh.
        """
        if self.group_size is None:
            return next((i for i in range(min(num_tokens, MAX_DEFAULT_GROUP), 1, -1) if num_tokens % i == 0), 1)
        check(
            num_tokens % self.group_size == 0,
            f"{num_tokens} tokens along the sequence with group_size={self.group_size}, expected a multiple of it: "
            "pad the sequence (and mask the padding with token_mask) or choose another group_size",
        )
        return self.group_size

    def capacity(self, group_size: int) -> int:
        """C = min(i, ceil(i * k * capacity_factor / E)) slots per group and expert; C = i if the factor is None.

        The product is taken exactly (1.1 means eleven tenths) and rounded once, at the end. Others differ: MaxText rounds
        i * k / E up before the factor; Tutel and DeepSpeed round T / E; flaxformer leaves k out; Megatron, MegaBlocks and
        DeepSpeed count the tokens of a rank, so that their drops change with the number of devices. Ours never do.
        """
        if self.capacity_factor is None:
            return group_size
        factor = fractions.Fraction(self.capacity_factor).limit_denominator(10**6)
        return min(group_size, math.ceil(group_size * self.top_k * factor / self.num_experts))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes: what `dispatch` and `combine` need, and what `metrics` needs.

    Attributes:
        expert: [*B, T, k] int32, the chosen experts, best first, distinct.
        slot: [*B, T, k] int32, place in that expert's queue within the token's group, in [0, capacity); -1: no slot.
            The slots taken of one queue are 0, 1, 2, ... without gaps.
        weight: [*B, T, k] float32 (float64 for float64 logits). NaN for a token with non-finite scores, 0 for a masked one.
        scores: [*B, T, E] as weight, softmax of the logits; 0 for tokens that don't take part.
        active: [*B, T] bool, the token takes part: not masked, and its scores are finite.
        num_experts, capacity, group_size: E, C, i; static.
    """

    expert: jax.Array
    slot: jax.Array
    weight: jax.Array
    scores: jax.Array
    active: jax.Array
    num_experts: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})


@meshes.in_the_mesh_of_its_operand
def route(logits: jax.Array, config: RouterConfig, *, token_mask: jax.Array | None = None) -> Routing:
    """Chooses k experts per token and gives every choice a slot, or drops it.

        s = softmax(logits);  expert = the k largest logits, lowest index first among equals
        weight_j = s[expert_j] / (sum_j s[expert_j] if renormalize else 1)
        slot_j = how many choices of the same group and expert come before it, if that is < C, else -1

    "Before": all first choices of a group come before all second choices, and so on; within a choice, in token order.
    Softmax is monotone, so choosing by logits is choosing by scores, without the ties that rounding adds; equal logits
    are decided by index alone, on every backend. -inf is allowed: that expert is chosen last, with weight 0.
    Weights are never rescaled after a drop. Gradients reach the logits through `weight` and `scores` alone.

    Args:
        logits: [*B, T, E] floating; cast up to float32 (float64 stays).
        config: see `RouterConfig`.
        token_mask: [*B, T] bool, False for padding: such a token takes no slot, counts nowhere and has weight 0.
            Default None: every token takes part. A token whose softmax is not finite (a NaN or +inf among its logits) takes
            no slot either; its weights are NaN, so its own output is NaN and nobody else's.

    Returns:
        `Routing`.

    Raises:
        ValueError: logits not floating or of another E, T not a multiple of the group size, a mask of another shape or dtype.

    Cost: O(T E k) elementwise and one cumulative sum over [i, E] per group and choice; no bytes on the wire if whole groups
    are local; a few [*B, T, E] float32 and int32 temporaries.
    Source: top-k gating with capacity and choice-major priority, GShard, https://arxiv.org/abs/2006.16668.
    """
    _check_route(logits, config, token_mask)
    group_size = config.group(logits.shape[-2])
    capacity = config.capacity(group_size)
    logits = _whole_groups(logits, group_size)
    token_mask = lie_alike(token_mask, logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if token_mask is not None:
        logits = jnp.where(token_mask[..., None], logits, 0)
    scores = jax.nn.softmax(logits, axis=-1)
    finite = lax.stop_gradient(jnp.isfinite(scores).all(axis=-1))
    active = finite if token_mask is None else finite & token_mask

    chosen = _top_k(jnp.where(finite[..., None], lax.stop_gradient(logits), 0), config.top_k)
    index = _iota_like(chosen[0])
    expert = jnp.stack([jnp.sum(jnp.where(hit, index, 0), axis=-1, dtype=jnp.int32) for hit in chosen], axis=-1)
    weight = jnp.stack([jnp.sum(jnp.where(hit, scores, 0), axis=-1) for hit in chosen], axis=-1)
    if config.renormalize:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    weight = jnp.where(finite[..., None], weight, jnp.nan)
    if token_mask is not None:
        weight = jnp.where(token_mask[..., None], weight, 0)
    slot = _slots([hit & active[..., None] for hit in chosen], group_size, capacity)
    scores = jnp.where(active[..., None], scores, 0)
    return Routing(expert, slot, weight, scores, active, config.num_experts, capacity, group_size)


def _whole_groups(logits, group_size):
    """With Explicit axes that cut groups, the logits moved to devices that hold whole ones; else as they are."""
    mesh = jax.typeof(logits).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return logits
    groups = (*logits.shape[:-2], logits.shape[-2] // group_size, logits.shape[-1])
    spec = jax.typeof(logits).sharding.spec
    held = rules.dividing(spec, groups, mesh.shape)
    if rules.axes_of(held, logits.ndim) == rules.axes_of(spec, logits.ndim):
        return logits
    return jax.sharding.reshard(logits, NamedSharding(mesh, held))


def _check_route(logits, config, token_mask):
    check(jnp.issubdtype(logits.dtype, jnp.floating), f"logits of dtype {logits.dtype}, expected a floating dtype")
    check(
        logits.ndim >= 2 and logits.shape[-1] == config.num_experts,
        f"logits of shape {logits.shape} with num_experts={config.num_experts}, expected [..., T, num_experts]",
    )
    check_mask(token_mask, logits.shape[:-1])


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


def _iota_like(x):
    """The index along the last dim, int32, ready to broadcast against `x`."""
    return lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)


def _top_k(logits, k):
    """k masks [*B, T, E] with one True per token: the largest logit, then the largest of the rest, lowest index first."""
    index, num_experts = _iota_like(logits), logits.shape[-1]
    left = jnp.ones(logits.shape, bool) & (index >= 0)
    chosen = []
    for _ in range(k):
        best = jnp.max(jnp.where(left, logits, -jnp.inf), axis=-1, keepdims=True)
        first = jnp.min(jnp.where(left & (logits == best), index, num_experts), axis=-1, keepdims=True)
        chosen.append(index == first)
        left = left & ~chosen[-1]
    return chosen


def _slots(chosen, group_size, capacity):
    """[*B, T, k] int32: place in the queue of (group, expert), choice-major then token order; -1 where there is none."""
    *batch, num_tokens, num_experts = chosen[0].shape
    grouped = (*batch, num_tokens // group_size, group_size, num_experts)
    taken, slots = 0, []
    for hit in chosen:
        hit = hit.reshape(grouped)
        asked = hit.astype(jnp.int32)
        place = jnp.cumsum(asked, axis=-2, dtype=jnp.int32) - 1 + taken
        taken = taken + jnp.sum(asked, axis=-2, keepdims=True, dtype=jnp.int32)
        slot = jnp.sum(jnp.where(hit & (place < capacity), place + 1, 0), axis=-1, dtype=jnp.int32) - 1
        slots.append(slot.reshape(*batch, num_tokens))
    return jnp.stack(slots, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeMetrics:
    """What a training loop watches; tokens that are masked or not finite count in none but `nonfinite`.

    Attributes:
        expert_load: [E] int32, choices asked of each expert, before any drop.
        dropped: int32, choices that found no slot.
        drop_fraction: float32, dropped / choices asked.
        nonfinite: int32, tokens whose scores were not finite.
        load_balance_loss: float32, E * sum_e f_e p_e, f_e the fraction of choices asked of e (a constant to gradients),
            p_e the mean score of e. 1 when balanced, whatever k (Switch); MaxText, flaxformer and HF have k there.
        z_loss: float32, mean of logsumexp(logits)^2.
    """

    expert_load: jax.Array
    dropped: jax.Array
    drop_fraction: jax.Array
    nonfinite: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array


def metrics(routing: Routing, logits: jax.Array) -> MoeMetrics:
    """Loads, drops and losses of one routing, over all its tokens (the global batch, when tokens are sharded).

    Args:
        routing: what `route(logits, ...)` gave.
        logits: [*B, T, E], the same logits, for the z-loss.

    Returns:
        `MoeMetrics`; `load_balance_loss` and `z_loss` are differentiable in the logits, and unweighted.

    Cost: O(T E k) elementwise; when tokens are sharded, two all-reduces of E numbers and a few scalars.
    Source: Switch Transformer, https://arxiv.org/abs/2101.03961 (balance); ST-MoE, https://arxiv.org/abs/2202.08906 (z).
    """
    num_experts, active = routing.num_experts, routing.active
    tokens = tuple(range(active.ndim))
    asked = active[..., None, None] & (
        routing.expert[..., None]
        == lax.broadcasted_iota(jnp.int32, (1,) * (active.ndim + 1) + (num_experts,), active.ndim + 1)
    )
    load = jnp.sum(asked, axis=(*tokens, active.ndim), dtype=jnp.int32)
    dropped = jnp.sum(active[..., None] & (routing.slot < 0), dtype=jnp.int32)
    num_active = jnp.maximum(jnp.sum(active, dtype=jnp.int32), 1).astype(jnp.float32)
    num_asked = num_active * routing.expert.shape[-1]
    share = load.astype(jnp.float32) / num_asked
    mean_score = jnp.sum(routing.scores.astype(jnp.float32), axis=tokens) / num_active
    logits = jnp.where(active[..., None], logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), 0)
    z = jnp.where(active, jax.nn.logsumexp(logits, axis=-1), 0).astype(jnp.float32)
    return MoeMetrics(
        expert_load=load,
        dropped=dropped,
        drop_fraction=dropped.astype(jnp.float32) / num_asked,
        nonfinite=jnp.sum(jnp.isnan(routing.weight).any(axis=-1), dtype=jnp.int32),
        load_balance_loss=num_experts * jnp.sum(lax.stop_gradient(share) * mean_score),
        z_loss=jnp.sum(z * z) / num_active,
    )
