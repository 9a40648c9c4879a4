"""Texts that nobody's compiler printed: each gives a report or a ValueError that says something, in a short time."""

import re
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from ringmoe import inspector

PROGRAM = """HloModule t, is_scheduled=true, num_partitions=8

FileNames
1 "a.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b), metadata={op_name="x" stack_frame_id=1}
}

%wrapped (x: f32[64,64]) -> f32[512,64] {
  %x = f32[64,64]{1,0} parameter(0)
  ROOT %g = f32[512,64]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}

%fused (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %k = s32[] constant(3)
  %s = f32[8,64]{1,0} dynamic-slice(%x, %k, %k), dynamic_slice_sizes={8,64}
  ROOT %u = f32[64,64]{1,0} dynamic-update-slice(%x, %s, %k, %k)
}

%cond (s: (s32[], f32[64,64])) -> pred[] {
  %s = (s32[], f32[64,64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %s = (s32[], f32[64,64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[64,64] get-tuple-element(%s), index=1
  %p = (f32[64,64], f32[64,64]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  %m = f32[64,64] dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %q = f32[64,64] collective-permute-done(%p)
  ROOT %out = (s32[], f32[64,64]) tuple(%next, %q)
}

ENTRY %main (w: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  %d = u32[] partition-id()
  %e = s32[] convert(%d)
  %init = (s32[], f32[64,64]) tuple(%e, %w)
  %loop = (s32[], f32[64,64]) while(%init), condition=%cond, body=%body
  %v = f32[64,64] get-tuple-element(%loop), index=1
  %f = f32[64,64] fusion(%v), kind=kLoop, calls=%fused
  %h = f32[64,64] convolution(%f, %w), window={size=1}, dim_labels=bf_io->bf
  %z = ((), (), u32[]) call-start(), async_execution_thread="sparsecore", to_apply=%wrapped
  %zu = ((f32[64,64]), f32[512,64]) call-update(%z, %f)
  %zd = f32[512,64] call-done(%zu)
  %r = f32[64,64] reduce(%h, %w), dimensions={}, to_apply=%add
  %cc = f32[64,64] custom-call(%r), custom_call_target="x", backend_config={"a":{"b":[1,2]},"c":"}"}
  %br = f32[64,64] conditional(%e, %cc, %cc), branch_computations={%fused, %fused}
  ROOT %last = f32[64,64] copy(%br)
}
"""
LINES = PROGRAM.split("\n")
WORDS = sorted(set(re.findall(r"[\w.%\-]+|\S", PROGRAM)))


def check(text, target="h200x8"):
    """The report or None; a ValueError has to say something."""
    started, message, report = time.perf_counter(), "", None
    try:
        report = inspector.inspect(text, target=target)
        assert str(report) and report.to_json() and report.to_html()
    except ValueError as error:
        message = str(error)
    assert report is not None or len(message) > 20, message
    assert time.perf_counter() - started < 10
    return report


@pytest.mark.parametrize("target", ["h200x8", "v5p:2x2x1", "cpux8"])
def test_the_program_itself_is_read(target):
    text = PROGRAM if target != "v5p:2x2x1" else PROGRAM.replace("num_partitions=8", "num_partitions=4")
    report = check(text, target)
    assert report is not None
    assert [c.kind for c in report.collectives] == ["collective-permute", "all-gather"] and report.unknown_loops == ()


@hypothesis.given(st.integers(0, len(PROGRAM)), st.integers(0, len(PROGRAM)))
@hypothesis.settings(max_examples=150)
def test_truncated_at_either_end(start, end):
    check(PROGRAM[start:end])
    check("HloModule t, is_scheduled=true\n" + PROGRAM[start:])


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, len(LINES) - 1), st.integers(0, len(LINES) - 1)), min_size=1, max_size=4)
)
@hypothesis.settings(max_examples=200)
def test_lines_moved_and_doubled(moves):
    lines = list(LINES)
    for source, place in moves:
        lines.insert(place, lines[source] if place % 2 else lines.pop(source))
    check("\n".join(lines))


@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from(WORDS),
            st.one_of(
                st.sampled_from(WORDS),
                st.sampled_from(
                    ["", "9" * 17, "9" * 30, "-1", "9" * 5000, "\x00", "\udcff", "é", '"', "{", "(", "%", "\u2028"]
                ),
                st.text(max_size=5),
            ),
        ),
        min_size=1,
        max_size=5,
    )
)
@hypothesis.settings(max_examples=600)
def test_words_changed(changes):
    text = PROGRAM
    for before, after in changes:
        text = text.replace(before, after, 1 + len(after) % 3)
    check(text)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=6))
@hypothesis.settings(max_examples=400)
def test_numbers_and_words_changed_anywhere(changes):
    text = PROGRAM
    for place, word in changes:
        spots = list(re.finditer(r"[\w.%\-]+", text))
        if not spots:
            break
        spot = spots[place % len(spots)]
        number = spot.group().isdecimal()
        text = (
            text[: spot.start()] + (str(10 ** (word % 18)) if number else WORDS[word % len(WORDS)]) + text[spot.end() :]
        )
    check(text)


