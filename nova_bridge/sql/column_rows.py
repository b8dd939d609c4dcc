"""A column that a schema statement adds, or forbids to be NULL, and the rows that were there before it.

The statement runs on a shadow without rows, where SQLite minds nothing of this, so it is refused here as SQLite would.
A writer who knows nothing of it yet may still come in between: his rows read as NULL in the column.
"""

from __future__ import annotations

import sqlite3

from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import not_null_failed
from nova_bridge.sql.schema import ColumnDef, Table, TableDef
from nova_bridge.sql.unique_rows import all_rows


def check(database: Database, before: TableDef, table: Table) -> None:
    """Raise OperationalError or IntegrityError if rows that exist would not be what the table promises."""
    known = {column.number: column for column in before.columns}
    for position, column in enumerate(table.columns):
        old = known.get(column.number)
        if old is None:
            refused = _refused(column)
            if refused and all_rows(database, table, limit=1):
                raise sqlite3.OperationalError(
                    f"Cannot add a {refused}: table {table.name} has rows, which would have nothing in it; give a "
                    f"constant as the default of {column.name}"
                )
        elif column.not_null and not old.not_null and None in _values(database, table, position):
            raise not_null_failed(table.name, column.name)


def _values(database: Database, table: Table, position: int) -> list[object]:
    return [record.values[position] for record in all_rows(database, table)]


def _refused(column: ColumnDef) -> str:
    """In SQLite's words, what it adds only to a table without rows."""
    if column.expression is not None:
        return "column with non-constant default"
    return "NOT NULL column with default value NULL" if column.not_null and column.default is None else ""
