"""How a replica compares itself with another one, step by step: domains without their background work."""

from __future__ import annotations

import asyncio
from typing import Any

from dht.model import Ballot, GroupKey, NodeId
from dht.world import Space
from tests.dht.domain.small_world import value
from tests.dht.domain.test_transfer import Stage, staged


async def two_replicas(stage: Stage) -> None:
    """Machines 0 and 1 serve the tablet at epoch 2, which holds nothing yet."""
    stage.move(0, 1)
    await stage.tell(0, 1)
    for number in (0, 1):
        assert await stage.initialise(number)


def test_survey_of_a_peer_that_has_few_where_this_node_has_many_looks_at_few() -> None:
    async def story(stage: Stage) -> None:
        await two_replicas(stage)
        keys = sorted(stage.keys)
        for i, k in enumerate(keys):
            stage.write(0, k, i + 1, "here", epoch=2)
        # The peer's: one in the midst that is newer there, one that is older, one that only it has.
        last = max(keys) + b"x"
        mine, theirs = stage.world.node(0), stage.world.node(1)
        while mine.registers.tablet(last) != stage.tablet:
            last += b"x"
        stage.write(1, keys[-2], 500, "there", epoch=2)
        stage.write(1, keys[1], 1, "there", epoch=2)
        stage.write(1, last, 500, "there", epoch=2)
        disk: Any = mine.boot.disk
        whole, looked = disk.range, 0

        def counted(space: Space, *bounds: Any, **more: Any) -> Any:
            nonlocal looked
            pairs = list(whole(space, *bounds, **more))
            looked += len(pairs) if space == Space.REGISTER else 0
            return pairs

        disk.range = counted
        repair = stage.world.domain(0).repair
        behind, _ = await repair._survey(stage.tablet, 2, theirs.boot.node_id)
        assert [mark.key for mark in behind] == [keys[-2], last]
        assert {mark.accepted for mark in behind} == {Ballot(1, 2, 500, b"p", 1, 500)}
        assert len(keys) > 20
        assert looked <= 2 * 3
        del disk.range

    staged(story, 2)


def test_peer_that_returns_while_much_is_being_finished_is_compared_with_at_once() -> None:
    """Each register that cannot be finished takes its time, and there may be thousands."""

    async def story(stage: Stage) -> None:
        stage.write(0, stage.keys[0], 1, "left by the first epoch", chosen=False)
        await two_replicas(stage)
        stage.write(1, stage.keys[1], 5, "missed", epoch=2)
        repair, clock = stage.world.domain(0).repair, stage.world.cluster.machines[0].clock
        begun: list[GroupKey] = []

        async def settle(key: GroupKey) -> None:
            begun.append(key)
            await asyncio.Event().wait()

        repair.settle = settle
        running = asyncio.create_task(repair.run())
        await clock.sleep(3.0)
        assert begun == [stage.keys[0]]
        stage.write(1, stage.keys[2], 6, "missed too", epoch=2)
        repair.returned(stage.world.node(1).boot.node_id)
        await clock.sleep(1.0)
        assert [stage.row(0, k) for k in stage.keys[1:3]] == [value("missed"), value("missed too")]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    staged(story, 2)


def test_tablet_that_is_taken_over_while_much_is_being_copied_is_finished_at_once() -> None:
    async def story(stage: Stage) -> None:
        repair, clock = stage.world.domain(0).repair, stage.world.cluster.machines[0].clock
        finished: list[GroupKey] = []

        async def settle(key: GroupKey) -> None:
            finished.append(key)

        async def compare_with(node: NodeId, only: list[int] | None) -> list[int]:
            await asyncio.Event().wait()
            return []

        repair.settle = settle
        repair._compare_with = compare_with  # type: ignore[method-assign]
        repair.returned(b"p" * 20)
        running = asyncio.create_task(repair.run())
        await clock.sleep(3.0)
        stage.write(0, stage.keys[0], 1, "left by the first epoch", chosen=False)
        await two_replicas(stage)
        await clock.sleep(1.0)
        assert finished == [stage.keys[0]]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        del repair._compare_with

    staged(story, 2)
