"""Two processes on one store: guards by column, duplicates at the statement and at COMMIT, unknown outcomes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest

from dht.errors import Conflict, Indeterminate, Unavailable
from dht.model import Transaction
from nova_bridge.sql import commit
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError, IndeterminateError, UnavailableError

Connect = Callable[..., Connection]

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, host VARCHAR(255),"
    " task_state VARCHAR(255), vcpus INTEGER, updated_at DATETIME, deleted INTEGER, UNIQUE (uuid))",
    "CREATE INDEX instances_host ON instances (host)",
    "CREATE TABLE services (id INTEGER NOT NULL PRIMARY KEY, host VARCHAR(255), binary VARCHAR(255),"
    " report_count INTEGER NOT NULL, disabled BOOLEAN, last_seen_up DATETIME, updated_at DATETIME, deleted INTEGER,"
    " CONSTRAINT uniq_services UNIQUE (host, binary, deleted))",
    "CREATE TABLE flavors (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255) NOT NULL, UNIQUE (name))",
]


@pytest.fixture
def two(connect: Connect) -> tuple[Connection, Connection]:
    first = connect()
    for sql in SCHEMA:
        first.execute(sql)
    first.execute("INSERT INTO instances (id, uuid, host, vcpus, deleted) VALUES (1, 'u1', 'h1', 4, 0)")
    first.execute("INSERT INTO services (host, binary, report_count, deleted) VALUES ('h1', 'nova-compute', 0, 0)")
    first.commit()
    return first, connect()


def one(connection: Connection, sql: str) -> object:
    row = connection.execute(sql).fetchone()
    return row[0] if row else None


def test_different_columns_both_succeed(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side, column in ((a, "host"), (b, "vcpus")):
        side.execute("BEGIN")
        assert side.execute("SELECT * FROM instances WHERE uuid = 'u1'").fetchall()
        value = "h2" if column == "host" else 8
        side.execute(f"UPDATE instances SET {column} = ?, updated_at = 'now-{column}' WHERE instances.id = 1", (value,))
    a.commit()
    b.commit()
    assert a.execute("SELECT host, vcpus, updated_at FROM instances").fetchall() == [("h2", 8, "now-vcpus")]


def test_same_column_read_before_second_conflicts(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side in two:
        side.execute("BEGIN")
        side.execute("SELECT task_state FROM instances WHERE uuid = 'u1'")
        side.execute("UPDATE instances SET task_state = 'x' WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()
    assert not b.in_transaction


def test_column_read_by_a_find_guards_an_update_by_key(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side in two:
        side.execute("BEGIN")
        assert side.execute("SELECT task_state FROM instances WHERE host = 'h1'").fetchall() == [(None,)]
        side.execute("UPDATE instances SET task_state = 'x' WHERE uuid = 'u1'")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()


def test_column_read_after_an_own_change_guards(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("UPDATE instances SET host = 'h7' WHERE id = 1")
    b.execute("UPDATE instances SET host = 'h8' WHERE id = 1")
    assert b.execute("SELECT vcpus FROM instances WHERE id = 1").fetchall() == [(4,)]
    b.execute("UPDATE instances SET host = 'h9' WHERE id = 1")
    b.execute("UPDATE instances SET vcpus = 5 WHERE id = 1")
    a.execute("UPDATE instances SET vcpus = 6 WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()


def test_same_column_never_read_last_write_wins(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("UPDATE instances SET task_state = 'a' WHERE id = 1")
    b.execute("UPDATE instances SET task_state = 'b' WHERE id = 1")
    a.commit()
    b.commit()
    assert one(a, "SELECT task_state FROM instances") == "b"


def test_compare_and_swap_one_winner(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side in two:
        cursor = side.execute("UPDATE instances SET task_state = 'mine' WHERE uuid = 'u1' AND task_state IS NULL")
        assert cursor.rowcount == 1
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()
    assert b.execute("UPDATE instances SET task_state = 'm' WHERE uuid = 'u1' AND task_state IS NULL").rowcount == 0


def test_increment_second_conflicts(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side in two:
        side.execute("UPDATE instances SET vcpus = vcpus + 1 WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()
    assert one(a, "SELECT vcpus FROM instances") == 5


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE instances SET vcpus = vcpus + 1 WHERE host = 'h1' OR task_state = 'x'",
        "UPDATE instances SET vcpus = (SELECT i.vcpus + 1 FROM instances i WHERE i.id = 1) WHERE id = 1",
    ],
)
def test_increment_by_or_or_subselect_second_conflicts(two: tuple[Connection, Connection], change: str) -> None:
    a, b = two
    for side in two:
        side.execute(change)
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()
    assert one(a, "SELECT vcpus FROM instances") == 5


def test_column_added_with_a_default_guards_rows_from_before(connect: Connect) -> None:
    a, b = connect(), connect()
    a.execute("CREATE TABLE cells (id INTEGER NOT NULL PRIMARY KEY, name TEXT)")
    a.execute("INSERT INTO cells (name) VALUES ('one'), ('two')")
    a.commit()
    a.execute("ALTER TABLE cells ADD COLUMN size INTEGER DEFAULT 5")
    for side in (a, b):
        side.execute("UPDATE cells SET size = size + 1 WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()
    b.execute("UPDATE cells SET name = 'small' WHERE size = 5")
    b.commit()
    assert a.execute("SELECT name, size FROM cells ORDER BY id").fetchall() == [("one", 6), ("small", 5)]
    a.execute("CREATE UNIQUE INDEX cells_size ON cells (size)")
    with pytest.raises(sqlite3.IntegrityError, match=r"^UNIQUE constraint failed: cells.size$"):
        a.execute("INSERT INTO cells (name) VALUES ('three')")


def test_merge_columns_guard_nothing(two: tuple[Connection, Connection]) -> None:
    for number, side in enumerate(two):
        side.execute("BEGIN")
        side.execute("SELECT * FROM services WHERE host = 'h1'")
        side.execute("UPDATE services SET report_count = ?, last_seen_up = 't' WHERE id = 1", (number + 7,))
    for side in two:
        side.commit()
    assert one(two[0], "SELECT report_count FROM services") == 8


def test_row_deleted_meanwhile_update_conflicts(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("UPDATE instances SET vcpus = 1 WHERE id = 1")
    a.execute("DELETE FROM instances WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.commit()


def test_duplicate_at_statement_when_committed_before(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("INSERT INTO services (host, binary, report_count, deleted) VALUES ('h2', 'nova-compute', 0, 0)")
    a.commit()
    with pytest.raises(
        sqlite3.IntegrityError, match=r"^UNIQUE constraint failed: services.host, services.binary, serv"
    ):
        b.execute("INSERT INTO services (host, binary, report_count, deleted) VALUES ('h2', 'nova-compute', 0, 0)")
    b.rollback()


def test_duplicate_at_commit_when_raced(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side in two:
        side.execute("INSERT INTO services (host, binary, report_count, deleted) VALUES ('h3', 'nova-compute', 0, 0)")
    a.commit()
    with pytest.raises(
        sqlite3.IntegrityError, match=r"^UNIQUE constraint failed: services.host, services.binary, serv"
    ):
        b.commit()
    assert one(b, "SELECT count(*) FROM services WHERE host = 'h3'") == 1


def test_duplicate_inside_group_at_commit_when_raced(two: tuple[Connection, Connection]) -> None:
    a, b = two
    for side in two:
        side.execute("INSERT INTO flavors (name) VALUES ('m1')")
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=r"^UNIQUE constraint failed: flavors.name$"):
        b.commit()


def test_soft_deleted_row_frees_its_unique_values(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("UPDATE services SET deleted = id WHERE host = 'h1'")
    a.execute("INSERT INTO services (host, binary, report_count, deleted) VALUES ('h1', 'nova-compute', 0, 0)")
    a.commit()
    assert b.execute("SELECT id FROM services WHERE host = 'h1' AND binary = 'nova-compute' AND deleted = 0").fetchall()
    with pytest.raises(sqlite3.IntegrityError):
        b.execute("INSERT INTO services (host, binary, report_count, deleted) VALUES ('h1', 'nova-compute', 0, 0)")


@pytest.mark.parametrize("kind", ["VARCHAR(36)", "BOOLEAN", "INTEGER"])
def test_deleted_that_is_not_the_rows_own_id_is_part_of_a_unique_key_as_any_column(
    two: tuple[Connection, Connection], kind: str
) -> None:
    a, b = two
    a.execute(
        f"CREATE TABLE shares (id INTEGER NOT NULL PRIMARY KEY, name TEXT, deleted {kind}, UNIQUE (name, deleted))"
    )
    gone = {"VARCHAR(36)": "False", "BOOLEAN": 1, "INTEGER": 9}[kind]
    a.execute("INSERT INTO shares (name, deleted) VALUES ('s', ?)", (gone,))
    a.commit()
    with pytest.raises(sqlite3.IntegrityError, match=r"^UNIQUE constraint failed: shares.name, shares.deleted$"):
        b.execute("INSERT INTO shares (name, deleted) VALUES ('s', ?)", (gone,))
    b.rollback()
    b.execute("INSERT INTO shares (id, name, deleted) VALUES (5, 's', '0')")
    b.execute("UPDATE shares SET deleted = id WHERE id = 5")
    b.execute("INSERT INTO shares (name, deleted) VALUES ('s', '0')")
    b.commit()
    assert one(a, "SELECT count(*) FROM shares") == 3


def test_group_changed_under_reader_newer_is_seen(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("SELECT * FROM instances WHERE uuid = 'u1'")
    a.execute("UPDATE instances SET host = 'h9', vcpus = 16 WHERE id = 1")
    a.commit()
    assert b.execute("SELECT vcpus FROM instances WHERE host = 'h9'").fetchall() == [(16,)]
    assert b.execute("SELECT vcpus FROM instances WHERE uuid = 'u1'").fetchall() == [(16,)]
    b.execute("UPDATE instances SET vcpus = 17 WHERE id = 1")
    with pytest.raises(ConflictError):
        b.commit()


def test_group_changed_under_writer_conflicts(two: tuple[Connection, Connection]) -> None:
    a, b = two
    b.execute("BEGIN")
    b.execute("SELECT * FROM instances WHERE uuid = 'u1'")
    b.execute("INSERT INTO flavors (name) VALUES ('x')")
    a.execute("UPDATE instances SET host = 'h9' WHERE id = 1")
    a.commit()
    with pytest.raises(ConflictError):
        b.execute("SELECT vcpus FROM instances WHERE host = 'h9'")
    b.rollback()


def test_rollback_without_writes_asks_nothing(two: tuple[Connection, Connection], store: object) -> None:
    a, _ = two
    a.execute("BEGIN")
    a.execute("SELECT * FROM instances WHERE uuid = 'u1'").fetchall()
    store.calls.clear()  # type: ignore[attr-defined]
    a.rollback()
    a.rollback()
    assert store.calls == []  # type: ignore[attr-defined]


def test_store_unavailable_named_as_such(
    two: tuple[Connection, Connection], store: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise Unavailable("no quorum")

    a, _ = two
    a.execute("UPDATE instances SET vcpus = 3 WHERE id = 1")
    monkeypatch.setattr(store, "commit", refuse)
    with pytest.raises(UnavailableError):
        a.commit()
    monkeypatch.setattr(store, "read", refuse)
    with pytest.raises(UnavailableError):
        a.execute("SELECT * FROM instances WHERE uuid = 'other'")


def test_store_unavailable_where_a_commit_needs_the_newer_catalog_is_told_as_such(
    two: tuple[Connection, Connection], store: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise Unavailable("no quorum")

    a, b = two
    a.execute("UPDATE instances SET vcpus = 3 WHERE id = 1")
    b.execute("CREATE TABLE other (id INTEGER NOT NULL PRIMARY KEY)")
    monkeypatch.setattr(store, "read", refuse)
    with pytest.raises(UnavailableError):
        a.commit()
    monkeypatch.undo()
    assert one(b, "SELECT vcpus FROM instances") == 4


@pytest.mark.parametrize(
    ("answer", "raised"), [("applied", None), ("not_applied", ConflictError), ("unknown", IndeterminateError)]
)
def test_indeterminate_commit_outcome_is_asked(
    two: tuple[Connection, Connection],
    store: object,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    raised: type[Exception] | None,
) -> None:
    def lose(*arguments: object) -> None:
        raise Indeterminate("no reply")

    a, _ = two
    a.execute("UPDATE instances SET vcpus = 3 WHERE id = 1")
    monkeypatch.setattr(store, "commit", lose)
    monkeypatch.setattr(store, "outcome", lambda *arguments: answer)
    if raised is None:
        a.commit()
    else:
        with pytest.raises(raised):
            a.commit()


def test_group_held_by_undecided_transaction_waits_then_conflicts(
    two: tuple[Connection, Connection], store: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[bytes] = []
    real = store.commit  # type: ignore[attr-defined]

    def held(transaction: Transaction, *arguments: object) -> object:
        ids.append(transaction.id)
        if len(ids) < 3:
            raise Conflict("another transaction holds one of the groups", part=0, what="intent", index=0)
        return real(transaction, *arguments)

    a, b = two
    monkeypatch.setattr(store, "commit", held)
    a.execute("UPDATE instances SET vcpus = 3 WHERE id = 1")
    a.commit()
    assert len(set(ids)) == 3
    assert one(b, "SELECT vcpus FROM instances WHERE id = 1") == 3
    ids.clear()
    monkeypatch.setattr(commit, "LOCK_WAIT_S", 0.0)
    a.execute("UPDATE instances SET vcpus = 4 WHERE id = 1")
    with pytest.raises(ConflictError, match="holds one of the groups"):
        a.commit()
    assert len(ids) == 1


def test_ids_from_two_processes_ascend_inside_a_group(connect: Connect) -> None:
    a, b = connect(), connect()
    a.execute("CREATE TABLE instance_faults (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36), code INTEGER)")
    for number in range(6):
        side = (a, b)[number % 2]
        side.execute("INSERT INTO instance_faults (instance_uuid, code) VALUES ('u1', ?)", (number,))
        side.commit()
    assert [r[0] for r in a.execute("SELECT code FROM instance_faults ORDER BY id")] == [0, 1, 2, 3, 4, 5]


def test_large_delete_alone_is_cut_into_pieces(
    connect: Connect, store: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "DELETE_ROWS_MAX", 10)
    a = connect()
    a.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
    a.executemany("INSERT INTO events (name) VALUES (?)", [(f"e{n}",) for n in range(35)])
    a.commit()
    store.calls.clear()  # type: ignore[attr-defined]
    assert a.execute("DELETE FROM events").rowcount == 35
    a.commit()
    assert store.calls.count("commit") == 4  # type: ignore[attr-defined]
    a.execute("INSERT INTO events (name) VALUES ('e1')")
    a.commit()
    assert connect().execute("SELECT name FROM events").fetchall() == [("e1",)]


def test_value_over_the_limit_is_a_data_error(connect: Connect) -> None:
    a = connect()
    a.execute("CREATE TABLE blobs (id INTEGER PRIMARY KEY, data BLOB)")
    a.execute("INSERT INTO blobs (data) VALUES (?)", (b"x" * (5 * 1024 * 1024),))
    with pytest.raises(sqlite3.DataError, match="4"):
        a.commit()
    assert a.execute("SELECT count(*) FROM blobs").fetchall() == [(0,)]


def test_row_that_breaks_two_unique_keys_the_one_defined_first_is_named(two: tuple[Connection, Connection]) -> None:
    a, _ = two
    a.execute("CREATE TABLE twice (id INTEGER PRIMARY KEY, a TEXT, b TEXT, UNIQUE (a), UNIQUE (b))")
    a.execute("INSERT INTO twice (a, b) VALUES ('x', 'y')")
    with pytest.raises(sqlite3.IntegrityError, match=r"twice\.a$"):
        a.execute("INSERT INTO twice (a, b) VALUES ('x', 'y')")


@pytest.mark.parametrize("change_first", [False, True])
def test_unique_key_with_a_column_that_was_added_with_a_default_holds_against_rows_from_before(
    connect: Connect, change_first: bool
) -> None:
    a, b = connect(), connect()
    a.execute("CREATE TABLE quotas (id INTEGER NOT NULL PRIMARY KEY, project_id VARCHAR(255), resource VARCHAR(255))")
    a.execute("INSERT INTO quotas (project_id, resource) VALUES ('p', 'cores')")
    a.commit()
    a.execute("ALTER TABLE quotas ADD COLUMN zone VARCHAR(255) DEFAULT 'z'")
    a.execute("CREATE UNIQUE INDEX uniq_quotas ON quotas (project_id, resource, zone)")
    b.execute("SELECT count(zone) FROM quotas")
    a.execute("UPDATE quotas SET resource = 'ram'")
    b.execute("INSERT INTO quotas (project_id, resource, zone) VALUES ('p', 'ram', 'z')")
    first, second = (a, b) if change_first else (b, a)
    first.commit()
    with pytest.raises(sqlite3.IntegrityError, match=r"^UNIQUE constraint failed: quotas.project_id, quotas.resource"):
        second.commit()
