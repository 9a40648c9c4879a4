"""The demo's train step compiled for TPU slices that this machine doesn't have."""

import collections
import importlib.util
import re
from typing import Any

import jax
from jax.experimental import topologies

TARGETS = ("v5e:2x4", "v5p:2x2x2")
HOW_TO_INSTALL = "pip install 'ringmoe[targets]'"

_KINDS = ("collective-permute", "all-to-all", "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter")
_OPCODE = re.compile(rf" ({'|'.join(_KINDS)}|async)(-start)?\(")


def can_compile() -> bool:
    """Whether libtpu, the TPU compiler, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(target: str) -> list[Any]:
    """The devices of the TPU slice `target`, to make a mesh of and compile for; they cannot run anything."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)


def collectives(hlo: str) -> collections.Counter[str]:
    """How often a scheduled program (`compiled.as_text()`) holds each collective.

    A name that ends in `-start` is asynchronous: a `-done` follows, and what stands between the two hides it. An op in
    a loop's body counts once.
    """
    count: collections.Counter[str] = collections.Counter()
    for line in hlo.splitlines():
        found = _OPCODE.search(line)
        if found is None:
            continue
        kind, start = found.group(1), found.group(2) or ""
        if kind == "async":  # a collective wrapped into a computation of its own, named by the attribute `calls`
            wrapped = re.search(rf"calls=%?[\w.-]*?({'|'.join(_KINDS)})", line.replace("_", "-"))
            if wrapped is None:
                continue
            kind = wrapped.group(1)
        count[kind + start] += 1
    return count


def summary(compiled: jax.stages.Compiled) -> str:
    """One line: the collectives by kind, and the memory that the step needs on each device."""
    found = collectives(compiled.as_text() or "")
    parts = [f"{count} {kind}" for kind, count in sorted(found.items())] or ["no collective"]
    memory = compiled.memory_analysis()
    assert memory is not None, "TPU programs come with their memory"
    return f"{', '.join(parts)}; {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporary memory per device"
