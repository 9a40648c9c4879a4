"""Named machines: their names, figures, meshes and errors."""

import importlib.util
import math
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringmoe.inspector import machines, topology

FIGURES = (
    "matmul_flops",
    "vector_flops",
    "hbm_bytes",
    "hbm_bandwidth",
    "num_links",
    "link_bandwidth",
    "domain",
    "network_bandwidth",
    "link_share",
    "protocols",
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
    assert {"h100", "h100x8", "h200", "h200x64", "b200", "b200x8", "gb200x72", "v5p:8x8x16", "v5e:4x8"} <= set(names)


@pytest.mark.parametrize("name", machines.targets())
def test_every_figure_has_a_source(name):
    target = machines.target(name)
    assert target.name == name and set(target.sources) == set(FIGURES) and all(target.sources.values())
    assert all(getattr(target, figure) for figure in FIGURES) and target.matmul_flops["bf16"] > target.vector_flops
    assert target.domain == math.prod(target.torus) * machines.CHIPS[target.chip].devices_per_chip or not target.torus


# The largest take the compiler a second each to name; the smallest three of each kind prove the
# form.
@pytest.mark.parametrize("name", [n for n in machines.targets() if machines.target(n).num_devices <= 64 and n != "cpu"])
def test_the_compiler_accepts_every_name(name):
    target = machines.target(name)
    assert len(target.devices()) == target.num_devices
    places = target.coords(target.devices())
    assert len(set(places)) == max(1, math.prod(target.torus)) * target.num_domains
    assert all(len(p) == 1 + len(target.torus) for p in places)


@pytest.mark.parametrize(
    ("name", "bf16", "hbm", "bandwidth", "link"),
    [
        ("v5e:2x4", 197e12, 16 * 2**30, 819e9, 50e9),
        ("v5p:2x2x2", 459e12, 95 * 2**30, 2765e9, 100e9),
        ("v4:2x2x2", 137.5e12, 16 * 2**30, 614e9, 50e9),
        ("tpu7x:2x2x2", 1153.5e12, 96 * 2**30, 3690e9, 100e9),
        ("h200x8", 989.4e12, 151397597184, 4800e9, 25e9),
        ("b200", 2250e12, 191503138816, 8000e9, 50e9),
        ("gb200x72", 2500e12, 197897748480, 8000e9, 50e9),
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


@pytest.mark.parametrize(
    ("name", "domains", "gigabits"),
    [
        ("v5e:4x4", 1, 25),
        ("2*v5p:2x2x2", 2, 50),
        ("4*tpu7x:2x2x1", 4, 50),  # two devices a chip
        ("v6e:2x4", 1, 100),
        ("h200x8", 1, 400),
        ("h100x64", 8, 400),
        ("gb200x72", 1, 400),
        ("gb200x144", 2, 400),
    ],
)
def test_what_the_network_joins(name, domains, gigabits):
    target = machines.target(name)
    assert target.num_domains == domains and target.domain * domains == target.num_devices
    assert target.network_bandwidth == gigabits * 1e9 / 8
    assert [place[0] for place in target.coords()] == [i for i in range(domains) for _ in range(target.domain)]


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "gb200"])
def test_packaged_figures_are_what_the_gpu_compiler_works_with(name):
    text = importlib.resources.files("ringmoe").joinpath("inspector", "target_specs", f"{name}.txtpb").read_text()
    target = machines.target(name)
    assert f"device_memory_size: {target.hbm_bytes}\n" in text
    assert f"memory_bandwidth: {int(target.hbm_bandwidth)}\n" in text and f"active_links: {target.num_links} " in text


@pytest.mark.parametrize(
    ("name", "hosts"), [("b200x8", 1), ("h100", 1), ("h200x16", 2), ("gb200x72", 1), ("gb200x144", 2)]
)
def test_compiles_for_gpus_that_are_not_here(name, hosts):
    assert len({device.process_index for device in machines.target(name).devices()}) == hosts
    mesh = machines.target(name).mesh()
    x = jax.ShapeDtypeStruct((8 * mesh.size, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("devices")))
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


def test_a_mesh_puts_slices_and_hosts_outermost():
    domains = lambda name, axes: np.vectorize(
        lambda device: machines.target(name).coords([device])[0][0], otypes=[int]
    )(machines.target(name).mesh(axes).devices)
    first = domains("2*v5e:2x2", {"data": 2, "seq": 4})
    assert (first[0] == first[0, 0]).all() and (first[1] == first[1, 0]).all() and first[0, 0] != first[1, 0]
    # Of six slices the first axis takes two, the second three.
    spread = domains("6*v5e:2x2", {"a": 4, "b": 6})
    assert all(
        (spread[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] == spread[2 * i, 2 * j]).all() for i in (0, 1) for j in (0, 1, 2)
    )
    assert len(set(spread.flat)) == 6
    gpus = domains("h200x16", {"data": 2, "model": 8})
    assert gpus.tolist() == [[0] * 8, [1] * 8]
    rows = machines.target("2*v5p:2x2x2").mesh({"data": 2, "seq": 8}).devices
    for row in rows:  # within a slice neighbours stay neighbours
        for a, b in zip(row, [*row[1:], row[0]], strict=True):
            assert sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) == 1


