"""A column that a schema statement adds, or forbids to be NULL, and the rows that were there before it.

The statement runs on a shadow without rows, where SQLite minds nothing of this, so it is refused here as SQLite would:
before it is published, and once more behind a fence (`dht.register.fence`), for a writer who knew nothing of it yet may
have come in between. Such a row takes out of the catalog again what it does not keep to; who knows the column cannot
add one. What was written to a column in the moment before it is taken back goes with it, as its number is not used
again.
"""

from __future__ import annotations

import functools
import sqlite3
from typing import NamedTuple

import apsw

from dht.errors import DhtError
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import not_null_failed
from nova_bridge.sql.schema import ColumnDef, Schema, Table, TableDef
from nova_bridge.sql.unique_rows import all_rows


class _Promise(NamedTuple):
    """That no row has NULL there. `refused`: what is added, in SQLite's words; empty: the column was there before."""

    position: int
    refused: str


def check(database: Database, before: TableDef, table: Table, *, published: bool = False) -> None:
    """Raise OperationalError or IntegrityError if rows that exist are not what the table promises.

    `published`: writers know the table as it is now; until then no row has anything in a column that is added.
    """
    for position, refused in _promises(before, table):
        column = table.columns[position]
        found = all_rows(database, table, limit=1 if refused and not published else None)
        if all(record.values[position] is not None for record in found):
            continue
        if not refused:
            raise not_null_failed(table.name, column.name)
        raise sqlite3.OperationalError(
            f"Cannot add a {refused}: table {table.name} has rows, which would have nothing in it; give a constant as "
            f"the default of {column.name}"
        )


def check_again(database: Database, before: Schema, schema: Schema) -> None:
    """Behind a fence, as `schema` is published now. Takes back what rows do not keep to, or could not be looked at."""
    for table in schema.tables.values():
        old = before.by_number.get(table.number)
        if old is None or not _promises(old.definition, table):
            continue
        try:
            database.fence(schema.version, [table])
            check(database, old.definition, table, published=True)
        except (sqlite3.Error, DhtError):
            _take_back(database, old.definition, table)
            raise


def _promises(before: TableDef, table: Table) -> list[_Promise]:
    """Those of the table that were none before."""
    known = {column.number: column for column in before.columns}
    found = []
    for position, column in enumerate(table.columns):
        old = known.get(column.number)
        refused = _refused(column) if old is None else ""
        if refused or (old is not None and column.not_null and not old.not_null):
            found.append(_Promise(position, refused))
    return found


def _refused(column: ColumnDef) -> str:
    """In SQLite's words, what it adds only to a table without rows."""
    if column.expression is not None:
        return "column with non-constant default"
    return "NOT NULL column with default value NULL" if column.not_null and column.default is None else ""


def _take_back(database: Database, before: TableDef, table: Table) -> None:
    """Publish the table without its new promises, if it is still there."""
    schema = database.reload()
    now = schema.by_number.get(table.number)
    if now is None:
        return
    added, required = [], []
    for position, refused in _promises(before, table):
        at = now.position.get(table.number_of(position))
        if at is not None:
            (added if refused else required).append(now.columns[at].name)
    newer = [name for name, _ in now.definition.index_sql if name not in dict(before.index_sql)]
    step = functools.partial(_undo, table=now.name, added=added, required=required, newer=newer)
    database.change(schema, [step])


def _undo(shadow: apsw.Connection, table: str, added: list[str], required: list[str], newer: list[str]) -> None:
    """`newer`: the table's indexes that came with the columns or later; those that need one go with it."""
    for column in required:
        shadow.execute(f"ALTER TABLE {_quoted(table)} ALTER COLUMN {_quoted(column)} DROP NOT NULL")
    lost = {column.lower() for column in added}
    for name, partial in shadow.execute("SELECT name, partial FROM pragma_index_list(?)", (table,)).fetchall():
        keys = {str(key).lower() for (key,) in shadow.execute("SELECT name FROM pragma_index_info(?)", (name,))}
        if lost and name in newer and (partial or not lost.isdisjoint(keys)):
            shadow.execute(f"DROP INDEX {_quoted(name)}")
    for column in added:
        shadow.execute(f"ALTER TABLE {_quoted(table)} DROP COLUMN {_quoted(column)}")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
