"""INSERT, UPDATE and DELETE of one row, as SQLite's engine asks for them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import apsw

from nova_bridge.sql import rules
from nova_bridge.sql.errors import not_null_failed, unique_failed
from nova_bridge.sql.schema import ColumnDef, Foreign, Record, Table, mask_of
from nova_bridge.sql.transaction import Pending, Transaction
from nova_bridge.sql.values import coerce

NO_CHANGE: Any = apsw.no_change
"""Of a column that an UPDATE leaves alone. The module's own attribute costs a call each time."""


class Writer:
    """Buffers one connection's row changes. `checks` run when the statement ends: foreign keys see all of it.

    `returning`: the columns that the statement wants to know of the rows it inserts, `returned`: these, row by row.
    `last_rowid`: of the row that it inserted last; SQLite forgets those that an INSERT has named.
    """

    def __init__(self, tx: Transaction) -> None:
        self.tx = tx
        self.foreign_keys = False
        self.named_columns: frozenset[str] | None = None
        self.returning: tuple[str, ...] = ()
        self.begin_statement()

    def begin_statement(self) -> None:
        """Forget what a statement, or a run of it that failed, has left."""
        self.last_rowid: int | None = None
        self.checks: list[Callable[[], None]] = []
        self.returned: list[tuple[Any, ...]] = []
        self._newest_id = 0

    def finish_statement(self) -> None:
        """Run what could be judged only now."""
        while self.checks:
            checks, self.checks = self.checks, []
            for check in checks:
                check()

    def insert(self, table: Table, rowid: int | None, fields: Sequence[Any]) -> int:
        """Returns what lastrowid shall be."""
        tx = self.tx
        values = [None if v is None else coerce(a, v) for a, v in zip(table.affinities, fields, strict=True)]
        if self.named_columns is not None:
            for position, column in table.defaults:
                if column.name.lower() not in self.named_columns:
                    values[position] = coerce(column.affinity, _default(column))
        given = self._identity(table, values, rowid)
        _check_not_null(table, values)
        record = table.record(tuple(values))
        place = (record.group, record.key)
        near = tx.begins(table, record.group)
        if near:
            tx.ensure([record.group], near=True)
        if given and self._exists(table, record):
            raise unique_failed(table.name, table.column_names(table.primary))
        rules.check_unique(tx, table, record, (place,), None, near)
        before = tx.pending(table, record)
        stored = before.base if before.base is not record else None
        columns = frozenset(range(len(values))) if stored is not None else frozenset[int]()
        tx.put(table, place, Pending(stored, record, columns, before.guards))
        if self.foreign_keys and table.foreign:
            self.checks.append(lambda: rules.check_child(tx, table, record, None))
        if self.returning:
            self.returned.append(_named(table, values, self.returning))
        number = values[table.integer_key] if table.integer_key is not None else values[-1] if table.rowid_key else 0
        self.last_rowid = int(number)
        return self.last_rowid

    def _identity(self, table: Table, values: list[Any], rowid: int | None) -> bool:
        """Fill in a generated key. Returns whether the key was given, so that it may be taken already."""
        tx = self.tx
        if table.rowid_key:
            values.append(rowid if rowid is not None else tx.database.next_id(table, 0))
            if rowid is not None:
                tx.database.raise_sequence(table, rowid)
            return rowid is not None
        if table.integer_key is None:
            return True
        number = values[table.integer_key]
        number = rowid if number is None else number
        if number is None:
            # SQLAlchemy tells the rows of one INSERT apart by their ids: they are in the order of the rows.
            above = max(self._newest(table, values), self._newest_id)
            values[table.integer_key] = self._newest_id = tx.database.next_id(table, above)
            return False
        if not isinstance(number, int):
            raise sqlite3.IntegrityError("datatype mismatch")
        values[table.integer_key] = number
        tx.database.raise_sequence(table, number)
        return True

    def _newest(self, table: Table, values: list[Any]) -> int:
        """The greatest id of the table in the group that the row will join."""
        if table.integer_key in table.family_key or not (table.family_key or table.whole):
            return 0
        key = tuple([values[p] for p in table.family_key])
        if None in key:
            return 0
        group = table.family_group(key)
        if self.tx.begins(table, group):
            self.tx.ensure([group], near=True)
        entries = [
            k for u in table.uniques if u.kind == "entry" and (k := table.entry_key(u, tuple(values))) is not None
        ]
        self.tx.ensure([group, *[k for k in entries if k not in self.tx.own_entries]])
        return self.tx.newest(table, group)

    def _exists(self, table: Table, record: Record) -> bool:
        if table.integer_key is not None:
            return bool(self.tx.by_pk(table, [record.pk]))
        return self.tx.row(table, record.group, record.key) is not None

    def update(self, table: Table, record: Record, fields: Sequence[Any], mask: int) -> None:
        """`record`: as the statement's cursor showed it; `mask`: the columns that its WHERE and SET looked at."""
        tx = self.tx
        current = tx.current(table, record)
        if current is None:
            return
        values = list(current.values)
        changed = [position for position, value in enumerate(fields) if value is not NO_CHANGE]
        for position in changed:
            # The hidden rowid comes behind the columns.
            value = fields[position]
            values[position] = coerce(table.affinities[position], value) if position < table.width else value
        if table.integer_key is not None and not isinstance(values[table.integer_key], int):
            raise sqlite3.IntegrityError("datatype mismatch")
        _check_not_null(table, values)
        new = table.changed(current, tuple(values), changed)
        old_place, place = (current.group, current.key), (new.group, new.key)
        if new.pk != current.pk:
            self._check_new_identity(table, new)
        rules.check_unique(tx, table, new, (old_place, place), changed)
        self._replace(table, current, new, changed, mask)
        if self.foreign_keys:
            if table.foreign:
                self.checks.append(lambda: rules.check_child(tx, table, new, changed))
            if not tx.schema.referred[table.number].isdisjoint(changed):
                self._lose_key(table, current, new)

    def _check_new_identity(self, table: Table, new: Record) -> None:
        if self._exists(table, new):
            raise unique_failed(table.name, table.column_names(table.primary))
        if table.integer_key is not None or table.rowid_key:
            self.tx.database.raise_sequence(table, new.pk[0])  # type: ignore[arg-type]

    def _replace(self, table: Table, current: Record, new: Record, changed: list[int], mask: int) -> None:
        tx = self.tx
        mask &= ~table.merge_mask
        before = tx.pending(table, current)
        old_place, place = (current.group, current.key), (new.group, new.key)
        if not table.unique_columns.isdisjoint(changed):
            for unique in table.uniques:
                if not set(unique.columns).isdisjoint(changed):
                    mask |= mask_of(unique.columns)
        guards = tx.guards(table, before, old_place, mask, (p for p in changed if p not in table.merge))
        if place == old_place:
            tx.put(table, place, Pending(before.base, new, before.columns.union(changed), guards))
            return
        everything = tx.guards(table, before, old_place, (1 << len(new.values)) - 1 & ~table.merge_mask, ())
        tx.put(table, old_place, Pending(before.base, None, before.columns, everything))
        target = tx.pending(table, new)
        stored = target.base if target.base is not new else None
        tx.put(table, place, Pending(stored, new, frozenset(range(len(new.values))), target.guards))

    def delete(self, table: Table, record: Record, mask: int) -> None:
        """`mask`: the columns that the statement's WHERE looked at."""
        tx = self.tx
        current = tx.current(table, record)
        if current is None:
            return
        mask &= ~table.merge_mask
        for unique in table.uniques:
            mask |= mask_of(unique.columns) if unique.kind == "entry" else 0
        before = tx.pending(table, current)
        place = (current.group, current.key)
        # A row that was copied and goes, as into an archive: what another writes to it meanwhile would be in neither.
        mask |= tx.marks.copied.get(place, 0) & ~table.merge_mask
        tx.put(table, place, Pending(before.base, None, before.columns, tx.guards(table, before, place, mask, ())))
        if self.foreign_keys:
            self._lose_key(table, current, None)

    def _lose_key(self, table: Table, old: Record, new: Record | None) -> None:
        """ON DELETE and ON UPDATE at once; who may not lose their parent are looked for when the statement ends."""
        tx = self.tx
        if not tx.schema.children.get(table.name.lower()):
            return
        for child, foreign, rows in rules.children_of(tx, table, old, new):
            # A row that refers to another parent by the time of the commit is none of this one's.
            refers = mask_of(foreign.columns)
            action = foreign.on_delete if new is None else foreign.on_update
            if action == "CASCADE" and new is None:
                for row in rows:
                    self.delete(child, row, refers)
            elif action in {"CASCADE", "SET NULL", "SET DEFAULT"}:
                fields = _with_key(tx, child, foreign, action, new)
                for row in rows:
                    self.update(child, row, fields, refers)
        self.checks.append(lambda: rules.check_parent(tx, table, old))


