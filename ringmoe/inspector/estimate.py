"""Compute time of one instruction: the longest of its matrix, vector and memory roofs.

    us = max(matmul FLOPs / matmul rate of the dtype, vector operations / vector rate, HBM bytes /
    HBM bandwidth)

Dots, convolutions and fusions count from their shapes, Pallas and other custom calls from their
cost estimate. What has no model is timed by the bytes it touches and named in
`Roofline.unestimated`, never skipped.
"""

import dataclasses
import functools
import math
import re

from ringmoe.inspector import mosaic
from ringmoe.inspector.chips import CHIPS
from ringmoe.inspector.flops import (
    convolution_flops,
    cost_estimate,
    dot_flops,
    rate_key,
    window_field,
)
from ringmoe.inspector.grammar import Shape, bits
from ringmoe.inspector.machines import Target
from ringmoe.inspector.reader import COLLECTIVES, Computation, Instruction, Module

FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "domain",
        "get-dimension-size",
        "set-dimension-size",
    }
)
_TRANSCENDENTAL = frozenset(
    {
        "exponential",
        "exponential-minus-one",
        "log",
        "log-plus-one",
        "logistic",
        "tanh",
        "tan",
        "sine",
        "cosine",
        "sqrt",
        "rsqrt",
        "cbrt",
        "power",
        "erf",
        "atan2",
        "divide",
        "remainder",
    }
)
_MOVES = frozenset(
    {
        "copy",
        "reshape",
        "transpose",
        "broadcast",
        "iota",
        "pad",
        "concatenate",
        "slice",
        "reverse",
        "dynamic-slice",
        "dynamic-update-slice",
        "gather",
        "scatter",
        "dynamic-reshape",
        "convert",
        "bitcast-convert",
        "rng-get-and-update-state",
        "rng-bit-generator",
        "rng",
        "copy-start",
        "copy-done",
    }
)
_ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "and",
        "ceil",
        "clamp",
        "clz",
        "compare",
        "complex",
        "count-leading-zeros",
        "floor",
        "imag",
        "is-finite",
        "map",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "or",
        "popcnt",
        "real",
        "reduce-precision",
        "round-nearest-afz",
        "round-nearest-even",
        "select",
        "shift-left",
        "shift-right-arithmetic",
        "shift-right-logical",
        "sign",
        "subtract",
        "xor",
        "stochastic-convert",
    }
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_THROUGH = frozenset({"bitcast", "convert", "copy", "reshape", "transpose"})
# Custom calls that are bookkeeping of the compiler's own and take no time.
_FREE_CALLS = frozenset(
    {
        "AllocateBuffer",
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "AsyncCollectiveStart",
        "AsyncCollectiveDone",
        "ConcatBitcast",
        "MoveToHost",
        "MoveToDevice",
        "AssumeGatherIndicesInBound",
        "xla.sdy.FuncResultSharding",
        "SliceId",
    }
)
_NO_MODEL = "COST_MODEL_TYPE_INVALID"
_NO_CYCLES = 2**63 - 1  # what XLA:TPU writes for some ragged matmuls
# Vector operations that one transcendental costs: its unit has a quarter of the vector slots.
_TRANSCENDENTAL_OPS = 4


@dataclasses.dataclass
class Work:
    """What one instruction does: matmul FLOPs by rate key, vector operations, HBM bytes.

    `flops` are those that the matrix units do; `useful` are those of the mathematics, None where that is the same.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    vector: float = 0.0
    bytes: float = 0.0
    useful: float | None = None

    def add(self, other: "Work") -> None:
        for key, value in other.flops.items():
            self.flops[key] = self.flops.get(key, 0.0) + value
        self.vector += other.vector
        self.bytes += other.bytes


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time of one instruction in microseconds, the roof that it touches ("matrix", "vector", "memory", or "" for
    nothing to do), and its matmul FLOPs."""

    us: float
    bound: str
    flops: float


