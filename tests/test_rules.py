"""Sharding rules: from the strings to Shardy's text, to the axes of each factor, and back to PartitionSpecs."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from ringmoe import rules

B, T, S, N, K, H = 2, 16, 24, 8, 2, 4
QKV = (("query", (B, T, N, H)), ("key", (B, S, K, H)), ("value", (B, S, K, H)))
MESH = {"a": 2, "b": 4, "c": 2}


def attention(*extras, qkv=QKV, results=("output", "lse")):
    return rules.make("attention", (*qkv, *extras), results)


def in_pages(*extras):
    pools = (("key", (64, 8, K, H)), ("value", (64, 8, K, H)))
    return rules.make("attention in pages", (QKV[0], *pools, *extras), ("output", "lse"))


def test_a_pool_decides_before_queries_which_axes_are_whose():
    rule = in_pages()
    axes = lambda *specs: rule.factor_axes([*specs], MESH)
    pool = (("b",), (), ("a",), ())
    assert axes((("a",), (), ("b",), ()), pool, pool) == {"s": ("b",), "k": ("a",)}


def experts(b=B, t=16, d=4, e=8, f=6, gate=False):
    weights = [("w_in", (e, d, f))] + [("w_gate", (e, d, f))] * gate + [("w_out", (e, f, d))]
    choices = [(name, (b, t, 2)) for name in ("expert", "slot", "weight")]
    return rules.make("experts", (("tokens", (b, t, d)), *choices, *weights), ("tokens",))


def dispatch(b=B, t=16, d=4, e=8, i=4, r=3):
    operands = (("tokens", (b, t, d)), ("expert", (b, t, 2)), ("slot", (b, t, 2)))
    return rules.make("movers", operands, ("rows",), (("e", e), ("i", i), ("r", r)))


@pytest.mark.parametrize(("rule", "text"), [
    (attention(), "b0 t (k g) h, b0 s k h, b0 s k v -> b0 t (k g) v, b0 t (k g)"),
    (attention(("bias", (B, N, T, S))), "b0 t (k g) h, b0 s k h, b0 s k v, b0 (k g) t u -> b0 t (k g) v, b0 t (k g)"),
    (attention(("key_lengths", (B,))), "b0 t (k g) h, b0 s k h, b0 s k v, b0 -> b0 t (k g) v, b0 t (k g)"),
    (attention(("query_segments", (B, T)), ("key_segments", (B, S))),
     "b0 t (k g) h, b0 s k h, b0 s k v, b0 t, b0 u -> b0 t (k g) v, b0 t (k g)"),
    (experts(), "b0 t d, b0 t c, b0 t c, b0 t c, e d f, e f d -> b0 t d"),
    (experts(gate=True), "b0 t d, b0 t c, b0 t c, b0 t c, e d f, e d f, e f d -> b0 t d"),
    (dispatch(), "b0 (z i) d, b0 (z i) c, b0 (z i) c -> e b0 z r d"),
])  # fmt: skip
def test_shardys_notation(rule, text):
    assert str(rule) == text


def test_factors_of_length_one_leave_compound_dims():
    mha = attention(qkv=(("query", (B, T, N, H)), ("key", (B, S, N, H)), ("value", (B, S, N, H))))
    mqa = attention(qkv=(("query", (B, T, N, H)), ("key", (B, S, 1, H)), ("value", (B, S, 1, H))))
    assert mha.operands[0][2] == ("k",) and mha.results[1][2] == ("k",)
    assert mqa.operands[0][2] == ("g",) and mqa.operands[1][2] == ("k",)
    assert dispatch(i=1).operands[0][1] == ("z",)
    assert dispatch(i=16).operands[0][1] == ("i",)


def test_sizes_of_factors_that_never_stand_alone():
    assert attention().compound_sizes == {"g": 4}
    assert dispatch().compound_sizes == {"i": 4} and experts().compound_sizes == {}


@given(st.tuples(*[st.booleans()] * 4))
def test_a_broadcast_dim_gets_a_factor_of_its_own(ones):
    shape = tuple(1 if one else length for one, length in zip(ones, (B, N, T, S)))
    rule = attention(("bias", shape))
    for dim, one, whole in zip(rule.operands[3], ones, (("b0",), ("k", "g"), ("t",), ("u",))):
        if one and whole != ("u",):  # u lives in this operand alone: nothing tells that it is longer elsewhere
            assert dim != whole and dict(rule.sizes)[dim[0]] == 1
        elif not one:
            assert dim == whole
    assert rule.shape(rule.operands[3]) == shape
    assert len({dim for dim, one in zip(rule.operands[3], ones) if one}) == sum(ones)


def test_a_result_that_bears_an_operands_name_has_its_dims():
    rule = attention(("bias", (1, N, 1, S)), results=("query", "key", "bias"))
    assert rule.results == (rule.operands[0], rule.operands[1], rule.operands[3])


def test_a_lone_query_token_is_a_factor_all_the_same():
    rule = attention(qkv=(("query", (1, 1, 1, 1)), ("key", (1, 1, 1, 1)), ("value", (1, 1, 1, 1))))
    assert str(rule) == "b0 t k h, b0 s k h, b0 s k v -> b0 t k v, b0 t k"


SPECS = st.permutations(["a", "b", "c", None, None, None])


def found(rule, *specs, mesh=MESH):
    return rule.factor_axes([rules.axes_of(spec, len(dims)) for spec, dims in zip(specs, rule.operands)], mesh)


@pytest.mark.parametrize(("specs", "want"), [
    ((P("a", "b"), P("a", "b"), P("a", "b")), {"b0": ("a",), "t": ("b",), "s": ("b",)}),
    ((P(("a", "c"), "b"),), {"b0": ("a", "c"), "t": ("b",)}),  # 2 batches over 4 devices: padded
    ((P(None, None, "b"),), {"k": ("b",)}),  # 2 key heads over 4 devices: repeated, 8 query heads go with them
    ((P(None, ("a", "b")), P(None, ("a", "b"))), {"t": ("a", "b"), "s": ("a", "b")}),
    ((P(None, ("b", "a")), P()), {"t": ("b", "a")}),
    ((P(), P(None, "b")), {"s": ("b",)}),
    ((P(None, None, "a"),), {"k": ("a",)}),  # two key heads over two devices
    ((P(None, None, ("a", "b")),), {"k": ("a",), "g": ("b",)}),  # the group goes on where key heads are single
    ((P(None, None, None, "a"),), {}),  # head dims are never split
    ((P("a"), P("c")), {"b0": ("a",)}),  # the first array that splits a factor decides
    ((P("a", "b"), P(None, "a")), {"b0": ("a",), "t": ("b",)}),  # a is b0's in every array, so s can't have it
    ((P(None, "a"), P(None, None, "a")), {"t": ("a",)}),  # t and k stand in one array: b is taken
])  # fmt: skip
def test_axes_of_each_factor(specs, want):
    assert found(attention(), *specs) == want


@given(SPECS, SPECS, SPECS)
@settings(max_examples=100)
def test_no_array_is_split_twice_over_one_axis(query, key, value):
    rule = attention(qkv=(("query", (8, 16, 8, H)), ("key", (8, 16, 8, H)), ("value", (8, 16, 8, H))))
    axes = found(rule, *(P(*spec[:4]) for spec in (query, key, value)))
    for dims in rule.operands + rule.results:
        spec = rules.spec_of(dims, axes)
        used = [axis for entry in rules.axes_of(spec, len(dims)) for axis in entry]
        assert len(used) == len(set(used))
        for length, entry in zip(rule.shape(dims), rules.axes_of(spec, len(dims))):
            assert length % math.prod(MESH[axis] for axis in entry) == 0
    # What the first operand says holds, but for the head dim.
    for factor, entry in zip(("b0", "t", "k"), query):
        assert entry is None or axes[factor] == (entry,)


@given(st.permutations(["a", "b", "c", None]))
@settings(max_examples=24)
def test_specs_come_back(entries):
    """The factors found from an array's spec give that spec back."""
    rule = experts(b=8, t=32, d=16)
    spec = P(*(entry for entry in entries[:2]))
    axes = found(rule, spec)
    assert rules.axes_of(rules.spec_of(rule.operands[0], axes), 3) == rules.axes_of(spec, 3)


