"""At which floor a copy tells of groups that it does not have."""

from __future__ import annotations

import pytest

from dht.domain.messages import AskChanges
from dht.model import ZERO, Ballot, Struct
from dht.world import Batch
from tests.dht.domain.beside import (
    FLOOR,
    collected,
    three,
    write,
)
from tests.dht.domain.small_world import value
from tests.dht.domain.test_transfer import Stage, staged


def test_tombstone_that_was_collected_reads_as_the_floor() -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        floor = Ballot(1, 2, 9, b"", 0, 0)
        for number in (0, 1, 2):
            node, batch = stage.world.node(number), Batch()
            node.domain.tablets.agree(batch, stage.tablet, floor)
            node.domain.tablets.submit(batch)
        await beside.rounds()
        assert beside.copy.standing(stage.keys[0]) == ZERO
        assert beside.copy.floors[stage.tablet] == floor

    staged(story, 3)


@pytest.mark.parametrize("restarted", [False, True], ids=["goes on", "restarted"])
def test_group_that_was_collected_during_the_round_is_told_at_the_floor_and_not_below_where_it_stood(
    restarted: bool,
) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        k = stage.keys[0]
        write(stage, k, 1, "old", 0, 1, 2, chosen=True)
        await beside.rounds()
        stood = beside.copy.standing(k)
        asked: set[int] = set()

        async def after(number: int, message: Struct) -> None:
            if isinstance(message, AskChanges):
                asked.add(number)
            if asked == {0, 1, 2}:
                asked.add(-1)
                collected(stage, k)

        beside.line.after = after
        beside.copy.open(k, doubtful=True)
        await beside.rounds()
        if restarted:
            beside.restart()
            await beside.rounds(4)
        assert beside.row(k) is None
        assert beside.copy.told_at(k) == FLOOR > stood
        await beside.rounds()
        assert (beside.copy.standing(k), beside.copy.told_at(k)) == (ZERO, FLOOR)

    staged(story, 3)


def test_group_that_is_not_here_yet_is_not_told_at_a_floor_above_what_was_heard_of_it() -> None:
    """It was made before the floor was raised; the follower knows the floor, but not yet whether it is chosen."""

    async def story(stage: Stage) -> None:
        beside = await three(stage)
        k, other = stage.keys[:2]
        write(stage, k, 1, "new", 0)
        collected(stage, other)
        beside.line.deaf = {1}
        await beside.rounds()
        assert beside.copy.floors[stage.tablet] == FLOOR
        told = beside.copy.told_at(k)
        write(stage, k, 1, "new", 1)
        beside.line.deaf = set()
        await beside.rounds()
        assert beside.row(k) == value("new")
        assert told <= beside.copy.told_at(k) < FLOOR

    staged(story, 3)
