"""The door against stock sqlite3: the same random statements give the same rows, counts and errors."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from nova_bridge.sql.connection import Connection

SCHEMA = [
    # The names have rules in families.yaml, so that family groups, whole groups and row groups all take part.
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, host VARCHAR(255),"
    " vcpus INTEGER, memory FLOAT, updated_at DATETIME, deleted INTEGER DEFAULT 0, UNIQUE (uuid))",
    "CREATE INDEX instances_host ON instances (host, deleted)",
    "CREATE TABLE instance_metadata (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36),"
    " key VARCHAR(255), value VARCHAR(255), deleted INTEGER DEFAULT 0)",
    "CREATE INDEX metadata_uuid ON instance_metadata (instance_uuid)",
    "CREATE TABLE tags (resource_id VARCHAR(36) NOT NULL, tag VARCHAR(80) NOT NULL, PRIMARY KEY (resource_id, tag))",
    "CREATE TABLE flavors (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255) NOT NULL, size INTEGER, UNIQUE (name))",
    "CREATE TABLE plain (a INTEGER, b TEXT, c NUMERIC, d BLOB)",
    "CREATE TABLE pairs (id INTEGER NOT NULL PRIMARY KEY, x TEXT, y INTEGER, UNIQUE (x, y))",
]
TABLES = {
    "instances": ["id", "uuid", "host", "vcpus", "memory", "updated_at", "deleted"],
    "instance_metadata": ["id", "instance_uuid", "key", "value", "deleted"],
    "tags": ["resource_id", "tag"],
    "flavors": ["id", "name", "size"],
    "plain": ["a", "b", "c", "d"],
    "pairs": ["id", "x", "y"],
}
KEYS = {"instances": "id", "instance_metadata": "id", "flavors": "id", "pairs": "id"}


class Generator:
    """Statements over few values, so that they meet."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._next = 0

    def value(self, column: str) -> Any:
        chance = self.random
        if column in {"id"}:
            return chance.randint(1, 12)
        if column in {"uuid", "instance_uuid", "resource_id"}:
            return f"u{chance.randint(1, 5)}"
        if column in {"vcpus", "deleted", "size", "y", "a"}:
            return chance.choice([0, 0, 1, 2, None, "3", 4.0])
        if column in {"memory", "c"}:
            return chance.choice([1, 2.5, "7", "x", None, "1e2"])
        if column == "d":
            return chance.choice([b"\x00\xff", "text", 5, None])
        return chance.choice(["alpha", "beta", "Alpha", "", None, 12, "12"])

    def condition(self, table: str, depth: int = 0) -> tuple[str, list[Any]]:
        chance = self.random
        column = chance.choice(TABLES[table])
        kind = chance.randint(0, 9 if depth < 2 else 6)
        if kind <= 2:
            return f"{column} = ?", [self.value(column)]
        if kind == 3:
            values = [self.value(column) for _ in range(chance.randint(1, 3))]
            return f"{column} IN ({', '.join('?' * len(values))})", values
        if kind == 4:
            return f"{column} {chance.choice(['<', '<=', '>', '>=', '!='])} ?", [self.value(column)]
        if kind == 5:
            return f"{column} IS {chance.choice(['', 'NOT '])}NULL", []
        if kind == 6:
            return f"{column} LIKE ?", [chance.choice(["a%", "%e%", "1_"])]
        left, first = self.condition(table, depth + 1)
        right, second = self.condition(table, depth + 1)
        return f"({left} {chance.choice(['AND', 'OR', 'AND'])} {right})", first + second

    def statement(self) -> tuple[str, list[Any]]:
        chance = self.random
        table = chance.choice(list(TABLES))
        columns = TABLES[table]
        where, arguments = self.condition(table)
        match chance.randint(0, 9):
            case 0 | 1 | 2:
                chosen = [c for c in columns if c != "id"]
                values = [self.value(c) for c in chosen]
                if table in KEYS:
                    self._next += 1
                    chosen, values = (
                        ["id", *chosen],
                        [chance.choice([self._next, self._next, self.value("id")]), *values],
                    )
                return f"INSERT INTO {table} ({', '.join(chosen)}) VALUES ({', '.join('?' * len(chosen))})", values
            case 3 | 4:
                column = chance.choice([c for c in columns if c != "id"])
                if column in {"vcpus", "size", "y", "a"} and chance.random() < 0.5:
                    return f"UPDATE {table} SET {column} = {column} + 1 WHERE {where}", arguments
                return f"UPDATE {table} SET {column} = ? WHERE {where}", [self.value(column), *arguments]
            case 5:
                return f"DELETE FROM {table} WHERE {where}", arguments
            case 6:
                joined = "SELECT i.id, i.host, m.key, m.value FROM instances i LEFT JOIN instance_metadata m ON"
                return f"{joined} m.instance_uuid = i.uuid AND m.deleted = 0 WHERE i.deleted = ?", [0]
            case 7:
                return f"SELECT count(*), max({columns[0]}), min({columns[-1]}) FROM {table} WHERE {where}", arguments
            case 8:
                order = ", ".join(columns)
                order = f"{order}" if chance.random() < 0.5 else ", ".join(f"{c} DESC" for c in columns)
                limit = chance.randint(1, 5)
                return f"SELECT * FROM {table} WHERE {where} ORDER BY {order} LIMIT {limit}", arguments
            case _:
                return f"SELECT * FROM {table} WHERE {where}", arguments


