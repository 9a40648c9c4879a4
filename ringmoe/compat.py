"""The only module that touches JAX's private parts, each with the reason; tests/test_compat.py tells when one moves."""

import jax
from jax._src import dispatch
from jax.extend.core import Primitive

from ringmoe.errors import check


def require_devices(primitive: Primitive) -> None:
    """Has JAX hand the device assignment to this primitive's lowering rule.

    `custom_partitioning` needs it there, and JAX gives it only to jaxprs that hold a primitive of this private set.
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


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
