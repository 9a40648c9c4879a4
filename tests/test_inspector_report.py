"""What a report says, and that its JSON, its page and its trace say the same."""

import dataclasses
import io
import itertools
import json
import pathlib

import pytest
from rich.console import Console

from ringmoe import inspector
from ringmoe.inspector import OverlapReport, trace, words
from ringmoe.inspector.axes import Axes
from tests import inspector_programs as programs
from tests.test_inspector_clock import BIG, DOT, THIN, WIRE, done, dots, program, start

FLOPS = 2 * 1024 * 4096 * 4096
WHENCE = ', metadata={op_name="jit(f)/while/body/layer/dot_general" source_file="model.py" source_line=7}'


def loop(times):
    """Computations of a loop over two dots and a permute, and the line that runs it."""
    state = f"({THIN}, {BIG})"
    hop = [
        "%s = " + state + " parameter(0)",
        "%a = " + THIN + " get-tuple-element(%s), index=0",
        "%w = " + BIG + " get-tuple-element(%s), index=1",
        start(),
        *(line + WHENCE for line in dots(1)),
        done(),
        *dots(1, "dot0", "late"),
        f"ROOT %t = {state} tuple(%late0, %pd)",
    ]
    body = f"%body (s: {state}) -> {state} {{\n" + "\n".join("  " + line for line in hop) + "\n}\n\n"
    test = f"%test (s: {state}) -> pred[] {{\n  %s = {state} parameter(0)\n  ROOT %c = pred[] constant(true)\n}}\n\n"
    config = f'backend_config={{"known_trip_count":{{"n":"{times}"}}}}'
    lines = [
        f"%both = {state} tuple(%a, %w)",
        f"%loop = {state} while(%both), condition=%test, body=%body, {config}",
    ]
    return body + test, lines


def looped_text(times=5):
    others, lines = loop(times)
    return program(*lines, *dots(1, name="last"), others=others)


def looped(times=5):
    return inspector.inspect(looped_text(times), target="h200x8", mesh={"seq": 8})


def shown(found, width):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(found)
    return out.getvalue()


def test_the_headline_is_the_share_of_the_step():
    report = looped()
    step = max(2 * DOT, DOT + WIRE) * 5 + DOT
    assert report.us == pytest.approx(step) and report.exposed_us == pytest.approx(5 * (WIRE - DOT))
    assert report.exposed_share == pytest.approx(5 * (WIRE - DOT) / step)
    lines = str(report).splitlines()
    assert lines[1].startswith(f"{report.exposed_share:.0%} of a step is spent waiting for the wire")
    assert f"{report.exposed_fraction:.1%} of" in lines[2] and "wire time is exposed" in lines[2]


def test_operations_add_up_to_the_step_and_tell_where_they_are_from():
    report = looped()
    assert sum(o.total_us for o in report.operations) == pytest.approx(report.us)
    first, *_, wait = sorted(report.operations, key=lambda o: (o.bound, o.name))
    assert (first.name, first.bound, first.trip_count, first.source) == ("dot0", "matrix", 5, "model.py:7")
    assert first.flops == FLOPS and first.us == pytest.approx(DOT) and first.computation == "body"
    assert (wait.name, wait.opcode, wait.bound) == ("p", "collective-permute", "wire")
    assert wait.total_us == pytest.approx(report.exposed_us)
    totals = [o.total_us for o in report.operations]
    assert totals == sorted(totals, reverse=True)
    assert "layer/dot_general" in str(report) and "model.py:7" in str(report) and "matrix" in str(report)


def test_utilisation_is_of_the_hardware_unless_the_models_flops_are_known():
    report = looped()
    assert report.flops == 11 * FLOPS and report.peak_flops == 989.4e12 and report.bound_us.keys() == {"matrix"}
    assert report.hfu == pytest.approx(11 * DOT / report.us) and report.mfu is None
    assert f"HFU {report.hfu:.0%}" in str(report) and "MFU" not in str(report)
    told = dataclasses.replace(report, model_flops=8 * 5 * FLOPS)
    assert told.mfu == pytest.approx(5 / 11 * told.hfu)
    assert f"MFU {told.mfu:.0%}" in str(told) and "HFU" in str(told) and "on 8 devices" in str(told)


def test_only_the_longest_operations_of_a_computation_are_kept_but_all_are_summed():
    report = inspector.inspect(program(*dots(300)), target="h200x8")
    (timeline,) = report.timelines
    assert len(timeline.operations) == 64 and report.flops == 300 * FLOPS
    assert report.bound_us["matrix"] == pytest.approx(300 * DOT)


