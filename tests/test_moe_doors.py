"""The expert layer and its two halves through every door, on every mesh, against the dense oracle in float64."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference_moe
from ringmoe.ffn import ACTIVATIONS, NEED_A_GATE
from tests.helpers import (
    AXES,
    MANUAL,
    MANUAL_VMA,
    MESHES,
    ONE_DEVICE,
    PARTITIONER,
    RINGMOE_JIT,
    SHARDED_DOORS,
    TOLERANCE,
    TYPES,
    WITHOUT_SHRINKING,
    Door,
    assert_close,
    collectives,
    double,
    make_mesh,
    put,
    value_and_gradients,
)  # fmt: skip

ROLES = (
    "batch",
    "sequence",
    "experts",
    "batch experts",
    "sequence experts",
    "hidden",
    "sequence hidden",
    "model",
    "nothing",
)
SHARED = ("w_in", "w_out", "w_gate", "router")  # ringmoe.SharedExpert's, here with a prefix
BIASES = ("b_in", "b_gate", "b_out")
MATRICES, SCALES = ("w_in", "w_gate", "w_out"), ("s_in", "s_gate", "s_out")
WANTED = ("x", "router_weight", *MATRICES, *BIASES, *SCALES, *(f"shared_{name}" for name in SHARED))


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer. Every mesh axis shards what its role names; a dim's length is its axes' size times the number here."""

    door: Door = TYPES
    mesh: tuple[int, ...] = (8,)
    roles: tuple[str, ...] = ("sequence experts",)
    dtype: str = "float32"
    batch: int = 1
    groups: int = 1  # per device
    group_size: int = 4
    experts: int = 1  # per device, at least 2 in all
    top_k: int = 2
    capacity_factor: float | None = 1.0
    renormalize: bool = True
    gate: bool = True
    activation: str | None = None
    biases: bool = False
    scaled: bool = False  # weights in float8
    shared: str = ""  # which arrays of a shared expert there are
    token_mask: bool = False
    d: int = 4
    f: int = 6
    seed: int = 0

    def axes(self, role: str) -> tuple[str, ...]:
        return tuple(axis for axis, roles in zip(AXES, self.roles) if role in roles.split())

    def size(self, role: str) -> int:
        return math.prod(self.mesh[AXES.index(axis)] for axis in self.axes(role))

    @property
    def num_experts(self) -> int:
        parts = self.size("experts")
        return self.experts * parts if parts > 1 else max(2, self.experts)

    @property
    def experts_activation(self) -> str:
        return self.activation or ("silu" if self.gate else "gelu")

    @property
    def config(self) -> ringmoe.RouterConfig:
        return ringmoe.RouterConfig(
            self.num_experts,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            group_size=self.group_size,
            renormalize=self.renormalize,
        )

    def arrays(self):
        b, t = self.batch * self.size("batch"), self.groups * self.group_size * self.size("sequence")
        d, f, e = self.d * self.size("model"), self.f * self.size("hidden"), self.num_experts
        rng = np.random.default_rng(self.seed)
        normal = lambda *shape, scale=1.0: (scale * rng.normal(size=shape)).astype(jnp.dtype(self.dtype))
        arrays = {
            "x": normal(b, t, d),
            "router_weight": normal(d, e),
            "w_in": normal(e, d, f, scale=d**-0.5),
            "w_gate": normal(e, d, f, scale=d**-0.5) if self.gate else None,
            "w_out": normal(e, f, d, scale=f**-0.5),
            "token_mask": rng.random((b, t)) < 0.8 if self.token_mask else None,
        }
        cotangent = rng.normal(size=(b, t, d)).astype(np.float32)
        if self.biases:
            arrays |= {"b_in": normal(e, f), "b_gate": normal(e, f) if self.gate else None, "b_out": normal(e, d)}
        if self.scaled:
            for matrix, scale in zip(MATRICES, SCALES):
                w = arrays[matrix]
                arrays[scale] = None if w is None else (1 + rng.random((e, w.shape[-1]), np.float32)) / 2
                arrays[matrix] = None if w is None else w.astype(jnp.float8_e4m3fn)
        shapes = {"w_in": (d, f), "w_out": (f, d), "w_gate": (d, f), "router": (d, 1)}
        arrays |= {f"shared_{name}": normal(*shapes[name], scale=d**-0.5) for name in self.shared.split()}
        return arrays, cotangent

    @property
    def specs(self):
        either = lambda role: self.axes(role) or None
        tokens = P(either("batch"), either("sequence"))
        experts, model, hidden = either("experts"), either("model"), either("hidden")
        return {
            "x": tokens, "router_weight": P(), "token_mask": tokens,
            "w_in": P(experts, model, hidden), "w_gate": P(experts, model, hidden), "w_out": P(experts, hidden, model),
            "b_in": P(experts, hidden), "b_gate": P(experts, hidden), "b_out": P(experts, model),
            "s_in": P(experts, hidden), "s_gate": P(experts, hidden), "s_out": P(experts, model),
            "shared_w_in": P(model, hidden), "shared_w_gate": P(model, hidden), "shared_w_out": P(hidden, model),
            "shared_router": P(),
        }  # fmt: skip


