"""Location hints of local groups: published at a bounded rate, kept alive by who coordinates them."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from dht.errors import StorageError, Unavailable
from lucd import hints
from lucd.hints import HintPublisher


class World:
    """A clock whose sleeps are counted, and an overlay that takes what it is given."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.published: list[bytes] = []
        self.fails = False
        self.kept = [[b"a", b"b"], [b"c"]]
        self.asked = True
        self.publisher = HintPublisher(self, self.publish, lambda: self.kept, lambda: self.asked)  # type: ignore[arg-type]

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.now_s += delay_s
        await asyncio.sleep(0)

    async def publish(self, group: bytes) -> int:
        if self.fails:
            raise Unavailable("the overlay does not run")
        self.published.append(group)
        return 3

    async def run(self, work: object, turns: int = 60) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def world() -> World:
    return World()


async def test_groups_made_here_are_published_one_by_one(world: World) -> None:
    for number in range(5):
        world.publisher.made(b"%d" % number)
    await world.run(world.publisher.run())
    assert world.published == [b"0", b"1", b"2", b"3", b"4"]
    assert world.now_s == pytest.approx(5 / hints.PUBLISHED_PER_S)


async def test_what_does_not_fit_is_left_out_and_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "WAITING_MAX", 2)
    for number in range(5):
        world.publisher.made(b"%d" % number)
    assert world.publisher.counters["left_out"] == 3


async def test_hint_that_cannot_be_published_stops_nothing(world: World) -> None:
    world.fails = True
    world.publisher.made(b"x")
    await world.run(world.publisher.run(), 5)
    world.fails = False
    world.publisher.made(b"y")
    await world.run(world.publisher.run())
    assert world.published == [b"y"]
    assert world.publisher.counters == {"published": 1, "failed": 1, "left_out": 0}


async def test_coordinator_publishes_again_round_after_round_where_hints_are_asked_for(world: World) -> None:
    await world.run(world.publisher.again(), 12)
    assert world.published[:6] == [b"a", b"b", b"c", b"a", b"b", b"c"]
    assert world.now_s >= hints.ROUND_EVERY_S
    world.published.clear()
    world.asked = False
    await world.run(world.publisher.again())
    assert not world.published


async def test_groups_that_cannot_be_listed_once_are_published_in_the_next_round(world: World) -> None:
    def damaged() -> list[list[bytes]]:
        world.publisher._kept = lambda: world.kept
        raise StorageError("a page is damaged")

    world.publisher._kept = damaged
    await world.run(world.publisher.again())
    assert world.published[:3] == [b"a", b"b", b"c"]
