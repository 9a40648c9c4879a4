"""What the choice of positions in global layers, and their temperature, are good for: short trainings with others."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console

from ringmoe.needle import evaluate, model, train
from ringmoe.needle.data import Lesson
from ringmoe.needle.haystack import Reader
from ringmoe.needle.model import Config

_FACTS = {"kinds": 1, "cipher": 0, "chain": 0}
CURRICULUM = (  # single facts in text, which are learnt in a few hundred steps; up to 2048 tokens, as in the whole training
    ((Lesson(32, 256, 96, **_FACTS),), 0.5),
    ((Lesson(16, 512, 128, decoys=0.4, **_FACTS), Lesson(4, 2048, 256, decoys=0.4, **_FACTS)), 0.5),
)


class Recalled(NamedTuple):
    """Single facts in text, by a model that was trained in some way."""

    what: str
    length: int  # tokens
    right: int
    asked: int


def variants(config: Config) -> dict[str, Config]:
    """The model, and others that differ in their global layers alone; RoPE with the base of RoFormer."""
    return {
        "no positions, log n": config,
        "no positions": dataclasses.replace(config, temperature=False),
        "RoPE, log n": dataclasses.replace(config, global_rope_base=10_000.0),
    }


def compare(
    config: Config, steps: int, lengths: Sequence[int], trials: int, seed: int, console: Console
) -> list[Recalled]:
    """Trains each of the `variants` from the same weights on the same data, and asks for facts in text of each length.

    Args:
      trials: facts at each of evaluate.DEPTHS depths.
    """
    found = []
    for what, variant in variants(config).items():
        console.print(f"training with {what}", markup=False)
        state = train.init_state(seed, variant, steps)
        state, _ = train.fit(state, variant, steps, None, console, CURRICULUM)
        reader = Reader(variant, max(lengths), min(32768, max(lengths)))
        for length in lengths:
            done, _ = evaluate.measure(reader, state.params, (length,), trials, seed, kinds=(0,))
            right = [trial.right for trial in done if trial.needle == model.KINDS[0]]
            found.append(Recalled(what, length, sum(right), len(right)))
            console.print(f"{length:>10,} tokens: {evaluate.counted(right)} facts", markup=False)
    return found
