"""Plans: which exchange, over which axes, how many hops and how many bytes, against counting by hand."""

import dataclasses
import functools
import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from ringmoe import rules
from ringmoe.masks import Band
from ringmoe.plan import attention as attention_plan
from ringmoe.plan import cost
from ringmoe.plan import experts as expert_plan
from ringmoe.plan.base import Group, Ring, freeze

MESH = (("a", 2), ("b", 4), ("c", 2))
B, T, S, N, K, H = 2, 32, 32, 4, 2, 8


FULL = Band()


def attention(factors, band=FULL, exchange="auto", mesh=MESH, t=T, s=S, bias=None, backward=False, itemsize=2):
    operands = [("query", (B, t, N, H)), ("key", (B, s, K, H)), ("value", (B, s, K, H))]
    operands += [] if bias is None else [("bias", bias)]
    results = ("query", "key", "value") if backward else ("output", "lse")
    rule = rules.make("attention", tuple(operands), results)
    index = None if bias is None else 3
    return attention_plan.make(rule, freeze(factors), mesh, band, exchange, itemsize, index, 4 if backward else 0)


def in_pages(factors, exchange="auto", mesh=MESH):
    pool = (64, 8, K, H)
    operands = (("query", (B, T, N, H)), ("key", pool), ("value", pool), ("pages", (B, 16)))
    rule = rules.make("attention in pages", operands, ("output", "lse"))
    return attention_plan.make(rule, freeze(factors), mesh, Band(right=0), exchange, 2)


@pytest.mark.parametrize(("factors", "kind", "split", "joint"), [
    ({}, "local", {}, ()),
    ({"b0": ("a",), "k": ("b",)}, "local", {"b0": ("a",), "k": ("b",)}, ()),
    ({"b0": ("a",), "s": ("b",)}, "merge", {"b0": ("a",), "s": ("b",)}, ()),
    ({"b0": ("a",), "s": ("b", "a")}, "merge", {"s": ("b", "a")}, ()),  # sequences give way to pages
    ({"g": ("b",), "s": ("b",)}, "merge", {"s": ("b",)}, ()),
    ({"k": ("a",), "t": ("b",), "s": ("b",)}, "merge", {"k": ("a",), "t": ("b",), "s": ("b",)}, ("b",)),
    ({"t": ("b", "a"), "s": ("b",)}, "merge", {"t": ("a",), "s": ("b",)}, ()),  # not its last: gathered outside
])  # fmt: skip
def test_of_pages(factors, kind, split, joint):
    got = in_pages(factors)
    assert (got.exchange, got.factors, got.joint_axes) == (kind, freeze(split), joint)
    assert got.band == Band(right=0)
    heads, size = N // (2 if "k" in split and kind == "merge" else 1), got.size
    sequences, tokens = (
        B // (2 if "b0" in split and kind == "merge" else 1),
        T // (2 if split.get("t") == ("a",) else 1),
    )
    if kind == "merge" and not joint:
        assert got.wire_bytes == 2 * (size - 1) * sequences * tokens * heads * H * 4 // size


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all"])
def test_pages_are_never_moved(exchange):
    assert in_pages({}, exchange).exchange == "local"
    with pytest.raises(
        ValueError, match=f"exchange='{exchange}' was asked for, but pages stay where they are: use 'merge'"
    ):
        in_pages({"s": ("b",)}, exchange)


BLOCK = 2 * B * S // 4 * K * H  # elements of K and V on one of four devices


