"""The per-device expert schedule in shard_map, against the float64 oracle, on every kind of mesh axis."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ringmoe import reference_moe, rules
from ringmoe.ffn import Weights
from ringmoe.pallas import experts_xla
from ringmoe.plan import experts as plan
from ringmoe.plan.base import freeze
from ringmoe.router import RouterConfig, route
from ringmoe.schedule import experts, gather, rows
from ringmoe.schedule.exchange import BY_XLA
from tests.exchanges import INTERPRETED

B, T, D, F, E = 4, 64, 16, 24, 8
CONFIG = RouterConfig(E, top_k=2, capacity_factor=1.0, group_size=8)

# name: mesh axes with sizes, axes of batch, of sequence, of experts (major to minor), of hidden
CASES = {
    "one device": ((("a", 1),), (), (), (), ()),
    "tokens only": ((("a", 8),), (), ("a",), (), ()),
    "experts on the token axis": ((("a", 8),), (), ("a",), ("a",), ()),
    "experts on another axis": ((("a", 8),), (), (), ("a",), ()),
    "hidden": ((("a", 8),), (), (), (), ("a",)),
    "batch x experts on sequence": ((("a", 2), ("b", 4)), ("a",), ("b",), ("b",), ()),
    "experts on both token axes": ((("a", 2), ("b", 4)), ("a",), ("b",), ("a", "b"), ()),
    "experts on both, minor first": ((("a", 2), ("b", 4)), ("a",), ("b",), ("b", "a"), ()),
    "experts on token and other": ((("a", 2), ("b", 4)), (), ("a",), ("a", "b"), ()),
    "experts on other and token": ((("a", 2), ("b", 4)), (), ("b",), ("a", "b"), ()),
    "tokens x hidden": ((("a", 2), ("b", 4)), ("a",), (), (), ("b",)),
    "experts and hidden": ((("a", 2), ("b", 4)), (), ("a",), ("a",), ("b",)),
    "exchange, own, exchange": ((("a", 2), ("b", 2), ("c", 2)), ("a",), ("c",), ("a", "b", "c"), ()),
    "batch, exchange, hidden": ((("a", 2), ("b", 2), ("c", 2)), ("a",), ("b",), ("b",), ("c",)),
    "own expert, tokens, hidden": ((("a", 2), ("b", 2), ("c", 2)), (), ("b",), ("a",), ("c",)),
}
# Wherever rows are exchanged they may also travel in pieces.
IN_PIECES = {name: f"{name}, in pieces" for name, (_, batch, seq, e, _) in CASES.items() if {*e} & {*batch, *seq}}
# Those by remote DMA, whose kernels are interpreted here; the weights' gradients are then added up piece by piece.
REMOTE = {name: f"{name}, by remote DMA" for name in IN_PIECES}
# And wherever an expert may take many more rows than it will, they lie sorted.
SORTED = {name: f"{name}, sorted" for name in CASES}
CASES |= {other: CASES[name] for name, other in (*IN_PIECES.items(), *REMOTE.items(), *SORTED.items())}
RULE = rules.make(
    "experts",
    (("tokens", (B, T, D)), ("expert", (B, T, 2)), ("slot", (B, T, 2)), ("w_in", (E, D, F)), ("w_out", (E, F, D))),
    ("tokens",),
)


def make_inputs(gated=True, dtype=jnp.float32):
    """(x, expert, slot, weight, w_in, ... as in `Weights`), dy; and the logits."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    logits = normal(B, T, E) + 0.5 * np.arange(E, dtype=np.float32)  # uneven, so that some experts overflow
    x, dy = normal(B, T, D), normal(B, T, D)
    w_in, w_gate = (normal(E, D, F) / np.float32(math.sqrt(D)) for _ in range(2))
    w_out = normal(E, F, D) / np.float32(math.sqrt(F))
    w_gate, b_gate = (w_gate, normal(E, F)) if gated else (None, None)
    weights = Weights(w_in, w_gate, w_out, normal(E, F), b_gate, normal(E, D))
    x, dy, *weights = jax.tree.map(lambda a: jnp.asarray(a, dtype), [x, dy, *weights])
    routing = jitted_route(logits)
    return (x, routing.expert, routing.slot, routing.weight, *weights), dy, logits


