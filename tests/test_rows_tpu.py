"""The TPU kernel that sums rows against numpy in Pallas's interpreter, and compiled for four TPUs."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from ringmoe.pallas import rows_tpu, runs_tpu
from ringmoe.primitives import rows as lowering
from ringmoe.schedule.gather import evaluate, sum_of_rows
from ringmoe.schedule.rows import Slots, combine_local, dispatch_local, packed
from tests.helpers import tpu_mesh


class Words:
    """Tiles as words from the start: the interpreter of JAX 0.12 sees no reference in another dtype or shape."""

    @staticmethod
    def load(rows, at, columns, step):
        return rows[at // rows.shape[1], pl.ds(at % rows.shape[1], columns, stride=step), :]

    @staticmethod
    def tiles(x):
        m, d = x.shape
        by_tile = x.reshape(m // 8, 8, d // 128, 128).swapaxes(1, 2)
        if x.dtype == jnp.bfloat16:
            by_tile = by_tile.reshape(m // 8, d // 128, 4, 2, 128).swapaxes(3, 4)
        return jax.lax.bitcast_convert_type(by_tile, jnp.uint32).reshape(m // 8, -1, 128)

    @staticmethod
    def rows_of(y, n, d, dtype):
        y = y.reshape(n // 8, d // 128, -1, 128)
        if dtype == jnp.bfloat16:
            y = jax.lax.bitcast_convert_type(y, dtype).swapaxes(3, 4).reshape(n // 8, d // 128, 8, 128)
        return jax.lax.bitcast_convert_type(y, dtype).swapaxes(1, 2).reshape(n, d)

    @staticmethod
    def out_type(x, n, dtype):
        return jax.ShapeDtypeStruct((n // 8, x.shape[1] // 128 * rows_tpu.height(dtype), 128), jnp.uint32)


@pytest.fixture
def races(races, monkeypatch):
    """In words that the interpreter knows."""
    for name in ("load", "tiles", "rows_of", "out_type"):
        monkeypatch.setattr(rows_tpu, name, getattr(Words, name))


CHIP = rows_tpu.Chip(64 * 2**20, 2)
SMALL = 16  # rows of a block of the result, so that few rows are several blocks
CASES = pytest.mark.parametrize(
    ("k", "dtype", "out", "weighted"),
    [
        (1, "bfloat16", "bfloat16", False),
        (1, "float32", "float32", False),
        (1, "bfloat16", "float32", True),
        (2, "bfloat16", "bfloat16", True),
        (2, "float32", "bfloat16", False),
        (8, "bfloat16", "bfloat16", False),
        (8, "float32", "float32", True),
    ],
)


def problem(k, dtype, m=24, n=40, d=4096, weighted=True):
    """Rows of which every eighth is NaN and in no sum; a sixth of all places are past the end."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, d)).astype(np.float32)
    x[3::8] = np.nan
    index = rng.choice(np.flatnonzero(np.arange(m) % 8 != 3), (n, k))
    index[rng.random((n, k)) < 1 / 6] = m
    index[0], index[1, 0], index[2, 0] = m, np.iinfo(np.int32).max, m - 1
    weight = rng.standard_normal((n, k)).astype(np.float32) if weighted else None
    return jnp.asarray(x, dtype), jnp.asarray(index, jnp.int32), None if weight is None else jnp.asarray(weight)


def by_loop(x, index, weight, out):
    x, index = np.asarray(x, np.float32), np.asarray(index)
    y = np.zeros((len(index), x.shape[1]), np.float32)
    for n, j in np.ndindex(index.shape):
        if index[n, j] < len(x):
            y[n] += x[index[n, j]] * (1 if weight is None else np.float32(weight[n, j]))
    return np.asarray(jnp.asarray(y).astype(out), np.float32)


def run(x, index, weight, out):
    return jax.jit(rows_tpu.sum_of_rows, static_argnums=(3, 4))(x, index, weight, jnp.dtype(out), CHIP)


