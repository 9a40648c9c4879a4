"""How attention is spread over a mesh."""

import dataclasses
import functools
import math

from ringmoe.errors import check
from ringmoe.masks import Band
from ringmoe.meshes import Axes
from ringmoe.plan import cost
from ringmoe.plan.base import Factors, Ring, freeze
from ringmoe.rules import Rule

EXCHANGES = ("auto", "ring", "all_gather")
LEAST, TILE = 8, 128  # consecutive tokens that a kernel works on; those of a TPU kernel's block


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """How one attention call is spread over the mesh."""

    factors: Factors  # the axes that really split each factor: the shard_map's specs come from here
    exchange: str  # "local" | "ring" | "all_gather"
    band: Band  # the call's, with the lengths of the sequences where they are padded
    axes: Axes  # mesh axes that K and V are exchanged over, major to minor
    ring: Ring  # one device where nothing travels
    size: int  # devices on those axes
    hops: int  # key blocks that a device meets, its own included
    ways: int  # parts of a block, each of which goes its own way round the ring
    pieces: int  # 2: balanced places, two chunks a device
    query_axes: Axes  # mesh axes that split the queries
    key_sum_axes: Axes  # axes over which the shares of dK and dV are summed, beside the ring's own hops
    bias_sum_axes: Axes  # axes over which the shares of dbias are summed
    reason: str
    wire_bytes: int  # sent per device by this op; what is one number a row aside


@functools.cache
def make(
    rule: Rule,
    factors: Factors,
    mesh_shape: tuple[tuple[str, int], ...],
    band: Band,
    exchange: str,
    itemsize: int,
    bias: int | None = None,
    owed_itemsize: int = 0,
    device_kind: str = "",
    may_balance: bool = True,
    in_tiles: bool = False,
) -> AttentionPlan:
    """Chooses the exchange.

    Args:
      rule: query, key and value are its first operands; `bias` is the index of the bias among them, or None.
      factors: the axes a door found for each factor. mesh_shape: every axis and its size.
      exchange: what the caller asked for, one of EXCHANGES. itemsize: bytes of one element of K and V; owed_itemsize: of
        dK and dV on their way to their owner, in a backward pass. device_kind: as JAX names it.
      may_balance: whether rows may be swapped between devices: not where arrays of queries by keys would have to follow.
      in_tiles: whether the kernel will be a TPU's, as far as is known.

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
        kind, why = _ring_or_gather(rule, split, key_axes)
        check(
            kind == "ring" or exchange != "ring",
            f"exchange='ring' was asked for, but {why}: shard queries and keys over the same axes, or use exchange='auto'",
        )
    if kind == "ring":
        split["t"] = key_axes
    rule = rule.fitted(split, length)
    padded = dict(rule.sizes)
    hops = _hops(band, size, padded["t"] // size, padded["s"] // size) if kind == "ring" else 1
    band = dataclasses.replace(
        band,
        queries=sizes["t"] if padded["t"] > sizes["t"] else None,
        keys=sizes["s"] if padded["s"] > sizes["s"] else None,
    )
    ways, pieces = 1, 1
    if kind == "ring" and hops == size:
        causal = band.right == 0 and band.left is None and padded["t"] == padded["s"]
        least = TILE if in_tiles else LEAST
        ways, pieces = _cut(device_kind, size, padded["s"] // size, causal and may_balance, least)
    axes = lambda dims: tuple(a for dim in dims for f in dim for a in split.get(f, ()))
    query, key = axes(rule.operands[0]), axes(rule.operands[1])
    own = () if kind == "all_gather" else split.get("s", ())
    shared = {a for a in key if a not in split.get("s", ())} | set(own)
    on_one = lambda i: math.prod(rule.shape(rule.operands[i])) // math.prod(length[a] for a in axes(rule.operands[i]))
    block = 2 * on_one(1)
    swapped = (3 * on_one(0) + 2 * block if owed_itemsize else 2 * on_one(0) + block) // 2 * (pieces - 1)
    sends, returns = {"local": (0, 0), "ring": (hops - 1, hops), "all_gather": (size - 1, size - 1)}[kind]
    return AttentionPlan(
        factors=freeze(split),
        exchange=kind,
        band=band,
        axes=key_axes if size > 1 else (),
        ring=Ring.make(key_axes, length) if kind == "ring" else Ring(),
        size=size,
        hops=hops,
        ways=ways,
        pieces=pieces,
        query_axes=split.get("t", ()),
        key_sum_axes=tuple(a for a in query if a not in shared),
        bias_sum_axes=() if bias is None else tuple(a for a in query if a not in axes(rule.operands[bias])),
        reason=why + "; two chunks a device, from both ends: each has as much to do" * (pieces - 1),
        wire_bytes=block * (sends * itemsize + returns * owed_itemsize) + swapped * itemsize,
    )


def _ring_or_gather(rule: Rule, split, key_axes: Axes) -> tuple[str, str]:
    query_axes = split.get("t", ())
    if query_axes == key_axes:
        return "ring", "queries and keys are sharded over the same axes"
    busy = {axis for f in rule.neighbours("t") for axis in split.get(f, ())}
    if not query_axes and not busy & set(key_axes):
        return "ring", "keys are sharded; queries are cut alike, which moves nothing"
    return "all_gather", f"keys are sharded over {key_axes} but queries over {query_axes or 'no axis'}"


def _cut(device_kind: str, size: int, keys: int, balance: bool, least: int) -> tuple[int, int]:
    """(ways, pieces) of the blocks of a ring that meets all of them: what a window cuts short comes from one side alone.

    Two ways where a device has a link to either neighbour, of whom there are two: to a GPU's switch all links carry what goes
    to one. Two pieces, balanced places, where later devices would see more; each of at least so many keys.
    """
    pieces = 2 if balance and keys % (2 * least) == 0 else 1
    ways = 2 if cost.family(device_kind) != "gpu" and size > 2 and keys % (2 * pieces * least) == 0 else 1
    return ways, pieces


def _hops(band: Band, size: int, queries: int, keys: int) -> int:
    """Key blocks that any device needs, walking from its own one to earlier ones.

    With `right <= 0` and a finite `left`, queries `[i t, i t + t)` see no key before `i t - left`: the ring stops there.
    """
    if band.right != 0 or band.left is None or queries != keys:
        return size
    return min(size, 1 + -(-band.left // keys))
