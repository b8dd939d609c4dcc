"""A statement sees one schema and each group at one ballot, whatever others commit while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError

Connect = Callable[..., Connection]

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, host TEXT, a INTEGER,"
    " UNIQUE (uuid))",
    "CREATE INDEX instances_host ON instances (host)",
    "CREATE TABLE instance_extra (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36) NOT NULL,"
    " a INTEGER, b INTEGER)",
    "CREATE TABLE plain (id INTEGER NOT NULL PRIMARY KEY, a INTEGER, b INTEGER)",
    "CREATE TABLE shadow_plain (id INTEGER NOT NULL PRIMARY KEY, a INTEGER, b INTEGER)",
]
BOTH = (
    "SELECT i.a, (SELECT e.{} FROM instance_extra e WHERE e.instance_uuid = i.uuid) FROM instances i WHERE i.host = 'h'"
)
"""A find of instances; their groups are read when the subselect runs."""


@pytest.fixture
def two(connect: Connect) -> tuple[Connection, Connection]:
    first, second = connect(), connect()
    for sql in SCHEMA:
        first.execute(sql)
    first.execute("INSERT INTO instances VALUES (1, 'u1', 'h', 0)")
    first.execute("INSERT INTO instance_extra VALUES (1, 'u1', 0, 6)")
    first.execute("INSERT INTO plain VALUES (1, 1, 1)")
    first.commit()
    second.execute("SELECT * FROM plain")
    return first, second


def change_after_find(
    a: Connection, store: Any, monkeypatch: pytest.MonkeyPatch, times: int, counts: list[int]
) -> None:
    """Both rows of the group are changed, in one transaction, after each of so many finds."""
    real = store.find

    def find(*arguments: Any) -> Any:
        found = real(*arguments)
        if len(counts) < times:
            counts.append(len(counts) + 1)
            a.execute("UPDATE instances SET a = ? WHERE uuid = 'u1'", (counts[-1],))
            a.execute("UPDATE instance_extra SET a = ? WHERE instance_uuid = 'u1'", (counts[-1],))
            a.commit()
        return found

    monkeypatch.setattr(store, "find", find)


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("times", [1, 5])
def test_group_moves_between_find_and_read_its_rows_are_of_one_ballot(
    two: tuple[Connection, Connection], store: object, monkeypatch: pytest.MonkeyPatch, times: int, begin: bool
) -> None:
    a, b = two
    if begin:
        b.execute("BEGIN")
    change_after_find(a, store, monkeypatch, times, [])
    ((one, other),) = b.execute(BOTH.format("a")).fetchall()
    assert one == other


def test_column_added_meanwhile_rows_are_not_kept_without_it(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("ALTER TABLE instance_extra ADD COLUMN c TEXT DEFAULT 'c'")
    assert b.execute(BOTH.format("b")).fetchall() == [(0, 6)]
    assert b.execute("SELECT c FROM instance_extra WHERE instance_uuid = 'u1'").fetchall() == [("c",)]


def test_column_replaced_meanwhile_rows_are_not_kept_as_they_were(two: tuple[Connection, Connection]) -> None:
    a, b = two
    a.execute("ALTER TABLE instance_extra DROP COLUMN a")
    a.execute("ALTER TABLE instance_extra ADD COLUMN c TEXT")
    assert b.execute(BOTH.format("b")).fetchall() == [(0, 6)]
    assert b.execute("SELECT b, c FROM instance_extra WHERE instance_uuid = 'u1'").fetchall() == [(6, None)]


def test_column_replaced_meanwhile_row_is_written_to_the_columns_that_it_names(
    two: tuple[Connection, Connection],
) -> None:
    a, b = two
    a.execute("ALTER TABLE plain DROP COLUMN a")
    a.execute("ALTER TABLE plain ADD COLUMN c TEXT")
    b.execute("INSERT INTO plain (id, b) SELECT 2, 7 FROM instances WHERE host = 'h'")
    b.commit()
    assert a.execute("SELECT id, b, c FROM plain WHERE id = 2").fetchall() == [(2, 7, None)]


@pytest.mark.parametrize("column", ["a", "b"])
def test_row_changed_after_it_was_copied_is_not_deleted(two: tuple[Connection, Connection], column: str) -> None:
    """Only where what was copied is old: the copy leaves b out."""
    a, b = two
    b.execute("INSERT INTO shadow_plain (id, a) SELECT id, a FROM plain WHERE id IN (1)")
    assert b.execute("DELETE FROM plain WHERE id IN (1)").rowcount == 1
    a.execute(f"UPDATE plain SET {column} = 5 WHERE id = 1")
    a.commit()
    if column == "b":
        b.commit()
        return
    with pytest.raises(ConflictError):
        b.commit()
    assert a.execute("SELECT a FROM plain").fetchall() == [(5,)]
