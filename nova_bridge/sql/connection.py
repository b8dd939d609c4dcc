"""A DB-API connection: one transaction at a time, SQLite's engine over virtual tables, savepoints as journal marks.

It behaves as the `sqlite3` module's (legacy isolation levels): `isolation_level` None leaves BEGIN to the caller,
anything else begins before the first INSERT, UPDATE or DELETE. DDL commits what is pending first.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

import apsw

from dht.errors import DhtError, SchemaChanged
from nova_bridge.sql import fixture, statements
from nova_bridge.sql.commit import commit
from nova_bridge.sql.cursor import Cursor, Description
from nova_bridge.sql.database import Database
from nova_bridge.sql.ddl import Ddl
from nova_bridge.sql.errors import from_sqlite, from_store
from nova_bridge.sql.schema import Place, Schema
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.values import EQ_OR_NULL, eq_or_null
from nova_bridge.sql.vtab import Module, Sight
from nova_bridge.sql.writes import Writer


class Connection:
    """Not to be used by two threads at once; a lock makes that an error of order only, never of memory."""

    Error = sqlite3.Error
    Warning = sqlite3.Warning
    InterfaceError = sqlite3.InterfaceError
    DatabaseError = sqlite3.DatabaseError
    DataError = sqlite3.DataError
    OperationalError = sqlite3.OperationalError
    IntegrityError = sqlite3.IntegrityError
    InternalError = sqlite3.InternalError
    ProgrammingError = sqlite3.ProgrammingError
    NotSupportedError = sqlite3.NotSupportedError

    def __init__(self, database: Database, isolation_level: str | None = "", foreign_keys: bool = True) -> None:
        self.database = database
        self.isolation_level = isolation_level
        self.row_factory: Any = None
        self.in_transaction = False
        self.total_changes = 0
        self.lock = threading.RLock()
        self.tx = Transaction(database)
        self.writer = Writer(self.tx)
        self.writer.foreign_keys = foreign_keys
        self.open_tables: dict[str, dict[int, int]] = {}
        self.handles: dict[tuple[int, int], Sight] = {}
        self.changing = False
        self.numbers: dict[Place, int] = {}
        self.take_in_lists = True
        self.column_names: dict[str, Description | None] = {}
        self._functions: list[tuple[str, int, Callable[..., Any], bool]] = []
        self._savepoints: list[tuple[str, int]] = []
        self._begun_by_savepoint = False
        self._engine: apsw.Connection | None = None
        self._schema: Schema | None = None
        self._ddl: Ddl | None = None
        self._closed = False

    # What virtual tables and cursors need.

    def in_lists(self) -> bool:
        """Whether IN lists may be taken at once (FACTS: apsw fails on some)."""
        return self.take_in_lists

    def engine(self) -> apsw.Connection:
        """SQLite with one module per table of the transaction's schema."""
        self._check_open()
        schema = self.tx.schema
        if self._engine is None or self._schema is not schema:
            self._close_engine()
            self._engine = engine = apsw.Connection(":memory:")
            self.column_names.clear()
            engine.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
            for table in schema.tables.values():
                engine.create_module(
                    table.name,
                    Module(self, table),
                    use_bestindex_object=True,
                    use_no_change=True,
                    eponymous_only=True,
                    iVersion=2,
                )
            engine.create_scalar_function(EQ_OR_NULL, eq_or_null, 2, deterministic=True)
            for name, count, function, deterministic in self._functions:
                engine.create_scalar_function(name, function, count, deterministic=deterministic)
            self._schema = schema
        return self._engine

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close(True)
            self._engine = None

    def _check_open(self) -> None:
        if self._closed:
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

    # DB-API.

    def cursor(self, factory: Any = None) -> Cursor:
        """A new cursor."""
        self._check_open()
        return Cursor(self)

    def execute(self, sql: str, parameters: Any = ()) -> Cursor:
        """On a new cursor."""
        return self.cursor().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any) -> Cursor:
        """On a new cursor."""
        return self.cursor().executemany(sql, parameters)

    def commit(self) -> None:
        """Nothing if there is no transaction."""
        self._check_open()
        if self.in_transaction:
            self.end(keep=True)

    def rollback(self) -> None:
        """Costs nothing when nothing was written."""
        self._check_open()
        if self.in_transaction:
            self.end(keep=False)

    def close(self) -> None:
        """Pending changes are dropped."""
        with self.lock:
            self.tx.reset()
            self.in_transaction = False
            self._closed = True
            self._close_engine()

    def interrupt(self) -> None:
        """Stop the running statement, from another thread."""
        if self._engine is not None:
            self._engine.interrupt()

    def create_function(self, name: str, narg: int, func: Callable[..., Any], *, deterministic: bool = False) -> None:
        """A function for SQL."""
        self._functions.append((name, narg, func, deterministic))
        if self._engine is not None:
            self._engine.create_scalar_function(name, func, narg, deterministic=deterministic)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.commit()
        else:
            self.rollback()

    # Transactions.

    def begin(self) -> None:
        """BEGIN."""
        if self.in_transaction:
            raise sqlite3.OperationalError("cannot start a transaction within a transaction")
        if self.tx.touched:
            self.tx.reset()
        self.in_transaction, self._savepoints, self._begun_by_savepoint = True, [], False

    def end(self, keep: bool) -> None:
        """COMMIT or ROLLBACK; over in either case, whatever the store answers."""
        if not self.in_transaction:
            verb = "commit" if keep else "rollback"
            raise sqlite3.OperationalError(f"cannot {verb} - no transaction is active")
        try:
            if keep:
                self._send()
        finally:
            self.in_transaction, self._savepoints = False, []
            self.tx.reset()

    def _send(self) -> None:
        if not self.tx.written:
            return
        try:
            commit(self.tx, self.writer.foreign_keys)
        except DhtError as error:
            # Of what was read for the commit, like a newer catalog; SQLAlchemy knows only the driver's exceptions.
            raise from_store(error) from None

    def end_statement(self) -> None:
        """Outside a transaction each statement is one."""
        if not self.in_transaction:
            try:
                self._send()
            finally:
                self.tx.reset()

    def savepoint(self, name: str) -> None:
        """SAVEPOINT begins a transaction if there is none."""
        if not self.in_transaction:
            self.begin()
            self._begun_by_savepoint = True
        self._savepoints.append((name, len(self.tx.journal)))

    def release(self, name: str) -> None:
        """RELEASE; of the savepoint that began the transaction, COMMIT."""
        index = self._find_savepoint(name)
        del self._savepoints[index:]
        if index == 0 and self._begun_by_savepoint:
            self.end(keep=True)

    def rollback_to(self, name: str) -> None:
        """ROLLBACK TO: the savepoint itself stays."""
        index = self._find_savepoint(name)
        self.tx.rollback_to(self._savepoints[index][1])
        del self._savepoints[index + 1 :]

    def _find_savepoint(self, name: str) -> int:
        for index in range(len(self._savepoints) - 1, -1, -1):
            if self._savepoints[index][0] == name:
                return index
        raise sqlite3.OperationalError(f"no such savepoint: {name}")

    # Schema.

    def define(self, sql: str) -> None:
        """A DDL statement; inside a script it waits for its neighbours."""
        self._commit_pending()
        if self._ddl is not None:
            self._ddl.add(sql)
            return
        ddl = Ddl(self.database)
        ddl.add(sql)
        self._publish(ddl)

    def _commit_pending(self) -> None:
        try:
            self._send()
        finally:
            self.tx.reset()
            self._savepoints, self._begun_by_savepoint = [], False

    def _publish(self, ddl: Ddl) -> None:
        try:
            ddl.run()
        finally:
            self.tx.reset()

    def flush_script(self) -> None:
        """Publish a script's DDL before something that needs it."""
        ddl, self._ddl = self._ddl, None
        if ddl is not None:
            if ddl:
                self._publish(ddl)
            self._ddl = Ddl(self.database)

    def reload_schema(self) -> bool:
        """Learn a newer catalog after a failure. Returns whether running the statement again may help."""
        newest = self.database.reload()
        if newest is self._schema:
            return False
        if not self.in_transaction:
            self.tx.reset()
        elif newest is not self.tx.schema and not self.tx.adopt(newest):
            raise SchemaChanged("a table that this transaction uses has other columns now; run the transaction again")
        return True

    def executescript(self, script: str) -> Cursor:
        """Commits what is pending, then runs the statements, each by itself where the script begins no transaction.

        DDL that follows on DDL is published at once.
        """
        self._check_open()
        cursor = self.cursor()
        with self.lock:
            if self.in_transaction:
                self.end(keep=True)
            try:
                enforced = self.writer.foreign_keys
                digest = hashlib.sha256(f"{enforced} {script}".encode()).digest()
                # Others may have made tables since this process looked.
                fresh = not self.database.reload().definitions
                if fixture.restore(self.database, digest):
                    self.tx.reset()
                    return cursor
                self._run_script(cursor, script)
                # What is kept is the database's content; a script that leaves more than that is run each time.
                if fresh and not self.in_transaction and self.writer.foreign_keys == enforced:
                    fixture.keep(self.database, digest)
            except DhtError as error:
                raise from_store(error) from None
            except apsw.Error as error:
                raise from_sqlite(error) from None
        return cursor

    def _run_script(self, cursor: Cursor, script: str) -> None:
        self._ddl = Ddl(self.database)
        level, self.isolation_level = self.isolation_level, None
        try:
            for statement in statements.split(script):
                cursor.execute(statement)
            self.flush_script()
        finally:
            self._ddl, self.isolation_level = None, level

    def iterdump(self) -> Iterator[str]:
        """The database as a script."""
        yield "BEGIN TRANSACTION;"
        with self.lock:
            definitions = sorted(self.database.schema.definitions.values(), key=lambda d: d.number)
            for definition in definitions:
                yield definition.sql + ";"
                table = self.tx.schema.by_number[definition.number]
                for record in self.tx.find(table, ()):
                    values = ",".join(statements.format_value(v) for v in record.values[: table.width])
                    yield f'INSERT INTO "{definition.name}" VALUES({values});'
            for definition in definitions:
                for _, sql in definition.index_sql:
                    yield sql + ";"
            if not self.in_transaction:
                self.tx.reset()
        yield "COMMIT;"

    def shadow_rows(self, sql: str, parameters: Any, keep: Callable[[Any, list[Any]], None]) -> None:
        """Run a query about the schema; `keep(description, rows)` gets the answer."""

        def run(connection: apsw.Connection) -> None:
            cursor = connection.cursor()
            described: list[Any] = []

            def trace(traced: apsw.Cursor, text: str, bindings: Any) -> bool:
                described.append(traced.get_description())
                return True

            cursor.exec_trace = trace
            rows = cursor.execute(sql, parameters).fetchall()
            keep(described[0] if described else (), rows)

        self.database.query_shadow(run)
