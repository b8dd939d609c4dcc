"""What lives in domain `global` is read in each PoP from its own copy, without a message between PoPs, cut off or not.

Daemon 0 is the only one of its PoP; of the three of the other one, two are members of `global` and follow it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import msgspec
import pytest

from dht.errors import DhtError, Unavailable
from dht.model import (
    GLOBAL,
    Change,
    Columns,
    Comparison,
    Constraint,
    FindQuery,
    Op,
    Part,
    Reading,
    TableSpec,
    Transaction,
)
from dht.requests import BlockingStore
from dht.rows import decode_row, encode_values, group_key
from tests.laboratory import wait_until
from tests.wan.sites import Wan, WanCluster, why_not

pytestmark = pytest.mark.cluster
RTT_MS = 100.0
FLAVOR, SECRET = 1, 2
KEY = group_key("api", "flavor", ())
HIDDEN = group_key("api", "secret", ())
QUERY = FindQuery("api", FLAVOR, 1, (Constraint(0, Comparison.GE, (0,)),))


def define(store: BlockingStore) -> None:
    """Tables that may and may not be read from copies."""
    store.create_database("api", home=GLOBAL)
    specs = [
        TableSpec(FLAVOR, (0,), (), read=Reading.FOLLOW | Reading.SERVE_STALE, groups=(encode_values(("flavor",)),)),
        TableSpec(SECRET, (0,), (), groups=(encode_values(("secret",)),)),
    ]
    rows: list[tuple[int, Columns]] = [(0, {0: 1}), *((s.table, {0: msgspec.msgpack.encode(s)}) for s in specs)]
    changes = tuple(Change(Op.INSERT, 0, (n,), columns) for n, columns in rows)
    store.commit(Transaction(os.urandom(16), "api", 0, (Part(group_key("api", "catalog", ()), None, changes),)))
    for table, key in ((FLAVOR, KEY), (SECRET, HIDDEN)):
        part = Part(key, None, (Change(Op.INSERT, table, (1,), {0: 1, 1: "first"}),))
        store.commit(Transaction(os.urandom(16), "api", 1, (part,)))


def write(store: BlockingStore, text: str) -> None:
    part = Part(KEY, None, (Change(Op.UPDATE, FLAVOR, (1,), {1: text}),))
    store.commit(Transaction(os.urandom(16), "api", 1, (part,)))


def read(store: BlockingStore, key: bytes = KEY) -> object:
    """None while a copy does not have the group yet, within the bound."""
    (found,) = store.read([key])
    return next((decode_row(row)[1] for row in (found.rows or {}).values()), None)


def refused(store: BlockingStore) -> bool:
    try:
        read(store, HIDDEN)
    except DhtError as error:
        return isinstance(error, Unavailable)
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WanCluster]:
    if reason := why_not():
        pytest.skip(reason)
    with (
        Wan(2, RTT_MS) as wan,
        WanCluster(tmp_path_factory.mktemp("copies"), wan, [0, 1, 1, 1], pops=True) as started,
    ):
        define(started.nodes[0].store())
        yield started


def counter(cluster: WanCluster, number: int, name: str) -> float:
    return float(cluster.nodes[number].status()["counters"]["copies"][name])


def covered(cluster: WanCluster, text: str) -> None:
    for node in cluster.nodes:
        wait_until(lambda node=node: read(node.store()) == text, 60.0, "a copy does not catch up")  # type: ignore[misc]


def test_followed_table_is_read_without_asking_another_pop(cluster: WanCluster) -> None:
    covered(cluster, "first")
    for number in range(len(cluster.nodes)):
        wait_until(lambda number=number: _copied(cluster, number), 30.0, "it is never read from the copy")  # type: ignore[misc]
    asked = [counter(cluster, n, "voter_reads") for n in range(4)]
    for node in cluster.nodes:
        for _ in range(20):
            assert read(node.store()) == "first"
            assert len(node.store().find(QUERY).rows) == 1
    again = [counter(cluster, n, "voter_reads") for n in range(4)]
    # A daemon that gets no time for seconds is right to ask the voters: then and only then.
    assert sum(again) - sum(asked) < 40, f"of 40 requests to each daemon too many were passed on: {asked}, {again}"
    begun_s = time.monotonic()
    assert read(cluster.nodes[0].store(), HIDDEN) == "first"
    assert time.monotonic() - begun_s > RTT_MS / 2000, "what may not be read from a copy is asked of other PoPs"


def _copied(cluster: WanCluster, number: int) -> bool:
    """Whether a read and a find there are answered from a copy. Time would not tell: PoP 1 has a quorum of its own."""
    store = cluster.nodes[number].store()
    asked = counter(cluster, number, "voter_reads")
    read(store)
    store.find(QUERY)
    return counter(cluster, number, "voter_reads") == asked


def test_own_write_is_read_at_once_and_others_see_it_within_the_bound(cluster: WanCluster) -> None:
    for number, text in enumerate(("second", "third", "fourth")):
        store = cluster.nodes[number].store()
        write(store, text)
        assert read(store) == text
        assert [decode_row(row.row)[1] for row in store.find(QUERY).rows] == [text]
        covered(cluster, text)


def test_cut_off_pop_goes_on_reading_its_copy_and_says_so(cluster: WanCluster) -> None:
    cut_off = cluster.nodes[0]
    cluster.wan.cut([0], [1])
    try:
        wait_until(lambda: refused(cut_off.store()), 60.0, "the cut is not noticed")
        for _ in range(10):
            assert read(cut_off.store()) == "fourth"
            assert len(cut_off.store().find(QUERY).rows) == 1
            time.sleep(0.7)
        assert refused(cut_off.store())
        wait_until(lambda: counter(cluster, 0, "stale_reads") > 0, 60.0, "no read is counted as stale")
        assert any("copy" in text for text in cut_off.status()["warnings"])
        write(cluster.nodes[1].store(), "fifth")
    finally:
        cluster.wan.heal()
    covered(cluster, "fifth")
