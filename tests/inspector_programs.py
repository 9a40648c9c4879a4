"""Programs that the inspector is tried on, written the obvious way. Each returns (function,
*arguments)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

HEADS, TOKENS, DIM = (
    8,
    4096,
    128,
)  # per device, those of the facts that the inspector must tell again


def spec(shape, dtype, axes, *parts):
    """A ShapeDtypeStruct sharded over an abstract mesh of these axis sizes."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*parts)))


def local(function, in_specs, out_specs):
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def neighbours(n):
    return [(i, (i + 1) % n) for i in range(n)]


def attention_block(q, k, v, state=None, block=256):
    """Softmax attention of one key block as a TPU kernel: unnormalised O, maximum and sum, carried
    on from `state`."""
    heads, tokens, dim = q.shape
    keys = k.shape[1]

    def kernel(q_ref, k_ref, v_ref, *refs):
        before, (o_ref, m_ref, l_ref) = refs[:-3], refs[-3:]
        s = lax.dot_general(q_ref[0], k_ref[0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        m = jnp.max(s, axis=1, keepdims=True)
        m = jnp.maximum(m, before[1][0]) if before else m
        p = jnp.exp(s - m)
        o = jnp.dot(p.astype(v_ref.dtype), v_ref[0], preferred_element_type=jnp.float32)
        l = jnp.sum(p, axis=1, keepdims=True)
        if before:
            alpha = jnp.exp(before[1][0] - m)
            o, l = o + alpha * before[0][0], l + alpha * before[2][0]
        o_ref[0], m_ref[0], l_ref[0] = o, m, l

    def row(width):
        return pl.BlockSpec((1, block, width), lambda h, i: (h, i, 0))

    whole = pl.BlockSpec((1, keys, dim), lambda h, i: (h, 0, 0))
    out = [jax.ShapeDtypeStruct((heads, tokens, width), jnp.float32) for width in (dim, 1, 1)]
    carried = 0 if state is None else 3
    flops = 4 * heads * tokens * keys * dim
    return pl.pallas_call(
        kernel,
        grid=(heads, tokens // block),
        out_shape=out,
        name="attention_block",
        in_specs=[row(dim), whole, whole, *(row(dim), row(1), row(1))[:carried]],
        out_specs=[row(dim), row(1), row(1)],
        input_output_aliases={3 + i: i for i in range(carried)},
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=heads * tokens * keys,
            bytes_accessed=2 * (q.size + k.size + v.size) + 4 * q.size * (2 if carried else 1),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=64 * 2**20),
    )(q, k, v, *(state or ()))


def ring(axes, axis="seq", merge="outside", tokens=TOKENS):
    """A scanned ring: the permutes beside the kernel, its results merged by jnp code or inside the
    kernel."""
    n = axes[axis]

    def body(q, k, v):
        def hop(carry, _):
            k, v, state = carry
            moved = lax.ppermute((k, v), axis, neighbours(n))
            if merge == "inside":
                state = attention_block(q, k, v, state)
            else:
                (o, m, l), (o2, m2, l2) = state, attention_block(q, k, v)
                top = jnp.maximum(m, m2)
                a, b = jnp.exp(m - top), jnp.exp(m2 - top)
                state = o * a + o2 * b, top, l * a + l2 * b
            return (*moved, tuple(state)), None

        start = (
            jnp.zeros(q.shape, jnp.float32),
            jnp.full((*q.shape[:2], 1), -1e30),
            jnp.zeros((*q.shape[:2], 1)),
        )
        o, _, l = lax.scan(hop, (k, v, start), None, length=n)[0][2]
        return (o / l).astype(q.dtype)

    x = spec((HEADS, tokens * n, DIM), jnp.bfloat16, axes, None, axis)
    return local(body, P(None, axis), P(None, axis)), x, x, x


def splash_ring(axes, axis="seq"):
    """The ring with JAX's splash kernel, whose normalised results jnp code merges by their
    log-sum-exp."""
    n = axes[axis]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((TOKENS, TOKENS))] * HEADS)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, save_residuals=True)

    def body(q, k, v):
        def hop(carry, _):
            k, v, o, lse = carry
            moved = lax.ppermute((k, v), axis, neighbours(n))
            block, (block_lse,) = kernel(q, k, v)
            total = jnp.logaddexp(lse, block_lse)
            o = o * jnp.exp(lse - total)[..., None] + block * jnp.exp(block_lse - total)[..., None]
            return (*moved, o, total), None

        start = (k, v, jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -1e30))
        return lax.scan(hop, start, None, length=n)[0][2].astype(q.dtype)

    x = spec((HEADS, TOKENS * n, DIM), jnp.bfloat16, axes, None, axis)
    return local(body, P(None, axis), P(None, axis)), x, x, x


