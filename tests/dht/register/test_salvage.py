"""After a recovery: intents are ended and sequences jump."""

from __future__ import annotations

from itertools import pairwise

import pytest
from register_cluster import Cluster
from test_store_node import insert, key, row, transaction, update

from dht.limits import IDS_APART, SPANNING_ID_MAX
from dht.register.catalog import sequence_group
from dht.register.local_ids import LOCAL_IDS_MAX, SEQUENCE_JUMP_IDS, jump_ids
from dht.register.messages import Kind, Operation


@pytest.fixture
async def cluster():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    yield cluster
    await cluster.stop()


async def prepare(store, id: bytes, name, primary) -> None:
    operation = Operation(Kind.PREPARE, id, update(name, {1: 2}), 1, key(primary), None)
    await store._router.submit(operation, 0, store._deadline(2.0))


async def recover(cluster) -> tuple[str, ...]:
    """As the order of `lucd domain recover` does it: a generation begins, then the data is seen to."""
    for domain in cluster.domains.values():
        domain.generation += 1
    return await cluster[0].salvage(10.0)


async def test_sequence_jumps_beyond_what_anybody_can_have_taken(cluster):
    before = await cluster[1].reserve_ids("db", "16", 1)
    findings = await recover(cluster)
    assert any("sequence db/sequence/16 jumped" in text for text in findings)
    assert await cluster[2].reserve_ids("db", "16", 1) >= before + SEQUENCE_JUMP_IDS


async def test_ids_of_a_pop_outlast_many_recoveries_and_each_is_told_what_is_left(cluster):
    given = [await cluster[1].reserve_ids("db", "~16", 101)]
    for _ in range(12):
        findings = await recover(cluster)
        given.append(await cluster[1].reserve_ids("db", "~16", 101))
        (text,) = [text for text in findings if "sequence db/~sequence/~16 jumped" in text]
        assert f"{LOCAL_IDS_MAX - given[-1] + 1:,} of this PoP's {LOCAL_IDS_MAX:,} ids are left" in text
    assert min(after - before for before, after in pairwise(given)) > 100_000, "more than one request may take"
    assert given[-1] * IDS_APART < SPANNING_ID_MAX


async def test_recovery_that_broke_off_and_is_ordered_again_jumps_no_sequence_twice(cluster):
    for name in ("16", "~16"):
        await cluster[1].reserve_ids("db", name, 1)
    await recover(cluster)
    before = [await cluster[1].reserve_ids("db", name, 1, above=2_000_000) for name in ("16", "~16")]
    assert [text for text in await cluster[0].salvage(10.0) if "jumped in this generation already" in text]
    after = [await cluster[2].reserve_ids("db", name, 1) for name in ("16", "~16")]
    assert all(1 <= later - earlier < 1_000 for earlier, later in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["16", "~16"])
async def test_ids_taken_before_the_repair_lie_beyond_the_jump_which_is_not_made_again(cluster, name):
    """A client may be faster than who sees to the data, who may also have broken off."""
    before = await cluster[1].reserve_ids("db", name, 1)
    for domain in cluster.domains.values():
        domain.generation += 1
    taken = await cluster[2].reserve_ids("db", name, 1)
    jump = jump_ids(sequence_group("db", name), before)
    assert taken >= before + jump
    assert [text for text in await cluster[0].salvage(10.0) if "jumped in this generation already" in text]
    assert await cluster[0].reserve_ids("db", name, 1) < before + 2 * jump


@pytest.mark.parametrize("name", ["16", "~16"])
@pytest.mark.parametrize("repaired", [True, False], ids=["repaired", "used at once"])
async def test_each_generation_of_which_nothing_is_left_leaves_a_jump_out(cluster, name, repaired):
    """Of a PoP that was recovered twice the copies may be those of before the first time."""
    before = await cluster[1].reserve_ids("db", name, 1)
    for domain in cluster.domains.values():
        domain.generation += 2
    if repaired:
        await cluster[0].salvage(10.0)
    unseen = before + jump_ids(sequence_group("db", name), before)
    assert await cluster[2].reserve_ids("db", name, 1) >= unseen + jump_ids(sequence_group("db", name), unseen)


async def test_ids_taken_while_a_generation_begins_lie_beyond_its_jump(cluster):
    before = await cluster[1].reserve_ids("db", "16", 1)
    sequences = cluster[2]._sequences
    read = sequences._read

    async def begins_then(*asked):
        found = await read(*asked)
        sequences._read = read
        for domain in cluster.domains.values():
            domain.generation += 1
        return found

    sequences._read = begins_then
    assert await cluster[2].reserve_ids("db", "16", 1) >= before + SEQUENCE_JUMP_IDS


async def test_sequence_that_was_made_in_a_later_generation_does_not_jump_in_that(cluster):
    await recover(cluster)
    assert await cluster[1].reserve_ids("db", "17", 1) == 1
    await cluster[1].raise_sequence("db", "18", 40)
    assert await cluster[2].reserve_ids("db", "17", 1) < SEQUENCE_JUMP_IDS
    assert await cluster[2].reserve_ids("db", "18", 1) == 41


async def test_intent_without_a_decision_is_dropped_and_named(cluster):
    for name in ("a", "b"):
        await cluster[0].commit(transaction(insert(name, columns={1: 1})))
    await prepare(cluster[0], b"u" * 16, "b", "a")
    findings = await cluster[1].salvage(10.0)
    assert [text for text in findings if (b"u" * 16).hex() in text and "db/f/b" in text and "dropped" in text]
    assert await row(cluster[2], "b") == {1: 1}
    assert not any(file.header(key("b")).intents for file in cluster.files.values())


async def test_intent_of_a_decided_transaction_is_finished_and_named(cluster):
    for name in ("a", "b"):
        await cluster[0].commit(transaction(insert(name, columns={1: 1})))
    id = b"u" * 16
    await prepare(cluster[0], id, "b", "a")
    decided = Operation(Kind.COMMIT_PRIMARY, id, update("a", {1: 2}), others=(key("b"),))
    await cluster[0]._router.submit(decided, 0, cluster[0]._deadline(2.0))
    findings = await cluster[1].salvage(10.0)
    assert [text for text in findings if id.hex() in text and "finished" in text]
    assert await row(cluster[2], "b") == {1: 2}


async def test_salvage_of_a_quiet_store_finds_nothing(cluster):
    await cluster[0].commit(transaction(insert("a")))
    assert await cluster[0].salvage(10.0) == ()
