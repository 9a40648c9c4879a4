"""The walk through a schedule, on programs small enough to time by hand.

On h200x8 here: `dot` of 1024 x 4096 by 4096 x 4096 in bf16 takes DOT us, a permute of 4096 x 4096
bf16 takes WIRE us.
"""

import pytest

from ringmoe import inspector
from ringmoe.inspector import machines

DOT = 2 * 1024 * 4096 * 4096 / 989.4e12 * 1e6
LATENCY = 8.4 + 3.4  # a launch and a step
WIRE = LATENCY + 4096 * 4096 * 2 / (18 * 20.6e9) * 1e6
BIG, THIN = "bf16[4096,4096]", "bf16[1024,4096]"
PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"


def dots(count, before="a", name="dot"):
    """A chain of dots that keeps the device busy for `count` times DOT."""
    lines = []
    for i in range(count):
        lines.append(f"%{name}{i} = {THIN} dot(%{before}, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}")
        before = f"{name}{i}"
    return lines


def program(*lines, others="", header="is_scheduled=true"):
    body = "\n".join("  " + line for line in lines)
    return (
        f"HloModule t, {header}, num_partitions=8\n\n{others}\nENTRY %main (w: {BIG}) -> s32[] {{\n"
        f"  %w = {BIG} parameter(0)\n  %a = {THIN} parameter(1)\n{body}\n  ROOT %end = s32[] "
        "constant(0)\n}}\n"
    )


def start(name="p", operand="w", pairs=PAIRS):
    return f"%{name} = ({BIG}, {BIG}) collective-permute-start(%{operand}), {pairs}"


def done(name="p"):
    return f"%{name}d = {BIG} collective-permute-done(%{name})"


def inspect(text):
    report = inspector.inspect(text, target="h200x8")
    assert report.us == pytest.approx(report.compute_us + report.exposed_us)
    assert 0 <= report.exposed_us <= report.wire_us * (1 + 1e-9)
    return report


def computation(name, root):
    """A computation of one big parameter x."""
    return f"%{name} (x: {BIG}) -> {BIG} {{\n  %x = {BIG} parameter(0)\n  ROOT {root}\n}}\n\n"


def only(report):
    (collective,) = report.collectives
    return collective


def test_hidden_when_enough_work_stands_between():
    enough = int(WIRE / DOT) + 2
    found = only(inspect(program(start(), *dots(enough), done())))
    assert (found.kind, found.asynchronous, found.wire_bytes) == (
        "collective-permute",
        True,
        4096 * 4096 * 2,
    )
    assert (
        found.exposed_us == 0
        and found.compute_us == pytest.approx(enough * DOT)
        and found.wire_us == pytest.approx(WIRE)
    )
    assert set(found.hidden_by) <= {f"dot{i}" for i in range(enough)} and found.hidden_by


def test_some_work_between_is_not_hidden():
    found = only(inspect(program(start(), *dots(1), done())))
    assert found.exposed_us == pytest.approx(WIRE - DOT) and found.hidden_by == ("dot0",)


def test_work_before_or_after_hides_nothing():
    found = only(inspect(program(*dots(3), start(), done(), *dots(3, "a", "late"))))
    assert found.exposed_us == pytest.approx(WIRE) and found.compute_us == 0 and found.hidden_by == ()


def test_synchronous_is_exposed():
    report = inspect(program(*dots(9), f"%p = {BIG} collective-permute(%w), {PAIRS}"))
    assert not only(report).asynchronous and report.exposed_fraction == pytest.approx(1)


def test_a_start_that_the_compiler_marks_synchronous_is():
    marked = start() + ', backend_config={"collective_backend_config":{"is_sync":true}}'
    assert not only(inspect(program(marked, *dots(9), done()))).asynchronous


def test_two_transfers_share_their_links():
    report = inspect(program(start("p"), start("q"), *dots(1), done("p"), done("q")))
    assert report.exposed_us == pytest.approx(2 * WIRE - DOT)
    assert all(c.exposed_us <= c.wire_us * (1 + 1e-9) for c in report.collectives)


def test_a_short_transfer_does_not_wait_for_a_long_one():
    small = f"%s = {THIN} collective-permute(%a), {PAIRS}"
    report = inspect(program(start(), small, *dots(9), done()))
    assert report.exposed_us == pytest.approx(
        2 * (LATENCY + (WIRE - LATENCY) / 4)
    )  # both progress while the short one is under way


