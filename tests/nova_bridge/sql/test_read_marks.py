"""What a transaction read, by whatever statement, guards what it writes later (DESIGN section 6, Writes)."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable

import pytest

from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError

Connect = Callable[..., Connection]

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, host VARCHAR(255),"
    " task_state VARCHAR(255), vcpus INTEGER, UNIQUE (uuid))",
    "CREATE TABLE notes (id INTEGER NOT NULL PRIMARY KEY, text VARCHAR(255), size INTEGER)",
]


@pytest.fixture
def two(connect: Connect) -> tuple[Connection, Connection]:
    first = connect()
    for sql in SCHEMA:
        first.execute(sql)
    first.execute("INSERT INTO instances (id, uuid, host, vcpus) VALUES (1, 'u1', 'h1', 4), (2, 'u2', 'h1', 2)")
    first.execute("INSERT INTO notes (id, text, size) VALUES (1, 'a', 4), (2, 'b', 2)")
    first.commit()
    return first, connect()


@pytest.mark.parametrize(
    "reading",
    [
        # In a subselect, about another row than the one that is changed.
        "UPDATE notes SET text = (SELECT i.vcpus FROM instances i WHERE i.id = 2) WHERE id = 1",
        "UPDATE notes SET text = 'x' WHERE size IN (SELECT vcpus FROM instances)",
        "DELETE FROM notes WHERE size > 100 OR EXISTS (SELECT 1 FROM instances WHERE vcpus + 0 = 99)",
        # In a WHERE that the row does not meet.
        "UPDATE instances SET host = 'h2' WHERE vcpus + 0 > 100",
        "INSERT INTO notes (text) SELECT vcpus FROM instances WHERE id = 2",
    ],
)
def test_column_read_by_a_change_guards_a_later_change(two: tuple[Connection, Connection], reading: str) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute(reading)
    b.execute("UPDATE instances SET vcpus = 7 WHERE uuid = 'u2'")
    a.execute("UPDATE instances SET vcpus = 3 WHERE id = 2")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()


def test_column_read_before_the_group_changed_guards_a_change_after(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    assert b.execute("SELECT vcpus FROM instances WHERE id = 1").fetchall() == [(4,)]
    a.execute("UPDATE instances SET vcpus = 5, host = 'h9' WHERE id = 1")
    a.commit()
    # The newer group is met by a statement that does not look at the column again.
    assert b.execute("SELECT id FROM instances WHERE host = 'h9'").fetchall() == [(1,)]
    b.execute("UPDATE instances SET vcpus = 6 WHERE uuid = 'u1'")
    with pytest.raises(ConflictError):
        b.commit()


@pytest.mark.parametrize("savepoint", [False, True])
def test_column_read_before_the_schema_changed_guards_a_change_after(
    two: tuple[Connection, Connection], savepoint: bool
) -> None:
    a, b = two
    b.execute("BEGIN")
    if savepoint:
        b.execute("SAVEPOINT s")
    assert b.execute("SELECT vcpus FROM instances WHERE id = 1").fetchall() == [(4,)]
    a.execute("CREATE TABLE other (id INTEGER NOT NULL PRIMARY KEY)")
    a.execute("UPDATE instances SET vcpus = 5 WHERE id = 1")
    a.commit()
    b.execute("SELECT count(*) FROM other")
    b.execute("UPDATE instances SET vcpus = 6 WHERE uuid = 'u1'")
    with pytest.raises(ConflictError):
        b.commit()


def test_table_that_was_read_changes_its_columns_conflict(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    assert b.execute("SELECT vcpus FROM instances WHERE id = 1").fetchall() == [(4,)]
    a.execute("ALTER TABLE instances ADD COLUMN zone VARCHAR(255)")
    with pytest.raises(ConflictError):
        b.execute("UPDATE instances SET zone = 'z' WHERE host = 'h1'")
    b.rollback()
    b.execute("UPDATE instances SET zone = 'z' WHERE host = 'h1'")
    b.commit()
    assert a.execute("SELECT zone FROM instances").fetchall() == [("z",), ("z",)]


def test_read_mark_survives_a_rolled_back_savepoint(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("SAVEPOINT s")
    b.execute("UPDATE instances SET vcpus = vcpus + 1 WHERE id = 1")
    b.execute("ROLLBACK TO s")
    b.execute("UPDATE instances SET vcpus = 9 WHERE id = 1")
    a.execute("UPDATE instances SET vcpus = 5 WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()


def test_column_read_of_a_row_changed_in_a_rolled_back_savepoint_guards_a_change_after(
    two: tuple[Connection, Connection],
) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("SAVEPOINT s")
    b.execute("UPDATE instances SET host = 'h5' WHERE id = 1")
    assert b.execute("SELECT vcpus FROM instances WHERE id = 1").fetchall() == [(4,)]
    b.execute("ROLLBACK TO s")
    b.execute("UPDATE instances SET vcpus = 5 WHERE id = 1")
    a.execute("UPDATE instances SET vcpus = 6 WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()


@pytest.mark.parametrize("moves", [False, True])
def test_own_value_read_in_a_rolled_back_savepoint_guards_nothing(
    two: tuple[Connection, Connection], moves: bool
) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("SAVEPOINT s")
    b.execute("UPDATE instances SET host = 'h5' WHERE id = 1")
    assert b.execute("SELECT host FROM instances WHERE id = 1").fetchall() == [("h5",)]
    b.execute("ROLLBACK TO s")
    a.execute("UPDATE instances SET vcpus = 7 WHERE id = 1")
    a.commit()
    if moves:
        assert b.execute("SELECT id FROM instances WHERE vcpus = 7").fetchall() == [(1,)]
    b.execute("UPDATE instances SET host = 'h6' WHERE id = 1")
    b.commit()
    assert a.execute("SELECT host, vcpus FROM instances WHERE id = 1").fetchall() == [("h6", 7)]


def test_guard_of_a_rolled_back_savepoint_is_gone(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("SAVEPOINT s")
    b.execute("UPDATE instances SET host = 'h5' WHERE id = 1 AND task_state IS NULL")
    b.execute("ROLLBACK TO s")
    b.execute("UPDATE instances SET vcpus = 9 WHERE id = 1")
    a.execute("UPDATE instances SET task_state = 'x' WHERE id = 1")
    a.commit()
    b.commit()
    assert a.execute("SELECT host, task_state, vcpus FROM instances WHERE id = 1").fetchall() == [("h1", "x", 9)]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ("WITH big AS (SELECT 1 AS n) UPDATE notes SET size = size + 1 WHERE id IN (SELECT n FROM big)", 1),
        ("WITH big AS (SELECT id FROM notes WHERE size > 3) DELETE FROM notes WHERE id IN (SELECT id FROM big)", 1),
        ("WITH RECURSIVE c(x) AS (VALUES (7) UNION ALL SELECT x + 1 FROM c WHERE x < 9) INSERT INTO notes (size)"
         " SELECT x FROM c", 3),
        ("/* why */ WITH big(n) AS (SELECT ')') INSERT INTO notes (text) SELECT n FROM big", 1),
    ],
)  # fmt: skip
def test_change_after_with_runs_as_a_change(two: tuple[Connection, Connection], change: str, count: int) -> None:
    a, b = two
    stock = sqlite3.connect(":memory:")
    stock.execute(SCHEMA[1])
    stock.execute("INSERT INTO notes (id, text, size) VALUES (1, 'a', 4), (2, 'b', 2)")
    stock.execute(change)
    assert a.execute(change).rowcount == count
    assert a.in_transaction
    a.commit()
    rows = [row[1:] for row in stock.execute("SELECT * FROM notes ORDER BY id")]
    assert [row[1:] for row in b.execute("SELECT * FROM notes ORDER BY id")] == rows
    stock.close()


def test_forked_process_draws_other_ids(connect: Connect) -> None:
    a = connect()
    a.execute("CREATE TABLE things (id INTEGER NOT NULL PRIMARY KEY, name TEXT)")
    table = a.tx.schema.tables["things"]
    for _ in range(4):
        a.database.next_id(table, 0)
    # The store of this test lives in one process: what the child reserves is not seen here, only what it kept counts.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        asked: list[int] = []
        a.database.ids.take(table, 0, lambda count, above: asked.append(count) or 1000)
        os.write(writing, b"asked" if asked else b"kept")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"asked"
    os.close(reading)
    os.close(writing)
