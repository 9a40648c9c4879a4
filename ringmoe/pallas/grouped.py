"""Matmuls of rows that are sorted by expert, each with the weights of its own expert; a row costs its own work alone.

    times(x, w, counts)[n] = x[n] w[e]         x [n, D], w [e, D, F] -> [n, F]
    back(g, w, counts)[n]  = g[n] w[e]^T       g [n, F], w [e, D, F] -> [n, D]
    outer(x, g, counts)[e] = sum x[n]^T g[n]   x [n, D], g [n, F]    -> [e, D, F]

`counts` [e] int32: the first counts[0] rows are of expert 0, and so on. Rows past the last expert's may hold anything and
give anything; nobody's sum has them. Accumulated and given in float32 (float64). The three are each other's derivatives, of
every order, so one primitive holds them, and its lowering is the one place that knows how a platform does it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from ringmoe import compat
from ringmoe.errors import warn_once
from ringmoe.pallas import grouped_gpu
from ringmoe.pallas.hopper import is_hopper

TILE = 256  # rows that are multiplied at once, where they go tile by tile; as often are the weights read

_ROWS = {"times": (((1,), (1,)), 2), "back": (((1,), (2,)), 1)}  # contracted dims, and which dim of w is a row's length
# The gradients of kind(a, b) given the cotangent ct: (kind, operands) for a and for b.
_GRADIENTS = {
    "times": lambda a, b, ct: (("back", ct, b), ("outer", a, ct)),
    "back": lambda a, b, ct: (("times", ct, b), ("outer", ct, a)),
    "outer": lambda a, b, ct: (("back", b, ct), ("times", a, ct)),
}


def times(x: jax.Array, w: jax.Array, counts: jax.Array) -> jax.Array:
    """Every row times its expert's matrix."""
    return _bind("times", x, w, counts)


def back(g: jax.Array, w: jax.Array, counts: jax.Array) -> jax.Array:
    """Every row times its expert's matrix, transposed."""
    return _bind("back", g, w, counts)


def outer(x: jax.Array, g: jax.Array, counts: jax.Array) -> jax.Array:
    """For every expert the sum of the outer products of its rows."""
    return _bind("outer", x, g, counts)


def _bind(kind, a, b, counts, dtype=None, mapped=0):
    dtype = dtype or jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return PRIMITIVE.bind(*compat.vary_alike((a, b, counts)), kind=kind, dtype=dtype, mapped=mapped)


def _abstract_eval(a, b, counts, *, kind, dtype, mapped):
    x, y = a.shape[mapped:], b.shape[mapped:]
    shape = (counts.shape[-1], x[1], y[1]) if kind == "outer" else (x[0], y[_ROWS[kind][1]])
    return a.update(shape=(*a.shape[:mapped], *shape), dtype=dtype, weak_type=False)


def _evaluate(run, a, b, counts, *, kind, dtype, mapped):
    common = jnp.promote_types(a.dtype, b.dtype)
    of_one = lambda arrays: run(kind, arrays[0].astype(common), arrays[1].astype(common), arrays[2]).astype(dtype)
    for _ in range(mapped):
        of_one = functools.partial(lax.map, of_one)
    return of_one((a, b, counts))


def _ragged(kind, a, b, counts):
    """By XLA's own ragged matmul, which on TPUs is a kernel."""
    contracted, group = (((0,), (0,)), []) if kind == "outer" else (_ROWS[kind][0], [0])
    dims = lax.RaggedDotDimensionNumbers((contracted, ((), ())), [0], group)
    acc = jnp.promote_types(a.dtype, jnp.float32)
    return lax.ragged_dot_general(a, b, counts, dims, preferred_element_type=acc)


