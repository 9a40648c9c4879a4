"""The examples: at most four lines changed, the ordinary program's numbers, rings and all-to-alls on TPU; and `explain`."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from bench import frameworks
from bench.frameworks import AUTO, AXES, EXPLICIT, NAMES, ORDINARY
from tests.helpers import TOLERANCE, make_mesh, tpu_mesh

GRADIENT = TOLERANCE[jnp.dtype(jnp.float32)][1]
WAYS = {"Auto": (AUTO, AxisType.Auto), "Explicit": (EXPLICIT, AxisType.Explicit)}
every_example = pytest.mark.parametrize("name", NAMES)
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def unoptimised():
    """Numbers are looked at, not speed: LLVM's dear passes are left out."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def ordinary(name):
    return frameworks.run(frameworks.program(name, ORDINARY), AxisType.Auto)


@every_example
def test_at_most_four_lines_differ(name):
    source = (frameworks.EXAMPLES / f"{name}.py").read_text()
    changes = frameworks.changes(source)
    assert 1 <= len(changes) <= 4
    marked = {number for start, end, *_ in changes for number in range(start, end + 1)}
    rest = [line for number, line in enumerate(source.splitlines()) if number not in marked]
    code = [line for line in rest[rest.index('"""', 1) :] if "ringmoe" in line]
    assert not code, "a line of RingMoE's isn't marked"


@pytest.mark.sampled
@every_example
@every_way
def test_the_ordinary_programs_numbers(name, way, unoptimised, capsys):
    """Loss, updated parameters and the optimiser's momentum, which after one step is the gradient."""
    keep, axis_type = WAYS[way]
    module = frameworks.program(name, keep)
    assert frameworks.error(frameworks.run(module, axis_type), ordinary(name)) < GRADIENT
    if axis_type is AxisType.Auto:  # the program as it stands; its step is compiled by now
        module.main()
        losses = [float(line) for line in capsys.readouterr().out.split()]
        assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


# With Explicit axes Haiku and plain functions are jax.jit's, as Linen is; NNX is below, under nnx.jit.
ON_TPU = [(name, "Auto") for name in NAMES] + [("flax_linen", "Explicit"), ("equinox_", "Explicit")]


def gathered_by_xla(text):
    """All-gathers that are not the exchange that an op chose."""
    return [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line) and "ringmoe." not in line]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "way"), ON_TPU)
def test_on_tpu(name, way):
    keep, axis_type = WAYS[way]
    text = frameworks.compiled_text(frameworks.program(name, keep), tpu_mesh("v5e:2x4", (2, 4), axis_type, AXES))
    found = frameworks.counts(text)
    assert found["all-to-all"] and found["kernels"], found
    assert not gathered_by_xla(text), "keys, values or weights are gathered"


def test_the_ordinary_program_gathers_keys_and_values_on_tpu():
    """What the test above would see."""
    module = frameworks.program("flax_linen", ORDINARY)
    text = frameworks.compiled_text(module, tpu_mesh("v5e:2x4", (2, 4), AxisType.Auto, AXES))
    found = frameworks.counts(text)
    assert gathered_by_xla(text) and not found["collective-permute"] and not found["kernels"]
    keys = re.findall(
        rf"\[2,{frameworks.TPU_LENGTH},2,128\]\S* all-gather", text
    )  # [B, T, N, H] of one row of the mesh
    assert len(keys) >= 2, found


# Flax NNX as most programs have it: nnx.jit, and a model that the step changes in place.


@nnx.jit
def nnx_step(model, opt, tokens, targets):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    opt.update(model, grads)
    return loss


def test_nnx_jit_and_a_model_changed_in_place(unoptimised):
    module = frameworks.program("flax_nnx", AUTO)

    def step(state, tokens, targets):
        model, opt = nnx.merge(*state)
        loss = nnx_step(model, opt, tokens, targets)
        return nnx.split((model, opt)), loss

    module.step = step
    assert frameworks.error(frameworks.run(module, AxisType.Explicit), ordinary("flax_nnx")) < GRADIENT


def test_nnx_jit_on_tpu_with_explicit_axes():
    mesh = tpu_mesh("v5e:2x4", (2, 4), AxisType.Explicit, AXES)
    model, opt, tokens = nnx_arguments(mesh)
    with frameworks.around(mesh):
        text = nnx_step.lower(model, opt, tokens, tokens).compile().as_text()
    found = frameworks.counts(text)
    assert found["all-to-all"] and found["kernels"], found
    assert not gathered_by_xla(text), "keys, values or weights are gathered"


