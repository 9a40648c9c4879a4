"""A share of what `make fuzz` runs: the same cases each time. And that the fuzzer sees what it looks for."""

import dataclasses

import jax
import pytest

from tests import fuzz, fuzz_cases, fuzz_programs, fuzz_shrink

ATTENTION = fuzz.draw(25, 0, fuzz_cases.attention_cases())
EXPERTS = fuzz.draw(15, 0, fuzz_cases.expert_cases())

# Cases that once were wrong, had no end, were refused or killed the process.
FOUND = (
    # Second derivatives in plain operations: XLA computed a scatter with unevenly sharded indices wrongly.
    "Case(op='experts', door='ringmoe.jit', mesh=(2, 2, 2), devices=(3, 0, 7, 2, 5, 6, 4, 1), explicit=False, "
    "jit='ringmoe.jit', operands=(Operand(name='x', shape=(3, 2, 2), spec=(('b',), ('a',)), steps=(('split', 0, 3, "
    "2),), constraint=None, manual=(), mapped=None), Operand(name='router_weight', shape=(2, 8), spec=(('b', 'c'), "
    "()), steps=(('slice', 0, 1, 1),), constraint=None, manual=(), mapped=None), Operand(name='w_in', shape=(8, 2, "
    "3), spec=((), (), (), ()), steps=(('slice', 2, 0, 1), ('join', 0, 2)), constraint=None, manual=(), "
    "mapped=None), Operand(name='w_out', shape=(8, 3, 2), spec=((), (), ('c',)), steps=(('slice', 0, 0, 1),), "
    "constraint=None, manual=(), mapped=None), Operand(name='token_mask', shape=(3, 2), spec=(('c',),), "
    "steps=(('split', 0, 3, 2),), constraint=((), ('b', 'a')), manual=(), mapped=None)), transform='hvp', "
    "options=(('top_k', 1), ('capacity_factor', 0.5), ('group_size', 2), ('renormalize', True)), manual=(), "
    "axis_name=(), check_vma=False, set_mesh=True, dtype='float32', seed=44)",
    # No end: a branch that some devices skip held a permute of XLA's, which partitions inside a partly manual shard_map.
    "Case(op='attention', door='partly manual', mesh=(2, 2, 2), devices=(5, 7, 2, 4, 6, 1, 0, 3), explicit=False, "
    "jit='jax.jit', operands=(Operand(name='query', shape=(2, 6, 4, 4), spec=(('a', 'c'), (), (), ('b',)), "
    "steps=(('slice', 0, 1, 1),), constraint=None, manual=((), ('a',), (), ()), mapped=None), Operand(name='key', "
    "shape=(2, 6, 2, 4), spec=((), ('a',), ('b',), ('c',)), steps=(('slice', 0, 0, 1),), constraint=None, "
    "manual=((), ('a',), (), ()), mapped=None), Operand(name='value', shape=(2, 6, 2, 4), spec=((), ('a',), ('b',), "
    "('c',)), steps=(), constraint=None, manual=((), ('a',), (), ()), mapped=None), Operand(name='key_lengths', "
    "shape=(2,), spec=(('a',),), steps=(), constraint=None, manual=((),), mapped=None)), transform='forward', "
    "options=(('is_causal', False), ('local_window_size', None), ('return_residual', False), ('exchange', 'auto')), "
    "manual=('a',), axis_name=('a',), check_vma=False, set_mesh=True, dtype='float32', seed=53)",
    # XLA died of a gather whose rows are split by an Auto axis inside a partly manual shard_map.
    "Case(op='experts', door='partly manual', mesh=(2, 2, 2), devices=(7, 5, 3, 6, 0, 1, 2, 4), explicit=False, "
    "jit='jax.jit', operands=(Operand(name='x', shape=(2, 4, 2), spec=(('c',), ('a',), ()), steps=(), "
    "constraint=None, manual=(('c',), (), ()), mapped=None), Operand(name='router_weight', shape=(2, 4), spec=((), "
    "('b',), ('a',)), steps=(), constraint=((), ('a', 'b')), manual=((), ()), mapped=0), Operand(name='w_in', "
    "shape=(4, 2, 8), spec=((), ('b', 'a'), (), ('c',)), steps=(), constraint=(('a', 'b'), (), ()), manual=(('c',), "
    "(), ()), mapped=0), Operand(name='w_out', shape=(4, 8, 2), spec=((), ('a', 'b'), ()), steps=(('split', 1, 8, "
    "2),), constraint=None, manual=(('c',), (), ()), mapped=0)), transform='scan grad', options=(('top_k', 1), "
    "('capacity_factor', 2.0), ('group_size', 2), ('renormalize', False)), manual=('c',), axis_name=('c',), "
    "check_vma=True, set_mesh=False, dtype='float32', seed=41)",
    # Refused: under vmap jax.numpy lost the mesh of an array made inside, where none was set.
    "Case(op='experts', door='types', mesh=(2, 4), devices=(1, 2, 3, 6, 4, 5, 0, 7), explicit=True, jit='jax.jit', "
    "operands=(Operand(name='x', shape=(3, 16, 4), spec=((), (), ('a',), ()), steps=(('transpose', (1, 2, 0)),), "
    "constraint=((), ('b',), ()), manual=(), mapped=2), Operand(name='router_weight', shape=(4, 8), spec=((), (), "
    "('a',)), steps=(), constraint=None, manual=(), mapped=2), Operand(name='w_in', shape=(8, 4, 8), spec=((), (), "
    "('a',)), steps=(('split', 1, 4, 8),), constraint=((), (), ()), manual=(), mapped=2), Operand(name='w_out', "
    "shape=(8, 8, 4), spec=((), ('a',), (), ()), steps=(), constraint=None, manual=(), mapped=1)), "
    "transform='vmap', options=(('top_k', 1), ('capacity_factor', 1.0), ('group_size', 1), ('renormalize', False)), "
    "manual=(), axis_name=(), check_vma=False, set_mesh=False, dtype='float32', seed=51)",
    # Refused: what varies inside a checked shard_map was not alike at a loop's start and end.
    "Case(op='attention', door='partly manual', mesh=(2, 2, 2), devices=(7, 0, 6, 2, 1, 4, 3, 5), explicit=False, "
    "jit='ringmoe.jit', operands=(Operand(name='query', shape=(2, 16, 3, 2), spec=((), (), ('b', 'c'), ('a',), ()), "
    "steps=(('slice', 2, 1, 0),), constraint=None, manual=((), ('b',), (), ()), mapped=0), Operand(name='key', "
    "shape=(2, 16, 1, 2), spec=((), ('c',), ('b',), ('a',), ()), steps=(('slice', 2, 0, 1),), constraint=None, "
    "manual=((), ('b',), (), ()), mapped=0), Operand(name='value', shape=(2, 16, 1, 2), spec=(('b', 'c'), (), (), "
    "(), ()), steps=(('transpose', (1, 0, 3, 2)),), constraint=None, manual=((), ('b',), (), ()), mapped=4), "
    "Operand(name='bias', shape=(2, 3, 16, 1), spec=((), (), (), ('c', 'b'), ()), steps=(('transpose', (2, 1, 3, "
    "0)),), constraint=None, manual=((), (), ('b',), ()), mapped=4), Operand(name='key_lengths', shape=(2,), "
    "spec=((), ()), steps=(), constraint=None, manual=((),), mapped=0), Operand(name='query_segments', shape=(2, "
    "16), spec=((), (), ('b', 'c')), steps=(), constraint=None, manual=((), ('b',)), mapped=1), "
    "Operand(name='key_segments', shape=(2, 16), spec=((), (), ('b', 'c', 'a'), ()), steps=(('slice', 1, 2, 2), "
    "('join', 1, 4)), constraint=None, manual=((), ()), mapped=1)), transform='vmap grad', options=(('is_causal', "
    "False), ('local_window_size', (3, 0)), ('return_residual', False), ('exchange', 'ring')), manual=('b',), "
    "axis_name=('b',), check_vma=True, set_mesh=True, dtype='float32', seed=92)",
    # XLA died of a gather from rows that an Auto axis splits the other way.
    "Case(op='experts', door='partly manual', mesh=(2, 2, 2), devices=(0, 4, 5, 3, 1, 6, 2, 7), explicit=False, "
    "jit='jax.jit', operands=(Operand(name='x', shape=(1, 12, 8), spec=(('c',), (), ('b',)), steps=(('slice', 0, 0, "
    "1),), constraint=None, manual=((), (), ()), mapped=None), Operand(name='router_weight', shape=(8, 8), "
    "spec=(('b',), ()), steps=(), constraint=None, manual=((), ()), mapped=None), Operand(name='w_in', shape=(8, 8, "
    "4), spec=((), ('b',), (), ('c',)), steps=(('join', 1, 4),), constraint=None, manual=((), (), ()), mapped=None), "
    "Operand(name='w_out', shape=(8, 4, 8), spec=(('b',), ('a',), ('c',)), steps=(('slice', 0, 2, 0), ('slice', 2, "
    "1, 1)), constraint=None, manual=((), (), ()), mapped=None), Operand(name='token_mask', shape=(1, 12), spec=((), "
    "()), steps=(('transpose', (0, 1)),), constraint=None, manual=((), ()), mapped=None)), transform='grad outside', "
    "options=(('top_k', 1), ('capacity_factor', 0.5), ('group_size', 6), ('renormalize', False)), manual=('a',), "
    "axis_name=(), check_vma=False, set_mesh=False, dtype='float32', seed=83)",
    # Refused: a result that is alike on all devices, which JAX can't see.
    "Case(op='attention', door='partly manual', mesh=(2, 2, 2), devices=(0, 4, 3, 7, 2, 5, 6, 1), explicit=True, "
    "jit='ringmoe.jit', operands=(Operand(name='query', shape=(2, 6, 2, 4), spec=(('c',), ('b',), ('a',), ()), "
    "steps=(('slice', 2, 1, 1),), constraint=(('c',), ('a',), (), ()), manual=(('c',), (), (), ()), mapped=None), "
    "Operand(name='key', shape=(2, 6, 1, 4), spec=((), ('c',), (), ()), steps=(), constraint=(('c',), (), (), ()), "
    "manual=(('c',), (), (), ()), mapped=None), Operand(name='value', shape=(2, 6, 1, 4), spec=((), (), ()), "
    "steps=(('slice', 1, 1, 0), ('split', 0, 2, 6)), constraint=(('c',), ('b',), (), ()), manual=(('c',), (), (), "
    "()), mapped=None)), transform='jvp', options=(('is_causal', True), ('local_window_size', None), "
    "('return_residual', False), ('exchange', 'all_gather')), manual=('c',), axis_name=(), check_vma=True, "
    "set_mesh=False, dtype='float32', seed=16)",
    # Wrong, once it ran: a bias's gradient was not summed over the axes that the user's shard_map leaves.
    "Case(op='attention', door='partly manual', mesh=(2, 2, 2), devices=(0, 2, 5, 1, 3, 4, 7, 6), explicit=False, "
    "jit='ringmoe.jit', operands=(Operand(name='query', shape=(2, 8, 4, 4), spec=(('a',), ('c',), ()), "
    "steps=(('split', 2, 4, 4),), constraint=None, manual=((), ('c',), (), ()), mapped=None), Operand(name='key', "
    "shape=(2, 2, 2, 4), spec=((), ('a',), (), ('c',)), steps=(), constraint=None, manual=((), ('c',), (), ()), "
    "mapped=None), Operand(name='value', shape=(2, 2, 2, 4), spec=(('a',), ('c',), ()), steps=(('slice', 2, 0, 1), "
    "('split', 2, 2, 4)), constraint=(('a',), ('c',), ('b',), ()), manual=((), ('c',), (), ()), mapped=None), "
    "Operand(name='bias', shape=(2, 1, 8, 1), spec=(('a',), ('c',), ()), steps=(('split', 0, 2, 1),), "
    "constraint=None, manual=((), (), ('c',), ()), mapped=None), Operand(name='query_segments', shape=(2, 8), "
    "spec=((), ('c',)), steps=(), constraint=None, manual=((), ('c',)), mapped=None), Operand(name='key_segments', "
    "shape=(2, 2), spec=(('a',), ('c',)), steps=(), constraint=(('a',), ()), manual=((), ()), mapped=None)), "
    "transform='hvp', options=(('is_causal', True), ('local_window_size', None), ('return_residual', False), "
    "('exchange', 'auto')), manual=('c',), axis_name=('c',), check_vma=True, set_mesh=False, dtype='float32', "
    "seed=71)",
    # The oracle divided 0 by 0: XLA computed a logit twice and rounded it otherwise the second time.
    "Case(op='attention', door='types under ringmoe.jit', mesh=(2, 2, 2), devices=(7, 6, 1, 4, 5, 3, 2, 0), "
    "explicit=True, jit='ringmoe.jit', operands=(Operand(name='query', shape=(2, 5, 8, 2), spec=(('b',), (), (), "
    "()), steps=(), constraint=None, manual=(), mapped=None), Operand(name='key', shape=(2, 5, 4, 2), spec=(('b',),"
    " (), (), ()), steps=(), constraint=None, manual=(), mapped=None), Operand(name='value', shape=(2, 5, 4, 2), "
    "spec=(('b',), (), (), ()), steps=(('slice', 2, 0, 1),), constraint=None, manual=(), mapped=None), "
    "Operand(name='bias', shape=(2, 1, 1, 5), spec=((), (), ()), steps=(('split', 2, 1, 5),), constraint=(('a',), "
    "(), (), ()), manual=(), mapped=None)), transform='jvp', options=(('is_causal', True), ('local_window_size', "
    "None), ('return_residual', False), ('exchange', 'auto')), manual=(), axis_name=(), check_vma=False, "
    "set_mesh=True, dtype='float32', seed=39)",
)