class Roofline:
    """Times instructions of `module` on `target`; `unestimated` collects what it had no model for,
    with the reason."""

    def __init__(self, module: Module, target: Target):
        self.module = module
        self.target = target
        chip = CHIPS[target.chip]
        self.clock_hz, self.matrix_unit = chip.clock_hz, chip.matrix_unit
        self.unestimated: dict[str, str] = {}
        self._fused: dict[str, Work] = {}
        self._reads: dict[str, dict[str, float]] = {}

    def name(self, instruction: str, reason: str) -> None:
        """Notes what about an instruction has no model."""
        before = self.unestimated.get(instruction, "")
        if reason not in before:
            self.unestimated[instruction] = f"{before}; {reason}" if before else reason

    def cost(self, instruction: Instruction, computation: Computation) -> Cost:
        """Time of one instruction and what bounds it; loops, calls and branches are the walker's, and cost 0 here."""
        work = self.work(instruction, computation)
        roofs = {
            "matrix": sum(flops / self._rate(key) for key, flops in work.flops.items()),
            "vector": work.vector / self.target.vector_flops,
            "memory": work.bytes / self.target.hbm_bandwidth,
        }
        bound = max(roofs, key=lambda name: roofs[name])
        seconds = max(roofs[bound], self._compilers(instruction))
        useful = sum(work.flops.values()) if work.useful is None else work.useful
        return Cost(1e6 * seconds, bound if seconds else "", useful)

    def _compilers(self, instruction: Instruction) -> float:
        """Seconds of an instruction by the compiler's own model of its matrix units: where it is sure of having one.

        XLA:TPU writes a number for every fusion, but a model's name only beside those of matmuls; the others are bounds
        that it schedules by (a transposing copy gets sixteen times its memory's time).
        """
        window = instruction.config.get("window_config")
        if not isinstance(window, dict) or not self.clock_hz:
            return 0.0
        if window.get("cost_model_type", _NO_MODEL) == _NO_MODEL or not str(window.get("estimated_cycles")).isdecimal():
            return 0.0
        cycles = int(window["estimated_cycles"])
        return cycles / self.clock_hz if cycles < _NO_CYCLES else 0.0

    def work(self, instruction: Instruction, computation: Computation) -> Work:
        """What the instruction computes and moves."""
        opcode = instruction.opcode
        if opcode in FREE or opcode in ("while", "conditional", "call"):
            return Work()
        if opcode in ("fusion", "fusion-start") and instruction.called:
            inside = self.module.computations[instruction.called[0]]
            fused = self._fused_work(inside)
            return Work(
                dict(fused.flops),
                fused.vector,
                self._fusion_bytes(instruction, computation, inside),
            )
        if opcode == "custom-call":
            return self._custom_call(instruction, computation)
        work = self._arithmetic(instruction, computation)
        work.bytes = self._bytes(instruction, computation)
        return work

    def _rate(self, key: str) -> float:
        """FLOP/s for a rate key; dtypes the target does not list run at its slowest rate."""
        rates = self.target.matmul_flops
        return rates.get(key) or rates.get(re.sub(r"e\d.*", "", key)) or min(rates.values())

    def _fused_work(self, computation: Computation) -> Work:
        """Arithmetic of a fused computation, nested fusions included; bytes stay 0, for they are on
        chip."""
        if computation.name not in self._fused:
            self._fused[computation.name] = total = Work()
            for instruction in computation.instructions:
                if instruction.opcode == "fusion" and instruction.called:
                    total.add(self._fused_work(self.module.computations[instruction.called[0]]))
                elif instruction.opcode == "custom-call":
                    total.add(dataclasses.replace(self._custom_call(instruction, computation), bytes=0.0))
                elif instruction.opcode not in FREE:
                    total.add(self._arithmetic(instruction, computation))
        return self._fused[computation.name]

    def _arithmetic(self, instruction: Instruction, computation: Computation) -> Work:
        """FLOPs and vector operations of one unfused instruction."""
        opcode, shapes = instruction.opcode, self._operands(instruction, computation)
        elements = instruction.shape.elements
        first = shapes[0].elements if shapes else 0
        if opcode in ("dot", "ragged-dot"):
            return Work({rate_key(instruction, shapes): dot_flops(instruction, shapes)})
        if opcode == "convolution":
            return Work({rate_key(instruction, shapes): convolution_flops(instruction, shapes)})
        if opcode in _TRANSCENDENTAL:
            return Work(vector=_TRANSCENDENTAL_OPS * elements)
        if opcode in _ELEMENTWISE:
            return Work(vector=elements)
        if opcode == "reduce":
            return Work(vector=first)
        if opcode in ("reduce-window", "select-and-scatter"):
            return Work(vector=max(elements, first) * math.prod(window_field(instruction, "size") or [1]))
        if opcode == "sort":  # a bitonic network: log2(n)^2 / 2 passes of a compare and two selects
            longest = max((max(shape.dims, default=1) for shape in shapes), default=1)
            return Work(vector=1.5 * elements * math.log2(max(longest, 2)) ** 2)
        if opcode not in _MOVES | COLLECTIVES and not opcode.endswith(("-start", "-done", "-update")):
            self.name(instruction.name, f"no model for the instruction {opcode!r}: timed by its bytes")
        return Work()

    def _custom_call(self, instruction: Instruction, computation: Computation) -> Work:
        """Work of a custom call from its cost estimate or, for cuBLAS, its shapes; else its bytes,
        and it is named."""
        target, shapes = instruction.target, self._operands(instruction, computation)
        if target in _FREE_CALLS:
            return Work()
        if _hands_over(instruction, computation):
            return Work()  # what it starts, or waits for, is on the wire; it touches none of it itself
        touched = self._bytes(instruction, computation)
        cost = cost_estimate(instruction)
        counted = self._kernel(instruction, cost or {}, touched)
        if counted is not None:
            return counted
        if cost is not None:
            if self.matrix_unit and _body(instruction).startswith(mosaic.BYTECODE):
                self.name(
                    instruction.name, "kernel whose body this jaxlib does not read: timed by its author's estimate"
                )
            # A kernel's FLOPs are mostly its matmuls'. Where one operand is narrower than f32, they multiply that.
            narrow = any(bits(shape.dtype) < 32 for shape in shapes if shape.dtype[0] in "bf")
            return Work(
                {"bf16" if narrow or self.target.kind != "tpu" else "f32_highest": cost.get("flops", 0.0)},
                _TRANSCENDENTAL_OPS * cost.get("transcendentals", 0.0),
                cost.get("bytes_accessed", 0.0) or touched,
            )
        gemm = instruction.config.get("gemm_backend_config")
        if isinstance(gemm, dict) and len(shapes) > 1:
            numbers = gemm.get("dot_dimension_numbers") or {}
            contracting = [int(d) for d in numbers.get("lhs_contracting_dimensions", [])]
            depth = math.prod(shapes[0].dims[d] for d in contracting if d < len(shapes[0].dims))
            result = next(instruction.shape.leaves(), Shape("opaque"))
            return Work({rate_key(instruction, shapes): 2.0 * result.elements * depth}, bytes=touched)
        self.name(instruction.name, f"custom call {target!r} has no cost estimate: timed by its bytes")
        return Work(bytes=touched)

    def _kernel(self, instruction: Instruction, cost: dict[str, float], touched: float) -> Work | None:
        """Work of a Pallas TPU kernel counted from its body, None for any other call.

        A branch that only the run decides counts as taken; if its author's estimate has fewer FLOPs than that (he knows what
        a mask leaves), everything is scaled to his.
        """
        counted = self._bodies.get(_body(instruction))
        if counted is None:
            return None
        total = sum(counted.flops.values())
        part = 1.0
        if not counted.known:
            if 0 < cost.get("flops", 0.0) < total:
                part = cost["flops"] / total
            elif "flops" not in cost:
                self.name(instruction.name, "kernel with branches that only the run decides: all counted as taken")
        return Work(
            {key: part * flops for key, flops in counted.padded.items()},
            part * (counted.vector + _TRANSCENDENTAL_OPS * counted.transcendental),
            cost.get("bytes_accessed", 0.0) or touched,
            part * total,
        )

    @functools.cached_property
    def _bodies(self) -> dict[str, mosaic.Count | None]:
        """What is counted of each kernel of the module, by its body."""
        calls = (i for c in self.module.computations.values() for i in c.instructions if i.opcode == "custom-call")
        bodies = tuple(dict.fromkeys(filter(None, map(_body, calls))))
        return dict(zip(bodies, mosaic.counts(bodies, self.matrix_unit))) if bodies and self.matrix_unit else {}

    def _operands(self, instruction: Instruction, computation: Computation) -> list[Shape]:
        by_name = computation.by_name
        return [by_name[name].shape for name in instruction.operands if name in by_name]

    def hbm_bytes(self, shape: Shape) -> float:
        """Bytes of the arrays in it that live in HBM: on TPU a memory space other than 0 is on
        chip."""
        if self.target.kind != "tpu":
            return shape.bytes
        return sum(leaf.bytes for leaf in shape.leaves() if leaf.memory_space == 0)

    def _bytes(self, instruction: Instruction, computation: Computation) -> float:
        """HBM bytes that one unfused instruction reads and writes."""
        opcode, shapes = instruction.opcode, self._operands(instruction, computation)
        result = self.hbm_bytes(instruction.shape)
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start", "async-start"):
            # The result is (operands, destination, context) or, for a copy, (destination, source,
            # context).
            leaves = [leaf for leaf in instruction.shape.leaves() if len(leaf.dims) > 0]
            moved = min((leaf.bytes for leaf in leaves), default=0.0)
            return moved * sum(bool(self.hbm_bytes(leaf)) for leaf in leaves[:2])
        if opcode in _SLICES:
            return 2 * result
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(self.hbm_bytes(shape) for shape in shapes[1:])
        return result + sum(self.hbm_bytes(shape) for shape in shapes)

    def _fusion_bytes(self, instruction: Instruction, computation: Computation, inside: Computation) -> float:
        """HBM bytes of a fusion: its operands and results, but of one only sliced, or updated in
        place, just that part."""
        total = 0.0
        reads = self._partial_reads(inside)
        for number, shape in enumerate(self._operands(instruction, computation)):
            if self.hbm_bytes(shape):
                parameter = inside.parameters.get(number)
                total += min(
                    reads.get(parameter.name, shape.bytes) if parameter else shape.bytes,
                    shape.bytes,
                )
        root = inside.root
        outputs = (
            [root]
            if root and root.opcode != "tuple"
            else [inside.by_name.get(name) for name in (root.operands if root else ())]
        )
        result = instruction.shape  # of a fusion-start: (operands, results, context)
        if instruction.opcode == "fusion-start" and len(result.parts) > 1:
            result = result.parts[1]
        for output, shape in zip(outputs, result.leaves(), strict=False):
            if self.hbm_bytes(shape):
                update = _update_of(output, inside)
                total += min(update.bytes, shape.bytes) if update else shape.bytes
        return total

    def _partial_reads(self, inside: Computation) -> dict[str, float]:
        """Bytes read of each parameter whose every use is a slice, or the target of an update in
        place."""
        if inside.name in self._reads:
            return self._reads[inside.name]
        reads: dict[str, float] = {p.name: 0.0 for p in inside.parameters.values()}
        self._reads[inside.name] = reads
        origin = {name: name for name in reads}
        for instruction in inside.instructions:
            for position, name in enumerate(instruction.operands):
                source = origin.get(name)
                if source is None:
                    continue
                if instruction.opcode in _THROUGH:
                    origin[instruction.name] = source
                elif instruction.opcode in _SLICES and position == 0:
                    reads[source] += instruction.shape.bytes
                elif instruction.opcode == "fusion" and instruction.called:
                    nested = self.module.computations[instruction.called[0]]
                    parameter = nested.parameters.get(position)
                    reads[source] += (
                        self._partial_reads(nested).get(parameter.name, math.inf) if parameter else math.inf
                    )
                elif not (instruction.opcode == "dynamic-update-slice" and position == 0):
                    reads[source] = math.inf
        if inside.root is not None and inside.root.name in origin:
            reads[origin[inside.root.name]] = math.inf
        return reads


def _hands_over(instruction: Instruction, computation: Computation) -> bool:
    """Whether it is a kernel that gives another the semaphores of what it started, or that other one."""
    taken = (computation.by_name.get(name) for name in instruction.operands)
    return instruction.has_semaphores or any(x is not None and x.has_semaphores for x in taken)


def _body(instruction: Instruction) -> str:
    """The program of a Pallas TPU kernel as its instruction carries it, or ""."""
    call = instruction.config.get("custom_call_config") if instruction.target == "tpu_custom_call" else None
    body = call.get("body") if isinstance(call, dict) else None
    return body if isinstance(body, str) else ""


def _update_of(output: Instruction | None, inside: Computation) -> Shape | None:
    """Shape of the update when `output` is a dynamic-update-slice, seen through copies of form;
    else None."""
    while output is not None and output.opcode in _THROUGH and output.operands:
        output = inside.by_name.get(output.operands[0])
    if output is None or output.opcode != "dynamic-update-slice" or len(output.operands) < 2:
        return None
    update = inside.by_name.get(output.operands[1])
    return update.shape if update else None
