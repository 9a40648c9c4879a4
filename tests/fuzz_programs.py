"""What a fuzzer's case stands for: the jitted program around one op, ours, the plain one, or the oracle's."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import reference, reference_moe
from tests.fuzz_cases import Case, Operand
from tests.helpers import AXES, double

CARRY = {"attention": "query", "experts": "x"}


def partition_spec(spec) -> P:
    return P(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in spec))


def apply(step, x):
    """One step between an argument and its operand."""
    kind, *args = step
    if kind == "transpose":
        return jnp.transpose(x, args[0])
    dim, *args = args
    if kind == "slice":
        return jax.lax.slice_in_dim(x, args[0], x.shape[dim] - args[1], axis=dim)
    if kind == "pad":
        return jnp.pad(x, [(0, args[0] if i == dim else 0) for i in range(x.ndim)])
    if kind == "concatenate":
        return jnp.concatenate([x, jax.lax.slice_in_dim(x, 0, args[0], axis=dim)], dim)
    if kind == "join":
        return x.reshape(*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
    return x.reshape(*x.shape[:dim], *args, *x.shape[dim + 1 :])


def prepared(case: Case, mesh: Mesh | None, operand: Operand, x):
    for step in operand.steps:
        x = apply(step, x)
    if mesh is not None and operand.constraint is not None:
        move = jax.sharding.reshard if case.explicit else jax.lax.with_sharding_constraint
        x = move(x, NamedSharding(mesh, partition_spec(operand.constraint)))
    return x


# The ops: (options, operands, axis_name) -> results.


def our_attention(options, x, axis_name):
    options = dict(options)
    out = ringmoe.dot_product_attention(
        x["query"], x["key"], x["value"], x.get("bias"), x.get("mask"), axis_name=axis_name or None,
        query_seq_lengths=x.get("query_lengths"), key_value_seq_lengths=x.get("key_lengths"),
        query_segment_ids=x.get("query_segments"), key_value_segment_ids=x.get("key_segments"), **options,
    )  # fmt: skip
    return dict(zip(("output", "lse"), out)) if options["return_residual"] else {"output": out}


def plain_attention(options, x, axis_name):
    """`jax.nn`; inside a shard_map with keys and values gathered, as a user without a ring would."""
    options = {name: value for name, value in options if name != "exchange"}
    key, value = x["key"], x["value"]
    if axis_name:
        key, value = (jax.lax.all_gather(a, axis_name, axis=1, tiled=True) for a in (key, value))
    mask = x.get("mask")
    if "query_segments" in x:
        segments = x["query_segments"][:, None, :, None] == x["key_segments"][:, None, None, :]
        mask = segments if mask is None else mask & segments
    out = jax.nn.dot_product_attention(
        x["query"], key, value, x.get("bias"), mask, query_seq_lengths=x.get("query_lengths"),
        key_value_seq_lengths=x.get("key_lengths"), **options,
    )  # fmt: skip
    return dict(zip(("output", "lse"), out)) if options["return_residual"] else {"output": out}


def dense_attention(options, x, axis_name):
    names = {"query_lengths": "query_seq_lengths", "key_lengths": "key_value_seq_lengths"}
    names |= {"query_segments": "query_segment_ids", "key_segments": "key_value_segment_ids"}
    options = dict(options)
    with_lse = options.pop("return_residual")
    del options["exchange"]
    out, lse = reference.dot_product_attention(**{names.get(n, n): a for n, a in x.items()}, **options)
    return {"output": out, "lse": lse} if with_lse else {"output": out}


def our_experts(options, x, axis_name):
    config, call = router_config(x, options)
    y, metrics = ringmoe.moe_ffn(**x, **call, config=config, axis_name=axis_name or None)
    return {"y": y, "load balance loss": metrics.load_balance_loss, "z loss": metrics.z_loss}


def router_config(x, options) -> tuple[ringmoe.RouterConfig, dict]:
    """The router's, and what else a call of the layer takes."""
    options = dict(options)
    call = {"exchange": options.pop("exchange", "auto"), "activation": options.pop("activation", None)}
    return ringmoe.RouterConfig(x["router_weight"].shape[1], **options), call


