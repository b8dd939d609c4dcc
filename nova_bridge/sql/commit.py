"""A transaction's buffered rows as one transaction of the store, its refusals in SQLite's words (DESIGN section 7)."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from dht.errors import Conflict, DhtError, Duplicate, Indeterminate, Invalid, SchemaChanged
from dht.model import Change, Columns, GroupKey, Guard, GuardKind, Op, Part
from dht.model import Transaction as StoreTransaction
from nova_bridge.sql.access import entry_owner, owner_columns
from nova_bridge.sql.errors import (
    ConflictError,
    IndeterminateError,
    LateDuplicateError,
    LateForeignKeyError,
    from_store,
    unique_failed,
)
from nova_bridge.sql.families import TEMPORARY
from nova_bridge.sql.rules import foreign_failed, parent_of
from nova_bridge.sql.schema import ENTRY_TABLE, AgedRecord, Foreign, Place, Table, Unique
from nova_bridge.sql.transaction import Pending, Transaction

ENTRY_ROW = (0,)
LOCK_WAIT_S = 5.0
"""How long a commit is sent anew, each time as a new transaction, while others that are undecided hold its groups: what
they leave decides, for example a duplicate, where a deadlock would be told to code that does not run again."""
LOCK_PAUSE_MAX_S = 0.02
_SEND_ANEW = ("intent", "window")
"""Refusals that say nothing of the guards: undecided others, or more of them since the read than a group remembers. As
a new transaction, which has seen nothing yet, it is decided by its guards."""
DELETE_ROWS_MAX = 1000
"""Rows in one piece of a transaction that only deletes; a group is never cut."""

Rows = list[tuple[Table, Place, Pending]]


class Meaning(NamedTuple):
    """What a change or guard stands for, should it be refused. `foreign`: a key of the table that it keeps."""

    table: Table
    columns: tuple[int, ...]
    foreign: Foreign | None = None


class _Draft:
    """One group's part while it is being collected."""

    def __init__(self) -> None:
        self.changes: list[tuple[Change, Meaning]] = []
        self._guards: dict[Any, tuple[Guard, Meaning]] = {}

    def guard(self, guard: Guard, meaning: Meaning) -> None:
        """Add it once."""
        self._guards[guard.kind, guard.table, guard.pk, tuple(guard.columns.items())] = guard, meaning

    @property
    def guards(self) -> list[tuple[Guard, Meaning]]:
        """In order of addition."""
        return list(self._guards.values())


class _Step(NamedTuple):
    """What happens to one unique entry over the whole transaction."""

    meaning: Meaning
    before: Place | None
    after: Place | None


class Counts(threading.local):
    """`applied`: how many transactions of the store this thread has had applied."""

    applied = 0


counts = Counts()


def commit(tx: Transaction, foreign_keys: bool) -> None:
    """Send the transaction. When it raises, nothing was applied, unless it is IndeterminateError.

    One that only deletes, and many rows, is cut into pieces (DESIGN section 1); when it raises, some may be gone.
    """
    for rows in _pieces(tx):
        _commit(tx, rows, foreign_keys)


def _pieces(tx: Transaction) -> list[Rows]:
    rows = [(tx.schema.by_number[n], place, p) for n, places in tx.overlay.items() for place, p in places.items()]
    if len(rows) <= DELETE_ROWS_MAX or any(pending.current is not None for _, _, pending in rows):
        return [rows]
    pieces: list[Rows] = []
    for _, group in itertools.groupby(sorted(rows, key=_group_of), key=_group_of):
        if not pieces or len(pieces[-1]) >= DELETE_ROWS_MAX:
            pieces.append([])
        pieces[-1] += group
    return pieces


def _group_of(row: tuple[Table, Place, Pending]) -> GroupKey:
    return row[1][0]


def _commit(tx: Transaction, rows: Rows, foreign_keys: bool) -> None:
    drafts = _collect(tx, rows, foreign_keys)
    parts = _parts(tx, drafts)
    if not any(part.changes for part in parts):
        return
    database = tx.database
    began = time.monotonic()
    while True:
        created = _created(tx, parts)
        transaction = StoreTransaction(os.urandom(16), database.name, tx.schema.version, parts, created)
        try:
            database.store.commit(transaction, 0, database.timeout_s)
        except SchemaChanged as error:
            if tx.adopt(database.reload(), to_commit=True):
                drafts = _collect(tx, rows, foreign_keys)
                parts = _parts(tx, drafts)
                continue
            raise from_store(error) from None
        except Conflict as error:
            if error.detail.get("what") in _SEND_ANEW and time.monotonic() - began < LOCK_WAIT_S:
                parts = tuple(msgspec.structs.replace(part, seen=None) for part in parts)
                time.sleep(random.uniform(0, LOCK_PAUSE_MAX_S))
                continue
            raise _named(error, list(drafts.values())) from None
        except Indeterminate as error:
            _settle(tx, transaction, error)
        except Invalid as error:
            if not _may_be_cut(rows):
                raise from_store(error) from None
            _commit_apart(tx, rows, parts, error, foreign_keys)
            return
        except DhtError as error:
            raise from_store(error) from None
        counts.applied += 1
        _remember_places(tx, rows)
        return


