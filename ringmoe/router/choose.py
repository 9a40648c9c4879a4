"""Scores, noise, and which experts a token (or which tokens an expert) chooses.

Plain jnp on [*B, T, E], elementwise along the tokens, so that it partitions over them in every sharding mode. Reductions run
over the experts as the second-minor dim, where tokens fill the vector unit. Nothing here is differentiated but the scores.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType

from ringmoe import compat
from ringmoe.meshes import Axes
from ringmoe.router.config import RouterConfig

MANY_EXPERTS = 128  # from which on top_k looks at chunks of them first


def noisy(logits: jax.Array, config: RouterConfig, noise_logits: jax.Array | None, key, axes: Axes = ()) -> jax.Array:
    """The logits plus the config's noise."""
    return logits + noise_std(logits, config, noise_logits) * drawn(jax.random.normal, key, logits, -2, axes)


def noise_std(logits: jax.Array, config: RouterConfig, noise_logits: jax.Array | None) -> jax.Array:
    """The standard deviation of the noise on the logits, where there is some."""
    assert config.noise_on_logits, config
    if config.noise == "gaussian":
        return jnp.asarray(1.0 if config.noise_scale is None else config.noise_scale, logits.dtype)
    assert noise_logits is not None, "route checks that"
    return jax.nn.softplus(noise_logits.astype(logits.dtype))


def jittered(x: jax.Array, config: RouterConfig, key, axes: Axes = ()) -> jax.Array:
    """The router's input times uniform [1 - eps, 1 + eps]."""
    eps = 0.01 if config.noise_scale is None else config.noise_scale
    return x * (1 + eps * (2 * drawn(jax.random.uniform, key, x, -2, axes) - 1))


def drawn(sample: Callable, key, like: jax.Array, dim: int, axes: Axes) -> jax.Array:
    """Random numbers for the global shape, the same on every mesh: those of this device's part of `like`, tokens at `dim`."""
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sample(key, like.shape, like.dtype, out_sharding=sharding)
    shape, dim, mine = list(like.shape), dim % like.ndim, like.shape[dim]
    shape[dim] = mine * math.prod(lax.axis_size(a) for a in axes)
    whole = sample(key, tuple(shape), like.dtype)
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(axes) * mine, mine, dim) if axes else whole


@jax.custom_jvp
def log_sum_exp(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m, log sum_e exp(logits_e - m)), [*B, T, 1], m the largest of [*B, T, E]: their sum is the log of the sum of exp.

    NaN or infinite where the token's softmax is not finite; no gradient goes there.
    """
    largest = jnp.max(logits, -1, keepdims=True)
    return largest, jnp.log(jnp.sum(jnp.exp(logits - largest), -1, keepdims=True))


@log_sum_exp.defjvp
def _log_sum_exp_jvp(primals, tangents):
    (logits,), (moved,) = primals, tangents
    largest, rest = log_sum_exp(logits)
    share = jnp.exp(jnp.where(jnp.isfinite(rest), logits - largest - rest, -jnp.inf))
    return (largest, rest), (jnp.zeros_like(largest), jnp.sum(share * moved, -1, keepdims=True))


def scoring(logits: jax.Array, config: RouterConfig) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """What makes scores of some of each token's logits [*B, T, any], and whether all of a token's are finite, [*B, T]."""
    if config.score == "softmax":
        largest, rest = log_sum_exp(logits)
        total = largest + rest  # one number, whose last digit is worth as much as a logit's own
        return lambda some: jnp.exp(some - total), jnp.isfinite(rest[..., 0])
    score = jax.nn.sigmoid if config.score == "sigmoid" else lambda some: jnp.sqrt(jax.nn.softplus(some))
    return score, jnp.isfinite(jnp.sum(score(logits), -1))


def top_k(values: jax.Array, k: int) -> jax.Array:
    """[*B, T, k] int32 of [*B, T, E]: the largest value first, the lowest index among equals, on every backend.

    Of a token with NaN some numbers.
    """
    return TOP_K.bind(lax.stop_gradient(values), k=k)


def _by_insertion(values, k):
    """Of many experts the k chunks with the largest maxima come first: no other can hold one of the k largest."""
    num_experts = values.shape[-1]
    chunk = 2 ** round(math.log2(num_experts / k) / 2)  # the least of num_experts / chunk + k * chunk steps
    if num_experts < MANY_EXPERTS or num_experts % chunk or num_experts // chunk < k:
        return _insert(values, k)
    chunks = values.reshape(*values.shape[:-1], -1, chunk)
    best = jnp.sort(_insert(jnp.max(chunks, -1), k), -1)  # in their order, for equal values
    candidates = jnp.take_along_axis(chunks, best[..., None], -2, mode="promise_in_bounds").reshape(
        *best.shape[:-1], k * chunk
    )
    found = _insert(candidates, k)
    return at_experts(best, lax.div(found, jnp.int32(chunk))) * chunk + lax.rem(found, jnp.int32(chunk))


def _in_rounds(values, k):
    """One reduction over the experts for each choice, of those that come after the last one. On a GPU a reduction is a kernel,
    and each of an insertion's E / 2 steps two."""
    index, none = jnp.zeros_like(values, jnp.int32) + numbered(values), jnp.int32(values.shape[-1])

    def better(a, b):
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return tuple(jnp.where(first, x, y) for x, y in zip(a, b))

    least, found, left = jnp.asarray(-jnp.inf, values.dtype), [], True
    for _ in range(k):
        candidates = jnp.where(left, values, least), jnp.where(left, index, none)
        best = lax.reduce(candidates, (least, none), better, (values.ndim - 1,))
        largest, expert = (x[..., None] for x in best)
        left = (values < largest) | ((values == largest) & (index > expert))
        found.append(best[1])
    return jnp.stack(found, axis=-1)