def plain_experts(options, x, axis_name):
    """Every expert applied to every token by einsums: the layer without capacity."""
    tokens, mask = x["x"], x.get("token_mask")
    weights = {n: a for n, a in x.items() if n.startswith("w_")}
    if axis_name:
        weights = {n: jax.lax.all_gather(a, axis_name, axis=0, tiled=True) for n, a in weights.items()}
    logits = jnp.einsum("btd,de->bte", tokens, x["router_weight"]).astype(jnp.float32)
    scores = jax.nn.softmax(logits, -1)
    best, index = jax.lax.top_k(scores, dict(options)["top_k"])
    best = best / best.sum(-1, keepdims=True)
    gates = jnp.einsum("btk,btke->bte", best, jax.nn.one_hot(index, logits.shape[-1])).astype(tokens.dtype)
    hidden = jnp.einsum("btd,edf->btef", tokens, weights["w_in"])
    if "w_gate" in weights:
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", tokens, weights["w_gate"])) * hidden
    else:
        hidden = jax.nn.gelu(hidden)
    y = jnp.einsum("bte,btef,efd->btd", gates, hidden, weights["w_out"])
    y = y if mask is None else jnp.where(mask[..., None], y, 0)
    balance, z = jnp.mean(scores) ** 2, jnp.mean(jax.nn.logsumexp(logits, -1) ** 2)
    return {"y": y, "load balance loss": balance, "z loss": z}


def dense_experts(options, x, axis_name):
    config, call = router_config(x, options)
    x = dict(x)
    token_mask = x.pop("token_mask", None)
    logits = x["x"] @ x["router_weight"]
    *batch, num_tokens, num_experts = logits.shape
    group, k = config.group(*batch, num_tokens), config.top_k
    choose = functools.partial(
        reference_moe.select, top_k=k, capacity=config.capacity(group), group_size=group, token_mask=None
    )

    def select(logits, mask):
        return tuple(choose(logits, token_mask=None if token_mask is None else mask))

    integers = jax.ShapeDtypeStruct((*batch, num_tokens, k), jnp.int32)
    shapes = (integers, integers, jax.ShapeDtypeStruct((*batch, num_tokens), jnp.bool_))
    mask = jnp.ones((*batch, num_tokens), bool) if token_mask is None else token_mask
    # Choices are constants to derivatives; the oracle counts them in Python.
    selection = reference_moe.Selection(
        *jax.pure_callback(select, shapes, jax.lax.stop_gradient(logits), mask, vmap_method="sequential")
    )
    active = selection.active[..., None]
    kind = {"renormalize": config.renormalize, "activation": call["activation"]}
    y = jnp.where(active, reference_moe.moe_ffn(**x, selection=selection, **kind), 0)
    num_active = jnp.maximum(1, selection.active.sum())
    asked = jax.nn.one_hot(selection.expert, num_experts, dtype=logits.dtype) * active[..., None]
    share = asked.sum((0, 1, 2)) / (num_active * k)
    scores = jnp.where(active, jax.nn.softmax(logits, -1), 0).sum((0, 1)) / num_active
    z = jnp.sum(jnp.where(selection.active, jax.nn.logsumexp(logits, -1), 0) ** 2) / num_active
    return {"y": y, "load balance loss": num_experts * jnp.sum(share * scores), "z loss": z}


def nothing(options, x, axis_name):
    """No op at all: what stands around it."""
    name = next(name for name in CARRY.values() if name in x)
    first = x[name]
    for other in (other for n, other in x.items() if n != name):
        first = first * (1 + jnp.sum(other.astype(first.dtype) ** 2))
    return {"first": first}


