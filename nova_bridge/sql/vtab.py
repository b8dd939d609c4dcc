"""SQLite's virtual-table callbacks: thin, because they run once per row and column (DESIGN section 11).

Each table is an eponymous-only module, so it is there without CREATE VIRTUAL TABLE. Rows are found by a rowid that is
the integer key, or a number given out per statement where there is none.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import apsw

from nova_bridge.sql.plan import Planner
from nova_bridge.sql.schema import Place, Record, Table
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.values import DECLARED, EQ_OR_NULL, eq_or_null
from nova_bridge.sql.writes import NO_CHANGE, Writer


class Sight:
    """A row as a statement that changes rows saw it. `mask`: the columns that its WHERE and SET looked at.

    All cursors of the statement share it: for an OR or a subselect SQLite looks at a row through one cursor and takes
    its number from another.
    SQLite says of an UPDATE of a virtual table that it uses all columns, so they are counted as it asks for them.
    """

    __slots__ = ("mask", "record")

    def __init__(self, record: Record, mask: int) -> None:
        self.record, self.mask = record, mask


class Session(Protocol):
    """What the callbacks need of their connection."""

    tx: Transaction
    writer: Writer
    open_tables: dict[str, dict[int, int]]
    handles: dict[tuple[int, int], Sight]
    numbers: dict[Place, int]
    changing: bool

    def in_lists(self) -> bool:
        """Whether IN lists may be taken at once."""
        ...


class Module:
    """One table's module."""

    def __init__(self, session: Session, table: Table) -> None:
        self._session, self._table = session, table

    def Create(
        self, connection: Any, module: str, database: str, name: str, *arguments: Any
    ) -> tuple[str, VirtualTable]:
        """The declaration that SQLite plans with."""
        table = self._table
        columns = ", ".join(f'"{c.name.replace(chr(34), chr(34) * 2)}" {DECLARED[c.affinity]}' for c in table.columns)
        return f"CREATE TABLE x({columns})", VirtualTable(self._session, table)

    Connect = Create


class VirtualTable:
    """A table in one connection."""

    def __init__(self, session: Session, table: Table) -> None:
        self.session, self.table = session, table
        self.planner = Planner(table, session.in_lists)
        self.BestIndexObject = self.planner.best_index
        self.unchanged = ((NO_CHANGE,) * table.width).__getitem__
        self._open = session.open_tables.setdefault(table.family, {})

    def FindFunction(self, name: str, count: int) -> tuple[int, Any] | None:
        """The one function of which the planner is told as of a comparison."""
        if name.lower() == EQ_OR_NULL and count == 2:
            return apsw.SQLITE_INDEX_CONSTRAINT_FUNCTION, eq_or_null
        return None

    def Open(self) -> Cursor | ChangingCursor:
        """Count who is open: a find of a family whose other tables are joined brings the groups along."""
        number = self.table.number
        self._open[number] = self._open.get(number, 0) + 1
        return ChangingCursor(self) if self.session.changing else Cursor(self)

    def closed(self) -> None:
        """One cursor less."""
        number = self.table.number
        left = self._open[number] - 1
        if left:
            self._open[number] = left
        else:
            del self._open[number]

    def joined(self) -> bool:
        """Whether the statement reads other tables of this family as well."""
        return len(self._open) > 1 and bool(self.table.family_key)

    def rowid(self, record: Record) -> int:
        """A number that is the row's own while the statement runs."""
        table = self.table
        if table.integer_key is not None:
            number: int = record.values[table.integer_key]
            return number
        if table.rowid_key:
            number = record.values[table.width]
            return number
        numbers = self.session.numbers
        return numbers.setdefault((record.group, record.key), len(numbers) + 1)

    def Disconnect(self) -> None:
        """Nothing is held."""

    Destroy = Disconnect

    def UpdateInsertRow(self, rowid: int | None, fields: Sequence[Any]) -> int:
        """INSERT."""
        if rowid is not None:
            self._check_rowid()
        return self.session.writer.insert(self.table, rowid, fields)

    def UpdateChangeRow(self, rowid: int, new_rowid: int, fields: Sequence[Any]) -> None:
        """UPDATE of a row that a cursor of this statement showed."""
        sight = self.session.handles[self.table.number, rowid]
        if new_rowid != rowid:
            self._check_rowid()
            fields = [*fields, new_rowid]
            if self.table.integer_key is not None:
                fields[self.table.integer_key] = fields.pop()
        self.session.writer.update(self.table, sight.record, fields, sight.mask)

    def _check_rowid(self) -> None:
        if self.table.integer_key is None and not self.table.rowid_key:
            raise sqlite3.NotSupportedError(
                f"table {self.table.name} has no rowid that can be set; name the columns of its primary key"
            )

    def UpdateDeleteRow(self, rowid: int) -> None:
        """DELETE."""
        sight = self.session.handles[self.table.number, rowid]
        self.session.writer.delete(self.table, sight.record, sight.mask)


