"""The ways to lay a model over devices, each written with its exchanges by hand, beside what they must send and compute.

Letters: B rows a device, D model width, F hidden width, L layers, n devices of an axis, M microbatches. Weights and rows are
bf16, two bytes. A device sends, of an array of S bytes in all: (n - 1)/n S to gather or scatter it, twice that to sum it,
(n - 1)/n S of an S that it holds to exchange it, S to hand it to its neighbour.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.inspector_programs import local, neighbours, spec

B, D, F, L, M = 512, 1024, 2048, 3, 4
GATHER, SCATTER, SUM = "all-gather", "reduce-scatter", "all-reduce"
EXCHANGE, HAND = "all-to-all", "collective-permute"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A program and what one device does in a run: `sent` bytes by kind, `times` a kind is run, `flops` of its matmuls."""

    function: Callable
    args: tuple[Any, ...]
    sent: dict[str, float]
    times: dict[str, int]
    flops: float


def of_all(n: int, size: float) -> float:
    """Bytes a device sends to gather, scatter or exchange `size` bytes over n devices."""
    return (n - 1) / n * size


def mlp(x, up, down):
    return jax.nn.relu(x @ up) @ down


def loss(y):
    return jnp.sum(y.astype(jnp.float32) ** 2)


MATMUL = 2 * B * D * D  # a device's rows by a square weight
MLP = 2 * 2 * B * D * F


def fsdp_forward(axes):
    """Every layer's weight is gathered before it is used."""
    n = axes["x"]

    def body(ws, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ lax.all_gather(w, "x", tiled=True)), None), x, ws)[0]

    ws = spec((L, D, D), jnp.bfloat16, axes, None, "x")
    x = spec((n * B, D), jnp.bfloat16, axes, "x")
    function = local(body, (P(None, "x"), P("x")), P("x"))
    return Layout(function, (ws, x), {GATHER: L * of_all(n, 2 * D * D)}, {GATHER: L}, L * MATMUL)


def fsdp_gradient(axes):
    """Gathered again in the backward pass; gradients are scattered over their owners; the first rows need none."""
    n = axes["x"]

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ lax.all_gather(w, "x", tiled=True)), None

    def body(ws, x):
        return jax.grad(lambda ws: loss(lax.scan(layer, x, ws)[0]))(ws)

    ws = spec((L, D, D), jnp.bfloat16, axes, None, "x")
    x = spec((n * B, D), jnp.bfloat16, axes, "x")
    function = local(body, (P(None, "x"), P("x")), P(None, "x"))
    each = L * of_all(n, 2 * D * D)
    # Forward, forward again, and two matmuls of the backward pass, in each layer.
    return Layout(function, (ws, x), {GATHER: 2 * each, SCATTER: each}, {GATHER: 2 * L, SCATTER: L}, 4 * L * MATMUL)


