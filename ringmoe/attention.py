"""Public attention ops: docstring, checks, one bind each."""

import math
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from ringmoe import compat, dropout, pallas
from ringmoe.errors import check
from ringmoe.interface import AttentionSpec, Extras, is_float8
from ringmoe.masks import Band, Mask
from ringmoe.plan.attention import EXCHANGES
from ringmoe.primitives.attention import Call, attention
from ringmoe.rules import MANUAL

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


class Options(TypedDict, total=False):
    """The keyword arguments of `dot_product_attention` but the one that decides what it returns, for the overloads."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    implementation: Literal["tpu", "gpu", "xla"] | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    query_positions: ArrayLike | None
    key_value_positions: ArrayLike | None
    mask_fn: Callable[[jax.Array, jax.Array], jax.Array] | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    alibi_slopes: ArrayLike | None
    key_scales: ArrayLike | None
    value_scales: ArrayLike | None
    dropout_rate: float
    dropout_key: jax.Array | None
    axis_name: str | tuple[str, ...] | None
    exchange: Literal["auto", "ring", "all_gather", "all_to_all", "merge"]


# fmt: off
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: ArrayLike | None = None, *,
    return_residual: Literal[False] = False, **options: Unpack[Options],
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: ArrayLike | None = None, *,
    return_residual: Literal[True], **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: ArrayLike | None = None, *,
    return_residual: bool, **options: Unpack[Options],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
# fmt: on


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["tpu", "gpu", "xla"] | None = None,
    return_residual: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    key_value_positions: ArrayLike | None = None,
    mask_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    key_scales: ArrayLike | None = None,
    value_scales: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    exchange: Literal["auto", "ring", "all_gather", "all_to_all", "merge"] = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention whose sequence may be sharded: a drop-in for `jax.nn.dot_product_attention`.

        O = dropout(softmax(cap(scale Q K^T + bias), sinks)) V,    cap(x) = logits_soft_cap tanh(x / logits_soft_cap)

    Every argument that `jax.nn` has means what it means there. Where we differ, it is on purpose:

    ======================  ==========================================  ==================================
    what                    here                                        `jax.nn`
    ======================  ==========================================  ==================================
    a query without keys    zeros, LSE -inf; its gradients are 0        the mean of V
    the residual (LSE)      fp32 (fp64 for fp64), differentiable        the query's dtype, no gradient
    leading dims            any number of batch dims                    one or none
    a mask of floats        refused, with the cast to write             refused
    ======================  ==========================================  ==================================

    Letters: B batch (any number of dims), T query tokens, S key tokens, N query heads, K key heads (N a multiple of K),
    H head dim, V that of values. Where query and keys are sharded along T and S, K and V travel round a ring of those
    devices, or what `exchange` says. A causal ring without a window, bias or mask is balanced: devices swap half of their
    rows, and back.

    Args:
      query: [B, T, N, H] or [T, N, H], or with more batch dims in front; bf16, fp16, fp32 or fp64.
      key: [B, S, K, H] or [S, K, H], of query's dtype, or float8 with key_scales. K == N is MHA, K == 1 MQA, between them GQA.
      value: [B, S, K, V] or [S, K, V], of query's dtype, or float8 with value_scales; V need not be H (multi-head latent
        attention).
      bias: added to the logits, broadcastable to [B, N, T, S]; differentiable. A finite one is a number, however low; -inf
        masks.
      mask: boolean, broadcastable to [B, N, T, S]; True takes part.
      scale: of the logits; default 1 / sqrt(H). It may be traced, and has a gradient: it is multiplied into the query then.
      is_causal: token i sees keys j <= i, both counted from their sequence's start.
      query_seq_lengths, key_value_seq_lengths: [B] int32, valid tokens of each sequence; the rest is padding.
      local_window_size: (left, right) or one int for both: token i sees keys i - left .. i + right.
      implementation: "tpu" or "gpu" (Pallas; a Hopper), "xla", or None: the best that takes this call on this platform. Away
        from a TPU "tpu" runs in Pallas's interpreter, slowly: for tests. "gpu" runs on H100 and H200 only.
      return_residual: also return the LSE.
      query_segment_ids, key_value_segment_ids: [B, T] and [B, S] int32, both or neither: a query sees keys of its own
        segment only (packed sequences).
      query_positions, key_value_positions: [B, T] and [B, S] int32, either or both: what is_causal and local_window_size
        compare, instead of places in the arrays; for tokens that are kept in another order, or of which some are elsewhere.
        Lengths and dropout count places still. A ring meets every block then and is not balanced.
      mask_fn: `mask_fn(query_positions, key_positions) -> bool`, True where the key is seen, of two int32 arrays that it
        broadcasts; beside is_causal and local_window_size. It is traced into the kernel, so it closes over no arrays, and no
        mask is kept. One of `ringmoe.masks` also tells which blocks to skip: `Causal() | Prefix(256)`, `Chunks(8192)`; of
        another every block that is_causal and the window leave is met. It is static: define it once, outside the function.
      logits_soft_cap: caps the logits, bias included, at +- this; > 0 (Gemma 2).
      sinks: [N] floats, one more logit of each head, which takes its share of the softmax and has no value; differentiable.
      alibi_slopes: [N] floats, times the distance of query's and key's positions taken from the logits, before a cap (Press et
        al., 2022, https://arxiv.org/abs/2108.12409). Constants: no gradient goes to them.
      key_scales, value_scales: floats, broadcastable to [B, S, K]: a key in float8 stands for key * key_scales[..., None], and
        values so. Eight bits are kept and travel; a kernel widens them, rounded once to query's dtype. They are constants: no
        gradient goes to float8 or its scales.
      dropout_rate: share of the weights that are left out, 0 <= rate < 1, the others multiplied by 1 / (1 - rate); the LSE
        knows nothing of it. Which ones depends on the key, sequence, head and places alone, so it is the same on any mesh.
      dropout_key: a `jax.random.key`, needed where the rate is not 0. Inside your own shard_map devices on axis_name need the
        same one, and those on other axes one each.
      axis_name: inside the caller's own `jax.shard_map`, the mesh axis (or axes) over which the sequence is sharded; query,
        key and value are then one device's slices, and bias, mask, key_value_segment_ids and key_value_positions span the
        whole of S. Outside
        a shard_map shardings are found by themselves and this stays None.
      exchange: what devices that share a sequence send each other, or "auto". "ring": K and V pass from neighbour to
        neighbour. "all_gather": K and V whole on every device. "all_to_all": for the work, each device has some heads of all
        tokens; where heads don't suffice for all devices, so many neighbours as they do share them, be it part of a mesh axis,
        and rings go from group to group. "merge": each device attends from all queries to its own keys, and the results are
        summed; for queries few beside the keys.

    Returns:
      output [B, T, N, V] in query's dtype; with `return_residual` also the LSE [B, T, N] (or [T, N]),
        log (sum_j exp(logit_ij) + exp(sink)).

    Raises:
      ValueError: shapes, dtypes or names that don't fit, with what was expected.
      ExceptionGroup: of NotImplementedErrors, where the implementation that was asked for lacks something.

    Cost per device of P: 2 B T S N (H + V) / P FLOPs forward (half if causal), 2.5 times as many backward. A ring sends
    (P - 1) / P of K and V forward, three to five times that backward (fp32 dK, dV travel too), and has memory beyond the
    operands for the next K and V block and one fp32 output; an all-to-all sends (P - 1) / P of its own part of query, key,
    value and output; a merge twice that of all fp32 output; an all-gather what a ring sends, with memory for all of K and V.
    On a TPU everything runs in the Pallas kernel, head dims above 576 excepted. A bias's gradient costs two more matmuls than
    the five of the backward pass; say `jax.lax.stop_gradient` where it needs none. float16 is multiplied as float32 there.
    On a Hopper GPU a Pallas kernel runs bfloat16 and float16, head dims 64, 128, 192 and 256, 64 tokens or more, or
    fewer than 32 queries against eight times as many keys. A mask, a bias's gradient, dropout, float8, a mask_fn of more than
    integers, positions above head dim 192, and above 128 more than one of soft cap, segments, positions, slopes, bias and a
    free mask_fn, take plain XLA operations, with a warning.
    Any order of derivative exists; beyond the first reverse one they are taken of plain XLA operations, slower and with the
    memory that those need. What a rematerialised layer can keep bears names: `ringmoe.RESIDUAL_NAMES`.

    Source: Liu et al., Ring Attention, https://arxiv.org/abs/2310.01889; Jacobs et al., DeepSpeed-Ulysses,
    https://arxiv.org/abs/2309.14509; Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691.
    """
    return attend(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        return_residual=return_residual,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        query_positions=query_positions,
        key_value_positions=key_value_positions,
        mask_fn=mask_fn,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key_scales=key_scales,
        value_scales=value_scales,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        axis_name=axis_name,
        exchange=exchange,
    )