def experts(axes, axis="expert", tokens=4096, width=4096):
    """Expert parallelism with one all_to_all there and one back."""
    n = axes[axis]

    def body(x, w):
        there = lax.all_to_all(x, axis, 0, 0, tiled=True)
        return lax.all_to_all(jax.nn.relu(there @ w), axis, 0, 0, tiled=True)

    return (
        local(body, (P(axis), P(axis)), P(axis)),
        spec((n * tokens, width), jnp.bfloat16, axes, axis),
        spec((n * width, width), jnp.bfloat16, axes, axis),
    )


def train_step(axes, layers=4, width=2048, heads=16, hidden=8192, tokens=2048):
    """One step of a transformer: layers scanned, ring attention over "seq", weights split over
    "data"."""
    n, dim = axes["seq"], width // heads

    def attend(q, k, v):  # [1, heads, tokens, dim] on one device
        @jax.checkpoint
        def hop(carry, _):
            k, v, o, m, l = carry
            moved = lax.ppermute((k, v), "seq", neighbours(n))
            s = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
            top = jnp.maximum(m, s.max(-1, keepdims=True))
            p, a = jnp.exp(s - top), jnp.exp(m - top)
            o = o * a + jnp.einsum("bhts,bhsd->bhtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (*moved, o, top, l * a + p.sum(-1, keepdims=True)), None

        edge = (*q.shape[:3], 1)
        start = (k, v, jnp.zeros(q.shape, jnp.float32), jnp.full(edge, -1e30), jnp.zeros(edge))
        _, _, o, _, l = lax.scan(hop, start, None, length=n)[0]
        return (o / l).astype(q.dtype)

    place = P("data", None, "seq")
    ring_attention = local(attend, place, place)

    @jax.checkpoint
    def layer(x, w):
        q, k, v = jnp.einsum("btd,dchk->cbhtk", x, w["qkv"])
        x = x + jnp.einsum("bhtk,hkd->btd", ring_attention(q, k, v), w["out"])
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    def loss(ws, x):
        y = lax.scan(layer, x, ws)[0].astype(jnp.float32)
        return jnp.mean(y * y)

    def step(ws, x):
        value, grads = jax.value_and_grad(loss)(ws, x)
        return value, jax.tree.map(lambda w, g: w - 1e-3 * g.astype(w.dtype), ws, grads)

    shapes = {
        "qkv": ((layers, width, 3, heads, dim), (None, "data")),
        "out": ((layers, heads, dim, width), (None, None, None, "data")),
        "up": ((layers, width, hidden), (None, "data")),
        "down": ((layers, hidden, width), (None, None, "data")),
    }
    weights = {name: spec(shape, jnp.bfloat16, axes, *parts) for name, (shape, parts) in shapes.items()}
    x = spec((axes["data"], tokens * n, width), jnp.bfloat16, axes, "data", "seq")
    return jax.jit(step, donate_argnums=0), weights, x


def remote_copy(axes, axis="seq", cost=True):
    """A Pallas kernel that sends its block to the next device itself."""
    n = axes[axis]

    def kernel(x_ref, o_ref, sent, received):
        following = lax.rem(lax.axis_index(axis) + 1, n)
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, device_id={axis: following})
        pl.semaphore_wait(barrier, 1)
        copy = pltpu.make_async_remote_copy(x_ref, o_ref, sent, received, device_id={axis: following})
        copy.start()
        copy.wait()

    def body(x):
        estimate = pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * x.nbytes,
            remote_bytes_transferred=x.nbytes,
        )
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
            name="remote_copy",
            compiler_params=pltpu.CompilerParams(collective_id=0, has_side_effects=True),
            cost_estimate=estimate if cost else None,
        )(x)

    return local(body, P(axis), P(axis)), spec((n * 1024, 1024), jnp.bfloat16, axes, axis)