def zero_1(axes):
    """Whole weights everywhere: the gradient is scattered, its part updated, and the weight gathered."""
    n = axes["x"]

    def body(w, x):
        part = lax.psum_scatter(jax.grad(lambda w: loss(x @ w))(w), "x", tiled=True)
        i = lax.axis_index("x")
        mine = lax.dynamic_slice_in_dim(w, i * (D // n), D // n) - 0.01 * part
        return lax.all_gather(mine.astype(w.dtype), "x", tiled=True)

    function = local(body, (P(), P("x")), P())
    args = spec((D, D), jnp.bfloat16, axes), spec((n * B, D), jnp.bfloat16, axes, "x")
    once = of_all(n, 2 * D * D)
    return Layout(function, args, {SCATTER: once, GATHER: once}, {SCATTER: 1, GATHER: 1}, 2 * MATMUL)


def data_parallel(axes):
    """Gradients of M microbatches are added up on the device, then summed over all, once."""
    n = axes["x"]

    def body(w, x):
        def micro(total, x):
            return total + jax.grad(lambda w: loss(x @ w))(w).astype(jnp.float32), None

        return lax.psum(lax.scan(micro, jnp.zeros((D, D), jnp.float32), x)[0], "x")

    function = local(body, (P(), P(None, "x")), P())
    args = spec((D, D), jnp.bfloat16, axes), spec((M, n * B, D), jnp.bfloat16, axes, None, "x")
    return Layout(function, args, {SUM: 2 * of_all(n, 4 * D * D)}, {SUM: 1}, M * 2 * MATMUL)


def tensor_forward(axes):
    """Hidden units split: the MLPs' partial outputs are summed."""
    n = axes["x"]

    def body(up, down, x):
        def layer(x, w):
            return lax.psum(mlp(x, *w), "x"), None

        return lax.scan(layer, x, (up, down))[0]

    function = local(body, (P(None, None, "x"), P(None, "x"), P()), P())
    up, down = spec((L, D, F), jnp.bfloat16, axes, None, None, "x"), spec((L, F, D), jnp.bfloat16, axes, None, "x")
    x = spec((B, D), jnp.bfloat16, axes)
    return Layout(function, (up, down, x), {SUM: L * 2 * of_all(n, 2 * B * D)}, {SUM: L}, L * MLP / n)


def tensor_sequence(axes):
    """Rows are split between the MLPs: gathered before, summed and scattered after each."""
    n = axes["x"]

    def body(up, down, x):
        def layer(x, w):
            return lax.psum_scatter(mlp(lax.all_gather(x, "x", tiled=True), *w), "x", tiled=True), None

        return lax.scan(layer, x, (up, down))[0]

    function = local(body, (P(None, None, "x"), P(None, "x"), P("x")), P("x"))
    up, down = spec((L, D, F), jnp.bfloat16, axes, None, None, "x"), spec((L, F, D), jnp.bfloat16, axes, None, "x")
    x = spec((n * B, D), jnp.bfloat16, axes, "x")
    each = L * of_all(n, 2 * n * B * D)
    return Layout(function, (up, down, x), {GATHER: each, SCATTER: each}, {GATHER: L, SCATTER: L}, L * MLP)


def vocabulary(axes):
    """Logits split over words: the rows' maxima, sums and labels' logits are each reduced, four bytes a row."""
    n, words = axes["x"], 8192

    def body(w, x, label):
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        top = lax.pmax(logits.max(-1), "x")
        total = lax.psum(jnp.exp(logits - top[:, None]).sum(-1), "x")
        mine = label - lax.axis_index("x") * (words // n)
        hit = jnp.arange(words // n) == mine[:, None]
        return jnp.log(total) + top - lax.psum(jnp.where(hit, logits, 0).sum(-1), "x")

    function = local(body, (P(None, "x"), P(), P()), P())
    args = (
        spec((D, words), jnp.bfloat16, axes, None, "x"),
        spec((B, D), jnp.bfloat16, axes),
        spec((B,), jnp.int32, axes),
    )
    return Layout(function, args, {SUM: 3 * 2 * of_all(n, 4 * B)}, {}, 2 * B * D * words / n)


def summa(axes):
    """A matmul on a grid of devices: rows of the one factor, columns of the other are gathered."""
    n, m = axes["x"], axes["y"]

    def body(a, b):
        return lax.all_gather(a, "y", axis=1, tiled=True) @ lax.all_gather(b, "x", tiled=True)

    function = local(body, (P("x", "y"), P("x", "y")), P("x", "y"))
    a, b = spec((n * B, D), jnp.bfloat16, axes, "x", "y"), spec((D, F), jnp.bfloat16, axes, "x", "y")
    sent = of_all(m, 2 * B * D) + of_all(n, 2 * D * F / m)
    return Layout(function, (a, b), {GATHER: sent}, {GATHER: 2}, 2 * B * D * F / m)


def ring_matmul(axes):
    """Rows travel round the ring while the weight's part works on those that are there."""
    n = axes["x"]

    def body(w, x):
        out = [x @ w]
        for _ in range(n - 1):
            x = lax.ppermute(x, "x", neighbours(n))
            out.append(x @ w)
        return jnp.stack(out)

    function = local(body, (P(None, "x"), P("x")), P(None, "x"))
    args = spec((D, n * D), jnp.bfloat16, axes, None, "x"), spec((n * B, D), jnp.bfloat16, axes, "x")
    return Layout(function, args, {HAND: (n - 1) * 2 * B * D}, {HAND: n - 1}, n * MATMUL)


def pipeline(axes, backward=False):
    """Stages in a row: M microbatches take M + n - 1 ticks, each of which hands a microbatch on (and its gradient back)."""
    n = axes["x"]
    ticks = M + n - 1

    def forward(w, x):
        stage = lax.axis_index("x")

        def tick(carry, t):
            arrived, out = carry
            y = jnp.tanh(jnp.where(stage == 0, x[jnp.minimum(t, M - 1)], arrived) @ w[0])
            done = jnp.where(t >= n - 1, y, 0)
            out = lax.dynamic_update_index_in_dim(out, done, jnp.maximum(t - n + 1, 0), 0)
            return (lax.ppermute(y, "x", neighbours(n)), out), None

        return lax.scan(tick, (jnp.zeros_like(x[0]), jnp.zeros_like(x)), jnp.arange(ticks))[0][1]

    def gradient(w, x):
        return jax.grad(lambda w: loss(forward(w, x)))(w)

    function = local(gradient if backward else forward, (P("x"), P()), P("x"))
    args = spec((n, D, D), jnp.bfloat16, axes, "x"), spec((M, B, D), jnp.bfloat16, axes)
    times = ticks * (2 if backward else 1)
    return Layout(function, args, {HAND: times * 2 * B * D}, {HAND: times}, ticks * MATMUL * (3 if backward else 1))


def pipeline_gradient(axes):
    return pipeline(axes, backward=True)


def expert_layer(axes):
    """Rows to their experts and back."""
    n = axes["x"]

    def body(up, down, x):
        there = lax.all_to_all(x, "x", 0, 0, tiled=True)
        return lax.all_to_all(mlp(there, up[0], down[0]), "x", 0, 0, tiled=True)

    function = local(body, (P("x"), P("x"), P("x")), P("x"))
    up, down = spec((n, D, F), jnp.bfloat16, axes, "x"), spec((n, F, D), jnp.bfloat16, axes, "x")
    x = spec((n * B, D), jnp.bfloat16, axes, "x")
    return Layout(function, (up, down, x), {EXCHANGE: 2 * of_all(n, 2 * B * D)}, {EXCHANGE: 2}, MLP)


def expert_tensor(axes):
    """Experts over one axis, each expert's hidden units over the other."""
    n, m = axes["x"], axes["y"]

    def body(up, down, x):
        there = lax.all_to_all(x, "x", 0, 0, tiled=True)
        return lax.all_to_all(lax.psum(mlp(there, up[0], down[0]), "y"), "x", 0, 0, tiled=True)

    function = local(body, (P("x", None, "y"), P("x", "y"), P("x")), P("x"))
    up, down = spec((n, D, F), jnp.bfloat16, axes, "x", None, "y"), spec((n, F, D), jnp.bfloat16, axes, "x", "y")
    x = spec((n * B, D), jnp.bfloat16, axes, "x")
    sent = {EXCHANGE: 2 * of_all(n, 2 * B * D), SUM: 2 * of_all(m, 2 * B * D)}
    return Layout(function, (up, down, x), sent, {EXCHANGE: 2, SUM: 1}, MLP / m)


def ulysses(axes):
    """Attention with heads split instead of the sequence: q, k, v are exchanged, and the output back."""
    n, heads, head = axes["x"], 16, 128

    def body(q, k, v):
        q, k, v = (lax.all_to_all(a, "x", 0, 1, tiled=True) for a in (q, k, v))
        s = jnp.einsum("nth,nsh->nts", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(s, -1).astype(v.dtype)
        return lax.all_to_all(jnp.einsum("nts,nsh->nth", p, v), "x", 1, 0, tiled=True)

    function = local(body, (P(None, "x"),) * 3, P(None, "x"))
    x = spec((heads, n * B, head), jnp.bfloat16, axes, None, "x")
    sent = 4 * of_all(n, 2 * heads * B * head)
    return Layout(function, (x, x, x), {EXCHANGE: sent}, {EXCHANGE: 4}, 4 * heads / n * (n * B) ** 2 * head)


def halo(axes):
    """A window over the sequence: each device gets the last row of the one before, seven times."""
    n = axes["x"]

    def body(x):
        def step(_, x):
            before = lax.ppermute(x[-8:], "x", neighbours(n))
            return x + jnp.concatenate([before, x[:-8]])

        return lax.fori_loop(0, 7, step, x)

    x = spec((n * B, D), jnp.bfloat16, axes, "x")
    return Layout(local(body, P("x"), P("x")), (x,), {HAND: 7 * 2 * 8 * D}, {HAND: 7}, 0.0)


def hybrid(axes):
    """Weights split inside a slice or host ("x"), copied over the slices ("y"): the scattered gradient is summed over them."""
    n, m = axes["x"], axes["y"]

    def body(w, x):
        whole = lax.all_gather(w, "x", tiled=True)
        part = lax.psum_scatter(jax.grad(lambda w: loss(x @ w))(whole), "x", tiled=True)
        return w - 0.01 * lax.psum(part, "y")

    function = local(body, (P("x"), P(("y", "x"))), P("x"))
    args = spec((D, D), jnp.bfloat16, axes, "x"), spec((n * m * B, D), jnp.bfloat16, axes, ("y", "x"))
    once = of_all(n, 2 * D * D)
    sent = {GATHER: once, SCATTER: once, SUM: 2 * of_all(m, 2 * D * D / n)}
    return Layout(function, args, sent, {GATHER: 1, SCATTER: 1, SUM: 1}, 2 * MATMUL)


ONE_AXIS = {
    f.__name__: f
    for f in (fsdp_forward, fsdp_gradient, zero_1, data_parallel, tensor_forward, tensor_sequence, vocabulary, ring_matmul,
              pipeline, pipeline_gradient, expert_layer, ulysses, halo)
}  # fmt: skip
TWO_AXES = {f.__name__: f for f in (summa, expert_tensor, hybrid)}
