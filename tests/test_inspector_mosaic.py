"""Pallas TPU kernels counted from their bodies: by hand counts on kernels made for it, and on bodies that are none."""

import base64
import functools
import random
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringmoe import inspector
from ringmoe.inspector import machines, mosaic

SIDE = 256
ONE = 2 * SIDE**3  # FLOPs of one square matmul


def multiply(x_ref, y_ref, o_ref, precision=None):
    o_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32, precision=precision)


def on_the_diagonal(x_ref, y_ref, o_ref):
    """Computes where the row is not before the column, as a causal mask leaves it."""

    @pl.when(pl.program_id(0) >= pl.program_id(1))
    def _():
        multiply(x_ref, y_ref, o_ref)


def four_times(x_ref, y_ref, o_ref):
    lax.fori_loop(0, 4, lambda i, _: multiply(x_ref, y_ref, o_ref), None)


def softened(x_ref, y_ref, o_ref):
    o_ref[...] = jnp.exp(x_ref[...].astype(jnp.float32)) * 2.0


def when_asked(asked_ref, x_ref, y_ref, o_ref):
    @pl.when(asked_ref[0] > 0)
    def _():
        multiply(x_ref, y_ref, o_ref)


def compiled(kernel, grid=(4, 3), side=SIDE, dtype=jnp.bfloat16, cost=None, prefetched=0, target="v5e:1x1"):
    """Text of a program that runs the kernel on squares, each step on a pair of blocks."""
    block = pl.BlockSpec((side, side), lambda i, j, *_: (i, j))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=prefetched, grid=grid, in_specs=[block, block], out_specs=block
        ),
        out_shape=jax.ShapeDtypeStruct((grid[0] * side, grid[1] * side), jnp.float32),
        cost_estimate=cost,
    )
    mesh = machines.target(target).mesh()
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P()))
    whole = shape((grid[0] * side, grid[1] * side), dtype)
    return jax.jit(call).lower(*[shape((1,), jnp.int32)] * prefetched, whole, whole).compile().as_text()


def body(text):
    return re.search(r'"body":"([^"]*)"', text).group(1)


def count(*args, unit=128, **kwargs):
    (found,) = mosaic.counts((body(compiled(*args, **kwargs)),), unit)
    assert found is not None
    return found


def test_every_step_of_the_grid_counts():
    found = count(multiply)
    assert found.flops == {"bf16": 12 * ONE} == found.padded and found.known


def test_branches_on_the_grid_are_taken_as_on_the_chip():
    assert count(on_the_diagonal).flops == {"bf16": 9 * ONE}  # of 4 rows of 3: 1 + 2 + 3 + 3
    assert count(on_the_diagonal, grid=(3, 4)).flops == {"bf16": 6 * ONE}


def test_of_a_large_grid_steps_are_sampled_evenly():
    side = 128
    found = count(on_the_diagonal, grid=(128, 128), side=side)
    assert found.flops["bf16"] == pytest.approx(128 * 129 / 2 * 2 * side**3, rel=0.02) and found.known


def test_loops_count_as_often_as_they_run():
    assert count(four_times).flops == {"bf16": 4 * 12 * ONE}


def test_a_branch_that_only_the_run_decides_counts_as_taken_and_is_told():
    found = count(when_asked, prefetched=1)
    assert found.flops == {"bf16": 12 * ONE} and not found.known


def test_vector_operations():
    found = count(softened)
    elements = 12 * SIDE**2
    assert found.flops == {} and found.transcendental == elements and 2 * elements == found.vector  # a cast, a product


def test_what_does_not_fill_the_matrix_unit_is_padded():
    found = count(multiply, side=128, unit=256)
    assert found.padded["bf16"] == 8 * found.flops["bf16"]


def test_float32_at_highest_precision_has_a_rate_of_its_own():
    highest = functools.partial(multiply, precision=lax.Precision.HIGHEST)
    assert count(highest, dtype=jnp.float32).flops == {"f32_highest": 12 * ONE}
    assert count(multiply, dtype=jnp.float32).flops == {"f32": 12 * ONE}


def test_the_estimate_of_a_kernel_is_of_its_body():
    machine = machines.target("v5e:1x1")
    report = inspector.inspect(compiled(on_the_diagonal), target="v5e:1x1")
    (kernel,) = [o for o in report.operations if o.opcode == "custom-call"]
    assert report.flops == 9 * ONE and report.unestimated == {}
    lower = 1e6 * 9 * ONE / machine.matmul_flops["bf16"]
    assert kernel.us >= lower


def test_its_author_knows_what_a_mask_leaves():
    cost = pl.CostEstimate(flops=3 * ONE, transcendentals=0, bytes_accessed=8)
    report = inspector.inspect(compiled(when_asked, prefetched=1, cost=cost), target="v5e:1x1")
    assert report.flops == pytest.approx(3 * ONE) and report.unestimated == {}
    # Of a body whose branches are known it is no business of his.
    assert inspector.inspect(compiled(multiply, cost=cost), target="v5e:1x1").flops == 12 * ONE
    named = inspector.inspect(compiled(when_asked, prefetched=1), target="v5e:1x1").unestimated
    assert any("only the run decides" in reason for reason in named.values())


def test_a_body_that_cannot_be_read_is_told():
    text = compiled(multiply, cost=pl.CostEstimate(flops=7 * ONE, transcendentals=0, bytes_accessed=8))
    report = inspector.inspect(text.replace(body(text), mosaic.BYTECODE + "AA"), target="v5e:1x1")
    assert report.flops == 7 * ONE
    assert any("body this jaxlib does not read" in reason for reason in report.unestimated.values())


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA", base64.b64encode(b"ML\xefR rest").decode()])
def test_what_is_no_body_counts_nothing(text):
    assert mosaic.counts((text,), 128) == (None,)


def test_broken_bodies_end_at_most_the_process_that_reads_them():
    whole = bytearray(base64.b64decode(body(compiled(on_the_diagonal))))
    chance = random.Random(0)
    for _ in range(8):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        text = base64.b64encode(broken[: chance.randint(1, len(broken))]).decode()
        (found,) = mosaic.counts((text,), 128)
        assert found is None or isinstance(found, mosaic.Count)


FUSION = """HloModule t, is_scheduled=true

%f (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %y = f32[8,128]{{1,0:T(8,128)}} add(%x, %x)
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %r = f32[8,128]{{1,0:T(8,128)}} fusion(%x), kind=kLoop, calls=%f, backend_config={{"window_config":{{{0}}}}}
}}
"""


@pytest.mark.parametrize(
    ("window", "us"),
    [
        ('"estimated_cycles":"1500000","cost_model_type":"COST_MODEL_TYPE_CLASSIC"', 1000),
        ('"estimated_cycles":"1500000","cost_model_type":"COST_MODEL_TYPE_INVALID"', None),
        ('"estimated_cycles":"1500000"', None),
        ('"estimated_cycles":"lots","cost_model_type":"COST_MODEL_TYPE_CLASSIC"', None),
        (f'"estimated_cycles":"{2**63 - 1}","cost_model_type":"COST_MODEL_TYPE_CLASSIC"', None),
        ('"estimated_cycles":"1","cost_model_type":"COST_MODEL_TYPE_CLASSIC"', None),
    ],
)
def test_a_fusion_takes_the_compiler_s_cycles_where_it_names_their_model(window, us):
    found = inspector.inspect(FUSION.format(window), target="v5e:2x4").us
    roofline = inspector.inspect(FUSION.format(""), target="v5e:2x4").us
    assert found == pytest.approx(us or roofline)