def attend(
    query, key, value, *, bias=None, mask=None, scale=None, is_causal=False, query_seq_lengths=None,
    key_value_seq_lengths=None, local_window_size=None, implementation=None, return_residual=False,
    query_segment_ids=None, key_value_segment_ids=None, query_positions=None, key_value_positions=None, mask_fn=None,
    logits_soft_cap=None, sinks=None, alibi_slopes=None, key_scales=None, value_scales=None, dropout_rate=0.0,
    dropout_key=None, axis_name=None, exchange="auto", cut=MANUAL["attention"], page_indices=None,
):  # fmt: skip
    """What `dot_product_attention` does once its docstring is read.

    `cut`: the factors of its rule that axis_name splits. With `page_indices` [B, M] key and value are pools [P, S, K, H].
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check(query.ndim >= 3, f"{query.shape=}, expected [..., T, N, H]")
    pooled = page_indices is not None
    _check_arrays(query, key, value, pooled)
    key, of_keys = _with_scales("key", key, key_scales)
    value, of_values = _with_scales("value", value, value_scales)
    shape = (*query.shape[:-1], value.shape[-1])
    if query.ndim == 3:
        query, key, value = (x[None] for x in (query, key, value))
        of_keys, of_values = (None if x is None else x[None] for x in (of_keys, of_values))
    query, scale = _scaled(query, scale)
    pallas.check_implementation("attention", implementation)
    check(exchange in EXCHANGES, f"{exchange=}, expected one of {EXCHANGES}")
    *batch, t, n, _ = query.shape
    s = key.shape[-3]
    axes = compat.check_axis_name(axis_name)
    columns = s * math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
    extras = Extras(
        bias=_logits_like("bias", bias, (*batch, n, t, columns)),
        mask=_logits_like("mask", mask, (*batch, n, t, columns)),
        query_lengths=_integers("query_seq_lengths", query_seq_lengths, (*batch,)),
        key_lengths=_integers("key_value_seq_lengths", key_value_seq_lengths, (*batch,)),
        query_segments=_integers("query_segment_ids", query_segment_ids, (*batch, t)),
        key_segments=_integers("key_value_segment_ids", key_value_segment_ids, (*batch, columns)),
        query_positions=_integers("query_positions", query_positions, (*batch, t)),
        key_positions=_integers("key_value_positions", key_value_positions, (*batch, columns)),
        key_scales=of_keys,
        value_scales=of_values,
        slopes=jax.lax.stop_gradient(_of_heads("alibi_slopes", alibi_slopes, n)),
        seeds=_dropout_seeds(dropout_rate, dropout_key, tuple(batch), n),
        sinks=_of_heads("sinks", sinks, n),
        pages=page_indices,
    )
    check(
        (extras.query_segments is None) == (extras.key_segments is None),
        "query_segment_ids and key_value_segment_ids: one was given, expected both or neither",
    )
    cap = logits_soft_cap
    check(
        cap is None or (isinstance(cap, int | float) and 0 < cap < math.inf),
        f"logits_soft_cap={cap}, expected None or a number > 0, known while tracing",
    )
    band = Band.make(is_causal, local_window_size, _checked(mask_fn))
    spec = AttentionSpec(scale, band, None if cap is None else float(cap), float(dropout_rate))
    call = Call(spec, exchange, implementation, axes, cut)
    output, lse = attention(call, *compat.vary_alike((query, key, value, extras)))
    output = output.reshape(shape)
    return (output, lse.reshape(shape[:-1])) if return_residual else output


def _check_arrays(query, key, value, pooled: bool):
    check(
        query.dtype in DTYPES, f"{query.dtype=}, expected one of {[jnp.dtype(d).name for d in DTYPES]}: cast the inputs"
    )
    for name, x in (("key", key), ("value", value)):
        check(
            x.dtype == query.dtype or is_float8(x.dtype),
            f"{name} has dtype {x.dtype}, expected query's {query.dtype}, or float8 with {name}_scales: cast one of them",
        )
        like = "a pool [num_pages, page_size, K, H]" if pooled else f"{query.ndim} dims like query's {query.shape}"
        check(x.ndim == (4 if pooled else query.ndim), f"{name} has shape {x.shape}, expected {like}")
    *batch, _, n, h = query.shape
    leading = [key.shape[0]] if pooled else batch
    expected = (*leading, key.shape[-3], key.shape[-2], h)
    layout = (
        "a pool [num_pages, page_size, K, H] with"
        if pooled
        else f"[..., S, K, H] with query's leading dims {batch} and"
    )
    check(key.shape == expected, f"{key.shape=}, expected {layout} H={h}")
    check(value.shape[:-1] == key.shape[:-1], f"{value.shape=}, expected key's shape {expected} but for the last dim")
    check(
        key.shape[-2] > 0 and n % key.shape[-2] == 0,
        f"{n} query heads and {key.shape[-2]} key heads, expected the first to be a multiple of the second",
    )
    lengths = query.shape + key.shape + value.shape
    check(min(lengths) > 0, f"{query.shape=}, {key.shape=}, {value.shape=}, expected no dim of length 0")


def _with_scales(name: str, x, scales):
    """`(x, scales)`, the scales of x in float8 float32 and one for each token and head, and both constants; or None."""
    if not is_float8(x.dtype):
        check(scales is None, f"{name}_scales with {name} of dtype {x.dtype}, expected float8: leave the scales out")
        return x, None
    check(scales is not None, f"{name} has dtype {x.dtype} and no {name}_scales, expected them: pass ones, if need be")
    scales, shape = jnp.asarray(scales), x.shape[:-1]
    fits = scales.ndim <= len(shape) and all(n in (1, m) for n, m in zip(scales.shape[::-1], shape[::-1]))
    check(
        fits and jnp.issubdtype(scales.dtype, jnp.floating) and not is_float8(scales.dtype),
        f"{name}_scales has shape {scales.shape} and dtype {scales.dtype}, expected floats that broadcast to {shape}",
    )
    scales = jnp.broadcast_to(scales.astype(jnp.float32), shape)
    return jax.lax.stop_gradient(x), jax.lax.stop_gradient(scales)


def _scaled(query, scale):
    """`(query, scale)` with a number for a scale: one that is traced is multiplied into the queries instead."""
    if scale is None:
        return query, 1 / math.sqrt(query.shape[-1])
    if not isinstance(scale, jax.core.Tracer):
        check(
            jnp.ndim(scale) == 0, f"scale has shape {jnp.shape(scale)}, expected a scalar: multiply the query with it"
        )
        return query, float(scale)
    check(
        scale.ndim == 0,
        f"scale has shape {scale.shape}, expected a scalar: multiply the query with it, and pass scale=1",
    )
    return (query * scale.astype(jnp.promote_types(query.dtype, jnp.float32))).astype(query.dtype), 1.0


def _logits_like(name: str, x, shape: tuple[int, ...]):
    """The bias or mask with as many dims as the logits, checked to broadcast to `shape`."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if name == "mask":
        check(
            x.dtype == jnp.bool_,
            f"mask has dtype {x.dtype}, expected bool, True where a pair takes part: pass mask.astype(bool), or, if it is "
            "added to the logits, bias=mask",
        )
    check(name == "mask" or jnp.issubdtype(x.dtype, jnp.floating), f"bias has dtype {x.dtype}, expected a float")
    check(
        x.ndim <= len(shape),
        f"{name} has shape {x.shape}, expected at most {len(shape)} dims, broadcastable to [..., N, T, S] = {shape}",
    )
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    fits = all(n in (1, m) for n, m in zip(x.shape, shape))
    check(fits, f"{name} has shape {x.shape}, expected one that broadcasts to [..., N, T, S] = {shape}")
    return x


