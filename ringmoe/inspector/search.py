"""Which mesh of a machine's devices runs a program fastest: each shape compiled, the best first."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from ringmoe.inspector import machines, words
from ringmoe.inspector.inspect import inspect
from ringmoe.inspector.report import OverlapReport


@dataclasses.dataclass(frozen=True)
class Trial:
    """One shape of the mesh: its report, or (None) why there is none."""

    mesh: dict[str, int]
    report: OverlapReport | None
    error: str = ""

    @property
    def reason(self) -> str:
        """What holds this shape back, in words."""
        report = self.report
        if report is None:
            return self.error
        if report.fits is False:
            return f"does not fit: needs {words.size(report.peak_bytes or 0)} of {words.size(report.hbm_bytes)}"
        waits: dict[str, float] = collections.defaultdict(float)
        for c in report.collectives:
            waits[f"{c.kind}s" + (f" over {'+'.join(c.axes)}" if c.axes else "")] += c.total_us
        worst = max(waits, key=lambda what: waits[what], default="")
        if worst and waits[worst] >= 0.01 * report.us:
            return f"waits {words.time(waits[worst])} for {worst}"
        bound = max(report.bound_us, key=lambda roof: report.bound_us[roof], default="")
        return f"computes: bound by {bound}" if bound else "does nothing that takes time"


def search(
    make: Callable[[Mesh], tuple[Any, ...]],
    target: str,
    axes: Sequence[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Trial]:
    """Compiles a program for each shape of a mesh over a machine's devices.

    Args:
      make: mesh -> (function, arguments...), as `ringmoe inspect MODULE:FUNCTION` calls it.
      target: a name of `ringmoe.targets()`.
      axes: names of the mesh's axes; each shape gives them sizes whose product is the number of devices.
      limit: the most shapes to compile, spread over all of them; None is all.
      progress: called with the number of shapes done, that of all, and the shape that is next.

    Returns:
      One Trial a shape: those that fit, the fastest first; then those that don't; then those that failed.

    Raises:
      ValueError: unknown target, no axes, a name twice, a limit below 1.
    """
    machine = machines.target(target)
    names = list(axes)
    if not names or len(set(names)) != len(names) or not all(names):
        raise ValueError(f"axes {names}, expected names of the mesh's axes, each once, such as ['data', 'seq']")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}, expected a number of shapes above 0, or None for all")
    shapes = _spread([dict(zip(names, sizes)) for sizes in _factorisations(machine.num_devices, len(names))], limit)
    trials = []
    for number, shape in enumerate(shapes):
        if progress is not None:
            progress(number, len(shapes), words.mesh(shape).removeprefix(", mesh "))
        trials.append(_try(make, machine, shape))
    return sorted(trials, key=_rank)


def _try(make: Callable[[Mesh], tuple[Any, ...]], machine: machines.Target, shape: dict[str, int]) -> Trial:
    try:
        mesh = machine.mesh(shape)
        function, *arguments = make(mesh)
        return Trial(shape, inspect(function, *arguments, target=machine.name, mesh=mesh))
    except Exception as error:  # the program's own, for a shape that it can't do: the others go on
        lines = str(error).strip().splitlines()
        return Trial(shape, None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


def _rank(trial: Trial) -> tuple[bool, bool, float]:
    report = trial.report
    return (report is None, report is not None and report.fits is False, report.us if report else 0.0)


def _factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of `count` numbers, order counting."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factorisations(number // first, count - 1))


def _spread(shapes: list[dict[str, int]], limit: int | None) -> list[dict[str, int]]:
    """At most `limit` of the shapes, the first and the last among them, at even steps."""
    if limit is None or limit >= len(shapes):
        return shapes
    step = (len(shapes) - 1) / max(limit - 1, 1)
    return [shapes[round(index * step)] for index in range(limit)]
