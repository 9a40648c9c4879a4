"""How an expert layer is spread over a mesh."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping

from ringmoe.errors import warn_once
from ringmoe.meshes import Axes
from ringmoe.plan import cost
from ringmoe.plan.base import Factors, freeze
from ringmoe.rules import Rule

EXCHANGES = ("auto", "all_to_all", "pieces", "remote")
PIECES = range(2, 17)  # in how many rows may travel: a copy of the experts' matmuls each
TILE = 16  # rows of a piece are a multiple of it, a tile of packed bfloat16
SORTING = 1.5  # rows are sorted where there is so much more room than even routing asks for: empty rows cost more than sorting
WINDOW = (
    1.25  # rows that a device works on at once over what comes to it, were routing even: memory against another turn
)


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
        pieces: in how many parts the rows of each expert travel, each during the work on others; 1: all at once.
        remote: pieces travel by remote DMA of our own, not by XLA's all-to-all.
        sums_each: backward, the weights' gradients are added up piece by piece; else multiplied last, of all at once.
        sorted: rows lie tightly by expert, and only those are multiplied; else every expert has its own room.
        window, most: of sorted rows that travel, how many a device takes at once, and how many may come to it.
        expert_axes: (axis, size) of the axes that shard E, major to minor; the product of sizes divides E.
        exchange_axes: those of them that also shard tokens, in the order of expert_axes.
        token_axes: all axes that shard tokens (batch or sequence).
        hidden_axes: axes that shard F; neither token nor expert axes.
        reason: why this plan, in words, for `explain`.
        wire_bytes: sent per device; of sorted rows, as many as there are when routing is even.
        factors: the axes that split each factor, for the shard_map's specs.
    """

    num_experts: int
    rows: int = 0
    pieces: int = 1
    remote: bool = False
    sums_each: bool = False
    sorted: bool = False
    window: int = 0
    most: int = 0
    expert_axes: tuple[tuple[str, int], ...] = ()
    exchange_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    hidden_axes: tuple[str, ...] = ()
    reason: str = ""
    wire_bytes: int = 0
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
    def by_xla(self) -> "ExpertPlan":
        """The plan with XLA's exchange, which JAX can differentiate."""
        return dataclasses.replace(self, remote=False)

    @property
    def at_once(self) -> "ExpertPlan":
        """That, with one window for all that may come: no loop, whose turns depend on the routing."""
        return dataclasses.replace(self.by_xla, window=self.most)

    @property
    def exchange(self) -> str:
        """What moves: "all_to_all", "pieces" or "remote", "sum", both, or "local"."""
        travel = "remote" if self.remote else "pieces" if self.pieces > 1 else "all_to_all"
        kinds = (travel,) * bool(self.exchange_axes) + ("sum",) * bool(self.sum_axes)
        return " + ".join(kinds) or "local"

    @property
    def axes(self) -> Axes:
        """The axes that it moves over."""
        return (*self.exchange_axes, *self.sum_axes)


