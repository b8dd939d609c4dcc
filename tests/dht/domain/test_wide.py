"""The domain over all PoPs: who is a member, on whose word one is replaced, and what everybody else holds of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from dht.domain import wide
from dht.domain.domain import Domain
from dht.domain.membership import Membership
from dht.domain.messages import AskJoin, AskLeave, AskStatus
from dht.domain.plan import left, lost
from dht.domain.roster import Member, Roster, found
from dht.domain.rules import RULES
from dht.domain.wide import (
    GLOBAL_TABLETS,
    Word,
    asked,
    check_room,
    has_room,
    leaving,
    members_wanted,
    neighbours,
    rounds_for_all,
    said,
    word_of_pop,
)
from dht.errors import Invalid
from tests.dht.domain.small_world import DomainNode, World, play

REMOVE_AFTER_S = 20.0


def member(number: int, pop: str) -> Member:
    return Member(bytes([number]) * 20, b"i" * 16, pop, f"host{number}", f"10.0.0.{number}:7650")


def roster(*pops: str) -> Roster:
    """Members 1, 2, ... of these PoPs."""
    members = tuple(member(n, pop) for n, pop in enumerate(pops, 1))
    return msgspec.structs.replace(found("global", members[0], GLOBAL_TABLETS), members=members)


def ids(*numbers: int) -> tuple[bytes, ...]:
    return tuple(bytes([n]) * 20 for n in numbers)


def test_three_members_at_least_and_two_of_each_pop() -> None:
    assert [members_wanted(pops) for pops in (0, 1, 2, 3, 100)] == [3, 3, 2, 2, 2]


def test_room_is_for_pops_that_have_too_few_counting_the_own_one() -> None:
    assert has_room(roster("a", "a"), "a")
    assert not has_room(roster("a", "a", "a"), "a")
    assert has_room(roster("a", "a", "b"), "b")
    assert has_room(roster("a", "a", "a"), "b")
    assert not has_room(roster("a", "a", "b"), "a")


def test_member_that_leaves_makes_room() -> None:
    full = roster("a", "a", "b", "b")
    after = msgspec.structs.replace(full, members=left(full, ids(1)))
    check_room(after, member(9, "a"))
    with pytest.raises(Invalid, match="PoP b has its 2 members of domain global already"):
        check_room(after, member(9, "b"))


def test_word_of_a_pop_is_that_of_its_majority() -> None:
    pop = roster("a", "a", "a", "a", "a")
    silent = {node: {ids(5)[0]: 100.0} for node in ids(1, 2)}
    for reached_by_two_of_five in (silent, {**silent, ids(3)[0]: {ids(5)[0]: REMOVE_AFTER_S - 1}}):
        assert word_of_pop(pop, lambda n: True, ids(4, 5), reached_by_two_of_five, REMOVE_AFTER_S) == Word()
    silent[ids(3)[0]] = {ids(5)[0]: REMOVE_AFTER_S}
    assert word_of_pop(pop, lambda n: True, ids(4, 5), silent, REMOVE_AFTER_S) == Word(ids(5))


def test_node_that_left_its_pop_is_let_go_and_one_that_is_not_known_yet_is_not() -> None:
    pop = roster("a", "a", "a")
    after = msgspec.structs.replace(pop, members=left(pop, ids(3)))
    assert word_of_pop(after, lambda n: n != ids(9)[0], ids(2, 3, 8, 9), {}, REMOVE_AFTER_S) == Word((), ids(3, 8))


def test_members_speak_for_their_own_pop_only() -> None:
    both = roster("a", "a", "b", "b")
    words = {ids(1)[0]: Word(ids(2, 3), ids(4)), ids(9)[0]: Word(ids(2))}
    assert said(both, words) == Word(ids(2))
    assert said(both, {ids(4)[0]: Word((), ids(3, 1))}) == Word((), ids(3))


def test_two_members_of_a_pop_are_no_majority_of_it() -> None:
    wide = roster("a", "a", "a", "b", "b")
    silent = {node: {ids(3)[0]: 100.0} for node in ids(1, 2, 4, 5)}
    assert lost(wide, ids(1)[0], silent, REMOVE_AFTER_S) == ids(3)
    assert lost(wide, ids(1)[0], silent, REMOVE_AFTER_S, unreached=()) == ()
    assert lost(wide, ids(1)[0], silent, REMOVE_AFTER_S, unreached=ids(3, 4)) == ids(3)


def test_member_that_is_reached_is_not_lost_whatever_is_said() -> None:
    wide = roster("a", "a", "b", "b")
    assert lost(wide, ids(1)[0], {}, REMOVE_AFTER_S, unreached=ids(2)) == ()


def test_one_member_stays_whatever_is_said() -> None:
    assert leaving(roster("a", "b"), ids(1, 2)) == ids(1)


def large(pops: int) -> Roster:
    """Two members of each PoP; tablet t is kept by the first ones of PoPs t and t + 1; the first three PoPs vote."""
    members = tuple(member(2 * pop + n, f"pop{pop}") for pop in range(pops) for n in (1, 2))
    firsts = [m.node_id for m in members[::2]]
    tablets = tuple((firsts[t], firsts[t + 1]) for t in range(GLOBAL_TABLETS))
    return msgspec.structs.replace(
        found("global", members[0], GLOBAL_TABLETS), members=members, voters=tuple(firsts[:3]), tablets=tablets
    )


def test_in_a_small_domain_everybody_is_asked_each_round() -> None:
    small = roster(*"aabbccdd")
    assert asked(small, ids(3)[0], (), 7) == tuple(m.node_id for m in small.members if m.node_id != ids(3)[0])


def test_in_a_large_domain_a_member_asks_whom_it_shares_tablets_with_its_pop_and_the_voters() -> None:
    wide = large(40)
    me = ids(2 * 10 + 1)[0]
    expected = set(ids(2 * 9 + 1, 2 * 11 + 1, 2 * 10 + 2, 1, 3, 5))
    assert {frozenset(asked(wide, me, (), n)) for n in range(9)} == {frozenset(expected)}
    assert set(asked(wide, me, (15,), 0)) == expected | set(ids(2 * 15 + 1, 2 * 16 + 1)), "what it still holds counts"


def test_voter_of_a_large_domain_asks_everybody_in_some_rounds_and_few_in_each() -> None:
    wide = large(100)
    voter = wide.voters[0]
    rounds = [set(asked(wide, voter, (), n)) for n in range(rounds_for_all(wide))]
    assert set().union(*rounds) == {m.node_id for m in wide.members} - {voter}
    assert len(rounds) == 13
    assert max(len(r) for r in rounds) <= 16 + len(neighbours(wide, voter, ()))


@pytest.mark.parametrize("joins", [True, False])
async def test_request_is_passed_on_once_between_members_whose_rosters_differ(joins: bool) -> None:
    first, second = ids(77, 79)
    voters = {first: (second,), second: (first,)}
    one = msgspec.structs.replace(member(1, "pop0"), leaving=True)
    asked_of: list[bytes] = []
    members: dict[bytes, Membership] = {}

    async def ask(to: bytes, request: Any) -> Any:
        asked_of.append(to)
        assert len(asked_of) < 5, "it goes to and fro"
        return await (members[to].join(first, request) if joins else members[to].leave(request))

    for node in (first, second):
        held = large(40)
        held = msgspec.structs.replace(held, members=(one, *held.members[1:]), voters=voters[node])
        chain: Any = SimpleNamespace(newest=held, domain="global", epoch=held.epoch)
        watch: Any = SimpleNamespace(reachable=lambda now_s: set(voters))
        unused: Any = None
        clock: Any = SimpleNamespace(monotonic=lambda: 0.0)
        peers: Any = SimpleNamespace(ask=ask, learn=unused)
        context: Any = SimpleNamespace(
            node=node, chain=chain, watch=watch, clock=clock, ask=ask, peers=peers, rules=RULES, wide=True
        )
        members[node] = Membership(context, unused, unused, 20.0)
    request = AskJoin("global", one) if joins else AskLeave("global", one.node_id, True)
    assert await (members[first].join(one.node_id, request) if joins else members[first].leave(request))
    assert asked_of == [second]


# ---- on simulated machines: three PoPs of three


def members(world: World) -> Counter[str]:
    return Counter(m.pop for m in world.domain(0).roster.members if not m.leaving)


def told(story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    play(story, remove_after_s=REMOVE_AFTER_S, domain="global", wide=True, pops=("a", "b", "c"))


async def nine(world: World) -> None:
    await world.add(founds=True)
    for _ in range(8):
        await world.add()
        await world.cluster.machines[0].clock.sleep(3.0)
    await world.until(lambda: members(world) == {"a": 2, "b": 2, "c": 2}, 60.0, "two of each PoP joining")


def outside(world: World) -> list[DomainNode]:
    return [node for node in world.running() if not node.domain.joined]


def test_two_of_each_pop_join_and_the_others_hold_the_same_chain() -> None:
    async def story(world: World) -> None:
        await nine(world)
        await world.cluster.machines[0].clock.sleep(30.0)
        assert members(world) == {"a": 2, "b": 2, "c": 2}
        assert len(outside(world)) == 3
        newest = world.domain(0).chain.newest
        assert all(node.domain.chain.newest == newest for node in outside(world))
        assert not any(node.domain.tablets.known() for node in outside(world))
        members_of_it = [node.domain for node in world.running() if node.domain.joined]
        assert [domain.health()["survivable"] for domain in members_of_it] == [["node", "failure_domain", "pop"]] * 6

    told(story)


def test_member_is_replaced_on_the_word_of_its_pop_and_by_a_node_of_it() -> None:
    async def story(world: World) -> None:
        await nine(world)
        gone = next(i for i in range(3, 9) if world.domain(i).joined and world.node(i).boot.pop == "a")
        spare = next(n for n in outside(world) if n.boot.pop == "a")
        node_id = world.node(gone).boot.node_id
        world.cluster.crash(gone)
        await world.cluster.machines[0].clock.sleep(3 * REMOVE_AFTER_S)
        assert world.domain(0).roster.member(node_id) is not None, "nobody of its PoP has said that it is gone"
        world.node(0).word = Word((node_id,))
        await world.until(lambda: spare.domain.joined, 60.0, "the spare node joining")
        await world.until(lambda: world.domain(0).roster.member(node_id) is None, 60.0, "the lost one's going")
        assert members(world) == {"a": 2, "b": 2, "c": 2}

    told(story)


def test_node_that_its_pop_let_go_leaves_at_once_though_it_answers() -> None:
    async def story(world: World) -> None:
        await nine(world)
        left_pop = next(i for i in range(3, 9) if world.domain(i).joined and world.node(i).boot.pop == "b")
        node_id = world.node(left_pop).boot.node_id
        world.node(left_pop).word = Word((), (node_id,))
        await world.until(lambda: world.domain(left_pop).removed, REMOVE_AFTER_S, "its leaving")
        await world.until(lambda: members(world)["b"] == 2, 60.0, "another one's joining")

    told(story)


def test_pop_that_is_cut_off_keeps_its_members() -> None:
    async def story(world: World) -> None:
        await nine(world)
        cut = [i for i in range(9) if world.node(i).boot.pop == "c"]
        world.cluster.partition(cut, [i for i in range(9) if i not in cut])
        others = [world.node(i).boot.node_id for i in cut if world.domain(i).joined]
        world.node(0).word = Word(tuple(others), tuple(others))
        await world.cluster.machines[0].clock.sleep(5 * REMOVE_AFTER_S)
        assert members(world) == {"a": 2, "b": 2, "c": 2}
        world.cluster.heal()
        await world.cluster.machines[0].clock.sleep(30.0)
        assert members(world) == {"a": 2, "b": 2, "c": 2}

    told(story)


def test_member_that_a_recovery_left_out_is_told_to_leave_its_pop_in_order_before_it_is_wiped() -> None:
    """Of two PoPs one was cut off, and the other went on alone. Its nodes still keep the data of their own PoP."""

    async def story(world: World) -> None:
        await world.add(founds=True)
        for _ in range(3):
            await world.add()
        await world.until(lambda: members(world) == {"a": 2, "b": 2}, 60.0, "two of each PoP joining")
        await world.cluster.machines[0].clock.sleep(30.0)
        a, b = ([i for i in range(4) if world.node(i).boot.pop == pop] for pop in "ab")
        assert world.domain(a[0]).health()["survivable"] == ["node", "failure_domain"], "neither of two PoPs"
        world.cluster.partition(a, b)
        await world.domain(a[0]).generations.recover([world.node(i).boot.node_id for i in a], accept_data_loss=True)
        world.cluster.heal()
        for left_out in (world.domain(i).generations for i in b):
            await world.until(lambda left_out=left_out: bool(left_out.stopped), 60.0, "stopping")  # type: ignore[misc]
            assert "lucd node drain" in left_out.stopped
            assert "one node of the PoP after another" in left_out.stopped

    play(story, remove_after_s=REMOVE_AFTER_S, domain="global", wide=True, pops=("a", "b"))


# ---- the same with more members than are asked each round: six PoPs of two, and a spare node


async def many(world: World) -> None:
    await world.add(founds=True)
    for _ in range(12):
        await world.add()
        await world.cluster.machines[0].clock.sleep(2.0)
    await world.until(lambda: len(world.domain(0).roster.members) == 12, 120.0, "two of each PoP joining")
    await world.until(lambda: len({d.chain.epoch for d in domains(world)}) == 1, 60.0, "telling of the links")
    await world.cluster.machines[0].clock.sleep(20.0)


def domains(world: World) -> list[Domain]:
    return [node.domain for node in world.running()]


def told_many(story: Callable[[World], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "ASKED_EACH_ROUND_MAX", 5)
    play(story, remove_after_s=REMOVE_AFTER_S, domain="global", wide=True, pops=[f"pop{n}" for n in range(6)])


def test_members_of_a_large_domain_take_their_tablets_over_and_ask_few(monkeypatch: pytest.MonkeyPatch) -> None:
    questions: Counter[bytes] = Counter()
    answer = DomainNode.answer

    async def counted(node: DomainNode, sender: bytes, message: Any) -> Any:
        questions[sender] += isinstance(message, AskStatus)
        return await answer(node, sender, message)

    monkeypatch.setattr(DomainNode, "answer", counted)

    async def story(world: World) -> None:
        await many(world)
        newest = world.domain(0).roster
        for domain in domains(world):
            held = [t for t, nodes in enumerate(newest.tablets) if domain.local.node_id in nodes]
            assert [domain.tablets.serves(t) for t in held] == [newest.tablet_epochs[t] for t in held]
        questions.clear()
        await world.cluster.machines[0].clock.sleep(20.0)
        for domain in domains(world):
            node_id = domain.local.node_id
            most = len(neighbours(newest, node_id, ())) + 5 * (node_id in newest.voters)
            assert questions[node_id] / 20.0 <= 1.3 * most

    told_many(story, monkeypatch)


def test_lost_member_of_a_large_domain_is_replaced_by_a_node_that_meets_no_voter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(world: World) -> None:
        await many(world)
        (spare,) = outside(world)
        roster = world.domain(0).roster
        gone = next(i for i in (0, 6) if world.domain(i).joined and world.node(i).boot.node_id not in roster.voters)
        left_over = 6 - gone
        node_id = world.node(gone).boot.node_id
        no_voters = tuple(n for n in roster.others(node_id) if n not in roster.voters)
        spare.contacts = no_voters
        world.cluster.crash(gone)
        world.node(left_over).word = Word((node_id,))
        await world.until(lambda: spare.domain.joined, 120.0, "the spare node joining")
        watching = world.domain(left_over)
        await world.until(lambda: watching.roster.member(node_id) is None, 120.0, "the lost one's going")
        assert set(members_of(watching).values()) == {2}

    told_many(story, monkeypatch)


def members_of(domain: Domain) -> Counter[str]:
    return Counter(m.pop for m in domain.roster.members if not m.leaving)
