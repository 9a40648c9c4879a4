"""Bad input: a ValueError that says what was passed, what was expected and what to do; a costly way is said once."""

import ast
import dataclasses
import functools
import importlib
import pathlib
import sys
import warnings
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import errors, pallas
from ringmoe.masks import Chunks, Prefix, Window
from ringmoe.primitives import attention as attention_primitive
from ringmoe.primitives import doors
from tests.helpers import RINGMOE_JIT, TYPES, assert_close, make_mesh, put
from tests.test_router import BAD_FIELDS
from tests.test_router_variants import BAD_ARRAYS, LOGITS

CHECKED = (
    "attention", "circles", "decode", "moe", "dense", "router.config", "router.metrics", "router.route", "masks",
    "plan.attention", "compat", "pallas", "primitives.doors", "lowering.jit",
)  # fmt: skip

B, T, S, N, K, H = 2, 8, 8, 4, 2, 4
Q, KV = jnp.zeros((B, T, N, H)), jnp.zeros((B, S, K, H))
TABLE = jnp.zeros((B, 3), jnp.int32)


def attention(query=Q, key=KV, value=None, *args, **kwargs):
    return ringmoe.dot_product_attention(query, key, key if value is None else value, *args, **kwargs)


def attention_over(spec, key_spec=None, door=TYPES, query=None, key=None, mesh=(8,), **kwargs):
    mesh = make_mesh(mesh, door.axis_type)
    query, key = jnp.zeros((8, 16, 8, 4)) if query is None else query, jnp.zeros((8, 16, 8, 4)) if key is None else key
    query, key = put(mesh, (query, key), (spec, spec if key_spec is None else key_spec))
    return door.jit(lambda q, k: ringmoe.dot_product_attention(q, k, k, **kwargs))(query, key)


def decode_pages(**kwargs):
    pool = put(make_mesh((2,), TYPES.axis_type), (KV,), (P("a"),))[0]
    return jax.jit(functools.partial(ringmoe.decode_attention, page_indices=TABLE, **kwargs))(
        Q, pool, pool, TABLE[:, 0]
    )


def attention_manual(axis_name, **kwargs):
    mesh = make_mesh((8,), AxisType.Auto)
    local = lambda q: ringmoe.dot_product_attention(q, q, q, axis_name=axis_name, **kwargs)
    return jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))(jnp.zeros((1, 16, 2, 4)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclasses.dataclass
class Model:
    """A model that is trained in place, as flax nnx's are."""

    weight: Any = dataclasses.field(default_factory=lambda: jnp.zeros(2))

    def add(self, x):
        self.weight = self.weight + x
        return jnp.sum(x)


D, F, E = 4, 6, 8
CONFIG = ringmoe.RouterConfig(E, group_size=4)


def moe(
    x=(2, 8, D), router=(D, E), w_in=(E, D, F), w_out=(E, F, D), w_gate=None, dtype=jnp.float32, config=CONFIG, **kwargs
):
    make = lambda x, dtype=dtype: jnp.zeros(x, dtype) if isinstance(x, tuple) else x
    return ringmoe.moe_ffn(
        make(x), make(router, jnp.float32), make(w_in), make(w_out), w_gate=make(w_gate), config=config, **kwargs
    )


def moe_own(fn, weights=None):
    return moe(w_in=None, w_out=None, expert_fn=fn, expert_weights=weights)


SHARED = jnp.zeros((D, F)), jnp.zeros((F, D))


def moe_shared(w_in=(D, F), w_out=(F, D), w_gate=None, router=None, dtype=jnp.float32):
    arrays = (None if shape is None else jnp.zeros(shape, dtype) for shape in (w_in, w_out, w_gate, router))
    return moe(shared=ringmoe.SharedExpert(*arrays))


def moe_manual(experts=E, w_in=(1, D, F), w_out=(1, F, D), axis_name="a", group_size=2):
    mesh = make_mesh((8,), AxisType.Auto)
    config = ringmoe.RouterConfig(experts, group_size=group_size)
    local = lambda x: moe(x, router=(D, experts), w_in=w_in, w_out=w_out, config=config, axis_name=axis_name)[0]
    return jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))(jnp.zeros((1, 16, D)))


def moe_over(tokens, experts, num_experts=E, num_tokens=16, group_size=2, door=RINGMOE_JIT):
    mesh = make_mesh((8,), door.axis_type)
    config = ringmoe.RouterConfig(num_experts, group_size=group_size)
    shapes = (2, num_tokens, D), (D, num_experts), (num_experts, D, F), (num_experts, F, D)
    specs = P(None, tokens), P(), P(experts), P(experts)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    return door.jit(lambda *arrays: ringmoe.moe_ffn(*arrays, config=config)[0]).lower(*arrays)


