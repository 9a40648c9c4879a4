"""The XLA attention kernel against the dense oracle: any shape, dtype, mask and order of hops."""

import dataclasses
import re
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from ringmoe import reference
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band
from ringmoe.pallas import attention_xla as kernel
from tests.helpers import TOLERANCE, assert_close, double


@dataclasses.dataclass(frozen=True)
class Case:
    """Shard `shard` of the queries attends all keys, which arrive in `num_hops` blocks, the last first.

    `t`, `s`: one shard's length. `config`: block lengths (b, k, t, s). Of the extras a case says whether each is there
    and, for bias and mask, which of its four dimensions are broadcast.
    """

    b: int = 2
    k: int = 2
    group: int = 2
    t: int = 5
    s: int = 7
    h: int = 4
    num_shards: int = 2
    shard: int = 1
    num_hops: int = 2
    config: tuple[int, int, int, int] | None = (1, 1, 2, 3)
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias: tuple[bool, bool, bool, bool] | None = None
    mask: tuple[bool, bool, bool, bool] | None = None
    lengths: bool = False
    segments: bool = False
    seed: int = 0

    def arrays(self):
        """Global arrays in float64, with the oracle's argument names and layout; the cotangents of out and lse."""
        rng = np.random.default_rng(self.seed)
        num_queries, num_keys, heads = self.t * self.num_shards, self.s * self.num_hops, self.k * self.group
        pairs = (self.b, heads, num_queries, num_keys)
        args = {
            "query": rng.normal(size=(self.b, num_queries, heads, self.h)),
            "key": rng.normal(size=(self.b, num_keys, self.k, self.h)),
            "value": rng.normal(size=(self.b, num_keys, self.k, self.h)),
        }
        if self.bias is not None:
            args["bias"] = rng.normal(size=[1 if one else n for one, n in zip(self.bias, pairs)])
        if self.mask is not None:
            args["mask"] = rng.random([1 if one else n for one, n in zip(self.mask, pairs)]) < 0.7
        if self.lengths:
            args["query_seq_lengths"] = rng.integers(0, num_queries + 2, self.b, np.int32)
            args["key_value_seq_lengths"] = rng.integers(0, num_keys + 2, self.b, np.int32)
        if self.segments:
            args["query_segment_ids"] = np.sort(rng.integers(0, 3, (self.b, num_queries), np.int32))
            args["key_value_segment_ids"] = np.sort(rng.integers(0, 3, (self.b, num_keys), np.int32))
        shape = args["query"].shape
        return args, rng.normal(size=shape), rng.normal(size=shape[:-1])


@st.composite
def cases(draw):
    integer = lambda low, high: draw(st.integers(low, high))
    b, k, t, s = integer(1, 2), integer(1, 3), integer(1, 9), integer(1, 9)
    num_shards = integer(1, 3)
    sides = st.none() | st.integers(0, 12)
    dims = st.none() | st.tuples(*[st.booleans()] * 4)
    return Case(
        b, k, integer(1, 3), t, s, integer(1, 5), num_shards, integer(0, num_shards - 1), integer(1, 3),
        (integer(1, b), k if draw(st.booleans()) else 1, integer(1, t), integer(1, s)),
        draw(st.booleans()), draw(st.none() | st.tuples(sides, sides)), draw(dims), draw(dims),
        draw(st.booleans()), draw(st.booleans()), integer(0, 99),
    )  # fmt: skip


def oracle(case: Case, args, do, dlse):
    """Output, lse and the gradients by query, key, value (and bias) of the case's shard of queries."""
    rows = slice(case.shard * case.t, (case.shard + 1) * case.t)
    names = [n for n in ("query", "key", "value", "bias") if n in args]

    @partial(jax.grad, has_aux=True)
    def run(wrt):
        out, lse = reference.dot_product_attention(
            **{**args, **wrt}, is_causal=case.is_causal, local_window_size=case.window
        )
        out, lse = out[:, rows], lse[:, rows]
        return jnp.sum(out * do[:, rows]) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse * dlse[:, rows])), (out, lse)

    grads, (out, lse) = jax.jit(run)({n: args[n] for n in names})
    return out, lse, grads | {"query": grads["query"][:, rows]}


