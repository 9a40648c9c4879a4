"""The Hopper kernels of attention: interpreted, against float64; down to ptxas; which calls they take; between a ring's sends.

`tests/gpu` runs the cases on a GPU, `python -m bench.gpu attention` measures there.
"""

import dataclasses
import functools
import itertools
import operator
import re
import warnings
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.errors import CostWarning, forget_warnings
from ringmoe.inspector import kernels
from ringmoe.interface import AttentionSpec, Extras, Offsets
from ringmoe.masks import Band, Causal, Chunks, Prefix, Window
from ringmoe.pallas import attention_gpu, attention_xla
from ringmoe.pallas.gradients_gpu import TOGETHER
from ringmoe.pallas.logits_gpu import ON_REGISTERS
from tests.helpers import assert_close
from tests.test_attention_tpu_features import POSITIONS, SEGMENTS, Case, oracle, run

CAUSAL, WINDOW = Band(right=0), Band(70, 200)
EVERYTHING = Band.make(True, None, (Window(80, 5) | Prefix(70)) & Chunks(100))
STRIDED = Band.make(True, None, lambda query, key: (query - key) % 3 != 1)


def of_numbers(dtype):
    """Each of ON_REGISTERS that takes numbers."""

    def seen(query, key):
        a, b = (x.astype(dtype) for x in jnp.broadcast_arrays(query - 40, key))
        numbers = [f(a, b | 1) for f in (lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min)]
        numbers += [f(a, b & 3) for f in (lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical)]
        numbers += [f(a, b) for f in (operator.and_, operator.or_, operator.xor)] + [~a, -a, lax.sign(a)]
        numbers += [] if dtype == jnp.uint32 else [abs(a)]
        seen = (functools.reduce(operator.xor, numbers) & 1).astype(bool)
        for number, compare in enumerate(COMPARISONS):
            seen ^= compare(a & number, b & 3)
        return seen ^ (lax.select_n(seen, a, b) == lax.broadcast_in_dim(jnp.asarray(60, dtype), a.shape, ()))

    return seen


def of_booleans(query, key):
    """And booleans."""
    query, key = jnp.broadcast_arrays(query, key)
    seen, some = ~(query < key), jax.jit(lambda q, k: (q & 2) == (k & 2))(query, key)
    for combine in (*COMPARISONS, lax.max, lax.min, operator.and_, operator.or_):
        seen ^= combine(seen, some)
    return lax.select_n(some, seen, ~seen) & (some.astype(jnp.uint32) + seen.astype(jnp.int32).astype(jnp.uint32) < 2)


COMPARISONS = lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge
OPERATIONS = {"int32": of_numbers(jnp.int32), "uint32": of_numbers(jnp.uint32), "booleans": of_booleans}
OPERATIONS = {f"every operation of {name}": Band.make(False, None, seen) for name, seen in OPERATIONS.items()}
LENGTHS = ("query_lengths", "key_lengths")
EXTRAS = (*LENGTHS, *SEGMENTS, *POSITIONS, "slopes")
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))


def case(h=64, v=None, t=128, s=256, **kind):
    return Case(h=h, v=v or h, t=t, s=s, **{"dtype": "bfloat16", "hops": 1} | kind)


@dataclasses.dataclass(frozen=True)
class Rising(Case):
    """Positions that rise, so that they empty whole blocks."""

    def arrays(self):
        arrays, found = super().arrays()
        return arrays, {name: np.sort(x, 1) if name in POSITIONS else x for name, x in found.items()}