def outcome(connection: Any, sql: str, arguments: Any) -> Any:
    try:
        cursor = connection.execute(sql, arguments)
    except sqlite3.Error as error:
        return type(error).__mro__[-4].__name__, str(error)
    rows = cursor.fetchall()
    ordered = rows if "ORDER BY" in sql else sorted(rows, key=repr)
    return ordered, cursor.rowcount


def control(chance: random.Random, both: list[Any], state: list[str]) -> None:
    """A transaction's statement to both sides."""
    step = chance.randint(0, 4)
    if not state:
        sql = "BEGIN"
        state.append(sql)
    elif step == 0:
        sql = "COMMIT"
        state.clear()
    elif step == 1:
        sql = "ROLLBACK"
        state.clear()
    elif step == 2:
        sql = f"SAVEPOINT s{len(state)}"
        state.append(f"s{len(state)}")
    elif len(state) > 1:
        sql = f"{'ROLLBACK TO' if step == 3 else 'RELEASE'} {state[-1]}"
        if step == 4:
            state.pop()
    else:
        return
    for side in both:
        side.execute(sql)


@pytest.mark.parametrize("seed", range(24))
def test_random_statements_same_as_stock_sqlite(seed: int, connect: Callable[..., Connection]) -> None:
    door = connect(foreign_keys=False, isolation_level=None)
    stock = sqlite3.connect(":memory:", isolation_level=None)
    for sql in SCHEMA:
        door.execute(sql)
        stock.execute(sql)
    generator = Generator(seed)
    state: list[str] = []
    for step in range(250):
        if generator.random.random() < 0.12:
            control(generator.random, [stock, door], state)
            continue
        sql, arguments = generator.statement()
        expected, got = outcome(stock, sql, arguments), outcome(door, sql, arguments)
        assert got == expected, f"step {step}: {sql} {arguments}"
    if state:
        stock.execute("COMMIT")
        door.execute("COMMIT")
    other = connect(foreign_keys=False)
    for table in TABLES:
        sql = f"SELECT * FROM {table}"
        assert outcome(other, sql, [])[0] == outcome(stock, sql, [])[0], table
    stock.close()


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_processes_taking_turns_same_as_stock_sqlite(seed: int, connect: Callable[..., Connection]) -> None:
    doors = [connect(foreign_keys=False, isolation_level=None) for _ in range(3)]
    stock = sqlite3.connect(":memory:", isolation_level=None)
    for sql in SCHEMA:
        doors[0].execute(sql)
        stock.execute(sql)
    generator = Generator(seed)
    for step in range(200):
        sql, arguments = generator.statement()
        door = generator.random.choice(doors)
        expected, got = outcome(stock, sql, arguments), outcome(door, sql, arguments)
        assert got == expected, f"step {step}: {sql} {arguments}"
    stock.close()


