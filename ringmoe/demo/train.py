"""The demo's program: trains the byte model on 8 CPU devices, checks it, and shows what its ops became.

python -m ringmoe.demo --steps 40 --out ./out
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

try:
    import matplotlib  # noqa: F401  (picture needs it)
    import optax
    from rich.console import Console
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the demo needs {error.name!r}, which is not installed: pip install 'ringmoe[examples]'", name=error.name
    ) from error

import ringmoe
from ringmoe.demo import check, data, machines, model, picture, placement, progress

SEQUENCE_LENGTH = 4096
BATCH_SIZE = 2


class State(NamedTuple):
    params: Any  # model.Params
    optimizer: Any  # optax's
    step: Any  # int32: how many steps were made; the router's noise is drawn from it


class History(NamedTuple):
    """One entry a step; of a dense model the losses alone."""

    loss: list[float]
    dropped: list[float]
    expert_load: list[np.ndarray]


def make_optimizer(num_steps: int, peak: float = 5e-3) -> optax.GradientTransformation:
    """AdamW with gradients clipped to norm 1; the rate warms up for a tenth of the steps, then falls as a cosine."""
    warmup = max(1, num_steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.1 * peak, peak, warmup, max(num_steps, warmup + 1), 0.1 * peak)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=_is_matrix))


def _is_matrix(params: model.Params) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def init_state(seed: int, config: model.Config, optimizer: optax.GradientTransformation) -> State:
    params = model.init(jax.random.key(seed), config)
    return State(params, optimizer.init(params), jax.numpy.int32(0))


def make_train_step(config: model.Config, optimizer: optax.GradientTransformation):
    """`step(state, inputs [B, T], targets [B, T]) -> (state, report)`; its arguments alone make it dense or sharded."""

    def train_step(state: State, inputs: jax.Array, targets: jax.Array):
        key = jax.random.fold_in(jax.random.key(0), state.step)
        grad = jax.grad(functools.partial(model.loss, config=config, key=key), has_aux=True)
        grads, report = grad(state.params, inputs, targets)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1), report

    return train_step


def abstract_arguments(state: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """The train step's arguments, shapes and shardings only; a larger mesh has more and longer sequences."""
    rows, length = (
        n * mesh.shape[axis]
        for n, axis in zip(placement.tokens_per_device(BATCH_SIZE, SEQUENCE_LENGTH), placement.AXES)
    )
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=placement.batch_sharding(mesh))
    return placement.abstract(state, placement.state_shardings(state, mesh)), tokens, tokens


def jit_step(train_step, state: Any, mesh: jax.sharding.Mesh):
    """The step, jitted for the mesh; the state it is given is overwritten in place."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return ringmoe.jit(train_step, donate_argnums=0, out_shardings=(placement.state_shardings(state, mesh), everywhere))


def compile_step(train_step, state: Any, mesh: jax.sharding.Mesh):
    """Compiles the step for the mesh's devices, which need not exist."""
    return jit_step(train_step, state, mesh).lower(*abstract_arguments(state, mesh)).compile()


def for_mesh(mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any, Any]:
    """The train step and its arguments on any mesh with axes `expert` and `seq`:

    ringmoe inspect ringmoe.demo.train:for_mesh --target v5p:8x8x16 --mesh expert=8,seq=128
    """
    config, optimizer = model.Config(), make_optimizer(1000)
    state = jax.eval_shape(functools.partial(init_state, 0, config, optimizer))
    train_step = make_train_step(config, optimizer)
    return jit_step(train_step, state, mesh), *abstract_arguments(state, mesh)


def fit(step, state: State, batches: Sequence[np.ndarray], mesh, console: Console) -> tuple[State, History]:
    """One step a batch [B, T + 1], with a progress bar; raises `check.CheckFailed` at a loss that is not finite."""
    history = History([], [], [])
    with progress.training(console, len(batches), every=10) as told:
        for i, batch in enumerate(batches, 1):
            start = time.perf_counter()
            inputs, targets = jax.device_put((batch[:, :-1], batch[:, 1:]), placement.batch_sharding(mesh))
            state, report = step(state, inputs, targets)
            report = jax.device_get(report)
            seconds = time.perf_counter() - start
            check.check_finite(i, float(report["loss"]))
            history.loss.append(float(report["loss"]))
            line = f"loss {history.loss[-1]:.3f} nats/byte  {batch[:, 1:].size / seconds:,.0f} tokens/s"
            if "dropped" in report:
                history.dropped.append(float(report["dropped"]))
                history.expert_load.append(report["expert_load"])
                line += f"  dropped {history.dropped[-1]:.1%}"
            told(i, line)
    return state, history


@contextlib.contextmanager
def timed(console: Console, what: str):
    """A spinner while the block runs; then one line with its seconds."""
    start = time.perf_counter()
    with console.status(f"{what} ..."):
        yield
    console.print(f"{what}: {time.perf_counter() - start:.1f} s")


