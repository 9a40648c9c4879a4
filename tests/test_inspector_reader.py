"""The reader of HLO text: its grammar, its errors, and that no text makes it crash or crawl."""

import re
import time

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from ringmoe import inspector
from ringmoe.inspector import machines, reader
from tests import inspector_programs as programs

SMALL = """HloModule small, is_scheduled=true, num_partitions=4, replica_count=2

FileNames
1 "a { file (name"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, /*index=1*/%b)
}

ENTRY %main (x: f32[8,16]) -> (f32[8,16], s32[]) {
  %x = f32[8,16]{1,0:T(8,128)S(1)} parameter(0), metadata={op_name="od\\"d {[("}
  %k = f32[2,2]{1,0} constant({
    { 1, 2 },
    { 3, 4 }
  })
  %r = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add, @
  %n = s32[] constant(7)
  ROOT %t = (f32[8,16]{1,0}, s32[]) tuple(f32[8,16] %r, s32[] %n)
}
""".replace("@", 'backend_config={"a":{"b":[1,2]},"c":"}"}')


NESTED = "HloModule n\n" + "".join(
    f"f{i} {{\n  x = f32[] parameter(0)\n  ROOT y = f32[] call(x), to_apply=f{i - 1 if i else 'end'}\n}}\n"
    for i in range(300)
).replace("call(x), to_apply=fend", "copy(x)").replace("f299", "ENTRY f299")


def test_reads_every_part():
    module = reader.parse(SMALL)
    assert (module.name, module.is_scheduled, module.num_devices, module.entry.name) == (
        "small",
        True,
        8,
        "main",
    )
    assert [i.opcode for i in module.entry.instructions] == [
        "parameter",
        "constant",
        "all-reduce",
        "constant",
        "tuple",
    ]
    reduce = module.entry.by_name["r"]
    assert reduce.operands == ("x",) and reduce.called == ("add",)
    assert reduce.attributes["replica_groups"] == "{{0,1},{2,3}}" and reduce.config == {
        "a": {"b": [1, 2]},
        "c": "}",
    }
    assert module.entry.by_name["x"].shape == reader.Shape("f32", (8, 16), memory_space=1)
    assert module.entry.root.operands == ("r", "n") and module.entry.root.is_root
    assert module.computations["add"].root.operands == ("a", "b")
    assert module.computations["add"].parameters[1].name == "b"


@pytest.mark.parametrize(
    ("text", "size", "elements"),
    [
        ("f32[2,3]{1,0}", 24, 6),
        ("pred[]", 1, 1),
        ("token[]", 0, 1),
        ("s4[3]{0:T(8)(2)E(4)}", 1.5, 3),
        ("bf16[<=8,2]", 32, 16),
        ("f8e4m3fn[4]", 4, 4),
        ("c64[2]", 16, 2),
        ("((f32[2], s32[]), /*index=2*/u8[3]{0})", 15, 6),
        ("()", 0, 0),
    ],
)
def test_shapes(text, size, elements):
    shape, end = reader.parse_shape(text)
    assert (shape.bytes, shape.elements, end) == (size, elements, len(text))


def test_split_minds_brackets_and_strings():
    assert reader.split('a={1,2}, b="x,(y", c=[3,4]') == ["a={1,2}", ' b="x,(y"', " c=[3,4]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "not HLO text"),
        ("", "not HLO text"),
        ("module @jit_f { stablehlo.add }", "this is StableHLO"),
        (SMALL[: SMALL.index("ENTRY")], "before the ENTRY"),
        (SMALL[: SMALL.index("%n")], "inside computation 'main'"),
        (SMALL[: SMALL.index("replica_groups")], "inside computation 'main'"),
        (SMALL.replace("%add (a", "%gone (a"), "'add', which is not in the HLO text"),
        (SMALL.replace("%n = s32[] constant(7)", "%n = what"), "expected '%name = shape opcode"),
        (SMALL + SMALL, "more than one module: 'small', then 'small"),
        (SMALL.replace("ENTRY", "%add () -> f32[] {\n}\nENTRY"), "computation 'add' a second time"),
        (SMALL.replace("ENTRY", "{\n}\nENTRY"), "a computation without a name"),
        (SMALL.replace("f32[8,16] %r,", "f32[8,16] %gone,"), "'t' takes 'gone', which computation 'main' of the HLO"),
        (SMALL.replace("all-reduce(%x)", "all-reduce(%n)"), "defines only after it"),
        (SMALL.replace("%n = s32", "%r = s32"), "defines 'r' twice"),
        (SMALL.replace("add(%a,", "add(%b,").replace("(%b, /", "(%b), to_apply=%add, ("), "'add' calls itself"),
        (SMALL.replace("f32[8,16]{1,0:T", f"f32[{'9' * 19}]{{1,0:T"), "a number of at most 18 digits"),
        (SMALL.replace("f32[8,16]{1,0:T", f"f32[{'9' * 17},9999]{{1,0:T"), "at most 2**62 elements"),
        (SMALL.replace("f32[8,16]{1,0:T(8,128)S(1)}", "(" * 400 + ")" * 400), "tuple in 256 tuples"),
        (SMALL.replace("num_partitions=4", "num_partitions=x"), "'x' in the HLO text, expected a number"),
        (SMALL.replace("to_apply=%add", "to_apply=\n{\n}\n"), "prints a computation inside an instruction"),
        (NESTED, "calls 256 others one inside the other"),
    ],
)
def test_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match="HLO") as error:
        reader.parse(text)
    assert message in str(error.value)


