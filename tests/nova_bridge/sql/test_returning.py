"""INSERT ... RETURNING columns, by which SQLAlchemy sends the rows that a session adds to a table as one statement."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from nova_bridge.sql import dbapi, statements
from nova_bridge.sql.connection import Connection
from tests.nova_bridge.sql.conftest import CountingStore

Connect = Callable[..., Connection]
TABLES = [
    "CREATE TABLE words (id INTEGER NOT NULL PRIMARY KEY, word TEXT, size INTEGER DEFAULT 7, UNIQUE (word))",
    "CREATE TABLE pairs (a INTEGER, b TEXT)",
]


@pytest.mark.parametrize(
    ("sql", "cut"),
    [
        ("INSERT INTO t (a) VALUES (1)", ("INSERT INTO t (a) VALUES (1)", None)),
        ("INSERT INTO t (a) VALUES (' RETURNING id')", ("INSERT INTO t (a) VALUES (' RETURNING id')", None)),
        ("INSERT INTO t (a) VALUES (1) RETURNING id", ("INSERT INTO t (a) VALUES (1) ", (("id", "id"),))),
        (
            'insert into t (a) values (1) returning t.Id, "B" AS b__1 ;',
            ("insert into t (a) values (1) ", (("id", "Id"), ("b", "b__1"))),
        ),
        ("INSERT INTO t (a) VALUES (1) RETURNING id, a + 1", ("INSERT INTO t (a) VALUES (1) RETURNING id, a + 1", ())),
        ("INSERT INTO t (a) VALUES (1) RETURNING *", ("INSERT INTO t (a) VALUES (1) RETURNING *", ())),
        ("INSERT INTO t (returning, a) VALUES (1, 2)", ("INSERT INTO t (returning, a) VALUES (1, 2)", ())),
    ],
)
def test_returning_cut_from_a_statement(sql: str, cut: Any) -> None:
    assert statements.cut_returning(sql) == cut


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO words (word) VALUES ('x') RETURNING id",
        "INSERT INTO words (word, size) VALUES ('x', '3'), (12, 4), (NULL, NULL) RETURNING word, id, words.id AS key",
        "INSERT INTO words (id, word) VALUES (5, 'x'), (3, 'y') RETURNING id",
        "INSERT INTO words (word) SELECT b FROM pairs WHERE a > 1 RETURNING id, word",
        "INSERT INTO words (word) SELECT b FROM pairs WHERE a > 100 RETURNING id, word",
        "WITH found AS (SELECT b FROM pairs) INSERT INTO words (word) SELECT b FROM found RETURNING word",
        "INSERT INTO pairs (b) VALUES ('x'), ('y') RETURNING a, b",
    ],
)
def test_returning_answers_as_stock_sqlite(connect: Connect, sql: str) -> None:
    door, stock = connect(), sqlite3.connect(":memory:")
    answers = []
    for side in (door, stock):
        for table in TABLES:
            side.execute(table)
        side.execute("INSERT INTO pairs VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        cursor = side.execute(sql)
        answers.append((cursor.description, cursor.fetchall(), cursor.fetchall()))
        side.commit()
        answers.append(side.execute("SELECT word, size FROM words ORDER BY id").fetchall())
    stock.close()
    assert answers[:2] == answers[2:]


def test_returning_of_an_unknown_column_inserts_nothing(connect: Connect) -> None:
    door = connect()
    door.execute(TABLES[0])
    with pytest.raises(sqlite3.OperationalError, match="no such column: weight"):
        door.execute("INSERT INTO words (word) VALUES ('x') RETURNING id, weight")
    door.commit()
    assert door.execute("SELECT * FROM words").fetchall() == []


def test_returning_after_a_run_that_failed_shows_each_row_once(connect: Connect) -> None:
    """The second SELECT fails while IN lists are taken at once (FACTS), when the first has brought its rows."""
    door = connect()
    for table in TABLES:
        door.execute(table)
    door.execute("INSERT INTO pairs VALUES (1, 'a')")
    sql = (
        "INSERT INTO words (word) SELECT b FROM pairs WHERE a = 1"
        " UNION ALL SELECT b FROM pairs WHERE a IN (SELECT a FROM pairs WHERE b = 'none') RETURNING word"
    )
    assert door.execute(sql).fetchall() == [("a",)]


def test_duplicate_among_many_rows_leaves_none(connect: Connect) -> None:
    door = connect()
    door.execute(TABLES[0])
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: words.word"):
        door.execute("INSERT INTO words (word) VALUES ('x'), ('y'), ('x') RETURNING id")
    door.commit()
    assert door.execute("SELECT * FROM words").fetchall() == []


def test_ids_of_one_insert_are_in_the_order_of_its_rows(
    connect: Connect, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store has given a later block out before an earlier one, as to another thread."""
    door = connect()
    door.execute(TABLES[0])
    firsts = iter(range(9000, 0, -1000))

    def reserve_ids(database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None) -> int:
        return max(next(firsts), above + 1)

    monkeypatch.setattr(store, "reserve_ids", reserve_ids)
    rows = ", ".join(f"('w{number}')" for number in range(20))
    ids = [row[0] for row in door.execute(f"INSERT INTO words (word) VALUES {rows} RETURNING id")]
    assert len(ids) == 20
    assert ids == sorted(ids)
    found = door.execute("SELECT word FROM words ORDER BY id").fetchall()
    assert found == [(f"w{number}",) for number in range(20)]


Base = orm.declarative_base()


class Note(Base):
    __tablename__ = "notes"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(20))


def test_rows_that_a_session_adds_are_one_statement_and_get_their_ids(request: pytest.FixtureRequest) -> None:
    engine = sa.create_engine(f"lucd+memory:///{request.node.name}")
    Base.metadata.create_all(engine)
    said: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda c, k, sql, *rest: said.append(sql))
    notes = [Note(text=f"t{number}") for number in range(30)]
    with orm.Session(engine, expire_on_commit=False) as session, session.begin():
        session.add_all(notes)
    assert [sql.split()[0] for sql in said] == ["INSERT"]
    with engine.connect() as connection:
        stored = dict(connection.execute(sa.select(Note.id, Note.text)).tuples().all())
    assert stored == {note.id: note.text for note in notes}
    engine.dispose()
    dbapi.forget_memory(request.node.name)
