"""Answers that do not fit a frame: the same rows in the same order, from pages as small as it takes."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from dht.errors import Invalid
from dht.model import Comparison
from dht.rows import decode_row
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.pages import PAGE_ROWS
from tests.nova_bridge.sql.conftest import CountingStore, small_frames

Connect = Callable[..., Connection]
ROWS_MAX = 3


@pytest.fixture
def filled(connect: Connect, store: CountingStore) -> Connection:
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
    small_frames(store, ROWS_MAX)
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


def test_pages_grow_again_behind_few_large_rows(
    connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4,000 rows one is so large that it fits by itself only."""
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE servers (id INTEGER PRIMARY KEY, host TEXT)")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO servers VALUES (?, 'h')", [(number,) for number in range(1, 4001)])
    connection.execute("COMMIT")
    find, sizes = store.find, list[int]()

    def with_a_large_row(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        sizes.append(len(result.rows))
        if len(result.rows) > 1 and any(decode_row(row.row)[1] == 7 for row in result.rows):
            raise Invalid("larger than a frame may be")
        return result

    monkeypatch.setattr(store, "find", with_a_large_row)
    found = connection.execute("SELECT id FROM servers WHERE host = 'h'").fetchall()
    assert found == [(number,) for number in range(1, 4001)]
    assert len(sizes) < 80
    assert sum(size > PAGE_ROWS / 4 for size in sizes) > 5


def test_descending_pages_ask_for_no_primary_key_without_a_value(filled: Connection, store: CountingStore) -> None:
    assert len(filled.execute("SELECT a, b FROM links ORDER BY a DESC, b DESC LIMIT 100").fetchall()) == 40
    asked = [constraint.comparison for query in store.questions for constraint in query.constraints]
    assert Comparison.LT in asked
    assert Comparison.IS_NULL not in asked


def test_row_that_moves_on_between_two_pages_is_there_once(
    filled: Connection, connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = connect(isolation_level=None)
    find, moved = store.find, list[int]()

    def moving(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        if not moved and len(result.rows) == ROWS_MAX and query.limit == ROWS_MAX:
            moved.append(decode_row(result.rows[0].row)[1])
            other.execute("UPDATE servers SET launched = '2027' WHERE id = ?", moved)
        return result

    monkeypatch.setattr(store, "find", moving)
    filled.execute("BEGIN")
    ids = [row[0] for row in filled.execute("SELECT id FROM servers ORDER BY launched, id LIMIT 100")]
    assert moved
    assert sorted(ids) == list(range(1, 41))
    assert ids[-1] == moved[0]


@pytest.fixture
def grouped(connect: Connect, store: CountingStore) -> Connection:
    """Rows 1 to 20, of two groups in turn; of any table the store gives three rows at most."""
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE instances (id INTEGER PRIMARY KEY, uuid VARCHAR(36), UNIQUE (uuid))")
    connection.execute("CREATE TABLE instance_metadata (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36), n INTEGER)")
    connection.execute("INSERT INTO instances VALUES (1, 'u0'), (2, 'u1')")
    rows = [(number, f"u{number % 2}") for number in range(1, 21)]
    connection.executemany("INSERT INTO instance_metadata VALUES (?, ?, 0)", rows)
    small_frames(store, ROWS_MAX)
    return connection


@pytest.mark.parametrize("limits", ["", " ORDER BY id LIMIT 15", " ORDER BY n, id LIMIT 100"])
def test_rows_of_a_group_that_changes_between_two_pages_are_of_one_state(
    grouped: Connection, connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch, limits: str
) -> None:
    other, find, pages = connect(isolation_level=None), store.find, list[int]()

    def moving(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        pages.append(len(result.rows))
        if len(pages) == 2:
            other.execute("UPDATE instance_metadata SET n = 1 WHERE instance_uuid = 'u1'")
        return result

    monkeypatch.setattr(store, "find", moving)
    grouped.execute("BEGIN")
    found = grouped.execute(f"SELECT id, n FROM instance_metadata{limits}").fetchall()
    assert len(pages) > 2
    assert len(found) == (15 if "15" in limits else 20)
    assert {n for number, n in found if number % 2} == {1}
    assert sorted(number for number, _ in found) == list(range(1, len(found) + 1))


def test_list_whose_rows_move_on_before_every_page_is_a_conflict(
    grouped: Connection, connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, find, asked = connect(isolation_level=None), store.find, list[int]()

    def moving(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        if query.order is not None and query.order.columns:
            asked.append(len(result.rows))
            assert len(asked) < 1000
            numbers = [decode_row(row.row)[1] for row in result.rows]
            listed = ", ".join(map(str, numbers))
            other.execute(f"UPDATE instance_metadata SET n = n + 1000 + {len(asked)} WHERE id IN ({listed or 0})")
        return result

    monkeypatch.setattr(store, "find", moving)
    with pytest.raises(sqlite3.OperationalError, match="groups kept changing"):
        grouped.execute("SELECT id FROM instance_metadata ORDER BY n, id LIMIT 100").fetchall()


def test_all_rows_of_a_table_that_never_stands_still_are_read_once(
    grouped: Connection, connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, find, pages = connect(isolation_level=None), store.find, list[int]()

    def moving(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        pages.append(len(result.rows))
        other.execute("UPDATE instance_metadata SET n = n + 1 WHERE instance_uuid = 'u1'")
        return result

    monkeypatch.setattr(store, "find", moving)
    found = grouped.execute("SELECT id, n FROM instance_metadata").fetchall()
    assert [number for number, _ in found] == list(range(1, 21))
    assert len({n for number, n in found if number % 2}) == 1
    assert sum(pages) < 30


@pytest.mark.parametrize("seed", range(12))
def test_random_reads_while_others_write_show_each_group_at_one_state(
    grouped: Connection, connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whoever changes one row of a group changes all of them by the same, and they move in the lists' orders."""
    grouped.execute("INSERT INTO instances VALUES (3, 'u2')")
    grouped.executemany("INSERT INTO instance_metadata VALUES (?, 'u2', 0)", [(number,) for number in range(21, 24)])
    chance, other, find, left = random.Random(seed), connect(isolation_level=None), store.find, [0]

    def moving(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        if left[0] and chance.random() < 0.4:
            left[0] -= 1
            change = f"UPDATE instance_metadata SET n = n + {chance.choice([1, -1])} WHERE instance_uuid = ?"
            other.execute(change, [f"u{chance.randint(0, 2)}"])
        return result

    monkeypatch.setattr(store, "find", moving)
    joined = "instances i LEFT JOIN instance_metadata m ON m.instance_uuid = i.uuid"
    for _ in range(12):
        left[0] = chance.randint(0, 4)
        order, rows = chance.choice(["n", "n DESC", "id", "id DESC"]), chance.randint(1, 23)
        sql = chance.choice(
            [
                "SELECT instance_uuid, n FROM instance_metadata",
                f"SELECT instance_uuid, n FROM instance_metadata ORDER BY {order}",
                f"SELECT instance_uuid, n FROM instance_metadata ORDER BY {order}, id LIMIT {rows}",
                f"SELECT i.uuid, m.n FROM {joined} WHERE i.id = 1 OR m.id > 2 ORDER BY m.{order} LIMIT {rows}",
                f"SELECT instance_uuid, n FROM instance_metadata m LEFT JOIN instances i ON i.uuid = m.instance_uuid"
                f" WHERE m.id < 15 OR i.id IS NOT 2 ORDER BY m.{order} LIMIT {rows}",
                "SELECT instance_uuid, n FROM instance_metadata WHERE id < 12 UNION ALL"
                " SELECT instance_uuid, n FROM instance_metadata WHERE id >= 12",
            ]
        )
        if chance.random() < 0.7:
            grouped.execute("BEGIN")
        found = grouped.execute(sql).fetchall()
        assert len(set(found)) == len({uuid for uuid, _ in found}), sql
        assert "LIMIT" in sql or len(found) == 23, sql
        if grouped.in_transaction:
            grouped.execute("COMMIT")


@pytest.fixture
def many(connect: Connect) -> Connection:
    """2,000 servers, every tenth without a size, and of three owners; two of them are known."""
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE servers (id INTEGER PRIMARY KEY, owner TEXT, made INTEGER, size INTEGER)")
    connection.execute("CREATE INDEX servers_made ON servers (made)")
    connection.execute("CREATE TABLE owners (name VARCHAR(64) PRIMARY KEY, mail TEXT)")
    connection.execute("BEGIN")
    rows = [(n, f"o{n % 3}", n // 3, None if n % 10 == 0 else n % 2) for n in range(1, 2001)]
    connection.executemany("INSERT INTO servers VALUES (?, ?, ?, ?)", rows)
    connection.execute("INSERT INTO owners VALUES ('o0', 'm'), ('o1', NULL)")
    connection.execute("COMMIT")
    return connection


LISTED = "SELECT s.id, o.mail FROM servers s LEFT JOIN owners o ON o.name = s.owner"


@pytest.mark.parametrize(
    ("condition", "limits", "given_max"),
    [
        ("s.made >= 0", (5, 0), 10),
        ("s.size IS NOT 1", (5, 3), 16),
        ("(s.size = 0 OR s.size IS NULL)", (20, 0), 36 * 9),
        ("lucd_eq_or_null(s.size, 0)", (20, 0), 36),
        ("o.mail IS NOT NULL", (100, 0), 116 * 9),
        ("(s.made < 40 OR s.made = 40 AND s.id < 122)", (5, 0), 2000),
        ("s.made <= max(40, 40) AND (s.made < 40 OR s.made = 40 AND s.id < 122)", (5, 0), 10),
        ("o.mail = 'nobody'", (1, 0), 2000),
    ],
)
def test_list_with_a_limit_beside_a_join_asks_for_what_it_reads(
    many: Connection, store: CountingStore, condition: str, limits: tuple[int, int], given_max: int
) -> None:
    given, find = [], store.find

    def counted(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        given.append(len(result.rows) if len(result.rows) > 2 else 0)
        return result

    store.find = counted  # type: ignore[method-assign]
    stock = sqlite3.connect(":memory:")
    stock.executescript("".join(many.iterdump()))
    stock.create_function("lucd_eq_or_null", 2, lambda value, other: value is None or value == other)
    given.clear()
    sql = f"{LISTED} WHERE {condition} ORDER BY s.made DESC, s.id DESC LIMIT ? OFFSET ?"
    assert many.execute(sql, limits).fetchall() == stock.execute(sql, limits).fetchall()
    assert sum(given) <= given_max
    stock.close()


def test_row_that_moves_on_while_a_list_is_read_is_shown_once(
    many: Connection, connect: Connect, store: CountingStore
) -> None:
    other, find, moved = connect(isolation_level=None), store.find, list[int]()

    def moving(query: Any, timeout_s: float | None = None) -> Any:
        result = find(query, timeout_s)
        if not moved and query.limit == 8:
            moved.append(decode_row(result.rows[0].row)[1])
            other.execute("UPDATE servers SET made = 1000 WHERE id = ?", moved)
        return result

    store.find = moving  # type: ignore[method-assign]
    many.execute("BEGIN")
    sql = f"{LISTED} WHERE s.id IN (1, 2, 1999) OR o.mail = 'nobody' ORDER BY s.made, s.id LIMIT 4"
    assert many.execute(sql).fetchall() == [(2, None), (1999, None), (1, None)]
    assert moved == [1]


def test_list_in_a_transaction_that_changed_the_table_shows_its_own_changes(many: Connection) -> None:
    many.execute("BEGIN")
    many.execute("UPDATE servers SET made = 1000 WHERE id = 3")
    many.execute("DELETE FROM servers WHERE id = 2000")
    sql = f"{LISTED} WHERE s.made > 0 ORDER BY s.made DESC, s.id DESC LIMIT 2"
    assert many.execute(sql).fetchall() == [(3, "m"), (1999, None)]
