"""A picture of how time and memory change over targets."""

from collections.abc import Sequence
from typing import Any

from ringmoe.inspector.report import OverlapReport


def plot(reports: Sequence[OverlapReport], path: str) -> None:
    """Writes a picture of how time and memory change over the reports' targets."""
    from matplotlib.figure import Figure  # a second to load, for a picture only

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [report.target for report in reports]
    above: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}
    compute = [report.compute_us / 1e3 for report in reports]
    left.bar(names, compute, color="#3b7dd8", label="compute")
    left.bar(
        names,
        [report.exposed_us / 1e3 for report in reports],
        bottom=compute,
        color="#d43d3d",
        label="exposed",
    )
    for index, report in enumerate(reports):
        label = f"{report.exposed_fraction:.0%} exposed"
        left.annotate(label, (index, report.us / 1e3), **above)
    left.set(title=f"{reports[0].program}: one run", ylabel="milliseconds")
    left.margins(y=0.15)
    left.legend(frameon=False)
    peaks = [(report.peak_bytes or 0) / 2**30 for report in reports]
    right.bar(names, peaks, color="#24885a", label="peak")
    for index, report in enumerate(reports):
        part = peaks[index] * 2**30 / report.hbm_bytes
        right.annotate(f"{part:.1%} of HBM", (index, peaks[index]), **above)
    right.set(title="memory a device", ylabel="GiB")
    right.margins(y=0.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
