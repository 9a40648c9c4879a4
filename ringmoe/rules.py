"""Each op's sharding rule, written once: which named factors every dimension of every array is made of.

`"... t (k g) h"` reads like einops: leading batch dims, query tokens, heads = key heads x group, head dim. From these
strings come the text that Shardy reads, the mesh axes of each factor, and the PartitionSpec of each operand and result.
A factor that is never split (`whole`) may be sharded in what the caller passes; it is gathered first.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from ringmoe.errors import check, warn_once

Axes = tuple[str, ...]  # mesh axes that split one dim or factor, major to minor
Dim = tuple[str, ...]  # the factors of one dim, major to minor

ATTENTION = {
    "query": "... t (k g) h",
    "key": "... s k h",
    "value": "... s k h",
    "bias": "... (k g) t u",
    "mask": "... (k g) t u",
    "query_lengths": "...",
    "key_lengths": "...",
    "query_segments": "... t",
    "key_segments": "... u",
    "output": "... t (k g) h",
    "output_cotangent": "... t (k g) h",
    "lse": "... t (k g)",
    "delta": "... t (k g)",
}
"""t query tokens, s key tokens, k key heads, g query heads of one key head, h head dim. `u` is s again in the arrays that
each device keeps whole along the keys, because the columns it needs change from hop to hop."""

EXPERTS = {
    "tokens": "... (z i) d",
    "tokens_cotangent": "... (z i) d",
    "expert": "... (z i) c",
    "slot": "... (z i) c",
    "weight": "... (z i) c",
    "w_in": "e d f",
    "w_gate": "e d f",
    "w_out": "e f d",
    "rows": "e ... z r d",
}
"""z groups of i consecutive tokens, d model dim, c choices of a token, e experts, f hidden dim, r rows an expert takes of a
group."""

FAMILIES = {"attention": ATTENTION, "experts": EXPERTS}
MANUAL = {"attention": ("t", "s"), "experts": ("z", "e")}
"""The factors that a call's `axis_name` splits, inside the user's own shard_map."""

WHOLE = frozenset({"h", "u", "i", "d", "c", "r"})
"""Factors no schedule splits."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The factors of each dim of each operand and result, and the factors' sizes."""

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: tuple[tuple[str, int], ...]

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

    def factor_axes(
        self, specs: Sequence[Sequence[Axes]], mesh_shape: Mapping[str, int], strict: bool = True
    ) -> dict[str, Axes]:
        """The mesh axes of each factor, from the axes of each dim of the arrays (operands, then perhaps results).

        The first array that splits a factor decides; an axis is given to one factor of an array only, the earlier one.
        Where a factor's size isn't a multiple of its axes' size: raises ValueError, or, not `strict`, leaves it whole
        and warns.
        """
        sizes = dict(self.sizes)
        arrays = self.operands + self.results
        found: dict[str, Axes] = {}
        for dims, spec in zip(arrays, specs):
            for dim, axes in zip(dims, spec, strict=True):
                lone_group = dim == ("i",)  # refused when it is cut, where other whole factors are gathered
                if any(factor in found for factor in dim) or (WHOLE.issuperset(dim) and not lone_group):
                    continue
                rivals = set().union(*map(self.neighbours, dim)) - set(dim)
                taken = {axis for rival in rivals for axis in found.get(rival, ())}
                free = tuple(axis for axis in axes if axis not in taken)
                shares = _split(dim, free, sizes, mesh_shape, strict)
                found |= {factor: share for factor, share in shares if share and factor not in WHOLE}
        return found


def spec_of(dims: Sequence[Dim], factors: Mapping[str, Axes]) -> PartitionSpec:
    """The PartitionSpec of an array with these dims when each factor is split over its axes."""
    entries = [tuple(itertools.chain.from_iterable(factors.get(f, ()) for f in dim)) for dim in dims]
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries))


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
) -> Rule:
    """The rule of one call: `(name, shape)` of each operand and the results' names, as in `FAMILIES[family]`.

    `sizes` gives what no operand's shape tells alone (the length of a group). A dim of length 1 that stands for a longer
    factor is a broadcast: it gets a factor of its own and is never split. A result that bears an operand's name is that
    operand's gradient (or successor) and has its dims. A factor of length 1 inside a compound dim is left out.
    """
    table = FAMILIES[family]
    known = dict(sizes)
    num_batch = max(
        (len(shape) - len(_dims(table[name], 0)) for name, shape in operands if "..." in table[name]), default=0
    )
    arrays = [(_dims(table[name], num_batch), shape) for name, shape in operands]
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
    for (name, _), (dims, shape) in zip(operands, arrays):
        kept = [tuple(f for f in dim if known.get(f, 1) != 1) or dim[:1] for dim in dims]
        for i, length in enumerate(shape):
            if length == 1 and known.get(kept[i][0], 1) > 1:
                kept[i] = (f"one{len(known)}",)
                known[kept[i][0]] = 1
            assert math.prod(known.get(f, 1) for f in kept[i]) == length, (name, shape, known)
        named[name] = tuple(kept)
    for name in results:
        if name not in named:
            dims = _dims(table[name], num_batch)
            named[name] = tuple(tuple(f for f in dim if known.get(f, 1) != 1) or dim[:1] for dim in dims)
    rule = lambda names: tuple(named[name] for name in names)
    return Rule(rule(name for name, _ in operands), rule(results), tuple(sorted(known.items())))


def _dims(text: str, num_batch: int) -> list[Dim]:
    """`"... t (k g)"` with two batch dims -> [("b0",), ("b1",), ("t",), ("k", "g")]."""
    words: list[Dim] = [tuple(word.strip("()").split()) for word in re.findall(r"\([^)]*\)|\S+", text)]
    if ("...",) in words:
        at = words.index(("...",))
        words[at : at + 1] = [(f"b{i}",) for i in range(num_batch)]
    return words


NOUNS = {"t": "query tokens", "s": "keys", "e": "experts", "f": "hidden units"}


def _split(dim: Dim, axes: Axes, sizes: Mapping[str, int], mesh_shape: Mapping[str, int], strict: bool):
    """Pairs `(factor, axes)`: the axes of one dim handed to its factors, major to minor.

    A factor takes axes while they divide it; the next one starts only when it is split to single elements.
    """
    left, shares = list(axes), []
    for factor in dim:
        share, length = [], sizes.get(factor, 1)
        while left and factor not in WHOLE and length % mesh_shape[left[0]] == 0:
            length //= mesh_shape[left[0]]
            share.append(left.pop(0))
        shares.append((factor, tuple(share)))
        if length > 1:
            break
    if not left:
        return shares
    length, parts = math.prod(sizes.get(f, 1) for f in dim), math.prod(mesh_shape[a] for a in axes)
    if dim[:2] == ("k", "g"):
        warn_once(
            "heads gathered",
            f"{parts} devices on {axes} divide neither the {sizes['k']} key heads nor one head's "
            "group of queries, so the heads are gathered; choose a number of devices that divides the key heads",
        )
        return shares
    if dim[-1] == "i":
        message = (
            f"{length} tokens over mesh axes {axes} leave {length / parts:g} tokens a device, expected whole groups of "
            f"{sizes['i']}: choose a group_size that divides the tokens of one device"
        )
    else:
        message = (
            f"{length} {NOUNS.get(dim[0], 'elements')} are sharded over mesh axes {axes}, {parts} devices, expected a "
            "multiple of that: pad that dim, or shard it over fewer devices"
        )
    check(not strict, message)
    warn_once("gathered", message)
    return shares
