"""The SQL door in three PoPs of one database: rows live where they were made, statements reach them from anywhere."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dht.errors import Unavailable
from dht.model import FindQuery
from dht.register.spanning import SpanningStore
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database
from tests.dht.register.spanning_cluster import Spanning

DATABASE = "d"
TABLES = (
    "CREATE TABLE cell_mappings (id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL UNIQUE, name VARCHAR(255))",
    """CREATE TABLE instance_mappings (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36) NOT NULL UNIQUE,
    cell_id INTEGER REFERENCES cell_mappings(id), project_id VARCHAR(255))""",
    "CREATE TABLE build_requests (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36) UNIQUE, project_id VARCHAR(255))",
)
MAP = "INSERT INTO instance_mappings (instance_uuid, cell_id, project_id) VALUES (?, ?, ?)"


class BlockingPop:
    """`dht.requests.BlockingStore` of one PoP's daemon."""

    def __init__(self, pops: Spanning, pop: str) -> None:
        self.places = pops.places(pop)
        self.loop = asyncio.new_event_loop()
        self._store = SpanningStore(pops.registry, self.places, pops.pops[pop])  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "home":
            return lambda database, timeout_s: "global"
        serve = getattr(self._store, name)
        return lambda *arguments, **named: self.loop.run_until_complete(serve(*arguments, **named))


class Doors:
    """A connection in each PoP."""

    def __init__(self) -> None:
        self.pops = Spanning("a", "b", "c")
        self.pops.home.memory.drop_database(DATABASE)
        self.pops.home.memory.create_database(DATABASE, home="global")
        self.stores = {name: BlockingPop(self.pops, name) for name in self.pops.pops}
        self.connections = {
            name: Connection(Database(store, DATABASE), "", True)  # type: ignore[arg-type]
            for name, store in self.stores.items()
        }
        for statement in TABLES:
            self["a"].execute(statement)
        self["b"].execute("INSERT INTO cell_mappings (uuid, name) VALUES ('u', 'cell')")
        self["b"].commit()

    def __getitem__(self, pop: str) -> Connection:
        return self.connections[pop]

    def boot(self, pop: str, *uuids: str, project: str = "p", cell: int | None = 1) -> None:
        for uuid in uuids:
            self[pop].execute("INSERT INTO build_requests (instance_uuid, project_id) VALUES (?, ?)", (uuid, project))
            self[pop].execute(MAP, (uuid, cell, project))
        self[pop].commit()

    def rows(self, pop: str, sql: str, *parameters: object) -> list[Any]:
        found = self[pop].execute(sql, parameters).fetchall()
        self[pop].commit()
        return found

    def close(self) -> None:
        for pop, store in self.stores.items():
            self[pop].close()
            store.loop.close()


@pytest.fixture
def doors() -> Iterator[Doors]:
    made = Doors()
    yield made
    made.close()


def test_row_made_in_one_pop_is_read_changed_and_listed_from_the_others(doors: Doors) -> None:
    doors.boot("a", "one")
    assert doors.rows("b", "SELECT project_id FROM instance_mappings WHERE instance_uuid = 'one'") == [("p",)]
    doors["b"].execute("UPDATE instance_mappings SET project_id = 'q' WHERE instance_uuid = 'one'")
    doors["b"].commit()
    doors.boot("c", "two", project="q")
    for pop in "abc":
        joined = doors.rows(
            pop,
            "SELECT m.instance_uuid, c.name FROM instance_mappings m LEFT JOIN cell_mappings c ON m.cell_id = c.id"
            " WHERE m.project_id = 'q' ORDER BY m.id",
        )
        assert sorted(joined) == [("one", "cell"), ("two", "cell")]
    homes = {
        pop: len(store.memory.find(query()).rows) for pop, store in doors.pops.pops.items() if store.memory.homes()
    }
    assert homes == {"a": 1, "c": 1}, "rows live where they were made"


