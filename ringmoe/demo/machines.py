"""The demo's train step compiled for TPU slices that this machine doesn't have."""

import collections
import importlib.util
from typing import Any

import jax

import ringmoe

TARGETS = ("v5e:2x4", "v5p:2x2x2")
HOW_TO_INSTALL = "pip install 'ringmoe[targets]'"


def can_compile() -> bool:
    """Whether libtpu, the TPU compiler, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(target: str) -> list[Any]:
    """The devices of the TPU slice `target`, to make a mesh of and compile for; they cannot run anything."""
    return ringmoe.target(target).devices()


def summary(compiled: jax.stages.Compiled, target: str, mesh: jax.sharding.Mesh) -> str:
    """The collectives of the schedule by kind (`-start`: asynchronous), how much of them shows, and the memory."""
    report = ringmoe.inspect(compiled, target=target, mesh=mesh)
    found = collections.Counter(c.kind + "-start" * c.asynchronous for c in report.collectives)
    parts = [f"{count} {kind}" for kind, count in sorted(found.items())] or ["no collective"]
    return (
        f"{', '.join(parts)}; estimated {report.compute_us:,.0f} us of compute, {report.wire_us:,.0f} us on the wire, "
        f"{report.exposed_fraction:.0%} of that exposed; {(report.peak_bytes or 0) / 2**20:.0f} MiB of "
        f"{report.hbm_bytes / 2**30:.0f} GiB per device"
    )
