"""The Hopper kernel that spreads rows: interpreted, against numpy; down to ptxas; and which calls it takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe.inspector import kernels
from ringmoe.pallas import rows_gpu
from ringmoe.schedule.rows import combine_local, dispatch_local, packed

# Tokens, columns, places of each, rows of the result, dtype: fewer and more tokens than blocks times slots, a share of none to
# three rows that are looked at with each token, rows that are several pieces or one.
CASES = (
    (3, 512, 2, 6, "bfloat16"),
    (23, 768, 4, 77, "bfloat16"),
    (37, 128, 2, 50, "float16"),
    (37, 32, 3, 200, "float32"),
    (5, 2880, 2, 9, "bfloat16"),
)


def problem(m, d, k, n, dtype, everywhere=True):
    """Some places, and what is over of the rows, are nobody's; some of x are not finite. `everywhere`: each has a place."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, d)).astype(np.float32)
    x[0, ::3], x[-1, 1::3] = np.nan, np.inf
    first = np.arange(m) * k + rng.integers(0, k, m) if everywhere else np.arange(0)
    others = rng.permutation(np.setdiff1d(np.arange(m * k), first))
    taken = np.concatenate([first, others])[: min(m * k * 5 // 6, n * 5 // 6)]
    rows = rng.permutation(n)[: taken.size]
    place, source = np.full(m * k, n), np.full(n, m * k)
    place[taken], source[rows] = rows, taken
    place[np.flatnonzero(place == n)[::2]] = np.iinfo(np.int32).max
    table = lambda a: jnp.asarray(a, jnp.int32)
    return jnp.asarray(x, dtype), table(place).reshape(m, k), table(source)


def by_loop(x, place, source):
    x = np.asarray(x, np.float64)
    out = np.zeros((source.size, x.shape[1]))
    for (t, _), row in np.ndenumerate(place):
        if row < source.size:
            out[row] = x[t]
    return out


def assert_equals_the_loop(*case):
    arrays, dtype = problem(*case), case[4]
    got = jax.jit(rows_gpu.spread)(*arrays)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), by_loop(*map(np.asarray, arrays)))


@pytest.fixture
def small(monkeypatch):
    """What the cache would hold is taken too."""
    monkeypatch.setattr(rows_gpu, "L2", 0)


@pytest.fixture
def interpreted(monkeypatch):
    """On four blocks of three slots."""
    monkeypatch.setattr(rows_gpu, "BLOCKS", 4)
    monkeypatch.setattr(rows_gpu, "MOST_SLOTS", 3)
    return lambda **options: plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options))


@pytest.mark.oldest
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loop(small, interpreted, case, capfd):
    """And fails on a data race (newer JAX raises, older prints)."""
    with interpreted(detect_races=True):
        assert_equals_the_loop(*case)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.oldest
def test_a_token_may_have_no_place(small, interpreted):
    """Then a step's group of copies is empty, which the chip waits for too; the interpreter, which counts copies, would see a
    race."""
    with interpreted():
        assert_equals_the_loop(37, 128, 2, 50, "float16", False)


def on(target):
    try:
        return SingleDeviceSharding(ringmoe.target(target).devices()[0])
    except ImportError as error:
        pytest.skip(f"no compiler for {target}: {error}")


def slots_of(expert, e=32, parts=1, length=None):
    return packed(expert, e, parts, length or expert.size)[0]


def types(sharding, t=8192, k=8, d=7168, length=None, parts=1):
    expert = jax.ShapeDtypeStruct((t, k), jnp.int32)
    slots = jax.eval_shape(functools.partial(slots_of, parts=parts, length=length), expert)
    at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(at, (jax.ShapeDtypeStruct((t, d), jnp.bfloat16), slots))


