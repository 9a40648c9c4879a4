"""What a Pallas TPU kernel does, counted from its own program.

A kernel's HLO instruction carries its body: Mosaic MLIR, one function of the grid's indices and the blocks of one step. Here
its matmuls and vector operations are counted, along the path that every step of the grid takes: scalars are evaluated from
the grid's indices, so a branch that depends on them alone is taken or not, as on the chip. Where a scalar comes from memory
(an offset that only the run knows) the costlier branch counts, and `Count.known` is False.

Bodies may come with a text from anywhere, and MLIR's reader can die of a broken one: they are read in a process of their own,
which is this file run as a program.
"""

import base64
import binascii
import dataclasses
import functools
import itertools
import json
import math
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxlib.mlir import ir

BYTECODE = "TUzvUg"  # how a Pallas kernel's body begins; XLA's own attention carries text, and a right estimate
_SECONDS = 120
_STEPS = 4096  # steps of the grid that are walked one by one; of more, evenly spaced ones
_PREFIX = "stable_mosaic."
_VECTOR = re.compile(r"vector<((?:\d+x)*)([a-z]\w*)>")
_COMPARE: Mapping[int, Any] = {
    0: operator.eq,
    1: operator.ne,
    2: operator.lt,
    3: operator.le,
    4: operator.gt,
    5: operator.ge,
}
_SCALARS: Mapping[str, Any] = {
    "arith.addi": operator.add, "arith.subi": operator.sub, "arith.muli": operator.mul, "arith.andi": operator.and_,
    "arith.ori": operator.or_, "arith.xori": operator.xor, "arith.minsi": min, "arith.maxsi": max,
    "arith.divsi": lambda a, b: int(a / b) if b else None, "arith.remsi": lambda a, b: int(math.fmod(a, b)) if b else None,
}  # fmt: skip
_SAME = frozenset({"arith.index_cast", "arith.extui", "arith.extsi", "arith.trunci", "arith.index_castui"})
# Vector operations that no slot of the vector unit is used for: they load, store, shape, or make constants.
_MOVES = frozenset(
    {"arith.constant", "vector.broadcast", "vector.shape_cast", "vector.load", "tpu.vector_store", "tpu.iota", "tpu.transpose",
     "vector.extract", "vector.extract_strided_slice", "tpu.concatenate", "tpu.bitcast", "tpu.reshape", "vector.store",
     "tpu.relayout", "vector.transpose", "tpu.repeat", "tpu.vector_load"}
)  # fmt: skip