# explain


def abstract(tree, shardings):
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(shape, tree, shardings)


def arguments(module, mesh):
    """State and tokens: shapes with shardings."""
    state = jax.eval_shape(lambda: module.init(jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, frameworks.TPU_LENGTH), jnp.int32, sharding=NamedSharding(mesh, P(*AXES)))
    return abstract(state, module.shardings(state, mesh)), tokens


def nnx_arguments(mesh):
    state, tokens = arguments(frameworks.program("flax_nnx", AUTO), mesh)
    return *nnx.merge(*state), tokens


def told(explanation):
    return [(row.op, row.exchange, row.axes, row.door) for row in explanation.rows]


def expected(door):
    found = [("attention", "ring"), ("experts", "all_to_all"), ("experts_backward", "all_to_all")]
    found += [("attention_backward", "ring")]
    if door == "partitioner":
        return [(op, door, (), door) for op, _ in found]
    return [(op, exchange, ("seq",), door) for op, exchange in found]


@pytest.mark.parametrize(("types", "door"), [(AxisType.Auto, "partitioner"), (AxisType.Explicit, "types")])
def test_explain_takes_what_nnx_jit_returns(types, door):
    mesh = make_mesh((2, 4), types, AXES)
    model, opt, tokens = nnx_arguments(mesh)
    before = jax.tree.leaves((model, opt))
    with frameworks.around(mesh):
        assert told(ringmoe.explain(nnx_step, model, opt, tokens, tokens)) == expected(door)
        bound = functools.partial(nnx_step, model, targets=tokens)
        assert told(ringmoe.explain(bound, opt, tokens=tokens)) == expected(door)
    assert jax.tree.leaves((model, opt)) == before, "explain changed the model"


def test_explain_takes_a_plain_step_that_changes_an_nnx_model_in_place():
    """Its backward pass is no dead code, though the step returns the loss alone; and a model is a function too."""
    model, opt, tokens = nnx_arguments(make_mesh((2, 4), AxisType.Auto, AXES))
    assert told(ringmoe.explain(nnx_step.fun, model, opt, tokens, tokens)) == expected("ringmoe.jit")
    assert told(ringmoe.explain(model, tokens)) == expected("ringmoe.jit")[:2]


class Scored(eqx.Module):
    """A model with leaves that are no arrays."""

    model: eqx.Module
    activation: object
    scale: int

    def __call__(self, tokens):
        return jnp.mean(self.activation(self.model(tokens))) * self.scale


@pytest.mark.parametrize(("types", "door"), [(AxisType.Auto, "partitioner"), (AxisType.Explicit, "types")])
def test_explain_takes_what_filter_jit_returns(types, door):
    mesh = make_mesh((2, 4), types, AXES)
    state, tokens = arguments(module := frameworks.program("equinox_", EXPLICIT), mesh)
    scored = Scored(state[0], jax.nn.relu, 3)
    gradient = eqx.filter_value_and_grad(lambda model, tokens: jnp.mean(jax.vmap(model)(tokens)))
    with frameworks.around(mesh):
        assert told(ringmoe.explain(module.step, state, tokens, tokens)) == expected(door)
        assert told(ringmoe.explain(eqx.filter_jit(gradient), scored, tokens)) == expected(door)
        plain = ringmoe.explain(gradient, scored, tokens=tokens)
        assert told(plain) == expected("types" if types is AxisType.Explicit else "ringmoe.jit")


def test_explain_sees_the_arrays_that_a_jitted_equinox_model_holds():
    """`eqx.filter_jit(model)` holds the model's arrays itself: with their shardings they are arguments, too."""
    mesh = make_mesh((8,), AxisType.Auto, ("seq",))

    class Keys(eqx.Module):
        key: jax.Array
        causal: bool

        def __call__(self, query):
            keys = self.key, self.key
            return ringmoe.dot_product_attention(query, *keys, is_causal=self.causal, exchange="ring")

    placed = jax.device_put(np.zeros((1, 16, 2, 4), np.float32), NamedSharding(mesh, P(None, "seq")))
    assert told(ringmoe.explain(Keys(placed, True), np.zeros((1, 16, 2, 4), np.float32))) == [
        ("attention", "ring", ("seq",), "ringmoe.jit")
    ]
    assert told(ringmoe.explain(eqx.filter_jit(Keys(placed, True)), placed)) == [
        ("attention", "partitioner", (), "partitioner")
    ]