def without_shared(arrays):
    """The arrays, and those of the shared expert by its own names."""
    rest = {name: x for name, x in arrays.items() if not name.startswith("shared_")}
    return rest, {name: arrays[f"shared_{name}"] for name in SHARED if f"shared_{name}" in arrays}


def layer(config, activation=None, **given):
    given, shared = without_shared(given)
    shared = ringmoe.SharedExpert(**shared) if shared else None
    y, metrics = ringmoe.moe_ffn(**given, activation=activation, shared=shared, config=config)
    return y, metrics.load_balance_loss, metrics.z_loss, metrics.dropped, metrics.expert_load


def loss_of_y(out, cotangent):
    dtype = jnp.promote_types(out[0].dtype, jnp.float32)
    return jnp.sum(out[0].astype(dtype) * cotangent.astype(dtype))


def loss(out, cotangent):
    """The output and both router losses."""
    _y, balance, z = out[:3]
    return loss_of_y(out, cotangent) + balance + 0.1 * z


@functools.cache
def oracle(case: Case, loss):
    """Output, losses, drops and load, and gradients, in float64."""
    arrays, cotangent = case.arrays()
    config = case.config
    with jax.enable_x64(True):
        arrays, cotangent = double(arrays), double(cotangent)
        token_mask = arrays.pop("token_mask")
        selection = reference_moe.select(
            arrays["x"] @ arrays["router_weight"],
            top_k=config.top_k,
            capacity=config.capacity(case.group_size),
            group_size=case.group_size,
            token_mask=token_mask,
        )
        active = jnp.asarray(selection.active)
        load = np.bincount(selection.expert[selection.active].ravel(), minlength=config.num_experts)
        dropped = int((selection.active[..., None] & (selection.slot < 0)).sum())
        num_active = max(1, int(selection.active.sum()))

        def dense(**arrays):
            arrays, shared = without_shared(arrays)
            for matrix, scale in zip(MATRICES, SCALES):
                if (s := arrays.pop(scale, None)) is not None:
                    arrays[matrix] = arrays[matrix] * s[:, None]
            kind = {"selection": selection, "renormalize": config.renormalize, "activation": case.activation}
            y = reference_moe.moe_ffn(**arrays, **kind)
            if shared:
                y += reference_moe.shared(arrays["x"], **shared, activation=case.experts_activation)
            y = jnp.where(active[..., None], y, 0)
            logits = arrays["x"] @ arrays["router_weight"]
            scores = jnp.where(active[..., None], jax.nn.softmax(logits, -1), 0).sum((0, 1)) / num_active
            balance = config.num_experts * jnp.sum(load / (num_active * config.top_k) * scores)
            z = jnp.sum(jnp.where(active, jax.nn.logsumexp(logits, -1), 0) ** 2) / num_active
            return y, balance, z, dropped, load

        return value_and_gradients(dense, loss, WANTED, ONE_DEVICE, None, arrays, {}, cotangent)


