"""Placement: balance, minimal moves, one replica a step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.domain.placement import Places, Tablets, place

TABLETS = 64


def node(i: int) -> bytes:
    return bytes([i]) * 20


def domains(n: int) -> Places:
    return {node(i): ("pop", f"host{i}") for i in range(n)}


def settle(current: Tablets, places: Places, givers: tuple[bytes, ...] = (), size: int = 3) -> Tablets:
    """Steps until nothing changes any more."""
    for _ in range(50):
        after = place(current, places, sorted(places), givers, (), size)
        if after == tuple(map(tuple, current)):
            return after
        current = after
    raise AssertionError("placement never settles")


def loads(tablets: Tablets) -> Counter[bytes]:
    return Counter(n for nodes in tablets for n in nodes)


def test_place_three_nodes_join_one_by_one_all_keep_everything() -> None:
    tablets: Tablets = ((node(0),),) * TABLETS
    for n in (2, 3):
        tablets = place(tablets, domains(n), sorted(domains(n)))
        assert all(len(nodes) == n for nodes in tablets)
    firsts = Counter(nodes[0] for nodes in tablets)
    assert max(firsts.values()) - min(firsts.values()) <= 1


def test_place_one_to_three_at_once_fills_all() -> None:
    tablets = place(((node(0),),) * TABLETS, domains(3), sorted(domains(3)))
    assert all(set(nodes) == set(domains(3)) for nodes in tablets)


@pytest.mark.parametrize("n", [4, 5, 7, 12])
def test_place_member_added_loads_differ_by_one_and_only_the_new_one_gains(n: int) -> None:
    before = settle(((node(0),),) * TABLETS, domains(n - 1))
    after = place(before, domains(n), sorted(domains(n)))
    final = settle(before, domains(n))
    counts = loads(final)
    assert max(counts.values()) - min(counts[node(i)] for i in range(n)) <= 1
    moved = sum(len(set(b) - set(a)) for a, b in zip(before, final, strict=True))
    assert moved == counts[node(n - 1)]
    assert moved <= TABLETS * 3 // n + 1
    assert all(len(set(b) - set(a)) <= 1 for a, b in zip(before, after, strict=True))


def test_place_giver_ends_with_nothing_and_others_keep_theirs() -> None:
    before = settle(((node(0),),) * TABLETS, domains(5))
    after = settle(before, domains(5), (node(2),))
    assert node(2) not in loads(after)
    moved = sum(len(set(b) - set(a)) for a, b in zip(before, after, strict=True))
    assert moved <= loads(before)[node(2)] + 2


def test_place_giver_without_substitute_shrinks_but_never_below_one() -> None:
    before = settle(((node(0),),) * TABLETS, domains(2))
    after = settle(before, domains(2), (node(0), node(1)))
    assert all(len(nodes) == 1 for nodes in after)


def test_place_frozen_tablets_keep_their_replicas() -> None:
    before = settle(((node(0),),) * TABLETS, domains(3))
    after = place(before, domains(6), sorted(domains(6)), frozen=range(32))
    assert all(set(a) == set(b) for a, b in zip(before[:32], after[:32], strict=True))
    assert any(set(a) != set(b) for a, b in zip(before[32:], after[32:], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    members=st.integers(1, 9),
    hosts=st.integers(1, 9),
    steps=st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=6),
)
def test_place_any_history_changes_one_replica_a_step(members: int, hosts: int, steps: list[tuple[int, bool]]) -> None:
    where = {node(i): ("pop", f"host{i % hosts}") for i in range(members)}
    tablets: Tablets = ((node(0),),) * 16
    givers: set[bytes] = set()
    for index, leaves in steps:
        n = node(index % members)
        if leaves and len(givers) + 1 < members:
            givers.add(n)
        else:
            givers.discard(n)
        after = place(tablets, where, sorted(where), sorted(givers))
        for old, new in zip(tablets, after, strict=True):
            gone, come = set(old) - set(new), set(new) - set(old)
            assert len(new) == len(set(new))
            assert 1 <= len(new) <= 3
            assert (len(gone) <= 1 and len(come) <= 1) or (not gone and len(new) == 3)
        tablets = after
    tablets = settle(tablets, where, tuple(sorted(givers)))
    assert not givers.intersection(loads(tablets)) or givers == set(where)
    wanted = min(3, members - len(givers))
    assert all(len(nodes) >= wanted for nodes in tablets)
    if hosts >= members:
        assert all(len({where[n] for n in nodes}) == len(nodes) for nodes in tablets)
