"""The TPU's kernel for decoding: in Pallas's interpreter against the dense oracle in float64, and compiled for every TPU."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.errors import Unsuited
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band, Causal, Prefix
from ringmoe.pallas import attention_tpu, attention_xla, decode_tpu, pick
from ringmoe.pallas.logits_tpu import Blocks
from ringmoe.pallas.tiles_tpu import Config
from ringmoe.schedule import pages
from tests.helpers import assert_close, collectives, no_cost_warnings, sent, tpu_mesh
from tests.test_attention_tpu_features import ALONG_KEYS, CAUSAL, Case, oracle

TARGETS = {"v5e:2x4": (2, 4), "v5p:2x2x2": (2, 4), "v6e:2x4": (2, 4), "tpu7x:2x2x2": (4, 4)}
CHUNKED = Config(block_k=128, chunk=256, ahead=1)


@dataclasses.dataclass(frozen=True)
class Few(Case):
    """Queries anywhere among the keys, so that each block is seen, crossed and hidden."""

    t: int = 1
    s: int = 768
    h: int = 128
    v: int = 128
    n: int = 8
    k: int = 2
    extras: tuple[str, ...] = ("key_lengths", "query_positions")
    band: Band = CAUSAL

    def arrays(self):
        arrays, found = super().arrays()
        if "query_positions" in found:
            places = np.random.default_rng(3).integers(self.s // 3, self.s, (self.b, self.t))
            found["query_positions"] = places.astype(np.int32)
        return arrays, found


CASES = {
    "one token": Few(b=3),
    "some tokens": Few(t=5, b=3),
    "in bfloat16": Few(t=3, b=2, dtype="bfloat16"),
    "one key head": Few(k=1, b=2),
    "as many key heads": Few(k=8),
    "eight key heads, values of another width": Few(n=16, k=8, v=256, b=2),
    "one head": Few(n=1, k=1),
    "window": Few(t=3, b=3, band=Band(90, 0)),
    "prefix": Few(t=3, band=Band.make(False, None, Causal() | Prefix(300))),
    "window on both sides": Few(t=2, band=Band(300, 20)),
    "any function": Few(t=2, band=Band.make(True, None, lambda query, key: (query - key) % 3 == 0)),
    "soft cap": Few(cap=1.5, b=2),
    "slopes": Few(t=2, extras=("query_positions", "slopes")),
    "float8": Few(n=16, k=8, b=2, extras=("key_lengths", "key_scales", "value_scales"), band=Band()),
    "values in float8": Few(k=4, dtype="bfloat16", extras=("query_positions", "value_scales")),
    "nothing hidden": Few(extras=(), band=Band()),
    "in order": Few(t=4, s=512, extras=(), hops=1, band=Band(right=300)),
    "lengths that no block divides": Few(s=2 * 333, t=2, b=3),
    "few keys": Few(s=2 * 100),
    "padded": Few(band=Band(right=0, keys=500)),
}  # fmt: skip


def run(case: Case, kernel=decode_tpu):
    """Over hops, the later keys first: output and LSE."""
    (q, k, v, _), found = case.arrays()
    options = {"config": CHUNKED} if kernel is decode_tpu else {}
    spec, size = AttentionSpec(1 / math.sqrt(case.h), case.band, case.cap), case.s // case.hops

    @jax.jit
    def forward(q, k, v, extras):
        state = kernel.init(spec, q, v)
        for first in range(case.s - size, -1, -size):
            cut = lambda x, axis=-1, first=first: jax.lax.slice_in_dim(x, first, first + size, axis=axis)
            here = extras._replace(**{n: cut(getattr(extras, n)) for n in ALONG_KEYS if getattr(extras, n) is not None})
            state = kernel.forward(spec, state, q, cut(k, 2), cut(v, 2), here, Offsets((0,), (first,)), **options)
        return kernel.finish(spec, state)[:2]

    return forward(*map(jnp.asarray, (q, k, v)), Extras(**{name: jnp.asarray(x) for name, x in found.items()}))


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_each_is_the_oracles(name, races):
    case = CASES[name]
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[case.dtype]
    for actual, expected in zip(run(case), oracle(case)):
        assert_close(actual, expected, tolerance)


PAGES = {
    "one token": 64, "some tokens": 128, "in bfloat16": 256, "one key head": 384, "as many key heads": 16,
    "eight key heads, values of another width": 48, "window": 64, "prefix": 64, "window on both sides": 64,
    "any function": 128, "soft cap": 64, "slopes": 64, "float8": 32, "values in float8": 32,
}  # fmt: skip
"""Cases, and how many tokens a page has: some in a block, one, or two blocks and more in one."""


def in_pages(case: Case, size: int, config=CHUNKED):
    """The same, of keys in pages: half of a pool a hop, as a device has them, in an order of no meaning."""
    (q, k, v, _), found = case.arrays()
    b, count = case.b, case.s // size
    spec, rng = AttentionSpec(1 / math.sqrt(case.h), case.band, case.cap), np.random.default_rng(4)
    table = rng.permutation(2 * -(-b * count // 2))[: b * count].reshape(b, count).astype(np.int32)

    def pool(x):
        own = x.reshape(b, x.shape[1], count, size, *x.shape[3:]).swapaxes(1, 2)
        filled = np.full((2 * -(-b * count // 2), *own.shape[2:]), np.nan, x.dtype)
        filled[table] = own
        return np.split(filled, 2)

    extras = Extras(**found | {"pages": table, "key_lengths": found.get("key_lengths", np.full(b, case.s, np.int32))})
    scales = [pool(found[name]) if name in found else [None] * 2 for name in ("key_scales", "value_scales")]

    @jax.jit
    def forward(q, halves, extras):
        state, held = decode_tpu.init(spec, q, v), halves[0][0].shape[0]
        for n, (k, v_, *scales) in enumerate(halves):
            here = pages.table(case.band, extras, n * held, held, size)
            here = here._replace(key_scales=scales[0], value_scales=scales[1])
            state = decode_tpu.forward(spec, state, q, k, v_, here, Offsets((0,), (0,)), config)
        return decode_tpu.finish(spec, state)[:2]

    return jax.tree.map(np.asarray, forward(q, list(zip(pool(k), pool(v), *scales)), extras))


@pytest.mark.sampled
@pytest.mark.parametrize("name", PAGES)
def test_of_pages_each_is_the_oracles(name, races):
    case = dataclasses.replace(CASES[name], extras=tuple({*CASES[name].extras, "query_positions"}))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[case.dtype]
    for actual, expected in zip(in_pages(case, PAGES[name]), oracle(case)):
        assert_close(actual, expected, tolerance)


def test_a_table_for_which_there_is_no_room_is_cut(monkeypatch, races):
    """Two sequences at a time, and the third alone."""
    case = CASES["one token"]
    expected = in_pages(case, 64)
    monkeypatch.setattr(decode_tpu, "TABLE_BYTES", 8 * 2 * case.s // 64 + 8)
    with mock.patch.object(decode_tpu.KeyBlocks, "of", wraps=decode_tpu.KeyBlocks.of) as made:
        actual = in_pages(case, 64)
    assert [call.args[1].shape[0] for call in made.call_args_list] == [2, 1] * 2  # of both halves of the pool
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("size", "length", "left"), [(64, 300, None), (32, 700, 100), (256, 700, 300), (64, 0, None)])
def test_pages_that_are_fetched(size, length, left):
    """Those that lie here and have a key that a query sees, each once, by brute force."""
    band, count, held = Band(left, 0), 768 // size, 512 // size
    table = np.random.default_rng(0).permutation(count).astype(np.int32)[None]
    positions = np.asarray([[length - 2, length - 1]], np.int32)
    extras = Extras(pages=table, key_lengths=jnp.array([length]), query_positions=jnp.asarray(positions))
    here = pages.table(band, extras, 1, held, size)
    spec, x = AttentionSpec(1.0, band), lambda rows: jnp.zeros((held, 1, rows, 128))
    blocks, scalars = decode_tpu.KeyBlocks.of(spec, x(2), x(size), here, Offsets((0,), (0,)), 128)
    first, last = (int(n) for n in blocks.keys_met(scalars, 0, 0))
    assert first == 0 and max(1, last) == blocks.steps(here)
    met = [(j, part) for j in range(last) for part in range(blocks.parts)]
    real = [at for at in met if at[0] * blocks.block_k + at[1] * blocks.part < int(here.key_lengths[0])]
    got = [tuple(int(n) for n in blocks.row(scalars, 0, *at)) for at in real]
    keys = np.arange(768)
    seen = (np.asarray(band(positions[0][:, None], keys)) & (keys < length)).any(0)
    starts = [n for n in range(0, 768, size) if seen[n : n + size].any() and 1 <= table[0, n // size] <= held]
    expected = [(table[0, n // size] - 1, part) for n in starts for part in range(max(1, size // 128))]
    expected = [
        (page, part)
        for n, (page, part) in zip(np.repeat(starts, max(1, size // 128)), expected)
        if n + 128 * part < length
    ]
    assert got == expected
    assert [int(blocks.start(scalars, 0, *at)) for at in real] == [
        n + 128 * part for n in starts for part in range(max(1, size // 128)) if n + 128 * part < length
    ]


def test_what_is_past_a_length_changes_nothing(races):
    """NaN there gives the same bits as zeros."""
    case = dataclasses.replace(CASES["one token"], b=2)
    (q, k, v, do), found = case.arrays()
    hidden = (np.arange(case.s) >= found["key_lengths"][:, None])[:, None, :, None]

    def of(value):
        changed = [np.where(hidden, np.float32(value), x) for x in (k, v)]
        with mock.patch.object(Case, "arrays", return_value=((q, *changed, do), found)):
            return run(case)

    for a, b in zip(of(np.nan), of(0.0)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("length", "t", "left", "start"), [(700, 1, 200, 0), (700, 4, None, 300), (90, 2, 30, 0), (0, 1, 9, 0)]
)
def test_blocks_that_are_fetched(length, t, left, start):
    """Those with a key that a query sees, by brute force, of this device's keys, which begin at `start`."""
    spec, band = AttentionSpec(1.0, Band(left, 0)), Band(left, 0)
    x = lambda rows: jnp.zeros((1, 1, rows, 8))
    positions = length - t + np.arange(t, dtype=np.int32)
    extras = Extras(key_lengths=jnp.array([length]), query_positions=jnp.asarray(positions)[None])
    blocks, scalars, _ = Blocks.make(spec, x(t), x(1024), extras, Offsets((0,), (start,)), t, 128)
    keys = start + np.arange(1024)
    seen = np.asarray(band(positions[:, None], keys)) & (keys < length)
    expected = np.flatnonzero(seen.any(0).reshape(-1, 128).any(1))
    first, last = blocks.keys_met(scalars, 0, 0)
    np.testing.assert_array_equal(np.arange(first, last), expected)


