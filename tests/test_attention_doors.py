"""Attention through every door, on every mesh, with everything it takes, against the dense oracle in float64."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import dropout, reference
from ringmoe.masks import Causal, Chunks, Prefix
from tests.helpers import (
    AXES,
    DOORS,
    EXPLICIT_RINGMOE_JIT,
    MANUAL,
    MANUAL_VMA,
    MESHES,
    ONE_DEVICE,
    PARTITIONER,
    RINGMOE_JIT,
    SHARDED_DOORS,
    TOLERANCE,
    TYPES,
    WITHOUT_SHRINKING,
    Door,
    assert_close,
    collectives,
    double,
    make_mesh,
    put,
    value_and_gradients,
)  # fmt: skip

ROLES = ("sequence", "batch", "heads", "groups", "keys only", "queries only", "nothing")
WANTED = ("query", "key", "value", "bias", "sinks")
MASK_FNS = {
    "prefix": Causal() | Prefix(5),
    "chunks": Chunks(3) & Causal(),
    "strided": lambda query, key: (query - key) % 3 == 0,
}
DROPOUT_KEY = 7  # of jax.random.key


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Every mesh axis has a role; a dim's length is its axes' size times the number given here."""

    door: Door = TYPES
    mesh: tuple[int, ...] = (8,)
    roles: tuple[str, ...] = ("sequence",)
    exchange: str = "auto"
    implementation: str | None = None
    dtype: str = "float32"
    b: int = 1
    t: int = 2
    s: int | None = None  # None: as many keys as queries
    k: int = 1
    g: int = 2
    h: int = 4
    is_causal: bool = False
    window: int | tuple[int, int] | None = None
    bias: tuple[bool, bool, bool, bool] | None = None  # which dims are broadcast
    mask: tuple[bool, bool, bool, bool] | None = None
    lengths: tuple[bool, bool] = (False, False)
    segments: bool = False
    positions: tuple[bool, bool] = (False, False)
    mask_fn: str | None = None  # of MASK_FNS
    cap: float | None = None
    sinks: bool = False
    slopes: bool = False
    dropout: float = 0.0
    v: int | None = None  # head dim of the values, where it is another
    float8: tuple[bool, bool] = (False, False)  # keys, values
    seed: int = 0

    def axes(self, *roles: str) -> tuple[str, ...]:
        return tuple(axis for axis, role in zip(AXES, self.roles) if role in roles)

    def size(self, *roles: str) -> int:
        return math.prod(self.mesh[AXES.index(axis)] for axis in self.axes(*roles))

    @property
    def shape(self):
        """B, T, S, K, N, H."""
        t = self.t * self.size("sequence", "queries only")
        s = t if self.s is None else self.s * self.size("sequence", "keys only")
        if self.s is None and s % self.size("sequence", "keys only"):
            s *= self.size("keys only")
        k = self.k * self.size("heads")
        return self.b * self.size("batch"), t, s, k, k * self.g * self.size("groups"), self.h

    @property
    def wanted(self):
        """What has a gradient."""
        return [name for name in WANTED if not dict(zip(("key", "value"), self.float8)).get(name)]

    @property
    def statics(self):
        mask_fn = None if self.mask_fn is None else MASK_FNS[self.mask_fn]
        both = {"mask_fn": mask_fn, "logits_soft_cap": self.cap, "dropout_rate": self.dropout}
        return {"is_causal": self.is_causal, "local_window_size": self.window, **both}

    def kept(self):
        """Which weights dropout keeps, [B, N, T, S]."""
        b, t, s, _, n, _ = self.shape
        seeds = dropout.seeds(jax.random.key(DROPOUT_KEY), (b,), n)[:, :, None, None]
        return dropout.kept(self.dropout, seeds, jnp.arange(t)[:, None], jnp.arange(s))

    def arrays(self):
        b, t, s, k, n, h = self.shape
        rng = np.random.default_rng(self.seed)
        floats = {"query": (b, t, n, h), "key": (b, s, k, h), "value": (b, s, k, self.v or h)}
        broadcast = lambda ones: tuple(1 if one else length for one, length in zip(ones, (b, n, t, s)))
        if self.bias is not None:
            floats["bias"] = broadcast(self.bias)
        floats |= {name: (n,) for name, has in (("sinks", self.sinks), ("alibi_slopes", self.slopes)) if has}
        found = {name: rng.normal(size=shape).astype(jnp.dtype(self.dtype)) for name, shape in floats.items()}
        for name, has in zip(("key", "value"), self.float8):
            if has:
                found[name] = found[name].astype(jnp.float8_e4m3fn if name == "key" else jnp.float8_e5m2)
                found[f"{name}_scales"] = rng.uniform(0.5, 2, (b, s, k)).astype(np.float32)
        if self.mask is not None:
            found["mask"] = rng.random(broadcast(self.mask)) < 0.7
        for name, length, given_ in zip(("query_seq_lengths", "key_value_seq_lengths"), (t, s), self.lengths):
            if given_:
                found[name] = rng.integers(0, length + 1, b).astype(np.int32)
        if self.segments:
            ids = lambda length: np.sort(rng.integers(0, 3, (b, length)), 1).astype(np.int32)
            found |= {"query_segment_ids": ids(t), "key_value_segment_ids": ids(s)}
        for name, length, given_ in zip(("query_positions", "key_value_positions"), (t, s), self.positions):
            if given_:
                found[name] = rng.integers(0, length, (b, length)).astype(np.int32)
        cotangents = (
            rng.normal(size=(b, t, n, self.v or h)).astype(np.float32),
            rng.normal(size=(b, t, n)).astype(np.float32),
        )
        return found, cotangents

    @property
    def specs(self):
        """Of each argument and of the results."""
        either = lambda *roles: self.axes(*roles) or None
        batch, queries, keys = either("batch"), either("sequence", "queries only"), either("sequence", "keys only")
        heads, kv_heads = (*self.axes("heads"), *self.axes("groups")) or None, either("heads")
        whole = lambda ones, *entries: P(*(None if one else entry for one, entry in zip(ones, entries)))
        logits = (batch, heads, queries, None)
        specs = {
            "query": P(batch, queries, heads), "key": P(batch, keys, kv_heads), "value": P(batch, keys, kv_heads),
            "bias": whole(self.bias or (), *logits), "mask": whole(self.mask or (), *logits),
            "query_seq_lengths": P(batch), "key_value_seq_lengths": P(batch),
            "query_segment_ids": P(batch, queries), "key_value_segment_ids": P(batch),
            "key_scales": P(batch, keys, kv_heads), "value_scales": P(batch, keys, kv_heads),
            "sinks": P(heads), "alibi_slopes": P(heads),
            "query_positions": P(batch, queries), "key_value_positions": P(batch),
        }  # fmt: skip
        return specs, (P(batch, queries, heads), P(batch, queries, heads))


