"""All that the TPU attention kernel takes, in Pallas's interpreter against the dense oracle in float64, and compiled."""

import dataclasses
import functools
import itertools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import dropout, reference
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band, Causal, Chunks, Mask, Prefix
from ringmoe.pallas import attention_tpu, attention_xla
from tests.helpers import assert_close, double, no_cost_warnings, tpu_devices, tpu_mesh

TILES = attention_tpu.Config(block_q=128, block_k=128, chunk=64)


@dataclasses.dataclass(frozen=True)
class Case:
    """So many hops of keys, the later ones first. `extras`: those that are given, of Extras' names."""

    t: int = 256
    s: int = 256
    h: int = 16
    v: int = 16
    n: int = 2
    k: int = 1
    b: int = 1
    band: Band = Band()
    cap: float | None = None
    rate: float = 0.0
    extras: tuple[str, ...] = ()
    dtype: str = "float32"
    block_k: int = 128
    hops: int = 2
    ones: tuple[bool, ...] = (False,) * 4  # which dims of a bias or mask are broadcast

    @property
    def ragged(self) -> bool:
        """Then by Pallas's plain interpreter, where what is past an array's end is NaN too: the TPU's (jax 0.12.0.1) gives
        aliased results of such lengths back with their padding."""
        return self.t == 1 or any(n > 128 and n % 128 for n in (self.t, self.s // self.hops))

    def arrays(self):
        rng = np.random.default_rng(0)
        shapes = (self.n, self.t, self.h), (self.k, self.s, self.h), (self.k, self.s, self.v), (self.n, self.t, self.v)
        q, k, v, do = (rng.normal(size=(self.b, *shape)).astype(jnp.dtype(self.dtype)) for shape in shapes)
        length = {"query": self.t, "key": self.s}
        found: dict[str, Any] = {}
        for name in self.extras:
            side = name.split("_")[0]
            match name.split("_")[-1]:
                case "lengths":
                    found[name] = rng.integers(0, length[side] + 1, self.b)
                case "segments":
                    found[name] = np.sort(rng.integers(0, 4, (self.b, length[side])), 1)
                case "positions":
                    found[name] = rng.integers(0, length[side], (self.b, length[side]))
                case "mask" | "bias":
                    shape = (self.b, self.n, self.t, self.s)
                    shape = [1 if one else n for one, n in zip(self.ones, shape)]
                    found[name] = rng.normal(size=shape).astype(np.float32)
                    found[name] = found[name] > -0.5 if name == "mask" else found[name]
                case "slopes":
                    found[name] = rng.random(self.n).astype(np.float32) / 10
                case "scales":
                    found[name] = rng.uniform(0.5, 2, (self.b, self.k, self.s)).astype(np.float32)
        k = k.astype(jnp.float8_e4m3fn) if "key_scales" in found else k
        v = v.astype(jnp.float8_e5m2) if "value_scales" in found else v
        found = {n: x if x.dtype in (np.float32, bool) else x.astype(np.int32) for n, x in found.items()}
        if self.rate:
            found["seeds"] = np.asarray(dropout.seeds(jax.random.key(1), (self.b,), self.n))
        return (q, k, v, do), found


def oracle(case: Case):
    (q, k, v, do), found = case.arrays()
    names = {
        "query_lengths": "query_seq_lengths", "key_lengths": "key_value_seq_lengths", "query_segments": "query_segment_ids",
        "key_segments": "key_value_segment_ids", "key_positions": "key_value_positions", "slopes": "alibi_slopes",
    }  # fmt: skip
    seeds = found.pop("seeds", None)
    k, v = (
        x if scales is None else x.astype(np.float64) * scales[..., None]
        for x, scales in ((k, found.pop("key_scales", None)), (v, found.pop("value_scales", None)))
    )
    kept = None
    if seeds is not None:
        at = np.arange(case.t, dtype=np.int32)[:, None], np.arange(case.s, dtype=np.int32)
        kept = dropout.kept(case.rate, jnp.asarray(seeds)[:, :, None, None], *map(jnp.asarray, at))
    with jax.enable_x64(True):
        extras = double({names.get(name, name): x for name, x in found.items()})
        fun = functools.partial(
            reference.dot_product_attention, mask_fn=case.band, logits_soft_cap=case.cap, kept=kept,
            dropout_rate=case.rate, **extras,
        )  # fmt: skip
        q, k, v, do = (x.swapaxes(1, 2) for x in double((q, k, v, do)))
        if "bias" not in extras:
            (o, lse), transpose = jax.vjp(fun, q, k, v)
            grads = transpose((do, jnp.zeros_like(lse)))
            return [np.asarray(x.swapaxes(1, 2)) for x in (o, lse, *grads)]
        (o, lse), transpose = jax.vjp(lambda q, k, v, bias: fun(q, k, v, bias=bias), q, k, v, extras["bias"])
        *grads, dbias = transpose((do, jnp.zeros_like(lse)))
        return [*(np.asarray(x.swapaxes(1, 2)) for x in (o, lse, *grads)), np.asarray(dbias)]


def run(case: Case, kernel=attention_tpu, plainly: bool = False, bias_gradient: bool = True):
    """By Pallas's plain interpreter, which is quick, or the one that is set."""
    (q, k, v, do), found = case.arrays()
    spec = AttentionSpec(
        1 / math.sqrt(case.h),
        case.band,
        case.cap,
        case.rate,
        bias_gradient and "bias" in found,
        interpret=case.ragged or plainly,
    )
    options = {"config": dataclasses.replace(TILES, block_k=case.block_k)} if kernel is attention_tpu else {}
    size = case.s // case.hops
    starts = range(case.s - size, -1, -size)

    def hops(x, axis):
        cut = lambda x, first: jax.lax.slice_in_dim(x, first, first + size, axis=axis)
        return [cut(x, first) for first in starts]

    def here(extras: Extras, first):
        def cut(x):
            return x if x is None or x.shape[-1] == 1 else x[..., first : first + size]

        return extras._replace(**{name: cut(getattr(extras, name)) for name in ALONG_KEYS})

    @jax.jit
    def both(q, k, v, do, extras):
        state = kernel.init(spec, q, v)
        offsets = [(Offsets((0,), (first,)), here(extras, first)) for first in starts]
        for k_, v_, (at, own) in zip(hops(k, 2), hops(v, 2), offsets):
            kernel.check(spec, q, k_, v_, own)
            state = kernel.forward(spec, state, q, k_, v_, own, at, **options)
        o, lse, _ = kernel.finish(spec, state)
        delta, dq, dkv = jnp.sum(o * do.astype(o.dtype), -1), None, []
        dbias = jnp.zeros(extras.bias.shape) if spec.bias_gradient else None
        for k_, v_, (at, own) in zip(hops(k, 2), hops(v, 2), offsets):
            grads = kernel.backward(spec, dq, q, k_, v_, do, lse, delta, own, at, **options)
            dq, dkv = grads.dq, [(grads.dk, grads.dv), *dkv]
            if dbias is not None:
                columns = (..., slice(at.key[0], at.key[0] + size) if dbias.shape[-1] > 1 else slice(None))
                dbias = dbias.at[columns].add(grads.dbias)
        return o, lse, dq, *(jnp.concatenate(x, 2) for x in zip(*dkv)), *(() if dbias is None else (dbias,))

    return both(*map(jnp.asarray, (q, k, v, do)), Extras(**{name: jnp.asarray(x) for name, x in found.items()}))


NAMES = ("output", "LSE", "dq", "dk", "dv", "dbias")  # the last where there is a bias
ALONG_KEYS = ("key_segments", "key_positions", "key_scales", "value_scales", "bias", "mask")
CAUSAL = Band(right=0)
POSITIONS, SEGMENTS = ("query_positions", "key_positions"), ("query_segments", "key_segments")
CASES = {
    "soft cap": Case(band=CAUSAL, cap=1.5),
    "values of another width": Case(band=CAUSAL, v=24, n=4, k=2),
    "lengths": Case(extras=("query_lengths", "key_lengths"), b=3),
    "segments": Case(extras=SEGMENTS, b=2, band=CAUSAL),
    "positions of queries": Case(extras=POSITIONS[:1], band=CAUSAL),
    "positions of both, window": Case(extras=POSITIONS, band=Band(60, 20)),
    "prefix": Case(band=Band.make(False, None, Causal() | Prefix(70))),
    "chunks": Case(band=Band.make(True, None, Chunks(100))),
    "strided": Case(band=Band.make(True, None, lambda query, key: (query - key) % 3 == 0)),
    "slopes": Case(extras=("slopes",), band=CAUSAL, n=4, k=2),
    "dropout": Case(rate=0.4, b=2, n=4, k=2),
    "mask": Case(extras=("mask",), band=CAUSAL, n=4, k=2, b=2),
    "bias": Case(extras=("bias",), band=CAUSAL, n=4, k=2, b=2, ones=(True, False, False, False)),
    "bias of queries, of all heads": Case(extras=("bias",), b=2, n=2, ones=(False, True, False, True), rate=0.2),
    "bias of sequences": Case(extras=("bias",), b=3, n=2, ones=(False, True, True, True), band=CAUSAL),
    "bias of heads, ragged": Case(extras=("bias",), t=300, s=600, b=2, ones=(True, False, True, True), dtype="bfloat16"),
    "mask of keys": Case(extras=("mask",), b=2, ones=(False, True, True, False)),
    "mask of queries": Case(extras=("mask",), b=2, ones=(False, True, False, True)),
    "mask of sequences": Case(extras=("mask",), b=4, ones=(False, True, True, True)),
    "bias of keys, ragged": Case(extras=("bias",), t=300, s=600, cap=1.0, ones=(True, False, True, False)),
    "bias and mask, half of a block, ragged": Case(
        extras=("bias", "mask"), t=600, s=1200, block_k=256, band=CAUSAL, cap=1.0, ones=(True, True, False, False)
    ),
    "half of a block, causal": Case(band=CAUSAL, block_k=256, t=512, s=1024),
    "half of a block, window": Case(band=Band(100, 30), block_k=512, t=512, s=1024, extras=SEGMENTS),
    "half of a block, queries in any order": Case(
        band=CAUSAL, block_k=256, t=512, s=1024, extras=POSITIONS[:1], rate=0.3, cap=2.0
    ),
    "one query, many keys": Case(t=1, s=600, band=Band(right=500), extras=SEGMENTS, b=3, cap=1.0, rate=0.3),
    "many queries, one key": Case(t=300, s=2, band=CAUSAL, extras=("bias",)),
    "three tokens": Case(t=3, s=6, n=4, k=2, b=2, extras=("mask", "key_lengths")),
    "float8": Case(band=CAUSAL, n=4, k=2, b=2, extras=("key_scales", "value_scales"), v=24),
    "values in float8": Case(band=CAUSAL, extras=("value_scales",), dtype="bfloat16"),
    "float16": Case(band=CAUSAL, n=4, k=2, dtype="float16"),
    "lengths that no block divides": Case(t=300, s=2 * 333, band=CAUSAL),
    "few keys of many, ragged": Case(t=40, s=2 * 150),
    "all, ragged, bfloat16": Case(
        t=300, s=600, band=Band.make(True, None, Chunks(210)), cap=2.0, rate=0.2, b=2, v=8, n=4, k=2, dtype="bfloat16",
        extras=(*POSITIONS, *SEGMENTS, "query_lengths", "key_lengths", "slopes"),
    ),
}  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_each_is_the_oracles(name, request):
    case = CASES[name]
    if not case.ragged:
        request.getfixturevalue("races")
    forward, gradient = {"float32": (1e-5, 1e-4), "float16": (2e-3, 6e-3), "bfloat16": (2e-2, 6e-2)}[case.dtype]
    expected = oracle(case)
    actual = run(case)
    for what, a, e in zip(NAMES[: len(expected)], actual, expected, strict=True):
        assert_close(a, e, forward if what in ("output", "LSE") else gradient, what)


def test_what_is_past_a_length_changes_nothing(races):
    """NaN there, in every operand, gives the same bits as zeros."""
    case = dataclasses.replace(CASES["lengths"], b=2)
    (q, k, v, do), found = case.arrays()

    def past(x, name, value):
        at = np.arange(x.shape[2])[None, :] >= found[name][:, None]
        return np.where(at[:, None, :, None], value, x)

    def of(value):
        changed = [
            past(x, name, value)
            for x, name in zip((q, k, v, do), ("query_lengths", *["key_lengths"] * 2, "query_lengths"))
        ]
        with mock.patch.object(Case, "arrays", lambda self, changed=changed: (changed, found)):
            return run(case)

    for a, b in zip(of(np.nan), of(0.0)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.sampled
@pytest.mark.parametrize("who", ["queries of one", "keys of one", "both of two"])
def test_a_block_that_meets_one_of_two_segments(races, who):
    """Whose least, whose greatest, or both are the same: it isn't taken for a block of which all is seen."""
    case = Case(extras=SEGMENTS)
    arrays, _ = case.arrays()
    one, two = np.repeat([1, 2], 128), np.repeat([0, 1, 2, 3], 64)
    sides = {"queries of one": (one, two), "keys of one": (two, one), "both of two": (two, two)}[who]
    ids = {name: x[None].astype(np.int32) for name, x in zip(SEGMENTS, sides)}
    with mock.patch.object(Case, "arrays", return_value=(arrays, ids)):
        actual, expected = run(case), oracle(case)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-4)


FEATURES = (
    "soft cap", "values of another width", "lengths", "segments", "positions of queries", "positions of both, window", "prefix",
    "chunks", "strided", "slopes", "dropout", "mask", "bias", "mask of keys", "float8",
)  # fmt: skip
# Numbered from one, i, j and i ^ j are a line of the projective space of fifteen points: every two lie on just one line.
LINES = [tuple(FEATURES[i - 1] for i in (a, b, a ^ b)) for a, b in itertools.combinations(range(1, 16), 2) if b < a ^ b]


def both(one, other):
    """What two conditions say together; None says nothing."""
    if one is None or other is None:
        return one or other
    if isinstance(one, Mask) and isinstance(other, Mask):
        return one & other
    return lambda query, key: one(query, key) & other(query, key)


def together(features) -> Case:
    """All of the features in one small case; of two biases or masks the first one's shape."""
    cases = [CASES[name] for name in features]
    bands = [case.band for case in cases]
    band = Band(
        max((band.left for band in bands if band.left is not None), default=None),
        min((band.right for band in bands if band.right is not None), default=None),
        also=functools.reduce(both, (band.also for band in bands)),
    )
    first = lambda found, default: next(filter(None, found), default)
    return Case(
        b=2, n=4, k=2, t=96, s=64, hops=1, band=band, v=max(case.v for case in cases),
        cap=first((case.cap for case in cases), None), rate=first((case.rate for case in cases), 0.0),
        extras=tuple(dict.fromkeys(name for case in cases for name in case.extras)),
        ones=first((case.ones for case in cases if any(case.ones)), Case.ones),
    )  # fmt: skip


@pytest.mark.sampled
@pytest.mark.parametrize("first", range(5))
def test_pairs_are_the_oracles(first):
    """Every pair of features, in threes, by the kernel in plain operations and, of every third of these, by the TPU's."""
    assert len({frozenset(pair) for line in LINES for pair in itertools.combinations(line, 2)}) == 15 * 14 // 2
    for n, line in enumerate(LINES[first::5]):
        case = together(line)
        expected = oracle(case)
        for kernel in (attention_xla, attention_tpu)[: 2 if (first + 5 * n) % 3 == 0 else 1]:
            actual = run(case, kernel, plainly=True)
            for what, x, e in zip(NAMES[: len(expected)], actual, expected, strict=True):
                assert_close(x, e, 1e-5 if what in ("output", "LSE") else 1e-4, f"{' and '.join(line)}, {what}")


@pytest.mark.sampled
@pytest.mark.parametrize("target", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2"])
@pytest.mark.parametrize("kind", ["masks", "logits", "wide", "float32", "few"])
def test_compiles_without_falling_back(target, kind):
    """Over a ring, forward and backward."""
    n = len(tpu_devices(target))
    mesh = tpu_mesh(target, (n,), AxisType.Explicit)
    t, s, h, v, dtype = {
        "masks": (1024, 1024, 128, 128, "bfloat16"), "logits": (1100, 1100, 64, 64, "bfloat16"),
        "wide": (1024, 1024, 576, 512, "bfloat16"), "float32": (1024, 1024, 192, 128, "float32"),
        "few": (1, 300, 64, 64, "float16"),
    }[kind]  # fmt: skip
    shape = lambda dims, dtype, *spec: jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))
    rows = lambda dtype: shape((1, n * t), dtype, None, "a")
    of = lambda length, heads, width: shape((1, n * length, heads, width), dtype, None, "a")
    q, key, value = of(t, 4, h), of(s, 2, h), of(s, 2, v)
    bias = {"wide": (4, 1, n * s), "masks": (1, 4, n * t, n * s), "few": (1, 1, n * t, 1)}.get(kind)
    bias = None if bias is None else shape(bias, "bfloat16")
    extras: dict[str, Any] = {}
    if kind in ("masks", "float32"):
        extras |= {"query_segment_ids": rows("int32"), "key_value_segment_ids": rows("int32")}
        extras |= {"query_positions": rows("int32"), "key_value_positions": rows("int32")}
        extras |= {"query_seq_lengths": shape((1,), "int32"), "key_value_seq_lengths": shape((1,), "int32")}
    if kind == "logits":
        extras |= {"query_segment_ids": rows("int32"), "key_value_segment_ids": rows("int32")}
    if kind == "wide":
        extras |= {"mask": shape((1, 1, n * t, n * t), "bool", None, None, "a")}
    if kind in ("logits", "float32"):
        extras |= {"sinks": shape((4,), "float32"), "alibi_slopes": shape((4,), "float32")}
    statics = {
        "masks": {"mask_fn": Causal() | Prefix(300), "exchange": "ring"},
        "logits": {"logits_soft_cap": 30.0, "dropout_rate": 0.1, "is_causal": True},
        "wide": {"is_causal": True},
        "float32": {"logits_soft_cap": 30.0, "dropout_rate": 0.1, "mask_fn": lambda q, k: (q - k) & 3 == 0},
        "few": {"is_causal": True, "exchange": "ring"},
    }[kind]

    def loss(q, k, v, bias, extras, seed):
        dropped = {"dropout_key": jax.random.key(seed)} if "dropout_rate" in statics else {}
        out = ringmoe.dot_product_attention(q, k, v, bias, implementation="tpu", **extras, **statics, **dropped)
        return jnp.sum(out.astype(jnp.float32))

    with no_cost_warnings(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3)))
        text = gradient.lower(q, key, value, bias, extras, shape((), "uint32")).compile().as_text()
    assert "ringmoe_attention_forward" in text and "ringmoe_attention_backward" in text
    assert ("ringmoe_attention_bias_gradient" in text) == (bias is not None)
