"""What the next link should say, from the newest link and what is known of the members (DESIGN section 5). Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dht.domain.messages import TabletMark
from dht.domain.placement import place, score
from dht.domain.roster import REPLICAS, Member, Roster, quorums, replicas_wanted, successor
from dht.errors import Invalid, Unavailable
from dht.model import NodeId, Struct

Marks = Mapping[NodeId, Mapping[int, TabletMark]]
"""Tablet states by node, as far as nodes answered."""


class Readiness(Struct, frozen=True):
    """`unready`: tablets whose current set has no initialised majority: they keep their replicas (rule 5).

    `incomplete`: tablets of which some reachable replica is not initialised yet.
    """

    unready: frozenset[int]
    incomplete: frozenset[int]


def readiness(roster: Roster, marks: Marks) -> Readiness:
    unready, incomplete = set(), set()
    for tablet, nodes in enumerate(roster.tablets):
        epoch = roster.tablet_epochs[tablet]
        states = [marks[n].get(tablet) for n in nodes if n in marks]
        initialised = sum(1 for s in states if s is not None and s.initialised >= epoch)
        if initialised < quorums(len(nodes))[1]:
            unready.add(tablet)
        if initialised < len(states):
            incomplete.add(tablet)
    return Readiness(frozenset(unready), frozenset(incomplete))


def joined(roster: Roster, member: Member) -> tuple[Member, ...]:
    """The members with this one in it, in place of an older incarnation or address of the same node."""
    return (*(m for m in roster.members if m.node_id != member.node_id), member)


def left(roster: Roster, nodes: Collection[NodeId]) -> tuple[Member, ...]:
    """The members with these marked as leaving."""
    return tuple(
        Member(m.node_id, m.incarnation, m.pop, m.failure_domain, m.address, True) if m.node_id in nodes else m
        for m in roster.members
    )


def next_link(
    roster: Roster,
    members: Sequence[Member],
    reachable: Collection[NodeId],
    ready: Readiness,
    voting: Collection[NodeId] | None = None,
) -> Roster | None:
    """The link after `roster` that goes one step towards these members; None when there is nothing to do.

    `reachable` members may get tablets; `voting` ones (None: those) are not replaced as voters.

    Raises Unavailable when a member's new incarnation has to wait for tablets, Invalid when it would lose a last copy.
    """
    reborn = {m.node_id for m in members if (old := roster.member(m.node_id)) and old.incarnation != m.incarnation}
    frozen = set(ready.unready)
    for node in sorted(reborn):
        _check_reborn(roster, node, reborn, frozen)
        frozen.update(roster.tablets_of(node))
    staying = tuple(m for m in members if not _may_go(roster, m, reachable, ready))
    receivers = [m.node_id for m in staying if not m.leaving and m.node_id in reachable]
    tablets = place(
        roster.tablets,
        {m.node_id: (m.pop, m.failure_domain) for m in staying},
        receivers,
        [m.node_id for m in staying if m.leaving],
        frozen,
        replicas_wanted(staying),
    )
    voters = choose_voters(staying, roster.voters, reachable if voting is None else voting)
    link = successor(roster, staying, voters, tablets)
    same = (link.members, link.voters, link.tablets) == (roster.members, roster.voters, roster.tablets)
    return None if same else link


def choose_voters(
    members: Sequence[Member], current: Sequence[NodeId], reachable: Collection[NodeId]
) -> tuple[NodeId, ...]:
    """5, 3 or 1 voters, over PoPs first, then over failure domains; unreachable ones are replaced first.

    A member that leaves votes only while too few others are there, and until it goes: with two members a single voter
    decides, and its disk would be the only one that must not be lost.
    """
    staying = [m for m in members if not m.leaving]
    domains = len({(m.pop, m.failure_domain) for m in staying})
    count = 5 if domains >= 5 else 3 if len(members) >= 3 else 1
    candidates = staying if len(staying) >= count else list(members)
    chosen: list[Member] = []
    for _ in range(count):
        pops = [m.pop for m in chosen]
        taken = [(m.pop, m.failure_domain) for m in chosen]
        best = min(
            (m for m in candidates if m not in chosen),
            key=lambda m: (
                m.node_id not in reachable,
                m.leaving,
                pops.count(m.pop),
                taken.count((m.pop, m.failure_domain)),
                m.node_id not in current,
                -score(0, m.node_id),
            ),
        )
        chosen.append(best)
    ids = [m.node_id for m in chosen]
    return tuple([v for v in current if v in ids] + [v for v in ids if v not in current])


def lost(
    roster: Roster,
    me: NodeId,
    silent_s: Mapping[NodeId, Mapping[NodeId, float]],
    remove_after_s: float,
    unreached: Collection[NodeId] | None = None,
) -> tuple[NodeId, ...]:
    """Members that a majority of their own PoP has not reached for so long, counting the one that asks.

    `unreached`: which those are, in a domain where few of each PoP are members (`dht.domain.wide`).

    They are replaced, never merely removed: without a spare node a removal gains nothing, and one that comes back with
    its disk would have to be wiped. A whole PoP is never lost: nobody of it is left to say so.
    `silent_s[a][b]`: for how long a has not reached b; only of nodes that answer now.
    """
    own = silent_s.get(me, {})
    out: list[NodeId] = []
    present = [m for m in roster.members if not m.leaving and own.get(m.node_id, 0.0) < remove_after_s]
    for member in roster.members:
        if member.node_id == me or member.leaving or own.get(member.node_id, 0.0) < remove_after_s:
            continue
        pop = [m.node_id for m in roster.members if m.pop == member.pop]
        agree = sum(1 for n in pop if silent_s.get(n, {}).get(member.node_id, 0.0) >= remove_after_s)
        agreed = agree > len(pop) // 2 if unreached is None else member.node_id in unreached
        if agreed and len(present) >= REPLICAS:
            out.append(member.node_id)
    return tuple(out)


def _check_reborn(roster: Roster, node: NodeId, reborn: Collection[NodeId], frozen: Collection[int]) -> None:
    if len(reborn) > 1:
        raise Unavailable("two wiped members cannot return in one link; the second tries again")
    for tablet in roster.tablets_of(node):
        if len(roster.tablets[tablet]) == 1:
            raise Invalid(
                f"the old disk of this node holds the only copy of tablet {tablet} of domain {roster.domain}: start it "
                "with its old data directory, or recover the domain and accept the loss"
            )
        if tablet in frozen:
            raise Unavailable(f"tablet {tablet} is still being taken over; the wiped member tries again")


def _may_go(roster: Roster, member: Member, reachable: Collection[NodeId], ready: Readiness) -> bool:
    """A leaving member goes when no tablet lists it and nobody needs its content any more."""
    if not member.leaving or len(roster.members) == 1 or roster.tablets_of(member.node_id):
        return False
    return not (ready.incomplete if member.node_id in reachable else ready.unready)
