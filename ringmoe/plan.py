"""Plans: which exchange an op uses, over which axes, and why. Frozen data without arrays, made by cached pure functions.

A plan is made from the op's sharding rule and the mesh axes of each of its factors (rules.py), whichever door found them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from ringmoe.errors import check
from ringmoe.masks import Band
from ringmoe.rules import Axes, Rule

EXCHANGES = ("auto", "ring", "all_gather")

Factors = tuple[tuple[str, Axes], ...]  # a dict of factor -> axes, sorted, hashable


def freeze(factors: Mapping[str, Axes]) -> Factors:
    """The hashable form of a factor -> axes mapping."""
    return tuple(sorted((factor, axes) for factor, axes in factors.items() if axes))


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """How one attention call is spread over the mesh."""

    factors: Factors  # the axes that really split each factor: the shard_map's specs come from here
    exchange: str  # "local" | "ring" | "all_gather"
    axes: Axes  # mesh axes that K and V are exchanged over, major to minor
    size: int  # devices on those axes
    hops: int  # key blocks that a device meets, its own included
    query_axes: Axes  # mesh axes that split the queries
    key_sum_axes: Axes  # axes over which the shares of dK and dV are summed, beside the ring's own hops
    bias_sum_axes: Axes  # axes over which the shares of dbias are summed
    reason: str
    wire_bytes: int  # sent per device, forward, K and V only

    @property
    def ring_size(self) -> int:
        """Devices on the ring: 1 where nothing travels."""
        return self.size if self.exchange == "ring" else 1


@functools.cache
def attention(
    rule: Rule, factors: Factors, mesh_shape: tuple[tuple[str, int], ...], band: Band, exchange: str, itemsize: int,
    bias: int | None = None,
) -> AttentionPlan:
    """Chooses the exchange.

    Args:
      rule: query, key and value are its first operands; `bias` is the index of the bias among them, or None.
      factors: the axes a door found for each factor. mesh_shape: every axis and its size.
      exchange: what the caller asked for, one of EXCHANGES. itemsize: bytes of one element of K and V.

    Raises ValueError where the caller asked for a ring that these shardings can't have.
    """
    sizes, split, length = dict(rule.sizes), dict(factors), dict(mesh_shape)
    key_axes = split.get("s", ())
    size = math.prod(length[a] for a in key_axes)
    if size == 1:
        kind, why = "local", "keys are whole on every device: nothing to exchange"
    elif exchange == "all_gather":
        kind, why = "all_gather", "asked for"
    else:
        kind, why = _ring_or_gather(rule, split, sizes, key_axes, size)
        check(
            kind == "ring" or exchange != "ring",
            f"exchange='ring' was asked for, but {why}: shard queries and keys over the same axes, or use exchange='auto'",
        )
    if kind == "ring":
        split["t"] = key_axes
    hops = _hops(band, size, sizes["t"] // size, sizes["s"] // size) if kind == "ring" else 1
    axes = lambda dims: tuple(a for dim in dims for f in dim for a in split.get(f, ()))
    query, key = axes(rule.operands[0]), axes(rule.operands[1])
    own = () if kind == "all_gather" else split.get("s", ())
    shared = {a for a in key if a not in split.get("s", ())} | set(own)
    block_bytes = 2 * itemsize * math.prod(rule.shape(rule.operands[1])) // math.prod(length[a] for a in key)
    return AttentionPlan(
        factors=freeze(split),
        exchange=kind,
        axes=key_axes if size > 1 else (),
        size=size,
        hops=hops,
        query_axes=split.get("t", ()),
        key_sum_axes=tuple(a for a in query if a not in shared),
        bias_sum_axes=() if bias is None else tuple(a for a in query if a not in axes(rule.operands[bias])),
        reason=why,
        wire_bytes={"local": 0, "ring": hops - 1, "all_gather": size - 1}[kind] * block_bytes,
    )


def _ring_or_gather(rule: Rule, split, sizes, key_axes: Axes, size: int) -> tuple[str, str]:
    query_axes = split.get("t", ())
    if query_axes == key_axes:
        return "ring", "queries and keys are sharded over the same axes"
    busy = {axis for f in rule.neighbours("t") for axis in split.get(f, ())}
    if not query_axes and not busy & set(key_axes) and sizes["t"] % size == 0:
        return "ring", "keys are sharded; queries are cut alike, which moves nothing"
    return "all_gather", f"keys are sharded over {key_axes} but queries over {query_axes or 'no axis'}"


def _hops(band: Band, size: int, queries: int, keys: int) -> int:
    """Key blocks that any device needs, walking from its own one to earlier ones.

    With `right <= 0` and a finite `left`, queries `[i t, i t + t)` see no key before `i t - left`: the ring stops there.
    """
    if band.right != 0 or band.left is None or queries != keys:
        return size
    return min(size, 1 + -(-band.left // keys))
