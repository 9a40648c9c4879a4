"""What every token visits: the router and the shared expert, dense matmuls beside the sparse ones, left to XLA."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ringmoe import rules
from ringmoe.errors import check
from ringmoe.ffn import ACTIVATIONS, NEED_A_GATE


class SharedExpert(NamedTuple):
    """An expert that every token visits: `y = experts(x) + sigmoid(x router) FFN(x)`, without a router `experts(x) + FFN(x)`.

    FFN(x) = hidden w_out, hidden as that of the experts; its hidden dim S may be another than theirs. Several shared experts
    are one of their joint hidden dim. Its matmuls are ordinary ones: XLA partitions them as the arrays are sharded; inside
    the caller's own `jax.shard_map` they are the device's.

    Attributes:
      w_in, w_gate: [D, S]; w_out: [S, D], of x's dtype. w_gate None: no gate.
      router: [D] or [D, 1], of any floating dtype: its product with x is computed in fp32. None: all of FFN(x) is added.

    Source: DeepSeekMoE, https://arxiv.org/abs/2401.06066; with a router, Qwen2, https://arxiv.org/abs/2407.10671.
    """

    w_in: Any
    w_out: Any
    w_gate: Any = None
    router: Any = None


def check_shared(shared: SharedExpert | None, x: jax.Array, activation: str) -> None:
    """Raises ValueError for what doesn't fit x [..., T, D] or the activation."""
    if shared is None:
        return
    d, s = x.shape[-1], shared.w_in.shape[-1] if shared.w_in.ndim else 0
    for name, shape in {"w_in": (d, s), "w_gate": (d, s), "w_out": (s, d)}.items():
        w = getattr(shared, name)
        check(
            w is None or (w.shape == shape and w.dtype == x.dtype),
            f"shared.{name} is {getattr(w, 'dtype', None)}{getattr(w, 'shape', None)}, expected {x.dtype}{shape} ([D, S]; "
            f"w_out [S, D]): D={d} and the dtype of x, S={s} of shared.w_in",
        )
    router = shared.router
    check(
        router is None or (router.shape in ((d,), (d, 1)) and jnp.issubdtype(router.dtype, jnp.floating)),
        f"shared.router is {getattr(router, 'dtype', None)}{getattr(router, 'shape', None)}, expected floating [D] or [D, 1] "
        f"with D={d} of x",
    )
    check(
        shared.w_gate is not None or activation not in NEED_A_GATE,
        f"{activation=} with shared.w_gate=None, expected a gate [D, S]: pass it, or another activation",
    )


def add_shared(y: jax.Array, x: jax.Array, shared: SharedExpert | None, activation: str) -> jax.Array:
    """y plus what the shared expert gives for x; like y. A token of zeros, a masked one, gets zeros.

    Matmuls accumulate in float32 and hidden is rounded to x's dtype, as the experts' are.
    """
    if shared is None:
        return y
    with jax.named_scope("shared"):
        sides = [product(x, w) for w in (shared.w_in, shared.w_gate) if w is not None]
        hidden = ACTIVATIONS[activation](*sides).astype(x.dtype)
        out = product(hidden, shared.w_out, rules.axes_of(jax.typeof(y).sharding.spec, y.ndim)[-1])
        if shared.router is not None:
            out = out * jax.nn.sigmoid(logits(x, shared.router.reshape(-1, 1)))
        return (y + out).astype(y.dtype)


def logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """x router in float32 (float64) at highest precision, whatever the dtypes; the last dim is whole."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    return product(x.astype(acc), router.astype(acc), (), jax.lax.Precision.HIGHEST)


def product(x: jax.Array, w: jax.Array, axes: rules.Axes | None = None, precision=None) -> jax.Array:
    """x [..., A] times w [A, B], accumulated in float32. With Explicit axes the rows stay where they are and w comes.

    `axes` shard B of the result; None: those that shard it in w and nothing in x.
    """
    acc = jnp.promote_types(x.dtype, jnp.float32)
    times = functools.partial(jnp.einsum, "...a,ab->...b", precision=precision, preferred_element_type=acc)
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return times(x, w)
    of = lambda array: rules.axes_of(jax.typeof(array).sharding.spec, array.ndim)
    spec = lambda *dims: NamedSharding(mesh, PartitionSpec(*(dim or None for dim in dims)))
    *rows, inner = of(x)
    if axes is None:
        axes = tuple(a for a in of(w)[1] if a not in (*inner, *(b for dim in rows for b in dim)))
    return times(x, jax.sharding.reshard(w, spec(inner, axes)), out_sharding=spec(*rows, axes))
