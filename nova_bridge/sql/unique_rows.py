"""A unique rule and the rows that were there before it: checked, and given their entries (`nova_bridge.sql.ddl`).

Writers keep the rule since it was published, so only the rows are looked after that a search behind the fence finds.
Every step is guarded by what it was decided on: one that loses against a writer looks again.
"""

from __future__ import annotations

import os
import random
import time

from dht.errors import Conflict, SchemaChanged
from dht.model import Change, Columns, GroupKey, Guard, GuardKind, Op, Order, Part, Value
from dht.model import Transaction as StoreTransaction
from dht.rows import decode_row
from nova_bridge.sql.access import entry_owner, owner_columns
from nova_bridge.sql.commit import ENTRY_ROW
from nova_bridge.sql.database import SCHEMA_ATTEMPTS, Database
from nova_bridge.sql.errors import ConflictError, unique_failed
from nova_bridge.sql.schema import ENTRY_TABLE, Record, Table, Unique
from nova_bridge.sql.transaction import Transaction

RESERVE_WAIT_S = 30.0
"""How long a row is looked at again and again because writers change it or its entry."""
_PAUSE_MAX_S = 0.05


def all_rows(database: Database, table: Table, limit: int | None = None) -> list[Record]:
    """All rows of the table, or so many of them. It need not be in the catalog any more."""
    order = None if limit is None else Order(tuple(table.number_of(p) for p in table.primary))
    for _ in range(SCHEMA_ATTEMPTS):
        try:
            return Transaction(database).find(table, (), order, limit)
        except SchemaChanged:
            database.reload()
    return Transaction(database).find(table, (), order, limit)


def check(database: Database, table: Table, unique: Unique) -> None:
    """Raise IntegrityError if rows that exist break the rule."""
    seen: set[tuple[Value, ...]] = set()
    for record in all_rows(database, table):
        if not table.binds(unique, record.values):
            continue
        values = tuple([record.values[p] for p in unique.columns])
        if values in seen:
            raise unique_failed(table.name, table.column_names(unique.columns))
        seen.add(values)


def build(database: Database, number: int, unique: Unique) -> None:
    """Make the rule true of the rows older than it. Raises IntegrityError for duplicates, which stay as they are."""
    table = database.schema.by_number.get(number)
    if table is None or unique.id not in {known.id for known in table.uniques}:
        return
    if unique.kind != "entry":
        check(database, table, unique)
        return
    for record in all_rows(database, table):
        entry = table.entry_key(unique, record.values)
        if entry is not None:
            _reserve(database, table, unique, record, entry)


def _reserve(database: Database, table: Table, unique: Unique, record: Record, entry: GroupKey) -> None:
    """Give the row its entry, unless it has it, or is not the row any more that was found."""
    if not table.unindexed.isdisjoint(unique.columns):
        # Of a column that was added with a default older rows hold nothing, which is what a guard has to say.
        stored = decode_row(Transaction(database).view(record.group).raw(table.prefix).get(record.key, b"\x80"))
        columns: Columns = {table.number_of(p): stored.get(table.number_of(p)) for p in unique.columns}
    else:
        columns = {table.number_of(p): record.values[p] for p in unique.columns}
    parts = (
        Part(record.group, None, (), (Guard(GuardKind.HAS, table.number, record.pk, columns),)),
        Part(entry, None, (Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, owner_columns((record.group, record.key))),)),
    )
    began = time.monotonic()
    while True:
        transaction = StoreTransaction(os.urandom(16), database.name, 0, parts)
        try:
            database.store.commit(transaction, 0, database.timeout_s)
            return
        except Conflict as error:
            if _settled(database, table, unique, record, entry):
                return
            if time.monotonic() - began > RESERVE_WAIT_S:
                raise ConflictError(
                    f"a unique index on {table.name} cannot be finished: the row {record.pk} or its entry is changed "
                    f"all the time ({error.message}); run the statement again"
                ) from None
        time.sleep(random.uniform(0, _PAUSE_MAX_S))


def _settled(database: Database, table: Table, unique: Unique, record: Record, entry: GroupKey) -> bool:
    """Whether nothing is left to do for the row. Raises IntegrityError when another row has its values."""
    tx = Transaction(database)
    tx.ensure([record.group, entry])
    row = tx.row(table, record.group, record.key)
    if row is None or table.entry_key(unique, row.values) != entry:
        return True  # whoever changed it knows the rule
    owner = entry_owner(tx, entry)
    if owner is None or owner == (record.group, record.key):
        return owner is not None
    other = tx.row(table, *owner)
    if other is not None and table.entry_key(unique, other.values) == entry:
        raise unique_failed(table.name, table.column_names(unique.columns))
    return False


def forget(database: Database, table: Table, unique: Unique) -> None:
    """Delete the entries of a rule that is no more, as far as rows show them; what is left over is never read."""
    for record in all_rows(database, table):
        entry = table.entry_key(unique, record.values) if unique.kind == "entry" else None
        if entry is None:
            continue
        delete = Change(Op.DELETE, ENTRY_TABLE, ENTRY_ROW, {}, owner_columns((record.group, record.key)))
        try:
            transaction = StoreTransaction(os.urandom(16), database.name, 0, (Part(entry, None, (delete,)),))
            database.store.commit(transaction, 0, database.timeout_s)
        except Conflict:
            continue
