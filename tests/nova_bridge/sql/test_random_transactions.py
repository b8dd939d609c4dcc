"""Transactions of several processes, interleaved at random: what was committed equals the same ones after each other.

Every change names its rows by key, and a transaction that meets no row rolls back, as Nova's compare-and-swap does:
so each value that decides something is guarded, and stock SQLite, which runs the committed transactions one after the
other in the order of their commits, must read the same values, count the same rows and end with the same tables.
Longer: `make sql-random SEEDS=5000`.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from nova_bridge.sql.connection import Connection
from nova_bridge.sql.errors import ConflictError

SEEDS = int(os.environ.get("LUCD_SQL_SEEDS", "40"))
PROCESSES = 3
STEPS = 220

SCHEMA = [
    "CREATE TABLE instances (id INTEGER NOT NULL PRIMARY KEY, uuid VARCHAR(36) NOT NULL, state VARCHAR(9), n INTEGER,"
    " m INTEGER, updated_at DATETIME, UNIQUE (uuid))",
    "CREATE TABLE instance_metadata (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36), state VARCHAR(9),"
    " n INTEGER, m INTEGER, FOREIGN KEY (instance_uuid) REFERENCES instances (uuid))",
    "CREATE TABLE flavors (id INTEGER NOT NULL PRIMARY KEY, state VARCHAR(9), n INTEGER, m INTEGER, name TEXT,"
    " UNIQUE (name))",
    "CREATE TABLE pairs (id INTEGER NOT NULL PRIMARY KEY, state VARCHAR(9), n INTEGER, m INTEGER, name TEXT,"
    " UNIQUE (name))",
]
FILL = [
    *[f"INSERT INTO instances (id, uuid, state, n, m) VALUES ({i}, 'u{i}', 'a', {i}, 0)" for i in (1, 2)],
    "INSERT INTO instance_metadata VALUES (11, 'u1', 'a', 1, 0)",
    *[f"INSERT INTO {t} VALUES ({i}, 'a', {i}, 0, 'n{i}')" for t in ("flavors", "pairs") for i in (1, 2, 3)],
]
ROWS = {"instances": (1, 2), "instance_metadata": (11, 12, 21, 22), "flavors": (1, 2, 3, 4), "pairs": (1, 2, 3, 4)}
DUMPS = [f"SELECT {c} FROM {t} ORDER BY id" for t, c in (
    ("instances", "id, uuid, state, n, m"), ("instance_metadata", "*"), ("flavors", "*"), ("pairs", "*"),
)]  # fmt: skip

Step = tuple[str, list[Any]]
GUARDED = "/* what it gives is written on */ "
"""Before a SELECT by key whose columns the transaction sets later: no commit of another may come between."""


class Program:
    """One transaction's statements, drawn while it runs, because some follow from what it read."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.made: set[tuple[str, int]] = set()

    def steps(self) -> Iterator[Step]:
        """Yields a statement; is sent the first row of a SELECT."""
        chance = self.chance
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.15:
                yield "SAVEPOINT s", []
                yield from self._change()
                yield chance.choice(["ROLLBACK TO s", "RELEASE s"]), []
            else:
                yield from self._change()

    def _change(self) -> Iterator[Step]:
        chance = self.chance
        table = chance.choice(list(ROWS))
        key, more, state = chance.choice(ROWS[table]), chance.randint(1, 9), chance.choice("abc")
        match chance.choice([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 10, 10, 11, 11, 11, 12]):
            case 0:
                yield f"UPDATE {table} SET n = n + ? WHERE id = ?", [more, key]
            case 1 | 2:
                # As an ORM does: read, decide, write what differs.
                row = yield f"{GUARDED}SELECT n, m FROM {table} WHERE id = ?", [key]
                if chance.random() < 0.5:
                    # Meets the group again, perhaps at a newer ballot.
                    yield f"SELECT count(*) FROM {table} WHERE state = ?", [state]
                if row is not None:
                    yield f"UPDATE {table} SET n = ?, m = ? WHERE {table}.id = ?", [row[0] + more, row[1] + row[0], key]
            case 3:
                yield f"UPDATE {table} SET state = ? WHERE id = ? AND state = ?", [state, key, chance.choice("abc")]
            case 4:
                yield f"UPDATE {table} SET n = m, m = n + 1 WHERE id = ?", [key]
            case 5:
                yield f"UPDATE {table} SET n = (SELECT t.n + ? FROM {table} t WHERE t.id = ?) WHERE id = ?", [
                    more, key, key,
                ]  # fmt: skip
            case 6:
                yield f"UPDATE {table} SET m = m + ? WHERE (id = ? AND state = 'a') OR (id = ? AND n > 3)", [
                    more, key, key,
                ]  # fmt: skip
            case 7:
                yield f"UPDATE {table} SET state = ? WHERE id = ?", [state, key]
            case 8:
                # Two rows, perhaps of two groups, both read before both are written.
                other = chance.choice(ROWS[table])
                if key == other:
                    return
                first = yield f"{GUARDED}SELECT n FROM {table} WHERE id = ?", [key]
                second = yield f"{GUARDED}SELECT n FROM {table} WHERE id = ?", [other]
                if first is not None and second is not None:
                    yield f"UPDATE {table} SET n = ? WHERE id = ?", [first[0] - more, key]
                    yield f"UPDATE {table} SET n = ? WHERE id = ?", [second[0] + more, other]
            case 9 if table in {"flavors", "pairs"}:
                yield f"UPDATE {table} SET name = ? WHERE id = ?", [f"n{chance.randint(1, 5)}", key]
            case 10 if (table, key) in self.made:
                # What is made and taken away at once takes no place, so another may have taken it meanwhile.
                return
            case 10 if table in {"flavors", "pairs"}:
                yield f"DELETE FROM {table} WHERE id = ?", [key]
            case 11 if table in {"flavors", "pairs"}:
                self.made.add((table, key))
                yield f"INSERT INTO {table} VALUES (?, ?, ?, 0, ?)", [key, state, more, f"n{chance.randint(1, 5)}"]
            case 11 if table == "instance_metadata":
                self.made.add((table, key))
                yield f"INSERT INTO {table} VALUES (?, ?, ?, ?, 0)", [key, f"u{key // 10}", state, more]
            case 10:
                if table == "instance_metadata" or chance.random() < 0.5:
                    yield f"DELETE FROM {table} WHERE id = ?", [key]
                else:
                    yield (
                        "INSERT INTO instances (id, uuid, state, n, m) VALUES (?, ?, ?, 1, 0)",
                        [key, f"u{key}", state],
                    )
            case _:
                # A look-up by something else than the key, then a change by key; and the row is met again later.
                row = yield f"SELECT id, n FROM {table} WHERE state = ? ORDER BY id", [state]
                if row is not None:
                    yield f"SELECT m FROM {table} WHERE id = ?", [row[0]]
                    yield f"UPDATE {table} SET n = ? WHERE id = ?", [row[1] + more, row[0]]