def loss(out, cotangents):
    """Both results count: the LSE where it is finite."""
    (output, lse), (d_output, d_lse) = out, cotangents
    dtype = lse.dtype
    finite = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.sum(output.astype(dtype) * d_output.astype(dtype)) + jnp.sum(finite * d_lse.astype(dtype))


@functools.cache
def oracle(case: Case):
    """Results and gradients in float64."""
    arrays, cotangents = case.arrays()
    with jax.enable_x64(True):
        arrays, cotangents = double(arrays), double(cotangents)
        kept = case.kept() if case.dropout else None
        for name in ("key", "value"):
            if f"{name}_scales" in arrays:
                arrays[name] *= arrays.pop(f"{name}_scales")[..., None]
        fun = functools.partial(reference.dot_product_attention, kept=kept, **case.statics)
        return value_and_gradients(fun, loss, case.wanted, ONE_DEVICE, None, arrays, {}, cotangents)


def run(case: Case):
    arrays, cotangents = case.arrays()
    specs, out_specs = case.specs
    mesh = make_mesh(case.mesh, case.door.axis_type) if case.mesh else None
    fun = functools.partial(
        ringmoe.dot_product_attention,
        return_residual=True,
        exchange=case.exchange,
        implementation=case.implementation,
        dropout_key=jax.random.key(DROPOUT_KEY) if case.dropout else None,
        **case.statics,
    )
    with jax.enable_x64(case.dtype == "float64"):
        return value_and_gradients(
            fun, loss, case.wanted, case.door, mesh, arrays, specs, cotangents, out_specs, case.axes("sequence")
        )


