"""A PoP's shard of a database: made by the first commit, its catalog copied, never back, never guessed."""

from __future__ import annotations

import asyncio
import os
import random

import msgspec
import pytest
from spanning_cluster import Spanning

from dht import requests
from dht.errors import Invalid, NotFound, SchemaChanged, Unavailable
from dht.model import Change, Comparison, Constraint, FindQuery, IndexSpec, Op, Part, Scope, TableSpec, Transaction
from dht.register import catalog
from dht.register.shards import Shard, _version_of, is_about_shard
from dht.register.spanning import SpanningStore
from dht.rows import group_key

TABLE = 16


@pytest.fixture
def pops():
    made = Spanning("a", "b")
    publish(made, 1)
    return made


def publish(pops, version, *indexes, again=False):
    """A new version of the catalog at the database's home, with these indexes; `again`: after the database was gone."""
    publish_at(pops.home.memory, version, *indexes, again=again)


def publish_at(memory, version, *indexes, again=False):
    specs = TableSpec(TABLE, (1,), tuple(IndexSpec(n, (n,)) for n in indexes))
    op = Op.INSERT if version == 1 else Op.UPDATE
    head = Change(op, 0, (0,), {0: version, 1: TABLE + version})
    table = Change(Op.INSERT if again else op, 0, (TABLE,), {0: msgspec.msgpack.encode(specs), 1: b"names"})
    part = Part(catalog.catalog_group("d"), None, (head, table))
    memory.commit(Transaction(os.urandom(16), "d", 0, (part,)))


def write(version, number=1):
    change = Change(Op.INSERT, TABLE, (number,), {1: number, 2: 5})
    return Transaction(os.urandom(16), "d", version, (Part(group_key("d", "~f", (number,)), None, (change,)),), (0,))


def copied(pops, name="a"):
    rows = pops.pops[name].memory.read([catalog.catalog_group("d")])[0].rows
    return _version_of(rows), rows


async def test_names_that_are_no_databases_leave_nothing_behind(pops):
    shard = pops.shards["a"]
    for number in range(20):
        await shard.find(FindQuery(f"no{number}", TABLE, 0, ()))
        with pytest.raises(NotFound):
            await shard.reserve_ids(f"no{number}", "n", 1)
    assert (len(shard._locks), len(shard._versions)) == (0, 0)


async def test_first_commit_makes_the_shard_with_the_whole_catalog(pops):
    await pops.shards["a"].commit(write(1))
    version, rows = copied(pops)
    assert version == 1
    assert rows == pops.home.memory.read([catalog.catalog_group("d")])[0].rows
    assert pops.pops["a"].memory.list_databases() == (), "it is not at home there"
    assert catalog.is_shard(pops.pops["a"].memory.homes()["d"])
    assert catalog.shards_of(pops.home.memory.read([catalog.shards_group("d")])[0].rows) == ("a",)
    pops.asked()
    await pops.shards["a"].commit(write(1, 2))
    assert pops.asked() == {"a": ["commit"]}


async def test_no_shard_is_made_that_is_not_listed(pops):
    listed = pops.home.commit
    pops.home.commit = lambda *arguments: listed(None)
    with pytest.raises(AttributeError):
        await pops.shards["a"].commit(write(1))
    assert pops.pops["a"].memory.homes() == {}


async def test_listing_that_a_recovery_lost_comes_back_with_the_next_version(pops):
    await pops.shards["a"].commit(write(1))
    lost = Part(catalog.shards_group("d"), None, (Change(Op.DELETE, 0, ("a",)),))
    pops.home.memory.commit(Transaction(os.urandom(16), "d", 0, (lost,)))
    publish(pops, 2)
    await pops.shards["a"].commit(write(2, 2))
    assert catalog.shards_of(pops.home.memory.read([catalog.shards_group("d")])[0].rows) == ("a",)


async def test_search_where_nothing_was_made_finds_nothing_and_makes_nothing(pops):
    assert (await pops.shards["a"].find(FindQuery("d", TABLE, 1))).rows == ()
    assert pops.pops["a"].memory.homes() == {}


async def test_who_is_older_fetches_first(pops):
    shard = pops.shards["a"]
    await shard.commit(write(1))
    publish(pops, 2, 2)
    found = await shard.find(FindQuery("d", TABLE, 2, (Constraint(2, Comparison.EQ, (5,)),)))
    assert len(found.rows) == 1
    assert copied(pops)[0] == 2
    with pytest.raises(SchemaChanged):
        await shard.commit(write(1, 2))


