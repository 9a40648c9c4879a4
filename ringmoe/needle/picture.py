"""Pictures of what was measured."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from ringmoe.needle.evaluate import DEPTHS, Translated, Trial, wilson
from ringmoe.needle.model import KINDS


def named(length: int) -> str:
    """1024 is 1K, 2^20 1M."""
    return f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}K"


def heat_map(path: pathlib.Path, trials: Sequence[Trial], trained: int) -> None:
    """Recall of single facts at each depth and length: all together, then each modality in each haystack.

    Args:
      trained: the longest context of training, marked by a line.
    """
    singles = [t for t in trials if t.links == 1]
    lengths = sorted({t.length for t in singles})
    with plt.rc_context({"font.size": 9}):
        figure = plt.figure(figsize=(13, 6.2), layout="constrained")
        ((left, right),) = figure.subfigures(1, 2, width_ratios=(1, 1.35), squeeze=False)
        axes = left.subplots()
        image = _cells(axes, singles, lengths, trained, numbers=True)
        axes.set_title(f"Recall of {len(singles):,} facts, each asked once")
        axes.set(xlabel="tokens of context", ylabel="depth of the fact")
        left.colorbar(image, ax=axes, orientation="horizontal", format=PercentFormatter(1), shrink=0.7)
        grid = right.subplots(len(KINDS), len(KINDS), sharex=True, sharey=True)
        for row, needle in zip(grid, KINDS):
            for axes, haystack in zip(row, KINDS):
                here = [t for t in singles if t.needle == needle and t.haystack == haystack]
                _cells(axes, here, lengths, trained)
                axes.set_title(f"{needle} in {haystack}: {sum(t.right for t in here)} of {len(here)}", fontsize=9)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _cells(axes, trials: Sequence[Trial], lengths: Sequence[int], trained: int, numbers: bool = False):
    """One map: a column for each length, a row for each depth, the context's start at the top."""
    right, count = np.zeros((2, DEPTHS, len(lengths)))
    for trial in trials:
        where = trial.depth, lengths.index(trial.length)
        right[where] += trial.right
        count[where] += 1
    rate = np.divide(right, count, out=np.full_like(right, np.nan), where=count > 0)
    image = axes.imshow(rate, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    if numbers:
        for (depth, column), n in np.ndenumerate(count):
            if n:
                axes.text(column, depth, f"{right[depth, column]:.0f}/{n:.0f}", ha="center", va="center", fontsize=7)
    after = sum(length <= trained for length in lengths) - 0.5
    axes.axvline(after, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(lengths)), [named(length) for length in lengths], fontsize=9 if numbers else 7)
    axes.set_yticks(range(0, DEPTHS, 3), [f"{(i + 0.5) / DEPTHS:.0%}" for i in range(0, DEPTHS, 3)])
    return image


def experts(path: pathlib.Path, load: np.ndarray, dropped: np.ndarray) -> None:
    """Which experts serve which modality: load [layers, KINDS, E], shares of a modality's choices; dropped [layers, KINDS]."""
    num_layers, _, num_experts = load.shape
    colors = dict(zip(KINDS, ("#1f4e79", "#c55a11", "#548235")))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(
            num_layers, 1, figsize=(8, 2.4 * num_layers), layout="constrained", sharex=True, squeeze=False
        )
        for layer, (axes,) in enumerate(grid):
            for i, (kind, color) in enumerate(colors.items()):
                label = f"{kind}, {dropped[layer, i]:.1%} dropped"
                axes.bar(np.arange(num_experts) + 0.27 * (i - 1), load[layer, i], 0.25, color=color, label=label)
            axes.axhline(1 / num_experts, color="#888888", linewidth=1, linestyle="--")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_title(f"local layer {layer + 1}: shares of each modality's choices (dashed: even)", fontsize=9)
            axes.legend(frameon=False, fontsize=8, ncols=3)
            axes.set_ylim(0, 1.25 * load[layer].max())
        grid[-1][0].set(xlabel="expert", xticks=np.arange(num_experts))
        figure.savefig(path, dpi=120)
        plt.close(figure)


def cipher(path: pathlib.Path, found: Sequence[Translated], trained: int) -> None:
    """Letters right against the length of the context, with the dictionary in it and without."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        for given, label, color in ((True, "dictionary in the context", "#1f4e79"), (False, "withheld", "#c55a11")):
            here = [t for t in found if t.dictionary == given]
            lengths = [t.length for t in here]
            low, high = np.array([wilson(t.right, t.letters) for t in here]).T
            axes.fill_between(lengths, low, high, color=color, alpha=0.25, linewidth=0)
            axes.plot(lengths, [t.right / t.letters for t in here], "o-", color=color, label=label)
        axes.axhline(1 / 26, color="#888888", linewidth=1, linestyle="--", label="chance")
        axes.axvline(trained, color="black", linewidth=1, linestyle=":", label="longest in training")
        axes.set_xscale("log", base=2)
        lengths = sorted({t.length for t in found})
        axes.set_xticks(lengths, [named(length) for length in lengths])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="tokens of context", ylabel="letters right", ylim=(0, 1.03))
        axes.set_title("An unseen cipher, learnt in context (bands: 95%)", fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="center right")
        figure.savefig(path, dpi=120)
        plt.close(figure)