def query() -> FindQuery:
    """All instance mappings."""
    return FindQuery(DATABASE, 17, 0)


def test_ids_of_the_pops_never_meet(doors: Doors) -> None:
    for number in range(3):
        for pop in "abc":
            doors.boot(pop, f"{pop}{number}")
    ids = [n for (n,) in doors.rows("b", "SELECT id FROM instance_mappings ORDER BY id")]
    assert len(set(ids)) == 9
    assert ids == sorted(ids)
    assert {n % 256 for n in ids} == {0, 1, 2}


def test_order_and_limit_go_over_all_pops(doors: Doors) -> None:
    for number, pop in enumerate("abcabc"):
        doors.boot(pop, f"u{number}")
    found = doors.rows("b", "SELECT instance_uuid FROM instance_mappings ORDER BY instance_uuid DESC LIMIT 2")
    assert found == [("u5",), ("u4",)]
    assert doors.rows("c", "SELECT count(*) FROM instance_mappings WHERE project_id = 'p'") == [(6,)]


def test_cut_off_pop_boots_and_deletes_its_own_and_knows_what_it_does_not_know(doors: Doors) -> None:
    doors.boot("a", "near")
    doors.boot("b", "far")
    assert doors.rows("a", "SELECT count(*) FROM instance_mappings") == [(2,)]
    doors.pops.cut("b", "c")
    doors.pops.home.away = Unavailable("domain global cannot be asked")
    doors.boot("a", "new", cell=None)
    assert doors.rows("a", "SELECT project_id FROM instance_mappings WHERE instance_uuid = 'new'") == [("p",)]
    doors["a"].execute("DELETE FROM build_requests WHERE instance_uuid = 'near'")
    doors["a"].commit()
    ((number,),) = doors.rows("a", "SELECT id FROM instance_mappings WHERE instance_uuid = 'near'")
    started = Connection(Database(doors.stores["a"], DATABASE), "", False)  # type: ignore[arg-type]
    started.execute("UPDATE instance_mappings SET project_id = 'p' WHERE id = ?", (number,))
    started.commit()
    started.close()
    assert sorted(doors.rows("a", "SELECT instance_uuid FROM instance_mappings")) == [("near",), ("new",)]
    assert doors.stores["a"].places.counters["partial_finds"] == 1
    for statement in (
        "SELECT * FROM instance_mappings WHERE instance_uuid = 'far'",
        "SELECT * FROM instance_mappings WHERE instance_uuid = 'nobody'",
        "SELECT * FROM instance_mappings WHERE id = 77",
        "UPDATE instance_mappings SET project_id = 'x' WHERE project_id = 'p'",
    ):
        with pytest.raises(sqlite3.OperationalError, match=r"cut off|cannot be asked"):
            doors["a"].execute(statement).fetchall()
        doors["a"].rollback()
    doors.pops.heal()
    doors.pops.home.away = None
    assert doors.rows("a", "SELECT * FROM instance_mappings WHERE instance_uuid = 'nobody'") == []
    assert len(doors.rows("a", "SELECT * FROM instance_mappings")) == 3


def test_three_groups_of_one_boot_are_made_together_or_not_at_all(doors: Doors) -> None:
    doors.boot("a", "one")
    doors["a"].execute("INSERT INTO build_requests (instance_uuid, project_id) VALUES ('two', 'p')")
    with pytest.raises(sqlite3.IntegrityError, match=r"instance_mappings\.instance_uuid"):
        doors["a"].execute(MAP, ("one", 1, "p"))
    doors["a"].rollback()
    assert doors.rows("b", "SELECT count(*) FROM build_requests") == [(1,)]