def step(query, new, key_cache, value_cache, lengths, table=None, **features):
    """A token's: its key and value into the cache, then attention."""
    first = lengths - new.shape[1]
    caches = [ringmoe.update_cache(cache, new, first, page_indices=table) for cache in (key_cache, value_cache)]
    return ringmoe.decode_attention(query, *caches, lengths, page_indices=table, **features), caches


KINDS = {
    "plain": {}, "window": {"local_window_size": 1000}, "one key head": {}, "float8": {}, "float32": {},
    "logits": {"logits_soft_cap": 30.0, "mask_fn": lambda q, k: (q - k) & 3 == 0},
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_and_copies_no_cache(target, kind):
    """In the cache's layout as it comes, with the update before it; the most rows there may be in float32."""
    mesh = tpu_mesh(target, TARGETS[target], AxisType.Explicit)
    heads, key_heads, t = {"one key head": (8, 1, 1), "float32": (32, 8, 8)}.get(kind, (32, 8, 1))
    dtype = {"float8": jnp.float8_e4m3fn, "float32": jnp.float32}.get(kind, jnp.bfloat16)
    of = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))
    batch, s = TARGETS[target][0], 65536
    cache = of((batch, s, key_heads, 128), dtype, "a", "b")
    scales = dict.fromkeys(("key_scales", "value_scales"), of((batch, s, key_heads), jnp.float32, "a", "b"))
    wide = jnp.float32 if kind == "float32" else jnp.bfloat16
    query, new = of((batch, t, heads, 128), wide, "a"), of((batch, t, key_heads, 128), dtype, "a")
    extras = (scales if kind == "float8" else {}) | ({"sinks": of((heads,), wide)} if kind == "logits" else {})
    run = jax.jit(functools.partial(step, **KINDS[kind]), donate_argnums=(2, 3))
    with no_cost_warnings():
        lowered = run.lower(query, new, cache, cache, of((batch,), jnp.int32, "a"), **extras)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert "ringmoe_attention_decode" in text and not collectives(text) & {"all-gather", "all-to-all"}
    own = cache.size * cache.dtype.itemsize // mesh.size
    assert compiled.memory_analysis().temp_size_in_bytes < own  # a copy of one cache would be as much