def run(case: Case, loss=loss, arrays=None):
    made, cotangent = case.arrays()
    arrays = made if arrays is None else arrays
    mesh = make_mesh(case.mesh, case.door.axis_type) if case.mesh else None
    fun = functools.partial(layer, case.config, case.activation)
    out_specs = None
    if case.door.check_vma is not None:
        # Inside a shard_map metrics are one device's: drops and loads are added up here, the losses are left out.
        axes = (*case.axes("batch"), *case.axes("sequence"))
        inner = fun

        def fun(**arrays):
            y, _, _, dropped, load = inner(**arrays)
            return y, jnp.float32(0), jnp.float32(0), jax.lax.psum(dropped, axes), jax.lax.psum(load, axes)

        out_specs = (case.specs["x"], P(), P(), P(), P())
    with jax.enable_x64(case.dtype == "float64"):
        return value_and_gradients(
            fun, loss, WANTED, case.door, mesh, arrays, case.specs, cotangent, out_specs, case.axes("experts")
        )


def check(case: Case):
    # Losses are float32 whatever the dtype, and one device's inside a shard_map.
    with_losses = case.door.check_vma is None and case.dtype != "float64"
    chosen = loss if with_losses else loss_of_y
    (y, balance, z, dropped, load), grads = run(case, chosen)
    (want_y, want_balance, want_z, want_dropped, want_load), want_grads = oracle(
        dataclasses.replace(case, door=ONE_DEVICE), chosen
    )
    forward, gradient = TOLERANCE[jnp.dtype(case.dtype)]
    assert y.dtype == jnp.dtype(case.dtype)
    assert_close(y, want_y, forward, "y")
    if with_losses:
        assert_close(balance, want_balance, forward, "load balance loss")
        assert_close(z, want_z, forward, "z loss")
    assert dropped == want_dropped
    np.testing.assert_array_equal(load, want_load)
    assert sorted(grads) == sorted(want_grads)
    for name, grad in grads.items():
        eight_bits = case.scaled and name in MATRICES
        assert grad.dtype == (jnp.float32 if name in SCALES else jnp.float8_e4m3fn if eight_bits else case.dtype)
        if not (eight_bits and case.door.check_vma is not None):  # JAX adds up the devices' in float8 there
            tolerance = 2**-4 if eight_bits else max(gradient, TOLERANCE[grad.dtype][1])
            assert_close(grad, want_grads[name], tolerance, f"gradient of {name}")


@st.composite
def cases(draw):
    mesh = draw(st.sampled_from(MESHES))
    door = draw(st.sampled_from(SHARDED_DOORS)) if mesh else ONE_DEVICE
    manual = door.check_vma is not None
    roles = tuple(draw(st.sampled_from(("batch", "sequence experts") if manual else ROLES)) for _ in mesh)
    if manual:
        roles = ("sequence experts", *roles[1:])
    experts, gate = draw(st.integers(1, 2)), draw(st.booleans())
    return Case(
        door=door, mesh=mesh, roles=roles, dtype=draw(st.sampled_from(("float32", "float32", "bfloat16", "float64"))),
        batch=draw(st.integers(1, 2)), groups=draw(st.integers(1, 2)), group_size=draw(st.sampled_from((1, 4, 6))),
        experts=experts, top_k=draw(st.integers(1, 2)),
        capacity_factor=draw(st.sampled_from((None, 0.5, 1.0, 1.25, 4.0))), renormalize=draw(st.booleans()),
        gate=gate, token_mask=draw(st.booleans()), f=draw(st.sampled_from((1, 6))), seed=draw(st.integers(0, 99)),
        activation=draw(st.sampled_from((None, *(name for name in ACTIVATIONS if gate or name not in NEED_A_GATE)))),
        biases=draw(st.booleans()),
        shared=draw(st.sampled_from(("", *(f"w_in w_out{' w_gate' * gate}{router}" for router in ("", " router"))))),
    )  # fmt: skip


