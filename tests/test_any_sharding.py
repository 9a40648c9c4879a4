"""Shardings that nobody would draw but ordinary models have: each case once refused or crashed, forward and gradient."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import errors, reference, reference_moe, rules
from ringmoe.primitives import doors
from tests.helpers import (
    PARTITIONER,
    RINGMOE_JIT,
    TYPES,
    assert_close,
    collectives,
    double,
    make_mesh,
    no_cost_warnings,
    put,
    tpu_mesh,
)

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)


def qkv(b=2, t=16, s=None, n=4, k=2, h=4):
    s = t if s is None else s
    return draw(b, t, n, h), draw(b, s, k, h), draw(b, s, k, h)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """`program(op)` is a function of the arrays that calls `op`: ours, or the dense one for the oracle. Each is its own key."""

    arrays: tuple
    specs: tuple
    program: Callable
    mesh: tuple[int, ...] = (8,)
    doors: tuple = (RINGMOE_JIT, PARTITIONER)


causal = lambda op: lambda q, k, v: op(q, k, v, is_causal=True)
SEQUENCE = (P(None, "a"),) * 3
ATTENTION = {
    "a slice": Case(qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q[:, :-1], k[:, :-1], v[:, :-1], is_causal=True)),
    "a slice, every key seen": Case(qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q[:, 1:], k[:, 1:], v[:, 1:])),
    "a window, padded": Case(
        qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q[:, :-3], k[:, :-3], v[:, :-3], is_causal=True, local_window_size=4)
    ),
    "concatenated keys": Case(
        qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q, *(jnp.concatenate([x, x[:, :3]], 1) for x in (k, v)))
    ),
    "padded keys": Case(
        qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q, *(jnp.pad(x, ((0, 0), (5, 0), (0, 0), (0, 0))) for x in (k, v)))
    ),
    "fewer tokens than devices": Case(qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q[:, :3], k, v)),
    "one token": Case(qkv(t=1, s=16), (P(), *SEQUENCE[1:]), lambda op: op, doors=(RINGMOE_JIT, PARTITIONER, TYPES)),
    "other lengths": Case(
        qkv(), SEQUENCE, lambda op: lambda q, k, v: op(q[:, :-1], k[:, :-4], v[:, :-4], is_causal=True)
    ),
    "heads cut off": Case(
        qkv(n=8, k=4), (P(None, None, "b"),) * 3, lambda op: lambda q, k, v: op(q[:, :, :6], k[:, :, :3], v[:, :, :3]),
        mesh=(2, 4), doors=(RINGMOE_JIT,),
    ),
    "axes in another order": Case(
        qkv(), (P(None, ("b", "a")),) * 3, causal, mesh=(2, 4), doors=(RINGMOE_JIT, PARTITIONER, TYPES)
    ),
    "three axes in another order": Case(
        qkv(), (P(None, ("c", "a", "b")),) * 3, causal, mesh=(2, 2, 2), doors=(RINGMOE_JIT, PARTITIONER, TYPES)
    ),
    "axes in different orders": Case(
        qkv(), (P(None, ("b", "a")), P(None, ("a", "b")), P(None, "b")), causal, mesh=(2, 4),
        doors=(RINGMOE_JIT, PARTITIONER, TYPES),
    ),
    "tensor parallel, more devices than heads": Case(
        (draw(2, 16, 16), *qkv()[1:]), (P(None, None, "a"), P(), P()),
        lambda op: lambda q, k, v: op(q.reshape(2, 16, 4, 4), k, v, is_causal=True),
    ),
    "more devices than key heads": Case(
        qkv(n=8), (P(None, None, "a"), P(), P()), causal, doors=(RINGMOE_JIT, PARTITIONER, TYPES)
    ),
    "a batch cut out of the sequence": Case(
        (draw(32, 4, 4), draw(32, 2, 4), draw(32, 2, 4)), (P("a"),) * 3,
        lambda op: lambda q, k, v: op(*(x.reshape(2, 16, *x.shape[1:]) for x in (q, k, v)), is_causal=True),
    ),
}  # fmt: skip


def value_and_grad(case: Case, op):
    loss = lambda *arrays: jnp.sum(jnp.sin(case.program(op)(*arrays)))
    return jax.value_and_grad(loss, tuple(range(len(case.arrays))))


def dense_attention(*arrays, **options):
    return reference.dot_product_attention(*arrays, **options)[0]


@functools.cache
def oracle(case: Case, dense):
    """In float64; the same for every door. Attention's is compiled; the experts' needs its logits' values."""
    jit = jax.jit if dense is dense_attention else lambda fun: fun
    with jax.enable_x64(True):
        return jit(value_and_grad(case, dense))(*double(case.arrays))


