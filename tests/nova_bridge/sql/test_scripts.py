"""Scripts whose schema statements hand names on: the same rows as on stock SQLite, statement by statement or as one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest

from nova_bridge.sql.connection import Connection

Connect = Callable[..., Connection]
MADE = (
    "CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b TEXT)",
    "CREATE TABLE s (id INTEGER PRIMARY KEY, a TEXT)",
    "INSERT INTO t VALUES (1, 'ta', 'tb')",
    "INSERT INTO s VALUES (2, 'sa')",
)


@pytest.mark.parametrize("as_one", [False, True], ids=["one by one", "as one"])
@pytest.mark.parametrize(
    ("script", "question"),
    [
        ("ALTER TABLE t RENAME COLUMN a TO c; ALTER TABLE t RENAME TO u", "SELECT id, b, c FROM u"),
        ("ALTER TABLE t RENAME TO u; ALTER TABLE u RENAME COLUMN a TO c", "SELECT id, b, c FROM u"),
        ("DROP TABLE t; CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b TEXT)", "SELECT * FROM t"),
        ("DROP TABLE t; CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, c TEXT)", "SELECT * FROM t"),
        ("DROP TABLE t; ALTER TABLE s RENAME TO t", "SELECT * FROM t"),
        (
            "ALTER TABLE t RENAME TO u; CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b TEXT)",
            "SELECT 't', * FROM t UNION ALL SELECT 'u', * FROM u",
        ),
        (
            "ALTER TABLE t RENAME TO u; ALTER TABLE s RENAME TO t; ALTER TABLE u RENAME TO s",
            "SELECT 't', id, a FROM t UNION ALL SELECT 's', id, a FROM s",
        ),
        ("ALTER TABLE t DROP COLUMN a; ALTER TABLE t ADD COLUMN a TEXT", "SELECT id, a, b FROM t"),
        ("ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN b TEXT", "SELECT id, a, b FROM t"),
        ("ALTER TABLE t RENAME COLUMN a TO c; ALTER TABLE t ADD COLUMN a TEXT", "SELECT id, a, b, c FROM t"),
        (
            "ALTER TABLE t RENAME COLUMN a TO c; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME COLUMN c TO b",
            "SELECT id, a, b FROM t",
        ),
        ("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY); ALTER TABLE t ADD COLUMN c TEXT", "SELECT * FROM t"),
    ],
)
def test_names_that_are_handed_on_take_no_rows_or_columns_along(
    connect: Connect, script: str, question: str, as_one: bool
) -> None:
    stock, door = sqlite3.connect(":memory:"), connect(isolation_level=None)
    answers = []
    for database in (stock, door):
        for statement in MADE:
            database.execute(statement)
        for part in [script] if as_one else script.split(";"):
            database.executescript(part)
        answers.append(database.execute(question).fetchall())
    stock.close()
    assert answers[1] == answers[0]
    assert connect().execute(question).fetchall() == answers[0]


@pytest.mark.parametrize("as_one", [False, True], ids=["one by one", "as one"])
def test_column_that_says_in_which_group_a_row_is_may_be_renamed_and_not_dropped(
    connect: Connect, as_one: bool
) -> None:
    door = connect(isolation_level=None)
    door.execute("CREATE TABLE instance_faults (id INTEGER PRIMARY KEY, instance_uuid TEXT, code INTEGER)")
    door.execute("INSERT INTO instance_faults VALUES (1, 'u', 500)")
    run = door.executescript if as_one else door.execute
    with pytest.raises(sqlite3.NotSupportedError, match="column instance_uuid says in which group a row is"):
        run("ALTER TABLE instance_faults DROP COLUMN instance_uuid")
    run("ALTER TABLE instance_faults RENAME COLUMN instance_uuid TO server")
    assert door.execute("SELECT code FROM instance_faults WHERE server = 'u'").fetchall() == [(500,)]