@given(cases())
@settings(max_examples=20, phases=WITHOUT_SHRINKING)
def test_equals_the_dense_oracle(case):
    check(case)


LAYOUTS = {
    "experts on the token axis": Case(),
    "batch x sequence, experts on sequence": Case(mesh=(2, 4), roles=("batch", "sequence experts")),
    "experts on both token axes": Case(mesh=(2, 4), roles=("batch experts", "sequence experts"), gate=False),
    "two axes of sequence and experts": Case(mesh=(2, 4), roles=("sequence experts",) * 2, capacity_factor=None),
}
FOUND_LAYOUTS = {  # inside a user's shard_map experts lie over the tokens' axis only
    "batch only": Case(roles=("batch",), experts=4),
    "experts on another axis": Case(mesh=(2, 4), roles=("sequence", "experts")),
    "experts only": Case(roles=("experts",)),
    "experts on a token axis and another": Case(mesh=(2, 2, 2), roles=("batch", "sequence experts", "experts")),
    "hidden": Case(mesh=(2, 2, 2), roles=("batch", "sequence experts", "hidden"), top_k=1),
    "hidden over a token axis": Case(mesh=(2, 4), roles=("sequence hidden", "experts")),
    "weights sharded along the model dim": Case(mesh=(2, 4), roles=("sequence experts", "model")),
}