def test_text_compared_with_numbers_same_as_stock_sqlite(connect: Callable[..., Connection]) -> None:
    door, stock = connect(foreign_keys=False, isolation_level=None), sqlite3.connect(":memory:", isolation_level=None)
    for side in (door, stock):
        side.execute("CREATE TABLE words (id INTEGER NOT NULL PRIMARY KEY, word TEXT)")
        side.execute("CREATE INDEX words_word ON words (word)")
        side.execute("CREATE TABLE numbers (id INTEGER NOT NULL PRIMARY KEY, number INTEGER)")
        side.execute("INSERT INTO words (word) VALUES ('01'), ('1'), ('1.0'), ('2'), ('x')")
        side.execute("INSERT INTO numbers (number) VALUES (1), (2)")
        for real in (1e17, 1.5e300, 0.1, 1e-7, 100.0, -0.0, 0.375, 2.5):
            side.execute("INSERT INTO words (word) VALUES (?)", (real,))
    for sql in (
        "SELECT w.id FROM numbers n JOIN words w ON w.word = n.number ORDER BY 1",
        "SELECT id FROM words WHERE word IN (SELECT number FROM numbers) ORDER BY id",
        "SELECT id FROM words WHERE word = 1",
        "SELECT id FROM words WHERE word > 1 ORDER BY id LIMIT 3",
        "SELECT word FROM words ORDER BY id",
    ):
        assert door.execute(sql).fetchall() == stock.execute(sql).fetchall(), sql
    stock.close()


@pytest.mark.parametrize("key", ["id INTEGER PRIMARY KEY, word TEXT UNIQUE", "word TEXT PRIMARY KEY"])
def test_unique_text_compared_with_numbers_is_more_than_one_row(connect: Callable[..., Connection], key: str) -> None:
    door, stock = connect(foreign_keys=False, isolation_level=None), sqlite3.connect(":memory:", isolation_level=None)
    number = "(SELECT number FROM numbers WHERE id = 1)"
    for side in (door, stock):
        side.execute(f"CREATE TABLE words ({key}, v INTEGER)")
        side.execute("CREATE TABLE numbers (id INTEGER NOT NULL PRIMARY KEY, number INTEGER)")
        side.execute("INSERT INTO words (word, v) VALUES ('01', 0), ('1', 0), ('2', 0)")
        side.execute("INSERT INTO numbers VALUES (1, 1)")
    for sql in (f"UPDATE words SET v = 1 WHERE word = {number}", f"DELETE FROM words WHERE word = {number}"):
        assert door.execute(sql).rowcount == stock.execute(sql).rowcount == 2
        left = "SELECT word, v FROM words ORDER BY word"
        assert door.execute(left).fetchall() == stock.execute(left).fetchall()
    stock.close()


def test_returning_of_other_than_inserted_columns_refused_with_what_to_do(connect: Callable[..., Connection]) -> None:
    door = connect()
    door.execute("CREATE TABLE words (id INTEGER NOT NULL PRIMARY KEY, word TEXT)")
    for sql in (
        "INSERT INTO words (word) VALUES ('x') RETURNING id + 1",
        "UPDATE words SET word = 'x' RETURNING id",
        "DELETE FROM words RETURNING id",
    ):
        with pytest.raises(sqlite3.NotSupportedError, match="in place of RETURNING"):
            door.execute(sql)
    door.execute("INSERT INTO words (word) VALUES (' RETURNING id')")
    door.commit()
    assert door.execute("SELECT count(*) FROM words").fetchall() == [(1,)]


def numbered(side: Any, sql: str) -> Any:
    """Rows, count, the last row's number."""
    try:
        cursor = side.execute(sql)
    except sqlite3.Error as error:
        return type(error), str(error)
    return cursor.fetchall(), cursor.rowcount, cursor.lastrowid if sql.startswith("INSERT") else None


def test_rowid_of_a_table_without_a_key_set_same_as_stock_sqlite(connect: Callable[..., Connection]) -> None:
    door, stock = connect(isolation_level=None), sqlite3.connect(":memory:", isolation_level=None)
    rows = "SELECT rowid, a FROM plain ORDER BY rowid"
    for sql in (
        "CREATE TABLE plain (a INTEGER)",
        "INSERT INTO plain VALUES (1), (2), (3)",
        "INSERT INTO plain (rowid, a) VALUES (7, 4)",
        "INSERT INTO plain (rowid, a) VALUES (7, 5)",
        "INSERT INTO plain VALUES (6)",
        rows,
        "UPDATE plain SET rowid = 20, a = 30 WHERE a = 2",
        "UPDATE plain SET rowid = 7 WHERE a = 1",
        "UPDATE plain SET rowid = rowid + 100 WHERE a > 4",
        rows,
        "DELETE FROM plain WHERE rowid = 20",
        "INSERT INTO plain VALUES (8)",
        rows,
        "INSERT INTO plain (rowid, a) SELECT 300 + a, a FROM plain ORDER BY rowid LIMIT 2",
        "SELECT last_insert_rowid()",
        "CREATE TABLE keyed (id INTEGER NOT NULL PRIMARY KEY, a INTEGER)",
        "INSERT INTO keyed (rowid, a) VALUES (9, 1)",
        "SELECT last_insert_rowid()",
        "UPDATE keyed SET rowid = 10",
        "UPDATE keyed SET id = NULL",
        "UPDATE keyed SET id = 'x'",
        "INSERT INTO keyed (id) VALUES (10)",
        "SELECT last_insert_rowid()",
        "SELECT * FROM keyed",
    ):
        assert numbered(door, sql) == numbered(stock, sql), sql
    stock.close()


