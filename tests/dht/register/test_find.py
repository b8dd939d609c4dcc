"""Finds over all replicas: coverage, unsettled groups, order and limit."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from register_cluster import Cluster, eventually

from dht.domain.roster import TabletReplicas
from dht.errors import Invalid, SchemaChanged, Unavailable
from dht.model import (
    Change,
    Comparison,
    Constraint,
    FindQuery,
    IndexSpec,
    Op,
    Order,
    Part,
    Struct,
    TableSpec,
    Transaction,
)
from dht.register.find import _Asked, _Collected, _shares_of
from dht.register.messages import Chosen, FindReplicaReply
from dht.register.rules import RULES
from dht.rows import decode_row, group_key
from dht.wire.frames import REPLY, encode_frame
from tests.sim.bench import Bench, play

ids = iter(range(1, 10**9))
A, B, C, D = (bytes([65 + n]) * 20 for n in range(4))


def key(name) -> bytes:
    return group_key("db", "f", (name,))


def transaction(*parts: Part, version: int = 1) -> Transaction:
    return Transaction(next(ids).to_bytes(16, "big"), "db", version, parts)


def insert(name, columns) -> Part:
    return Part(key(name), changes=(Change(Op.INSERT, 1, (name,), {0: name, **columns}),))


def update(name, columns) -> Part:
    return Part(key(name), changes=(Change(Op.UPDATE, 1, (name,), columns),))


def catalog(version, *indexes: IndexSpec, op=Op.INSERT) -> Part:
    spec = msgspec.msgpack.encode(TableSpec(1, (0,), indexes))
    return Part(
        group_key("db", "catalog", ()),
        changes=(Change(op, 0, (0,), {0: version}), Change(op, 0, (1,), {0: spec})),
    )


def equal(value, **more) -> FindQuery:
    return FindQuery("db", 1, 1, (Constraint(1, Comparison.EQ, (value,)),), **more)


async def found(store, query) -> list:
    return [decode_row(row.row)[0] for row in (await store.find(query)).rows]


@pytest.fixture(params=[(3, 3), (4, 3), (2, 2), (1, 1)])
async def cluster(request):
    cluster = Cluster(*request.param)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1, IndexSpec(1, (1,)))))
    yield cluster
    await cluster.stop()


async def test_rows_are_found_from_every_node_at_once(cluster):
    for n in range(20):
        await cluster[n % len(cluster.ids)].commit(transaction(insert(n, {1: n % 4})))
    for store in cluster.wire.nodes.values():
        assert await found(store, equal(2)) == [2, 6, 10, 14, 18]


async def test_row_that_moved_out_of_the_condition_is_no_longer_found(cluster):
    for n in range(4):
        await cluster[0].commit(transaction(insert(n, {1: 1})))
    for n in range(4):
        await cluster[0].commit(transaction(update(n, {1: 2})))
        assert await found(cluster[0], equal(1)) == list(range(n + 1, 4))
        assert await found(cluster[0], equal(2)) == list(range(n + 1))


@pytest.mark.parametrize("descending", [False, True])
async def test_order_and_limit_give_the_first_rows(cluster, descending):
    for n in range(40):
        await cluster[0].commit(transaction(insert(n, {1: n % 2})))
    everything = await found(cluster[0], equal(1, order=Order((0,), descending)))
    assert everything == sorted(range(1, 40, 2), reverse=descending)
    for limit in (0, 1, 5, 100):
        query = equal(1, order=Order((0,), descending), limit=limit)
        assert await found(cluster[0], query) == everything[:limit]


async def test_whole_groups_come_at_the_ballots_of_their_rows(cluster):
    for n in range(6):
        await cluster[0].commit(transaction(insert(n, {1: n % 2, 2: "x" * n})))
    result = await cluster[0].find(equal(1, whole_groups=True))
    assert [group.key for group in result.groups] == [row.group for row in result.rows]
    for row, group in zip(result.rows, result.groups, strict=True):
        assert (row.ballot, group.rows[row.key]) == (group.ballot, row.row)


async def test_rows_of_a_transaction_are_found_though_its_intents_are_not_finished(cluster, monkeypatch):
    async def dead(*args) -> None:
        return None

    monkeypatch.setattr(cluster[0]._resolver, "finish", dead)
    await cluster[0].commit(transaction(insert(1, {1: 1}), insert(2, {1: 1})))
    for store in cluster.wire.nodes.values():
        assert await found(store, equal(1)) == [1, 2]


async def test_older_catalog_is_told_to_reload_and_new_index_is_used(cluster):
    await cluster[0].commit(transaction(insert(1, {1: 1, 2: "a"})))
    await cluster[0].commit(transaction(catalog(2, IndexSpec(1, (1,)), IndexSpec(2, (2,)), op=Op.UPDATE)))
    with pytest.raises(SchemaChanged):
        await found(cluster[0], equal(1))
    query = FindQuery("db", 1, 2, (Constraint(2, Comparison.EQ, ("a",)),))
    for store in cluster.wire.nodes.values():
        assert await found(store, query) == [1]


async def test_new_index_of_many_rows_is_filled_in_pieces_between_which_others_write(monkeypatch):
    monkeypatch.setattr("dht.storage.indexes.FILL_ROWS_MAX", 10)
    cluster = Cluster(1, 1)
    store = cluster[0]
    await store.create_database("db")
    await store.commit(transaction(catalog(1, IndexSpec(1, (1,)))))
    await asyncio.gather(*(store.commit(transaction(insert(n, {1: 0, 2: 7}))) for n in range(60)))
    file, turns, begun = store._databases._context.file, 0, asyncio.Event()
    fill, pieces = file.fill, []

    def counted(*args) -> bool:
        pieces.append(turns)
        if len(pieces) == 3:
            begun.set()
        return fill(*args)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(file, "fill", counted)
    waiting = asyncio.ensure_future(others())
    changed = catalog(2, IndexSpec(1, (1,)), IndexSpec(2, (2,)), op=Op.UPDATE)
    published = asyncio.ensure_future(store.commit(transaction(changed)))
    await asyncio.wait_for(begun.wait(), 10.0)
    await store.commit(transaction(insert(100, {1: 0, 2: 7}), version=0))
    await store.commit(transaction(update(59, {2: 8}), version=0))
    await published
    await store._databases.learn("db", 2, store._deadline(5.0))
    waiting.cancel()
    assert len(pieces) > 6
    assert len(set(pieces)) == len(pieces), "the loop was held from one piece to the next"
    assert store.counters["index_pieces"] == len(pieces) - 1
    query = FindQuery("db", 1, 2, (Constraint(2, Comparison.EQ, (7,)),))
    assert sorted(await found(store, query)) == [*range(59), 100]
    await cluster.stop()


async def test_find_is_right_with_one_replica_behind_and_with_one_down():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1, IndexSpec(1, (1,)))))
    for n in range(6):
        await cluster[0].commit(transaction(insert(n, {1: 1})))
    await eventually(lambda: all(f.header(key(5)).settled for f in cluster.files.values()))
    for index in range(3):
        gone = cluster.ids[index]
        await cluster.crash(gone)
        rest = next(iter(cluster.wire.nodes.values()))
        await rest.commit(transaction(update(index, {1: 2})))
        await rest.commit(transaction(insert(10 + index, {1: 1})))
        expected = list(range(index + 1, 6)) + [10 + i for i in range(index + 1)]
        assert await found(rest, equal(1)) == expected
        back = cluster.start(gone)
        assert await found(back, equal(1)) == expected
        assert await found(back, equal(1, order=Order((0,)), limit=3)) == expected[:3]
    await cluster.stop()


def test_find_without_marks_takes_ballots_that_a_majority_names_and_reads_no_group():
    """All name the groups: their writer as matches, the others, who do not know that they are chosen, as unsettled too.

    In virtual time: on a busy machine a replica that is asked may lag, and its group is rightly read.
    """

    async def story(bench: Bench) -> list[int]:
        await bench.define()

        async def gate(sender: int, to: int, message: Struct) -> bool:
            return not isinstance(message, Chosen)

        bench.gate = gate
        for n in range(4):
            await bench[n % 3].commit(transaction(insert(n, {1: 1})))
        await asyncio.sleep(1.0)
        counts = []
        for number in range(3):
            before = bench[number].counters.get("find_groups_read", 0)
            assert await found(bench[number], equal(1)) == [0, 1, 2, 3]
            counts.append(bench[number].counters.get("find_groups_read", 0) - before)
        return counts

    assert play(story, RULES) == [0, 0, 0]


async def test_read_and_find_ask_one_other_replica_and_the_third_where_that_is_silent():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1)))
    await cluster[0].commit(transaction(insert(1, {1: 1})))
    await found(cluster[0], equal(1))
    await eventually(lambda: all(f.header(key(1)).settled for f in cluster.files.values()))
    asked: list[tuple[str, bytes]] = []
    silent: list[bytes] = []

    def drop(sender, to, message):
        asked.append((type(message).__name__, to))
        return to in silent

    cluster.wire.drop = drop
    assert (await cluster[0].read([key(1)]))[0].rows
    assert await found(cluster[0], equal(1)) == [1]
    assert [name for name, _ in asked] == ["ReadReplica", "FindReplica"]
    for other in cluster.ids[1:]:
        silent[:] = [other]
        assert (await cluster[0].read([key(1)]))[0].rows
        assert await found(cluster[0], equal(1)) == [1]
    await cluster.stop()


async def test_find_without_a_majority_is_unavailable():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1)))
    await cluster.crash(cluster.ids[1])
    await cluster.crash(cluster.ids[2])
    with pytest.raises(Unavailable):
        await cluster[0].find(equal(1), timeout_s=0.1)
    await cluster.stop()


async def test_sequences_give_each_id_once_and_above_what_is_asked():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    given = []
    for n in range(250):
        given.append(await cluster[n % 3].reserve_ids("db", "s", 1))
    assert len(set(given)) == len(given)
    assert await cluster[0].reserve_ids("db", "s", 3, above=5000) > 5000
    await cluster[1].raise_sequence("db", "s", 9000)
    assert await cluster[1].reserve_ids("db", "s", 1) > 9000
    await cluster.stop()


async def test_database_is_created_once_and_dropped_with_its_groups():
    cluster = Cluster(3)
    assert await cluster[0].create_database("db")
    assert not await cluster[1].create_database("db")
    await cluster[0].commit(transaction(catalog(7)))
    await cluster[0].commit(transaction(insert(1, {1: 1}), version=7))
    assert await cluster[1].drop_database("db")
    assert not await cluster[2].drop_database("db")
    assert await cluster[2].list_databases() == ()
    assert await cluster[0].create_database("db")
    assert (await cluster[2].read([key(1)]))[0].rows == {}
    again = catalog(9)
    again = Part(again.key, changes=(Change(Op.UPDATE, 0, (0,), {0: 9}, {0: 8}), again.changes[1]))
    await cluster[0].commit(transaction(again, version=9))  # versions go on, so that no old one passes for a new one
    assert await found(cluster[2], msgspec.structs.replace(equal(1), catalog_version=9)) == []
    with pytest.raises(SchemaChanged):
        await cluster[2].commit(transaction(insert(2, {1: 1}), version=7))
    assert (await cluster[0].read([key(2)]))[0].rows == {}
    await cluster.stop()


async def test_asker_that_keeps_no_tablet_and_missed_the_catalog_still_knows_the_primary_key():
    cluster = Cluster(4, 3, tablets=1)
    cluster.wire.drop = lambda sender, to, message: type(message).__name__ in ("Learn", "Chosen")
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1)))
    for n in range(60):
        part = Part(key(n), changes=(Change(Op.INSERT, 1, (n,), {1: n}),))
        await cluster[0].commit(transaction(part))
    query = FindQuery("db", 1, 1, (Constraint(0, Comparison.GE, (7,)),), Order((0,)), 3)
    assert [decode_row(row.row)[1] for row in (await cluster[3].find(query)).rows] == [7, 8, 9]
    await cluster.stop()


def framed(answer):
    """As the link does it: a reply that is too large becomes the failure that says so."""

    async def serve(sender, message):
        reply = await answer(sender, message)
        encode_frame(1, REPLY, reply)
        return reply

    return serve


async def test_one_large_row_of_many_is_found_where_a_few_fit_a_frame(monkeypatch):
    cluster = Cluster(4, 3, tablets=1)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1)))
    for n in range(20):
        await cluster[0].commit(transaction(insert(n, {1: "x" * 20_000})))
    for node in cluster.ids[:3]:
        cluster.wire.nodes[node].answer = framed(cluster.wire.nodes[node].answer)
    monkeypatch.setattr("dht.wire.frames.FRAME_BYTES_MAX", 100_000)
    # Besides the rows a reply names what is not marked yet.
    query = FindQuery("db", 1, 1, (), Order((0,)), 1)
    for limit in (0, 1, 2):
        rows = (await cluster[3].find(msgspec.structs.replace(query, limit=limit))).rows
        assert [row.group for row in rows] == [key(n) for n in range(limit)]
    await cluster.stop()


@pytest.mark.parametrize("away", [False, True], ids=["all there", "one away"])
async def test_rows_that_do_not_fit_a_replicas_frame_are_invalid_at_once_as_for_a_client(away, monkeypatch):
    cluster = Cluster(4, 3, tablets=1)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(catalog(1)))
    for n in range(10):
        await cluster[0].commit(transaction(insert(n, {1: "x" * 1000})))
    for node in cluster.ids[:3]:
        cluster.wire.nodes[node].answer = framed(cluster.wire.nodes[node].answer)
    assert len((await cluster[3].find(FindQuery("db", 1, 1))).rows) == 10
    monkeypatch.setattr("dht.wire.frames.FRAME_BYTES_MAX", 5000)
    if away:
        cluster.wire.cut.add(cluster.ids[2])
    with pytest.raises(Invalid, match="larger than a frame may be"):
        await cluster[3].find(FindQuery("db", 1, 1), timeout_s=2.0)
    await cluster.stop()


async def test_sequence_of_a_database_made_again_gives_no_id_twice(monkeypatch):
    monkeypatch.setattr("dht.register.databases.NAMES_KEPT_S", 0.0)
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    await cluster[1].reserve_ids("db", "s", 1)
    await cluster[0].drop_database("db")
    await cluster[0].create_database("db")
    given = [await cluster[n % 3].reserve_ids("db", "s", 1) for n in range(250)]
    assert len(set(given)) == len(given)
    await cluster.stop()


def shares():
    views = tuple(TabletReplicas(7, nodes) for nodes in ((A, B, C), (B, C, A), (A, B, D)))
    return views, _shares_of(views)


def asked_for(*numbers: int) -> _Asked:
    asked = _Asked()
    for number in numbers:
        asked.add(number, shares()[1][number], rows=False)
    return asked


def reply_of(*covered: int) -> FindReplicaReply:
    return FindReplicaReply(covered, (), (), (), (), False, (), 1)


def test_tablets_that_the_same_nodes_keep_are_asked_of_as_one_share():
    _, (both, other) = shares()
    assert (both.nodes, both.tablets, both.epochs, both.quorum) == ({A, B, C}, (0, 1), (7, 7), 2)
    assert (other.nodes, other.tablets) == ({A, B, D}, (2,))


def test_tablet_is_missing_until_a_majority_of_its_own_nodes_has_covered_it():
    collected = _Collected(lambda key: 0, *shares())
    assert collected.missing() == [0, 1, 2]
    collected.add(reply_of(0, 1, 2), asked_for(0, 1))
    assert collected.missing() == [0, 1, 2]
    collected.add(reply_of(0), asked_for(0))
    assert collected.missing() == [1, 2]
    collected.add(reply_of(), asked_for(1))
    assert collected.missing() == [1, 2]
    collected.add(reply_of(2), asked_for(1))
    assert collected.missing() == [1]
    collected.add(reply_of(1), asked_for(0))
    assert collected.missing() == []
