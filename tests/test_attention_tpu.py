"""The TPU attention kernel against a dense oracle in Pallas's interpreter, and compiled for four TPUs."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from ringmoe import softmax
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band
from ringmoe.pallas import attention_tpu, tiles_tpu

FULL, CAUSAL, WINDOW = Band(), Band(right=0), Band(70, 20)
TILES = attention_tpu.Config(block_q=128, block_k=64, chunk=32)  # small, so that a small problem has several of each
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 5e-2)}  # forward, gradients


def random_inputs(n=2, kv_heads=1, t=256, s=256, h=32, dtype="float32"):
    """q, k, v, do."""
    shapes = (1, n, t, h), (1, kv_heads, s, h), (1, kv_heads, s, h), (1, n, t, h)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def dense(spec, q, k, v, do, at=(0, 0)):
    """(o, lse, dq, dk, dv) by a whole softmax in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    group = q.shape[1] // k.shape[1]
    k_n, v_n = np.repeat(k, group, 1), np.repeat(v, group, 1)
    i, j = at[0] + np.arange(q.shape[2])[:, None], at[1] + np.arange(k.shape[2])
    seen = np.ones((q.shape[2], k.shape[2]), bool)
    if spec.band.right is not None:
        seen &= j <= i + spec.band.right
    if spec.band.left is not None:
        seen &= j >= i - spec.band.left
    e = np.where(seen, np.exp(spec.scale * q @ k_n.swapaxes(2, 3)), 0)
    total = e.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    p = e / np.where(total == 0, 1, total)[..., None]
    o = p @ v_n
    ds = spec.scale * p * (do @ v_n.swapaxes(2, 3) - (o * do).sum(-1, keepdims=True))
    dk, dv = ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ do
    dk, dv = (x.reshape(1, k.shape[1], group, *k.shape[2:]).sum(2) for x in (dk, dv))
    return o, lse, ds @ k_n, dk, dv


