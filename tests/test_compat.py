"""Tells when the private or unstable pieces of JAX that ringmoe leans on have moved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import sdy
from jax.interpreters import mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ringmoe import compat, meshes
from tests.helpers import make_mesh

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("spec", [P(), P("b"), P(None, ("b", "a"))], ids=str)
def test_the_partitioner_is_asked_with_shardings_that_can_be_read(spec):
    """In a lowering rule: a device assignment of the right size, and what custom_partitioning hands over undecoded."""
    seen = []
    call = custom_partitioning(lambda x: x)

    def partition(mesh, operands, result):
        (x,) = operands
        seen.append((x.sharding.num_devices, compat.digits_of(x.sharding, 2)))
        fine, (axes,) = meshes.refine({"n": 8}, [seen[-1][1]])
        place = jax.NamedSharding(fine, P(*(a or None for a in axes)))
        return fine, lambda x: x + 1, place, (place,)

    call.def_partition(partition=partition, decode_shardings=False, sharding_rule="i j -> i j")
    primitive = Primitive("ringmoe_compat_devices")
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(
        primitive, lambda ctx, x: mlir.lower_fun(call, multiple_results=False)(compat.with_device_assignment(ctx), x)
    )
    mesh = make_mesh((2, 4), AxisType.Auto)
    x = jax.device_put(jnp.zeros((8, 8)), jax.NamedSharding(mesh, spec))
    np.testing.assert_array_equal(jax.jit(primitive.bind)(x), np.ones((8, 8)))
    digits = {P(): ((), ()), P("b"): (((4, 1),), ()), P(None, ("b", "a")): ((), ((4, 1), (2, 4)))}
    assert seen[-1] == (8, digits[spec])


def test_a_lowering_rule_can_tell_the_kind_of_device():
    """From a mesh, real or abstract, and from the backend of a program of one device; not where no device is known."""
    seen = []

    def rule(ctx, x):
        seen.append(compat.device_kind(ctx))
        return [x]

    primitive = Primitive("ringmoe_compat_kind")
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, rule)
    mesh = make_mesh((2, 4), AxisType.Auto)
    unknown = jax.sharding.AbstractMesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x, kind = jnp.zeros((8, 8)), jax.devices()[0].device_kind
    jax.jit(primitive.bind).lower(x)
    for around in (mesh, mesh.abstract_mesh, unknown):
        over = jax.shard_map(primitive.bind, mesh=around, in_specs=P("a"), out_specs=P("a"))
        jax.jit(over).trace(x).lower(lowering_platforms=("cpu",))
    assert kind and seen == [kind, kind, kind, ""]


def test_jax_refuses_to_permute_over_axes_in_another_order_than_the_meshs():
    """On every JAX we support it raises, rather than permute along the wrong circle: a ring sorts its axes (plan/base.py)."""
    mesh = make_mesh((2, 4), AxisType.Auto)
    turn = lambda x: jax.lax.ppermute(x, ("b", "a"), [(i, (i + 1) % 8) for i in range(8)])
    turned = jax.shard_map(turn, mesh=mesh, in_specs=P(("b", "a")), out_specs=P(("b", "a")))
    with pytest.raises(RuntimeError, match="same order as the axis_names declared on the mesh"):
        jax.jit(turned).lower(jnp.arange(8.0))


def test_the_array_behind_an_eager_gradients_tracer():
    seen = []

    def fun(x):
        seen.append(compat.concrete(x))
        return jnp.sum(x * x)

    x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(make_mesh((8,), AxisType.Auto), P("a")))
    jax.grad(fun)(x)
    jax.jvp(fun, (x,), (x,))
    assert [y.sharding for y in seen] == [x.sharding] * 2
    jax.jit(jax.grad(fun))(x)
    jax.vmap(fun)(x[None])
    assert seen[2:] == [None, None]
    assert compat.concrete(x) is x


def varying(x):
    return set(jax.typeof(x).manual_axis_type.varying)


def test_arrays_are_marked_as_varying_alike():
    mesh = make_mesh((2, 4), AxisType.Auto)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("a"), P("b"), P()), out_specs=P("a", "b"))
    def local(x, y, z):
        assert (varying(x), varying(y), varying(z)) == ({"a"}, {"b"}, set())
        x, y, (z, nothing) = compat.vary_alike((x, y, (z, None)))
        assert nothing is None and varying(x) == varying(y) == varying(z) == {"a", "b"}
        return x[:, None] + y[None, :] + z

    want = np.arange(2)[:, None] + np.arange(4) + 1.0
    np.testing.assert_array_equal(local(jnp.arange(2.0), jnp.arange(4.0), jnp.float32(1)), want)


def test_outside_a_shard_map_nothing_is_marked():
    x = jnp.zeros(3)
    assert compat.vary_alike((x, None))[0] is x


def test_shardys_propagation_pipeline_is_registered():
    mesh = make_mesh((8,), AxisType.Auto)
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P("a")))
    module = jax.jit(lambda x: x + 1).lower(x).compiler_ir("stablehlo")
    with module.context:
        passmanager.PassManager.parse("builtin.module(sdy-propagation-pipeline)").run(module.operation)
    assert "sdy.sharding" in str(module)


def test_shardys_attributes_are_readable():
    mesh = make_mesh((8,), AxisType.Auto)
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "a")))
    module = jax.jit(lambda x: x).lower(x).compiler_ir("stablehlo")
    main = module.body.operations[-1]
    assert isinstance(main.operation.context, ir.Context)
    sharding = sdy.TensorShardingAttr(ir.DictAttr(main.attributes["arg_attrs"][0])["sdy.sharding"])
    dims = [
        [sdy.AxisRefAttr(axis).name for axis in sdy.DimensionShardingAttr(dim).axes]
        for dim in sharding.dimension_shardings
    ]
    assert dims == [[], ["a"]]


@pytest.mark.parametrize("name", ["a", ("a",), None])
def test_axis_names_are_those_of_the_enclosing_shard_map(name):
    mesh = make_mesh((8,), AxisType.Auto)

    def local(x):
        assert compat.check_axis_name(name) == (() if name is None else ("a",))
        return x

    jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a")), jnp.zeros(8))