def name_of(case):
    return f"{case.op} {case.door} {'x'.join(map(str, case.mesh))} {case.transform}"


@pytest.fixture(scope="module")
def worker():
    """A process of its own: a case that hangs or kills it fails alone."""
    worker = fuzz.Worker()
    yield worker
    worker.close()


@pytest.mark.sampled
@pytest.mark.parametrize("case", [*ATTENTION, *EXPERTS, *map(fuzz.read_case, FOUND)], ids=name_of)
def test_a_program_of_any_shardings(worker, case):
    verdict = worker.verdict(case)
    assert verdict.outcome not in fuzz.FAILURES, fuzz.report(case, verdict)


def simple(**fields):
    shapes = {"query": (2, 8, 2, 4), "key": (2, 8, 2, 4), "value": (2, 8, 2, 4)}
    operands = tuple(fuzz_cases.Operand(name, shape, ((), ("a",), (), ())) for name, shape in shapes.items())
    options = {"is_causal": False, "local_window_size": None, "return_residual": False, "exchange": "auto"}
    case = fuzz_cases.Case(
        "attention", "partitioner", (8,), tuple(range(8)), False, "jax.jit", operands, "grad", tuple(options.items())
    )
    return dataclasses.replace(case, **fields)


def broken(monkeypatch, change):
    """Our attention with its results changed."""
    ours = fuzz_programs.our_attention
    monkeypatch.setitem(fuzz_programs.OURS, "attention", lambda *args: change(ours(*args)))


