"""Sums of rows at given places, whose derivatives of every order are again such sums: the transpose of JAX's own gather is
a scatter, which is slow on TPUs, and which XLA's partitioner (jaxlib 0.11, 0.12) computes wrongly where it pads the indices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ringmoe import compat


def sum_of_rows(
    x: jax.Array, index: jax.Array, back: jax.Array, weight: jax.Array | None = None, dtype=None, starts=None
) -> jax.Array:
    """out[n] = sum over j of weight[n, j] * x[row of index[n, j]], in the order of j, summed in float32 or float64.

    Linear in x and in `weight` (None: 1). n runs over the leading dims of `index` [*n, k], m, the rows of x [*m, ...], over
    those of `back` [*m, l]: each has k or l places, and the two say which of the others' each is joined to. Both count places
    flat, over [*m, l] and [*n, k], and are each other's inverse; past the end, a place is joined to none, and adds 0. So the
    transpose is the same sum with the two exchanged, and needs no scatter. The result is in `dtype` (None: x's).

    `starts` [runs] int32 promises order: from each, a row of x, up to the next, the rows that are asked for lie without gaps
    and in the order of n, and none before the first. So a few neighbours of n need a stretch of each run, and a kernel can
    fetch those alone. None promises nothing.
    """
    starts = jnp.zeros(0, jnp.int32) if starts is None else starts
    operands = (x, index, back, starts) if weight is None else (x, index, back, starts, weight)
    return PRIMITIVE.bind(*compat.vary_alike(operands), mapped=0, dtype=jnp.dtype(dtype or x.dtype))


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first dim; 0 where the index is past the end."""
    return _rows_at(x, index, (0 <= index) & (index < x.shape[0]))


def _rows_at(x, index, there):
    """x[index] along the first dim; 0 where it isn't `there`."""
    found = _whole(x).at[jnp.where(there, index, 0)].get(mode="promise_in_bounds")
    return jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - 1)), found, 0)


def count_below(ascending: jax.Array, bounds: jax.Array) -> jax.Array:
    """How many of the numbers, which ascend, are less than each bound; by bisection.

    jnp.searchsorted (jax 0.12.0.1) fails inside a shard_map that checks what varies.
    """
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


def evaluate(x, index, back, starts, *weight, mapped, dtype):
    """The sum in XLA's operations."""

    def run(x, index, back, starts, *weight):
        acc = jnp.promote_types(x.dtype, jnp.float32)
        flat = x.reshape(-1, *x.shape[back.ndim - 1 :])
        row = lax.div(index, jnp.int32(back.shape[-1]))
        there = (0 <= row) & (row < flat.shape[0])  # of all places at once: on GPUs each comparison alone is a kernel
        terms = (_rows_at(flat, row[..., j], there[..., j]) for j in range(index.shape[-1]))
        if index.shape[-1] > 1 or weight:
            terms = (term.astype(acc) for term in terms)
        for w in weight:
            terms = (_times(term, w[..., j].astype(acc)) for j, term in enumerate(terms))
        return functools.reduce(jnp.add, terms).astype(dtype)

    for _ in range(mapped):
        run = jax.vmap(run)
    return run(x, index, back, starts, *weight)


def _times(x, scalars):
    return x * scalars.reshape(*scalars.shape, *(1,) * (x.ndim - scalars.ndim))


def _whole(x):
    """`x` whole along axes that are left to XLA inside a shard_map: jaxlib 0.12 dies of gathers from a split operand there."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or AxisType.Auto not in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _abstract_eval(x, index, back, starts, *weight, mapped, dtype):
    return x.update(shape=(*index.shape[:-1], *x.shape[back.ndim - 1 :]), dtype=dtype, weak_type=False)


def _jvp(primals, tangents, **params):
    x, index, back, starts, *_ = primals
    x_dot, _, _, _, *weight_dot = tangents
    moved = [] if type(x_dot) is ad.Zero else [PRIMITIVE.bind(x_dot, *primals[1:], **params)]
    moved += [PRIMITIVE.bind(x, index, back, starts, dot, **params) for dot in weight_dot if type(dot) is not ad.Zero]
    return PRIMITIVE.bind(*primals, **params), functools.reduce(jnp.add, moved)


def _transpose(cotangent, x, index, back, starts, *weight, mapped, dtype):
    """Of the one operand that is linear. Places change sides: a weight goes to where the place that it stands at leads."""
    linear = x if ad.is_undefined_primal(x) else weight[0]
    unordered = starts[..., :0]
    bind = functools.partial(PRIMITIVE.bind, mapped=mapped, dtype=linear.aval.dtype)
    if type(cotangent) is ad.Zero:
        moved = ad.Zero(linear.aval)
    elif linear is x:
        weight_there = (bind(w, back[..., None], index[..., None], unordered, dtype=w.dtype) for w in weight)
        moved = bind(cotangent, back, index, unordered, *weight_there)
    else:
        moved = _products(cotangent, x, index, back, unordered, mapped).astype(linear.aval.dtype)
    constant = [None] * 3
    return [moved, *constant, *(None for _ in weight)] if linear is x else [None, *constant, moved]


def _products(y, x, index, back, unordered, mapped):
    """[*n, k]: of each place, the product of row n of y and the row of x that it is joined to."""
    k, size, acc = index.shape[-1], math.prod(index.shape[mapped:-1]), jnp.promote_types(x.dtype, jnp.float32)
    products = []
    for j in range(k):  # one choice of all n at a time, whose places are counted by n alone
        back_j = jnp.where(lax.rem(back, jnp.int32(k)) == j, lax.div(back, jnp.int32(k)), size)
        row = PRIMITIVE.bind(x, index[..., j, None], back_j, unordered, mapped=mapped, dtype=x.dtype)
        products.append(jnp.sum(row.astype(acc) * y.astype(acc), axis=tuple(range(index.ndim - 1, y.ndim))))
    return jnp.stack(products, axis=-1)


PRIMITIVE = Primitive("ringmoe_sum_of_rows")
PRIMITIVE.def_impl(evaluate)
PRIMITIVE.def_abstract_eval(_abstract_eval)
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(evaluate, multiple_results=False))
ad.primitive_jvps[PRIMITIVE] = _jvp
ad.primitive_transposes[PRIMITIVE] = _transpose
batching.primitive_batchers[PRIMITIVE] = functools.partial(compat.batch_in_front, PRIMITIVE)