def assert_case(case: Case, door, ours, dense):
    mesh = make_mesh(case.mesh, door.axis_type)
    got = door.jit(value_and_grad(case, ours))(*put(mesh, case.arrays, case.specs))
    want = oracle(case, dense)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, 1e-4)


def pairs(cases):
    return [pytest.param(case, door, id=f"{name}, {door}") for name, case in cases.items() for door in case.doors]


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize(("case", "door"), pairs(ATTENTION))
def test_attention(case, door):
    with no_cost_warnings():
        assert_case(case, door, ringmoe.dot_product_attention, dense_attention)


@pytest.mark.parametrize(
    "name", ["a slice", "a window, padded", "fewer tokens than devices", "one token", "other lengths"]
)
def test_it_stays_a_ring(name):
    case = ATTENTION[name]
    arrays = put(make_mesh(case.mesh, AxisType.Auto), case.arrays, case.specs)
    program = case.program(functools.partial(ringmoe.dot_product_attention, exchange="ring"))
    (row,) = ringmoe.explain(ringmoe.jit(program), *arrays).rows
    assert (row.exchange, row.axes) == ("ring", ("a",))


@pytest.mark.parametrize(
    "name", ["a slice", "a window, padded", "a batch cut out of the sequence", "axes in another order"]
)
def test_on_tpu_it_is_a_ring_of_kernels(name):
    """Padding and cut axes cost no gather and no kernel, forward or backward."""
    case, length = ATTENTION[name], 64
    mesh = tpu_mesh("v5e:2x4", case.mesh, AxisType.Auto)

    def big(x, spec):
        *rows, heads, _ = x.shape
        shape = (*rows[:-1], length * rows[-1], heads, 128)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    attend = functools.partial(ringmoe.dot_product_attention, exchange="ring")
    program = case.program(attend)
    if name.startswith("a batch"):
        program = lambda *arrays: attend(*(x.reshape(2, -1, *x.shape[1:]) for x in arrays))
    loss = lambda *arrays: jnp.sum(program(*arrays).astype(jnp.float32) ** 2)
    with no_cost_warnings():
        text = ringmoe.jit(jax.grad(loss, (0, 1, 2))).lower(*map(big, case.arrays, case.specs)).compile().as_text()
    assert "collective-permute" in collectives(text) and "tpu_custom_call" in text
    assert not collectives(text) & {"all-gather", "all-to-all"}


@pytest.mark.sampled
@pytest.mark.parametrize("door", [RINGMOE_JIT, PARTITIONER], ids=str)
@pytest.mark.parametrize("keys", [15, 11, 3])
@pytest.mark.parametrize("extra", ["bias", "mask", "segments"])
def test_columns_that_belong_to_padded_keys(extra, keys, door):
    """What stays whole along the keys (bias, mask, segments) is cut to each hop's keys, the last, padded block included."""
    q, k, v = qkv(t=16)
    bias = draw(1, 4, 16, 16)
    mask = (RNG.random((1, 1, 16, 16)) < 0.7) | (np.arange(16) == 0)
    ids = np.repeat(np.arange(8), 2)[None].repeat(2, 0).astype(np.int32)

    def program(op):
        def run(q, k, v, bias):
            k, v = k[:, :keys], v[:, :keys]
            if extra == "bias":
                return op(q, k, v, bias[..., :keys])
            if extra == "mask":
                return op(q, k, v, mask=mask[..., :keys])
            return op(q, k, v, query_segment_ids=ids, key_value_segment_ids=ids[:, :keys])

        return run

    case = Case((q, k, v, bias), (*SEQUENCE, P()), program)
    assert_case(case, door, ringmoe.dot_product_attention, dense_attention)


@pytest.mark.parametrize(
    ("length", "local", "device", "kept"), [(3, 1, 2, 1), (3, 1, 3, 0), (9, 2, 4, 1), (16, 2, 7, 2)]
)
def test_what_xla_pads_with_is_cleared(length, local, device, kept):
    """Under the partitioner a device past the end, or the last one, holds anything there: zeros reach the kernel."""
    rule = rules.make("attention", tuple((n, (1, length, 2, 4)) for n in ("query", "key", "value")), ("output",))
    partition = doors._Partition(None, rule, (), "cpu", {"operands": ("query", "key", "value")})
    clear = lambda x: partition._cleared(0, x, {"t": ("a",)}, {"a": 8})
    garbage = np.full((1, 8 * local, 2, 4), np.nan, np.float32)
    mesh = make_mesh((8,), AxisType.Auto)
    out = jax.shard_map(clear, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))(garbage)
    mine = np.asarray(out)[0, device * local : (device + 1) * local, 0, 0]
    assert np.isnan(mine[:kept]).all() and (mine[kept:] == 0).all()