def test_mesh_of_another_size():
    with pytest.raises(ValueError, match=r"has 6 devices, expected 8 for target 'v5p:2x2x2'"):
        machines.target("v5p:2x2x2").mesh({"a": 2, "b": 3})


@pytest.mark.parametrize(
    "name",
    [
        "",
        "v5p",
        "v5p:",
        "v5p:2",
        "v9:2x2x2",
        "h300",
        "h200x",
        "h200:2x2",
        "v5p:4x4x4x4",
        "cpu:2x2",
        "v5p:0x4x4",
        "0*v5p:4x4x4",
        "2*h200x8",
        "*v5p:4x4x4",
        "1000*v5p:4x4x4",
        "v5e:9999x9999",
        "h200x0",
    ],
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match="expected one such as v4:2x2x4"):
        machines.target(name)


@pytest.mark.parametrize("name", ["h200x12", "gb200x100"])
def test_gpus_that_do_not_fill_their_hosts(name):
    with pytest.raises(ValueError, match=f"target '{name}' has 1.. GPUs, expected at most|a multiple of it"):
        machines.target(name)


def test_shapes_that_the_compiler_takes_though_nobody_listed_them():
    assert len(machines.target("v5e:6x2").devices()) == 12


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("v5p:3x3x3", "not divisible by the given"),
        ("v5e:3x5", "not divisible by the given"),
        ("v5e:32x32", "it died: Topology.*32 vs. 16"),  # libtpu aborts: a process of its own takes that
        ("2*v5e:32x32", "it died"),
    ],
)
def test_names_the_compiler_refuses_or_dies_of(name, reason):
    shape = name.rpartition("*")[2]
    with pytest.raises(
        ValueError, match=rf"target '{shape}' is refused by its compiler \(.*{reason}.*expected a shape such"
    ):
        machines.target(name).devices()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (subprocess.TimeoutExpired("libtpu", 60), "did not answer within 60 s"),
        (subprocess.CompletedProcess([], -8, "", "no word"), "it died: signal 8"),
        (subprocess.CompletedProcess([], 3, "", "no word"), "exit status 3"),
    ],
)
def test_a_compiler_that_gives_no_reason(monkeypatch, answer, reason):
    def run(*_, **options):
        assert options["stdin"] == subprocess.DEVNULL and options["timeout"]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(subprocess, "run", run)
    topology._refusal.cache_clear()
    with pytest.raises(ValueError, match=reason):
        machines.target("v5e:10x10").devices()
    topology._refusal.cache_clear()


def test_too_many_cpus():
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=4096"):
        machines.target("cpux4096").devices()


@pytest.mark.parametrize(("name", "package"), [("v5e:2x6", "libtpu"), ("h200x3", "jax-cuda13-plugin")])
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
            "target 'h200x5': JAX started before it could load its CUDA compiler",
        ),
        (jax.errors.JaxRuntimeError("ABORTED: lockfile"), "ABORTED"),
    ],
)
def test_a_compiler_that_does_not_start(monkeypatch, error, expected):
    def fail(**_):
        raise error

    monkeypatch.setattr(topology.topologies, "get_topology_desc", fail)
    with pytest.raises(RuntimeError, match=expected):
        machines.target("h200x5").devices()


def device(kind, coords=None, **others):
    return types.SimpleNamespace(device_kind=kind, coords=coords, **others)


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        ([device("NVIDIA H100 80GB HBM3")], "h100"),
        ([device("NVIDIA B200")] * 4, "b200x4"),
        ([device("NVIDIA GB200")] * 100, "gb200x100"),
        ([device("cpu")] * 8, "cpux8"),
        ([device("TPU v5", (0, 0, z), slice_index=s) for s in range(3) for z in range(2)], "3*v5p:1x1x2"),
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
