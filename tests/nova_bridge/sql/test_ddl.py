"""DDL through the door, with data: columns, renames, indexes, alembic's batch mode, other processes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from dht.register.memory import MemoryStore
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError
from nova_bridge.sql.schema import Table, TableDef

Connect = Callable[..., Connection]


def rows(connection: Connection, sql: str) -> list[object]:
    return connection.execute(sql).fetchall()


@pytest.fixture
def door(connect: Connect) -> Connection:
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b INTEGER)")
    connection.execute("INSERT INTO t (a, b) VALUES ('x', 1), ('y', 2), ('z', 2)")
    return connection


def test_added_column_old_rows_have_default(door: Connection) -> None:
    door.execute("ALTER TABLE t ADD COLUMN c TEXT DEFAULT 'd'")
    door.execute("INSERT INTO t (a, c) VALUES ('w', NULL)")
    assert rows(door, "SELECT a, c FROM t ORDER BY id") == [("x", "d"), ("y", "d"), ("z", "d"), ("w", None)]
    assert rows(door, "SELECT a FROM t WHERE c = 'd' AND b = 2 ORDER BY id") == [("y",), ("z",)]


def test_renamed_table_and_column_keep_data(door: Connection, connect: Connect) -> None:
    door.execute("ALTER TABLE t RENAME COLUMN a TO name")
    door.execute('ALTER TABLE "t" RENAME TO "u"')
    assert rows(connect(), "SELECT name FROM u WHERE b = 1") == [("x",)]
    with pytest.raises(sqlite3.OperationalError, match="no such table: t"):
        door.execute("SELECT * FROM t")


def test_dropped_and_created_again_is_empty(door: Connection) -> None:
    door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    door.execute("DROP TABLE t")
    door.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT UNIQUE)")
    assert rows(door, "SELECT * FROM t") == []
    door.execute("INSERT INTO t (a) VALUES ('x')")


def test_statement_works_on_the_tables_that_it_changes_alone_and_asks_for_the_home_once(
    door: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    home = MemoryStore.home
    monkeypatch.setattr(MemoryStore, "home", lambda store, *of: asked.append(of[0]) or home(store, *of))  # type: ignore[func-returns-value]
    door.executescript(";".join(f"CREATE TABLE t{n} (id INTEGER PRIMARY KEY, a TEXT)" for n in range(30)))
    assert asked == [door.database.name]
    made: list[str] = []
    init = Table.__init__

    def count(table: Table, database: str, definition: TableDef) -> None:
        made.append(definition.name)
        init(table, database, definition)

    monkeypatch.setattr(Table, "__init__", count)
    door.execute("CREATE UNIQUE INDEX ua ON t7 (a)")
    door.execute("CREATE TABLE last (id INTEGER PRIMARY KEY)")
    assert set(made) == {"t7", "last"}


def test_unique_index_over_rows_reserves_their_values(door: Connection, connect: Connect) -> None:
    door.execute("CREATE UNIQUE INDEX ua ON t (a)")
    other = connect()
    assert rows(other, "SELECT b FROM t WHERE a = 'y'") == [(2,)]
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
        other.execute("INSERT INTO t (a) VALUES ('z')")
    door.execute("DROP INDEX ua")
    door.execute("INSERT INTO t (a) VALUES ('z')")


def test_unique_index_over_duplicates_refused(door: Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.b"):
        door.execute("CREATE UNIQUE INDEX ub ON t (b)")
    door.execute("INSERT INTO t (b) VALUES (2)")


def test_failed_ddl_changes_nothing(door: Connection) -> None:
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        door.execute("CREATE TABLE t (id INTEGER)")
    with pytest.raises(sqlite3.OperationalError, match="incomplete input"):
        door.execute("CREATE TABLE u (")
    assert len(rows(door, "SELECT * FROM t")) == 3


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE VIEW v AS SELECT 1",
        "CREATE TEMP TABLE x (a)",
        "-- for a moment\nCREATE /* only */ TEMPORARY TABLE x (a)",
        "CREATE TABLE IF NOT EXISTS temp.x (a)",
        "/* a copy */ CREATE TABLE x AS SELECT 1 AS a",
        "CREATE TABLE x AS SELECT 1 AS a",
        "CREATE TABLE x (a INTEGER CHECK (a > 0))",
        "CREATE TABLE x (a INTEGER PRIMARY KEY) WITHOUT ROWID",
        "CREATE UNIQUE INDEX x ON t (a) WHERE b = 1",
        "CREATE UNIQUE INDEX x ON t (lower(a))",
        "CREATE TABLE x (a TEXT COLLATE NOCASE)",
        "CREATE UNIQUE INDEX x ON t (a COLLATE NOCASE)",
    ],
)
def test_what_is_not_supported_says_so(door: Connection, sql: str) -> None:
    with pytest.raises(sqlite3.NotSupportedError, match=r"not supported|plain columns|WHERE|leave out its COLLATE"):
        door.execute(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE t; CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b INTEGER)",
        "CREATE TABLE u (a); INSERT INTO u VALUES (1)",
        "BEGIN; INSERT INTO t (a) VALUES ('w')",
        "DELETE FROM t WHERE id = 1; DELETE FROM t",
        "SELECT 1; DROP TABLE t",
    ],
)
def test_several_statements_at_once_are_refused_as_a_whole(door: Connection, sql: str) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="one statement at a time"):
        door.execute(sql)
    assert not door.in_transaction
    assert len(rows(door, "SELECT * FROM t")) == 3
    assert rows(door, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("t",)]


@pytest.mark.parametrize("sql", ["", ";", "-- nothing", "/* nothing; */ ;"])
def test_text_without_a_statement_does_nothing(door: Connection, sql: str) -> None:
    assert rows(door, sql) == []
    door.execute("INSERT INTO t (a) VALUES ('w; x'); -- and; no more")
    assert len(rows(door, "SELECT * FROM t")) == 4


@pytest.mark.parametrize("back", ["ROLLBACK TO s -- File: a.py; File: b.py", "/* half */ ROLLBACK TO SAVEPOINT s;"])
def test_savepoint_whose_statement_has_a_comment_is_gone_back_to(door: Connection, back: str) -> None:
    door.execute("BEGIN")
    door.execute("DELETE FROM t WHERE id = 1")
    door.execute("SAVEPOINT s -- File: a.py; File: b.py")
    door.execute("DELETE FROM t")
    door.execute(back)
    door.execute("COMMIT -- File: a.py")
    assert rows(door, "SELECT id FROM t") == [(2,), (3,)]


def test_rollback_to_what_cannot_be_told_takes_nothing_back(door: Connection) -> None:
    door.execute("BEGIN")
    door.execute("DELETE FROM t WHERE id = 1")
    with pytest.raises(sqlite3.OperationalError, match="not a statement"):
        door.execute("ROLLBACK TO 's'")
    door.execute("COMMIT")
    assert rows(door, "SELECT id FROM t") == [(2,), (3,)]


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        ("ALTER TABLE t ADD COLUMN c TEXT NOT NULL", "Cannot add a NOT NULL column with default value NULL"),
        ("ALTER TABLE t ADD c DATETIME DEFAULT CURRENT_TIMESTAMP", "Cannot add a column with non-constant default"),
        ("ALTER TABLE t ADD c TEXT NOT NULL DEFAULT (lower('X'))", "Cannot add a column with non-constant default"),
    ],
)
def test_column_that_rows_would_lack_is_added_to_an_empty_table_only(
    door: Connection, connect: Connect, statement: str, refusal: str
) -> None:
    stock = sqlite3.connect(":memory:", isolation_level=None)
    for database in (stock, door):
        database.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, a TEXT, b INTEGER)")
        database.execute("INSERT INTO t (a) VALUES ('w')")
        with pytest.raises(sqlite3.OperationalError, match=refusal):
            database.execute(statement)
        database.execute("DELETE FROM t")
        database.execute(statement)
        assert database.execute("SELECT count(c) FROM t").fetchall() == [(0,)]
    stock.close()


def test_column_with_nulls_is_not_made_not_null(door: Connection) -> None:
    door.execute("INSERT INTO t (b) VALUES (7)")
    with pytest.raises(sqlite3.IntegrityError, match=r"NOT NULL constraint failed: t\.a"):
        door.execute("ALTER TABLE t ALTER COLUMN a SET NOT NULL")
    door.execute("UPDATE t SET a = 'v' WHERE b = 7")
    door.execute("ALTER TABLE t ALTER COLUMN a SET NOT NULL")
    with pytest.raises(sqlite3.IntegrityError, match=r"NOT NULL constraint failed: t\.a"):
        door.execute("INSERT INTO t (b) VALUES (8)")


def test_other_process_meets_new_table_and_column(door: Connection, connect: Connect) -> None:
    other = connect()
    assert len(rows(other, "SELECT * FROM t")) == 3
    door.execute("ALTER TABLE t ADD COLUMN c INTEGER")
    door.execute("CREATE TABLE later (id INTEGER PRIMARY KEY)")
    assert rows(other, "SELECT c FROM t WHERE id = 1") == [(None,)]
    assert rows(other, "SELECT * FROM later") == []


def test_database_that_does_not_exist_is_named(connect: Connect) -> None:
    with pytest.raises(sqlite3.OperationalError, match="there is no database 'cell'"):
        connect().execute("SELECT * FROM t")


def test_dump_restores_elsewhere(door: Connection) -> None:
    from nova_bridge.sql import dbapi

    door.execute("CREATE INDEX ib ON t (b)")
    script = "".join(door.iterdump())
    for _ in range(2):
        copy = dbapi.connect_memory()
        copy.executescript(script)
        assert rows(copy, "SELECT id, a, b FROM t ORDER BY id") == rows(door, "SELECT id, a, b FROM t ORDER BY id")
        copy.execute("INSERT INTO t (a) VALUES ('new')")
        copy.commit()
        copy.close()


def test_schema_queries_answered(door: Connection) -> None:
    door.execute("CREATE INDEX ib ON t (b)")
    assert rows(door, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("t",)]
    assert [r[1] for r in rows(door, "PRAGMA table_info('t')")] == ["id", "a", "b"]  # type: ignore[index]
    assert [r[1] for r in rows(door, 'PRAGMA main.index_list("t")')] == ["ib"]  # type: ignore[index]


def test_alembic_batch_keeps_rows() -> None:
    engine = sa.create_engine("lucd+memory://", poolclass=sa.pool.StaticPool)
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operations.create_table(
            "services",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("host", sa.String(255)),
            sa.Column("uuid", sa.String(36)),
        )
        connection.execute(sa.text("INSERT INTO services (host, uuid) VALUES ('a', 'u1'), ('b', 'u2')"))
        with operations.batch_alter_table("services") as batch:
            batch.alter_column("host", type_=sa.String(100), nullable=False)
            batch.add_column(sa.Column("zone", sa.String(10), server_default="z"))
            batch.create_unique_constraint("uq_host", ["host"])
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT id, host, uuid, zone FROM services ORDER BY id")).fetchall()
        assert [tuple(r) for r in found] == [(1, "a", "u1", "z"), (2, "b", "u2", "z")]
        assert sa.inspect(connection).get_unique_constraints("services")[0]["column_names"] == ["host"]
    engine.dispose()


def test_defaults_constant_and_worked_out(door: Connection) -> None:
    door.execute(
        "CREATE TABLE d (id INTEGER PRIMARY KEY, a TEXT DEFAULT 'it''s (x)', b INTEGER DEFAULT -3, c REAL DEFAULT 1,"
        " made DATETIME DEFAULT CURRENT_TIMESTAMP, e TEXT DEFAULT (upper('x')), \"CHECK\" TEXT DEFAULT NULL)"
    )
    door.execute("INSERT INTO d (id) VALUES (1)")
    a, b, c, made, e, check = door.execute('SELECT a, b, c, made, e, "CHECK" FROM d').fetchone()
    assert (a, b, c, e, check) == ("it's (x)", -3, 1.0, "X", None)
    assert len(made) == 19


@pytest.mark.parametrize(
    ("ddl", "holds"),
    [("CREATE TABLE other (id INTEGER PRIMARY KEY)", True), ("ALTER TABLE t ADD COLUMN c TEXT DEFAULT 'd'", False)],
)
def test_schema_changed_under_a_writer(door: Connection, connect: Connect, ddl: str, holds: bool) -> None:
    writer = connect()
    writer.execute("UPDATE t SET b = 9 WHERE a = 'x'")
    door.execute(ddl)
    if holds:
        assert len(rows(writer, "SELECT * FROM t WHERE b > 0")) == 3
        writer.commit()
        assert rows(door, "SELECT b FROM t WHERE a = 'x'") == [(9,)]
    else:
        with pytest.raises(ConflictError):
            writer.commit()
        writer.execute("UPDATE t SET b = 9, c = 'e' WHERE a = 'x'")
        writer.commit()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT OR IGNORE INTO t VALUES (1, 'v', 2)",
        "insert or replace into t values (1, 'v', 2)",
        "REPLACE INTO t VALUES (1, 'v', 2)",
        "UPDATE OR IGNORE t SET id = 1",
    ],
)
def test_conflict_clause_is_refused_and_says_what_to_do(door: Connection, sql: str) -> None:
    before = rows(door, "SELECT * FROM t")
    with pytest.raises(sqlite3.NotSupportedError, match="catch it"):
        door.execute(sql)
    assert rows(door, "SELECT * FROM t") == before
    door.execute("INSERT OR ABORT INTO t VALUES (9, 'w', 2)")
    assert len(rows(door, "SELECT * FROM t")) == len(before) + 1
