"""Scripts whose schema statements hand names on: the same rows as on stock SQLite, statement by statement or as one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from dht.model import GLOBAL
from dht.register.memory import MemoryStore
from nova_bridge.sql import dbapi, fixture, unique_rows
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import ConflictError
from nova_bridge.sql.transaction import Transaction

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


@pytest.mark.parametrize(
    ("script", "question"),
    [
        ("CREATE TABLE n (id INTEGER PRIMARY KEY); -- the end", "SELECT * FROM n"),
        ("-- first\nCREATE TABLE n (a TEXT /* why */); /* then; */ INSERT INTO n VALUES (';'); ;", "SELECT * FROM n"),
        ("/* nothing", "SELECT id FROM t"),
        ("", "SELECT id FROM t"),
    ],
)
def test_comments_in_a_script_are_no_statements(connect: Connect, script: str, question: str) -> None:
    stock, door = sqlite3.connect(":memory:"), connect(isolation_level=None)
    answers = []
    for database in (stock, door):
        for statement in MADE:
            database.execute(statement)
        database.executescript(script)
        answers.append(database.execute(question).fetchall())
    stock.close()
    assert answers[1] == answers[0]


@pytest.mark.parametrize("isolation_level", ["", None])
@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE q (a); INSERT INTO q VALUES (1)",
        "CREATE TABLE q (a); BEGIN; INSERT INTO q VALUES (1)",
        "PRAGMA foreign_keys = ON; CREATE TABLE q (a); INSERT INTO q VALUES (1)",
    ],
)
def test_script_leaves_what_sqlite_leaves_each_time(script: str, isolation_level: str | None) -> None:
    """Rows that no ROLLBACK takes back, a transaction, a setting."""

    def left(connection: Any) -> list[Any]:
        connection.executescript(script)
        seen = [connection.in_transaction, *connection.execute("PRAGMA foreign_keys").fetchall()]
        connection.rollback()
        seen += connection.execute("SELECT * FROM q").fetchall()
        connection.close()
        return seen

    stock = left(sqlite3.connect(":memory:", isolation_level=isolation_level))  # type: ignore[arg-type]
    assert [left(dbapi.connect_memory(isolation_level=isolation_level)) for _ in range(2)] == [stock, stock]


def test_table_whose_unique_index_was_never_finished_is_replaced_by_a_script_that_makes_both(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = connect(isolation_level=None)
    for statement in MADE:
        door.execute(statement)

    def die(*args: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(unique_rows, "_reserve", die)
    with pytest.raises(InterruptedError):
        door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    monkeypatch.undo()
    door.executescript("DROP TABLE t; CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT); CREATE UNIQUE INDEX ua ON t (a)")
    door.execute("INSERT INTO t VALUES (1, 'ta')")
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
        connect(isolation_level=None).execute("INSERT INTO t VALUES (2, 'ta')")


@pytest.mark.parametrize(("old", "new"), [("deleted", "gone"), ("gone", "deleted"), ("deleted", "Deleted")])
def test_unique_key_holds_when_the_column_that_says_which_rows_are_deleted_is_renamed(
    connect: Connect, old: str, new: str
) -> None:
    """A deleted row, which has its own id there, needs no entry under that name, and needs one under another."""
    door = connect(isolation_level=None)
    door.execute(f"CREATE TABLE h (id INTEGER PRIMARY KEY, name TEXT, {old} INTEGER, UNIQUE (name, {old}))")
    door.execute("INSERT INTO h VALUES (1, 'x', 1), (2, 'x', 0), (3, 'x', 3)")
    door.execute(f"ALTER TABLE h RENAME COLUMN {old} TO {new}")
    reader = connect(isolation_level=None)
    assert reader.execute(f"SELECT id FROM h WHERE name = 'x' AND {new} = 1").fetchall() == [(1,)]
    reader.execute("DELETE FROM h WHERE id = 3")
    reader.execute("INSERT INTO h VALUES (4, 'x', 3)")
    for value in (0, 3) if new == "deleted" else (0, 1, 3):
        with pytest.raises(sqlite3.IntegrityError, match=rf"UNIQUE constraint failed: h\.name, h\.{new}"):
            reader.execute("INSERT INTO h VALUES (9, 'x', ?)", (value,))


class Remote:
    """A store that is not in this process, as far as the door can tell."""

    def __init__(self, home: str) -> None:
        self._store = MemoryStore()
        self._home = home

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def home(self, database: str, timeout_s: float | None = None) -> str:
        return self._home


def opened(store: Any) -> Connection:
    return Connection(Database(store, "cell"), None, True)


FLAVORS = "CREATE TABLE flavors (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO flavors VALUES (1, 'small');"


def test_script_that_ran_on_a_database_elsewhere_makes_tables_of_this_ones_home() -> None:
    near, wide = opened(Remote("paris")), opened(Remote(GLOBAL))
    for door in (near, wide):
        door.executescript(FLAVORS)
    plain = opened(Remote(GLOBAL))
    for statement in FLAVORS.rstrip(";").split(";"):
        plain.execute(statement)
    reads = [door.database.schema.definitions["flavors"].read for door in (near, wide, plain)]
    assert reads[0] == 0
    assert reads[1] == reads[2] > 0


def test_script_in_a_database_made_again_gives_its_tables_to_no_transaction_of_the_former_one() -> None:
    store = Remote("paris")
    old = opened(store)
    old.executescript(FLAVORS)
    old.execute("BEGIN")
    old.execute("INSERT INTO flavors VALUES (7, 'old')")
    assert store.drop_database("cell")
    assert store.create_database("cell")
    door = opened(store)
    door.executescript(FLAVORS)
    with pytest.raises(ConflictError):
        old.execute("COMMIT")
    assert door.execute("SELECT * FROM flavors").fetchall() == [(1, "small")]


def test_script_in_a_database_that_others_have_filled_meanwhile_is_kept_without_their_tables() -> None:
    store = Remote("paris")
    door = opened(store)
    assert not door.database.schema.definitions
    opened(store).executescript(FLAVORS)
    script = "CREATE TABLE aggregates (id INTEGER PRIMARY KEY);"
    door.executescript(script)
    again = opened(Remote("paris"))
    again.executescript(script)
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    assert door.execute(tables).fetchall() == [("aggregates",), ("flavors",)]
    assert again.execute(tables).fetchall() == [("aggregates",)]


def test_script_whose_tables_were_dropped_since_makes_them_again_for_all() -> None:
    store = Remote("paris")
    door = opened(store)
    door.executescript(FLAVORS)
    door.execute("DROP TABLE flavors")
    door.executescript(FLAVORS)
    for one in (door, opened(store)):
        assert one.execute("SELECT * FROM flavors").fetchall() == [(1, "small")]
    # The same in an empty database, for which it is kept.
    again = opened(Remote("paris"))
    again.executescript(FLAVORS)
    assert again.execute("SELECT * FROM flavors").fetchall() == [(1, "small")]


@pytest.mark.parametrize("same_process", [True, False])
def test_script_has_run_where_others_drop_its_table_before_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, same_process: bool
) -> None:
    """The result is not kept then: neither does the script fail, nor what it is restored to next time."""
    store = Remote("paris")
    door = opened(store)
    other = Connection(door.database, None, True) if same_process else opened(store)
    script = FLAVORS + f"INSERT INTO flavors VALUES (2, 'for {same_process}');"
    keep = fixture.keep

    def beside(*args: Any) -> None:
        tables = Transaction.find

        def find(self: Transaction, *asked: Any) -> Any:
            monkeypatch.undo()
            found = tables(self, *asked) if same_process else None
            other.execute("DROP TABLE flavors")
            return tables(self, *asked) if found is None else found

        monkeypatch.setattr(Transaction, "find", find)
        keep(*args)

    monkeypatch.setattr(fixture, "keep", beside)
    door.executescript(script)
    again = opened(Remote("paris"))
    again.executescript(script)
    assert len(again.execute("SELECT * FROM flavors").fetchall()) == 2
