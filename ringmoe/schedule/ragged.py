"""Slices of rows from every device to every other, as many of each as there are: nothing but rows is on the wire.

XLA has that as one operation on TPUs and GPUs (jaxlib 0.12: asynchronous on TPUs, on tpu7x by the SparseCore; none on v5e from
32 chips on). Elsewhere, and where XLA partitions what is left, an all-to-all with the same room for every device stands for it.
One primitive holds both, so that its lowering is the one place that knows, and its transpose is the way back: JAX's own would
scatter.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ringmoe import compat
from ringmoe.plan.cost import machine
from ringmoe.schedule.gather import take


class Slices(NamedTuple):
    """The rows between this device and each other one, [P, q] int32: q slices of each, which don't overlap."""

    size: jax.Array  # rows
    here: jax.Array  # which row of this device's array the slice begins with
    there: jax.Array  # and which of the other device's array


def exchange(rows: jax.Array, sent: Slices, came: Slices, length: int, axes: tuple[str, ...]) -> jax.Array:
    """[length, ...]: the slices that came from all devices on `axes`, zeros elsewhere.

    Args:
        rows: [n, ...], of which `sent` go, each to its place in the other device's result.
        came: the same slices, as those who get them see them: the size and the two places of what each device sent here.

    Linear in rows; the transpose is the exchange with `sent` and `came` exchanged.
    """
    return PRIMITIVE.bind(*compat.vary_alike((rows, *sent, *came)), mapped=0, length=length, axes=axes)


def _abstract_eval(rows, *slices, mapped, length, axes):
    return rows.update(shape=(*rows.shape[:mapped], length, *rows.shape[mapped + 1 :]), weak_type=False)


def _evaluate(run, rows, *slices, mapped, length, axes):
    one = lambda arrays: run(arrays[0], Slices(*arrays[1:4]), Slices(*arrays[4:]), length, axes)
    for _ in range(mapped):
        one = functools.partial(lax.map, one)
    return one((rows, *slices))


def _ragged(rows, sent: Slices, came: Slices, length, axes):
    empty = compat.vary_alike((jnp.zeros((length, *rows.shape[1:]), rows.dtype), rows))[0]
    places = (a.reshape(-1) for a in (sent.here, sent.size, sent.there, came.size))
    return lax.ragged_all_to_all(rows, empty, *places, axis_name=axes)


def _padded(rows, sent: Slices, came: Slices, length, axes):
    """The slices for a device lie tightly in its part, which has room for all that this one has or that one takes."""
    room, devices = min(rows.shape[0], length), sent.size.shape[0]
    at = lax.broadcasted_iota(jnp.int32, (devices, room), 1)
    parts = take(rows, _follow(at, _before(sent.size), sent.size, sent.here, rows.shape[0]))
    parts = lax.all_to_all(parts, axes, 0, 0)
    lies = _before(came.size) + room * lax.broadcasted_iota(jnp.int32, came.size.shape, 0)
    at, (here, size, lies) = lax.iota(jnp.int32, length), (a.reshape(-1) for a in (came.here, came.size, lies))
    return take(parts.reshape(-1, *parts.shape[2:]), _follow(at, here, size, lies, devices * room))


def _before(size):
    """The rows of the slices before each one of the same device."""
    return jnp.cumsum(size, 1, dtype=jnp.int32) - size


def _follow(at, start, size, to, end: int):
    """Where the places `at` [..., n] lead, of slices [..., q] that begin at `start` and lead to `to`; from none to `end`."""
    offset = at[..., None] - start[..., None, :]
    inside = (offset >= 0) & (offset < size[..., None, :])
    led = jnp.sum(jnp.where(inside, to[..., None, :] + offset, 0), -1, dtype=jnp.int32)
    return jnp.where(jnp.any(inside, -1), led, end)


def _jvp(primals, tangents, **params):
    moved = PRIMITIVE.bind(tangents[0], *primals[1:], **params)
    return PRIMITIVE.bind(*primals, **params), moved


def _transpose(cotangent, rows, *slices, mapped, length, axes):
    del length
    grad = ad.Zero(rows.aval)
    if type(cotangent) is not ad.Zero:
        way = dict(mapped=mapped, length=rows.aval.shape[mapped], axes=axes)
        grad = PRIMITIVE.bind(cotangent, *slices[3:], *slices[:3], **way)
    return [grad, *(None for _ in slices)]


def _lower_ragged(ctx, *operands, **params):
    """XLA's own, where there is one and no axes are left to XLA: it can't partition that."""
    limited = machine(compat.device_kind(ctx)).is_limited(compat.num_devices(ctx))
    run = _ragged if compat.is_of_one_device(ctx) and not limited else _padded
    return mlir.lower_fun(functools.partial(_evaluate, run), multiple_results=False)(ctx, *operands, **params)


PRIMITIVE = Primitive("ringmoe_exchange")
PRIMITIVE.def_abstract_eval(_abstract_eval)
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(functools.partial(_evaluate, _padded), multiple_results=False))
for platform in ("tpu", "cuda", "rocm"):
    mlir.register_lowering(PRIMITIVE, _lower_ragged, platform=platform)
ad.primitive_jvps[PRIMITIVE] = _jvp
ad.primitive_transposes[PRIMITIVE] = _transpose
batching.primitive_batchers[PRIMITIVE] = functools.partial(compat.batch_in_front, PRIMITIVE)
