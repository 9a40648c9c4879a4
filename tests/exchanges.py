"""A layer that exchanges rows, for a machine; and the kernels of `pallas/exchange_tpu.py`, interpreted, with race detection."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.pallas import exchange_tpu, remote_tpu
from ringmoe.schedule.exchange import Travel


def interpreted(axes, arrays, kind, start_kernel, finish_kernel):
    """Both kernels of an exchange in one: where they are interpreted a semaphore can't leave its kernel."""
    half, hbm = len(arrays), pl.BlockSpec(memory_space=pltpu.HBM)

    def both(*refs):
        places, *refs = refs
        sent, there, semaphores = refs[:half], refs[half : 2 * half], refs[2 * half :]
        start_kernel(places, *sent, *sent, *there, *semaphores)
        finish_kernel(*sent, *there, *semaphores, half=half)

    return list(
        pl.pallas_call(
            both,
            out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + [hbm] * half,
            out_specs=(hbm,) * half,
            scratch_shapes=[pltpu.SemaphoreType.DMA(())] * 2,
            compiler_params=pltpu.CompilerParams(collective_id=remote_tpu.barrier(axes, kind), has_side_effects=True),
            interpret=pltpu.InterpretParams(detect_races=True),
        )(remote_tpu.devices(axes), *arrays)
    )


def all_to_all(axes, arrays):
    names = jax.sharding.get_abstract_mesh().axis_names
    start_kernel = functools.partial(exchange_tpu._start_kernel, half=len(arrays), names=names)
    return interpreted(axes, arrays, exchange_tpu.KIND, start_kernel, exchange_tpu._finish_kernel)


INTERPRETED = Travel(
    lambda axes, arrays, others: (arrays, others), lambda axes, under_way, after: (all_to_all(axes, under_way), after)
)


def lowered(target, devices, backward, exchange, tokens=1024, jit=ringmoe.jit):
    """A layer wide enough that its matmuls outlast the wire of a few chips, forward or backward."""
    mesh = ringmoe.target(target).mesh({"a": devices})
    of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    d, f, experts = 2048, 4096, devices
    weights = of((d, experts)), *(of((experts, *shape), "a") for shape in ((d, f), (d, f), (f, d)))
    x = of((1, tokens * devices, d), None, "a")
    config = ringmoe.RouterConfig(experts, group_size=tokens)
    layer = lambda x, r, w_in, w_gate, w_out: ringmoe.moe_ffn(
        x, r, w_in, w_out, w_gate=w_gate, config=config, exchange=exchange
    )[0]
    fun = jit((lambda dy, *args: jax.vjp(layer, *args)[1](dy)) if backward else layer)
    return fun.lower(*(x,) * backward, x, *weights)
