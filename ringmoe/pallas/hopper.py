"""What the kernels of Hopper GPUs share: which chips those are, how tiles lie in shared memory, sums in registers."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringmoe.inspector.chips import chip_of

CHIPS = ("h100", "h200")  # names of inspector/chips.py: wgmma is Hopper's alone


def is_hopper(device_kind: str) -> bool:
    """Whether what JAX calls so runs these kernels."""
    return chip_of(device_kind) in CHIPS


def swizzled(dtype):
    """Rows of 128 bytes, as the tensor cores and bank-conflict-free stores want them."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def added_to(totals, work, *kept):
    """The arrays `totals` and the products that `work(*accumulators, *kept)` adds to them, and what it returns, arrays like
    `kept`. Products still under way are waited for."""
    number = len(totals)

    def run(refs):
        found = work(*refs[:number], *(ref[...] for ref in refs[number:]))
        for ref, x in zip(refs[number:], found, strict=True):
            ref[...] = x

    return pl.run_state(run)((*map(plgpu.ACC.init, totals), *kept))
