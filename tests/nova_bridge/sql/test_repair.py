"""Unique entries and sequences that do not fit the rows are found, and made to fit."""

from __future__ import annotations

import os
import sqlite3

import msgspec
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


def beside(store, act, version: int | None = None) -> None:
    """Have it done when the rows were read, and the entries were not.

    `version`: of the catalog, that the entries' question names then; 0 is what replicas answer that have heard of none.
    """
    find = store.find

    def then(query, *more):
        if query.table == ENTRY_TABLE:
            store.find = find
            act()
            if version is not None:
                query = msgspec.structs.replace(query, catalog_version=version)
        return find(query, *more)

    store.find = then


def test_row_that_comes_after_the_rows_were_read_keeps_its_entry(store, table, connect):
    """A recovery ends with a check, and services write again by then."""
    writer = connect(isolation_level=None)
    beside(store, lambda: writer.execute("INSERT INTO things (name) VALUES ('late')"))
    assert found(store, repair=True) == []
    with pytest.raises(sqlite3.IntegrityError):
        writer.execute("INSERT INTO things (name) VALUES ('late')")


def test_row_that_gets_other_values_after_the_rows_were_read_keeps_its_entry_and_is_not_reported(store, table, connect):
    writer = connect(isolation_level=None)
    beside(store, lambda: writer.execute("UPDATE things SET name = 'z' WHERE name = 'a'"))
    assert found(store, repair=True) == []
    with pytest.raises(sqlite3.IntegrityError):
        writer.execute("INSERT INTO things (name) VALUES ('z')")


def test_row_that_gets_other_values_while_it_is_mended_gets_no_entry_for_those_before(store, table):
    commit, things = store.commit, Database(store, "cell").schema.tables["things"]
    renamed = Part(things.row_group((1,)), None, (Change(Op.UPDATE, things.number, (1,), {things.number_of(1): "z"}),))
    forget(store, "a")

    def later(transaction, *more):
        store.commit = commit
        commit(Transaction(os.urandom(16), "cell", 0, (renamed,)))
        return commit(transaction, *more)

    store.commit = later
    (text,) = found(store, repair=True)
    assert "not mended, a writer was faster" in text
    assert not store.read([entry_of(store, "a")])[0].rows


def found_at_two_moments(store, act) -> None:
    """Have it done while the rows are found: of the odd ones by then, of the even ones already."""
    find = store.find

    def torn(query, *more):
        reply = find(query, *more)
        if query.table != ENTRY_TABLE:
            store.find = find
            act()
            before, after = reply.rows, find(query, *more).rows
            rows = tuple(
                new if number % 2 else old for number, (old, new) in enumerate(zip(before, after, strict=True))
            )
            reply = msgspec.structs.replace(reply, rows=rows)
        return reply

    store.find = torn


def test_two_rows_of_which_one_has_passed_its_value_on_meanwhile_are_not_reported(store, table, connect):
    writer = connect(isolation_level=None)

    def pass_on() -> None:
        writer.execute("UPDATE things SET name = 'x' WHERE id = 1")
        writer.execute("UPDATE things SET name = 'a' WHERE id = 2")

    found_at_two_moments(store, pass_on)
    assert found(store, repair=True) == []


def test_value_that_goes_to_and_fro_while_it_is_looked_at_is_not_taken_for_a_duplicate(store, table, connect):
    writer, read = connect(isolation_level=None), store.read
    owners = [1, 2]

    def swap() -> None:
        writer.execute("UPDATE things SET name = 'of ' || id WHERE id = ?", (owners[0],))
        writer.execute("UPDATE things SET name = 'a' WHERE id = ?", (owners[1],))
        owners.reverse()

    def moving(keys, *more, **named):
        """Each group is read at a moment of its own, and the value is at that one by then."""
        if len(keys) < 2:
            return read(keys, *more, **named)
        store.read = read
        replies = []
        for key in keys:
            replies += read([key], *more, **named)
            swap()
        store.read = moving
        return replies

    found_at_two_moments(store, swap)
    store.read = moving
    texts = found(store, repair=True)
    assert texts
    assert all("was changed all the time" in text for text in texts)
    store.read = read
    assert found(store) == []


def test_entries_of_a_table_that_came_after_the_first_look_stay(store, table, connect):
    writer = connect(isolation_level=None)

    def make() -> None:
        writer.execute("CREATE TABLE later (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
        writer.execute("INSERT INTO later (name) VALUES ('a')")

    beside(store, make, version=0)
    assert found(store, repair=True) == []
    with pytest.raises(sqlite3.IntegrityError):
        writer.execute("INSERT INTO later (name) VALUES ('a')")


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
