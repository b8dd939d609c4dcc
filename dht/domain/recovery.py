"""A majority lost for good: the survivors go on by themselves, in a new generation (DESIGN section 5, rule 8).

The link that begins a generation is decided by a human, not by voters: it lists the survivors that he named as its only
members, and gives every tablet a new epoch on them. Each survivor that was a replica of a tablet contributes to it (per
register the highest accepted ballot among them), and all of them have to answer: what the others had is lost. Nobody
answers for an epoch before the link any more; a node that is not listed keeps its file and serves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from dht.domain.placement import score
from dht.domain.plan import choose_voters
from dht.domain.roster import REPLICAS, Member, Roster, digest, quorums
from dht.errors import Invalid, StorageError
from dht.model import NodeId, Struct
from dht.world import Batch, Disk, Space

_RECORD_PREFIX = b"recovery/"


class Recovery(Struct, frozen=True):
    """The audit record of one recovery, kept where it was ordered. `wall_s`: seconds since 1970.

    `bereft`: tablets that had lost their majority; `empty`: those of which no survivor had anything. `findings`:
    sentences about what was done to the data afterwards. `from_copies`: nobody was left, it began with what others had
    copied.
    """

    wall_s: float
    ordered_at: NodeId
    generation: int
    epoch: int
    survivors: tuple[NodeId, ...]
    lost: tuple[NodeId, ...]
    bereft: tuple[int, ...]
    empty: tuple[int, ...]
    findings: tuple[str, ...] = ()
    from_copies: bool = False


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Recovery).decode


def bereft_tablets(roster: Roster, survivors: Collection[NodeId]) -> tuple[int, ...]:
    """Tablets that the survivors can neither read nor write."""
    return tuple(
        t for t, nodes in enumerate(roster.tablets) if sum(n in survivors for n in nodes) < quorums(len(nodes))[0]
    )


def majority_lives(roster: Roster, answering: Collection[NodeId]) -> bool:
    """Whether the domain goes on by itself: its voters can decide and no tablet is bereft."""
    voters = sum(v in answering for v in roster.voters)
    return voters * 2 > len(roster.voters) and not bereft_tablets(roster, answering)


def recovered(roster: Roster, survivors: Sequence[NodeId]) -> Roster:
    """The link that begins the next generation. Raises Invalid for survivors that are no members."""
    members = tuple(m for m in roster.members if m.node_id in survivors)
    strangers = [n for n in survivors if roster.member(n) is None]
    if strangers or not members:
        raise Invalid(
            f"{', '.join(n.hex() for n in strangers) or 'nobody'} is no member of domain {roster.domain}; "
            "`lucd domain show` lists its members"
        )
    ids = [m.node_id for m in members]
    tablets = []
    for tablet, nodes in enumerate(roster.tablets):
        kept = [n for n in nodes if n in ids][:REPLICAS]
        others = sorted((n for n in ids if n not in kept), key=lambda n: (-score(tablet, n), n))
        tablets.append(tuple(kept + others[: REPLICAS - len(kept)]))
    epoch = roster.epoch + 1
    return Roster(
        roster.domain,
        roster.generation + 1,
        epoch,
        digest(roster),
        members,
        choose_voters(members, [v for v in roster.voters if v in ids], ids),
        tuple(tablets),
        (epoch,) * len(tablets),
    )


def restored(roster: Roster, member: Member, generation: int = 0) -> Roster:
    """The link with which one new node begins the next generation, out of a follower's copy: nobody else is left.

    `generation`: the least that it may be, where later ones were begun that the copy has not heard of.
    """
    epoch = roster.epoch + 1
    tablets = ((member.node_id,),) * len(roster.tablets)
    return Roster(
        roster.domain,
        max(roster.generation + 1, generation),
        epoch,
        digest(roster),
        (member,),
        (member.node_id,),
        tablets,
        (epoch,) * len(tablets),
    )


def put_record(batch: Batch, domain: str, record: Recovery) -> None:
    """Into the batch: the audit record, in place of an earlier one of the same generation."""
    batch.put(Space.META, _prefix(domain) + record.generation.to_bytes(8, "big"), _encode(record))


def keep_record(disk: Disk, domain: str, record: Recovery) -> int:
    """Submit the audit record; returns the batch's number."""
    batch = Batch()
    put_record(batch, domain, record)
    return disk.submit(batch)


def records(disk: Disk, domain: str) -> tuple[Recovery, ...]:
    """The recoveries that were ordered at this node, oldest first."""
    prefix = _prefix(domain)
    try:
        return tuple(_decode(value) for _, value in disk.range(Space.META, prefix, prefix + b"\xff" * 9))
    except msgspec.MsgspecError as error:
        raise StorageError(f"the record of a recovery cannot be read ({error}): the file is damaged") from None


def _prefix(domain: str) -> bytes:
    return _RECORD_PREFIX + domain.encode() + b"\x00"


def _superseded_key(domain: str) -> bytes:
    return b"superseded/" + domain.encode()


def mark_superseded(disk: Disk, domain: str, generation: int) -> int:
    """Submit the note that this file belongs to a generation which is over."""
    batch = Batch()
    batch.put(Space.META, _superseded_key(domain), generation.to_bytes(8, "big"))
    return disk.submit(batch)


def superseded_by(disk: Disk, domain: str) -> int:
    """The generation that was begun without what this file holds; 0 if none is known."""
    value = disk.get(Space.META, _superseded_key(domain))
    return 0 if value is None else int.from_bytes(value, "big")


class Vote(Struct, frozen=True):
    """This node takes part in the recovery that was ordered at `ordered_at`, and begins with that link."""

    generation: int
    ordered_at: NodeId
    link: bytes


_encode_vote = msgspec.msgpack.Encoder().encode
_decode_vote = msgspec.msgpack.Decoder(Vote).decode


def _vote_key(domain: str) -> bytes:
    return b"recovering/" + domain.encode()


def vote(disk: Disk, link: Roster, ordered_at: NodeId) -> Vote | None:
    """The vote that stands against the order, if any. One counts for nothing whose orderer is not to survive."""
    value = disk.get(Space.META, _vote_key(link.domain))
    earlier = None if value is None else _decode_vote(value)
    if earlier is None or earlier.generation < link.generation or earlier.ordered_at == ordered_at:
        return None
    return earlier if link.member(earlier.ordered_at) is not None else None


def keep_vote(disk: Disk, link: Roster, ordered_at: NodeId) -> int:
    """Submit the vote; returns the batch's number."""
    batch = Batch()
    batch.put(Space.META, _vote_key(link.domain), _encode_vote(Vote(link.generation, ordered_at, digest(link))))
    return disk.submit(batch)
