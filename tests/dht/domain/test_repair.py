"""How a replica compares itself with another one, step by step: domains without their background work."""

from __future__ import annotations

from typing import Any

from dht.model import Ballot
from dht.world import Space
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
