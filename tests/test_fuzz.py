"""A share of what `make fuzz` runs: the same cases each time. And that the fuzzer sees what it looks for."""


import pytest

from tests import fuzz, fuzz_cases

ATTENTION = fuzz.draw(25, 0, fuzz_cases.attention_cases())
EXPERTS = fuzz.draw(15, 0, fuzz_cases.expert_cases())


def name_of(case):
    return f"{case.op} {case.door} {'x'.join(map(str, case.mesh))} {case.transform}"


@pytest.mark.parametrize("case", ATTENTION + EXPERTS, ids=name_of)
def test_a_program_of_any_shardings(case):
    verdict = fuzz.examine(case)
    assert verdict.outcome not in fuzz.FAILURES, fuzz.report(case, verdict)
