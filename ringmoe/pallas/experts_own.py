"""The caller's own experts as a kernel (see `experts_xla.py`): a function of one device's rows, which JAX differentiates."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ringmoe.pallas.experts_xla import Grads


@dataclasses.dataclass(frozen=True)
class OwnExperts:
    """`fn(rows [e, R, D], weights) -> [e, R, D]`; `tree` is the structure of weights, whose leaves a schedule passes flat."""

    fn: Callable
    tree: Any

    def forward(
        self, rows: jax.Array, weights: Sequence[jax.Array], activation: None, counts: None = None
    ) -> jax.Array:
        """What fn gives, in float32 (float64): as all kernels do. Plans for it don't sort rows."""
        assert counts is None, "fn knows rows [e, R, D] alone"
        del activation
        out = self.fn(rows, self.tree.unflatten(weights))
        return out.astype(jnp.promote_types(rows.dtype, jnp.float32))

    def backward_rows(
        self,
        rows: jax.Array,
        weight: jax.Array,
        weights: Sequence[jax.Array],
        activation: None,
        dy,
        counts: None = None,
    ) -> tuple[Grads, tuple]:
        """The gradients of y = weight * fn(rows), with fn run again; None of weights that are no floats."""
        assert counts is None, "fn knows rows [e, R, D] alone"
        floats = [jnp.issubdtype(w.dtype, jnp.inexact) for w in weights]

        def of_floats(rows, moving):
            moving = iter(moving)
            return self.forward(rows, [next(moving) if float_ else w for w, float_ in zip(weights, floats)], activation)

        out, pullback = jax.vjp(of_floats, rows, [w for w, float_ in zip(weights, floats) if float_])
        dweight = jnp.sum(dy * out, axis=-1)
        drows, found = pullback((weight[..., None] * dy).astype(out.dtype))
        found = iter(found)
        dweights = tuple(next(found).astype(out.dtype) if float_ else None for float_ in floats)
        return Grads(drows.astype(out.dtype), dweight.astype(out.dtype)), dweights

    def backward_weights(self, pieces: Sequence[tuple], weights: Sequence[jax.Array], counts: None = None) -> tuple:
        """As `backward_rows` found them, added up."""
        del weights, counts
        return tuple(None if parts[0] is None else functools.reduce(jnp.add, parts) for parts in zip(*pieces))
