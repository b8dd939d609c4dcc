"""Ways to rows by equality: primary key, family key, unique entry, find (DESIGN sections 6, 7 and 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dht.model import Columns, Comparison, Constraint, GroupKey, Scope, Value
from dht.rows import decode_row, group_key, table_prefix
from nova_bridge.sql.schema import ENTRY_TABLE, UNIQUE_FAMILY, Place, Record, Table, Unique
from nova_bridge.sql.transaction import Transaction

ENTRY_PREFIX = table_prefix(ENTRY_TABLE)
OWNER_GROUP, OWNER_ROW = 0, 1
"""Columns of an entry's row."""

_MISSING: Any = object()


def by_family(tx: Transaction, table: Table, keys: Sequence[tuple[Value, ...]]) -> list[Record]:
    """Rows of the groups with these family keys, which are in the table's order of family columns."""
    if len(keys) == 1:
        return [] if None in keys[0] else tx.rows(table, table.family_group(keys[0]))
    groups = list(dict.fromkeys([table.family_group(key) for key in keys if None not in key]))
    if len(groups) > 1:
        tx.ensure(groups)
    return [record for group in groups for record in tx.rows(table, group)]


def entry_owner(tx: Transaction, entry: GroupKey) -> Place | None:
    """Who holds the unique values in the store, as this transaction read it."""
    for data in tx.view(entry).raw(ENTRY_PREFIX).values():
        row = decode_row(data)
        return bytes(row[OWNER_GROUP]), bytes(row[OWNER_ROW])  # type: ignore[arg-type]
    return None


def owner_columns(place: Place) -> Columns:
    """An entry's row that names its owner."""
    return {OWNER_GROUP: place[0], OWNER_ROW: place[1]}


def by_entry(tx: Transaction, table: Table, unique: Unique, keys: Sequence[tuple[Value, ...]]) -> list[Record]:
    """Rows by the values of a unique key; the entry leads to the owner's group, which decides."""
    hints = tx.database.hints
    entries = {
        group_key(table.database, UNIQUE_FAMILY, (table.number, unique.id, *key)): key
        for key in keys
        if None not in key
    }
    hinted = [hint for entry in entries if (hint := hints.get(entry)) is not None]
    tx.ensure([*[e for e in entries if e not in tx.own_entries], *hinted])
    places: dict[GroupKey, Place] = {}
    for entry in entries:
        own = tx.own_entries.get(entry, _MISSING)
        place = entry_owner(tx, entry) if own is _MISSING else own
        if place is not None:
            places[entry] = place
            hints.put(entry, place[0])
    overlay = tx.overlay.get(table.number, {})
    tx.ensure([place[0] for place in places.values() if place not in overlay])
    found = []
    for entry, (group, row_key) in places.items():
        record = tx.row(table, group, row_key)
        key = entries[entry]
        if record is not None and tuple([record.values[p] for p in unique.columns]) == key:
            found.append(record)
        elif entry not in tx.own_entries:
            found += tx.find(table, _equalities(table, dict(zip(unique.columns, key, strict=True))))
    return found


def equal(tx: Transaction, table: Table, wanted: Mapping[int, Value], near: bool = False) -> list[Record]:
    """Rows whose columns (by position) have these values, none of them NULL. `near`: those that a find sees here."""
    if table.integer_key is not None and table.integer_key in wanted:
        records = tx.by_pk(table, [(wanted[table.integer_key],)])
    elif table.whole:
        records = tx.rows(table, table.family_group(()))
    elif table.family_key and all(p in wanted for p in table.family_key):
        records = by_family(tx, table, [tuple([wanted[p] for p in table.family_key])])
    elif not table.family_key and all(p in wanted for p in table.primary):
        records = tx.by_pk(table, [tuple([wanted[p] for p in table.primary])])
    elif (unique := usable_entry(table, wanted)) is not None:
        records = by_entry(tx, table, unique, [tuple([wanted[p] for p in unique.columns])])
    else:
        constraints = {p: v for p, v in wanted.items() if p not in table.unindexed}
        records = tx.find(table, _equalities(table, constraints), scope=Scope.NEAR if near else None)
    items = list(wanted.items())
    return [r for r in records if all(r.values[p] == v for p, v in items)]


def usable_entry(table: Table, wanted: Mapping[int, Any]) -> Unique | None:
    """A unique rule whose entries answer a look-up by these values."""
    for unique in table.uniques:
        if (
            unique.kind == "entry"
            and unique.used
            and all(p in wanted for p in unique.columns)
            and (unique.deleted < 0 or wanted[unique.deleted] == 0)
        ):
            return unique
    return None


def _equalities(table: Table, wanted: Mapping[int, Value]) -> tuple[Constraint, ...]:
    return tuple([Constraint(table.number_of(p), Comparison.EQ, (v,)) for p, v in wanted.items()])