def test_update_over_pops_is_refused_and_a_delete_goes_in_pieces(doors: Doors) -> None:
    doors.boot("a", "one")
    doors.boot("b", "two")
    doors["c"].execute("UPDATE instance_mappings SET project_id = 'x'")
    with pytest.raises(sqlite3.Error, match="live in a and b"):
        doors["c"].commit()
    assert doors.rows("c", "SELECT DISTINCT project_id FROM instance_mappings") == [("p",)]
    doors["c"].execute("DELETE FROM instance_mappings WHERE instance_uuid IN ('one', 'two')")
    doors["c"].commit()
    assert doors.rows("a", "SELECT count(*) FROM instance_mappings") == [(0,)]


def test_local_and_global_rows_in_one_transaction_are_refused(doors: Doors) -> None:
    doors["a"].execute(MAP, ("one", 1, "p"))
    doors["a"].execute("UPDATE cell_mappings SET name = 'other' WHERE uuid = 'u'")
    with pytest.raises(sqlite3.Error, match="live in a and global"):
        doors["a"].commit()
    assert doors.rows("b", "SELECT name FROM cell_mappings") == [("cell",)]
    assert doors.rows("b", "SELECT count(*) FROM instance_mappings") == [(0,)]


def test_parent_is_not_deleted_while_a_row_of_another_pop_refers_to_it(doors: Doors) -> None:
    doors.boot("c", "one")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        doors["a"].execute("DELETE FROM cell_mappings WHERE uuid = 'u'")


def test_columns_and_indexes_come_to_tables_with_rows_in_several_pops(doors: Doors) -> None:
    doors.boot("a", "one")
    doors.boot("b", "two")
    doors["c"].execute("ALTER TABLE instance_mappings ADD COLUMN queued INTEGER")
    doors["c"].execute("CREATE INDEX by_queued ON instance_mappings (queued)")
    doors["b"].execute("UPDATE instance_mappings SET queued = 1 WHERE instance_uuid = 'one'")
    doors["b"].commit()
    assert doors.rows("a", "SELECT instance_uuid FROM instance_mappings WHERE queued = 1") == [("one",)]


def test_batch_copy_of_alembic_moves_no_row_to_another_pop(doors: Doors) -> None:
    doors.boot("a", "one")
    doors.boot("b", "two")
    connection = doors["c"]
    connection.execute(
        "CREATE TABLE _alembic_tmp_instance_mappings (id INTEGER PRIMARY KEY,"
        " instance_uuid VARCHAR(36) NOT NULL UNIQUE, project_id VARCHAR(255))"
    )
    connection.execute(
        "INSERT INTO _alembic_tmp_instance_mappings SELECT id, instance_uuid, project_id FROM instance_mappings"
    )
    connection.commit()
    connection.execute("DROP TABLE instance_mappings")
    connection.execute("ALTER TABLE _alembic_tmp_instance_mappings RENAME TO instance_mappings")
    for pop in "abc":
        assert sorted(doors.rows(pop, "SELECT instance_uuid FROM instance_mappings")) == [("one",), ("two",)]
    doors.pops.cut("b", "c")
    assert doors.rows("a", "SELECT instance_uuid FROM instance_mappings") == [("one",)]


def test_dropped_table_is_cleared_in_every_pop(doors: Doors) -> None:
    doors.boot("a", "one")
    doors.boot("b", "two")
    doors["c"].execute("DROP TABLE instance_mappings")
    for pop in "ab":
        assert not doors.pops.pops[pop].memory.find(query()).rows


def test_process_that_starts_in_a_cut_off_pop_has_the_catalog_of_its_shard(doors: Doors) -> None:
    doors.boot("a", "one")
    doors.pops.home.away = Unavailable("domain global cannot be asked")
    doors.pops.cut("b", "c")
    started = Connection(Database(doors.stores["a"], DATABASE), "", False)  # type: ignore[arg-type]
    assert started.execute("SELECT instance_uuid FROM instance_mappings").fetchall() == [("one",)]
    started.execute("INSERT INTO instance_mappings (instance_uuid) VALUES ('two')")
    started.commit()
    started.close()
