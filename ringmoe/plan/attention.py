"""How attention is spread over a mesh."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ringmoe.errors import check
from ringmoe.masks import Band
from ringmoe.meshes import Axes, of_mesh
from ringmoe.plan import cost
from ringmoe.plan.base import Factors, Group, Ring, freeze
from ringmoe.plan.load import Load
from ringmoe.rules import Rule

EXCHANGES = ("auto", "ring", "all_gather", "all_to_all", "merge")
MOST_GATHERED = 1 / 32  # of a device's memory, for keys and values that "auto" gathers
LEAST, TILE = 8, 128  # consecutive tokens that a kernel works on; those of a Pallas kernel's block


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """How one attention call is spread over the mesh."""

    factors: Factors  # the axes that really split each factor: the shard_map's specs come from here
    exchange: str  # "local" | "ring" | "all_gather" | "all_to_all" | "all_to_all + ring" | "merge"
    band: Band  # the call's, with the lengths of the sequences where they are padded
    axes: Axes  # mesh axes that K and V are exchanged over, major to minor
    ring: Ring  # the devices whose blocks are met one after another; one device where nothing travels
    size: int  # devices on `axes`
    hops: int  # key blocks that a device meets, its own included
    ways: int  # that blocks travel round the ring
    parts: int  # of a block, each of which goes its own way; 1 where the whole block goes one way, or both
    own_parts: int  # of its own block, worked on one by one: backward the second while what is owed goes home
    pieces: int  # 2: balanced places, two chunks a device
    query_axes: Axes  # mesh axes that split the queries
    rows: Ring  # whose places are the blocks of queries, during the work
    heads: Group  # devices that split heads instead of tokens during the work: the last ones of the keys'
    joint_axes: Axes  # the last of `query_axes`, along which queries are gathered for the work
    joint_parts: int  # devices on those
    key_sum_axes: Axes  # axes over which the shares of dK and dV are summed, beside the ring's own hops
    bias_sum_axes: Axes  # axes over which the shares of dbias are summed
    reason: str
    wire_bytes: int  # sent per device by this op; what is one number a row aside
    remote: bool = False  # blocks travel by remote DMA of our own, where XLA's permutes would hold up the work
    us: float = 0.0  # by the model of `load.py`, waiting included
    arriving_us: float = 0.0  # of these, what brings query, key and value
    gathered_bytes: float = 0.0  # of memory for keys and values of all devices, and their gradients


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
    rows_stay: bool = False,
    in_order: bool = True,
    in_tiles: bool = False,
    slices: int = 1,
) -> AttentionPlan:
    """Chooses the exchange.

    Args:
      rule: query, key and value are its first operands; `bias` is the index of the bias among them, or None.
      factors: the axes a door found for each factor. mesh_shape: every axis and its size.
      exchange: what the caller asked for, one of EXCHANGES. itemsize: bytes of one element of K and V; owed_itemsize: of
        dK and dV on their way to their owner, in a backward pass. device_kind: as JAX names it.
      rows_stay: whether there are arrays of queries by keys, which would have to follow rows that go elsewhere.
      in_order: whether places in the arrays are what the band compares.
      in_tiles: whether the kernel will be one in Pallas, as far as is known.
      slices: of TPUs, that the mesh is over.

    Raises ValueError where the caller asked for an exchange that these shardings can't have.
    """
    call = _Call(
        rule,
        _around_pages(rule, dict(factors)),
        dict(mesh_shape),
        band,
        itemsize,
        bias,
        owed_itemsize,
        device_kind,
        rows_stay,
        in_order,
        in_tiles,
        slices,
    )
    if call.devices(call.key_axes) == 1:
        return call.plan("local", "keys are whole on every device: nothing to exchange")
    able, unable = call.exchanges()
    if exchange == "auto":
        machine, plans = cost.machine(device_kind, itemsize), lambda call: [call.plan(*way) for way in able]
        forward = _fastest(plans(dataclasses.replace(call, owed_itemsize=0)), machine) if owed_itemsize else None
        return _fastest(plans(call), machine, forward)
    found = [way for way in able if way[0] == exchange]
    check(len(found) > 0, f"{exchange=} was asked for, but {unable.get(exchange)}, or use exchange='auto'")
    return call.plan(*found[0])


def _around_pages(rule: Rule, split: dict[str, Axes]) -> dict[str, Axes]:
    """The axes without those of a pool's pages for any other factor: queries are gathered, the pool never.

    Tokens of queries keep theirs where `merge` can gather them, and scatter the results: see `_joint_axes`.
    """
    pages = split.get("s", ())
    if not rule.first:
        return split
    stay = ("s", "t") if _joint_axes(split) is not None else ("s",)
    return {f: axes if f in stay else tuple(a for a in axes if a not in pages) for f, axes in split.items()}


def _joint_axes(split: Mapping[str, Axes]) -> Axes | None:
    """The axes of both queries and keys, where they are the queries' last; None where they are not."""
    queries = split.get("t", ())
    shared = [a for a in queries if a in split.get("s", ())]
    return tuple(shared) if shared == [*queries[len(queries) - len(shared) :]] else None


