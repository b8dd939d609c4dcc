"""DDL beside other processes: writers that go on, statements that die half way, tables that go while rows come."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dht.model import FindQuery
from dht.rows import split_group_key
from nova_bridge.sql import column_rows, ddl, unique_rows
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError
from nova_bridge.sql.schema import ENTRY_TABLE, UNIQUE_FAMILY
from tests.laboratory import wait_until
from tests.nova_bridge.sql.conftest import CountingStore

Connect = Callable[..., Connection]


class Died(Exception):
    """The process that ran the statement."""


def rows(connection: Connection, sql: str) -> list[object]:
    return connection.execute(sql).fetchall()


def entries(store: CountingStore, connection: Connection) -> int:
    """Unique entries of all tables."""
    found = store.find(FindQuery("cell", ENTRY_TABLE, connection.database.reload().version))
    return sum(split_group_key(row.group)[1] == UNIQUE_FAMILY for row in found.rows)


@pytest.fixture
def door(connect: Connect) -> Connection:
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b INTEGER)")
    connection.execute("INSERT INTO t (a, b) VALUES ('x', 1), ('y', 2), ('z', 2)")
    return connection


def test_refused_unique_index_leaves_the_catalog_as_it_was(door: Connection) -> None:
    before = door.database.reload()
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.b"):
        door.execute("CREATE UNIQUE INDEX ub ON t (b)")
    assert door.database.reload().definitions == before.definitions


def test_duplicate_that_came_after_the_early_check_takes_the_index_out_again(
    door: Connection, connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's statement comes between the check and the catalog, so it knows nothing of the index."""
    other = connect(isolation_level=None)
    change = door.database.change

    def late(*args: object) -> object:
        monkeypatch.setattr(door.database, "change", change)
        other.execute("INSERT INTO t (a) VALUES ('x')")
        return change(*args)

    monkeypatch.setattr(door.database, "change", late)
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
        door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    assert [i.kind for i in door.database.reload().definitions["t"].indexes] == []
    assert entries(store, door) == 0
    connect(isolation_level=None).execute("INSERT INTO t (a) VALUES ('x')")
    door.execute("DELETE FROM t WHERE a = 'x' AND id > 1")
    door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    assert rows(connect(), "SELECT id FROM t WHERE a = 'x'") == [(1,)]


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        ("ALTER TABLE t ADD COLUMN c TEXT NOT NULL", "Cannot add a NOT NULL column with default value NULL"),
        ("ALTER TABLE t ADD c DATETIME DEFAULT CURRENT_TIMESTAMP", "Cannot add a column with non-constant default"),
        ("ALTER TABLE t ALTER COLUMN a SET NOT NULL", r"NOT NULL constraint failed: t\.a"),
    ],
)
def test_row_that_came_after_the_check_of_a_column_takes_the_column_back(
    door: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch, statement: str, refusal: str
) -> None:
    """The writer's statement comes between the check and the catalog, so it knows nothing of the column."""
    door.execute("DELETE FROM t")
    before = door.database.reload()
    other = connect(isolation_level=None)
    change = door.database.change

    def late(*args: object) -> object:
        monkeypatch.setattr(door.database, "change", change)
        other.execute("INSERT INTO t (b) VALUES (7)")
        return change(*args)

    monkeypatch.setattr(door.database, "change", late)
    with pytest.raises(sqlite3.Error, match=refusal):
        door.execute(statement)
    assert door.database.reload().definitions["t"].columns == before.definitions["t"].columns
    connect(isolation_level=None).execute("INSERT INTO t (b) VALUES (8)")
    assert [row[1:] for row in rows(connect(), "SELECT * FROM t ORDER BY b")] == [(None, 7), (None, 8)]
    connect(isolation_level=None).execute("DELETE FROM t")
    door.execute(statement)
    assert door.database.reload().definitions["t"].columns != before.definitions["t"].columns


