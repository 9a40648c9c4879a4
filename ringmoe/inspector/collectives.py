"""Which instructions communicate, and which computations run as part of the schedule."""

import dataclasses
import functools
import itertools
import re

from ringmoe.inspector.reader import PERMUTE, STARTS, Computation, Instruction, Module, split

_WRAPPERS = (*STARTS, "fusion", "fusion-start")
_LEVELS = 4  # a start inside a start: XLA:TPU prints two for the SparseCore
# What XLA:TPU's runtime for several slices calls its exchanges, and what they are called elsewhere.
_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": PERMUTE,
}
_SLICE = 100_000  # device number / this is the number of its slice


@dataclasses.dataclass(frozen=True)
class SliceExchange:
    """An exchange between slices, which the host carries out: `key` is the same on its send and its recv, `devices` are
    those of one group, each the number of its slice and its number there."""

    key: str
    kind: str
    devices: tuple[tuple[int, int], ...]

    @property
    def slices(self) -> int:
        return max(2, len({number for number, _ in self.devices}))


def collective_kind(module: Module, instruction: Instruction) -> str:
    """Kind of the collective that this instruction runs or starts, "" for anything else.

    It is `Instruction.exchange`, of the instruction or of what it wraps. A fused all-reduce of which
    a slice is kept is how XLA:TPU writes a reduce-scatter.
    """
    if instruction.exchange:
        return instruction.exchange
    inner = wrapped(module, instruction)
    if inner is None:
        return ""
    collective, inside = inner
    kind, root = collective.exchange, inside.root
    sliced = root is not None and root.opcode == "dynamic-slice" and root.operands[:1] == (collective.name,)
    return "reduce-scatter" if kind == "all-reduce" and sliced else kind


def slice_exchange(instruction: Instruction) -> SliceExchange | None:
    """The exchange between slices that a send starts or a recv ends; None for anything else."""
    if instruction.opcode not in ("send", "recv") or "_xla_megascale_transfer_type" not in instruction.tail:
        return None
    parts = split(instruction.attributes.get("frontend_attributes", "{}")[1:-1])
    found = {key.strip(): value.strip('"') for key, _, value in (part.partition("=") for part in parts)}
    kind = found.get("_xla_megascale_transfer_type", "")
    devices = _exchanging(found.get("_xla_megascale_target", ""))
    return SliceExchange(
        found.get("_xla_host_transfer_rendezvous", ""), _BETWEEN_SLICES.get(kind, kind.lower()), devices
    )


@functools.cache
def _exchanging(target: str) -> tuple[tuple[int, int], ...]:
    """The largest group of "{1,2}x{0:7}" (slices from 1, then devices of each: those of one number are a group), of
    "{{100000,200000},...}" (devices) or of "{{100000->200000},...}" (pairs)."""
    groups = re.findall(r"\{([\d,:\s>-]+)\}", target)
    if target.startswith("{{"):
        numbers = max((re.findall(r"\d+", group) for group in groups), key=len, default=[])
        return tuple((int(n) // _SLICE - 1, int(n) % _SLICE) for n in numbers)
    ranges = re.findall(r"(\d+)(?::(\d+))?", groups[0] if groups else "")
    slices = itertools.chain.from_iterable(range(int(first), int(last or first) + 1) for first, last in ranges)
    first = int(re.findall(r"\d+", groups[1])[0]) if len(groups) > 1 else 0
    return tuple((number - 1, first) for number in itertools.islice(slices, _SLICE))


def flow(module: Module, instruction: Instruction) -> tuple[str, ...]:
    """Computations that run as part of the schedule when this instruction does: not fused ones,
    reducers or wrappers of a collective."""
    if instruction.opcode in ("while", "conditional"):
        return tuple(dict.fromkeys(instruction.called))
    if instruction.opcode == "call" or (instruction.opcode in STARTS and wrapped(module, instruction) is None):
        return instruction.called[:1]
    return ()


def wrapped(module: Module, instruction: Instruction) -> tuple[Instruction, Computation] | None:
    """The collective that a start or a fusion runs or starts, and the computation it is in.

    XLA:TPU also spreads one over several fusions; those between the first and the last only push it
    along.
    """
    wrapper: Instruction | None = instruction
    for _ in range(_LEVELS):
        if wrapper is None or wrapper.opcode not in _WRAPPERS or not wrapper.called:
            return None
        inside = module.computations[wrapper.called[0]]
        found = inside.exchange
        if found is not None:
            pushes = "async_collective_fusion_config" in found.tail and "AsyncCollectiveStart" not in inside.targets
            return None if pushes else (found, inside)
        wrapper = inside.start
    return None


def post_order(module: Module) -> list[Computation]:
    """Computations that run from the entry on, callees before callers."""
    order: list[Computation] = []
    state: dict[str, int] = {}
    stack = [(module.entry.name, False)]
    while stack:
        name, left = stack.pop()
        if left:
            state[name] = 2
            order.append(module.computations[name])
        elif state.get(name) == 1:
            raise ValueError(f"computation {name!r} calls itself, expected a tree of calls: the HLO text was edited")
        elif name not in state:
            state[name] = 1
            stack.append((name, True))
            for instruction in module.computations[name].instructions:
                stack.extend((callee, False) for callee in flow(module, instruction) if state.get(callee) != 2)
    return order
