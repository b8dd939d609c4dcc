"""A statement is planned once and run with all values: comparisons whose meaning depends on the other side, LIMIT."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from nova_bridge.sql.connection import Connection
from tests.nova_bridge.sql.conftest import CountingStore

Both = tuple[Connection, sqlite3.Connection]

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, size INTEGER, name TEXT, load REAL, part NUMERIC,"
    " raw BLOB)",
    "CREATE INDEX instances_size ON instances (size, name)",
    "CREATE INDEX instances_load ON instances (load)",
    "CREATE INDEX instances_raw ON instances (raw)",
    "CREATE TABLE others (id INTEGER NOT NULL PRIMARY KEY, number INTEGER, text TEXT, raw BLOB UNIQUE)",
    "CREATE TABLE keys (raw BLOB NOT NULL PRIMARY KEY, v INTEGER)",
]
LARGE = 2**53
INSTANCES = [
    (
        n,
        (None, 1, 2, 3)[n % 4],
        ("a", "b", None, "B", "1")[n % 5],
        (None, 1.0, 2.5, float(LARGE))[n // 2 % 4],
        (None, "x", 1, 2.5)[n % 4],
        (None, 1, "1", b"1", 1.0, "a")[n % 6],
    )
    for n in range(1, 21)
]
OTHERS = [(1, 1, "1", 1), (2, 2, "2", "1"), (3, None, "a", b"1"), (4, 3, None, "a"), (5, 5, "01", "01")]
COLUMNS = ("id", "size", "name", "load", "part", "raw")
VALUES: list[Any] = [
    None, 1, "1", 1.0, 2.5, b"1", "a", LARGE, LARGE + 1, float(LARGE), -1, "", "01", " 1", "1e0", float("nan"),
]  # fmt: skip


@pytest.fixture
def both(connect: Callable[..., Connection]) -> Any:
    door, stock = connect(isolation_level=None), sqlite3.connect(":memory:", isolation_level=None)
    for side in (door, stock):
        for sql in SCHEMA:
            side.execute(sql)
        side.executemany("INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?)", INSTANCES)
        side.executemany("INSERT INTO others VALUES (?, ?, ?, ?)", OTHERS)
        side.executemany("INSERT INTO keys VALUES (?, ?)", [(raw, id) for id, _, _, raw in OTHERS])
    yield door, stock
    stock.close()


def same(both: Both, sql: str, *runs: tuple[Any, ...]) -> None:
    """The same statement gives the same with all these values, one after the other."""
    for values in runs or ((),):
        assert outcome(both[0], sql, values) == outcome(both[1], sql, values), f"{sql} {values}"


def outcome(side: Any, sql: str, values: tuple[Any, ...]) -> Any:
    try:
        return side.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        return type(error), str(error)


@pytest.mark.parametrize("column", COLUMNS)
def test_comparison_run_with_values_of_all_types_same_rows_as_stock_sqlite(both: Both, column: str) -> None:
    one = [(value,) for value in VALUES]
    two = [(value, other) for value in VALUES for other in VALUES[::3]]
    asked = "SELECT id FROM instances WHERE"
    for operator in ("=", "!=", "<", "<=", ">", ">=", "IS", "IS NOT", "LIKE"):
        same(both, f"{asked} {column} {operator} ? ORDER BY id", *one)
        same(both, f"{asked} {column} {operator} ? ORDER BY id LIMIT 2", *one)
        same(both, f"{asked} NOT ({column} {operator} ?) ORDER BY id DESC LIMIT 2", *one)
    for listed in ("IN (?, ?)", "NOT IN (?, ?)", "BETWEEN ? AND ?", "NOT BETWEEN ? AND ?"):
        same(both, f"{asked} {column} {listed} ORDER BY id", *two)
        same(both, f"{asked} {column} {listed} ORDER BY id DESC LIMIT 2 OFFSET 1", *two)
    for listed in ("IN ()", "NOT IN ()", "IN (NULL)", "NOT IN (NULL)"):
        same(both, f"{asked} {column} {listed} ORDER BY id LIMIT 3")
    for other in ("number", "text", "raw"):
        rows = f"(SELECT {other} FROM others WHERE id > ?)"
        for listed in ("IN", "NOT IN", "IS", "="):
            same(both, f"{asked} {column} {listed} {rows} ORDER BY id LIMIT 9", (0,), (9,), (2,), (None,), (1,))


@pytest.mark.parametrize("column", COLUMNS)
def test_columns_compared_across_tables_same_rows_as_stock_sqlite(both: Both, column: str) -> None:
    for other in ("number", "text", "raw"):
        for operator in ("=", "!=", "<", ">=", "IS", "IS NOT"):
            on = f"i.{column} {operator} o.{other}"
            same(both, f"SELECT i.id, o.id FROM instances i JOIN others o ON {on} ORDER BY 1, 2")
            same(both, f"SELECT i.id, o.id FROM instances i LEFT JOIN others o ON {on} ORDER BY 1, 2")
            same(both, f"SELECT i.id, o.id FROM others o LEFT JOIN instances i ON {on} ORDER BY 1, 2")


@pytest.mark.parametrize("column", ["number", "text", "raw"])
def test_keys_of_no_type_compared_across_tables_same_rows_as_stock_sqlite(both: Both, column: str) -> None:
    """As numbers or as text, whichever the other side's column is of: then one key may be equal to several rows."""
    for kept in ("keys", "others"):
        same(both, f"SELECT o.id, k.raw FROM others o LEFT JOIN {kept} k ON k.raw = o.{column} ORDER BY 1, 2")
        same(both, f"SELECT id FROM others o WHERE {column} IN (SELECT raw FROM {kept}) ORDER BY id")
        same(both, f"SELECT raw FROM {kept} WHERE raw IN (SELECT {column} FROM others) ORDER BY raw")
        same(both, f"SELECT raw FROM {kept} WHERE raw = ?", *[(value,) for value in VALUES])
    for value in (1, 2, 5):
        key = f"(SELECT {column} FROM others WHERE id = {value})"
        counts = {side.execute(f"UPDATE keys SET v = v + 10 WHERE raw = {key}").rowcount for side in both}
        assert len(counts) == 1