def without_percent(text):
    """As `--xla_dump_hlo_as_long_text=false` prints it: no `%`, and headers without parameters."""
    text = re.sub(r"^((?:ENTRY )?%[^ ]+) \(.*\) -> .*\{$", r"\1 {", text, flags=re.MULTILINE)
    return re.sub(r"%(?=[\w.\-]+)", "", text)


def with_operand_types(text):
    """As older compilers print it: the type before each operand."""
    shapes = dict(re.findall(r"^ +(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|[^ ]+) [\w\-]+\(", text, flags=re.MULTILINE))

    def typed(match):
        return match[1] + re.sub(r"%[\w.\-]+", lambda name: f"{shapes[name[0]]} {name[0]}", match[2])

    return re.sub(r"( [\w\-]+\()(%[^()]*)(?=\))", typed, text)


@pytest.mark.parametrize("name", ["nested", "fsdp", "switch", "experts", "random"])
@pytest.mark.parametrize("target", ["v5p:2x2x2", "h200x8", "cpux8"])
def test_every_dialect_gives_the_same_report(target, name):
    mesh = machines.target(target).mesh({"seq": 8})
    known = programs.corpus({"seq": 8}) | {"experts": programs.experts({"seq": 8}, "seq", 256, 256)}
    function, *args = known[name]
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, a.sharding.spec)) for a in args]
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*args).compile().as_text()
    report = inspector.inspect(text, target=target)
    assert report.us > 0 and bool(report.collectives) == (name != "random")
    for dialect in (without_percent, with_operand_types, lambda text: without_percent(with_operand_types(text))):
        assert dialect(text) != text
        assert inspector.inspect(dialect(text), target=target) == report


@pytest.mark.parametrize("fields", ["replica_count=2, num_partitions=4, is_scheduled=true", 'f={a="num_partitions=9"}, '
    "num_partitions=8, is_scheduled=true"])  # fmt: skip
def test_fields_of_the_header_stand_in_any_order(fields):
    module = reader.parse(SMALL.replace("is_scheduled=true, num_partitions=4, replica_count=2", fields))
    assert module.is_scheduled and module.num_devices == 8


def test_source_lines_old_and_new():
    old = SMALL.replace('metadata={op_name="od', 'metadata={source_file="a b.py" source_line=7 op_name="od')
    module = reader.parse(old)
    assert module.source(module.entry.by_name["x"]) == "a b.py:7" and module.source(module.entry.by_name["n"]) == ""
    tables = """FileNames
1 "lib.py"
2 "my.py"

FileLocations
1 {file_name_id=1 line=3}
2 {file_name_id=2 function_name_id=1 line=31 end_line=31 column=12}

StackFrames
1 {file_location_id=1}
5 {file_location_id=2 parent_frame_id=1}
"""
    new = SMALL.replace('FileNames\n1 "a { file (name"\n', tables).replace("constant(7)", "constant(7), metadata={@}")
    for metadata, source in (('op_name="x" stack_frame_id=5', "my.py:31"), ("stack_frame_id=9", ""), ("", "")):
        module = reader.parse(new.replace("@", metadata))
        assert module.source(module.entry.by_name["n"]) == source


def test_source_of_a_compiled_program():
    text = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((64, 64))).compile().as_text()
    module = reader.parse(text)
    sources = {module.source(i) for c in module.computations.values() for i in c.instructions}
    assert any(re.fullmatch(r".*test_inspector_reader\.py:\d+", source) for source in sources), sources


def test_lowered_text_is_told_from_compiled():
    with pytest.raises(ValueError, match="this is StableHLO"):
        reader.parse(jax.jit(jnp.sin).lower(1.0).as_text())


def test_cut_anywhere_is_told():
    """Every proper prefix that ends before the last brace is refused, with no other exception."""
    for end in range(len(SMALL.rstrip())):
        with pytest.raises(ValueError, match="HLO"):
            reader.parse(SMALL[:end])


