"""Unique and foreign keys, checked at the statement; what must hold at commit becomes guards (DESIGN section 7)."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection
from typing import Any

from dht.errors import Conflict, SchemaChanged
from dht.model import Guard, GuardKind, Part, Reading, Value
from dht.model import Transaction as StoreTransaction
from nova_bridge.sql.access import entry_owner, equal
from nova_bridge.sql.errors import ForeignKeyError, unique_failed
from nova_bridge.sql.schema import Foreign, Place, Record, Schema, Table
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.values import coerce


def check_unique(
    tx: Transaction,
    table: Table,
    record: Record,
    own: Collection[Place],
    changed: Collection[int] | None,
    near: bool = False,
) -> None:
    """Raise for a duplicate. `own`: the row's places before and after; `changed`: positions set, None for a new row.

    `near`: the row makes its group, so that only this PoP is asked (`Transaction.begins`).
    """
    if changed is not None and table.unique_columns.isdisjoint(changed):
        return
    rules = [u for u in table.uniques if changed is None or not set(u.columns).isdisjoint(changed)]
    if not rules:
        return
    entries = {u.id: key for u in rules if u.kind == "entry" and (key := table.entry_key(u, record.values)) is not None}
    wanted = [key for key in entries.values() if key not in tx.own_entries]
    if any(u.kind == "group" for u in rules):
        wanted.append(record.group)
    tx.ensure(wanted)
    # SQLite lists the newest index first. Of two keys that are taken MySQL names the older, and Nova tells them apart:
    # a flavor whose id and name both exist is FlavorIdExists.
    for unique in reversed(rules):
        match unique.kind:
            case "entry":
                key = entries.get(unique.id)
                if key is None:
                    continue
                owner = tx.own_entries[key] if key in tx.own_entries else entry_owner(tx, key)
                taken = owner is not None and owner not in own
            case "group":
                holder = tx.holder(table, unique, record)
                taken = holder is not None and holder not in own
            case _:
                values = [record.values[p] for p in unique.columns]
                taken = None not in values and any(
                    (r.group, r.key) not in own
                    for r in equal(tx, table, dict(zip(unique.columns, values, strict=True)), near)
                )
        if taken:
            raise unique_failed(table.name, table.column_names(unique.columns))


def parent_of(schema: Schema, foreign: Foreign) -> tuple[Table, tuple[int, ...]]:
    """The parent's table and the positions of its key. Raises OperationalError where it has no such key."""
    parent = schema.tables.get(foreign.parent)
    if parent is None:
        raise sqlite3.OperationalError(f"no such table: main.{foreign.parent}")
    key = () if parent.rowid_key else parent.primary
    if foreign.parent_columns:
        key = tuple([parent.by_name[c] for c in foreign.parent_columns if c in parent.by_name])
    if len(key) != len(foreign.columns):
        raise sqlite3.OperationalError(
            f'foreign key mismatch - "{foreign.child}" referencing "{parent.name}", which has no key of these columns'
        )
    return parent, key


def check_child(tx: Transaction, table: Table, record: Record, changed: Collection[int] | None) -> None:
    """Every parent that the row names exists.

    A parent in a group that the transaction writes anyway is guarded until the commit.
    """
    for foreign in table.foreign:
        if changed is not None and set(foreign.columns).isdisjoint(changed):
            continue
        values = [record.values[p] for p in foreign.columns]
        if None in values:
            continue
        parent, positions = parent_of(tx.schema, foreign)
        key = [coerce(parent.affinities[p], v) for p, v in zip(positions, values, strict=True)]
        found = equal(tx, parent, dict(zip(positions, key, strict=True)))
        if not found and _voters_have(tx, parent, positions, key):
            continue
        if not found:
            raise foreign_failed(table, foreign)
        stored = tx.pending(parent, found[0]).base
        if stored is not None and all(stored.values[p] == v for p, v in zip(positions, key, strict=True)):
            columns = [(parent.number_of(p), v) for p, v in zip(positions, key, strict=True) if p not in parent.primary]
            tx.guard_parent((stored.group, parent.number, stored.pk, tuple(columns)), table, foreign)


def _voters_have(tx: Transaction, parent: Table, positions: tuple[int, ...], key: list[Any]) -> bool:
    """Whether a parent that was not found is only newer than the copy that it was looked for in.

    Asked by a transaction that changes nothing: what it guards is judged by the voters.
    """
    if not parent.definition.read & Reading.FOLLOW or positions != parent.primary:
        return False
    if not (parent.whole or set(parent.family_key) <= set(positions)):
        return False
    group = parent.family_group(tuple([key[positions.index(p)] for p in parent.family_key]))
    if not (parent.whole or parent.family_key):
        group = parent.row_group(tuple(key))
    guard = Guard(GuardKind.HAS, parent.number, tuple(key), {}, "foreign_key")
    database = tx.database
    part = Part(group, None, (), (guard,))
    try:
        database.store.commit(
            StoreTransaction(os.urandom(16), database.name, tx.schema.version, (part,)), 0, database.timeout_s
        )
    except SchemaChanged:
        raise
    except Conflict:
        return False
    return True


def children_of(
    tx: Transaction, table: Table, old: Record, new: Record | None
) -> list[tuple[Table, Foreign, list[Record]]]:
    """The rows that refer to a key which the row had and has no longer."""
    result = []
    for child, foreign in tx.schema.children.get(table.name.lower(), ()):
        _, positions = parent_of(tx.schema, foreign)
        values: list[Value] = [old.values[p] for p in positions]
        if None in values or (new is not None and all(old.values[p] == new.values[p] for p in positions)):
            continue
        key = [coerce(child.affinities[p], v) for p, v in zip(foreign.columns, values, strict=True)]
        rows = equal(tx, child, dict(zip(foreign.columns, key, strict=True)))
        if rows:
            result.append((child, foreign, rows))
    return result


def check_parent(tx: Transaction, table: Table, old: Record) -> None:
    """Raise if somebody still refers to a key that this row had, and no row has it now."""
    for child, foreign, _ in children_of(tx, table, old, tx.current(table, old)):
        _, positions = parent_of(tx.schema, foreign)
        if not equal(tx, table, {p: old.values[p] for p in positions}):
            raise foreign_failed(child, foreign)


def foreign_failed(table: Table, foreign: Foreign, kind: type[ForeignKeyError] = ForeignKeyError) -> ForeignKeyError:
    """The refusal of a row of `table` whose parent is not there, or of the parent that such a row needs."""
    columns = table.column_names(foreign.columns)
    return kind(table.name, columns, foreign.parent, f"{table.name}_ibfk_{'_'.join(columns)}")
