"""Unique entries and sequences made to fit the rows again, after a recovery lost writes (DESIGN section 5, rule 8).

Rows are what counts. A row without its entry gets one; an entry that names no row with its values goes, or is given to
the row that has them; where two rows have the same values, both are named and left alone. Safe beside running writers:
what does not fit is looked at once more, as it was at one moment, before anything is said of it; every step is guarded
by what it was decided on, and one that loses against a writer is left to the next run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from dht.errors import Conflict, Invalid
from dht.model import Change, FindQuery, GroupKey, Guard, GuardKind, Op, Part, Scope
from dht.model import Transaction as StoreTransaction
from dht.register.catalog import sequence_group
from dht.register.local_ids import jump_ids
from dht.rows import decode_row, split_group_key, split_row_key
from nova_bridge.sql.access import entry_owner, owner_columns
from nova_bridge.sql.commit import ENTRY_ROW
from nova_bridge.sql.database import Database
from nova_bridge.sql.schema import ENTRY_TABLE, UNIQUE_FAMILY, Place, Record, Table, Unique
from nova_bridge.sql.transaction import Transaction

Holder = tuple[Table, Unique, Record]
Taken = dict[GroupKey, list[Holder]]
"""By entry: the rows that have its values."""
LOOKS_MAX = 20
"""At what writers change meanwhile; each look is a moment, so more of them do not help."""


def check(database: Database, *, repair: bool) -> Iterator[str]:
    """A sentence for each thing that does not fit; with `repair`, it was mended unless the sentence says otherwise."""
    schema = database.reload()
    taken: Taken = {}
    for table in schema.tables.values():
        records = Transaction(database).find(table, ())
        yield from _check_sequence(database, table, records, repair)
        for record in records:
            for unique in table.uniques:
                if unique.kind == "entry" and (entry := table.entry_key(unique, record.values)) is not None:
                    taken.setdefault(entry, []).append((table, unique, record))
    found = database.store.find(FindQuery(database.name, ENTRY_TABLE, schema.version), database.timeout_s)
    reserved = [row.group for row in found.rows if split_group_key(row.group)[1] == UNIQUE_FAMILY]
    # Of a table, or a rule, that came after the first look there may be entries now: they are no leftovers.
    tables = database.reload().by_number
    for entry in dict.fromkeys([*taken, *reserved]):
        yield from _check_entry(database, entry, taken.get(entry, []), tables, repair)


def _check_sequence(database: Database, table: Table, records: list[Record], repair: bool) -> Iterator[str]:
    if table.integer_key is None and not table.rowid_key:
        return
    if table.local:
        # Each PoP has a sequence of its own, of which this is the one here.
        records = Transaction(database).find(table, (), scope=Scope.NEAR)
    numbers = [n for r in records if isinstance(n := r.pk[0], int)]
    key = sequence_group(database.name, table.sequence)
    (group,) = database.store.read([key], None, database.timeout_s, near=table.local)
    following: Any = next((decode_row(row).get(0) for row in (group.rows or {}).values()), 1)
    if numbers and following * table.id_step <= max(numbers):
        if repair:
            # In the sequence's own steps: of a table whose rows live in several PoPs it gives out every 256th id.
            taken = max(numbers) // table.id_step
            database.raise_sequence(table, (taken + jump_ids(key, taken + 1)) * table.id_step)
        yield f"the sequence of {table.name} stands at {following}, a row has id {max(numbers)}"


def _check_entry(
    database: Database, entry: GroupKey, rows: list[Holder], tables: Mapping[int, Table], repair: bool
) -> Iterator[str]:
    owner = entry_owner(Transaction(database), entry)
    if len(rows) == 1 and owner == (rows[0][2].group, rows[0][2].key):
        return
    tx = _at_one_moment(database, entry, rows)
    if tx is None:
        yield f"what has the values {split_group_key(entry)[2]} was changed all the time, not checked: run it again"
        return
    owner, rows = entry_owner(tx, entry), _that_have(tx, entry, rows)
    if len(rows) > 1:
        table, unique, _ = rows[0]
        names = ", ".join(table.column_names(unique.columns))
        yield f"rows {[r.pk for _, _, r in rows]} of {table.name} have the same {names}: change or delete all but one"
        return
    if rows and owner == (rows[0][2].group, rows[0][2].key):
        return
    if rows:
        table, unique, record = rows[0]
        columns = {table.number_of(p): record.stored(p) for p in unique.columns}
        new = owner_columns((record.group, record.key))
        change = Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, new)
        if owner is not None:
            change = Change(Op.UPDATE, ENTRY_TABLE, ENTRY_ROW, new, owner_columns(owner))
        parts: tuple[Part, ...] = (
            Part(record.group, None, (), (Guard(GuardKind.HAS, table.number, record.pk, columns),)),
            Part(entry, None, (change,)),
        )
        names = ", ".join(table.column_names(unique.columns))
        text = f"row {record.pk} of {table.name} had no entry for its unique {names}"
    elif owner is not None:
        guards = _without_the_values(tx, entry, owner, tables)
        if guards is None:
            return
        gone = Part(entry, None, (Change(Op.DELETE, ENTRY_TABLE, ENTRY_ROW, {}, owner_columns(owner)),))
        parts = (gone, Part(owner[0], None, (), guards)) if guards else (gone,)
        text = f"the unique entry {split_group_key(entry)[2]} named a row that is gone or has other values"
    else:
        return
    yield text + (_apply(database, parts) if repair else "")


def _at_one_moment(database: Database, entry: GroupKey, rows: list[Holder]) -> Transaction | None:
    """Has read the entry, the rows, and the row that the entry names, as they stood together; None: they never did.

    Each group is read twice. Where none has moved, all stood so when the first reading ended.
    """
    tx = Transaction(database)
    for _ in range(LOOKS_MAX):
        owner = entry_owner(tx, entry)
        groups = [entry, *(record.group for _, _, record in rows), *(() if owner is None else owner[:1])]
        tx.ensure(groups)
        before, tx = tx, Transaction(database)
        tx.ensure(groups)
        if all(tx.view(group).ballot == before.view(group).ballot for group in groups):
            return tx
    return None


def _that_have(tx: Transaction, entry: GroupKey, rows: list[Holder]) -> list[Holder]:
    """Those of the rows that have the entry's values, as the transaction reads them."""
    now = [(table, unique, tx.row(table, record.group, record.key)) for table, unique, record in rows]
    return [(t, u, record) for t, u, record in now if record is not None and t.entry_key(u, record.values) == entry]