def _insert(values, k):
    """Expert after expert, the last first, into each token's k largest so far: a token is a lane of the vector unit.

    What comes later has a lower index than all that is held, so it goes before its equals.
    """
    by_expert = jnp.moveaxis(values, -1, 0)
    nothing = jnp.full_like(by_expert[0], -jnp.inf), jnp.full_like(by_expert[0], -1, jnp.int32)

    def step(best, new):
        before = [new[0] >= value for value, _ in best]
        kept = [jax.tree.map(functools.partial(jnp.where, before[0]), new, best[0])]
        for j in range(1, k):  # a place's next holder depends on two of before alone, and not on all places above
            moved = jax.tree.map(functools.partial(jnp.where, before[j - 1]), best[j - 1], new)
            kept.append(jax.tree.map(functools.partial(jnp.where, before[j]), moved, best[j]))
        return tuple(kept), None

    index = lax.iota(jnp.int32, by_expert.shape[0])
    best, _ = lax.scan(step, (nothing,) * k, (by_expert, index), reverse=True, unroll=min(2, index.size))
    return jnp.stack([index for _, index in best], axis=-1)


@jax.custom_jvp
def at_experts(values: jax.Array, expert: jax.Array) -> jax.Array:
    """values[*B, T, E] at expert [*B, T, k]: [*B, T, k]. Its derivative keeps the choices alone, and scatters nothing.

    A choice of -1 gives some number.
    """
    return AT_EXPERTS.bind(*compat.vary_alike((values, expert)))


def numbered(x: jax.Array) -> jax.Array:
    """The index along the last dim, int32, ready to broadcast against `x`."""
    return lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)


