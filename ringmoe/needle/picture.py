"""Pictures of what was measured."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from ringmoe.needle.evaluate import DEPTHS, Trial
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
    axes.set_xticks(range(len(lengths)), [named(length) for length in lengths])
    axes.set_yticks(range(0, DEPTHS, 3), [f"{(i + 0.5) / DEPTHS:.0%}" for i in range(0, DEPTHS, 3)])
    return image
