"""Which kernel sums rows on TPU: the primitive of `schedule/gather.py` has its rules there, and here its lowering."""

import functools

import jax
from jax import lax
from jax.interpreters import mlir

from ringmoe import compat
from ringmoe.pallas import rows_tpu
from ringmoe.schedule import gather


def lower_on_tpu(ctx, *operands, mapped, dtype):
    """The kernel where it is the faster one, and XLA may not have to partition it; XLA's own gathers elsewhere."""
    run = functools.partial(gather.evaluate, mapped=mapped, dtype=dtype)
    if not mapped and compat.is_of_one_device(ctx):
        x, row, _ = jax.eval_shape(_flat, *ctx.avals_in)
        try:
            rows_tpu.check(x, row, dtype)
        except NotImplementedError:
            pass
        else:
            run = functools.partial(_kernel, dtype)
    return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)


def _flat(x, index, back, weight=None):
    """x [m, ...], the rows of it [n, k] that are summed, and their weights."""
    flat = lambda a: a.reshape(-1, a.shape[-1])
    row = lax.div(flat(index), back.dtype.type(back.shape[-1]))
    return x.reshape(-1, *x.shape[back.ndim - 1 :]), row, None if weight is None else flat(weight)


def _kernel(dtype, x, index, back, *weight):
    y = rows_tpu.sum_of_rows(*_flat(x, index, back, *weight), dtype)
    return y.reshape(*index.shape[:-1], -1)
