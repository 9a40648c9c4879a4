"""How often loops run whose bounds the program computes: from the device, the loops around it, tables."""

import jax.numpy as jnp
import pytest

import ringmoe
from ringmoe import inspector
from ringmoe.inspector import loops, reader
from tests import inspector_programs as programs

STATE = "(s32[], s32[], s32[8])"


def computation(name, *lines, state=STATE):
    return (
        f"%{name} (s: {state}) -> s32[] {{\n  %s = {state} parameter(0)\n" + "".join(f"  {x}\n" for x in lines) + "}\n"
    )


COUNT = [
    "%i = s32[] get-tuple-element(%s), index=0",
    "%n = s32[] get-tuple-element(%s), index=1",
    "%t = s32[8] get-tuple-element(%s), index=2",
    "%one = s32[] constant(1)",
]
NEXT = ["%next = s32[] add(%i, %one)", f"ROOT %out = {STATE} tuple(%next, %n, %t)"]
COND = computation("cond", *COUNT, "ROOT %lt = pred[] compare(%i, %n), direction=LT")
INNER = computation("inner", *COUNT, *NEXT)


def counts(*lines, others="", devices=8):
    """Trip counts of a program whose entry has a device number %d and a list %table of squares."""
    text = f"HloModule t, is_scheduled=true, num_partitions={devices}\n\n{COND}{INNER}{others}\nENTRY %main () -> s32[] {{\n"
    for line in (
        "%u = u32[] partition-id()",
        "%d = s32[] convert(%u)",
        "%table = s32[8] constant({0, 1, 4, 9, 16, 25, 36, 49})",
        *(f"%c{i} = s32[] constant({i})" for i in (-1, 0, 2, 3, 5, 7)),
        *lines,
    ):
        text += f"  {line}\n"
    found = loops.trip_counts(reader.parse(text.replace("c-1", "minus") + "}\n"))
    return {loop: count for (_, loop), count in found.items()}


def loop(bound, name="loop", start="c0"):
    return (
        f"%init.{name} = {STATE} tuple(%{start}, %{bound}, %table)",
        f"%{name} = {STATE} while(%init.{name}), condition=%cond, body=%inner",
    )


@pytest.mark.parametrize(
    ("expression", "trips"),  # of the device that has the most
    [
        ("add(%d, %c3)", 10),
        ("subtract(%c5, %d)", 5),
        ("multiply(%d, %c3)", 21),
        ("divide(%d, %c2)", 3),
        ("remainder(%d, %c5)", 4),
        ("minimum(%d, %c5)", 5),
        ("maximum(%d, %c5)", 7),
        ("clamp(%c2, %d, %c5)", 5),
        ("clamp(%c2, %c7, %d)", 7),
        ("and(%d, %c5)", 5),
        ("or(%d, %c2)", 7),
        ("xor(%d, %c7)", 7),
        ("negate(%minus)", 1),
        ("abs(%minus)", 1),
        ("sign(%d)", 1),
        ("shift-left(%d, %c2)", 28),
        ("shift-right-logical(%d, %c2)", 1),
        ("shift-right-arithmetic(%minus, %c2)", 0),
        ("divide(%minus, %c2)", 0),
        ("remainder(%minus, %c5)", 0),
        ("divide(%d, %c0)", 0),
        ("dynamic-slice(%table, %d), dynamic_slice_sizes={1}", 49),
        ("dynamic-slice(%table, %minus), dynamic_slice_sizes={1}", 0),
        ("fusion(%d), kind=kLoop, calls=%double", 14),
    ],
)
def test_bounds_that_the_device_computes(expression, trips):
    double = "%double (x: s32[]) -> s32[] {\n  %x = s32[] parameter(0)\n  ROOT %y = s32[] add(%x, %x)\n}\n"
    assert counts(f"%b = s32[] {expression}", *loop("b"), others=double) == {"loop": trips}


def test_bounds_that_a_comparison_chooses():
    lines = "%p = pred[] compare(%d, %c5), direction=GE", "%q = pred[] not(%p)", "%b = s32[] select(%q, %c3, %c2)"
    assert counts(*lines, *loop("b")) == {"loop": 3}
    assert counts(*lines, *loop("b"), devices=5) == {"loop": 3}
    always = lines[0].replace("%c5", "%minus")
    assert counts(always, *lines[1:], *loop("b")) == {"loop": 2}
    assert counts(lines[0], lines[2].replace("%q", "%p"), *loop("b"), devices=5) == {"loop": 2}


def test_numbers_wrap_as_on_the_device():
    assert counts("%big = s32[] constant(2147483647)", "%b = s32[] add(%big, %c5)", *loop("b")) == {"loop": 0}


