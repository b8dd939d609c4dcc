"""Links: shape, steps, tablet epochs, quorums, the durable chain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.domain import roster as rosters
from dht.domain.chain import Chain
from dht.domain.plan import Readiness, choose_voters, joined, left, lost, next_link
from dht.domain.roster import Member, Roster, check_step, quorums, successor
from dht.errors import Invalid, NotFound, RemoteProtocolError, Unavailable
from dht.storage.memory import MemoryDisk

READY = Readiness(frozenset(), frozenset())


def member(i: int, incarnation: bytes = b"i", pop: str = "one") -> Member:
    return Member(bytes([i]) * 20, incarnation, pop, f"host{i}", f"10.0.0.{i}:7000")


def ids(*numbers: int) -> tuple[bytes, ...]:
    return tuple(bytes([i]) * 20 for i in numbers)


def grown(n: int) -> Roster:
    link = rosters.found("one", member(0), 8)
    for i in range(1, n):
        after = next_link(link, joined(link, member(i)), ids(*range(i + 1)), READY)
        assert after is not None
        check_step(link, after)
        link = after
    for _ in range(20):
        after = next_link(link, link.members, ids(*range(n)), READY)
        if after is None:
            return link
        check_step(link, after)
        link = after
    raise AssertionError("never settles")


@pytest.mark.parametrize(("n", "accept", "prepare"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 3)])
def test_quorums_any_accept_meets_any_prepare_and_any_accept(n: int, accept: int, prepare: int) -> None:
    assert quorums(n) == (accept, prepare)
    assert accept + prepare > n
    assert 2 * accept > n


def test_check_step_two_replicas_replaced_is_refused() -> None:
    link = grown(5)
    tablets = [list(nodes) for nodes in link.tablets]
    others = [n for n in ids(0, 1, 2, 3, 4) if n not in tablets[0]]
    tablets[0][:2] = others[:2]
    with pytest.raises(RemoteProtocolError, match="replaces 2 replicas of tablet 0"):
        check_step(link, successor(link, link.members, link.voters, tablets))


def test_check_step_forged_tablet_epochs_are_refused() -> None:
    link = grown(3)
    after = successor(link, link.members, link.voters, link.tablets)
    forged = Roster(*[*(getattr(after, f) for f in after.__struct_fields__[:-1]), (after.epoch,) * 8])
    with pytest.raises(RemoteProtocolError, match="tablet epochs"):
        check_step(link, forged)


def test_successor_order_alone_changes_no_tablet_epoch() -> None:
    link = grown(3)
    after = successor(link, link.members, link.voters, [tuple(reversed(nodes)) for nodes in link.tablets])
    check_step(link, after)
    assert after.tablet_epochs == link.tablet_epochs


def test_next_link_reborn_member_changes_all_its_tablets() -> None:
    link = grown(4)
    after = next_link(link, joined(link, member(1, b"new")), ids(0, 1, 2, 3), READY)
    assert after is not None
    check_step(link, after)
    for tablet, nodes in enumerate(link.tablets):
        assert (after.tablet_epochs[tablet] == after.epoch) >= (member(1).node_id in nodes)


def test_next_link_reborn_only_copy_is_refused_and_unready_waits() -> None:
    link = grown(1)
    with pytest.raises(Invalid, match="only copy"):
        next_link(link, joined(link, member(0, b"new")), ids(0), READY)
    link = grown(3)
    with pytest.raises(Unavailable):
        next_link(link, joined(link, member(1, b"new")), ids(0, 1, 2), Readiness(frozenset([0]), frozenset()))


def test_next_link_unready_tablets_keep_their_replicas() -> None:
    link = grown(2)
    after = next_link(link, joined(link, member(2)), ids(0, 1, 2), Readiness(frozenset(range(4)), frozenset()))
    assert after is not None
    assert [len(nodes) for nodes in after.tablets] == [2, 2, 2, 2, 3, 3, 3, 3]


def test_next_link_leaving_member_loses_tablets_then_goes() -> None:
    link = grown(5)
    gone = member(2).node_id
    link = successor(link, left(link, [gone]), link.voters, link.tablets)
    for _ in range(10):
        after = next_link(link, link.members, ids(0, 1, 2, 3, 4), READY)
        if after is None:
            break
        check_step(link, after)
        link = after
    assert link.member(gone) is None
    assert gone not in link.voters


@given(
    members=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=8),
    current=st.lists(st.integers(0, 8), max_size=5, unique=True),
)
def test_choose_voters_any_members_counts_domains_and_reach_are_kept(
    members: list[tuple[int, bool, bool]], current: list[int]
) -> None:
    all_members = [
        Member(bytes([i]) * 20, b"i", "one", f"host{host}", "h:1", leaving)
        for i, (host, leaving, _) in enumerate(members)
    ]
    reachable = [m.node_id for m, (_, _, near) in zip(all_members, members, strict=True) if near]
    voters = choose_voters(all_members, ids(*current), reachable)
    assert len(voters) in (1, 3, 5)
    assert len(set(voters)) == len(voters)
    staying = [m for m in all_members if not m.leaving]
    candidates = staying if len(staying) >= len(voters) else all_members
    assert {m.node_id for m in candidates}.issuperset(voters)
    near = [m for m in candidates if m.node_id in reachable]
    assert len([v for v in voters if v in reachable]) == min(len(voters), len(near))


def test_choose_voters_dead_one_is_replaced_first() -> None:
    members = [member(i) for i in range(4)]
    voters = choose_voters(members, ids(0, 1, 2), ids(0, 2, 3))
    assert voters == ids(0, 2, 3)
    assert choose_voters(members, ids(0, 1, 2), ids(0, 1, 2, 3)) == ids(0, 1, 2)


def test_choose_voters_leaving_one_of_three_votes_until_it_goes() -> None:
    members = [
        member(0),
        member(1),
        Member(*[*(getattr(member(2), f) for f in member(2).__struct_fields__[:-1]), True]),
    ]
    assert choose_voters(members, ids(0, 1, 2), ids(0, 1, 2)) == ids(0, 1, 2)
    assert len(choose_voters(members[:2], ids(0, 1, 2), ids(0, 1))) == 1


def test_lost_needs_a_majority_of_the_members_own_pop() -> None:
    link = grown(4)
    a, b, c, d = ids(0, 1, 2, 3)
    assert lost(link, a, {a: {c: 700.0}}, 600.0) == ()
    assert lost(link, a, {a: {c: 700.0}, b: {c: 650.0}, d: {c: 10.0}}, 600.0) == ()
    assert lost(link, a, {a: {c: 700.0}, b: {c: 650.0}, d: {c: 650.0}}, 600.0) == (c,)


def test_lost_without_a_spare_stays() -> None:
    link = grown(3)
    a, b, c = ids(0, 1, 2)
    assert lost(link, a, {a: {c: 700.0}, b: {c: 650.0}}, 600.0) == ()


def test_lost_other_pop_cut_off_is_never_lost() -> None:
    link = rosters.found("global", member(0), 8)
    far = [member(i, pop="two") for i in (1, 2)]
    link = successor(link, (*link.members, *far), link.voters, link.tablets)
    a, b, c = ids(0, 1, 2)
    assert lost(link, a, {a: {b: 9e9, c: 9e9}}, 600.0) == ()


def test_chain_is_read_back_and_never_skips() -> None:
    disk = MemoryDisk()
    chain = Chain("one", disk)
    first = rosters.found("one", member(0), 8)
    second = successor(first, first.members, first.voters, first.tablets)
    third = successor(second, second.members, second.voters, second.tablets)
    with pytest.raises(RemoteProtocolError, match="not skipped"):
        chain.append(second)
    assert chain.append(first)
    assert not chain.append(first)
    with pytest.raises(RemoteProtocolError):
        chain.append(third)
    chain.append(second)
    chain.append(third)
    again = Chain("one", disk)
    assert again.newest == third
    assert again.after(1, 10) == (second, third)
    assert Chain("two", disk).newest is None
    with pytest.raises(NotFound):
        again.link(4)


def test_chain_other_link_of_a_held_epoch_is_refused() -> None:
    chain = Chain("one", MemoryDisk())
    chain.append(rosters.found("one", member(0), 8))
    with pytest.raises(RemoteProtocolError, match="another chain"):
        chain.append(rosters.found("one", member(1), 8))


def test_chain_history_lists_only_epochs_in_which_the_tablet_changed() -> None:
    chain = Chain("one", MemoryDisk())
    link = rosters.found("one", member(0), 2)
    chain.append(link)
    link = successor(link, (*link.members, member(1)), link.voters, [ids(0, 1), ids(0)])
    chain.append(link)
    link = successor(link, link.members, link.voters, [ids(0, 1), ids(0, 1)])
    chain.append(link)
    assert [(r.epoch, r.nodes) for r in chain.history(0, link.tablet_epochs[0])] == [(1, ids(0))]
    assert [r.epoch for r in chain.history(1, link.tablet_epochs[1])] == [1]