@pytest.mark.parametrize(("factors", "exchange", "kind", "axes", "query_axes", "sent"), [
    ({}, "auto", "local", (), (), 0),
    ({"b0": ("a",)}, "auto", "local", (), (), 0),
    ({"t": ("b",)}, "auto", "local", (), ("b",), 0),
    ({"t": ("b",), "s": ("b",)}, "ring", "ring", ("b",), ("b",), 3 * BLOCK * 2),
    ({"t": ("b",), "s": ("b",)}, "all_gather", "all_gather", ("b",), ("b",), 3 * BLOCK * 2),
    ({"b0": ("a",), "t": ("b",), "s": ("b",)}, "ring", "ring", ("b",), ("b",), 3 * BLOCK // 2 * 2),
    ({"k": ("a",), "t": ("b",), "s": ("b",)}, "ring", "ring", ("b",), ("b",), 3 * BLOCK // 2 * 2),
    ({"t": ("a", "b"), "s": ("a", "b")}, "ring", "ring", ("a", "b"), ("a", "b"), 7 * BLOCK // 2 * 2),
    ({"s": ("b",)}, "ring", "ring", ("b",), ("b",), 3 * BLOCK * 2),  # queries are cut alike
    ({"g": ("b",), "s": ("b",)}, "auto", "all_gather", ("b",), (), 3 * BLOCK * 2),  # b is busy in the query
    ({"t": ("a",), "s": ("b",)}, "auto", "all_gather", ("b",), ("a",), 3 * BLOCK * 2),
    ({"t": ("b", "a"), "s": ("a", "b")}, "auto", "all_gather", ("a", "b"), ("b", "a"), 7 * BLOCK // 2 * 2),
])  # fmt: skip
def test_attention_exchange(factors, exchange, kind, axes, query_axes, sent):
    got = attention(factors, exchange=exchange)
    assert (got.exchange, got.axes, got.query_axes, got.wire_bytes) == (kind, axes, query_axes, sent)
    assert got.ring.size == (got.size if kind == "ring" else 1)
    assert got.reason


@pytest.mark.parametrize(("factors", "asked", "kind", "backward", "sent"), [
    # 4 query heads, 2 key heads copied to 4; q [2, 8, 4, 8] on a device: q and output, K and V; or q, do, dq, and fp32 dK, dV
    ({"t": ("b",), "s": ("b",)}, "all_to_all", "all_to_all", False, (2 * 512 * 2 + 2 * 512 * 2) * 3 // 4),
    ({"t": ("b",), "s": ("b",)}, "all_to_all", "all_to_all", True, (3 * 512 * 2 + 2 * 512 * (2 + 4)) * 3 // 4),
    ({"s": ("b",)}, "all_to_all", "all_to_all", False, (2 * 512 * 2 + 2 * 512 * 2) * 3 // 4),
    # of 8 devices 4 share heads, and a ring of 2 goes over the others
    ({"t": ("a", "b"), "s": ("a", "b")}, "all_to_all", "all_to_all + ring", False, 2 * 256 * 2 + (4 * 256 * 2) * 3 // 4),
    # all queries are everywhere: the float32 output summed; else gathered first, and the sums scattered
    ({"s": ("b",)}, "merge", "merge", False, 2 * 2048 * 4 * 3 // 4),
    ({"t": ("a",), "s": ("b",)}, "merge", "merge", False, 2 * 1024 * 4 * 3 // 4),
    ({"t": ("b",), "s": ("b",)}, "merge", "merge", False, 512 * 3 * (2 + 4)),
    ({"t": ("b",), "s": ("b",)}, "merge", "merge", True, 512 * 3 * (2 + 2 + 4)),
])  # fmt: skip
def test_what_other_exchanges_send(factors, asked, kind, backward, sent):
    got = attention(factors, exchange=asked, backward=backward)
    assert (got.exchange, got.wire_bytes) == (kind, sent)


@pytest.mark.parametrize(("factors", "heads", "row", "joint"), [
    ({"t": ("a", "b"), "s": ("a", "b")}, Group(("b",), 4, 4), (("a",), 1), ()),
    ({"t": ("b", "a"), "s": ("b", "a")}, Group(("b", "a"), 4, 8), (("b",), 2), ()),  # four heads: half of b, and a
    ({"t": ("b",), "s": ("b",)}, Group(("b",), 4, 4), ((), 1), ()),
    ({"t": ("c", "b"), "s": ("b",)}, None, (("c",), 1), ("b",)),
    ({"t": ("c",), "s": ("b",)}, None, (("c",), 1), ()),
])  # fmt: skip
def test_which_axes_cut_what_during_the_work(factors, heads, row, joint):
    got = attention(factors, exchange="merge" if heads is None else "all_to_all")
    assert (got.heads, (got.rows.axes, got.rows.abreast), got.joint_axes) == (heads or Group(), row, joint)


def test_heads_are_split_over_as_many_devices_of_an_axis_as_are_fastest():
    """Of 64 devices along one axis, for 8 heads: over 4, a row of the torus, so that no two of the rings share a link."""
    shapes = [(name, (1, 64 * 4096, 8, 128)) for name in ("query", "key", "value")]
    rule, split = rules.make("attention", tuple(shapes), ("output", "lse")), freeze({"t": ("x",), "s": ("x",)})
    make = lambda exchange: attention_plan.make(
        rule, split, (("x", 64),), Band(None, 0), exchange, 2, device_kind="TPU v5", in_tiles=True
    )
    got = make("auto")
    assert (got.exchange, got.heads, got.ring.size) == ("all_to_all + ring", Group(("x",), 4, 64), 16)
    assert got.us < min(make("ring").us, make("all_to_all").us) and make("all_to_all").heads == Group(("x",), 8, 64)
    assert (
        got.ring.devices == tuple(range(64)) and got.heads.indices is not None and got.heads.indices[1] == [4, 5, 6, 7]
    )


@given(st.sampled_from([2, 4, 6, 8]), st.permutations("abc"))
def test_groups_and_rings_share_the_devices_of_a_dim(size, axes):
    """Device i of a dim is in place i // size of a ring and has part i % size of the heads, whichever axes these take."""
    mesh, axes = {"a": 2, "b": 3, "c": 4}, tuple(axes)
    group, ring = Group.last(axes, size, mesh), Ring.make(axes, mesh, size)
    assert group.total % group.size == 0 and ring.size == 24 // size
    for i, coordinates in enumerate(np.ndindex(*(mesh[a] for a in axes))):
        at = dict(zip(axes, coordinates))
        assert _index(ring.axes, at, mesh) // ring.abreast == i // size
        assert _index(group.axes, at, mesh) % group.size == i % size


def _index(axes, at, mesh):
    """Of the device at these coordinates among those along `axes`, major to minor."""
    return functools.reduce(lambda index, a: index * mesh[a] + at[a], axes, 0)


@pytest.mark.parametrize("queries", ["g", "b0"])
def test_shares_of_other_heads_or_sequences_are_never_merged(queries):
    """Over one axis keys, and of the queries something else than tokens: no device has all queries of its keys."""
    factors = {queries: ("b",), "s": ("b",)}
    with pytest.raises(ValueError, match=r"asked for, but keys are sharded over .* and so are query heads"):
        attention(factors, exchange="merge")
    assert attention(factors, t=1, s=2**20).exchange == "all_gather"


def test_auto_takes_the_least_time_and_tells_the_others():
    factors = {"t": ("b",), "s": ("b",)}
    got = attention(factors)
    plans = [attention(factors, exchange=name) for name in ("ring", "all_gather", "all_to_all")]
    assert got.us == min(plan.us for plan in plans) > 0
    told = re.search(r"; (\d+) us on v5p by the model, (.*)$", got.reason)
    assert told is not None
    others = [other.rsplit(" ", 1) for other in told[2].split(", ")]
    assert {got.exchange, *(name for name, _ in others)} == {"ring", "all_gather", "all_to_all", "all_to_all + ring"}
    times = [int(told[1]), *(int(us) for _, us in others)]
    assert times == sorted(times)


def test_devices_of_a_chip_share_its_links():
    """2x2x2 chips of two devices: where all send, to the mirror or two on, a link carries what two send; to the next, one."""
    two, one = cost.machine("TPU7x"), cost.machine("TPU v5")
    assert (two.per_chip, one.per_chip) == (2, 1)
    assert (two.mirror(16, two.link), one.mirror(8, one.link)) == (2, 1)
    assert [two.apart(16, far) for far in (1, 2)] == [1, 2] and one.apart(8, 1) == 1


@pytest.mark.parametrize(
    ("kind", "devices", "cut", "middle"), [("TPU7x", 16, 2 * 2 / 4, 2), ("TPU v5 lite", 64, 4 / 4, 4)]
)
def test_groups_of_heads_swap_across_the_whole_axis(kind, devices, cut, middle):
    """Heads over eight devices, and a balanced ring of such groups: query, key and value cross a cut of the group, and half
    of each then the middle of all."""
    shapes = [(name, (1, devices * 4096, 8, 128)) for name in ("query", "key", "value")]
    rule = rules.make("attention", tuple(shapes), ("output", "lse"))
    factors = freeze({"t": ("x",), "s": ("x",)})
    got = attention_plan.make(
        rule, factors, (("x", devices),), Band(right=0), "all_to_all", 2, device_kind=kind, in_tiles=True
    )
    assert (got.exchange, got.heads.size, got.pieces) == ("all_to_all + ring", 8, 2)
    size = 8 * 4096 * 128 * 2 / cost.machine(kind).link
    assert got.arriving_us == pytest.approx(3 * (size * cut + size / 2 * middle), rel=0.1)


def test_backward_takes_what_forward_does_where_that_saves_the_way_of_what_both_need():
    """128 tokens on each of eight v5p: alone a backward pass would exchange heads, which takes 2% less."""
    shapes = ("query", (1, 1024, 16, 128)), *((name, (1, 1024, 2, 128)) for name in ("key", "value"))
    factors, results = freeze({"t": ("x",), "s": ("x",)}), {0: ("output", "lse"), 4: ("query", "key", "value")}

    def make(owed, exchange="auto"):
        rule = rules.make("attention", shapes, results[owed])
        return attention_plan.make(
            rule, factors, (("x", 8),), FULL, exchange, 2, owed_itemsize=owed, device_kind="TPU v5", in_tiles=True
        )

    forward, backward = make(0), make(4)
    assert forward.exchange == backward.exchange == "all_gather"
    reason = re.search(r"; (\d+) us on v5p by the model, (.*)$", backward.reason)
    assert reason is not None
    assert min(int(other.rsplit(" ", 1)[1]) for other in reason[2].split(", ")) <= int(reason[1]) == round(backward.us)
    assert backward.us - backward.arriving_us < min(make(4, name).us for name in ("ring", "all_to_all"))
    # Of K and V, each to all of seven others: what forward moves, and all that it moves.
    assert 0 < backward.arriving_us == forward.arriving_us < forward.us


@pytest.mark.parametrize(("heads", "key_heads", "exchange"), [(8, 2, "ring"), (16, 2, "ring"), (8, 8, "all_to_all")])
@pytest.mark.parametrize("owed", [0, 4])
def test_few_key_heads_go_round_a_switch(heads, key_heads, exchange, owed):
    """4096 causal tokens on each of eight H200: a ring and heads by the inspector 352 and 422, 673 and 755, 526 and 424 us."""
    shapes = ("query", (1, 32768, heads, 128)), *((name, (1, 32768, key_heads, 128)) for name in ("key", "value"))
    results = ("query", "key", "value") if owed else ("output", "lse")
    rule, factors = rules.make("attention", shapes, results), freeze({"t": ("x",), "s": ("x",)})
    make = lambda asked: attention_plan.make(
        rule,
        factors,
        (("x", 8),),
        Band(right=0),
        asked,
        2,
        owed_itemsize=owed,
        device_kind="NVIDIA H200",
        in_tiles=True,
    )
    assert make("auto").exchange == exchange
    # Half of query, key and value are one permute to balanced places: XLA:GPU makes one of all that leave together.
    machine, ring = cost.machine("NVIDIA H200"), make("ring")
    sent = (heads + 2 * key_heads) * 4096 * 128 * 2
    assert ring.pieces == 2 and ring.arriving_us == machine.alone(machine.mirror(8, sent / 2), machine.steps(8))


def test_what_a_network_adds():
    """Two slices of 2x2x2 v5p, 1 MB of each device: links, then the network, and latencies; of GPUs the longer of both."""
    machine, two, sent = cost.machine("TPU v5"), cost.Span(16, 2), 1e6
    link, network = sent / machine.link, sent / machine.network
    assert two.within == 8 and network == pytest.approx(1e6 / 6250)
    takes = {
        kind: machine.takes(kind, two, sent) for kind in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter")
    }
    assert takes == pytest.approx({
        "all-gather": 2 * link * 7 / 3 + network + 3 + 50,
        "all-to-all": link * 2 / 4 + network / 2 + 3 + 50,
        "all-reduce": 2 * link * 7 / 8 / 3 + network / 8 + 2 * (3 + 50),
        "reduce-scatter": 2 * link * 7 / 8 / 3 + network / 16 + 3 + 50,
    })  # fmt: skip
    assert machine.takes("all-gather", cost.Span(2, 2), sent) == pytest.approx(network + 50)  # one of each slice
    assert machine.domains(16, 2) == 2 and [cost.machine("NVIDIA H200").domains(n, 1) for n in (8, 16, 20)] == [1, 2, 3]
    gpu, sent = cost.machine("NVIDIA H200"), 64e6
    assert gpu.takes("all-gather", cost.Span(8), sent) == gpu.alone(7 * sent / gpu.link, 7)
    # By NCCL's protocol for large messages: 8.4 us, 3.4 for each step over links and 14 over the network.
    assert gpu.takes("all-gather", cost.Span(16, 2), sent) == pytest.approx(8.4 + 14 * 3.4 + 14 + 14 * sent / gpu.link)
    assert gpu.takes("all-to-all", cost.Span(16, 2), sent) == pytest.approx(8.4 + 3.4 + 14 + sent / 2 / gpu.network)


def over_slices(mesh, axes, exchange, kind="TPU v5", slices=2, owed=0):
    """1024 tokens on each device along the axes, and two sequences, on every other one."""
    size = math.prod(dict(mesh)[axis] for axis in axes)
    shapes = [(name, (2, size * 1024, 8, 128)) for name in ("query", "key", "value")]
    rule = rules.make("attention", tuple(shapes), ("query", "key", "value") if owed else ("output", "lse"))
    factors = freeze({"t": axes, "s": axes, "b0": tuple(axis for axis, _ in mesh if axis not in axes)})
    how = {"device_kind": kind, "in_tiles": True, "slices": slices, "owed_itemsize": owed}
    return attention_plan.make(rule, factors, mesh, FULL, exchange, 2, **how)


@pytest.mark.parametrize("owed", [0, 4])
@pytest.mark.parametrize(
    ("kind", "devices", "slices"), [("TPU v5", 16, 2), ("TPU v6 lite", 32, 2), ("NVIDIA H200", 16, 1)]
)
def test_no_ring_goes_over_a_network(kind, devices, slices, owed):
    """Of eight heads: they are exchanged within a slice or behind a switch, and what is left for the network has two places."""
    got = over_slices((("x", devices),), ("x",), "auto", kind, slices, owed)
    assert got.exchange in ("all_to_all + ring", "all_gather") and got.ring.size <= 2
    ring = over_slices((("x", devices),), ("x",), "ring", kind, slices, owed)
    assert ring.us > 2 * got.us


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all", "merge"])
def test_an_axis_within_a_slice_needs_no_network(exchange):
    inside = over_slices((("data", 2), ("x", 8)), ("x",), exchange)
    assert inside.us == over_slices((("data", 2), ("x", 8)), ("x",), exchange, slices=1).us
    across = over_slices((("x", 8), ("data", 2)), ("x",), exchange)
    assert across.us > 1.5 * inside.us


@pytest.mark.parametrize(("length", "exchange"), [(2**10, "all_gather"), (2**22, "merge")])
def test_auto_gathers_no_more_than_there_is_memory_for(length, exchange):
    """Of many more queries than keys, so that merging takes longer: until keys are 16 GiB, of 95."""
    shapes = ("query", (1, 64 * length, 16, 128)), *((name, (1, length, 16, 128)) for name in ("key", "value"))
    rule = rules.make("attention", shapes, ("output", "lse"))
    factors = freeze({"t": ("b",), "s": ("a",)})
    got = attention_plan.make(rule, factors, (("a", 2), ("b", 2)), FULL, "auto", 2, in_tiles=True)
    assert got.exchange == exchange


@pytest.mark.parametrize(
    ("t", "s", "queries", "keys"), [(32, 32, None, None), (6, 32, 6, None), (1, 30, 1, 30), (32, 31, None, 31)]
)
def test_lengths_that_the_devices_do_not_divide_are_padded(t, s, queries, keys):
    """The ring stays a ring, and the band knows where the sequences end."""
    got = attention({"s": ("b",)}, Band(5, 0), "ring", t=t, s=s)
    assert got.exchange == "ring" and got.band == Band(5, 0, queries, keys)
    assert got.wire_bytes == (got.hops - 1) * 2 * B * -(-s // 4) * K * H * 2


@given(st.permutations("abc"), st.integers(1, 3))
def test_a_ring_follows_the_blocks_whatever_the_axes_order(axes, num):
    """Place i of the circle is the device that holds block i: counted by hand from the device's coordinates."""
    axes, mesh = tuple(axes[:num]), {"a": 2, "b": 3, "c": 2}
    ring = Ring.make(axes, mesh)
    assert ring.mesh_order == tuple(sorted(axes)) and ring.axes == axes
    for place, coordinates in enumerate(np.ndindex(*(mesh[a] for a in axes))):
        at, number = dict(zip(axes, coordinates)), 0
        for axis in sorted(axes):
            number = number * mesh[axis] + at[axis]
        assert ring.devices[place] == number


def test_a_ring_that_was_asked_for_and_can_not_be():
    with pytest.raises(
        ValueError, match=r"exchange='ring' was asked for, but keys are sharded over .*'b'.* but queries over .*'a'"
    ):
        attention({"t": ("a",), "s": ("b",)}, exchange="ring")


def test_a_backward_ring_sends_gradients_in_float32_once_more_than_keys():
    got = attention({"t": ("b",), "s": ("b",)}, exchange="ring", backward=True)
    assert got.wire_bytes == BLOCK * (3 * 2 + 4 * 4)


@given(st.sampled_from((1, 2, 4, 8)), st.integers(1, 5), st.none() | st.integers(0, 45), st.sampled_from((None, 0, 3)))
@settings(max_examples=150)
def test_hops_are_as_few_as_cover_every_pair(size, tokens, left, right):
    """Walking from its own block back, or both ways, each device meets all blocks that its queries see; one hop less misses
    some."""
    band, length = Band(left, right), size * tokens
    queries, keys = np.arange(length)[:, None], np.arange(length)
    seen = np.asarray(band(queries, keys))
    got = attention({"t": ("r",), "s": ("r",)}, band, "ring", (("r", size),), t=length, s=length)
    both = got.ways > got.parts

    def misses(hops):
        blocks = seen.reshape(size, tokens, size, tokens).any((1, 3))
        met = lambda i, j: (i - j) % size < hops or (both and (j - i) % size < hops)
        return any(blocks[i, j] and not met(i, j) for i in range(size) for j in range(size))

    hops = got.hops if size > 1 else 1
    assert not misses(hops)
    if both or (right == 0 and left is not None):
        assert hops == 1 or misses(hops - 1)
    block = 2 * B * tokens * K * H
    assert got.wire_bytes == block * 2 * (hops - 1) * (1 + both)


def test_a_narrow_window_to_both_sides_takes_neighbours_of_both():
    both = attention({"t": ("r",), "s": ("r",)}, Band(9, 3), "ring", (("r", 8),), t=64, s=64)
    assert (both.hops, both.ways, both.parts) == (3, 2, 1)
    wide = attention({"t": ("r",), "s": ("r",)}, Band(9, 25), "ring", (("r", 8),), t=64, s=64)
    assert wide.hops == 8 and wide.ways == wide.parts


@pytest.mark.parametrize(("kind", "band", "tokens", "how", "ways", "pieces"), [
    ("cpu", FULL, 16, {}, 2, 1),
    ("cpu", FULL, 8, {}, 1, 1),  # halves would be too short
    ("TPU v5p", FULL, 256, {"in_tiles": True}, 2, 1),
    ("TPU v5p", FULL, 128, {"in_tiles": True}, 1, 1),
    ("TPU v5p", Band(right=0), 512, {"in_tiles": True}, 2, 2),
    ("TPU v5p", Band(right=0), 256, {"in_tiles": True}, 1, 2),
    ("NVIDIA H200", FULL, 512, {}, 1, 1),  # to a switch
    ("NVIDIA H200", Band(right=0), 512, {}, 1, 2),
    ("cpu", Band(right=0), 512, {"rows_stay": True}, 2, 1),
    ("cpu", Band(100, 0), 512, {}, 1, 1),  # the ring is shorter
    ("cpu", Band(4 * 512, 0), 512, {}, 2, 1),  # a window evens it out
])  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_both_ways_round_and_balanced(kind, band, tokens, how, ways, pieces, backward):
    """And what is sent: balanced, half of query, key, value and output besides, or of do, the gradients and their like."""
    shape = lambda heads: (B, 4 * tokens, heads, H)
    operands = (("query", shape(N)), ("key", shape(K)), ("value", shape(K)))
    results = ("query", "key", "value") if backward else ("output", "lse")
    rule = rules.make("attention", operands, results)
    factors = freeze({"t": ("r",), "s": ("r",)})
    mesh, owed = (("r", 4),), 4 if backward else 0
    got = attention_plan.make(rule, factors, mesh, band, "ring", 2, None, owed, kind, **how)
    assert (got.ways, got.pieces) == (ways, pieces)
    queries, keys = B * tokens * N * H, B * tokens * K * H
    swapped = (3 * queries + 4 * keys if backward else 2 * queries + 2 * keys) * 2 // 2
    returned = (
        got.hops * owed if got.hops > 2 else min(owed, 2)
    )  # of two hops rounded, by the one neighbour who owes any
    ring = 2 * keys * ((got.hops - 1) * 2 + returned)
    assert got.wire_bytes == ring + (swapped if pieces == 2 else 0)


def test_a_cross_attention_ring_takes_no_short_cut():
    factors = {"t": ("b",), "s": ("b",)}
    assert attention(factors, Band(3, 0), "ring").hops == 2
    assert attention(factors, Band(3, 0), "ring", s=64).hops == 4


@pytest.mark.parametrize(("factors", "bias", "key_sum", "bias_sum"), [
    ({"t": ("b",), "s": ("b",)}, (B, N, T, S), (), ()),
    ({"t": ("b",), "s": ("b",)}, (1, N, 1, S), (), ("b",)),
    ({"b0": ("a",), "t": ("b",), "s": ("b",)}, (1, N, T, S), (), ("a",)),
    ({"b0": ("a",), "t": ("b",), "s": ("b",)}, (1, 1, 1, S), (), ("a", "b")),
    ({"t": ("b",)}, (B, N, T, S), ("b",), ()),  # whole keys met queries of every device
    ({"g": ("a",), "t": ("b",), "s": ("b",)}, (1, 1, T, S), ("a",), ("a",)),
    ({"t": ("a",), "s": ("b",)}, (1, 1, 1, S), ("a",), ("a",)),
])  # fmt: skip
def test_what_gradients_are_summed_over(factors, bias, key_sum, bias_sum):
    asked = "ring" if factors.get("t") == factors.get("s") else "all_gather"
    got = attention(factors, exchange=asked, bias=bias, backward=True)
    assert set(got.key_sum_axes) == set(key_sum)
    assert set(got.bias_sum_axes) == set(bias_sum)


def experts(factors, mesh=MESH, e=8, t=32, i=16, d=4, f=8, capacity=5, itemsize=2, exchange="auto"):
    operands = (("tokens", (B, t, d)), ("expert", (B, t, 2)), ("slot", (B, t, 2)), ("weight", (B, t, 2)),
                ("w_in", (e, d, f)), ("w_out", (e, f, d)))  # fmt: skip
    rule = rules.make("experts", operands, ("tokens",))
    return expert_plan.make(rule, freeze(factors), mesh, capacity, i, itemsize, exchange=exchange)


@pytest.mark.parametrize(("factors", "exchange", "exchange_axes", "sum_axes", "weight_sum_axes"), [
    ({}, "local", (), (), ()),
    ({"t": ("b",)}, "local", (), (), ("b",)),
    ({"b0": ("a",), "t": ("b",)}, "local", (), (), ("a", "b")),
    ({"t": ("b",), "e": ("b",)}, "all_to_all", ("b",), (), ()),
    ({"b0": ("a",), "t": ("b",), "e": ("b",)}, "all_to_all", ("b",), (), ("a",)),
    ({"b0": ("a",), "t": ("b",), "e": ("b", "a")}, "all_to_all", ("b", "a"), (), ()),
    ({"e": ("b",)}, "sum", (), ("b",), ()),
    ({"t": ("a",), "e": ("b",)}, "sum", (), ("b",), ("a",)),
    ({"t": ("b",), "e": ("b", "a")}, "all_to_all + sum", ("b",), ("a",), ()),
    ({"t": ("b",), "e": ("b",), "f": ("a",)}, "all_to_all + sum", ("b",), ("a",), ()),
    ({"f": ("a",)}, "sum", (), ("a",), ()),
    ({"t": ("a",), "f": ("a",)}, "local", (), (), ("a",)),  # gathered first
    ({"e": ("a",), "f": ("a", "b")}, "sum", (), ("a", "b"), ()),
])  # fmt: skip
def test_expert_exchange(factors, exchange, exchange_axes, sum_axes, weight_sum_axes):
    got = experts(factors)
    assert (got.exchange, got.exchange_axes) == (exchange, exchange_axes)
    assert set(got.sum_axes) == set(sum_axes) and set(got.weight_sum_axes) == set(weight_sum_axes)
    assert got.num_exchange == math.prod(dict(MESH)[axis] for axis in exchange_axes)
    assert set(got.axes) == {*exchange_axes, *sum_axes}
    assert got.reason and dict(got.factors).get("f", ()) == got.hidden_axes


MIXTRAL, QWEN, DEEPSEEK = (4096, 14336, 8, 2), (2048, 768, 128, 8), (7168, 2048, 256, 8)


def published(model, kind, size, exchange="auto", backward=False, slices=1):
    """The plan of a published layer, 4096 tokens a device, all devices on one axis."""
    d, f, e, k = model
    tokens = ("expert", "slot", "weight")
    operands = (("tokens", (1, 4096 * size, d)), *((name, (1, 4096 * size, k)) for name in tokens))
    operands += ("w_in", (e, d, f)), ("w_gate", (e, d, f)), ("w_out", (e, f, d))
    rule = rules.make("experts", operands, ("tokens",))
    how = 5120 * k // e, 4096, 2, backward, True, exchange, kind, slices
    return expert_plan.make(rule, freeze({"t": ("x",), "e": ("x",)}), (("x", size),), *how)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("model", "kind", "size", "exchange"), [
    (MIXTRAL, "TPU v5", 8, "pieces"), (MIXTRAL, "TPU v6 lite", 8, "pieces"), (DEEPSEEK, "TPU v5", 64, "pieces"),
    (MIXTRAL, "TPU v5 lite", 8, "pieces"), (DEEPSEEK, "TPU v5 lite", 256, "remote"),
    (MIXTRAL, "TPU v5 lite", 32, "remote"), (MIXTRAL, "cpu", 8, "all_to_all"),  # XLA's would not be under way during the work
    (DEEPSEEK, "TPU v5 lite", 512, "all_to_all"),  # more than a slice
    (MIXTRAL, "", 8, "pieces"), (MIXTRAL, "TPU v99", 8, "pieces"),  # taken for a v5p
])  # fmt: skip
def test_rows_travel_in_pieces_where_the_machine_is_faster_so(model, kind, size, exchange, backward):
    if size in (32, 512):
        model = (*model[:2], size, 2)
    got, in_pieces = published(model, kind, size, backward=backward), exchange != "all_to_all"
    assert got.exchange == exchange and (got.pieces > 1) == in_pieces and got.remote == (exchange == "remote")
    assert bool(re.search(r"pieces( by remote DMA)?: ", got.reason)) == in_pieces and "at once: " in got.reason
    assert got.rows % (16 * got.pieces) == 0 or got.pieces == 1


def test_rows_travel_by_dma_in_one_slice_alone():
    assert published(DEEPSEEK, "TPU v5 lite", 256).exchange == "remote"
    got = published(DEEPSEEK, "TPU v5 lite", 256, slices=2)
    assert got.exchange == "all_to_all" and "no all-to-all during other work" in got.reason


def test_on_a_gpu_rows_travel_in_pieces_forward_alone():
    assert published(MIXTRAL, "NVIDIA H200", 8).exchange == "pieces"
    got = published(MIXTRAL, "NVIDIA H200", 8, backward=True)
    assert got.exchange == "all_to_all" and "copied" in got.reason


def test_the_times_by_which_rows_travel_in_pieces():
    """By hand, Mixtral on 8 v6e chips, 2 x 4: 1280 rows of 8 KiB for each of 8 experts, and four links' width of 100 GB/s."""
    once = re.search(
        r"in (\d+) pieces: (\d+) us; at once: (\d+) us on v6e", published(MIXTRAL, "TPU v6 lite", 8).reason
    )
    assert once is not None
    wire = 8 * 1280 * 8192 * 4 / 4 / 100e3  # half of all cross the middle of the long side
    work = 8 * 1280 * 2 * 4096 * 14336 * 3 / 918e6
    assert int(once[3]) == round(2 * wire + work)
    pieces = int(once[1])
    assert 1280 % (16 * pieces) == 0
    of_each = max(work / pieces, 3 * 4096 * 14336 * 2 / 1640e3) + 5
    travel = wire / pieces
    assert int(once[2]) == round(travel + (pieces - 1) * max(of_each, 2 * travel) + of_each + travel)


@pytest.mark.parametrize(("model", "kind", "size", "each"), [
    (DEEPSEEK, "TPU v5 lite", 256, True), (MIXTRAL, "TPU v5 lite", 8, False), (MIXTRAL, "TPU v6 lite", 8, False),
])  # fmt: skip
def test_weight_gradients_are_added_up_piece_by_piece_where_the_wire_is_the_longer_part(model, kind, size, each):
    assert published(model, kind, size, backward=True).sums_each == each
    assert not published(model, kind, size).sums_each


def test_the_times_by_which_gradients_are_added_up_piece_by_piece():
    """By hand, DeepSeek-V3 on 256 v5e chips, a torus of 16 x 16: one expert each, 160 rows of 14 KiB from every one."""
    got = published(DEEPSEEK, "TPU v5 lite", 256, backward=True)
    told = re.search(r"in (\d+) pieces by remote DMA: (\d+) us; at once: (\d+) us on v5e", got.reason)
    assert told is not None and got.sums_each
    pieces, matrix = int(told[1]), 7168 * 2048
    wire = 256 * 160 * 7168 * 2 * 16 / 8 / 50e3 / pieces
    matmul = 256 * 160 * 2 * matrix / 197e6 / pieces
    sums = 3 * matmul + 2 * 3 * matrix * 4 / 819e3
    step = max(5 * matmul + 5 + sums, 3 * wire)
    assert int(told[2]) == pytest.approx(2 * wire + 5 * matmul + 5 + max(sums, wire) + (pieces - 1) * step, abs=2)


@pytest.mark.parametrize("exchange", expert_plan.EXCHANGES[1:])
def test_rows_travel_as_the_caller_asks(exchange):
    got = published(MIXTRAL, "cpu", 8, exchange)
    assert got.exchange == exchange and "as asked for" in got.reason
    assert experts({}, exchange=exchange).exchange == "local"


def test_bytes_of_an_expert_exchange():
    """Two sequences of 64 tokens in groups of 16 over 4 devices: 8 experts x 2 groups x 5 slots x 4 x 2 bytes, and back."""
    rows = 8 * 2 * 5 * 4 * 2
    assert experts({"t": ("b",), "e": ("b",)}, t=64).wire_bytes == 2 * rows * 3 // 4
    # Sorted: both choices of every token.
    rows = 2 * 16 * 2 * 4 * 2
    assert experts({"t": ("b",), "e": ("b",)}, t=64, capacity=16).wire_bytes == 2 * rows * 3 // 4
    tokens = B * 32 * 4 * 4  # float32
    assert experts({"e": ("b",)}).wire_bytes == 2 * tokens * 3 // 4
    assert experts({"t": ("b",)}).wire_bytes == 0


@pytest.mark.parametrize("broken", [
    {"expert_axes": (("a", 3),)}, {"exchange_axes": ("b",)}, {"hidden_axes": ("b",), "token_axes": ("b",)},
    {"expert_axes": (("b", 4),), "token_axes": ("b",)},
])  # fmt: skip
def test_a_plan_checks_itself(broken):
    with pytest.raises(AssertionError):
        expert_plan.ExpertPlan(num_experts=8, **broken)


@st.composite
def kept_anywhere(draw):
    """A batch of sequences in groups, over devices that may cut these."""
    i, groups, batch = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    everything = draw(st.booleans())  # one group of the whole batch
    size = i * groups * batch if everything else i
    return batch, i * groups, size, draw(st.integers(1, size)), draw(st.integers(1, 5)), draw(st.integers(1, 3))


@given(kept_anywhere())
@settings(max_examples=200)
def test_no_device_has_more_rows_for_an_expert_than_it_has_room(drawn):
    """Against the worst that may be kept: every group gives one expert as many tokens of one device as it can."""
    batch, t, group, capacity, over_t, over_b = drawn
    given = {"b0": batch, "t": t}
    local, sequences = -(-t // over_t), -(-batch // over_b)
    number = np.arange(batch * t).reshape(batch, t) // group
    worst = 0
    for i in range(over_b):
        for j in range(over_t):
            mine = number[i * sequences : (i + 1) * sequences, j * local : (j + 1) * local]
            worst = max(worst, sum(min(capacity, n) for n in np.bincount(mine.reshape(-1)) if n))
    room = expert_plan._most_rows(given, sequences * local, local, capacity, group)
    assert worst <= room <= sequences * local
    if local % group == 0 and t % local == 0 and batch % over_b == 0:
        assert room == worst


def test_rows_that_are_asked_to_travel_in_pieces_are_not_sorted():
    factors = {"t": ("b",), "e": ("b",)}
    assert experts(factors, t=64, capacity=16).sorted
    for exchange in ("pieces", "remote"):
        got = experts(factors, t=64, capacity=16, exchange=exchange)
        assert got.exchange == exchange and not got.sorted


@pytest.mark.parametrize(("capacity", "e", "factors", "rows"), [
    (5, 8, {}, None), (16, 8, {}, 2 * 32 * 2), (16, 2, {}, None),  # both choices of every token; of two experts it takes both
    (16, 8, {"t": ("b",), "e": ("b",)}, 2 * 8 * 2), (16, 4, {"t": ("b",), "e": ("b",)}, 2 * 8 * 2),
    (5, 8, {"t": ("b",)}, 2 * 8 * 2),  # the device's eight tokens of a group may be the five that it keeps
])  # fmt: skip
def test_rows_are_sorted_where_there_is_much_more_room_than_is_asked_for(capacity, e, factors, rows):
    got = experts(factors, e=e, capacity=capacity)
    assert got.sorted == ("sorted" in got.reason) == (rows is not None)
    assert rows is None or got.rows == rows


@pytest.mark.parametrize(("t", "e", "axes", "window", "most"), [
    (64, 8, ("b",), 80, 4 * 2 * 16 * 2),  # 64 rows and a quarter; two experts a device may take both choices of all
    (64, 4, ("b",), 80, 4 * 2 * 16),  # one takes one of them
    (1024, 8, ("b",), 1280, 4 * 2 * 256 * 2), (1040, 8, ("b",), 1536, 4 * 2 * 260 * 2),  # whole tiles of 256
    (64, 8, ("b", "c"), 40, 4 * 2 * 16),  # half of the experts are on devices that share the tokens
    (64, 8, ("c",), 0, 0),  # nothing travels
])  # fmt: skip
def test_a_window_has_room_for_a_quarter_more_than_comes_when_routing_is_even(t, e, axes, window, most):
    got = experts({"t": ("b",), "e": axes}, t=t, e=e, i=t, capacity=t)
    assert got.sorted and (got.window, got.most) == (window, most) and got.at_once.window == most


def test_plans_are_frozen_hashable_and_made_once():
    one, other = attention({"s": ("b",)}), attention({"s": ("b",)})
    assert one is other and hash(one) == hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.hops = 1
    hash(experts({"e": ("b",)}))


def test_the_other_half_of_a_machine_is_at_its_other_side():
    """Of two groups that swap, in a circle at the other end; other neighbours are as far as rows along the longest dim tell."""
    v5e, v5p = cost.machine("TPU v5 lite"), cost.machine("TPU v5p")
    assert [v5e.apart(8, far) for far in (1, 2, 4)] == [1, 2, 4] and v5e.apart(64, 32) == 4
    assert [v5p.apart(8, 4), v5p.apart(64, 8), v5p.apart(64, 32)] == [1, 2, 2]
