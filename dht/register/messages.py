"""What the registers of two nodes say to each other: numbers 1 to 49.

A ballot carries generation and tablet epoch, so a message that has one is admitted or refused by it; reads and finds
name the tablet epoch themselves.
"""

from __future__ import annotations

import enum

import msgspec

from dht.codec import Message, message
from dht.model import ZERO, Ballot, FindQuery, FoundRow, GroupKey, GroupRead, Part, RowKey, Struct, TransactionId


@message
class Prepare(Message, frozen=True, tag=1):
    """Promise the ballot. Rows come back unless the acceptor's accepted ballot is `known`."""

    key: GroupKey
    ballot: Ballot
    known: Ballot | None


@message
class Prepared(Message, frozen=True, tag=2):
    """`promise`: the acceptor's promise after the request; above the asked ballot means refused.

    `floor`: of the window of a register without a value, for earlier ones in its place may have been collected.
    `version`: of the database's catalog, as the acceptor knows it; on this promise nothing older is proposed.
    """

    ok: bool
    promise: Ballot
    accepted: Ballot
    rows: dict[RowKey, bytes] | None
    floor: Ballot = ZERO
    version: int = 0


@message
class Accept(Message, frozen=True, tag=3):
    """Accept the state at `ballot`, and promise `next` with it (None: no further promise).

    `whole`: `rows` are all rows; else they are the changes on the state at `base`. `digest`: of the resulting state.
    """

    key: GroupKey
    ballot: Ballot
    next: Ballot | None
    base: Ballot
    whole: bool
    rows: dict[RowKey, bytes | None]
    digest: bytes
    deleted: bool


class Verdict(enum.IntEnum):
    """NEED_WHOLE: the acceptor stands on another base, or its rows give another digest."""

    ACCEPTED = 1
    REFUSED = 2
    NEED_WHOLE = 3


@message
class Accepted(Message, frozen=True, tag=4):
    """`version`: as in `Prepared`, for the promise that the accept brought along."""

    verdict: Verdict
    promise: Ballot
    accepted: Ballot
    version: int = 0


class Wanted(enum.IntEnum):
    """What a read asks a replica for. SYSTEM: the store's own rows (window, intents, decisions)."""

    BALLOT = 0
    DATA = 1
    SYSTEM = 2


class ReadItem(Struct, frozen=True):
    """`known`: rows are not sent if the accepted ballot is this one."""

    key: GroupKey
    epoch: int
    wanted: Wanted
    known: Ballot | None = None


@message
class ReadReplica(Message, frozen=True, tag=5):
    """Many groups in one frame; each is answered for itself."""

    items: tuple[ReadItem, ...]


class ReplicaState(Struct, frozen=True):
    """`serving` False: this replica does not answer for the group's tablet at that epoch; the rest is meaningless.

    `floor`: as in `Prepared`. `chosen`: the accepted value is known here to be chosen.
    """

    serving: bool
    accepted: Ballot
    intents: int
    rows: dict[RowKey, bytes] | None = None
    floor: Ballot = ZERO
    chosen: bool = False


@message
class ReadReplicaReply(Message, frozen=True, tag=6):
    """`link`: epoch of the newest roster link held here, for whoever was refused."""

    items: tuple[ReplicaState, ...]
    link: int


@message
class Chosen(Message, frozen=True, tag=7):
    """These ballots of these groups are chosen. A hint that only saves work; lost ones are made good by reads."""

    keys: tuple[GroupKey, ...]
    ballots: tuple[Ballot, ...]


@message
class ChosenReply(Message, frozen=True, tag=8):
    pass


class Kind(enum.IntEnum):
    """What a coordinator is asked to do to a group (`dht.register.operations`)."""

    COMMIT = 1
    PREPARE = 2
    COMMIT_PRIMARY = 3
    FINISH = 4
    ROLL_BACK = 5
    ABORT = 6
    FORGET = 7
    SETTLE = 8
    EMPTY = 9


class Operation(Struct, frozen=True):
    """One step on one group.

    `part`: of an EMPTY, its `seen` is where the group stood when it was listed.
    `part_index`: for the errors. `primary`, `primary_seen`: of a PREPARE. `others`: of a COMMIT_PRIMARY. `version`: of
    the catalog under which the transaction was made, 0 where it does not matter (`dht.register.fence`). `author`: of a
    PREPARE, the node that carries the transaction out.
    """

    kind: Kind
    id: TransactionId
    part: Part
    part_index: int = 0
    primary: GroupKey = b""
    primary_seen: Ballot | None = None
    others: tuple[GroupKey, ...] = ()
    version: int = 0
    author: bytes = b""

    def seeing(self, ballot: Ballot | None) -> Operation:
        """The operation that says that it saw the group at that ballot, if it names none."""
        if ballot is None or self.part.seen is not None:
            return self
        return msgspec.structs.replace(self, part=msgspec.structs.replace(self.part, seen=ballot))


