"""The words of the store as types: ballots, rows, guards, transactions, queries (DESIGN sections 3, 6, 7).

Tables and columns are numbers that the catalog gave out; the store never learns their names. A row is a map from
column number to value. Rows and row keys travel and rest as bytes (`dht.rows`), so that an acceptor stores exactly what
the proposer digested.

All types are msgspec structs: frozen, positional on the wire, and validated by their annotations when decoded, so a
frame that does not fit is refused before any code of ours looks at it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    Value = None | int | float | str | bytes
else:  # msgspec has no union of str and bytes: `dht.rows.check_value` checks values where they enter the store
    Value = Any
Row = dict[int, Value]
Columns = dict[int, Value]
GroupKey = bytes
RowKey = bytes
NodeId = bytes
TransactionId = bytes


class Ballot(NamedTuple):
    """Totally ordered; unique per operation, because (node, boot, op) never repeats.

    Rule: promises are compared whole, so a ballot of a higher generation or tablet epoch beats any round below it.
    """

    generation: int
    epoch: int
    round: int
    node: bytes
    boot: int
    op: int


ZERO = Ballot(0, 0, 0, b"", 0, 0)


class Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of everything that is sent or stored."""


class Op(enum.IntEnum):
    """What a change does to its row."""

    INSERT = 1
    UPDATE = 2
    DELETE = 3


class Change(Struct, frozen=True):
    """One row's change. INSERT requires the row to be absent, UPDATE and DELETE require it to exist.

    `columns`: the values set (INSERT: all). Columns not named are never touched. `guards`: column -> value that the
    current row must have, compared by value; a mismatch is a Conflict.
    """

    op: Op
    table: int
    pk: tuple[Value, ...]
    columns: Columns = {}
    guards: Columns = {}


class GuardKind(enum.IntEnum):
    """HAS: the row (table, pk) exists and has the columns' values. ABSENT: it does not exist.

    UNIQUE: no row of the table in this group, other than `pk`, has all of the columns' values (empty pk: excepts none).
    """

    HAS = 1
    ABSENT = 2
    UNIQUE = 3


class Guard(Struct, frozen=True):
    """A condition on a group beside those of its changes. `fails_as` is the error code: conflict or duplicate."""

    kind: GuardKind
    table: int
    pk: tuple[Value, ...] = ()
    columns: Columns = {}
    fails_as: str = "conflict"


class Part(Struct, frozen=True):
    """What a transaction does to one group. Guards are checked before, UNIQUE guards after, the changes.

    `seen`: the ballot at which the transaction first saw the group; None if it never did. Guards without changes are
    allowed.
    """

    key: GroupKey
    seen: Ballot | None = None
    changes: tuple[Change, ...] = ()
    guards: tuple[Guard, ...] = ()


class Transaction(Struct, frozen=True):
    """All parts or none. `id`: 16 random bytes, the same at every retry. A single part is the common, fast case.

    `created`: the parts, by position, whose groups nobody has yet; of a local family they are made in the PoP where the
    transaction is committed.
    """

    id: TransactionId
    database: str
    catalog_version: int
    parts: tuple[Part, ...]
    created: tuple[int, ...] = ()

    @property
    def witness(self) -> Part:
        """The part whose group is asked what became of the transaction.

        One that names a ballot if any does: where its group has forgotten the transaction, it can still tell that it
        did, or that nothing which it forgot was applied.
        """
        return next((part for part in self.parts if part.seen is not None), self.parts[0])


class Applied(Struct, frozen=True):
    """The ballots at which the parts now stand, in the order of the parts."""

    ballots: tuple[Ballot, ...]


class GroupRead(Struct, frozen=True):
    """One group at one ballot. `rows` is None where the caller's known ballot still holds.

    A group that does not exist reads as no rows; its ballot is ZERO, that of its tombstone, or its tablet's floor.
    """

    key: GroupKey
    ballot: Ballot
    rows: dict[RowKey, bytes] | None


class Comparison(enum.IntEnum):
    """NULL satisfies IS_NULL, IS_NOT (a value: the column's is another, or NULL) and EQ_OR_NULL, and nothing else."""

    EQ = 1
    NE = 2
    IN = 3
    LT = 4
    LE = 5
    GT = 6
    GE = 7
    IS_NULL = 8
    NOT_NULL = 9
    IS_NOT = 10
    EQ_OR_NULL = 11


