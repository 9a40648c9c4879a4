"""Attention on a Hopper GPU that is there, forward and with gradients, beside cuDNN's: `python -m bench.gpu_attention`.

Every way is held against plain attention in float32, head by head; gradients too. The share is of the rate of an 8192^3
bfloat16 matmul, of the FLOPs that the mask leaves: 4 a pair and head dim forward, 14 with gradients, whatever a way recomputes.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

import ringmoe
from bench.gpu import milliseconds, peaks

SHAPES = {  # sequences, tokens, heads, key heads, head dim
    "Llama 3 8B, 4k": (4, 4096, 32, 8, 128),
    "Llama 3 8B, 16k": (1, 16384, 32, 8, 128),
    "heads of 64": (4, 4096, 32, 32, 64),
    "heads of 256": (2, 4096, 16, 8, 256),
    "ragged": (2, 3333, 16, 4, 128),
}
WRONG = {"forward": 1e-2, "gradients": 2e-2}  # ||got - want|| / ||want|| from which on a way is not timed


def plain(q, k, v, is_causal):
    """A head at a time, in float32."""

    def of_head(arrays):
        q, k, v = (x.astype(jnp.float32) for x in arrays)
        s = jnp.einsum("bth,bsh->bts", q, k, precision="highest") / q.shape[-1] ** 0.5
        seen = jnp.tril(jnp.ones(s.shape[1:], bool)) | (not is_causal)
        return jnp.einsum("bts,bsh->bth", jax.nn.softmax(jnp.where(seen, s, -jnp.inf)), v, precision="highest")

    group = q.shape[2] // k.shape[2]
    heads = (q.swapaxes(0, 2).swapaxes(1, 2), *(jnp.repeat(x, group, 2).swapaxes(0, 2).swapaxes(1, 2) for x in (k, v)))
    return jax.lax.map(jax.checkpoint(of_head), heads).swapaxes(1, 2).swapaxes(0, 2)


def ways(is_causal):
    """name -> attention of q, k, v."""
    return {
        "ours": functools.partial(ringmoe.dot_product_attention, is_causal=is_causal, implementation="gpu"),
        "xla": functools.partial(ringmoe.dot_product_attention, is_causal=is_causal, implementation="xla"),
        "cudnn": functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn"),
    }


def gradients(attend, q, k, v, do):
    return jax.vjp(attend, q, k, v)[1](do)


def attempt(run, *arrays):
    try:
        return jax.block_until_ready(run(*arrays))
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


@jax.jit
def distances(got, want):
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32))
    return jax.tree.map(lambda a, b: norm(a.astype(jnp.float32) - b) / norm(b), got, want)


def measure(name, peak, is_causal, direction):
    batch, t, n, kv_heads, h = SHAPES[name]
    shapes = (batch, t, n, h), (batch, t, kv_heads, h), (batch, t, kv_heads, h), (batch, t, n, h)
    arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
    arrays = arrays[: 3 if direction == "forward" else 4]
    of = lambda attend: jax.jit(attend if direction == "forward" else functools.partial(gradients, attend))
    want = attempt(of(functools.partial(plain, is_causal=is_causal)), *(x.astype(jnp.float32) for x in arrays))
    good, words = {}, {}
    for way, attend in ways(is_causal).items():
        print(f"{way}, ", end="", flush=True)  # what hangs, if one does
        run = of(attend)
        got = attempt(run, *arrays)
        words[way] = got if isinstance(got, str) else ""
        if not words[way] and not isinstance(want, str):
            off = max(map(float, jax.tree.leaves(distances(got, want))))
            words[way] = f"off by {off:.1e}" if off < WRONG[direction] else f"WRONG, by {off}"
        if isinstance(got, str) or "WRONG" in words[way]:
            continue
        if any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (got, run(*arrays))), strict=True)):
            words[way] += ", bits differ between runs"
        good[way] = functools.partial(run, *arrays)
    print("checked", flush=True)
    times = milliseconds(good)
    pairs = t * (t + 1) // 2 if is_causal else t * t
    flops = (4 if direction == "forward" else 14) * batch * n * h * pairs
    for way, word in words.items():
        ms = times.get(way, float("nan"))
        rate = flops / ms / 1e9
        mask = "causal" if is_causal else "full"
        print(
            f"{name:16} {mask:6} {direction:9} {way:6} {ms:8.3f} ms {rate:5.0f} TFLOP/s {rate / peak:5.0%} {word}",
            flush=True,
        )


def main(*names: str) -> None:
    began, peak = time.perf_counter(), peaks()[0] / 1e12
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {peak:.0f} TFLOP/s", flush=True)
    for name in names or SHAPES:
        for is_causal in (True, False):
            for direction in ("forward", "gradients"):
                if failed := attempt(measure, name, peak, is_causal, direction):
                    print(name, direction, failed, flush=True)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
