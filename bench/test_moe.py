"""The expert layer against the one-hot einsum form and sort + lax.ragged_dot: float32, one CPU device.

Every implementation gets the same x, router weight and expert weights, and computes routing, experts and combination.
`ours` and `one_hot` drop by the same capacity; `ragged` drops nothing. Columns beside the time: temp_mib, the compiled
program's temporary memory, and drop_fraction. Run: pytest bench/test_moe.py, JAX_PLATFORMS=cpu.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringmoe
from bench.specs import EXPERTS
from ringmoe.router import RouterConfig, metrics, route


def config_of(spec):
    return RouterConfig(spec.num_experts, spec.top_k, spec.capacity_factor, spec.group_size)


def make_inputs(spec):
    keys = jax.random.split(jax.random.key(0), 5)
    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    num_experts, dim, hidden = spec.num_experts, spec.model_dim, spec.hidden_dim
    return (
        normal(keys[0], (1, spec.num_tokens, dim)),
        normal(keys[1], (dim, num_experts)) / math.sqrt(dim),
        normal(keys[2], (num_experts, dim, hidden)) / math.sqrt(dim),
        normal(keys[3], (num_experts, dim, hidden)) / math.sqrt(dim),
        normal(keys[4], (num_experts, hidden, dim)) / math.sqrt(hidden),
    )


def ours(spec, x, router_weight, w_in, w_gate, w_out):
    return ringmoe.moe_ffn(x, router_weight, w_in, w_out, w_gate=w_gate, config=config_of(spec))[0]


def one_hot(spec, x, router_weight, w_in, w_gate, w_out):
    """Dispatch and combine as einsums with one-hot tensors [groups, i, E, C], after GShard."""
    routing = route(x @ router_weight, config_of(spec))
    arrays = (routing.expert, routing.slot, routing.weight, x)
    expert, slot, weight, tokens = (a.reshape(-1, spec.group_size, a.shape[-1]) for a in arrays)

    def place(scale):
        of_expert = jax.nn.one_hot(expert, spec.num_experts) * scale[..., None]
        return jnp.einsum("gike,gikc->giec", of_expert, jax.nn.one_hot(slot, routing.capacity))

    rows = jnp.einsum("giec,gid->egcd", place(jnp.ones_like(weight)), tokens)
    hidden = jax.nn.silu(jnp.einsum("egcd,edf->egcf", rows, w_gate)) * jnp.einsum("egcd,edf->egcf", rows, w_in)
    out = jnp.einsum("egcf,efd->egcd", hidden, w_out)
    return jnp.einsum("giec,egcd->gid", place(weight), out).reshape(x.shape)


def ragged(spec, x, router_weight, w_in, w_gate, w_out):
    """Dropless: assignments sorted by expert, grouped matmuls by lax.ragged_dot, back by the inverse permutation."""
    weight, expert = jax.lax.top_k(jax.nn.softmax(x[0] @ router_weight), spec.top_k)
    weight = weight / weight.sum(-1, keepdims=True)
    order = jnp.argsort(expert.reshape(-1))
    sizes = jnp.bincount(expert.reshape(-1), length=spec.num_experts).astype(jnp.int32)
    rows = x[0][order // spec.top_k]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, w_gate, sizes)) * jax.lax.ragged_dot(rows, w_in, sizes)
    out = jax.lax.ragged_dot(hidden, w_out, sizes)[jnp.argsort(order)].reshape(*weight.shape, -1)
    return jnp.einsum("tk,tkd->td", weight, out)[None]


IMPLEMENTATIONS = {"ours": ours, "one_hot": one_hot, "ragged": ragged}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", EXPERTS, ids=lambda spec: spec.name)
def test_layer(benchmark, spec, name, direction):
    layer = functools.partial(IMPLEMENTATIONS[name], spec)
    if direction != "forward":
        layer = jax.grad(lambda *inputs, f=layer: jnp.sum(jnp.sin(f(*inputs))), argnums=(0, 1, 2, 3, 4))
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
