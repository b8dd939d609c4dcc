"""A node that hears too few replicas refuses at once; one that hears enough does not wait for the silent ones."""

from __future__ import annotations

import asyncio

import pytest
from register_cluster import Cluster

from dht.errors import Indeterminate, Unavailable
from dht.model import Change, FindQuery, Op, Part, Transaction
from dht.register.messages import Accept
from dht.register.rounds import Tally
from dht.rows import group_key

KEY = group_key("db", "f", ("a",))
ids = iter(range(1, 10**9))


def write(op: Op = Op.UPDATE) -> Transaction:
    return Transaction(next(ids).to_bytes(16, "big"), "db", 0, (Part(KEY, None, (Change(op, 1, (1,), {0: 1}),)),))


@pytest.fixture
async def cluster():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    await cluster[0].commit(write(Op.INSERT))
    yield cluster
    await cluster.stop()


def asked(store):
    """Each kind of question that needs a majority."""
    return (
        lambda timeout_s: store.commit(write(), 0, timeout_s),
        lambda timeout_s: store.read([KEY], None, timeout_s),
        lambda timeout_s: store.find(FindQuery("db", 1, 0), timeout_s),
    )


async def test_node_that_is_cut_off_refuses_at_once_and_says_whom_it_misses(cluster):
    cluster.wire.cut.update(cluster.ids[1:])
    cluster.wire.silent_s = 5.0
    for ask in asked(cluster[0]):
        with pytest.raises(Unavailable, match="hears 1, it takes") as caught:
            async with asyncio.timeout(20.0):
                await ask(60.0)
        assert caught.value.detail["cut_off"] is True
        assert "h:1 for 5.0 s" in caught.value.message
    cluster.wire.cut.clear()
    for ask in asked(cluster[0]):
        await ask(5.0)


async def test_node_that_was_cut_off_just_now_tries_on(cluster):
    cluster.wire.cut.update(cluster.ids[1:])
    for ask in asked(cluster[0]):
        waiting = asyncio.ensure_future(ask(20.0))
        assert not (await asyncio.wait((waiting,), timeout=0.2))[0]
        cluster.wire.cut.clear()
        await waiting
        cluster.wire.cut.update(cluster.ids[1:])


async def test_node_that_the_network_parted_from_the_others_refuses_without_grace(cluster):
    cluster.wire.cut.update(cluster.ids[1:])
    cluster.wire.parted_from.update(cluster.ids[1:])
    for ask in asked(cluster[0]):
        with pytest.raises(Unavailable, match="hears 1, it takes"):
            async with asyncio.timeout(20.0):
                await ask(60.0)


async def test_node_that_the_network_parted_from_one_of_two_gives_the_other_its_grace(cluster):
    """The other may be starting again."""
    cluster.wire.hung.add(cluster.ids[1])
    cluster.wire.cut.add(cluster.ids[2])
    cluster.wire.parted_from.add(cluster.ids[2])
    waiting = asyncio.ensure_future(cluster[0].commit(write(), 0, 20.0))
    assert not (await asyncio.wait((waiting,), timeout=0.2))[0]
    cluster.wire.hung.clear()
    await waiting


async def test_write_that_was_sent_before_the_cut_is_told_as_unknown(cluster):
    coordinator = next(store for store in cluster.wire.nodes.values() if store._router.coordinates(KEY))
    await coordinator.commit(write())
    cluster.wire.hung.update(node for node, store in cluster.wire.nodes.items() if store is not coordinator)
    waiting = asyncio.ensure_future(coordinator.commit(write(), 0, 60.0))
    await asyncio.sleep(0.05)
    cluster.wire.silent_s = 5.0
    with pytest.raises(Indeterminate, match="hears 1, it takes"):
        async with asyncio.timeout(5.0):
            await waiting


async def test_round_that_hangs_on_a_silent_replica_ends(cluster):
    rounds = cluster[0]._coordinator._rounds
    tally = Tally(cluster.ids, 2, rounds._watch)
    tally.vote(cluster.ids[0], True)
    tally.vote(cluster.ids[1], False)
    assert not (await asyncio.wait((tally.done,), timeout=0.1))[0]
    cluster.wire.hung.add(cluster.ids[2])
    assert await asyncio.wait_for(tally.done, 20.0) is False


async def test_read_whose_two_live_replicas_differ_does_not_wait_for_the_silent_one(cluster, monkeypatch):
    for module in ("reader", "rounds"):
        monkeypatch.setattr(f"dht.register.{module}.PEER_TIMEOUT_S", 30.0)
    cluster.wire.drop = lambda sender, to, message: isinstance(message, Accept) and to == cluster.ids[1]
    applied = await cluster[0].commit(write())
    cluster.wire.drop = lambda sender, to, message: False
    cluster.wire.hung.add(cluster.ids[2])
    async with asyncio.timeout(5.0):
        (read,) = await cluster[0].read([KEY], None, 20.0)
    assert read.ballot >= applied.ballots[0]


async def test_read_whose_two_live_replicas_differ_asks_again_at_once(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.reader.MAJORITY_WAIT_S", 30.0)
    for module in ("reader", "rounds"):
        monkeypatch.setattr(f"dht.register.{module}.PEER_TIMEOUT_S", 30.0)
    cluster.wire.drop = lambda sender, to, message: isinstance(message, Accept) and to == cluster.ids[1]
    applied = await cluster[0].commit(write())
    cluster.wire.drop = lambda sender, to, message: False
    cluster.wire.hung.add(cluster.ids[2])
    async with asyncio.timeout(10.0):
        (read,) = await cluster[0].read([KEY], None, 20.0)
    assert read.ballot >= applied.ballots[0]


async def test_read_between_two_replicas_that_do_not_hear_each_other_is_answered_by_both(cluster):
    """What one of them coordinates never reaches the other, so the two that it hears differ at every write."""
    apart = cluster.ids[1:]
    cluster.wire.drop = lambda sender, to, message: sender in apart and to in apart
    for name in range(20):
        key = group_key("db", "f", (name,))
        part = Part(key, None, (Change(Op.INSERT, 1, (1,), {0: 1}),))
        async with asyncio.timeout(5.0):
            applied = await cluster[0].commit(Transaction(next(ids).to_bytes(16, "big"), "db", 0, (part,)))
            for store in cluster.wire.nodes.values():
                (read,) = await store.read([key], None, 4.0)
                assert read.rows
                assert read.ballot >= applied.ballots[0]