def _remember_places(tx: Transaction, rows: Rows) -> None:
    """Who made a row knows its group, and need not find it when it asks by the row's id."""
    hints = tx.database.hints
    for table, (group, _), pending in rows:
        if table.number in hints.by_id and pending.base is None and pending.current is not None:
            hints.put((table.number, pending.current.pk[0]), group)


def _may_be_cut(rows: Rows) -> bool:
    """Deletes, and the copies that a schema statement makes, which nobody reads before it ends."""
    return all(
        pending.current is None or (pending.base is None and table.name.lower().startswith(TEMPORARY))
        for table, _, pending in rows
    )


def _commit_apart(tx: Transaction, rows: Rows, parts: tuple[Part, ...], error: Invalid, foreign_keys: bool) -> None:
    for piece in apart(parts, error):
        keys = {part.key for part in piece}
        _commit(tx, [row for row in rows if _group_of(row) in keys], foreign_keys)


def apart(parts: Sequence[Part], error: Invalid) -> list[list[Part]]:
    """The parts by the PoP that they live in, where the store refused them together; else the refusal is raised."""
    homes = error.detail.get("homes")
    if not isinstance(homes, (list, tuple)) or len(homes) != len(parts) or len(set(homes)) < 2:
        raise from_store(error) from None
    pieces: dict[object, list[Part]] = {}
    for part, home in zip(parts, homes, strict=True):
        pieces.setdefault(home, []).append(part)
    return list(pieces.values())


def _parts(tx: Transaction, drafts: dict[GroupKey, _Draft]) -> tuple[Part, ...]:
    return tuple(
        Part(key, tx.seen.get(key), tuple(c for c, _ in draft.changes), tuple(g for g, _ in draft.guards))
        for key, draft in drafts.items()
    )


def _created(tx: Transaction, parts: tuple[Part, ...]) -> tuple[int, ...]:
    """Which parts make a group that was not there when this transaction looked."""
    roots = tx.schema.roots
    if not roots:
        return ()
    return tuple(
        index
        for index, part in enumerate(parts)
        if any(change.op is Op.INSERT and change.table in roots for change in part.changes) and tx.is_empty(part.key)
    )


def _settle(tx: Transaction, transaction: StoreTransaction, error: Indeterminate) -> None:
    """Ask for the outcome once; it stays unknown if it cannot be had."""
    witness = transaction.witness
    try:
        outcome = tx.database.store.outcome(transaction.id, witness.key, witness.seen, tx.database.timeout_s)
    except DhtError:
        outcome = "unknown"
    match outcome:
        case "applied":
            return
        case "not_applied":
            raise ConflictError("the transaction was interrupted and certainly not applied; run it again") from None
        case _:
            raise IndeterminateError(f"outcome unknown: {error.message}") from None


def _collect(tx: Transaction, rows: Rows, foreign_keys: bool) -> dict[GroupKey, _Draft]:
    drafts: dict[GroupKey, _Draft] = {}
    steps: dict[GroupKey, _Step] = {}
    for known, place, pending in rows:
        table = tx.schema.by_number[known.number]
        if pending.base is None and pending.current is None:
            continue
        draft = drafts.setdefault(place[0], _Draft())
        _add_row(table, pending, draft)
        _add_unique_guards(table, pending, draft)
        if foreign_keys:
            _add_child_guards(tx, table, pending, draft)
        for unique in table.uniques:
            if unique.kind == "entry":
                _add_step(tx, table, unique, place, pending, steps)
    for (group, number, pk, key), (child, foreign) in tx.foreign_guards.items():
        if group in drafts and not _is_own(tx, group, number, pk):
            guard = Guard(GuardKind.HAS, number, pk, dict(key), "foreign_key")
            drafts[group].guard(guard, Meaning(child, foreign.columns, foreign))
    for key, step in steps.items():
        change = _entry_change(step)
        if change is not None:
            drafts.setdefault(key, _Draft()).changes.append((change, step.meaning))
        elif step.before is None and step.after is None:
            # The entry is not the row's, or not made yet: that has to be so when the row goes.
            owner = entry_owner(tx, key)
            kind, held = (GuardKind.ABSENT, {}) if owner is None else (GuardKind.HAS, owner_columns(owner))
            drafts.setdefault(key, _Draft()).guard(Guard(kind, ENTRY_TABLE, ENTRY_ROW, held), step.meaning)
    return drafts


def _is_own(tx: Transaction, group: GroupKey, number: int, pk: tuple[Any, ...]) -> bool:
    """Whether this transaction made or removes the parent itself."""
    table = tx.schema.by_number[number]
    pending = tx.overlay.get(number, {}).get((group, table.pk_key(pk)))
    return pending is not None and (pending.base is None or pending.current is None)