def test_rowid_of_a_table_with_another_key_set_is_refused_with_what_to_do(connect: Callable[..., Connection]) -> None:
    door = connect()
    door.execute("CREATE TABLE words (word TEXT NOT NULL PRIMARY KEY, v INTEGER)")
    door.execute("INSERT INTO words VALUES ('a', 1)")
    for sql in ("UPDATE words SET rowid = 5", "INSERT INTO words (rowid, word) VALUES (5, 'b')"):
        with pytest.raises(sqlite3.NotSupportedError, match="name the columns of its primary key"):
            door.execute(sql)


def test_defaults_of_columns_that_an_insert_does_not_name_same_as_stock_sqlite(
    connect: Callable[..., Connection],
) -> None:
    door, stock = connect(isolation_level=None), sqlite3.connect(":memory:", isolation_level=None)
    for sql in (
        'CREATE TABLE t (id INTEGER NOT NULL PRIMARY KEY, a INTEGER DEFAULT 7, "b""c" TEXT DEFAULT \'x\')',
        "INSERT INTO t AS other (id) VALUES (1)",
        "INSERT INTO t /* (a) */ (id, a) VALUES (2, NULL)",
        "INSERT INTO 't' ('id', \"b\"\"c\") VALUES (3, NULL)",
        "WITH c AS (SELECT 4 AS n) INSERT INTO t (id) SELECT n FROM c",
        "SELECT * FROM t ORDER BY id",
        'SELECT count(*) FROM t WHERE "b""c" != \'sqlite_master\'',
    ):
        assert door.execute(sql).fetchall() == stock.execute(sql).fetchall(), sql
    stock.close()


def test_named_value_that_is_missing_is_told_as_stock_sqlite_tells_it(connect: Callable[..., Connection]) -> None:
    door, stock = connect(), sqlite3.connect(":memory:")
    for given in ({"a": 1}, {"a": 1, "b": None}, {"a": True, "b": 2, "c": 3}):
        assert outcome(door, "SELECT :a, :b", given) == outcome(stock, "SELECT :a, :b", given)
    stock.close()


def test_default_of_another_type_than_its_added_column_older_rows_as_in_stock_sqlite(
    connect: Callable[..., Connection],
) -> None:
    door, stock = connect(isolation_level=None), sqlite3.connect(":memory:", isolation_level=None)
    for sql in (
        "CREATE TABLE t (id INTEGER NOT NULL PRIMARY KEY)",
        "INSERT INTO t VALUES (1), (2)",
        "ALTER TABLE t ADD COLUMN word TEXT DEFAULT 1",
        "ALTER TABLE t ADD COLUMN load REAL DEFAULT 1",
        "ALTER TABLE t ADD COLUMN size INTEGER DEFAULT '7'",
        "INSERT INTO t (id) VALUES (3)",
        "SELECT id, word, typeof(word), load, typeof(load), size, typeof(size) FROM t ORDER BY id",
        "SELECT id FROM t WHERE word = '1' AND size = 7 ORDER BY id",
        "UPDATE t SET size = 8 WHERE word = '1' AND id = 1",
        "BEGIN",
        "UPDATE t SET word = 'x' WHERE id = 2",
        "SELECT DISTINCT word, size FROM t ORDER BY size, word",
        "COMMIT",
        "SELECT * FROM t ORDER BY id",
    ):
        assert outcome(door, sql, []) == outcome(stock, sql, []), sql
    stock.close()
