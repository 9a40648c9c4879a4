"""Which experts serve which modality, and what the balance loss and the router's noise are good for."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from ringmoe.needle import data, model, train
from ringmoe.needle.model import KINDS, Config, Params


class Served(NamedTuple):
    """Shares of the choices that went to each expert."""

    load: np.ndarray  # [layers, KINDS, E], sums of 1 over E
    dropped: np.ndarray  # [layers, KINDS], share of choices, at the capacity of training


def served(params: Params, config: Config, tokens: int = 8192, seed: int = 0) -> Served:
    """Routing of the local layers in contexts of one modality each, of so many tokens, without noise."""
    calm = dataclasses.replace(config, router=dataclasses.replace(config.router, noise=None))
    run = jax.jit(functools.partial(model.local_layers, config=calm))
    load, dropped = [], []
    for kind in range(len(KINDS)):
        rng = np.random.default_rng((seed, kind))
        one = jax.tree.map(lambda x: x[None], data.render(data.haystack(tokens, kind, rng), rng))
        _, metrics = run(params, model.embed(params, one), key=jax.random.key(0))
        load.append([m.expert_load / m.expert_load.sum() for m in metrics])
        dropped.append([m.drop_fraction for m in metrics])
    return Served(np.swapaxes(np.array(load), 0, 1), np.array(dropped).T)


class Balance(NamedTuple):
    """How evenly a router that was trained in some way uses its experts, in the last tenth of training."""

    what: str
    busiest: float  # the busiest expert's load over the mean, mean over layers
    unused: float  # experts with less than a tenth of the mean, mean over layers
    dropped: float  # share of choices
    accuracy: float  # of answers' bytes


def variants(config: Config) -> dict[str, Config]:
    """The model's router, and without each of its two remedies, and without both."""
    calm = dataclasses.replace(config.router, noise=None)
    return {
        "noise and loss": config,
        "loss alone": dataclasses.replace(config, router=calm),
        "noise alone": dataclasses.replace(config, load_balance_weight=0.0),
        "neither": dataclasses.replace(config, router=calm, load_balance_weight=0.0),
    }


def balance(config: Config, steps: int, seed: int, console: Console) -> list[Balance]:
    """Trains each of the `variants` for some steps of the curriculum, from the same weights on the same data."""
    found = []
    for what, variant in variants(config).items():
        console.print(f"training with {what}", markup=False)
        state = train.init_state(seed, variant, steps)
        _, reports = train.fit(state, variant, steps, None, console)
        found.append(_of(what, reports[-max(1, steps // 10) :]))
    return found


def _of(what: str, reports: list[dict[str, np.ndarray]]) -> Balance:
    load = np.sum([report["expert_load"] for report in reports], 0)
    relative = load / load.mean(-1, keepdims=True)
    return Balance(
        what,
        busiest=float(relative.max(-1).mean()),
        unused=float((relative < 0.1).sum(-1).mean()),
        dropped=float(np.mean([report["dropped"] for report in reports])),
        accuracy=float(np.mean([report["accuracy"] for report in reports])),
    )
