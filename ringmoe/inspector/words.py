"""Figures and names as a person reads them."""

import re
from collections.abc import Mapping

# Steps of a JAX name stack that say how something is called, not what it is.
_PLUMBING = frozenset(
    "while body cond closed_call shard_map checkpoint remat core_call pjit eval_jaxpr jvp() transpose(jvp())".split()
)


def time(us: float) -> str:
    """Microseconds in the unit that reads best."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("us", 1.0)):
        if us >= size:
            return f"{us / size:.3g} {unit}" if us / size < 999.5 else f"{us / size:.0f} {unit}"
    return f"{us:.2g} us" if us >= 1e-3 else "<1 ns" if us > 0 else "0"


def size(size: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size / scale < 999.5 else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def count(number: float) -> str:
    """A large number in the unit that reads best: 1.2 T."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} "


def runs(number: float) -> str:
    """How often something runs; a mean over iterations has a tenth."""
    return f"{round(number, 1):.9g}x"


def percent(part: float) -> str:
    """A part of 1: whole percents from 10 % on, tenths below."""
    return f"{part:.0%}" if part >= 0.0995 or not part else f"{part:.1%}"


def label(op_name: str, name: str) -> str:
    """What an instruction is in the JAX code: the last two steps of its name stack that say something, else its HLO name."""
    steps = [re.sub(r"^jit\((.*)\)$", r"\1", step) for step in op_name.split("/") if step not in _PLUMBING]
    return "/".join(steps[-2:]) if any(steps) else name


def mesh(shape: Mapping[str, int]) -> str:
    """Axes and sizes, to stand behind a machine's name."""
    return f", mesh {', '.join(f'{axis}={size}' for axis, size in shape.items())}" if shape else ""


def plain(text: str) -> str:
    """Text that moves no cursor and colours nothing: a program's names may hold any character."""
    return "".join(mark if mark.isprintable() else "?" for mark in text)