OURS = {"attention": our_attention, "experts": our_experts}
PLAIN = {"attention": plain_attention, "experts": plain_experts}
DENSE = {"attention": dense_attention, "experts": dense_experts}
NOTHING = {"attention": nothing, "experts": nothing}


def kept(case: Case, results):
    """Inside a user's shard_map the losses are one device's: left out."""
    return {n: a for n, a in results.items() if not (case.manual and n.endswith("loss"))}


def call(case: Case, mesh: Mesh | None, op, x):
    """The op, inside the user's shard_map if there is one."""
    if mesh is None or not case.manual:
        return kept(case, op(case.options, x, ()))
    specs = {o.name: partition_spec(o.manual) for o in case.operands}
    rows = specs[CARRY[case.op]]
    names = {"attention": ("output", "lse"), "experts": ("y",)}[case.op]
    if op is nothing:
        names = ("first",)
    elif not dict(case.options).get("return_residual"):
        names = names[:1]
    out_specs = {n: P(*tuple(rows)[:3]) if n == "lse" else rows for n in names}
    local = lambda x: kept(case, op(case.options, x, case.axis_name))
    return jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=out_specs, axis_names=set(case.manual), check_vma=case.check_vma
    )(x)


def one_call(case: Case, mesh, op, arrays):
    return call(case, mesh, op, {o.name: prepared(case, mesh, o, arrays[o.name]) for o in case.operands})


def two_layers(case: Case, mesh, op, arrays):
    """A scan whose carry is the query, or x: mapped operands are one layer's slice."""
    carry = CARRY[case.op]
    operands = {o.name: o for o in case.operands}
    whole = {n: a for n, a in arrays.items() if n != carry and operands[n].mapped is None}
    layers = {n: a for n, a in arrays.items() if operands[n].mapped is not None}

    def body(x, layer):
        rest = {n: prepared(case, mesh, operands[n], a) for n, a in (whole | layer).items()}
        results = call(case, mesh, op, {carry: x, **rest})
        found = next(name for name in ("output", "y", "first") if name in results)
        following = results.pop(found)
        following = (x + following if case.op == "experts" else following).astype(x.dtype)
        if mesh is not None and case.explicit and not jax.typeof(x).sharding.mesh.empty:
            following = jax.sharding.reshard(following, jax.typeof(x).sharding)
        return following, results

    last, others = jax.lax.scan(body, prepared(case, mesh, operands[carry], arrays[carry]), layers)
    return {"last": last, **others}


def outputs(case: Case, mesh, op, arrays):
    if "scan" in case.transform:
        return two_layers(case, mesh, op, arrays)
    one = functools.partial(one_call, case, mesh, op)
    if "vmap" in case.transform:
        return jax.vmap(one, ({o.name: o.mapped for o in case.operands},))(arrays)
    return (jax.checkpoint(one) if "remat" in case.transform else one)(arrays)


def wave(shape, phase: float):
    """Fixed numbers of a shape: cotangents and tangents."""
    return np.cos(1.7 * np.arange(math.prod(shape)) + phase).reshape(shape)


def loss(results):
    """Every result counts, the LSE where it is finite."""
    total = 0
    for i, name in enumerate(sorted(results)):
        x = results[name]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        total += jnp.sum(jnp.where(jnp.isneginf(x), 0, x) * wave(x.shape, i).astype(x.dtype))
    return total


