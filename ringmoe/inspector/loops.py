"""How often the while loops of a program run, read from its HLO.

GPU and CPU compilers print `known_trip_count` for some; for the others the count is found again from
the loop itself: the condition compares an element of the state with a bound, the body adds a
constant to that element. Where it starts and ends may depend on the device and on the loops around
it (a causal ring computes what its hop needs): `scalars` works that out for all of them.
"""

import collections
import math
from typing import Any

import numpy as np

from ringmoe.inspector.collectives import flow
from ringmoe.inspector.reader import Instruction, Module
from ringmoe.inspector.scalars import Frame, Linear, Test

_POINTS = 64  # iterations of a loop, and devices, that are looked at: more are sampled evenly
_MOST = 2**18  # elements of a value
_MIRROR = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def trip_counts(module: Module) -> dict[tuple[str, str], float]:
    """Iterations by (computation, while instruction); those that the text does not tell are missing.

    Where they differ, it is the mean over the iterations of the loops around it, of the device that
    has the most.
    """
    counts: dict[tuple[str, str], float] = {}
    callers: collections.Counter[str] = collections.Counter([module.entry.name])
    for computation in module.computations.values():
        for instruction in computation.instructions:
            inside = flow(module, instruction)
            callers.update(name for name in instruction.called if name in inside)
    devices = _sampled(module.num_devices, _POINTS)
    frames = [Frame(module, module.entry.name, [], devices, (len(devices),))]
    while frames:
        frame = frames.pop()
        for instruction in frame.computation.instructions:
            inside = flow(module, instruction)
            axis, state = _loop(frame, instruction, counts) if instruction.opcode == "while" else ((), None)
            for name in inside:
                if callers[name] > 0:  # else it has been looked at
                    known = callers[name] == 1  # of one with several callers no parameter is
                    parameters = _parameters(frame, instruction, name, state) if known else []
                    frames.append(Frame(module, name, parameters, devices, axis + frame.grid))
                    callers[name] = 0
    return counts


def _sampled(length: int, most: int) -> np.ndarray:
    """0 to length - 1, or so many of them spread evenly, the first and the last included."""
    return np.unique(np.rint(np.linspace(0, max(length - 1, 0), min(max(length, 1), most))).astype(np.int64))


def _parameters(frame: Frame, instruction: Instruction, name: str, state: Any) -> list[Any]:
    """Values of the parameters of a computation that the instruction runs."""
    if instruction.opcode == "while":
        return [state]
    operands = instruction.operands
    if instruction.opcode == "conditional":
        position = instruction.called.index(name) + 1
        operands = operands[position : position + 1]
    return [frame.value(operand) for operand in operands]


def _loop(frame: Frame, loop: Instruction, counts: dict[tuple[str, str], float]) -> tuple[tuple[int, ...], Any]:
    """Notes the iterations of a loop. Returns the length of the axis of its iterations, () when they
    are not told apart, and the state while it runs."""
    size = len(loop.shape.parts)
    init = _elements(frame.value(loop.operands[0]) if loop.operands else None, size)
    test, step = _once(frame, loop, "condition", size), _elements(_once(frame, loop, "body", size), size)
    told = _told(loop)
    trips = np.array([told]) if told is not None else _trips(test, init, step)
    changes = [_change(Linear(i, 0), step) for i in range(size)]
    kept = tuple(value if change == 0 else None for value, change in zip(init, changes, strict=True))
    if trips is None:
        return (), kept
    counts[frame.computation.name, loop.name] = float(trips.reshape(-1, trips.shape[-1]).mean(axis=0).max())
    if trips.min() != trips.max():
        return (), kept
    trips = trips.flat[0]
    points = _sampled(int(trips), max(1, min(_POINTS, _MOST // math.prod(frame.grid))))
    during, after = list(kept), list(kept)
    for i, (value, change) in enumerate(zip(init, changes, strict=True)):
        if change and isinstance(value, np.ndarray):
            during[i] = value + change * points.reshape(-1, *[1] * len(frame.grid))
            after[i] = value + change * trips
    frame.loops[loop.name] = tuple(after)
    return (len(points),), tuple(during)


def _elements(value: Any, size: int) -> tuple:
    return value if isinstance(value, tuple) and len(value) == size else (None,) * size


def _once(frame: Frame, loop: Instruction, key: str, size: int) -> Any:
    """What the loop's condition or body makes of its state, in terms of that."""
    name = loop.attributes.get(key, "").lstrip("%")
    if name not in frame.module.computations:
        return None
    return Frame(frame.module, name, [tuple(Linear(i, 0) for i in range(size))], frame.devices, frame.grid).result()


def _told(loop: Instruction) -> int | None:
    known = loop.config.get("known_trip_count")
    count = str(known.get("n")) if isinstance(known, dict) else ""
    return int(count) if count.isdecimal() and len(count) <= 18 else None


def _trips(test: Any, init: tuple, step: tuple) -> np.ndarray | None:
    """Iterations, an array over the devices and the loops around, from the loop's condition."""
    if not isinstance(test, Test):
        return None
    direction, left, right = test
    if not isinstance(left, Linear) or (isinstance(right, Linear) and _change(left, step) == 0):
        direction, left, right = _MIRROR.get(direction, direction), right, left
    if not isinstance(left, Linear):
        return None
    by, start = _change(left, step), init[left.element]
    if isinstance(right, Linear):  # the bound is carried unchanged by the state
        first = init[right.element]
        right = first + right.constant if _change(right, step) == 0 and isinstance(first, np.ndarray) else None
    if not by or not isinstance(start, np.ndarray) or not isinstance(right, np.ndarray):
        return None
    distance = right - start - left.constant
    if direction in ("LE", "GE"):
        distance = distance + (1 if direction == "LE" else -1)
    elif direction not in ("LT", "GT", "NE"):
        return None
    return np.maximum(0, -(-distance // by))


def _change(value: Linear, step: tuple) -> int | None:
    """What one iteration adds to an element of the state; None when that isn't a constant."""
    after = step[value.element]
    if not isinstance(after, Linear) or after.element != value.element or np.size(after.constant) != 1:
        return None
    return int(np.ravel(after.constant)[0])
