"""A replica that a chosen write has passed by catches up soon, with whole production nodes in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

from dht.model import Change, Op, Part
from dht.register.messages import Prepare
from dht.register.node import StoreNode
from tests.sim.test_rare_rules_collection import KEY, Yard, insert, play


def update(value: int) -> Part:
    return Part(KEY, changes=(Change(Op.UPDATE, 1, (1,), {1: value}),))


def promise_another(store: StoreNode) -> None:
    """The replica promises a ballot of a proposer that is not heard of again."""
    context = store._context
    held = context.file.header(KEY)
    ballot = held.promise._replace(round=held.promise.round + 10)
    assert store._acceptor.prepare(Prepare(KEY, ballot, None))[0].ok


async def begun(yard: Yard) -> tuple[StoreNode, StoreNode]:
    """Three nodes with one row: the coordinator of its group, and another replica."""
    await yard.grow(3)
    first = yard.node(0).domain.roster.tablets[0][0]
    at = [machine.node_id for machine in yard.cluster.machines].index(first)
    store = yard.store(at)
    await store.create_database("db")
    await store.commit(yard.transaction(insert(1)))
    await asyncio.sleep(1.0)
    return store, yard.store((at + 1) % 3)


def standings(yard: Yard) -> list[tuple[int, bytes]]:
    headers = [yard.store(number)._context.file.header(KEY) for number in range(3)]
    return [(header.accepted.round, header.digest) for header in headers]


def test_replica_that_refused_a_chosen_write_stands_with_the_others_soon() -> None:
    async def story(yard: Yard) -> None:
        store, last = await begun(yard)
        promise_another(last)
        await store.commit(yard.transaction(update(7)))
        assert len(set(standings(yard))) == 2
        await asyncio.sleep(1.0)
        assert len(set(standings(yard))) == 1
        assert store.counters["laggards_settled"] == 1

    play(story)


def test_replica_behind_that_settles_before_its_own_promise_is_durable_comes_to_the_newest_value() -> None:
    """The others' promises are a quorum before its own is: they stand alike, and it does not."""

    async def story(yard: Yard) -> None:
        store, behind = await begun(yard)

        async def nobody(*_: object) -> None:
            return None

        store._coordinator._rounds._laggards.settle = nobody
        promise_another(behind)
        await store.commit(yard.transaction(update(7)))
        await asyncio.sleep(1.0)
        assert len(set(standings(yard))) == 2
        when_durable = behind._acceptor.when_durable

        def slowly(*asked: Any) -> None:
            asyncio.get_running_loop().call_later(0.2, when_durable, *asked)

        behind._acceptor.when_durable = slowly  # type: ignore[method-assign]
        await behind.settle(KEY)
        await asyncio.sleep(1.0)
        assert len(set(standings(yard))) == 1

    play(story)
