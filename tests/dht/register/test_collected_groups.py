"""Groups in a tablet whose deleted groups were collected: the tablet's floor takes the place of their windows."""

from __future__ import annotations

import pytest
from register_cluster import Cluster
from test_store_node import insert, key, row, transaction, update

from dht.errors import Conflict, Indeterminate
from dht.model import ZERO, Ballot

FLOOR = Ballot(1, 1, 50, b"", 0, 0)


@pytest.fixture
async def cluster():
    cluster = Cluster()
    await cluster[0].create_database("db")
    for domain in cluster.domains.values():
        domain.floors = FLOOR
    yield cluster
    await cluster.stop()


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_blind_first_insert_is_applied_at_every_node(cluster, at):
    for name in range(3):
        assert (await cluster[at].commit(transaction(insert(name)))).ballots[0] > FLOOR
        assert await row(cluster[at], name) == {}


async def test_insert_that_saw_the_group_absent_is_applied(cluster):
    (read,) = await cluster[1].read([key("a")])
    assert (read.ballot, read.rows) == (FLOOR, {})
    part = insert("a")
    seen = type(part)(part.key, read.ballot, part.changes)
    await cluster[2].commit(transaction(seen))
    assert await row(cluster[0], "a") == {}


async def test_transaction_over_new_groups_is_applied(cluster):
    await cluster[1].commit(transaction(insert("a"), insert("b"), insert("c")))
    assert [await row(cluster[2], name) for name in "abc"] == [{}, {}, {}]


@pytest.mark.parametrize(("attempt", "error"), [(0, Conflict), (1, Indeterminate)])
async def test_transaction_from_before_the_collection_is_not_applied(cluster, attempt, error):
    part = insert("a")
    old = type(part)(part.key, ZERO, part.changes)
    with pytest.raises(error):
        await cluster[0].commit(transaction(old), attempt)
    assert await row(cluster[1], "a") is None


async def test_group_begun_anew_keeps_the_floor_as_its_window_s_at_every_later_proposer(cluster):
    await cluster[0].commit(transaction(insert("a", columns={1: 1})))
    for domain in cluster.domains.values():
        domain.floors = ZERO
    for node in range(3):
        cluster[node]._coordinator.forget(key("a"))
        with pytest.raises(Indeterminate):
            await cluster[node].commit(transaction(update("a", {1: 2}, seen=ZERO)), 1)
    assert await row(cluster[0], "a") == {1: 1}


async def test_known_absence_from_before_the_floor_is_told_anew(cluster):
    (read,) = await cluster[1].read([key("a")], [ZERO])
    assert (read.ballot, read.rows) == (FLOOR, {})
    (read,) = await cluster[1].read([key("a")], [FLOOR])
    assert (read.ballot, read.rows) == (FLOOR, None)


async def test_outcome_of_a_transaction_on_a_collected_group_is_unknown(cluster):
    assert await cluster[1].outcome(bytes(16), key("a"), ZERO) == "unknown"
    assert await cluster[1].outcome(bytes(16), key("a")) == "unknown"
