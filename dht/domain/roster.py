"""A domain's configuration as a chain of links, and the arithmetic on it (DESIGN section 5). Pure.

Link e lists everything explicitly; nobody derives a replica set from it. Tablet epoch: the roster epoch in which
a tablet's replicas last changed; frames of registers carry it and are refused on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import msgspec

from dht.errors import Invalid, RemoteProtocolError
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import ZERO, Ballot, NodeId, Struct

FIRST_EPOCH: Final = 1
REPLICAS: Final = 3
REPLICAS_WIDE: Final = 5
"""Replicas of a tablet in a domain of so many PoPs; elsewhere `REPLICAS`."""
_SIZES: Final = {1: (1, 1), 2: (2, 1), 3: (2, 2), 5: (3, 3)}
_GROWTH: Final = ((1, 3), (2, 3), (3, 5))
_SHRINKING: Final = ((5, 3),)
_VOTER_COUNTS: Final = (1, 3, 5)
_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Roster]


def quorums(n: int) -> tuple[int, int]:
    """(accept and read, prepare and seal) of n replicas; any two of different kinds meet, and so do two accepts."""
    return _SIZES.get(n) or (n // 2 + 1, n // 2 + 1)


def proven(ballot: Ballot, epoch: int, holders: int, replicas: int) -> bool:
    """Whether so many of a tablet epoch's replicas, all at this accepted ballot, prove it chosen without a mark.

    Those that accepted it in this epoch do when they are an accept quorum. What an earlier epoch left unfinished was
    handed to each new replica by the sealed ones that it happened to ask: most may hold one accept of a single old
    replica, and one of them a higher accept of another, which the next prepare may find and choose instead. Only where
    all hold the ballot there is no other to be found. That nothing was accepted needs no proof: what is found later
    was on its way.
    """
    if ballot == ZERO or ballot.epoch == epoch:
        return holders >= quorums(replicas)[0]
    return holders == replicas


def replicas_wanted(members: Sequence[Member]) -> int:
    """How many replicas a tablet is to have in a domain of these: 5 over five PoPs and more, else 3.

    A whole PoP is never removed by itself, so its being cut off changes nothing here.
    """
    return REPLICAS_WIDE if len({m.pop for m in members if not m.leaving}) >= REPLICAS_WIDE else REPLICAS


class Member(Struct, frozen=True):
    """A node as the roster knows it. `address`: host:port. `leaving`: gets no tablets, and goes when it has none.

    A member is (node_id, incarnation): the same node with a wiped disk is another member.
    """

    node_id: NodeId
    incarnation: bytes
    pop: str
    failure_domain: str
    address: str
    leaving: bool = False


class TabletReplicas(Struct, frozen=True):
    """A tablet's replicas, coordinator first, and their tablet epoch."""

    epoch: int
    nodes: tuple[NodeId, ...]


class Roster(Struct, frozen=True):
    """One link. `previous`: digest of the link before (empty in the first). `members` are sorted by node_id.

    `tablets[t]`: replicas in the order in which they are tried as coordinator; `tablet_epochs[t]`: their epoch.
    """

    domain: str
    generation: int
    epoch: int
    previous: bytes
    members: tuple[Member, ...]
    voters: tuple[NodeId, ...]
    tablets: tuple[tuple[NodeId, ...], ...]
    tablet_epochs: tuple[int, ...]

    def member(self, node: NodeId) -> Member | None:
        return next((m for m in self.members if m.node_id == node), None)

    def others(self, node: NodeId) -> tuple[NodeId, ...]:
        """The members but this one."""
        return tuple(m.node_id for m in self.members if m.node_id != node)

    def lists(self, node: NodeId, incarnation: bytes) -> bool:
        """Whether exactly this incarnation of the node is a member."""
        return any(m.node_id == node and m.incarnation == incarnation for m in self.members)

    def replicas(self, tablet: int) -> TabletReplicas:
        """Raises Invalid for a tablet that the domain does not have."""
        if not 0 <= tablet < len(self.tablets):
            raise Invalid(f"domain {self.domain} has tablets 0 to {len(self.tablets) - 1}, not {tablet}")
        return TabletReplicas(self.tablet_epochs[tablet], self.tablets[tablet])

    def tablets_of(self, node: NodeId) -> tuple[int, ...]:
        return tuple(t for t, nodes in enumerate(self.tablets) if node in nodes)


_decoder = msgspec.msgpack.Decoder(Roster)


def encode_link(link: Roster) -> bytes:
    return _encode(link)


