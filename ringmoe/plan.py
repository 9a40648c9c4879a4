"""Plans: which exchange an op uses, over which axes, and why. Frozen data without arrays, made by cached pure functions.

A plan is made from the op's sharding rule and the mesh axes of each of its factors (rules.py), whichever door found them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from ringmoe.errors import check, warn_once
from ringmoe.masks import Band
from ringmoe.meshes import Axes
from ringmoe.rules import Rule

EXCHANGES = ("auto", "ring", "all_gather")
HIDING = 8192  # FLOPs a byte on the wire from which on matmuls hide it: about what a TPU does while a link carries one
MOST_PIECES = 16  # each is a copy of the experts' matmuls in the program
SORTING = (
    1.5  # room over rows asked, were routing even, from which on rows are sorted: what is empty costs more than sorting
)
WINDOW = (
    1.25  # rows a device works on at once over what comes to it, were routing even: more is memory, less another turn
)

Factors = tuple[tuple[str, Axes], ...]  # a dict of factor -> axes, sorted, hashable


def freeze(factors: Mapping[str, Axes]) -> Factors:
    """The hashable form of a factor -> axes mapping."""
    return tuple(sorted((factor, axes) for factor, axes in factors.items() if axes))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Devices in a circle: place i is device `devices[i]` of those on the axes, counted in the mesh's order."""

    axes: Axes = ()  # major to minor: a device's index along them is its place
    mesh_order: Axes = ()  # the same axes as the mesh orders them, which is how ppermute counts devices
    devices: tuple[int, ...] = (0,)

    @classmethod
    def make(cls, axes: Axes, mesh_shape: Mapping[str, int]) -> "Ring":
        """The circle that follows the blocks of a dim that is split over `axes`."""
        ordered = tuple(a for a in mesh_shape if a in axes)
        numbers = np.arange(math.prod(mesh_shape[a] for a in axes)).reshape([mesh_shape[a] for a in ordered])
        by_place = numbers.transpose([ordered.index(a) for a in axes]).reshape(-1)
        return cls(axes, ordered, tuple(by_place.tolist()))

    @property
    def size(self) -> int:
        return len(self.devices)


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
    query_axes: Axes  # mesh axes that split the queries
    key_sum_axes: Axes  # axes over which the shares of dK and dV are summed, beside the ring's own hops
    bias_sum_axes: Axes  # axes over which the shares of dbias are summed
    reason: str
    wire_bytes: int  # sent per device by this op


