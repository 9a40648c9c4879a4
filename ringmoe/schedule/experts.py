"""Expert parallelism: the per-device body of the expert layer, forward and backward.

Called inside a shard_map in which the plan's axes are manual; all arrays are the device's own. The steps, named so that the
inspector finds them: dispatch (tokens to rows), exchange (rows to the devices that hold their experts, and back), experts
(the kernel), combine (rows to tokens). Devices that share tokens but not experts, or that hold parts of the hidden dim,
add up their outputs at the end.
Rows lie in one of two layouts. Fixed: every visible expert has room for the r rows that this device may have for it; the
matmuls are batched, and go over what is empty, too. Sorted: all r rows lie tightly one after another, by expert; only what is
filled travels and is multiplied, a window at a time (`schedule/windows.py`).
Symbols: t tokens and e experts of this device, v experts visible to its tokens (e times the devices it exchanges with),
P devices in the exchange, R = P * r rows per expert after it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ringmoe.ffn import Weights
from ringmoe.plan.experts import ExpertPlan
from ringmoe.schedule.exchange import Travel, visit
from ringmoe.schedule.rows import (
    Slots,
    combine_local,
    combine_scalars,
    dispatch_local,
    dispatch_scalars,
    packed,
    slots_of,
)
from ringmoe.schedule.sums import sum_over


def forward(
    plan: ExpertPlan, kernel, travel: Travel, x, expert, slot, weight, weights: Weights, activation: str
) -> jax.Array:
    """y = sum_j weight_j FFN_{expert_j}(x), over the choices that were kept; like x.

    Args:
        plan: where the experts are; `kernel`: a module as described in `pallas/experts_xla.py`; `travel`: how pieces travel.
        x: [*b, t, D] tokens; expert, slot, weight: [*b, t, k] as in `router.Routing`, over all experts. Of the slot only
            whether there is one counts: whole groups need not be here.
        weights: this device's experts, f of their hidden dim; activation: a name in `ffn.ACTIVATIONS`. Or what the caller's
            own kernel takes, arrays [e, ...] and None; such experts have no hidden axes.

    Cost per device: v * r * D elements of x's dtype (sorted: those of the rows there are) to send out, a share (P - 1) / P of
    it over the wire, and back the same; an all-reduce of y in float32 if the plan has sum_axes; rows are kept twice, before and
    after the exchange (in pieces: once and a piece; sorted: r before and a window after).
    """
    with jax.named_scope("dispatch"):
        slots, counts = _rows(plan, expert, slot)
        rows = dispatch_local(x, slots)

    def work(rows, weights, counts):
        out = kernel.forward(rows, weights, activation, counts)
        return (out.astype(x.dtype) if plan.exchange_axes else out), ()

    out, _ = visit(plan, travel, work, lambda _: (), rows, _ready(plan, weights, x.dtype), counts)
    with jax.named_scope("combine"):
        y = combine_local(out, slots, weight, None if plan.sum_axes else x.dtype)
        return sum_over(y, plan.sum_axes).astype(x.dtype)


def backward(plan: ExpertPlan, kernel, travel: Travel, x, expert, slot, weight, weights: Weights, activation: str, dy):
    """(dx, dweight, dweights), each of the dtype of what it is the gradient of.

    Nothing but the arguments is kept from the forward pass: rows travel again, together with rows of dy and the weights of
    their slots. <dy row, out row> is taken where the expert is and travels back as one number per slot. The weights' gradients
    need nothing that is still under way, so theirs are the matmuls that come last, beneath the last rows' way home.

    Cost per device: the exchanges of `forward` once and a half, plus 2 numbers per slot; all-reduces of dx and dweight over
    sum_axes, and of the weight gradients in float32 over weight_sum_axes.
    """
    with jax.named_scope("dispatch"):
        slots, counts = _rows(plan, expert, slot)
        rows = dispatch_local(x, slots), dispatch_scalars(weight, slots), dispatch_local(dy.astype(x.dtype), slots)

    def work(rows, weights, counts):
        x, weight, dy = rows
        grads, kept = kernel.backward_rows(x, weight, weights, activation, dy, counts)
        return (grads._replace(drows=grads.drows.astype(x.dtype)) if plan.exchange_axes else grads), (kept, counts)

    def sums(kept):
        pieces, counts = zip(*kept)
        return kernel.backward_weights(pieces, ready, counts[0])

    ready = _ready(plan, weights, x.dtype)
    grads, dweights = visit(plan, travel, work, sums, rows, ready, counts)
    with jax.named_scope("combine"):
        dx = combine_local(grads.drows, slots, None, None if plan.sum_axes else x.dtype)
        dweight = combine_scalars(grads.dweight, slots)
        dx, dweight = sum_over((dx, dweight), plan.sum_axes)
        dweights = _narrowed(plan, weights, sum_over(dweights, plan.weight_sum_axes))
    absent = lambda d: d is None
    dweights = jax.tree.map(lambda d, w: None if d is None else d.astype(w.dtype), dweights, weights, is_leaf=absent)
    return dx.astype(x.dtype), dweight.astype(weight.dtype), dweights


def dispatch(plan: ExpertPlan, capacity: int, group_size: int, x, expert, slot, weight) -> jax.Array:
    """Rows [e, *b, g, C, D] of this device's experts for its g groups; times `weight` of their assignment unless None."""
    slots = slots_of(*_visible(plan, expert, slot), capacity, group_size)
    rows = dispatch_local(x, slots)
    if weight is not None:
        rows = (rows * dispatch_scalars(weight, slots)[..., None]).astype(x.dtype)
    groups = (*x.shape[:-2], x.shape[-2] // group_size, capacity)
    return rows.reshape(rows.shape[0], *groups, x.shape[-1])


def combine(plan: ExpertPlan, capacity: int, group_size: int, rows, expert, slot, weight) -> jax.Array:
    """The transpose: tokens [*b, t, D] in the dtype of `rows`, summed over the devices that hold other experts."""
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    y = combine_local(flat, slots_of(*_visible(plan, expert, slot), capacity, group_size), weight)
    return sum_over(y, plan.sum_axes).astype(rows.dtype)


def _ready(plan, weights: Weights | tuple, dtype) -> Weights | tuple:
    """As a kernel takes them: widened; and of the devices that hold parts of a hidden dim one has the outputs' bias.

    The bias's gradient comes from dy alone, which those devices share: it needs no such care.
    """
    if not isinstance(weights, Weights):
        return weights
    weights = weights.widened(dtype)
    if not plan.hidden_axes or weights.b_out is None:
        return weights
    return weights._replace(b_out=jnp.where(lax.axis_index(plan.hidden_axes) == 0, weights.b_out, 0))


def _narrowed(plan, weights: Weights | tuple, dweights):
    """The gradients of the weights, of those of what `_ready` made of them; s_out's is a sum over the whole hidden dim."""
    if not isinstance(weights, Weights):
        return dweights
    dweights = weights.narrowed(dweights)
    if dweights.s_out is None:
        return dweights
    return dweights._replace(s_out=sum_over(dweights.s_out, plan.hidden_axes))


def _rows(plan, expert, slot) -> tuple[Slots, jax.Array | None]:
    """Where this device's rows lie, and, if they are sorted, how many it has for each visible expert."""
    expert, slot, num_visible = _visible(plan, expert, slot)
    parts = 1 if plan.sorted else num_visible
    slots, counts = packed(jnp.where(slot >= 0, expert, num_visible), num_visible, parts, plan.rows)
    return slots, counts if plan.sorted else None


def _visible(plan, expert, slot):
    """(expert, slot) over the v experts that this device's rows can reach, and v; choices of the others have slot -1.

    An expert's number is its coordinates on expert_axes, major to minor, then its place e on a device. Coordinates on
    exchange axes stay (rows can travel there); on the other axes only this device's own coordinate is reachable.
    """
    stride = plan.num_experts
    index, mine = jnp.zeros((), jnp.int32), True
    for axis, size in plan.expert_axes:
        stride //= size
        coordinate = lax.rem(lax.div(expert, jnp.int32(stride)), jnp.int32(size))
        if axis in plan.exchange_axes:
            index = index * size + coordinate
        else:
            mine = mine & (coordinate == lax.axis_index(axis))
    index = index * stride + lax.rem(expert, jnp.int32(stride))
    num_visible = plan.num_exchange * stride
    return index, jnp.where(mine, slot, -1), num_visible