def decode_link(data: bytes) -> Roster:
    """Raises RemoteProtocolError when the bytes are no link."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise RemoteProtocolError(f"{len(data)} bytes are not a roster link of this version: {error}") from None


def digest(link: Roster) -> bytes:
    """What the next link names as its predecessor."""
    return hashlib.sha256(_encode(link)).digest()


def found(domain: str, member: Member, tablets: int = TABLETS_PER_DOMAIN, generation: int = 1) -> Roster:
    """The first link: one member, which keeps every tablet and decides alone."""
    return Roster(
        domain,
        generation,
        FIRST_EPOCH,
        b"",
        (member,),
        (member.node_id,),
        ((member.node_id,),) * tablets,
        (FIRST_EPOCH,) * tablets,
    )


def successor(
    link: Roster,
    members: Sequence[Member],
    voters: Sequence[NodeId],
    tablets: Sequence[Sequence[NodeId]],
) -> Roster:
    """The link after `link` with this content; tablet epochs follow from which replica sets (not orders) changed.

    A replica whose incarnation changed is another replica, so its tablets get a new epoch too.
    """
    epoch = link.epoch + 1
    ordered = tuple(sorted(members, key=lambda m: m.node_id))
    reborn = {m.node_id for m in ordered if (old := link.member(m.node_id)) and old.incarnation != m.incarnation}
    epochs = tuple(
        epoch if set(old) != set(new) or reborn.intersection(new) else link.tablet_epochs[t]
        for t, (old, new) in enumerate(zip(link.tablets, tablets, strict=True))
    )
    return Roster(
        link.domain,
        link.generation,
        epoch,
        digest(link),
        ordered,
        tuple(voters),
        tuple(tuple(nodes) for nodes in tablets),
        epochs,
    )


def check_step(before: Roster, after: Roster) -> None:
    """Raise RemoteProtocolError unless `after` may follow `before` (rule 5 and the shape of a link).

    What is written is safe whatever the new replicas are: they begin from a quorum of sealed old ones. That one at a
    time changes keeps the tablet served: of the old set a seal quorum has to answer, of the new one an accept quorum
    has to be initialised, and both bear the loss that the smaller set bears. So do growth that keeps all (two come at
    once, for 2 and 4 bear no more losses than 1 and 3) and the way back from 5, where all that stay were replicas.
    """
    if after.domain == before.domain and after.generation > before.generation:
        _check_recovery(before, after)
        return
    if after.domain != before.domain or after.generation != before.generation:
        _refuse(after, f"belongs to domain {after.domain} generation {after.generation}")
    if after.epoch != before.epoch + 1 or after.previous != digest(before):
        _refuse(after, f"does not follow the link {before.epoch} held here")
    check_shape(after)
    if len(after.tablets) != len(before.tablets):
        _refuse(after, "changes the number of tablets, which is fixed for the domain's life")
    if after != successor(before, after.members, after.voters, after.tablets):
        _refuse(after, "has tablet epochs that do not follow from its tablets")
    reborn = {
        m.node_id for m in after.members if (old := before.member(m.node_id)) and old.incarnation != m.incarnation
    }
    for tablet, (old_nodes, new_nodes) in enumerate(zip(before.tablets, after.tablets, strict=True)):
        gone = sum(1 for n in old_nodes if n not in new_nodes or n in reborn)
        come = sum(1 for n in new_nodes if n not in old_nodes or n in reborn)
        sizes = len(old_nodes), len(new_nodes)
        grows = gone == 0 and sizes in _GROWTH
        shrinks = come == 0 and sizes in _SHRINKING
        if not grows and not shrinks and (gone > 1 or come > 1):
            _refuse(after, f"replaces {max(gone, come)} replicas of tablet {tablet}; one epoch replaces at most one")


def _check_recovery(before: Roster, after: Roster) -> None:
    """Rule 8: the first link of a generation has members of the link before only, and new epochs everywhere.

    Or it has one member that is new: nobody of the link before is left, and that one begins with a follower's copy.
    """
    if after.epoch != before.epoch + 1 or after.previous != digest(before):
        _refuse(after, f"does not follow the link {before.epoch} held here", generation=after.generation)
    check_shape(after)
    if len(after.tablets) != len(before.tablets):
        _refuse(after, "changes the number of tablets, which is fixed for the domain's life")
    if len(after.members) > 1 and any(not before.lists(m.node_id, m.incarnation) for m in after.members):
        _refuse(after, "begins a generation with members that the link before does not have")
    if set(after.tablet_epochs) != {after.epoch}:
        _refuse(after, "begins a generation and leaves tablets at epochs of the one before")


def check_shape(link: Roster) -> None:
    """Raise RemoteProtocolError unless the link is sound by itself."""
    ids = [m.node_id for m in link.members]
    known = set(ids)
    if not ids or ids != sorted(known):
        _refuse(link, "lists members twice or out of order")
    if len(link.voters) not in _VOTER_COUNTS or len(set(link.voters)) != len(link.voters):
        _refuse(link, f"has {len(link.voters)} voters; 1, 3 or 5 different ones are allowed")
    if not known.issuperset(link.voters):
        _refuse(link, "has a voter that is not a member")
    if not link.tablets or len(link.tablets) != len(link.tablet_epochs):
        _refuse(link, "has no tablet map, or one without epochs")
    for tablet, nodes in enumerate(link.tablets):
        if len(nodes) not in _SIZES or len(set(nodes)) != len(nodes) or not known.issuperset(nodes):
            _refuse(link, f"gives tablet {tablet} replicas that are no set of 1, 2, 3 or 5 members")


def _refuse(link: Roster, why: str, **detail: object) -> None:
    text = f"link {link.epoch} of domain {link.domain} {why}; it is not taken"
    raise RemoteProtocolError(text, epoch=link.epoch, **detail)
