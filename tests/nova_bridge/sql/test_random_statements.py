"""Random statements of the shapes that Nova and Placement send, with keys on, beside stock sqlite3.

Subselects in SET and WHERE, INSERT ... SELECT, RETURNING, WITH, UPDATE ... FROM, joins, groups, LIMIT, values of the
wrong type, several rows in a statement of which one fails, savepoints; then the same text again, whose plan is kept,
with other values, NULL and values of all types among them. Rows, counts, lastrowid and errors have to be the same.
Longer: `make sql-random SEEDS=5000`.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from nova_bridge.sql.connection import Connection
from tests.nova_bridge.sql.test_semantics import control

SEEDS = int(os.environ.get("LUCD_SQL_SEEDS", "12"))
STEPS = 250
RUNS_AGAIN = 2
ANYTHING = [None, None, 0, 1, 3, -1, "1", "3", "01", "1.0", " 1", 1.0, 2.5, 2**53 + 1, "", "a", "u1", "p1", b"a", b"1"]

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, host VARCHAR(255),"
    " vcpus INTEGER, updated_at DATETIME, deleted INTEGER DEFAULT 0, UNIQUE (uuid))",
    "CREATE INDEX instances_host ON instances (host, deleted)",
    # of its instance's group, with a foreign key into it
    "CREATE TABLE instance_metadata (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36), key VARCHAR(255),"
    " n NUMERIC, FOREIGN KEY (instance_uuid) REFERENCES instances (uuid))",
    # of another group
    "CREATE TABLE migrations (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36), status VARCHAR(255),"
    " load FLOAT, FOREIGN KEY (instance_uuid) REFERENCES instances (uuid))",
    "CREATE INDEX migrations_uuid ON migrations (instance_uuid, status)",
    "CREATE TABLE resource_providers (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(200), generation INTEGER,"
    " parent INTEGER REFERENCES resource_providers (id), UNIQUE (name))",
    "CREATE TABLE allocations (id INTEGER NOT NULL PRIMARY KEY, resource_provider_id INTEGER NOT NULL, consumer"
    " VARCHAR(36) NOT NULL, used INTEGER NOT NULL, raw BLOB, UNIQUE (resource_provider_id, consumer))",
    "CREATE INDEX allocations_raw ON allocations (raw)",
    "CREATE TABLE shadow_migrations (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36), status VARCHAR(255),"
    " load FLOAT)",
]
COLUMNS = {
    "instances": ["id", "uuid", "host", "vcpus", "updated_at", "deleted"],
    "instance_metadata": ["id", "instance_uuid", "key", "n"],
    "migrations": ["id", "instance_uuid", "status", "load"],
    "resource_providers": ["id", "name", "generation", "parent"],
    "allocations": ["id", "resource_provider_id", "consumer", "used", "raw"],
    "shadow_migrations": ["id", "instance_uuid", "status", "load"],
}


class Statements:
    """Statements over few values, so that they meet."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, column: str) -> Any:
        chance = self.random
        match column:
            case "id" | "parent" | "resource_provider_id":
                return chance.choice([1, 2, 3, 4, 5, 6, "3", 4.0, None] if column == "parent" else [1, 2, 3, 4, 5, 6])
            case "uuid" | "instance_uuid" | "consumer":
                return f"u{chance.randint(1, 4)}"
            case "vcpus" | "deleted" | "generation" | "used":
                return chance.choice([0, 0, 1, 2, "3", 2.5, True])
            case "n":
                return chance.choice([1, "01", "1.50", 2.5, "x", None, 2**62, -(2**63), "1e3", 0.1])
            case "load":
                return chance.choice([None, 0.5, 1, 2.0, float(2**53), 2**53 + 1, "2.5", "x"])
            case "raw":
                return chance.choice(ANYTHING)
            case "updated_at":
                return chance.choice(["2026-01-01 00:00:00", "2026-01-02 00:00:00.000000", None])
            case "name":
                return chance.choice(["p1", "p2", "p3", "P1", None, 7])
        return chance.choice(["a", "b", "A", "", None, "a%", 1])

    def condition(self, table: str, alias: str, depth: int = 0) -> tuple[str, list[Any]]:
        chance = self.random
        column = chance.choice(COLUMNS[table])
        name = f"{alias}.{column}"
        match chance.randint(0, 12 if depth < 2 else 8):
            case 0 | 1 | 2:
                return f"{name} {chance.choice(['=', '=', '=', 'IS', '==', 'IS NOT'])} ?", [self.value(column)]
            case 3:
                count = chance.randint(0, 4)
                values = [self.value(column) for _ in range(count)]
                return f"{name} {chance.choice(['', 'NOT '])}IN ({', '.join('?' * count)})", values
            case 4:
                return f"{name} {chance.choice(['<', '<=', '>', '>=', '!='])} ?", [self.value(column)]
            case 5:
                return f"{name} IS {chance.choice(['', 'NOT '])}NULL", []
            case 6:
                return f"{name} LIKE ?", [chance.choice(["a%", "%1", "u_", "A"])]
            case 7:
                return f"{name} BETWEEN ? AND ?", [self.value(column), self.value(column)]
            case 8 if chance.random() < 0.5:
                other = chance.choice(COLUMNS[table])
                operator = chance.choice(["<", "<=", ">", ">=", "=", "!=", "IS"])
                return f"({name}, {alias}.{other}) {operator} (?, ?)", [self.value(column), self.value(other)]
            case 8:
                return f"coalesce({name}, ?) = ?", [self.value(column), self.value(column)]
            case 9 | 10:
                # Not the same table: stock SQLite may look at rows that the statement has changed already.
                other = chance.choice([t for t in COLUMNS if t != table])
                inner, arguments = self.condition(other, "s", depth + 1)
                match = chance.choice(COLUMNS[other])
                if chance.random() < 0.5:
                    return f"{name} IN (SELECT s.{match} FROM {other} AS s WHERE {inner})", arguments
                exists = f"EXISTS (SELECT 1 FROM {other} AS s WHERE s.{match} = {name} AND {inner})"
                return f"{chance.choice(['', 'NOT '])}{exists}", arguments
        left, first = self.condition(table, alias, depth + 1)
        right, second = self.condition(table, alias, depth + 1)
        joined = f"({left} {chance.choice(['AND', 'OR', 'OR'])} {right})"
        return (f"NOT {joined}" if chance.random() < 0.2 else joined), first + second

    def statement(self) -> tuple[str, list[Any]]:
        """One statement and its arguments."""
        chance = self.random
        table = chance.choice(list(COLUMNS))
        columns = COLUMNS[table]
        where, arguments = self.condition(table, table)
        column = chance.choice(columns[1:])
        match chance.randint(0, 17):
            case 0 | 1 | 2 | 3:
                # Ids are named: those that stock SQLite draws it draws again after a DELETE or ROLLBACK.
                rows = chance.choice([1, 1, 1, 3])
                one = f"({', '.join('?' * len(columns))})"
                values = [self.value(c) for _ in range(rows) for c in columns]
                returning = f" RETURNING {column}, {table}.id AS number" if chance.random() < 0.3 else ""
                return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([one] * rows)}{returning}", values
            case 4:
                return f"UPDATE {table} SET {column} = ? WHERE {where}", [self.value(column), *arguments]
            case 5:
                inner, more = self.condition(table, "t")
                value = f"(SELECT max(t.{column}) FROM {table} AS t WHERE {inner})"
                return f"UPDATE {table} SET {column} = {value} WHERE {where}", more + arguments
            case 6:
                number = chance.choice(columns)
                return f"UPDATE {table} SET {number} = {number} + 1, {column} = {column} WHERE {where}", arguments
            case 7:
                return f"DELETE FROM {table} WHERE {where}", arguments
            case 8:
                source = "migrations" if table == "shadow_migrations" else table
                picked, arguments = self.condition(source, source)
                if source != table:
                    listed = f"SELECT * FROM {source} WHERE {picked} ORDER BY id LIMIT 2"
                    return f"INSERT INTO {table} {listed}", arguments
                names = ", ".join(columns[1:])
                return (
                    f"INSERT INTO {table} (id, {names}) SELECT id + 3, {names} FROM {table} WHERE {picked} ORDER BY id",
                    arguments,
                )
            case 9:
                return f"WITH c AS (SELECT id FROM {table} WHERE {where}) DELETE FROM {table} WHERE id IN c", arguments
            case 10:
                source = "(SELECT instance_uuid AS u, count(*) AS c FROM migrations GROUP BY instance_uuid) AS m"
                return f"UPDATE instances SET vcpus = m.c FROM {source} WHERE m.u = instances.uuid", []
            case 11:
                joined = "SELECT i.id, m.id, g.id, g.status FROM instances i LEFT JOIN instance_metadata m"
                joined += " ON m.instance_uuid = i.uuid LEFT JOIN migrations g ON g.instance_uuid = i.uuid"
                where, arguments = self.condition("instances", "i")
                if chance.random() < 0.5:
                    listed = joined.replace("i.id, m.id, g.id, g.status", "i.id, i.vcpus")
                    order = chance.choice(["i.id", "i.id DESC", "i.vcpus DESC, i.id DESC", "i.vcpus, i.id, i.uuid"])
                    more = [chance.randint(0, 4), chance.randint(0, 2)]
                    return f"{listed} WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?", arguments + more
                return f"{joined} WHERE {where}", arguments
            case 12:
                joined = "SELECT p.name, sum(a.used), count(*) FROM resource_providers p JOIN allocations a"
                where, arguments = self.condition("allocations", "a")
                return f"{joined} ON a.resource_provider_id = p.id WHERE {where} GROUP BY p.name", arguments
            case 13:
                return f"SELECT DISTINCT {column} FROM {table} WHERE {where}", arguments
            case 14:
                limit, offset = chance.randint(0, 4), chance.randint(0, 2)
                order = ", ".join(f"{c}{chance.choice(['', '', ' DESC'])}" for c in [column, "id"])
                if chance.random() < 0.3:
                    where = f"({column}, id) {chance.choice(['<', '<=', '>', '>='])} (?, ?)"
                    arguments = [self.value(column), self.value("id")]
                limits = "LIMIT ? OFFSET ?" if chance.random() < 0.7 else f"LIMIT {limit} OFFSET {offset}"
                more = [limit, offset] if "?" in limits else []
                return f"SELECT * FROM {table} WHERE {where} ORDER BY {order} {limits}", arguments + more
            case 15:
                marker = self.value("id")
                return f"SELECT * FROM {table} WHERE id > ? ORDER BY id LIMIT 2", [marker]
            case _:
                return f"SELECT {', '.join(columns)} FROM {table} WHERE {where}", arguments


