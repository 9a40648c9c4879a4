"""Attention to a cache of keys and values, and its update: one token after another, or a prompt chunk by chunk."""

import math
from collections.abc import Callable
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ringmoe import compat
from ringmoe.attention import attend
from ringmoe.errors import check
from ringmoe.primitives import cache as primitive


# fmt: off
@overload
def decode_attention(
    query: ArrayLike, key_cache: ArrayLike, value_cache: ArrayLike, lengths: ArrayLike, *,
    page_indices: ArrayLike | None = None, scale: ArrayLike | None = None,
    local_window_size: int | None = None, mask_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    logits_soft_cap: float | None = None, sinks: ArrayLike | None = None, alibi_slopes: ArrayLike | None = None,
    key_scales: ArrayLike | None = None, value_scales: ArrayLike | None = None,
    implementation: Literal["tpu", "gpu", "xla"] | None = None, return_residual: Literal[False] = False,
    axis_name: str | tuple[str, ...] | None = None,
    exchange: Literal["auto", "ring", "all_gather", "all_to_all", "merge"] = "auto",
) -> jax.Array: ...
@overload
def decode_attention(
    query: ArrayLike, key_cache: ArrayLike, value_cache: ArrayLike, lengths: ArrayLike, *,
    page_indices: ArrayLike | None = None, scale: ArrayLike | None = None,
    local_window_size: int | None = None, mask_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    logits_soft_cap: float | None = None, sinks: ArrayLike | None = None, alibi_slopes: ArrayLike | None = None,
    key_scales: ArrayLike | None = None, value_scales: ArrayLike | None = None,
    implementation: Literal["tpu", "gpu", "xla"] | None = None, return_residual: bool,
    axis_name: str | tuple[str, ...] | None = None,
    exchange: Literal["auto", "ring", "all_gather", "all_to_all", "merge"] = "auto",
) -> tuple[jax.Array, jax.Array]: ...
# fmt: on


