"""The Hopper kernel of sorted rows' matmuls: interpreted, against float64; down to ptxas; and which calls it takes.

`tests/gpu` runs the cases on a GPU, `python -m bench.gpu grouped` measures there.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding

import ringmoe
from ringmoe.inspector import kernels
from ringmoe.pallas import grouped, grouped_gpu

KINDS = {"times": grouped.times, "back": grouped.back, "outer": grouped.outer}
D, F = 192, 320  # neither is a whole number of columns of a tile
# Rows, no multiple of a tile's, and how many each expert has: none, a few, more than a tile; experts begin anywhere.
COUNTS = (
    (264, (3, 0, 150, 71, 0)),
    (136, (0, 136, 0, 0, 0)),
    (136, (0, 0, 0, 0, 0)),
)


def types(kind, n=256, d=D, f=F, e=4, dtype=jnp.bfloat16, sharding=None):
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    a = of(n, f if kind == "back" else d)
    return a, of(n, f) if kind == "outer" else of(e, d, f), of(e, dtype=jnp.int32)


def operands(kind, n, counts, dtype):
    """In which NaN follows the last expert's rows."""
    rng = np.random.default_rng(0)
    a, b, _ = (np.asarray(rng.normal(size=x.shape)) for x in types(kind, n, e=len(counts)))
    for rows in (a, b) if kind == "outer" else (a,):
        rows[sum(counts) :] = np.nan
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.asarray(counts, jnp.int32)


def by_loop(kind, a, b, counts):
    """In float64, without the rows that are nobody's."""
    ends = np.cumsum(counts)
    parts = [slice(end - count, end) for end, count in zip(ends, counts)]
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if kind == "outer":
        return np.stack([a[part].T @ b[part] for part in parts])
    return np.concatenate([a[part] @ (w.T if kind == "back" else w) for part, w in zip(parts, b)])


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """On two multiprocessors, and fails on a data race (newer JAX raises, older prints).

    The two views of the memory through which results go lie apart here, for the detector knows one union only: to it two
    warpgroups that use a view each race, though their halves of the memory are disjoint. A warpgroup waits for its own
    copies before it takes the other view.
    """
    monkeypatch.setattr(grouped_gpu, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(plgpu, "RefUnion", lambda *views: views)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def assert_equals_the_loop(kind, n, counts):
    a, b, counts = operands(kind, n, counts, jnp.bfloat16)
    got = np.asarray(jax.jit(grouped_gpu.matmul, static_argnums=(0, 4))(kind, a, b, counts, jnp.float32))
    want = by_loop(kind, a, b, np.asarray(counts))
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got[: len(want)], want, atol=1e-4)


def assert_is_rounded_once(kind):
    a, b, counts = operands(kind, 72, (3, 0, 64, 1), jnp.float16)
    got = np.asarray(jax.jit(grouped_gpu.matmul, static_argnums=(0, 4))(kind, a, b, counts, jnp.float16))
    want = by_loop(kind, a, b, np.asarray(counts))
    np.testing.assert_allclose(got[: len(want)], want, rtol=2**-11 * 1.01, atol=1e-4)


