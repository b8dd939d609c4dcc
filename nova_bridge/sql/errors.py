"""The store's errors as DB-API exceptions, and SQLite's own words for constraint failures (DESIGN section 11).

The classes are those of the `sqlite3` module, or derive from them, because Nova's and oslo.db's SQLite branches catch
these. Those of our own exist so that the exception filters need no guessing by text.
"""

from __future__ import annotations

import re
import sqlite3

import apsw

from dht.errors import Conflict, DhtError, Indeterminate, Invalid, NotFound, StorageError, Unavailable


class ConflictError(sqlite3.OperationalError):
    """The transaction lost a race and certainly was not applied; running it again is right. Becomes DBDeadlock."""


class UnavailableError(sqlite3.OperationalError):
    """The store could not be asked; nothing was applied. Becomes DBConnectionError."""


class LateDuplicateError(sqlite3.IntegrityError):
    """Another transaction took the unique values after the statement's check; nothing was applied.

    Run again, the statement itself meets the other's row. Becomes DBLateDuplicateEntry.
    """


class IndeterminateError(sqlite3.DatabaseError):
    """Nobody knows whether the transaction was applied. Becomes DBError, which nothing retries."""


_PREFIX = re.compile(r"^\w+Error: ")


def from_store(error: DhtError) -> sqlite3.Error:
    """The exception a DB-API caller gets for the store's error. Constraint failures are named before they come here."""
    match error:
        case Conflict():
            return ConflictError(f"transaction conflict: {error.message}")
        case Indeterminate():
            return IndeterminateError(f"outcome unknown: {error.message}")
        case Unavailable() | StorageError():
            return UnavailableError(f"store unavailable: {error.message}")
        case Invalid():
            return sqlite3.DataError(error.message)
        case NotFound():
            return sqlite3.OperationalError(error.message)
        case _:
            return sqlite3.DatabaseError(error.message)


def from_sqlite(error: apsw.Error) -> sqlite3.Error:
    """The exception of the `sqlite3` module that stock SQLite would have raised."""
    text = _PREFIX.sub("", str(error))
    match error:
        case apsw.ConstraintError() | apsw.MismatchError():
            return sqlite3.IntegrityError(text)
        case apsw.BindingsError() | apsw.ThreadingViolationError() | apsw.ConnectionClosedError():
            return sqlite3.ProgrammingError(text)
        case apsw.SQLError() | apsw.BusyError() | apsw.LockedError() | apsw.SchemaChangeError() | apsw.InterruptError():
            return sqlite3.OperationalError(text)
        case _:
            return sqlite3.DatabaseError(text)


def unique_failed(
    table: str, columns: tuple[str, ...], kind: type[sqlite3.IntegrityError] = sqlite3.IntegrityError
) -> sqlite3.IntegrityError:
    """SQLite's words for a duplicate; oslo.db reads the columns from them."""
    return kind("UNIQUE constraint failed: " + ", ".join(f"{table}.{c}" for c in columns))


def not_null_failed(table: str, column: str) -> sqlite3.IntegrityError:
    """SQLite's words for a missing value."""
    return sqlite3.IntegrityError(f"NOT NULL constraint failed: {table}.{column}")


class ForeignKeyError(sqlite3.IntegrityError):
    """SQLite's words, with what MySQL would say beside them, for the exception filter."""

    def __init__(self, table: str = "", columns: tuple[str, ...] = (), parent: str = "", constraint: str = "") -> None:
        super().__init__("FOREIGN KEY constraint failed")
        self.table, self.columns, self.parent, self.constraint = table, columns, parent, constraint


class LateForeignKeyError(ForeignKeyError):
    """Another transaction took the parent away, or gave it a child, after the statement's check; nothing was applied.

    Run again, the statement itself meets what the other did. Becomes DBLateReferenceError.
    """
