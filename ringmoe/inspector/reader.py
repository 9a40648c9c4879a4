"""Scheduled HLO text -> a small tree of computations and instructions.

`parse` reads what `compiled.as_text()` prints on TPU, GPU and CPU. It knows the grammar (brackets,
strings, commas), not the opcodes: an instruction nobody has heard of still has a name, a shape,
operands and attributes. The text is untrusted: every scan is linear in its length, and nothing in
it is evaluated.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator

# One token per bracket, comma or whole string. The closing quote is optional so that no text makes
# it backtrack.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[(){}\[\],]')
_SHAPE = re.compile(r"[(),]|([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?|/\*[^*]*\*/|\s+")
_HEAD = re.compile(r"\s*(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMMENT = re.compile(r"/\*[^*]*\*/")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
PERMUTE = "collective-permute"
COLLECTIVES = frozenset(
    {
        PERMUTE,
        "all-to-all",
        "ragged-all-to-all",
        "all-gather",
        "reduce-scatter",
        "all-reduce",
        "collective-broadcast",
        "send",
        "recv",
    }
)
_CALLED = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """An array (`dtype`, `dims`, `memory_space`) or, when `dtype` is "tuple", its `parts`."""

    dtype: str
    dims: tuple[int, ...] = ()
    memory_space: int = 0
    parts: "tuple[Shape, ...]" = ()

    @property
    def elements(self) -> int:
        """Number of array elements; for a tuple, of all its parts."""
        if self.parts:
            return sum(leaf.elements for leaf in self.leaves())
        count = 1
        for dim in self.dims:
            count *= dim
        return 0 if self.dtype == "tuple" else count

    @property
    def bytes(self) -> float:
        """Size without layout padding; sub-byte types count as packed."""
        return sum(leaf.elements * bits(leaf.dtype) / 8 for leaf in self.leaves())

    def leaves(self) -> "Iterator[Shape]":
        """The arrays in it, in order."""
        stack: list[Shape] = [self]
        while stack:
            shape = stack.pop()
            if shape.dtype == "tuple":
                stack.extend(reversed(shape.parts))
            else:
                yield shape


@functools.cache
def bits(dtype: str) -> int:
    """Bits in one element of an HLO dtype: the first number in its name (bf16, s4, f8e4m3fn), 8 for
    pred, 0 for tokens."""
    digits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(digits.group()) if digits else 0


@dataclasses.dataclass
class Instruction:
    """One line of a computation. `inner` is the text between the opcode's parentheses, `tail` the
    text after them."""

    name: str
    shape: Shape
    opcode: str
    inner: str
    tail: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order; empty for constants and parameters, whose `inner` is a
        literal."""
        if self.opcode in ("constant", "parameter"):
            return ()
        parts = (_COMMENT.sub("", part).split() for part in split(self.inner))
        return tuple(part[-1].lstrip("%") for part in parts if part)

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """`key=value` pieces after the operands, values as printed."""
        pairs = (part.strip().partition("=") for part in split(self.tail))
        return {key: value for key, equals, value in pairs if equals}

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in the order printed."""
        if "=%" not in self.tail and "={%" not in self.tail:
            return ()
        values = (self.attributes[key].strip("{}") for key in _CALLED if key in self.attributes)
        return tuple(name.strip().lstrip("%") for value in values for name in value.split(",") if name.strip())

    @functools.cached_property
    def config(self) -> dict:
        """`backend_config` when it is a JSON object, else an empty dict."""
        text = self.attributes.get("backend_config", "")
        try:
            value = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            return {}  # Mosaic GPU prints MLIR attributes there
        return value if isinstance(value, dict) else {}

    @property
    def op_name(self) -> str:
        """The JAX name stack it came from ("jit(f)/while/body/ppermute"), or ""."""
        found = re.search(r'op_name="([^"]*)"', self.tail)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """`custom_call_target`, or ""."""
        return self.attributes.get("custom_call_target", "").strip('"')


@dataclasses.dataclass
class Computation:
    """Instructions in program order; `is_entry` marks the one that runs first."""

    name: str
    is_entry: bool = False
    instructions: list[Instruction] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction | None:
        """The instruction marked ROOT, else the last; None when empty."""
        marked = (instruction for instruction in self.instructions if instruction.is_root)
        return next(marked, self.instructions[-1] if self.instructions else None)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by number."""
        found = (i for i in self.instructions if i.opcode == "parameter")
        return {int(i.inner): i for i in found if i.inner.strip().isdigit()}