def _without_the_values(
    tx: Transaction, entry: GroupKey, owner: Place, tables: Mapping[int, Table]
) -> tuple[Guard, ...] | None:
    """Guards that no row with the entry's values is where it says; None if there is one.

    It came, or got these values, after the rows were read: a writer has reserved them.
    """
    number, id = split_group_key(entry)[2][:2]
    table = tables.get(number) if isinstance(number, int) else None
    unique = next((u for u in table.uniques if u.id == id), None) if table is not None else None
    if table is None or unique is None:
        return ()
    record = tx.row(table, *owner)
    if record is None:
        with contextlib.suppress(Invalid):
            return (Guard(GuardKind.ABSENT, table.number, split_row_key(owner[1])[1]),)
        return ()  # of no row: nobody can make one of that key
    if table.entry_key(unique, record.values) == entry:
        return None
    columns = {table.number_of(p): record.stored(p) for p in unique.columns}
    return (Guard(GuardKind.HAS, table.number, record.pk, columns),)


def _apply(database: Database, parts: tuple[Part, ...]) -> str:
    transaction = StoreTransaction(os.urandom(16), database.name, 0, parts)
    try:
        database.store.commit(transaction, 0, database.timeout_s)
    except Conflict as error:
        return f" (not mended, a writer was faster: {error.message})"
    return ""