@pytest.mark.parametrize("operator", ["=", "!=", "<", "<=", ">", ">=", "IS", "IS NOT"])
def test_row_values_compared_same_rows_as_stock_sqlite(both: Both, operator: str) -> None:
    runs = [(1, "b"), (None, "a"), (1, None), ("1", "a"), (2, "a"), (3, 1), (1, "B")]
    asked = f"SELECT id FROM instances WHERE (size, name) {operator} (?, ?)"
    for order in ("id", "id LIMIT 3", "size, name, id LIMIT 2", "size DESC, id DESC LIMIT 3 OFFSET 1"):
        same(both, f"{asked} ORDER BY {order}", *runs)
    same(both, f"SELECT id FROM instances WHERE (id, name) {operator} (?, ?) ORDER BY id LIMIT 3", (4, "b"), (5, "a"))
    inner = f"SELECT 1 FROM instances i WHERE (i.size, i.name) {operator} (o.number, o.text)"
    same(both, f"SELECT id, EXISTS ({inner}), (SELECT count(*) FROM ({inner} LIMIT 2)) FROM others o ORDER BY id")


def test_row_values_in_lists_same_rows_as_stock_sqlite(both: Both) -> None:
    asked = "SELECT id FROM instances WHERE (size, name)"
    for order in ("id", "id LIMIT 3", "size, name, id LIMIT 2"):
        same(both, f"{asked} IN (VALUES (?, ?), (2, 'b')) ORDER BY {order}", (1, "b"), (None, "b"), (1, None), ("1", 1))
        same(both, f"{asked} IN (SELECT number, text FROM others WHERE id > ?) ORDER BY {order}", (0,), (9,), (None,))
        same(both, f"{asked} BETWEEN (?, ?) AND (3, 'z') ORDER BY {order}", (1, "b"), (None, "b"), (1, None))