async def test_newer_catalog_out_of_reach_is_unavailable_and_the_old_one_goes_on(pops):
    shard = pops.shards["a"]
    await shard.commit(write(1))
    pops.home.away = Unavailable("global is cut off")
    await shard.commit(write(1, 2))
    for ask in (shard.commit(write(2, 3)), shard.find(FindQuery("d", TABLE, 2)), shard.fence("d", 2, ())):
        with pytest.raises(Unavailable, match="global is cut off"):
            await ask
    assert copied(pops)[0] == 1


async def test_copy_never_goes_back(pops):
    shard = pops.shards["a"]
    publish(pops, 2, 2)
    old = pops.home.memory.clone()
    publish(pops, 3, 2, 3)
    await shard.commit(write(3))
    pops.home.memory = old
    shard._versions.clear()
    await shard.commit(write(3, 2))
    assert copied(pops)[0] == 3
    with pytest.raises(SchemaChanged):
        await shard.commit(write(4, 3))


async def test_copy_that_was_overtaken_is_not_installed(pops):
    """Between the reading of a catalog and its installation another node of the PoP installs a newer one."""
    slow, fast = pops.shards["a"], Shard("a", pops.pops["a"], pops.registry, pops.clock, random.Random(1))
    await slow.commit(write(1))
    publish(pops, 2, 2)
    ask = slow._home_catalog

    async def overtaken(database, timeout_s):
        found = await ask(database, timeout_s)
        if copied(pops)[0] == 1:
            publish(pops, 3, 2, 3)
            await fast.commit(write(3, 2))
        return found

    slow._home_catalog = overtaken
    with pytest.raises(SchemaChanged):
        await slow.commit(write(2, 3))
    assert copied(pops)[0] == 3


async def test_two_nodes_of_a_pop_copy_at_once(pops):
    other = Shard("a", pops.pops["a"], pops.registry, pops.clock, random.Random(1))
    await asyncio.gather(pops.shards["a"].commit(write(1, 1)), other.commit(write(1, 2)))
    assert copied(pops)[0] == 1


async def test_version_that_the_home_never_had_is_refused(pops):
    with pytest.raises(SchemaChanged):
        await pops.shards["a"].commit(write(7))


async def test_database_that_is_gone_is_not_found_and_one_of_its_name_begins_empty(pops):
    """Also where its drop did not reach this PoP."""
    shard = pops.shards["a"]
    await shard.commit(write(1))
    pops.home.memory.drop_database("d")
    with pytest.raises(NotFound, match="no database 'd'"):
        await pops.shards["b"].commit(write(1, 2))
    pops.home.memory.create_database("d")
    publish(pops, 3, again=True)
    await shard.commit(write(3, 2))
    assert [row.group for row in (await shard.find(FindQuery("d", TABLE, 3))).rows] == [group_key("d", "~f", (2,))]
    assert copied(pops)[0] == 3


async def test_node_that_comes_second_to_replace_what_a_drop_left_takes_the_others_shard(pops):
    one, two = pops.shards["a"], Shard("a", pops.pops["a"], pops.registry, pops.clock, random.Random(2))
    await one.commit(write(1))
    pops.home.memory.drop_database("d")
    pops.home.memory.create_database("d")
    publish(pops, 3, again=True)
    make = two._make

    async def late(*arguments):
        two._make = make
        await one.commit(write(3, 2))
        await make(*arguments)

    two._make = late
    await two.commit(write(3, 5))
    found = await one.find(FindQuery("d", TABLE, 3))
    assert [row.group for row in found.rows] == [group_key("d", "~f", (n,)) for n in (2, 5)]


async def test_database_created_again_while_its_drop_ends_keeps_its_shards(pops):
    store = SpanningStore(pops.registry, pops.places("a"), pops.pops["a"])
    await pops.shards["a"].commit(write(1))
    drop = pops.home.memory.drop_database

    def and_again(*arguments):
        dropped = drop(*arguments)
        pops.home.memory.create_database("d")
        mark = catalog.databases_of(pops.home.memory.read([catalog.REGISTRY_GROUP])[0].rows)["d"]
        pops.pops["a"].memory.create_database("d", None, catalog.shard_home(mark))
        return dropped

    pops.home.memory.drop_database = and_again
    assert await store.drop_database("d") is True
    assert "d" in pops.pops["a"].memory.homes()


async def test_shard_dropped_behind_this_nodes_back_finds_nothing(pops):
    shard = pops.shards["a"]
    await shard.commit(write(1))
    pops.pops["a"].memory.drop_database("d")
    assert (await shard.find(FindQuery("d", TABLE, 1))).rows == ()


