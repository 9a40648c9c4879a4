"""The per-device expert schedule in shard_map, against the float64 oracle, on every kind of mesh axis."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from ringmoe import reference_moe
from ringmoe.pallas import experts_xla
from ringmoe.plan import ExpertPlan
from ringmoe.router import RouterConfig, route
from ringmoe.schedule import experts

B, T, D, F, E = 4, 64, 16, 24, 8
CONFIG = RouterConfig(E, top_k=2, capacity_factor=1.0, group_size=8)

# name: mesh axes with sizes, axes of batch, of sequence, of experts (major to minor), of hidden
CASES = {
    "one device": ((("a", 1),), (), (), (), ()),
    "tokens only": ((("a", 8),), (), ("a",), (), ()),
    "experts on the token axis": ((("a", 8),), (), ("a",), ("a",), ()),
    "experts on another axis": ((("a", 8),), (), (), ("a",), ()),
    "hidden": ((("a", 8),), (), (), (), ("a",)),
    "batch x experts on sequence": ((("a", 2), ("b", 4)), ("a",), ("b",), ("b",), ()),
    "experts on both token axes": ((("a", 2), ("b", 4)), ("a",), ("b",), ("a", "b"), ()),
    "experts on both, minor first": ((("a", 2), ("b", 4)), ("a",), ("b",), ("b", "a"), ()),
    "experts on token and other": ((("a", 2), ("b", 4)), (), ("a",), ("a", "b"), ()),
    "experts on other and token": ((("a", 2), ("b", 4)), (), ("b",), ("a", "b"), ()),
    "tokens x hidden": ((("a", 2), ("b", 4)), ("a",), (), (), ("b",)),
    "experts and hidden": ((("a", 2), ("b", 4)), (), ("a",), ("a",), ("b",)),
    "exchange, own, exchange": ((("a", 2), ("b", 2), ("c", 2)), ("a",), ("c",), ("a", "b", "c"), ()),
    "batch, exchange, hidden": ((("a", 2), ("b", 2), ("c", 2)), ("a",), ("b",), ("b",), ("c",)),
    "own expert, tokens, hidden": ((("a", 2), ("b", 2), ("c", 2)), (), ("b",), ("a",), ("c",)),
}


def make_inputs(gated=True, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 7)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
    logits = normal(keys[0], B, T, E) + 0.5 * jnp.arange(E)  # uneven, so that some experts overflow
    x, dy = normal(keys[1], B, T, D), normal(keys[2], B, T, D)
    w_in, w_gate = (normal(key, E, D, F) / math.sqrt(D) for key in keys[3:5])
    w_out = normal(keys[5], E, F, D) / math.sqrt(F)
    cast = lambda *arrays: [a.astype(dtype) for a in arrays]
    return (logits, *cast(x, w_in), w_gate.astype(dtype) if gated else None, *cast(w_out, dy))


def make_schedule(case):
    """forward and backward over global arrays, jitted, on the case's mesh."""
    axes, batch, sequence, expert_axes, hidden = CASES[case]
    size = dict(axes)
    tokens = (*batch, *sequence)
    plan = ExpertPlan(
        E, CONFIG.capacity(CONFIG.group_size), CONFIG.group_size,
        expert_axes=tuple((a, size[a]) for a in expert_axes), exchange_axes=tuple(a for a in expert_axes if a in tokens),
        token_axes=tokens, hidden_axes=hidden,
    )
    num_devices = math.prod(size.values())
    mesh = jax.make_mesh(tuple(size.values()), tuple(size), axis_types=(AxisType.Auto,) * len(size),
                         devices=jax.devices()[:num_devices])
    of_tokens = P(batch or None, sequence or None, None)
    of_in, of_out = P(expert_axes or None, None, hidden or None), P(expert_axes or None, hidden or None, None)
    smap = functools.partial(jax.shard_map, mesh=mesh)
    arrays = (of_tokens,) * 4 + (of_in, of_in, of_out)
    forward = smap(functools.partial(experts.forward, plan, experts_xla), in_specs=arrays, out_specs=of_tokens)
    backward = smap(
        functools.partial(experts.backward, plan, experts_xla),
        in_specs=(*arrays, of_tokens), out_specs=(of_tokens, of_tokens, of_in, of_in, of_out))
    return jax.jit(forward), jax.jit(backward)


@functools.cache
def oracle(gated):
    """Output and gradients in float64, with the same float32 inputs."""
    logits, x, w_in, w_gate, w_out, dy = make_inputs(gated)
    with jax.enable_x64(True):
        up = lambda a: None if a is None else jnp.asarray(np.asarray(a), jnp.float64)
        selection = reference_moe.select(
            logits, top_k=2, capacity=CONFIG.capacity(CONFIG.group_size), group_size=CONFIG.group_size)
        assert (selection.slot < 0).any()
        weight = up(route(logits, CONFIG).weight)
        f = lambda x, weight, w_in, w_gate, w_out: reference_moe.experts(x, selection, weight, w_in, w_out, w_gate)
        y, pullback = jax.vjp(f, up(x), weight, up(w_in), up(w_gate), up(w_out))
        return jax.tree.map(np.asarray, (y, pullback(up(dy))))


def run(case, gated=True, dtype=jnp.float32):
    logits, x, w_in, w_gate, w_out, dy = make_inputs(gated, dtype)
    routing = route(logits, CONFIG)
    forward, backward = make_schedule(case)
    arrays = (x, routing.expert, routing.slot, routing.weight, w_in, w_gate, w_out)
    return forward(*arrays), backward(*arrays, dy)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_layer(case):
    y, grads = run(case)
    want, want_grads = oracle(True)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
