"""The only module that touches JAX's private parts, each with the reason; tests/test_compat.py tells when one moves."""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax._src.mesh import get_concrete_mesh
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh

from ringmoe import meshes
from ringmoe.errors import check


def vary_alike(tree):
    """Inside a shard_map that checks it, marks every array as varying over all the axes that any of them varies over.

    The mark's transpose is the sum over those axes that a replicated operand's gradient needs. `manual_axis_type` has no
    public name yet.
    """
    varying = lambda x: frozenset(jax.typeof(x).manual_axis_type.varying)
    every = frozenset().union(*(varying(x) for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(sorted(every - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def unmarked(x):
    """`x`, marked as varying over no axis: a Pallas kernel refuses a Ref that is, inside a shard_map that checks it."""
    return _UNMARKED.bind(x)


_UNMARKED = Primitive("ringmoe_unmarked")
_UNMARKED.def_impl(lambda x: x)
_UNMARKED.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_UNMARKED, lambda ctx, x: [x])


def check_axis_name(axis_name) -> tuple[str, ...]:
    """The axes as a tuple, checked to be manual here."""
    axes = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for axis in axes:
        check(
            axis in manual,
            f"{axis_name=}, expected axes of an enclosing jax.shard_map, which here are {tuple(manual)}; outside a "
            "shard_map leave axis_name out: shardings are found by themselves",
        )
    return axes


def varies(tree) -> bool:
    """Whether any array is marked as varying over some axis: inside a shard_map that checks it."""
    return any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))


def digits_of(sharding, ndim: int) -> meshes.Digits | None:
    """A sharding of XLA's as digits of the device number, by dim; None where no digits tell.

    `custom_partitioning` hands over XLA's tilings, when it is asked not to decode them, in an object without public ways in.
    """
    tiling = sharding._to_xla_hlo_sharding(ndim)
    if tiling.is_replicated():
        return ((),) * ndim
    if not tiling.is_tiled() or tiling.subgroup_types():
        return None
    tiles = np.array(tiling.tile_assignment_devices()).reshape(tiling.tile_assignment_dimensions())
    digits = meshes.of_tiles(tiles)
    return None if digits is None else digits[:ndim]


def with_device_assignment(ctx):
    """A lowering context in which `custom_partitioning` finds as many devices as the program runs on.

    JAX tells a lowering rule the devices only for jaxprs with a primitive of a private set, and refuses such jaxprs operands
    on two meshes. Undecoded shardings ask the devices nothing, so any will do.
    """
    axes = ctx.module_context.axis_context
    devices = (jax.local_devices(backend="cpu")[0],) * axes.num_devices
    axes = dataclasses.replace(axes, device_assignment=devices, abstract_mesh=None)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=axes))


def batch_in_front(primitive, arrays, dims, *, mapped, **params):
    """vmap of a primitive that counts, in `mapped`, the dims that all of its operands have in front."""
    (length,) = {x.shape[dim] for x, dim in zip(arrays, dims) if dim is not None}
    lead = lambda x, dim: jnp.broadcast_to(x[None], (length, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    return primitive.bind(*map(lead, arrays, dims), mapped=mapped + 1, **params), 0


def is_of_one_device(ctx) -> bool:
    """Whether what is lowered is one device's own program: the only one there is, or inside a shard_map of all axes.

    XLA can't partition a Pallas kernel, and JAX refuses to lower one anywhere else.
    """
    axes = ctx.module_context.axis_context
    if not hasattr(axes, "manual_axes"):
        return getattr(axes, "num_devices", None) == 1
    return axes.manual_axes | set(axes.mesh.manual_axes) == set(axes.mesh.axis_names)


def num_devices(ctx) -> int:
    """Of the program that is lowered; 1 where JAX doesn't tell."""
    axes = ctx.module_context.axis_context
    return axes.mesh.size if hasattr(axes, "mesh") else getattr(axes, "num_devices", None) or 1


def device_kind(ctx) -> str:
    """What kind of device is lowered for, real or one that only compiles; empty where JAX doesn't tell.

    A mesh tells it, and a program of one device has only its backend.
    """
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].device_kind
    if mesh is not None:
        return getattr(mesh.abstract_device, "device_kind", "")
    backend = ctx.module_context.backend
    return backend.devices()[0].device_kind if backend else ""


def in_the_mesh_that_is_set(mesh: AbstractMesh) -> AbstractMesh | Mesh:
    """`mesh`, made of the devices of the mesh that `jax.set_mesh` set, if that is one of other axes.

    A shard_map over an abstract mesh is lowered with the axes of the concrete mesh that is set, and finds a finer mesh's
    axes unbound. What is set can't be asked for inside a trace.
    """
    outer = with_its_devices(mesh)
    if not isinstance(outer, Mesh) or outer.shape == mesh.shape:
        return mesh
    return Mesh(outer.devices.reshape(mesh.axis_sizes), mesh.axis_names, axis_types=mesh.axis_types)


def with_its_devices(mesh: AbstractMesh) -> AbstractMesh | Mesh:
    """The mesh that `jax.set_mesh` set, where it has as many devices as `mesh`, which doesn't tell its own."""
    outer = get_concrete_mesh()
    return mesh if outer.empty or outer.size != mesh.size else outer


def concrete(x):
    """The array behind a tracer of an eager `jax.grad` or `jax.vjp`; None where only an outer jit will know it.

    A gradient is taken of a value that is there, so its sharding can be asked for; tracers have no public way to it.
    """
    return x.to_concrete_value() if isinstance(x, jax.core.Tracer) else x
