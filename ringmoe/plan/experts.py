"""How an expert layer is spread over a mesh."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from ringmoe.errors import check, warn_once
from ringmoe.meshes import Axes
from ringmoe.plan import cost
from ringmoe.plan.base import Factors, Ring, freeze
from ringmoe.rules import Rule

EXCHANGES = ("auto", "all_to_all", "pieces")
MOST_ROUNDS = (
    8  # in which pieces travel; in each, those of either way are worked on together, by one copy of the matmuls
)
MOST_PIECES = 128  # that "auto" takes: two transfers each, of one array or more
SORTING = (
    1.5  # room over rows asked, were routing even, from which on rows are sorted: what is empty costs more than sorting
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
        rows: r, room for what a device may have for one expert or, sorted, for one device: no more can be asked for.
        sorted: rows lie tightly by expert, and only those are multiplied; else every expert has its own room.
        expert_axes: (axis, size) of the axes that shard E, major to minor; the product of sizes divides E.
        exchange_axes: those of them that also shard tokens, in the order of expert_axes.
        token_axes: all axes that shard tokens (batch or sequence).
        hidden_axes: axes that shard F; neither token nor expert axes.
        reason: why this plan, in words, for `explain`.
        wire_bytes: sent per device, forward.
        ring: the devices that exchange, where rows travel in pieces during the work on others; one device: all at once.
        factors: the axes that split each factor, for the shard_map's specs.
    """

    num_experts: int
    rows: int = 0
    sorted: bool = False
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
) -> ExpertPlan:
    """Where rows go: to the experts' devices over axes that also shard tokens; else outputs are summed.

    `rule` is that of an op on "tokens" (or "rows"), `factors` what a door found. Weights sharded over the model dim, or
    over the hidden dim along an axis that shards tokens or experts, are gathered first. All rows travel twice forward
    (there and back), thrice `backward` (x and dy there, dx back); the weights' gradients are not counted. `may_sort`: whether the
    kernel takes sorted rows. `exchange`: one of EXCHANGES, as the caller asked. `device_kind`: JAX's name of the machine, for
    the times by which "auto" chooses.
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
    in_order = may_sort and sizes["e"] * room > SORTING * tokens * sizes["c"]
    rows = min(tokens * min(sizes["c"], here), here * room) if in_order else room
    devices = splits(travelling)
    sent = devices * rows * (1 if in_order else here) * sizes.get("d", 1) * itemsize
    load = _Load(
        devices=devices,
        sent=sent,
        matmul=2.0 * devices * here * rows * sizes.get("d", 1) * sizes.get("f", 0) / splits(split["f"]),
        matrix=here * sizes.get("d", 1) * sizes.get("f", 0) * itemsize // splits(split["f"]),
        matrices=sum(("d",) in dims and ("f",) in dims for dims in rule.operands),
        backward=backward,
    )
    in_pieces, how = _in_pieces(
        load, cost.machine(device_kind, itemsize), exchange, in_order, math.prod(length.values())
    )
    why = [f"experts and tokens are both sharded over {travelling}: rows travel to their experts{how}"] * bool(
        travelling
    )
    why += [f"experts are sharded over {own}, tokens are not: each device serves its own experts"] * bool(own)
    why += [f"the hidden dim is sharded over {split['f']}: partial outputs"] * bool(split["f"])
    why = why or ["experts are whole on every device: nothing moves"]
    why += [f"rows are sorted by expert: one may take {room} of {tokens} tokens"] * in_order
    summed = tokens * sizes.get("d", 1) * max(itemsize, 4)
    parts = splits((*own, *split["f"]))
    return ExpertPlan(
        num_experts=sizes["e"],
        rows=rows,
        sorted=in_order,
        expert_axes=tuple((a, length[a]) for a in expert_axes),
        exchange_axes=travelling,
        token_axes=token_axes,
        hidden_axes=split["f"],
        reason="; ".join(why),
        wire_bytes=load.exchanges * sent * (devices - 1) // devices + 2 * summed * (parts - 1) // parts,
        ring=Ring.make(travelling, length) if in_pieces else Ring(),
        factors=freeze(split),
    )


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
    """What one device of an exchange has to send and to multiply, and what that takes."""

    devices: int
    sent: int  # bytes of its rows for all devices, its own among them
    matmul: float  # FLOPs of one matrix times all rows that come
    matrix: int  # bytes of one matrix of all its experts
    matrices: int  # 3 with a gate, else 2
    backward: bool

    @property
    def exchanges(self) -> int:
        return 3 if self.backward else 2

    def matmuls(self) -> tuple[int, int]:
        """How many, before the results can travel home, and after."""
        return (2 * self.matrices - 1, self.matrices) if self.backward else (self.matrices, 0)

    def at_once(self, machine: cost.Machine) -> float:
        """Microseconds: there, all matmuls, and home."""
        work = (machine.work(n * self.matmul, n * self.matrix) for n in self.matmuls())
        return self.exchanges * machine.all_to_all(self.devices, self.sent) + sum(work)

    def in_pieces(self, machine: cost.Machine) -> float:
        """Microseconds: this device's own piece while the farthest travel, then each round while the next one and the results
        of the one before do; the last results travel home beneath what matmuls there are after them."""
        first, after = self.matmuls()
        there, rounds = self.exchanges - 1, min(self.devices // 2, MOST_ROUNDS)
        work = lambda part: machine.work(first * self.matmul * part, first * self.matrix)
        own, wire = work(1 / self.devices), machine.permutes(self.devices, self.sent) / rounds
        steps = min(2 * rounds, self.devices - 1)
        round_ = (work((self.devices - 1) / self.devices / steps) + machine.launch) * steps / rounds
        last = max(machine.work(after * self.matmul, after * self.matrix), wire)
        return max(own, there * wire) + (rounds - 1) * max(round_, self.exchanges * wire) + round_ + last


def _in_pieces(load: _Load, machine: cost.Machine, exchange: str, in_order: bool, mesh_size: int) -> tuple[bool, str]:
    """Whether rows travel in pieces, and why."""
    if load.devices == 1:
        return False, ""
    lacks = in_order and "sorted rows have no equal pieces"
    check(
        not (lacks and exchange == "pieces"),
        f"exchange='pieces' was asked for, but {lacks}: give the config a capacity_factor, or use exchange='auto'",
    )
    if exchange != "auto":
        return exchange == "pieces", f", {'in pieces' if exchange == 'pieces' else 'at once'}, as asked for"
    if in_order or not load.matrices:
        return False, ""
    once = load.at_once(machine)
    told = f", at once: {once:.0f} us on {machine.kind} by the model"
    if load.devices > MOST_PIECES or mesh_size > machine.asynchronous:
        return False, f"{told}; of {mesh_size} devices nothing would be hidden"
    pieces = load.in_pieces(machine)
    if pieces >= once:
        return False, f"{told}, piece by piece {pieces:.0f}"
    return True, f", in pieces: {pieces:.0f} us on {machine.kind} by the model, at once {once:.0f}"