@jax.jit
def jitted_route(logits):
    return route(logits, CONFIG)


def make_plan(case):
    axes, batch, sequence, expert_axes, hidden = CASES[case]
    factors = freeze({"b0": batch, "t": sequence, "e": expert_axes, "f": hidden})
    config = dataclasses.replace(CONFIG, capacity_factor=None) if case in SORTED.values() else CONFIG
    remote = case in REMOTE.values()
    asked = "remote" if remote else "pieces" if case in IN_PIECES.values() else "all_to_all"
    made = plan.make(RULE, factors, axes, config.capacity(config.group_size), config.group_size, 4, exchange=asked)
    assert made.sorted == (case in SORTED.values()) and made.remote == remote
    assert (made.pieces > 1) == (remote or case in IN_PIECES.values())
    return dataclasses.replace(made, sums_each=remote)


def shard(case, body, in_specs, out_specs, **options):
    """jit of shard_map of `body` on the case's mesh.

    In the specs T stands for tokens; I for w_in and w_gate; O for w_out; H for b_ and s_ of the two; M for b_out and s_out.
    """
    axes, batch, sequence, expert_axes, hidden = CASES[case]
    names, sizes = zip(*axes, strict=True)
    mesh = jax.make_mesh(
        sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[: math.prod(sizes)]
    )
    spec = {
        "T": P(batch or None, sequence or None, None),
        "I": P(expert_axes or None, None, hidden or None),
        "O": P(expert_axes or None, hidden or None, None),
        "H": P(expert_axes or None, hidden or None),
        "M": P(expert_axes or None),
    }
    in_specs, out_specs = (tuple(spec[letter] for letter in letters) for letters in (in_specs, out_specs))
    out_specs = out_specs if len(out_specs) > 1 else out_specs[0]
    options = {"check_vma": case not in REMOTE.values()} | options  # kernels are interpreted without the checks alone
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options))


def scheduled(run, case):
    """`run` of the schedule as a function of the flat arrays of `make_inputs`, to flat results."""

    def body(x, expert, slot, weight, *rest):
        weights, dy = Weights(*rest[: len(Weights._fields)]), rest[len(Weights._fields) :]
        kind = weights, "gelu" if weights.w_gate is None else "silu"
        travel = INTERPRETED if case in REMOTE.values() else BY_XLA
        out = run(make_plan(case), experts_xla, travel, x, expert, slot, weight, *kind, *dy)
        return (*out[:2], *out[2]) if dy else out

    return body


@functools.cache
def make_forward(case, **options):
    return shard(case, scheduled(experts.forward, case), "TTTTIIOHHMHHM", "T", **options)


@functools.cache
def make_backward(case, **options):
    return shard(case, scheduled(experts.backward, case), "TTTTIIOHHMHHMT", "TTIIOHHMHHM", **options)


@functools.cache
def oracle(gated):
    """Output and gradients in float64, from the same float32 inputs."""
    (x, _, _, weight, *weights), dy, logits = make_inputs(gated)
    selection = reference_moe.select(
        logits, top_k=2, capacity=CONFIG.capacity(CONFIG.group_size), group_size=CONFIG.group_size
    )
    assert (selection.slot < 0).any()
    with jax.enable_x64(True):
        x, dy, weight, *weights = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float64), [x, dy, weight, *weights]
        )

        def layer(x, weight, *weights):
            given = {name: w for name, w in zip(Weights._fields, weights) if w is not None}
            return reference_moe.experts(x, selection, weight, **given)

        y, pullback = jax.vjp(layer, x, weight, *weights)
        return jax.tree.map(np.asarray, (y, pullback(dy)))