class Constraint(Struct, frozen=True):
    """One column's condition; `values` holds one value, several for IN, none for IS_NULL and NOT_NULL."""

    column: int
    comparison: Comparison
    values: tuple[Value, ...] = ()


class Order(Struct, frozen=True):
    """Order by columns of an index or of the primary key; all ascending or all descending."""

    columns: tuple[int, ...]
    descending: bool = False


class Scope(enum.IntEnum):
    """Which PoPs a find is about.

    HOME: the database's home. For tables of local families: POPS: all PoPs; REACHABLE: those that can be asked, the
    others are left out; NEAR: the one where it is asked.
    """

    HOME = 0
    POPS = 1
    REACHABLE = 2
    NEAR = 3


class FindQuery(Struct, frozen=True):
    """Rows of one table in whatever group, by conjunction of constraints.

    `limit` cuts only together with `order`. `whole_groups` brings the matching rows' groups too.
    """

    database: str
    table: int
    catalog_version: int
    constraints: tuple[Constraint, ...] = ()
    order: Order | None = None
    limit: int | None = None
    whole_groups: bool = False
    scope: Scope = Scope.HOME


class FoundRow(Struct, frozen=True):
    """A row, and the group at the ballot at which it was read."""

    group: GroupKey
    ballot: Ballot
    key: RowKey
    row: bytes


class FindResult(Struct, frozen=True):
    """Rows in the asked order (else by primary key); `groups` is filled when whole groups were asked for."""

    rows: tuple[FoundRow, ...]
    groups: tuple[GroupRead, ...] = ()


class IndexSpec(Struct, frozen=True):
    """An index that replicas keep. `id` is unique in its table and never reused; id 0 is the primary key, implicit."""

    id: int
    columns: tuple[int, ...]


class Reading(enum.IntFlag):
    """How a table may be read besides linearizably, by its voters (DESIGN section 8).

    FOLLOW: from a follower, within the bound. SERVE_STALE: from one past the bound, while the voters are out of reach.
    PARTIAL_OK: a scan may leave out PoPs that are out of reach, and counts them.
    """

    FOLLOW = 1
    SERVE_STALE = 2
    PARTIAL_OK = 4


class TableSpec(Struct, frozen=True):
    """What the store must know of a table: its primary-key columns, its indexes, where its groups live, how it is read.

    `home`: "local", "global", or empty: its database's. `read`: `Reading` flags. `groups`: what the keys of groups with
    its rows, or with its unique entries, begin with after the database's name; none: no group is known to be its own.
    Later fields have defaults, so a spec of an earlier version, which is shorter, reads as what it meant.
    """

    table: int
    pk_columns: tuple[int, ...]
    indexes: tuple[IndexSpec, ...] = ()
    home: str = ""
    read: int = 0
    groups: tuple[bytes, ...] = ()


GLOBAL = "global"
"""The domain over all PoPs, and the home of what it keeps."""
LOCAL = "local"
"""The home of what lives in the PoP where it was made. No PoP may have either for its name."""
SPANNING = (GLOBAL, LOCAL)
"""Homes of databases of which more than one domain may have groups."""
POPS_MAX = 255
"""As many indexes are given out, from 0 on; ids of tables that span PoPs are k * 256 + index."""


class PopClaim(Struct, frozen=True):
    """Who may found a PoP, the first that asked, and the PoP's index: given once, never reused.

    `incarnation`: of a node that recovered the PoP, followed by the generation (`dht.register.catalog.recovering`).
    """

    node: NodeId
    incarnation: bytes
    index: int


CATALOG_FAMILY = "catalog"
CATALOG_TABLE = 0
"""Rows of table 0 in the group (database, "catalog") are the catalog: pk (0,) is the database's own row, its column 0
the catalog version; pk (n,) is table n, whose column 0 is its `TableSpec` in msgpack. Other columns belong to SQL."""

SYSTEM_WINDOW = -1
SYSTEM_INTENT = -2
SYSTEM_DECISION = -3
SYSTEM_META = -4
"""Tables of a group that readers never see: the once-only window, intents, decision records, the window's floor."""