def check(case: Case):
    (output, lse), grads = run(case)
    (want_output, want_lse), want_grads = oracle(
        dataclasses.replace(case, door=ONE_DEVICE, implementation=None, exchange="auto")
    )
    forward, gradient = TOLERANCE[jnp.dtype(case.dtype)]
    assert output.dtype == jnp.dtype(case.dtype) and lse.dtype == (
        np.float64 if case.dtype == "float64" else np.float32
    )
    assert_close(output, want_output, forward, "output")
    assert_close(lse, want_lse, forward, "LSE")
    assert sorted(grads) == sorted(want_grads)
    for name, grad in grads.items():
        assert grad.dtype == jnp.dtype(case.dtype)
        assert_close(grad, want_grads[name], gradient, f"gradient of {name}")


@st.composite
def cases(draw):
    mesh = draw(st.sampled_from(MESHES))
    door = draw(st.sampled_from(SHARDED_DOORS)) if mesh else ONE_DEVICE
    manual = door.check_vma is not None
    # In a user's shard_map the sequence lies over axis_name, and the other axes hide nothing from the op.
    roles = ("sequence", "batch", "heads") if manual else ROLES
    roles = tuple(draw(st.sampled_from(roles)) for _ in mesh)
    if not {"sequence", "keys only"} & set(roles):
        roles = ("sequence", *roles[1:]) if mesh else ()
    if {"sequence", "keys only"} <= set(roles) or {"sequence", "queries only"} <= set(roles):
        roles = tuple("sequence" if role.endswith("only") else role for role in roles)
    dims = st.tuples(*[st.booleans()] * 4)
    causal_like = draw(st.booleans())
    return Case(
        door=door, mesh=mesh, roles=roles,
        exchange=draw(st.sampled_from(("auto", "auto", "all_gather", "all_to_all", "merge"))),
        dtype=draw(st.sampled_from(("float32", "float32", "bfloat16", "float64"))),
        b=draw(st.integers(1, 2)), t=draw(st.sampled_from((1, 3, 4, 16))), s=draw(st.sampled_from((None, None, 2, 5))),
        k=draw(st.integers(1, 2)), g=draw(st.sampled_from((1, 3))), h=draw(st.sampled_from((1, 4))),
        is_causal=causal_like, window=draw(st.sampled_from((None, None, 0, 2, (5, 0), (1, 7)))),
        bias=draw(st.none() | dims), mask=draw(st.none() | dims),
        lengths=draw(st.sampled_from(((False, False), (True, False), (False, True), (True, True)))),
        segments=draw(st.booleans()), positions=draw(st.sampled_from((False, False, True)).flatmap(
            lambda some: st.tuples(st.booleans(), st.booleans()) if some else st.just((False, False))
        )), mask_fn=draw(st.sampled_from((None, None, *MASK_FNS))), cap=draw(st.sampled_from((None, None, 1.5))),
        sinks=draw(st.booleans()), slopes=draw(st.booleans()), v=draw(st.sampled_from((None, None, 3))),
        float8=draw(st.sampled_from(((False, False), (False, False), (True, True), (True, False)))),
        # In the user's shard_map a device of other sequences or heads would need a key of its own.
        dropout=draw(st.sampled_from((0.0, 0.0, 0.4))) if not manual or {*roles} <= {"sequence"} else 0.0,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@given(cases())
@settings(max_examples=20, phases=WITHOUT_SHRINKING)
def test_equals_the_dense_oracle(case):
    try:
        check(case)
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # drawn shardings need not suit a drawn exchange
        if f"exchange='{case.exchange}' was asked for, but" not in str(error):
            raise
        check(dataclasses.replace(case, exchange="auto"))


NO_ONES = (False,) * 4
LAYOUTS = {
    "sequence over one axis": Case(is_causal=True, bias=NO_ONES),
    "sequence over two axes at once": Case(mesh=(2, 4), roles=("sequence", "sequence"), is_causal=True, mask=NO_ONES),
    "both ways round": Case(mesh=(4,), t=16, bias=(True, False, True, False)),
    "balanced": Case(mesh=(4,), t=16, is_causal=True, segments=True, k=2),
    "balanced, lengths": Case(mesh=(4,), t=16, is_causal=True, lengths=(True, True), b=3, seed=1),
    "balanced, both ways round": Case(mesh=(2, 4), roles=("batch", "sequence"), t=32, is_causal=True),
    "balanced, three devices": Case(mesh=(3,), t=32, is_causal=True),
    "both ways round, all extras": Case(
        mesh=(2, 4),
        roles=("batch", "sequence"),
        t=16,
        is_causal=True,
        segments=True,
        lengths=(True, True),
        bias=NO_ONES,
        mask=(False, True, False, False),
    ),
    "heads all to all": Case(mesh=(2, 4), roles=("batch", "sequence"), exchange="all_to_all", k=4, is_causal=True, t=3),
    "heads all to all, a bias without rows": Case(
        mesh=(4,), exchange="all_to_all", k=4, bias=(True, False, True, False), mask=(False, True, True, False), t=4
    ),
    "heads all to all, fewer key heads": Case(
        mesh=(4,), exchange="all_to_all", k=2, g=2, segments=True, lengths=(True, True), b=2, t=4
    ),
    "heads all to all, one key head": Case(mesh=(4,), exchange="all_to_all", k=1, g=8, window=(3, 2), t=4),
    "heads all to all and a ring": Case(
        mesh=(4, 2), roles=("sequence", "sequence"), exchange="all_to_all", k=2, is_causal=True, t=16, segments=True
    ),
    "heads all to all and a ring, minor axis first": Case(
        mesh=(2, 2, 2), roles=("sequence", "heads", "sequence"), exchange="all_to_all", k=2, window=5, t=4
    ),
    "heads all to all and rings, one axis": Case(
        exchange="all_to_all", k=2, is_causal=True, t=16, segments=True, lengths=(True, True), sinks=True, slopes=True
    ),
    "heads all to all and rings, one axis, fewer key heads": Case(
        exchange="all_to_all", k=1, g=4, window=(3, 2), t=4, b=2, positions=(True, False), dropout=0.3
    ),
    "heads all to all and rings, one axis and a part of another": Case(
        mesh=(4, 2), roles=("sequence", "sequence"), exchange="all_to_all", k=4, g=1, t=4, float8=(True, True)
    ),
    "positions of queries": Case(t=16, mesh=(4,), is_causal=True, positions=(True, False), lengths=(False, True)),
    "positions of both, all to all": Case(
        t=4, mesh=(4,), k=4, window=(6, 2), positions=(True, True), exchange="all_to_all", b=2
    ),
    "positions of keys, merged": Case(
        t=5, mesh=(4,), window=(6, 2), positions=(False, True), exchange="merge", segments=True
    ),
    "merged": Case(
        mesh=(4,), exchange="merge", k=2, is_causal=True, t=3, segments=True, bias=(True, False, True, False)
    ),
    "merged over two axes, lengths": Case(
        mesh=(2, 4), roles=("sequence", "sequence"), exchange="merge", lengths=(True, True), b=2, window=(9, 0), t=3
    ),
    "soft cap, sinks, values of another width": Case(mesh=(4,), t=4, k=2, v=3, cap=1.5, sinks=True, is_causal=True),
    "prefix, slopes, heads on another axis": Case(
        mesh=(2, 4), roles=("heads", "sequence"), t=16, g=1, mask_fn="prefix", slopes=True, sinks=True, cap=2.0
    ),
    "balanced, dropout": Case(mesh=(4,), t=16, is_causal=True, dropout=0.4, slopes=True),
    "chunks stop the ring, dropout": Case(t=4, mask_fn="chunks", dropout=0.3, segments=True, sinks=True),
    "heads all to all, sinks, dropout, slopes": Case(
        mesh=(4,), exchange="all_to_all", k=4, t=4, sinks=True, slopes=True, dropout=0.4, v=5, b=2
    ),
    "balanced, float8": Case(mesh=(4,), t=16, k=2, is_causal=True, float8=(True, True), v=3),
    "heads all to all, values in float8": Case(
        mesh=(4,), exchange="all_to_all", k=2, t=4, float8=(False, True), slopes=True
    ),
    "merged, keys in float8, uneven": Case(mesh=(4,), exchange="merge", k=2, t=1, s=5, float8=(True, False)),
    "merged, sinks, strided": Case(mesh=(4,), exchange="merge", k=2, t=3, sinks=True, mask_fn="strided", cap=1.5, v=2),
    "gathered, everything that has no rows": Case(
        mesh=(2, 4),
        roles=("heads", "sequence"),
        exchange="all_gather",
        t=4,
        sinks=True,
        slopes=True,
        cap=1.0,
        mask_fn="prefix",
        positions=(True, True),
        v=6,
    ),
    "packed, in bfloat16": Case(mesh=(2,), dtype="bfloat16", segments=True, b=2, t=4, k=2, g=3),
    "batch, sequence, heads": Case(
        mesh=(2, 2, 2), roles=("batch", "sequence", "heads"), bias=(True, False, False, False)
    ),
    "window": Case(t=4, is_causal=True, window=(5, 0)),
    "window to both sides": Case(exchange="ring", t=4, window=(5, 2), k=2, segments=True, bias=NO_ONES),
    "window to both sides, on all devices": Case(
        mesh=(3,), exchange="ring", t=4, window=(1, 3), lengths=(True, True), b=2
    ),
    "packed segments and lengths": Case(mesh=(2, 4), roles=("batch", "sequence"), segments=True, lengths=(True, True)),
    "cross attention": Case(mesh=(2, 4), roles=("batch", "sequence"), t=2, s=5, is_causal=True, bias=NO_ONES),
}


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("door", SHARDED_DOORS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_through_every_door(layout, door):
    check(dataclasses.replace(LAYOUTS[layout], door=door))


UNEVEN = {
    "keys sharded, queries not": Case(mesh=(2, 4), roles=("batch", "keys only"), t=4, is_causal=True, bias=NO_ONES),
    "queries sharded, keys not": Case(mesh=(2, 4), roles=("batch", "queries only"), s=6, bias=NO_ONES, mask=NO_ONES),
    "keys sharded, queries not, merged": Case(
        mesh=(2, 4), roles=("batch", "keys only"), exchange="merge", t=5, s=3, is_causal=True, bias=NO_ONES
    ),
    "one query, merged": Case(
        mesh=(8,), roles=("keys only",), exchange="merge", t=1, s=3, mask=NO_ONES, lengths=(False, True)
    ),
    "keys over one axis, queries over another, merged": Case(
        mesh=(2, 4), roles=("queries only", "keys only"), exchange="merge", is_causal=True, t=4, bias=NO_ONES
    ),
    "keys over one axis, queries over another": Case(
        mesh=(2, 4), roles=("queries only", "keys only"), is_causal=True, t=4
    ),
    "keys over one axis more than queries": Case(mesh=(2, 4), roles=("sequence", "keys only"), is_causal=True),
    "keys over one axis more, the major one": Case(mesh=(2, 4), roles=("keys only", "sequence"), is_causal=True),
    "one key head, query heads sharded": Case(mesh=(2, 4), roles=("groups", "sequence"), k=1, g=1, is_causal=True),
    "key heads and groups sharded": Case(mesh=(2, 2, 2), roles=("heads", "groups", "sequence"), k=1, g=1),
    "heads only": Case(mesh=(8,), roles=("heads",), is_causal=True, bias=NO_ONES),
    "batch only": Case(mesh=(8,), roles=("batch",), is_causal=True, lengths=(False, True)),
    "nothing sharded": Case(mesh=(2, 4), roles=("nothing", "nothing"), is_causal=True),
}


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, EXPLICIT_RINGMOE_JIT], ids=str)
@pytest.mark.parametrize("layout", UNEVEN)
def test_every_uneven_layout_through_every_door_that_finds_it(layout, door):
    check(dataclasses.replace(UNEVEN[layout], door=door))


