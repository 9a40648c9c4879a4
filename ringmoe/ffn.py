"""What a feed-forward network is made of: its arrays, and the elementwise function between its matmuls.

out = hidden w_out + b_out,   hidden = act(v) * u with a gate, act(u) without,   u = x w_in + b_in,   v = x w_gate + b_gate
A matrix of eight bits is its scales, one an output, times what it holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ALPHA, LIMIT = 1.702, 7.0  # gpt-oss's
SIDES = ("in", "gate", "out")


class Weights(NamedTuple):
    """One thing for each array of the experts: the array, its gradient or its shape; None where absent.

    w_in, w_gate [e, D, F]; w_out [e, F, D]; b_in, b_gate, s_in, s_gate [e, F]; b_out, s_out [e, D].
    """

    w_in: Any
    w_gate: Any
    w_out: Any
    b_in: Any = None
    b_gate: Any = None
    b_out: Any = None
    s_in: Any = None
    s_gate: Any = None
    s_out: Any = None

    def widened(self, dtype) -> "Weights":
        """w times its scale, in `dtype`, computed in float32 at least; without scales."""
        acc = jnp.promote_types(dtype, jnp.float32)
        wide = {}
        for side in SIDES:
            w, scale = getattr(self, f"w_{side}"), getattr(self, f"s_{side}")
            if scale is not None:
                wide |= {f"w_{side}": (w.astype(acc) * scale[:, None].astype(acc)).astype(dtype), f"s_{side}": None}
        return self._replace(**wide)

    def narrowed(self, grads: "Weights") -> "Weights":
        """The gradients of these arrays, of those of what `widened` made of them, in the latter's dtype."""
        found = {}
        for side in SIDES:
            w, scale, grad = (
                getattr(x, name) for x, name in ((self, f"w_{side}"), (self, f"s_{side}"), (grads, f"w_{side}"))
            )
            if scale is not None:
                found |= {f"w_{side}": grad * scale[:, None], f"s_{side}": jnp.sum(grad * w.astype(grad.dtype), axis=1)}
        return grads._replace(**found)


def _gated(act: Callable) -> Callable:
    return lambda u, v=None: act(u) if v is None else act(v) * u


def _clamped_silu(u, v):
    gate = jnp.minimum(v, LIMIT)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (jnp.clip(u, -LIMIT, LIMIT) + 1)


ACTIVATIONS: dict[str, Callable] = {
    "silu": _gated(jax.nn.silu),
    "gelu": _gated(lambda x: jax.nn.gelu(x, approximate=True)),
    "gelu_exact": _gated(lambda x: jax.nn.gelu(x, approximate=False)),
    "relu": _gated(jax.nn.relu),
    "relu2": _gated(lambda x: jnp.square(jax.nn.relu(x))),
    "clamped_silu": _clamped_silu,
}
"""hidden from u, and v where there is a gate. Each gives 0 for zeros, so a padded hidden unit adds nothing."""

NEED_A_GATE = ("clamped_silu",)