def started_and_awaited(axes, axis="seq", metadata=None):
    """A kernel that starts sending its block to the next device, a matmul, and a kernel that waits for it."""
    n, hbm = axes[axis], pl.BlockSpec(memory_space=pltpu.HBM)
    semaphores = (pl.BlockSpec(memory_space=pltpu.SEMAPHORE),) * 2

    def start(x, x_out, there, sent, received):
        following = lax.rem(lax.axis_index(axis) + 1, n)
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, device_id={axis: following})
        pl.semaphore_wait(barrier, 1)
        pltpu.make_async_remote_copy(x, there, sent, received, device_id={axis: following}).start()

    def wait(x, there, sent, received, result):
        pltpu.make_async_copy(there, there, received).wait()
        pltpu.make_async_copy(x, x, sent).wait()

    def body(x, w):
        moved = pltpu.HBM(x.shape, x.dtype)
        x_out, there, *flags = pl.pallas_call(
            start,
            out_shape=(moved, moved, *(pltpu.SemaphoreType.DMA(()),) * 2),
            in_specs=[hbm],
            out_specs=(hbm, hbm, *semaphores),
            input_output_aliases={0: 0},
            name="send",
            compiler_params=pltpu.CompilerParams(collective_id=0, has_side_effects=True),
            cost_estimate=pl.CostEstimate(
                flops=0, transcendentals=0, bytes_accessed=0, remote_bytes_transferred=x.nbytes
            ),
            metadata=metadata,
        )(pltpu.with_memory_space_constraint(x, pltpu.HBM))
        x_out, there, w = lax.optimization_barrier((x_out, there, w))
        x_out, there, y = lax.optimization_barrier((x_out, there, w @ w))
        result = pl.pallas_call(
            wait,
            out_shape=moved,
            in_specs=[hbm, hbm, *semaphores],
            out_specs=hbm,
            input_output_aliases={1: 0},
            name="await",
            compiler_params=pltpu.CompilerParams(has_side_effects=True),
        )(*(pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (x_out, there)), *flags)
        return result + 1, y

    shapes = spec((n * 1024, 1024), jnp.bfloat16, axes, axis), spec((2048, 2048), jnp.bfloat16, axes)
    return local(body, (P(axis), P()), (P(axis), P())), *shapes


