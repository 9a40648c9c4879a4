"""What changed between two reports, as data, in words and on the command line."""

import dataclasses
import json

import pytest

from ringmoe import inspector
from tests.test_inspector_clock import BIG, DOT, WIRE, done, dots, program, start
from tests.test_inspector_command import here, run  # noqa: F401  a fixture
from tests.test_inspector_report import looped

CODE = ', metadata={{op_name="jit(f)/{0}"}}'


def report(*lines):
    return inspector.inspect(program(*lines), target="h200x8", mesh={"seq": 8})


def gather(name, code="", size=8, kind="all-gather"):
    group = ",".join(map(str, range(size)))
    return f"%{name} = {BIG} {kind}(%w), replica_groups={{{{{group}}}}}, dimensions={{0}}" + CODE.format(code or name)


def test_the_same_report_differs_in_nothing():
    found = inspector.diff(looped(), looped())
    assert not (found.added or found.removed or found.changed or found.operations)
    assert (
        "the same collectives" in str(found)
        and "%" not in str(found).replace(str(looped().exposed_share), "").split("same")[1]
    )


def test_times_and_collectives_that_changed():
    before, after = report(start(), *dots(1), done()), report(start(), *dots(3), done(), gather("g"))
    found = inspector.diff(before, after)
    assert [c.kind for c in found.added] == ["all-gather"] and found.removed == ()
    ((one, other),) = found.changed  # the permute is hidden now
    assert one.exposed_us == pytest.approx(WIRE - DOT) and other.exposed_us == 0
    figures = found.to_dict()["figures"]
    assert figures["us"] == [before.us, after.us] and figures["peak_bytes"] == [None, None]
    assert "added: all-gather over seq" in str(found) and "changed: collective-permute" in str(found)
    assert f"{after.us / before.us - 1:+.1%}" in str(found) and " points" in str(found)
    back = inspector.diff(after, before)
    assert [c.kind for c in back.removed] == ["all-gather"] and "removed: all-gather" in str(back)


def test_collectives_are_matched_by_place_before_bytes_and_by_bytes_before_nothing():
    before = report(gather("ga", "one"), gather("gb", "two"), gather("gc", "three", 2))
    after = report(gather("gb", "two", 4), gather("ga", "renamed"), gather("gc", "three", 2))
    found = inspector.diff(before, after)
    assert not found.added and not found.removed
    ((one, other),) = found.changed
    assert (one.name, other.name) == ("gb", "gb") and one.wire_bytes != other.wire_bytes
    apart = inspector.diff(report(gather("ga", "one")), report(gather("gb", "two", 4)))
    assert len(apart.removed) == len(apart.added) == 1 and not apart.changed
    other_kind = inspector.diff(before, report(gather("ga", "one", kind="all-reduce")))
    assert len(other_kind.removed) == 3 and len(other_kind.added) == 1


def test_equal_collectives_are_matched_in_order():
    before = report(gather("ga", "one"), gather("gb", "one"))
    found = inspector.diff(before, report(gather("x", "one")))
    assert [c.name for c in found.removed] == ["gb"] and found.added == ()


def test_operations_that_got_slower_or_faster():
    place = CODE.format("layer/dot")
    before = report(*(line + place for line in dots(2)), *dots(1, "dot1", "other"))
    after = report(*(line + place for line in dots(4)), f"%c = {BIG} copy(%w)")
    found = dict((name, (b, a)) for name, b, a in inspector.diff(before, after).operations)
    assert found["layer/dot"] == pytest.approx((2 * DOT, 4 * DOT))
    assert found["other0"] == pytest.approx((DOT, 0)) and found["c"][0] == 0 < found["c"][1]
    waits = inspector.diff(report(*dots(1)), report(*dots(1), gather("g")))
    assert waits.operations == ()  # a wait is told with its collective
    assert next(iter(found)) == "layer/dot" and "+100.0%" in str(inspector.diff(before, after))


def test_changes_of_asynchrony_and_of_executions():
    one = looped(5)
    (c,) = one.collectives
    for change in ({"asynchronous": False}, {"trip_count": 6}, {"counted": False}):
        other = dataclasses.replace(one, collectives=(dataclasses.replace(c, **change),))
        assert len(inspector.diff(one, other).changed) == 1


def test_many_changes_are_told_to_be_more():
    found = inspector.diff(report(*dots(1)), report(*(gather(f"g{i}") for i in range(13))))
    assert len(found.added) == 13 and str(found).count("added:") == 10 and "... and 3 more" in str(found)


def test_on_the_command_line(here, capsys):  # noqa: F811
    (here / "a.json").write_text(looped(5).to_json())
    (here / "b.json").write_text(looped(6).to_json())
    (here / "list.json").write_text(f"[{looped(5).to_json()}, {looped(6).to_json()}]")
    assert run("--diff", "a.json", "b.json", "--json", "d.json") == 0
    assert "a step" in capsys.readouterr().out
    record = json.loads((here / "d.json").read_text())
    assert record["schema"] == "ringmoe.diff/1" and len(record["changed"]) == 1
    assert (
        run("--diff", "a.json", "list.json", "--json", "d.json") == 0
        and len(json.loads((here / "d.json").read_text())) == 2
    )


def test_text_is_compared_for_a_target(here, capsys):  # noqa: F811
    (here / "a.txt").write_text(program(*dots(1)))
    (here / "b.txt").write_text(program(*dots(2), gather("g")))
    assert run("--diff", "a.txt", "b.txt", "--target", "h200x8", "--mesh", "seq=*") == 0
    assert "added: all-gather over seq" in capsys.readouterr().out
    assert run("--diff", "a.txt", "b.txt") == 2 and "target=None for HLO text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--diff", "none.json", "a.json"), "No such file"),
        (("--diff", "a.json", "bad.json"), "not JSON"),
        (("--diff", "a.json", "bad.json"), "in bad.json"),
        (("p:f", "--diff", "a.json", "a.json"), "beside --diff"),
        (("--diff", "a.json", "two.json"), "no target in common"),
    ],
)
def test_mistakes(here, capsys, words, message):  # noqa: F811
    (here / "a.json").write_text(looped(5).to_json())
    (here / "bad.json").write_text("{")
    other = dataclasses.replace(looped(5), target="h100x8").to_json()
    (here / "two.json").write_text(f"[{other}, {other}]")
    assert run(*words) == 2 and message in " ".join(capsys.readouterr().err.split())
