"""What a training loop watches, the usual losses, and the update of a selection bias."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.errors import check
from ringmoe.router.choose import is_chosen, log_sum_exp, noise_std
from ringmoe.router.config import RouterConfig
from ringmoe.router.places import histogram, in_blocks
from ringmoe.router.route import Routing

BLOCK = 256  # tokens whose choices are counted by one matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeMetrics:
    """What a training loop watches; tokens that are masked or not finite count in none but `masked` and `nonfinite`.

    Attributes:
        expert_load: [E] int32, choices asked of each expert, before any drop.
        dropped: int32, choices that found no slot.
        drop_fraction: float32, dropped / choices asked.
        masked: int32, tokens that `token_mask` leaves out.
        nonfinite: int32, tokens whose scores were not finite.
        unused_experts: int32, experts that nobody asked for.
        entropy: float32, mean over tokens of -sum_e s_e log s_e, in nats; log E where the router doesn't know.
        load_balance_loss: float32, E * sum_e f_e p_e, f_e the fraction of choices asked of e (a constant to gradients),
            p_e the mean score of e. 1 when balanced, whatever k (Switch); MaxText, flaxformer and HF have k there.
        sequence_balance_loss: float32, the same of each sequence, averaged over sequences (DeepSeek). 1 when balanced.
        importance_loss: float32, squared coefficient of variation over experts of the sum of their tokens' weights. 0 when
            balanced (Shazeer).
        load_loss: float32, squared coefficient of variation of the expected number of tokens an expert gets, over the
            noise. 0 when balanced (Shazeer); 0 where the logits got no noise.
        z_loss: float32, mean of logsumexp(logits)^2.
    """

    expert_load: jax.Array
    dropped: jax.Array
    drop_fraction: jax.Array
    masked: jax.Array
    nonfinite: jax.Array
    unused_experts: jax.Array
    entropy: jax.Array
    load_balance_loss: jax.Array
    sequence_balance_loss: jax.Array
    importance_loss: jax.Array
    load_loss: jax.Array
    z_loss: jax.Array


def metrics(
    routing: Routing, logits: jax.Array, config: RouterConfig | None = None, *, noise_logits: jax.Array | None = None
) -> MoeMetrics:
    """Loads, drops and losses of one routing, over all its tokens (the global batch, when tokens are sharded).

    Args:
        routing: what `route(logits, ...)` gave.
        logits: [*B, T, E], the same logits, for the z-loss and the load loss.
        config, noise_logits: those of the routing, for the load loss of noisy logits.

    Returns:
        `MoeMetrics`; the losses are differentiable in the logits and noise_logits, and unweighted.

    Cost: O(T E) elementwise; when tokens are sharded, a few all-reduces of E numbers, or of B E where a sequence is cut.
    Source: Shazeer, https://arxiv.org/abs/1701.06538 (importance, load); Switch Transformer,
    https://arxiv.org/abs/2101.03961 (balance); ST-MoE, https://arxiv.org/abs/2202.08906 (z).
    """
    num_experts, active = routing.num_experts, routing.active
    asked_of, weights_of = _by_expert(routing)
    over_sequences = lambda x: jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=x.dtype)
    load = over_sequences(asked_of)
    lost = active[..., None] & (routing.slot < 0) if routing.capacity < routing.group_size else jnp.zeros((), bool)
    dropped = jnp.sum(lost, dtype=jnp.int32)
    per_sequence = jnp.maximum(jnp.sum(active, axis=-1, dtype=jnp.int32), 1).astype(jnp.float32)
    num_active = jnp.maximum(jnp.sum(active, dtype=jnp.int32), 1).astype(jnp.float32)
    k = routing.expert.shape[-1]
    scores = routing.scores.astype(jnp.float32)
    score_sums = jnp.sum(scores, axis=-2)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    largest, rest = log_sum_exp(logits)
    z = jnp.where(active, (largest + rest)[..., 0], 0).astype(jnp.float32)
    nonfinite = jnp.sum(jnp.isnan(routing.weight).any(axis=-1), dtype=jnp.int32)
    balance = num_experts * jnp.sum(
        lax.stop_gradient(load / (num_active * k)) * over_sequences(score_sums) / num_active
    )
    by_sequence = num_experts * jnp.sum(
        lax.stop_gradient(asked_of / (per_sequence * k)[..., None]) * score_sums / per_sequence[..., None], -1
    )
    return MoeMetrics(
        expert_load=load,
        dropped=dropped,
        drop_fraction=dropped.astype(jnp.float32) / (num_active * k),
        masked=jnp.asarray(active.size, jnp.int32) - jnp.sum(active, dtype=jnp.int32) - nonfinite,
        nonfinite=nonfinite,
        unused_experts=jnp.sum(load == 0, dtype=jnp.int32),
        entropy=jnp.sum(_entropy(lax.stop_gradient(scores))) / num_active,
        load_balance_loss=balance,
        sequence_balance_loss=jnp.mean(by_sequence),
        importance_loss=_variation(over_sequences(weights_of)),
        load_loss=_load_loss(routing, logits, config, noise_logits),
        z_loss=jnp.sum(z * z) / num_active,
    )


def drops_by_part(routing: Routing, parts: int) -> jax.Array:
    """Choices without a slot, of each of `parts` equal parts of the sequences: [*B, parts] int32. By source shard, say.

    Raises ValueError where `parts` doesn't divide T.
    """
    *batch, num_tokens, k = routing.slot.shape
    check(parts >= 1 and num_tokens % parts == 0, f"{parts=} of {num_tokens} tokens, expected a divisor")
    lost = routing.active[..., None] & (routing.slot < 0)
    return jnp.sum(lost.reshape(*batch, parts, num_tokens // parts, k), axis=(-2, -1), dtype=jnp.int32)


def update_selection_bias(bias: jax.Array, expert_load: jax.Array, rate: float = 1e-3) -> jax.Array:
    """bias + rate * sign(mean load - load): the bias of experts that had too little to do goes up, once a step.

    Args:
        bias: [E], float32. expert_load: [E], of `MoeMetrics`, summed over the whole step. rate: default 1e-3.

    Source: auxiliary-loss-free balancing, https://arxiv.org/abs/2408.15664.
    """
    load = expert_load.astype(bias.dtype)
    return bias + rate * jnp.sign(jnp.mean(load) - load)


def _by_expert(routing: Routing):
    """Of each sequence, how many choices it asks of each expert, [*B, E] int32, and the float32 sum of their weights."""
    active = routing.active[..., None]

    def flat(x):
        *blocks, n, k = (x := in_blocks(x, x.shape[-2], BLOCK)).shape
        return x.reshape(*blocks, n * k)

    expert = flat(jnp.where(active, routing.expert, -1))
    weight = flat(jnp.where(active, routing.weight, 0).astype(jnp.float32))
    one = (expert >= 0).astype(
        jnp.float32
    )  # not a constant: under vmap it is to be sharded as the weights that it joins
    found = histogram(expert, routing.num_experts, jnp.stack([one, weight], -2))
    asked = jnp.sum(found[..., 0, :].astype(jnp.int32), axis=-2, dtype=jnp.int32)
    return asked, jnp.sum(found[..., 1, :], axis=-2)


def _entropy(scores):
    """[*B, T] of [*B, T, E]. 0 log 0 is 0; without a case for it, which XLA's vector loops on CPUs lack."""
    return -jnp.sum(scores * jnp.log(jnp.maximum(scores, jnp.finfo(scores.dtype).tiny)), -1)


def _load_loss(routing: Routing, logits, config, noise_logits):
    """Of P(t, e), the chance that e is among the token's k largest when its noise is drawn again."""
    if routing.threshold is None or config is None:
        return jnp.zeros((), jnp.float32)
    logits = jnp.where(routing.active[..., None], logits, 0)
    std = noise_std(logits, config, noise_logits)
    least, following = routing.threshold[..., :1], routing.threshold[..., 1:]
    beaten = jnp.where(is_chosen(logits, routing.expert), following, least)
    chance = jax.scipy.stats.norm.cdf((logits - beaten) / jnp.maximum(std, 1e-6))
    chance = jnp.where(routing.active[..., None], chance, 0)
    return _variation(jnp.sum(chance.astype(jnp.float32), axis=tuple(range(chance.ndim - 1))))


def _variation(x):
    """Squared coefficient of variation of [E] numbers; 0 where all are 0."""
    mean = jnp.mean(x)
    return jnp.mean((x - mean) ** 2) / jnp.where(mean == 0, 1, mean**2)