def corpus(axes):
    """name -> (function, *arguments) for the first axis of the mesh: every collective, loop and odd
    instruction."""
    axis, n = next(iter(axes.items()))
    x = spec((n * 64, 512), jnp.float32, axes, axis)
    one = spec((64, 64), jnp.float32, axes)
    flat = functools.partial(local, in_specs=P(axis), out_specs=P(axis))
    weights = spec((4, 512, 512), jnp.float32, axes, None, axis)
    image = spec((8 * n, 16, 16, 8), jnp.float32, axes, axis)
    kernel = spec((3, 3, 8, 16), jnp.float32, axes)

    def shift(y):
        return lax.ppermute(y, axis, neighbours(n))

    def inner(c, _):
        return shift(c) * 2, None

    def nested(y):
        return lax.scan(lambda c, _: (lax.scan(inner, c, None, length=3)[0] + 1, None), y, None, length=5)[0]

    def ragged(y):
        start, size = jnp.arange(n, dtype=jnp.int32) * (64 // n), jnp.full(n, 64 // n, jnp.int32)
        return lax.ragged_all_to_all(y, jnp.zeros_like(y), start, size, start, size, axis_name=axis)

    def forward(y, ws):
        return jnp.mean(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, ws)[0])

    return {
        "permute": (flat(shift), x),
        "all_to_all": (flat(lambda y: lax.all_to_all(y, axis, 0, 0, tiled=True)), x),
        "all_gather": (flat(lambda y: jnp.tanh(lax.all_gather(y, axis, tiled=True))[:64]), x),
        "reduce_scatter": (
            flat(lambda y: lax.psum_scatter(jnp.tile(y, (n, 1)), axis, tiled=True)),
            x,
        ),
        "all_reduce": (flat(lambda y: lax.psum(y, axis) * 2), x),
        "all_max": (flat(lambda y: lax.pmax(y, axis)), x),
        "ragged": (flat(ragged), x),
        "nested": (flat(nested), x),
        "while": (
            flat(lambda y: lax.while_loop(lambda c: c.sum() < 1e9, lambda c: shift(c) * 2 + 1, y)),
            x,
        ),
        "down_loop": (flat(lambda y: lax.fori_loop(0, 7, lambda i, c: shift(c) + i, y)), x),
        "cond": (
            flat(lambda y: lax.cond(y[0, 0] > 0, lambda z: shift(z) @ jnp.ones((512, 512)), lambda z: z * 2, y)),
            x,
        ),
        "switch": (
            flat(lambda y: lax.switch(y[0, 0].astype(int), [jnp.sin, shift, jnp.exp], y)),
            x,
        ),
        "calls": (flat(lambda y: jax.checkpoint(lambda z: jax.jit(shift)(jnp.sin(z)))(y)), x),
        "fsdp": (jax.grad(forward, argnums=1), x, weights),
        "conv": (
            lambda i, k: lax.conv_general_dilated(i, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            image,
            kernel,
        ),
        "conv_grad": (
            jax.grad(
                lambda k, i: lax.conv_general_dilated(
                    i, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                ).sum()
            ),
            kernel,
            image,
        ),
        "sort": (lambda y: jnp.argsort(y, axis=-1), one),
        "scan_sum": (lambda y: jnp.cumsum(y, axis=-1), x),
        "scatter": (lambda y: y.at[jnp.arange(8) * 3].add(1.0), x),
        "gather": (lambda y: y[jnp.array([3, 1, 2])], x),
        "fft": (lambda y: jnp.fft.fft(y).real, x),
        "cholesky": (lambda y: jnp.linalg.cholesky(y @ y.T + jnp.eye(64)), one),
        "solve": (lambda y: jnp.linalg.solve(y, y), one),
        "random": (lambda y: y + jax.random.normal(jax.random.key(0), y.shape), x),
        "top_k": (lambda y: lax.top_k(y, 4), one),
        "complex": (lambda y: jnp.abs(jnp.exp(1j * y)), x),
        "int8": (
            lambda y: lax.dot_general(
                y.astype(jnp.int8),
                y.astype(jnp.int8),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32,
            ),
            x,
        ),
        "empty": (lambda y: y[:0], x),
        "scalar": (lambda y: y.sum(), x),
        "constant": (
            lambda: (
                jnp.arange(5.0).reshape(5, 1) * jnp.array([[1.5, 2.5], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 1.0]])
            ),
        ),
        "name": (jax.named_call(lambda y: y * 2, name='od"d {name}, ((%x = '), x),
    }


def data_parallel(axes, *, layers=2, width=1024, rows=1024):
    """A step of gradient descent: weights sharded over "fsdp", rows over both axes."""

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def step(weights, x):
        return [w - 0.01 * g for w, g in zip(weights, jax.grad(loss)(weights, x), strict=True)]

    weights = [spec((width, width), jnp.bfloat16, axes, "fsdp")] * layers
    return step, weights, spec((rows, width), jnp.bfloat16, axes, ("data", "fsdp"))