# Not under check_vma: JAX 0.12's interpreter slices arrays of unlike varying axes, and says to turn the check off.
@pytest.mark.parametrize("door", [door for door in DOORS if door is not MANUAL_VMA], ids=str)
def test_the_tpu_kernel_in_the_interpreter(door):
    mesh, roles = ((), ()) if door is ONE_DEVICE else ((2,), ("sequence",))
    check(Case(door=door, mesh=mesh, roles=roles, implementation="tpu", is_causal=True, t=8, g=2, h=8))


@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT], ids=str)
def test_the_tpu_kernel_at_balanced_places_and_both_ways_round(door):
    check(Case(door=door, mesh=(3,), implementation="tpu", is_causal=True, t=512, g=1, h=8))


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT, PARTITIONER, MANUAL, ONE_DEVICE], ids=str)
def test_the_tpu_kernel_with_all_it_takes(door):
    mesh, roles, t = ((), (), 150) if door is ONE_DEVICE else ((3,), ("sequence",), 50)
    check(Case(
        door=door, mesh=mesh, roles=roles, implementation="tpu", mask_fn="prefix", t=t, g=2, h=8, v=16, cap=2.0, sinks=True,
        slopes=True, dropout=0.3, segments=True, lengths=(True, True), positions=(True, True), b=2,
    ))  # fmt: skip


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_the_first_two_derivatives_by_sinks(implementation):
    """And their limits: a sink of -inf is none, one far above all logits leaves nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 8, 2, 4)), jnp.float32) for _ in range(3))

    def loss(fun, q, sinks):
        out, lse = fun(q, k, v, sinks=sinks, is_causal=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    ours = functools.partial(ringmoe.dot_product_attention, return_residual=True, implementation=implementation)
    sinks = jnp.array([0.5, -1.0])
    for derivative in (jax.grad, jax.hessian):
        got, want = (
            derivative(functools.partial(loss, fun), 1)(q, sinks) for fun in (ours, reference.dot_product_attention)
        )
        assert_close(got, want, 1e-4)
    plain = ours(q, k, v)
    none = ours(q, k, v, sinks=jnp.full(2, -jnp.inf))
    assert_close(none[0], plain[0], 1e-6)
    assert_close(none[1], plain[1], 1e-6)
    assert float(jnp.abs(ours(q, k, v, sinks=jnp.full(2, 1e4))[0]).max()) == 0.0
    assert_close(jax.grad(functools.partial(loss, ours), 1)(q, jnp.full(2, -jnp.inf)), jnp.zeros(2), 0.0)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_mapped_over_sinks_and_slopes(implementation):
    """Which have no batch dims: everything is mapped, the kernels' own numbers of blocks too."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 16, heads, 8)), jnp.float32) for heads in (4, 2, 2)]
    slopes, sinks = (jnp.asarray(rng.random((3, 4)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 16)), 1), jnp.int32)

    def gradients(fun):
        def of(slopes, sinks):
            loss = lambda q, sinks: jnp.sum(jnp.sin(fun(
                q, *arrays[1:], alibi_slopes=slopes, sinks=sinks, is_causal=True, query_segment_ids=ids,
                key_value_segment_ids=ids,
            )))  # fmt: skip
            return jax.grad(loss, (0, 1))(arrays[0], sinks)

        return jax.vmap(of)(slopes, sinks)

    want = gradients(lambda *args, **kwargs: reference.dot_product_attention(*args, **kwargs)[0])
    for g, w in zip(gradients(functools.partial(ringmoe.dot_product_attention, implementation=implementation)), want):
        assert_close(g, w, 1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("door", SHARDED_DOORS, ids=str)
def test_ring_equals_all_gather_equals_one_device(door):
    case = Case(door=door, is_causal=True, t=4, bias=(True, False, False, False))
    results = [
        run(dataclasses.replace(case, exchange="ring")),
        run(dataclasses.replace(case, exchange="all_gather")),
    ]
    arrays, cotangents = case.arrays()
    fun = functools.partial(ringmoe.dot_product_attention, return_residual=True, is_causal=True)
    results.append(value_and_gradients(fun, loss, WANTED, ONE_DEVICE, None, arrays, {}, cotangents))
    forward, gradient = TOLERANCE[jnp.dtype(jnp.float32)]
    for other in results[1:]:
        for got, want in zip(results[0][0], other[0], strict=True):
            assert_close(got, want, forward)
        for name, got in results[0][1].items():
            assert_close(got, other[1][name], gradient, name)


@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT, PARTITIONER], ids=str)
def test_a_sharded_sequence_is_never_gathered(door):
    case = Case(door=door, mesh=(2, 4), roles=("batch", "sequence"), is_causal=True, t=4)
    arrays, _ = case.arrays()
    mesh = make_mesh(case.mesh, door.axis_type)
    arrays = put(mesh, arrays, case.specs[0])
    square = lambda query, key, value: jnp.sum(ringmoe.dot_product_attention(query, key, value, is_causal=True) ** 2)
    operands = [arrays[name] for name in ("query", "key", "value")]
    text = door.jit(jax.grad(square, (0, 1, 2))).lower(*operands).compile().as_text()
    assert "collective-permute" in collectives(text)
    assert "all-gather" not in collectives(text)