def hops(k, v, num_hops, key_offset):
    """Pieces of the keys in ring order from the middle on, each with its offset."""
    size = k.shape[2] // num_hops
    for hop in range(num_hops):
        at = (num_hops // 2 - hop) % num_hops * size
        yield k[:, :, at : at + size], v[:, :, at : at + size], slice(at, at + size), key_offset + at


@functools.partial(jax.jit, static_argnames=("spec", "num_hops", "config"))
def forward(spec, q, k, v, at=(0, 0), num_hops=1, config=TILES):
    state = attention_tpu.init(spec, q, v)
    for k_hop, v_hop, _, key_offset in hops(k, v, num_hops, at[1]):
        state = attention_tpu.forward(spec, state, q, k_hop, v_hop, Extras(), Offsets((at[0],), (key_offset,)), config)
    return attention_tpu.finish(spec, state)[:2]


@functools.partial(jax.jit, static_argnames=("spec", "num_hops", "config"))
def backward(spec, q, k, v, do, o, lse, at=(0, 0), num_hops=1, config=TILES):
    delta = jnp.sum(jnp.asarray(o, jnp.float32) * do.astype(jnp.float32), -1)
    lse, dq, dk, dv = jnp.asarray(lse, jnp.float32), None, *(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for k_hop, v_hop, piece, key_offset in hops(k, v, num_hops, at[1]):
        offsets = Offsets((at[0],), (key_offset,))
        grads = attention_tpu.backward(spec, dq, q, k_hop, v_hop, do, lse, delta, Extras(), offsets, config)
        dq, dk, dv = grads.dq, dk.at[:, :, piece].set(grads.dk), dv.at[:, :, piece].set(grads.dv)
    return dq, dk, dv


def close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


CASES = pytest.mark.parametrize(
    ("band", "dtype", "num_hops", "heads"),
    [
        (FULL, "float32", 1, (2, 2)),
        (CAUSAL, "float32", 2, (2, 1)),
        (CAUSAL, "bfloat16", 2, (4, 2)),
        (WINDOW, "float32", 2, (2, 1)),
    ],
    ids=lambda x: str(x),
)


@pytest.mark.sampled
@CASES
def test_forward_over_hops_is_dense_attention(races, band, dtype, num_hops, heads):
    spec = AttentionSpec(0.2, band)
    q, k, v, do = random_inputs(*heads, dtype=dtype)
    close(forward(spec, q, k, v, num_hops=num_hops), dense(spec, q, k, v, do)[:2], TOLERANCES[dtype][0])


@pytest.mark.sampled
@CASES
def test_backward_over_hops_is_dense_attentions(races, band, dtype, num_hops, heads):
    spec = AttentionSpec(0.2, band)
    q, k, v, do = random_inputs(*heads, dtype=dtype)
    o, lse, *expected = dense(spec, q, k, v, do)
    close(backward(spec, q, k, v, do, o, lse, num_hops=num_hops), expected, TOLERANCES[dtype][1])


@pytest.mark.parametrize("blocks", [1, 2])
def test_backward_in_runs_of_query_blocks(races, blocks):
    """Where dq of all queries doesn't fit VMEM, several calls cover them; a run may end inside a head."""
    spec = AttentionSpec(0.2, CAUSAL)
    q, k, v, do = random_inputs(n=2, s=128)
    o, lse, *expected = dense(spec, q, k, v, do)
    config = attention_tpu.Config(block_q=128, block_k=64, chunk=32, resident_bytes=blocks * 128 * q.shape[3] * 4)
    close(backward(spec, q, k, v, do, o, lse, config=config), expected, 1e-4)


DIAGONAL = attention_tpu.Config(block_q=256, block_k=512, chunk=256)


@pytest.mark.parametrize(("t", "at"), [(512, (0, 0)), (512, (256, 256)), (256, (320, 64)), (256, (64, 0))], ids=str)
def test_along_the_diagonal(races, t, at):
    """Queries that begin with the first key of a block, with one in the middle of it, and elsewhere."""
    spec = AttentionSpec(0.2, CAUSAL)
    q, k, v, do = random_inputs(n=1, t=t, s=512)
    expected = dense(spec, q, k, v, do, at)
    close(forward(spec, q, k, v, at, config=DIAGONAL), expected[:2], 1e-5)
    close(backward(spec, q, k, v, do, *expected[:2], at, config=DIAGONAL), expected[2:], 1e-4)


@pytest.mark.parametrize("last", [128, 384])
def test_along_the_diagonal_queries_meet_few_keys_after_theirs(races, last):
    """What a query is computed with spreads its NaN, since 0 * NaN is NaN."""
    spec = AttentionSpec(0.2, CAUSAL)
    q, k, v, do = random_inputs(n=1, t=512, s=512)
    v = v.at[:, :, last:].set(jnp.nan)
    o, lse = forward(spec, q, k, v, config=DIAGONAL)
    assert np.isfinite(o[:, :, :last]).all() and np.isnan(o[:, :, last:]).all()
    dq, _, _ = backward(spec, q, k, v, do, jnp.nan_to_num(o), lse, config=DIAGONAL)
    assert np.isfinite(dq[:, :, :last]).all()


@pytest.mark.parametrize("config", [TILES, tiles_tpu.DEFAULT["forward"]], ids=["small", "default"])
def test_lengths_that_no_tile_divides(races, config):
    spec = AttentionSpec(0.2, CAUSAL)
    q, k, v, do = random_inputs(t=100, s=48 if config is TILES else 300)
    expected = dense(spec, q, k, v, do, (20, 0))
    close(forward(spec, q, k, v, (20, 0), config=config), expected[:2], 1e-5)
    close(backward(spec, q, k, v, do, *expected[:2], (20, 0), config=config), expected[2:], 1e-4)


@pytest.mark.parametrize(("band", "at"), [(CAUSAL, (0, 40)), (CAUSAL, (0, 128)), (WINDOW, (150, 0))], ids=str)
def test_rows_without_keys(races, band, at):
    """They give 0 and -inf and gradients of 0; the other rows don't notice."""
    spec = AttentionSpec(0.2, band)
    q, k, v, do = random_inputs(n=1, t=128, s=128)
    expected = dense(spec, q, k, v, do, at)
    assert np.isneginf(expected[1]).any()
    o, lse = forward(spec, q, k, v, at)
    close((o, lse), expected[:2], 1e-5)
    close(backward(spec, q, k, v, do, o, lse, at), expected[2:], 1e-4)


def test_hidden_blocks_are_not_computed(races):
    """A computed block would spread its NaN, since 0 * NaN is NaN."""
    spec = AttentionSpec(0.2, Band(64, 0))
    q, k, v, do = random_inputs(n=1, t=128, s=192)
    at = (256, 128)  # queries 256 .. 384 see keys 192 .. 384: all but the first block
    k, v = k.at[:, :, :64].set(jnp.nan), v.at[:, :, :64].set(jnp.nan)
    o, lse = forward(spec, q, k, v, at)
    assert np.isfinite(o).all()
    dq, dk, dv = backward(spec, q, k, v, do, o, lse, at)
    assert np.isfinite(dq).all() and not np.any(dk[:, :, :64]) and not np.any(dv[:, :, :64])


def test_skipped_steps_fetch_no_new_block():
    fetched = [int(tiles_tpu.within(j, (2, 5), 8)) for j in range(8)]
    assert fetched == [2, 2, 2, 3, 4, 4, 4, 4]
    assert [int(tiles_tpu.within(j, (0, 0), 8)) for j in range(8)] == [0] * 8


def test_spec_interpret_needs_no_context():
    spec = AttentionSpec(0.2, FULL, interpret=True)
    q, k, v, do = random_inputs(n=1, t=128, s=64)
    close(forward(spec, q, k, v), dense(spec, q, k, v, do)[:2], 1e-5)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (((1, 1, 64, 64), "float16"), ((1, 1, 64, 64), "bfloat16"), "bfloat16"),
        (((1, 1, 64, 64), "float64"), ((1, 1, 64, 64), "float64"), "float64"),
        (((1, 1, 64, 64), "float32"), ((1, 1, 64, 64), "bfloat16"), "bfloat16"),
        (((1, 1, 64, 640), "float32"), ((1, 1, 64, 640), "float32"), "head dims 640 and 640"),
    ],
)
def test_check_says_what_it_lacks(q, k, message):
    q, k = jax.ShapeDtypeStruct(*q), jax.ShapeDtypeStruct(*k)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=message):
        attention_tpu.check(AttentionSpec(1.0), q, k, k, Extras())