FORTH = (
    "source_target_pairs={{0,1},{1,3},{3,2},{2,0}}"  # round the four chips of a 2 x 2, whose numbers count along rows
)


@pytest.mark.parametrize(("pairs", "shared"), [
    ("{{1,0},{3,1},{2,3},{0,2}}", 0.0),  # the other way round
    ("{{0,1}}", 1.0),  # a link of the way
    ("{{0,3}}", 1.0),  # two links of it, by 1
    ("{{0,3},{1,2}}", 1.0),
    ("{{1,2}}", 0.0),  # by 0 and to 2, against it
])  # fmt: skip
def test_permutes_share_the_links_that_both_use(pairs, shared):
    text = program(start("p", pairs=FORTH), start("q", pairs=f"source_target_pairs={pairs}"), done("p"), done("q"))
    report = inspector.inspect(text.replace("num_partitions=8", "num_partitions=4"), target="v5p:2x2x1")
    p, q = (c.wire_us for c in report.collectives)
    load = (
        1e6 * 4096 * 4096 * 2 / (machines.target("v5p:2x2x1").link_bandwidth * machines.target("v5p:2x2x1").link_share)
    )
    assert report.exposed_us == pytest.approx(max(p, q) + shared * load)


LOOP = """
%cond (s: (s32[], @)) -> pred[] {{
  %s = (s32[], @) parameter(0)
  %n = s32[] constant({count})
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%body (s: (s32[], @)) -> (s32[], @) {{
  %s = (s32[], @) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %x = @ get-tuple-element(%s), index=1
{body}
  ROOT %out = (s32[], @) tuple(%next, %x)
}}
""".replace("@", BIG)
WHILE = [
    "%zero = s32[] constant(0)",
    f"%init = (s32[], {BIG}) tuple(%zero, %w)",
    f"%loop = (s32[], {BIG}) while(%init), condition=%cond, body=%body",
]


@pytest.mark.parametrize(("count", "step", "trips"), [(12, 1, 12), (12, 5, 3), (0, 1, 0)])
def test_loops_multiply(count, step, trips):
    body = f"  %p = {BIG} collective-permute(%x), {PAIRS}"
    report = inspect(program(*WHILE, others=LOOP.format(count=count, step=step, body=body)))
    assert only(report).trip_count == trips and only(report).loop == "body"
    assert report.exposed_us == pytest.approx(trips * WIRE) and report.unknown_loops == ()


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    body = f"  %p = {BIG} collective-permute(%x), {PAIRS}"
    others = LOOP.format(count=3, step=1, body=body).replace("direction=LT", "direction=EQ")
    report = inspect(program(*WHILE, others=others))
    assert report.unknown_loops == ("loop",) and only(report).trip_count == 1
    assert "counted once: loop" in str(report)


def test_the_compiler_may_tell_the_trip_count():
    lines = [*WHILE[:2], WHILE[2] + ', backend_config={"known_trip_count":{"n":"5"}}']
    others = LOOP.format(count=3, step=1, body=f"  %p = {BIG} collective-permute(%x), {PAIRS}")
    assert only(inspect(program(*lines, others=others))).trip_count == 5


def test_a_transfer_that_crosses_iterations_is_hidden_by_both():
    """Started at the end of one iteration and awaited in the middle of the next."""
    state = f"(s32[], ({BIG}, {BIG}))"
    others = f"""
%cond (s: {state}) -> pred[] {{
  %s = {state} parameter(0)
  %n = s32[] constant(4)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %a = {THIN} constant(0)
  %w = {BIG} constant(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %flying = ({BIG}, {BIG}) get-tuple-element(%s), index=1
  {dots(1)[0]}
  %landed = {BIG} collective-permute-done(%flying)
  {start("p", "landed")}
  {dots(1, name="after")[0]}
  ROOT %out = {state} tuple(%next, %p)
}}
"""
    lines = [
        start("first"),
        "%zero = s32[] constant(0)",
        f"%init = {state} tuple(%zero, %first)",
        f"%loop = {state} while(%init), condition=%cond, body=%body",
    ]
    report = inspector.inspect(program(*lines, others=others), target="h200x8")
    inside = next(c for c in report.collectives if c.loop == "body")
    assert inside.compute_us == pytest.approx(2 * DOT) and inside.exposed_us == pytest.approx(WIRE - 2 * DOT)
    assert set(inside.hidden_by) == {"dot0", "after0"} and inside.trip_count == 4


