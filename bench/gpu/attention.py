"""Attention beside cuDNN's and tokamax's: forward, and with all gradients.

Models of one width at each length, and of a real model's heads. FLOPs are those that the mask leaves: 4 a pair and head dim
forward, 14 with gradients, whatever a way recomputes. SEEN rows of the output and of dq are checked, against plain attention
in float32; dk and dv are, for a cotangent that only these rows have.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import ringmoe
from bench.gpu.case import Case

SEEN = 64


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int


TOKENS = (16384, 2048, 8192, 32768, 131072)
HEAD_DIMS = (128, 64, 256)
MODELS = {
    "Llama 3 8B": Shape(1, 16384, 32, 8, 128),
    "ragged": Shape(2, 3333, 16, 4, 128),
}


def of_width(tokens: int, head_dim: int) -> Shape:
    """16,384 tokens of width 2048; of long sequences one, of half that width."""
    heads = (2048 if tokens <= 16384 else 1024) // head_dim
    return Shape(max(1, 16384 // tokens), tokens, heads, heads, head_dim)


def shapes() -> dict[str, Shape]:
    named = {f"T {t}, H {h}": of_width(t, h) for t in TOKENS for h in HEAD_DIMS}
    return dict(list(named.items())[: len(HEAD_DIMS)]) | MODELS | named


def tokamax(q, k, v, is_causal):
    import tokamax  # where it is installed

    return tokamax.dot_product_attention(q, k, v, is_causal=is_causal, implementation=("mosaic", "triton"))


def ways(is_causal: bool) -> dict:
    """name -> attention of q, k, v."""
    found = {
        "ours": functools.partial(ringmoe.dot_product_attention, implementation="gpu"),
        "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
        "tokamax": tokamax,
    }
    return {name: functools.partial(attend, is_causal=is_causal) for name, attend in found.items()}


def gradients(attend, q, k, v, do):
    return jax.vjp(attend, q, k, v)[1](do)


def seen(tokens: int) -> jax.Array:
    return jnp.arange(SEEN) * (tokens - 1) // (SEEN - 1)


def plain(is_causal: bool, q, k, v):
    """Of the seen queries' rows, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    by_head = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    s = jnp.einsum("btkgh,bskh->bkgts", by_head, k, precision="highest") / q.shape[-1] ** 0.5
    allowed = seen(k.shape[1])[:, None] >= jnp.arange(k.shape[1]) if is_causal else True
    p = jax.nn.softmax(jnp.where(allowed, s, -jnp.inf))
    return jnp.einsum("bkgts,bskh->btkgh", p, v, precision="highest").reshape(q.shape)


def case(name: str, shape: Shape, is_causal: bool, backward: bool) -> Case:
    batch, t, n, kv, h = shape
    heads, mask = (n, kv, kv, n), "causal" if is_causal else "full"
    of_seen = lambda x: x[:, seen(t)]

    def arrays():
        keys = jax.random.split(jax.random.key(0), 4)
        made = [jax.random.normal(key, (batch, t, n, h), jnp.bfloat16) for key, n in zip(keys, heads)]
        return tuple(made if backward else made[:3])

    def exact(q, k, v, *do):
        attend = functools.partial(plain, is_causal)
        q, k, v = (x.astype(jnp.float32) for x in (of_seen(q), k, v))
        return (
            gradients(attend, q, k, v, *(of_seen(x).astype(jnp.float32) for x in do)) if backward else attend(q, k, v)
        )

    def probed(arrays):
        if not backward:
            return arrays
        q, k, v, do = arrays
        return q, k, v, jnp.zeros_like(do).at[:, seen(t)].set(of_seen(do))

    pairs = t * (t + 1) // 2 if is_causal else t * t
    return Case(
        f"{name}, {mask}, {'gradients' if backward else 'forward'}",
        {way: functools.partial(gradients, f) if backward else f for way, f in ways(is_causal).items()},
        arrays,
        exact,
        lambda result: (of_seen(result[0]), *result[1:]) if backward else of_seen(result),
        probed,
        lambda way: 2e-2 if backward else 1e-2,
        flops=(14 if backward else 4) * batch * n * h * pairs,
    )


def cases() -> list[Case]:
    """The most important ones first."""
    return [
        case(name, shape, is_causal, backward)
        for name, shape in shapes().items()
        for is_causal in (True, False)
        for backward in (False, True)
    ]
