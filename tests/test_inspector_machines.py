"""Named machines: their names, figures, meshes and errors."""

import importlib.util
import math
import types

import jax
import jax.numpy as jnp
import pytest

from ringmoe.inspector import machines

FIGURES = (
    "matmul_flops",
    "vector_flops",
    "hbm_bytes",
    "hbm_bandwidth",
    "num_links",
    "link_bandwidth",
)


def test_lists_every_kind_once():
    names = machines.targets()
    assert len(names) == len(set(names)) and {n.split(":")[0] for n in names if ":" in n} == {
        "v4",
        "v5e",
        "v5p",
        "v6e",
        "tpu7x",
    }
    assert {"h100", "h100x8", "h200", "h200x8", "b200", "b200x8", "v5p:8x8x16", "v5e:4x8"} <= set(names)


@pytest.mark.parametrize("name", machines.targets())
def test_every_figure_has_a_source(name):
    target = machines.target(name)
    assert target.name == name and set(target.sources) == set(FIGURES) and all(target.sources.values())
    assert all(getattr(target, figure) for figure in FIGURES) and target.matmul_flops["bf16"] > target.vector_flops
    assert (
        target.num_devices == math.prod(target.torus) * machines.CHIPS[target.chip].devices_per_chip or not target.torus
    )


# The largest take the compiler a second each to name; the smallest three of each kind prove the
# form.
@pytest.mark.parametrize("name", [n for n in machines.targets() if machines.target(n).num_devices <= 64 and n != "cpu"])
def test_the_compiler_accepts_every_name(name):
    target = machines.target(name)
    assert len(target.devices()) == target.num_devices
    places = target.coords(target.devices())
    assert len(set(places)) == max(1, math.prod(target.torus)) and all(len(p) == len(target.torus) for p in places)


@pytest.mark.parametrize(
    ("name", "bf16", "hbm", "bandwidth", "link"),
    [
        ("v5e:2x4", 197e12, 16 * 2**30, 819e9, 50e9),
        ("v5p:2x2x2", 459e12, 95 * 2**30, 2765e9, 100e9),
        ("v4:2x2x2", 137.5e12, 16 * 2**30, 614e9, 50e9),
        ("tpu7x:2x2x2", 1153.5e12, 96 * 2**30, 3690e9, 100e9),
        ("h200x8", 989.4e12, 151397597184, 4800e9, 25e9),
        ("b200", 2250e12, 191503138816, 8000e9, 50e9),
    ],
)
def test_figures_are_of_one_device(name, bf16, hbm, bandwidth, link):
    target = machines.target(name)
    assert (
        target.matmul_flops["bf16"],
        target.hbm_bytes,
        target.hbm_bandwidth,
        target.link_bandwidth,
    ) == (bf16, hbm, bandwidth, link)


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x2x4", (False, False, True)),
        ("v5e:4x8", (False, False)),
        ("v5e:16x16", (True, True)),
        ("v6e:8x16", (False, True)),
        ("h200x8", ()),
    ],
)
def test_which_ends_are_joined(name, wraps):
    assert machines.target(name).wraps == wraps


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_packaged_figures_are_what_the_gpu_compiler_works_with(name):
    text = importlib.resources.files("ringmoe").joinpath("inspector", "target_specs", f"{name}.txtpb").read_text()
    target = machines.target(name)
    assert f"device_memory_size: {target.hbm_bytes}\n" in text
    assert f"memory_bandwidth: {int(target.hbm_bandwidth)}\n" in text and f"active_links: {target.num_links} " in text


@pytest.mark.parametrize("name", ["b200x8", "h100"])
def test_compiles_for_gpus_that_are_not_here(name):
    mesh = machines.target(name).mesh()
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("devices")))
    assert "is_scheduled=true" in jax.jit(lambda a: a @ a.T).lower(x).compile().as_text()


def test_mesh_keeps_axes_and_neighbours():
    mesh = machines.target("v5p:2x2x2").mesh({"data": 2, "seq": 4})
    assert dict(mesh.shape) == {"data": 2, "seq": 4}
    for row in mesh.devices:  # each row of four is a ring of neighbours
        for a, b in zip(row, [*row[1:], row[0]], strict=True):
            assert sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) == 1
    assert machines.target("v4:2x2x1").mesh({"a": 8}).size == 8  # two devices a chip
    explicit = machines.target("h200x8").mesh({"a": 8}, axis_types=(jax.sharding.AxisType.Explicit,))
    assert explicit.axis_types == (jax.sharding.AxisType.Explicit,)


def test_mesh_of_another_size():
    with pytest.raises(ValueError, match=r"has 6 devices, expected 8 for target 'v5p:2x2x2'"):
        machines.target("v5p:2x2x2").mesh({"a": 2, "b": 3})


@pytest.mark.parametrize(
    "name",
    ["", "v5p", "v5p:", "v5p:2", "v9:2x2x2", "h300", "h200x", "h200:2x2", "v5p:4x4x4x4", "cpu:2x2"],
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match="expected one such as v4:2x2x4"):
        machines.target(name)


def test_names_the_compiler_refuses():
    with pytest.raises(ValueError, match="target 'v5p:3x3x3' is refused by its compiler"):
        machines.target("v5p:3x3x3").devices()


def test_too_many_cpus():
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=4096"):
        machines.target("cpux4096").devices()


@pytest.mark.parametrize(("name", "package"), [("v5e:6x2", "libtpu"), ("h200x3", "jax-cuda13-plugin")])
@pytest.mark.parametrize("how", ["absent", "parent absent"])
def test_a_missing_package_is_told_with_the_command(monkeypatch, name, package, how):
    def find_spec(wanted):
        if how == "parent absent":
            raise ModuleNotFoundError(wanted)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ImportError, match=rf"'{package}', which is not installed: pip install 'ringmoe\[targets\]'"):
        machines.target(name).devices()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            NotImplementedError("topology not implemented for cuda"),
            "JAX started before it could load its GPU compiler",
        ),
        (jax.errors.JaxRuntimeError("ABORTED: lockfile"), "ABORTED"),
    ],
)
def test_a_compiler_that_does_not_start(monkeypatch, error, expected):
    def fail(**_):
        raise error

    monkeypatch.setattr(machines.topologies, "get_topology_desc", fail)
    with pytest.raises(RuntimeError, match=expected):
        machines.target("h200x5").devices()


def device(kind, coords=None):
    return types.SimpleNamespace(device_kind=kind, coords=coords)


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        ([device("NVIDIA H100 80GB HBM3")], "h100"),
        ([device("NVIDIA B200")] * 4, "b200x4"),
        ([device("cpu")] * 8, "cpux8"),
        ([device("TPU v5 lite", (x, y, 0)) for x in range(2) for y in range(4)], "v5e:2x4"),
        ([device("TPU v5", (x, 0, 0)) for x in range(2)], "v5p:2x1x1"),
        ([device("TPU7x", (x, 0, 0)) for x in range(2) for _ in range(2)], "tpu7x:2x1x1"),
    ],
)
def test_devices_that_are_present_are_themselves(devices, name):
    target = machines.present(devices)
    assert (target.name, target.devices(), target.num_devices) == (name, devices, len(devices))


def test_a_device_nobody_knows():
    with pytest.raises(ValueError, match="device kind 'Abacus', expected one of"):
        machines.present([device("Abacus")])