@functools.cache
def make(
    rule: Rule,
    factors: Factors,
    mesh_shape: tuple[tuple[str, int], ...],
    capacity: int,
    group_size: int,
    itemsize: int,
    backward: bool = False,
    may_sort: bool = True,
    exchange: str = "auto",
    device_kind: str = "",
    slices: int = 1,
) -> ExpertPlan:
    """Where rows go: to the experts' devices over axes that also shard tokens; else outputs are summed.

    `rule` is that of an op on "tokens" (or "rows"), `factors` what a door found. Weights sharded over the model dim, or
    over the hidden dim along an axis that shards tokens or experts, are gathered first. All rows travel twice forward
    (there and back), thrice `backward` (x and dy there, dx back); the weights' gradients are not counted. `may_sort`: whether
    the kernel takes sorted rows. `exchange`: one of EXCHANGES, as the caller asked. `device_kind`: JAX's name of the machine,
    for the times by which "auto" chooses, and `slices` of TPUs are what the mesh is over.
    """
    split, length = dict(factors), dict(mesh_shape)
    token_axes = tuple(a for f in sorted(split) if _of_tokens(f) for a in split[f])
    expert_axes = split.get("e", ())
    split["f"] = tuple(a for a in split.get("f", ()) if a not in (*token_axes, *expert_axes))
    travelling = tuple(a for a in expert_axes if a in token_axes)
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
    devices, width, hidden = splits(travelling), sizes.get("d", 1), sizes.get("f", 0) // splits(split["f"])
    asked = -(-tokens * sizes["c"] // splits(own))  # rows that a device sends, and that come to it, if routing is even
    machine, mesh_size = cost.machine(device_kind, itemsize), math.prod(length.values())
    most_room = SORTING * tokens * sizes["c"]
    if devices > 1 and machine.is_limited(mesh_size):  # sorted rows then travel with a window's room for every device
        most_room = max(most_room, devices * WINDOW * asked * splits(own))
    in_order = may_sort and exchange in ("auto", "all_to_all") and sizes["e"] * room > most_room
    rows, window, most = _sorted_rows(tokens, sizes["c"], here, room, devices, asked) if in_order else (room, 0, 0)
    matrices = 0 if in_order else sum(("d",) in dims and ("f",) in dims for dims in rule.operands)
    load = _Load(
        devices=devices,
        experts=here,
        room=room,
        row=width * itemsize,
        matmul=2.0 * width * hidden,
        matrix=width * hidden * itemsize,
        matrices=matrices,
        sums=4 * matrices * here * width * hidden,
        backward=backward,
    )
    travel, how = _travel(load, machine, exchange, mesh_size, machine.reaches(mesh_size, slices))
    rows = travel.pop("rows", rows)
    why = [f"experts and tokens are both sharded over {travelling}: rows travel to their experts{how}"][
        : len(travelling)
    ]
    why += [f"experts are sharded over {own}, tokens are not: each device serves its own experts"] * bool(own)
    why += [f"the hidden dim is sharded over {split['f']}: partial outputs"] * bool(split["f"])
    why = why or ["experts are whole on every device: nothing moves"]
    why += [f"rows are sorted by expert: one may take {room} of {tokens} tokens"] * in_order
    why += [f"only rows travel, {window} at a time: bytes are of even routing"] * (in_order and bool(travelling))
    sent = (asked if in_order else devices * rows * here) * width * itemsize
    summed = tokens * width * max(itemsize, 4)
    parts = splits((*own, *split["f"]))
    return ExpertPlan(
        num_experts=sizes["e"],
        rows=rows,
        **travel,
        sorted=in_order,
        window=window,
        most=most,
        expert_axes=tuple((a, length[a]) for a in expert_axes),
        exchange_axes=travelling,
        token_axes=token_axes,
        hidden_axes=split["f"],
        reason="; ".join(why),
        wire_bytes=load.exchanges * sent * (devices - 1) // devices + 2 * summed * (parts - 1) // parts,
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


@dataclasses.dataclass(frozen=True)
class _Load:
    """What one device of an exchange has to send and to multiply, and what that takes, in microseconds."""

    devices: int
    experts: int  # of this device
    room: int  # for rows of one device for one expert
    row: int  # bytes
    matmul: float  # FLOPs of a row times a matrix
    matrix: int  # bytes
    matrices: int  # 3 with a gate, else 2; 0 where the work is unknown, or none, or its rows are sorted
    sums: int  # bytes of the weights' gradients, in float32
    backward: bool

    @property
    def exchanges(self) -> int:
        return 3 if self.backward else 2

    def rows(self, pieces: int) -> int:
        """The room, padded to so many pieces."""
        return pieces * TILE * -(-self.room // (pieces * TILE))

    def work(self, machine: cost.Machine, rows: float, matmuls: int) -> float:
        """Of so many rows of each device for each expert, `matmuls` times."""
        all_rows = self.devices * self.experts * rows
        return machine.work(matmuls * all_rows * self.matmul, matmuls * self.experts * self.matrix)

    def wire(self, machine: cost.Machine, rows: float) -> float:
        return machine.all_to_all(self.devices, int(self.devices * self.experts * rows * self.row))

    def matmuls(self) -> tuple[int, int]:
        """How many, before the results can travel home, and after."""
        return (2 * self.matrices - 1, self.matrices) if self.backward else (self.matrices, 0)

    def at_once(self, machine: cost.Machine) -> float:
        """There, all matmuls, and home."""
        return self.exchanges * self.wire(machine, self.room) + sum(
            self.work(machine, self.room, n) for n in self.matmuls()
        )

    def in_pieces(self, machine: cost.Machine, pieces: int, sums_each: bool = False) -> float:
        """The first piece there; of each, the work while the one before travels home and the next one there; the last one home,
        beneath what matmuls there are after. With `sums_each` those are beneath all that travels, and each adds to the sums."""
        first, after = self.matmuls()
        rows = self.rows(pieces) / pieces
        work, wire = self.work(machine, rows, first) + machine.launch, self.wire(machine, rows)
        last = self.work(machine, pieces * rows, after)
        if sums_each:
            last = last / pieces + machine.work(0, 2 * self.sums)
        step = max(work + sums_each * last, self.exchanges * wire)
        return (self.exchanges - 1) * wire + work + max(last, wire) + (pieces - 1) * step


def _travel(load: _Load, machine: cost.Machine, exchange: str, mesh_size: int, reached: bool) -> tuple[dict, str]:
    """What the plan says of the way rows travel, and why; `reached`: all devices, by remote DMA."""
    if load.devices == 1:
        return {}, ""
    if exchange == "all_to_all":
        return {}, ", at once, as asked for"
    ways = itertools.product(PIECES, (False, True)[: 1 + load.backward])
    pieces, sums_each = best = min(ways, key=lambda way: load.in_pieces(machine, *way))
    remote = exchange == "remote" or (exchange == "auto" and mesh_size > machine.asynchronous)
    way = " by remote DMA" if remote else ""
    found = {"pieces": pieces, "sums_each": sums_each, "remote": remote, "rows": load.rows(pieces)}
    if exchange != "auto":
        return found, f", in pieces{way}, as asked for"
    if not load.matrices:
        return {}, ""
    once, in_pieces = load.at_once(machine), load.in_pieces(machine, *best)
    told = f"at once: {once:.0f} us on {machine.kind} by the model"
    if remote and not reached:
        return {}, f", {told}, which has no all-to-all during other work"
    if load.backward and not machine.dims:
        kept = "what pieces keep for the weights' gradients is copied there"
        return {}, f", {told}: XLA hides some of it on GPUs, and {kept}"
    if in_pieces >= once:
        return {}, f", {told}, in {pieces} pieces {in_pieces:.0f}"
    return found, f", in {pieces} pieces{way}: {in_pieces:.0f} us; {told}"