@pytest.mark.sampled
@CASES
def test_sums_are_numpys(races, monkeypatch, k, dtype, out, weighted):
    """Two blocks of columns a core, three blocks of rows, the last of them half empty."""
    monkeypatch.setattr(rows_tpu, "BLOCK", SMALL)
    monkeypatch.setattr(rows_tpu, "MAX_COLUMNS", 1024)
    monkeypatch.setattr(rows_tpu, "MAX_CHOICES", 8)
    x, index, weight = problem(k, dtype, weighted=weighted)
    y = run(x, index, weight, out)
    assert y.dtype == out
    expected = by_loop(x, index, weight, out)
    if k == 1 and not weighted:
        np.testing.assert_array_equal(np.asarray(y, np.float32), expected)
    else:
        np.testing.assert_allclose(
            np.asarray(y, np.float32), expected, rtol=2**-7 if out == "bfloat16" else 1e-5, atol=1e-5
        )


def test_a_row_that_is_asked_for_keeps_what_is_not_finite(races, monkeypatch):
    monkeypatch.setattr(rows_tpu, "BLOCK", SMALL)
    x = jnp.ones((8, 1024), jnp.bfloat16).at[2].set(jnp.nan).at[3].set(-jnp.inf).at[5].set(jnp.finfo("bfloat16").max)
    index = jnp.asarray([[2, 4], [3, 4], [3, 8], [5, 5], [4, 4], [8, 8]] * 4, jnp.int32)
    y = np.asarray(run(x, index, None, "bfloat16"), np.float32)[:6]
    np.testing.assert_array_equal(y, np.full((1, 1024), 1) * np.array([[np.nan, -np.inf, -np.inf, np.inf, 2, 0]]).T)


def test_every_nan_stays_one_when_rounded(races, monkeypatch):
    monkeypatch.setattr(rows_tpu, "BLOCK", SMALL)
    nans = np.array([0x7FC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0, 0, 0], np.uint32).view(np.float32)
    index = jnp.asarray([[0, 8], [1, 8], [2, 8], [3, 8], [4, 8], [5, 8]] * 4, jnp.int32)
    y = run(jnp.asarray(np.tile(nans[:, None], (1, 512))), index, None, "bfloat16")
    np.testing.assert_array_equal(np.isnan(np.asarray(y[:6], np.float32)).all(1), [True] * 5 + [False])


def test_rounds_to_nearest_even(races, monkeypatch):
    """Of sums that lie on, just below and just above the middle of two neighbours."""
    monkeypatch.setattr(rows_tpu, "BLOCK", SMALL)
    rng = np.random.default_rng(0)
    middles = (rng.integers(0x3F80, 0x4000, 1024).astype(np.uint32) << 16) + 0x8000
    x = np.zeros((8, 1024), np.float32)
    for row, off in enumerate((-1, 0, 1)):
        x[row] = (middles + np.uint32(off % 2**32)).view(np.float32)
    index = jnp.asarray([[0, 8], [1, 8], [2, 8]] * 8, jnp.int32)
    y = run(jnp.asarray(x), index, None, "bfloat16")
    np.testing.assert_array_equal(y[:3], jnp.asarray(x[:3]).astype(jnp.bfloat16))


RUNS = pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "parts", "dtype", "out"),
    [
        (384, 2, 4, 4, "bfloat16", "bfloat16"),  # a part is one expert's; an odd number of blocks
        (512, 2, 12, 3, "float32", "float32"),  # runs that begin within a tile, and end where others begin
        (1024, 1, 3, 1, "bfloat16", "float32"),
        (256, 2, 40, 1, "float32", "bfloat16"),  # shorter than a tile: more is fetched again than came before
    ],
)