@dataclasses.dataclass
class Module:
    """A whole HLO module. `num_devices` is partitions times replicas."""

    name: str
    is_scheduled: bool
    num_devices: int
    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Reads HLO text.

    Args:
      text: what `compiled.as_text()` returns, or a file XLA dumped.

    Raises:
      ValueError: it is not HLO, or it ends in the middle.
    """
    start = re.search(r"^HloModule ([^\s,]+)", text, re.MULTILINE)
    if start is None:
        hint = (
            "this is StableHLO: compile it first, `lowered.compile().as_text()`"
            if "stablehlo." in text or text.lstrip().startswith("module")
            else "pass what `compiled.as_text()` returns"
        )
        raise ValueError(f"not HLO text: it begins {text[:60]!r}, expected a line 'HloModule NAME, ...'; {hint}")
    computations: dict[str, Computation] = {}
    header, current = "", None
    for line, statement in _statements(text[start.start() :]):
        if current is None:
            if statement.startswith("HloModule "):
                header = statement
            elif statement.endswith("{") and (" (" in statement or statement.endswith(" {")):
                words = statement.split(maxsplit=2)
                is_entry = words[0] == "ENTRY"
                current = Computation(words[is_entry].lstrip("%"), is_entry)
        elif statement.startswith("}"):
            computations[current.name] = current
            current = None
        else:
            current.instructions.append(_instruction(statement, line))
    entry = next((c for c in computations.values() if c.is_entry), None)
    if current is not None or entry is None:
        where = f"inside computation {current.name!r}" if current else "before the ENTRY computation"
        raise ValueError(
            f"HLO text of module {start.group(1)!r} ends {where}, expected a closing brace: the "
            "text was "
            "cut; pass the whole of it"
        )
    _check_calls(computations)
    num_devices = 1
    for key in ("num_partitions", "replica_count"):
        count = re.search(rf"\b{key}=(\d+)", header)
        num_devices *= int(count.group(1)) if count else 1
    return Module(start.group(1), "is_scheduled=true" in header, num_devices, computations, entry)


def split(text: str) -> list[str]:
    """Splits at the commas that are outside every bracket and string."""
    pieces, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif mark == "," and depth == 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    pieces.append(text[start:])
    return pieces


def parse_shape(text: str, position: int = 0) -> tuple[Shape, int]:
    """Reads the shape that starts at `position`; returns it and where it ends."""
    stack: list[list[Shape]] = [[]]
    while token := _SHAPE.match(text, position):
        mark = token.group()
        if mark == ")" and len(stack) == 1:
            break
        position = token.end()
        if mark == "(":
            stack.append([])
        elif mark == ")":
            parts = tuple(stack.pop())
            stack[-1].append(Shape("tuple", parts=parts))
        elif token.group(1):
            stack[-1].append(_array(token))
        if len(stack) == 1 and stack[0]:
            return stack[0][0], position
    return Shape("opaque"), position


def _array(token: re.Match) -> Shape:
    """The Shape of one match of `_SHAPE`; a bounded dimension (<=8) counts as its bound, an unknown
    one (?) as 1."""
    dims = tuple(int("".join(filter(str.isdecimal, dim)) or 1) for dim in token.group(2).split(",") if dim.strip())
    space = _MEMORY_SPACE.search(token.group(3) or "")
    return Shape(token.group(1), dims, int(space.group(1)) if space else 0)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Lines of the text with their number, those that a bracket holds together joined into one.

    A computation's own braces stay apart: its header is yielded with the opening one, and a line
    `}` closes it.
    """
    depth, parts, first = 0, [], 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not depth:
            if not stripped:
                continue
            parts, first = [], number
            if stripped.startswith("}") or (stripped.endswith("{") and " = " not in stripped):
                yield number, stripped
                continue
        depth += sum((mark in "([{") - (mark in ")]}") for mark in _TOKEN.findall(line) if len(mark) == 1)
        parts.append(line)
        if depth <= 0:
            depth = 0
            yield first, "\n".join(parts).strip()


def _instruction(statement: str, line: int) -> Instruction:
    """Reads `[ROOT] %name = shape opcode(operands), attributes`."""
    head = _HEAD.match(statement)
    if head:
        shape, position = parse_shape(statement, head.end())
        opcode = _OPCODE.match(statement, position)
        if opcode:
            depth = 1
            for token in _TOKEN.finditer(statement, opcode.end()):
                mark = token.group()
                depth += (mark in "([{") - (mark in ")]}") if len(mark) == 1 else 0
                if depth == 0:
                    return Instruction(
                        head.group(2).lstrip("%"),
                        shape,
                        opcode.group(1),
                        statement[opcode.end() : token.start()],
                        statement[token.end() :].lstrip(", "),
                        bool(head.group(1)),
                    )
    raise ValueError(
        f"line {line} of the HLO text is {statement[:80]!r}, expected '%name = shape "
        "opcode(operands)': "
        "the text was cut or edited; pass the whole of it"
    )


def _check_calls(computations: dict[str, Computation]) -> None:
    """Raises when a computation that is called is not in the text."""
    for computation in computations.values():
        for instruction in computation.instructions:
            for name in instruction.called:
                if name not in computations:
                    raise ValueError(
                        f"{instruction.name!r} calls computation {name!r}, which is not in the "
                        "HLO text: "
                        "the text was cut; pass the whole of it"
                    )
