"""The demo's picture: the loss, and where each MoE layer sent its bytes."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter


def save(path: pathlib.Path, losses, dropped, expert_load, dense, loss_bound: float) -> None:
    """Writes a PNG.

    Args:
      losses: [steps] nats per byte.
      dropped: [steps] fraction of expert assignments dropped.
      expert_load: [steps, MoE layers, E] assignments that asked for each expert.
      dense: [steps] nats per byte of the dense model.
    """
    losses, dropped = np.asarray(losses), np.asarray(dropped)
    load = np.asarray(expert_load, float)
    num_layers, num_experts = load.shape[1:]
    share = load / load.sum(-1, keepdims=True)
    steps = np.arange(1, len(losses) + 1)
    last = max(2, len(steps))  # a single step still makes an axis
    even = 1 / num_experts

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(12, 3 + 1.5 * num_layers), layout="constrained")
        ((left, right),) = figure.subfigures(1, 2, squeeze=False, wspace=0.04)

        loss_axes, drop_axes = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        loss_axes.plot(steps, dense, color="#999999", linewidth=1.5, label="dense")
        loss_axes.plot(steps, losses, color="#1f4e79", linewidth=2, label="with experts")
        loss_axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
        _level(loss_axes, np.log(256), "uniform bytes, ln 256")
        _level(loss_axes, loss_bound, "bound of the demo")
        loss_axes.set_title(f"Loss: {losses[-10:].mean():.2f} nats per byte in the last 10 steps")
        loss_axes.set(ylabel="nats per byte", ylim=(min(2, losses.min() - 0.1), None))
        drop_axes.fill_between(steps, dropped, color="#c55a11", alpha=0.35, linewidth=0)
        drop_axes.plot(steps, dropped, color="#c55a11", linewidth=1.5)
        drop_axes.set_title("Expert assignments dropped (no capacity left)")
        drop_axes.set(xlabel="step", ylim=(0, None), xlim=(1, last))
        drop_axes.yaxis.set_major_formatter(PercentFormatter(1))

        grid = right.subplots(num_layers, 2, squeeze=False, width_ratios=(3, 2))
        colors = plt.get_cmap("viridis")(np.linspace(0.05, 0.95, num_experts))
        for layer, (over_time, at_end) in enumerate(grid):
            over_time.stackplot(steps, share[:, layer].T, colors=colors, edgecolor="white", linewidth=0.3)
            over_time.set_title(f"MoE layer {layer + 1}: experts' shares")
            over_time.set(xlim=(1, last), ylim=(0, 1))
            over_time.yaxis.set_major_formatter(PercentFormatter(1))
            final = share[-10:, layer].mean(0)
            at_end.bar(np.arange(num_experts), final, color=colors)
            _level(at_end, even, "")
            at_end.set(
                title="last 10 (dashed: even)",
                xticks=np.arange(num_experts),
                ylim=(0, 1.25 * max(final.max(), even)),
            )
            at_end.yaxis.set_major_formatter(PercentFormatter(1))
        grid[-1][0].set_xlabel("step")
        grid[-1][1].set_xlabel("expert")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _level(axes, height: float, label: str) -> None:
    """A dashed line across the plot with its meaning above its right end."""
    axes.axhline(height, color="#888888", linewidth=1, linestyle="--")
    beside = axes.get_yaxis_transform()  # x in fractions of the plot, y in its data
    axes.text(0.99, height, label, transform=beside, ha="right", va="bottom", color="#666666", fontsize=9)
