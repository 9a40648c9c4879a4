"""One expert layer beside ways to write it in plain JAX.

bfloat16, SwiGLU, 8192 tokens, whole models' layers (of DeepSeek-V3 32 of its experts), forward, and with all gradients where
a way serves training; ours with skewed routing too (as in `bench.moe`). FLOPs are those of the work that was asked for. First,
of 512 tokens with room for all, every implementation is held against all experts on all tokens in float32.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bench.gpu.case import Case
from bench.moe import ENTRIES, ExpertsShape, dropped, make_inputs, with_gradients

LAYERS = (
    ExpertsShape("Mixtral 8x7B", 8192, 4096, 14336, 8, 2),
    ExpertsShape("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
    ExpertsShape("DeepSeek-V3, 32 experts", 8192, 7168, 2048, 32, 8),
)
DROPLESS = "ours dropless"
OURS = (DROPLESS, "ours 1.25")
TRAINED = (*OURS, "one-hot", "loop")  # with gradients too
RAGGED_EXPERTS = 32  # with more, ragged_dot needs tens of GiB, which takes minutes to find out


def both(spec: ExpertsShape, name: str) -> Callable:
    """The layer and its gradients."""
    layer = functools.partial(ENTRIES[name].layer, spec)
    return lambda *inputs: (layer(*inputs), with_gradients(layer)(*inputs))


def small(spec: ExpertsShape) -> Case:
    """Where nothing is dropped."""
    room = spec.num_experts / spec.top_k
    spec = dataclasses.replace(spec, num_tokens=512, capacity_factor=room, group_size=256)

    def exact(*inputs):
        with jax.default_matmul_precision("highest"):
            return both(spec, "every expert")(*(x.astype(jnp.float32) for x in inputs))

    return Case(
        f"{spec.name}, 512 tokens, both",
        {name: both(spec, name) for name in TRAINED},
        functools.partial(make_inputs, spec, 1.0, jnp.bfloat16),
        exact,
        wrong=lambda way: 3e-2,
        repeats=False,  # the others scatter
        flops=_work(spec, 4),
    )


def whole(spec: ExpertsShape, backward: bool, ids: str, names) -> Case:
    def way(name):
        run = functools.partial(ENTRIES[name].layer, ENTRIES[name].of(spec))
        return with_gradients(run) if backward else run

    def note(name, inputs):
        lost = dropped(spec, inputs, ENTRIES[name].group_size)
        return f"drops {lost:.1%}" if lost else ""

    return Case(
        f"{spec.name}, {'both' if backward else 'forward'}, {ids}",
        {name: way(name) for name in names},
        functools.partial(make_inputs, spec, float(ids == "skewed"), jnp.bfloat16),
        flops=_work(spec, 3 if backward else 1),
        note=note,
    )


def _work(spec: ExpertsShape, passes: int) -> int:
    return passes * 6 * spec.num_tokens * spec.top_k * spec.model_dim * spec.hidden_dim


def cases() -> list[Case]:
    found = []
    for spec in LAYERS:
        forward = [n for n in (*OURS, *ENTRIES) if n != "ragged_dot" or spec.num_experts <= RAGGED_EXPERTS]
        found += [
            small(spec),
            whole(spec, False, "even", dict.fromkeys(forward)),
            whole(spec, True, "even", TRAINED),
            whole(spec, False, "skewed", OURS),
            whole(spec, True, "skewed", OURS),
        ]
    return found
