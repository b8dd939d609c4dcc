"""Which tablets a node takes over at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from dht.domain.takeover import TRANSFERS_MAX, Takeover


class Transfers:
    """Those that were begun, none of which ends. `waiting`: as of `dht.domain.transfer.Transfer`."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.waiting: set[int] = set()

    async def initialise(self, tablet: int) -> None:
        self.begun.append(tablet)
        await asyncio.Event().wait()


class Due(Takeover):
    """Of ten tablets, all of which are due. `sealed`: what callers wait for."""

    def __init__(self, transfers: Any, sealed: tuple[int, ...] = ()) -> None:
        names = ("chain", "tablets", "registers", "disk", "clock", "watch", "wide")
        context: Any = SimpleNamespace(node=b"n" * 20, **dict.fromkeys(names))
        super().__init__(context, transfers, self.wake)
        self.sealed = sealed

    def pending(self) -> tuple[int, ...]:
        return tuple(range(10))

    def _due(self, tablet: int) -> bool:
        return True

    def _sealed_already(self, tablet: int) -> bool:
        return tablet in self.sealed

    async def look(self) -> None:
        self._start_due()
        await asyncio.sleep(0)

    async def end(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)


async def test_tablets_are_taken_over_one_by_one() -> None:
    transfers = Transfers()
    due = Due(transfers)
    for _ in range(3):
        await due.look()
    assert transfers.begun == [0]
    await due.end()


async def test_tablets_that_are_sealed_already_are_all_begun_at_once() -> None:
    transfers = Transfers()
    due = Due(transfers, sealed=(3, 5, 7))
    await due.look()
    assert transfers.begun == [3, 5, 7]
    await due.end()


async def test_tablet_whose_replicas_do_not_answer_does_not_hold_up_the_others_but_not_all_wait_at_once() -> None:
    transfers = Transfers()
    due = Due(transfers)
    for tablet in range(10):
        await due.look()
        assert transfers.begun == list(range(min(tablet + 1, TRANSFERS_MAX)))
        transfers.waiting.update(transfers.begun)
    await due.end()


async def test_tablet_that_fails_unexpectedly_is_begun_again_after_the_others() -> None:
    class Broken(Transfers):
        async def initialise(self, tablet: int) -> None:
            self.begun.append(tablet)
            raise KeyError("a defect")

    transfers = Broken()
    due = Due(transfers)
    for _ in range(22):
        await due.look()
    assert transfers.begun[:11] == [*range(10), 0]
    await due.end()