@pytest.mark.oldest
@pytest.mark.parametrize("of", [{}, {"k": 2, "d": 4096, "parts": 8, "length": 2560}], ids=str)
def test_ptxas_spills_nothing(of, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    x, slots = types(on("h200"), **of)
    with kernels.dumping(tpu=False) as dumps:
        text = jax.jit(dispatch_local).lower(x, slots).compile().as_text() or ""
        (kernel,) = kernels.read(dumps, frozenset())
        (ptx,) = (path.read_text() for path in dumps.gpu.glob("*.ptx"))
        (words,) = (path.read_text() for path in dumps.gpu.glob("*.ptxas"))
    assert kernel.spills == kernel.fills == 0 and "0 bytes stack frame" in words and ".local" not in ptx
    # Two blocks a multiprocessor, by registers and by shared memory; whole rows by TMA, none through registers.
    assert kernel.registers * 128 * 2 <= 2**16 and kernel.shared_bytes <= 113 * 2**10
    assert not re.search(r"(?:ld\.shared|st\.(?:shared|global))", ptx)
    share = -(-slots.assignment.size // x.shape[0])
    assert len(re.findall(r"cp\.async\.bulk\.global\.shared", ptx)) == slots.place.shape[-1] + share
    assert text.count("custom_call_target=") == 1 and " gather(" not in text


def lowered(fun=dispatch_local, target="h200", **of):
    return jax.jit(fun).lower(*types(on(target), **of)).as_text()


@pytest.mark.parametrize(("of", "taken"), [
    ({}, True),
    ({"t": 1024}, False),  # 14 MiB
    ({"k": 1}, False),
    ({"d": 7200}, False),
    ({"k": 2, "d": 4096, "length": 2**15}, True),
    ({"k": 2, "d": 4096, "length": 2**16}, False),  # three quarters would be zeros
], ids=str)  # fmt: skip
def test_which_calls_it_takes(of, taken):
    assert ("mosaic_gpu" in lowered(**of)) == taken


def test_elsewhere_and_of_sums_xla_gathers():
    assert "mosaic_gpu" not in lowered(target="b200")
    back = lambda x, slots: combine_local(x[None], slots._replace(assignment=slots.assignment[:, :8192]), None)
    assert "mosaic_gpu" not in lowered(back)
    batched = jax.vmap(dispatch_local, (0, None))
    x, slots = types(on("h200"))
    both = jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=x.sharding)
    assert "mosaic_gpu" not in jax.jit(batched).lower(both, slots).as_text()


@pytest.mark.parametrize(("x", "place", "n", "why"), [
    ("int8[8192,7168]", "int32[8192,8]", 65536, "int8[8192, 7168], supported: 2-D, 2 or 4 bytes, rows of a multiple of 128"),
    ("bfloat16[8192,7169]", "int32[8192,8]", 65536, "bfloat16[8192, 7169]"),
    ("float32[8192,16384]", "int32[8192,8]", 65536, "rows of 16384, supported: up to 9386"),
    ("bfloat16[8192,16448]", "int32[8192,8]", 65536, "rows of 16448"),
    ("bfloat16[8192,7168]", "int32[8192,1]", 8192, "1 places of each of 8192 rows among 8192, supported: 2 to 16"),
    ("bfloat16[8192,7168]", "int32[8192,17]", 65536, "17 places"),
    ("bfloat16[8192,7168]", "int32[8192,2]", 40000, "2 places of each of 8192 rows among 40000"),
    ("bfloat16[1024,7168]", "int32[1024,8]", 8192, "1024 rows of 7168 stay in the L2 cache"),
])  # fmt: skip
def test_says_what_it_lacks(x, place, n, why):
    def of(text):
        name, sizes = text.rstrip("]").split("[")
        return jax.ShapeDtypeStruct([int(size) for size in sizes.split(",")], name)

    rows_gpu.check(of("bfloat16[8192,7168]"), of("int32[8192,8]"), 65536)
    with pytest.raises(NotImplementedError, match=re.escape(why)):
        rows_gpu.check(of(x), of(place), n)


def layer_on_eight_gpus(t, d, f, e):
    """A layer with as many tokens a device, and its operands."""
    on("h200")
    mesh = ringmoe.target("h200x8").mesh({"x": 8})
    of = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    arrays = of(P(None, "x"), 1, 8 * t, d), of(P(), d, e), of(P("x"), e, d, f), of(P("x"), e, f, d)
    config = ringmoe.RouterConfig(e, 2, 1.25)
    return lambda *arrays: ringmoe.moe_ffn(*arrays, config=config, activation="relu")[0], arrays


def test_a_layer_on_eight_gpus_spreads_its_tokens():
    """Forward and backward, which spreads tokens and cotangents."""
    layer, arrays = layer_on_eight_gpus(8192, 4096, 512, 16)
    energy = lambda *arrays: jnp.sum(layer(*arrays).astype(jnp.float32) ** 2)
    text = ringmoe.jit(jax.grad(energy, (0, 2))).lower(*arrays).as_text()
    assert len(re.findall(r"ringmoe_spread_rows", text)) >= 2


def test_rows_travel_between_eight_gpus_during_the_matmuls():
    """A piece's exchange is under way while the experts work on another: only the first and the last are waited for."""
    layer, arrays = layer_on_eight_gpus(4096, 4096, 14336, 8)
    report = ringmoe.inspect(ringmoe.jit(layer), *arrays, target="h200x8")
    rows = [c for c in report.collectives if c.kind == "all-to-all" and "router" not in c.op_name]
    hidden = [c for c in rows if c.asynchronous and c.exposed_us < 0.1 * c.wire_us]
    assert len(rows) >= 3 and hidden == rows[1:-1]
    assert all(any("dot" in name or "gemm" in name for name in c.hidden_by) for c in hidden)
