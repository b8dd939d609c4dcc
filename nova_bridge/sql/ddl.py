"""CREATE, ALTER and DROP: run on a copy of the shadow schema, committed to the catalog, then data follows.

A statement that changes rows as well (DROP TABLE, a unique index over rows that exist) does so in transactions of at
most CHUNK_ROWS rows.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Iterator

import apsw

from dht.errors import Conflict
from dht.model import Change, Guard, GuardKind, Op, Part
from dht.model import Transaction as StoreTransaction
from nova_bridge.sql.access import ENTRY_PREFIX, owner_columns
from nova_bridge.sql.commit import ENTRY_ROW, commit
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import ConflictError, unique_failed
from nova_bridge.sql.schema import ENTRY_TABLE, Record, Schema, Table, Unique
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.writes import Writer

CHUNK_ROWS = 200

_NAME = r'(?:(?:"main"|main)\s*\.\s*)?(?:"((?:[^"]|"")+)"|`([^`]+)`|\[([^\]]+)\]|(\w+))'
_RENAME_TABLE = re.compile(rf"\s*ALTER\s+TABLE\s+{_NAME}\s+RENAME\s+TO\s+{_NAME}\s*;?\s*$", re.I)
_RENAME_COLUMN = re.compile(rf"\s*ALTER\s+TABLE\s+{_NAME}\s+RENAME\s+(?:COLUMN\s+)?{_NAME}\s+TO\s+{_NAME}", re.I)
_REFUSED = re.compile(
    r"\s*CREATE\s+(?:(TEMP|TEMPORARY|VIRTUAL|TRIGGER|VIEW)\b|TABLE\s+.*?\bAS\s+(?:SELECT|WITH|VALUES)\b)", re.I | re.S
)


class Ddl:
    """Schema statements collected until `run`; a script's statements are published together."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._steps: list[Callable[[apsw.Connection], None]] = []
        self._renamed: dict[str, str] = {}
        self._columns: dict[str, dict[str, str]] = {}

    def add(self, sql: str) -> None:
        """One more statement. Raises for what virtual tables cannot be."""
        if _REFUSED.match(sql):
            raise sqlite3.NotSupportedError(
                f"not supported by this database: {' '.join(sql.split())[:80]}; only tables and indexes can be created"
            )
        if match := _RENAME_TABLE.match(sql):
            old, new = _names(match, 2)
            self._renamed[new] = self._renamed.pop(old, old)
        elif match := _RENAME_COLUMN.match(sql):
            table, old, new = _names(match, 3)
            columns = self._columns.setdefault(table, {})
            columns[new] = columns.pop(old, old)
        self._steps.append(lambda shadow: _execute(shadow, sql))

    def __bool__(self) -> bool:
        return bool(self._steps)

    def run(self) -> None:
        """Publish. Raises what SQLite raises, IntegrityError for a unique index over duplicates."""
        before = self._database.reload()
        after = self._preview(before)
        for name in sorted(before.tables.keys() - after.keys() - set(self._renamed.values())):
            _delete_rows(self._database, before.tables[name])
        built = [(name, u) for name, t in after.items() for u in _to_build(before, t)]
        for name, unique in built:
            _check_rows(self._database, after[name], unique)
        self._database.change(before, self._steps, self._renamed, self._columns)
        for name, unique in built:
            if unique.kind == "entry":
                _build_entries(self._database, name, unique)
        for name in dict.fromkeys(name for name, _ in built):
            self._database.mark_used(name, {unique.id for of, unique in built if of == name})

    def _preview(self, before: Schema) -> dict[str, Table]:
        """The tables as they will be, without publishing anything; errors of SQLite surface here."""
        definitions = self._database.preview(before, self._steps, self._renamed, self._columns)
        return {name: Table(self._database.name, definition) for name, definition in definitions.items()}


def _names(match: re.Match[str], count: int) -> list[str]:
    groups = match.groups()
    names = [next(g for g in groups[i * 4 : i * 4 + 4] if g is not None) for i in range(count)]
    return [n.replace('""', '"').lower() for n in names]


def _execute(shadow: apsw.Connection, sql: str) -> None:
    shadow.execute(sql)


def _to_build(before: Schema, table: Table) -> list[Unique]:
    """Unique rules that are new on a table that was there before."""
    old = before.by_number.get(table.number)
    if old is None:
        return []
    known = {u.id for u in old.uniques}
    return [u for u in table.uniques if u.id not in known]


def _all_rows(database: Database, number: int) -> list[Record]:
    tx = Transaction(database)
    table = tx.schema.by_number.get(number)
    return tx.find(table, ()) if table is not None else []


def _chunks(records: list[Record]) -> Iterator[list[Record]]:
    for start in range(0, len(records), CHUNK_ROWS):
        yield records[start : start + CHUNK_ROWS]


def _delete_rows(database: Database, table: Table) -> None:
    """Take all rows of a table that is about to go, and their unique entries."""
    for chunk in _chunks(_all_rows(database, table.number)):
        tx = Transaction(database)
        writer = Writer(tx)
        for record in chunk:
            writer.delete(table, record, 0)
        commit(tx, foreign_keys=False)


def _check_rows(database: Database, table: Table, unique: Unique) -> None:
    """Raise if rows that exist break the new rule."""
    seen = set()
    names = [table.columns[p].number for p in unique.columns]
    for record in _all_rows(database, table.number):
        old = database.schema.by_number[table.number]
        values = tuple(record.values[old.position[n]] if n in old.position else None for n in names)
        if None in values:
            continue
        if values in seen:
            raise unique_failed(table.name, table.column_names(unique.columns))
        seen.add(values)


def _build_entries(database: Database, name: str, unique: Unique) -> None:
    """Reserve the values of rows older than the rule; writers reserve theirs since the rule was published."""
    table = database.schema.tables[name]
    for chunk in _chunks(_all_rows(database, table.number)):
        for record in chunk:
            entry = table.entry_key(unique, record.values)
            if entry is not None:
                _reserve(database, table, unique, record, entry)


def _reserve(database: Database, table: Table, unique: Unique, record: Record, entry: bytes) -> None:
    columns = {table.number_of(p): record.stored(p) for p in unique.columns}
    parts = (
        Part(record.group, None, (), (Guard(GuardKind.HAS, table.number, record.pk, columns),)),
        Part(entry, None, (Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, owner_columns((record.group, record.key))),)),
    )
    transaction = StoreTransaction(os.urandom(16), database.name, 0, parts)
    try:
        database.store.commit(transaction, 0, database.timeout_s)
    except Conflict as error:
        tx = Transaction(database)
        held = tx.view(entry).raw(ENTRY_PREFIX)
        row = tx.row(table, record.group, record.key)
        if row is not None and not held and row.values == record.values:
            raise ConflictError(f"building a unique index on {table.name}: {error.message}") from None
