"""The examples as they stand, and as the ordinary programs they came from: numbers, and what TPU's compiler made of each.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m bench.frameworks

prints the table of bench/README.md.
"""

import collections
import contextlib
import importlib.metadata
import math
import pathlib
import re
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NAMES = {
    "flax_linen": "Flax Linen",
    "flax_nnx": "Flax NNX",
    "equinox_": "Equinox",
    "haiku_": "Haiku",
    "optax_": "optax, plain functions",
}
# Which of RingMoE's lines a program keeps. With Explicit axes the framework's own jit stays.
ORDINARY = lambda line: False
AUTO = lambda line: True
EXPLICIT = lambda line: "ringmoe.jit" not in line
BATCH, CPU_LENGTH, TPU_LENGTH, TARGET = 4, 128, 512, "v5e:2x4"
AXES = ("data", "seq")


def changes(source: str) -> list[tuple[int, int, str | None, str]]:
    """`(first line, last line, ordinary line or None, RingMoE's line)` of every marked region; lines count from 0."""
    found, lines, start = [], source.splitlines(), None
    for number, line in enumerate(lines):
        if line.strip() == "# [ringmoe]":
            start = number
        elif line.strip() == "# [/ringmoe]":
            assert start is not None, f"line {number + 1}: no region is open"
            region = [text for text in lines[start + 1 : number] if text.strip()]
            was = [text.replace("# was: ", "", 1) for text in region if text.strip().startswith("# was: ")]
            ours = [text for text in region if not text.strip().startswith("#")]
            assert len(was) <= 1 == len(ours), f"line {start + 1}: expected one line, and at most one that it replaces"
            found.append((start, number, was[0] if was else None, ours[0]))
            start = None
    assert start is None, f"line {start}: the region isn't closed"
    return found


def program(name: str, keep) -> Any:
    """The example as a module, with the ordinary line wherever `keep` doesn't want RingMoE's."""
    path = EXAMPLES / f"{name}.py"
    lines = path.read_text().splitlines()
    for start, end, was, ours in changes(path.read_text()):
        if not keep(ours):
            lines[start : end + 1] = [was or ""] + [""] * (end - start)
    module = types.ModuleType(f"{name}_{'ordinary' if keep is ORDINARY else 'ringmoe'}")
    sys.modules[module.__name__] = module  # Equinox's and Flax's dataclasses look their module up
    sys.path.insert(0, str(EXAMPLES))
    try:
        exec(compile("\n".join(lines), path, "exec"), module.__dict__)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def around(mesh: Mesh):
    """Explicit axes need the mesh set: an array made inside the step has no other way to know it."""
    return jax.set_mesh(mesh) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


def run(module, axis_type: AxisType):
    """`(state, loss)` after one step on eight devices, as numpy arrays."""
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(axis_type,) * 2)
    state = jax.jit(module.init)(jax.random.key(0))
    state = jax.device_put(state, module.shardings(state, mesh))
    text = jax.random.randint(jax.random.key(1), (BATCH, CPU_LENGTH + 1), 0, module.VOCABULARY)
    tokens, targets = jax.device_put((text[:, :-1], text[:, 1:]), NamedSharding(mesh, P(*AXES)))
    with around(mesh):
        return jax.tree.map(np.asarray, module.step(state, tokens, targets))


def error(got, want) -> float:
    """The largest difference of a leaf from what it should be, over that leaf's largest element."""
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(want)) > 1
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
    return max(float(np.max(np.abs(np.float64(a) - np.float64(b))) / np.max(np.abs(b))) for a, b in pairs)


def compiled_text(module, mesh: Mesh) -> str:
    """The step compiled for the devices of `mesh`, which needn't be here."""
    state = jax.eval_shape(lambda: module.init(jax.random.key(0)))
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(shape, state, module.shardings(state, mesh))
    tokens = jax.ShapeDtypeStruct((BATCH, TPU_LENGTH), jnp.int32, sharding=NamedSharding(mesh, P(*AXES)))
    # Equinox takes what isn't an array for a static argument, a ShapeDtypeStruct too: a jax.jit around it traces it first.
    step = jax.jit(module.step) if type(module.step).__module__.startswith("equinox") else module.step
    with around(mesh):
        return step.lower(state, tokens, tokens).compile().as_text()


def counts(text: str) -> collections.Counter:
    """How many collectives of each kind and Pallas kernels the program's text holds; integers that are gathered, how many rows
    each device has for each expert, are no matter."""
    kinds = "all-gather|collective-permute|all-to-all"
    typed = re.findall(rf"= \(*([a-z]+\d*)\[.*?\s(?:ragged-)?({kinds})(?:-start)?\(", text)
    found = collections.Counter(kind for dtype, kind in typed if (dtype, kind) != ("s32", "all-gather"))
    found["kernels"] = text.count('custom_call_target="tpu_custom_call"')
    return found


def tpu_mesh(axis_type: AxisType) -> Mesh:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TARGET).devices
    return Mesh(np.array(devices).reshape(2, 4), AXES, axis_types=(axis_type,) * 2)


def main():
    print(f"jax {jax.__version__}, {', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES)}\n")
    print(
        "| | lines | error, Auto / Explicit | ordinary program | Auto, `ringmoe.jit` | Explicit, the framework's jit |"
    )
    print("|---|---|---|---|---|---|")
    for name, title in NAMES.items():
        want = run(program(name, ORDINARY), AxisType.Auto)
        cells = [title, str(len(changes((EXAMPLES / f"{name}.py").read_text())))]
        ways = ((AUTO, AxisType.Auto), (EXPLICIT, AxisType.Explicit))
        cells.append(" / ".join(f"{error(run(program(name, keep), axis_type), want):.0e}" for keep, axis_type in ways))
        for keep, axis_type in ((ORDINARY, AxisType.Auto), *ways):
            found = counts(compiled_text(program(name, keep), tpu_mesh(axis_type)))
            kinds = ("collective-permute", "kernels", "all-to-all", "all-gather")
            cells.append(" / ".join(str(found[kind]) for kind in kinds))
        print("|", " | ".join(cells), "|", flush=True)


PACKAGES = ("flax", "equinox", "dm-haiku", "optax")

if __name__ == "__main__":
    assert math.prod((2, 4)) <= len(jax.devices()), "eight devices are needed: see the top of this file"
    main()
