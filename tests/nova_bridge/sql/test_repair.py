"""Unique entries and sequences that do not fit the rows are found, and made to fit."""

from __future__ import annotations

import os
import sqlite3

import pytest

from dht.model import Change, Op, Part, Transaction
from dht.rows import group_key
from nova_bridge.sql.access import owner_columns
from nova_bridge.sql.commit import ENTRY_ROW
from nova_bridge.sql.database import Database
from nova_bridge.sql.repair import check
from nova_bridge.sql.schema import ENTRY_TABLE


@pytest.fixture
def table(connect):
    connection = connect(isolation_level=None)
    connection.execute("CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT UNIQUE, note TEXT)")
    connection.execute("INSERT INTO things (name) VALUES ('a'), ('b')")
    return connection


def forget(store, name: str, *, family: str = "unique") -> None:
    """Take the entry away behind the door's back."""
    entry = entry_of(store, name)
    change = Change(Op.DELETE, ENTRY_TABLE, ENTRY_ROW)
    store.commit(Transaction(os.urandom(16), "cell", 0, (Part(entry, None, (change,)),)))


def entry_of(store, name: str) -> bytes:
    table = Database(store, "cell").schema.tables["things"]
    (unique,) = table.uniques
    entry = table.entry_key(unique, (0, name, None))
    assert entry is not None
    return entry


def found(store, repair: bool = False) -> list[str]:
    return list(check(Database(store, "cell"), repair=repair))


def test_whole_database_has_nothing_to_mend(store, table):
    assert found(store) == []


def test_row_without_entry_gets_one(store, table, connect):
    forget(store, "a")
    assert len(found(store)) == 1
    assert len(found(store, repair=True)) == 1
    assert found(store) == []
    with pytest.raises(sqlite3.IntegrityError):
        connect(isolation_level=None).execute("INSERT INTO things (name) VALUES ('a')")


def test_entry_without_row_goes(store, table, connect):
    gone = owner_columns((group_key("cell", "row", (16, 99)), b"x"))
    entry = entry_of(store, "c")
    change = Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, gone)
    store.commit(Transaction(os.urandom(16), "cell", 0, (Part(entry, None, (change,)),)))
    assert len(found(store, repair=True)) == 1
    assert found(store) == []
    connect(isolation_level=None).execute("INSERT INTO things (name) VALUES ('c')")


def beside(store, act) -> None:
    """Have it done when the rows were read, and the entries were not."""
    find = store.find

    def then(query, *more):
        if query.table == ENTRY_TABLE:
            store.find = find
            act()
        return find(query, *more)

    store.find = then


def test_row_that_comes_after_the_rows_were_read_keeps_its_entry(store, table, connect):
    """A recovery ends with a check, and services write again by then."""
    writer = connect(isolation_level=None)
    beside(store, lambda: writer.execute("INSERT INTO things (name) VALUES ('late')"))
    assert found(store, repair=True) == []
    with pytest.raises(sqlite3.IntegrityError):
        writer.execute("INSERT INTO things (name) VALUES ('late')")


def test_row_that_gets_other_values_after_the_rows_were_read_keeps_its_entry(store, table, connect):
    writer = connect(isolation_level=None)
    beside(store, lambda: writer.execute("UPDATE things SET name = 'z' WHERE name = 'a'"))
    (text,) = found(store, repair=True)
    assert "not mended, a writer was faster" in text
    assert found(store) == []
    with pytest.raises(sqlite3.IntegrityError):
        writer.execute("INSERT INTO things (name) VALUES ('z')")


def test_entry_whose_row_has_other_values_goes(store, table, connect):
    schema = Database(store, "cell").schema.tables["things"]
    place = connect(isolation_level=None).execute("SELECT id FROM things WHERE name = 'a'").fetchone()
    owner = (group_key("cell", schema.family, place), schema.pk_key(place))
    change = Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, owner_columns(owner))
    store.commit(Transaction(os.urandom(16), "cell", 0, (Part(entry_of(store, "c"), None, (change,)),)))
    assert len(found(store, repair=True)) == 1
    assert found(store) == []


def test_entry_of_another_row_is_given_to_the_one_that_has_the_values(store, table):
    forget(store, "a")
    other = owner_columns((group_key("cell", "row", (16, 99)), b"x"))
    change = Change(Op.INSERT, ENTRY_TABLE, ENTRY_ROW, other)
    store.commit(Transaction(os.urandom(16), "cell", 0, (Part(entry_of(store, "a"), None, (change,)),)))
    assert len(found(store, repair=True)) == 1
    assert found(store) == []


def test_two_rows_with_the_same_values_are_named_and_left_alone(store, table, connect):
    forget(store, "a")
    connect(isolation_level=None).execute("INSERT INTO things (name) VALUES ('a')")
    (text,) = found(store, repair=True)
    assert "same name" in text
    assert connect().execute("SELECT count(*) FROM things WHERE +name = 'a'").fetchall() == [(2,)]


def test_lost_sequence_is_raised_above_the_rows(store, table, connect):
    number = Database(store, "cell").schema.tables["things"].sequence
    key = group_key("cell", "sequence", (number,))
    store.commit(Transaction(os.urandom(16), "cell", 0, (Part(key, None, (Change(Op.DELETE, 0, ()),)),)))
    assert len(found(store, repair=True)) == 1
    assert found(store) == []
