"""Rules of the fence between two versions of a catalog: one hand-made schedule for each, with the rule and without it.

In each of them a new rule is published that writers have to keep, one replica is away, and the fence is raised over the
others. A search then tells which rows there are. With the rule no other row ever comes to light; without it a
transaction that was made under the older catalog does, after the search that should have seen it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from dht.domain.roster import successor
from dht.domain.rules import DomainRules
from dht.errors import Indeterminate, SchemaChanged, Unavailable
from dht.model import (
    Ballot,
    Change,
    Comparison,
    Constraint,
    FindQuery,
    GroupKey,
    Op,
    Part,
    Struct,
    TableSpec,
    Transaction,
)
from dht.register.messages import Accept, AskFence, Coordinate, FindReplica, Kind, Learn, Operation, ReadReplica
from dht.register.rules import Rules
from dht.rows import decode_row, encode_value, group_key
from dht.sim.clock import SimClock
from dht.storage.registers import Header
from dht.world import Batch
from tests.dht.domain.test_transfer import Stage, staged
from tests.sim.bench import Bench, Gate, failed, insert, play, update
from tests.sim.test_rare_rules_domain import three_replicas
from tests.sim.test_rare_rules_epochs import NEVER_SEEN, Stores

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
CATALOG = group_key("db", "catalog", ())
FENCED = (group_key("db", "f", ()),)


async def publish(bench: Bench, version: int = 2) -> None:
    """A new version of the catalog, through node 0."""
    part = Part(CATALOG, changes=(Change(Op.UPDATE, 0, (0,), {0: version}),))
    await bench[0].commit(bench.transaction(part))
    await asyncio.sleep(0.5)


async def fence(bench: Bench, timeout_s: float = 20.0) -> int:
    following = 0
    while following >= 0:
        following = await bench[0].fence("db", 2, FENCED, following, timeout_s)
    return following


async def found(bench: Bench, number: int, value: int) -> list[object]:
    """Column 0 of the rows whose column 1 has the value, asked under the new catalog."""
    query = FindQuery("db", 1, 2, (Constraint(1, Comparison.EQ, (value,)),))
    return [decode_row(row.row)[0] for row in (await bench[number].find(query)).rows]


async def deaf(sender: int, to: int, message: Struct) -> bool:
    """Node 2 hears nothing of the new catalog, neither when it is announced nor by a fence or a find."""
    return not (to == 2 and isinstance(message, (Learn, AskFence, FindReplica)))


async def propose(bench: Bench, number: int, part: Part, version: int, timeout_s: float = 1.0) -> object:
    """As `Bench.propose`, made under a version of the catalog."""
    operation = Operation(Kind.COMMIT, bench.transaction(part).id, part, version=version)
    return await bench[number]._coordinator.run(operation, 0, True, SimClock().monotonic() + timeout_s)


@BOTH
def test_version_with_promise_replica_that_missed_the_catalog_commits_under_the_old_one(on: bool) -> None:
    """A group begins after the fence, at a coordinator that never heard of the new catalog."""

    async def story(bench: Bench) -> object:
        await bench.define()
        bench.gate = deaf
        await publish(bench)
        await fence(bench)
        assert await found(bench, 0, 7) == []
        error = await failed(bench[2].commit(bench.transaction(insert(bench.key(2), {0: "late", 1: 7}), version=1)))
        return type(error), await bench.row(0, bench.key(2))

    wrong = (type(None), {0: "late", 1: 7})
    assert play(story, Rules(version_with_promise=on)) == ((SchemaChanged, None) if on else wrong)


@BOTH
def test_window_write_that_was_applied_before_the_fence_is_not_refused_behind_it_for_its_version(on: bool) -> None:
    """1 applied it, and falls silent before 2, who passed it on, hears of it: 2 sends it again behind the fence."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(1)
        write = bench.transaction(insert(key, {0: "first", 1: 1}), version=1)
        serve, applied = bench[1]._router.serve, asyncio.Event()

        async def mute(request: Coordinate) -> Any:
            reply = await serve(request)
            if request.operation.id != write.id:
                return reply
            applied.set()
            await asyncio.sleep(60.0)
            raise Unavailable("too late for anybody")

        bench[1]._answers[Coordinate] = mute
        told = asyncio.create_task(failed(bench[2].commit(write)))
        await applied.wait()
        await publish(bench)
        await fence(bench)
        return type(await told), await bench.row(0, key)

    told = type(None) if on else SchemaChanged
    assert play(story, Rules(window=on)) == (told, {0: "first", 1: 1})