@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, MANUAL, MANUAL_VMA, ONE_DEVICE], ids=str)
def test_without_a_batch_dim(door):
    mesh = None if door is ONE_DEVICE else make_mesh((8,), door.axis_type)
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(16, heads, 4)).astype(np.float32)
        for name, heads in (("query", 4), ("key", 2), ("value", 2))
    }
    cotangents = rng.normal(size=(16, 4, 4)).astype(np.float32), rng.normal(size=(16, 4)).astype(np.float32)
    fun = functools.partial(ringmoe.dot_product_attention, return_residual=True, is_causal=True)
    specs = dict.fromkeys(arrays, P("a"))
    out, grads = value_and_gradients(fun, loss, WANTED, door, mesh, arrays, specs, cotangents, (P("a"), P("a")), ("a",))
    with jax.enable_x64(True):

        def dense(query, key, value):
            return tuple(
                x[0] for x in reference.dot_product_attention(query[None], key[None], value[None], is_causal=True)
            )

        want, want_grads = value_and_gradients(
            dense, loss, WANTED, ONE_DEVICE, None, double(arrays), {}, double(cotangents)
        )
    forward, gradient = TOLERANCE[jnp.dtype(jnp.float32)]
    for got, expected in zip(out, want, strict=True):
        assert_close(got, expected, forward)
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], gradient, name)


