"""Rows of a table that was dropped: deleted in pieces by whoever runs a schema statement (`nova_bridge.sql.ddl`)."""

from __future__ import annotations

import os

from dht.errors import Conflict, Invalid
from dht.model import Change, GroupKey, Op, Part
from dht.model import Transaction as StoreTransaction
from nova_bridge.sql.access import ENTRY_PREFIX
from nova_bridge.sql.commit import ENTRY_ROW, apart
from nova_bridge.sql.database import Database
from nova_bridge.sql.schema import ENTRY_TABLE, Record, Table, TableDef
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.unique_rows import all_rows

CHUNK_ROWS = 200
_ATTEMPTS = 5


def clear(database: Database, definition: TableDef) -> bool:
    """Delete what rows there are, and their unique entries. Whether there were none.

    A row that is changed at that moment is left to the next schema statement, which looks again in any case.
    """
    table = Table(database.name, definition)
    for attempt in range(_ATTEMPTS):
        records = all_rows(database, table)
        if not records:
            return attempt == 0
        for start in range(0, len(records), CHUNK_ROWS):
            _delete(database, table, records[start : start + CHUNK_ROWS])
    return False


def _delete(database: Database, table: Table, records: list[Record]) -> None:
    changes: dict[GroupKey, list[Change]] = {}
    for record in records:
        changes.setdefault(record.group, []).append(Change(Op.DELETE, table.number, record.pk))
    _commit(database, changes)
    rules = [unique for unique in table.uniques if unique.kind == "entry"]
    entries = [e for record in records for unique in rules if (e := table.entry_key(unique, record.values)) is not None]
    tx = Transaction(database)
    tx.ensure(entries)
    _commit(database, {e: [Change(Op.DELETE, ENTRY_TABLE, ENTRY_ROW)] for e in entries if tx.view(e).raw(ENTRY_PREFIX)})


def _commit(database: Database, changes: dict[GroupKey, list[Change]]) -> None:
    parts = tuple(Part(key, None, tuple(of)) for key, of in changes.items())
    if not parts:
        return
    try:
        database.store.commit(StoreTransaction(os.urandom(16), database.name, 0, parts), 0, database.timeout_s)
    except Invalid as error:
        for piece in apart(parts, error):
            _commit(database, {part.key: list(part.changes) for part in piece})
    except Conflict:
        return  # somebody else deletes or changes them; the caller looks again