@pytest.mark.parametrize("local", [True, False])
def test_request_of_another_pop_is_told_by_its_keys_to_be_about_the_shard(local):
    key = group_key("d", "~f" if local else "f", (1,))
    for message in (
        requests.ReadGroups((key,), (None,)),
        requests.Commit(Transaction(b"i" * 16, "d", 1, (Part(key),))),
        requests.AskOutcome(b"i" * 16, key),
        requests.RaiseFence("d", 1, (key,)),
        requests.Find(FindQuery("d", TABLE, 1, scope=Scope.POPS if local else Scope.HOME)),
    ):
        assert is_about_shard(message) is local
    assert not is_about_shard(requests.ListDatabases())


def own_catalog(pops, *versions):
    """A database of PoP a's own, with a table, that was dropped since."""
    memory = pops.pops["a"].memory
    memory.create_database("d")
    for version in versions:
        publish_at(memory, version)
    memory.drop_database("d")


async def test_version_that_a_drop_left_in_the_pop_is_no_copy_of_the_catalog(pops):
    """Else finds would be served at a version of which no index is built, or nothing at all for ever."""
    own_catalog(pops, 1, 2, 3)
    publish(pops, 2, 2)
    shard = pops.shards["a"]
    with pytest.raises(SchemaChanged) as refused:
        await shard.commit(write(2))
    version = refused.value.detail["version"]
    assert version > 4, "above what the drop left"
    assert _version_of(pops.home.memory.read([catalog.catalog_group("d")])[0].rows) == version
    await shard.commit(write(version))
    found = await shard.find(FindQuery("d", TABLE, version, (Constraint(2, Comparison.EQ, (5,)),)))
    assert len(found.rows) == 1
    assert copied(pops)[1] == pops.home.memory.read([catalog.catalog_group("d")])[0].rows


async def test_version_that_a_drop_left_is_no_copy_though_the_home_comes_to_the_same(pops):
    own_catalog(pops, 1)
    publish(pops, 2, 2)
    with pytest.raises(SchemaChanged):
        await pops.shards["a"].commit(write(2))
    assert copied(pops)[0] == 3
    assert copied(pops)[1] == pops.home.memory.read([catalog.catalog_group("d")])[0].rows


async def test_shard_that_was_made_and_has_no_catalog_yet_takes_the_homes(pops):
    """Its maker stopped half way."""
    own_catalog(pops, 1, 2, 3)
    mark = catalog.databases_of(pops.home.memory.read([catalog.REGISTRY_GROUP])[0].rows)["d"]
    pops.pops["a"].memory.create_database("d", None, catalog.shard_home(mark))
    with pytest.raises(SchemaChanged):
        await pops.shards["a"].commit(write(1))
    assert copied(pops)[0] == 5


async def test_catalog_out_of_reach_is_read_from_the_shard_unless_that_was_never_copied(pops):
    """A process that starts would take an empty one for a database without tables."""
    store = SpanningStore(pops.registry, pops.places("a"), pops.pops["a"])
    key = catalog.catalog_group("d")
    own_catalog(pops, 1, 2, 3)
    pops.pops["a"].memory.create_database("d", None, catalog.shard_home(b"mark"))
    pops.home.away = Unavailable("global is cut off")
    with pytest.raises(Unavailable, match="global is cut off"):
        await store.read([key])
    pops.home.away = None
    publish(pops, 7, 2)
    await pops.shards["a"].commit(write(7))
    pops.home.away = Unavailable("global is cut off")
    (found,) = await store.read([key])
    assert _version_of(found.rows) == 7


async def test_database_of_the_pops_own_that_the_list_lost_is_not_dropped_for_a_shard(pops):
    memory = pops.pops["a"].memory
    memory.create_database("d")
    publish_at(memory, 1)
    memory.commit(write(1, 7))
    with pytest.raises(Invalid, match="a database 'd' of its own"):
        await pops.shards["a"].commit(write(1))
    assert memory.read([group_key("d", "~f", (7,))])[0].rows


async def test_id_drawn_from_a_shard_that_a_drop_left_behind_is_not_given_out_again(pops):
    """By a process whose first statement is an INSERT: it draws an id before anything names the new catalog."""
    shard = pops.shards["a"]
    await shard.commit(write(1))
    pops.home.memory.drop_database("d")
    pops.home.memory.create_database("d")
    publish(pops, 3, again=True)
    first = await shard.reserve_ids("d", "~17", 50)
    await shard.commit(write(3, 2))
    assert await shard.reserve_ids("d", "~17", 50) >= first + 50


async def test_sequence_raised_in_a_shard_that_a_drop_left_behind_stays_raised(pops):
    shard = pops.shards["a"]
    await shard.commit(write(1))
    pops.home.memory.drop_database("d")
    pops.home.memory.create_database("d")
    publish(pops, 3, again=True)
    await shard.raise_sequence("d", "~17", 500)
    await shard.commit(write(3, 2))
    assert await shard.reserve_ids("d", "~17", 50) > 500