def _integers(name: str, x, shape: tuple[int, ...]):
    if x is None:
        return None
    x = jnp.asarray(x)
    check(
        x.shape == shape and x.dtype == jnp.int32,
        f"{name} has shape {x.shape} and dtype {x.dtype}, expected int32 {shape}",
    )
    return x


def _of_heads(name: str, x, num_heads: int):
    if x is None:
        return None
    x = jnp.asarray(x)
    fits = x.shape == (num_heads,) and jnp.issubdtype(x.dtype, jnp.floating)
    check(
        fits, f"{name} has shape {x.shape} and dtype {x.dtype}, expected floats ({num_heads},), one for each query head"
    )
    return x


def _dropout_seeds(rate, key, batch: tuple[int, ...], num_heads: int):
    """uint32 [*batch, N], or None without dropout."""
    known = isinstance(rate, int | float)
    check(known and 0 <= rate < 1, f"dropout_rate={rate}, expected a number, 0 <= rate < 1, known while tracing")
    if rate == 0:
        return None
    check(
        key is not None, f"dropout_rate={rate} without a dropout_key, expected a jax.random.key, another for each step"
    )
    return dropout.seeds(key, batch, num_heads)


def _checked(mask_fn):
    """The mask_fn, called once to see what it gives."""
    if mask_fn is None or isinstance(mask_fn, Mask):
        return mask_fn
    check(callable(mask_fn), f"{mask_fn=}, expected a function of query and key positions, or one of ringmoe.masks")
    rows, keys = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((1, 3), jnp.int32)
    traced, out = jax.make_jaxpr(mask_fn, return_shape=True)(rows, keys)
    check(
        getattr(out, "dtype", None) == jnp.bool_ and jnp.broadcast_shapes(out.shape, (2, 3)) == (2, 3),
        f"mask_fn gave {out} for positions [2, 1] and [1, 3], expected bool [2, 3], True where the key is seen",
    )
    check(
        not traced.consts,
        "mask_fn closes over arrays, expected a function of the two positions alone: what differs between sequences goes "
        "into query_positions, segment ids, bias or mask",
    )
    return mask_fn