@pytest.mark.sampled
@pytest.mark.oldest
@pytest.mark.parametrize("door", SHARDED_DOORS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_through_every_door(layout, door):
    check(dataclasses.replace(LAYOUTS[layout], door=door))


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
@pytest.mark.parametrize("layout", FOUND_LAYOUTS)
def test_every_layout_through_every_door_that_finds_it(layout, door):
    check(dataclasses.replace(FOUND_LAYOUTS[layout], door=door))


EXPERTS = 8
CONFIG = ringmoe.RouterConfig(EXPERTS, top_k=2, capacity_factor=0.75, group_size=8)
PLACES = {  # name: mesh, spec of x, axes of the experts
    "one device": ((), P(), None),
    "sequence": ((8,), P(None, "a"), "a"),
    "batch and sequence": ((2, 4), P("a", "b"), "b"),
    "experts elsewhere": ((2, 4), P("a"), "b"),
}


def uneven_inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    router = normal(4, EXPERTS) + np.linspace(1, -1, EXPERTS, dtype=np.float32)  # the first experts overflow
    return {
        "x": normal(2, 64, 4) + 1,
        "router_weight": router,
        "w_in": normal(EXPERTS, 4, 6),
        "w_out": normal(EXPERTS, 6, 4),
    }


def uneven_layer(place, door, arrays):
    shape, tokens, experts = PLACES[place]
    mesh = make_mesh(shape, door.axis_type) if shape else None
    specs = {"x": tokens, "router_weight": P(), "w_in": P(experts), "w_out": P(experts)}
    fun = functools.partial(ringmoe.moe_ffn, config=CONFIG)
    return jax.tree.map(np.asarray, door.jit(lambda arrays: fun(**arrays))(put(mesh, arrays, specs)))


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
def test_what_is_dropped_does_not_depend_on_the_mesh(door):
    arrays = uneven_inputs()
    want_y, want = uneven_layer("one device", ONE_DEVICE, arrays)
    zeros = (want_y == 0).all(-1)
    assert want.dropped > 0 and zeros.any(), "nothing is dropped: the test would show nothing"
    for place in list(PLACES)[1:]:
        y, metrics = uneven_layer(place, door, arrays)
        assert metrics.dropped == want.dropped
        np.testing.assert_array_equal((y == 0).all(-1), zeros)
        np.testing.assert_array_equal(metrics.expert_load, want.expert_load)


CUT = {  # tokens, tokens of a group: over eight devices
    "two devices a group": (64, 16),
    "six of sixteen a device, the rows sorted": (48, 16),
    "one group for all": (40, 40),
}


def run_cut(cut, factor, door):
    """(results, gradients) of a layer whose groups eight devices cut, or of one device; config; the arrays and their specs."""
    num_tokens, group_size = CUT[cut]
    config = dataclasses.replace(CONFIG, group_size=group_size, capacity_factor=factor)
    arrays = uneven_inputs()
    arrays["x"] = arrays["x"][:, :num_tokens]
    cotangent = np.random.default_rng(1).normal(size=arrays["x"].shape).astype(np.float32)
    specs = {"x": P(None, "a"), "router_weight": P(), "w_in": P("a"), "w_out": P("a")}
    mesh = None if door is ONE_DEVICE else make_mesh((8,), door.axis_type)
    fun = functools.partial(layer, config)
    return value_and_gradients(fun, loss, tuple(arrays), door, mesh, arrays, specs, cotangent), config, arrays, specs


alone = functools.cache(functools.partial(run_cut, door=ONE_DEVICE))


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("factor", [0.75, None])
def test_devices_may_cut_a_group(cut, door, factor, recwarn):
    """What is kept is the same to the bit, whatever part of its group a device holds, and so are output and gradients."""
    ((want, *_, dropped, load), want_grads), *_ = alone(cut, factor)
    assert bool(dropped) == (factor is not None)
    ((y, *_, got_dropped, got_load), grads), config, arrays, specs = run_cut(cut, factor, door)
    assert got_dropped == dropped and not [w for w in recwarn if "groups padded" in str(w.message)]
    np.testing.assert_array_equal(got_load, load)
    np.testing.assert_array_equal((y == 0).all(-1), (want == 0).all(-1))
    forward, gradient = TOLERANCE[jnp.dtype(jnp.float32)]
    assert_close(y, want, forward)
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], gradient, name)
    if door is RINGMOE_JIT:
        fun = ringmoe.jit(lambda arrays: layer(config, **arrays)[0])
        (row,) = ringmoe.explain(fun, put(make_mesh((8,), door.axis_type), arrays, specs)).rows
        assert row.exchange == "all_to_all" and ("sorted" in row.reason) == (factor is None or CUT[cut][0] < 64)