def routing(shape=(2, 8, E)):
    return ringmoe.route(jnp.zeros(shape), CONFIG)


lengths = lambda *values: jnp.array(values, jnp.int32)
CASES = {
    "ring along no axis of the mesh": (
        lambda: ringmoe.ring_mesh(make_mesh((8,), AxisType.Auto), "seq"),
        r"axis='seq' is none of the mesh's \('a',\): name the one of the sequence",
    ),
    # attention: shapes and dtypes
    "query of 2 dims": (lambda: attention(Q[0, 0]), r"query.shape=\(4, 4\), expected \[\.\.\., T, N, H\]"),
    "query of 5 dims": (lambda: attention(Q[None]), r"key has shape .*, expected 5 dims like query's"),
    "other B": (lambda: attention(key=KV[:1]), r"key.shape=\(1, 8, 2, 4\), expected .*leading dims \[2\]"),
    "scale of an array": (lambda: attention(scale=jnp.ones(N)), r"scale has shape \(4,\), expected a scalar: multiply"),
    "traced scale of an array": (
        lambda: jax.jit(lambda scale: attention(scale=scale))(jnp.ones(N)),
        r"scale has shape \(4,\), expected a scalar: multiply the query with it, and pass scale=1",
    ),
    "other S of value": (
        lambda: attention(value=KV[:, :4]),
        r"value.shape=\(2, 4, 2, 4\), expected key's shape \(2, 8, 2, 4\)",
    ),
    "other H": (lambda: attention(key=KV[..., :2]), r"key.shape=\(2, 8, 2, 2\), expected .*H=4"),
    "other dtype": (
        lambda: attention(key=KV.astype(jnp.bfloat16)),
        "key has dtype bfloat16, expected query's float32, or float8 with key_scales: cast",
    ),
    "value's dtype": (
        lambda: attention(value=KV.astype(jnp.float16)),
        "value has dtype float16, expected query's float32, or float8 with value_scales: cast",
    ),
    "key without batch": (lambda: attention(key=KV[0]), r"key has shape \(8, 2, 4\), expected 4 dims like query"),
    "integers": (lambda: attention(Q.astype(int), KV.astype(int)), "query.dtype=.*int32.*, expected one of .*: cast"),
    "N not a multiple of K": (
        lambda: attention(key=jnp.zeros((B, S, 3, H))),
        "4 query heads and 3 key heads, expected .* multiple",
    ),
    "no key heads": (lambda: attention(key=KV[:, :, :0]), "4 query heads and 0 key heads"),
    "no keys": (lambda: attention(key=KV[:, :0]), "expected no dim of length 0"),
    # attention: the other arguments
    "bias of integers": (lambda: attention(bias=jnp.zeros((T, S), int)), "bias has dtype int32, expected a float"),
    "mask of floats": (
        lambda: attention(mask=jnp.zeros((T, S))),
        r"mask has dtype float32, expected bool.*mask.astype\(bool\)",
    ),
    "bias of 5 dims": (
        lambda: attention(bias=jnp.zeros((1, B, N, T, S))),
        "bias has shape .*, expected at most 4 dims",
    ),
    "mask of another S": (
        lambda: attention(mask=jnp.ones((T, 5), bool)),
        r"mask has shape .*5\), expected .* broadcasts to .*\(2, 4, 8, 8\)",
    ),
    "lengths of another B": (
        lambda: attention(query_seq_lengths=lengths(8)),
        r"query_seq_lengths has shape \(1,\) .*expected int32 \(2,\)",
    ),
    "lengths of floats": (
        lambda: attention(key_value_seq_lengths=jnp.ones(2)),
        "key_value_seq_lengths has .*float32, expected int32",
    ),
    "segments of another T": (
        lambda: attention(
            query_segment_ids=jnp.zeros((B, 3), jnp.int32), key_value_segment_ids=jnp.zeros((B, S), jnp.int32)
        ),
        r"query_segment_ids has shape \(2, 3\) .*expected int32 \(2, 8\)",
    ),
    "segments of another S": (
        lambda: attention(
            query_segment_ids=jnp.zeros((B, T), jnp.int32), key_value_segment_ids=jnp.zeros((B, 3), jnp.int32)
        ),
        r"key_value_segment_ids has shape \(2, 3\) .*expected int32 \(2, 8\)",
    ),
    "one of two segments": (
        lambda: attention(query_segment_ids=jnp.zeros((B, T), jnp.int32)),
        "one was given, expected both or neither",
    ),
    "negative window": (lambda: attention(local_window_size=(2, -1)), r"local_window_size=\(2, -1\), expected .*>= 0"),
    "unknown implementation": (
        lambda: attention(implementation="cuda"),
        "implementation='cuda', expected None .* or one of .*tpu.*xla",
    ),
    "unknown exchange": (lambda: attention(exchange="pieces"), "exchange='pieces', expected one of .*ring"),
    # attention: the mesh
    "axis outside a shard_map": (
        lambda: attention(axis_name="a"),
        "axis_name='a', expected axes of an enclosing jax.shard_map.*leave axis_name out",
    ),
    "unknown axis": (lambda: attention_manual("z"), r"axis_name='z', expected axes .* are \('a',\)"),
    "one unknown axis of two": (lambda: attention_manual(("a", "z")), r"axis_name=\('a', 'z'\), expected axes"),
    "mask of one device's keys": (
        lambda: attention_manual("a", mask=jnp.ones((2, 2), bool)),
        r"mask has shape .*, expected .* = \(1, 2, 2, 16\)",
    ),
    "a ring that shardings exclude": (
        lambda: attention_over(P(None, "a"), P(None, "b"), mesh=(2, 4), exchange="ring"),
        "exchange='ring' was asked for, but keys are sharded over .*use exchange='auto'",
    ),
    "an all-to-all of heads that devices don't divide": (
        lambda: attention_over(
            P(None, "a"), query=jnp.zeros((8, 16, 3, 4)), key=jnp.zeros((8, 16, 1, 4)), exchange="all_to_all"
        ),
        "exchange='all_to_all' was asked for, but 3 query and 1 key heads .* not cut evenly by any number of the 8 devices",
    ),
    "an all-to-all of queries sharded otherwise": (
        lambda: attention_over(P(None, "a"), P(None, "b"), mesh=(2, 4), exchange="all_to_all"),
        "exchange='all_to_all' was asked for, but keys are sharded over .*'b'.* but queries over .*'a'.*the same axes",
    ),
    "an all-to-all with a bias of rows": (
        lambda: attention_over(P(None, "a"), bias=jnp.zeros((16, 16)), exchange="all_to_all"),
        "exchange='all_to_all' was asked for, but a bias or a mask of queries by keys would have to follow its rows",
    ),
    "shares merged with a bias of rows": (
        lambda: attention_over(P(None, "a"), bias=jnp.zeros((16, 16)), exchange="merge"),
        "exchange='merge' was asked for, but a bias or a mask of queries by keys would have to be gathered",
    ),
    "shares merged of queries in between": (
        lambda: attention_over(P(None, ("a", "b")), P(None, "a"), mesh=(2, 4), exchange="merge"),
        "exchange='merge' was asked for, but .*those that both are sharded over must be the last ones of the queries'",
    ),
    "positions of another shape": (
        lambda: attention(query_positions=jnp.zeros((B, T + 1), jnp.int32)),
        r"query_positions has shape \(2, 9\) and dtype int32, expected int32 \(2, 8\)",
    ),
    "positions of floats": (
        lambda: attention(key_value_positions=jnp.zeros((B, S))),
        r"key_value_positions has shape \(2, 8\) and dtype float32, expected int32",
    ),
    # attention: masks, caps, sinks, slopes, dropout
    "a mask_fn that isn't one": (
        lambda: attention(mask_fn=3),
        "mask_fn=3, expected a function of query and key positions",
    ),
    "a mask_fn of numbers": (
        lambda: attention(mask_fn=lambda q, k: q - k),
        r"mask_fn gave ShapeDtypeStruct\(shape=\(2, 3\), dtype=int32\) for positions .*, expected bool \[2, 3\]",
    ),
    "a mask_fn of another shape": (
        lambda: attention(mask_fn=lambda q, k: (q > k)[None]),
        r"mask_fn gave .*shape=\(1, 2, 3\).*, expected bool \[2, 3\]",
    ),
    "a mask_fn that closes over arrays": (
        lambda: attention(mask_fn=lambda q, k: q + lengths(1) >= k),
        "mask_fn closes over arrays, expected a function of the two positions alone: .* goes into query_positions",
    ),
    "a window of half a key": (lambda: Window(0.5, 1), r"Window\(left=0.5, right=1\), expected how many keys .* >= 0"),
    "a negative prefix": (lambda: Prefix(-1), r"Prefix\(length=-1\), expected a number of keys, >= 0"),
    "chunks of nothing": (lambda: Chunks(0), r"Chunks\(length=0\), expected the length of a chunk, > 0"),
    "a soft cap of 0": (lambda: attention(logits_soft_cap=0.0), "logits_soft_cap=0.0, expected None or a number > 0"),
    "a traced soft cap": (
        lambda: jax.jit(lambda cap: attention(logits_soft_cap=cap))(2.0),
        "logits_soft_cap=.*, expected None or a number > 0, known while tracing",
    ),
    "sinks of key heads": (
        lambda: attention(sinks=jnp.zeros(K)),
        r"sinks has shape \(2,\) and dtype float32, expected floats \(4,\), one for each query head",
    ),
    "keys in float8 without scales": (
        lambda: attention(key=KV.astype(jnp.float8_e4m3fn), value=KV),
        "key has dtype float8_e4m3fn and no key_scales, expected them: pass ones, if need be",
    ),
    "scales without float8": (
        lambda: attention(value_scales=jnp.ones(K)),
        "value_scales with value of dtype float32, expected float8: leave the scales out",
    ),
    "scales of query heads": (
        lambda: attention(key=KV.astype(jnp.float8_e5m2), value=KV, key_scales=jnp.ones(N)),
        r"key_scales has shape \(4,\) and dtype float32, expected floats that broadcast to \(2, 8, 2\)",
    ),
    "slopes of integers": (
        lambda: attention(alibi_slopes=jnp.zeros(N, int)),
        r"alibi_slopes has shape \(4,\) and dtype int32, expected floats \(4,\)",
    ),
    "dropout of everything": (
        lambda: attention(dropout_rate=1.0, dropout_key=jax.random.key(0)),
        "dropout_rate=1.0, expected a number, 0 <= rate < 1, known while tracing",
    ),
    "dropout without a key": (
        lambda: attention(dropout_rate=0.1),
        "dropout_rate=0.1 without a dropout_key, expected a jax.random.key, another for each step",
    ),
    "values of no width": (
        lambda: attention(value=KV[..., :0]),
        r"value.shape=\(2, 8, 2, 0\), expected no dim of length 0",
    ),
    # a cache
    "decoding without a batch": (
        lambda: ringmoe.decode_attention(Q[0], KV[0], KV[0], jnp.zeros((), jnp.int32)),
        r"query.shape=\(8, 4, 4\), expected \[B, T, N, H\]",
    ),
    "lengths of a cache, not one a sequence": (
        lambda: ringmoe.decode_attention(Q, KV, KV, jnp.int32(3)),
        r"lengths has shape \(\) and dtype int32, expected int32 \(2,\), one for each sequence",
    ),
    "a window of a cache that is negative": (
        lambda: ringmoe.decode_attention(Q, KV, KV, jnp.zeros(B, jnp.int32), local_window_size=-1),
        "local_window_size=-1, expected how many tokens before it",
    ),
    "a ring of a cache inside a shard_map": (
        lambda: ringmoe.decode_attention(Q, KV, KV, jnp.zeros(B, jnp.int32), axis_name="a", exchange="ring"),
        "exchange='ring' with axis_name='a', expected 'merge' or 'all_gather': devices have queries whole there",
    ),
    "a cache without a batch": (
        lambda: ringmoe.update_cache(KV[0], KV[0], jnp.zeros((), jnp.int32)),
        r"cache.shape=\(8, 2, 4\), expected \[B, S, K, H\]",
    ),
    "new tokens of other heads": (
        lambda: ringmoe.update_cache(KV, Q, jnp.zeros(B, jnp.int32)),
        r"new.shape=\(2, 8, 4, 4\), expected \[B, T, K, H\] with the dims of the cache's \(2, 8, 2, 4\)",
    ),
    "new tokens of another dtype": (
        lambda: ringmoe.update_cache(KV, KV.astype(jnp.bfloat16), jnp.zeros(B, jnp.int32)),
        r"new.dtype=dtype\(bfloat16\), expected the cache's float32: cast one of them",
    ),
    "places of new tokens as floats": (
        lambda: ringmoe.update_cache(KV, KV, jnp.zeros(B)),
        "first has shape .* and dtype float32, expected int32",
    ),
    "a pool without a dim of pages": (
        lambda: ringmoe.decode_attention(Q, KV[0], KV[0], jnp.zeros(B, jnp.int32), page_indices=TABLE),
        r"key has shape \(8, 2, 4\), expected a pool \[num_pages, page_size, K, H\]",
    ),
    "a pool of another head dim": (
        lambda: ringmoe.decode_attention(Q, KV[..., :2], KV[..., :2], jnp.zeros(B, jnp.int32), page_indices=TABLE),
        r"key.shape=\(2, 8, 2, 2\), expected a pool \[num_pages, page_size, K, H\] with H=4",
    ),
    "pages of one sequence": (
        lambda: ringmoe.decode_attention(Q, KV, KV, jnp.zeros(B, jnp.int32), page_indices=TABLE[0]),
        r"page_indices has shape \(3,\) and dtype int32, expected int32 \[B, M\] with B of \(2,\), M > 0",
    ),
    "a ring of pages": (
        lambda: decode_pages(exchange="ring"),
        "exchange='ring' was asked for, but pages stay where they are: use 'merge', or use exchange='auto'",
    ),
    "a pool of caches": (
        lambda: ringmoe.update_cache(KV[None], KV, jnp.zeros(B, jnp.int32), page_indices=TABLE),
        r"cache.shape=\(1, 2, 8, 2, 4\) with page_indices, expected a pool \[num_pages, page_size, K, H\]",
    ),
    "export under plain jit with Auto axes": (
        lambda: jax.export.export(jax.jit(attention))(
            *put(make_mesh((8,), AxisType.Auto), (Q, KV), (P(None, "a"),) * 2)
        ),
        "attention: .* Auto mesh axes under plain jax.jit, which can't be exported .* compile with ringmoe.jit",
    ),
    "a trained model that is not returned": (
        lambda: ringmoe.jit(lambda model, x: model.add(x))(Model(), jnp.ones(2)),
        r"changes .*weight.* of its arguments in place and doesn't return it.* nnx.split",
    ),
    # experts
    "k > E": (
        lambda: ringmoe.RouterConfig(4, top_k=5),
        "top_k=5 with num_experts=4, expected 1 <= top_k <= num_experts",
    ),
    "k < 1": (lambda: ringmoe.RouterConfig(4, top_k=0), "top_k=0 .*expected 1 <= top_k"),
    "no experts": (lambda: ringmoe.RouterConfig(0), "num_experts=0, expected at least 1"),
    "capacity factor 0": (
        lambda: ringmoe.RouterConfig(4, capacity_factor=0),
        "capacity_factor=0, expected .* > 0 or None: pass None",
    ),
    "capacity factor < 0": (lambda: ringmoe.RouterConfig(4, capacity_factor=-1.5), "capacity_factor=-1.5, expected"),
    "capacity factor nan": (
        lambda: ringmoe.RouterConfig(4, capacity_factor=float("nan")),
        "capacity_factor=nan, expected a finite",
    ),
    "group of 0": (lambda: ringmoe.RouterConfig(4, group_size=0), "group_size=0, expected at least 1 or None"),
    "T not a multiple of the group": (
        lambda: moe((2, 6, D)),
        "6 tokens .* group_size=4, expected a multiple of it: pad",
    ),
    "integer logits": (
        lambda: ringmoe.route(jnp.zeros((8, E), int), CONFIG),
        "logits of dtype int32, expected a floating",
    ),
    "logits of another E": (
        lambda: ringmoe.route(jnp.zeros((8, 3)), CONFIG),
        r"logits of shape \(8, 3\) with num_experts=8",
    ),
    "mask of another T": (
        lambda: moe(token_mask=jnp.ones((2, 3), bool)),
        r"token_mask bool\(2, 3\), expected bool\(2, 8\)",
    ),
    "mask of numbers": (lambda: moe(token_mask=jnp.ones((2, 8))), r"token_mask float32\(2, 8\), expected bool"),
    "x of integers": (lambda: moe(dtype=jnp.int32), "x has shape .* and dtype int32, expected floating"),
    "x of one dim": (lambda: moe((D,)), r"x has shape \(4,\) .*expected floating \[..., T, D\]"),
    "no tokens": (lambda: moe((2, 0, D)), r"x.shape=\(2, 0, 4\), expected no dim of length 0"),
    "router of another E": (lambda: moe(router=(D, 4)), r"router_weight.shape=\(4, 4\), expected \[D, E\] = \(4, 8\)"),
    "router of another D": (lambda: moe(router=(5, E)), r"router_weight.shape=\(5, 8\), expected"),
    "w_in of another E": (
        lambda: moe(w_in=(4, D, F)),
        r"w_in has shape \(4, 4, 6\), expected \(8, 4, 6\).*E=8 experts",
    ),
    "w_gate of another F": (lambda: moe(w_gate=(E, D, 5)), r"w_gate has shape \(8, 4, 5\), expected \(8, 4, 6\)"),
    "w_out the wrong way round": (lambda: moe(w_out=(E, D, F)), r"w_out has shape \(8, 4, 6\), expected \(8, 6, 4\)"),
    "w_in without dims": (lambda: moe(w_in=()), r"w_in has shape \(\), expected"),
    "weights of another dtype": (
        lambda: moe(w_in=jnp.zeros((E, D, F), jnp.bfloat16)),
        "w_in has dtype bfloat16, expected x's float32: cast",
    ),
    "b_in of another F": (
        lambda: moe(b_in=jnp.zeros((E, 5))),
        r"b_in has shape \(8, 5\), expected \(8, 6\).*F=6 of w_in",
    ),
    "b_out of one expert": (
        lambda: moe(b_out=jnp.zeros(D)),
        r"b_out has shape \(4,\), expected \(8, 4\).*b_out \[E, D\]",
    ),
    "a bias of another dtype": (
        lambda: moe(b_in=jnp.zeros((E, F), jnp.bfloat16)),
        "b_in has dtype bfloat16, expected x's float32: cast",
    ),
    "float8 without scales": (
        lambda: moe(w_in=jnp.zeros((E, D, F), jnp.float8_e4m3fn)),
        "w_in has dtype float8_e4m3fn and no scale, expected s_in: pass it",
    ),
    "scales of no matrix": (
        lambda: moe(s_gate=jnp.zeros((E, F))),
        "s_gate has dtype float32, w_gate is None, expected floating scales of a w_gate",
    ),
    "scales of integers": (
        lambda: moe(s_out=jnp.zeros((E, D), int)),
        "s_out has dtype int32, .*expected floating scales",
    ),
    "a scale of another F": (
        lambda: moe(s_in=jnp.zeros((E, 5))),
        r"s_in has shape \(8, 5\), expected \(8, 6\).*s_ as b_",
    ),
    "b_gate without w_gate": (
        lambda: moe(b_gate=jnp.zeros((E, F))),
        "b_gate without w_gate, expected both: .*pass w_gate, or leave b_gate out",
    ),
    "unknown activation": (
        lambda: moe(activation="swish"),
        "activation='swish', expected None or one of .*silu.*relu2.*clamped_silu",
    ),
    "an activation that needs a gate": (
        lambda: moe(activation="clamped_silu"),
        "activation='clamped_silu' without w_gate, expected a gate .*pass w_gate, or another",
    ),
    "a shared expert of another D": (
        lambda: moe_shared(w_in=(5, F)),
        r"shared.w_in is float32\(5, 6\), expected float32\(4, 6\)",
    ),
    "a shared expert without dims": (
        lambda: moe_shared(w_in=()),
        r"shared.w_in is float32\(\), expected float32\(4, 0\)",
    ),
    "a shared w_out the wrong way round": (
        lambda: moe_shared(w_out=(D, F)),
        r"shared.w_out is float32\(4, 6\), expected float32\(6, 4\) .*S=6 of shared.w_in",
    ),
    "a shared gate of another S": (lambda: moe_shared(w_gate=(D, 5)), r"shared.w_gate is float32\(4, 5\), expected"),
    "a shared expert of another dtype": (
        lambda: moe_shared(dtype=jnp.bfloat16),
        r"shared.w_in is bfloat16\(4, 6\), expected float32",
    ),
    "a shared router of all experts": (
        lambda: moe_shared(router=(D, E)),
        r"shared.router is float32\(4, 8\), expected floating \[D\] or \[D, 1\] with D=4",
    ),
    "a shared expert that needs a gate": (
        lambda: moe(w_gate=(E, D, F), activation="clamped_silu", shared=ringmoe.SharedExpert(*SHARED)),
        r"activation='clamped_silu' with shared.w_gate=None, expected a gate \[D, S\]",
    ),
    "no experts' arrays": (
        lambda: moe(w_in=None),
        r"\['w_out'\] of the experts' arrays .*at least w_in and w_out, or expert_fn",
    ),
    "two kinds of experts": (
        lambda: moe(expert_fn=lambda rows, _: rows),
        r"expert_fn and \['w_in', 'w_out'\] were given, expected one or the other",
    ),
    "arrays of no function": (
        lambda: moe(expert_weights=jnp.zeros(E)),
        "expert_weights without expert_fn, expected both",
    ),
    "own experts of another E": (
        lambda: moe_own(lambda rows, _: rows, {"scale": jnp.zeros(4)}),
        r"expert_weights has an array of shape \(4,\), expected \[E, \.\.\.\] with E=8",
    ),
    "own experts' scalar": (
        lambda: moe_own(lambda rows, _: rows, 1.0),
        r"expert_weights has an array of shape \(\), expected",
    ),
    "own experts' shared one of an unknown activation": (
        lambda: moe(w_in=None, w_out=None, expert_fn=lambda rows, _: rows, activation="swish", shared=SHARED),
        "activation='swish', expected None or one of",
    ),
    "own experts that lose rows": (
        lambda: moe_own(lambda rows, _: rows[:, 0]),
        r"expert_fn makes .*shape=\(8, 4\).* of rows float32\(8, 1, 4\), expected floating rows of the same shape",
    ),
    "own experts that give a tuple": (
        lambda: moe_own(lambda rows, _: (rows, rows)),
        "expert_fn makes .* of rows float32",
    ),
    "unknown exchange of rows": (lambda: moe(exchange="ring"), "exchange='ring', expected one of .*all_to_all.*pieces"),
    "unknown expert implementation": (lambda: moe(implementation="tpu"), "implementation='tpu', expected None .*xla"),
    "expert axis outside a shard_map": (lambda: moe(axis_name="a"), "axis_name='a', expected axes of an enclosing"),
    "E not divisible by axis_name": (
        lambda: moe_manual(12),
        r"num_experts=12 over axis_name=\('a',\) of 8 devices, expected a multiple",
    ),
    "all experts where one device's were due": (
        lambda: moe_manual(w_in=(E, D, F)),
        r"w_in has shape \(8, 4, 6\), expected \(1, 4, 6\).*E=1 experts, inside a shard_map one device's",
    ),
    "x of other tokens than routed": (
        lambda: ringmoe.dispatch(jnp.zeros((2, 4, D)), routing()),
        r"x.shape=\(2, 4, 4\) with a routing of tokens \(2, 8\), expected",
    ),
    "rows of other slots": (
        lambda: ringmoe.combine(jnp.zeros((E, 3, D)), routing()),
        r"expert_out has shape \(8, 3, 4\), expected \[E, C, D\]",
    ),
    "rows of another E": (lambda: ringmoe.combine(jnp.zeros((2, 8, D)), routing()), "expert_out has shape"),
    "rows of 2 dims": (lambda: ringmoe.combine(jnp.zeros((E, 8)), routing()), "expert_out has shape"),
}


