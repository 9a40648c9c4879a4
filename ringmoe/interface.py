"""What an attention kernel is: the types a schedule and a kernel share.

A kernel is a module with the four functions below, on one device's arrays, head-major:
q [B, N, T, H]; do [B, N, T, V]; k [B, K, S, H]; v [B, K, S, V] with N a multiple of K (query head n reads key head
n // (N // K)), k and v in q's dtype, or in float8 with scales among the extras; lse, delta [B, N, T]. `acc` is float32, or
float64 for float64 inputs. No kernel communicates and none knows the mesh: a schedule calls it once or twice a hop and tells
it where in the sequence the local rows and keys stand.

    check(spec, q, k, v, extras)                    raises NotImplementedError with what it lacks; nothing else
    init(spec, q, v) -> state                       no key seen yet; an opaque pytree, perhaps of no arrays
    forward(spec, state, q, k, v, extras, at) -> state              the state after also seeing these keys
    finish(spec, state) -> (o [B, N, T, V], lse, tail [B, N, T])    in acc's dtype, see softmax.finish
    backward(spec, dq, q, k, v, do, lse, delta, extras, at) -> Grads     this block pair's; with dq, unless that is None, added
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ringmoe.masks import Band, Places

ATTENTION_OUTPUT, ATTENTION_LSE, MOE_OUTPUT = "ringmoe_attention_output", "ringmoe_attention_lse", "ringmoe_moe_output"

RESIDUAL_NAMES = (ATTENTION_OUTPUT, ATTENTION_LSE, MOE_OUTPUT)
"""Names of what the ops' backward passes need, or what the next layer does, for `jax.checkpoint` policies: a layer that is
rematerialised under `jax.checkpoint_policies.save_only_these_names(*ringmoe.RESIDUAL_NAMES)` runs its ring, and sends its
rows to their experts, once forward and not again before the backward pass. It keeps one array like the query (and one
number per row and head), and one like the tokens."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is computed, without shapes: `dropout(softmax(cap(scale q k^T + bias), where band and mask)) v`."""

    scale: float
    band: Band = Band()
    # Logits x are taken as `soft_cap tanh(x / soft_cap)`.
    soft_cap: float | None = None
    # The share of the pairs that are left out, at random: see dropout.py.
    dropout_rate: float = 0.0
    # Whether a backward pass is asked for the bias's gradient.
    bias_gradient: bool = False
    # Run a TPU kernel in Pallas's interpreter: set off its platform. The plain one: the TPU interpreter calls back to
    # Python in order, an effect that a lowering rule can't have; tests turn it on from outside, for its race detection.
    interpret: bool = False
    # What it runs on, by its name in inspector/chips.py; "" where nobody knows.
    chip: str = ""
    # No loop or branch depends on where a device stands: hidden blocks are masked instead of skipped. So JAX can transpose
    # the loops, and XLA's partitioner can insert collectives in them, which every device then meets.
    uniform: bool = False
    # The local rows are so many equal pieces, which stand apart in the sequence, in ascending order; and so the keys.
    pieces: int = 1


class Offsets(NamedTuple):
    """Global position of the first query of each piece, and of the first key: int32 scalars, may be traced."""

    query: tuple[jax.Array | np.integer | int, ...]
    key: tuple[jax.Array | np.integer | int, ...]
    # Of all devices that see any of these keys the first query's position less the first key's, where that is known before the
    # run: it tells what a call costs, and nothing else.
    apart: int | None = None

    def places(self, num_queries: int, num_keys: int) -> tuple[Places, Places]:
        """Where so many queries and keys stand."""
        return Places(self.query, num_queries // len(self.query)), Places(self.key, num_keys // len(self.key))


class Extras(NamedTuple):
    """Optional per-call arrays, already cut to the local rows and keys; None where absent.

    bias, mask: [B|1, N|1, T|1, S|1]; query_lengths, key_lengths: [B] int32, counted in global positions;
    query_segments [B, T] and key_segments [B, S]: int32, a query sees keys of its own segment only;
    query_positions [B, T] and key_positions [B, S]: int32, what the band compares instead of places;
    key_scales, value_scales [B, K, S]: floats, of k and v in float8, which stand for `widened` ones;
    pages, page_starts [B, M]: int32, of keys in pages of a pool: k is then [P, K, S, H] (so v, and scales [P, K, S]), and keys
    j S .. of sequence b are k[pages[b, j]], at positions from page_starts[b, j] on, in ascending order; key_lengths are given
    then, count a sequence's keys in this order, and tell how many of its pages are met. A schedule makes page_starts;
    slopes [N]: float32, of ALiBi; seeds [B, N]: uint32, of dropout. Sinks [N] are a schedule's business.
    """

    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    slopes: jax.Array | None = None
    seeds: jax.Array | None = None
    sinks: jax.Array | None = None
    pages: jax.Array | None = None
    page_starts: jax.Array | None = None


def is_float8(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def widened(x: jax.Array, scales: jax.Array | None, dtype) -> jax.Array:
    """Keys or values [B, K, S, H] as they are multiplied: in float8 x stands for x * scales[..., None], rounded once."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return x if scales is None else (x.astype(wide) * scales[..., None].astype(wide)).astype(dtype)


class Grads(NamedTuple):
    """Gradients in acc's dtype: dq [B, N, T, H], dk [B, K, S, H], dv [B, K, S, V]; dbias shaped like extras.bias, or None where
    `spec.bias_gradient` is not set."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbias: jax.Array | None = None
