"""Dense oracles: the formulas as written, T x S arrays and all. For tests and documentation only."""

import jax.numpy as jnp
from jax import lax


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    query_positions=None,
    key_value_positions=None,
    mask_fn=None,
    logits_soft_cap=None,
    sinks=None,
    alibi_slopes=None,
    kept=None,
    dropout_rate=0.0,
):
    """Attention and its log-sum-exp: `out = softmax(scale q k^T + bias, over the keys a query sees) v`.

    Arguments mean what they mean in `jax.nn.dot_product_attention`, except that a row without keys gives 0 and -inf.

    Args:
      query: [B, T, N, H]; key [B, S, K, H], value [B, S, K, V] with N a multiple of K. Everything is computed in their dtype.
      bias: [B|1, N|1, T|1, S|1], added to the logits; mask: likewise, True where a pair takes part.
      query_seq_lengths, key_value_seq_lengths: [B], how many leading queries and keys are real.
      local_window_size: keys seen to the left and to the right of a query, or one number for both; None for all.
      query_segment_ids: [B, T]; key_value_segment_ids: [B, S]: a query sees the keys of its own segment.
      query_positions: [B, T]; key_value_positions: [B, S]: what is_causal, mask_fn and the window compare.
      mask_fn: of query and key positions: True where the key is seen. logits_soft_cap: c in c tanh(logit / c).
      sinks: [N], a logit without a value. alibi_slopes: [N], times the distance of positions, taken from the logits.
      kept: [B, N, T, S] bool, the weights that dropout keeps; dropout_rate: the share of those it doesn't.

    Returns:
      `(out [B, T, N, V], lse [B, T, N])`
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, 2), jnp.repeat(value, group, 2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)

    i, j = jnp.arange(num_queries)[:, None], jnp.arange(num_keys)
    at = i if query_positions is None else query_positions[:, None, :, None]
    of = j if key_value_positions is None else key_value_positions[:, None, None, :]
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.astype(logits.dtype)[:, None, None] * jnp.abs(at - of)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)

    seen = jnp.ones(logits.shape, bool) if mask is None else jnp.broadcast_to(mask, logits.shape)
    if is_causal:
        seen &= of <= at
    if local_window_size is not None:
        window = local_window_size
        left, right = (window, window) if isinstance(window, int) else window
        seen &= True if left is None else of >= at - left
        seen &= True if right is None else of <= at + right
    if mask_fn is not None:
        seen &= mask_fn(at, of)
    if query_seq_lengths is not None:
        seen &= i < query_seq_lengths[:, None, None, None]
    if key_value_seq_lengths is not None:
        seen &= j < key_value_seq_lengths[:, None, None, None]
    if query_segment_ids is not None and key_value_segment_ids is not None:
        seen &= (query_segment_ids[:, :, None] == key_value_segment_ids[:, None, :])[:, None]

    logits = jnp.where(seen, logits, -jnp.inf)
    if sinks is not None:  # a key of its own, with a value of zeros
        column = jnp.broadcast_to(sinks.astype(logits.dtype)[:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, column], -1)
        value = jnp.pad(value, ((0, 0), (0, 1), (0, 0), (0, 0)))
        kept = None if kept is None else jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, 1)))
    any_seen = jnp.any(logits > -jnp.inf, -1, keepdims=True)
    # It cancels. Its derivative would be 0 / 0 where XLA computes a logit twice and rounds it otherwise the second time.
    largest = lax.stop_gradient(jnp.where(any_seen, jnp.max(logits, -1, keepdims=True), 0))
    weights = jnp.exp(logits - largest)
    total = jnp.where(any_seen, jnp.sum(weights, -1, keepdims=True), 1)
    weights = weights / total
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, value)
    lse = jnp.where(any_seen, largest + jnp.log(total), -jnp.inf)
    return out, jnp.swapaxes(lse[..., 0], 1, 2)