POOLS = {
    "some in a block": (16, 8, "bfloat16", 1, {}),
    "one in a block, a window": (1024, 8, "bfloat16", 3, {"local_window_size": 1000}),
    "blocks in one": (16384, 1, "bfloat16", 1, {"logits_soft_cap": 30.0}),
    "float8": (32, 8, "float8_e4m3fn", 1, {}),
    "float32": (64, 8, "float32", 8, {"mask_fn": lambda q, k: (q - k) & 3 == 0}),
}  # fmt: skip
"""Tokens of a page, key heads, dtype, queries, features."""


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        *((target, "some in a block") for target in (*TARGETS, "v4:2x2x2")),
        *(("v5e:2x4", kind) for kind in POOLS if kind != "some in a block"),
    ],
)
def test_pages_compile_and_no_pool_is_copied(target, kind):
    """As it comes, with the update before it, and as long a table as there may be, or three; a pool is not sent either."""
    size, key_heads, dtype, t, features = POOLS[kind]
    mesh = tpu_mesh(target, TARGETS.get(target, (4, 4)), AxisType.Explicit)
    of = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))
    batch, dtype = mesh.shape["a"] * (3 if kind == "float8" else 1), jnp.dtype(dtype)
    pool = of((2**20 // size, size, key_heads, 128), dtype, "b")
    wide = dtype if dtype.itemsize > 1 else jnp.bfloat16
    scales = (
        {}
        if dtype.itemsize > 1
        else dict.fromkeys(("key_scales", "value_scales"), of(pool.shape[:3], jnp.float32, "b"))
    )
    query, new = of((batch, t, 4 * key_heads, 128), wide, "a"), of((batch, t, key_heads, 128), dtype, "a")
    run = jax.jit(functools.partial(step, **features), donate_argnums=(2, 3))
    most = min(decode_tpu.TABLE_BYTES // 8, pool.shape[0])
    with no_cost_warnings():
        lowered = run.lower(
            query, new, pool, pool, of((batch,), jnp.int32, "a"), of((batch, most), jnp.int32, "a"), **scales
        )
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    own = pool.size * pool.dtype.itemsize // mesh.shape["b"]
    assert "ringmoe_attention_decode" in text and max(count for _, count in sent(text)) < own / 64
    assert memory.temp_size_in_bytes < own and memory.alias_size_in_bytes >= 2 * own


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 257}, Unsuited, "257 rows in 1 pieces, supported: up to 256, in one"),
        ({"dtype": "float16"}, NotImplementedError, "supported: both bfloat16, both float32"),
        ({"extras": ("bias",)}, NotImplementedError, r"\['bias'\], spec.dropout_rate=0.0, supported: .*, no dropout"),
        ({"rate": 0.5}, NotImplementedError, "spec.dropout_rate=0.5"),
        ({"h": 64}, NotImplementedError, "2 key heads of 64, supported: .* each a multiple of 128"),
        ({"n": 9, "k": 3}, NotImplementedError, "3 key heads of 128, supported: "),
        ({"v": 256}, NotImplementedError, "2 key heads of 256, supported: "),
        ({"extras": ("key_scales",)}, NotImplementedError, "2 key heads of 128, supported: "),
        (
            {"s": 32, "pages": 9},
            NotImplementedError,
            "pages of 32 tokens of 2 key heads, supported: tokens times heads a",
        ),
        ({"s": 8000, "pages": 9}, NotImplementedError, "pages of 8000 tokens of 2 key heads, .* tokens too above 2048"),
        ({"s": 64, "pages": 2**16 + 1}, NotImplementedError, "65537 pages of a sequence, supported: up to 65536"),
    ],
)
def test_what_it_lacks(change, error, message):
    table = {"pages": np.zeros((1, change["pages"]), np.int32)} if "pages" in change else {}
    case = dataclasses.replace(Few(), **{n: x for n, x in change.items() if n not in table})
    (q, k, v, _), found = case.arrays()
    found.pop("seeds", None)
    with pytest.raises(error, match=message):
        decode_tpu.check(AttentionSpec(1.0, dropout_rate=case.rate), q, k, v, Extras(**found, **table))