def cut(x, rows: slice | None, keys: slice | None):
    """The local rows and keys of a [B|1, N|1, T|1, S|1] array."""
    x = x if rows is None or x.shape[2] == 1 else x[:, :, rows]
    return x if keys is None or x.shape[3] == 1 else x[..., keys]


def local(case: Case, args, hop: int):
    """k, v, extras and offsets of one hop."""
    rows = slice(case.shard * case.t, (case.shard + 1) * case.t)
    keys = slice(hop * case.s, (hop + 1) * case.s)
    has = lambda name, index: args[name][index] if name in args else None
    extras = Extras(
        *(cut(args[n], rows, keys) if n in args else None for n in ("bias", "mask")),
        has("query_seq_lengths", ...), has("key_value_seq_lengths", ...),
        has("query_segment_ids", np.s_[:, rows]), has("key_value_segment_ids", np.s_[:, keys]),
    )  # fmt: skip
    k, v = (args[n][:, keys].swapaxes(1, 2) for n in ("key", "value"))
    return k, v, extras, Offsets((np.int32(rows.start),), (np.int32(keys.start),)), keys


def run(case: Case, args, do, dlse, dtype):
    """What `oracle` returns, by the kernel and hop by hop, with q, k, v and do in `dtype`.

    Around the kernel all is NumPy's: JAX would compile each operation for each shape.
    """
    spec = AttentionSpec(case.h**-0.5, Band.make(case.is_causal, case.window), bias_gradient="bias" in args)
    config = case.config and kernel.Config(*(next(d for d in range(n, 0, -1) if full % d == 0) for n, full in zip(
        case.config[:2], (case.b, case.k))), *case.config[2:])  # fmt: skip
    rows = slice(case.shard * case.t, (case.shard + 1) * case.t)
    args = args | {n: args[n].astype(dtype) for n in ("query", "key", "value")}
    q, do = (x.astype(dtype)[:, rows].swapaxes(1, 2) for x in (args["query"], do))
    hops = [local(case, args, hop) for hop in reversed(range(case.num_hops))]

    forward = jax.jit(partial(kernel.forward, spec, config=config))
    backward = jax.jit(partial(kernel.backward, spec, config=config))
    state = jax.jit(partial(kernel.init, spec))(q, hops[0][1])
    for k, v, extras, at, _ in hops:
        kernel.check(spec, q, k, v, extras)
        state = forward(state, q, k, v, extras, at)
    o, lse, _ = map(np.asarray, jax.jit(partial(kernel.finish, spec))(state))
    assert o.dtype == lse.dtype == jnp.promote_types(jnp.float32, dtype)

    delta = np.sum(do.astype(o.dtype) * o, -1) - dlse[:, rows].swapaxes(1, 2).astype(o.dtype)
    dq = None
    total = {n: np.zeros(args[n].shape) for n in ("key", "value", "bias") if n in args}
    for k, v, extras, at, keys in hops:
        dq, dk, dv, dbias = backward(dq, q, k, v, do, lse, delta, extras, at)
        total["key"][:, keys] += np.swapaxes(dk, 1, 2)
        total["value"][:, keys] += np.swapaxes(dv, 1, 2)
        if dbias is not None:
            cut(total["bias"], rows, keys)[...] += dbias
    return o.swapaxes(1, 2), lse.swapaxes(1, 2), total | {"query": np.swapaxes(dq, 1, 2)}


def compare(case: Case, dtype=jnp.float64):
    with jax.enable_x64(True):
        args, do, dlse = case.arrays()
        expected = oracle(case, args, do, dlse)
        actual = run(case, args, do, dlse, dtype)
        forward, gradient = TOLERANCE[jnp.dtype(dtype)]
        assert_close(actual[0], expected[0], forward, "out")
        assert_close(actual[1], expected[1], forward, "lse")
        assert actual[2].keys() == expected[2].keys()
        for name in expected[2]:
            assert_close(actual[2][name], expected[2][name], gradient, f"gradient by {name}")


@settings(max_examples=15)
@given(cases())
def test_equals_dense_oracle(case):
    compare(case)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_dtypes(dtype, extras):
    whole = (False, False, False, False)
    more = {"bias": whole, "mask": whole, "lengths": True, "segments": True} if extras else {}
    compare(Case(t=40, s=24, h=8, num_hops=3, config=(2, 1, 16, 16), is_causal=True, **more), dtype)