def transformed(case: Case, mesh, op, jit):
    """The program: (arrays, tangents) -> {name: array}."""
    named = lambda kind, tree: {f"{kind} {name}": a for name, a in tree.items()}

    def scalar(floats, rest):
        results = outputs(case, mesh, op, {o.name: floats.get(o.name, rest.get(o.name)) for o in case.operands})
        return loss(results), results

    def program(floats, rest, tangents):
        if case.transform == "jvp":
            results, moved = jax.jvp(lambda floats: scalar(floats, rest)[1], (floats,), (tangents,))
            return results | named("tangent of", moved)
        if case.transform == "hvp":
            grad = lambda floats: jax.grad(scalar, has_aux=True)(floats, rest)[0]
            product = lambda floats: sum(jnp.sum(g * tangents[n]) for n, g in grad(floats).items())
            return named("second derivative of", jax.grad(product)(floats))
        if case.transform == "hvp by jvp":
            grad = lambda floats: jax.grad(scalar, has_aux=True)(floats, rest)[0]
            grads, products = jax.jvp(grad, (floats,), (tangents,))
            return named("gradient of", grads) | named("second derivative of", products)
        if "grad" in case.transform:
            inner = jit(scalar) if case.transform == "grad outside" else scalar
            (_, results), grads = jax.value_and_grad(inner, has_aux=True)(floats, rest)
            return results | named("gradient of", grads)
        return scalar(floats, rest)[1]

    return program if case.transform == "grad outside" else jit(program)


def make_arrays(case: Case):
    """Numpy arguments of a case, and tangents of the floating ones."""
    rng = np.random.default_rng(case.seed)
    arrays, tangents = {}, {}
    for i, operand in enumerate(case.operands):
        name, shape = operand.name, operand.argument_shape
        if name.endswith("mask"):
            arrays[name] = rng.random(shape) < 0.7
        elif name.endswith("lengths"):
            longest = next(o.shape[1] for o in case.operands if f"{o.name}_lengths" == name)
            arrays[name] = rng.integers(0, longest + 1, shape).astype(np.int32)
        elif name.endswith("segments"):
            arrays[name] = rng.integers(0, 3, shape).astype(np.int32)
        else:
            scale = 0.5 if name.startswith("w_") else 1.0
            arrays[name] = (scale * rng.normal(size=shape)).astype(jnp.dtype(case.dtype))
            tangents[name] = wave(shape, i).astype(jnp.dtype(case.dtype))
    return arrays, tangents


def make_mesh(case: Case) -> Mesh | None:
    if not case.mesh:
        return None
    devices = np.array(jax.devices())[list(case.devices)].reshape(case.mesh)
    kind = AxisType.Explicit if case.explicit else AxisType.Auto
    return Mesh(devices, AXES[: len(case.mesh)], axis_types=(kind,) * len(case.mesh))


def run(case: Case, ops=OURS) -> dict[str, np.ndarray]:
    """The program with ours, or the plain op, on the case's mesh."""
    mesh = make_mesh(case)
    arrays, tangents = make_arrays(case)
    specs = {o.name: partition_spec(o.spec) for o in case.operands}
    place = lambda tree: {
        n: jnp.asarray(a) if mesh is None else jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in tree.items()
    }
    arrays, tangents = place(arrays), place(tangents)
    jit = ringmoe.jit if case.jit == "ringmoe.jit" else jax.jit
    program = transformed(case, mesh, ops[case.op], jit)
    with jax.set_mesh(mesh) if case.set_mesh and mesh is not None else contextlib.nullcontext():
        floats = {n: arrays[n] for n in tangents}
        rest = {n: a for n, a in arrays.items() if n not in tangents}
        return {n: np.asarray(a) for n, a in program(floats, rest, tangents).items()}


def oracle(case: Case) -> dict[str, np.ndarray]:
    """The same program with the dense op, on one device in float64."""
    arrays, tangents = make_arrays(case)
    transform = "grad" if case.transform == "grad outside" else case.transform
    program = transformed(dataclasses.replace(case, transform=transform), None, DENSE[case.op], jax.jit)
    with jax.enable_x64(True):
        arrays, tangents = double(arrays), double(tangents)
        rest = {n: a for n, a in arrays.items() if n not in tangents}
        return {n: np.asarray(a) for n, a in program({n: arrays[n] for n in tangents}, rest, tangents).items()}