@pytest.mark.parametrize("outside", [False, True])
def test_a_cut_axis_under_a_mesh_that_is_set(outside):
    """jax.set_mesh names the user's axes; an op placed along a part of one brings its own."""
    case = ATTENTION["a batch cut out of the sequence"]
    loss = lambda *arrays: jnp.sum(jnp.sin(case.program(ringmoe.dot_product_attention)(*arrays)))
    want = jax.jit(jax.grad(loss, (0, 1, 2)))(*case.arrays)
    mesh = make_mesh(case.mesh, AxisType.Auto)
    arrays = put(mesh, case.arrays, case.specs)
    with jax.set_mesh(mesh), no_cost_warnings():
        got = (
            jax.grad(ringmoe.jit(loss), (0, 1, 2))(*arrays)
            if outside
            else ringmoe.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
        )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 1e-5)


def layer(b=2, t=16, d=8, e=8, f=8):
    return draw(b, t, d), draw(d, e), draw(e, d, f) / 3, draw(e, f, d) / 3


def with_groups(group_size, e=8):
    return ringmoe.RouterConfig(e, top_k=2, group_size=group_size)


def ours(config):
    return lambda x, router, w_in, w_out: ringmoe.moe_ffn(x, router, w_in, w_out, config=config)[0]


@functools.cache
def dense(config):
    """Chooses by the same logits, in float32 as the router does."""

    def run(x, router, w_in, w_out):
        logits = np.asarray(
            jax.lax.stop_gradient(x).astype(np.float32) @ jax.lax.stop_gradient(router).astype(np.float32)
        )
        chosen = reference_moe.select(
            logits, top_k=2, capacity=config.capacity(config.group_size), group_size=config.group_size
        )
        return reference_moe.moe_ffn(x, router, w_in, w_out, selection=chosen)

    return run


