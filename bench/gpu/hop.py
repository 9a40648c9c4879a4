"""A ring's hop, attention's kernel with a state carried through it, beside the same kernel that begins with none.

The state that is carried has seen no key yet, so that both give the same.
"""

import jax
import jax.numpy as jnp

from bench.gpu.case import OURS, Case
from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band
from ringmoe.pallas import attention_gpu

SHAPES = {"4 heads of 128, 16384 tokens": (4, 16384, 128), "32 heads of 128, 4096 tokens": (32, 4096, 128),
          "64 heads of 64, 4096 tokens": (64, 4096, 64)}  # fmt: skip


def case(name: str, n: int, t: int, h: int, is_causal: bool) -> Case:
    spec = AttentionSpec(h**-0.5, Band(right=0) if is_causal else Band())

    def arrays():
        q, k, v = (jax.random.normal(key, (1, n, t, h), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
        empty = jnp.full((1, n, t), softmax.initial_max(jnp.float32)), jnp.zeros((1, n, t), jnp.float32)
        return q, k, v, jnp.zeros(q.shape, jnp.float32), *empty

    def forward(state, q, k, v):
        found = attention_gpu.forward(spec, state, q, k, v, Extras(), Offsets((0,), (0,)))
        return found.acc, found.m, found.l

    plain = lambda q, k, v, *_: forward(None, q, k, v)
    carried = lambda q, k, v, *state: forward(attention_gpu.State(*state, t), q, k, v)
    flops = 4 * n * h * (t * (t + 1) // 2 if is_causal else t * t)
    mask = "causal" if is_causal else "full"
    return Case(f"{name}, {mask}", {f"{OURS}, carried": carried, "plain": plain}, arrays, plain, flops=flops)


def cases() -> list[Case]:
    return [case(name, *shape, is_causal) for name, shape in SHAPES.items() for is_causal in (False, True)]
