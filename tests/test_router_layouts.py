"""Who gets a slot is the same on every mesh, whatever cuts the groups; and what devices exchange for it is counts."""

import functools
import hashlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.router import PRESETS, RouterConfig, drops_by_part, metrics, route
from tests.helpers import make_mesh, put

B, T, E = 4, 64, 8
CONFIGS = {
    "group": RouterConfig(E, capacity_factor=0.7, group_size=8),
    "sequence": RouterConfig(E, capacity_factor=0.7),
    "global": RouterConfig(E, capacity_factor=0.7, scope="global"),
    "position": RouterConfig(E, capacity_factor=0.7, priority="position"),
    "probability": RouterConfig(E, capacity_factor=0.7, priority="probability", renormalize="after_drops"),
    "batch": RouterConfig(E, capacity_factor=0.7, priority="batch", scope="global"),
    "random": RouterConfig(E, capacity_factor=0.7, priority="random", group_size=32),
    "noise": RouterConfig(E, capacity_factor=0.7, noise="learned"),
    "expert choice": RouterConfig(E, capacity_factor=0.7, method="expert_choice"),
    "sinkhorn": RouterConfig(E, capacity_factor=0.7, method="sinkhorn", scope="global"),
    "groups of experts": RouterConfig(E, score="sigmoid", expert_groups=4, top_groups=2, group_top=1),
}
# mesh, axes of batch and of sequence
LAYOUTS = {
    "sequence over 8": ((8,), (), ("a",)),
    "sequence over 2": ((2,), (), ("a",)),
    "batch over 4": ((4,), ("a",), ()),
    "batch x sequence": ((2, 4), ("a",), ("b",)),
    "sequence over both": ((2, 4), (), ("a", "b")),
}


MODES = ("explicit", "auto", "manual")
OPTIMISED = {"xla_backend_optimization_level": 3}  # as users' programs are: rounding must not depend on a part's shape


def inputs():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, T, E)).astype(np.float32) + 0.3 * np.arange(E, dtype=np.float32)
    logits[1, 3, 2] = np.nan
    return logits, rng.random((B, T)) < 0.9, rng.normal(size=(B, T, E)).astype(np.float32)


def routed(config, logits, mask, noise, **where):
    noise = noise if config.noise == "learned" else None
    routing = route(logits, config, token_mask=mask, noise_logits=noise, key=jax.random.key(3), train=True, **where)
    return routing, metrics(routing, logits, config, noise_logits=noise)


def digest(routing) -> str:
    """Of which choices are kept, and in which places."""
    kept = [np.asarray(x, np.int32).tobytes() for x in (routing.expert, routing.slot)]
    return hashlib.sha256(b"".join(kept)).hexdigest()


@functools.cache
def alone(name):
    return jax.jit(functools.partial(routed, CONFIGS[name]), compiler_options=OPTIMISED)(*inputs())


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "layout", "mode"),
    [(name, layout, MODES[(i + j) % 3]) for i, name in enumerate(CONFIGS) for j, layout in enumerate(LAYOUTS)],
)
def test_one_digest_of_the_kept_set(name, layout, mode):
    config, (shape, batch, sequence) = CONFIGS[name], LAYOUTS[layout]
    if mode == "manual" and batch and (config.scope == "global" or name in ("random", "noise")):
        mode = "auto"  # inside the caller's shard_map only the sequence's axes are known
    mesh = make_mesh(shape, AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    spec = P(batch or None, sequence or None)
    body = functools.partial(routed, config)
    if mode == "manual":
        only = lambda *args: routed(config, *args, axis_name=sequence)[0]
        body = jax.shard_map(only, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    with jax.set_mesh(mesh):
        got = jax.jit(body, compiler_options=OPTIMISED)(*put(mesh, inputs(), (spec,) * 3))
    want, measured = alone(name)
    routing = got if mode == "manual" else got[0]
    assert digest(routing) == digest(want)
    np.testing.assert_allclose(routing.weight, want.weight, rtol=2e-6)
    if mode != "manual":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[1], measured)
    assert (np.asarray(routing.slot) < 0).any() and (np.asarray(routing.slot) >= 0).any()


@pytest.mark.parametrize("mode", MODES)
def test_devices_that_share_a_group_exchange_counts_alone(mode):
    """A sequence over 8 devices: one all-gather, of each 8 blocks' counts of 2 choices of 8 experts."""
    mesh = make_mesh((8,), AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    body = functools.partial(route, config=CONFIGS["sequence"], axis_name="a" if mode == "manual" else None)
    if mode == "manual":
        body = jax.shard_map(body, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))
    with jax.set_mesh(mesh):
        logits = jax.device_put(np.tile(inputs()[0], (1, 32, 1)), NamedSharding(mesh, P(None, "a")))
        text = jax.jit(body).lower(logits).compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"s32\[([\d,]+)\]\S* all-gather\(", text)]
    others = re.findall(r" (all-to-all|all-reduce|reduce-scatter|scatter)\(", text)
    assert sizes == [B * 8 * 2 * E] and not others, (sizes, others)


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_with_no_capacity_nothing_is_counted_across_devices(capacity_factor):
    mesh = make_mesh((8,), AxisType.Explicit)
    config = RouterConfig(E, capacity_factor=capacity_factor)
    with jax.set_mesh(mesh):
        x = jax.device_put(inputs()[0][..., :4], NamedSharding(mesh, P(None, "a")))
        weights = (jnp.ones((4, E)), jnp.ones((E, 4, 2)), jnp.ones((E, 2, 4)))
        text = jax.jit(lambda x: ringmoe.moe_ffn(x, *weights, config=config)[0]).lower(x).compile().as_text()
    exchanged = re.search(r"all-gather|all-reduce|collective-permute|all-to-all", text)
    assert (exchanged is None) == (capacity_factor is None)


def test_drops_by_source():
    routing, _ = alone("sequence")
    lost = (np.asarray(routing.slot) < 0) & np.asarray(routing.active)[..., None]
    np.testing.assert_array_equal(drops_by_part(routing, 8), lost.reshape(B, 8, -1).sum(-1))
    with pytest.raises(ValueError, match="parts=7 of 64 tokens, expected a divisor"):
        drops_by_part(routing, 7)


def test_every_preset_routes():
    assert all(name in str(RouterConfig.preset.__doc__) for name in PRESETS)
    for name, fields in PRESETS.items():
        config = RouterConfig.preset(name)
        logits = jax.random.normal(jax.random.key(0), (1, 16, fields["num_experts"]))
        noise = jnp.zeros_like(logits) if config.noise == "learned" else None
        routed = functools.partial(route, config=config, key=jax.random.key(1), train=True)
        routing = jax.eval_shape(lambda *a, routed=routed: routed(a[0], noise_logits=a[1]), logits, noise)
        assert routing.expert.shape == (1, 16, config.top_k)
    with pytest.raises(ValueError, match="no preset 'mixtrel', expected one of"):
        RouterConfig.preset("mixtrel")