@dataclasses.dataclass
class Count:
    """Work of a kernel on one device, or of a piece of it.

    `flops` are those of its matmuls by rate key, `padded` the same with the contracted and the last dim of each filled up
    to the matrix unit; `vector` are elementwise operations, `transcendental` those of them that need many; `known` is
    whether every branch on the way was decided.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    padded: dict[str, float] = dataclasses.field(default_factory=dict)
    vector: float = 0.0
    transcendental: float = 0.0
    known: bool = True

    def add(self, other: "Count", times: float = 1.0) -> None:
        for mine, theirs in ((self.flops, other.flops), (self.padded, other.padded)):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0.0) + times * value
        self.vector += times * other.vector
        self.transcendental += times * other.transcendental
        self.known &= other.known

    def size(self) -> float:
        """To tell the costlier of two: matmuls come a hundred to one with vector operations."""
        return sum(self.padded.values()) / 128 + self.vector + 4 * self.transcendental


_Values = dict[Any, int | None]  # of scalars, None where it isn't known
_Pass = Callable[[_Values], Count]  # one pass through a block, with what is known of its scalars


@functools.lru_cache(64)
def counts(bodies: tuple[str, ...], matrix_unit: int) -> tuple[Count | None, ...]:
    """Counts kernels.

    Args:
      bodies: `custom_call_config.body` of their instructions: MLIR bytecode in base64.
      matrix_unit: rows (and columns) of the chip's matrix unit.

    Returns:
      One for each; None for what isn't a body, or one of a form that isn't known here. All None when reading one of them was
      fatal or took minutes.
    """
    words = [sys.executable, "-I", __file__, str(matrix_unit)]
    try:
        done = subprocess.run(
            words, input=json.dumps(bodies), capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except subprocess.SubprocessError:
        return (None,) * len(bodies)
    return tuple(None if found is None else Count(**found) for found in json.loads(done.stdout))


def _count(body: str, matrix_unit: int) -> Count | None:
    """Counts one kernel, in this process."""
    try:
        context = ir.Context()
        context.allow_unregistered_dialects = True
        with context, ir.Location.unknown():
            module = ir.Module.parse(base64.b64decode(body, validate=True))
            return _Kernel(module, matrix_unit).count()
    except (ir.MLIRError, binascii.Error, ValueError, KeyError, IndexError, RecursionError):
        return None


class _Kernel:
    """The main function of a body, and its grid."""

    def __init__(self, module: Any, matrix_unit: int):
        mains = [op.operation for op in module.body.operations if "iteration_bounds" in op.operation.attributes]
        if len(mains) != 1:
            raise ValueError(f"{len(mains)} functions with a grid, expected one")
        (self.main,) = mains
        self.grid = [int(n) for n in self.main.attributes["iteration_bounds"]]
        self.matrix_unit = matrix_unit
        self.block = self.main.regions[0].blocks[0]

    def count(self) -> Count:
        sampled, steps, run = Count(), 0, self._read(self.block)
        free = self._free_dims()
        walked = [range(1) if dim in free else range(n) for dim, n in enumerate(self.grid)]
        stride = -(-math.prod(len(dim) for dim in walked) // _STEPS)
        for step in itertools.islice(itertools.product(*walked), stride // 2, None, stride):
            sampled.add(run({self.block.arguments[dim]: index for dim, index in enumerate(step)}))
            steps += 1
        whole = Count()
        whole.add(sampled, math.prod(self.grid) / max(1, steps))
        return whole

    def _free_dims(self) -> set[int]:
        """Dims of the grid that no branch and no loop depends on: their steps are all alike."""
        depends: dict[Any, frozenset[int]] = {
            self.block.arguments[dim]: frozenset({dim}) for dim in range(len(self.grid))
        }
        deciding: set[int] = set()
        for op in _walk(self.block):
            of_operands = frozenset().union(*(depends.get(value, frozenset()) for value in op.operands))
            if op.regions:
                deciding |= of_operands
            for result in op.results:
                depends[result] = of_operands
        return set(range(len(self.grid))) - deciding

    def _read(self, block: Any) -> _Pass:
        """A block, read once and not again for each step of the grid."""
        own, steps = Count(), list[Callable[[_Values], Count | None]]()
        for wrapped in block.operations:
            op = wrapped.operation
            name = op.name.removeprefix(_PREFIX)
            if name == "scf.if":
                steps.append(self._branch(op))
            elif name in ("scf.for", "scf.while"):
                steps.append(self._loop(op))
            elif op.regions:
                steps += [self._read(inner) for region in op.regions for inner in region.blocks]
            else:
                if len(op.results) == 1 and not _VECTOR.match(str(op.results[0].type)):
                    steps.append(_scalar(op, name))
                self._vector(op, name, own)

        def run(values: _Values) -> Count:
            cost = Count()
            cost.add(own)
            for step in steps:
                if (found := step(values)) is not None:
                    cost.add(found)
            return cost

        return run

    def _branch(self, op: Any) -> _Pass:
        condition = op.operands[0]
        ways = [self._read(region.blocks[0]) if len(region.blocks) else lambda _: Count() for region in op.regions]

        def run(values: _Values) -> Count:
            known = values.get(condition)
            if known is not None:
                return ways[0 if known else 1](values)
            both = [way(values) for way in ways]
            costlier = max(both, key=Count.size)
            costlier.known &= all(other.size() == costlier.size() for other in both)
            return costlier

        return run

    def _loop(self, op: Any) -> _Pass:
        counted, limits = op.name.endswith("scf.for"), list(op.operands)[:3]
        body = self._read(op.regions[-1].blocks[0])

        def run(values: _Values) -> Count:
            cost, trips = Count(), 1.0
            bounds = [values.get(value) for value in limits]
            if counted and None not in bounds and bounds[2]:
                low, high, step = (int(bound or 0) for bound in bounds)
                trips = max(0.0, math.ceil((high - low) / step))
            else:
                cost.known = False
            cost.add(body(values), trips)
            return cost

        return run

    def _vector(self, op: Any, name: str, cost: Count) -> None:
        """Adds the work of one operation on vectors."""
        if name in _MOVES or not len(op.results):
            return
        found = _VECTOR.match(str(op.results[0].type))
        if name == "tpu.matmul":
            self._matmul(op, cost)
        elif name == "vector.multi_reduction":
            cost.vector += _elements(str(op.operands[0].type))
        elif found and (name.startswith("math.") or name == "arith.divf" or name == "tpu.reciprocal"):
            cost.transcendental += _elements(str(op.results[0].type))
        elif found and name.startswith(("arith.", "vector.", "tpu.")):
            cost.vector += _elements(str(op.results[0].type))

    def _matmul(self, op: Any, cost: Count) -> None:
        (left, dtype), (right, _) = (_shape(str(value.type)) for value in list(op.operands)[:2])
        numbers = [
            [int(n) for n in re.findall(r"\d+", part)]
            for part in re.findall(r"\[([^\]]*)\]", str(op.attributes["dimension_numbers"]))
        ]
        contracting, batch = numbers[0], numbers[6] if len(numbers) > 6 else []
        depth = math.prod(left[dim] for dim in contracting)
        groups = math.prod(left[dim] for dim in batch)
        rows = math.prod(left) // max(1, depth * groups)
        columns = math.prod(right) // max(1, depth * groups)
        key = dtype
        if dtype == "f32":
            precision = str(op.attributes["precision"]) if "precision" in op.attributes else ""
            key = "f32_highest" if "fp32" in precision else "f32"
        fill = lambda n: -(-n // self.matrix_unit) * self.matrix_unit
        cost.flops[key] = cost.flops.get(key, 0.0) + 2.0 * groups * rows * depth * columns
        # Of one side a square of the unit's size stays while rows of the other go by, one a cycle; a new square comes in in as
        # many cycles as it has rows.
        side = self.matrix_unit
        filled = min(max(rows, side) * fill(columns), fill(rows) * max(columns, side)) * fill(depth)
        cost.padded[key] = cost.padded.get(key, 0.0) + 2.0 * groups * filled


def _scalar(op: Any, name: str) -> Callable[[_Values], None]:
    """Notes the value of a scalar operation, None where it isn't known."""
    (result,), operands = op.results, list(op.operands)
    of = _SCALARS.get(name)
    if name == "arith.constant":
        attribute = op.attributes["value"]
        constant = int(attribute.value) if isinstance(attribute, (ir.IntegerAttr, ir.BoolAttr)) else None
        of = lambda: constant
    elif name in _SAME:
        of = lambda x: x
    elif name == "arith.cmpi":
        compare = _COMPARE.get(int(op.attributes["predicate"].value))
        of = compare and (lambda a, b: int(compare(a, b)))

    def note(values: _Values) -> None:
        found = [values.get(operand) for operand in operands]
        if name == "arith.select" and found[0] is not None:
            values[result] = found[1] if found[0] else found[2]
        else:
            values[result] = of(*found) if of and None not in found else None

    return note


def _walk(block: Any) -> Iterator[Any]:
    """All operations of a block, those of its regions too."""
    for wrapped in block.operations:
        yield wrapped.operation
        for region in wrapped.operation.regions:
            for inner in region.blocks:
                yield from _walk(inner)


def _shape(text: str) -> tuple[tuple[int, ...], str]:
    found = _VECTOR.match(text)
    if not found:
        raise ValueError(f"{text}, expected a vector")
    return tuple(int(n) for n in found.group(1).split("x") if n), found.group(2)


def _elements(text: str) -> float:
    return float(math.prod(_shape(text)[0])) if _VECTOR.match(text) else 0.0


if __name__ == "__main__":
    _found = [_count(body, int(sys.argv[1])) for body in json.load(sys.stdin)]
    print(json.dumps([None if found is None else dataclasses.asdict(found) for found in _found]))
