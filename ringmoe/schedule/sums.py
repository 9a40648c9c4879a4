"""Sums over mesh axes, shared by the schedules."""

import jax


def sum_over(values, axes: tuple[str, ...]):
    """`values`, a pytree, summed over the mesh axes; as it is where there are none."""
    return jax.lax.psum(values, axes) if axes else values
