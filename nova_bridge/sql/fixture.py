"""Scripts that fill an empty database are run once per process; afterwards their result is restored as a whole.

Nova's database fixture restores the same schema dump for each of its tests. In-process stores are cloned; elsewhere
the catalog and the rows are written by two transactions.
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from dht.errors import DhtError
from dht.register.memory import MemoryStore
from nova_bridge.sql.catalog import Catalog
from nova_bridge.sql.commit import commit
from nova_bridge.sql.database import Database
from nova_bridge.sql.schema import Schema
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.writes import Writer

KEPT_MAX = 16
ROWS_MAX = 1000
"""A script that leaves more rows than this is run each time."""


class _Clone(NamedTuple):
    store: MemoryStore
    catalog: Catalog


class _Content(NamedTuple):
    """`home`: of the database; where groups live, and how they may be read, depends on it."""

    schema: Schema
    rows: list[tuple[int, tuple[Any, ...]]]
    home: str


_kept: dict[bytes, _Clone | _Content] = {}


def restore(database: Database, digest: bytes) -> bool:
    """Give an empty database the content that the script made before. Returns whether that was possible."""
    match _kept.get(digest):
        case _Clone(store, catalog) if isinstance(database.store, MemoryStore) and not database.schema.definitions:
            database.replace_store(store.clone(), catalog)
            return True
        case _Content(schema, rows, home) if not isinstance(database.store, MemoryStore):
            before = database.schema
            # A number is given once. Rows of a dropped table may be left, and a client of a dropped database of this
            # name would take the new table for the one that he writes to.
            if any(number < before.next_table for number in schema.by_number):
                return False
            if before.definitions or before.dropped or database.home() != home:
                return False
            database.publish(schema)
            _insert(database, rows)
            return True
    return False


def _insert(database: Database, rows: list[tuple[int, tuple[Any, ...]]]) -> None:
    tx = Transaction(database)
    writer = Writer(tx)
    for number, values in rows:
        writer.insert(tx.schema.by_number[number], None, values)
    commit(tx, foreign_keys=False)


def keep(database: Database, digest: bytes) -> None:
    """Remember the content that the script made of an empty database, unless others change its tables meanwhile."""
    if len(_kept) >= KEPT_MAX:
        _kept.clear()
    if isinstance(database.store, MemoryStore):
        store = database.store.clone()
        _kept[digest] = _Clone(store, database.catalog_for(store))
        return
    tx = Transaction(database)
    try:
        rows = [(t.number, r.values[: t.width]) for t in tx.schema.tables.values() for r in tx.find(t, ())]
        home = database.home()
    except (DhtError, sqlite3.Error):
        return  # The script itself has run.
    if len(rows) <= ROWS_MAX:
        _kept[digest] = _Content(tx.schema, rows, home)
