"""The public function: what it takes, what it says of FACTS 3, and its errors."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ringmoe import inspector
from ringmoe.inspector import machines
from tests import inspector_programs as programs

RING, RING_32 = {"seq": 8}, {"seq": 32}


@pytest.fixture(scope="module")
def hidden_ring():
    return inspector.inspect(*programs.ring(RING, merge="inside", tokens=8192), target="v5p:2x2x2", mesh=RING)


def test_a_ring_merged_outside_its_kernel_is_exposed_on_v5p():
    report = inspector.inspect(*programs.splash_ring(RING), target="v5p:2x2x2", mesh=RING)
    assert [(c.kind, c.asynchronous, c.trip_count, c.route) for c in report.collectives] == [
        ("collective-permute", True, 8, "neighbours")
    ] * 2
    assert report.exposed_fraction > 0.9 and not any(
        "splash" in name for c in report.collectives for name in c.hidden_by
    )
    # 8 heads x 4096 x 128 bf16 over one link of 100 GB/s, and one hop
    assert report.collectives[0].wire_us == pytest.approx(8 * 4096 * 128 * 2 / 100e9 * 1e6 + 1)


def test_a_ring_merged_inside_its_kernel_is_hidden_on_v5p(hidden_ring):
    assert len(hidden_ring.collectives) == 2 and hidden_ring.exposed_fraction == 0
    assert all(
        c.asynchronous and any("attention_block" in name for name in c.hidden_by) for c in hidden_ring.collectives
    )


def test_on_a_large_v5e_slice_the_ring_is_synchronous():
    report = inspector.inspect(*programs.splash_ring(RING_32), target="v5e:4x8", mesh=RING_32)
    assert [(c.asynchronous, c.trip_count) for c in report.collectives] == [(False, 32)] * 2
    assert report.exposed_fraction == pytest.approx(1) and report.exposed_us == pytest.approx(
        32 * 2 * (8 * 2**20 / 50e9 * 1e6 + 10)  # the ring's ends are ten hops apart
    )


@pytest.mark.parametrize("target", ["v5e:2x4", "h200x8"])
def test_experts_by_all_to_all_are_synchronous(target):
    axes = {"expert": 8}
    report = inspector.inspect(*programs.experts(axes, tokens=1024, width=1024), target=target, mesh=axes)
    assert [(c.kind, c.asynchronous) for c in report.collectives] == [("all-to-all", False)] * 2
    assert report.exposed_us == pytest.approx(report.wire_us) and report.exposed_us > 0


def test_a_kernel_that_moves_data_itself():
    report = inspector.inspect(*programs.remote_copy(RING), target="v5p:2x2x2", mesh=RING)
    (found,) = report.collectives
    assert (found.kind, found.wire_bytes, found.asynchronous) == (
        "remote-dma",
        1024 * 1024 * 2,
        True,
    )
    assert found.wire_us == pytest.approx(2 * 2**20 / 100e9 * 1e6 + 1)
    assert found.exposed_us == pytest.approx(found.wire_us - found.compute_us) and found.compute_us > 0


def test_a_kernel_that_does_not_say_what_it_moves_is_named():
    report = inspector.inspect(*programs.remote_copy(RING, cost=False), target="v5p:2x2x2", mesh=RING)
    (reason,) = report.unestimated.values()
    assert "no remote_bytes_transferred" in reason and report.collectives[0].wire_bytes == 0


@pytest.mark.parametrize("metadata", [
    None, {"collective": "all-to-all", "replica_groups": "[1,8]<=[8]T(0)"},
    {"collective": "all-to-all", "replica_groups": "[4,2]<=[4,2]T(0,1)"}, {"collective": "teleport"},
])  # fmt: skip
def test_what_one_kernel_starts_is_under_way_until_another_waits(metadata):
    """A matmul stands between; what is sent is a collective if the author says so, else goes to a neighbour."""
    report = inspector.inspect(*programs.started_and_awaited(RING, metadata=metadata), target="v5p:2x2x2", mesh=RING)
    (found,) = report.collectives
    told, size = metadata is not None and "replica_groups" in metadata, 1024 * 1024 * 2
    assert found.kind == ("all-to-all" if told else "remote-dma") and found.asynchronous
    assert found.wire_bytes == pytest.approx(size)  # the kernel's own figure
    assert found.axes == (("seq",) if told else ())
    assert any("dot_general" in op for op in found.hidden_by_ops) and found.compute_us > 10
    matmul = next(o for o in report.operations if "dot_general" in o.op_name)
    assert found.exposed_us == pytest.approx(max(0, found.wire_us - found.compute_us))
    assert report.us > matmul.us and found.compute_us >= matmul.us


def test_train_step_on_a_small_slice():
    axes = {"data": 2, "seq": 4}
    report = inspector.inspect(
        *programs.train_step(axes, layers=2, width=256, heads=2, hidden=512, tokens=256),
        target="v5p:2x2x2",
        mesh=axes,
    )
    kinds = {c.kind for c in report.collectives}
    assert {"collective-permute", "all-gather"} <= kinds and report.unknown_loops == ()
    assert {c.trip_count for c in report.collectives if c.kind == "collective-permute"} == {2 * 4}


@pytest.mark.parametrize("target", ["2*v5e:2x2", "2*v5p:2x2x1", "h200x16"])
def test_gradients_are_summed_over_the_network_between_slices_and_hosts(target):
    machine = machines.target(target)
    axes = {"data": 2, "fsdp": machine.domain}
    report = inspector.inspect(*programs.data_parallel(axes), target=target, mesh=axes)
    outside = [c for c in report.collectives if c.route.startswith("network, 2")]
    inside = [c for c in report.collectives if c not in outside]
    assert {c.kind for c in outside} == {"all-reduce"} and {"all-gather"} <= {c.kind for c in inside}
    # Each device sums its part of two gradients, in bf16, over two slices: it sends it once.
    assert sum(c.wire_bytes for c in outside) == pytest.approx(2 * 1024 * 1024 * 2 / machine.domain)
    for c in outside:
        assert c.wire_us > c.wire_bytes / machine.network_bandwidth * 1e6
    if target.startswith("2*"):
        assert all(c.asynchronous and c.wire_us > 100 for c in outside) and len(outside) == 2
    assert not any("host" in reason for reason in report.unestimated.values())


@pytest.mark.parametrize(("target", "mesh"), [("2*v5e:2x2", {"a": 8}), ("6*v5e:2x2", {"a": 4, "b": 6})])
def test_the_program_of_one_slice_is_for_its_devices(target, mesh):
    """XLA:TPU prints what each slice runs, its devices numbered from 0, wherever the mesh puts them."""
    for groups in ("{}", "{{0,1,2,3}}"):
        text = (
            "HloModule t, is_scheduled=true, num_partitions=4\n\nENTRY %e (p: f32[8]) -> f32[32] {\n  %p = f32[8] "
            f"parameter(0)\n  ROOT %g = f32[32] all-gather(%p), replica_groups={groups}\n}}\n"
        )
        (found,) = inspector.inspect(text, target=target, mesh=mesh).collectives
        assert (found.route, found.wire_bytes) == ("line of 2 x line of 2", 3 * 32)


def case(mesh_axes=RING, width=1024):
    """A sharded matmul that gathers, with abstract shardings."""
    x = programs.spec((1024, width), jnp.bfloat16, mesh_axes, *mesh_axes)
    return (lambda a: a @ a.T), x


def test_every_face_gives_the_same_report(tmp_path):
    function, x = case()
    mesh = machines.target("v5p:2x2x2").mesh(RING)
    placed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, P("seq")))
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(placed)
    compiled = lowered.compile()
    file = tmp_path / "program.txt"
    file.write_text(compiled.as_text())
    whole = inspector.inspect(function, x, target="v5p:2x2x2", mesh=RING)
    assert whole.mesh == RING and whole.collectives and whole.compile_seconds > 0
    for report in (
        inspector.inspect(jax.jit(function), x, target="v5p:2x2x2"),  # the mesh of the argument has that size
        inspector.inspect(function, placed),  # the devices of the argument are the target
        inspector.inspect(function, placed, mesh=mesh),
        inspector.inspect(function, x, target="v5p:2x2x2", mesh=mesh),
        inspector.inspect(lowered),
        inspector.inspect(compiled),
        inspector.inspect(compiled, target="v5p:2x2x2"),
    ):
        assert (report.us, report.peak_bytes, report.target) == (
            whole.us,
            whole.peak_bytes,
            "v5p:2x2x2",
        )
    for text in (compiled.as_text(), file, str(file)):
        report = inspector.inspect(text, target="v5p:2x2x2", mesh=RING)
        assert report.us == whole.us and report.peak_bytes is report.fits is report.compile_seconds is None
        assert "memory not known" in str(report) and json.loads(report.to_json())["fits"] is None


def test_keyword_arguments_and_arrays():
    report = inspector.inspect(lambda a, *, b: a @ b, jnp.ones((256, 256)), b=jnp.ones((256, 128)), target="v5e:2x2")
    assert report.mesh == {"devices": 4} and report.compute_us > 0 and report.collectives == ()


def test_what_is_present_is_inspected_as_itself():
    report = inspector.inspect(lambda a: a @ a, jnp.ones((256, 256)))
    assert report.target == "cpux8" and report.collectives == ()


def test_axis_types_are_kept():
    axes = {"seq": 8}
    mesh = jax.sharding.AbstractMesh((8,), ("seq",), axis_types=(AxisType.Explicit,))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, P("seq")))
    seen = []
    inspector.inspect(lambda a: seen.append(jax.typeof(a).sharding.spec) or a * 2, x, target="v5e:2x4", mesh=axes)
    assert seen == [P("seq", None)]


def test_memory_by_part():
    x = programs.spec((8, 2**30), jnp.bfloat16, {"devices": 1})
    report = inspector.inspect(lambda a: a + 1, x, target="v5p:1x1x1")
    assert report.fits and report.memory["arguments"] == report.memory["results"] == 2**34
    assert report.peak_bytes == pytest.approx(2**35, rel=1e-3)


def test_reads_well(hidden_ring):
    text = str(hidden_ring)
    assert "0.0% of" in text and "fits" in text and "neighbours" in text and "optimal_seconds" in text
    assert max(map(len, text.splitlines())) <= 132


def test_the_page_holds_its_data_and_nothing_from_elsewhere(hidden_ring):
    page = hidden_ring.to_html()
    data = page[page.index("const report = ") + 15 :]
    record = json.loads(data[: data.index(";\n")])
    assert record["collectives"][0]["name"] == hidden_ring.collectives[0].name
    assert {span[0] for span in record["timelines"][0]["spans"]} == {"compute", "wire"}
    assert (
        record["timelines"][0]["trip_count"] == 8
        and "src=" not in page
        and "href=" not in page
        and "@import" not in page
    )


def test_names_cannot_break_out_of_the_page():
    text = (
        "HloModule </script><b>, is_scheduled=true\n\nENTRY %e (p: f32[]) -> f32[] {\n  %p = "
        "f32[] parameter(0)\n"
        "  ROOT %<img> = f32[9] all-reduce(%p), replica_groups={}, "
        'metadata={op_name="</script>"}\n}\n'
    )
    page = inspector.inspect(text, target="h200x8").to_html()
    assert page.count("</script>") == 1 and "<img>" not in page


def raises(match, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as info:
        inspector.inspect(*args, **kwargs)
    return info.value


def test_errors():
    function, x = case()
    raises("target 'v7:2x2x2', expected one such as", function, x, target="v7:2x2x2")
    raises(
        "mesh {'seq': 8} has 8 devices, expected 16 for target 'v5p:2x2x4'",
        function,
        x,
        target="v5p:2x2x4",
        mesh=RING,
    )
    mesh = machines.target("v5p:2x2x2").mesh(RING)
    raises("has 8 devices, expected 16", function, x, target="v5p:2x2x4", mesh=mesh)
    raises(
        r"sharded over \['seq'\], the mesh .* has axes \['rows'\]",
        function,
        x,
        target="v5p:2x2x2",
        mesh={"rows": 8},
    )
    raises("target=None for HLO text", "HloModule x")
    raises("neither HLO text nor a file", "no_such_file.txt", target="h200")
    raises("neither HLO text nor a file", pathlib.Path("no_such_file.txt"), target="h200")
    raises("not HLO text", "one\ntwo", target="h200")
    raises("1 arguments for a program that is compiled already", "HloModule x", x, target="h200")
    raises("program is a int, expected a function", 5, target="h200")
    text = "HloModule t, is_scheduled=true, num_partitions=16\n\n"
    text += "ENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"
    raises("is for 16 devices, target 'h200x8' has 8", text, target="h200x8")


def test_what_does_not_compile_raises_its_own_error():
    error = raises(
        "bad shape",
        lambda a: a.reshape(3, 3) if a.shape[0] == 9 else (_ for _ in ()).throw(TypeError("bad shape")),
        jnp.ones(4),
        target="v5e:2x2",
        error=TypeError,
    )
    assert any("target 'v5e:2x2', mesh {'devices': 4}" in note for note in error.__notes__)


@pytest.mark.parametrize(
    ("name", "bytes_sent"),
    [("all-gather", 15 * 2**20), ("reduce-scatter", 15 * 2**20 / 16), ("all-reduce", 2 * 15 * 2**16)],
)
def test_the_sparsecore_s_collectives_are_on_the_wire(name, bytes_sent):
    axes = {"data": 16}
    x = programs.spec((16 * 512, 1024), jnp.bfloat16, axes, "data")
    exchange = {
        "all-gather": lambda y: jax.lax.all_gather(y, "data", tiled=True),
        "reduce-scatter": lambda y: jax.lax.psum_scatter(y, "data", tiled=True),
        "all-reduce": lambda y: jax.lax.psum(y, "data"),
    }[name]
    out = P() if name != "reduce-scatter" else P("data")
    report = inspector.inspect(programs.local(exchange, P("data"), out), x, target="tpu7x:2x2x2", mesh=axes)
    (found,) = report.collectives
    assert (found.kind, found.asynchronous, "call-start" in found.name) == (name, True, True), found
    assert found.wire_bytes == pytest.approx(bytes_sent) and found.exposed_us > 0


@pytest.mark.parametrize("target", ["v5p:2x2x2", "tpu7x:2x2x2"])
def test_a_gather_on_the_sparsecore_costs_the_rows_gathered(target):
    n = machines.target(target).num_devices
    table = programs.spec((65536, 2048), jnp.bfloat16, {"seq": n})
    rows = programs.spec((n * 4096,), jnp.int32, {"seq": n}, "seq")
    report = inspector.inspect(lambda w, i: w[i], table, rows, target=target, mesh={"seq": n})
    moved = 2 * 4096 * 2048 * 2  # read and written
    assert report.compute_us == pytest.approx(moved / machines.target(target).hbm_bandwidth * 1e6, rel=0.02)
    assert report.collectives == () and report.unestimated == {}