@pytest.mark.parametrize("kwargs", [
    {}, {"is_causal": True}, {"local_window_size": 3}, {"local_window_size": (4, 1)}, {"scale": 0.3}, {"scale": 0},
    {"lengths": True}, {"bias": True}, {"mask": True}, {"is_causal": True, "local_window_size": (2, 2), "bias": True},
], ids=str)  # fmt: skip
def test_shared_arguments_mean_what_they_mean_in_jax_nn(kwargs):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 8, n, 4)), jnp.float32) for n in (4, 2, 2))
    kwargs = dict(kwargs)
    if kwargs.pop("lengths", False):
        kwargs |= {"query_seq_lengths": jnp.array([8, 5]), "key_value_seq_lengths": jnp.array([3, 8])}
    if kwargs.pop("bias", False):
        kwargs["bias"] = jnp.asarray(rng.normal(size=(1, 4, 8, 8)), jnp.float32)
    if kwargs.pop("mask", False):
        kwargs["mask"] = jnp.asarray(rng.random((2, 1, 8, 8)) < 0.5).at[..., 0].set(True)
    want = jax.nn.dot_product_attention(q, k, v, **kwargs)
    got = ringmoe.dot_product_attention(q, k, v, **kwargs)
    if "query_seq_lengths" in kwargs:  # rows past a length: jax.nn's are whatever, ours are zeros
        want = jnp.where(jnp.arange(8)[:, None, None] < kwargs["query_seq_lengths"][:, None, None, None], want, 0)
    assert_close(got, want, TOLERANCE[jnp.dtype(jnp.float32)][0])


