"""A domain's health as plain data for status commands and metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dht.domain.messages import Status, TabletMark
from dht.domain.roster import REPLICAS, Member, Roster, quorums
from dht.domain.watch import Watch
from dht.model import NodeId
from dht.world import Clock


def health(
    roster: Roster | None,
    node: NodeId,
    own: Status,
    watch: Watch,
    clock: Clock,
    unchecked: int,
    unasked: Collection[NodeId] = (),
) -> dict[str, object]:
    """As seen from this node; members that it does not ask (`unasked`) are taken to be well.

    `tablets`: how many are whole (all replicas initialised, reachable, and not known to lack anything), degraded (a
    majority answers), unavailable (fewer). `state`: "healthy" if all are whole, "unavailable" if one is, else
    "degraded". `survivable`: what may be lost, one at a time, with every tablet still served: "node",
    "failure_domain", and of a domain over several PoPs "pop". `to_copy`, `to_copy_bytes`: groups that this node still
    copies; for each member, too, as it told last, and `to_take_over`, its tablets that it does not serve yet (of those,
    what is not begun is not counted in groups). `unchecked`: tablets that this node has not compared with another
    replica since it started. `voters_reachable`: those are always asked. `warnings`: sentences for humans.
    """
    if roster is None:
        return {"joined": False, "epoch": 0, "warnings": ["this node has not joined yet"]}
    reachable = watch.reachable(clock.monotonic()).union(unasked)
    marks = {**watch.marks, node: {m.tablet: m for m in own.tablets}}
    working = [
        [n for n in nodes if n in unasked or (n in reachable and _initialised(marks, n, t, roster.tablet_epochs[t]))]
        for t, nodes in enumerate(roster.tablets)
    ]
    need = [quorums(len(nodes))[0] for nodes in roster.tablets]
    whole = sum(
        len(w) == len(nodes) and not any(marks[n][t].remaining for n in nodes if n in marks and t in marks[n])
        for t, (w, nodes) in enumerate(zip(working, roster.tablets, strict=True))
    )
    to_copy = {
        n: (sum(m.remaining for m in of.values()), sum(m.remaining_bytes for m in of.values()))
        for n, of in marks.items()
    }
    served = sum(len(w) >= n for w, n in zip(working, need, strict=True))
    voters_heard = len(reachable.intersection(roster.voters))
    return {
        "joined": roster.lists(node, own.incarnation),
        "domain": roster.domain,
        "generation": roster.generation,
        "epoch": roster.epoch,
        "members": [
            {
                **_of_roster(roster, m),
                "reachable": m.node_id in reachable,
                "to_take_over": 0 if m.node_id in unasked else _to_take_over(roster, marks, m.node_id),
                "to_copy": to_copy.get(m.node_id, (0, 0))[0],
                "to_copy_bytes": to_copy.get(m.node_id, (0, 0))[1],
            }
            for m in roster.members
        ],
        "voters": [v.hex() for v in roster.voters],
        "voters_reachable": voters_heard,
        "tablets": {"whole": whole, "degraded": served - whole, "unavailable": len(working) - served},
        "state": "unavailable" if served < len(working) else "healthy" if whole == len(working) else "degraded",
        "to_copy": to_copy[node][0],
        "to_copy_bytes": to_copy[node][1],
        "unchecked": unchecked,
        "survivable": _survivable(working, need, {m.node_id: m for m in roster.members}),
        "warnings": _warnings(roster, len(working) - served, voters_heard),
    }


def _of_roster(roster: Roster, member: Member) -> dict[str, object]:
    return {
        "node_id": member.node_id.hex(),
        "pop": member.pop,
        "failure_domain": member.failure_domain,
        "address": member.address,
        "leaving": member.leaving,
        "voter": member.node_id in roster.voters,
        "tablets": len(roster.tablets_of(member.node_id)),
    }


def _to_take_over(roster: Roster, marks: Mapping[NodeId, Mapping[int, TabletMark]], node: NodeId) -> int:
    """How many of its tablets the member does not serve yet."""
    return sum(
        node in nodes and not _initialised(marks, node, t, roster.tablet_epochs[t])
        for t, nodes in enumerate(roster.tablets)
    )


def _initialised(marks: Mapping[NodeId, Mapping[int, TabletMark]], node: NodeId, tablet: int, epoch: int) -> bool:
    mark = marks.get(node, {}).get(tablet)
    return mark is not None and mark.initialised >= epoch > mark.sealed


def _survivable(
    working: Sequence[Sequence[NodeId]], need: Sequence[int], members: Mapping[NodeId, Member]
) -> list[str]:
    out = []
    if all(len(w) - 1 >= n for w, n in zip(working, need, strict=True)):
        out.append("node")
    hosts = {node: (m.pop, m.failure_domain) for node, m in members.items()}
    pops = {node: m.pop for node, m in members.items()}
    for name, place_of in (("failure_domain", hosts), ("pop", pops)):
        places = set(place_of.values())
        if len(places) > 1 and all(
            sum(place_of.get(x) != place for x in w) >= n
            for place in places
            for w, n in zip(working, need, strict=True)
        ):
            out.append(name)
    return out


def _warnings(roster: Roster, unavailable: int, voters_heard: int) -> list[str]:
    out = []
    if 2 * voters_heard <= len(roster.voters):
        out.append(
            f"{voters_heard} of the {len(roster.voters)} voters are within reach: no member can join, be replaced or "
            "leave"
        )
    if unavailable:
        out.append(f"{unavailable} tablets have no working majority: their groups can neither be read nor written")
    staying = [m for m in roster.members if not m.leaving]
    if len(staying) < REPLICAS:
        out.append(f"members of this domain: {len(staying)}; add nodes until there are {REPLICAS}")
    elif len({m.failure_domain for m in staying}) < REPLICAS:
        out.append("members share failure domains; one failure may stop tablets")
    return out
