"""What travels round a ring, as what and how often: counted in the program, against what the plan says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import rules
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band
from ringmoe.pallas import attention_xla
from ringmoe.pallas.blocks import apart
from ringmoe.plan import attention as plan
from ringmoe.plan.base import freeze
from ringmoe.schedule import attention as schedule
from tests.helpers import assert_close, double, make_mesh

HEADS, WIDTH = 2, 8
BANDS = {"full": Band(), "causal": Band(right=0), "left": Band(32, 0), "far": Band(40, 0), "both": Band(8, 8)}
SIZES = [("full", 2), ("full", 4), ("causal", 4), ("left", 4), ("left", 2), ("far", 4), ("both", 4), ("both", 2)]


def permuted(jaxpr, times: int = 1) -> list[tuple[str, int]]:
    """(dtype, bytes) of what has heads and a head dim, each time that it travels."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            sent = [x.aval for x in eqn.invars if x.aval.ndim == 4]
            found += [(str(x.dtype), x.size * x.dtype.itemsize) for x in sent] * times
        for inner in eqn.params.values():
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                found += permuted(inner, times * eqn.params.get("length", 1))
    return found


def ring(name: str, size: int, tokens: int, backward: bool):
    """Its plan, and what travels."""
    shape = (1, size * tokens, HEADS, WIDTH)
    results = ("query", "key", "value") if backward else ("output", "lse")
    rule = rules.make("attention", (("query", shape), ("key", shape), ("value", shape)), results)
    factors, owed = freeze({"t": ("a",), "s": ("a",)}), 4 if backward else 0
    made = plan.make(rule, factors, (("a", size),), BANDS[name], "ring", 2, None, owed)
    spec = AttentionSpec(1.0, made.band, pieces=made.pieces)

    def local(x):
        row = jnp.zeros(x.shape[:3], jnp.float32)
        if not backward:
            return schedule.forward(made, attention_xla, spec, x, x, x, Extras())[0]
        return schedule.backward(made, attention_xla, spec, x, x, x, row, row, x, row, Extras())[:3]

    mesh = make_mesh((size,), AxisType.Auto)
    one_device = jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"), check_vma=False)
    return made, permuted(jax.make_jaxpr(one_device)(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).jaxpr)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tokens", [32, 12])  # of which there are halves for the kernel, or none
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_as_much_travels_as_the_plan_says(name, size, tokens, backward):
    made, sent = ring(name, size, tokens, backward)
    assert made.exchange == "ring" and sum(size for _, size in sent) == made.wire_bytes > 0
    assert made.own_parts == (2 if made.parts == 2 or (backward and tokens == 32) else 1)


@pytest.mark.parametrize("name", ["left", "both"])
def test_what_only_a_neighbour_owes_goes_home_once_and_rounded(name):
    """Keys and values there, their gradients back: nothing else, and as what they are."""
    made, sent = ring(name, 4, 32, True)
    assert made.hops == 2 and {dtype for dtype, _ in sent} == {"bfloat16"} and len(sent) == 4 * made.ways


@pytest.mark.parametrize("how", [{"is_causal": True, "local_window_size": (64, 0)}, {"local_window_size": (16, 48)}])
def test_and_its_error_is_hardly_larger(how):
    """Of dK and dV in bfloat16, against float64: at most 1.2 times that of one device."""
    draw = np.random.default_rng(0).normal
    arrays = [jnp.asarray(draw(size=(1, 256, 4, 32)), jnp.bfloat16) for _ in range(4)]
    attend = functools.partial(ringmoe.dot_product_attention, exchange="ring", **how)
    pullback = lambda do, *qkv: jax.vjp(attend, *qkv)[1](do)
    mesh = make_mesh((4,), AxisType.Auto)
    placed = [jax.device_put(x, NamedSharding(mesh, P(None, "a"))) for x in arrays]
    ring, one = ringmoe.jit(pullback)(*placed), ringmoe.jit(pullback)(*arrays)
    with jax.enable_x64(True):
        want = ringmoe.jit(pullback)(*double(arrays))
        error = lambda got: [float(jnp.linalg.norm(g - w)) for g, w in zip(double(got), want)]
        for here, alone in zip(error(ring), error(one), strict=True):
            assert 0 < here <= 1.2 * alone


def test_the_cost_of_a_block_whose_place_is_known():
    """Half of a device's own block under a causal mask, and the most that a window may meet of a block somewhere."""
    causal, window = Band(right=0), Band(7, 0)
    first = jnp.int32(5)
    known = lambda distance: jax.make_jaxpr(lambda at: apart(Offsets((at,), (at,), distance)) or 0)(first).jaxpr.outvars
    assert [v.val for v in known(16)] == [16] and [v.val for v in known(None)] == [0]
    assert causal.met(64, 32, 8, 8, apart=0) == 64 * 32 - 8 * 8 * (3 + 2 + 1)  # all but the blocks above the diagonal
    assert window.met(64, 16, 8, 8, None) == min(64 * 16, 16 * 24) < window.met(64, 64, 8, 8, None)


def test_an_own_block_in_halves_is_the_whole():
    """Each half once, at its own keys: a bias tells them apart."""
    mesh, draw = make_mesh((4,), AxisType.Auto), np.random.default_rng(0).normal
    q, k, v, do = (draw(size=(1, 128, 2, 8)).astype(np.float32) for _ in range(4))
    bias = draw(size=(1, 2, 128, 128)).astype(np.float32)
    how = {"is_causal": True, "local_window_size": (32, 0)}

    def gradients(attend, q, k, v, do, bias):
        return jax.vjp(lambda q, k, v, bias: attend(q, k, v, bias=bias, **how), q, k, v, bias)[1](do)

    placed = [jax.device_put(x, NamedSharding(mesh, P(None, "a"))) for x in (q, k, v, do)]
    ring = functools.partial(ringmoe.dot_product_attention, exchange="ring")
    got = ringmoe.jit(functools.partial(gradients, ring))(*placed, bias)
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(gradients, jax.nn.dot_product_attention))(*double((q, k, v, do, bias)))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 2e-5)