def test_a_kernel_for_many_queries_refuses_pages():
    (q, k, v, _), _ = Few().arrays()
    with pytest.raises(NotImplementedError, match="TPU attention kernel: keys in pages of a pool"):
        attention_tpu.check(AttentionSpec(1.0), q, k, v, Extras(pages=np.zeros((1, 9), np.int32)))


def test_a_gradient_is_another_kernels():
    """Which takes the LSE of this one."""
    mesh = tpu_mesh("v5e:2x4", (2, 4), AxisType.Explicit)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, P("a")))
    loss = lambda *x: jnp.sum(ringmoe.dot_product_attention(*x).astype(jnp.float32))
    with no_cost_warnings():
        text = jax.jit(jax.grad(loss)).lower(of(2, 1, 8, 128), *[of(2, 4096, 2, 128)] * 2).compile().as_text()
    assert text.count("ringmoe_attention_decode") and "ringmoe_attention_backward" not in text


def test_an_unsuited_kernel_is_passed_over_in_silence():
    def accepts(kernel):
        if kernel is decode_tpu:
            raise Unsuited("too many rows")

    with no_cost_warnings():
        assert pick("attention", "tpu", None, accepts, few=True) is attention_xla
        assert pick("attention", "tpu", "tpu", accepts, few=True) is attention_tpu
