"""Connections that are opened while the database's home is out of reach."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dht.errors import Unavailable
from dht.model import Ballot, GroupKey, GroupRead
from dht.register.memory import MemoryStore
from nova_bridge.sql import dbapi
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import UnavailableError


class CutStore(MemoryStore):
    cut = False

    def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        if self.cut:
            raise Unavailable("PoP b cannot be asked")
        return super().read(keys, known, timeout_s, near)


def test_connection_is_opened_on_the_known_catalog_and_its_statements_say_what_is_out_of_reach() -> None:
    store = CutStore()
    store.create_database("far")
    database = Database(store, "far")
    with dbapi._open(database, "", foreign_keys=True) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text VARCHAR(20))")
        connection.execute("INSERT INTO notes VALUES (1, 'one')")
        connection.commit()
    store.cut = True
    opened = dbapi._open(database, "", foreign_keys=True)
    with pytest.raises(UnavailableError, match="PoP b cannot be asked"):
        opened.execute("SELECT text FROM notes WHERE id = 1").fetchall()
    opened.rollback()
    store.cut = False
    assert opened.execute("SELECT text FROM notes WHERE id = 1").fetchall() == [("one",)]
    opened.close()


def test_connection_is_refused_while_nothing_is_known_of_the_catalog() -> None:
    store = CutStore()
    store.create_database("far")
    store.cut = True
    with pytest.raises(UnavailableError, match="PoP b cannot be asked"):
        dbapi._open(Database(store, "far"), "", foreign_keys=True)