def runs(tokens, k, num_experts, parts, dtype, d=512):
    """Rows as `packed` puts them, NaN where none is; a quarter of the choices have none, and some blocks none of an expert."""
    rng = np.random.default_rng(0)
    scores = rng.random((tokens, num_experts)) + 2 * (np.arange(num_experts) == np.arange(tokens)[:, None] // 128)
    expert = np.argsort(-scores, axis=1)[:, :k]
    expert[rng.random(expert.shape) < 1 / 4] = num_experts
    length = tokens if parts == num_experts else tokens * min(k, num_experts // parts)
    slots, _ = jax.jit(packed, static_argnums=(1, 2, 3))(jnp.asarray(expert, jnp.int32), num_experts, parts, length)
    filled = np.asarray(slots.assignment).reshape(-1, 1) < tokens * k
    x = np.where(filled, rng.standard_normal((parts * length, d)).astype(np.float32), np.nan)
    weight = jnp.asarray(rng.standard_normal((tokens, k)), jnp.float32)
    return jnp.asarray(x, dtype), slots, weight


@pytest.mark.sampled
@RUNS
def test_sums_of_runs_are_numpys(races, monkeypatch, tokens, k, num_experts, parts, dtype, out):
    """Blocks of 128 sums, on both cores where their number is even."""
    monkeypatch.setattr(runs_tpu, "BLOCKS", (128,))
    monkeypatch.setattr(runs_tpu, "MIN_BYTES", 1024)
    x, slots, weight = runs(tokens, k, num_experts, parts, dtype)
    weight = None if k == 1 else weight
    sums = lambda x, place, starts, weight: runs_tpu.sum_of_rows(x, place, starts, weight, jnp.dtype(out), CHIP)
    y = np.asarray(jax.jit(sums)(x, slots.place, slots.starts, weight), np.float32)
    expected = by_loop(x, slots.place, weight, out)
    np.testing.assert_allclose(y, expected, rtol=2**-7 if out == "bfloat16" else 1e-5, atol=1e-5)


def test_runs_in_blocks_of_columns(races, monkeypatch):
    """Two of them, of four blocks of sums on each core: the second's first block comes while the first's last is worked on."""
    monkeypatch.setattr(runs_tpu, "BLOCKS", (128,))
    monkeypatch.setattr(runs_tpu, "MIN_BYTES", 512)
    rows = 3 * runs_tpu._room(128, 2) + 1
    chip = rows_tpu.Chip(400 * (rows * 8 * 2 + 2 * 128 * 4), 2)
    x, slots, _ = runs(1024, 1, 2, 2, "bfloat16")
    assert runs_tpu._sizes(x, slots.place, 2, chip) == (128, 256)
    sums = lambda x, place, starts: runs_tpu.sum_of_rows(x, place, starts, None, jnp.dtype("bfloat16"), chip)
    y = jax.jit(sums)(x, slots.place, slots.starts)
    np.testing.assert_array_equal(np.asarray(y, np.float32), by_loop(x, slots.place, None, "bfloat16"))


@pytest.mark.parametrize("num_experts", [4, 12])
def test_what_no_sum_needs_is_not_fetched(num_experts):
    """And what runs of a tile or more need is fetched once, but for a tile of each run where it begins."""
    tokens, k, block = 2048, 2, 512
    x, slots, _ = runs(tokens, k, num_experts, num_experts, "float32", d=128)
    index = jnp.where(slots.place < len(x), slots.place, -1).reshape(tokens // block, -1, 128)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        _, fetch = jax.jit(runs_tpu._table, static_argnums=2)(index, slots.starts, tokens // block)
    tiles = np.asarray(fetch)[..., 2].sum()
    filled = np.asarray(slots.assignment).reshape(-1, 8).min(1) < tokens * k
    assert filled.sum() <= tiles <= filled.sum() + num_experts


def joined(n=(2, 3), k=4, m=(5,), l=2):
    """`index` [*n, k] and `back` [*m, l]: each other's inverse, with places on both sides that are joined to none."""
    rng = np.random.default_rng(0)
    ends, starts = np.prod(n) * k, np.prod(m) * l
    index, back = np.full(ends, starts), np.full(starts, ends)
    some = rng.permutation(ends)[: min(ends, starts) - 2]
    index[some] = rng.permutation(starts)[: len(some)]
    back[index[some]] = some
    return jnp.asarray(index.reshape(*n, k), jnp.int32), jnp.asarray(back.reshape(*m, l), jnp.int32)


def test_the_kernel_is_called_with_what_the_primitive_means(races, monkeypatch):
    """Leading dims, places instead of rows, weights."""
    monkeypatch.setattr(rows_tpu, "BLOCK", 8)
    monkeypatch.setattr(rows_tpu, "MAX_CHOICES", 4)
    index, back = joined(n=(4, 2), m=(2, 4))
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 4, 1024), index.shape))
    for w in ((), (weight,)):
        operands = (x, index, back, jnp.zeros(0, jnp.int32), *w)
        y = jax.jit(functools.partial(lowering._resident, jnp.dtype("float32"), CHIP))(*operands)
        expected = evaluate(*operands, mapped=0, dtype=jnp.dtype("float32"))
        assert y.shape == expected.shape == (4, 2, 1024)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_derivatives_of_the_primitive():
    """To the second order, in rows and weights, forward and reverse, and under vmap."""
    index, back = joined()
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 3), index.shape))
    weighted = jax.jit(lambda x, weight: sum_of_rows(x, index, back, weight))
    dense = np.zeros((*index.shape, 6), np.float32)
    np.put_along_axis(dense, np.minimum(np.asarray(index) // 2, 5)[..., None], 1, -1)
    expected = np.einsum("abkm,abk,md->abd", dense[..., :5], weight, x)
    np.testing.assert_allclose(weighted(x, weight), expected, rtol=1e-5, atol=1e-6)
    check_grads(weighted, (x, weight), order=2, atol=1e-2, rtol=1e-2)
    check_grads(jax.jit(lambda x: sum_of_rows(x, index, back)), (x,), order=2, atol=1e-2, rtol=1e-2)
    check_grads(
        jax.vmap(weighted), (jnp.stack([x, -x]), jnp.stack([weight, 2 * weight])), order=1, atol=1e-2, rtol=1e-2
    )
    grad = lambda x, weight: jax.vjp(weighted, x, weight)[1](jnp.ones((2, 3, 3)))
    assert "scatter" not in str(jax.make_jaxpr(grad)(x, weight))
    bf16 = jax.vjp(lambda x: sum_of_rows(x, index, back, weight, jnp.float32), x.astype(jnp.bfloat16))
    assert bf16[0].dtype == jnp.float32 and bf16[1](bf16[0])[0].dtype == jnp.bfloat16


TARGETS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x2")


def compiled(target, fun, *shapes):
    sharding = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0])
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(fun).lower(*arrays).compile().as_text() or ""


