"""Dispatch and combine: against numpy loops, as inverses and transposes of each other, with bad tokens, without scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmoe.router import RouterConfig, route
from ringmoe.schedule import rows as movers
from ringmoe.schedule.rows import combine_local, combine_scalars, dispatch_local, dispatch_scalars, packed, slots_of

D = 3


# (E, k, capacity factor, group size, batch): few shapes, so that each compiles once; hypothesis draws the values
LAYOUTS = (
    (1, 1, 1.0, 12, ()),
    (2, 2, 0.4, 4, (2,)),
    (4, 2, 1.0, 4, (2, 2)),
    (7, 3, 1.25, 12, (2,)),
    (4, 1, 0.5, 1, ()),
    (7, 3, None, 4, (2,)),
    (4, 2, None, 12, (2, 2)),
    (2, 1, None, 1, ()),
)


@st.composite
def routings(draw, layouts=LAYOUTS):
    num_experts, top_k, factor, group_size, batch = draw(st.sampled_from(layouts))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    logits = rng.normal(size=(*batch, 12, num_experts)) + draw(st.sampled_from([0, 2])) * np.arange(num_experts)
    mask = rng.random((*batch, 12)) < draw(st.sampled_from([1.0, 0.8]))
    config = RouterConfig(num_experts, top_k, factor, group_size)
    x = rng.normal(size=(*batch, 12, D)).astype(np.float32)
    return x, jitted_route(logits.astype(np.float32), config, mask)


@functools.partial(jax.jit, static_argnums=1)
def jitted_route(logits, config, mask):
    return route(logits, config, token_mask=mask)


def slots(routing):
    return slots_of(routing.expert, routing.slot, routing.num_experts, routing.capacity, routing.group_size)


def combine(rows, routing, weight):
    return combine_local(rows, slots(routing), weight)


@jax.jit
def move(x, routing):
    """(the assignment in each slot, x by slot, weights by slot)"""
    found = slots(routing)
    return found.assignment, dispatch_local(x, found), dispatch_scalars(routing.weight, found)


@jax.jit
def back(rows, routing):
    """(weighted combine, combine with weight 1)"""
    return combine(rows, routing, routing.weight), combine(rows, routing, None)


@jax.jit
def pull_back(rows, routing, dy):
    """Gradients of the weighted combine: by jax, and by dispatch; (drows, dweight) twice."""
    _, pullback = jax.vjp(lambda rows, weight: combine(rows, routing, weight), rows, routing.weight)
    found = slots(routing)
    dy_rows = dispatch_local(dy, found)
    dweight = combine_scalars(jnp.sum(dy_rows * rows, axis=-1), found)
    return pullback(dy), (dy_rows * dispatch_scalars(routing.weight, found)[..., None], dweight)


def loop_table(routing):
    """The inverse table by assigning, one choice at a time."""
    expert, slot = (np.asarray(a).reshape(-1, routing.expert.shape[-1]) for a in (routing.expert, routing.slot))
    num_groups = expert.shape[0] // routing.group_size
    table = np.full((routing.num_experts, num_groups * routing.capacity), expert.size)
    for t in range(expert.shape[0]):
        for j in range(expert.shape[1]):
            if slot[t, j] >= 0:
                row = t // routing.group_size * routing.capacity + slot[t, j]
                assert table[expert[t, j], row] == expert.size
                table[expert[t, j], row] = t * expert.shape[1] + j
    return table


@given(routings())
def test_table_and_rows_equal_the_loop(drawn):
    x, routing = drawn
    table, rows, row_weight = move(x, routing)
    want = loop_table(routing)
    np.testing.assert_array_equal(table, want)
    padded = np.concatenate([x.reshape(-1, D), np.zeros((1, D), np.float32)])
    np.testing.assert_array_equal(rows, padded[want // routing.expert.shape[-1]])
    np.testing.assert_array_equal(row_weight, np.append(np.asarray(routing.weight).reshape(-1), 0)[want])


@given(routings())
def test_combine_equals_the_loop(drawn):
    x, routing = drawn
    table = loop_table(routing)
    rows = np.random.default_rng(0).normal(size=(*table.shape, D)).astype(np.float32)
    want = np.zeros((x.size // D, D))
    weight = np.asarray(routing.weight).reshape(-1)
    for (e, r), assignment in np.ndenumerate(table):
        if assignment < weight.size:
            want[assignment // routing.expert.shape[-1]] += weight[assignment] * rows[e, r]
    got = np.asarray(back(rows, routing)[0])
    np.testing.assert_allclose(got.reshape(-1, D), want, atol=1e-6)
    assert (got[(np.asarray(routing.slot) < 0).all(-1)] == 0).all()


@pytest.mark.parametrize("one_key", [True, False])
@given(routings(), st.booleans())
def test_packed_rows_equal_the_loops(one_key, drawn, in_one_part):
    """By expert and in the order of the assignments, from the first row of each part on; and where each one lies."""
    _, routing = drawn
    num_experts = routing.num_experts
    expert = np.where(np.asarray(routing.slot) < 0, num_experts, routing.expert)
    parts, length = (1, expert.size) if in_one_part else (num_experts, expert.shape[-2] * 4)
    with pytest.MonkeyPatch.context() as patch:
        if not one_key:  # as where both in one key would not fit
            patch.setattr(movers, "LARGEST", 0)
        found, counts = packed(jnp.asarray(expert), num_experts, parts, length)
    want, place = np.full((parts, length), expert.size), np.full(expert.size, parts * length)
    for part, shared in enumerate(np.split(np.arange(num_experts), parts)):
        mine = [n for e in shared for n, of in enumerate(expert.reshape(-1)) if of == e]
        want[part, : len(mine)] = mine
        place[mine] = part * length + np.arange(len(mine))
    np.testing.assert_array_equal(found.assignment, want)
    np.testing.assert_array_equal(found.place, place.reshape(expert.shape))
    counted = np.bincount(expert.reshape(-1), minlength=num_experts + 1)[:-1]
    np.testing.assert_array_equal(counts, counted)
    share = counted.reshape(parts, -1)
    starts = np.arange(parts)[:, None] * length + np.cumsum(share, 1) - share
    np.testing.assert_array_equal(found.starts, starts.reshape(-1))


@given(routings(layouts=LAYOUTS[5:]))
def test_combine_undoes_dispatch(drawn):
    x, routing = drawn
    y, _ = back(move(x, routing)[1], routing)
    np.testing.assert_allclose(y, np.where(np.asarray(routing.active)[..., None], x, 0), atol=1e-6)


@given(routings())
def test_they_are_transposes(drawn):
    x, routing = drawn
    rng = np.random.default_rng(0)
    _, x_rows, _ = move(x, routing)
    rows, dy = (rng.normal(size=a.shape).astype(np.float32) for a in (x_rows, x))
    np.testing.assert_allclose(np.sum(x_rows * rows), np.sum(x * back(rows, routing)[1]), atol=1e-4)
    for want, got in zip(*pull_back(rows, routing, dy), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@given(routings())
@settings(max_examples=12)
def test_derivatives_equal_those_of_the_loops_matrix(drawn):
    x, routing = drawn
    assignment = loop_table(routing).reshape(-1)
    one_hot = (assignment[:, None] == np.arange(routing.weight.size)).astype(np.float64)  # [slots, assignments]
    to_rows = one_hot.reshape(len(assignment), -1, routing.expert.shape[-1])  # [slots, tokens, k]

    def dense(x, weight):
        rows = jnp.sin(jnp.einsum("rtk,td->rd", to_rows, x.reshape(-1, D)))
        y = jnp.einsum("rtk,rd,tk->td", to_rows, rows, weight.reshape(to_rows.shape[1:]))
        return jnp.sum(jnp.cos(y + 1))

    def ours(x, weight):
        y = combine(jnp.sin(dispatch_local(x, slots(routing))), routing, weight)
        return jnp.sum(jnp.cos(y + 1))

    of = lambda loss: jax.grad(lambda *a: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss, (0, 1))(*a)), (0, 1))
    with jax.enable_x64(True):
        exact = np.asarray(x, np.float64), np.asarray(routing.weight, np.float64)
        want = jax.jit(of(dense))(*exact)
    got = jax.jit(of(ours))(x, routing.weight)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)


def test_a_nan_token_stays_alone():
    logits = jax.random.normal(jax.random.key(0), (16, 4)).at[5, 0].set(jnp.nan)
    x = jax.random.normal(jax.random.key(1), (16, D)).at[5].set(jnp.nan)
    routing = jitted_route(logits, RouterConfig(4, capacity_factor=None, group_size=8), jnp.ones(16, bool))
    rows = move(x, routing)[1]
    assert np.isfinite(rows).all()
    y = np.asarray(back(rows, routing)[0])
    assert np.isnan(y[5]).all() and np.isfinite(np.delete(y, 5, 0)).all()


def test_a_dropped_choice_adds_nothing_though_rows_are_nan():
    config = RouterConfig(2, top_k=1, capacity_factor=0.5, group_size=4)
    routing = jitted_route(jnp.tile(jnp.array([1.0, 2.0]), (4, 1)), config, jnp.ones(4, bool))
    assert routing.capacity == 1
    rows = jnp.full((2, 1, D), jnp.nan)
    y = np.asarray(back(rows, routing)[0])
    assert np.isnan(y[0]).all() and (y[1:] == 0).all()


def test_bfloat16_accumulates_in_float32():
    routing = jitted_route(
        jax.random.normal(jax.random.key(0), (16, 4)), RouterConfig(4, group_size=8), jnp.ones(16, bool)
    )
    rows = move(jnp.ones((16, D), jnp.bfloat16), routing)[1]
    assert rows.dtype == jnp.bfloat16
    assert [y.dtype for y in back(rows, routing)] == [jnp.float32] * 2


def test_no_scatter():
    routing = jitted_route(
        jax.random.normal(jax.random.key(0), (16, 4)), RouterConfig(4, group_size=8), jnp.ones(16, bool)
    )
    for fun, x in ((move, jnp.ones((16, D))), (back, jnp.ones((4, 2 * routing.capacity, D)))):
        lowered = fun.lower(x, routing)
        assert "stablehlo.scatter" not in lowered.as_text()
        assert " scatter(" not in lowered.compile().as_text()
    # Nor in derivatives, of any order: the transpose of JAX's gather would be one.
    shifted = lambda x, weight: combine(jnp.sin(dispatch_local(x, slots(routing))), routing, weight)
    energy = lambda x, weight: jnp.sum(shifted(x, weight) ** 2)
    second = jax.jit(jax.hessian(energy, (0, 1))).lower(jnp.ones((16, D)), routing.weight)
    assert "stablehlo.gather" in second.as_text() and "stablehlo.scatter" not in second.as_text()
    assert " sort(" in move.lower(jnp.ones((16, D)), routing).compile().as_text()


@pytest.mark.parametrize("one_key", [True, False])
def test_no_sort_is_stable(one_key, monkeypatch):
    """XLA:TPU compiles a stable one three times as long: a device's 160,000 choices took it many minutes."""
    if not one_key:
        monkeypatch.setattr(movers, "LARGEST", 0)
    config = RouterConfig(4, group_size=8, priority="batch")
    routed = jax.jit(lambda logits: slots(route(logits, config))).lower(jnp.ones((16, 4))).as_text()
    laid = jax.jit(lambda expert: packed(expert, 4, 2, 32)).lower(jnp.ones((16, 2), jnp.int32)).as_text()
    for text, sorts in ((routed, 3), (laid, 2)):
        assert text.count("is_stable = false") == sorts and "is_stable = true" not in text