def chain(count, line):
    """`count` computations, each of which calls the one before as `line` says."""
    parts = ["%f0 (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8] parameter(0)\n}\n"]
    for i in range(1, count):
        body = line.replace("@", f"%f{i - 1}")
        parts.append(f"%f{i} (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n{body}\n}}\n")
    end = f"ENTRY %main () -> f32[8] {{\n  %x = f32[8] parameter(0)\n  ROOT %r = f32[8] call(%x), to_apply=%f{count - 1}\n}}\n"
    return "HloModule t, is_scheduled=true\n" + "".join(parts) + end


def line_of(count, line):
    body = "".join("  " + line.replace("@", str(i)).replace("#", str(i - 1)) + "\n" for i in range(1, count))
    return (
        "HloModule t, is_scheduled=true, num_partitions=8\nENTRY %main () -> f32[8] {\n  %x0 = f32[8] parameter(0)\n"
        f"{body}  ROOT %r = f32[8] copy(%x0)\n}}\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            chain(count, line)
            for count in (200, 5000)
            for line in (
                "  ROOT %y = f32[8] fusion(%x), kind=kLoop, calls=@",
                "  %z = f32[8] fusion(%x), kind=kLoop, calls=@\n  ROOT %y = f32[8] fusion(%z), kind=kLoop, calls=@",
                "  %z = f32[8] call(%x), to_apply=@\n  ROOT %y = f32[8] call(%z), to_apply=@",
                "  ROOT %y = f32[8] while(%x), condition=@, body=@",
                "  %z = f32[8] async-start(%x), calls=@\n  %y = f32[8] async-start(%x), calls=@",
                "  ROOT %y = f32[8] conditional(%x, %x, %x), branch_computations={@, @}",
                "  ROOT %y = f32[8] while(%x), condition=@, body=@, "
                'backend_config={"known_trip_count":{"n":"999999999999999999"}}',
            )
        ),
        line_of(20_000, "%x@ = f32[8] add(%x#, %x#)"),
        line_of(20_000, "%x@ = s32[] add(%x#, %x#)"),
        line_of(20_000, "%x@ = f32[8] bitcast(%x#)") + "",
        line_of(3_000, "%x@ = f32[8] all-gather-start(%x#)"),
        line_of(3_000, "%x@ = (f32[8], f32[8]) collective-permute-start(%x0), source_target_pairs={{0,1}}"),
        line_of(3_000, "%x@ = f32[8] copy-done(%x#)"),
        line_of(2, "%x@ = f32[8] convolution(%x0, %x0), window={size=99999999999}, dim_labels=0_0->0"),
        line_of(2, "%x@ = f32[8] convolution(%x0, %x0), window={size=8 stride=0 lhs_dilate=0}, dim_labels=0_0->0"),
        line_of(2, "%x@ = f32[8] convolution(%x0, %x0), window={size=- stride=x}, dim_labels=0_0->0"),
        line_of(2, "%x@ = f32[8] convolution(%x0, %x0), dim_labels=0_0->0").replace("f32[8]", "f32[999999999999]"),
        line_of(2, "%x@ = f32[8] dynamic-slice()"),
        line_of(2, "%x@ = () recv(%x0)"),
        line_of(2, "%x@ = f32[8] fusion(), calls=%f").replace(
            "ENTRY", "%f {\n  %a = f32[8] all-reduce()\n  ROOT %d = f32[8] dynamic-slice()\n}\nENTRY"
        ),
        *(
            line_of(2, f"%x@ = f32[8] {opcode}()")
            for opcode in (
                "while conditional call fusion tuple get-tuple-element dot convolution reduce sort custom-call gather scatter "
                "dynamic-update-slice copy-start copy-done async-start async-update call-start call-update call-done send recv "
                "ragged-all-to-all all-reduce collective-permute-start collective-permute-done partition-id compare"
            ).split()
        ),
        line_of(2, "%x@ = f32[8] all-gather(%x0), replica_groups=[99999,99999]<=[9999800001]"),
        line_of(2, "%x@ = f32[8] all-gather(%x0), replica_groups=mesh['a'=99999999999] {'a'}"),
        line_of(2, "%x@ = f32[8] all-gather(%x0), replica_groups={{99999999999999999999}}"),
        line_of(2, "%x@ = f32[8] collective-permute(%x0), source_target_pairs={{99999999999999999999,1}}"),
        line_of(2, "%x@ = f32[8] get-tuple-element(%x0), index=" + "9" * 5000),
        line_of(2, "%x@ = f32[8] parameter(" + "9" * 5000 + ")"),
        line_of(2, "%x@ = f32[8] constant(" + "9" * 5000 + ")"),
        line_of(2, '%x@ = f32[8] custom-call(%x0), custom_call_target="x", backend_config=' + '{"a":' * 50_000),
        line_of(2, "%x@ = " + "(" * 100 + "f32[8]" + ")" * 100 + " copy(%x0)"),
        "HloModule t, is_scheduled=true\n\nENTRY %main () -> f32[] {\n}\n",
        "x" * 100_000,
        "HloModule",
        "HloModule \n",
        "\x00",
        "",
        "HloModule t, is_scheduled=true, num_partitions=" + "9" * 5000 + "\n",
    ],
    ids=lambda text: f"{text[:20]}{len(text)}",
)
def test_made_to_crash_or_to_crawl(text):
    check(text)


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "program.txt"
    file.write_bytes(PROGRAM.replace('op_name="x"', 'op_name="@"').encode().replace(b"@", b"\xff\xfe"))
    assert check(file) is not None