def _named(table: Table, values: Sequence[Any], names: Sequence[str]) -> tuple[Any, ...]:
    for name in names:
        if name not in table.by_name:
            raise sqlite3.OperationalError(f"no such column: {name}")
    return tuple([values[table.by_name[name]] for name in names])


def _default(column: ColumnDef) -> Any:
    if column.expression is None:
        return column.default
    engine = apsw.Connection(":memory:")
    try:
        return list(engine.execute(f"SELECT {column.expression}"))[0][0]  # noqa: RUF015
    finally:
        engine.close()


def _check_not_null(table: Table, values: Sequence[Any]) -> None:
    for position in table.required:
        if values[position] is None:
            raise not_null_failed(table.name, table.columns[position].name)
    for position in table.primary:
        if values[position] is None:
            raise not_null_failed(table.name, table.columns[position].name)


def _with_key(tx: Transaction, child: Table, foreign: Foreign, action: str, new: Record | None) -> list[Any]:
    """What an action sets of a child: the key that its parent has now, NULL, or the defaults."""
    fields: list[Any] = [NO_CHANGE] * child.width
    _, keys = rules.parent_of(tx.schema, foreign)
    for position, key in zip(foreign.columns, keys, strict=True):
        if action == "CASCADE" and new is not None:
            fields[position] = new.values[key]
        else:
            fields[position] = child.columns[position].default if action == "SET DEFAULT" else None
    return fields