@pytest.mark.sampled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "d"), [("bfloat16", 4096), ("float32", 1536), ("bfloat16", 7168)])
def test_compiles_without_a_copy(target, dtype, d):
    """Dispatch, combine and their transposes: four sums, one of runs, by the kernels, from rows where XLA put them."""
    tokens, k, num_experts, capacity = 1000, 2, 8, 320
    num_rows = num_experts * capacity

    def loss(x, weight, assignment, place, starts):
        slots = Slots(assignment, place, starts)
        rows = dispatch_local(x, slots)
        return jnp.sum(combine_local(rows, slots, weight, rows.dtype).astype(jnp.float32))

    text = compiled(
        target,
        jax.value_and_grad(loss),
        ((tokens, d), dtype),
        ((tokens, k), jnp.float32),
        ((num_experts, capacity), jnp.int32),
        ((tokens, k), jnp.int32),
        ((num_experts,), jnp.int32),
    )
    kernels = [line.split("%")[1].split(".")[0] for line in text.splitlines() if "tpu_custom_call" in line]
    assert sorted(kernels) == ["ringmoe_runs", *["ringmoe_sum_of_rows"] * 3, "ringmoe_sum_of_runs"]
    moved = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    for dims, op in re.findall(rf"= {moved}\[([\d,]+)\]\S* ([a-z-]+)\(", text):
        whole = np.prod([int(n) for n in dims.split(",")]) in (tokens * d, num_rows * d)
        assert not whole or op not in ("copy", "transpose", "scatter"), (dims, op)


