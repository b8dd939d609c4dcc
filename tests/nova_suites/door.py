"""Puts the SQL door in SQLite's place, and the RPC door in that of nova.db.main.api, for Nova's own suites, unedited.

On the in-process store, or, when LUCD_SUITE_SOCKET names a daemon's socket, on its cluster: then each engine that a
test makes has a database of its own there, until it is disposed of. LUCD_SUITE_BUS names the socket of the daemon over
whose bus the calls of the RPC door go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import weakref
from typing import Any

from sqlalchemy.dialects import registry, sqlite
from sqlalchemy.pool import QueuePool

from dht.errors import NotFound
from dht.limits import REQUEST_TIMEOUT_S
from dht.wire.blocking import BlockingClient, SocketStore
from nova_bridge.sql import dbapi
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database
from nova_bridge.sql.dialect import LucdMemoryDialect

SOCKET = os.environ.get("LUCD_SUITE_SOCKET", "")
BUS = os.environ.get("LUCD_SUITE_BUS", "")
CALL_TIMEOUT_S = 60
_named: dict[str, Database] = {}
_client = BlockingClient(SOCKET, REQUEST_TIMEOUT_S)


class ServerPool(QueuePool):
    """Connections to a server. An engine on memory has one, for all greenlets: SQLite's calls never wait for anything,
    so no two of them are ever between the statements of their transactions. Those of a server do wait.

    oslo.db gives SQLite's engines no other pool than its own choice, so it is put in that one's place."""

    def __init__(self, creator: Any, **options: Any) -> None:
        super().__init__(creator, **{**options, "pool_size": 0})

    def dispose(self) -> None:
        """What Nova's fixtures do to have an empty database."""
        super().dispose()
        if self._dialect is not None:
            self._dialect.forget_database()  # type: ignore[attr-defined]


class SqliteByLucd(LucdMemoryDialect):
    """Answers `sqlite://`; the driver's name stays, Nova's fixtures ask for it."""

    driver = "pysqlite"
    supports_statement_cache = True
    _own: Database | None = None

    @classmethod
    def engine_created(cls, engine: Any) -> None:
        super().engine_created(engine)
        if SOCKET:
            chosen = engine.pool
            engine.pool = ServerPool(chosen._creator, _dispatch=chosen.dispatch, dialect=engine.dialect)

    def connect(self, *args: Any, **kwargs: Any) -> Connection:
        """In process, or in a database of the cluster that exists for this engine or this file name."""
        if not SOCKET:
            return dbapi.connect_memory(*args, **kwargs)
        path = str(args[0]) if args else ":memory:"
        if path in {"", ":memory:"}:
            if self._own is None:
                self._own = _make(os.urandom(8).hex())
                weakref.finalize(self, _drop, self._own)
            return Connection(self._own, "", foreign_keys=False)
        if path not in _named:
            _named[path] = _make(hashlib.sha256(f"{os.getpid()} {path}".encode()).hexdigest()[:16])
        return Connection(_named[path], "", foreign_keys=False)

    def forget_database(self) -> None:
        """The next connection finds an empty one."""
        if self._own is not None:
            _drop(self._own)
            self._own = None


def _drop(database: Database) -> None:
    with contextlib.suppress(NotFound):
        database.store.drop_database(database.name)


def _make(name: str) -> Database:
    # One client for all: each keeps connections, and a daemon serves a bounded number of them.
    database = Database(SocketStore(_client), f"suite_{name}", REQUEST_TIMEOUT_S)
    database.store.create_database(database.name)
    database.exists = True
    return database


def install() -> None:
    """Every `sqlite` URL of this process opens a database of the door from now on."""
    sys.modules["lucd_suite_door"] = sys.modules[__name__]
    registry.register("sqlite", "lucd_suite_door", "SqliteByLucd")
    registry.register("sqlite.pysqlite", "lucd_suite_door", "SqliteByLucd")
    sqlite.dialect = SqliteByLucd


def through_rpc() -> None:
    """Every call of Nova's database API goes over the daemon's bus to a server in this process, and back.

    The server has the suite's own databases and its clock, so that what a test arranges is there on both sides.
    """
    import nova.conf
    import nova.test  # registers options of the command line, which cannot be done once it was parsed
    import nova.tests.functional  # decides on monkey-patching before anything else is imported
    import oslo_messaging
    from nova import config, objects

    from nova_bridge.rpc import client
    from nova_bridge.rpc.methods import catalogue
    from nova_bridge.rpc.server import NovaDbEndpoint, Runner, make_server
    from nova_bridge.rpc.worker import Cells

    conf = nova.conf.CONF
    config.parse_args(["suite"], default_config_files=[], configure_db=False, init_rpc=False)
    objects.register_all()
    name, url = f"suite-{os.getpid()}", f"lucd://{BUS}"
    endpoint = NovaDbEndpoint(catalogue(), Runner(Cells("sqlite://")))
    make_server(oslo_messaging.get_rpc_transport(conf, url=url), name, endpoint).start()
    client.install(client.OsloChannel(conf, url, name, CALL_TIMEOUT_S))
    # Each test parses it anew, and some register options before.
    conf.reset()