def outcome(connection: Any, sql: str, arguments: list[Any]) -> Any:
    try:
        cursor = connection.execute(sql, arguments)
    except sqlite3.Error as error:
        return next(c.__name__ for c in type(error).__mro__ if c.__module__ == "sqlite3"), str(error)
    rows = cursor.fetchall()
    inserted = cursor.lastrowid if sql.startswith("INSERT") and cursor.rowcount > 0 and "SELECT" not in sql else None
    return (rows if "ORDER BY" in sql else sorted(rows, key=repr)), 0 if "WITH" in sql else cursor.rowcount, inserted


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_statements_with_keys_same_as_stock_sqlite(seed: int, connect: Callable[..., Connection]) -> None:
    door = connect(isolation_level=None)
    stock = sqlite3.connect(":memory:", isolation_level=None)
    stock.execute("PRAGMA foreign_keys=ON")
    for sql in SCHEMA:
        door.execute(sql)
        stock.execute(sql)
    statements = Statements(seed)
    chance = statements.random
    state: list[str] = []
    for step in range(STEPS):
        if chance.random() < 0.12:
            control(chance, [stock, door], state)
            continue
        sql, arguments = statements.statement()
        for run in range(1 if "INSERT" in sql else 1 + RUNS_AGAIN):
            expected, got = outcome(stock, sql, arguments), outcome(door, sql, arguments)
            assert got == expected, f"step {step}, run {run}: {sql} {arguments}"
            arguments = [chance.choice(ANYTHING) if chance.random() < 0.6 else value for value in arguments]
    if state:
        stock.execute("COMMIT")
        door.execute("COMMIT")
    other = connect()
    for table in COLUMNS:
        sql = f"SELECT * FROM {table} ORDER BY id"
        assert other.execute(sql).fetchall() == stock.execute(sql).fetchall(), table
    stock.close()