EXPERTS = (P(None, "a"), P(), P("a"), P("a"))
SPREAD = {
    "tokens and the router's experts on one axis": (
        2, Case(layer(), (P(None, "a"), P(None, "a"), P("a"), P("a")), lambda op: op, doors=(TYPES, RINGMOE_JIT))),
    "x sharded over D": (
        2, Case(layer(), (P(None, None, "a"), P("a"), P("a"), P("a")), lambda op: op, doors=(TYPES, RINGMOE_JIT, PARTITIONER))),
    "x over T and D, the router over D and E": (
        2, Case(layer(), (P(None, "b", "a"), P("a", "b"), P("b"), P("b")), lambda op: op, mesh=(2, 4),
                doors=(TYPES, RINGMOE_JIT))),
    "a slice": (
        3, Case(layer(t=15), (P(), *EXPERTS[1:]), lambda op: lambda x, *w: op(x, *w), doors=(RINGMOE_JIT, PARTITIONER))),
    "six experts over four devices": (
        4, Case(layer(e=8), (P(None, "b"), P(), P("b"), P("b")),
                lambda op: lambda x, r, a, b: op(x, r[:, :6], a[:6], b[:6]), mesh=(2, 4))),
    "a hidden dim that four devices do not divide": (
        4, Case(layer(), (P("a"), P(), P(None, None, "b"), P(None, "b")),
                lambda op: lambda x, r, a, b: op(x, r, a[..., :7], b[:, :7]), mesh=(2, 4))),
    "a batch cut out of the tokens": (
        4, Case((draw(32, 8), *layer()[1:]), (P("a"), *EXPERTS[1:]), lambda op: lambda x, *w: op(x.reshape(2, 16, 8), *w))),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize(("size", "case", "door"), [
    pytest.param(size, case, door, id=f"{name}, {door}") for name, (size, case) in SPREAD.items() for door in case.doors
])  # fmt: skip
def test_experts(size, case, door):
    config = with_groups(size, 6 if "six" in str([n for n, c in SPREAD.items() if c[1] is case]) else 8)
    assert_case(case, door, ours(config), dense(config))


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT, PARTITIONER], ids=str)
def test_vmap_over_weights_that_are_sharded_along_the_mapped_dim(door):
    config, (x, router, w_in, w_out) = with_groups(4), layer()
    layers = tuple(np.stack([w, w[::-1]]) for w in (w_in, w_out))
    mesh = make_mesh((2, 4), door.axis_type)
    every = lambda op: lambda x, r, *ws: jax.vmap(lambda *w: op(x, r, *w))(*ws)
    specs = (P(None, "b"), P(), P("a", "b"), P("a", "b"))
    loss = lambda fun: lambda *arrays: jnp.sum(jnp.sin(fun(*arrays)))
    got = door.jit(jax.value_and_grad(loss(every(ours(config))), (0, 1, 2, 3)))(*put(mesh, (x, router, *layers), specs))
    each = lambda x, r, a, b: jnp.stack([dense(config)(x, r, a[i], b[i]) for i in range(2)])
    with jax.enable_x64(True):
        want = jax.value_and_grad(loss(each), (0, 1, 2, 3))(*double((x, router, *layers)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, 1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("inner", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("jit", [jax.jit, ringmoe.jit], ids=["jax.jit", "ringmoe.jit"])
@pytest.mark.parametrize("spec", [P("b", "a"), P(None, ("a", "b"))], ids=str)
def test_a_shard_map_over_one_axis_of_two(inner, jit, spec):
    """The other axis splits the batch, or the sequence again: its part of the ring is found, not the user's to name."""
    mesh, arrays = make_mesh((2, 4), inner), qkv(b=4)
    local = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, is_causal=True, axis_name="a")
    whole = jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"), axis_names={"a"})
    loss = lambda fun: lambda *arrays: jnp.sum(jnp.sin(fun(*arrays)))
    errors.forget_warnings()
    told = jit is jax.jit and inner == AxisType.Auto  # only XLA will know then what the other axis splits
    heard = pytest.warns(errors.CostWarning, match="^attention.* left to XLA: .* masked") if told else nullcontext()
    with jax.set_mesh(mesh), heard:
        got = jit(jax.value_and_grad(loss(whole), (0, 1, 2)))(*put(mesh, arrays, (spec,) * 3))
    with jax.enable_x64(True):
        dense = lambda q, k, v: dense_attention(q, k, v, is_causal=True)
        want = jax.jit(jax.value_and_grad(loss(dense), (0, 1, 2)))(*double(arrays))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, 1e-4)


def test_experts_in_a_shard_map_over_one_axis_of_two():
    mesh, config = make_mesh((2, 4), AxisType.Explicit), with_groups(4)
    arrays = layer(b=4)
    local = lambda x, r, a, b: ringmoe.moe_ffn(x, r, a, b, config=config, axis_name="a")[0]
    whole = jax.shard_map(
        local, mesh=mesh, in_specs=(P(None, "a"), P(), P("a"), P("a")), out_specs=P(None, "a"), axis_names={"a"}
    )
    loss = lambda fun: lambda *arrays: jnp.sum(jnp.sin(fun(*arrays)))
    with jax.set_mesh(mesh):
        placed = put(mesh, arrays, (P("b", "a"), P(), P("a"), P("a")))
        got = jax.jit(jax.value_and_grad(loss(whole), (0, 1, 2, 3)))(*placed)
    with jax.enable_x64(True):
        want = jax.value_and_grad(loss(dense(config)), (0, 1, 2, 3))(*double(arrays))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(g, w, 1e-4)


@pytest.mark.parametrize("door", [RINGMOE_JIT, PARTITIONER], ids=str)
def test_operands_on_two_meshes_of_the_same_devices(door):
    one, other = make_mesh((2, 4), AxisType.Auto), make_mesh((8,), AxisType.Auto, ("x",))
    q, k, v = qkv()
    placed = put(one, (q,), (P(None, ("a", "b")),)) + put(other, (k, v), (P(None, "x"),) * 2)
    fun = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, is_causal=True, exchange="ring")
    assert_close(door.jit(fun)(*placed), fun(q, k, v), 1e-5)
    if door is RINGMOE_JIT:
        assert [row.exchange for row in ringmoe.explain(door.jit(fun), *placed).rows] == ["ring"]


def test_a_program_under_plain_jit_says_how_it_could_be_serialized():
    mesh = make_mesh((8,), AxisType.Auto)
    arrays = put(mesh, qkv(), SEQUENCE)
    fun = lambda q, k, v: ringmoe.dot_product_attention(q, k, v, is_causal=True)
    with pytest.raises(TypeError, match=r"can't be exported or serialized.* ringmoe.jit .*Explicit"):
        serialize_executable.serialize(jax.jit(fun).lower(*arrays).compile())
    payload, *trees = serialize_executable.serialize(ringmoe.jit(fun).lower(*arrays).compile())
    loaded = serialize_executable.deserialize_and_load(
        payload, *trees, execution_devices=list(mesh.devices.reshape(-1))
    )
    assert_close(loaded(*arrays), fun(*qkv_of(arrays)), 1e-5)


def qkv_of(arrays):
    return tuple(np.asarray(x) for x in arrays)
