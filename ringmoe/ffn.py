"""What a feed-forward network is made of: its arrays, and the elementwise function between its matmuls.

out = hidden w_out + b_out,   hidden = act(v) * u with a gate, act(u) without,   u = x w_in + b_in,   v = x w_gate + b_gate
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ALPHA, LIMIT = 1.702, 7.0  # gpt-oss's


class Weights(NamedTuple):
    """One thing for each array of the experts: the array, its gradient or its shape; None where absent.

    w_in, w_gate [e, D, F]; w_out [e, F, D]; b_in, b_gate [e, F]; b_out [e, D].
    """

    w_in: Any
    w_gate: Any
    w_out: Any
    b_in: Any = None
    b_gate: Any = None
    b_out: Any = None


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
