"""Rules of collection whose breaking random runs show too seldom, with whole production nodes in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dht.errors import Indeterminate, Unavailable
from dht.model import Ballot, Change, FindQuery, GroupKey, Op, Part, Transaction
from dht.register.messages import Kind, Operation
from dht.register.node import StoreNode
from dht.register.operations import Intent
from dht.rows import decode_row, group_key, row_key
from dht.sim import loop as virtual
from dht.sim.cluster import Cluster
from dht.sim.production import ProductionNode, builder
from dht.world import Batch
from tests.sim.bench import failed

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
KEY = group_key("db", "f", ("g",))


class Yard:
    """A cluster in which nothing is collected but by the story."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.ids = iter(range(1, 1000))

    def node(self, number: int) -> ProductionNode:
        node = self.cluster.machines[number].node
        assert isinstance(node, ProductionNode)
        return node

    def store(self, number: int) -> StoreNode:
        return self.node(number)._store

    async def grow(self, size: int) -> None:
        while len(self.cluster.machines) < size:
            await self.cluster.start(self.cluster.add(founds=not self.cluster.machines))
            await asyncio.sleep(20.0)

    async def sweep(self) -> None:
        for _ in range(2):
            await self.node(0).domain.collection.sweep()
        assert self.node(0).domain.collection.collected == 1

    def transaction(self, part: Part) -> Transaction:
        return Transaction(next(self.ids).to_bytes(16, "big"), "db", 0, (part,))

    async def keys(self, number: int, key: GroupKey) -> list[bytes]:
        (read,) = await self.store(number).read([key])
        return sorted(read.rows or {})


def insert(pk: int) -> Part:
    return Part(KEY, changes=(Change(Op.INSERT, 1, (pk,), {0: pk}),))


def delete(pk: int) -> Part:
    return Part(KEY, changes=(Change(Op.DELETE, 1, (pk,), {}),))


def play(story: Callable[[Yard], Coroutine[Any, Any, None]], *off: str, register: tuple[str, ...] = ()) -> None:
    """`off`, `register`: rules of the domain and of the registers that are switched off."""

    async def told() -> None:
        await story(Yard(Cluster(1, builder(register, off, 1, 1e6, 1e6, boots_checked=False))))

    virtual.run(told(), time_limit_s=1000.0)


@BOTH
def test_floor_carried_transaction_from_before_the_collection_is_applied_again(on: bool) -> None:
    """A row is inserted, deleted, and its group collected, with its window. Then the tablet gets a second replica.

    The insert is tried again. Only the floor that the replicas of the new epoch took over tells that it is too old.
    """

    async def story(yard: Yard) -> None:
        await yard.grow(1)
        store = yard.store(0)
        await store.create_database("db")
        (read,) = await store.read([KEY])
        old = yard.transaction(Part(KEY, read.ballot, insert(1).changes))
        await store.commit(old)
        await store.commit(yard.transaction(delete(1)))
        await asyncio.sleep(1.0)
        await yard.sweep()
        await yard.grow(2)
        error = await failed(yard.store(1).commit(old, 1))
        assert isinstance(error, Indeterminate) if on else error is None
        assert await yard.keys(1, KEY) == ([] if on else [row_key(1, (1,))])

    play(story, *(() if on else ("floor_carried",)))


@BOTH
def test_floor_keeps_promise_accept_on_its_way_overwrites_a_later_write(on: bool) -> None:
    """A slow proposer is promised its ballot above a tombstone that is collected before its accept comes.

    If the floor is above the tombstone only, the coordinator may write below that ballot: acknowledged. The slow accept
    then passes, on the state of before.
    """

    async def story(yard: Yard) -> None:
        await yard.grow(3)
        order = yard.node(0).domain.roster.tablets[0]
        by_id = {machine.node_id: number for number, machine in enumerate(yard.cluster.machines)}
        first, slow = by_id[order[0]], by_id[order[2]]
        await yard.store(first).create_database("db")
        await yard.store(first).commit(yard.transaction(insert(1)))
        await yard.store(first).commit(yard.transaction(delete(1)))
        await asyncio.sleep(1.0)
        coordinator = yard.store(slow)._coordinator
        deadline = asyncio.get_running_loop().time() + 60.0
        # A prepare more, so that its ballot is the higher one whatever the order of the nodes' ids.
        await coordinator.run(Operation(Kind.SETTLE, bytes(15) + b"s", Part(KEY)), 0, True, deadline)
        await asyncio.sleep(0.1)
        coordinator.forget(KEY)
        rounds = coordinator._rounds
        accept, go_on = rounds.accept, asyncio.Event()

        async def late(*args: Any) -> bool:
            await go_on.wait()
            return await accept(*args)

        rounds.accept = late  # type: ignore[method-assign]
        operation = Operation(Kind.COMMIT, bytes(16), insert(2))
        coming = asyncio.create_task(failed(coordinator.run(operation, 0, True, deadline)))
        await asyncio.sleep(1.0)
        await yard.sweep()
        if await failed(yard.store(first).commit(yard.transaction(insert(1)))) is not None:
            # Its first ballot was below the floor, and what it had seen of the group is forgotten: the client runs it
            # again as a new transaction.
            await yard.store(first).commit(yard.transaction(insert(1)))
        go_on.set()
        error = await coming
        assert isinstance(error, Indeterminate) if on else error is None
        assert await yard.keys(first, KEY) == [row_key(1, (1 if on else 2,))]

    play(story, *(() if on else ("floor_keeps_promise",)))


