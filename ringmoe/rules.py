"""Each op's sharding rule, written once: which named factors every dimension of every array is made of.

`"... t (k g) h"` reads like einops: leading batch dims, query tokens, heads = key heads x group, head dim. From these
strings come the text that Shardy reads, the mesh axes of each factor, and the PartitionSpec of each operand and result.
A factor that is never split (WHOLE) may be sharded in what the caller passes; it is gathered first. A factor whose length its
axes don't divide is padded: `fitted` gives the lengths, `grow` and `shrink` take arrays there and back.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ringmoe.errors import warn_once
from ringmoe.meshes import Axes, Digit, Digits

Dim = tuple[str, ...]  # the factors of one dim, major to minor

ATTENTION = {
    "query": "... t (k g) h",
    "key": "... s k h",
    "value": "... s k v",
    "bias": "... (k g) t u",
    "mask": "... (k g) t u",
    "query_lengths": "...",
    "key_lengths": "...",
    "query_segments": "... t",
    "key_segments": "... u",
    "query_positions": "... t",
    "key_positions": "... u",
    "key_scales": "... s k",
    "value_scales": "... s k",
    "slopes": "(k g)",
    "seeds": "... (k g)",
    "sinks": "(k g)",
    "output": "... t (k g) v",
    "lse": "... t (k g)",
    "lse_tail": "... t (k g)",
    "delta": "... t (k g)",
}
"""t query tokens, s key tokens, k key heads, g query heads of one key head, h head dim, v that of values. `u` is s again in
the arrays that each device keeps whole along the keys, because the columns it needs change from hop to hop."""

EXPERTS = {
    "tokens": "... t d",
    "expert": "... t c",
    "slot": "... t c",
    "weight": "... t c",
    "w_in": "e d f",
    "w_gate": "e d f",
    "w_out": "e f d",
    "b_in": "e f",
    "b_gate": "e f",
    "b_out": "e d",
    "s_in": "e f",
    "s_gate": "e f",
    "s_out": "e d",
}
"""t tokens, d model dim, c choices of a token, e experts, f hidden dim."""

MOVERS = {
    "tokens": "... (z i) d",
    "expert": "... (z i) c",
    "slot": "... (z i) c",
    "weight": "... (z i) c",
    "rows": "e ... z r d",
}
"""Of dispatch and combine, whose rows lie by slot: z groups of i consecutive tokens, r rows an expert takes of a group."""

CACHE = {"cache": "... s k h", "new": "... u k h", "first": "..."}
"""Of a cache's update: s tokens that there is room for, u new ones, which devices hold whole."""

POOL = {"key": "s i k h", "value": "s i k v", "key_scales": "s i k", "value_scales": "s i k", "pages": "... p"}
"""Of attention to keys in pages of a pool, beside ATTENTION: s pages of i tokens, of all sequences, and p of a sequence."""

POOL_UPDATE = {"cache": "s i k h", "pages": "... p"}
"""The same of a cache's update, beside CACHE."""

OWN = re.compile(r"own(\d+)_(\d+)")
"""An array of the caller's own experts: its number, and how many dims it has. The first is e, the others are whole."""

IN_PAGES = " in pages"
FAMILIES = {
    "attention": ATTENTION,
    f"attention{IN_PAGES}": ATTENTION | POOL,
    "experts": EXPERTS,
    "movers": MOVERS,
    "cache": CACHE,
    f"cache{IN_PAGES}": CACHE | POOL_UPDATE,
}
"""An array's tangent and cotangent have its rule: `query_tangent` reads as `query`."""

MANUAL = {"attention": ("t", "s"), "experts": ("t", "e"), "movers": ("z", "e"), "cache": ("s",)}
"""The factors that a call's `axis_name` splits, inside the user's own shard_map, unless its parameter `cut` says which."""

WHOLE = frozenset({"h", "v", "u", "i", "p", "d", "c", "r"})
"""Factors no schedule splits."""

