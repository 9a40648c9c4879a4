"""Compute time by the roofline, against FLOPs and bytes worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmoe import inspector
from ringmoe.inspector import estimate, flops, loops, machines, reader
from tests import inspector_programs as programs

ONE = {"devices": 1}


def spec(*shape, dtype=jnp.bfloat16):
    return programs.spec(shape, dtype, ONE)


def attention(q, k, v):
    return programs.local(lambda q, k, v: tuple(programs.attention_block(q, k, v)), programs.P(), programs.P())(q, k, v)


def chain(x):
    return jnp.maximum(x * 2 + 1, 0) - 3


BLOCK = spec(8, 4096, 128)
# Program, arguments, then the microseconds one works out for v5p: 459 TFLOP/s in bf16, 2765 GB/s.
KNOWN = {
    "matmul": (
        lambda a, b: a @ b,
        (spec(8192, 8192), spec(8192, 8192)),
        2 * 8192**3 / 459e12 * 1e6,
    ),
    "chain": (chain, (spec(8192, 8192, dtype=jnp.float32),), 2 * 4 * 8192**2 / 2765e9 * 1e6),
    "attention": (attention, (BLOCK, BLOCK, BLOCK), 4 * 8 * 4096 * 4096 * 128 / 459e12 * 1e6),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_programs_within_15_percent(name):
    function, args, by_hand = KNOWN[name]
    report = inspector.inspect(function, *args, target="v5p:1x1x1", mesh=ONE)
    assert report.compute_us == pytest.approx(by_hand, rel=0.15)
    assert report.xla_optimal_us and f"{report.once_us:.3g}"[:2] and "optimal_seconds" in str(report)
    assert report.unestimated == {} and report.exposed_fraction == 0


def test_h200_takes_its_own_rates():
    function, args, _ = KNOWN["matmul"]
    report = inspector.inspect(function, *args, target="h200", mesh=ONE)
    assert report.compute_us == pytest.approx(2 * 8192**3 / 989.4e12 * 1e6, rel=0.15)


def test_precision_costs_passes():
    """Text rather than a compilation: XLA:TPU takes half a minute over a matmul of highest
    precision."""
    dot = "%r = f32[1024,1024] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    highest = dot + ", operand_precision={highest,highest}"
    assert work(dot)[0].flops == {"f32": 2 * 1024**3}
    assert work(highest)[0].flops == {"f32_highest": 2 * 1024**3}
    rates = machines.target("v5p:1x1x1").matmul_flops
    assert rates["f32"] == rates["bf16"] == pytest.approx(6 * rates["f32_highest"])


def matmul_flops(function, *args, target="v5p:1x1x1"):
    """Matmul FLOPs that the estimate finds in a compiled function."""
    machine = machines.target(target)
    mesh = machine.mesh(ONE)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, programs.P())) for a in args]
    module = reader.parse(jax.jit(function).lower(*args).compile().as_text())
    roofline = estimate.Roofline(module, machine)
    return sum(sum(roofline.work(i, module.entry).flops.values()) for i in module.entry.instructions)


@pytest.mark.parametrize("target", ["v5p:1x1x1", "h200"])
def test_batched_dot(target):
    """On TPU this is a convolution over a dilated batch dimension; it must not count the
    padding."""
    found = matmul_flops(
        lambda a, b: jnp.einsum("bik,bkj->bij", a, b),
        spec(24, 256, 128),
        spec(24, 128, 512),
        target=target,
    )
    assert found == pytest.approx(2 * 24 * 256 * 128 * 512)


def test_image_convolution():
    def function(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert matmul_flops(function, spec(8, 30, 30, 64), spec(3, 3, 64, 128)) == pytest.approx(
        2 * 8 * 28 * 28 * 9 * 64 * 128
    )


@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(-3, 6),
    st.integers(1, 5),
    st.integers(1, 3),
)
@settings(max_examples=400, deadline=None)
def test_window_positions_equal_a_count(size, window, outputs, stride, low, dilate, window_dilate):
    count = 0
    for output in range(outputs):
        for tap in range(window):
            at = output * stride + tap * window_dilate - low
            count += at % dilate == 0 and 0 <= at // dilate < size
    assert flops._valid_pairs(size, window, outputs, stride, low, dilate, window_dilate) == count


def work(line, *others):
    """Work of one instruction on v5p, with operands x and y of 1024 x 1024 in f32."""
    text = (
        "HloModule t, is_scheduled=true\n\n" + "\n".join(others) + "\nENTRY %main (x: f32[]) -> f32[] {\n"
        "  %x = f32[1024,1024] parameter(0)\n  %y = f32[1024,1024]{1,0:S(1)} parameter(1)\n  %i = "
        "s32[] parameter(2)\n"
        f"  %u = f32[1,1024] parameter(3)\n  {line}\n  ROOT %e = f32[] constant(0)\n}}\n"
    )
    module = reader.parse(text)
    roofline = estimate.Roofline(module, machines.target("v5p:1x1x1"))
    return roofline.work(module.entry.by_name["r"], module.entry), roofline


ROW, WHOLE = 4 * 1024, 4 * 1024 * 1024


@pytest.mark.parametrize(
    ("line", "moved", "vector"),
    [
        ("%r = f32[1024,1024] add(%x, %x)", 3 * WHOLE, 2**20),
        ("%r = f32[1024,1024] add(%x, %y)", 2 * WHOLE, 2**20),  # y lies on chip
        ("%r = f32[1024,1024] exponential(%x)", 2 * WHOLE, 4 * 2**20),
        ("%r = f32[1,1024] dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,1024}", 2 * ROW, 0),
        ("%r = f32[1024,1024] dynamic-update-slice(%x, %u, %i, %i)", 2 * (ROW + 8), 0),
        ("%r = f32[1024] reduce(%x, %i), dimensions={1}", WHOLE + ROW + 4, 2**20),
        ("%r = f32[1024,1024] bitcast(%x)", 0, 0),
        ('%r = f32[1024,1024] custom-call(), custom_call_target="AllocateBuffer"', 0, 0),
        (
            "%r = f32[512,1024] reduce-window(%x, %i), window={size=2x1 stride=2x1}",
            WHOLE + WHOLE / 2 + 4,
            2 * 2**20,
        ),
    ],
)
def test_bytes_and_vector_work(line, moved, vector):
    found, roofline = work(line)
    assert (found.bytes, found.vector, roofline.unestimated) == (moved, vector, {})


def test_a_sort_takes_more_than_one_pass():
    assert work("%r = f32[1024,1024] sort(%x), dimensions={1}")[0].vector == pytest.approx(1.5 * 2**20 * 100)


def test_fusions_read_and_write_only_the_parts_they_touch():
    fused = (
        "%f (a: f32[], b: f32[], c: s32[]) -> f32[] {\n  %a = f32[1024,1024] parameter(0)\n  %b = "
        "f32[1024,1024] parameter(1)\n"
        "  %c = s32[] parameter(2)\n  %s = f32[1,1024] dynamic-slice(%a, %c, %c)\n  %n = "
        "f32[1,1024] negate(%s)\n"
        "  ROOT %d = f32[1024,1024] dynamic-update-slice(%b, %n, %c, %c)\n}\n"
    )
    found, _ = work("%r = f32[1024,1024] fusion(%x, %x, %i), kind=kLoop, calls=%f", fused)
    assert (found.bytes, found.vector) == (2 * ROW + 4, 1024)


def test_slices_inside_nested_fusions_count_as_slices():
    inner = (
        "%g (a: f32[], c: s32[]) -> f32[] {\n  %a = f32[1024,1024] parameter(0)\n  %c = s32[] "
        "parameter(1)\n"
        "  ROOT %s = f32[1,1024] dynamic-slice(%a, %c, %c)\n}\n"
    )
    outer = (
        "%f (a: f32[], c: s32[]) -> f32[] {\n  %a = f32[1024,1024] parameter(0)\n  %c = s32[] "
        "parameter(1)\n"
        "  ROOT %s = f32[1,1024] fusion(%a, %c), kind=kLoop, calls=%g\n}\n"
    )
    assert work("%r = f32[1,1024] fusion(%x, %i), kind=kLoop, calls=%f", inner, outer)[0].bytes == 2 * ROW + 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '%r = f32[1024,1024] custom-call(%x), custom_call_target="mystery"',
            "'mystery' has no cost estimate",
        ),
        (
            "%r = f32[1024,1024] triangular-solve(%x, %x)",
            "no model for the instruction 'triangular-solve'",
        ),
    ],
)
def test_the_unknown_is_named_and_timed_by_its_bytes(line, reason):
    found, roofline = work(line)
    assert reason in roofline.unestimated["r"] and found.bytes >= 2 * WHOLE


def test_cost_estimates():
    cost = '{"flops":"1000","transcendentals":"10","bytes_accessed":"100"}'
    config = f'{{"custom_call_config":{{"cost_estimate":{cost}}}}}'
    call = '%r = f32[4] custom-call(%x), custom_call_target="tpu_custom_call"'
    line = f"{call}, backend_config={config}"
    found, roofline = work(line)
    assert found == estimate.Work({"f32_highest": 1000}, 40, 100) and roofline.unestimated == {}
    narrow = line.replace("f32[4] custom", "bf16[4] custom").replace("(%x)", "(%x, %narrow)")
    assert work(f"%narrow = bf16[4] parameter(1)\n  {narrow}")[0].flops == {"bf16": 1000}
    broken = work(line.replace('"1000"', '"lots"'))[0]
    assert broken.flops == {"f32_highest": 0}


def test_cublas_counts_from_its_shapes():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    call = '%r = (f32[1024,1024], s8[64]) custom-call(%x, %x), custom_call_target="__cublas$gemm"'
    line = f"{call}, backend_config={config}"
    assert work(line)[0].flops == {"f32": 2 * 1024**3}


@pytest.mark.parametrize("target", ["v5p:1x1x1", "h200", "cpu"])
@pytest.mark.parametrize(("first", "last", "step"), [(0, 9, 1), (2, 11, 3), (10, 3, -2)])
def test_trip_counts_of_compiled_loops(target, first, last, step):
    trips = max(0, math.ceil((last - first) / step))

    def function(x):
        def more(c):
            return c[0] < last if step > 0 else c[0] > last

        return jax.lax.while_loop(more, lambda c: (c[0] + step, jnp.sin(c[1]) @ c[1]), (first, x))[1]

    mesh = machines.target(target).mesh(ONE)
    x = jax.ShapeDtypeStruct((128, 128), np.float32, sharding=jax.NamedSharding(mesh, programs.P()))
    module = reader.parse(jax.jit(function).lower(x).compile().as_text())
    assert list(loops.trip_counts(module).values()) == [trips]