@BOTH
def test_floor_raised_transaction_from_before_the_collection_is_applied_again(on: bool) -> None:
    """A row is inserted, deleted, and its group collected, with its window. Then the insert is tried again."""

    async def story(yard: Yard) -> None:
        await yard.grow(1)
        store = yard.store(0)
        await store.create_database("db")
        (read,) = await store.read([KEY])
        old = yard.transaction(Part(KEY, read.ballot, insert(1).changes))
        await store.commit(old)
        await store.commit(yard.transaction(delete(1)))
        await asyncio.sleep(1.0)
        await yard.sweep()
        error = await failed(store.commit(old, 1))
        assert isinstance(error, Indeterminate) if on else error is None
        assert await yard.keys(0, KEY) == ([] if on else [row_key(1, (1,))])

    play(story, *(() if on else ("floor_raised",)))


@BOTH
def test_collected_primary_asked_read_that_met_the_intent_before_tells_the_state_before(on: bool) -> None:
    """After a deletion in two groups is acknowledged a read meets its intent, and is slow to ask the first group of it.

    Meanwhile the deletion is finished and the first group, empty now, collected. Silence there is no "not decided yet".
    """
    first, second = KEY, group_key("db", "f", ("h",))

    async def story(yard: Yard) -> None:
        await yard.grow(3)
        store = yard.store(0)
        await store.create_database("db")
        kept = Change(Op.INSERT, 2, (2,), {0: 2})
        await store.commit(yard.transaction(insert(1)))
        await store.commit(yard.transaction(Part(second, changes=(Change(Op.INSERT, 1, (1,), {0: 1}), kept))))
        reader = yard.store(1)._reader
        resolve, met, go_on = reader.resolve, asyncio.Event(), asyncio.Event()

        async def slow(key: GroupKey, intent: Intent, deadline: float) -> bool:
            met.set()
            await go_on.wait()
            return await resolve(key, intent, deadline)

        reader.resolve = slow
        router = store._router
        submit, finish = router.submit, asyncio.Event()

        async def held(operation: Operation, attempt: int, deadline: float) -> Any:
            if operation.kind == Kind.FINISH:
                await finish.wait()
            return await submit(operation, attempt, deadline)

        router.submit = held  # type: ignore[method-assign]
        gone = Change(Op.DELETE, 1, (1,), {})
        parts = (Part(first, changes=(gone,)), Part(second, changes=(gone,)))
        await store.commit(Transaction(bytes(15) + b"t", "db", 0, parts))
        reading = asyncio.create_task(yard.store(1).find(FindQuery("db", 1, 0), timeout_s=60.0))
        await met.wait()
        finish.set()
        await asyncio.sleep(1.0)
        await yard.sweep()
        go_on.set()
        assert [row.group for row in (await reading).rows] == ([] if on else [second])

    play(story, register=() if on else ("collected_primary_asked",))


def test_forgotten_is_chosen_before_an_intent_is_dropped_for_it() -> None:
    """A floor reached one replica only; a read there ends a transaction's intent for it. Then the others commit.

    They know a lower floor, and would let the transaction's first group apply it without the second.
    """
    primary, other = KEY, group_key("db", "f", ("h",))

    async def story(yard: Yard) -> None:
        await yard.grow(3)
        order = yard.node(0).domain.roster.tablets[0]
        by_id = {machine.node_id: number for number, machine in enumerate(yard.cluster.machines)}
        store, last = yard.store(by_id[order[0]]), yard.store(by_id[order[2]])
        await store.create_database("db")
        await store.commit(yard.transaction(Part(other, changes=(Change(Op.INSERT, 1, (9,), {0: 1}),))))
        router, commit = store._router, asyncio.Event()
        submit = router.submit

        async def held(operation: Operation, attempt: int, deadline: float) -> Any:
            if operation.kind == Kind.COMMIT_PRIMARY:
                await commit.wait()
            return await submit(operation, attempt, deadline)

        router.submit = held  # type: ignore[method-assign]
        changes = tuple(Change(Op.INSERT, 1, (pk,), {0: pk}) for pk in (1, 2))
        parts = (Part(primary, changes=changes), Part(other, changes=(Change(Op.UPDATE, 1, (9,), {0: 2}),)))
        committing = asyncio.create_task(failed(store.commit(Transaction(bytes(15) + b"t", "db", 0, parts))))
        await asyncio.sleep(0.2)
        roster = yard.node(0).domain.roster
        floor = Ballot(roster.generation, roster.tablet_epochs[0], 5, b"", 0, 0)
        for number in range(3):
            tablets, batch = yard.node(number).domain.tablets, Batch()
            tablets.raise_floor(batch, 0, floor)
            if number == by_id[order[2]]:
                tablets.agree(batch, 0, floor)
            tablets.submit(batch)
        await last.read([other])

        def away(request: Any) -> Any:
            raise Unavailable("away")

        last._acceptor.prepare = away  # type: ignore[method-assign]
        store._coordinator.forget(primary)
        commit.set()
        error = await committing
        (first,) = await store.read([primary])
        (second,) = await store.read([other])
        applied = [bool(first.rows), decode_row(next(iter((second.rows or {}).values())))[0] == 2]
        assert applied == [error is None, error is None]

    play(story)
