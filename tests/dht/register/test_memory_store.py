"""The store in one process."""

from __future__ import annotations

import threading

import msgspec
import pytest

from dht.errors import Conflict, Duplicate, Invalid, NotFound, SchemaChanged
from dht.model import (
    Change,
    Comparison,
    Constraint,
    FindQuery,
    Guard,
    GuardKind,
    IndexSpec,
    Op,
    Order,
    Part,
    TableSpec,
    Transaction,
)
from dht.register import memory
from dht.register.memory import MemoryStore
from dht.rows import decode_row, group_key, row_key

ids = iter(range(1, 10**9))


def transaction(*parts: Part, version: int = 0) -> Transaction:
    return Transaction(next(ids).to_bytes(16, "big"), "db", version, parts)


def key(name) -> bytes:
    return group_key("db", "f", (name,))


def insert(name, pk, columns, table=1) -> Part:
    return Part(key(name), changes=(Change(Op.INSERT, table, pk, columns),))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    assert store.create_database("db")
    return store


def set_catalog(store: MemoryStore, version: int) -> None:
    spec = msgspec.msgpack.encode(TableSpec(1, (0,), (IndexSpec(1, (1,)),)))
    changes = (Change(Op.INSERT, 0, (0,), {0: version}), Change(Op.INSERT, 0, (1,), {0: spec}))
    store.commit(transaction(Part(group_key("db", "catalog", ()), changes=changes)))


def test_commit_then_read_returns_rows_and_known_ballot_spares_them(store):
    applied = store.commit(transaction(insert("a", (1,), {0: 1})))
    (read,) = store.read([key("a")])
    assert read.ballot == applied.ballots[0]
    assert decode_row(read.rows[row_key(1, (1,))]) == {0: 1}
    assert store.read([key("a")], [read.ballot])[0].rows is None


def test_commit_of_two_parts_is_all_or_nothing(store):
    store.commit(transaction(insert("a", (1,), {})))
    with pytest.raises(Duplicate) as caught:
        store.commit(transaction(insert("b", (1,), {}), insert("a", (1,), {})))
    assert caught.value.detail["part"] == 1
    assert store.read([key("b")])[0].rows == {}


def test_same_transaction_twice_is_applied_once(store):
    both = transaction(insert("a", (1,), {}), insert("b", (1,), {}))
    assert store.commit(both, 1) == store.commit(both, 2)
    assert store.outcome(both.id, key("a")) == "applied"


def test_refused_retry_stays_refused(store):
    store.commit(transaction(insert("a", (1,), {})))
    again = transaction(insert("a", (1,), {}))
    with pytest.raises(Duplicate):
        store.commit(again, 1)
    store.commit(transaction(Part(key("a"), changes=(Change(Op.DELETE, 1, (1,)),))))
    with pytest.raises(Duplicate):
        store.commit(again, 2)
    assert store.outcome(again.id, key("a")) == "not_applied"


def test_guard_only_part_refuses_the_whole(store):
    guard = Part(key("b"), guards=(Guard(GuardKind.HAS, 1, (9,), fails_as="foreign_key"),))
    with pytest.raises(Conflict) as caught:
        store.commit(transaction(insert("a", (1,), {}), guard))
    assert caught.value.detail == {"part": 1, "what": "guard", "index": 0, "fails_as": "foreign_key"}


def test_find_uses_index_order_and_limit(store):
    set_catalog(store, 3)
    for n in range(5):
        store.commit(transaction(insert(f"g{n}", (n,), {0: n, 1: n % 2}), version=3))
    query = FindQuery("db", 1, 3, (Constraint(1, Comparison.EQ, (0,)),), Order((0,), True), 2, True)
    found = store.find(query)
    assert [decode_row(row.row)[0] for row in found.rows] == [4, 2]
    assert [read.key for read in found.groups] == [key("g4"), key("g2")]


def test_find_of_more_rows_than_an_answer_holds_is_invalid_unless_cut_by_its_own_limit(store, monkeypatch):
    """Told as in a cluster: who asks goes on in pieces. The first so many would pass for all that there are."""
    monkeypatch.setattr(memory, "FIND_ROWS_MAX", 3)
    set_catalog(store, 3)
    store.commit(transaction(*(insert(f"g{n}", (n,), {0: n, 1: n % 2}) for n in range(4)), version=3))
    with pytest.raises(Invalid, match="more than 3 rows"):
        store.find(FindQuery("db", 1, 3))
    assert len(store.find(FindQuery("db", 1, 3, order=Order((0,)), limit=2)).rows) == 2
    assert len(store.find(FindQuery("db", 1, 3, (Constraint(0, Comparison.LT, (3,)),))).rows) == 3


def test_older_catalog_version_is_told_to_reload(store):
    set_catalog(store, 3)
    with pytest.raises(SchemaChanged):
        store.commit(transaction(insert("a", (1,), {}), version=2))
    with pytest.raises(SchemaChanged):
        store.find(FindQuery("db", 1, 2))


def test_unknown_database_is_not_found():
    store = MemoryStore()
    with pytest.raises(NotFound):
        store.commit(transaction(insert("a", (1,), {})))
    with pytest.raises(NotFound):
        store.reserve_ids("db", "s", 1)


def test_database_created_once_and_dropped_with_its_groups(store):
    assert not store.create_database("db")
    store.commit(transaction(insert("a", (1,), {})))
    assert store.drop_database("db")
    assert not store.drop_database("db")
    assert store.list_databases() == ()
    store.create_database("db")
    assert store.read([key("a")])[0].rows == {}


def test_database_of_another_home_is_not_dropped(store):
    assert not store.drop_database("db", None, "~6d61726b")
    assert store.list_databases() == ("db",)
    assert store.drop_database("db", None, "")


def test_database_created_again_keeps_its_writes_and_goes_on_with_the_catalog_versions(store):
    set_catalog(store, 3)
    store.commit(transaction(insert("a", (1,), {}), version=3))
    assert store.drop_database("db")
    with pytest.raises(NotFound):
        store.commit(transaction(insert("a", (1,), {}), version=3))
    store.create_database("db")
    with pytest.raises(SchemaChanged):
        store.commit(transaction(insert("a", (1,), {}), version=3))
    store.commit(transaction(insert("a", (1,), {0: 2})))
    assert not store.create_database("db")
    assert len(store.read([key("a")])[0].rows) == 1


def test_sequence_gives_increasing_ids_above_what_is_asked(store):
    assert store.reserve_ids("db", "t", 1) == 1
    assert store.reserve_ids("db", "t", 5) == 2
    assert store.reserve_ids("db", "t", 1, above=50) == 51
    store.raise_sequence("db", "t", 100)
    store.raise_sequence("db", "t", 10)
    assert store.reserve_ids("db", "t", 1) == 101


def test_clone_is_independent(store):
    store.commit(transaction(insert("a", (1,), {})))
    copy = store.clone()
    copy.commit(transaction(insert("b", (1,), {})))
    assert store.read([key("b")])[0].rows == {}
    assert len(copy.read([key("a")])[0].rows) == 1


def test_threads_that_race_for_a_row_have_one_winner(store):
    won = []

    def race() -> None:
        try:
            store.commit(transaction(insert("a", (1,), {})))
            won.append(1)
        except Duplicate:
            pass

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]