def decode_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    lengths: ArrayLike,
    *,
    page_indices: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    local_window_size: int | None = None,
    mask_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    key_scales: ArrayLike | None = None,
    value_scales: ArrayLike | None = None,
    implementation: Literal["tpu", "gpu", "xla"] | None = None,
    return_residual: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    exchange: Literal["auto", "ring", "all_gather", "all_to_all", "merge"] = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of the last T tokens of each sequence to a cache that may be sharded along the sequence.

        O_i = softmax(scale q_i K[: p_i + 1]^T) V[: p_i + 1],    p_i = length - T + i

    T == 1 decodes a token; larger T are the chunks of a prompt (chunked prefill). The new tokens' own keys and values are in
    the cache already: write them with `update_cache` first. Nothing of the cache travels where queries are few: each device
    attends to its own part, and the shares are merged.

    With `page_indices` the caches are pools of pages that all sequences share, and any page may be any sequence's, or several
    sequences' (a common prefix): tokens j page_size and after of sequence b are those of page `page_indices[b, j]`. A pool may
    be sharded along its pages and key heads. Of the queries, what would be sharded over the pages' axes is gathered.

    Args:
      query: [B, T, N, H], the last T tokens of each sequence; any number of batch dims; bf16, fp16, fp32 or fp64.
      key_cache, value_cache: [B, S, K, H] and [B, S, K, V] of query's dtype, or float8 with scales; N a multiple of K.
      lengths: [B] int32, 0 <= length <= S: tokens of each sequence in the cache, the queries' own included. Sequences may
        have different ones. What is past them in the cache is not read, NaN or not.
      page_indices: [B, M] int32; key_cache and value_cache are then [num_pages, page_size, K, H] and [.., V], scales
        [num_pages, page_size, K], and S is M page_size. Entries past a sequence's length may be any numbers. A number that is
        no page's is a page without tokens.
      scale: of the logits; default 1 / sqrt(H).
      local_window_size: a token sees so many tokens before it, and itself; None: all.
      key_scales, value_scales: as in `dot_product_attention`; `update_cache(key_scales[..., None], ...)` keeps a cache of them.
      axis_name: inside the caller's own `jax.shard_map`, the mesh axis (or axes) over which the cache is sharded along S;
        key_cache and value_cache (and their scales) are then one device's slices, and the other arguments are alike on all
        devices of the axis, as the results are. Of a pool they are slices of its pages, and page_indices count the pages of
        all devices of the axis. Outside a shard_map shardings are found by themselves and this stays None.
      mask_fn, logits_soft_cap, sinks, alibi_slopes, implementation, return_residual, exchange: as in `dot_product_attention`;
        with axis_name "merge", which "auto" is then, or "all_gather"; with page_indices "merge".

    Returns:
      output like query; with `return_residual` also the LSE [B, T, N]. A query before the sequence's start (where
      length < T) gives 0 and -inf.

    Raises:
      ValueError: shapes, dtypes or names that don't fit, with what was expected.
      NotImplementedError: a derivative is asked for with axis_name.

    Cost per device of P: 4 B T S N H / P FLOPs; its part of the cache is read up to the longest sequence's end;
    2 (P - 1) / P B T N (H + 1) fp32 numbers are sent and as many received, however long the cache; no memory to speak of.
    With page_indices a device reads its pages of the sequences, and a table of B M numbers is made on each.

    Source: Dao et al., Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; Kwon et al., PagedAttention,
    https://arxiv.org/abs/2309.06180.
    """
    query, key_cache, value_cache, lengths = map(jnp.asarray, (query, key_cache, value_cache, lengths))
    check(query.ndim >= 4, f"{query.shape=}, expected [B, T, N, H] with a batch dim or more")
    _check_numbers("lengths", lengths, query.shape[:-3])
    check(
        local_window_size is None or local_window_size >= 0,
        f"{local_window_size=}, expected how many tokens before it a token sees, >= 0",
    )
    if page_indices is not None:
        page_indices = _pages(page_indices, query.shape[:-3], key_cache, axis_name)
    if axis_name is not None:
        check(
            exchange in ("auto", "merge", "all_gather"),
            f"{exchange=} with {axis_name=}, expected 'merge' or 'all_gather': devices have queries whole there",
        )
        exchange = "merge" if exchange == "auto" else exchange
    num_queries = query.shape[-3]
    first = lengths[..., None] - num_queries
    return attend(
        query,
        key_cache,
        value_cache,
        scale=scale,
        is_causal=True,
        local_window_size=None if local_window_size is None else (local_window_size, 0),
        mask_fn=mask_fn,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key_scales=key_scales,
        value_scales=value_scales,
        key_value_seq_lengths=lengths,
        query_positions=first + jnp.arange(num_queries, dtype=jnp.int32),
        implementation=implementation,
        return_residual=return_residual,
        axis_name=axis_name,
        exchange=exchange,
        cut=("s",),
        page_indices=page_indices,
    )


def update_cache(
    cache: ArrayLike,
    new: ArrayLike,
    first: ArrayLike,
    *,
    page_indices: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """The cache with each sequence's new tokens written from its place `first` on: on the devices that own these places.

    Args:
      cache: [B, S, K, H], keys or values; any number of batch dims. new: [B, T, K, H], of the cache's dtype.
      first: [B] int32, tokens that each sequence had before. Places outside 0 .. S are dropped.
      page_indices: [B, M] int32, as in `decode_attention`: cache is then a pool [num_pages, page_size, K, H], and S is
        M page_size. Into a page that sequences share the last of them writes; give a sequence a page of its own first.
      axis_name: as in `decode_attention`: the cache is then one device's slice, and new is whole on every device.

    Returns:
      The cache. Donate the old one to your jitted step (`donate_argnames`) and it is changed in place.

    Raises:
      ValueError: shapes or dtypes that don't fit, with what was expected.

    Cost: nothing is sent but `new`, where it isn't on all devices; B T rows are written.
    """
    cache, new, first = map(jnp.asarray, (cache, new, first))
    check(cache.ndim >= 4, f"{cache.shape=}, expected [B, S, K, H] with a batch dim or more")
    batch = cache.shape[:-3]
    if page_indices is not None:
        check(cache.ndim == 4, f"{cache.shape=} with page_indices, expected a pool [num_pages, page_size, K, H]")
        batch = new.shape[:-3]
    expected = (*batch, "T", *cache.shape[-2:])
    fits = new.ndim == len(expected) > 3 and (*new.shape[:-3], "T", *new.shape[-2:]) == expected
    check(fits, f"{new.shape=}, expected [B, T, K, H] with the dims of the cache's {cache.shape}")
    check(new.dtype == cache.dtype, f"{new.dtype=}, expected the cache's {cache.dtype}: cast one of them")
    _check_numbers("first", first, batch)
    pages = () if page_indices is None else (_pages(page_indices, batch, cache, axis_name),)
    axes = compat.check_axis_name(axis_name)
    return primitive.update(*compat.vary_alike((cache, new, first, *pages)), axis_name=axes)


def _check_numbers(name: str, x, batch):
    check(
        x.shape == batch and x.dtype == jnp.int32,
        f"{name} has shape {x.shape} and dtype {x.dtype}, expected int32 {batch}, one for each sequence",
    )


def _pages(page_indices, batch, pool, axis_name):
    """The numbers of pages [*batch, M], -1 where there is none: of a padded pool devices hold more than there are."""
    numbers = jnp.asarray(page_indices)
    check(
        numbers.ndim == len(batch) + 1
        and numbers.shape[:-1] == batch
        and numbers.size > 0
        and numbers.dtype == jnp.int32,
        f"page_indices has shape {numbers.shape} and dtype {numbers.dtype}, expected int32 [B, M] with B of {batch}, M > 0",
    )
    sizes = jax.sharding.get_abstract_mesh().shape
    num_pages = pool.shape[0] * math.prod(sizes[a] for a in compat.check_axis_name(axis_name))
    return jnp.where(numbers < num_pages, numbers, -1)