def test_dispatch_never_cuts_a_group():
    """Axes that would cut groups get whole ones, and more of them; a single group is never split."""
    assert found(dispatch(t=12), P(None, ("a", "b"))) == {"z": ("a", "b")}
    assert dict(dispatch(t=12).fitted({"z": ("a", "b")}, MESH).sizes)["z"] == 8
    assert found(dispatch(), P(None, ("b", "a"))) == {"z": ("b", "a")}
    assert found(dispatch(i=16), P(None, "b")) == {}


def test_the_layers_tokens_are_cut_anywhere():
    assert found(experts(t=12), P(None, ("a", "b"))) == {"t": ("a", "b")}
    assert dict(experts(t=12).fitted({"t": ("a", "b")}, MESH).sizes)["t"] == 16


@pytest.mark.parametrize(("k", "g", "devices", "want"), [
    (2, 4, 2, (2, 4)), (2, 4, 8, (8, 1)), (3, 1, 4, (4, 1)), (1, 6, 4, (4, 2)), (6, 4, 4, (12, 2)), (2, 3, 4, (4, 2)),
    (2, 3, 8, (8, 1)),
])  # fmt: skip
def test_key_heads_are_repeated_until_every_device_holds_those_of_its_queries(k, g, devices, want):
    qkv = (("query", (B, T, k * g, H)), ("key", (B, S, k, H)), ("value", (B, S, k, H)))
    sizes = dict(attention(qkv=qkv).fitted({"k": ("x",)}, {"x": devices}).sizes)
    assert (sizes["k"], sizes["g"]) == want
    per_device = want[0] // devices * want[1]
    assert per_device == min(-(-k * r // devices) * -(-g // r) for r in range(1, g + 1))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(2, 8), st.integers(2, 8))
@settings(max_examples=30)
def test_arrays_grow_and_shrink_back(k, g, t, b, heads, tokens):
    """Shrinking undoes growing; a repeated key head comes back as the sum; queries stay with their own key head."""
    query, key = (
        jnp.arange(b * t * k * g * 3.0).reshape(b, t, k * g, 3),
        jnp.arange(b * t * k * 3.0).reshape(b, t, k, 3),
    )
    rule = rules.make("attention", (("query", query.shape), ("key", key.shape), ("value", key.shape)), ("output",))
    mesh = {"x": heads, "y": tokens}
    axes = rule.factor_axes([((), ("y",), ("x",), ())] * 2, mesh)
    old, new = dict(rule.sizes), dict(rule.fitted(axes, mesh).sizes)
    big_q, big_k = (rules.grow(x, dims, old, new) for x, dims in zip((query, key), rule.operands))
    assert big_q.shape == rule.fitted(axes, mesh).shape(rule.operands[0])
    assert big_k.shape == rule.fitted(axes, mesh).shape(rule.operands[1])
    assert (rules.shrink(big_q, rule.operands[0], old, new) == query).all()
    repeats = round(float(rules.shrink(big_k, rule.operands[1], old, new).sum() / key.sum())) if key.sum() else 1
    assert (rules.shrink(big_k, rule.operands[1], old, new) == repeats * key).all()
    marked = jnp.repeat(key, g, axis=2)  # every query head as its key head: they still stand together
    grown = rules.grow(marked, rule.operands[0], old, new)
    pairs = jnp.repeat(big_k, grown.shape[2] // big_k.shape[2], axis=2)
    assert ((grown == pairs) | (grown == 0)).all()


def test_axes_are_cut_where_key_heads_end():
    """Digits (size, stride): eight devices on two key heads of four; not where no factor ends so, nor inside a group."""
    heads = lambda digits: attention().cut([((), (), digits, ()), *[((),) * 4] * 3])[0][2]
    assert heads(((8, 1),)) == ((2, 4), (4, 1))
    assert heads(((16, 1),)) == ((16, 1),) and heads(((3, 1),)) == ((3, 1),) and heads(()) == ()
    assert heads(((4, 2), (2, 1))) == ((2, 4), (2, 2), (2, 1))
    assert dispatch().cut([((), ((8, 1),), ())])[0][1] == ((8, 1),)


@pytest.mark.parametrize(("shape", "want"), [((8, 3), P("a")), ((8, 4), P("a", ("b", "c"))), ((9, 2), P(None, "b"))])
def test_axes_that_divide(shape, want):
    got = rules.dividing(P("a", ("b", "c")), shape, {"a": 4, "b": 2, "c": 2})
    assert rules.axes_of(got, 2) == rules.axes_of(want, 2)


def test_the_rule_of_the_whole_call_from_one_devices_shapes():
    rule = experts(e=1).scaled(("t", "e"), 8)
    assert dict(rule.sizes)["t"] == 128 and dict(rule.sizes)["e"] == 8 and dict(rule.sizes)["d"] == 4


def test_one_devices_slice_is_cut_evenly_or_not_at_all():
    rule, mesh = attention(), {"b": 4, "c": 5}
    evenly = lambda **factors: rule.evenly(("t", "s"), {f: (axis,) for f, axis in factors.items()}, mesh)
    assert evenly(t="b", s="b", b0="c") == {
        "t": ("b",),
        "s": ("b",),
        "b0": ("c",),
    }  # 16 and 24 tokens; batches are padded
    assert evenly(t="c", s="b") == {"s": ("b",)}
    assert rule.evenly(("t", "s"), {"s": ("d",)}, {"d": 3}) == {}  # 24 keys, but 16 queries would be cut like them


@pytest.mark.parametrize(("spec", "axes"), [
    (P(), ((), (), ())), (P("a"), (("a",), (), ())), (P(None, ("a", "b")), ((), ("a", "b"), ())),
    (P(P.UNCONSTRAINED, None, "c"), ((), (), ("c",))),
])  # fmt: skip
def test_axes_of_a_spec(spec, axes):
    assert rules.axes_of(spec, 3) == axes


@pytest.mark.parametrize("family", rules.FAMILIES)
def test_every_rule_is_one_that_custom_partitioning_takes(family):
    """The text and sizes go through JAX's own parser."""
    from jax.experimental.custom_partitioning import custom_partitioning

    of = {"attention": attention(("bias", (1, N, T, 1))), "experts": experts(gate=True), "movers": dispatch()}
    cache = (("cache", (B, S, K, H)), ("new", (B, 3, K, H)), ("first", (B,)))
    of["cache"] = rules.make("cache", cache, ("cache",))
    pages = ("pages", (B, 6))
    of["attention in pages"] = in_pages(pages)
    of["cache in pages"] = rules.make("cache in pages", (("cache", (64, 8, K, H)), *cache[1:], pages), ("cache",))
    rule = of[family]
    call = custom_partitioning(lambda *xs: tuple(jnp.zeros(rule.shape(dims)) for dims in rule.results))
    call.def_partition(partition=lambda *_: None, sharding_rule=str(rule), **rule.compound_sizes)
    jax.eval_shape(call, *(jnp.zeros(rule.shape(dims)) for dims in rule.operands))
