"""Training on short contexts: a curriculum of lessons, checkpoints by orbax, and a small file of weights to keep."""

import contextlib
import functools
import math
import pathlib
import time
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from rich.console import Console

from ringmoe.demo import progress
from ringmoe.needle import data, model
from ringmoe.needle.data import Lesson
from ringmoe.needle.model import Config, Params

type Curriculum = tuple[tuple[tuple[Lesson, ...], float], ...]  # parts: lessons, and the share of all steps

# (lessons, steps). Single facts in text teach to match keys in a hundred steps; on everything at once that takes a thousand. No
# sequence is longer than 2048 tokens; decoys stand for what only a longer one holds. The last lessons are noisier than what is
# asked after training (data.NOISE), so that a symbol of ten million is still read when it is worse than most.
_PARTS = (
    ((Lesson(32, 256, 96, kinds=1, cipher=0, chain=0),), 192),
    ((Lesson(16, 512, 128, decoys=0.2),), 1264),
    ((Lesson(16, 512, 128, decoys=0.4), Lesson(4, 2048, 256, decoys=0.4)), 544),
    ((Lesson(16, 512, 128, decoys=0.6, noise=0.1), Lesson(4, 2048, 256, decoys=0.6, noise=0.1)), 800),
)
STEPS = sum(steps for _, steps in _PARTS)
CURRICULUM: Curriculum = tuple(
    (lessons, steps / STEPS) for lessons, steps in _PARTS
)  # shares of however many steps there are
LONGEST = max(lesson.length for lessons, _ in CURRICULUM for lesson in lessons)
EVERY = 250  # steps between checkpoints


class Diverged(Exception):
    """The loss is not finite; the message says since when and what to try."""


class NotWeights(ValueError):
    """A file is not one of this model's weights; the message says what it holds."""


class State(NamedTuple):
    params: Any  # model.Params
    optimizer: Any  # optax's
    step: Any  # int32, how many steps were made; data and noise are drawn from it


def lesson_of(step: int, steps: int, curriculum: Curriculum | None = None) -> Lesson:
    """What step number `step` of `steps` learns from; of several lessons of a part of the curriculum, in turns."""
    parts = curriculum or CURRICULUM
    ends = np.cumsum([share for _, share in parts]) * steps
    lessons, _ = parts[min(int(np.searchsorted(ends, step, "right")), len(parts) - 1)]
    return lessons[step % len(lessons)]


def make_optimizer(steps: int, peak: float = 3e-3) -> optax.GradientTransformation:
    """AdamW with gradients clipped to norm 1; the rate warms up for 50 steps, then falls as a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0, peak, min(50, steps - 1), steps, peak / 20)
    is_matrix = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.02, mask=is_matrix))


def init_state(seed: int, config: Config, steps: int) -> State:
    params = model.init(jax.random.key(seed), config)
    return State(params, make_optimizer(steps).init(params), jnp.int32(0))


def train_step(
    state: State, example: data.Example, *, config: Config, steps: int
) -> tuple[State, dict[str, jax.Array]]:
    """One of `steps` steps: the next state, and what `model.loss` reports. Its arguments alone make it dense or sharded."""
    key = jax.random.fold_in(jax.random.key(0), state.step)
    loss = functools.partial(model.loss, config=config, key=key)
    grads, report = jax.grad(loss, has_aux=True)(state.params, *example)
    updates, optimizer = make_optimizer(steps).update(grads, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), optimizer, state.step + 1), report


_train_step = jax.jit(train_step, donate_argnums=0, static_argnames=("config", "steps"))


def checkpoints(folder: pathlib.Path) -> orbax.checkpoint.CheckpointManager:
    options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2)
    return orbax.checkpoint.CheckpointManager(folder.resolve(), options=options)


def resumed(manager: orbax.checkpoint.CheckpointManager, state: State) -> State:
    """The state of the latest checkpoint, or the one given where there is none."""
    latest = manager.latest_step()
    if latest is None:
        return state
    return State(*manager.restore(latest, args=orbax.checkpoint.args.StandardRestore(tuple(state))))


def fit(
    state: State,
    config: Config,
    steps: int,
    folder: pathlib.Path | None,
    console: Console,
    curriculum: Curriculum | None = None,
) -> tuple[State, list[dict[str, np.ndarray]]]:
    """Trains until `steps` steps are made, from the folder's checkpoint on if there is one; and each step's report.

    Args:
      curriculum: what it learns from; default CURRICULUM.

    Raises:
      Diverged: the loss was not finite.
    """
    reports = []
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints(folder)) if folder else None
        state = resumed(manager, state) if manager else state
        first = int(state.step)
        told = stack.enter_context(progress.training(console, steps, every=100, first=first))
        for i in range(first, steps):
            start = time.perf_counter()
            example = data.batch(lesson_of(i, steps, curriculum), i)
            state, report = _train_step(state, example, config=config, steps=steps)
            reports.append(report := jax.device_get(report))
            check_finite(i, report["loss"], folder)
            rate = example.shown.size / (time.perf_counter() - start)
            told(i + 1, f"loss {report['loss']:.3f}  bytes right {report['accuracy']:.1%}  {rate:,.0f} tokens/s")
            if manager and ((i + 1) % EVERY == 0 or i + 1 == steps):
                manager.save(i + 1, args=orbax.checkpoint.args.StandardSave(tuple(state)))
    return state, reports


def check_finite(step: int, loss: float, folder: pathlib.Path | None) -> None:
    if not math.isfinite(loss):
        again = f"from the last checkpoint in {folder}, or anew" if folder else "anew"
        raise Diverged(f"the loss of step {step} is {loss}: training diverged; start {again} with another --seed")


def save(path: pathlib.Path, params: Params) -> None:
    """Writes weights as a NumPy archive of float16 arrays, named by their places in the tree; two bytes each."""
    leaves: dict[str, Any] = {
        jax.tree_util.keystr(place): np.asarray(x, np.float16)
        for place, x in jax.tree_util.tree_leaves_with_path(params)
    }
    np.savez(path, **leaves)


def load(path: pathlib.Path, config: Config) -> Params:
    """Reads what `save` wrote, as float32.

    Raises:
      NotWeights: the file is none that `save` wrote, or holds other arrays than a model of this `config` has.
    """
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise NotWeights(
            f"{path} is no NumPy archive (.npz) of plain arrays: give the file that training wrote"
        ) from error
    found = {name: x.shape for name, x in arrays.items()}
    wanted = {jax.tree_util.keystr(place): x.shape for place, x in jax.tree_util.tree_leaves_with_path(shapes)}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise NotWeights(
            f"{path}: {len(odd)} arrays are not this model's, first {odd[0]} {found.get(odd[0])}, expected "
            f"{wanted.get(odd[0])}: train anew, or give the file that this version wrote"
        )
    return jax.tree_util.tree_map_with_path(
        lambda place, _: jnp.asarray(arrays[jax.tree_util.keystr(place)], jnp.float32), shapes
    )
