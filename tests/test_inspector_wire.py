"""Bytes on the wire and time on it, against figures worked out by hand."""

import pytest

from ringmoe.inspector import machines, wire


def grid(*sizes):
    """Coordinates of a torus in order, the first dimension fastest."""
    if not sizes:
        return [()]
    return [(x, *rest) for rest in grid(*sizes[1:]) for x in range(sizes[0])]


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
    target = machines.target("h200x8")
    transfer = wire.Wire(target, [()] * 8).exchange(kind, 8e6, "{}")
    assert transfer.wire_bytes == pytest.approx(8e6 * sent)
    assert transfer.us == pytest.approx(8e6 * sent / 450e9 * 1e6) and transfer.route == "switch"


def test_permute_between_neighbours_and_round_the_torus():
    target = machines.target("v5p:4x4x4")
    torus = wire.Wire(target, grid(4, 4, 4))
    line = "{{0,1},{1,2},{2,3},{3,0}}"  # the ends are joined, so 3 to 0 is one hop
    assert torus.permute(1e6, line) == wire.Transfer(1e6, 10.0, line, "neighbours")
    assert torus.permute(1e6, "{{0,2}}").route == "up to 2 hops"
    shared = torus.permute(1e6, "{{0,2},{1,2}}")  # both pass the link from 1 to 2
    assert (shared.us, shared.route) == (20.0, "up to 2 hops, 2 share a link")


def test_a_line_has_no_way_round():
    target = machines.target("v5e:2x4")
    line = wire.Wire(target, grid(2, 4))
    assert line.permute(1e6, "{{0,6}}").route == "up to 3 hops"
    assert line.permute(1e6, "{{0,99}}").us == pytest.approx(
        1e6 / 819e9 * 1e6
    )  # a device that is not there has no route


def test_gather_streams_over_every_link_of_its_group():
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    row = torus.exchange("all-gather", 1e6, "[16,4]<=[64]")  # rings of 4 along x: two links in
    assert (row.us, row.route) == (pytest.approx(3e6 / 200e9 * 1e6), "ring of 4")
    everyone = torus.exchange("all-gather", 1e6, "{}")
    assert (everyone.us, everyone.route) == (
        pytest.approx(63e6 / 600e9 * 1e6),
        "ring of 4 x ring of 4 x ring of 4",
    )
    line = wire.Wire(machines.target("v5e:2x4"), grid(2, 4)).exchange("all-gather", 1e6, "{}")
    assert (line.us, line.route) == (pytest.approx(7e6 / 100e9 * 1e6), "line of 2 x line of 4")


def test_all_to_all_is_bound_by_the_middle():
    torus = wire.Wire(machines.target("v5p:4x4x4"), grid(4, 4, 4))
    assert torus.exchange("all-to-all", 1e6, "[16,4]<=[64]").us == pytest.approx(1e6 * 4 / 8 / 100e9 * 1e6)
    line = wire.Wire(machines.target("v5e:2x4"), grid(2, 4))  # 4 devices send half of theirs over 2 links... 4 / 4 each
    assert line.exchange("all-to-all", 1e6, "{}").us == pytest.approx(1e6 * 4 / 4 / 50e9 * 1e6)


def test_devices_of_one_chip_need_no_link():
    target = machines.target("tpu7x:1x1x1")
    chip = wire.Wire(target, [(0, 0, 0), (0, 0, 0)])
    assert chip.permute(1e6, ring(2)).route == chip.exchange("all-reduce", 1e6, "{}").route == "same chip"


def test_a_group_of_one_sends_nothing():
    alone = wire.Wire(machines.target("h200x8"), [()] * 8).exchange("all-reduce", 1e6, "{{0},{1}}")
    assert (alone.us, alone.wire_bytes) == (0, 0)
