"""The Hopper's kernel for decoding: interpreted, against float64; down to ptxas; which calls it takes."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.errors import Unsuited
from ringmoe.inspector import kernels
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band, Causal, Prefix
from ringmoe.pallas import decode_gpu
from tests.helpers import assert_close, collectives, no_cost_warnings
from tests.test_attention_gpu import STRIDED, on
from tests.test_attention_tpu_features import CAUSAL, oracle
from tests.test_decode_tpu import Few, run, step

NAMES = ("key_lengths", "query_positions")


@pytest.fixture(autouse=True)
def few_processors(monkeypatch, request):
    """So that splits have several blocks of keys, or none, where keys are few."""
    if "interpreted" in request.fixturenames:
        monkeypatch.setattr(decode_gpu, "MULTIPROCESSORS", 4)


def case(h=64, **kind):
    return Few(**{"h": h, "v": h, "dtype": "bfloat16", "s": 512, "hops": 1, "n": 4} | kind)


CASES = {
    "one token": case(b=3, hops=2),
    "some tokens, a split without keys": case(t=5, b=1, k=1, n=3, s=64 * 5),
    "more steps than slots": case(b=4, s=448),
    "float16": case(t=3, b=2, dtype="float16"),
    "as many key heads": case(k=4),
    "more rows than a tile": case(n=10, k=1, t=7, s=256),
    "window": case(t=3, b=3, band=Band(90, 0)),
    "prefix": case(t=3, band=Band.make(False, None, Causal() | Prefix(300))),
    "any function": case(t=2, band=STRIDED),
    "soft cap": case(cap=1.5, b=2),
    "slopes": case(t=2, extras=(*NAMES, "slopes"), band=Band(400, 30)),
    "nothing hidden": case(extras=(), band=Band(), hops=2),
    "in order": case(t=4, s=256, extras=(), hops=2, band=Band(right=100)),
    "lengths that no block divides": case(s=2 * 213, t=2, b=3, hops=2),
    "all of it": case(t=3, b=2, cap=2.0, band=STRIDED, extras=(*NAMES, "slopes"), s=2 * 201, hops=2),
    "padded": case(band=Band(right=0, keys=300)),
    "head dims 128": case(128, b=2, s=256),
    "head dims 192 and 128": case(192, v=128, s=256),
    "head dims 256": case(256, s=192),
}


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("name", CASES)
def test_each_is_the_oracles(interpreted, name):
    case = CASES[name]
    rounded = {"bfloat16": 2**-7, "float16": 2**-10}[case.dtype]
    for actual, expected, most in zip(run(case, decode_gpu), oracle(case), (rounded, 2e-6)):
        assert_close(actual, expected, most)


def test_what_is_past_a_length_changes_nothing(interpreted):
    """NaN there gives the same bits as zeros."""
    case = CASES["one token"]
    (q, k, v, do), found = case.arrays()
    hidden = (np.arange(case.s) >= found["key_lengths"][:, None])[:, None, :, None]

    def of(value):
        changed = [np.where(hidden, np.asarray(value, x.dtype), x) for x in (k, v)]
        with mock.patch.object(Few, "arrays", return_value=((q, *changed, do), found)):
            return run(case, decode_gpu)

    for a, b in zip(of(np.nan), of(0.0)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("b", "n", "k", "t", "h", "s", "blocks"), [
    (1, 32, 8, 1, 128, 65536, (33, 1)),
    (1, 32, 8, 1, 256, 65536, (16, 1)),
    (64, 32, 8, 1, 128, 65536, (1, 1)),
    (1, 64, 8, 1, 128, 1024, (16, 1)),  # a block of keys each
    (1, 64, 1, 2, 128, 65536, (132, 2)),  # tiles of rows
    (1, 64, 1, 2, 128, 65500, (132, 2)),
])  # fmt: skip
def test_how_keys_are_split(b, n, k, t, h, s, blocks):
    """The docstring's formula."""
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    spec, found = AttentionSpec(0.1), []

    def forward(q, k, v):
        state = decode_gpu.init(spec, q, v)
        return decode_gpu.forward(spec, state, q, k, v, Extras(), Offsets((0,), (0,)))

    def launch(body, name, heads, rows, out, *args, launch=decode_gpu.launch, **options):
        found.append((rows, *out[0][:2]))
        return launch(body, name, heads, rows, out, *args, **options)

    with mock.patch.object(decode_gpu, "launch", launch):
        jax.eval_shape(forward, of(b, n, t, h), of(b, k, s, h), of(b, k, s, h))
    splits, tiles = blocks
    assert found == [(splits * tiles, splits, 64 * tiles)]


