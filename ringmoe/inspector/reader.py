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

from ringmoe.inspector.grammar import DEEPEST, Shape, closing, number, pairs, parse_shape, split, statements

_HEAD = re.compile(r"\s*(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMMENT = re.compile(r"/\*[^*]*\*/")
_PERCENT_NAME = re.compile(r"%([^\s,(){}]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_SOURCE_FILE = re.compile(r'source_file="((?:[^"\\]|\\.)*)"')
_FIELD = re.compile(r"\b(\w+)=(\d{1,18})\b")
_MODULE = re.compile(r"^HloModule ([^\s,]+)", re.MULTILINE)
_ROW = re.compile(r"(\d{1,18}) (.+)", re.DOTALL)
_JSON = json.JSONDecoder()
# What only one compiler prints: tiled layouts; queues and libraries of GPUs; thread partitions of CPUs.
_PLATFORM_MARKS = {
    "tpu": (":T(", '"tpu_custom_call"'),
    "gpu": ('"operation_queue_id":"', '="__cublas$', '="__cudnn$', '="cusolver_', '"__triton'),
    "cpu": ('{"outer_dimension_partitions":', '="__onednn$', '="lapack_'),
}
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
REMOTE_DMA = "remote-dma"  # kind of an exchange that a Pallas kernel makes in a way of its own
UNKNOWN = "unknown"  # kind of an exchange that is known only by its looks
_SEMAPHORES = 2  # memory space of XLA:TPU
STARTS = ("async-start", "call-start")  # what runs a computation beside the program
_EXCHANGE_KEYS = ("replica_groups", "source_target_pairs", "channel_id")
_EXCHANGE_NAME = re.compile(
    r"nccl|rccl|nvshmem|(?<![a-z])mpi(?![a-z])|collective|all[-_]?(to[-_]?all|gather|reduce)|reduce[-_]?scatter", re.I
)
_BOOKKEEPING = ("AsyncCollectiveStart", "AsyncCollectiveDone")  # of XLA:TPU, inside the fusions of a collective
_CALL_MARKS = ("calls=", "to_apply=", "body=", "_computation")


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
        inner = self.inner
        if self.opcode in ("constant", "parameter") or not inner:
            return ()
        if "%" in inner:
            return tuple(_PERCENT_NAME.findall(inner))
        plain = "[" not in inner and "(" not in inner
        parts = _COMMENT.sub("", inner).split(",") if plain else map(_without_comments, split(inner))
        return tuple(words[-1] for words in map(str.split, parts) if words)

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """`key=value` pieces after the operands, values as printed."""
        head, found, rest = self.tail.partition(", backend_config={")
        if not found:
            return pairs(self.tail)
        try:  # the decoder finds the end of the JSON much faster than `split` does
            end = _JSON.raw_decode("{" + rest)[1] - 1
        except (ValueError, RecursionError):
            return pairs(self.tail)
        return pairs(head + rest[end:]) | {"backend_config": "{" + rest[:end]}

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in the order printed."""
        tail = self.tail
        if not any(mark in tail for mark in _CALL_MARKS):
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

    @functools.cached_property
    def kernel_metadata(self) -> dict[str, str]:
        """What a Pallas kernel's author says of it (`pallas_call(metadata=)`), else an empty dict."""
        _, found, rest = self.attributes.get("frontend_attributes", "").partition("kernel_metadata=")
        try:
            value = _JSON.raw_decode(rest)[0] if found else {}
        except (ValueError, RecursionError):
            return {}
        return {key: text for key, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}

    @property
    def groups(self) -> str:
        """Groups of devices that exchange with each other, as printed or as a kernel says; "" where none are named."""
        return self.attributes.get("replica_groups") or self.kernel_metadata.get("replica_groups", "")

    @property
    def op_name(self) -> str:
        """The JAX name stack it came from ("jit(f)/while/body/ppermute"), or ""."""
        found = _OP_NAME.search(self.tail)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """`custom_call_target`, or ""."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @functools.cached_property
    def exchange(self) -> str:
        """Kind of the exchange between devices that it runs or starts itself: the HLO opcode without
        -start; for a Pallas kernel that moves data what its metadata calls "collective", else "remote-dma"; `UNKNOWN` for
        what only looks like one; "" for anything else."""
        opcode = self.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return "" if self.is_host_transfer else opcode
        if opcode.endswith(("-done", "-update")):
            return ""
        looks = opcode.startswith(("all-", "collective-", "ragged-all-", "reduce-scatter-"))
        if opcode == "custom-call":
            if self.is_sending_kernel:
                told = self.kernel_metadata.get("collective", "")
                return told if told in COLLECTIVES else REMOTE_DMA
            looks = self.target not in _BOOKKEEPING and _EXCHANGE_NAME.search(self.target) is not None
        looks = looks or any(f"{key}=" in self.tail and key in self.attributes for key in _EXCHANGE_KEYS)
        return UNKNOWN if looks and not self.is_host_transfer else ""

    @functools.cached_property
    def is_sending_kernel(self) -> bool:
        """Whether it is a Pallas kernel that moves data between devices."""
        call = self.config.get("custom_call_config") if self.opcode == "custom-call" else None
        return isinstance(call, dict) and bool(call.get("has_communication"))

    @property
    def has_semaphores(self) -> bool:
        """Whether what it gives are semaphores, or has some: what one kernel starts, another waits for."""
        return any(leaf.memory_space == _SEMAPHORES for leaf in self.shape.leaves())

    @property
    def is_host_transfer(self) -> bool:
        """Whether a send or recv is with the host rather than another device."""
        return "is_host_transfer=true" in self.tail


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
    def exchange(self) -> Instruction | None:
        """The first instruction that is an exchange between devices; Pallas kernels aside."""
        return next((i for i in self.instructions if i.exchange and not i.is_sending_kernel), None)

    @functools.cached_property
    def start(self) -> Instruction | None:
        """The first instruction that runs another computation beside this one."""
        return next((i for i in self.instructions if i.opcode in STARTS), None)

    @functools.cached_property
    def targets(self) -> frozenset[str]:
        """Targets of its custom calls."""
        return frozenset(i.target for i in self.instructions if i.opcode == "custom-call")

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by number."""
        found = (i for i in self.instructions if i.opcode == "parameter")
        return {number(i.inner.strip()): i for i in found if i.inner.strip().isdecimal()}


@dataclasses.dataclass
class Module:
    """A whole HLO module. `num_devices` is partitions times replicas; `tables` are the file names,
    locations and stack frames that newer compilers print once, by number."""

    name: str
    is_scheduled: bool
    num_devices: int
    computations: dict[str, Computation]
    entry: Computation
    tables: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)

    def named(self, instruction: Instruction) -> Instruction:
        """The one that tells what an instruction is of: itself, or in a fusion that XLA made around a call, and that says
        nothing, the call."""
        inside = () if instruction.op_name or instruction.opcode != "fusion" else instruction.called
        computations = (self.computations[name] for name in inside if name in self.computations)
        calls = (i for computation in computations for i in computation.instructions if i.opcode == "custom-call")
        return next((call for call in calls if call.op_name), instruction)

    def source(self, instruction: Instruction) -> str:
        """ "file.py:line" that the instruction came from, innermost frame; "" when not told."""
        metadata = instruction.attributes.get("metadata", "")
        fields = dict(_FIELD.findall(metadata))
        if "stack_frame_id" in fields:
            frame = self._row("StackFrames", fields["stack_frame_id"])
            location = self._row("FileLocations", frame.get("file_location_id", ""))
            name = self.tables.get("FileNames", {}).get(number(location.get("file_name_id", "0")), "")
            return f"{name.strip('"')}:{location.get('line', '0')}" if name else ""
        file = _SOURCE_FILE.search(metadata)
        return f"{file.group(1)}:{fields.get('source_line', '0')}" if file else ""

    def _row(self, table: str, key: str) -> dict[str, str]:
        return dict(_FIELD.findall(self.tables.get(table, {}).get(number(key or "0"), "")))


def parse(text: str) -> Module:
    """Reads HLO text.

    Args:
      text: what `compiled.as_text()` returns, or a file XLA dumped, with or without `%` before
        names and types before operands.

    Raises:
      ValueError: it is not HLO, holds more than one module, ends in the middle, or something that
        it uses is not in it.
    """
    start = _MODULE.search(text)
    if start is None:
        hint = (
            "this is StableHLO: compile it first, `lowered.compile().as_text()`"
            if "stablehlo." in text or text.lstrip().startswith("module")
            else "pass what `compiled.as_text()` returns"
        )
        raise ValueError(f"not HLO text: it begins {text[:60]!r}, expected a line 'HloModule NAME, ...'; {hint}")
    name = start.group(1)
    header, computations, tables = _blocks(text[start.start() :], name)
    entry = next((c for c in computations.values() if c.is_entry), None)
    if entry is None:
        raise _cut(name, "before the ENTRY computation")
    _check_names(computations)
    fields = pairs(header)
    num_devices = number(fields.get("num_partitions", "1")) * number(fields.get("replica_count", "1"))
    return Module(name, fields.get("is_scheduled") == "true", num_devices, computations, entry, tables)


def _blocks(text: str, name: str) -> tuple[str, dict[str, Computation], dict[str, dict[int, str]]]:
    """The header's line, the computations by name and the tables of a module's text."""
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    header, current, table = "", None, {}
    for line, statement in statements(text):
        if current is not None:
            if statement.startswith("}"):
                computations[current.name] = current
                current = None
            elif statement == "{":
                raise ValueError(
                    f"line {line} of the HLO text prints a computation inside an instruction, expected each by its "
                    "name: pass what `compiled.as_text()` returns"
                )
            else:
                current.instructions.append(_instruction(statement, line))
        elif statement.startswith("HloModule "):
            if header:
                raise ValueError(
                    f"the HLO text has more than one module: {name!r}, then {statement[10:60]!r} on line {line}; "
                    "expected one: pass them one by one"
                )
            header = statement
        elif statement.endswith("{"):
            current = _begin(statement, line)
            if current.name in computations:
                raise ValueError(
                    f"line {line} of the HLO text defines computation {current.name!r} a second time: "
                    "the text was edited; pass the whole of it as it was printed"
                )
        elif statement.isalpha():
            table = tables.setdefault(statement, {})
        elif row := _ROW.match(statement):
            table[number(row.group(1))] = row.group(2)
    if current is not None:
        raise _cut(name, f"inside computation {current.name!r}")
    return header, computations, tables


def _begin(statement: str, line: int) -> Computation:
    """The computation whose header this is: `[ENTRY] [%]name [(parameters) -> shape] {`."""
    words = statement.split(maxsplit=2)
    is_entry = words[0] == "ENTRY"
    name = words[is_entry].lstrip("%") if len(words) > is_entry + 1 else ""
    if not name:
        raise ValueError(
            f"line {line} of the HLO text begins a computation without a name ({statement[:60]!r}), expected "
            "'name (parameters) -> shape {': pass what `compiled.as_text()` returns"
        )
    return Computation(name, is_entry)


def _cut(module: str, where: str) -> ValueError:
    return ValueError(
        f"HLO text of module {module!r} ends {where}, expected a closing brace: the text was cut; pass the whole of it"
    )


def platform(text: str) -> str:
    """Which compiler printed this text, "tpu", "gpu" or "cpu"; "" when nothing in it tells for sure."""
    found = [kind for kind, marks in _PLATFORM_MARKS.items() if any(mark in text for mark in marks)]
    return found[0] if len(found) == 1 else ""


def _without_comments(text: str) -> str:
    return _COMMENT.sub("", text)


def _instruction(statement: str, line: int) -> Instruction:
    """Reads `[ROOT] %name = shape opcode(operands), attributes`."""
    head = _HEAD.match(statement)
    if head:
        shape, position = parse_shape(statement, head.end())
        opcode = _OPCODE.match(statement, position)
        close = closing(statement, opcode.end()) if opcode else -1
        if opcode and close >= 0:
            return Instruction(
                head.group(2).lstrip("%"),
                shape,
                opcode.group(1),
                statement[opcode.end() : close],
                statement[close + 1 :].lstrip(", "),
                bool(head.group(1)),
            )
    raise ValueError(
        f"line {line} of the HLO text is {statement[:80]!r}, expected '%name = shape opcode(operands)': "
        "the text was cut or edited; pass the whole of it"
    )


def _check_names(computations: dict[str, Computation]) -> None:
    """Raises when an instruction uses a value or a computation that the text does not define before
    it, or when computations call one another in a circle or too deep."""
    callees: dict[str, set[str]] = {}
    for computation in computations.values():
        defined: set[str] = set()
        called = callees.setdefault(computation.name, set())
        for instruction in computation.instructions:
            called.update(instruction.called)
            for operand in instruction.operands:
                if operand not in defined:
                    raise _undefined(computation, instruction, operand)
            if instruction.name in defined:
                raise ValueError(
                    f"computation {computation.name!r} of the HLO text defines {instruction.name!r} twice, "
                    "expected once: the text was edited; pass it as printed"
                )
            defined.add(instruction.name)
    _check_calls(callees)


def _undefined(computation: Computation, instruction: Instruction, operand: str) -> ValueError:
    late = "only after it" if operand in computation.by_name else "nowhere"
    return ValueError(
        f"{instruction.name!r} takes {operand[:80]!r}, which computation {computation.name!r} of the HLO text defines "
        f"{late}: the text was cut or edited; pass the whole of it"
    )


def _check_calls(callees: dict[str, set[str]]) -> None:
    """Raises when a computation that is called is not in the text, calls itself, or lies too deep."""
    depth: dict[str, int] = {}
    for first in callees:
        stack = [first]
        while stack:
            name = stack[-1]
            if depth.get(name, 0) > 0:
                stack.pop()
                continue
            if name in depth:  # its callees are done
                depth[name] = 1 + max((depth[callee] for callee in callees[name]), default=0)
            else:
                depth[name] = 0
                for callee in callees[name]:
                    if callee not in callees:
                        raise ValueError(
                            f"computation {name!r} calls computation {callee[:80]!r}, which is not in the HLO text: "
                            "the text was cut; pass the whole of it"
                        )
                    if depth.get(callee) == 0:
                        raise ValueError(
                            f"computation {callee!r} calls itself, expected a tree of calls: the HLO text was edited"
                        )
                    stack.append(callee)
            if depth[name] > DEEPEST:
                raise ValueError(
                    f"computation {name!r} of the HLO text calls {DEEPEST} others one inside the other, expected "
                    "fewer: the text was edited"
                )
