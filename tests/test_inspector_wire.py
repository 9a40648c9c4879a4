"""Bytes on the wire and time on it, against figures worked out by hand."""

import pytest

from ringmoe.inspector import machines, wire

HOP = 1.0  # microseconds on a TPU's link


def grid(*sizes, slices=1):
    """Places on a torus in order, the first dimension fastest, slice by slice."""
    places = [()]
    for size in reversed(sizes):
        places = [(x, *place) for place in places for x in range(size)]
    return [(number, *place) for number in range(slices) for place in places]


def hosts(name):
    """The wire of GPUs."""
    target = machines.target(name)
    return wire.Wire(target, target.coords())


def ring(n):
    return "{" + ",".join(f"{{{i},{(i + 1) % n}}}" for i in range(n)) + "}"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("{}", [(0, 1, 2, 3)]),
        ("[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
        ("mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2], device_ids=([3,2,1,0]) {'b'}", [(3, 2), (1, 0)]),
        ("something new", [(0, 1, 2, 3)]),
        ("[3,5]<=[7]", [(0, 1, 2, 3)]),
        ("mesh[] {'a'}", [(0, 1, 2, 3)]),
        ("mesh['a'=0] {'a'}", [(0, 1, 2, 3)]),
        ("mesh['a'=4] {'a':(0)2}", [(0, 1, 2, 3)]),
        ("[0,2]<=[0]", [(0, 1, 2, 3)]),
    ],
)
def test_replica_groups(text, groups):
    assert wire.replica_groups(text, 4) == groups


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 7),
        ("reduce-scatter", 7 / 8),
        ("all-reduce", 14 / 8),
        ("all-to-all", 7 / 8),
        ("ragged-all-to-all", 7 / 8),
        ("collective-broadcast", 1),
    ],
)
def test_bytes_behind_a_switch(kind, sent):
    transfer = hosts("h200x8").exchange(kind, 8e10, "{}")
    assert transfer.wire_bytes == pytest.approx(8e10 * sent)
    assert transfer.us == pytest.approx(8e10 * sent / (18 * 20.6e9) * 1e6, rel=0.02) and transfer.route == "switch"


def test_permute_between_neighbours_and_round_the_torus():
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    line = "{{0,1},{1,2},{2,3},{3,0}}"  # the ends are joined, so 3 to 0 is one hop
    assert torus.permute(1e6, line) == wire.Transfer(1e6, 10.0 + HOP, line, "neighbours")
    assert torus.permute(1e6, "{{0,2}}").route == "up to 2 hops"
    shared = torus.permute(1e6, "{{0,2},{1,2}}")  # both pass the link from 1 to 2
    assert (shared.us, shared.route) == (20.0 + 2 * HOP, "up to 2 hops, 2 share a link")


def test_a_line_has_no_way_round():
    line = wire.Wire(machines.target("v5e:2x4"), grid(2, 4))
    assert line.permute(1e6, "{{0,6}}").route == "up to 3 hops"
    nowhere = line.permute(1e6, "{{0,99}}")  # a device that is not there has no route
    assert nowhere.us == pytest.approx(1e6 / 819e9 * 1e6)


def test_gather_streams_over_every_link_of_its_group():
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    row = torus.exchange("all-gather", 1e6, "[16,4]<=[64]")  # rings of 4 along x: two links in, two hops
    assert (row.us, row.route) == (pytest.approx(3e6 / 200e9 * 1e6 + 2 * HOP), "ring of 4")
    everyone = torus.exchange("all-gather", 1e6, "{}")
    assert (everyone.us, everyone.route) == (
        pytest.approx(63e6 / 600e9 * 1e6 + 6 * HOP),
        "ring of 4 x ring of 4 x ring of 4",
    )
    line = wire.Wire(machines.target("v5e:2x4"), grid(2, 4)).exchange("all-gather", 1e6, "{}")
    assert (line.us, line.route) == (pytest.approx(7e6 / 100e9 * 1e6 + 4 * HOP), "line of 2 x line of 4")


def test_all_to_all_is_bound_by_the_middle():
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    row = torus.exchange("all-to-all", 1e6, "[16,4]<=[64]")
    assert row.us == pytest.approx(1e6 * 4 / 8 / 100e9 * 1e6 + 2 * HOP)
    line = wire.Wire(machines.target("v5e:2x4"), grid(2, 4))  # 4 devices send half of theirs over 2 links... 4 / 4 each
    assert line.exchange("all-to-all", 1e6, "{}").us == pytest.approx(1e6 * 4 / 4 / 50e9 * 1e6 + 4 * HOP)


def test_devices_of_one_chip_need_no_link():
    target = machines.target("tpu7x:1x1x1")
    chip = wire.Wire(target, [(0, 0, 0, 0), (0, 0, 0, 0)])
    assert chip.permute(1e6, ring(2)).route == chip.exchange("all-reduce", 1e6, "{}").route == "same chip"
    assert chip.permute(1e6, ring(2)).us == pytest.approx(1e6 / 3690e9 * 1e6)


def test_a_group_of_one_sends_nothing():
    alone = hosts("h200x8").exchange("all-reduce", 1e6, "{{0},{1}}")
    assert (alone.us, alone.wire_bytes) == (0, 0)


