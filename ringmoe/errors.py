"""Checks of the caller's arguments, and warnings that are given once.

`ValueError`: the caller's mistake. `NotImplementedError`: this backend can't, the next is tried. `assert`: our own bug.
"""

import warnings


def check(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds.

    A message says what was passed, what was expected and how to mend it.
    """
    if not condition:
        raise ValueError(message)


class Unsuited(NotImplementedError):
    """The next kernel in line is no slower for this call: it is tried without a warning."""


class CostWarning(UserWarning):
    """The answer is right, but a slower or larger way to it was taken."""


_warned: set[str] = set()


def warn_once(name: str, message: str) -> None:
    """Warns with `CostWarning`, once per process and `name`: a fallback is never silent and never noisy."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name}: {message}", CostWarning, stacklevel=2)


def forget_warnings() -> None:
    """Makes every warning fresh again (tests)."""
    _warned.clear()
