"""The store's own interface: what a client of a node can ask, in one asynchronous and one blocking shape.

The same requests travel over the local socket. `Store` is served by a node (`dht.register`), by the asynchronous
client; `BlockingStore` by the blocking client and by the in-process store of unit tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dht.codec import Message, message
from dht.model import (
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    NodeId,
    PopClaim,
    Transaction,
    TransactionId,
)


@message
class ReadGroups(Message, frozen=True, tag=100):
    """Linearizable read of groups, each at one ballot. `known[i]`: the ballot the caller has cached, or None.

    `near`: a group of a local family is looked for in the asked node's own PoP only.
    """

    keys: tuple[GroupKey, ...]
    known: tuple[Ballot | None, ...]
    near: bool = False


@message
class ReadGroupsReply(Message, frozen=True, tag=101):
    groups: tuple[GroupRead, ...]


@message
class Find(Message, frozen=True, tag=102):
    query: FindQuery


@message
class FindReply(Message, frozen=True, tag=103):
    result: FindResult


@message
class Commit(Message, frozen=True, tag=104):
    """`attempt`: 0 the first time, then counted up; the transaction's id stays.

    Whoever sends it again has asked first what became of it: what the registry and the catalog refuse (NotFound,
    SchemaChanged), and Unavailable, is said of this attempt alone, without a look at the group's window.
    """

    transaction: Transaction
    attempt: int = 0


@message
class CommitReply(Message, frozen=True, tag=105):
    applied: Applied


@message
class ReserveIds(Message, frozen=True, tag=106):
    """`count` consecutive ids of the sequence (database, name), all greater than `above`."""

    database: str
    name: str
    count: int
    above: int = 0


@message
class ReserveIdsReply(Message, frozen=True, tag=107):
    first: int


@message
class RaiseSequence(Message, frozen=True, tag=108):
    """Make the sequence give out only ids greater than `above` from now on (an explicit id was inserted)."""

    database: str
    name: str
    above: int


@message
class ListDatabases(Message, frozen=True, tag=109):
    pass


@message
class ListDatabasesReply(Message, frozen=True, tag=110):
    names: tuple[str, ...]


@message
class CreateDatabase(Message, frozen=True, tag=111):
    """Create the database if it does not exist; `changed` in the reply tells which.

    `home`: the PoP that it lives in, or "global"; empty: the PoP, or the domain, that is asked.
    """

    name: str
    home: str = ""


@message
class DropDatabase(Message, frozen=True, tag=112):
    """Delete the database with all its groups; one that is being dropped already, too.

    `home`: only if the list that is asked has it with that home; None: whichever it has.
    """

    name: str
    home: str | None = None


@message
class Done(Message, frozen=True, tag=113):
    """Success without content; `changed` is False when there was nothing to do."""

    changed: bool = True


@message
class AskOutcome(Message, frozen=True, tag=114):
    """Was the transaction applied? Asked at its first part's group after an Indeterminate."""

    id: TransactionId
    key: GroupKey
    seen: Ballot | None = None


@message
class AskOutcomeReply(Message, frozen=True, tag=115):
    """`outcome`: "applied", "not_applied" or "unknown" (the window no longer covers it)."""

    outcome: str


@message
class RaiseFence(Message, frozen=True, tag=116):
    """No transaction made under an older catalog than `version` shall change the groups that begin with `prefixes`.

    Done in slices: `first` is 0, then what the reply says.
    """

    database: str
    version: int
    prefixes: tuple[bytes, ...]
    first: int = 0


@message
class RaiseFenceReply(Message, frozen=True, tag=117):
    """`following`: where to go on; -1 when the fence is raised everywhere."""

    following: int


@message
class ListHomes(Message, frozen=True, tag=118):
    pass


@message
class ListHomesReply(Message, frozen=True, tag=119):
    """Database -> the PoP that it lives in, or "global"."""

    homes: dict[str, str]


@message
class ClaimPop(Message, frozen=True, tag=120):
    """May this incarnation of the node found the PoP's domain? Asked of domain `global`.

    `index`: what the PoP had, for one that was founded already and is missing in the list.
    """

    pop: str
    node: NodeId
    incarnation: bytes
    index: int | None = None


@message
class ClaimPopReply(Message, frozen=True, tag=121):
    """Who may, now and for ever: the first that asked."""

    claim: PopClaim


@message
class MovePop(Message, frozen=True, tag=136):
    """Let `after` have the claim of the PoP, if `before` still has it. Asked of domain `global`, answered by `Done`."""

    pop: str
    before: PopClaim
    after: PopClaim


@message
class ListPops(Message, frozen=True, tag=124):
    pass


@message
class ListPopsReply(Message, frozen=True, tag=125):
    """In the order of their indexes."""

    pops: dict[str, PopClaim]


@message
class AskHome(Message, frozen=True, tag=126):
    """Of one database, as the asked node knows it; asked of `global` only if it does not."""

    database: str


@message
class AskHomeReply(Message, frozen=True, tag=127):
    """A PoP, "global" or "local"; empty if there is no such database."""

    home: str


class Store(Protocol):
    """Errors: see `dht.errors`. `timeout_s` bounds the whole call; None means limits.REQUEST_TIMEOUT_S."""

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]: ...

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult: ...

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied: ...

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int: ...

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None: ...

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str: ...

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int: ...

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]: ...

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]: ...

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]: ...

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool: ...

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool: ...


class BlockingStore(Protocol):
    """`Store` for threads and greenlets: the same calls, blocking."""

    def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]: ...

    def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult: ...

    def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied: ...

    def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int: ...

    def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None: ...

    def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str: ...

    def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int: ...

    def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]: ...

    def home(self, database: str, timeout_s: float | None = None) -> str: ...

    def create_database(self, name: str, timeout_s: float | None = None) -> bool: ...

    def drop_database(self, name: str, timeout_s: float | None = None) -> bool: ...