def test_a_thousand_small_all_reduces_wait_for_their_hops():
    """Bytes alone would take 3.7 us in all."""
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    small = torus.exchange("all-reduce", 1024, "{}")
    assert small.us == pytest.approx(2 * (2 + 2 + 2) * HOP, rel=0.01)  # there and back, two hops a ring of four
    # Rings and trees of NCCL's quickest protocol: a launch of 6.6 us, 0.6 us a GPU, 5 us a level of the tree of hosts.
    assert hosts("h200x8").exchange("all-reduce", 1024, "{}").us == pytest.approx(6.6 + 14 * 0.6, rel=0.01)
    assert hosts("h200x64").exchange("all-reduce", 1024, "{}").us == pytest.approx(6.6 + 14 * 0.6 + 6 * 5.0, rel=0.01)
    assert hosts("h200x64").exchange("all-to-all", 1024, "{}").us == pytest.approx(6.6 + 0.6 + 5.0, rel=0.01)
    assert hosts("h200x64").exchange("all-gather", 16, "{}").us == pytest.approx(6.6 + 56 * 0.6 + 7 * 5.0, rel=0.01)


KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["v5p", "v5e", "h200", "gb200"])
def test_more_bytes_or_devices_never_take_less_time(kind, family):
    shapes = {
        "v5p": ("2x1x1", "2x2x1", "2x2x2", "4x4x4", "4x4x8", "8x8x8"),
        "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "16x16"),
        "h200": ("2", "4", "8", "16", "64", "512"),
        "gb200": ("4", "72", "144", "576"),
    }
    before = [0.0] * 30
    for shape in shapes[family]:
        tpu = family.startswith("v")
        target = machines.target(f"{family}:{shape}" if tpu else f"{family}x{shape}")
        places = grid(*target.torus) if tpu else target.coords()
        line = wire.Wire(target, places)
        # A result of the same size for all: an all-gather's operand is the part of one device.
        part = len(places) if kind == "all-gather" else 1
        times = [line.exchange(kind, 2.0**i / part, "{}").us for i in range(4, 34)]
        assert times == sorted(times)
        compared = 1 if tpu else len(times)  # a larger torus has more links too, so there only latency must grow
        assert all(b <= t * (1 + 1e-9) for b, t in zip(before[:compared], times, strict=False))
        before = times


@pytest.mark.parametrize("kind", KINDS)
def test_large_messages_are_bound_by_bandwidth_alone(kind):
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    for line in (torus, hosts("h200x8"), hosts("h200x64")):
        one, two = (line.exchange(kind, size, "{}").us for size in (2.0**35, 2.0**36))
        assert two == pytest.approx(2 * one, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "groups", "on_links", "on_network"),
    [
        ("all-gather", "{}", 15, 1),  # each NIC brings in one eighth of the other host's
        ("reduce-scatter", "{}", 15 / 16, 1 / 16),
        ("all-reduce", "{}", 15 / 8, 1 / 8),
        ("all-to-all", "{}", 15 / 16, 1 / 2),
        ("collective-broadcast", "{}", 1, 1 / 8),
        ("all-reduce", "[8,2]<=[2,8]T(1,0)", 1, 1),  # pairs of GPUs, one of each host
        ("all-gather", "[2,8]<=[16]", 7, 0),
    ],
)
def test_groups_across_hosts_are_bound_by_the_slower_of_switch_and_network(kind, groups, on_links, on_network):
    size = 1e12
    transfer = hosts("h200x16").exchange(kind, size, groups)
    seconds = max(on_links * size / (18 * 20.6e9), on_network * size / 50e9)
    assert transfer.us == pytest.approx(1e6 * seconds, rel=1e-3)
    assert transfer.route == ("network, 2 hosts" if on_network else "switch")
    assert transfer.lane == ("network" if on_network else "switch")


def test_a_rack_is_one_switch():
    size = 1e12
    assert hosts("gb200x72").exchange("all-gather", size, "{}").route == "switch"
    assert hosts("gb200x144").exchange("all-gather", size, "{}").route == "network, 2 hosts"


def test_permutes_across_hosts_and_slices():
    two = hosts("h200x16")
    assert two.permute(1e12, "{{0,7}}").us == pytest.approx(1e12 / (18 * 20.6e9) * 1e6, rel=1e-3)
    across = two.permute(1e12, "{{0,7},{7,8}}")
    assert across.us == pytest.approx(1e12 / 50e9 * 1e6, rel=1e-3) and across.lane == across.route == "network"
    slices = wire.Wire(machines.target("2*v5p:2x2x2"), grid(2, 2, 2, slices=2))
    assert slices.permute(1e9, "{{0,1}}").us == pytest.approx(1e9 / 100e9 * 1e6 + HOP)
    assert slices.permute(1e9, "{{0,1},{0,8}}").us == pytest.approx(1e9 / 6.25e9 * 1e6 + 50)
    gather = slices.exchange("all-gather", 1e9, "{}")
    assert gather.us == pytest.approx(max(15e9 / 300e9, 1e9 / 6.25e9) * 1e6 + 3 * HOP + 50)
    assert gather.route == "line of 2 x line of 2 x line of 2 x network, 2 slices"


def test_of_groups_of_several_kinds_the_slowest_counts():
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    line = torus.exchange("all-gather", 1e6, "{{0,1,2,3},{4,5,6}}")
    assert line.route == "line of 3"
    assert hosts("h200x8").exchange("all-gather", 1e6, "{{0},{1,2},{3,4,5,6}}").wire_bytes == 3e6
    assert hosts("h200x16").exchange("all-gather", 1e6, "{{0,1},{2,8}}").route == "network, 2 hosts"