def test_flops_of_kernels_and_of_branches():
    kernel = 'custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
    kernel += '{"cost_estimate":{"flops":"5000","transcendentals":"0","bytes_accessed":"8"}}}'
    report = inspector.inspect(program(f"%k = {THIN} {kernel}"), target="v5e:2x4")
    assert report.flops == 5000
    branch = "%{0} (x: {1}) -> {1} {{\n  %x = {1} parameter(0)\n{2}\n}}\n\n"
    body = f"  ROOT %d = {BIG} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    others = branch.format("yes", BIG, body) + branch.format("no", BIG, f"  ROOT %c = {BIG} copy(%x)")
    line = f"%q = {BIG} conditional(%w, %w, %w), branch_computations={{%yes, %no}}"
    report = inspector.inspect(program(line, others=others), target="h200x8")
    assert report.flops == 2 * 4096**3  # of the slowest branch alone
    assert [o.computation for o in report.operations] == ["yes"]


def test_transfers_by_kind():
    gather = "%g = bf16[32768,4096] all-gather(%w), replica_groups={}, dimensions={0}"
    others, lines = loop(3)
    report = inspector.inspect(program(*lines, gather, others=others), target="h200x8", mesh={"a": 2, "b": 4})
    first, second = report.by_kind
    size = 4096 * 4096 * 2
    assert (first["kind"], first["executions"], first["bytes"]) == ("all-gather", 1, 7 * size)
    assert (second["kind"], second["executions"], second["bytes"]) == ("collective-permute", 3, 3 * size)
    assert sum(row["wire_us"] for row in report.by_kind) == pytest.approx(report.wire_us)
    assert sum(row["exposed_us"] for row in report.by_kind) == pytest.approx(report.exposed_us)
    assert {c.kind: c.axes for c in report.collectives} == {"all-gather": ("a", "b"), "collective-permute": ("a", "b")}


@pytest.mark.parametrize(
    ("attribute", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("b", "c")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("a",)),
        ("replica_groups={{0},{1}}", ()),
        ("source_target_pairs={{0,1},{1,0}}", ("c",)),
        ("source_target_pairs={{0,2},{4,6},{900,901}}", ("b",)),
        ("dimensions={0}", ()),
    ],
)
def test_axes_that_a_collective_goes_over(attribute, axes):
    def instruction(text):
        found = inspector.inspect(
            program(f"%g = {BIG} all-gather(%w), {text}"), target="h200x8", mesh={"a": 2, "b": 2, "c": 2}
        )
        return found.collectives[0]

    assert instruction(attribute).axes == axes
    assert Axes({}).of(None) == ()  # of a mesh that is not known


def test_what_a_transfer_hides_behind_is_told_by_its_name_in_the_code():
    report = looped()
    (permute,) = report.collectives
    assert permute.hidden_by == ("dot0",) and permute.hidden_by_ops == ("jit(f)/while/body/layer/dot_general",)
    assert "layer/dot_general" in next(line for line in str(report).splitlines() if "seq" in line and "MiB" in line)


@pytest.mark.parametrize(
    ("op_name", "label"),
    [
        ("jit(step)/while/body/closed_call/shard_map/attend/ppermute", "attend/ppermute"),
        ("jit(step)/add", "step/add"),
        ("", "fusion.1"),
        ("while/body", "fusion.1"),
        ("x", "x"),
    ],
)
def test_names_in_the_code(op_name, label):
    assert words.label(op_name, "fusion.1") == label


def test_figures_in_words():
    times = [words.time(us) for us in (0, 1e-5, 0.25, 999.6, 1234, 2.5e6)]
    assert times == ["0", "<1 ns", "0.25 us", "1000 us", "1.23 ms", "2.5 s"]
    assert [words.size(n) for n in (7, 2**20, 3 * 2**40)] == ["7 B", "1 MiB", "3 TiB"]
    assert [words.percent(x) for x in (0, 0.0312, 0.312)] == ["0%", "3.1%", "31%"]
    assert [words.count(n) for n in (12, 4.59e14)] == ["12 ", "459 T"]


def test_nothing_is_sent_is_said_only_then():
    assert "nothing is sent" in inspector.inspect(program(*dots(1)), target="h200x8").headline()
    branch = "%{0} (x: {1}) -> {1} {{\n  %x = {1} parameter(0)\n{2}\n}}\n\n"
    gather = f"  ROOT %g = {BIG} all-reduce(%x), replica_groups={{{{0}}}}"
    slow = f"  %c = {BIG} copy(%x)\n  ROOT %d = {BIG} copy(%c)"
    others = branch.format("yes", BIG, gather) + branch.format("no", BIG, slow)
    line = f"%q = {BIG} conditional(%w, %w, %w), branch_computations={{%yes, %no}}"
    report = inspector.inspect(program(line, others=others), target="h200x8")
    assert [c.counted for c in report.collectives] == [False] and report.wire_us == 0
    assert "nothing is sent" not in str(report) and "no collective is timed or counted" in str(report)
    assert report.by_kind == ()


