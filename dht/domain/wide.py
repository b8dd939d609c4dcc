"""The domain over all PoPs: a few members from each, and what a PoP says of its own (DESIGN section 5). Pure.

A domain of one PoP has all its nodes for members. `global` has so many from each PoP that the loss of a host, and of
a PoP, is survived; a node of a PoP that has too few asks to join, and what is more than enough is never sent away.
All other nodes hold the chain as well, so that they know whom to ask, and learn newer links now and again.

Members of another PoP cannot tell a node that is gone from a PoP that is cut off, and two members of one PoP are no
majority of it. So a member is replaced on the word of another member of its PoP only: that the majority of the PoP's
own domain has not reached it for long, or that the PoP has let it go. Of a PoP that is cut off nobody says anything,
so it is never removed.

What the members cost each other: in a domain of more than ASKED_EACH_ROUND_MAX each keeps links to, and asks the status
of, those only that it shares tablets with, those of its PoP, and the voters, about once a second. A voter, who has to
see everybody to mend the roster, asks the others in turn, so many a round. With two members from each of 100 PoPs, 16
tablets and 5 voters that is some 10 questions a second for a member, and 30 for a voter, which has 199 links.
Changes are proposed by voters: others pass on who wants to join.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dht.domain.roster import REPLICAS, Member, Roster
from dht.errors import Invalid
from dht.model import NodeId, Struct

MEMBERS_PER_POP_MIN: Final = 2
GLOBAL_TABLETS: Final = 16
"""What lives there is little and seldom written; each member has to take its share over when it joins."""


ASKED_EACH_ROUND_MAX: Final = 16


class Word(Struct, frozen=True):
    """What a member says of others of its own PoP, as that PoP's domain sees them.

    `unreached`: a majority of the PoP has not reached them for `remove_after_s`. `let_go`: the PoP's roster lists them
    no more, or as leaving.
    """

    unreached: tuple[NodeId, ...] = ()
    let_go: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True)
class Wide:
    """What a domain over all PoPs is told by the node that it runs on.

    `may_join`: whether this node's own PoP has it for a member. `word`: of these members of its PoP.
    """

    may_join: Callable[[], bool]
    word: Callable[[Sequence[NodeId]], Word]


def members_wanted(pops: int) -> int:
    """From each of so many PoPs."""
    return max(MEMBERS_PER_POP_MIN, -(-REPLICAS // max(1, pops)))


def has_room(roster: Roster, pop: str) -> bool:
    """Whether the PoP has fewer members than it should."""
    staying = [m for m in roster.members if not m.leaving]
    pops = {m.pop for m in staying} | {pop}
    return sum(m.pop == pop for m in staying) < members_wanted(len(pops))


def check_room(roster: Roster, newcomer: Member) -> None:
    """Raise Invalid if the PoP has members enough."""
    if not has_room(roster, newcomer.pop):
        count = sum(m.pop == newcomer.pop and not m.leaving for m in roster.members)
        raise Invalid(
            f"PoP {newcomer.pop} has its {count} members of domain {roster.domain} already: its other nodes ask those, "
            "and one of them takes the place of a member that is lost or leaves"
        )


def word_of_pop(
    roster: Roster,
    known: Callable[[NodeId], bool],
    nodes: Sequence[NodeId],
    silent_s: Mapping[NodeId, Mapping[NodeId, float]],
    remove_after_s: float,
) -> Word:
    """Of `nodes`, from the roster of their PoP's own domain. `known`: whether any link of that lists the node.

    `silent_s[a][b]`: for how long a has not reached b, as in `dht.domain.plan.lost`.
    """
    unreached, let_go = [], []
    for node in nodes:
        member = roster.member(node)
        if member is None or member.leaving:
            # A node that no link held here lists has joined by one that is still to come.
            if known(node):
                let_go.append(node)
            continue
        agree = sum(silent_s.get(m.node_id, {}).get(node, 0.0) >= remove_after_s for m in roster.members)
        if agree > len(roster.members) // 2:
            unreached.append(node)
    return Word(tuple(unreached), tuple(let_go))


def said(roster: Roster, words: Mapping[NodeId, Word]) -> Word:
    """What counts of these members' words: each speaks for its own PoP only."""
    unreached: dict[NodeId, None] = {}
    let_go: dict[NodeId, None] = {}
    for speaker, word in words.items():
        own = roster.member(speaker)
        for nodes, out in ((word.unreached, unreached), (word.let_go, let_go)):
            out.update((n, None) for n in nodes if own is not None and own.pop == _pop_of(roster, n))
    return Word(tuple(unreached), tuple(let_go))


def _pop_of(roster: Roster, node: NodeId) -> str | None:
    member = roster.member(node)
    return None if member is None else member.pop


def leaving(roster: Roster, nodes: Collection[NodeId]) -> tuple[NodeId, ...]:
    """Those of the nodes that can be told to leave now: one member stays in any case."""
    staying = [m.node_id for m in roster.members if not m.leaving]
    out = [n for n in staying if n in nodes]
    return tuple(out[: len(staying) - 1])


def is_large(roster: Roster) -> bool:
    """Whether members do not ask everybody each round."""
    return len(roster.members) > ASKED_EACH_ROUND_MAX


def neighbours(roster: Roster, me: NodeId, held: Collection[int]) -> frozenset[NodeId]:
    """Whom a member of a large domain asks each round: who shares a tablet, or takes over one that is `held` here."""
    own = roster.member(me)
    tablets = {*held, *roster.tablets_of(me)}
    sharing = {n for tablet in tablets for n in roster.replicas(tablet).nodes}
    mates = {m.node_id for m in roster.members if own is not None and m.pop == own.pop}
    return frozenset((sharing | mates | set(roster.voters)) - {me})


def rounds_for_all(roster: Roster) -> int:
    """In how many rounds a voter has asked everybody."""
    return -(-(len(roster.members) - 1) // ASKED_EACH_ROUND_MAX)


def asked(roster: Roster, me: NodeId, held: Collection[int], round: int) -> tuple[NodeId, ...]:
    """The members to ask in this round."""
    others = [m.node_id for m in roster.members if m.node_id != me]
    if not is_large(roster):
        return tuple(others)
    near, every = neighbours(roster, me, held), rounds_for_all(roster)
    votes = me in roster.voters
    return tuple(n for at, n in enumerate(others) if n in near or (votes and at % every == round % every))