# The router's own, which its tests match with their messages.
ROUTER = [lambda fields=fields: ringmoe.RouterConfig(**fields) for fields, _ in BAD_FIELDS]
ROUTER += [lambda c=config, arrays=arrays: ringmoe.route(LOGITS, c, **arrays) for config, arrays, _ in BAD_ARRAYS]
CASES |= {
    "a preset of no name": (lambda: ringmoe.RouterConfig.preset("mixtrel"), "no preset 'mixtrel', expected one of"),
    "parts that don't divide T": (
        lambda: ringmoe.drops_by_part(ringmoe.route(jnp.zeros((8, 4)), ringmoe.RouterConfig(4)), 3),
        "parts=3 of 8 tokens, expected a divisor",
    ),
    "router_bias of another length": (lambda: moe(router_bias=jnp.zeros(3)), r"router_bias of shape \(3,\)"),
    "noise_weight of another shape": (lambda: moe(noise_weight=jnp.zeros((D, 3))), "noise_weight of shape"),
    "jitter without a key": (
        lambda: moe(config=ringmoe.RouterConfig(E, noise="jitter"), train=True),
        "key=None with noise='jitter', train=True",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def modules():
    for name in CHECKED:
        yield importlib.import_module(f"ringmoe.{name}")


def test_every_check_has_a_case(monkeypatch):
    """Runs all cases and compares the checks that fired with those in the source."""
    fired = set()

    def record(condition, message):
        if not condition:
            frame = sys._getframe(1)
            fired.add((frame.f_globals["__name__"], frame.f_lineno))
            raise ValueError(message)

    written = set()
    for module in modules():
        monkeypatch.setattr(module, "check", record)
        for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
                written.add((module.__name__, node.lineno, node.end_lineno))
    for call in (*(call for call, _ in CASES.values()), *ROUTER):
        with pytest.raises(ValueError):
            call()
    hit = {where for where in written for name, line in fired if name == where[0] and where[1] <= line <= where[2]}
    missing = sorted(written - hit)
    assert not missing, missing


# What can't be written by a caller with arrays of ours: JAX itself refuses, with a ValueError too.
def test_an_uneven_array_is_refused_before_it_reaches_an_op():
    with pytest.raises(ValueError, match=r"(?s)divi"):
        attention_over(P(None, "a"), query=jnp.zeros((1, 36, 2, 4)), key=jnp.zeros((1, 36, 2, 4)))
    with pytest.raises(ValueError, match=r"(?s)divi"):
        moe_over(None, "a", num_experts=12).compile()


class TestPick:
    def refuse(self, kernel):
        raise NotImplementedError(f"{kernel.__name__} lacks something")

    def test_no_kernel_takes_the_call(self):
        with pytest.raises(ExceptionGroup, match="no kernel of attention takes this call on tpu") as info:
            pallas.pick("attention", "tpu", None, self.refuse)
        reasons = [str(e) for e in info.value.exceptions]
        assert len(reasons) == 2 and "attention_tpu lacks" in reasons[0] and "attention_xla lacks" in reasons[1]

    def test_an_implementation_that_was_asked_for_is_the_only_one_tried(self):
        with pytest.raises(ExceptionGroup) as info:
            pallas.pick("attention", "tpu", "tpu", self.refuse)
        assert len(info.value.exceptions) == 1

    def test_the_callers_view_of_it(self):
        with pytest.raises(ExceptionGroup, match="no kernel of attention") as info:
            attention(jnp.zeros((B, T, N, 640)), jnp.zeros((B, S, K, 640)), implementation="tpu")
        assert "head dims 640 and 640, supported: up to 576" in str(info.value.exceptions[0])

    def test_falling_back_is_said_once(self, fresh_warnings):
        def only_xla(kernel):
            if kernel is not pallas.KERNELS["attention"]["xla"]:
                self.refuse(kernel)

        with pytest.warns(
            errors.CostWarning, match=r"(?s)attention on tpu: the xla kernel runs .*attention_tpu lacks something"
        ):
            assert pallas.pick("attention", "tpu", None, only_xla) is pallas.KERNELS["attention"]["xla"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pallas.pick("attention", "tpu", None, only_xla)

    def test_each_platform_prefers_its_own(self):
        accept = lambda kernel: None
        assert pallas.pick("attention", "tpu", None, accept) is pallas.KERNELS["attention"]["tpu"]
        assert pallas.pick("attention", "cpu", None, accept) is pallas.KERNELS["attention"]["xla"]
        assert pallas.pick("experts", "tpu", None, accept) is pallas.KERNELS["experts"]["xla"]


@pytest.fixture
def fresh_warnings():
    errors.forget_warnings()
    yield
    errors.forget_warnings()


def test_a_warning_is_given_once_by_name(fresh_warnings):
    with pytest.warns(errors.CostWarning, match="^slow: because$"):
        errors.warn_once("slow", "because")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors.warn_once("slow", "because")
    with pytest.warns(errors.CostWarning, match="other"):
        errors.warn_once("other", "because")


def test_heads_that_no_split_fits_are_padded_or_gathered_and_said_so(fresh_warnings):
    """Three key heads over four devices: padded where the shardings are known, gathered under plain jax.jit."""
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    mesh = make_mesh((2, 4), AxisType.Auto)
    fun = lambda x: ringmoe.dot_product_attention(x[:, :, :6], x[:, :, 4:7], x[:, :, 4:7])
    placed, want = put(mesh, (x,), (P(None, None, "b"),)), fun(x)
    assert_close(ringmoe.jit(fun)(*placed), want, 1e-5)
    with pytest.warns(errors.CostWarning, match="gathered: 4 devices on .* don't divide the 3 key heads"):
        got = jax.jit(fun)(*placed)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(("door", "groups", "size"), [(TYPES, 4, 4), (RINGMOE_JIT, 3, 8)], ids=str)
def test_groups_that_the_devices_cannot_share_are_padded_and_said_so(door, groups, size, fresh_warnings):
    config, rng = ringmoe.RouterConfig(E, group_size=size), np.random.default_rng(0)
    arrays = tuple(rng.normal(size=(1, size * groups, n)).astype(np.float32) for n in (D, E))

    def fun(x, logits):
        routing = ringmoe.route(logits, config)
        return ringmoe.combine(ringmoe.dispatch(x, routing), routing)

    placed = put(make_mesh((8,), door.axis_type), arrays, (P(None, "a"), P(None, "a")))
    with pytest.warns(
        errors.CostWarning, match=rf"groups padded: {groups} groups of {size} tokens over mesh axes \('a',\)"
    ):
        got = door.jit(fun)(*placed)
    assert_close(got, fun(*arrays), 1e-5)


def test_xla_may_ask_for_an_uneven_split_and_is_answered(fresh_warnings):
    """Plain jax.jit: what XLA's partitioner proposes is never the caller's mistake."""
    mesh = make_mesh((8,), AxisType.Auto)
    x = np.random.default_rng(0).normal(size=(1, 36, 2, 4)).astype(np.float32)

    def fun(x):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "a")))
        return ringmoe.dot_product_attention(x, x, x, is_causal=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.CostWarning)
        got = jax.jit(fun)(jax.device_put(x, NamedSharding(mesh, P())))
    assert_close(got, ringmoe.dot_product_attention(x, x, x, is_causal=True), 1e-5)


