"""A database is dropped in three steps, each of which may be the last one of whoever takes it; another goes on."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from register_cluster import Cluster
from test_store_node import insert, key, row, rows, transaction

from dht.errors import Invalid, NotFound, Unavailable
from dht.model import ZERO, Ballot, Change, Op, Part
from dht.register import catalog, group, operations
from dht.register.group import APPLIED, REFUSED, GroupState
from dht.register.messages import Accept, Coordinate, Kind, ListGroups, Operation
from dht.register.rules import RULES
from dht.rows import encode_row, group_key, row_key

GROUPS = 30


@pytest.fixture
async def cluster():
    cluster = Cluster(3, tablets=8)
    await cluster[0].create_database("db")
    for n in range(GROUPS):
        await cluster[0].commit(transaction(insert(n)))
    yield cluster
    await cluster.stop()


def is_listing(sender, to, message) -> bool:
    return isinstance(message, ListGroups)


def is_order(sender, to, message) -> bool:
    return isinstance(message, Coordinate) and message.operation.kind == Kind.EMPTY


def is_last_step(sender, to, message) -> bool:
    """One group cannot be emptied."""
    return isinstance(message, Accept) and message.key == key(1)


async def break_off(cluster, at) -> None:
    """A drop by node 0 that gets so far."""
    cluster.wire.drop = at
    with pytest.raises(Unavailable, match=r"'db' is being dropped and serves nobody any more.*drop it again"):
        await cluster[0].drop_database("db", timeout_s=0.3)
    cluster.wire.drop = lambda sender, to, message: False


@pytest.mark.parametrize("at", [is_listing, is_last_step])
async def test_database_whose_drop_broke_off_is_served_by_no_node_and_dropped_by_another(cluster, at):
    await break_off(cluster, at)
    assert [await cluster[n].list_databases() for n in range(3)] == [()] * 3
    assert await cluster[1].homes() == {}
    for n in (0, 2):
        with pytest.raises(NotFound, match=r"'db' is being dropped; `lucd database drop db --yes` goes on"):
            await cluster[n].commit(transaction(insert("late")))
    assert await cluster[1].drop_database("db") is True
    assert await cluster[1].drop_database("db") is False
    with pytest.raises(NotFound, match="there is no database 'db'"):
        await cluster[1].commit(transaction(insert("late")))
    for n in range(GROUPS):
        assert await rows(cluster[2], n) == {}


@pytest.mark.parametrize("at", [is_listing, is_last_step])
async def test_database_that_is_created_while_a_drop_is_unfinished_is_empty_and_stays(cluster, at):
    await break_off(cluster, at)
    assert await cluster[1].create_database("db") is True
    assert await cluster[2].create_database("db") is False
    for n in range(GROUPS):
        assert await rows(cluster[2], n) == {}
    await cluster[2].commit(transaction(insert(1, columns={0: "new"})))
    assert await row(cluster[0], 1) == {0: "new"}


async def test_name_of_another_home_is_taken_while_its_drop_is_unfinished_and_free_for_any_home_after(cluster):
    await cluster[0].create_database("far", home="lyon")
    cluster.wire.drop = is_listing
    with pytest.raises(Unavailable):
        await cluster[0].drop_database("far", timeout_s=0.2)
    cluster.wire.drop = lambda sender, to, message: False
    assert await cluster[1].homes() == {"db": ""}
    assert await cluster[1].create_database("far", home="nice") is True
    assert await cluster[2].homes() == {"db": "", "far": "nice"}


async def test_drop_of_what_has_another_home_by_now_drops_nothing(cluster):
    shard = catalog.shard_home(b"mark")
    assert await cluster[1].drop_database("db", home=shard) is False
    assert await row(cluster[2], 1) == {}
    assert await cluster[1].drop_database("db", home="") is True
    assert await cluster[1].create_database("db", home=shard)
    assert await cluster[1].drop_database("db", home=catalog.shard_home(b"other")) is False
    assert await cluster[1].drop_database("db", home=shard) is True
    assert await cluster[1].homes() == {}


@pytest.mark.parametrize("seed", range(6))
async def test_drops_and_a_creation_at_once_leave_a_database_whose_writes_stay(seed):
    """Over links that delay. The creation begins when both droppers have looked which database they are to drop."""
    cluster = Cluster(3, seed=seed, tablets=8)
    chance = random.Random(seed)
    cluster.wire.delay_s = 0.004
    await cluster[0].create_database("db")
    for n in range(5):
        await cluster[0].commit(transaction(insert(n, columns={0: "old"})))
    looked = [asyncio.Event(), asyncio.Event()]
    drops = [asyncio.ensure_future(cluster[n].drop_database("db")) for n in (0, 1)]
    for n, drop in enumerate(drops):
        _tell_when_it_has_looked(cluster[n]._databases, looked[n])
        drop.add_done_callback(lambda done, n=n: looked[n].set())
    await asyncio.gather(*(one.wait() for one in looked))
    await asyncio.sleep(chance.uniform(0, 0.02))
    if not await cluster[2].create_database("db"):
        await asyncio.gather(*drops)
        assert await cluster[2].create_database("db")
    for n in range(5):
        await cluster[2].commit(transaction(insert(n, columns={0: "new"})))
    assert any(await asyncio.gather(*drops))
    for n in range(5):
        assert await row(cluster[n % 3], n) == {0: "new"}
    await cluster.stop()


def _tell_when_it_has_looked(databases, looked: asyncio.Event) -> None:
    go_on = databases._drop

    async def begun(*arguments) -> bool:
        looked.set()
        return await go_on(*arguments)

    databases._drop = begun


async def test_drop_orders_each_group_to_be_emptied_once_and_none_that_an_earlier_drop_left(cluster):
    ordered: list[bytes] = []

    def note(sender, to, message) -> bool:
        if is_order(sender, to, message):
            ordered.append(message.operation.part.key)
        return False

    async def drop_counted() -> int:
        cluster.wire.messages.clear()
        await cluster[0].drop_database("db")
        return cluster.wire.messages["ListGroups"]

    cluster.wire.drop = note
    assert await drop_counted() == 2 * 2  # twice eight tablets at once, of two others
    assert 0 < len(ordered) == len(set(ordered)) < GROUPS, "its own orders node 0 carries out itself"
    ordered.clear()
    await asyncio.sleep(0.3)  # marks
    await cluster[0].create_database("db")
    assert await drop_counted() == 2
    assert ordered == []


async def test_list_that_does_not_say_where_the_groups_stand_counts_for_nothing(cluster):
    """A peer of another version."""
    answer = cluster[1].answer

    async def silent(sender, message):
        reply = await answer(sender, message)
        return msgspec.structs.replace(reply, ballots=()) if isinstance(message, ListGroups) else reply

    cluster[1].answer = silent
    cluster.wire.cut.add(cluster.ids[2])
    with pytest.raises(Unavailable, match=r"cannot be listed: 1 of 3 answered"):
        await cluster[0].drop_database("db", timeout_s=0.5)


# The order itself.

KEY = group_key("db", "f", (1,))


def at(round: int) -> Ballot:
    return ZERO._replace(round=round)


def order(seen: Ballot | None, key: bytes = KEY) -> Operation:
    return Operation(Kind.EMPTY, b"e" * 16, Part(key, seen))


def with_row(round: int) -> GroupState:
    return GroupState({row_key(1, (1,)): encode_row({0: 1})}, at(round))


def test_order_empties_what_stands_where_it_was_listed_or_below():
    for stands in (3, 4):
        delta, ballot, outcome = operations.perform(with_row(stands), order(at(4)), at(4), 0, at(9), RULES)
        assert (delta, ballot, outcome) == ({row_key(1, (1,)): None}, at(9), APPLIED)


def test_order_leaves_what_stands_higher():
    assert operations.perform(with_row(5), order(at(4)), at(4), 0, at(9), RULES) == ({}, at(5), REFUSED)


def test_order_that_comes_again_finds_the_group_empty_though_it_stands_higher():
    """It is applied at a ballot of its own: there is an accept all the same."""
    assert operations.perform(GroupState({}, at(5)), order(at(4)), at(4), 1, at(9), RULES) == ({}, at(9), APPLIED)


def test_order_without_a_ballot_is_refused():
    with pytest.raises(Invalid, match="another version"):
        operations.perform(with_row(5), order(None), at(5), 0, at(9), RULES)


def test_group_above_the_listed_ballot_that_an_intent_holds_is_not_waited_for():
    part = Part(KEY, changes=(Change(Op.INSERT, 1, (1,), {}),))
    prepare = Operation(Kind.PREPARE, b"t" * 16, part, primary=group_key("db", "f", (2,)))
    state = GroupState({}, at(5))
    delta, _, _ = operations.perform(state, prepare, at(5), 0, at(6), RULES)
    state.apply(delta)
    state.ballot = at(6)
    assert operations.perform(state, order(at(5)), at(5), 0, at(9), RULES) == ({}, at(6), REFUSED)
    with pytest.raises(operations.Blocked):
        operations.perform(state, order(at(6)), at(6), 0, at(9), RULES)


def test_catalog_that_a_drop_emptied_is_not_changed_by_the_next_order():
    key = catalog.catalog_group("db")
    table = Change(Op.INSERT, 0, (1,), {0: b"spec"})
    state = GroupState({}, ZERO)
    state.apply(group.evaluate(state, Part(key, changes=(Change(Op.INSERT, 0, (0,), {0: 7}), table))))
    delta, _, _ = operations.perform(state, order(at(1), key), at(1), 0, at(2), RULES)
    state.apply(delta)
    assert catalog.catalog_of(state.data()) == (8, [])
    assert operations.perform(state, order(at(1), key), at(1), 0, at(2), RULES) == ({}, at(2), APPLIED)
