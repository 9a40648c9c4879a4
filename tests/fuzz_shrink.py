"""Makes a failing case simpler while it fails the same way."""

import dataclasses
from collections.abc import Callable, Iterator

from tests.fuzz_cases import Case

PLAIN = {"is_causal": False, "local_window_size": None, "return_residual": False, "exchange": "auto"}
PLAIN |= {
    "top_k": 1,
    "capacity_factor": None,
    "group_size": 1,
    "renormalize": False,
    "scope": "group",
    "activation": None,
}
NEEDED = ("query", "key", "value", "x", "router_weight", "w_in", "w_out")


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    change = lambda **fields: dataclasses.replace(case, **fields)
    for operand in case.operands:
        if operand.name not in NEEDED:
            gone = {operand.name, operand.name.replace("query_seg", "key_seg")}
            yield change(operands=tuple(o for o in case.operands if o.name not in gone))
    for transform in ("forward", "grad", "hvp by jvp"):
        if transform != case.transform and not any(o.mapped is not None for o in case.operands):
            yield change(transform=transform)
    for name, value in case.options:
        if value != PLAIN[name]:
            yield change(options=tuple((n, PLAIN[n] if n == name else v) for n, v in case.options))
    for fields in ({"set_mesh": False}, {"check_vma": False}, {"dtype": "float32"}, {"seed": 0},
                   {"devices": tuple(range(len(case.devices)))}):  # fmt: skip
        if any(getattr(case, name) != value for name, value in fields.items()):
            yield change(**fields)
    for i, operand in enumerate(case.operands):
        bare = dataclasses.replace(operand, steps=(), spec=((),) * (len(operand.shape) + (operand.mapped is not None)))
        fewer = [bare, dataclasses.replace(operand, constraint=None)]
        fewer += [
            dataclasses.replace(operand, spec=(*operand.spec[:d], (), *operand.spec[d + 1 :]))
            for d in range(len(operand.spec))
        ]
        for one in fewer:
            if one != operand:
                yield change(operands=(*case.operands[:i], one, *case.operands[i + 1 :]))


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The simplest case found, greedily, that still fails."""
    candidates = simpler(case)
    while True:
        smaller = next((c for c in candidates if fails(c)), None)
        if smaller is None:
            return case
        case, candidates = smaller, simpler(smaller)