@BOTH
def test_fence_settles_groups_value_of_a_minority_comes_to_light_after_it(on: bool) -> None:
    """Node 2 alone accepted a write before the fence, and is away. Later 0 is, and 1 has to go on from what 2 has."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(2)

        async def lonely(sender: int, to: int, message: Struct) -> bool:
            return not (sender == 2 and to != 2 and isinstance(message, Accept))

        bench.gate = lonely
        await failed(propose(bench, 2, insert(key, {0: "late", 1: 7}), 1, 0.2))
        bench.gate = away(2)
        await publish(bench)
        await fence(bench)
        seen = await found(bench, 0, 7)
        bench.gate = away(0)
        return seen, await bench.row(1, key)

    assert play(story, Rules(fence_settles_groups=on)) == ([], None if on else {0: "late", 1: 7})


@BOTH
def test_fence_settles_groups_promise_from_before_it_is_used_after_it(on: bool) -> None:
    """Node 2 coordinates a group and holds the promise for its next write, made under the old catalog."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(2)
        await propose(bench, 2, insert(key, {0: "first", 1: 1}), 1)
        bench.gate = away(2)
        await publish(bench)
        await fence(bench)
        seen = await found(bench, 0, 7)
        bench.gate = deaf
        error = await failed(propose(bench, 2, update(key, {1: 7}), 1))
        return seen, type(error), await bench.row(0, key)

    expected = ([], SchemaChanged, {0: "first", 1: 1}) if on else ([], type(None), {0: "first", 1: 7})
    assert play(story, Rules(fence_settles_groups=on)) == expected