def is_chosen(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """[*B, T, E] bool, like values: whether it is one of `chosen` [*B, T, k]."""
    return functools.reduce(jnp.logical_or, (c[..., None] == numbered(values) for c in jnp.unstack(chosen, axis=-1)))


@jax.jit  # one by one, under an Explicit mesh, an iota, without operands, fails for want of devices (jax 0.12.0.1)
def _select(values, expert):
    one = lambda e: jnp.sum(jnp.where(e[..., None] == numbered(values), values, 0), -1, dtype=values.dtype)
    return jnp.stack([one(e) for e in jnp.unstack(expert, axis=-1)], -1)


_select_again = jax.jit(jax.checkpoint(_select, prevent_cse=False))  # keeps no [T, E] mask of each choice


@at_experts.defjvp
def _at_experts_jvp(primals, tangents):
    values, expert = primals
    return at_experts(values, expert), _select_again(tangents[0], expert)


def _gather(values, expert):
    return jnp.take_along_axis(values, jnp.maximum(expert, 0), -1, mode="promise_in_bounds")


def _batch(primitive, arrays, dims, **params):
    (length,) = {x.shape[dim] for x, dim in zip(arrays, dims) if dim is not None}
    return primitive.bind(*(batching.bdim_at_front(x, dim, length) for x, dim in zip(arrays, dims)), **params), 0


def _by_platform(name: str, result: Callable, function: Callable, **others: Callable) -> Primitive:
    """A primitive that is `function`, but on platforms that `others` name; `result` gives its type. In place of
    lax.platform_dependent, which fails in an eager gradient over an Explicit mesh."""
    made = Primitive(name)
    made.def_impl(jax.jit(made.bind, static_argnames=("k",)))
    made.def_abstract_eval(result)
    batching.primitive_batchers[made] = functools.partial(_batch, made)
    for platform, run in {None: function, **others}.items():
        mlir.register_lowering(made, mlir.lower_fun(run, multiple_results=False), platform=platform)
    return made


TOP_K = _by_platform(
    "ringmoe_top_k",
    lambda values, k: values.update(shape=(*values.shape[:-1], k), dtype=jnp.int32, weak_type=False),
    _by_insertion,
    cuda=_in_rounds,
)
AT_EXPERTS = _by_platform(
    "ringmoe_at_experts",
    lambda values, expert: expert.update(dtype=values.dtype, weak_type=False),
    _select,
    cpu=_gather,
)


def without_poor_groups(values: jax.Array, config: RouterConfig) -> jax.Array:
    """`values` with those of all but a token's `top_groups` best groups of experts set to `config.excluded`."""
    if config.expert_groups == 1:
        return values
    grouped = values.reshape(*values.shape[:-1], config.expert_groups, -1)
    best = at_experts(grouped, top_k(grouped, config.group_top))
    best = jnp.sum(jnp.where(jnp.isneginf(best), jnp.finfo(best.dtype).min, best), -1)
    kept = is_chosen(best, top_k(best, config.top_groups))
    return jnp.where(kept[..., None], grouped, config.excluded).reshape(values.shape)


def sinkhorn(logits: jax.Array, active: jax.Array, config: RouterConfig, axes: Axes = ()) -> jax.Array:
    """log(exp(logits) r_t c_e), [*B, T, E], with r and c such that every expert has the same mass and every token mass 1.

    Over each sequence, or over all with scope "global"; tokens that aren't active have no mass. So many steps bring it near.
    Source: Sinkhorn-balanced assignment, https://arxiv.org/abs/2202.01169.
    """
    dims = tuple(range(active.ndim)) if config.scope == "global" else (active.ndim - 1,)
    over = lambda reduce, across, x, d: (
        across(reduce(x, axis=d, keepdims=True), axes) if axes else reduce(x, axis=d, keepdims=True)
    )
    tokens = jnp.maximum(over(jnp.sum, lax.psum, active.astype(logits.dtype), dims), 1)[..., None]
    share = jnp.log(tokens) - jnp.log(jnp.asarray(logits.shape[-1], logits.dtype))
    logits = jnp.where(active[..., None], logits, -jnp.inf)
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)

    def step(_, x):
        most = finite(over(jnp.max, lax.pmax, x, dims))
        mass = most + jnp.log(over(jnp.sum, lax.psum, jnp.exp(x - most), dims))
        x = x - finite(mass) + share
        return x - finite(jax.nn.logsumexp(x, axis=-1, keepdims=True))

    return lax.fori_loop(0, config.sinkhorn_iterations, step, logits)


def hash_experts(token_ids: jax.Array, num_experts: int, top_k: int = 1, *, seed: int = 0) -> jax.Array:
    """Experts by a fixed hash of the token's number, for `route(..., expert=)`: [*B, T, k] int32, distinct.

    Args:
        token_ids: [*B, T] integers, of a vocabulary. num_experts: E. top_k: k <= E. seed: another seed, another hash.

    Cost: a few integer operations a choice. Source: Hash Layers, https://arxiv.org/abs/2106.04426; the mixing function is the
    finalizer of MurmurHash3.
    """
    taken: list[jax.Array] = []
    for j in range(top_k):
        h = token_ids.astype(jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32((seed * 40503 + j * 977) % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        draw = lax.rem((h ^ (h >> 16)), jnp.uint32(num_experts - j)).astype(jnp.int32)
        # The draw counts the experts that are left: step over the taken ones, lowest first.
        for other in jnp.unstack(jnp.sort(jnp.stack(taken, -1), -1), axis=-1) if taken else ():
            draw = draw + (draw >= other)
        taken.append(draw)
    return jnp.stack(taken, -1)
