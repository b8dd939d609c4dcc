"""What clients asked and what they were told, in an order that the oracles can rely on.

Moments are numbers of a counter, not seconds: two events of one virtual instant still have an order.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

from dht.model import Change, FindQuery, FindResult, GroupKey, Op, Part, Row, Transaction, Value
from dht.rows import decode_row, split_row_key

RowName = tuple[int, tuple[Value, ...]]
Content = frozenset[tuple[RowName, frozenset[tuple[int, Value]]]]
"""A group's rows as a value: ((table, primary key), columns)."""

EMPTY: Content = frozenset()
APPLIED, REFUSED, NOTHING, UNKNOWN = "applied", "refused", "nothing", "unknown"
"""Outcomes of a commit. REFUSED: by a change or guard. NOTHING: certainly not applied, for another reason."""


@dataclass(slots=True)
class Read:
    """A group read; `content` is None when it failed."""

    client: str
    key: GroupKey
    call: int
    ret: int | None = None
    content: Content | None = None


@dataclass(slots=True)
class Commit:
    """One transaction with all its attempts. `refused_part`: whose guard failed.

    `until_s`: when nobody works on an attempt of it any more, in virtual time.
    """

    client: str
    transaction: Transaction
    call: int
    ret: int | None = None
    outcome: str = UNKNOWN
    refused_part: int = 0
    until_s: float = math.inf


@dataclass(slots=True)
class Find:
    """A query and its rows; `result` is None when it failed."""

    client: str
    query: FindQuery
    call: int
    ret: int | None = None
    result: FindResult | None = None


@dataclass(slots=True)
class Draw:
    """`count` ids of a sequence, to exceed `above`, asked at a machine; `first` is None when it failed."""

    client: str
    machine: int
    sequence: tuple[str, str]
    count: int
    above: int
    call: int
    ret: int | None = None
    first: int | None = None


@dataclass(slots=True)
class Raise:
    """A sequence was told to exceed `above`; `done` when that was acknowledged."""

    client: str
    machine: int
    sequence: tuple[str, str]
    above: int
    call: int
    ret: int | None = None
    done: bool = False


@dataclass(slots=True)
class Listed:
    """What the registry said of the database: the mark of its creation, None where the name is free."""

    client: str
    call: int
    ret: int
    mark: Value
    dropping: bool = False


@dataclass(slots=True)
class Keeping:
    """A creation, or a drop, of the database; `changed` is what was answered, None when that failed."""

    client: str
    drops: bool
    call: int
    ret: int | None = None
    changed: bool | None = None


@dataclass(slots=True)
class Missed:
    """A request that was told that there is no such database."""

    client: str
    what: str
    call: int
    ret: int


@dataclass(slots=True)
class Published:
    """A catalog with the tables, acknowledged at this version."""

    version: int
    call: int
    ret: int


@dataclass(slots=True)
class History:
    """Everything that the clients of one run did."""

    moment: int = 0
    times_s: list[float] = field(default_factory=list)
    """When each moment was, in virtual time; none where there is no loop."""
    reads: list[Read] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    finds: list[Find] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    raises: list[Raise] = field(default_factory=list)
    listed: list[Listed] = field(default_factory=list)
    keepings: list[Keeping] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)

    def tick(self) -> int:
        self.moment += 1
        with contextlib.suppress(RuntimeError):
            self.times_s.append(asyncio.get_running_loop().time())
        return self.moment

    def moment_of(self, time_s: float) -> int:
        """The last moment before this time: what returned later has a higher one."""
        return bisect.bisect_left(self.times_s, time_s)

    def time_of(self, moment: int) -> float:
        """When the moment was, in virtual time."""
        return self.times_s[moment - 1]

    def counts(self) -> dict[str, int]:
        """How much a run exercised, for its report."""
        outcomes = {f"commits_{o}": 0 for o in (APPLIED, REFUSED, NOTHING, UNKNOWN)}
        for commit in self.commits:
            outcomes[f"commits_{commit.outcome}"] += 1
        return {
            "reads": sum(r.content is not None for r in self.reads),
            "reads_failed": sum(r.content is None for r in self.reads),
            **outcomes,
            "finds": sum(f.result is not None for f in self.finds),
            "finds_failed": sum(f.result is None for f in self.finds),
            "draws": sum(d.first is not None for d in self.draws),
            "drops": sum(k.drops and k.changed is True for k in self.keepings),
            "creations": sum(not k.drops and k.changed is True for k in self.keepings),
        }


def freeze_row(row: Row) -> frozenset[tuple[int, Value]]:
    return frozenset(row.items())


def content_of(rows: dict[bytes, bytes]) -> Content:
    """What a read returned, as a value."""
    return frozenset((split_row_key(key), freeze_row(decode_row(row))) for key, row in rows.items())


def after_part(content: Content, part: Part) -> Content | None:
    """The group after the part, None if the part must be refused: the rules of DESIGN section 6 once more.

    Written for the oracle alone, so that a mistake in the store's evaluation does not repeat itself here.
    """
    rows: dict[RowName, dict[int, Any]] = {name: dict(columns) for name, columns in content}
    for guard in part.guards:
        row = rows.get((guard.table, guard.pk))
        if guard.kind == 1 and (row is None or not _has(row, guard.columns)):
            return None
        if guard.kind == 2 and row is not None:
            return None
    for change in part.changes:
        if not _change(rows, change):
            return None
    for guard in part.guards:
        if guard.kind == 3 and any(
            table == guard.table and pk != guard.pk and _has(row, guard.columns) for (table, pk), row in rows.items()
        ):
            return None
    return frozenset((name, freeze_row(row)) for name, row in rows.items())


def _has(row: Row, columns: Row) -> bool:
    return all(row.get(column) == value for column, value in columns.items())


def _change(rows: dict[RowName, dict[int, Any]], change: Change) -> bool:
    name = (change.table, change.pk)
    row = rows.get(name)
    if (row is None) != (change.op == Op.INSERT):
        return False
    if row is not None and not _has(row, change.guards):
        return False
    if change.op == Op.DELETE:
        del rows[name]
    elif row is None:
        rows[name] = dict(change.columns)
    else:
        row.update(change.columns)
    return True