def test_default_blocks_longer_than_one_block():
    compare(Case(b=1, k=1, group=1, t=600, s=700, num_hops=1, num_shards=1, shard=0, config=None, is_causal=True))


@pytest.mark.parametrize("broadcast", [0, 10, 15])
def test_bias_gradient_sums_over_broadcast_dims(broadcast):
    dims = tuple(bool(broadcast >> d & 1) for d in range(4))
    compare(Case(bias=dims, window=(3, 2)))


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (None, 3), (0, None), (2, 0), (0, 5), (4, 1)])
@pytest.mark.parametrize(("t", "s", "block_t", "block_s"), [(6, 8, 2, 4), (7, 5, 3, 2), (1, 9, 1, 4), (8, 3, 5, 3)])
def test_only_blocks_that_meet_are_visited(left, right, t, s, block_t, block_s):
    """At all pairs of offsets both passes visit the blocks in which a pair is seen, and leave whole ones unmasked.

    The last block of the inner loop, where it is not whole, may be visited for keys that its whole length would hold.
    """
    band, config = Band(left, right), kernel.Config(1, 1, block_t, block_s)
    q, k = jnp.ones((1, 1, t, 1)), jnp.ones((1, 1, s, 1))

    def look(outer, inner, n, m, query_offset, key_offset):
        walk = kernel._Walk.make(
            AttentionSpec(1.0, band), config, q, k, Extras(), Offsets((query_offset,), (key_offset,))
        )
        tile = walk.tile(n, outer)
        first, last = walk.bounds(tile, inner)
        tell = lambda _, tile, masked: jnp.bool_(masked)
        masked = walk.at_block(tell, None, tile | {inner: walk.span(inner, m)}, None)
        return (first <= m) & (m < last), masked

    for outer, inner in ("ts", "st"):
        count = {"t": -(-t // block_t), "s": -(-s // block_s)}
        grid = np.indices((count[outer], count[inner], 16, 16), np.int32).reshape(4, -1)
        visited, masked = jax.jit(jax.vmap(partial(look, outer, inner)))(*grid)
        for n, m, query_offset, key_offset, visit, mask in zip(*grid, np.asarray(visited), np.asarray(masked)):
            i, j = (n, m) if outer == "t" else (m, n)
            queries = query_offset + np.arange(i * block_t, min((i + 1) * block_t, t))
            keys = key_offset + np.arange(j * block_s, min((j + 1) * block_s, s))
            relative = queries[:, None] - keys
            seen = (relative <= (99 if left is None else left)) & (relative >= (-99 if right is None else -right))
            is_whole = {"t": len(queries) == block_t, "s": len(keys) == block_s}
            assert visit == seen.any() or (visit and not is_whole[inner])
            assert mask == (not (seen.all() and all(is_whole.values())))


THREE_AND_FIVE = jnp.repeat(jnp.array([[0, 1]], jnp.int32), jnp.array([12, 20]), 1)


@pytest.mark.parametrize(("extras", "visited", "masked"), [
    # Row blocks 0, 1 and 2..7 see 1, 2 and 3 key blocks; the diagonal and the block that holds the end are masked.
    (Extras(key_lengths=jnp.array([9], jnp.int32)), 1 + 2 + 6 * 3, 1 + 1 + 6),
    # Three blocks and five of a segment each, in which the diagonal is masked.
    (Extras(query_segments=THREE_AND_FIVE, key_segments=THREE_AND_FIVE), 1 + 2 + 3 + 1 + 2 + 3 + 4 + 5, 8),
    # A segment that ends in a block: it is met by both, and masked wherever it is met.
    (Extras(query_segments=THREE_AND_FIVE, key_segments=jnp.roll(THREE_AND_FIVE, -1)), 6 + 2 + 3 + 4 + 5 + 6, 3 + 5 + 5),
])  # fmt: skip
def test_what_nobody_sees_is_skipped(monkeypatch, extras, visited, masked):
    """Key blocks past the longest sequence, or of other segments, are not computed, neither forward nor backward."""
    computed = []
    logits = kernel._Walk.logits

    def counted(self, q_tile, k_tile, tile, masked):
        jax.debug.callback(lambda: computed.append(masked))
        return logits(self, q_tile, k_tile, tile, masked)

    monkeypatch.setattr(kernel._Walk, "logits", counted)
    spec, config = AttentionSpec(1.0, Band(right=0)), kernel.Config(1, 1, 4, 4)
    x = jnp.ones((1, 1, 32, 2))
    state = jax.jit(
        lambda: kernel.forward(spec, kernel.init(spec, x, x), x, x, x, extras, Offsets((0,), (0,)), config)
    )()
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert (len(computed), sum(computed)) == (visited, masked)

    computed.clear()
    o, lse, _ = kernel.finish(spec, state)
    out = jax.jit(
        lambda: kernel.backward(spec, None, x, x, x, x, lse, jnp.sum(o, -1), extras, Offsets((0,), (0,)), config)
    )()
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert (len(computed), sum(computed)) == (visited, masked)


CAUSAL = Band(right=0)


def plain(q, k, v, *, band=CAUSAL, config=None, axis=None, num_hops=1):
    """Differentiable BTNH attention from the kernel's four functions: a ring over `axis`, or one hop."""
    spec = AttentionSpec(q.shape[-1] ** -0.5, band)
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    t, s = q.shape[1], k.shape[1]

    def at(hop):
        me = 0 if axis is None else jax.lax.axis_index(axis)
        return Offsets((me * t,), ((me + hop) % num_hops * s,))

    shift = lambda x: (
        x if axis is None else jax.lax.ppermute(x, axis, [(i, (i - 1) % num_hops) for i in range(num_hops)])
    )

    @jax.custom_vjp
    def attend(q, k, v):
        return attend_forward(q, k, v)[0]

    def attend_forward(q, k, v):
        q, k, v = swap(q), swap(k), swap(v)
        state, kv = kernel.init(spec, q, v), (k, v)
        for hop in range(num_hops):
            state = kernel.forward(spec, state, q, *kv, Extras(), at(hop), config)
            kv = jax.tree.map(shift, kv)
        o, lse, _ = kernel.finish(spec, state)
        return swap(o), (q, k, v, o, lse)

    def attend_backward(residual, do):
        q, k, v, o, lse = residual
        do = swap(do)
        dq, rest = None, (k, v, jnp.zeros_like(k), jnp.zeros_like(v))
        for hop in range(num_hops):
            k, v, dk, dv = rest
            grads = kernel.backward(spec, dq, q, k, v, do, lse, jnp.sum(do * o, -1), Extras(), at(hop), config)
            dq, rest = grads.dq, jax.tree.map(shift, (k, v, dk + grads.dk, dv + grads.dv))
        return swap(dq), swap(rest[2]), swap(rest[3])

    attend.defvjp(attend_forward, attend_backward)
    return attend(q, k, v)


@pytest.mark.parametrize("check_vma", [False, True])
def test_ring_inside_shard_map(check_vma):
    num_hops = 8
    mesh = jax.make_mesh((num_hops,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = jax.random.normal(jax.random.key(0), (4, 2, 6 * num_hops, 2, 4))
    spec = P(None, "seq")

    def ring(q, k, v):
        return plain(q, k, v, axis="seq", num_hops=num_hops, config=kernel.Config(1, 1, 4, 4))

    ring = jax.shard_map(ring, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)
    dense = lambda q, k, v: reference.dot_product_attention(q, k, v, is_causal=True)[0]

    @partial(jax.jit, static_argnums=0)
    def output_and_gradients(attend, q, k, v, do):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(do)

    for actual, expected in zip(output_and_gradients(ring, *arrays), output_and_gradients(dense, *arrays)):
        assert_close(actual, expected, TOLERANCE[jnp.dtype(jnp.float32)][1])


def test_rows_without_keys_are_zero_and_give_no_gradient():
    q, k, v, do = jax.random.normal(jax.random.key(0), (4, 1, 1, 8, 4))
    spec, at = AttentionSpec(1.0, Band(right=0)), Offsets((-5,), (0,))  # only queries 5, 6, 7 see a key
    state = kernel.forward(spec, kernel.init(spec, q, v), q, k, v, Extras(), at, kernel.Config(1, 1, 4, 4))
    o, lse, _ = kernel.finish(spec, state)
    assert jnp.all(o[:, :, :5] == 0) and jnp.all(jnp.isneginf(lse[:, :, :5]))
    assert jnp.all(jnp.isfinite(lse[:, :, 5:]))
    grads = kernel.backward(spec, None, q, k, v, do, lse, jnp.sum(do * o, -1), Extras(), at)
    assert jnp.all(jnp.isfinite(jnp.stack(grads[:3]))) and jnp.all(grads.dq[:, :, :5] == 0)


def test_bias_of_minus_infinity_masks():
    q, k, v, do = jax.random.normal(jax.random.key(0), (4, 1, 1, 4, 4))
    bias = jnp.zeros((1, 1, 4, 4)).at[:, :, 1].set(-jnp.inf).at[:, :, 2, :3].set(-jnp.inf)
    spec, extras, at = AttentionSpec(1.0), Extras(bias), Offsets((0,), (0,))
    o, lse, _ = kernel.finish(spec, kernel.forward(spec, kernel.init(spec, q, v), q, k, v, extras, at))
    assert jnp.all(o[0, 0, 1] == 0) and jnp.isneginf(lse[0, 0, 1])
    assert_close(o[0, 0, 2], v[0, 0, 3], 1e-6)
    spec = dataclasses.replace(spec, bias_gradient=True)
    grads = kernel.backward(spec, None, q, k, v, do, lse, jnp.sum(do * o, -1), extras, at)
    assert jnp.all(jnp.isfinite(jnp.stack(grads))) and jnp.all(grads.dq[0, 0, 1] == 0)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["query", "key", "value", "do"])
@pytest.mark.parametrize("block", [5, 16])
def test_nan_reaches_only_rows_that_see_it(name, block):
    """A NaN at position 6 of one array reaches the queries that see it and the keys that those see, and no others."""
    q, k, v, do = jax.random.normal(jax.random.key(0), (4, 1, 16, 1, 4))
    arrays = {"query": q, "key": k, "value": v, "do": do}
    arrays[name] = arrays[name].at[0, 6, 0, 1].set(jnp.nan)
    attend = partial(plain, config=kernel.Config(1, 1, block, block), band=Band(left=3, right=0))
    o, vjp = jax.vjp(attend, arrays["query"], arrays["key"], arrays["value"])
    nan = lambda x: set(np.flatnonzero(np.isnan(x).any((0, 2, 3))))
    rows = {6} if name in ("query", "do") else set(range(6, 10))
    keys = {j for i in rows for j in range(i - 3, i + 1)}
    assert nan(o) == (set() if name == "do" else rows)
    dq, dk, dv = map(nan, vjp(arrays["do"]))
    assert dq == rows and dk == keys and dv == keys


def test_temporary_memory_is_linear_in_length():
    def compiled(t):
        x = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
        gradient = jax.grad(
            lambda q, k, v: jnp.sum(plain(q, k, v, config=kernel.Config(1, 1, 128, 128)) ** 2), (0, 1, 2)
        )
        return jax.jit(gradient).lower(x, x, x).compile()

    t = 2048
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w+\[([\d,]+)\]", compiled(t).as_text())
    ]
    assert 128 * 128 <= max(sizes) < t * t / 64
    small, large = (compiled(n).memory_analysis().temp_size_in_bytes for n in (t, 2 * t))
    assert large < 2.1 * small


@pytest.mark.parametrize("shared", [
    {"is_causal": True}, {"local_window_size": (2, 3)}, {"local_window_size": 2, "is_causal": True}, {"scale": 0.3},
    {"bias": (2, 1, 5, 5)}, {"bias": (1, 4, 1, 5)}, {"mask": (2, 4, 5, 5)}, {"query_seq_lengths": [5, 3]},
    {"key_value_seq_lengths": [2, 4]},
], ids="-".join)  # fmt: skip
def test_oracle_equals_jax_nn(shared):
    keys = iter(jax.random.split(jax.random.key(0), 4))
    q = jax.random.normal(next(keys), (2, 5, 4, 8))
    k, v = jax.random.normal(next(keys), (2, 2, 5, 2, 8))
    shared = dict(shared)
    if "bias" in shared:
        shared["bias"] = jax.random.normal(next(keys), shared["bias"])
    if "mask" in shared:  # every row sees a key: where none does, jax.nn averages all values
        shared["mask"] = jax.random.bernoulli(next(keys), 0.5, shared["mask"]).at[..., 0].set(True)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in shared:
            shared[name] = jnp.array(shared[name], jnp.int32)
    out, lse = reference.dot_product_attention(q, k, v, **shared)
    expected, residual = jax.nn.dot_product_attention(q, k, v, **shared, return_residual=True)
    assert_close(out, expected, 1e-5)
    real = ~jnp.isneginf(lse)
    assert_close(jnp.where(real, lse, 0), jnp.where(real, residual, 0), 1e-5)
    num_real = shared.get("query_seq_lengths", jnp.array([5, 5]))
    assert jnp.all(real == (jnp.arange(5) < num_real[:, None])[..., None])


def test_reject_what_is_not_supported():
    q = jnp.ones((1, 1, 2, 2), jnp.int32)
    with pytest.raises(NotImplementedError, match="int32"):
        kernel.check(AttentionSpec(1.0), q, q, q, Extras())


@pytest.mark.parametrize(("q_shape", "k_shape"), [
    ((1, 8, 8192, 64), (1, 8, 8192, 64)), ((64, 32, 1, 128), (64, 8, 4096, 128)), ((3, 7, 33, 5), (3, 7, 100, 5)),
    ((1, 128, 4096, 128), (1, 1, 4096, 128)), ((1, 1, 1, 1), (1, 1, 1, 1)),
])  # fmt: skip
def test_chosen_blocks_fit(q_shape, k_shape):
    config = kernel.Config.choose(q_shape, k_shape)
    assert q_shape[0] % config.b == 0 and k_shape[1] % config.k == 0
    assert config.t <= q_shape[2] and config.s <= k_shape[2]
    logits = config.b * config.k * (q_shape[1] // k_shape[1]) * config.t * config.s
    assert logits <= kernel.TILE
    with pytest.raises(AssertionError):
        dataclasses.replace(config, t=0)


def test_blocks_of_a_narrow_window_are_short():
    long, other = (1, 2, 4096, 16), (1, 1, 4096, 16)
    blocks = lambda *band: dataclasses.astuple(kernel.Config.choose(long, other, Band(*band)))[2:]
    assert blocks() == blocks(None, 0) == blocks(4095, 0) == (256, 512)
    assert blocks(32, 0) == blocks(64, 64) == (128, 128)
    assert blocks(200, 0) == (200, 200)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_error_does_not_grow_with_the_hops(dtype):
    """Of 64 simulated ones, output and dq, against float64: at most 1.2 times that of one."""
    rng, spec = np.random.default_rng(0), AttentionSpec(0.25)
    q, k, v, do = (jnp.asarray(rng.normal(size=(1, 2, n, 16)), dtype) for n in (32, 4096, 4096, 32))
    with jax.enable_x64(True):

        def dense(q):
            major = (x.swapaxes(1, 2) for x in (q, *double((k, v))))
            return reference.dot_product_attention(*major, scale=spec.scale)[0].swapaxes(1, 2)

        want, pull = jax.vjp(dense, *double((q,)))
        (want_dq,) = pull(double((do,))[0])

    def errors(hops):
        parts = [(i, x, y) for i, (x, y) in enumerate(zip(*(jnp.split(x, hops, 2) for x in (k, v))))]
        at = lambda i: Offsets((0,), (i * (4096 // hops),))
        # A hop is compiled once, not for each place.
        forward = jax.jit(lambda state, x, y, i: kernel.forward(spec, state, q, x, y, Extras(), at(i)))
        backward = jax.jit(
            lambda dq, x, y, lse, delta, i: kernel.backward(spec, dq, q, x, y, do, lse, delta, Extras(), at(i))
        )
        state = kernel.init(spec, q, v)
        for i, x, y in parts:
            state = forward(state, x, y, i)
        o, lse, _ = kernel.finish(spec, state)
        o, dq = o.astype(dtype), jnp.zeros(q.shape, jnp.float32)  # each hop a sum: one program
        delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)
        for i, x, y in parts:
            dq = backward(dq, x, y, lse, delta, i).dq
        rms = lambda got, want: float(np.sqrt(np.mean((np.asarray(got, np.float64) - np.asarray(want)) ** 2)))
        return rms(o, want), rms(dq.astype(dtype), want_dq)

    for many, one in zip(errors(64), errors(1), strict=True):
        assert 0 < many <= 1.2 * one