@BOTH
def test_fence_ends_intents_transaction_prepared_before_it_commits_after_it(on: bool) -> None:
    """The commit of its first group, which is not behind the fence, is on its way on a promise of old; 2 answers no
    reads, so nobody finishes it."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key, primary = bench.key(1), elsewhere(bench)
        await propose(bench, 2, Part(primary, changes=(Change(Op.INSERT, 2, (1,), {0: 1}),)), 1)
        go_on = asyncio.create_task(asyncio.sleep(0.9))

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Accept) and message.key == primary and sender == 2 != to:
                await asyncio.wait((go_on,))
            return await deaf(sender, to, message) and not (to == 2 and isinstance(message, ReadReplica))

        bench.gate = gate
        changes = (Change(Op.UPDATE, 2, (1,), {0: 2}), Change(Op.INSERT, 2, (2,), {0: 2}))
        both = bench.transaction(insert(key, {0: "late", 1: 7}), Part(primary, changes=changes), version=1)
        late = asyncio.create_task(failed(bench[2].commit(both, timeout_s=30.0)))
        await asyncio.sleep(0.1)
        await publish(bench)
        await fence(bench)
        seen = await found(bench, 1, 7)
        await late
        await asyncio.sleep(1.0)
        return seen, await bench.row(1, key)

    assert play(story, Rules(fence_ends_intents=on)) == (["late"] if on else [], {0: "late", 1: 7})


def test_fence_without_a_majority_is_refused_and_can_be_repeated() -> None:
    async def story(bench: Bench) -> object:
        await bench.define()
        await publish(bench)

        async def alone(sender: int, to: int, message: Struct) -> bool:
            return sender == to

        bench.gate = alone
        error = await failed(fence(bench, 2.0))
        bench.gate = deaf
        return type(error), await fence(bench)

    assert play(story, Rules()) == (Unavailable, -1)


@BOTH
def test_versions_carried_new_replica_tells_what_the_old_ones_told(on: bool) -> None:
    """0 and 1 know version 5, 2 does not. The tablet moves to 0, 2 and 3, of whom 2 and 3 are a majority."""

    async def story(stage: Stage) -> None:
        await three_replicas(stage)
        for number in (0, 1):
            registers = stage.world.node(number).registers
            batch = Batch()
            registers.tell_versions(batch, {encode_value("db"): 5})
            stage.world.node(number).boot.disk.submit(batch)
        stage.move(0, 2, 3)
        await stage.tell(0, 2, 3)
        assert await stage.initialise(3)
        assert await stage.initialise(2)
        told = [stage.world.node(number).registers.told_version(group_key("db", "f", ())) for number in (2, 3)]
        assert told == ([5, 5] if on else [0, 0])

    staged(story, 4, DomainRules(versions_carried=on))


def test_version_that_came_with_a_tablet_is_not_forgotten_for_a_catalog_that_was_read_before() -> None:
    """2 reads the catalog, and the reply is long on its way. Then the next version is published, the fence is raised by
    0 and 1, and 2 takes a tablet over that was behind it."""

    async def story(bench: Bench) -> object:
        await bench.define()
        databases, registers = bench[2]._databases, bench.files[2]
        read, answered, go_on = databases._reader.read, asyncio.Event(), asyncio.Event()

        async def late(*args: Any) -> Any:
            reply = await read(*args)
            answered.set()
            await go_on.wait()
            return reply

        databases._reader.read = late  # type: ignore[method-assign]
        learning = asyncio.create_task(databases.learn("db", None, SimClock().monotonic() + 60.0))
        await answered.wait()
        bench.gate = deaf
        await publish(bench)
        await fence(bench)
        batch = Batch()
        registers.tell_versions(batch, {encode_value("db"): 2})
        bench.disks[2].submit(batch)
        go_on.set()
        return await learning, registers.told_version(bench.key(2))

    assert play(story, Rules()) == (2, 2)


def test_version_with_promise_recovery_that_lost_the_newest_catalog_leaves_groups_that_can_be_written() -> None:
    """1 coordinates a group and was told of version 2. In the next generation the catalog is of version 1 again."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(1)
        await publish(bench)
        await bench[1].commit(bench.transaction(insert(key, {0: "first", 1: 1}), version=2))
        for number in range(3):
            bench[number]._context.domain.generation = 2  # type: ignore[misc]
        await publish(bench, 1)
        await bench[1].commit(bench.transaction(update(key, {1: 7}), version=1))
        return await bench.row(0, key)

    assert play(story, Rules()) == {0: "first", 1: 7}


@BOTH
def test_promises_carried_group_that_was_only_promised_is_listed_by_a_new_replica(on: bool) -> None:
    """Somewhere a value may lie that was proposed on the promise: the fence has to settle the group."""

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        await three_replicas(stage)
        for number in (0, 1):
            registers = stage.world.node(number).registers
            batch = Batch()
            registers.write(batch, k, Header(Ballot(1, 2, 1, b"p", 1, 1)), {})
            stage.world.node(number).boot.disk.submit(batch)
        stage.move(0, 2, 3)
        await stage.tell(0, 2, 3)
        assert await stage.initialise(3)
        assert stage.world.node(3).registers.keys_with(stage.tablet, k) == ([k] if on else [])

    staged(story, 4, DomainRules(promises_carried=on))


def all_on(stage: Stage, *numbers: int) -> None:
    """A link that gives every tablet to these machines. Nobody hears of it yet."""
    link = stage.move(*numbers)
    nodes = link.tablets[stage.tablet]
    stage.links[-1] = successor(stage.links[-2], link.members, link.voters, [nodes] * len(link.tablets))


async def take_over(stage: Stage, *numbers: int) -> None:
    """These machines hear of the last link, and begin all its tablets."""
    await stage.tell(*numbers)
    for number in numbers:
        for tablet in range(len(stage.links[-1].tablets)):
            stage.tablet = tablet
            assert await stage.initialise(number, 60.0)


