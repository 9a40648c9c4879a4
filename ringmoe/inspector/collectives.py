"""Which instructions communicate, and which computations run as part of the schedule."""

from ringmoe.inspector.reader import STARTS, Computation, Instruction, Module

_WRAPPERS = (*STARTS, "fusion", "fusion-start")
_LEVELS = 4  # a start inside a start: XLA:TPU prints two for the SparseCore


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