def _tiled(kind, a, b, counts):
    """Tile by tile, where XLA's ragged matmul multiplies every row with every expert: on CPUs, and (jaxlib 0.12) on GPUs.

    A tile begins with an expert's row, or goes back from the very last one; of the rows before and after the expert's own
    it changes nothing.
    """
    acc, tile = jnp.promote_types(a.dtype, jnp.float32), min(TILE, a.shape[0])
    ends, tiles = jnp.cumsum(counts), -(-counts // tile)
    tiles_ends = jnp.cumsum(tiles)
    width = b.shape[1] if kind == "outer" else b.shape[_ROWS[kind][1]]
    shape = (counts.size, a.shape[1], width) if kind == "outer" else (a.shape[0], width)

    def step(i, out):
        e = jnp.sum(tiles_ends <= i, dtype=jnp.int32)
        first = ends[e] - counts[e] + (i - tiles_ends[e] + tiles[e]) * tile
        start = jnp.minimum(first, a.shape[0] - tile)
        row = start + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        mine = (first <= row) & (row < ends[e])
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, tile)
        if kind == "outer":
            y = _dot(jnp.where(mine, cut(a), 0), jnp.where(mine, cut(b), 0), ((0,), (0,)), acc)
            return lax.dynamic_update_index_in_dim(out, out[e] + y, e, 0)
        y = _dot(cut(a), lax.dynamic_index_in_dim(b, e, keepdims=False), ((1,), (2 - _ROWS[kind][1],)), acc)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, cut(out)), start, 0)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and AxisType.Auto in mesh.axis_types:
        steps = jnp.int32(counts.size + a.shape[0] // tile)  # what XLA may send in there must happen on every device
    else:
        steps = tiles_ends[-1]
    # A zero that is not there before `a` is: XLA would fill the result's memory at the very beginning.
    zero = (a[0, 0] > jnp.inf).astype(acc)
    return lax.fori_loop(jnp.int32(0), steps, step, jnp.full(shape, zero))


def _dot(a, b, contracted, acc):
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=acc)


def _jvp(primals, tangents, **params):
    (a, b, counts), (da, db, _) = primals, tangents
    moves = [(da, b)] * (type(da) is not ad.Zero) + [(a, db)] * (type(db) is not ad.Zero)
    moved = (PRIMITIVE.bind(*pair, counts, **params) for pair in moves)
    return PRIMITIVE.bind(*primals, **params), functools.reduce(ad.add_tangents, moved)


def _transpose(cotangent, a, b, counts, *, kind, dtype, mapped):
    del dtype
    at = 0 if ad.is_undefined_primal(a) else 1
    aval = (a, b)[at].aval
    if type(cotangent) is ad.Zero:
        grad = ad.Zero(aval)
    else:
        of, left, right = _GRADIENTS[kind](a, b, cotangent)[at]
        grad = _bind(of, left, right, counts, aval.dtype, mapped)
    return [grad if i == at else None for i in range(3)]


def _lowering(run):
    return mlir.lower_fun(functools.partial(_evaluate, run), multiple_results=False)


def _lower_on_cuda(ctx, *operands, mapped, dtype, **params):
    """A kernel where there is one for the GPU, and XLA may not have to partition it; tile by tile elsewhere."""
    (a, b, _), run = ctx.avals_in, _tiled
    if not mapped and compat.is_of_one_device(ctx) and is_hopper(compat.device_kind(ctx)):
        try:
            grouped_gpu.check(a, b, dtype)
            run = functools.partial(grouped_gpu.matmul, dtype=dtype)
        except NotImplementedError as refusal:
            warn_once("matmuls of sorted rows", f"one goes tile by tile instead of through a faster kernel: {refusal}")
    run = functools.partial(_evaluate, run, mapped=mapped, dtype=dtype, **params)
    return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)


PRIMITIVE = Primitive("ringmoe_grouped_matmul")
PRIMITIVE.def_impl(lambda *arrays, **params: jax.jit(functools.partial(PRIMITIVE.bind, **params))(*arrays))
PRIMITIVE.def_abstract_eval(_abstract_eval)
mlir.register_lowering(PRIMITIVE, _lowering(_tiled))
mlir.register_lowering(PRIMITIVE, _lowering(_ragged), platform="tpu")
mlir.register_lowering(PRIMITIVE, _lower_on_cuda, platform="cuda")
ad.primitive_jvps[PRIMITIVE] = _jvp
ad.primitive_transposes[PRIMITIVE] = _transpose
batching.primitive_batchers[PRIMITIVE] = functools.partial(compat.batch_in_front, PRIMITIVE)