async def third_comes(stage: Stage, rules: Rules, *, promised: bool) -> list[object]:
    """Epoch 2 is {0, 1}. A write of the old catalog, whose accept reaches 0 alone: 0 and 1 hear each other no more,
    from before its prepare on or after both have `promised`.

    Epoch 3 is {0, 1, 2}. 1 and 2 go on without 0, and raise the fence. 0 comes with what it has, and a prepare asks it.
    What became of the write, what a find told behind the fence, and what the prepare found.
    """
    cluster = stage.world.cluster
    all_on(stage, 0, 1)
    await take_over(stage, 0, 1)
    stores = Stores(stage, rules)
    await stores[0].create_database("db")
    specs = (
        Change(Op.INSERT, 0, (0,), {0: 1}),
        Change(Op.INSERT, 0, (1,), {0: msgspec.msgpack.encode(TableSpec(1, (0,)))}),
    )
    await stores[0].commit(Transaction(b"1" * 16, "db", 1, (Part(CATALOG, changes=specs),)))
    late = group_key("db", "f", ("late",))
    rounds = stores[0]._coordinator._rounds
    accept = rounds.accept

    async def cut_off(*args: Any) -> bool:
        rounds.accept = accept  # type: ignore[method-assign]
        cluster.partition([0], [1, 2])
        return await accept(*args)

    if promised:
        rounds.accept = cut_off  # type: ignore[method-assign]
    else:
        cluster.partition([0], [1, 2])
    operation = Operation(Kind.COMMIT, b"2" * 16, insert(late, {1: "late"}), version=1)
    deadline = stage.world.node(0).boot.clock.monotonic() + 0.5
    refusal = await failed(stores[0]._coordinator.run(operation, 0, True, deadline))
    all_on(stage, 0, 1, 2)
    await take_over(stage, 1, 2)
    newer = Part(CATALOG, changes=(Change(Op.UPDATE, 0, (0,), {0: 2}),))
    await stores[1].commit(Transaction(b"3" * 16, "db", 1, (newer,)))
    assert await stores[1].fence("db", 2, FENCED) == -1
    found = await stores.find(1, late)
    await take_over(stage, 0)
    cluster.heal()
    for a, b in ((0, 2), (2, 0)):  # they hear each other again
        await stores[a]._context.network.call(cluster.machines[b].node_id, ReadReplica(()), 5.0)
    cluster.partition([1], [0, 2])
    read = await stores.read(0, late)
    await stores.stop()
    return [type(refusal), found, read]


@BOTH
def test_prepare_at_both_value_of_one_of_two_comes_to_light_after_a_third_has_come(on: bool) -> None:
    """Had 0 been enough for the promise, 1 and 2 would know nothing of the group, and the fence would miss it."""
    told: list[object] = []

    async def story(stage: Stage) -> None:
        told.extend(await third_comes(stage, Rules(prepare_at_both=on), promised=False))

    staged(story, 3)
    assert told == ([Unavailable, NEVER_SEEN, NEVER_SEEN] if on else [Indeterminate, NEVER_SEEN, "late"])


def test_value_of_one_of_two_that_both_promised_is_settled_by_a_fence_after_a_third_has_come() -> None:
    told: list[object] = []

    async def story(stage: Stage) -> None:
        told.extend(await third_comes(stage, Rules(), promised=True))

    staged(story, 3)
    assert told == [Indeterminate, NEVER_SEEN, NEVER_SEEN]


def away(number: int) -> Gate:
    """Nothing goes to the node or comes from it."""

    async def gate(sender: int, to: int, message: Struct) -> bool:
        return number not in (sender, to)

    return gate


def elsewhere(bench: Bench) -> GroupKey:
    """A group of another family that node 2 coordinates."""
    keys = (group_key("db", "g", (n,)) for n in range(100))
    return next(key for key in keys if bench.files[0].tablet(key) % 3 == 2)