CASES = {
    "all keys, heads that share them, sequences": case(n=4, k=2, b=2, t=64, s=128),
    "causal over hops, one of which nobody sees": case(band=CAUSAL, n=1, s=256, hops=2),
    "more steps than slots": case(band=CAUSAL, n=1, t=256, s=384),
    "window, float16, lengths that no block divides": case(band=WINDOW, dtype="float16", n=1, t=201, s=303),
    "a window's queries without keys": case(band=Band(20, 0), t=256, s=64, n=1),
    "lengths": case(extras=("query_lengths", "key_lengths"), b=3, n=1, t=64, s=128, band=CAUSAL),
    "prefix": case(band=Band.make(False, None, Causal() | Prefix(70)), n=1, s=128),
    "nothing but a prefix": case(band=Band.make(False, None, Prefix(70)), n=1, s=128),
    "chunks": case(band=Band.make(True, None, Chunks(100)), n=1, s=128),
    "everything of masks": case(band=EVERYTHING, extras=("query_lengths", "key_lengths"), b=2, n=1, t=201, s=203),
    "soft cap": case(band=CAUSAL, cap=1.5, n=1, s=128),
    "soft cap, lengths that no block divides": case(band=WINDOW, cap=3.0, n=1, t=201, s=203, extras=("key_lengths",)),
    "segments": case(extras=SEGMENTS, b=2, n=1, t=128, s=256, band=CAUSAL, hops=2),
    "segments, lengths that no block divides": case(extras=SEGMENTS, n=1, t=201, s=203),
    "positions of queries": case(extras=POSITIONS[:1], n=1, t=128, s=128, band=CAUSAL),
    "positions of both": case(extras=POSITIONS, n=1, t=201, s=203, band=Band(60, 20)),
    "positions that rise": Rising(h=64, v=64, n=1, dtype="bfloat16", extras=POSITIONS, band=Band(20, 0), hops=1),
    "slopes": case(extras=("slopes",), n=4, k=2, t=64, s=64, band=CAUSAL),
    "any function": case(band=STRIDED, n=1, s=128),
    **{name: case(band=band, n=1, t=64, s=128) for name, band in OPERATIONS.items()},
    "bias": case(band=CAUSAL, extras=("bias",), b=2, n=4, k=2, t=64, s=64),
    "bias, lengths that no block divides": case(band=WINDOW, extras=("bias",), n=1, t=201, s=203, cap=3.0),
    "bias of keys, over hops": case(extras=("bias",), ones=(False, True, True, False), b=2, t=64, s=128, hops=2),
    "bias of queries": case(band=CAUSAL, extras=("bias",), ones=(True, False, False, True), n=2, t=64, s=64),
    "all of it": case(band=STRIDED, cap=2.0, b=2, n=2, k=1, t=72, s=72, extras=EXTRAS),
    "head dims 128": case(128, band=CAUSAL, n=1, s=128),
    "head dims 192 and 128": case(192, 128, n=1, t=64, s=64),
    "head dims 256": case(256, n=1, t=64, s=64),
}


def assert_is_the_oracles(case: Case):
    """Output, LSE and gradients, on what runs JAX's programs."""
    # Numbers are rounded to these types where they are multiplied, and to nothing else: a logarithm of a sum is exact.
    rounded = {"bfloat16": 2**-7, "float16": 2**-10}[case.dtype]
    tolerance = {"output": rounded, "LSE": 2e-6, "dq": 2 * rounded, "dk": 2 * rounded, "dv": 2 * rounded}
    actual = run(case, attention_gpu, bias_gradient=False)
    for (what, most), a, e in zip(tolerance.items(), actual, oracle(case)[:5], strict=True):
        assert_close(a, e, most, what)


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("name", CASES)
def test_each_is_the_oracles(interpreted, name):
    assert_is_the_oracles(CASES[name])


def test_what_is_past_a_length_changes_nothing(interpreted):
    """NaN there, in every operand, gives the same bits as zeros."""
    lengths = dataclasses.replace(CASES["lengths"], b=2)
    (q, k, v, do), found = lengths.arrays()

    def of(value):
        def past(x, name):
            at = np.arange(x.shape[2])[None, :] >= found[name][:, None]
            return np.where(at[:, None, :, None], np.asarray(value, x.dtype), x)

        with_past = [past(x, f"{side}_lengths") for x, side in zip((q, k, v, do), ("query", "key", "key", "query"))]
        with mock.patch.object(Case, "arrays", return_value=(with_past, found)):
            return run(lengths, attention_gpu)

    for zeros, nans in zip(of(0), of(np.nan), strict=True):
        np.testing.assert_array_equal(zeros, nans)


