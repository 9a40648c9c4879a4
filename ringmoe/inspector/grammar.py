"""The grammar of HLO text: brackets, strings, commas, numbers and shapes.

The text is untrusted: every scan is linear in its length, and a number or a shape no program has is
a ValueError.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

# One token per bracket, comma or whole string. The closing quote is optional so that no text makes
# it backtrack.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[(){}\[\],]')
_SHAPE = re.compile(r"[(),]|([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?|/\*[^*]*\*/|\s+")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?(?= )")
DEEPEST = 256  # computations that call one another, or tuples in tuples; far more than any compiler prints
_LARGEST = 2**62  # elements of an array


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


def number(digits: str) -> int:
    """A count that the text prints; ValueError when it is none, or larger than any program's."""
    if not digits.isdecimal() or len(digits) > 18:
        raise ValueError(
            f"{digits[:40]!r} in the HLO text, expected a number of at most 18 digits: the text was edited"
        )
    return int(digits)


def pairs(text: str) -> dict[str, str]:
    """`key=value` pieces between the commas of `text`."""
    pairs = (part.strip().partition("=") for part in split(text))
    return {key: value for key, equals, value in pairs if equals}


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
    if simple := _ARRAY.match(text, position):
        return _array(*simple.groups()), simple.end()
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
            stack[-1].append(_array(*token.groups()))
        if len(stack) == 1 and stack[0]:
            return stack[0][0], position
        if len(stack) > DEEPEST:
            raise ValueError(
                f"the HLO text has a tuple in {DEEPEST} tuples, expected fewer: it was edited; pass it as printed"
            )
    return Shape("opaque"), position


@functools.lru_cache(65536)
def _array(dtype: str, sizes: str, layout: str | None) -> Shape:
    """The Shape of one match of `_SHAPE`; a bounded dimension (<=8) counts as its bound, an unknown
    one (?) as 1."""
    dims = tuple(number("".join(filter(str.isdecimal, dim)) or "1") for dim in sizes.split(",") if dim.strip())
    space = _MEMORY_SPACE.search(layout or "")
    shape = Shape(dtype, dims, number(space.group(1)) if space else 0)
    if shape.elements > _LARGEST:
        raise ValueError(
            f"an array {dtype}[{sizes[:40]}] in the HLO text, expected at most 2**62 elements: it was edited"
        )
    return shape


def statements(text: str) -> Iterator[tuple[int, str]]:
    """Lines of the text with their number, those that a bracket holds together joined into one.

    A computation's own braces stay apart: its header is yielded with the opening one, and a line
    `}` closes it.
    """
    depth, parts, first = 0, [], 0
    for count, line in enumerate(text.split("\n"), 1):
        if not depth:
            stripped = line.strip()
            if not stripped:
                continue
            if stripped.startswith("}") or (stripped.endswith("{") and " = " not in stripped):
                yield count, stripped
                continue
            if _is_closed(line):
                yield count, stripped
                continue
            parts, first = [], count
        depth += sum((mark in "([{") - (mark in ")]}") for mark in _TOKEN.findall(line) if len(mark) == 1)
        parts.append(line)
        if depth <= 0:
            depth = 0
            yield first, "\n".join(parts).strip()


def _is_closed(line: str) -> bool:
    """Whether a line closes as many brackets as it opens. Quick: a line that doesn't, counting those
    in strings, is looked at closely."""
    return all(line.count(opening) == line.count(closing) for opening, closing in ("()", "{}", "[]"))


def closing(text: str, position: int) -> int:
    """Where the parenthesis that was opened before `position` closes; -1 when nowhere."""
    close = text.find(")", position)
    if text.find("(", position, close) < 0 and text.find('"', position, close) < 0:
        return close
    depth = 1
    for token in _TOKEN.finditer(text, position):
        mark = token.group()
        depth += (mark in "([{") - (mark in ")]}") if len(mark) == 1 else 0
        if depth == 0:
            return token.start()
    return -1