@functools.cache
def attention(
    rule: Rule,
    factors: Factors,
    mesh_shape: tuple[tuple[str, int], ...],
    band: Band,
    exchange: str,
    itemsize: int,
    bias: int | None = None,
    owed_itemsize: int = 0,
) -> AttentionPlan:
    """Chooses the exchange.

    Args:
      rule: query, key and value are its first operands; `bias` is the index of the bias among them, or None.
      factors: the axes a door found for each factor. mesh_shape: every axis and its size.
      exchange: what the caller asked for, one of EXCHANGES. itemsize: bytes of one element of K and V; owed_itemsize: of
        dK and dV on their way to their owner, in a backward pass.

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
    axes = lambda dims: tuple(a for dim in dims for f in dim for a in split.get(f, ()))
    query, key = axes(rule.operands[0]), axes(rule.operands[1])
    own = () if kind == "all_gather" else split.get("s", ())
    shared = {a for a in key if a not in split.get("s", ())} | set(own)
    block = 2 * math.prod(rule.shape(rule.operands[1])) // math.prod(length[a] for a in key)
    sends, returns = {"local": (0, 0), "ring": (hops - 1, hops), "all_gather": (size - 1, size - 1)}[kind]
    return AttentionPlan(
        factors=freeze(split),
        exchange=kind,
        band=band,
        axes=key_axes if size > 1 else (),
        ring=Ring.make(key_axes, length) if kind == "ring" else Ring(),
        size=size,
        hops=hops,
        query_axes=split.get("t", ()),
        key_sum_axes=tuple(a for a in query if a not in shared),
        bias_sum_axes=() if bias is None else tuple(a for a in query if a not in axes(rule.operands[bias])),
        reason=why,
        wire_bytes=block * (sends * itemsize + returns * owed_itemsize),
    )


def _ring_or_gather(rule: Rule, split, key_axes: Axes) -> tuple[str, str]:
    query_axes = split.get("t", ())
    if query_axes == key_axes:
        return "ring", "queries and keys are sharded over the same axes"
    busy = {axis for f in rule.neighbours("t") for axis in split.get(f, ())}
    if not query_axes and not busy & set(key_axes):
        return "ring", "keys are sharded; queries are cut alike, which moves nothing"
    return "all_gather", f"keys are sharded over {key_axes} but queries over {query_axes or 'no axis'}"


def _hops(band: Band, size: int, queries: int, keys: int) -> int:
    """Key blocks that any device needs, walking from its own one to earlier ones.

    With `right <= 0` and a finite `left`, queries `[i t, i t + t)` see no key before `i t - left`: the ring stops there.
    """
    if band.right != 0 or band.left is None or queries != keys:
        return size
    return min(size, 1 + -(-band.left // keys))


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """How one expert layer is spread over a mesh.

    Three kinds of axes shard experts or their hidden dim:
    an exchange axis shards experts and tokens: rows travel to their experts and back by all-to-all;
    an expert axis that doesn't shard tokens: every device serves its own experts, the outputs are summed;
    a hidden axis shards F: every device computes its part of every row, the outputs are summed.

    Attributes:
        num_experts: E, or what it is padded to.
        rows: r, room for what a device may have for one expert or, sorted, in all: no more can be asked for.
        sorted: rows lie tightly by expert, and only those are multiplied; else every expert has its own room.
        window, most: of sorted rows that travel, how many a device takes at once, and how many may come to it.
        expert_axes: (axis, size) of the axes that shard E, major to minor; the product of sizes divides E.
        exchange_axes: those of them that also shard tokens, in the order of expert_axes.
        token_axes: all axes that shard tokens (batch or sequence).
        hidden_axes: axes that shard F; neither token nor expert axes.
        reason: why this plan, in words, for `explain`.
        wire_bytes: sent per device; of sorted rows, as many as there are when routing is even.
        ring: the devices that exchange, where rows travel in pieces during the work on others; one device: all at once.
        factors: the axes that split each factor, for the shard_map's specs.
    """

    num_experts: int
    rows: int = 0
    sorted: bool = False
    window: int = 0
    most: int = 0
    expert_axes: tuple[tuple[str, int], ...] = ()
    exchange_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    hidden_axes: tuple[str, ...] = ()
    reason: str = ""
    wire_bytes: int = 0
    ring: Ring = Ring()
    factors: Factors = ()

    def __post_init__(self):
        experts = [axis for axis, _ in self.expert_axes]
        assert self.num_experts % math.prod(size for _, size in self.expert_axes) == 0, self
        assert list(self.exchange_axes) == [axis for axis in experts if axis in self.token_axes], self
        assert not set(self.hidden_axes) & {*experts, *self.token_axes}, self

    @property
    def sum_axes(self) -> tuple[str, ...]:
        """Axes over which outputs (and dx, dweight) are summed: expert axes without exchange, and hidden axes."""
        own = (axis for axis, _ in self.expert_axes if axis not in self.exchange_axes)
        return (*own, *self.hidden_axes)

    @property
    def weight_sum_axes(self) -> tuple[str, ...]:
        """Axes over which weight gradients are summed: token axes that don't exchange, so each saw its own tokens only."""
        return tuple(axis for axis in self.token_axes if axis not in self.exchange_axes)

    @property
    def num_exchange(self) -> int:
        """Devices among which one device's rows are exchanged."""
        return math.prod(size for axis, size in self.expert_axes if axis in self.exchange_axes)

    @property
    def at_once(self) -> "ExpertPlan":
        """The plan with one window for all that may come: no loop, whose turns depend on the routing."""
        return dataclasses.replace(self, window=self.most)

    @property
    def exchange(self) -> str:
        """What moves: "all_to_all" or "pieces", "sum", both, or "local"."""
        travel = "pieces" if self.ring.size > 1 else "all_to_all"
        kinds = (travel,) * bool(self.exchange_axes) + ("sum",) * bool(self.sum_axes)
        return " + ".join(kinds) or "local"

    @property
    def axes(self) -> Axes:
        """The axes that it moves over."""
        return (*self.exchange_axes, *self.sum_axes)