def test_check_refuses_pieces_that_no_block_divides():
    q = jax.ShapeDtypeStruct((1, 1, 2 * 1100, 64), "float32")
    with pytest.raises(NotImplementedError, match="1100 tokens, more than 512 and in no blocks of 128"):
        attention_tpu.check(AttentionSpec(1.0, pieces=2), q, q, q, Extras())


@pytest.mark.parametrize("field", [{"block_q": 64}, {"block_k": 24}, {"chunk": 0}, {"resident_bytes": 0}])
def test_config_validates_itself(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        attention_tpu.Config(**field)


# ---- compiled for real machines, inside a ring ----


def ring_forward(spec, n, q, k, v):
    me, to_next = jax.lax.axis_index("sp"), [(i, (i + 1) % n) for i in range(n)]

    def hop(carry, i):
        state, k, v = carry
        following = jax.lax.ppermute((k, v), "sp", to_next)
        at = Offsets((me * q.shape[2],), ((me - i) % n * k.shape[2],))
        return (attention_tpu.forward(spec, state, q, k, v, Extras(), at), *following), None

    zeros = jax.lax.pcast(jnp.zeros((*q.shape[:2], q.shape[3], q.shape[2])), "sp", to="varying")
    state = attention_tpu.State(zeros, *(zeros[:, :, :1] + x for x in (softmax.initial_max(jnp.float32), 0)))
    state = jax.lax.scan(hop, (state, k, v), jnp.arange(n))[0][0]
    return attention_tpu.finish(spec, state)[:2]


def ring_backward(spec, n, q, k, v, do, lse, delta):
    """The sums of dk and dv follow their keys one hop late, so that no permute waits for the kernel of its hop."""
    me, to_next = jax.lax.axis_index("sp"), [(i, (i + 1) % n) for i in range(n)]

    def zeros(x):
        return jax.lax.pcast(jnp.zeros(x.shape, jnp.float32), "sp", to="varying")

    def add(sums, share):
        return jax.tree.map(jnp.add, sums, share)

    def hop(carry, i):
        dq, share, sums, k, v = carry
        following, sums = jax.lax.ppermute(((k, v), add(sums, share)), "sp", to_next)
        at = Offsets((me * q.shape[2],), ((me - i) % n * k.shape[2],))
        grads = attention_tpu.backward(spec, dq, q, k, v, do, lse, delta, Extras(), at)
        return (grads.dq, (grads.dk, grads.dv), sums, *following), None

    carry = (zeros(q), (zeros(k), zeros(v)), (zeros(k), zeros(v)), k, v)
    (dq, share, sums, _, _), _ = jax.lax.scan(hop, carry, jnp.arange(n))
    return dq, *jax.lax.ppermute(add(sums, share), "sp", to_next)


@pytest.mark.sampled
@pytest.mark.parametrize("target", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ring_hides_every_permute_behind_the_kernel(target, direction):
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    n = len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("sp",))
    sharded = PartitionSpec(None, None, "sp")

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharded))

    q, kv, row = array(1, 4, n * 2048, 128), array(1, 2, n * 2048, 128), array(1, 4, n * 2048, dtype=jnp.float32)
    ring, arguments = {
        "forward": (ring_forward, (q, kv, kv)),
        "backward": (ring_backward, (q, kv, kv, q, row, row)),
    }[direction]
    ring = functools.partial(ring, AttentionSpec(128**-0.5, CAUSAL), n)
    ring = jax.shard_map(ring, mesh=mesh, in_specs=(sharded,) * len(arguments), out_specs=sharded)
    text = jax.jit(ring).lower(*arguments).compile().as_text()

    assert "all-gather" not in text
    [loop] = [c for c in text.split("\n\n") if "collective-permute-start" in c and "tpu_custom_call" in c]
    starts, dones = (
        [m.start() for m in re.finditer(rf" collective-permute-{end}\(", loop)] for end in ("start", "done")
    )
    kernel = re.search(r" custom-call\(.*tpu_custom_call", loop)
    assert len(starts) == len(dones) == {"forward": 2, "backward": 4}[direction]
    assert max(starts) < kernel.start() < min(dones)