FILL = {"slot": -1}  # what the padding of an array holds, where zeros would mean something


@dataclasses.dataclass(frozen=True)
class Rule:
    """The factors of each dim of each operand and result, and the factors' sizes."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: tuple[tuple[str, int], ...]
    # Factors of this call that no axis may split: the 1 that stands for a longer one, and the 1 that was left out elsewhere.
    whole: frozenset[str] = frozenset()
    # Arrays of one of these factors decide before others which axes are whose.
    first: frozenset[str] = frozenset()

    def is_whole(self, factor: str) -> bool:
        """Whether no schedule splits this factor."""
        return factor in WHOLE or factor in self.whole or factor.startswith("own")

    def __str__(self) -> str:
        """Shardy's notation, as `custom_partitioning` and `sdy.sharding_rule` take it."""
        dim = lambda factors: factors[0] if len(factors) == 1 else f"({' '.join(factors)})"
        side = lambda arrays: ", ".join(" ".join(map(dim, dims)) for dims in arrays)
        return f"{side(self.operands)} -> {side(self.results)}"

    def shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        """The lengths of the dims of an array of this rule."""
        sizes = dict(self.sizes)
        return tuple(math.prod(sizes.get(f, 1) for f in dim) for dim in dims)

    def scaled(self, factors: Sequence[str], by: int) -> "Rule":
        """The rule of the whole call, where this one was made from one device's shapes and `factors` are split `by` ways."""
        return dataclasses.replace(self, sizes=tuple((f, n * by if f in factors else n) for f, n in self.sizes))

    @property
    def compound_sizes(self) -> dict[str, int]:
        """Sizes of the factors that never stand alone: Shardy can't read them off a shape."""
        dims = [dim for dims in self.operands + self.results for dim in dims]
        alone = {dim[0] for dim in dims if len(dim) == 1}
        return {name: size for name, size in self.sizes if any(name in dim for dim in dims) and name not in alone}

    def neighbours(self, factor: str) -> set[str]:
        """The factors that share an array with this one: they can't be split over the same axis."""
        arrays = [{f for dim in dims for f in dim} for dims in self.operands + self.results]
        return set().union(*(factors for factors in arrays if factor in factors)) - {factor}

    def factor_axes(self, specs: Sequence[Sequence[Axes]], mesh_shape: Mapping[str, int]) -> dict[str, Axes]:
        """The mesh axes of each factor, from the axes of each dim of the arrays (operands, then perhaps results).

        The first array that splits a factor decides; an axis is given to one factor of an array only, the earlier one.
        A factor's length need not be a multiple of its axes' size: see `fitted`.
        """
        sizes = dict(self.sizes)
        found: dict[str, Axes] = {}
        arrays = zip(self.operands + self.results, specs)
        for dims, spec in sorted(arrays, key=lambda x: not any(self.first & {*dim} for dim in x[0])):
            for dim, axes in zip(dims, spec, strict=True):
                if any(factor in found for factor in dim) or all(map(self.is_whole, dim)):
                    continue
                rivals = set().union(*map(self.neighbours, dim)) - set(dim)
                taken = {axis for rival in rivals for axis in found.get(rival, ())}
                free = tuple(axis for axis in axes if axis not in taken)
                splittable = [factor for factor in dim if not self.is_whole(factor)]
                found |= {factor: share for factor, share in _split(splittable, free, sizes, mesh_shape) if share}
        return found

    def cut(self, arrays: Sequence[Digits | None]) -> list[Digits | None]:
        """The arrays' digits (see meshes.py), cut where a factor of a compound dim ends: 8 devices on 2 key heads of 4."""
        sizes = dict(self.sizes)

        def of_dim(dim: Dim, digits: tuple[Digit, ...]) -> tuple[Digit, ...]:
            left, parts = list(digits), []
            for factor in dim:
                length = 1 if self.is_whole(factor) else sizes.get(factor, 1)
                while left and length > 1 and (common := math.gcd(length, left[0][0])) > 1:
                    size, stride = left.pop(0)
                    parts.append((common, stride * (size // common)))
                    left[:0] = [(size // common, stride)] if size > common else []
                    length //= common
                if length > 1:
                    break
            return digits if left else tuple(parts)  # a cut that fits no factor helps nobody

        cut = lambda dims, digits: tuple(map(of_dim, dims, digits))
        return [
            None if digits is None else cut(dims, digits) for dims, digits in zip(self.operands + self.results, arrays)
        ]

    def fitted(self, factors: Mapping[str, Axes], mesh_shape: Mapping[str, int]) -> "Rule":
        """This rule with every factor as long as its axes need it: the lengths that are padded to.

        Key heads that the devices don't divide are not only padded but first repeated, r times each, and the queries of one
        key head cut into r parts: every device holds the key heads of its own queries, as it would have to anyway. The
        smallest r that leaves a device the fewest query heads is taken.
        """
        sizes = dict(self.sizes)
        parts = {f: math.prod(mesh_shape[a] for a in axes) for f, axes in factors.items()}
        k, g, devices = sizes.get("k", 1), sizes.get("g", 1), parts.get("k", 1)
        if k % devices:
            repeats = min(range(1, g + 1), key=lambda r: _ceil(k * r, devices) * _ceil(g, r))
            sizes["k"], sizes["g"] = k * repeats, _ceil(g, repeats)
        sizes |= {f: _ceil(sizes.get(f, 1), n) * n for f, n in parts.items()}
        return dataclasses.replace(self, sizes=tuple(sorted(sizes.items())))

    def evenly(
        self, names: Sequence[str], factors: Mapping[str, Axes], mesh_shape: Mapping[str, int]
    ) -> dict[str, Axes]:
        """`factors` without those of `names` that the axes don't divide.

        Inside the user's shard_map an array is one slice of the whole: padding at its end would stand amid the sequence, or
        amid the experts. Queries may be cut like keys, so keys are cut only where both divide.
        """
        sizes = dict(self.sizes)
        uneven = lambda f, axes: f in names and sizes.get(f, 1) % math.prod(mesh_shape[a] for a in axes)
        return {f: axes for f, axes in factors.items() if not uneven(f, axes) and not (f == "s" and uneven("t", axes))}

    def splits_a_compound_unevenly(self, factor: str, axes: Axes, mesh_shape: Mapping[str, int]) -> bool:
        """Whether the axes leave uneven parts of a factor that shares a dim with others; said, because it is gathered.

        XLA's partitioner pads a dim at its end, never inside.
        """
        sizes, parts = dict(self.sizes), math.prod(mesh_shape[a] for a in axes)
        dims = itertools.chain.from_iterable(self.operands + self.results)
        if sizes.get(factor, 1) % parts == 0 or not any(factor in dim and len(dim) > 1 for dim in dims):
            return False
        what = {"k": "key heads", "g": "query heads of a key head", "z": "groups of tokens"}[factor]
        warn_once(
            "gathered",
            f"{parts} devices on {axes} don't divide the {sizes.get(factor, 1)} {what}, which plain jax.jit gathers; "
            "ringmoe.jit pads them, and a number that the devices divide costs nothing",
        )
        return True


def spec_of(dims: Sequence[Dim], factors: Mapping[str, Axes]) -> PartitionSpec:
    """The PartitionSpec of an array with these dims when each factor is split over its axes."""
    entries = [tuple(itertools.chain.from_iterable(factors.get(f, ()) for f in dim)) for dim in dims]
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries))


def dividing(spec: PartitionSpec, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """`spec` with only as many axes of each dim as divide its length."""
    entries = []
    for axes, length in zip(axes_of(spec, len(shape)), shape):
        kept = list(axes)
        while length % math.prod(mesh_shape[a] for a in kept):
            kept.pop()
        entries.append(tuple(kept))
    return spec_of([(str(i),) for i in range(len(shape))], {str(i): axes for i, axes in enumerate(entries)})


def axes_of(spec: PartitionSpec, ndim: int) -> tuple[Axes, ...]:
    """The axes of each dim: a PartitionSpec with every entry a tuple, one for each of `ndim` dims."""
    entries = tuple(spec) + (None,) * (ndim - len(spec))
    return tuple(
        () if e is None or e is PartitionSpec.UNCONSTRAINED else (e,) if isinstance(e, str) else tuple(e)
        for e in entries
    )


@functools.cache
def make(
    family: str,
    operands: tuple[tuple[str, tuple[int, ...]], ...],
    results: tuple[str, ...],
    sizes: tuple[tuple[str, int], ...] = (),
    mapped: int = 0,
) -> Rule:
    """The rule of one call: `(name, shape)` of each operand and the results' names, as in `FAMILIES[family]`.

    `sizes` gives what no operand's shape tells alone (the length of a group). Every array has `mapped` more dims in front,
    the same ones: those of a `jax.vmap` that the op runs inside. A dim of length 1 that stands for a longer
    factor is a broadcast: it gets a factor of its own and is never split. A result that bears an operand's name is that
    operand's gradient (or successor) and has its dims. A factor of length 1 inside a compound dim is left out.
    """
    known = dict(sizes)
    texts = {name: text(family, name) for name in (*(name for name, _ in operands), *results)}
    num_batch = max(
        (len(shape) - mapped - len(_dims(texts[name], 0)) for name, shape in operands if "..." in texts[name]),
        default=0,
    )
    front = [(f"m{i}",) for i in range(mapped)]
    dims_of = {name: front + _dims(words, num_batch) for name, words in texts.items()}
    arrays = [(dims_of[name], shape) for name, shape in operands]
    for dims, shape in arrays:
        for dim, length in zip(dims, shape):
            if len(dim) == 1:
                known[dim[0]] = max(known.get(dim[0], 1), length)
    for dims, shape in arrays:
        for dim, length in zip(dims, shape):
            unknown = [f for f in dim if f not in known]
            if len(unknown) == 1 and length != 1:
                known[unknown[0]] = length // math.prod(known[f] for f in dim if f in known)
    named: dict[str, tuple[Dim, ...]] = {}
    whole: set[str] = set()

    def without_ones(dim: Dim) -> Dim:
        kept = tuple(f for f in dim if known.get(f, 1) != 1) or dim[:1]
        whole.update(set(dim) - set(kept))  # split elsewhere, it would be missed here
        return kept

    for (name, _), (dims, shape) in zip(operands, arrays):
        kept = list(map(without_ones, dims))
        for i, length in enumerate(shape):
            if length == 1 and known.get(kept[i][0], 1) > 1:
                kept[i] = (f"one{len(known)}",)
                known[kept[i][0]] = 1
                whole.update(kept[i])
            assert math.prod(known.get(f, 1) for f in kept[i]) == length, (name, shape, known)
        named[name] = tuple(kept)
    for name in results:
        if name not in named:
            named[name] = tuple(map(without_ones, dims_of[name]))
    rule = lambda names: tuple(named[name] for name in names)
    first = frozenset({"s"} if family.endswith(IN_PAGES) else ())  # a pool stays where it is
    return Rule(
        rule(name for name, _ in operands), rule(results), tuple(sorted(known.items())), frozenset(whole), first
    )


def text(family: str, name: str) -> str:
    """The rule string of an array."""
    name = re.sub("_(co)?tangent$", "", name)
    if own := OWN.fullmatch(name):
        return " ".join(("e", *(f"own{own[1]}d{i}" for i in range(1, int(own[2])))))
    return FAMILIES[family][name]


def _dims(text: str, num_batch: int) -> list[Dim]:
    """`"... t (k g)"` with two batch dims -> [("b0",), ("b1",), ("t",), ("k", "g")]."""
    words: list[Dim] = [tuple(word.strip("()").split()) for word in re.findall(r"\([^)]*\)|\S+", text)]
    if ("...",) in words:
        at = words.index(("...",))
        words[at : at + 1] = [(f"b{i}",) for i in range(num_batch)]
    return words


def _split(factors: Sequence[str], axes: Axes, sizes: Mapping[str, int], mesh_shape: Mapping[str, int]):
    """Pairs `(factor, axes)`: the axes of one dim handed to its factors, major to minor.

    A factor takes axes while they divide it; the next one starts only when it is split to single elements. Where that
    leaves axes over, the first factor takes all of them and will be padded.
    """
    left, shares = list(axes), []
    for factor in factors:
        share, length = [], sizes.get(factor, 1)
        while left and length % mesh_shape[left[0]] == 0:
            length //= mesh_shape[left[0]]
            share.append(left.pop(0))
        shares.append((factor, tuple(share)))
        if length > 1:
            break
    return [(factors[0], axes)] if left else shares


def grow(x: jax.Array, dims: Sequence[Dim], old: Mapping[str, int], new: Mapping[str, int], fill=0) -> jax.Array:
    """`x`, whose dims have the lengths `old`, brought to the lengths `new` of a fitted rule: padded with `fill`."""
    for axis, dim in enumerate(dims):
        if not changes(dim, old, new):
            continue
        shape, repeats, length = x.shape, _repeats(dim, old, new), math.prod(new.get(f, 1) for f in dim)
        if repeats > 1 and dim == ("k", "g"):  # k key heads of g queries -> k r of ceil(g / r)
            x = x.reshape(*shape[:axis], old["k"], old["g"], *shape[axis + 1 :])
            x = _pad(x, axis + 1, repeats * new["g"], fill)
            x = x.reshape(*shape[:axis], old["k"] * repeats * new["g"], *shape[axis + 1 :])
        elif repeats > 1:
            x = jnp.repeat(x, repeats, axis)
        x = _pad(x, axis, length, fill)
    return x


def shrink(x: jax.Array, dims: Sequence[Dim], old: Mapping[str, int], new: Mapping[str, int]) -> jax.Array:
    """The way back from `grow`: padding is cut off, and what repeated key heads gave is summed."""
    for axis, dim in enumerate(dims):
        if not changes(dim, old, new):
            continue
        length, repeats = math.prod(old.get(f, 1) for f in dim), _repeats(dim, old, new)
        shape, cut = x.shape, functools.partial(jax.lax.slice_in_dim, start_index=0)
        if repeats == 1:
            x = cut(x, limit_index=length, axis=axis)
            continue
        group = new["g"] if dim == ("k", "g") else 1
        x = cut(x, limit_index=old["k"] * repeats * group, axis=axis)
        x = x.reshape(*shape[:axis], old["k"], repeats * group, *shape[axis + 1 :])
        if dim == ("k", "g"):
            x = cut(x, limit_index=old["g"], axis=axis + 1)
            x = x.reshape(*shape[:axis], length, *shape[axis + 1 :])
        else:
            x = jnp.sum(x, axis + 1, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
    return x


def changes(dim: Dim, old: Mapping[str, int], new: Mapping[str, int]) -> bool:
    """Whether `grow` changes a dim of these factors."""
    return any(old.get(f, 1) != new.get(f, 1) for f in dim)


def _repeats(dim: Dim, old: Mapping[str, int], new: Mapping[str, int]) -> int:
    """How often each key head of this dim is repeated: as often as its queries are cut."""
    if "k" not in dim or old.get("g", 1) == new.get("g", 1):
        return 1
    return next(r for r in range(2, old["g"] + 1) if _ceil(old["g"], r) == new["g"])


def _pad(x, axis: int, length: int, fill):
    """`x` with `fill` after the end of one axis."""
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)


def _ceil(n: int, parts: int) -> int:
    return -(-n // parts)
