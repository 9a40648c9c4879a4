"""What several test files share: tolerances, comparisons, meshes, and every door through which a function is run."""

import contextlib
import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe

# Largest allowed difference, absolute and relative, of a result and of a gradient computed from inputs of this dtype.
TOLERANCE = {
    jnp.dtype(jnp.bfloat16): (2e-2, 6e-2),
    jnp.dtype(jnp.float16): (2e-3, 8e-3),
    jnp.dtype(jnp.float32): (1e-5, 1e-4),
    jnp.dtype(jnp.float64): (1e-12, 1e-11),
}

MESHES = ((8,), (2, 4), (2, 2, 2), ())  # (): one device, no mesh
AXES = ("a", "b", "c")


@dataclasses.dataclass(frozen=True)
class Door:
    """One way in which an op learns how its operands are sharded."""

    name: str
    axis_type: AxisType | None  # None: one device
    jit: Callable = jax.jit
    check_vma: bool | None = None  # not None: inside the caller's own shard_map

    def __str__(self):
        return self.name


TYPES = Door("types", AxisType.Explicit)
PARTITIONER = Door("partitioner", AxisType.Auto)
RINGMOE_JIT = Door("ringmoe.jit", AxisType.Auto, ringmoe.jit)
EXPLICIT_RINGMOE_JIT = Door("types under ringmoe.jit", AxisType.Explicit, ringmoe.jit)
MANUAL = Door("manual", AxisType.Auto, jax.jit, False)
MANUAL_VMA = Door("manual, check_vma", AxisType.Auto, jax.jit, True)
ONE_DEVICE = Door("one device", None)
SHARDED_DOORS = (TYPES, PARTITIONER, RINGMOE_JIT, MANUAL, MANUAL_VMA)
DOORS = (*SHARDED_DOORS, ONE_DEVICE)
FOUND = (TYPES, PARTITIONER, RINGMOE_JIT, EXPLICIT_RINGMOE_JIT)  # that find shardings by themselves


def make_mesh(shape: Sequence[int], axis_type: AxisType, names: Sequence[str] = AXES) -> Mesh:
    """A mesh of the first devices."""
    names, shape = tuple(names)[: len(shape)], tuple(shape)
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=jax.devices()[: math.prod(shape)])


def put(mesh: Mesh | None, tree, specs):
    """The arrays on the mesh; a spec for each; None stays None."""
    if mesh is None:
        return tree
    one = lambda x, spec: None if x is None else jax.device_put(x, NamedSharding(mesh, spec))
    return (
        {name: one(x, specs[name]) for name, x in tree.items()}
        if isinstance(tree, dict)
        else tuple(map(one, tree, specs))
    )


def value_and_gradients(
    fun: Callable[..., Any],
    loss: Callable[[Any, Any], jax.Array],
    wanted: Sequence[str],
    door: Door,
    mesh: Mesh | None,
    arrays: dict[str, Any],
    specs: dict[str, P],
    cotangents,
    out_specs=None,
    axis_name: tuple[str, ...] = (),
):
    """`fun(**arrays)` and the gradients of `loss(fun(**arrays), cotangents)` in the arrays `wanted`, through `door`.

    Returns `(out, {name: gradient})`. A manual door calls `fun(axis_name=..., **arrays)` inside a shard_map whose
    results lie as `out_specs` say.
    """
    arrays = {name: x for name, x in arrays.items() if x is not None}
    if door.check_vma is not None:
        names = tuple(arrays)
        local = lambda *xs: fun(**dict(zip(names, xs)), **({"axis_name": axis_name} if axis_name else {}))
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=tuple(specs[n] for n in names), out_specs=out_specs, check_vma=door.check_vma
        )
        whole = lambda arrays: sharded(*(arrays[n] for n in names))
    else:
        whole = lambda arrays: fun(**arrays)

    def both(differentiated, rest, cotangents):
        def scalar(differentiated):
            out = whole({**{n: differentiated.get(n, rest.get(n)) for n in arrays}})
            return loss(out, cotangents), out

        (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(differentiated)
        return out, grads

    arrays = put(mesh, arrays, specs)
    differentiated = {n: x for n, x in arrays.items() if n in wanted}
    rest = {n: x for n, x in arrays.items() if n not in wanted}
    return jax.tree.map(np.asarray, door.jit(both)(differentiated, rest, cotangents))


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Equal shapes, equal infinities, no NaN where none is expected, and close elsewhere."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: {actual.shape=}, {expected.shape=}"
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def double(tree):
    """The same values in float64 (integers and bools as they are); call it inside `jax.enable_x64(True)`."""

    def one(x):
        x = np.asarray(x)
        return jnp.asarray(x.astype(np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)

    return jax.tree.map(one, tree)


def collectives(text: str) -> set[str]:
    """The kinds of collectives in compiled HLO text; asynchronous ones bear the name of the synchronous."""
    kinds = "all-gather|collective-permute|all-reduce|all-to-all|reduce-scatter|ragged-all-to-all"
    return set(re.findall(rf"\s({kinds})(?:-start)?\(", text))


def sent(text):
    """What collectives there are in compiled HLO, and how many numbers the results of each are."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    count = lambda types: sum(
        math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", types)
    )
    return [(kind, count(types)) for types, kind in found]


@contextlib.contextmanager
def no_cost_warnings():
    """A fallback is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ringmoe.errors.CostWarning)
        yield


@functools.cache
def tpu_devices(target: str):
    """The devices of a TPU topology that isn't here; skips where libtpu isn't installed."""
    import pytest

    try:
        from jax.experimental import topologies

        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    except Exception as error:  # libtpu's absence has no type of its own
        pytest.skip(f"no TPU compiler for {target} (pip install libtpu): {type(error).__name__}: {error}")


def tpu_mesh(target: str, shape: Sequence[int], axis_type: AxisType, names: Sequence[str] = AXES) -> Mesh:
    devices = tpu_devices(target)
    names = tuple(names)[: len(shape)]
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(axis_type,) * len(shape))


# For examples that each compile a program: a failing one is shown as it was drawn, shrinking would take minutes.
WITHOUT_SHRINKING = tuple(phase for phase in Phase if phase not in (Phase.shrink, Phase.explain))