def assert_equals_oracle(y, grads, gated=True, atol=(1e-5, 1e-4)):
    want, want_grads = oracle(gated)
    np.testing.assert_allclose(y, want, rtol=0, atol=atol[0])
    for name, got, expected in zip(("x", "weight", *Weights._fields), grads, want_grads, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            np.testing.assert_allclose(got, expected, rtol=0, atol=atol[1], err_msg=name)


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_layer(case):
    arrays, dy, _ = make_inputs()
    assert_equals_oracle(make_forward(case)(*arrays), make_backward(case)(*arrays, dy))


@pytest.mark.parametrize("case", ["one device", "exchange, own, exchange"])
def test_without_a_gate(case):
    arrays, dy, _ = make_inputs(gated=False)
    assert_equals_oracle(make_forward(case)(*arrays), make_backward(case)(*arrays, dy), gated=False)


@pytest.mark.sampled
@pytest.mark.parametrize("case", [case for name, case in SORTED.items() if name in IN_PIECES])
def test_no_row_is_lost_though_all_are_sent_to_one_device(case):
    """Every token chooses the same experts, and all of them are kept."""
    (x, expert, _, weight, *weights), dy, _ = make_inputs()
    expert = jnp.broadcast_to(jnp.array([1, 0], jnp.int32), expert.shape)
    y, (dx, dweight, *_) = (
        make_forward(case)(x, expert, expert, weight, *weights),
        make_backward(case)(x, expert, expert, weight, *weights, dy),
    )
    with jax.enable_x64(True):
        double = lambda a: jnp.asarray(np.asarray(a), jnp.float64)
        x, weight, dy, *weights = map(double, (x, weight, dy, *weights))
        w = Weights(*weights)

        def dense(x, weight):
            hidden = lambda e: jax.nn.silu(x @ w.w_gate[e] + w.b_gate[e]) * (x @ w.w_in[e] + w.b_in[e])
            ffn = lambda e: hidden(e) @ w.w_out[e] + w.b_out[e]
            return weight[..., :1] * ffn(1) + weight[..., 1:] * ffn(0)

        want, pullback = jax.vjp(dense, x, weight)
        want_dx, want_dweight = pullback(dy)
    for got, expected, atol in ((y, want, 1e-5), (dx, want_dx, 1e-4), (dweight, want_dweight, 1e-4)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_without_replication_checks():
    arrays, dy, _ = make_inputs()
    case = "experts and hidden"
    grads = make_backward(case, check_vma=False)(*arrays, dy)
    assert_equals_oracle(make_forward(case, check_vma=False)(*arrays), grads)


def test_float64():
    with jax.enable_x64(True):
        arrays, dy, _ = make_inputs(dtype=jnp.float64)
        arrays = (*arrays[:3], arrays[3].astype(jnp.float64), *arrays[4:])
        case = "exchange, own, exchange"
        y, grads = make_forward(case)(*arrays), make_backward(case)(*arrays, dy)
    assert {a.dtype for a in jax.tree.leaves((y, *grads))} == {jnp.dtype("float64")}
    assert_equals_oracle(y, grads, atol=(1e-13, 1e-12))


def test_bfloat16():
    arrays, dy, _ = make_inputs(dtype=jnp.bfloat16)
    case = "exchange, own, exchange"
    y, grads = make_forward(case)(*arrays), make_backward(case)(*arrays, dy)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda g: g.dtype, [*grads]) == jax.tree.map(lambda a: a.dtype, [arrays[0], *arrays[3:]])
    want, want_grads = oracle(True)
    for got, expected in zip(*map(jax.tree.leaves, ((y, *grads), (want, *want_grads))), strict=True):
        assert np.abs(np.asarray(got, np.float32) - expected).max() < 0.02 * np.abs(expected).max()


def test_repeats_bit_for_bit():
    arrays, dy, _ = make_inputs()
    case = "exchange, own, exchange"
    first, second = ((make_forward(case)(*arrays), make_backward(case)(*arrays, dy)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    "case", ["experts on the token axis", "batch x experts on sequence", "exchange, own, exchange"]
)
def test_the_same_choices_are_dropped_on_every_mesh(case):
    """Routing where the tokens are, device by device, drops what routing all of them at once drops."""
    arrays, _, logits = make_inputs()

    def layer(x, logits, *weights):
        routing = route(logits, CONFIG)
        return scheduled(experts.forward, case)(x, routing.expert, routing.slot, routing.weight, *weights), routing.slot

    y, slot = shard(case, layer, "TTIIOHHMHHM", "TT")(arrays[0], logits, *arrays[4:])
    np.testing.assert_array_equal(slot, arrays[2])
    np.testing.assert_allclose(y, oracle(True)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["experts on another axis", "exchange, own, exchange", "batch, exchange, hidden"])
def test_a_nan_token_changes_no_other(case):
    (x, *rest), _, logits = make_inputs()
    mask = np.arange(B * T).reshape(B, T) != 7
    without = jax.jit(lambda logits: route(logits, CONFIG, token_mask=mask))(logits)
    logits[0, 7] = np.nan
    routing = jitted_route(logits)
    got, want = (
        np.asarray(make_forward(case)(x, r.expert, r.slot, r.weight, *rest[3:])).reshape(-1, D)
        for x, r in ((x.at[0, 7].set(jnp.nan), routing), (x, without))
    )
    assert np.isnan(got[7]).all() and (want[7] == 0).all()
    np.testing.assert_array_equal(np.delete(got, 7, 0), np.delete(want, 7, 0))


@pytest.mark.parametrize(
    ("case", "collectives"),
    [
        ("one device", set()),
        ("tokens only", set()),
        ("experts on the token axis", {"all-to-all"}),
        ("experts on another axis", {"all-reduce"}),
        ("hidden", {"all-reduce"}),
        ("exchange, own, exchange", {"all-to-all", "all-reduce"}),
        ("one device, sorted", set()),
        ("exchange, own, exchange, sorted", {"all-gather", "all-to-all", "all-reduce"}),  # of counts
    ],
)
def test_compiled_text_holds_the_planned_collectives_and_no_scatter(case, collectives):
    arrays, dy, _ = make_inputs()
    text = make_forward(case).lower(*arrays).compile().as_text()
    known = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "scatter")
    assert {op for op in known if re.search(rf"\s{op}(-start)?\(", text)} == collectives
    both = text + make_backward(case).lower(*arrays, dy).compile().as_text()
    assert not re.search(r"\sscatter\(", both)
    for step in ("dispatch", "experts", "combine", *(["exchange"] if "all-to-all" in collectives else [])):
        assert f"/{step}/" in both, step


def keeps_its_promise(x, index, back, weight=None, dtype=None, starts=None):
    """`sum_of_rows`, NaN unless the places of each run, as they are asked for, are the rows from its start on."""
    y = gather.sum_of_rows(x, index, back, weight, dtype, starts)
    if starts is None:
        return y
    place = index.reshape(-1)
    run = jnp.sum(place[:, None] >= starts, axis=1) - 1
    same = (run[:, None] == jnp.arange(starts.size)) & (place < back.size)[:, None]
    rows = starts[run] + jnp.take_along_axis(jnp.cumsum(same, axis=0), jnp.maximum(run, 0)[:, None], axis=1)[:, 0] - 1
    kept = jnp.all((place == rows) | (place >= back.size)) & jnp.all(run >= 0) & jnp.all(jnp.diff(starts) >= 0)
    return jnp.where(kept, y, jnp.nan)


@pytest.mark.sampled
@pytest.mark.parametrize("case", ["tokens only", *(SORTED[name] for name in ("one device", *IN_PIECES))])
def test_rows_lie_in_the_runs_that_a_kernel_is_promised(case, monkeypatch):
    arrays, *_ = make_inputs()
    expected = make_forward(case)(*arrays)
    monkeypatch.setattr(rows, "sum_of_rows", keeps_its_promise)
    promised = shard(case, scheduled(experts.forward, case), "TTTTIIOHHMHHM", "T")
    np.testing.assert_array_equal(promised(*arrays), expected)