def test_of_a_conditional_the_slowest_branch_counts():
    permute = f"{BIG} collective-permute(%x), {PAIRS}"
    others = computation("fast", f"%fastp = {permute}")
    others += computation("slow", f"%slowp = {permute}\n  %twice = {permute}")
    report = inspect(
        program(
            "%i = s32[] constant(0)",
            f"%c = {BIG} conditional(%i, %w, %w), branch_computations={{%fast, %slow}}",
            others=others,
        )
    )
    assert {c.name: c.counted for c in report.collectives} == {
        "fastp": False,
        "slowp": True,
        "twice": True,
    }
    assert report.exposed_us == pytest.approx(2 * WIRE)


def test_a_called_computation_counts_for_each_call():
    others = computation("sub", f"%p = {BIG} collective-permute(%x), {PAIRS}")
    call = "%{} = " + BIG + " call(%w), to_apply=%sub"
    report = inspect(program(call.format("one"), call.format("two"), others=others))
    assert only(report).trip_count == 2 and report.exposed_us == pytest.approx(2 * WIRE)


@pytest.mark.parametrize("opcode", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
def test_async_wrappers(opcode):
    others = computation("wrapped", f"%inner = {BIG} {opcode}(%x), replica_groups={{}}")
    lines = [
        f"%s = (({BIG}), {BIG}, u32[]) async-start(%w), calls=%wrapped",
        f"%u = (({BIG}), {BIG}, u32[]) async-update(%s)",
        *dots(1),
        f"%d = {BIG} async-done(%u)",
    ]
    found = only(inspect(program(*lines, others=others)))
    assert (found.kind, found.asynchronous) == (opcode, True)
    assert found.compute_us == pytest.approx(DOT) and found.exposed_us == pytest.approx(found.wire_us - DOT)


def test_send_and_recv_count_once():
    pairs = 'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,0}}"}'
    context = f"({BIG}, u32[], token[])"
    lines = [
        "%t = token[] after-all()",
        f"%r = {context} recv(%t), channel_id=1, {pairs}",
        f"%s = {context} send(%w, %t), channel_id=1, {pairs}",
        *dots(1),
        f"%rd = ({BIG}, token[]) recv-done(%r)",
        "%sd = token[] send-done(%s)",
    ]
    report = inspect(program(*lines))
    assert {c.kind: c.wire_bytes for c in report.collectives} == {
        "recv": 4096 * 4096 * 2,
        "send": 0,
    }
    assert report.exposed_us == pytest.approx(WIRE - DOT)


def test_transfers_to_the_host_are_named():
    lines = [
        "%t = token[] after-all()",
        f"%s = ({BIG}, u32[], token[]) send(%w, %t), is_host_transfer=true",
        "%sd = token[] send-done(%s), is_host_transfer=true",
    ]
    report = inspect(program(*lines))
    assert report.collectives == () and "host" in report.unestimated["s"]


def test_fused_reduce_and_slice_is_a_reduce_scatter():
    others = (
        f"%f (x: {BIG}) -> {THIN} "
        f"{{\n  %x = {BIG} parameter(0)\n  %r = {BIG} all-reduce(%x), replica_groups={{}}\n"
        f"  %z = s32[] constant(0)\n  ROOT %d = {THIN} dynamic-slice(%r, %z, %z), "
        f"dynamic_slice_sizes={{1024,4096}}\n}}\n"
    )
    found = only(inspect(program(f"%g = {THIN} fusion(%w), kind=kCustom, calls=%f", others=others)))
    assert (found.kind, found.asynchronous, found.wire_bytes) == (
        "reduce-scatter",
        False,
        pytest.approx(4096 * 4096 * 2 * 7 / 8),
    )


def test_a_copy_in_the_background_delays_only_who_waits_for_it():
    copy = f"%c = ({BIG}, {BIG}, u32[]) copy-start(%w)"
    us = 2 * 4096 * 4096 * 2 / 4.8e12 * 1e6
    assert inspect(program(copy, *dots(3), f"%cd = {BIG} copy-done(%c)")).compute_us == pytest.approx(3 * DOT)
    assert inspect(program(copy, f"%cd = {BIG} copy-done(%c)")).compute_us == pytest.approx(us)


def test_never_awaited_is_awaited_at_the_end():
    assert only(inspect(program(start(), *dots(1)))).exposed_us == pytest.approx(WIRE - DOT)


def test_refuses_text_that_is_not_scheduled():
    with pytest.raises(ValueError, match="is not scheduled, expected 'is_scheduled=true'"):
        inspector.inspect(program(header="x=1"), target="h200x8")


def test_refuses_a_computation_that_calls_itself():
    others = computation("sub", f"%p = {BIG} call(%x), to_apply=%sub")
    with pytest.raises(ValueError, match="'sub' calls itself"):
        inspector.inspect(program(f"%c = {BIG} call(%w), to_apply=%sub", others=others), target="h200x8")


def test_deep_and_wide_calls_take_no_exponential_time():
    parts = [f"%f0 (x: {BIG}) -> {BIG} {{\n  ROOT %x = {BIG} parameter(0)\n}}\n"]
    for i in range(1, 60):
        parts.append(
            f"%f{i} (x: {BIG}) -> {BIG} "
            f"{{\n  %x = {BIG} parameter(0)\n  %y = {BIG} call(%x), to_apply=%f{i - 1}\n"
            f"  ROOT %z = {BIG} call(%y), to_apply=%f{i - 1}\n}}\n"
        )
    inspect(program(f"%c = {BIG} call(%w), to_apply=%f59", others="\n".join(parts)))


def sparsecore(inner, name="s", operand="w"):
    """A computation on the SparseCore as XLA:TPU prints it: the operands come with the update."""
    others = computation("wrapped", inner) + computation(
        "outer",
        f"%o = (({BIG}), {BIG}, u32[]) call-start(%x), to_apply=%wrapped\n  %r = {BIG} call-done(%o)",
    )
    lines = (
        f'%{name} = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", to_apply=%outer',
        f"%{name}u = (({BIG}), {BIG}) call-update(%{name}, %{operand})",
        f"%{name}d = {BIG} call-done(%{name}u)",
    )
    return others, *lines


@pytest.mark.parametrize("opcode", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
def test_sparsecore_collectives_are_on_the_wire_from_their_update_on(opcode):
    others, begin, update, end = sparsecore(f"%inner = {BIG} {opcode}(%x), replica_groups={{}}")
    found = only(inspect(program(begin, *dots(2, name="early"), update, *dots(1), end, others=others)))
    assert (found.kind, found.asynchronous, found.name) == (opcode, True, "s") and found.hidden_by == ("dot0",)
    assert found.compute_us == pytest.approx(DOT) and found.exposed_us == pytest.approx(found.wire_us - DOT)


def test_sparsecore_gathers_run_beside_the_program_and_beside_copies():
    gather = f"%g = {BIG} copy(%x)"
    others, begin, update, end = sparsecore(gather)
    us = 2 * 4096 * 4096 * 2 / 4.8e12 * 1e6
    copy = f"%c = ({BIG}, {BIG}, u32[]) copy-start(%w)", f"%cd = {BIG} copy-done(%c)"
    assert inspect(program(begin, update, end, others=others)).compute_us == pytest.approx(us)
    both = inspect(program(begin, update, copy[0], end, copy[1], others=others))
    assert both.compute_us == pytest.approx(us) and both.collectives == ()
    hidden = inspect(program(begin, update, *dots(3), end, others=others))
    assert us < 3 * DOT and hidden.compute_us == pytest.approx(3 * DOT)


@pytest.mark.parametrize(
    ("line", "asynchronous"),
    [
        (f"%p = {BIG} collective-foo(%w)", False),
        (f"%p = {BIG} all-foo-start(%w)", True),
        (f"%p = {BIG} brand-new(%w), channel_id=3", False),
        (f"%p = {BIG} brand-new-start(%w), replica_groups={{{{0,1,2,3,4,5,6,7}}}}", True),
        (f"%p = {BIG} brand-new(%w), {PAIRS}", False),
        (f'%p = {BIG} custom-call(%w), custom_call_target="xla_nccl_thing"', False),
        (f'%p = {BIG} custom-call(%w), custom_call_target="my_mpi_send"', False),
        (f"%p = {BIG} async-start(%w), calls=%wrapped", True),
        (f"%p = {BIG} fusion(%w), kind=kCustom, calls=%wrapped", False),
    ],
)
def test_what_looks_like_communication_is_listed_and_never_compute(line, asynchronous):
    others = computation("wrapped", f"%inner = {BIG} collective-foo(%x)")
    report = inspect(program(line, *dots(1), others=others))
    found = only(report)
    assert (found.name, found.kind, found.asynchronous) == ("p", "unknown", asynchronous)
    assert report.compute_us == pytest.approx(DOT) and found.wire_us > 0
    assert found.wire_bytes == pytest.approx(4096 * 4096 * 2 * (1 if "pairs" in line else 7 / 8))
    assert "looks like communication of a kind that isn't known" in report.unestimated["p"]


@pytest.mark.parametrize(
    "line",
    [
        f'%p = {BIG} custom-call(%w), custom_call_target="compile"',
        f'%p = {BIG} copy(%w), metadata={{op_name="all-gather, channel_id=3"}}',
        f"%p = {BIG} brand-new(%w), channel_id=3, is_host_transfer=true",
    ],
)
def test_what_only_sounds_like_it_is_none(line):
    assert inspect(program(line)).collectives == ()


@pytest.mark.parametrize(("own", "named"), [("", "f/kernel"), ("f/own", "f/own")])
def test_a_fusion_around_a_call_is_of_what_the_call_is_of(own, named):
    """As XLA:GPU makes them of a kernel and the slices that it reads, without a name."""
    call = f'%inner = {BIG} custom-call(%x), custom_call_target="k", metadata={{op_name="f/kernel"}}'
    metadata = f', metadata={{op_name="{own}"}}' if own else ""
    line = f"%around = {BIG} fusion(%w), kind=kCustom, calls=%wrapped{metadata}"
    (found,) = [o for o in inspect(program(line, others=computation("wrapped", call))).operations if o.name == "around"]
    assert found.op_name == named
    behind = only(inspect(program(start(), line, done(), others=computation("wrapped", call))))
    assert behind.hidden_by_ops == (named,)


def branches(index="%i = s32[] constant(0)", names="%fast, %slow"):
    return [index, f"%c = {BIG} conditional(%i, %w, %w), branch_computations={{{names}}}"]


def test_branches_that_differ_are_told_and_what_is_not_counted_named():
    permute = f"{BIG} collective-permute(%x), {PAIRS}"
    others = computation("fast", f"%fastp = {permute}")
    others += computation("slow", f"%slowp = {permute}\n  %twice = {permute}")
    report = inspect(program(*branches(), others=others))
    (choice,) = report.choices
    assert (choice.name, choice.loop, choice.taken, choice.uncounted) == ("c", "main", "slow", ("fast",))
    assert choice.branches == (
        ("fast", pytest.approx(WIRE), pytest.approx(WIRE)),
        ("slow", *[pytest.approx(2 * WIRE)] * 2),
    )
    assert "at most: c counts its slowest branch of fast" in str(report) and "NOT counted though sending: fast" in str(
        report
    )
    assert inspector.OverlapReport.from_json(report.to_json()).choices == report.choices


def test_the_cost_of_a_branch_is_that_of_all_it_calls():
    others = computation("sub", f"%p = {BIG} collective-permute(%x), {PAIRS}")
    others += computation("fast", f"%call = {BIG} call(%x), to_apply=%sub")
    others += computation(
        "slow", f"%q = {BIG} collective-permute(%x), {PAIRS}\n  %call = {BIG} call(%q), to_apply=%sub"
    )
    report = inspect(program(*branches(), others=others))
    assert report.choices[0].branches[0] == ("fast", pytest.approx(WIRE), pytest.approx(WIRE))
    assert {c.name: (c.trip_count, c.counted) for c in report.collectives} == {"p": (1, True), "q": (1, True)}


def test_branches_that_are_the_same_are_no_choice():
    others = computation("fast", f"%p = {BIG} collective-permute(%x), {PAIRS}")
    report = inspect(program(*branches(names="%fast, %fast"), others=others))
    assert report.choices == () and only(report).trip_count == 1


def test_a_conditional_in_a_loop_counts_its_slowest_branch_each_time():
    permute = f"{BIG} collective-permute(%x), {PAIRS}"
    others = computation("fast", f"%n = {BIG} bitcast(%x)") + computation("slow", f"%p = {permute}")
    body = f"  %c = {BIG} conditional(%i, %x, %x), branch_computations={{%fast, %slow}}"
    report = inspect(program(*WHILE, others=others + LOOP.format(count=6, step=1, body=body)))
    assert report.exposed_us == pytest.approx(6 * WIRE) and only(report).trip_count == 6
    assert (report.choices[0].trip_count, report.choices[0].loop, report.choices[0].uncounted) == (6, "body", ())


def test_what_is_sent_only_in_a_branch_that_is_not_taken_is_listed():
    fast = f"%t = {THIN} slice(%x)\n  %p = {THIN} collective-permute(%t), {PAIRS}"
    slow = "\n  ".join(f"%y{i} = {BIG} copy(%x)" for i in range(99))
    others = computation("fast", fast) + computation("slow", slow)
    report = inspect(program(*branches(), others=others))
    found = only(report)
    assert (report.wire_us, found.counted, found.trip_count) == (0, False, 1)
    assert report.choices[0].uncounted == ("fast",)


def between_slices(kind, target, sent="f32[1024]", got="f32[1024]", number=""):
    """The four instructions of an exchange between slices, as XLA:TPU prints them."""
    names = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous='
        f'"r{number}",_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}",is_spmd_generated="true"}}'
    )
    host = "channel_id=2, is_host_transfer=true"
    return (
        f"%x{number} = {sent} broadcast(%w)",
        f"%t{number} = token[] after-all()",
        f"%s{number} = ({sent}, u32[], token[]) send(%x{number}, %t{number}), {host}, {names}",
        f"%r{number} = ({got}, u32[], token[]) recv(%t{number}), {host}, {names}",
        f"%sd{number} = token[] send-done(%s{number}), {host}",
        f"%rd{number} = ({got}, token[]) recv-done(%r{number}), {host}",
    )


TO_ALL = '"{1,2,3,4}x{0:3}"'


@pytest.mark.parametrize(
    ("kind", "target", "name", "part", "hops"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', "all-reduce", 1, 2),
        ("ALL_REDUCE", TO_ALL, "all-reduce", 6 / 4, 2),
        ("ALL_REDUCE", '"{1:4}x{0:3}"', "all-reduce", 6 / 4, 2),
        ("ALL_GATHER", TO_ALL, "all-gather", 3, 1),
        ("REDUCE_SCATTER", TO_ALL, "reduce-scatter", 3 / 4, 1),
        ("ALL_TO_ALL", "{{100000,100001,200000,200001}}", "all-to-all", 1 / 2, 1),
        ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", "all-to-all", 1 / 2, 1),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", "collective-permute", 1, 1),
        ("SOMETHING_NEW", "nobody knows", "something_new", 1 / 2, 1),
    ],
)
def test_exchanges_between_slices(kind, target, name, part, hops):
    text = program(*between_slices(kind, target, sent=BIG, got=BIG))
    report = inspector.inspect(text.replace("num_partitions=8", "num_partitions=4"), target="4*v5e:2x2")
    found = only(report)
    size = 4096 * 4096 * 2 * part
    assert (found.kind, found.asynchronous, found.wire_bytes) == (name, True, pytest.approx(size))
    assert found.wire_us == pytest.approx(hops * 50 + size / 3.125e9 * 1e6) and found.exposed_us == found.wire_us
    assert found.route.startswith("network, ") and report.unestimated == {}