def test_wrong_numbers_are_seen(monkeypatch):
    assert fuzz.examine(simple()).outcome == fuzz.AGREES
    broken(monkeypatch, lambda results: {"output": results["output"] * 1.001})
    verdict = fuzz.examine(simple())
    assert (verdict.outcome, verdict.kind) == (fuzz.WRONG, "output")


def test_a_wrong_gradient_is_seen(monkeypatch):
    stopped = lambda x: x + 1e-3 * (x - jax.lax.stop_gradient(x))
    broken(monkeypatch, lambda results: {"output": stopped(results["output"])})
    verdict = fuzz.examine(simple())
    assert verdict.outcome == fuzz.WRONG and verdict.kind.startswith("gradient of")


def test_refusals_are_told_apart(monkeypatch):
    def refuse(results):
        raise ValueError("no")

    broken(monkeypatch, refuse)
    assert fuzz.examine(simple()).outcome == fuzz.REFUSED
    explicit = simple(explicit=True, door="types")  # jax.nn doesn't take a sharded sequence there
    assert fuzz.examine(explicit).outcome == fuzz.BOTH
    query, *rest = simple().operands
    nowhere = dataclasses.replace(query, shape=(2, 8, 2, 2), steps=(("split", 2, 2, 4),))
    assert fuzz.examine(simple(operands=(nowhere, *rest))).outcome == fuzz.NO_PROGRAM


def test_a_dead_process_is_a_result():
    worker = fuzz.Worker()
    try:
        case = simple(transform="forward")
        assert worker.verdict(case).outcome == fuzz.AGREES
        worker.process.kill()
        assert worker.ask(f"ours {case!r}").outcome == fuzz.DIED
        assert worker.verdict(case).outcome == fuzz.AGREES
    finally:
        worker.close()


def test_a_case_is_what_its_repr_says():
    for case in ATTENTION + EXPERTS:
        assert fuzz.read_case(repr(case)) == case


def test_a_seed_gives_the_same_cases_and_they_differ():
    again = fuzz.draw(25, 0, fuzz_cases.attention_cases())
    assert again == ATTENTION and len(set(map(repr, again))) == 25
    assert {case.door for case in fuzz.draw(60, 0)} == set(fuzz_cases.DOORS)


def test_a_failing_case_gets_simpler():
    case = next(case for case in ATTENTION if case.mesh and any(o.steps for o in case.operands))
    smallest = fuzz_shrink.shrink(case, lambda other: other.seed == case.seed)
    assert not any(operand.steps or any(operand.spec) for operand in smallest.operands)
    assert smallest.seed == case.seed and smallest.mesh == case.mesh
