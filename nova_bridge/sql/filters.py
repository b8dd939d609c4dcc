"""oslo.db's exceptions for ours: what MySQL's filters do for MySQL (DESIGN section 11).

oslo.db picks filters by dialect name, which is SQLite's; these look at the class of the driver's exception first, so
stock SQLite in the same process is not affected.
"""

from __future__ import annotations

from typing import Any

from oslo_db import exception
from oslo_db.sqlalchemy import exc_filters
from sqlalchemy import exc

from nova_bridge.sql.errors import (
    ConflictError,
    ForeignKeyError,
    IndeterminateError,
    LateDuplicateError,
    LateForeignKeyError,
    UnavailableError,
)

_installed = False


class DBLateDuplicateEntry(exception.DBDuplicateEntry, exception.DBDeadlock):
    """A duplicate that only the commit met, where the code that expects one at its INSERT no longer watches.

    Whoever handles DBDuplicateEntry still catches it; whoever runs deadlocked transactions again (wrap_db_retry, the
    RPC door's worker) does so here too, and then meets the other's row at the statement, as on MySQL.
    """


class DBLateReferenceError(exception.DBReferenceError, exception.DBDeadlock):
    """A foreign key that only the commit found broken: what holds of DBLateDuplicateEntry holds of it."""


def install() -> None:
    """Register the filters, once, ahead of oslo.db's own for SQLite."""
    global _installed
    if _installed:
        return
    _installed = True
    _first(
        exc.OperationalError, _operational, r"^.*(?:transaction conflict|transaction was interrupted|store unavailable)"
    )
    _first(exc.DatabaseError, _indeterminate, r"^.*outcome unknown: ")
    _first(exc.IntegrityError, _late_duplicate, r"^.*UNIQUE constraint failed: ")
    _first(exc.IntegrityError, _foreign_key, r"^.*FOREIGN KEY constraint failed")


def _first(kind: type[Exception], function: Any, pattern: str) -> None:
    exc_filters.filters("sqlite", kind, pattern)(function)
    registered = exc_filters._registry["sqlite"][kind]
    registered.insert(0, registered.pop())


def _operational(error: Any, match: Any, engine_name: str, is_disconnect: bool) -> None:
    if isinstance(error.orig, ConflictError):
        raise exception.DBDeadlock(error)
    if isinstance(error.orig, UnavailableError):
        raise exception.DBConnectionError(error)


def _indeterminate(error: Any, match: Any, engine_name: str, is_disconnect: bool) -> None:
    if isinstance(error.orig, IndeterminateError):
        raise exception.DBError(error)


def _late_duplicate(error: Any, match: Any, engine_name: str, is_disconnect: bool) -> None:
    if isinstance(error.orig, LateDuplicateError):
        columns = [name.split(".")[-1] for name in str(error.orig).split(": ", 1)[1].split(", ")]
        raise DBLateDuplicateEntry(columns, error)


def _foreign_key(error: Any, match: Any, engine_name: str, is_disconnect: bool) -> None:
    if isinstance(error.orig, ForeignKeyError) and error.orig.table:
        failed = error.orig
        kind = DBLateReferenceError if isinstance(failed, LateForeignKeyError) else exception.DBReferenceError
        raise kind(failed.table, failed.constraint, ", ".join(failed.columns), failed.parent, error)
