"""DB-API 2.0 module, as SQLAlchemy's SQLite dialect expects one; exceptions are those of `sqlite3`."""

from __future__ import annotations

import os
import sqlite3
import threading
from sqlite3 import (
    Binary,
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    Warning,
)
from typing import Any

import apsw

from dht.errors import DhtError, Unavailable
from dht.limits import REQUEST_TIMEOUT_S
from dht.register.memory import MemoryStore
from dht.requests import BlockingStore
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.cursor import Cursor
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import from_store

apilevel = "2.0"
threadsafety = 1
paramstyle = "qmark"
sqlite_version = apsw.sqlite_lib_version()
sqlite_version_info = tuple(int(part) for part in sqlite_version.split("."))
version = apsw.apsw_version()
PARSE_DECLTYPES = sqlite3.PARSE_DECLTYPES
PARSE_COLNAMES = sqlite3.PARSE_COLNAMES

DEFAULT_SOCKET = "/run/lucd/lucd.sock"
MEMORY_DATABASE = "memory"

_databases: dict[tuple[int, str, str], Database] = {}
_lock = threading.Lock()


def _database(kind: str, name: str, make: Any) -> Database:
    """One `Database` per process, place and name."""
    key = (os.getpid(), kind, name)
    with _lock:
        found = _databases.get(key)
        if found is None:
            found = _databases[key] = make()
        return found


def connect(
    database: str,
    socket: str = DEFAULT_SOCKET,
    timeout: float = REQUEST_TIMEOUT_S,
    isolation_level: str | None = "",
    **ignored: Any,
) -> Connection:
    """A connection through the daemon's socket. `timeout`: seconds for each request to the daemon."""
    from dht.wire.blocking import BlockingClient, SocketStore

    def make() -> Database:
        return Database(SocketStore(BlockingClient(socket, timeout)), database, timeout)

    return _open(_database(socket, database, make), isolation_level, foreign_keys=True)


def connect_memory(database: str = ":memory:", isolation_level: str | None = "", **ignored: Any) -> Connection:
    """A connection to a store in this process; without a name, to one of its own. Foreign keys as stock SQLite: off."""

    def make() -> Database:
        return memory_database(MemoryStore())

    private = database in {"", ":memory:"}
    found = make() if private else _database("memory", database, make)
    return _open(found, isolation_level, foreign_keys=False)


def memory_database(store: BlockingStore) -> Database:
    """A database in a store of this process, created if need be."""
    store.create_database(MEMORY_DATABASE)
    return Database(store, MEMORY_DATABASE)


def forget_memory(database: str) -> None:
    """Drop a named in-process database."""
    with _lock:
        _databases.pop((os.getpid(), "memory", database), None)


def _open(database: Database, isolation_level: str | None, foreign_keys: bool) -> Connection:
    """Raises UnavailableError where nothing is known of the catalog and nobody can be asked."""
    try:
        database.reload()
    except Unavailable as error:
        # Whoever commits or searches says which catalog it knows, so one that is known does until it is refused.
        if not database.known:
            raise from_store(error) from None
    except DhtError as error:
        raise from_store(error) from None
    return Connection(database, isolation_level, foreign_keys)


__all__ = [
    "PARSE_COLNAMES",
    "PARSE_DECLTYPES",
    "Binary",
    "Connection",
    "Cursor",
    "DataError",
    "DatabaseError",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "Warning",
    "apilevel",
    "connect",
    "connect_memory",
    "paramstyle",
    "sqlite_version",
    "sqlite_version_info",
    "threadsafety",
    "version",
]
