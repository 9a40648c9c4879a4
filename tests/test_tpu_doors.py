"""Every door that exists on TPU, compiled by TPU's own compiler for four machines: forward and gradient of both ops."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import errors
from ringmoe.pallas import attention_tpu, tiles_tpu
from tests.helpers import MANUAL_VMA, RINGMOE_JIT, TYPES, collectives, no_cost_warnings, tpu_devices, tpu_mesh

TARGETS = {"v5e:2x4": (2, 4), "v5p:2x2x2": (2, 4), "v6e:2x4": (2, 4), "tpu7x:2x2x2": (4, 4)}
DOORS = {target: (TYPES, RINGMOE_JIT) for target in TARGETS} | {"v5p:2x2x2": (TYPES, RINGMOE_JIT, MANUAL_VMA)}
CASES = [(target, door) for target in TARGETS for door in DOORS[target]]
pytestmark = pytest.mark.oldest
every_target = pytest.mark.parametrize(("target", "door"), CASES, ids=str)

TOKENS, HEADS, KEY_HEADS, HEAD, MODEL, HIDDEN, EXPERTS = 512, 4, 2, 128, 128, 256, 8
SPEC = P("a", "b")


def shape_of(mesh, shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compiled_text(door, fun, mesh, arrays, in_specs, out_specs):
    """Of value and gradients of the sum of squares of `fun`."""
    if door.check_vma is not None:
        fun = jax.shard_map(functools.partial(fun, axis_name="b"), mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    loss = lambda *arrays: jnp.sum(fun(*arrays).astype(jnp.float32) ** 2)
    both = jax.value_and_grad(loss, tuple(range(len(arrays))))
    return door.jit(fun).lower(*arrays).compile().as_text(), door.jit(both).lower(*arrays).compile().as_text()


@pytest.mark.sampled
@every_target
def test_attention(target, door):
    mesh = tpu_mesh(target, TARGETS[target], door.axis_type)
    arrays = [shape_of(mesh, (4, TOKENS, n, HEAD), SPEC) for n in (HEADS, KEY_HEADS, KEY_HEADS)]

    def fun(q, k, v, axis_name=None):
        return ringmoe.dot_product_attention(q, k, v, is_causal=True, axis_name=axis_name, exchange="ring")

    for direction, text in zip(("forward", "gradient"), compiled_text(door, fun, mesh, arrays, (SPEC,) * 3, SPEC)):
        assert "tpu_custom_call" in text, f"{direction}: no Pallas kernel"
        assert "collective-permute" in collectives(text), f"{direction}: {collectives(text)}"
        assert not collectives(text) & {"all-gather", "all-to-all"}, f"{direction}: {collectives(text)}"


@pytest.mark.sampled
@every_target
def test_experts(target, door):
    mesh = tpu_mesh(target, TARGETS[target], door.axis_type)
    shapes = (4, TOKENS, MODEL), (MODEL, EXPERTS), (EXPERTS, MODEL, HIDDEN), (EXPERTS, HIDDEN, MODEL)
    specs = SPEC, P(), P("b"), P("b")
    arrays = [shape_of(mesh, shape, spec) for shape, spec in zip(shapes, specs)]
    config = ringmoe.RouterConfig(EXPERTS, group_size=64)

    def fun(x, router, w_in, w_out, axis_name=None):
        return ringmoe.moe_ffn(x, router, w_in, w_out, config=config, axis_name=axis_name)[0]

    for direction, text in zip(("forward", "gradient"), compiled_text(door, fun, mesh, arrays, specs, SPEC)):
        assert "all-to-all" in collectives(text), f"{direction}: {collectives(text)}"
        # Weights of E / P experts a device stay where they are; nothing of their size is gathered.
        assert f"bf16[{EXPERTS},{MODEL},{HIDDEN}]" not in text, f"{direction}: a whole weight appears"


def test_plain_jit_falls_back_and_says_so():
    mesh = tpu_mesh("v5e:2x4", (2, 4), AxisType.Auto)
    arrays = [shape_of(mesh, (4, TOKENS, HEADS, HEAD), SPEC)] * 3
    errors.forget_warnings()
    with pytest.warns(
        errors.CostWarning,
        match=r"attention gathered: on tpu .* compile with ringmoe.jit .*, or make the mesh axes Explicit",
    ):
        text = (
            jax.jit(lambda q, k, v: ringmoe.dot_product_attention(q, k, v, is_causal=True))
            .lower(*arrays)
            .compile()
            .as_text()
        )
    assert "CustomSPMDPartitioning" not in text and "tpu_custom_call" not in text
    assert math.prod(mesh.devices.shape) == 8


def test_a_call_the_tpu_kernel_lacks_takes_the_other_and_says_so():
    """Heads wider than its memory: the XLA kernel runs, in the same ring, with a warning by name."""
    mesh = tpu_mesh("v5e:2x4", (2, 4), AxisType.Explicit)
    arrays = [shape_of(mesh, (4, TOKENS, HEADS, 640), SPEC)] * 3
    attend = functools.partial(ringmoe.dot_product_attention, exchange="ring")
    loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32))
    errors.forget_warnings()
    with pytest.warns(
        errors.CostWarning, match=r"attention on tpu: the xla kernel runs .*head dims 640 and 640, supported: up to 576"
    ):
        lowered = jax.jit(jax.grad(loss)).lower(*arrays)
    text = lowered.compile().as_text()
    assert "collective-permute" in collectives(text) and "all-gather" not in collectives(text)


@pytest.mark.parametrize("door", ["types", "one device"])
@pytest.mark.parametrize("target", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2"])
def test_a_kernel_takes_the_blocks_of_its_chip(target, door):
    chips = []
    best = lambda direction, spec, *arrays: chips.append(spec.chip) or tiles_tpu.best(direction, spec, *arrays)
    if door == "types":
        x = shape_of(tpu_mesh(target, (len(tpu_devices(target)),), AxisType.Explicit), (2, 1024, 2, 128), P(None, "a"))
    else:
        sharding = SingleDeviceSharding(tpu_devices(target)[0])
        x = jax.ShapeDtypeStruct((2, 1024, 2, 128), jnp.bfloat16, sharding=sharding)
    with mock.patch.object(attention_tpu, "best", best):
        jax.jit(ringmoe.dot_product_attention).lower(x, x, x)
    assert {*chips} == {target.split(":")[0]}


@pytest.mark.sampled
@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 256), ("float32", 256)])
def test_a_gradient_of_many_tokens_has_room_on_the_smallest_chip(dtype, head_dim):
    """A v4's VMEM is 16 MiB, which the gradients of that many queries alone would fill."""
    mesh = tpu_mesh("v4:2x2x1", (8,), AxisType.Explicit)
    x = jax.ShapeDtypeStruct((1, 8 * 16384, 1, head_dim), dtype, sharding=NamedSharding(mesh, P(None, "a")))
    loss = lambda *qkv: ringmoe.dot_product_attention(*qkv, exchange="ring", is_causal=True).astype(jnp.float32).sum()
    jax.jit(jax.grad(loss)).lower(x, x, x).compile()


@pytest.mark.sampled
@pytest.mark.parametrize(("tokens", "kernel"), [(256, "forward"), (64, "forward"), (8, "decode"), (1, "decode")])
def test_a_cache_is_attended_to_by_the_kernel_for_so_many_tokens(tokens, kernel):
    """Without a warning; none gathers the cache."""
    mesh = tpu_mesh("v5e:2x4", (2, 4), AxisType.Explicit)
    cache = shape_of(mesh, (2, 8192, 2, 128), P("a", "b"))
    query, lengths = shape_of(mesh, (2, tokens, 8, 128), P("a")), shape_of(mesh, (2,), P("a"), jnp.int32)
    with no_cost_warnings():
        text = jax.jit(ringmoe.decode_attention).lower(query, cache, cache, lengths).compile().as_text()
    assert {name for name in ("forward", "decode") if f"ringmoe_attention_{name}" in text} == {*filter(None, (kernel,))}
    assert "all-gather" not in collectives(text)
