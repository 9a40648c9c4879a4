"""Tokens to expert slots and back, beside XLA's gathers and a copy of as many bytes.

Bytes are those that must move: dispatch reads each token once and writes k rows, combine reads k rows and writes a token.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bench.gpu.case import Case
from bench.gpu.layer import LAYERS
from bench.specs import ExpertsShape
from ringmoe.schedule.rows import combine_local, dispatch_local, packed


def places(spec: ExpertsShape):
    """Of random choices, all kept; and the weights."""
    shape = spec.num_tokens, spec.num_experts
    weight, expert = lax.top_k(jax.random.uniform(jax.random.key(1), shape), spec.top_k)
    return packed(expert, spec.num_experts, 1, spec.num_tokens * spec.top_k)[0], weight


def of_layer(spec: ExpertsShape) -> list[Case]:
    t, k, d = spec.num_tokens, spec.top_k, spec.model_dim
    moved = 2 * d * (t + t * k)
    normal = lambda *shape: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    to_copy = lambda: normal(moved // 4)
    copy = {"copy": lambda x, slots, weight, plain: jnp.copy(plain)}
    token = lambda slots: slots.assignment[0] // k

    dispatch = {
        "ours": lambda x, slots, *_: dispatch_local(x, slots)[0],
        "xla": lambda x, slots, *_: x.at[token(slots)].get(mode="promise_in_bounds"),
    }

    def by_einsum(rows, slots, weight, *_):
        chosen = rows[0].at[slots.place].get(mode="promise_in_bounds")
        summed = jnp.einsum("tk,tkd->td", weight, chosen, precision="highest", preferred_element_type=jnp.float32)
        return summed.astype(rows.dtype)

    combine = {
        "ours": lambda rows, slots, weight, *_: combine_local(rows, slots, weight, rows.dtype),
        "xla": by_einsum,
    }
    return [
        Case(
            f"{spec.name}, dispatch",
            dispatch | copy,
            lambda: (normal(t, d), *places(spec), to_copy()),
            dispatch["xla"],
            unchecked=("copy",),
            moved=moved,
        ),
        Case(
            f"{spec.name}, combine",
            combine | copy,
            lambda: (normal(1, t * k, d), *places(spec), to_copy()),
            by_einsum,
            unchecked=("copy",),
            moved=moved,
        ),
    ]


def cases() -> list[Case]:
    return [case for spec in LAYERS for case in of_layer(spec)]
