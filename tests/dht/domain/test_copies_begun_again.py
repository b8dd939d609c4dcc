"""A follower's copy over restarts, and when its domain was recovered: what it keeps, and when it begins again."""

from __future__ import annotations

import itertools
import random

import pytest

from dht.domain import copy as copy_module
from dht.sim.disk import SimDisk
from dht.world import Batch, Space
from tests.dht.domain.beside import (
    Beside,
    three,
    write,
)
from tests.dht.domain.small_world import TABLETS, World, key, play, value
from tests.dht.domain.test_transfer import Stage, staged


def test_follower_that_stops_between_a_generations_link_and_beginning_again_begins_again_at_its_next_start() -> None:
    """The link is on its disk, so nobody tells it of the generation once more."""

    async def story(world: World) -> None:
        await world.grow(3)
        k = key(0)
        await world.put(0, k, "kept")
        beside = Beside(world)
        await beside.rounds(3)
        await world.put(0, k, "lost", skip=(2,))
        await beside.rounds()
        assert beside.row(k) == value("lost")
        world.cluster.crash(0)
        world.cluster.crash(1)
        await world.domain(2).generations.recover([], accept_data_loss=True)
        await world.until(lambda: all(world.domain(2).tablets.serves(t) for t in range(TABLETS)), what="serving")
        left: list[SimDisk] = []

        class LosesPower(SimDisk):
            def submit(self, batch: Batch) -> int:
                number = super().submit(batch)
                if not left and any(space == Space.ROSTER for space, _, _ in batch.writes):
                    left.append(SimDisk(random.Random(1)))
                    left[0].fill(self.content())
                return number

        beside.disk.__class__ = LosesPower
        await beside.rounds()
        (beside.disk,) = left
        beside.restart()
        assert beside.row(k) == value("lost")
        await beside.rounds(6)
        assert beside.row(k) == value("kept")
        assert beside.copy.noted.generation == 2

    play(story)


def test_complete_copy_that_is_to_be_set_aside_stays_as_it_is_when_its_domain_was_recovered() -> None:
    """After a restart in between too, for then it is not set aside yet."""

    async def story(world: World) -> None:
        await world.grow(3)
        k = key(0)
        await world.put(0, k, "before")
        beside, incomplete = Beside(world), Beside(world)
        await beside.rounds(3)
        world.cluster.crash(0)
        world.cluster.crash(1)
        await world.domain(2).generations.recover([], accept_data_loss=True)
        await world.until(lambda: all(world.domain(2).tablets.serves(t) for t in range(TABLETS)), what="serving")
        await world.put(2, k, "after")
        for _ in range(2):
            beside.follower._sets_aside = lambda: True
            await beside.rounds(6)
            assert beside.follower.outlived
            assert beside.row(k) == value("before")
            assert (beside.copy.noted.generation, beside.copy.complete) == (1, True)
            beside.restart()
        incomplete.follower._sets_aside = lambda: True
        await incomplete.rounds(6)
        assert not incomplete.follower.outlived
        assert incomplete.row(k) == value("after")

    play(story)


def test_copy_that_begins_again_forgets_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would keep the node from everything else meanwhile, and wait in its memory for the disk."""
    monkeypatch.setattr(copy_module, "ERASE_KEYS", 3)

    async def story(stage: Stage) -> None:
        beside = await three(stage)
        for k in stage.keys[:10]:
            write(stage, k, 1, "text", 0, 1, 2, chosen=True)
        await beside.rounds()
        waiting = [0]

        class Counts(SimDisk):
            def submit(self, batch: Batch) -> int:
                waiting.append(sum(space == Space.REGISTER for space, _, _ in batch.writes))
                return super().submit(batch)

            async def durable(self, number: int) -> None:
                await super().durable(number)
                waiting.append(-sum(waiting))

        beside.disk.__class__ = Counts
        await beside.copy.begin_again(2)
        assert max(itertools.accumulate(waiting)) == 2 * 3
        assert not any(beside.copy.registers.keys(tablet) for tablet in range(TABLETS))
        assert beside.copy.noted.generation == 2

    staged(story, 3)


def test_other_branch_that_counts_more_is_followed_and_the_copy_begins_again() -> None:
    """Two begin a generation each. The follower goes with the one that it hears, then hears the other, which wins."""

    async def story(world: World) -> None:
        await world.grow(3)
        k = key(0)
        await world.put(0, k, "old")
        beside = Beside(world)
        await beside.rounds(3)
        world.cluster.partition([0], [1, 2])
        await world.cluster.machines[0].clock.sleep(8.0)
        world.cluster.crash(1)
        first, second = 0, 2
        beside.line.deaf = {second}
        await world.domain(first).generations.recover([], accept_data_loss=True)
        await world.domain(second).generations.recover([], accept_data_loss=True)
        winner = max((first, second), key=lambda n: world.domain(n).chain.branch)
        loser = first if winner == second else second
        beside.line.deaf = {winner}
        await beside.rounds(3)
        beside.line.deaf = {loser}
        await world.put(winner, k, "winner")
        await beside.rounds(6)
        assert beside.follower.chain.branch == world.domain(winner).chain.branch
        assert beside.row(k) == value("winner")

    play(story)


def test_coverage_is_noted_and_survives_a_restart_with_its_open_registers() -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        a, b = stage.keys[:2]
        clock = stage.world.cluster.machines[0].clock
        write(stage, a, 1, "chosen", 0, 1, 2, chosen=True)
        await beside.rounds()
        before = beside.copy.covered_s(a)
        write(stage, b, 1, "perhaps", 0)
        beside.line.deaf = {1}
        await beside.wait()
        await beside.rounds()
        beside.copy.note(clock.monotonic(), clock.wall())
        ahead_s = clock.wall() - clock.monotonic()
        beside.restart()
        beside.copy.note(clock.monotonic(), clock.wall())
        noted = beside.copy.noted
        assert noted.wall_s[stage.tablet] > before + ahead_s
        assert noted.open == {b: pytest.approx(before + ahead_s)}

    staged(story, 3)
