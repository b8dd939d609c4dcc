"""What a node says of domain `global`, of which it sees a part where PoPs are many."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec

from dht.domain.health import health
from dht.domain.messages import Status
from dht.domain.roster import Member, Roster, found
from dht.domain.watch import Watch
from dht.domain.wide import GLOBAL_TABLETS, neighbours
from lucd.report import shared_warnings


def member(number: int, pop: str) -> Member:
    return Member(bytes([number]) * 20, b"i" * 16, pop, f"host{number}", f"10.0.0.{number}:7650")


def of_many_pops(pops: int) -> Roster:
    """Two members of each; those of the first three PoPs vote, and keep none of the tablets."""
    members = tuple(member(2 * pop + n, f"pop{pop}") for pop in range(pops) for n in (1, 2))
    firsts = [m.node_id for m in members[::2]]
    tablets = tuple((firsts[t + 3], firsts[t + 4]) for t in range(GLOBAL_TABLETS))
    first = found("global", members[0], GLOBAL_TABLETS)
    return msgspec.structs.replace(first, members=members, voters=tuple(firsts[:3]), tablets=tablets)


def test_member_of_many_that_hears_no_majority_of_the_voters_warns_though_it_asks_nobody_of_the_tablets_away() -> None:
    """It asks few, and takes the others to be well: cut off with its PoP, it has the voters to see that by."""
    roster = of_many_pops(40)
    mate, me = roster.members[-2:]
    unasked = frozenset(m.node_id for m in roster.members) - neighbours(roster, me.node_id, ()) - {me.node_id}
    clock: Any = SimpleNamespace(monotonic=lambda: 100.0)
    watch = Watch(me.node_id, 0.0)
    own = Status(roster.epoch, me.incarnation, (), (), roster.generation)

    def warned_when_heard(node: bytes) -> list[str]:
        watch.heard(node, own, 100.0)
        state = health(roster, me.node_id, own, watch, clock, 0, unasked)
        assert state["tablets"]["unavailable"] == 0  # type: ignore[index]
        return shared_warnings("global", state)

    (text,) = warned_when_heard(mate.node_id)
    assert text.startswith("domain global: 0 of its 3 voters are within reach; if it is this PoP that is cut off, no ")
    assert len(warned_when_heard(roster.voters[0])) == 1
    assert warned_when_heard(roster.voters[1]) == []