@functools.cache
def experts(
    rule: Rule,
    factors: Factors,
    mesh_shape: tuple[tuple[str, int], ...],
    capacity: int,
    group_size: int,
    itemsize: int,
    exchanges: int = 2,
    may_sort: bool = True,
) -> ExpertPlan:
    """Where rows go: to the experts' devices over axes that also shard tokens; else outputs are summed.

    `rule` is that of an op on "tokens" (or "rows"), `factors` what a door found. Weights sharded over the model dim, or
    over the hidden dim along an axis that shards tokens or experts, are gathered first. `exchanges`: how often all rows
    travel, 2 forward (there and back), 3 backward (x and dy there, dx back); the weights' gradients are not counted. Forward
    they may travel in pieces; backward each piece would add to the weights' gradients, which costs more than it hides.
    `may_sort`: whether the kernel takes sorted rows.
    """
    split, length = dict(factors), dict(mesh_shape)
    token_axes = tuple(a for f in sorted(split) if _of_tokens(f) for a in split[f])
    expert_axes = split.get("e", ())
    split["f"] = tuple(a for a in split.get("f", ()) if a not in (*token_axes, *expert_axes))
    exchange = tuple(a for a in expert_axes if a in token_axes)
    own = tuple(a for a in expert_axes if a not in token_axes)
    given, sizes = dict(rule.sizes), dict(rule.fitted(split, length).sizes)
    if sizes.get("z", 1) > given.get("z", 1):
        warn_once(
            "groups padded",
            f"{given.get('z', 1)} groups of {given['i']} tokens over mesh axes {split['z']}, and their rows lie by group: some "
            f"devices hold nothing but padding up to {sizes['z']} groups; choose a group_size that divides the tokens of one "
            "device",
        )
    splits = lambda axes: math.prod(length[a] for a in axes)
    tokens = math.prod(n for f, n in sizes.items() if _of_tokens(f)) // splits(token_axes)
    consecutive, here = sizes.get("t", 1) // splits(split.get("t", ())), sizes["e"] // splits(expert_axes)
    room = _most_rows(given, tokens, consecutive, capacity, group_size) if "t" in sizes else 0
    in_order = may_sort and sizes["e"] * room > SORTING * tokens * sizes["c"]
    asked = -(
        -tokens * sizes["c"] // splits(own)
    )  # rows that a device sends, and that come to it, when routing is even
    rows, window, most = (
        _sorted_rows(tokens, sizes["c"], here, room, splits(exchange), asked) if in_order else (room, 0, 0)
    )
    hides = (
        exchanges == 2 and not in_order and _hides(splits(exchange), sizes.get("f", 0) // splits(split["f"]), itemsize)
    )
    ring = Ring.make(exchange, length) if hides else Ring()
    how = f", in pieces: matmuls of hidden dim {sizes['f']} outlast the wire" if hides else ""
    why = [f"experts and tokens are both sharded over {exchange}: rows travel to their experts{how}"] * bool(exchange)
    why += [f"experts are sharded over {own}, tokens are not: each device serves its own experts"] * bool(own)
    why += [f"the hidden dim is sharded over {split['f']}: partial outputs"] * bool(split["f"])
    why = why or ["experts are whole on every device: nothing moves"]
    why += [f"rows are sorted by expert: one may take {room} of {tokens} tokens"] * in_order
    why += [f"only rows travel, {window} at a time: bytes are of even routing"] * (in_order and bool(exchange))
    sent = (asked if in_order else splits(exchange) * rows * here) * sizes.get("d", 1) * itemsize
    summed = tokens * sizes.get("d", 1) * max(itemsize, 4)
    parts = splits((*own, *split["f"]))
    return ExpertPlan(
        num_experts=sizes["e"],
        rows=rows,
        sorted=in_order,
        window=window,
        most=most,
        expert_axes=tuple((a, length[a]) for a in expert_axes),
        exchange_axes=exchange,
        token_axes=token_axes,
        hidden_axes=split["f"],
        reason="; ".join(why),
        wire_bytes=exchanges * sent * (splits(exchange) - 1) // splits(exchange) + 2 * summed * (parts - 1) // parts,
        ring=ring,
        factors=freeze(split),
    )


def _sorted_rows(tokens: int, choices: int, here: int, room: int, devices: int, asked: int) -> tuple[int, int, int]:
    """(rows, window, most) of the plan for a device with `here` experts that takes up to `room` of the `tokens` for each."""
    of = lambda experts: min(tokens * min(choices, experts), experts * room)
    if devices == 1:
        return of(here), 0, 0
    wanted, most = math.ceil(WINDOW * asked), devices * of(here)
    step = 256 if wanted > 256 else 8  # rows of a matmul's tile, or of a register
    return of(here * devices), min(most, -(-wanted // step) * step), most


def _of_tokens(factor: str) -> bool:
    """Whether it counts tokens: sequences, tokens of one, or groups of them and what each has."""
    return factor in ("t", "z", "i") or re.fullmatch(r"b\d+", factor) is not None


def _most_rows(given: Mapping[str, int], tokens: int, consecutive: int, capacity: int, group_size: int) -> int:
    """How many of a device's `tokens` one expert may take: `capacity` of every group that the device has any of.

    `consecutive` tokens of a sequence begin anywhere in a group, and a group may be larger than a sequence; in all there are
    as many as the `given` lengths of the call make.
    """
    steps = math.gcd(consecutive, group_size, given["t"])
    touched = 1 - (steps - consecutive) // group_size
    groups = -(-math.prod(n for f, n in given.items() if _of_tokens(f)) // group_size)
    return min(tokens, tokens // consecutive * min(consecutive, touched * capacity), groups * capacity)


def _hides(devices: int, hidden: int, itemsize: int) -> bool:
    """Whether the matmuls hide rows that travel in pieces: 6 f d FLOPs are done on a row between 2 d numbers on the wire, so
    the balance is one of f alone, what one device has of the hidden dim."""
    return 1 < devices <= MOST_PIECES and 3 * hidden >= HIDING * itemsize