def test_the_fallback_on_tpu_gives_the_right_answer(fresh_warnings):
    """`_whole` is what plain jax.jit lowers on TPU with Auto axes: here it runs on CPU, over a sharded mesh."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 16, n, 4)).astype(np.float32) for n in (4, 2, 2)]
    spec = attention_primitive.AttentionSpec(0.5, ringmoe.attention.Band(right=0))
    names = ("query", "key", "value")
    params = {
        "operands": names, "results": attention_primitive.RESULTS, "sizes": (), "axis_name": (), "implementation": None,
        "spec": spec, "exchange": "auto", "placement": None, "mapped": 0,
    }  # fmt: skip
    op = attention_primitive.FORWARD

    def whole(*arrays):
        avals = [jax.typeof(x) for x in arrays]
        return doors._whole(op, op.rule(avals, params), avals, "cpu", params)(*arrays)

    placed = put(make_mesh((2, 4), AxisType.Auto), tuple(arrays), (P("a", "b"),) * 3)
    with pytest.warns(
        errors.CostWarning, match=r"attention gathered: .*compile with ringmoe.jit .*, or make the mesh axes Explicit"
    ):
        got, *_ = jax.jit(whole)(*placed)
    assert_close(got, ringmoe.dot_product_attention(*arrays, scale=0.5, is_causal=True), 1e-5)