FEATURES = {  # band, soft cap, extras
    "all keys": (Band(), None, ()),
    "decoding": (CAUSAL, None, NAMES),
    "window, soft cap": (Band(1000, 0), 30.0, NAMES),
    "any function": (STRIDED, None, NAMES),
    "all of it": (STRIDED, 30.0, (*NAMES, "slopes")),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("h", "v", "name"), [
    *((*dims, name) for dims in ((64, 64), (192, 128)) for name in ("all keys", "all of it")),
    *((128, 128, name) for name in FEATURES),
    *((256, 256, name) for name in FEATURES if name != "all of it"),
])  # fmt: skip
def test_ptxas_spills_nothing(h, v, name, monkeypatch):
    """From a state, at a place that only the run knows."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    band, cap, given = FEATURES[name]
    sharding, spec = on("h200"), AttentionSpec(0.1, band, cap)
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    whole, float32 = {"dtype": jnp.int32}, {"dtype": jnp.float32}
    extras = {"key_lengths": of(2, **whole), "query_positions": of(2, 3, **whole), "slopes": of(16, **float32)}
    state = of(2, 16, 3, v, **float32), *[of(2, 16, 3, 1, **float32)] * 2
    arrays = of(2, 16, 3, h), of(2, 2, 4096, h), of(2, 2, 4096, v)

    def forward(state, q, k, v, extras, place):
        return decode_gpu.forward(spec, state, q, k, v, extras, Offsets((0,), (place,)))

    with kernels.dumping(tpu=False) as dumps:
        jax.jit(forward).lower(state, *arrays, Extras(**{name: extras[name] for name in given}), of(**whole)).compile()
        (kernel,) = kernels.read(dumps, frozenset())
        text, said = ((dumps.gpu / f"{kernel.name}.{kind}").read_text() for kind in ("ptx", "ptxas"))
    assert kernel.spills == kernel.fills == 0 and "0 bytes stack frame" in said, said
    assert ".local" not in text and "C7510" not in said and "tanh" not in text
    assert text.count("wgmma.mma_async") == (h + 64) // 16
    assert kernel.registers <= 255 and kernel.shared_bytes <= 227 * 2**10, kernel
    if h + v <= 320:  # two blocks of threads, each of which has a KiB of the system's, and registers by the 256
        assert 2 * (kernel.shared_bytes + 2**10) <= 228 * 2**10 and 2 * 128 * 256 <= 2**16, kernel


KINDS = {
    "plain": {}, "window": {"local_window_size": 1000}, "one key head": {},
    "logits": {"logits_soft_cap": 30.0, "mask_fn": lambda q, k: (q - k) & 3 == 0},
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_no_cache_is_copied(kind):
    """Of eight GPUs, two by four: the cache in its layout as it comes, with the update before it."""
    on("h200")
    mesh = ringmoe.target("h200x8").mesh({"a": 2, "b": 4})
    of = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    heads, key_heads = (8, 1) if kind == "one key head" else (32, 8)
    cache = of((2, 262144, key_heads, 128), jnp.bfloat16, "a", "b")
    query, new = (of((2, 1, n, 128), jnp.bfloat16, "a") for n in (heads, key_heads))
    sinks = {"sinks": of((heads,), jnp.bfloat16)} if kind == "logits" else {}
    run = ringmoe.jit(lambda *arrays, **more: step(*arrays, **KINDS[kind], **more), donate_argnums=(2, 3))
    with no_cost_warnings():
        compiled = run.lower(query, new, cache, cache, of((2,), jnp.int32, "a"), **sinks).compile()
    text = compiled.as_text() or ""
    assert "ringmoe_attention_decode" in text and not collectives(text) & {"all-gather", "all-to-all"}
    own = cache.size * cache.dtype.itemsize // mesh.size
    assert compiled.memory_analysis().temp_size_in_bytes < own  # a copy of one cache would be as much


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"s": 60}, Unsuited, "60 keys in 1 pieces, supported: 64 or more, in one"),
    ({"dtype": "float32"}, NotImplementedError, "supported: all bfloat16 or all float16"),
    ({"extras": ("bias", "key_scales")}, NotImplementedError, "k.dtype=dtype(float8_e4m3fn)"),
    ({"extras": ("bias",), "rate": 0.5}, NotImplementedError, "bias, seeds given with few queries, supported: key_lengths, "),
    ({"h": 80}, NotImplementedError, "head dims 80 and 64"),
    ({"v": 256, "extras": ("slopes",)}, NotImplementedError, "slopes with few queries and values of 256, supported: one above"),
    ({"v": 256, "cap": 2.0, "band": STRIDED}, NotImplementedError, "mask_fn, soft_cap with few queries and values of 256"),
])  # fmt: skip
def test_what_it_lacks(change, error, message):
    few = dataclasses.replace(case(), **change)
    (q, k, v, _), found = few.arrays()
    with pytest.raises(error, match=re.escape(message)):
        decode_gpu.check(AttentionSpec(1.0, few.band, few.cap), q, k, v, Extras(**found))


def test_a_gradient_is_another_kernels():
    """Which takes the LSE of this one."""
    sharding = on("h200")
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    loss = lambda *x: jnp.sum(ringmoe.dot_product_attention(*x).astype(jnp.float32))
    with no_cost_warnings():
        text = jax.jit(jax.grad(loss)).lower(of(2, 1, 8, 128), *[of(2, 4096, 2, 128)] * 2).as_text()
    assert "ringmoe_attention_decode" in text and "ringmoe_attention_backward" not in text
