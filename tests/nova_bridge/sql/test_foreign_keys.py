"""Foreign keys inside a group, across groups, at the statement and at COMMIT."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest

from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError, ForeignKeyError

Connect = Callable[..., Connection]
FAILED = "^FOREIGN KEY constraint failed$"

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, UNIQUE (uuid))",
    # the same group as its instance
    "CREATE TABLE instance_extra (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36) NOT NULL,"
    " FOREIGN KEY (instance_uuid) REFERENCES instances (uuid))",
    # another group than its instance
    "CREATE TABLE migrations (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36),"
    " FOREIGN KEY (instance_uuid) REFERENCES instances (uuid))",
    # in its instance's group, without a foreign key
    "CREATE TABLE tags (resource_id VARCHAR(36) NOT NULL, tag VARCHAR(80) NOT NULL, PRIMARY KEY (resource_id, tag))",
    "CREATE TABLE tree (id INTEGER NOT NULL PRIMARY KEY, parent INTEGER REFERENCES tree (id))",
    # parent and child in the one group of a whole family
    "CREATE TABLE flavors (id INTEGER NOT NULL PRIMARY KEY, name TEXT UNIQUE)",
    "CREATE TABLE flavor_extra_specs (id INTEGER NOT NULL PRIMARY KEY, flavor TEXT REFERENCES flavors (name))",
    "CREATE TABLE boxes (id INTEGER NOT NULL PRIMARY KEY)",
    "CREATE TABLE things (id INTEGER NOT NULL PRIMARY KEY, box INTEGER REFERENCES boxes ON DELETE CASCADE)",
    "CREATE TABLE notes (id INTEGER NOT NULL PRIMARY KEY, box INTEGER REFERENCES boxes ON DELETE SET NULL)",
]


@pytest.fixture
def two(connect: Connect) -> tuple[Connection, Connection]:
    first = connect()
    for sql in SCHEMA:
        first.execute(sql)
    first.execute("INSERT INTO instances (uuid) VALUES ('u1')")
    first.commit()
    return first, connect()


@pytest.mark.parametrize("table", ["instance_extra", "migrations"])
def test_child_without_parent_refused_at_statement(two: tuple[Connection, Connection], table: str) -> None:
    a, _ = two
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        a.execute(f"INSERT INTO {table} (instance_uuid) VALUES ('nobody')")
    a.execute(f"INSERT INTO {table} (instance_uuid) VALUES ('u1')")
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        a.execute(f"UPDATE {table} SET instance_uuid = 'nobody'")
    a.commit()
    assert a.execute(f"SELECT instance_uuid FROM {table}").fetchall() == [("u1",)]


@pytest.mark.parametrize(
    "parent", ["CREATE TABLE p (b, d, PRIMARY KEY (b, d))", "CREATE TABLE p (id INTEGER)", "CREATE TABLE p (b, c)"]
)
@pytest.mark.parametrize("refers", ["p", "p (a)"])
def test_child_of_a_parent_without_such_a_key_is_refused_as_sqlite_does(
    connect: Connect, parent: str, refers: str
) -> None:
    stock, door = sqlite3.connect(":memory:"), connect(isolation_level=None)
    stock.execute("PRAGMA foreign_keys = ON")
    for database in (stock, door):
        database.execute(parent)
        database.execute(f"CREATE TABLE c (x INTEGER REFERENCES {refers})")
        with pytest.raises(sqlite3.OperationalError, match='foreign key mismatch - "c" referencing "p"'):
            database.execute("INSERT INTO c VALUES (1)")
    stock.close()


@pytest.mark.parametrize("table", ["instance_extra", "migrations"])
def test_parent_with_child_not_deleted(two: tuple[Connection, Connection], table: str) -> None:
    a, b = two
    a.execute(f"INSERT INTO {table} (instance_uuid) VALUES ('u1')")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        b.execute("DELETE FROM instances")
    b.execute(f"DELETE FROM {table}")
    b.execute("DELETE FROM instances")
    b.commit()


def test_parent_deleted_meanwhile_refused_at_commit(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("INSERT INTO instance_extra (instance_uuid) VALUES ('u1')")
    a.execute("DELETE FROM instances")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        b.commit()


def test_child_added_meanwhile_parent_refused_at_commit(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("DELETE FROM instances")
    a.execute("INSERT INTO instance_extra (instance_uuid) VALUES ('u1')")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        b.commit()


def test_parent_and_child_in_one_transaction(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("INSERT INTO instances (uuid) VALUES ('u2')")
    a.execute("INSERT INTO instance_extra (instance_uuid) VALUES ('u2')")
    a.execute("INSERT INTO migrations (instance_uuid) VALUES ('u2')")
    a.commit()
    assert b.execute("SELECT count(*) FROM instance_extra").fetchall() == [(1,)]
    for table in ("migrations", "instance_extra", "instances"):
        b.execute(f"DELETE FROM {table}")
    b.commit()


def test_tree_removed_by_one_statement(two: tuple[Connection, Connection]) -> None:
    a, _ = two
    a.execute("INSERT INTO tree VALUES (1, 1), (2, 1), (3, 2)")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        a.execute("DELETE FROM tree WHERE id = 2")
    assert a.execute("DELETE FROM tree").rowcount == 3
    a.commit()


def test_on_delete_actions(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("INSERT INTO boxes VALUES (1), (2)")
    a.execute("INSERT INTO things VALUES (1, 1), (2, 2)")
    a.execute("INSERT INTO notes VALUES (1, 1)")
    a.execute("DELETE FROM boxes WHERE id = 1")
    a.commit()
    assert b.execute("SELECT id FROM things").fetchall() == [(2,)]
    assert b.execute("SELECT box FROM notes").fetchall() == [(None,)]


def test_on_update_actions(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("CREATE TABLE names (name TEXT PRIMARY KEY, id INTEGER, UNIQUE (id))")
    actions = {"cascaded": "CASCADE", "nulled": "SET NULL", "kept": "NO ACTION"}
    for table, action in actions.items():
        a.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, name TEXT REFERENCES names ON UPDATE {action})")
    a.execute("INSERT INTO names VALUES ('old', 1), ('other', 2)")
    for table in actions:
        a.execute(f"INSERT INTO {table} VALUES (1, 'old'), (2, 'other')")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY constraint failed"):
        a.execute("UPDATE names SET name = 'new' WHERE id = 1")
    a.execute("DELETE FROM kept WHERE name = 'old'")
    a.execute("UPDATE names SET name = 'new' WHERE id = 1")
    a.commit()
    assert b.execute("SELECT name FROM cascaded ORDER BY id").fetchall() == [("new",), ("other",)]
    assert b.execute("SELECT name FROM nulled ORDER BY id").fetchall() == [(None,), ("other",)]


@pytest.mark.parametrize("table", ["things", "notes"])
def test_child_given_to_another_parent_meanwhile_is_not_lost_with_the_first(
    two: tuple[Connection, Connection], table: str
) -> None:
    a, b = two
    a.execute("INSERT INTO boxes VALUES (1), (2)")
    a.execute(f"INSERT INTO {table} VALUES (1, 1)")
    a.commit()
    b.execute("DELETE FROM boxes WHERE id = 1")
    a.execute(f"UPDATE {table} SET box = 2 WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()
    assert a.execute(f"SELECT box FROM {table}").fetchall() == [(2,)]


def test_pragma_turns_checks_off_and_on(connect: Connect) -> None:
    connection = connect(foreign_keys=False, isolation_level=None)
    for sql in SCHEMA:
        connection.execute(sql)
    connection.execute("INSERT INTO migrations (instance_uuid) VALUES ('nobody')")
    connection.execute("PRAGMA foreign_keys=ON")
    assert connection.execute("PRAGMA foreign_keys").fetchall() == [(1,)]
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        connection.execute("INSERT INTO migrations (instance_uuid) VALUES ('nobody')")


def test_referenced_column_changed_meanwhile_child_refused_at_commit(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("INSERT INTO flavors VALUES (1, 'left')")
    a.commit()
    b.execute("INSERT INTO flavor_extra_specs VALUES (1, 'left')")
    a.execute("UPDATE flavors SET name = 'right' WHERE id = 1")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        b.commit()


def test_child_added_meanwhile_referenced_column_stays(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("INSERT INTO flavors VALUES (1, 'left')")
    a.commit()
    b.execute("UPDATE flavors SET name = 'right' WHERE id = 1")
    a.execute("INSERT INTO flavor_extra_specs VALUES (1, 'left')")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        b.commit()


def test_referenced_column_changed_and_child_added_in_one_transaction(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("INSERT INTO flavors VALUES (1, 'left'), (2, 'top')")
    a.commit()
    b.execute("UPDATE flavors SET name = 'right' WHERE id = 1")
    b.execute("INSERT INTO flavor_extra_specs VALUES (1, 'right')")
    b.execute("DELETE FROM flavors WHERE id = 2")
    b.execute("INSERT INTO flavors VALUES (3, 'top')")
    b.execute("INSERT INTO flavor_extra_specs VALUES (2, 'top')")
    b.execute("UPDATE flavors SET id = 4 WHERE id = 3")
    b.commit()
    assert a.execute("SELECT id, name FROM flavors ORDER BY id").fetchall() == [(1, "right"), (4, "top")]


def test_parent_in_another_group_that_is_written_too_is_guarded(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("INSERT INTO migrations (instance_uuid) VALUES ('u1')")
    b.execute("INSERT INTO tags (resource_id, tag) VALUES ('u1', 'moving')")
    a.execute("DELETE FROM instances")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=FAILED):
        b.commit()


@pytest.mark.parametrize("child_first", [False, True])
def test_foreign_key_that_the_commit_finds_broken_is_named_as_at_the_statement(
    connect: Connect, child_first: bool
) -> None:
    a, b = connect(), connect()
    a.execute("CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, UNIQUE (uuid))")
    a.execute(
        "CREATE TABLE instance_info_caches (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36),"
        " FOREIGN KEY (instance_uuid) REFERENCES instances (uuid))"
    )
    a.execute("INSERT INTO instances VALUES (1, 'u1')")
    a.commit()
    a.execute("INSERT INTO instance_info_caches (instance_uuid) VALUES ('u1')")
    b.execute("DELETE FROM instances WHERE id = 1")
    first, second = (a, b) if child_first else (b, a)
    first.commit()
    with pytest.raises(ForeignKeyError) as late:
        second.commit()
    again = "DELETE FROM instances" if child_first else "INSERT INTO instance_info_caches (instance_uuid) VALUES ('u1')"
    with pytest.raises(ForeignKeyError) as early:
        second.execute(again)
    assert vars(late.value) == vars(early.value)
    assert (early.value.table, early.value.columns) == ("instance_info_caches", ("instance_uuid",))