@pytest.mark.parametrize("low", [float(np.finfo(np.float32).min), -1e9])
def test_a_bias_however_low_is_a_number(interpreted, low):
    """The lowest one leaves a row's weights alike, as -inf does not; and the LSE is it."""
    (q, k, v, do), _ = case(t=64, s=64, n=1).arrays()
    bias = np.full((1, 1, 64, 64), low, np.float32)
    bias[..., 32:] = -np.inf
    arrays, extras = [jnp.asarray(x) for x in (q, k, v)], Extras(bias=jnp.asarray(bias))
    spec, at = AttentionSpec(0.125), Offsets((0,), (0,))
    o, lse, tail = attention_gpu.finish(spec, attention_gpu.forward(spec, None, *arrays, extras, at))
    seen = np.where(np.isneginf(bias), 0, 1 / 32).astype(np.float64)
    expected = np.broadcast_to(seen @ v.astype(np.float64), v.shape)
    assert_close(o, expected, 2**-7)
    np.testing.assert_array_equal(lse, np.full(lse.shape, low, np.float32))
    assert_close(tail, np.full(tail.shape, np.log(32)), 2e-6)
    do = jnp.asarray(do) / 32  # as the tail says
    dv = attention_gpu.backward(spec, None, *arrays, do, lse, jnp.sum(do * o, -1), extras, at).dv
    assert_close(dv, seen.mT * 32 @ np.asarray(do, np.float64), 2**-6)


@pytest.mark.oldest
def test_pieces_stand_apart(interpreted):
    """As a balanced ring has them; and dq is added to one that came in."""
    (q, k, v, do), _ = case(band=CAUSAL, t=256, s=256, n=1).arrays()
    spec, at = AttentionSpec(0.125, CAUSAL, pieces=2), Offsets((128, 640), (256, 512))

    def both(kernel, dtype):
        def of(q, k, v, do):
            o, lse, _ = kernel.finish(spec, kernel.forward(spec, kernel.init(spec, q, v), q, k, v, Extras(), at))
            dq, delta = jnp.ones(q.shape, o.dtype), jnp.sum(o * do.astype(o.dtype), -1)
            grads = kernel.backward(spec, dq, q, k, v, do, lse, delta, Extras(), at)
            return o, lse, grads.dq, grads.dk, grads.dv

        return jax.jit(of)(*(jnp.asarray(x).astype(dtype) for x in (q, k, v, do)))

    for actual, expected in zip(both(attention_gpu, q.dtype), both(attention_xla, jnp.float32), strict=True):
        assert_close(actual, expected, 2**-6)


def on(target):
    try:
        return SingleDeviceSharding(ringmoe.target(target).devices()[0])
    except ImportError as error:
        pytest.skip(f"no compiler for {target}: {error}")


def types(sharding, h=128, v=128, t=1024, n=4, k=2, dtype=jnp.bfloat16):
    """q, k, v [B, T, N, H]."""
    of = lambda heads, width: jax.ShapeDtypeStruct((2, t, heads, width), dtype, sharding=sharding)
    return of(n, h), of(k, h), of(k, v)


def gradient(attend):
    return jax.grad(lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32) ** 2), (0, 1, 2))


FEATURES = {  # band, soft cap, extras
    "all keys": (Band(), None, ()),
    "causal": (CAUSAL, None, ()),
    "ends": (WINDOW, None, LENGTHS),
    "soft cap": (CAUSAL, 30.0, ()),
    "segments": (CAUSAL, None, SEGMENTS),
    "positions": (CAUSAL, None, POSITIONS),
    "slopes": (CAUSAL, None, ("slopes",)),
    "bias": (CAUSAL, None, ("bias",)),
    "bias of keys": (CAUSAL, None, ("bias",)),
    "masks": (EVERYTHING, None, LENGTHS),
    "prefix": (Band.make(False, None, Prefix(70)), None, ()),
    "any function": (STRIDED, None, ()),
    **{name: (band, None, ()) for name, band in OPERATIONS.items()},
    "all of it": (STRIDED, 30.0, (*EXTRAS, "bias")),
}
ALONE = "soft cap", "positions", "slopes", "bias", "any function"  # what wide heads take one of