@pytest.mark.sampled
@pytest.mark.parametrize("door", [ONE_DEVICE, TYPES, RINGMOE_JIT, PARTITIONER], ids=str)
def test_a_dropless_layer_has_tangents_and_is_mapped(door):
    """Rows that lie sorted: pushed forward, the layer gives what its gradient says; mapped over layers of weights, each one."""
    config, arrays = dataclasses.replace(CONFIG, capacity_factor=None), uneven_inputs()
    specs = {"x": P(None, "a"), "router_weight": P(), "w_in": P("a"), "w_out": P("a")}
    mesh = None if door is ONE_DEVICE else make_mesh((8,), door.axis_type)
    arrays = put(mesh, arrays, specs)
    fun = lambda arrays: layer(config, **arrays)[0]
    square = lambda arrays: jnp.sum(fun(arrays) ** 2)
    y, moved = door.jit(lambda arrays: jax.jvp(fun, (arrays,), (arrays,)))(arrays)
    grads = door.jit(jax.grad(square))(arrays)
    along = sum(jnp.vdot(np.asarray(grads[name]), np.asarray(arrays[name])) for name in arrays)
    np.testing.assert_allclose(2 * np.vdot(y, moved), along, rtol=1e-4)
    weights = {
        name: jnp.stack([np.asarray(arrays[name])] * 2) * jnp.array([1.0, 2.0])[:, None, None, None]
        for name in ("w_in", "w_out")
    }
    weights = put(mesh, weights, {name: P(None, "a") for name in weights})
    mapped = door.jit(lambda arrays, weights: jax.vmap(lambda w: fun(arrays | w))(weights))(arrays, weights)
    np.testing.assert_allclose(mapped[0], y, atol=1e-4 * np.abs(y).max())
    want = door.jit(lambda arrays: fun(arrays | {name: 2 * arrays[name] for name in weights}))(arrays)
    np.testing.assert_allclose(mapped[1], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("door", "place"), [
    (ONE_DEVICE, "one device"), (TYPES, "sequence"), (RINGMOE_JIT, "batch and sequence"),
    (PARTITIONER, "experts elsewhere"),
], ids=str)  # fmt: skip
def test_a_nan_token_changes_no_other_bit(door, place):
    arrays = uneven_inputs()
    # The token's own slot must not matter either: what the others would get without it is the layer with it masked.
    poisoned = dict(arrays, x=arrays["x"].copy())
    poisoned["x"][1, 0, 2] = np.nan  # the first of its group: a slot it took would be another's
    masked = np.ones((2, 64), bool)
    masked[1, 0] = False
    y, metrics = uneven_layer(place, door, poisoned)
    want, _ = uneven_layer(place, door, arrays)
    assert np.isnan(y[1, 0]).all() and metrics.nonfinite == 1
    same_group = np.zeros((2, 64), bool)
    same_group[1, :8] = True
    np.testing.assert_array_equal(y[~same_group], want[~same_group])
    with jax.enable_x64(True):  # the oracle's layer without the token: whoever gets its slots
        wide = double(arrays)
        selection = reference_moe.select(
            wide["x"] @ wide["router_weight"],
            top_k=CONFIG.top_k,
            capacity=CONFIG.capacity(8),
            group_size=8,
            token_mask=masked,
        )
        without = np.asarray(reference_moe.moe_ffn(**wide, selection=selection))
    others = same_group & masked
    assert_close(y[others], without[others], TOLERANCE[jnp.dtype(jnp.float32)][0])
    assert np.isfinite(y[masked]).all()


@pytest.mark.parametrize(
    ("door", "place"), [(TYPES, "sequence"), (RINGMOE_JIT, "batch and sequence"), (ONE_DEVICE, "one device")], ids=str
)
def test_a_nan_token_without_a_queue_changes_no_other_bit(door, place):
    """Dropless, slots never run out, so that bitwise equality holds for the token's own group too."""
    arrays = uneven_inputs()
    shape, tokens, experts = PLACES[place]
    mesh = make_mesh(shape, door.axis_type) if shape else None
    config = dataclasses.replace(CONFIG, capacity_factor=None)
    specs = {"x": tokens, "router_weight": P(), "w_in": P(experts), "w_out": P(experts)}
    fun = door.jit(lambda arrays: ringmoe.moe_ffn(**arrays, config=config)[0])
    want = np.asarray(fun(put(mesh, arrays, specs)))
    arrays["x"][0, 17] = np.nan
    got = np.asarray(fun(put(mesh, arrays, specs)))
    others = np.ones((2, 64), bool)
    others[0, 17] = False
    np.testing.assert_array_equal(got[others], want[others])
    assert np.isnan(got[0, 17]).all()


@pytest.mark.sampled
@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
def test_two_runs_are_bitwise_equal(door):
    case = Case(door=door, mesh=(2, 4), roles=("batch", "sequence experts"), group_size=8)
    first, second = run(case), run(case)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("door", [ONE_DEVICE, TYPES, PARTITIONER, RINGMOE_JIT, MANUAL, MANUAL_VMA], ids=str)