@dataclass
class Process:
    """One connection and the transaction that it is in."""

    door: Connection
    steps: Any = None
    answer: Any = None
    done: list[tuple[str, list[Any], Any]] = field(default_factory=list)

    def step(self, chance: random.Random) -> list[tuple[str, list[Any], Any]] | None:
        """Run the next statement. Returns the transaction when it was committed."""
        if self.steps is None:
            self.steps, self.answer, self.done = Program(chance).steps(), None, []
            self.door.execute("BEGIN")
        try:
            sql, arguments = self.steps.send(self.answer)
        except StopIteration:
            self.steps = None
            try:
                self.door.commit()
            except (ConflictError, sqlite3.IntegrityError):
                return None
            return self.done
        try:
            result = _run(self.door, sql, arguments)
        except (ConflictError, sqlite3.IntegrityError):
            result = 0
        if result in (0, []):
            self.door.rollback()
            self.steps = None
            return None
        self.answer = result[0] if isinstance(result, list) else None
        if "ORDER BY" in sql:
            # Which rows a look-up finds is not guarded, only what it gave of the row that is then changed.
            table = sql.split()[4]
            self.done.append((f"{GUARDED}SELECT n FROM {table} WHERE id = ?", [result[0][0]], [(result[0][1],)]))
        elif not sql.startswith("SELECT"):
            self.done.append((sql, arguments, result))
        return None


def _run(connection: Any, sql: str, arguments: list[Any]) -> Any:
    """The rows of a SELECT, the count of a change."""
    cursor = connection.execute(sql, arguments)
    if sql.startswith(("SELECT", GUARDED)):
        return cursor.fetchall()
    return cursor.rowcount if sql.startswith(("UPDATE", "DELETE", "INSERT")) else None


def _kept(transaction: list[tuple[str, list[Any], Any]]) -> list[tuple[str, list[Any], Any]]:
    """Without what a savepoint took back."""
    result: list[tuple[str, list[Any], Any]] = []
    mark = 0
    for statement in transaction:
        if statement[0] == "SAVEPOINT s":
            mark = len(result)
        elif statement[0] == "ROLLBACK TO s":
            del result[mark:]
        elif statement[0] != "RELEASE s":
            result.append(statement)
    return result


@pytest.mark.parametrize("seed", range(SEEDS))
def test_interleaved_transactions_same_as_one_after_the_other(seed: int, connect: Callable[..., Connection]) -> None:
    chance = random.Random(seed)
    processes = [Process(connect(isolation_level=None)) for _ in range(PROCESSES)]
    stock = sqlite3.connect(":memory:", isolation_level=None)
    stock.execute("PRAGMA foreign_keys=ON")
    for sql in SCHEMA + FILL:
        processes[0].door.execute(sql)
        stock.execute(sql)
    committed = 0
    for _ in range(STEPS):
        transaction = chance.choice(processes).step(chance)
        if transaction is None:
            continue
        committed += 1
        stock.execute("BEGIN")
        # A parent that is deleted and made again may have got a child in between.
        stock.execute("PRAGMA defer_foreign_keys=ON")
        for sql, arguments, expected in _kept(transaction):
            assert _run(stock, sql, arguments) == expected, (sql, arguments, transaction)
        stock.execute("COMMIT")
    assert committed > STEPS / 40
    fresh = connect()
    for dump in DUMPS:
        assert fresh.execute(dump).fetchall() == stock.execute(dump).fetchall(), dump
    stock.close()