@pytest.mark.sampled
@pytest.mark.parametrize(("h", "v", "s", "name"), [
    (128, 128, 1024, "causal"),
    *((64, 64, 900, name) for name in ("causal", "ends")),
    *((*dims, 900, "masks") for dims in HEAD_DIMS),
    *((*dims, 900, "all of it") for dims in HEAD_DIMS[:2]),
    (256, 256, 900, "segments"),
    *((*dims, 900, name) for dims in HEAD_DIMS[2:] for name in ALONE if dims[0] == 192 or name != "positions"),
    *((128, 128, 900, name) for name in FEATURES if name not in ("masks", "all of it", "causal")),
])  # fmt: skip
def test_ptxas_spills_nothing(h, v, s, name, monkeypatch):
    """Forward, afresh and from a state, and backward, at a place that only the run knows; and of lengths of which it's true."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    band, cap, given = FEATURES[name]
    sharding, spec = on("h200"), AttentionSpec(0.1, band, cap)
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    t = s + s % 128 * 25  # which no block divides either
    q, k, val, do, row = (
        of(2, 4, t, h),
        of(2, 2, s, h),
        of(2, 2, s, v),
        of(2, 4, t, v),
        of(2, 4, t, dtype=jnp.float32),
    )
    shapes = dict.fromkeys(LENGTHS, (2,)) | {name: (2, t if name.startswith("query") else s) for name in EXTRAS[2:6]}
    extras: dict[str, Any] = {name: of(*shapes[name], dtype=jnp.int32) for name in given if name in shapes}
    extras |= {"slopes": of(4, dtype=jnp.float32)} if "slopes" in given else {}
    extras |= {"bias": of(2, 1, 1, s) if name == "bias of keys" else of(2, 4, t, s)} if "bias" in given else {}

    def both(q, k, v, do, lse, delta, place, extras):
        at = Offsets((place,), (0,))
        state = attention_gpu.forward(spec, attention_gpu.init(spec, q, v), q, k, v, extras, at)
        state = attention_gpu.forward(spec, state, q, k, v, extras, at)
        return state, attention_gpu.backward(spec, jnp.zeros(q.shape, jnp.float32), q, k, v, do, lse, delta, extras, at)

    with kernels.dumping(tpu=False) as dumps:
        jax.jit(both).lower(q, k, val, do, row, row, of(dtype=jnp.int32), Extras(**extras)).compile()
        found = {kernel.name: kernel for kernel in kernels.read(dumps, frozenset())}
        ptx = {name: (dumps.gpu / f"{name}.ptx").read_text() for name in found}
        words = {name: (dumps.gpu / f"{name}.ptxas").read_text() for name in found}
    few = name in ("all keys", "causal", "ends", "masks", "prefix")  # registers that logits take
    together = name in ("all keys", "causal", "ends") and (h, v) in TOGETHER
    assert len(found) == (3 if together else 4 if h + v <= (256 if few else 128) else 5)
    # Products of 16 deep: those of S, dP, and of the result, by what is summed over; forward asks twice for each.
    for kernel_name, kernel in found.items():
        text, said = ptx[kernel_name], words[kernel_name]
        assert kernel.spills == kernel.fills == 0 and "0 bytes stack frame" in said, (kernel_name, said)
        assert ".local" not in text and "serialized" not in said, kernel_name  # else products are serialized
        assert "tanh" not in text, kernel_name  # of which the chip's own has eleven bits
        assert kernel.registers == 168 and 2**16 < (kernel.shared_bytes or 0) <= 227 * 2**10, (kernel_name, kernel)
        keys = 128 if v <= 128 and few else 64
        own = {
            "forward": 2 * (h + keys),
            "backward_queries": h + v + (128 if h <= (128 if name == "causal" else 64) and few else 64),
            "backward_dq_dk_dv": h + v + 4 * 64,
            "backward_dk_dv": h + v + 2 * 64,
            "backward_dk": h + v + 64,
            "backward_dv": h + 64,
        }[re.sub(r"ringmoe_attention_(.*)_\d+", r"\1", kernel_name)]
        assert text.count("wgmma.mma_async") == own // 16, kernel_name


def test_every_operation_of_a_mask_is_tried():
    def names(closed):
        for eqn in closed.eqns:
            yield eqn.primitive.name
            for inner in eqn.params.values():
                if hasattr(inner, "eqns"):
                    yield from names(inner)

    places = jnp.zeros((8, 8), jnp.int32)
    tried = {x for band in OPERATIONS.values() for x in names(jax.make_jaxpr(band.also)(places, places))}
    assert tried | {"jit", "pjit"} == ON_REGISTERS | {"jit", "pjit"}


@pytest.mark.parametrize(("of", "why"), [
    ({"dtype": jnp.float32}, "q.dtype=dtype('float32')"),
    ({"h": 80, "v": 80}, "head dims 80 and 80, supported: multiples of 64 up to 256"),
    ({"h": 320}, "head dims 320 and 128"),
    ({"t": 32}, "32 queries, 32 keys, supported: 64 or more"),
    ({"spec": {"uniform": True}}, "XLA may have to partition the call further"),
    ({"spec": {"scale": -1.0}}, "spec.scale=-1.0, supported: above 0"),
    ({"spec": {"band": Band(also=lambda q, k: jnp.arange(9)[q % 9] > k)}}, "a mask_fn with gather"),
    ({"spec": {"band": Band(also=lambda q, k: q * np.ones(64, np.int32) > k)}}, "a mask_fn with arrays of its own"),
    ({"spec": {"band": Band(also=lambda q, k: jnp.sqrt(q) > k)}}, "a mask_fn with float32, supported: int32, uint32 and bool"),
    ({"spec": {"band": Band(also=lambda q, k: (q > k).all(0))}}, "a mask_fn with reduce_and, supported: what is done"),
    ({"spec": {"pieces": 2}, "t": 320}, "2 pieces of (320, 320) tokens, supported: multiples of 128 each"),
    ({"h": 256, "extras": POSITIONS}, "positions with head dims 256 and 128, supported: up to 192, for registers"),
    ({"h": 256, "spec": {"soft_cap": 2.0}, "extras": SEGMENTS}, "segments, soft_cap with head dims 256 and 128, supported"),
    ({"extras": ("mask", "slopes", "seeds")}, "mask, seeds given, supported: query_lengths, key_lengths, query_segments"),
    ({"extras": ("bias",), "spec": {"bias_gradient": True}}, "the bias's gradient, supported: a bias of which none is asked"),
])  # fmt: skip
def test_says_what_it_lacks(of, why):
    of = dict(of)
    spec = dataclasses.replace(AttentionSpec(0.1), **of.pop("spec", {}))
    extras = Extras()._replace(**dict.fromkeys(of.pop("extras", ()), jnp.zeros(1)))

    def check(spec, extras, **of):
        head_major = lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:0:-1], x.shape[3]), x.dtype)
        q, k, v = map(head_major, types(None, **of))
        attention_gpu.check(spec, q, k, v, extras)

    check(AttentionSpec(0.1), Extras())
    with pytest.raises(NotImplementedError, match=re.escape(why)):
        check(spec, extras, **of)


def lowered(target="h200", change=lambda f: f, of=None, **kind):
    attend = lambda *arrays: ringmoe.dot_product_attention(*arrays, **kind)
    return jax.jit(change(attend)).lower(*types(on(target), **(of or {}))).as_text()


KERNELS = "ringmoe_attention_forward", "ringmoe_attention_backward_dq_dk_dv"


@pytest.mark.oldest
@pytest.mark.parametrize("change", [
    gradient,
    lambda attend: gradient(jax.checkpoint(attend)),
    lambda attend: gradient(lambda *arrays: jax.vmap(attend)(*(x[:, None] for x in arrays))),
])  # fmt: skip
def test_what_it_takes_goes_through_it(change):
    text = lowered(change=change, is_causal=True)
    assert all(f'"{name}' in text or f"{name}_mosaic_gpu" in text for name in KERNELS) and "stablehlo.while" not in text


def test_what_it_refuses_goes_to_xla_with_a_word():
    forget_warnings()
    with pytest.warns(
        CostWarning, match="attention on hopper: the xla kernel runs instead of a faster one: Hopper.*head dims 80"
    ):
        text = lowered(of={"h": 80, "v": 80})
    assert "mosaic_gpu" not in text
    with pytest.raises(ExceptionGroup, match="no kernel of attention takes this call on hopper"):
        lowered(of={"h": 80, "v": 80}, implementation="gpu")


@pytest.mark.parametrize("target", ["b200", "cpu"])
def test_elsewhere_nothing_changes(target):
    forget_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "mosaic_gpu" not in lowered(target, is_causal=True)
    with pytest.raises(ExceptionGroup, match="no kernel") as raised:
        lowered(target, implementation="gpu")
    assert "the gpu kernel runs on a hopper only" in str(raised.value.exceptions[0])


def ring(change=lambda f: f, door=jax.jit, **kind):
    """Compiled for eight GPUs, and the text of each of its computations."""
    on("h200")
    mesh = ringmoe.target("h200x8").mesh({"x": 8})
    attend = lambda *arrays: ringmoe.dot_product_attention(*arrays, exchange="ring", **kind)
    arrays = types(NamedSharding(mesh, P(None, "x")), t=8192)
    text = door(change(attend)).lower(*arrays).compile().as_text() or ""
    return text, re.split(r"\n(?=\S)", text)


@pytest.mark.sampled
@pytest.mark.parametrize(("door", "is_causal"), [(jax.jit, False), (ringmoe.jit, True)])
def test_a_rings_sends_go_on_during_the_kernels(door, is_causal):
    text, parts = ring(gradient, door, is_causal=is_causal)
    # The first hop, two in a loop, and the last: one kernel each forward and backward, and one that hides the way home.
    assert text.count('custom_call_target="mosaic_gpu') == 9
    loops = [part for part in parts if "mosaic_gpu" in part and not part.startswith("ENTRY")]
    assert len(loops) == 2
    for part in loops:
        order = re.findall(r"collective-permute-(?:start|done)\(|custom_call_target=\"mosaic_gpu", part)
        kinds = [kind for kind, _ in itertools.groupby(order)]
        assert [kind.split("(")[0] for kind in kinds] == 2 * [
            "collective-permute-start", 'custom_call_target="mosaic_gpu', "collective-permute-done"
        ]  # fmt: skip
        # What one hop adds to is where the next but one writes: in a loop of single hops it would be copied.
        assert not re.search(r"f32\[2,4,1024,128\]\S* copy\(", part)


@pytest.mark.parametrize("change", [lambda f: f, gradient])
def test_nothing_is_copied_to_lie_head_by_head(change):
    """Two sequences on one GPU: of bfloat16 arrays [B, N, T, H] none is written, as those that XLA had transposed were."""
    run = jax.jit(change(ringmoe.dot_product_attention)).lower(*types(on("h200"), t=2048)).compile()
    text = run.as_text() or ""
    assert "mosaic_gpu" in text and not re.search(r"= bf16\[2,[24],2048,128\]\{3,2,1,0\S* (?!bitcast)", text)


def test_all_that_leaves_a_ring_together_is_under_way_at_once():
    """XLA:GPU itself has one permute under way at a time: `ringmoe.jit` lets it have four."""
    on("h200")
    mesh = ringmoe.target("h200x8").mesh({"x": 8})
    x, *others = types(NamedSharding(mesh, P(None, "x")), t=8 * 4096, n=8, k=8)
    attend = functools.partial(ringmoe.dot_product_attention, exchange="ring")

    def waits(**options):
        pulled = ringmoe.jit(lambda do, *qkv: jax.vjp(attend, *qkv)[1](do), **options)
        found = ringmoe.inspect(pulled, x, x, *others, target="h200x8")
        return found.exposed_us / found.us

    alone = {"xla_gpu_experimental_parallel_collective_overlap_limit": "1"}
    assert waits() <= 0.03 < 0.1 < waits(compiler_options=alone)


def test_in_the_users_shard_map_that_checks():
    on("h200")
    mesh = ringmoe.target("h200x8").mesh({"x": 8})
    attend = lambda *arrays: ringmoe.dot_product_attention(*arrays, is_causal=True, exchange="ring", axis_name="x")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "x"), out_specs=P(None, "x"))
    text = jax.jit(gradient(mapped)).lower(*types(NamedSharding(mesh, P(None, "x")), t=8192)).as_text()
    assert all(name in text for name in KERNELS)


@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize(("backward", "products"), [(False, 4), (True, 4 + 10)])
def test_the_inspector_counts_what_kernels_multiply(backward, products, key_heads):
    """Of a Mosaic GPU kernel nothing else tells it: two products forward, five backward, of query heads."""
    on("h200")
    mesh = ringmoe.target("h200x8").mesh({"x": 8})
    x, key = (
        jax.ShapeDtypeStruct((8, 1024, heads, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
        for heads in (2, key_heads)
    )
    attend = ringmoe.dot_product_attention
    fun = (lambda do, *qkv: jax.vjp(attend, *qkv)[1](do)) if backward else lambda _, *qkv: attend(*qkv)
    report = ringmoe.inspect(ringmoe.jit(fun), x, x, key, key, target="h200x8")
    assert report.flops == products * 128 * 1024**2 * 2
    assert "no cost estimate" not in str(report)