class Cursor:
    """The rows of one xFilter, all in memory; but those of a list that may be left early come page by page."""

    __slots__ = ("Column", "_at", "_mask", "_pages", "_rows", "_table", "row")

    def __init__(self, table: VirtualTable) -> None:
        self._table = table
        self._rows: list[Record] = []
        self._pages: Iterator[list[Record]] | None = None
        self._at = self._mask = 0
        self.row: Record | None = None
        self.Column: Any = None

    def Filter(self, number: int, name: str, arguments: Sequence[Any]) -> None:
        """Fetch the rows of a plan."""
        table = self._table
        tx, planner = table.session.tx, table.planner
        plan = planner.plans[number]
        self._mask = plan.mask
        self._pages = planner.pages(tx, plan, arguments, table.joined) if plan.order is not None else None
        if self._pages is None:
            self._take(planner.run(tx, plan, arguments, table.joined))
        else:
            self._take(next(self._pages, []))

    def _take(self, rows: list[Record]) -> None:
        self._rows, self._at = rows, 0
        if not rows:
            self.row = None
            return
        tx = self._table.session.tx
        tx.marks.read(rows, self._mask)
        if not tx.reading:
            tx.marks.copy(rows, self._mask)
        row = self.row = rows[0]
        self.Column = row.values.__getitem__

    def Eof(self) -> bool:
        """No row left."""
        return self.row is None

    def Next(self) -> None:
        """The following row."""
        self._at += 1
        if self._at < len(self._rows):
            row = self.row = self._rows[self._at]
            self.Column = row.values.__getitem__
        elif self._pages is not None:
            self._take(next(self._pages, []))
        else:
            self.row = None

    def Rowid(self) -> int:
        """See `VirtualTable.rowid`."""
        if self.row is None:
            raise ValueError("the cursor shows no row")
        return self._table.rowid(self.row)

    def Close(self) -> None:
        """The statement is done."""
        self._rows, self._pages = [], None
        self._table.closed()


class ChangingCursor:
    """The rows that an UPDATE or DELETE goes through; remembers what it looked at."""

    __slots__ = ("ColumnNoChange", "_at", "_mask", "_row", "_rows", "_sight", "_table")

    def __init__(self, table: VirtualTable) -> None:
        self._table = table
        self._rows: list[Record] = []
        self._at = self._mask = 0
        self._row: Record | None = None
        self._sight: Sight | None = None
        self.ColumnNoChange = table.unchanged
        """Of a column that the UPDATE leaves alone; there are many of them in each row."""

    def Filter(self, number: int, name: str, arguments: Sequence[Any]) -> None:
        """Fetch the rows of a plan; its own conditions were looked at already."""
        table = self._table
        plan = table.planner.plans[number]
        self._rows = table.planner.run(table.session.tx, plan, arguments, table.joined)
        self._mask = 0
        for term in plan.terms:
            self._mask |= 1 << term.position
        self._at = -1
        self.Next()

    def Eof(self) -> bool:
        """No row left."""
        return self._sight is None

    def Next(self) -> None:
        """The following row."""
        self._at += 1
        if self._at >= len(self._rows):
            self._row = self._sight = None
            return
        row, table = self._rows[self._at], self._table
        self._row = row
        handles, key = table.session.handles, (table.table.number, table.rowid(row))
        sight = handles.get(key)
        if sight is None or (sight.record.group, sight.record.key) != (row.group, row.key):
            sight = handles[key] = Sight(row, 0)
        sight.mask |= self._mask
        self._sight = sight

    def Column(self, number: int) -> Any:
        """A column that WHERE or SET looks at."""
        row, sight = self._row, self._sight
        if row is None or sight is None:
            raise ValueError("the cursor shows no row")
        if number >= 0:
            sight.mask |= 1 << number
        return row.values[number]

    def Rowid(self) -> int:
        """The number by which the row is changed."""
        if self._row is None:
            raise ValueError("the cursor shows no row")
        return self._table.rowid(self._row)

    def Close(self) -> None:
        """The statement is done."""
        self._rows = []
        self._table.closed()
