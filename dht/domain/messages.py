"""What the members of a domain ask each other (numbers 50-99). Each names its domain; a receiver of another refuses.

A link travels whole: it is small (4 KiB with 64 tablets) and explains itself.
"""

from __future__ import annotations

from typing import Final

from dht.codec import Message, message
from dht.domain.roster import Member, Roster
from dht.domain.wide import Word
from dht.model import ZERO, Ballot, GroupKey, NodeId, RowKey, Struct
from dht.storage.registers import Header


class DomainMessage(Message, frozen=True):
    """Base of the requests that `Domain.answer` serves."""

    domain: str


LINKS_PER_PAGE: Final = 100


@message
class AskLinks(DomainMessage, frozen=True, tag=50):
    """The links after an epoch, at most `limit` and LINKS_PER_PAGE, in order: fewer are all that there are."""

    after: int
    limit: int


@message
class Links(Message, frozen=True, tag=51):
    """`newest`: the newest epoch that the sender holds."""

    links: tuple[Roster, ...]
    newest: int


@message
class TellLink(DomainMessage, frozen=True, tag=52):
    """A decided link; the receiver takes it, and those before it from the sender."""

    link: Roster


@message
class Newest(Message, frozen=True, tag=53):
    """The newest epoch held after the request was served."""

    epoch: int


@message
class DecreePrepare(DomainMessage, frozen=True, tag=54):
    """Single-decree Paxos for link `epoch`, asked of the voters of the link before."""

    epoch: int
    ballot: Ballot


@message
class DecreePromise(Message, frozen=True, tag=55):
    """`promised`: equals the asked ballot if granted. `decided`: the link, where it is known already."""

    promised: Ballot
    accepted: Ballot
    link: Roster | None
    decided: Roster | None = None


@message
class DecreeAccept(DomainMessage, frozen=True, tag=56):
    epoch: int
    ballot: Ballot
    link: Roster


@message
class DecreeAccepted(Message, frozen=True, tag=57):
    """`promised`: equals the asked ballot if accepted."""

    promised: Ballot
    decided: Roster | None = None


@message
class AskSeal(DomainMessage, frozen=True, tag=60):
    """Seal the tablet at `epoch`, because the decided `link` gave it other replicas (rule 1)."""

    tablet: int
    epoch: int
    link: Roster


@message
class Sealed(Message, frozen=True, tag=61):
    """Sealed durably. `initialised`: whether this replica was ever initialised at the epoch, so may contribute.

    `floor`: promise of the registers that this replica has no trace of. `versions`: of the catalogs, by encoded name of
    the database, as this replica told them with its promises (`dht.register.fence`).
    """

    incarnation: bytes
    initialised: bool
    floor: Ballot
    versions: dict[bytes, int] = {}


@message
class AskHeaders(DomainMessage, frozen=True, tag=62):
    """A page of registers of the tablet behind `after`, from a replica initialised at `epoch`.

    `link`: 0 while copying ahead; else the seal is required.
    """

    tablet: int
    epoch: int
    after: GroupKey
    limit: int
    sealed: bool


class RegisterMark(Struct, frozen=True):
    key: GroupKey
    promise: Ballot
    accepted: Ballot
    chosen: Ballot
    size_bytes: int = 0


@message
class Headers(Message, frozen=True, tag=63):
    """`more`: whether keys behind the last one exist. `floor`: as in `Sealed`."""

    marks: tuple[RegisterMark, ...]
    more: bool
    floor: Ballot = ZERO


@message
class AskRegisters(DomainMessage, frozen=True, tag=64):
    """Whole registers; the reply may leave out the last ones for size, never the first."""

    tablet: int
    epoch: int
    keys: tuple[GroupKey, ...]
    sealed: bool


class RegisterCopy(Struct, frozen=True):
    """A register as it rests on a replica; an absent one has an empty header."""

    key: GroupKey
    header: Header
    rows: dict[RowKey, bytes]


@message
class Registers(Message, frozen=True, tag=65):
    copies: tuple[RegisterCopy, ...]


@message
class AskStatus(DomainMessage, frozen=True, tag=66):
    """Sent by every member to every other at short intervals: liveness, newest epoch, state of tablets.

    `branch`: digest of the link that began the generation, empty in the first: two recoveries may begin the same one.
    """

    epoch: int
    generation: int = 0
    branch: bytes = b""


class TabletMark(Struct, frozen=True):
    """`initialised`: newest epoch that the replica was initialised at; `sealed`: the highest sealed (0: none).

    `remaining`: groups that this replica still has to copy, as far as it knows, of `remaining_bytes`. `floor`: the one
    that all replicas of that epoch are known to have (`Tablets.agree`).
    """

    tablet: int
    initialised: int
    sealed: int
    remaining: int = 0
    floor: Ballot = ZERO
    remaining_bytes: int = 0