def test_positional_arguments_are_those_of_jax_nn():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, 2, 4)), jnp.float32) for _ in range(3))
    bias, mask = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32), jnp.tril(jnp.ones((4, 4), bool))
    want = jax.nn.dot_product_attention(q, k, v, bias[None, None], mask[None, None])
    assert_close(ringmoe.dot_product_attention(q, k, v, bias, mask), want, TOLERANCE[jnp.dtype(jnp.float32)][0])


@pytest.mark.parametrize("door", [TYPES, RINGMOE_JIT], ids=str)
def test_a_nan_in_one_key_poisons_only_the_rows_that_see_it(door):
    case = Case(door=door, is_causal=True, t=2)
    arrays, cotangents = case.arrays()
    clean = run(case)[0][0]
    arrays["value"][0, 9] = np.nan
    mesh = make_mesh(case.mesh, door.axis_type)
    fun = functools.partial(ringmoe.dot_product_attention, return_residual=True, is_causal=True)
    (output, _), _ = value_and_gradients(fun, loss, WANTED, door, mesh, arrays, case.specs[0], cotangents)
    np.testing.assert_array_equal(output[:, :9], clean[:, :9])
    assert np.isnan(output[:, 9:]).all()


@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT, EXPLICIT_RINGMOE_JIT], ids=str)
def test_a_query_made_inside_the_function(door):
    """No mesh stands in its type, where none is set: the keys' types tell."""
    mesh = make_mesh((8,), door.axis_type)
    shape = (1, 16, 2, 4)
    key, value = (np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in range(2))
    attend = lambda key, value, op=ringmoe.dot_product_attention: jnp.sum(op(jnp.ones(shape), key, value) ** 2)
    want = jax.grad(lambda k, v: attend(k, v, jax.nn.dot_product_attention), (0, 1))(key, value)
    got = door.jit(jax.grad(attend, (0, 1)))(*put(mesh, (key, value), (P(None, "a"), P(None, "a"))))
    for mine, theirs in zip(got, want):
        assert_close(mine, theirs, TOLERANCE[jnp.dtype(jnp.float32)][1])
