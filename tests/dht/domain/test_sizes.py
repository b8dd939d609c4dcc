"""Replica sets of 1, 2, 3 and 5: which steps a link may take, how placement takes them, and that nothing is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from dht.domain.placement import Tablets, place
from dht.domain.roster import Member, Roster, check_step, found, quorums, replicas_wanted, successor
from dht.errors import RemoteProtocolError
from tests.dht.domain.small_world import World, key, play, value

KEYS = [key(i) for i in range(24)]


def node(i: int) -> bytes:
    return bytes([i]) * 20


def member(i: int, pop: str) -> Member:
    return Member(node(i), b"i", pop, f"host{i}", f"10.0.0.{i}:7000")


def link(*replicas: int) -> Roster:
    first = found("global", member(0, "p0"), 1)
    return successor(first, [member(i, f"p{i}") for i in range(8)], first.voters, [[node(i) for i in replicas]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((0,), (0, 1)),
        ((0,), (0, 1, 2)),
        ((0, 1), (0, 1, 2)),
        ((0, 1, 2), (0, 1, 2, 3, 4)),
        ((0, 1, 2, 3, 4), (0, 1, 2, 3, 5)),
        ((0, 1, 2, 3, 4), (1, 3, 4)),
        ((0, 1, 2), (1, 2, 3)),
        ((0, 1, 2), (0, 2)),
        ((0, 1), (1,)),
    ],
)
def test_check_step_sizes_one_two_three_five_one_after_the_other_are_taken(
    old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    before = link(*old)
    check_step(before, successor(before, before.members, before.voters, [[node(i) for i in new]]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((0, 1, 2), (0, 1, 3, 4, 5)),  # grows, but does not keep all
        ((0, 1, 2, 3, 4), (0, 1, 5)),  # shrinks, but brings a new one
        ((0, 1, 2, 3, 4), (0, 1)),
        ((0, 1, 2), (0,)),
        ((0, 1), (0, 1, 2, 3, 4)),
        ((0,), (0, 1, 2, 3, 4)),
        ((0, 1, 2), (0, 1, 2, 3)),  # four is no size
        ((0, 1, 2, 3, 4), (0, 1, 2, 5, 6)),
    ],
)
def test_check_step_other_jumps_are_refused(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    before = link(*old)
    with pytest.raises(RemoteProtocolError):
        check_step(before, successor(before, before.members, before.voters, [[node(i) for i in new]]))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_quorums_a_sealed_quorum_meets_every_accept_quorum_at_every_size(n: int) -> None:
    accept, seal = quorums(n)
    assert accept + seal > n


def test_replicas_wanted_five_only_over_five_pops() -> None:
    assert replicas_wanted([member(i, "one") for i in range(7)]) == 3
    assert replicas_wanted([member(i, f"p{i % 4}") for i in range(8)]) == 3
    assert replicas_wanted([member(i, f"p{i % 5}") for i in range(10)]) == 5


def settle(current: Tablets, places: dict[bytes, tuple[str, str]], givers: tuple[bytes, ...], size: int) -> Tablets:
    for _ in range(50):
        after = place(current, places, sorted(places), givers, (), size)
        for old, new in zip(current, after, strict=True):
            check_step(link(*[n[0] for n in old]), successor_of(old, new))
        if after == tuple(map(tuple, current)):
            return after
        current = after
    raise AssertionError("placement never settles")


def successor_of(old: tuple[bytes, ...], new: tuple[bytes, ...]) -> Roster:
    before = link(*[n[0] for n in old])
    return successor(before, before.members, before.voters, [new])


def test_place_five_pops_every_tablet_has_one_replica_in_each_and_goes_back_to_three() -> None:
    places = {node(i): (f"p{i % 5}", f"host{i}") for i in range(8)}
    wide = settle(((node(0),),) * 16, places, (), 5)
    for nodes in wide:
        assert sorted(places[n][0] for n in nodes) == ["p0", "p1", "p2", "p3", "p4"]
    firsts = Counter(nodes[0] for nodes in wide)
    assert max(firsts.values()) - min(firsts.get(n, 0) for n in places) <= 1
    leaving = tuple(n for n, (pop, _) in places.items() if pop == "p4")
    narrow = settle(wide, places, leaving, 3)
    for nodes in narrow:
        assert len({places[n][0] for n in nodes}) == 3
        assert not set(leaving).intersection(nodes)


def test_place_two_pops_replicas_are_in_both() -> None:
    places = {node(i): (f"p{i % 2}", f"host{i}") for i in range(4)}
    tablets = settle(((node(0),),) * 16, places, (), 3)
    assert all(len({places[n][0] for n in nodes}) == 2 for nodes in tablets)
    loads = Counter(n for nodes in tablets for n in nodes)
    assert max(loads.values()) - min(loads.values()) <= 1


def global_world(world: World) -> None:
    """Every machine in a PoP of its own, all in one domain."""
    world.cluster.pops = tuple(f"p{i}" for i in range(8))


@pytest.mark.parametrize("seed", range(4))
def test_sizes_one_two_three_five_three_two_one_nothing_acknowledged_is_lost(seed: int) -> None:
    async def story(world: World) -> None:
        global_world(world)
        await world.add(founds=True)
        expected = {}

        async def write(text: str) -> None:
            for k in KEYS:
                at = world.cluster.numbers()[-1]
                await world.put(at, k, text)
                expected[k] = value(text)

        async def sized(size: int) -> None:
            def done() -> bool:
                roster = world.running()[0].domain.roster
                return world.is_settled() and all(len(nodes) == size for nodes in roster.tablets)

            await world.until(done, 200.0, f"size {size}")
            for k in KEYS:
                assert await world.get(world.cluster.numbers()[0], k) == expected[k]

        await write("1")
        await world.add()
        await sized(2)
        await write("2")
        await world.add()
        await sized(3)
        await write("3")
        await world.add()
        await world.add()
        await sized(5)
        await write("5")
        for size, goes in ((3, 0), (3, 1), (2, 2), (1, 3)):
            gone = world.cluster.machines[goes].node_id
            await world.domain(4).leave(gone, drain=True)
            await world.until(lambda gone=gone: world.domain(4).roster.member(gone) is None, 200.0, "leaving")
            world.cluster.crash(goes)
            await sized(size)
            await write(f"back to {size} without {goes}")
        await sized(1)

    play(story, seed, domain="global")