@message
class Status(Message, frozen=True, tag=67):
    """`silent`: members that the sender has not reached lately, with the seconds since it did.

    `word`: what the sender says of others of its PoP, in a domain over all PoPs.
    """

    epoch: int
    incarnation: bytes
    tablets: tuple[TabletMark, ...]
    silent: tuple[tuple[NodeId, float], ...]
    generation: int = 0
    branch: bytes = b""
    word: Word = Word()


@message
class TellTablets(DomainMessage, frozen=True, tag=68):
    """Tablets of the sender that were sealed or initialised a moment ago: told at once, not at the next status."""

    epoch: int
    generation: int
    tablets: tuple[TabletMark, ...]


@message
class AskJoin(DomainMessage, frozen=True, tag=70):
    """Make the sender (or a member whose address changed) a member.

    `passed_on`: by a member, to be done by this one.
    """

    member: Member
    passed_on: bool = False


@message
class AskLeave(DomainMessage, frozen=True, tag=71):
    """Take a member out. `drain`: it is alive and its tablets move first; else it counts as lost.

    `passed_on`: by a member, to be done by this one.
    """

    node: NodeId
    drain: bool
    passed_on: bool = False


@message
class AskTombstones(DomainMessage, frozen=True, tag=80):
    """Raise the tablet's floor, durably. Which of these registers are this tombstone, or without a value, with you?"""

    tablet: int
    epoch: int
    floor: Ballot
    keys: tuple[GroupKey, ...]
    ballots: tuple[Ballot, ...]


@message
class Tombstones(Message, frozen=True, tag=81):
    """`held`: in the order of the question. `promise`: the highest of those registers."""

    held: tuple[bool, ...]
    promise: Ballot


@message
class Collect(DomainMessage, frozen=True, tag=82):
    """Every replica has the floor, and held these tombstones: erase them where they are unchanged."""

    tablet: int
    epoch: int
    floor: Ballot
    keys: tuple[GroupKey, ...]
    ballots: tuple[Ballot, ...]


@message
class Collected(Message, frozen=True, tag=83):
    """How many were erased."""

    registers: int


@message
class AskRecovery(DomainMessage, frozen=True, tag=84):
    """May `link` begin a generation, as a human ordered at the sender? Each survivor takes part in one order only."""

    link: Roster


@message
class RecoveryVote(Message, frozen=True, tag=85):
    """`granted`: durably. Else `why` not, a sentence."""

    granted: bool
    why: str = ""


@message
class AskChanges(DomainMessage, frozen=True, tag=90):
    """A follower's question: which registers changed behind `after`, by the count that began as `instance`?

    Not more than `limit`. Of another count only where it stands now is told.
    """

    instance: bytes
    after: int
    limit: int


class Served(Struct, frozen=True):
    """A tablet that the replica serves at that epoch. `floor`: one that all its replicas have (`Tablets.agree`)."""

    tablet: int
    epoch: int
    floor: Ballot


@message
class Changes(Message, frozen=True, tag=91):
    """What changed at one replica, durable there.

    `kept`: whether the count asked for is this one, and reaches back so far. `upto`: where to go on. `more`: there is
    more to ask for. `served`: of the moment of the answer, told when there is no more. `epoch`: of the newest link.
    """

    instance: bytes
    kept: bool
    upto: int
    more: bool
    marks: tuple[RegisterMark, ...]
    served: tuple[Served, ...]
    epoch: int
    generation: int


@message
class AskCopy(DomainMessage, frozen=True, tag=94):
    """What does your copy of the domain cover?"""


@message
class CopyCovers(Message, frozen=True, tag=95):
    """`wall_s`, `open`: see `dht.domain.copy.Coverage`. `epoch`, `generation`: of the newest link that it holds."""

    epoch: int
    generation: int
    wall_s: tuple[float, ...]
    open: dict[GroupKey, float]


@message
class AskCopyLinks(DomainMessage, frozen=True, tag=96):
    """The links that the copy came with, as `AskLinks`; answered with `Links`."""

    after: int


@message
class AskCopyPage(DomainMessage, frozen=True, tag=97):
    """Registers of the tablet in your copy, behind `after`: answered with `Registers` that fit, none at the end."""

    tablet: int
    after: GroupKey


@message
class AskMarks(DomainMessage, frozen=True, tag=92):
    """Where do these registers of the tablet stand, at a replica that serves it at `epoch`?"""

    tablet: int
    epoch: int
    keys: tuple[GroupKey, ...]


@message
class Marks(Message, frozen=True, tag=93):
    """In the order of the question, durable; a register without a value has ZERO everywhere. `floor`: as `Served`."""

    marks: tuple[RegisterMark, ...]
    floor: Ballot