def test_lists_are_worked_out():
    lines = (
        "%i = s32[8] iota(), iota_dimension=0",
        "%w = s32[8] broadcast(%c3), dimensions={}",
        "%l = s32[8] multiply(%i, %w)",
        "%b = s32[1] dynamic-slice(%l, %d), dynamic_slice_sizes={1}",
        "%r = s32[] reshape(%b)",
    )
    assert counts(*lines, *loop("r")) == {"loop": 21}


def outer(bound):
    """A loop of 7 around one whose bound is computed from its own number %i."""
    lines = (
        "%u = u32[] partition-id()",
        "%d = s32[] convert(%u)",
        "%zero = s32[] constant(0)",
        f"%b = s32[] {bound}",
        f"%init = {STATE} tuple(%zero, %b, %t)",
        f"%nested = {STATE} while(%init), condition=%cond, body=%inner",
    )
    around = f"%around = {STATE} while(%init.a), condition=%cond, body=%outer"
    return (f"%init.a = {STATE} tuple(%c0, %c7, %table)", around), computation("outer", *COUNT, *lines, *NEXT)


@pytest.mark.parametrize(
    ("bound", "mean"),
    [
        ("add(%i, %one)", 4),  # 1 to 7
        ("subtract(%d, %i)", 4),  # of device 7: 7 to 1
        ("dynamic-slice(%t, %i), dynamic_slice_sizes={1}", 13),  # 0, 1, 4, ... 36
        ("multiply(%n, %one)", 7),
    ],
)
def test_inner_bounds_that_the_outer_loop_computes_are_counted_in_the_mean(bound, mean):
    lines, others = outer(bound)
    assert counts(*lines, others=others) == {"around": 7, "nested": mean}


def test_state_after_a_loop_is_known():
    lines = (*loop("c7"), "%after = s32[] get-tuple-element(%loop), index=0", "%b = s32[] add(%after, %c5)")
    assert counts(*lines, *loop("b", "second")) == {"loop": 7, "second": 12}


def test_what_depends_on_data_is_not_told():
    data = "%x = s32[] parameter(0)"
    assert counts(data, "%b = s32[] add(%x, %c3)", *loop("b")) == {}
    assert counts(data, *loop("c5", start="x")) == {}


def test_what_several_call_is_not_told_by_one_of_them():
    sub = "%sub (b: s32[]) -> s32[] {\n  %b = s32[] parameter(0)\n  %c0 = s32[] constant(0)\n  %table = s32[8] iota()\n"
    sub += "".join(f"  {line}\n" for line in loop("b")) + "}\n"
    one = "%one = s32[] call(%c5), to_apply=%sub"
    assert counts(one, others=sub) == {"loop": 5}
    assert counts(one, "%two = s32[] call(%c7), to_apply=%sub", others=sub) == {}


def test_many_devices_and_iterations_are_sampled():
    lines, others = outer("add(%i, %d)")
    long = [line.replace("%c7", "%many") for line in ("%many = s32[] constant(100001)", *lines)]
    found = counts(*long, others=others, devices=1024)
    assert found == {"around": 100001, "nested": pytest.approx(50000 + 1023, rel=0.02)}


def test_a_long_chain_is_given_up_and_takes_no_exponential_time():
    lines = ["%x0 = s32[] constant(1)", *(f"%x{i} = s32[] add(%x{i - 1}, %x{i - 1})" for i in range(1, 5000))]
    assert counts(*lines, *loop("x4999")) == {} and counts(*lines, *loop("x20")) == {"loop": 2**20}


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        # Blocks of 512, 8 heads, of the last device: on its own keys 1 + 2 + 3 + 4 for its 4 of rows, else 4 x 4. A turn of
        # the ring's loop is two hops, so its first work is that of hops 0, 2 and 4, its second of 1, 3 and 5; two follow.
        ({"is_causal": True, "local_window_size": (8 * 2048 - 1, 0)}, {8 * (10 + 2 * 16), 8 * 3 * 16, 8 * 16}),
        # Balanced, of any device: as many on its own keys, else either 4 blocks of rows see 2 of keys, or 2 see all 4.
        ({"is_causal": True}, {8 * (10 + 2 * 8), 8 * 3 * 8, 8 * 8}),
        ({"is_causal": True, "local_window_size": (3000, 0)}, {8 * 10, 8 * 15, 8 * 3}),
    ],
)
def test_the_loops_of_our_own_ring_are_all_told(options, blocks):
    q = programs.spec((1, 8 * 2048, 8, 128), jnp.bfloat16, {"seq": 8}, None, "seq")

    def attend(q, k, v):
        # The kernel in plain operations: a Hopper's own has its loops inside.
        return ringmoe.dot_product_attention(q, k, v, exchange="ring", implementation="xla", **options)

    report = inspector.inspect(ringmoe.jit(attend), q, q, q, target="h200x8", mesh={"seq": 8})
    assert report.unknown_loops == () and {c.kind for c in report.collectives} == {"collective-permute"}
    assert blocks <= {t.trip_count for t in report.timelines}