def test_exchanges_between_slices_are_under_way_from_send_to_recv_done():
    before = between_slices("ALL_REDUCE", '"{1,2}x{0:3}"', sent=BIG, got=BIG)
    text = program(*before[:3], *dots(3), *before[3:]).replace("num_partitions=8", "num_partitions=4")
    found = only(inspector.inspect(text, target="2*v5e:2x2"))
    assert found.compute_us > 0 and found.exposed_us == pytest.approx(found.wire_us - found.compute_us)
    # A recv-done without its send, and a send never received, cost what they cost and no more.
    assert inspector.inspect(program(before[1], *before[3:4], *before[5:]), target="2*v5e:2x4").collectives == ()
    alone = only(inspector.inspect(program(*before[:3]), target="2*v5e:2x4"))
    assert alone.exposed_us == alone.wire_us


def test_links_and_the_network_are_not_shared():
    before = between_slices("ALL_REDUCE", '"{1,2}x{0:3}"', sent=BIG, got=BIG)
    gather = "%g = bf16[16384,4096] all-gather(%w), replica_groups={{0,1,2,3}}, dimensions={0}"
    text = program(*before[:3], gather, *before[3:]).replace("num_partitions=8", "num_partitions=4")
    found = {c.kind: c for c in inspector.inspect(text, target="2*v5e:2x2").collectives}
    assert found["all-gather"].exposed_us == found["all-gather"].wire_us
    assert found["all-reduce"].exposed_us == pytest.approx(found["all-reduce"].wire_us - found["all-gather"].wire_us)