def test_combine_undoes_dispatch(door):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(2, 32, 4)).astype(np.float32),
        "logits": rng.normal(size=(2, 32, 4)).astype(np.float32),
    }
    config = ringmoe.RouterConfig(4, top_k=2, capacity_factor=None, group_size=4)

    def there_and_back(x, logits, axis_name=None):
        routing = ringmoe.route(logits, config)
        return ringmoe.combine(ringmoe.dispatch(x, routing), routing)

    mesh = None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)
    specs = {"x": P("a", "b"), "logits": P("a", "b")}
    scalar = lambda y, cotangent: jnp.sum(y * cotangent)
    y, grads = value_and_gradients(
        there_and_back, scalar, ("x", "logits"), door, mesh, arrays, specs, np.ones((2, 32, 4), np.float32), P("a", "b")
    )
    forward, gradient = TOLERANCE[jnp.dtype(jnp.float32)]
    assert_close(y, arrays["x"], forward)
    assert_close(grads["x"], np.ones((2, 32, 4)), gradient)
    assert_close(grads["logits"], np.zeros((2, 32, 4)), gradient)  # the weights sum to one, whatever the logits


@pytest.mark.sampled
@pytest.mark.parametrize("door", [ONE_DEVICE, TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
@pytest.mark.parametrize("expert_axis", [None, "b", "a"])
def test_dispatch_and_combine_around_a_users_own_experts(door, expert_axis):
    """The two halves with experts that scale by a number of their own, against the formula; forward and gradient."""
    rng = np.random.default_rng(1)
    arrays = {
        "x": rng.normal(size=(2, 32, 4)), "logits": rng.normal(size=(2, 32, 8)), "scale": rng.normal(size=(8,)),
    }  # fmt: skip
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    cotangent = rng.normal(size=(2, 32, 4)).astype(np.float32)
    config = ringmoe.RouterConfig(8, top_k=2, capacity_factor=0.75, group_size=8)

    def scaled(x, logits, scale):
        routing = ringmoe.route(logits, config)
        return ringmoe.combine(ringmoe.dispatch(x, routing) * scale[:, None, None], routing)

    mesh = None if door is ONE_DEVICE else make_mesh((2, 4), door.axis_type)
    specs = {"x": P("a", "b"), "logits": P("a", "b"), "scale": P(expert_axis if door is not TYPES else None)}
    scalar = lambda y, cotangent: jnp.sum(y * cotangent)
    y, grads = value_and_gradients(scaled, scalar, tuple(arrays), door, mesh, arrays, specs, cotangent)
    with jax.enable_x64(True):
        selection = reference_moe.select(arrays["logits"], top_k=2, capacity=config.capacity(8), group_size=8)
        assert (selection.slot < 0).any()

        def dense(x, logits, scale):
            weight = reference_moe.weights(logits, selection, renormalize=True) * (selection.slot >= 0)
            return jnp.einsum("btk,btk,btd->btd", weight, scale[selection.expert], x)

        want, want_grads = value_and_gradients(
            dense, scalar, tuple(arrays), ONE_DEVICE, None, double(arrays), {}, double(cotangent)
        )
    forward, gradient = TOLERANCE[jnp.dtype(jnp.float32)]
    assert_close(y, want, forward)
    for name, grad in grads.items():
        assert_close(grad, want_grads[name], gradient, name)


@pytest.mark.parametrize("door", [TYPES, PARTITIONER, RINGMOE_JIT], ids=str)
def test_rows_travel_by_all_to_all_and_weights_stay(door):
    case = Case(door=door)
    arrays, _ = case.arrays()
    del arrays["token_mask"]
    arrays = put(make_mesh(case.mesh, door.axis_type), arrays, case.specs)
    square = lambda arrays: jnp.sum(layer(case.config, **arrays)[0] ** 2)
    text = door.jit(jax.grad(square)).lower(arrays).compile().as_text()
    assert "all-to-all" in collectives(text)
    assert "all-gather" not in collectives(text)
