"""Values of the integers that a program computes for itself: loop bounds, block numbers, offsets.

An interpreter of the few HLO operations that such numbers are made of. A value is an integer array
whose last axis is the devices and the others the loops around it, innermost first, so all devices and
iterations are worked out at once (an axis of length 1, or missing, is for what they share); `Linear` where it
depends on the state of a loop that isn't known yet; a `Table` for a small list; a tuple
of values; None for all that depends on data.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ringmoe.inspector.grammar import Shape, bits
from ringmoe.inspector.reader import Instruction, Module

COPIES = frozenset({"copy", "bitcast", "convert", "reshape", "broadcast", "opt-barrier", "optimization-barrier"})
_DEPTH = 128  # operands of operands; the numbers of our schedules take about 30
_TABLE = 65536  # elements of the longest list


class Linear(NamedTuple):
    """state[element] + constant."""

    element: int
    constant: Any


class Table(NamedTuple):
    """A one-dimensional array of constants."""

    values: np.ndarray


class Test(NamedTuple):
    """A comparison of values of which one or both are Linear."""

    direction: str
    left: Any
    right: Any


_COMPARE: dict[str, Callable] = {
    "LT": operator.lt,
    "GT": operator.gt,
    "LE": operator.le,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounds towards zero; by zero it is -1, as HLO has it."""
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, -1, np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe)))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - b * _divide(a, b))


_BINARY: dict[str, Callable] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": _divide,
    "remainder": _remainder,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shift-left": lambda a, b: np.where((b < 0) | (b > 63), 0, a << np.clip(b, 0, 63)),
    "shift-right-arithmetic": lambda a, b: a >> np.clip(b, 0, 63),
    "shift-right-logical": lambda a, b: np.where((b < 0) | (b > 63), 0, a >> np.clip(b, 0, 63)),
}
_UNARY: dict[str, Callable] = {"negate": operator.neg, "abs": np.abs, "sign": np.sign}


class Frame:
    """One computation with the values of its parameters; `value(name)` is that of an instruction,
    `grid` the lengths of the axes."""

    def __init__(self, module: Module, name: str, parameters: list[Any], devices: np.ndarray, grid: tuple[int, ...]):
        self.module, self.computation = module, module.computations[name]
        self.parameters, self.devices, self.grid = parameters, devices, grid
        self.depth = 0
        self._known: dict[str, Any] = {}
        self.loops: dict[str, Any] = {}  # results of while instructions, set by who counts their iterations

    def value(self, name: str) -> Any:
        """The value of the instruction of this name, None when it isn't known."""
        if name not in self._known:
            instruction = self.computation.by_name[name]
            if self.depth > _DEPTH:
                return None
            self.depth += 1
            self._known[name] = self._evaluate(instruction)
            self.depth -= 1
        return self._known[name]

    def result(self) -> Any:
        """The value of the root."""
        return self.value(self.computation.root.name) if self.computation.root else None

    def _evaluate(self, instruction: Instruction) -> Any:
        opcode, shape = instruction.opcode, instruction.shape
        if shape.dtype != "tuple" and (not _is_integer(shape) or shape.elements > _TABLE):
            return None
        if opcode == "tuple":
            return tuple(self.value(name) for name in instruction.operands)
        if opcode == "parameter":
            position = instruction.inner.strip()
            known = position.isdecimal() and int(position) < len(self.parameters)
            return self.parameters[int(position)] if known else None
        if opcode == "get-tuple-element" and instruction.operands:
            source, index = self.value(instruction.operands[0]), instruction.attributes.get("index", "")
            found = isinstance(source, tuple) and index.isdecimal() and int(index) < len(source)
            return source[int(index)] if found else None
        if opcode == "while":
            return self.loops.get(instruction.name)
        if opcode in ("fusion", "call") and instruction.called:
            return self.enter(instruction, instruction.called[0]).result()
        if opcode == "iota" and len(shape.dims) == 1:
            return Table(np.arange(shape.elements))
        if opcode == "constant":
            return _constant(instruction)
        if opcode in ("partition-id", "replica-id"):
            return self.devices if opcode == "partition-id" else self.devices * 0
        return self._operation(instruction)

    def enter(self, instruction: Instruction, name: str) -> "Frame":
        """The frame of a computation that the instruction calls with its operands."""
        parameters = [self.value(operand) for operand in instruction.operands]
        frame = Frame(self.module, name, parameters, self.devices, self.grid)
        frame.depth = self.depth
        return frame

    def _operation(self, instruction: Instruction) -> Any:
        opcode, shape = instruction.opcode, instruction.shape
        if opcode not in _OPERATIONS or not instruction.operands:
            return None
        values = [self.value(name) for name in instruction.operands]
        if opcode == "broadcast" and len(shape.dims) == 1 and isinstance(values[0], np.ndarray) and values[0].size == 1:
            return Table(np.full(shape.dims, values[0].flat[0])) if shape.elements > 1 else values[0]
        if opcode in COPIES and not isinstance(values[0], np.ndarray):
            return values[0] if opcode != "broadcast" or shape.elements == 1 else None
        if opcode == "dynamic-slice":
            return _looked_up(*values) if len(values) == 2 and shape.elements == 1 else None
        if all(isinstance(value, Table) and len(value.values) == shape.elements for value in values):
            result = _wrapped(_apply(opcode, [value.values for value in values]), shape)
            return None if result is None else Table(result)
        if shape.elements != 1:
            return None
        if opcode == "compare" and len(values) == 2:
            return _compared(instruction.attributes.get("direction", ""), *values)
        if any(isinstance(value, Linear) for value in values):
            return _linear(opcode, values)
        if any(not isinstance(value, np.ndarray) for value in values):
            return None
        if opcode == "shift-right-logical":
            values[0] = values[0] & (2 ** min(bits(shape.dtype), 63) - 1)
        return _wrapped(_apply(opcode, values), shape)


