"""A DB-API cursor: routes each statement to SQLite's engine, to the shadow schema or to the connection."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import apsw

from dht.errors import Conflict, DhtError, SchemaChanged
from nova_bridge.sql import statements, vtab
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import from_sqlite, from_store
from nova_bridge.sql.reads import Moved
from nova_bridge.sql.values import adapt_all

_SCHEMA = frozenset({"CREATE", "DROP", "ALTER"})
_NOTHING_TO_DO = frozenset({"VACUUM", "ANALYZE", "REINDEX"})
_VACUUM_INTO = re.compile(r"\s*VACUUM\b.*\bINTO\b", re.IGNORECASE | re.DOTALL)
_IN_LIST_BUG = ("<NULL>", "vtab_in")
SCHEMA_RELOADS_MAX = 3
RUNS_MAX = 12
"""Of a statement whose groups change while it reads them; from the second on a look-up brings its groups whole."""
COLUMN_NAMES_MAX = 500

Description = tuple[tuple[Any, ...], ...]


def _description(described: Any) -> Description:
    return tuple([(d[0], None, None, None, None, None, None) for d in described])


class Session(vtab.Session, Protocol):
    """What a cursor needs of its connection: what virtual tables need, its transactions and its schema."""

    lock: threading.RLock
    database: Database
    isolation_level: str | None
    in_transaction: bool
    total_changes: int
    take_in_lists: bool
    column_names: dict[str, Description | None]

    def engine(self) -> apsw.Connection: ...
    def begin(self) -> None: ...
    def end(self, keep: bool) -> None: ...
    def end_statement(self) -> None: ...
    def savepoint(self, name: str) -> None: ...
    def release(self, name: str) -> None: ...
    def rollback_to(self, name: str) -> None: ...
    def define(self, sql: str) -> None: ...
    def flush_script(self) -> None: ...
    def reload_schema(self) -> bool: ...
    def shadow_rows(self, sql: str, parameters: Any, keep: Callable[[Any, list[Any]], None]) -> None: ...
    def executescript(self, script: str) -> Any: ...


class Cursor:
    """Results are complete when execute returns."""

    def __init__(self, connection: Session) -> None:
        self.connection = connection
        self.arraysize = 1
        self.description: Description | None = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self._rows: list[Any] = []
        self._at = 0
        self._described: Any = ()

    def execute(self, sql: str, parameters: Any = ()) -> Cursor:
        """Run one statement."""
        connection = self.connection
        self.description, self.rowcount = None, -1
        self._rows, self._at = [], 0
        with connection.lock:
            try:
                self._route(sql, adapt_all(parameters) if parameters else ())
            except apsw.Error as error:
                raise from_sqlite(error) from None
            except DhtError as error:
                raise from_store(error) from None
        return self

    def executemany(self, sql: str, parameters: Iterable[Any]) -> Cursor:
        """Run it once for each set; rowcount is the sum."""
        total = 0
        for one in parameters:
            self.execute(sql, one)
            total += max(self.rowcount, 0)
        self.rowcount = total
        return self

    def executescript(self, script: str) -> Cursor:
        """See the connection's."""
        result: Cursor = self.connection.executescript(script)
        return result

    def _route(self, sql: str, parameters: Any) -> None:
        connection = self.connection
        shape = statements.shape(sql)
        word = shape.word
        if shape.several:
            raise sqlite3.ProgrammingError(
                "You can only execute one statement at a time; run them one by one, or by executescript()"
            )
        if word in statements.READS:
            connection.flush_script()
            if shape.asks_for_schema:
                self._ask_shadow(sql, parameters)
            else:
                self._read(sql, parameters)
        elif word in statements.WRITES:
            connection.flush_script()
            self._write(shape, parameters)
        elif word in _SCHEMA:
            connection.define(sql)
        elif word == "PRAGMA":
            connection.flush_script()
            self._pragma(sql)
        elif word in _NOTHING_TO_DO and not _VACUUM_INTO.match(sql):
            return
        elif word or not statements.is_empty(sql):
            self._transaction(word, sql)

    def _transaction(self, word: str, sql: str) -> None:
        connection = self.connection
        name = statements.savepoint_name(sql)
        match word:
            case "BEGIN":
                connection.begin()
            case "COMMIT" | "END":
                connection.flush_script()
                connection.end(keep=True)
            case "ROLLBACK" if name is not None:
                connection.rollback_to(name)
            case "ROLLBACK" if statements.is_plain_end(sql):
                connection.end(keep=False)
            case "SAVEPOINT" if name is not None:
                connection.savepoint(name)
            case "RELEASE" if name is not None:
                connection.release(name)
            case _:
                raise sqlite3.OperationalError(f'near "{sql.strip()[:40]}": not a statement that this database runs')

    def _read(self, sql: str, parameters: Any) -> None:
        tx = self.connection.tx
        tx.reading = True
        try:
            self._with_reloads(sql, parameters)
        finally:
            tx.reading, tx.rows_wanted = False, None
        self.connection.end_statement()

    def _write(self, shape: statements.Shape, parameters: Any) -> None:
        connection = self.connection
        if shape.refused:
            raise sqlite3.NotSupportedError(
                f"not supported by this database: {' '.join(shape.text.split())[:60]}; {shape.refused}"
            )
        if not connection.in_transaction and connection.isolation_level is not None:
            connection.begin()
        writer = connection.writer
        writer.named_columns, writer.returning = shape.inserted, tuple([r.column for r in shape.returned])
        connection.changing = shape.word in {"UPDATE", "DELETE"}
        try:
            engine = self._with_reloads(shape.text, parameters)
        finally:
            connection.changing = False
        if shape.returned:
            self._rows = writer.returned
            self.description = tuple([(r.called, None, None, None, None, None, None) for r in shape.returned])
        self.rowcount = engine.changes()
        connection.total_changes += self.rowcount
        if shape.word == "INSERT":
            if writer.last_rowid is not None:
                engine.set_last_insert_rowid(writer.last_rowid)
            self.lastrowid = engine.last_insert_rowid()
        connection.end_statement()

    def _with_reloads(self, sql: str, parameters: Any) -> apsw.Connection:
        """Run on the engine; when the schema turns out to be old, learn the new one and run again."""
        connection = self.connection
        reading = connection.tx.reading
        for attempt in range(SCHEMA_RELOADS_MAX + 1):
            try:
                return self._run_on_one_ballot(sql, parameters, reading)
            except (SchemaChanged, apsw.SQLError) as error:
                helped = attempt < SCHEMA_RELOADS_MAX and (
                    isinstance(error, SchemaChanged)
                    or str(error).startswith(("no such", "SQLError: no such", "table "))
                )
                if not helped or not connection.reload_schema():
                    if isinstance(error, apsw.SQLError) and "no such table" in str(error):
                        connection.database.check_exists()
                    raise
        raise AssertionError("unreachable")

    def _run_on_one_ballot(self, sql: str, parameters: Any, reading: bool) -> apsw.Connection:
        """Run until no group moved between two looks at it, so that the result shows each at one ballot."""
        tx = self.connection.tx
        try:
            for run in range(RUNS_MAX):
                # Outside a transaction a run that failed has reset all of it.
                tx.tells_moves, tx.again, tx.reading = True, run > 0, reading
                tx.rows_wanted = statements.rows_wanted(sql, parameters) if reading else None
                try:
                    return self._run(sql, parameters)
                except Moved:
                    continue
        finally:
            tx.tells_moves = tx.again = False
        raise Conflict("groups kept changing while the statement read them; run the transaction again")

    def _run(self, sql: str, parameters: Any) -> apsw.Connection:
        connection = self.connection
        engine = connection.engine()
        journal = connection.tx.journal
        mark = len(journal)
        connection.tx.statement += 1
        connection.handles.clear()
        connection.numbers.clear()
        connection.writer.begin_statement()
        try:
            try:
                self._fetch(engine, sql, parameters)
            except apsw.SQLError as error:
                if not any(sign in str(error) for sign in _IN_LIST_BUG):
                    raise
                connection.tx.rollback_to(mark)
                connection.writer.begin_statement()
                self._fetch_without_in_lists(engine, sql, parameters)
            finally:
                if connection.handles:
                    looked_at = [(number, s.record, s.mask) for (number, _), s in connection.handles.items()]
                    connection.tx.mark_looked_at(looked_at)
            connection.writer.finish_statement()
        except BaseException:
            connection.writer.begin_statement()
            connection.tx.rollback_to(mark)
            if not connection.in_transaction:
                connection.tx.reset()
            raise
        return engine

    def _fetch(self, engine: apsw.Connection, sql: str, parameters: Any, can_cache: bool = True) -> None:
        """Names of columns are asked for once: a trace, which has them also of no rows, costs more than a row."""
        cursor, names = engine.cursor(), self.connection.column_names
        known = names.get(sql, ())
        if known == ():
            self._described = ()
            cursor.exec_trace = self._trace
        self._rows = cursor.execute(sql, parameters, can_cache=can_cache).fetchall()
        if known == ():
            known = _description(self._described) if self._described else None
            if len(names) >= COLUMN_NAMES_MAX:
                names.clear()
            names[sql] = known
        self.description = known

    def _fetch_without_in_lists(self, engine: apsw.Connection, sql: str, parameters: Any) -> None:
        """An IN (subquery) without rows fails when lists are taken at once: prepare anew, value by value."""
        self.connection.take_in_lists = False
        try:
            self._fetch(engine, sql, parameters, can_cache=False)
        finally:
            self.connection.take_in_lists = True

    def _trace(self, cursor: apsw.Cursor, sql: str, bindings: Any) -> bool:
        self._described = cursor.get_description()
        return True

    def _ask_shadow(self, sql: str, parameters: Any) -> None:
        def keep(described: Any, rows: list[Any]) -> None:
            self._rows = rows
            if described:
                self.description = _description(described)

        self.connection.shadow_rows(sql, parameters, keep)

    def _pragma(self, sql: str) -> None:
        name, value = statements.pragma(sql)
        if name == "foreign_keys":
            if value is None:
                self._rows = [(int(self.connection.writer.foreign_keys),)]
                self.description = (("foreign_keys", None, None, None, None, None, None),)
            elif not self.connection.in_transaction:
                self.connection.writer.foreign_keys = value in {"on", "1", "true", "yes"}
        elif name in {"synchronous", "journal_mode", "busy_timeout", "legacy_alter_table", "wal_checkpoint"}:
            return
        else:
            self._ask_shadow(sql, ())

    def fetchone(self) -> Any:
        """The next row or None."""
        if self._at < len(self._rows):
            self._at += 1
            return self._rows[self._at - 1]
        return None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Up to `size` rows."""
        rows = self._rows[self._at : self._at + (size or self.arraysize)]
        self._at += len(rows)
        return rows

    def fetchall(self) -> list[Any]:
        """All that are left."""
        rows = self._rows[self._at :] if self._at else list(self._rows)
        self._at = len(self._rows)
        return rows

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    def close(self) -> None:
        """Drop the results."""
        self._rows = []

    def setinputsizes(self, *sizes: Any) -> None:
        """Nothing to prepare."""

    def setoutputsize(self, *sizes: Any) -> None:
        """Nothing to prepare."""
