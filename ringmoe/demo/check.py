"""What the demo has to show before it may succeed."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ringmoe
from ringmoe.demo import model
from ringmoe.demo.placement import batch_sharding

LOSS_BOUND = 3.0  # nats per byte; log(256) = 5.55 knows nothing, about 3.4 knows how frequent each byte is
DROPS_BOUND = 0.02  # of the choices of experts, at the end of training
LOGITS_BOUND = 1e-4  # float32, largest absolute difference


class CheckFailed(Exception):
    """The demo ran, but what it computed is not good enough; the message says what and what to try."""


def check_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise CheckFailed(f"the loss of step {step} is {loss}: an op made NaN or infinity, or training diverged")


def check_loss(losses: Sequence[float], window: int = 10) -> float:
    """The mean of the last `window` losses, in nats per byte, if it is below the bound."""
    last = float(np.mean(losses[-window:])) if len(losses) else math.inf
    if not last < LOSS_BOUND:
        raise CheckFailed(
            f"the loss is {last:.3f} nats per byte after {len(losses)} steps, expected below {LOSS_BOUND}; "
            "train for more with --steps"
        )
    return last


def check_experts(losses: Sequence[float], dense: Sequence[float], dropped: Sequence[float], window: int = 10) -> str:
    """What experts were good for, in words, if they were: a loss no higher than the dense model's, and few drops."""
    ours, theirs, drops = (float(np.mean(values[-window:])) for values in (losses, dense, dropped))
    if not (ours <= theirs and drops < DROPS_BOUND):
        raise CheckFailed(
            f"with experts the loss is {ours:.3f} nats per byte, {theirs:.3f} without, and {drops:.1%} of the choices were "
            f"dropped after {len(losses)} steps, expected no higher loss and less than {DROPS_BOUND:.0%}; train for more "
            "with --steps"
        )
    return f"with experts {ours:.3f} nats per byte, without {theirs:.3f}; {drops:.2%} of their choices dropped"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How sharded and dense logits compare on one held-out batch."""

    max_difference: float
    max_logit: float
    margin: float  # of the closest expert choice, as a difference of probabilities
    heldout_loss: float


def routing_margin(params: model.Params, tokens: jax.Array, config: model.Config) -> jax.Array:
    """By how much the last expert chosen beats the first not chosen: [B], each sequence's closest choice."""
    x = params["embedding"][tokens]
    closest = jnp.full(len(tokens), jnp.inf)
    for layer in params["layers"]:
        x = x + model.attend(layer, x, config)
        if "router" in layer:
            y = model.rms_norm(x, layer["ffn_norm"])
            probabilities = jax.nn.softmax(jnp.matmul(y, layer["router"], precision="highest"), -1)
            best = jax.lax.top_k(probabilities, config.experts.top_k + 1)[0]
            closest = jnp.minimum(closest, jnp.min(best[..., -2] - best[..., -1], -1))
        x = x + model.feed_forward(layer, x, config)[0]
    return closest


def clearest(params: model.Params, sequences: np.ndarray, count: int, config: model.Config):
    """The `count` of `sequences` [n, T + 1] whose closest expert choice is the clearest, and the closest among them.

    Top-k routing is discontinuous: where two experts' probabilities are equal to float32 rounding, two right programs
    may choose differently, and their logits then say nothing about either.
    """
    margin_of = jax.jit(functools.partial(routing_margin, config=config))
    batches = np.split(sequences, range(count, len(sequences), count))
    margins = np.concatenate([margin_of(params, batch[:, :-1]) for batch in batches])
    best = np.argsort(-margins, kind="stable")[:count]
    return sequences[best], float(margins[best].min())


def compare_logits(params: model.Params, sequences: np.ndarray, count: int, config: model.Config, mesh) -> Agreement:
    """Runs the same `model.forward` sharded over `mesh` and dense on one device, on the clearest `count` sequences.

    Args:
      params: trained weights, placed on the mesh.
      sequences: held-out bytes [n, T + 1] int32, n a multiple of `count`.
      count: B, how many to compare on.

    Raises:
      CheckFailed: some logit differs by more than `LOGITS_BOUND`.
    """
    dense_params = jax.device_put(params, mesh.devices.flat[0])
    batch, margin = clearest(dense_params, sequences, count, config)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    forward = functools.partial(model.forward, config=config)
    dense, _ = jax.jit(forward)(dense_params, inputs)
    sharded, _ = ringmoe.jit(forward)(params, jax.device_put(inputs, batch_sharding(mesh)))
    return compare(np.asarray(sharded), np.asarray(dense), targets, margin)


def compare(sharded: np.ndarray, dense: np.ndarray, targets: np.ndarray, margin: float) -> Agreement:
    agreement = Agreement(
        max_difference=float(np.max(np.abs(sharded - dense))),
        max_logit=float(np.max(np.abs(dense))),
        margin=margin,
        heldout_loss=float(model.cross_entropy(jnp.asarray(dense), jnp.asarray(targets))),
    )
    if not agreement.max_difference <= LOGITS_BOUND:  # NaN fails too
        raise CheckFailed(
            f"sharded and dense logits differ by {agreement.max_difference:.2e}, expected at most {LOGITS_BOUND:.0e} "
            f"(largest logit {agreement.max_logit:.1f}, closest expert choice {margin:.1e})"
        )
    return agreement