@hypothesis.given(
    st.lists(
        st.tuples(
            st.integers(0, len(SMALL)),
            st.sampled_from(['"', "{", ")", "\\", "\n", "=", "%", "é", "["]),
        ),
        max_size=6,
    )
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_edited_text_never_crashes(edits):
    text = SMALL
    for position, mark in edits:
        text = text[:position] + mark + text[position:]
    try:
        module = reader.parse(text)
    except ValueError:
        return
    for computation in module.computations.values():
        for instruction in computation.instructions:
            assert isinstance(instruction.operands, tuple) and isinstance(instruction.attributes, dict)
            assert isinstance(instruction.config, dict) and instruction.shape.bytes >= 0


@pytest.mark.parametrize(
    "filler",
    [
        '"' * 200_000,
        '\\"' * 100_000,
        "(" * 200_000,
        "{[" * 100_000,
        "/*" * 100_000,
        "a=b," * 50_000,
        "f32[" * 50_000,
        "S(" * 100_000,
    ],
)
def test_time_is_linear_in_hostile_text(filler):
    text = SMALL.replace('"a":{"b":[1,2]}', filler)
    started = time.perf_counter()
    try:
        module = reader.parse(text)
        assert module.entry.by_name["r"].attributes is not None
    except ValueError:
        pass
    assert time.perf_counter() - started < 5


def test_config_that_is_not_json_is_empty():
    text = SMALL.replace('{"a":{"b":[1,2]},"c":"}"}', '{module = "ML\\EFR", x = 1}')
    assert reader.parse(text).entry.by_name["r"].config == {}
    deep = SMALL.replace('{"b":[1,2]}', "[" * 100_000 + "]" * 100_000)
    assert reader.parse(deep).entry.by_name["r"].config == {}


@pytest.mark.parametrize(("written", "want"), [
    ('{"collective":"all-to-all",\n"n":3}', {"collective": "all-to-all"}),  # what isn't a string nobody asks for
    ("{nonsense}", {}), ("[" * 100_000, {}), ('["a"]', {}),
])  # fmt: skip
def test_what_a_kernels_author_says(written, want):
    made = lambda attributes: reader.Instruction("k", reader.Shape("f32"), "custom-call", "", attributes, False)
    kernel = made(f", frontend_attributes={{kernel_metadata={written}}}")
    assert kernel.kernel_metadata == want
    assert made(', frontend_attributes={a="b"}').kernel_metadata == {} == made("").kernel_metadata


def test_time_is_linear_in_the_number_of_instructions():
    def seconds(count):
        lines = [
            f'  x{i} = f32[8]{{0}} add(x{i - 1}, x{i // 2}), metadata={{op_name="a{i}"}}\n' for i in range(1, count)
        ]
        text = "HloModule t\n\nENTRY m {\n  x0 = f32[8]{0} parameter(0)\n" + "".join(lines) + "}\n"
        started = time.process_time()
        assert len(reader.parse(text).entry.instructions) == count
        return time.process_time() - started

    # Eight times as many, of this process's own time: a quadratic reader takes sixty-four times as long.
    assert min(seconds(64_000) for _ in range(2)) < 30 * min(seconds(8_000) for _ in range(3))


def test_what_ends_an_exchange_is_none():
    text = SMALL.replace("all-reduce(%x)", "all-@(%x)")
    kinds = {
        "reduce": "all-reduce",
        "foo-start": "unknown",
        "foo-done": "",
        "foo-update": "",
        "gather-start": "all-gather",
    }
    for opcode, kind in kinds.items():
        module = reader.parse(text.replace("@", opcode))
        assert module.entry.by_name["r"].exchange == kind


MARKED = {
    "tpu": SMALL.replace("replica_count=2", "replica_count=1"),
    "gpu": SMALL.replace(":T(8,128)S(1)", "")
    .replace("replica_count=2", "replica_count=1")
    .replace('{"a":', '{"operation_queue_id":"0","a":'),
    "cpu": SMALL.replace(":T(8,128)S(1)", "")
    .replace("replica_count=2", "replica_count=1")
    .replace('{"a":', '{"outer_dimension_partitions":["2"],"a":'),
}


@pytest.mark.parametrize("kind", MARKED)
def test_text_of_another_machine_is_refused(kind):
    targets = {"tpu": "v5p:2x2x1", "gpu": "h200x4", "cpu": "cpux4"}
    assert reader.platform(MARKED[kind]) == kind
    for other, target in targets.items():
        if other == kind:
            inspector.inspect(MARKED[kind], target=target)
        else:
            with pytest.raises(
                ValueError, match=f"compiled for a {kind.upper()}, target '{target}' is a {other.upper()}"
            ):
                inspector.inspect(MARKED[kind], target=target)


def test_text_without_marks_or_with_those_of_two_may_be_of_any_machine():
    assert reader.platform(MARKED["tpu"] + MARKED["gpu"]) == reader.platform("HloModule x") == ""
