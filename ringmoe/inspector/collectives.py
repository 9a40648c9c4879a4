"""Which instructions communicate, and which computations run as part of the schedule."""

import dataclasses
import functools
import re

from ringmoe.inspector.reader import COLLECTIVES, PERMUTE, Computation, Instruction, Module, split

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
    """An exchange between slices, which the host carries out: `key` is the same on its send and its recv."""

    key: str
    kind: str
    slices: int


def collective_kind(module: Module, instruction: Instruction) -> str:
    """Kind of the collective that this instruction runs or starts, "" for anything else.

    It is the HLO opcode without -start, "remote-dma" for a Pallas kernel that moves data itself.
    A fused all-reduce of which a slice is kept is how XLA:TPU writes a reduce-scatter.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        return "" if is_host_transfer(instruction) else opcode
    if instruction.opcode == "custom-call":
        call = instruction.config.get("custom_call_config")
        return "remote-dma" if isinstance(call, dict) and call.get("has_communication") else ""
    inner = wrapped(module, instruction)
    if inner is None:
        return ""
    collective, inside = inner
    kind, root = collective.opcode.removesuffix("-start"), inside.root
    sliced = root is not None and root.opcode == "dynamic-slice" and root.operands[0]
    return "reduce-scatter" if kind == "all-reduce" and sliced == collective.name else kind


def is_host_transfer(instruction: Instruction) -> bool:
    """Whether a send or recv is with the host rather than another device."""
    return "is_host_transfer=true" in instruction.tail


def slice_exchange(instruction: Instruction) -> SliceExchange | None:
    """The exchange between slices that a send starts or a recv ends; None for anything else."""
    if instruction.opcode not in ("send", "recv") or "_xla_megascale_transfer_type" not in instruction.tail:
        return None
    parts = split(instruction.attributes.get("frontend_attributes", "{}")[1:-1])
    found = {key.strip(): value.strip('"') for key, _, value in (part.partition("=") for part in parts)}
    kind = found.get("_xla_megascale_transfer_type", "")
    slices = _slices(found.get("_xla_megascale_target", ""))
    return SliceExchange(
        found.get("_xla_host_transfer_rendezvous", ""), _BETWEEN_SLICES.get(kind, kind.lower()), slices
    )


@functools.cache
def _slices(target: str) -> int:
    """Slices in one group of "{1,2}x{0:7}" (slices, then devices of each), of "{{100000,200000},...}" (devices) or of
    "{{100000->200000},...}" (pairs)."""
    groups = re.findall(r"\{([\d,:\s>-]+)\}", target)
    if target.startswith("{{"):
        return max((len({int(n) // _SLICE for n in re.findall(r"\d+", group)}) for group in groups), default=2)
    ranges = re.findall(r"(\d+)(?::(\d+))?", groups[0] if groups else "")
    return max(2, sum(int(last or first) - int(first) + 1 for first, last in ranges))


def flow(module: Module, instruction: Instruction) -> tuple[str, ...]:
    """Computations that run as part of the schedule when this instruction does: not fused ones,
    reducers or wrappers of a collective."""
    if instruction.opcode in ("while", "conditional"):
        return instruction.called
    if instruction.opcode == "call" or (instruction.opcode == "async-start" and wrapped(module, instruction) is None):
        return instruction.called[:1]
    return ()


def wrapped(module: Module, instruction: Instruction) -> tuple[Instruction, Computation] | None:
    """The collective that an async-start or a fusion runs or starts, and the computation it is in.

    XLA:TPU also spreads one over several fusions; those between the first and the last only push it
    along.
    """
    if instruction.opcode not in ("async-start", "fusion", "fusion-start") or not instruction.called:
        return None
    inside = module.computations[instruction.called[0]]
    found = next((i for i in inside.instructions if i.opcode.removesuffix("-start") in COLLECTIVES), None)
    if found is None or ("async_collective_fusion_config" in found.tail and not holds(inside, "AsyncCollectiveStart")):
        return None
    return found, inside


def holds(computation: Computation, custom_call: str) -> bool:
    """Whether the computation has a custom call of this target."""
    return any(i.opcode == "custom-call" and i.target == custom_call for i in computation.instructions)


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