@message
class Coordinate(Message, frozen=True, tag=9):
    """Do it for me. `passed`: it came from a node that was not the coordinator either; it is not passed on again."""

    operation: Operation
    attempt: int
    passed: bool
    timeout_ms: int


@message
class Coordinated(Message, frozen=True, tag=10):
    """`ballot`: where the group stands now. `outcome`: group.APPLIED or group.ABORTED; of an EMPTY that came too late
    for what is there now, group.REFUSED.
    """

    ballot: Ballot
    outcome: int


@message
class FindReplica(Message, frozen=True, tag=11):
    """Search your indexes in these tablets at these tablet epochs; send rows of those where `rows` is set."""

    query: FindQuery
    tablets: tuple[int, ...]
    epochs: tuple[int, ...]
    rows: tuple[bool, ...]
    limit: int


@message
class FindReplicaReply(Message, frozen=True, tag=12):
    """One replica's share.

    `covered`: tablets that count. `rows`, and for the other tablets `keys` with `ballots`: matching groups.

    `unsettled`: groups with rows of the table that may not be decided, matching or not; `unsettled_ballots`: where they
    stand, ZERO for one that holds an intent. `truncated`: there are more matches than were sent, all behind `horizon`
    in the query's order. `groups`: the sent rows' groups, whole, as far as they fit. `link`: epoch of the newest roster
    link held here.
    """

    covered: tuple[int, ...]
    rows: tuple[FoundRow, ...]
    keys: tuple[GroupKey, ...]
    ballots: tuple[Ballot, ...]
    unsettled: tuple[GroupKey, ...]
    truncated: bool
    groups: tuple[GroupRead, ...]
    link: int
    horizon: bytes = b""
    unsettled_ballots: tuple[Ballot, ...] = ()


@message
class ListGroups(Message, frozen=True, tag=13):
    """Groups of a database in the tablet, those behind `after`, and in the `others`, as far as they are known here.

    `epochs`: of the tablet and of the others; what is served at another one is not told of. `version`: of the catalog
    that whoever tells follows durably from now on, or a newer one; 0: any.
    """

    database: str
    tablet: int
    after: GroupKey
    limit: int
    others: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()
    version: int = 0


@message
class ListGroupsReply(Message, frozen=True, tag=14):
    """`tablets`: how many of those asked for this is about, in order; the one behind them may not be served.

    `last`: where to go on in the last of them; empty when its end was reached. Of each key, `ballots`: what is accepted
    here; `gone`: that is a tombstone and chosen, and nothing above it is promised here; `promises`: what is promised.
    """

    keys: tuple[GroupKey, ...]
    last: GroupKey
    tablets: int = 1
    ballots: tuple[Ballot, ...] = ()
    gone: tuple[bool, ...] = ()
    promises: tuple[Ballot, ...] = ()


@message
class Learn(Message, frozen=True, tag=15):
    """The database's catalog has changed: read it now. A lost one is made good by the next find."""

    database: str


@message
class LearnReply(Message, frozen=True, tag=16):
    pass


@message
class ListDoubtful(Message, frozen=True, tag=17):
    """Groups of the tablet, behind `after`, that need a look after a recovery (`dht.register.salvage`)."""

    tablet: int
    after: GroupKey


@message
class ListDoubtfulReply(Message, frozen=True, tag=18):
    """Groups that hold intents, and sequences. `last`: where to go on; empty when the tablet's end was reached."""

    intents: tuple[GroupKey, ...]
    sequences: tuple[GroupKey, ...]
    last: GroupKey


@message
class AskFence(Message, frozen=True, tag=19):
    """Follow the catalog at this version or a newer one, durably; then list the groups that begin with `prefixes`."""

    database: str
    version: int
    prefixes: tuple[bytes, ...]
    tablets: tuple[int, ...]
    epochs: tuple[int, ...]


@message
class Fenced(Message, frozen=True, tag=20):
    """`version`: what is followed durably. `tablets`: those served at the asked epochs, as far as they fit.

    `keys`: of each of them all groups of which anything is known here, were it only a promise.
    """

    version: int
    tablets: tuple[int, ...]
    keys: tuple[tuple[GroupKey, ...], ...]