def test_column_that_is_taken_back_takes_the_indexes_of_its_script_with_it(
    door: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.execute("DELETE FROM t")
    change = door.database.change

    def late(*args: object) -> object:
        monkeypatch.setattr(door.database, "change", change)
        connect(isolation_level=None).execute("INSERT INTO t (b) VALUES (7)")
        return change(*args)

    monkeypatch.setattr(door.database, "change", late)
    with pytest.raises(sqlite3.OperationalError, match="Cannot add a NOT NULL column"):
        door.executescript(
            "CREATE INDEX ib ON t (b); ALTER TABLE t ADD COLUMN c TEXT NOT NULL; CREATE UNIQUE INDEX uc ON t (c);"
            "CREATE INDEX ic ON t (a) WHERE c IS NOT NULL"
        )
    definition = door.database.reload().definitions["t"]
    assert [name for name, _ in definition.index_sql] == ["ib"]
    assert [column.name for column in definition.columns] == ["id", "a", "b"]


def test_column_is_looked_at_again_behind_the_fence(door: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made under the older catalog may still be on its way when the new one is published."""
    seen: list[str] = []
    fence, check = door.database.fence, column_rows.check
    monkeypatch.setattr(door.database, "fence", lambda *args: (seen.append("fence"), fence(*args)))
    monkeypatch.setattr(column_rows, "check", lambda *args, **more: (seen.append("check"), check(*args, **more)))
    door.execute("ALTER TABLE t ALTER COLUMN a SET NOT NULL")
    assert seen == ["check", "fence", "check"]
    seen.clear()
    door.execute("ALTER TABLE t ADD COLUMN c TEXT NOT NULL DEFAULT 'c'")
    assert seen == ["check"], "nothing is promised of the rows that are there"


@pytest.mark.parametrize(
    "statement", ["CREATE UNIQUE INDEX ua ON t (a)", "create unique index if not exists ua on t (a);"]
)
@pytest.mark.parametrize("after", [0, 2])
def test_unique_index_whose_process_died_is_finished_by_the_same_statement(
    door: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch, statement: str, after: int
) -> None:
    reserve, count = unique_rows._reserve, [0]

    def die(*args: object) -> None:
        count[0] += 1
        if count[0] > after:
            raise Died
        reserve(*args)

    monkeypatch.setattr(unique_rows, "_reserve", die)
    with pytest.raises(Died):
        door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    monkeypatch.undo()
    other = connect(isolation_level=None)
    assert rows(other, "SELECT b FROM t WHERE a = 'z'") == [(2,)]
    other.execute("DELETE FROM t WHERE a = 'z'")
    other.execute("UPDATE t SET a = 'w' WHERE a = 'y'")
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        other.execute("CREATE UNIQUE INDEX ua ON t (b)")
    other.execute(statement)
    third = connect(isolation_level=None)
    assert rows(third, "SELECT a, b FROM t WHERE a IN ('w', 'x') ORDER BY a") == [("w", 2), ("x", 1)]
    third.execute("INSERT INTO t (a) VALUES ('y'), ('z')")
    for taken in ("w", "x", "y", "z"):
        with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
            third.execute("INSERT INTO t (a) VALUES (?)", (taken,))
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        other.execute("CREATE UNIQUE INDEX ua ON t (a)")


def _leave_index_unfinished(door: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index `ua` is published, and no row is entered in it."""

    def die(*args: object) -> None:
        raise Died

    monkeypatch.setattr(unique_rows, "_reserve", die)
    with pytest.raises(Died):
        door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    monkeypatch.undo()


def test_unfinished_unique_index_that_a_script_drops_and_makes_again_is_there(
    door: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave_index_unfinished(door, monkeypatch)
    door.executescript("DROP INDEX ua; CREATE UNIQUE INDEX ua ON t (a)")
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
        door.execute("INSERT INTO t (a) VALUES ('x')")
    assert [name for table in door.database.schema.tables.values() for name, _ in table.definition.index_sql] == ["ua"]


def test_index_on_a_column_that_was_added_with_a_default_is_built(door: Connection, connect: Connect) -> None:
    door.execute("DELETE FROM t WHERE a != 'x'")
    door.execute("ALTER TABLE t ADD COLUMN c TEXT DEFAULT 'd'")
    door.execute("CREATE UNIQUE INDEX uc ON t (c)")
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.c"):
        connect().execute("INSERT INTO t (a) VALUES ('y')")


@pytest.mark.parametrize("beside", ["CREATE TABLE b (id INTEGER PRIMARY KEY)", "DROP TABLE t"])
def test_statement_of_another_thread_of_the_process_comes_between(
    door: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """What the one has read of the catalog is not the newest that the process knows any more."""
    database = door.database
    other = Connection(database, None, True)
    preview = database.preview

    def late(*args: Any) -> object:
        monkeypatch.setattr(database, "preview", preview)
        other.execute(beside)
        return preview(*args)

    monkeypatch.setattr(database, "preview", late)
    door.execute("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    other.close()
    names = {name for (name,) in connect().execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == ({"t", "b", "u"} if "CREATE" in beside else {"u"})


@pytest.mark.parametrize(
    "beside",
    ["ALTER TABLE t ADD COLUMN c TEXT; CREATE UNIQUE INDEX uc ON t (c)", "ALTER TABLE t RENAME COLUMN a TO z"],
)
def test_unique_index_is_gone_on_with_while_another_thread_changes_its_table(
    door: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """What the process knows of the table by then is not what was read of the catalog."""

    _leave_index_unfinished(door, monkeypatch)
    database = door.database
    other = Connection(database, None, True)
    reload = database.reload

    def late() -> object:
        monkeypatch.setattr(database, "reload", reload)
        read = reload()
        other.executescript(beside)
        return read

    monkeypatch.setattr(database, "reload", late)
    door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    other.close()
    column = "z" if "RENAME" in beside else "a"
    with pytest.raises(sqlite3.IntegrityError, match=rf"UNIQUE constraint failed: t\.{column}"):
        connect().execute(f"INSERT INTO t ({column}) VALUES ('x')")


def test_dropped_table_loses_its_rows_and_entries_and_what_came_late(
    door: Connection, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    old = door.database.schema.by_number[16]
    clear = ddl.rows_left.clear
    monkeypatch.setattr(ddl.rows_left, "clear", lambda *args: False)
    door.execute("DROP TABLE t")
    monkeypatch.setattr(ddl.rows_left, "clear", clear)
    assert len(unique_rows.all_rows(door.database, old)) == entries(store, door) == 3
    with pytest.raises(sqlite3.OperationalError, match="no such table: t"):
        door.execute("SELECT * FROM t")
    door.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT UNIQUE)")
    assert unique_rows.all_rows(door.database, old) == []
    assert entries(store, door) == 0
    door.execute("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    assert not door.database.reload().dropped


def test_drop_that_is_refused_leaves_the_rows(door: Connection) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        door.executescript("DROP TABLE t; DROP TABLE u")
    assert len(rows(door, "SELECT * FROM t")) == 3


def test_table_that_replaces_another_of_its_name_takes_nothing_over(door: Connection) -> None:
    old = door.database.schema.by_number[16]
    door.execute("CREATE TABLE new (id INTEGER PRIMARY KEY, a TEXT)")
    door.execute("INSERT INTO new (a) VALUES ('n')")
    door.executescript("DROP TABLE t; ALTER TABLE new RENAME TO t")
    assert rows(door, "SELECT a FROM t") == [("n",)]
    assert unique_rows.all_rows(door.database, old) == []


def test_writers_go_on_while_the_schema_changes(door: Connection, connect: Connect) -> None:
    """Each of them keeps what it was told: rows that were inserted are there, by every index, each value once."""
    stop = threading.Event()
    written: list[set[str]] = [set(), set(), set()]
    broken: list[BaseException] = []

    def write(number: int) -> None:
        connection = connect(isolation_level=None)
        done, i = written[number], 0
        while not stop.is_set():
            i += 1
            value = f"{number}-{i}"
            try:
                connection.execute("INSERT INTO t (a, b) VALUES (?, ?)", (value, number))
                done.add(value)
                if i % 3 == 0:
                    connection.execute("UPDATE t SET a = ? WHERE a = ?", (f"{value}'", value))
                    done.symmetric_difference_update((value, f"{value}'"))
                elif i % 7 == 0:
                    connection.execute("DELETE FROM t WHERE a = ?", (value,))
                    done.discard(value)
            except ConflictError:
                continue
            except BaseException as error:
                broken.append(error)
                return

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: broken or min(map(len, written)) > 1, 60.0, "a writer writes nothing")
    for statement in (
        "CREATE UNIQUE INDEX ua ON t (a)",
        "ALTER TABLE t ADD COLUMN c TEXT DEFAULT 'c'",
        "CREATE INDEX ib ON t (b)",
        "DROP INDEX ua",
        "CREATE UNIQUE INDEX ua ON t (a, b)",
        "CREATE UNIQUE INDEX uaa ON t (a)",
    ):
        door.execute(statement)
    stop.set()
    for thread in threads:
        thread.join()
    assert not broken
    reader = connect(isolation_level=None)
    for number, values in enumerate(written):
        assert values
        assert {a for (a,) in rows(reader, f"SELECT a FROM t WHERE b = {number}")} - {"x", "y", "z"} == values
        for value in sorted(values):
            assert len(rows(reader, f"SELECT id FROM t WHERE a = '{value.replace(chr(39), chr(39) * 2)}'")) == 1
            with pytest.raises(sqlite3.IntegrityError):
                reader.execute("INSERT INTO t (a) VALUES (?)", (value,))


@pytest.mark.parametrize("index", ["CREATE UNIQUE INDEX ua ON t (a)", "CREATE INDEX ia ON t (a)"])
def test_transaction_begun_before_an_index_keeps_it(door: Connection, connect: Connect, index: str) -> None:
    other = connect()
    other.execute("INSERT INTO t (a) VALUES ('w')")
    other.execute("UPDATE t SET a = 'v' WHERE a = 'y'")
    door.execute(index)
    other.commit()
    reader = connect()
    assert rows(reader, "SELECT a FROM t WHERE a IN ('v', 'w', 'y') ORDER BY a") == [("v",), ("w",)]
    door.execute("INSERT INTO t (a) VALUES ('y')")
    if "UNIQUE" in index:
        with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
            reader.execute("INSERT INTO t (a) VALUES ('v')")


def test_transaction_begun_before_a_unique_index_that_it_breaks_is_refused(door: Connection, connect: Connect) -> None:
    other = connect()
    other.execute("INSERT INTO t (a) VALUES ('x')")
    door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
        other.commit()
    assert rows(connect(), "SELECT id FROM t WHERE a = 'x'") == [(1,)]


def test_transaction_begun_before_a_column_or_a_drop_runs_again(door: Connection, connect: Connect) -> None:
    for change in ("ALTER TABLE t ADD COLUMN c TEXT DEFAULT 'c'", "DROP TABLE t"):
        other = connect()
        other.execute("INSERT INTO t (a) VALUES ('w')")
        door.execute(change)
        with pytest.raises(ConflictError):
            other.commit()