def _fastest(plans: list[AttentionPlan], machine: cost.Machine, forward: AttentionPlan | None = None) -> AttentionPlan:
    """The one that takes the least time by the model, and for a reason what the others would take; none that gathers
    queries, or more keys than a device has memory for, while there are others.

    Backward what `forward` does needs nothing brought: in one program XLA sends once what both need.
    """
    most = machine.capacity * MOST_GATHERED
    fitting = [plan for plan in plans if plan.gathered_bytes <= most and not plan.joint_axes] or plans
    alike = lambda plan: forward is not None and (plan.exchange, plan.heads) == (forward.exchange, forward.heads)
    best, *others = sorted(fitting, key=lambda plan: plan.us - plan.arriving_us * alike(plan))
    told = f"{best.us:.0f} us on {machine.kind} by the model" + "".join(f", {p.exchange} {p.us:.0f}" for p in others)
    return dataclasses.replace(best, reason=f"{best.reason}; {told}")


@dataclasses.dataclass(frozen=True)
class _Call:
    """What `make` is given, and the plans that could be made of it."""

    rule: Rule
    split: dict[str, Axes]
    length: Mapping[str, int]
    band: Band
    itemsize: int
    bias: int | None
    owed_itemsize: int
    device_kind: str
    rows_stay: bool
    in_order: bool
    in_tiles: bool
    slices: int

    @property
    def key_axes(self) -> Axes:
        return self.split.get("s", ())

    @property
    def in_pages(self) -> bool:
        """Whether s are the pages of a pool, of all sequences."""
        return bool(self.rule.first)

    def devices(self, axes: Axes) -> int:
        return math.prod(self.length[a] for a in axes)

    def exchanges(self) -> tuple[list[tuple[str, str, int]], dict[str, str]]:
        """What `plan` takes for each exchange that can be had, and why not, and how it could, of the others."""
        keys, queries = self.key_axes, self.split.get("t", ())
        if self.in_pages:
            here = "every device takes its own pages' share of all queries, and the shares are merged"
            return [("merge", here, 1)], dict.fromkeys(EXCHANGES, "pages stay where they are: use 'merge'")
        able, unable = {}, {}
        busy = {axis for f in self.rule.neighbours("t") for axis in self.split.get(f, ())}
        where = f"keys are sharded over {keys} but queries over {queries or 'no axis'}"
        if queries == keys:
            able["ring"] = "queries and keys are sharded over the same axes"
        elif not queries and not busy & set(keys):
            able["ring"] = "keys are sharded; queries are cut alike, which moves nothing"
        else:
            unable["ring"] = f"{where}: shard queries and keys over the same axes"
        able["all_gather"] = "asked for" if "ring" in able else where
        heads, key_heads = self._heads()
        moved, head_parts = f"{heads} query and {key_heads} key heads on a device", self._head_parts()
        if "ring" not in able:
            unable["all_to_all"] = unable["ring"]
        elif self.rows_stay:
            unable["all_to_all"] = (
                "a bias or a mask of queries by keys would have to follow its rows: use another exchange"
            )
        elif not head_parts:
            unable["all_to_all"] = (
                f"{moved} are not cut evenly by any number of the {self.devices(keys)} devices on {keys}: use another exchange"
            )
        joint = _joint_axes(self.split)
        if busy & set(keys):
            unable["merge"] = (
                f"keys are sharded over {keys}, and so are query heads or sequences: use another exchange, which has them meet"
            )
        elif joint and self.rows_stay:
            unable["merge"] = "a bias or a mask of queries by keys would have to be gathered: use another exchange"
        elif joint is None:
            unable["merge"] = f"{where}: those that both are sharded over must be the last ones of the queries'"
        else:
            able["merge"] = "every device takes its own keys' share of all queries, and the shares are merged"
        ways = [(kind, why, 1) for kind, why in able.items()]
        if "all_to_all" not in unable:
            told = lambda parts: f"{moved}, cut over {parts} devices on {keys} instead of their tokens"
            ways += [("all_to_all", told(parts), parts) for parts in head_parts]
        return ways, unable

    def _heads(self) -> tuple[int, int]:
        """Query and key heads on a device."""
        sizes = dict(self.rule.fitted(self.split, self.length).sizes)
        k, g = (sizes.get(f, 1) // self.devices(self.split.get(f, ())) for f in "kg")
        return k * g, k

    def _head_parts(self) -> list[int]:
        """Over how many devices heads can be split, most first: each gets whole groups of heads, or some heads of one group and
        a copy of its key head. Over the others the ring goes round."""
        (heads, key_heads), devices = self._heads(), self.devices(self.key_axes)
        cut = lambda n: devices % n == heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)
        return [n for n in range(devices, 1, -1) if cut(n)]

    def plan(self, kind: str, why: str, head_parts: int = 1) -> AttentionPlan:
        """That of one exchange, for which heads are split over so many devices."""
        split, length, keys = dict(self.split), self.length, self.key_axes
        size, walks = self.devices(keys), kind in ("ring", "all_to_all")
        if walks:
            split["t"] = keys
        joint_axes = _joint_axes(self.split) or () if kind == "merge" else ()
        rule = self.rule.fitted(split, length)
        sizes, padded = dict(self.rule.sizes), dict(rule.sizes)
        band = dataclasses.replace(
            self.band,
            queries=sizes["t"] if padded["t"] > sizes["t"] else None,
            keys=sizes["s"] if padded["s"] > sizes["s"] and not self.in_pages else None,
        )
        ring = Ring.make(keys, length, head_parts) if walks or kind == "merge" else Ring()
        walk = self._walk(ring.size, padded["t"], padded["s"]) if walks else _Walk()
        axes = lambda dims: tuple(a for dim in dims for f in dim for a in split.get(f, ()))
        query, key = axes(rule.operands[0]), axes(rule.operands[1])
        own = () if kind == "all_gather" else keys
        shared = {a for a in key if a not in keys} | set(own)
        summed = (*query, *(a for a in keys if kind == "merge" and a not in query))
        how = walk._asdict() | {"joint_parts": self.devices(joint_axes)}
        load = self._load(kind, rule, split, head_parts=head_parts, abreast=ring.abreast, **how)
        return AttentionPlan(
            factors=freeze(split),
            exchange="all_to_all + ring" if head_parts > 1 and ring.size > 1 else kind,
            band=band,
            axes=keys if size > 1 else (),
            ring=ring,
            size=size,
            **how,
            query_axes=split.get("t", ()),
            rows=Ring.make(split.get("t", ()), length, head_parts * how["joint_parts"]),
            heads=Group.last(keys, head_parts, length),
            joint_axes=joint_axes,
            key_sum_axes=tuple(a for a in query if a not in shared),
            bias_sum_axes=()
            if self.bias is None
            else tuple(a for a in summed if a not in axes(rule.operands[self.bias])),
            reason=why
            + "; two chunks a device, from both ends: each has as much to do" * (walk.pieces - 1)
            + "; by remote DMA, which work can hide here, unlike XLA's permutes" * load.remote,
            wire_bytes=load.sent(),
            remote=load.remote,
            us=load.us if size > 1 else 0.0,
            arriving_us=load.arriving if size > 1 else 0.0,
            gathered_bytes=load.gathered_bytes(),
        )

    def _load(self, kind: str, rule: Rule, split: Mapping[str, Axes], **how: int) -> Load:
        here = {f: n // self.devices(split.get(f, ())) for f, n in rule.sizes}
        of = lambda *names: math.prod(here.get(f, 1) for f in names)
        return Load(
            kind=kind,
            machine=cost.machine(self.device_kind, self.itemsize),
            band=self.band if self.in_order else Band(),
            itemsize=self.itemsize,
            owed_itemsize=self.owed_itemsize,
            in_tiles=self.in_tiles,
            batch=math.prod(n for f, n in here.items() if re.fullmatch(r"[bm]\d+", f)),
            heads=of("k", "g"),
            key_heads=of("k"),
            queries=of("t"),
            keys=of("p", "i") // self.devices(self.key_axes) if self.in_pages else of("s"),
            width=(of("h") + of("v")) // 2,
            size=self.devices(self.key_axes),
            mesh_size=math.prod(self.length.values()),
            slices=self.slices,
            domains=self._domains,
            **how,
        )

    @functools.cached_property
    def _domains(self) -> tuple[int, ...]:
        """Of each device along the keys' axes, the slice or the host of GPUs that it is on: a mesh has one after the other."""
        size, digits, numbers = math.prod(self.length.values()), of_mesh(self.length), np.zeros((), int)
        for axis in self.key_axes:
            count, stride = digits[axis]
            numbers = np.add.outer(numbers, stride * np.arange(count))
        domains = cost.machine(self.device_kind, self.itemsize).domains(size, self.slices)
        return tuple((numbers.reshape(-1) * domains // size).tolist())

    def _walk(self, size: int, queries: int, keys: int) -> "_Walk":
        """That of a ring of so many devices, which have so many tokens together.

        Two parts and two pieces only where all blocks are met: what a window cuts short comes whole, from one side or from
        both. Two parts where a device has a link to either neighbour, of whom there are two: to a GPU's switch all links
        carry what goes to one. Two pieces, balanced places, where later devices would see more. Each of at least LEAST or
        TILE keys.
        """
        band, block = self.band if self.in_order else Band(), keys // size
        hops, ways = _hops(band, size, queries // size, block)
        least, owes = TILE if self.in_tiles else LEAST, self.owed_itemsize > 0
        if size == 1 or hops < size:
            return _Walk(hops, ways, 1, 2 if owes and hops > 1 and block % (2 * least) == 0 else 1)
        causal = band.right == 0 and band.left is None and queries == keys
        pieces = 2 if causal and not self.rows_stay and block % (2 * least) == 0 else 1
        switched = cost.family(self.device_kind) == "gpu"
        halves = 2 if block % (2 * pieces * least) == 0 else 1
        ways = 1 if switched or size == 2 else halves
        return _Walk(hops, ways, ways, halves if owes else ways, pieces)


class _Walk(NamedTuple):
    """Of a ring; see `AttentionPlan`."""

    hops: int = 1
    ways: int = 1
    parts: int = 1
    own_parts: int = 1
    pieces: int = 1


def _hops(band: Band, size: int, queries: int, keys: int) -> tuple[int, int]:
    """(hops, ways): key blocks that any device needs, from its own one to earlier ones, or both ways to the farthest.

    Queries `[i t, i t + t)` see no key before `i t - left`, and none from `i t + t + right` on: the ring stops there.
    """
    if band.left is None or band.right is None or queries != keys:
        return size, 1
    earlier, later = (-(-side // keys) for side in (band.left, band.right))
    if not later:
        return min(size, 1 + earlier), 1
    farthest = max(earlier, later)
    return (1 + farthest, 2) if 2 * farthest < size else (size, 1)
