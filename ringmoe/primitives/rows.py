"""Which kernel sums rows: the primitive of `schedule/gather.py` has its rules there, and here its lowering."""

import functools

import jax
from jax import lax
from jax.interpreters import mlir

from ringmoe import compat
from ringmoe.pallas import rows_gpu, rows_tpu, runs_tpu
from ringmoe.pallas.hopper import is_hopper
from ringmoe.schedule import gather


def lower_on_tpu(ctx, *operands, mapped, dtype):
    chip = rows_tpu.CHIPS.get(compat.device_kind(ctx))
    return _lower(ctx, operands, mapped, dtype, functools.partial(pick, dtype, chip) if chip else None)


def lower_on_cuda(ctx, *operands, mapped, dtype):
    hopper = is_hopper(compat.device_kind(ctx))
    return _lower(ctx, operands, mapped, dtype, functools.partial(pick_on_hopper, dtype) if hopper else None)


def _lower(ctx, operands, mapped, dtype, pick):
    """A kernel where it is the faster one, and XLA may not have to partition it; XLA's own gathers elsewhere."""
    run = functools.partial(gather.evaluate, mapped=mapped, dtype=dtype)
    if pick and not mapped and compat.is_of_one_device(ctx):
        run = pick(*ctx.avals_in) or run
    return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)


def pick(dtype, chip: rows_tpu.Chip, *types):
    """The first that takes the call, of those that are faster than XLA's gathers; None if none does."""
    x, row, starts, _ = jax.eval_shape(_flat, *types)
    for run, accepts in (
        (_by_runs, lambda: runs_tpu.check(x, row, starts.size, dtype, chip)),
        (_resident, lambda: rows_tpu.check(x, row, dtype, chip)),
    ):
        try:
            accepts()
        except NotImplementedError:
            continue
        return functools.partial(run, dtype, chip)
    return None


def pick_on_hopper(dtype, x, index, back, starts, *weight):
    """The kernel of Hopper GPUs for rows that go to several places as they are; None for all others, which XLA reads once."""
    if index.shape[-1] > 1 or weight or x.dtype != dtype:
        return None
    rows, place = jax.eval_shape(_spread_operands, x, back)
    try:
        rows_gpu.check(rows, place, index.size)
    except NotImplementedError:
        return None
    return _spread


def _flat(x, index, back, starts, weight=None):
    """x [m, ...], the rows of it [n, k] that are summed, where runs of them start, and the weights [n, k]."""
    flat = lambda a: a.reshape(-1, a.shape[-1])
    row = lax.div(flat(index), back.dtype.type(back.shape[-1]))
    return x.reshape(-1, *x.shape[back.ndim - 1 :]), row, starts, None if weight is None else flat(weight)


def _by_runs(dtype, chip, x, index, *others):
    return runs_tpu.sum_of_rows(*_flat(x, index, *others), dtype, chip).reshape(*index.shape[:-1], -1)


def _resident(dtype, chip, x, index, *others):
    x, row, _, weight = _flat(x, index, *others)
    return rows_tpu.sum_of_rows(x, row, weight, dtype, chip).reshape(*index.shape[:-1], -1)


def _spread_operands(x, back):
    return x.reshape(-1, *x.shape[back.ndim - 1 :]), back.reshape(-1, back.shape[-1])


def _spread(x, index, back, starts):
    return rows_gpu.spread(*_spread_operands(x, back), index.reshape(-1)).reshape(*index.shape[:-1], -1)
