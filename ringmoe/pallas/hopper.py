"""What the kernels of Hopper GPUs share: which chips those are, how tiles lie in shared memory, sums in registers."""

import json

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.xla_metadata import set_xla_metadata

from ringmoe.inspector.chips import chip_of

CHIPS = ("h100", "h200")  # names of inspector/chips.py: wgmma is Hopper's alone
MULTIPROCESSORS = 132  # of an H100 (SXM) and an H200


def is_hopper(device_kind: str) -> bool:
    """Whether what JAX calls so runs these kernels."""
    return chip_of(device_kind) in CHIPS


def costing(flops: int, transcendentals: int, moved: int):
    """In its context a kernel's instruction says what it does, `moved` in bytes, as a TPU's says by its cost estimate."""
    cost = {"flops": flops, "transcendentals": transcendentals, "bytes_accessed": moved}
    return set_xla_metadata(kernel_metadata=json.dumps({name: str(number) for name, number in cost.items()}))


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
