"""A ring's hops by remote DMA: the same as XLA's permutes, without races; hidden where XLA's are not."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import rules
from ringmoe.inspector.wire import source_target_pairs
from ringmoe.interface import AttentionSpec, Extras
from ringmoe.masks import Band
from ringmoe.pallas import attention_xla, exchange_tpu, remote_tpu, ring_tpu
from ringmoe.plan import attention as plan
from ringmoe.plan.base import Ring, freeze
from ringmoe.primitives import attention as primitive
from ringmoe.schedule import attention as schedule
from ringmoe.schedule.ring import BY_XLA, BY_XLA_IN_PAIRS, WAYS, Travel, send
from tests.exchanges import interpreted
from tests.helpers import collectives, make_mesh

pytestmark = pytest.mark.oldest


def hop(names, trees, distance=1):
    """Of blocks in the interpreter."""
    mesh, steps = jax.sharding.get_abstract_mesh(), ring_tpu.steps_of(trees, distance)
    arrays, tree = jax.tree.flatten(list(trees))
    start_kernel = functools.partial(ring_tpu._start_kernel, steps=steps, names=mesh.axis_names)
    axes, kind = tuple((name, mesh.shape[name]) for name in names), ring_tpu.KINDS[tuple(sorted(set(steps)))]
    return tree.unflatten(interpreted(axes, arrays, kind, start_kernel, ring_tpu._finish_kernel))


INTERPRETED = Travel(
    lambda ring, trees, others, distance=1: ((trees, distance), trees, others),
    lambda ring, under_way, after: (
        hop(ring.axes, *under_way) if jax.tree.leaves(under_way[0]) else under_way[0],
        after,
    ),
)


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("axes", [("a",), ("b", "a"), ("c", "b"), ("a", "b", "c")])
def test_blocks_go_where_xla_sends_them(axes, ways, capfd):
    """Over one axis and over several, in an order that is not the mesh's, beside axes that are no ring's."""
    mesh = make_mesh((2, 2, 2), AxisType.Auto)
    ring, rng = Ring.make(axes, dict(mesh.shape)), np.random.default_rng(0)
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=(8, *shape)), dtype)
    trees = [(draw(jnp.bfloat16, 16, 8), draw(jnp.float32, 8, 4)), (draw(jnp.bfloat16, 16, 8), ())][:ways]
    spec = P(("a", "b", "c"))
    local = lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    got = local(lambda trees: hop(axes, trees))(trees)
    want = local(lambda trees: [send(ring, tree, way) for way, tree in zip(WAYS, trees)])(trees)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_whole_ring_and_its_gradients(tokens, capfd):
    """One way and both: what is owed, too, is as by XLA, to the bit."""
    mesh, heads, width = make_mesh((4,), AxisType.Auto), 2, 8
    shape = (1, 4 * tokens, heads, width)
    rule = rules.make("attention", (("query", shape), ("key", shape), ("value", shape)), ("output", "lse"))
    made = plan.make(rule, freeze({"t": ("a",), "s": ("a",)}), (("a", 4),), Band(), "ring", 4)
    assert made.ways == tokens // 8
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    spec = AttentionSpec(0.3)

    def both(travel, q, k, v, do):
        output, lse, tail = schedule.forward(made, attention_xla, spec, q, k, v, Extras(), travel)
        delta = jnp.sum(do * output, -1)
        grads = schedule.backward(made, attention_xla, spec, q, k, v, lse, tail, do, delta, Extras(), travel)
        return output, lse, *grads[:3]

    sharded = P(None, "a")
    run = lambda travel: jax.jit(
        jax.shard_map(functools.partial(both, travel), mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False)
    )(q, k, v, do)
    for got, want in zip(run(INTERPRETED), run(BY_XLA), strict=True):
        np.testing.assert_array_equal(got, want)
    assert "RACE" not in capfd.readouterr().out


def test_nobody_counts_anothers_greetings():
    """A semaphore for each set of axes and each way: who is ahead in another exchange may greet before."""
    mesh = make_mesh((2, 2, 2), AxisType.Auto)
    subsets = ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")
    with jax.set_mesh(mesh):
        numbers = [
            remote_tpu.barrier(tuple((name, 2) for name in axes), kind)
            for axes in subsets
            for kind in (exchange_tpu.KIND, *ring_tpu.KINDS.values())
        ]
    assert len(set(numbers)) == len(numbers) == 28


@pytest.mark.parametrize("axes", [("a",), ("b", "a"), ("c", "a")])
def test_the_pairs_are_those_of_the_ring(axes):
    mesh = make_mesh((2, 2, 2), AxisType.Auto)
    with jax.set_mesh(mesh):
        pairs = source_target_pairs(ring_tpu._pairs(tuple((name, 2) for name in axes), (-1, 1)))
    number, size = np.arange(8).reshape(2, 2, 2), 2 ** len(axes)
    want = set()
    for at in np.ndindex(2, 2, 2):
        place = 0
        for name in axes:
            place = 2 * place + at["abc".index(name)]
        for way in WAYS:
            left, to = (place + way) % size, list(at)
            for name in reversed(axes):
                to["abc".index(name)], left = left % 2, left // 2
            want.add((int(number[at]), int(number[tuple(to)])))
    assert set(pairs) == want and len(pairs) == 16


def ring_on(target, backward, tokens=1024, **how):
    machine = ringmoe.target(target)
    mesh = machine.mesh({"x": machine.num_devices})
    sharding = NamedSharding(mesh, P(None, "x"))
    q = jax.ShapeDtypeStruct((1, tokens * machine.num_devices, 2, 128), jnp.bfloat16, sharding=sharding)
    attend = functools.partial(ringmoe.dot_product_attention, exchange="ring", **how)
    fun = (lambda do, *qkv: jax.vjp(attend, *qkv)[1](do)) if backward else attend
    return ringmoe.jit(fun).lower(*(q,) * (4 if backward else 3))


@pytest.mark.parametrize("backward", [False, True])
def test_where_permutes_are_synchronous_the_wire_is_hidden(backward):
    """Of v5e from 32 chips on; the buffers stay in HBM, and both ways are one exchange for the inspector."""
    lowered = ring_on("v5e:4x8", backward, 4096)
    text = lowered.compile().as_text()
    kernels = re.findall(r"%ring_(?:start|done)[\.\d]* = (.*?) custom-call\(", text)
    assert len(kernels) >= 2 and not any("S(1)" in shape for shape in kernels)
    report = ringmoe.inspect(lowered, target="v5e:4x8")
    travels = [c for c in report.collectives if c.name.startswith("ring_start")]
    assert {c.kind for c in travels} == {"collective-permute"} and all(c.asynchronous for c in travels)
    assert {c.axes for c in travels} == {("x",)}
    assert all(any("attention" in op for op in c.hidden_by_ops) for c in travels)
    block = 4096 * 2 * 128 * 2  # bytes of K, and as many of V
    hops = [c.wire_bytes for c in travels]
    assert max(hops) == pytest.approx(4 * block if backward else block)  # half of a hop's; all that goes home, float32
    assert sum(c.wire_us for c in travels) > 0
    kernels = [
        op for line in report.timelines for op in line.operations if op.name.startswith(("ring_start", "ring_done"))
    ]
    assert sum(op.total_us for op in kernels) < 0.01 * report.us  # what they hand over they don't touch
    assert sum(c.exposed_us for c in travels) < 0.02 * report.us  # the last way home as well


def test_elsewhere_permutes_are_xlas():
    for target in ("v5e:2x4", "v5p:2x2x1"):
        text = ring_on(target, False).compile().as_text()
        assert "collective-permute" in collectives(text) and "ring_start" not in text


def test_nothing_is_sent_before_the_neighbours_have_come():
    """Greetings to those that send to it, as many waited for, and only then copies. No interpreter sees that."""
    steps = []

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("semaphore_wait", "semaphore_signal", "dma_start"):
                steps.append(eqn.primitive.name)
            for inner in jax.tree.leaves(list(eqn.params.values())):
                if hasattr(inner, "eqns"):
                    look(inner)

    mesh = make_mesh((4,), AxisType.Auto)
    local = lambda x: ring_tpu.start(("a",), [(x, x), (x,)], ())[0][1][0]
    run = jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    look(jax.make_jaxpr(run)(jnp.ones((32, 128))).jaxpr)
    assert steps == ["semaphore_signal"] * 2 + ["semaphore_wait"] + ["dma_start"] * 3


@pytest.mark.parametrize(("kind", "size", "slices", "remote"), [
    ("TPU v5 lite", 32, 1, True), ("TPU v5 lite", 32, 2, False), ("TPU v5 lite", 16, 1, False),
    ("TPU v5 lite", 512, 1, False),  # more than any slice has
    ("TPU v5", 64, 1, False), ("TPU v6 lite", 256, 1, False), ("NVIDIA H200", 32, 1, False), ("cpu", 32, 1, False),
])  # fmt: skip
def test_the_plan_says_where(kind, size, slices, remote):
    shape = (1, 512 * size, 2, 128)
    rule = rules.make("attention", (("query", shape), ("key", shape), ("value", shape)), ("output", "lse"))
    factors = freeze({"t": ("x",), "s": ("x",)})
    how = {"device_kind": kind, "in_tiles": True, "slices": slices}
    made = plan.make(rule, factors, (("x", size),), Band(), "ring", 2, **how)
    assert made.remote == remote and ("remote DMA" in made.reason) == remote
    window = plan.make(rule, factors, (("x", size),), Band(0, 0), "ring", 2, device_kind=kind, in_tiles=True)
    assert not window.remote  # one block is all it meets


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("target", ["v5e:4x8", "2*v5e:4x4"])
def test_no_dma_leaves_a_slice(target, kind, monkeypatch):
    """Of 32 devices: where arguments tell them, where a mesh is set, and where the machine that runs the program has them."""
    mesh = ringmoe.target(target).mesh({"x": 32}, axis_types=(kind,))
    q = jax.ShapeDtypeStruct((1, 32 * 512, 1, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "x")))
    attend = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, exchange="ring")
    by_dma = lambda jit: "ring_start" in jit(attend).lower(q, q, q).as_text(debug_info=True)
    in_one_slice = "*" not in target
    if kind == AxisType.Auto:
        assert by_dma(ringmoe.jit) == in_one_slice
    else:
        with jax.set_mesh(mesh):
            assert by_dma(jax.jit) == in_one_slice
        monkeypatch.setattr(jax, "devices", lambda: list(mesh.devices.flat))
        assert by_dma(jax.jit) == in_one_slice


def test_what_is_differentiated_or_for_another_platform_travels_by_xla():
    shape = (1, 512 * 32, 2, 128)
    rule = rules.make("attention", (("query", shape), ("key", shape), ("value", shape)), ("output", "lse"))
    factors = freeze({"t": ("x",), "s": ("x",)})
    made = plan.make(rule, factors, (("x", 32),), Band(), "ring", 2, device_kind="TPU v5 lite")
    assert primitive._travel(made, "cpu", {}) is BY_XLA
    assert primitive._travel(made, "tpu", {"uniform": True}) is BY_XLA
    assert primitive._travel(made, "tpu", {}) is not BY_XLA
    assert primitive._travel(dataclasses.replace(made, remote=False), "tpu", {}) is BY_XLA_IN_PAIRS
    assert primitive._travel(made, "cuda", {}) is BY_XLA_IN_PAIRS