def assert_is_padded(kind):
    """Rows, and both widths, one of them a bias's."""
    rng, counts = np.random.default_rng(0), (3, 0, 90, 8)
    a, b, _ = (jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16) for x in types(kind, 101, 1, 70, 4))
    counts = jnp.asarray(counts, jnp.int32)
    got = jax.jit(grouped_gpu.matmul, static_argnums=(0, 4))(kind, a, b, counts, jnp.float32)
    want = by_loop(kind, a, b, np.asarray(counts))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize(("n", "counts"), COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop(interpreted, kind, n, counts):
    assert_equals_the_loop(kind, n, counts)


@pytest.mark.oldest
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_rounded_once(interpreted, kind):
    assert_is_rounded_once(kind)


@pytest.mark.oldest
@pytest.mark.parametrize("kind", KINDS)
def test_what_tiles_do_not_divide_is_padded(interpreted, kind):
    assert_is_padded(kind)


@pytest.mark.parametrize(("a", "b", "dtype", "why"), [
    ("float32[256,192]", "float32[4,192,320]", "float32", "float32 with float32 to float32"),
    ("bfloat16[256,192]", "float16[4,192,320]", "float32", "bfloat16 with float16"),
    ("float16[256,192]", "float16[4,192,320]", "float64", "to float64"),
])  # fmt: skip
def test_says_what_it_lacks(a, b, dtype, why):
    def of(text):
        name, sizes = text.rstrip("]").split("[")
        return jax.ShapeDtypeStruct([int(size) for size in sizes.split(",")], name)

    grouped_gpu.check(*types("times")[:2], jnp.dtype(jnp.float32))
    with pytest.raises(NotImplementedError, match=re.escape(why)):
        grouped_gpu.check(of(a), of(b), jnp.dtype(dtype))


def on(target):
    try:
        return SingleDeviceSharding(ringmoe.target(target).devices()[0])
    except ImportError as error:
        pytest.skip(f"no compiler for {target}: {error}")


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("kind", KINDS)
def test_ptxas_spills_nothing(kind, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    arrays = types(kind, sharding=on("h200"))
    with kernels.dumping(tpu=False) as dumps:
        jax.jit(KINDS[kind]).lower(*arrays).compile()
        (kernel,) = kernels.read(dumps, frozenset())
        (ptx,) = (path.read_text() for path in dumps.gpu.glob("*.ptx"))
        (words,) = (path.read_text() for path in dumps.gpu.glob("*.ptxas"))
    assert kernel.spills == kernel.fills == 0 and "0 bytes stack frame" in words and ".local" not in ptx
    assert (
        kernel.registers == 168 and kernel.shared_bytes <= 227 * 2**10
    )  # three warpgroups, one block a multiprocessor
    assert ptx.count("wgmma.mma_async") == grouped_gpu.DEPTH // 16


def lowered(kind, target="h200", **of):
    return jax.jit(KINDS[kind]).lower(*types(kind, sharding=on(target), **of)).as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_takes_goes_through_it(kind):
    text = lowered(kind)
    assert "mosaic_gpu" in text and "stablehlo.while" not in text


@pytest.mark.parametrize(("target", "of"), [("h200", {"dtype": jnp.float32}), ("b200", {})])
def test_what_it_refuses_goes_tile_by_tile(target, of):
    ringmoe.errors.forget_warnings()
    if target == "h200":
        with pytest.warns(ringmoe.errors.CostWarning, match="tile by tile instead of through a faster kernel: "):
            text = lowered("times", target, **of)
    else:
        text = lowered("times", target, **of)
    assert "mosaic_gpu" not in text and "stablehlo.while" in text


def test_under_vmap_and_where_xla_partitions_it_goes_tile_by_tile():
    of_two = [
        jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=x.sharding) for x in types("times", sharding=on("h200"))
    ]
    assert "mosaic_gpu" not in jax.jit(jax.vmap(grouped.times)).lower(*of_two).as_text()
    mesh = ringmoe.target("h200x8").mesh({"a": 8})
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert "mosaic_gpu" not in jax.jit(grouped.times).lower(*types("times", sharding=whole)).as_text()


def test_a_dropless_layer_has_no_loop_over_tiles():
    sharding, (t, d, f, e) = on("h200"), (256, 128, 192, 8)
    shapes = (1, t, d), (d, e), (e, d, f), (e, f, d), (e, d, f)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    config = ringmoe.RouterConfig(e, 2, None)
    layer = lambda x, r, w_in, w_out, w_gate: ringmoe.moe_ffn(x, r, w_in, w_out, w_gate=w_gate, config=config)[0]
    energy = lambda *arrays: jnp.sum(layer(*arrays).astype(jnp.float32) ** 2)
    text = jax.jit(jax.grad(energy, tuple(range(5)))).lower(*arrays).compile().as_text() or ""
    # Three forward; eight backward, of which two are of the same operands as forward.
    assert text.count('custom_call_target="mosaic_gpu') == 9
    assert all("router" in line for line in text.splitlines() if " while(" in line)
