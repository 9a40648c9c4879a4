"""All-to-alls by remote DMA: the same as XLA's, without races; compiled for every TPU; and hidden where XLA's is not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import errors
from ringmoe.inspector.wire import replica_groups
from ringmoe.pallas import exchange_tpu
from tests.exchanges import all_to_all, lowered
from tests.helpers import collectives, make_mesh

TARGETS = {"v5e:4x8": 32, "v5p:2x2x1": 4, "v6e:2x2": 4, "tpu7x:2x2x1": 8}


@pytest.mark.oldest
@pytest.mark.parametrize("axes", [("a",), ("b", "a"), ("c", "b"), ("a", "b", "c")])
def test_every_slice_goes_where_xla_sends_it(axes, capfd):
    """Over one axis and over several, in an order that is not the mesh's, beside axes that don't exchange."""
    mesh = make_mesh((2, 2, 2), AxisType.Auto)
    peers = 2 ** len(axes)
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=(8 * peers, *shape)), dtype)
        for shape, dtype in (((2, 16, 8), jnp.bfloat16), ((1, 8, 4), jnp.float32))
    ]
    spec = P(("a", "b", "c"))
    local = lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    got = local(lambda *arrays: tuple(all_to_all(tuple((axis, 2) for axis in axes), arrays)))(*arrays)
    want = local(lambda *arrays: tuple(lax.all_to_all(a, axes, 0, 0) for a in arrays))(*arrays)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    assert "RACE" not in capfd.readouterr().out


@given(st.permutations(["a", "b", "c"]), st.integers(1, 3))
@settings(max_examples=30)
def test_the_groups_are_those_that_exchange(axes, count):
    """As the inspector reads them, against the devices that `lax.all_to_all` groups: those equal on all other axes."""
    mesh, sizes = make_mesh((2, 2, 2), AxisType.Auto), {"a": 2, "b": 2, "c": 2}
    axes = tuple(axes[:count])
    with jax.set_mesh(mesh):
        found = replica_groups(exchange_tpu._groups(tuple((axis, sizes[axis]) for axis in axes)), 8)
    number = np.arange(8).reshape(2, 2, 2)
    others = [i for i, name in enumerate("abc") if name not in axes]
    same = lambda d: tuple(np.argwhere(number == d)[0][others])
    want = {frozenset(d for d in range(8) if same(d) == same(first)) for first in range(8)}
    assert {frozenset(group) for group in found} == want and len(found) == len(want)


def there_and_back(target):
    """Start, a matmul, finish, of arrays that VMEM would hold; and their types."""
    devices = TARGETS[target]
    mesh, axes = ringmoe.target(target).mesh({"a": devices}), (("a", devices),)

    def local(x, w):
        under_way, w = exchange_tpu.start(axes, [x * 2], w)
        (x,), w = exchange_tpu.finish(axes, under_way, w @ w)
        return x + 1, w

    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("a")))
    run = jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    return jax.jit(run), (of(devices**2, 16, 256), of(1024 * devices, 1024))


@pytest.mark.oldest
@pytest.mark.parametrize("target", TARGETS)
def test_buffers_stay_in_hbm(target):
    """XLA moves those in VMEM, even while others write to them."""
    run, types = there_and_back(target)
    text = run.lower(*types).compile().as_text()
    kernels = re.findall(r"%all_to_all_(?:start|done)[\.\d]* = (.*?) custom-call\(", text)
    assert len(kernels) == 2 and not any("S(1)" in shape for shape in kernels)


@pytest.mark.oldest
def test_nothing_is_sent_before_all_have_come():
    """Greetings to all others, as many waited for, and only then copies: others may not have the room yet. No interpreter sees
    that, for there every buffer is there from the beginning."""
    run, types = there_and_back("v6e:2x2")
    steps = []

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name == "semaphore_wait":
                steps.append(f"{name} {next(int(v.val) for v in eqn.invars if hasattr(v, 'val'))}")
            elif name in ("semaphore_signal", "dma_start"):
                steps.append(name)
            for inner in jax.tree.leaves(list(eqn.params.values())):
                if hasattr(inner, "eqns"):
                    look(inner)

    look(run.trace(*types).jaxpr)
    assert steps == ["semaphore_signal", "semaphore_wait 3", "dma_start", "dma_start"]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("target", "backward"), [("v5p:2x2x1", True), ("v6e:2x2", False), ("tpu7x:2x2x1", False), ("v5e:4x8", False)]
)
def test_every_tpu_works_on_one_piece_while_others_travel(target, backward):
    """Between start and finish are matmuls."""
    report = ringmoe.inspect(lowered(target, TARGETS[target], backward, "remote", tokens=512), target=target)
    travels = [c for c in report.collectives if c.name.startswith("all_to_all_start")]
    assert len(travels) > 2
    hidden = [any("dot_general" in op for op in c.hidden_by_ops) for c in travels]
    # The first piece has nothing to hide behind, nor forward the last one on its way home.
    assert sum(hidden) >= len(travels) - (1 if backward else 2)


@pytest.mark.sampled
@pytest.mark.parametrize("backward", [False, True])
def test_where_xla_can_not_hide_it_the_wire_is_hidden(backward):
    once, chosen = (
        ringmoe.inspect(lowered("v5e:4x8", 32, backward, how), target="v5e:4x8") for how in ("all_to_all", "auto")
    )
    of = lambda report: [c for c in report.collectives if c.kind == "all-to-all" and c.wire_us > 20]
    assert not any(c.asynchronous for c in of(once)) and all(c.asynchronous for c in of(chosen))
    assert {c.axes for c in of(chosen)} == {("a",)} and len(of(chosen)) > 2
    bytes_of, waited = (
        (lambda report: sum(c.wire_bytes for c in of(report))),
        lambda report: sum(c.exposed_us for c in of(report)),
    )
    assert bytes_of(chosen) == pytest.approx(bytes_of(once))
    assert waited(chosen) < 0.6 * waited(once) and chosen.us < once.us


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_users_shard_map_beside_another_axis(check_vma):
    mesh = ringmoe.target("v5e:4x8").mesh({"b": 2, "a": 16})
    of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    config = ringmoe.RouterConfig(16, group_size=2048)
    layer = lambda x, r, w_in, w_out: ringmoe.moe_ffn(x, r, w_in, w_out, config=config, axis_name="a")[0]
    specs = P("b", "a"), P(), P("a"), P("a")
    run = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
    types = (2, 2048 * 16, 1024), (1024, 16), (16, 1024, 4096), (16, 4096, 1024)
    report = ringmoe.inspect(jax.jit(run), *(of(shape, *spec) for shape, spec in zip(types, specs)), target="v5e:4x8")
    travels = [c for c in report.collectives if c.name.startswith("all_to_all_start")]
    assert len(travels) > 2 and {c.axes for c in travels} == {("a",)}


def test_without_a_ragged_all_to_all_a_dropless_layer_compiles():
    """libtpu has none for v5e from 32 chips on."""
    mesh = ringmoe.target("v5e:4x8").mesh({"a": 32})
    of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    config = ringmoe.RouterConfig(
        128, capacity_factor=None
    )  # rows are sorted: of four experts a device few tokens choose two
    layer = ringmoe.jit(lambda x, r, w_in, w_out: ringmoe.moe_ffn(x, r, w_in, w_out, config=config)[0])
    types = of((1, 32 * 64, 128), None, "a"), of((128, 128)), of((128, 128, 256), "a"), of((128, 256, 128), "a")
    assert "sorted" in ringmoe.explain(layer, *types).rows[0].reason
    text = layer.lower(*types).compile().as_text()
    assert "all-to-all" in collectives(text) and "ragged-all-to-all" not in text


def test_elsewhere_pieces_travel_by_xla_and_it_is_said():
    rng = np.random.default_rng(0)
    mesh = make_mesh((4,), AxisType.Explicit)
    place = lambda a, *spec: jax.device_put(jnp.asarray(a, jnp.float32), NamedSharding(mesh, P(*spec)))
    x, router = place(rng.normal(size=(1, 128, 8)), None, "a"), place(rng.normal(size=(8, 4)))
    w_in, w_out = place(rng.normal(size=(4, 8, 16)), "a"), place(rng.normal(size=(4, 16, 8)), "a")
    layer = functools.partial(ringmoe.moe_ffn, config=ringmoe.RouterConfig(4, group_size=32))
    run = lambda how: jax.jit(lambda *args: layer(*args, exchange=how)[0])(x, router, w_in, w_out)
    errors.forget_warnings()
    with pytest.warns(
        errors.CostWarning, match="no remote DMA between devices on cpu: pieces travel by XLA's all-to-all"
    ):
        got = run("remote")
    np.testing.assert_allclose(got, run("all_to_all"), rtol=0, atol=1e-5)
