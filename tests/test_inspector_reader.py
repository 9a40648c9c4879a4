"""The reader of HLO text: its grammar, its errors, and that no text makes it crash or crawl."""

import time

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from ringmoe.inspector import reader

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
    ],
)
def test_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match="HLO") as error:
        reader.parse(text)
    assert message in str(error.value)


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