LIMITS: list[Any] = [2, 0, 100, -1, None, "2", "x", 2.0, 2.5, b"1"]


@pytest.mark.parametrize(
    "asked",
    [
        "SELECT id FROM instances ORDER BY id",
        "SELECT id FROM instances WHERE size = 1 ORDER BY name, id",
        "SELECT id FROM instances WHERE size >= 1 ORDER BY id DESC",
        "SELECT id FROM instances WHERE size = 1 OR name = 'a' ORDER BY id",
        "SELECT i.id, o.id FROM instances i LEFT JOIN others o ON o.number = i.size ORDER BY i.id, o.id",
        "SELECT DISTINCT size FROM instances ORDER BY size",
        "SELECT size, count(*) FROM instances GROUP BY size ORDER BY size",
        "SELECT id FROM instances WHERE id > 17 UNION ALL SELECT id + 50 FROM others ORDER BY id",
        "SELECT * FROM (SELECT id FROM instances WHERE size > 1 UNION ALL SELECT id + 50 FROM others) ORDER BY id",
    ],
)
def test_limit_run_with_values_of_all_kinds_same_rows_as_stock_sqlite(both: Both, asked: str) -> None:
    same(both, f"{asked} LIMIT ?", *[(limit,) for limit in LIMITS])
    same(both, f"{asked} LIMIT ? OFFSET ?", *[(limit, offset) for limit in LIMITS[:5] for offset in LIMITS])
    same(both, f"{asked} LIMIT ?, ?", *[(offset, limit) for limit in LIMITS[:5] for offset in LIMITS[:5]])
    same(both, f"{asked} LIMIT -1 OFFSET ?", *[(offset,) for offset in LIMITS])


@pytest.mark.parametrize("column", ["size", "name", "part", "raw"])
def test_text_compared_without_case_same_rows_as_stock_sqlite(both: Both, column: str) -> None:
    for value in ("'A'", "'X'", "'b'"):
        for operator in ("=", "!=", "<", "IS NOT"):
            for compared in (
                f"{column} {operator} {value} COLLATE NOCASE",
                f"{column} COLLATE NOCASE {operator} {value}",
            ):
                same(both, f"SELECT id FROM instances WHERE {compared} ORDER BY id LIMIT 3")
                found = f"EXISTS (SELECT 1 FROM instances i WHERE {compared} AND i.id > 3)"
                same(both, f"SELECT o.id, {found} FROM others o ORDER BY 1")


def test_plan_of_a_bound_limit_asks_the_store_for_as_many_rows(both: Both, store: CountingStore) -> None:
    """Or for a page of them, where the bound of a range may be a row value's, or a text's case may not matter."""
    for condition, value, ordered, limits in (
        ("size > ?", 1, "size, name", [2]),
        ("size >= ?", 1, "size, name", [4]),
        ("size = ?", 1, "name", [2]),
        ("size = ?", "x", "name", [2]),
        ("name IS NOT ?", None, "name", [2]),
        ("name IS NOT ?", "a", "size, name", [4]),
        ("size IS NOT ?", 7, "size, name", [2]),
    ):
        store.questions.clear()
        both[0].execute(f"SELECT id FROM instances WHERE {condition} ORDER BY {ordered} LIMIT ?", (value, 2)).fetchall()
        assert [query.limit for query in store.questions] == limits, condition


def test_real_written_to_a_text_column_is_found_by_its_value(both: Both) -> None:
    door = both[0]
    for number, real in enumerate((0.1 + 0.2, 1 / 3, 1e16, float(LARGE)), 100):
        door.execute("INSERT INTO instances (id, name) VALUES (?, ?)", (number, real))
        assert door.execute("SELECT id FROM instances WHERE name = ?", (real,)).fetchall() == [(number,)]
