"""The expert layer against the one-hot einsum form and sort + lax.ragged_dot: float32, one CPU device.

Every implementation gets the same x, router weight and expert weights, and computes routing, experts and combination.
`ours` and `one_hot` drop by the same capacity; `ragged` drops nothing. Columns beside the time: temp_mib, the compiled
program's temporary memory, and drop_fraction. Run: pytest bench/test_moe.py, JAX_PLATFORMS=cpu.
"""

import functools

import jax
import numpy as np
import pytest

from bench.moe import config_of, make_inputs, one_hot, ours, ragged, with_gradients
from bench.specs import EXPERTS
from ringmoe.router import metrics, route

IMPLEMENTATIONS = {"ours": ours, "one_hot": one_hot, "ragged": ragged}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.name)
def test_layer(benchmark, spec, name, direction):
    layer = functools.partial(IMPLEMENTATIONS[name], spec)
    if direction != "forward":
        layer = with_gradients(layer)
    inputs = make_inputs(spec)
    compiled = jax.jit(layer).lower(*inputs).compile()
    logits = inputs[0] @ inputs[1]
    benchmark.group = f"{spec.name} {direction}"
    benchmark.extra_info["temp_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    benchmark.extra_info["drop_fraction"] = (
        0.0 if name == "ragged" else float(metrics(route(logits, config_of(spec)), logits).drop_fraction)
    )
    benchmark.pedantic(lambda: jax.block_until_ready(compiled(*inputs)), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.name)
def test_ours_and_one_hot_agree(spec):
    inputs = make_inputs(spec)
    got, want = (jax.jit(functools.partial(f, spec))(*inputs) for f in (ours, one_hot))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