def compile_for_targets(train_step, state: Any, console: Console) -> None:
    """Prints what the same train step becomes on machines that are not here."""
    if not machines.can_compile():
        missing = f"not compiled for {', '.join(machines.TARGETS)}: libtpu is missing ({machines.HOW_TO_INSTALL})"
        console.print(missing, markup=False)
        return
    for target in machines.TARGETS:
        with timed(console, f"compiling the same train step for {target}"):
            mesh = placement.make_mesh(machines.devices(target))
            found = machines.summary(compile_step(train_step, state, mesh), target, mesh)
        console.print(f"  {target}: {found}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ringmoe demo",
        description="Trains a byte-level mixture-of-experts model on the Python standard library's own sources, in "
        f"sequences of {SEQUENCE_LENGTH} bytes sharded over {placement.NUM_DEVICES} CPU devices (sequence, experts), "
        "checks it against the dense model and shows how every op was partitioned. About three minutes on two cores.",
        epilog=f"Exits with 1 if the loss does not fall below {check.LOSS_BOUND} nats per byte or that of a model without "
        f"experts, if more than {check.DROPS_BOUND:.0%} of the choices of experts are dropped at the end, or if sharded and "
        f"dense logits differ by more than {check.LOGITS_BOUND:.0e}.",
    )
    parser.add_argument("--steps", type=int, default=40, help="batches to train for (default %(default)s)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="picture's folder (default ./out)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of text (default %(default)s)")
    targets = " and ".join(machines.TARGETS)
    parser.add_argument("--no-targets", dest="targets", action="store_false", help=f"don't compile for {targets}")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}, expected at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    arguments = parse(argv)
    console = Console(soft_wrap=True)
    start = time.perf_counter()
    try:
        placement.use_cpu_devices()
    except RuntimeError as error:  # of the caller's making; those of a run below keep their traceback
        console.print(f"demo failed: {error}", style="bold red", markup=False)
        return 1
    try:
        run(arguments, console)
    except check.CheckFailed as error:
        console.print(f"demo failed: {error}", style="bold red", markup=False)
        return 1
    console.print(f"demo passed in {time.perf_counter() - start:.0f} s", style="bold green")
    return 0


def run(arguments: argparse.Namespace, console: Console) -> None:
    config = model.Config()
    corpus = data.load(SEQUENCE_LENGTH)
    mesh = placement.make_mesh(jax.devices())
    console.print(
        f"{len(corpus.train):,} sequences of {SEQUENCE_LENGTH:,} bytes, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    )
    state, history = train(config, corpus, mesh, arguments, console)
    console.print("and a dense model of equal work for each byte, on the same bytes:")
    _, dense = train(dataclasses.replace(config, router=None), corpus, mesh, arguments, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "demo.png"
    picture.save(path, *history, dense.loss, check.LOSS_BOUND)
    console.print(f"picture of loss and expert load: {path}")

    train_step = make_train_step(config, make_optimizer(arguments.steps))
    console.print(str(ringmoe.explain(train_step, *abstract_arguments(state, mesh))), markup=False)
    with timed(console, "comparing sharded with dense logits"):
        candidates = next(data.batches(corpus.heldout, 4 * BATCH_SIZE, arguments.seed))
        agreement = check.compare_logits(state.params, candidates, BATCH_SIZE, config, mesh)
    console.print(
        f"largest difference {agreement.max_difference:.1e} (bound {check.LOGITS_BOUND:.0e}, largest logit "
        f"{agreement.max_logit:.1f}, closest expert choice {agreement.margin:.1e})"
    )
    if arguments.targets:
        compile_for_targets(train_step, state, console)
    last = check.check_loss(history.loss)
    console.print(f"loss {last:.3f} nats per byte (bound {check.LOSS_BOUND}); held out {agreement.heldout_loss:.3f}")
    console.print(check.check_experts(history.loss, dense.loss, history.dropped))


def train(config: model.Config, corpus: data.Corpus, mesh, arguments, console: Console) -> tuple[State, History]:
    """Trains one model from scratch."""
    optimizer = make_optimizer(arguments.steps)
    train_step = make_train_step(config, optimizer)
    init = functools.partial(init_state, arguments.seed, config, optimizer)
    # Born in its place: no device ever holds all experts.
    state = jax.jit(init, out_shardings=placement.state_shardings(jax.eval_shape(init), mesh))()
    count = sum(x.size for x in jax.tree.leaves(state.params))
    with timed(console, f"{count:,} weights: compiling the train step for {mesh.size} CPU devices"):
        step = compile_step(train_step, state, mesh)
    batches = list(itertools.islice(data.batches(corpus.train, BATCH_SIZE, arguments.seed), arguments.steps))
    return fit(step, state, batches, mesh, console)


if __name__ == "__main__":
    sys.exit(main())
