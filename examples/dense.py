"""What the ordinary programs call where the examples call `ringmoe.moe_ffn`: every expert computes every token."""

import jax
import jax.numpy as jnp


def experts(x: jax.Array, router: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """The top-2 experts' GELU layers, weighted; x [..., T, D], router [D, E], w_in [E, D, F], w_out [E, F, D]."""
    weight, expert = jax.lax.top_k(jax.nn.softmax(x @ router), 2)
    weight = weight / jnp.sum(weight, -1, keepdims=True)
    weight = jnp.sum(weight[..., None] * jax.nn.one_hot(expert, router.shape[-1]), -2)  # [..., T, E]
    hidden = jax.nn.gelu(jnp.einsum("...d,edf->...ef", x, w_in))
    return jnp.einsum("...ef,efd,...e->...d", hidden, w_out, weight)