def _add_row(table: Table, pending: Pending, draft: _Draft) -> None:
    number, meaning = table.number, Meaning(table, table.primary)
    guards: Columns = {table.number_of(p): v for p, v in pending.guards.items() if p not in table.primary}
    if pending.base is None and pending.current is not None:
        change = Change(Op.INSERT, number, pending.current.pk, table.encode(pending.current.values))
    elif pending.base is not None and pending.current is None:
        change = Change(Op.DELETE, number, pending.base.pk, {}, guards)
    elif pending.base is not None and pending.current is not None:
        written_out = _written_out(table, pending)
        guards |= {table.number_of(p): None for p in written_out}
        columns: Columns = {
            table.number_of(p): pending.current.values[p] for p in sorted(pending.columns | written_out)
        }
        change = Change(Op.UPDATE, number, pending.base.pk, columns, guards)
    else:
        return
    draft.changes.append((change, meaning))


def _written_out(table: Table, pending: Pending) -> frozenset[int]:
    """Columns of changed unique keys of the group that the row has only by their default, from before they were added.

    They are stored with the change: what is not stored is not seen by the UNIQUE guards of others.
    """
    base = pending.base
    if not isinstance(base, AgedRecord):
        return frozenset()
    rules = [set(u.columns) for u in table.uniques if u.kind == "group" and not pending.columns.isdisjoint(u.columns)]
    return (base.lacks & set[int]().union(*rules)) - pending.columns


def _add_unique_guards(table: Table, pending: Pending, draft: _Draft) -> None:
    row = pending.current
    if row is None:
        return
    for unique in table.uniques:
        if unique.kind != "group" or (pending.base is not None and pending.columns.isdisjoint(unique.columns)):
            continue
        columns: Columns = {table.number_of(p): row.values[p] for p in unique.columns}
        if None not in columns.values():
            guard = Guard(GuardKind.UNIQUE, table.number, row.pk, columns, "duplicate")
            draft.guard(guard, Meaning(table, unique.columns))


def _add_child_guards(tx: Transaction, table: Table, pending: Pending, draft: _Draft) -> None:
    """A parent's key leaves its group only while no row of the group refers to it."""
    old = pending.base
    if old is None or (pending.current is not None and tx.schema.referred[table.number].isdisjoint(pending.columns)):
        return
    for child, foreign in tx.schema.children.get(table.name.lower(), ()):
        if child.family != table.family or child.family == "row":
            continue
        _, positions = parent_of(tx.schema, foreign)
        values = [old.values[p] for p in positions]
        if None not in values and not _has_parent(tx, table, old.group, positions, values):
            columns = {child.number_of(c): v for c, v in zip(foreign.columns, values, strict=True)}
            guard = Guard(GuardKind.UNIQUE, child.number, (), columns, "foreign_key")
            draft.guard(guard, Meaning(child, foreign.columns, foreign))


def _has_parent(tx: Transaction, table: Table, group: GroupKey, positions: tuple[int, ...], key: list[Any]) -> bool:
    """Whether a row that this transaction leaves in the group has the key: the same one, or another in its place."""
    return any(
        place[0] == group and p.current is not None and [p.current.values[at] for at in positions] == key
        for place, p in tx.overlay[table.number].items()
    )


def _add_step(
    tx: Transaction, table: Table, unique: Unique, place: Place, pending: Pending, steps: dict[GroupKey, _Step]
) -> None:
    """While an index is being built, a row older than it may have no entry yet (`nova_bridge.sql.unique_rows`)."""
    meaning = Meaning(table, unique.columns)
    old = table.entry_key(unique, pending.base.values) if pending.base is not None else None
    new = table.entry_key(unique, pending.current.values) if pending.current is not None else None
    if old == new:
        return
    if old is not None:
        held = place if unique.used or entry_owner(tx, old) == place else None
        steps[old] = _Step(meaning, held, steps[old].after if old in steps else None)
    if new is not None:
        steps[new] = _Step(meaning, steps[new].before if new in steps else None, place)


def _entry_change(step: _Step) -> Change | None:
    owner: Columns | None = None if step.after is None else owner_columns(step.after)
    expected: Columns = {} if step.before is None else owner_columns(step.before)
    if owner is None:
        return Change(Op.DELETE, ENTRY_TABLE, ENTRY_ROW, {}, expected) if expected else None
    if not expected:
        return Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, owner)
    return None if owner == expected else Change(Op.UPDATE, ENTRY_TABLE, ENTRY_ROW, owner, expected)


def _named(error: Conflict, drafts: list[_Draft]) -> sqlite3.Error:
    """The refusal as SQLite would have said it at the statement."""
    detail = error.detail
    part, index = detail.get("part"), detail.get("index")
    if not isinstance(part, int) or not isinstance(index, int) or not 0 <= part < len(drafts):
        return from_store(error)
    draft = drafts[part]
    meanings = [m for _, m in (draft.guards if detail.get("what") == "guard" else draft.changes)]
    if not 0 <= index < len(meanings):
        return from_store(error)
    table, columns, foreign = meanings[index]
    if foreign is not None:
        return foreign_failed(table, foreign, LateForeignKeyError)
    if isinstance(error, Duplicate):
        return unique_failed(table.name, table.column_names(columns), LateDuplicateError)
    return from_store(error)