@pytest.mark.sampled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("num_experts", "k", "d", "out"), [(256, 8, 7168, "bfloat16"), (128, 8, 2048, "float32"), (3, 1, 1024, "bfloat16")]
)
def test_sums_of_runs_compile(target, num_experts, k, d, out):
    """Blocks of columns, sums of twice the size, and runs as they lie where rows travelled."""
    tokens, room = 1024, 2048 * k // num_experts // 8 * 8
    sums = lambda rows, place, starts: combine_local(rows, Slots(place, place, starts), None, jnp.dtype(out))
    arrays = ((num_experts, room, d), jnp.bfloat16), ((tokens, k), jnp.int32), ((num_experts,), jnp.int32)
    text = compiled(target, sums, *arrays)
    assert "%ringmoe_sum_of_runs" in text and " gather(" not in text


def test_a_chip_whose_memory_we_do_not_know_has_xlas_gathers():
    arrays = ((4096, 4096), jnp.bfloat16), ((8, 1280), jnp.int32), ((4096, 2), jnp.int32)
    dispatch = lambda x, assignment, place: dispatch_local(x, Slots(assignment, place))
    for target, expected in (("v4:2x2x1", False), ("v5e:2x4", True)):
        assert ("tpu_custom_call" in compiled(target, dispatch, *arrays)) == expected, target


def lowered_for_tpu(fun, *arrays):
    return jax.jit(fun).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("m", "n", "k", "d", "dtype", "out"),
    [
        (1024, 1024, 1, 1000, "bfloat16", "bfloat16"),  # rows that aren't whole tiles
        (1001, 1024, 1, 1024, "bfloat16", "bfloat16"),
        (1024, 1024, 1, 1024, "float16", "float16"),
        (512, 128, 2, 1024, "bfloat16", "bfloat16"),  # few sums
        (1024, 1024, 4, 1024, "bfloat16", "bfloat16"),  # many choices
        (4096, 1024, 1, 1024, "bfloat16", "bfloat16"),  # most rows in no sum
        (1024, 1024, 1, 512, "bfloat16", "bfloat16"),  # short rows: address arithmetic alone takes longer than XLA
        (16384, 8192, 2, 4096, "bfloat16", "bfloat16"),  # only few columns of so many rows fit
    ],
)
def test_what_xla_does_faster_is_left_to_it(m, n, k, d, dtype, out):
    x, index, back = jnp.zeros((m, d), dtype), jnp.zeros((n, k), jnp.int32), jnp.zeros((m, 1), jnp.int32)
    text = lowered_for_tpu(lambda x, index, back: sum_of_rows(x, index, back, dtype=out), x, index, back)
    assert "tpu_custom_call" not in text and "gather" in text
    with pytest.raises(NotImplementedError, match="TPU row kernel"):
        rows_tpu.sum_of_rows(x, index, None, jnp.dtype(out), CHIP)


def test_only_in_a_program_of_one_device():
    """XLA can't partition the kernel: it is used inside a shard_map of all axes, and not outside or of some axes."""
    shape = lambda *s, dtype: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, P("a")))
    for manual, expected in ((None, False), ({"a"}, False), ({"a", "b"}, True)):
        mesh = tpu_mesh("v5e:2x4", (2, 4), jax.sharding.AxisType.Auto)
        arrays = shape(2048, 1024, dtype=jnp.bfloat16), *(shape(2048, 1, dtype=jnp.int32) for _ in range(2))
        fun = sum_of_rows
        if manual:
            fun = jax.shard_map(fun, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names=manual)
        text = jax.jit(fun).lower(*arrays).compile().as_text() or ""
        assert ("tpu_custom_call" in text) == expected, manual
