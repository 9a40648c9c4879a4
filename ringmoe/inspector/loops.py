"""How often a while loop runs, read from its HLO.

GPU and CPU compilers print `known_trip_count`; XLA:TPU does not, so the count is found again from
the loop itself: the condition compares an element of the state with a bound, the body adds a
constant to that element, and the state starts from a constant.
"""

import math
from typing import NamedTuple

from ringmoe.inspector.reader import Computation, Instruction, Module

_COPIES = frozenset({"copy", "bitcast", "convert", "reshape", "broadcast"})


class _Term(NamedTuple):
    """state[element] + constant, or just the constant when `element` is None."""

    element: int | None
    constant: int


def trip_count(module: Module, loop: Instruction, caller: Computation) -> int | None:
    """Iterations of the while instruction `loop` in `caller`; None when the text does not tell."""
    known = loop.config.get("known_trip_count")
    count = known.get("n") if isinstance(known, dict) else None
    if str(count).isdigit():
        return int(str(count))
    compare = _compare(module, loop)
    if compare is None:
        return None
    direction, left, right = compare
    if left.element is None and right.element is not None:
        direction, left, right = (
            {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction),
            right,
            left,
        )
    body, init = (
        module.computations[loop.attributes["body"].lstrip("%")],
        caller.by_name.get(loop.operands[0]),
    )
    step, start = (
        _element(module, body.root, body, left.element),
        _element(module, init, caller, left.element),
    )
    bound = _Term(None, right.constant)
    if right.element is not None:  # the bound is carried unchanged by the state
        kept, first = (
            _element(module, body.root, body, right.element),
            _element(module, init, caller, right.element),
        )
        if kept != _Term(right.element, 0) or first is None or first.element is not None:
            return None
        bound = _Term(None, first.constant + right.constant)
    if step is None or step.element != left.element or not step.constant or start is None or start.element is not None:
        return None
    distance = bound.constant - start.constant - left.constant
    if direction in ("LE", "GE"):
        distance += 1 if direction == "LE" else -1
    elif direction not in ("LT", "GT", "NE"):
        return None
    return max(0, math.ceil(distance / step.constant))


def _compare(module: Module, loop: Instruction) -> tuple[str, _Term, _Term] | None:
    """Direction and both sides of the loop's condition, as terms of its state."""
    condition = module.computations[loop.attributes["condition"].lstrip("%")]
    root, arguments, inside = condition.root, None, condition
    for _ in range(4):  # a fusion, and at most a copy or two, may wrap the compare
        if root is None or root.opcode == "compare":
            break
        if root.opcode == "fusion" and root.called:
            arguments = [_term(module, condition.by_name.get(name), condition) for name in root.operands]
            inside = module.computations[root.called[0]]
            root = inside.root
        elif root.opcode in _COPIES and root.operands:
            root = inside.by_name.get(root.operands[0])
    if root is None or root.opcode != "compare" or len(root.operands) != 2:
        return None
    left, right = (_term(module, inside.by_name.get(name), inside, arguments) for name in root.operands)
    return (root.attributes.get("direction", ""), left, right) if left and right else None


def _element(module: Module, state: Instruction | None, computation: Computation, index: int | None) -> _Term | None:
    """Element `index` of the tuple that `state` makes, as a term."""
    if state is None or index is None or state.opcode != "tuple" or index >= len(state.operands):
        return None
    return _term(module, computation.by_name.get(state.operands[index]), computation)


def _term(
    module: Module,
    instruction: Instruction | None,
    computation: Computation,
    arguments: list[_Term | None] | None = None,
    depth: int = 0,
) -> _Term | None:
    """`instruction` as a term; `arguments` are the terms of the computation's parameters when it is
    fused."""
    if instruction is None or depth > 64:
        return None

    def operand(position: int) -> _Term | None:
        name = instruction.operands[position] if position < len(instruction.operands) else ""
        return _term(module, computation.by_name.get(name), computation, arguments, depth + 1)

    opcode = instruction.opcode
    if opcode == "constant":
        text = instruction.inner.strip()
        return _Term(None, int(text)) if text.removeprefix("-").isdecimal() else None
    if opcode == "parameter" and arguments is not None:
        number = int(instruction.inner) if instruction.inner.strip().isdecimal() else len(arguments)
        return arguments[number] if number < len(arguments) else None
    if opcode == "get-tuple-element":
        source = computation.by_name.get(instruction.operands[0])
        if source is not None and source.opcode == "parameter" and arguments is None:
            return _Term(int(instruction.attributes["index"]), 0)
        return None
    if opcode in _COPIES:
        return operand(0)
    if opcode in ("add", "subtract"):
        left, right = operand(0), operand(1)
        if left is None or right is None or (left.element is not None and right.element is not None):
            return None
        if opcode == "subtract":
            return _Term(left.element, left.constant - right.constant) if right.element is None else None
        return _Term(left.element if right.element is None else right.element, left.constant + right.constant)
    if opcode == "fusion" and instruction.called:
        inner = module.computations[instruction.called[0]]
        return _term(
            module,
            inner.root,
            inner,
            [operand(i) for i in range(len(instruction.operands))],
            depth + 1,
        )
    return None