@pytest.mark.parametrize("width", [80, 132])
def test_every_line_fits_the_terminal(width):
    text = shown(looped(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "collective-perm" in text and "exposed" in text and "bound by" in text


def test_names_are_no_markup_and_move_no_cursor():
    names = {'[/red]"': "x"}  # rich would take it for a closing tag
    text = program(
        *(line + ', metadata={op_name="[/red]\x1b[31m/dot"}' for line in dots(1)), f"%[/b] = {THIN} copy(%a)"
    )
    report = dataclasses.replace(inspector.inspect(text, target="h200x8"), unestimated=names)
    assert (
        "red]?[31m/dot" in str(report)
        and "[/red]" in str(report)
        and "\x1b" not in str(report)
        and "[/b]" in str(report)
    )


# JSON


def conforms(value, schema, root):
    """Whether a value is what a JSON Schema says, for the words that ours uses."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    assert schema.keys() <= set(
        "$schema $ref $defs title description anyOf const enum type items properties required additionalProperties".split()
    )
    if "$ref" in schema:
        return conforms(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema and not any(conforms(value, one, root) for one in schema["anyOf"]):
        return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    types = schema.get("type", [])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = [
        number if t == "number" else type(value) is kinds[t] for t in ([types] if isinstance(types, str) else types)
    ]
    if fits and not any(fits):
        return False
    if isinstance(value, list):
        return all(conforms(entry, schema["items"], root) for entry in value)
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema["additionalProperties"]
        return value.keys() >= set(schema.get("required", ())) and all(
            conforms(entry, properties[key], root) if key in properties else rest and conforms(entry, rest, root)
            for key, entry in value.items()
        )
    return True


@pytest.fixture(scope="module")
def schema():
    return json.loads((pathlib.Path(trace.__file__).parent / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def compiled():
    axes = {"data": 2, "seq": 4}
    small = programs.train_step(axes, layers=2, width=256, heads=2, hidden=512, tokens=256)
    return inspector.inspect(*small, target="v5p:2x2x2", mesh=axes)


def test_reports_are_what_the_schema_says(schema, compiled):
    for report in (compiled, looped(), dataclasses.replace(looped(), model_flops=1e15)):
        assert conforms(json.loads(report.to_json()), schema, schema)
    record = compiled.to_dict()
    for change in ({"us": "long"}, {"schema": "ringmoe.report/1"}, {"more": 1}, {"mesh": {"a": "b"}}, {"fits": 1}):
        assert not conforms(json.loads(json.dumps(record | change)), schema, schema)
    del record["operations"]
    assert not conforms(json.loads(json.dumps(record)), schema, schema)


def test_json_is_read_back(compiled):
    for report in (compiled, looped()):
        back = OverlapReport.from_json(report.to_json())
        assert back == dataclasses.replace(report, timelines=())
        assert str(back) == str(report) and json.loads(back.to_json()) == json.loads(report.to_json())
        assert "<!doctype html>" in back.to_html()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "ringmoe.report/1"}, "schema is 'ringmoe.report/1', expected 'ringmoe.report/2'"),
        ({"schema": [[]]}, "schema is a list"),
        ({"us": "long"}, r"report\.us is 'long', expected a number"),
        ({"us": True}, r"report\.us is True, expected a number"),
        ({"us": float("nan")}, r"report\.us is nan, expected a number"),
        ({"us": 10**400}, r"report\.us is 1000.*, expected a number"),
        ({"hbm_bytes": 1.5}, r"report\.hbm_bytes is 1\.5, expected a whole number"),
        ({"mesh": {"seq": "8"}}, r"report\.mesh\['seq'\] is '8', expected a whole number"),
        ({"mesh": []}, r"report\.mesh is a list, expected an object"),
        ({"collectives": {}}, r"report\.collectives is an object, expected a list"),
        ({"collectives": [5]}, r"report\.collectives\[0\] is 5, expected an object"),
        ({"collectives": [{}]}, r"report\.collectives\[0\] has no 'name', expected a string"),
        ({"peak_bytes": "1"}, r"report\.peak_bytes is '1', expected a whole number"),
    ],
)
def test_json_that_is_something_else(change, message):
    with pytest.raises(ValueError, match=message):
        OverlapReport.from_json(json.dumps(looped().to_dict() | change))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema": 1e999'])
def test_text_that_is_no_json(text):
    with pytest.raises(ValueError, match="not JSON"):
        OverlapReport.from_json(text)


def test_json_of_nothing_at_all():
    with pytest.raises(ValueError, match="schema is None"):
        OverlapReport.from_json("{}")
    with pytest.raises(ValueError, match="schema is a list"):
        OverlapReport.from_json("[]")
    record = looped().to_dict()
    del record["us"]
    with pytest.raises(ValueError, match="report has no 'us', expected a number"):
        OverlapReport.from_json(json.dumps(record))


def test_hostile_figures_print():
    record = looped().to_dict() | {
        "us": 0.0,
        "num_devices": 0,
        "model_flops": 1.0,
        "bound_us": {"matrix": -1.0, "x": 1.0},
    }
    back = OverlapReport.from_json(json.dumps(record))
    assert back.mfu == 0 and "MFU" in str(back) and back.to_html()


# the trace


def events(report):
    return json.loads(report.to_trace())["traceEvents"]


def test_trace_of_the_run_shows_the_first_and_the_last_iteration_inside_the_loop():
    report = looped(5)
    run = [e for e in events(report) if e["ph"] == "X" and e["pid"] == 1]
    names = {e["args"]["name"] for e in events(report) if e["name"] == "thread_name" and e["pid"] == 1}
    assert names == {"compute", "waiting for the wire", "wire"}
    (block,) = (e for e in run if e["name"] == "loop")
    assert block["args"] == {"iterations": 5, "of": "body, test"}
    one = block["dur"] / 5
    starts = sorted(e["ts"] for e in run if e["name"] == "dot0")
    assert starts == pytest.approx([block["ts"], block["ts"] + 4 * one], abs=2e-3)
    (between,) = (e for e in run if e["name"] == "3 more like these")
    assert between["dur"] == pytest.approx(3 * one, abs=2e-3)
    waits = [e for e in run if e["cat"] == "wait"]
    assert len(waits) == 2 and waits[0]["dur"] == pytest.approx(WIRE - DOT, abs=2e-3)
    wires = [e for e in run if e["cat"] == "wire"]
    assert len(wires) == 2 and wires[0]["args"]["bytes"] == 4096 * 4096 * 2 and wires[0]["args"]["over"] == "seq"


def test_every_computation_has_a_process_of_its_own():
    titles = {e["pid"]: e["args"]["name"] for e in events(looped(5)) if e["name"] == "process_name"}
    assert titles == {1: "t on h200x8", 2: "body: one of 5 executions"}
    assert len([e for e in events(looped(2)) if e["ph"] == "X" and e["pid"] == 1 and e["name"] == "dot0"]) == 2
    assert not [e for e in events(looped(2)) if "more like these" in e["name"]]


def test_events_of_a_lane_nest(compiled):
    lanes = {}
    for e in events(compiled):
        if e["ph"] == "X":
            first = round(1e3 * e["ts"])
            lanes.setdefault((e["pid"], e["tid"]), []).append((first, first + round(1e3 * e["dur"])))
    assert len(lanes) > 5
    for spans in lanes.values():
        assert spans == sorted(spans, key=lambda span: (span[0], -span[1]))
        open_ends = []
        for first, end in spans:
            while open_ends and open_ends[-1] <= first:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)


def test_transfers_that_overlap_have_a_lane_each():
    lines = [start("p"), start("q"), *dots(1), done("p"), done("q"), start("r", "w"), done("r")]
    report = inspector.inspect(program(*lines), target="h200x8")
    lanes = {}
    for e in events(report):
        if e.get("cat") == "wire":
            lanes.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"], e["name"]))
    assert sorted([name for *_, name in lane] for lane in lanes.values()) == [["p", "r"], ["q"]]
    assert all(one[1] <= other[0] for lane in lanes.values() for one, other in itertools.pairwise(lane))


def test_a_trace_keeps_its_size(monkeypatch):
    monkeypatch.setattr(trace, "_EVENTS", 5)
    run = [e for e in events(looped(3)) if e["ph"] == "X" and e["pid"] == 1]
    assert {e["name"] for e in run} == {"loop", "last0", "1 more like these"}  # no room for what is inside
    monkeypatch.setattr(trace, "_SPANS", 2)
    assert len([e for e in events(looped(5)) if e["ph"] == "X" and e["pid"] == 2]) == 2
    long = inspector.inspect(program(*dots(30)), target="h200x8")
    assert len([e for e in events(long) if e["ph"] == "X"]) == 2  # the longest, rather than none


def test_no_trace_without_timelines():
    with pytest.raises(ValueError, match="has no timelines, expected one of"):
        OverlapReport.from_json(looped().to_json()).to_trace()


# the page


def test_the_page_opens_loops():
    page = looped(5).to_html()
    data = page[page.index("const report = ") + 15 :]
    record = json.loads(data[: data.index(";\n")])
    entry = record["timelines"][record["entry"]]
    (block,) = (span for span in entry["spans"] if span[4] >= 0)
    assert block[1] == "loop" and block[5] == 5 and record["timelines"][block[4]]["name"] == "body"
    assert block[6] == pytest.approx(5 * (WIRE - DOT))  # waited inside
    assert record["operations"][0]["label"] and record["collectives"][0]["behind"] == ["layer/dot_general"]