def _looked_up(table: Any, index: Any) -> Any:
    """The element of a list that a dynamic-slice takes, which stays inside of it."""
    if not isinstance(table, Table) or not isinstance(index, np.ndarray) or not len(table.values):
        return None
    return table.values[np.clip(index, 0, len(table.values) - 1)]


_OPERATIONS = {*COPIES, *_BINARY, *_UNARY, "compare", "dynamic-slice", "select", "clamp", "not"}


def _apply(opcode: str, values: list[np.ndarray]) -> np.ndarray | None:
    if opcode in COPIES:
        return values[0]
    if opcode in _UNARY:
        return _UNARY[opcode](values[0])
    if opcode in _BINARY and len(values) == 2:
        return _BINARY[opcode](*values)
    if opcode == "not":
        return ~values[0]
    if opcode == "select" and len(values) == 3:
        return np.where(values[0] != 0, values[1], values[2])
    if opcode == "clamp" and len(values) == 3:
        return np.minimum(np.maximum(values[1], values[0]), values[2])
    return None


def _linear(opcode: str, values: list[Any]) -> Linear | None:
    """Sum or difference of which one side is Linear and the other known."""
    if opcode not in ("add", "subtract") or len(values) != 2:
        return None
    left, right = values
    if isinstance(left, Linear) and isinstance(right, np.ndarray):
        return Linear(left.element, left.constant + (right if opcode == "add" else -right))
    if isinstance(right, Linear) and isinstance(left, np.ndarray) and opcode == "add":
        return Linear(right.element, right.constant + left)
    return None


def _compared(direction: str, left: Any, right: Any) -> Any:
    kinds = (Linear, np.ndarray)
    if direction not in _COMPARE or not isinstance(left, kinds) or not isinstance(right, kinds):
        return None
    if isinstance(left, Linear) or isinstance(right, Linear):
        return Test(direction, left, right)
    return np.asarray(_COMPARE[direction](left, right)).astype(np.int64)


def _is_integer(shape: Shape) -> bool:
    return shape.dtype[:1] in ("s", "u") or shape.dtype == "pred"


def _constant(instruction: Instruction) -> Any:
    """A scalar, or a list of integers, as printed."""
    text = instruction.inner.replace("{", " ").replace("}", " ").replace(",", " ")
    words = [{"true": "1", "false": "0"}.get(word, word) for word in text.split()]
    if not words or any(not word.removeprefix("-").isdecimal() or len(word) > 18 for word in words):
        return None
    values = np.array(words, np.int64)
    if len(instruction.shape.dims) == 1 and instruction.shape.dims[0] == len(values):
        return Table(values)
    return values if len(values) == 1 else None


def _wrapped(value: np.ndarray | None, shape: Shape) -> np.ndarray | None:
    """The value as an integer of that type; 64-bit ones as they are."""
    width = bits(shape.dtype)
    if value is None or width >= 64:
        return value
    if shape.dtype == "pred":
        return value & 1
    value = value & ((1 << width) - 1)
    return np.where(value >> (width - 1), value - (1 << width), value) if shape.dtype[0] == "s" else value
