"""Answers that do not fit a frame: the same rows in the same order, from pages as small as it takes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from dht.errors import Invalid
from nova_bridge.sql.connection import Connection
from tests.nova_bridge.sql.conftest import CountingStore

Connect = Callable[..., Connection]
ROWS_MAX = 3


@pytest.fixture
def filled(connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch) -> Connection:
    """Rows with equal values and NULLs in what they are ordered by; of any table the store gives three rows at most."""
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE servers (id INTEGER PRIMARY KEY, host TEXT, launched TEXT, size INTEGER)")
    connection.execute("CREATE TABLE users (name VARCHAR(64) PRIMARY KEY, mail TEXT)")
    connection.execute("CREATE TABLE links (a INTEGER, b TEXT, PRIMARY KEY (a, b))")
    connection.execute("BEGIN")
    for number in range(40):
        launched = None if number % 5 == 0 else f"2026-0{number % 3 + 1}-01"
        connection.execute(
            "INSERT INTO servers VALUES (?, 'h', ?, ?)", (number + 1, launched, None if number % 7 == 0 else number % 2)
        )
        connection.execute("INSERT INTO users VALUES (?, 'm')", (f"u{number * 7 % 40:02}",))
        connection.execute("INSERT INTO links VALUES (?, ?)", (number // 8, f"b{number % 8}"))
    connection.execute("COMMIT")
    find = store.find

    def small_find(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        if len(result.rows) > ROWS_MAX:
            raise Invalid("larger than a frame may be")
        return result

    monkeypatch.setattr(store, "find", small_find)
    return connection


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM servers WHERE host = 'h'",
        "SELECT id FROM servers WHERE host = 'h' ORDER BY launched DESC, size DESC, id DESC LIMIT 25",
        "SELECT id FROM servers WHERE host = 'h' ORDER BY launched, size, id LIMIT 33 OFFSET 2",
        "SELECT id FROM servers WHERE launched > '2026-01-15' ORDER BY launched DESC, id DESC LIMIT 17",
        "SELECT id FROM servers ORDER BY launched, size LIMIT 100",
        "SELECT id FROM servers ORDER BY launched DESC, id LIMIT 30",
        "SELECT name FROM users",
        "SELECT name FROM users ORDER BY name DESC LIMIT 31",
        "SELECT a, b FROM links ORDER BY a DESC, b DESC LIMIT 22",
        "SELECT a, b FROM links WHERE a IN (1, 3, 4) ORDER BY b, a LIMIT 20",
    ],
)
def test_rows_that_do_not_fit_a_frame_come_in_pages_in_the_order_asked_for(filled: Connection, sql: str) -> None:
    stock = sqlite3.connect(":memory:")
    stock.executescript("".join(filled.iterdump()))
    assert filled.execute(sql).fetchall() == stock.execute(sql).fetchall()
    stock.close()


def test_row_that_does_not_fit_a_frame_by_itself_is_a_data_error(
    filled: Connection, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_find(query: Any, timeout_s: float | None = None) -> Any:
        raise Invalid("larger than a frame may be")

    monkeypatch.setattr(store, "find", no_find)
    with pytest.raises(sqlite3.DataError, match="larger than a frame"):
        filled.execute("SELECT id FROM servers")
