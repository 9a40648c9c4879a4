"""Sums of rows at given places, whose derivatives of every order are again such sums: the transpose of JAX's own gather is
a scatter, which is slow on TPUs, and which XLA's partitioner (jaxlib 0.11, 0.12) computes wrongly where it pads the indices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ringmoe import compat


def sum_of_rows(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """out[n] = sum over j of x[index[n, j]], summed in float32 or float64 and in x's dtype; linear in x.

    n runs over the leading dims of `index` [*n, k], m, the places in x [*m, ...], over those of `back` [*m, l]; an index
    counts them flat, and past the end stands for a row of zeros. `back` is the inverse of `index`: m occurs in index[n] as
    often as n in back[m]. So the transpose is the same sum with the two exchanged, and needs no scatter.
    """
    return PRIMITIVE.bind(*compat.vary_alike((x, index, back)), mapped=0)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first dim; 0 where the index is past the end."""
    return _whole(x).at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def count_below(ascending: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many of the numbers, which ascend, are less than each bound; by bisection."""
    below = jnp.zeros_like(bounds)
    for bit in reversed(range(ascending.size.bit_length())):
        probe = below + (1 << bit)
        less = (probe <= ascending.size) & (take(ascending, probe - 1) < bounds)
        below = jnp.where(less, probe, below)
    return below


def staircase(starts: jax.Array, heights: jax.Array, at: jax.Array) -> jax.Array:
    """heights[q] of the last start that is not past each number of `at`; starts ascend, and the first is not past any."""
    rises = jnp.diff(heights, prepend=jnp.zeros(1, heights.dtype))
    return jnp.sum(jnp.where(at[..., None] >= starts, rises, 0), axis=-1, dtype=heights.dtype)


def _evaluate(x, index, back, *, mapped):
    def run(x, index, back):
        acc = jnp.promote_types(x.dtype, jnp.float32)
        flat = x.reshape(-1, *x.shape[back.ndim - 1 :])
        if index.shape[-1] == 1:
            return take(flat, index[..., 0])
        rows = (take(flat, index[..., j]).astype(acc) for j in range(index.shape[-1]))
        return functools.reduce(jnp.add, rows).astype(x.dtype)

    for _ in range(mapped):
        run = jax.vmap(run)
    return run(x, index, back)


def _whole(x):
    """`x` whole along axes that are left to XLA inside a shard_map: jaxlib 0.12 dies of gathers from a split operand there."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or AxisType.Auto not in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _abstract_eval(x, index, back, *, mapped):
    return x.update(shape=(*index.shape[:-1], *x.shape[back.ndim - 1 :]), weak_type=False)


def _jvp(primals, tangents, **params):
    moved = PRIMITIVE.bind(ad.instantiate_zeros(tangents[0]), *primals[1:], **params)
    return PRIMITIVE.bind(*primals, **params), moved


def _transpose(cotangent, x, index, back, **params):
    zero = type(cotangent) is ad.Zero
    return [ad.Zero(x.aval) if zero else PRIMITIVE.bind(cotangent, back, index, **params), None, None]


def _batch(arrays, dims, *, mapped):
    (length,) = {x.shape[dim] for x, dim in zip(arrays, dims) if dim is not None}
    lead = lambda x, dim: jnp.broadcast_to(x[None], (length, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    return PRIMITIVE.bind(*map(lead, arrays, dims), mapped=mapped + 1), 0


PRIMITIVE = Primitive("ringmoe_sum_of_rows")
PRIMITIVE.def_impl(_evaluate)
PRIMITIVE.def_abstract_eval(_abstract_eval)
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(_evaluate, multiple_results=False))
ad.primitive_jvps[PRIMITIVE] = _jvp
ad.primitive_transposes[PRIMITIVE] = _transpose
batching.primitive_batchers[PRIMITIVE] = _batch
