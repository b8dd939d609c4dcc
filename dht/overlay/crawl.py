"""The look-up: ask the nearest known nodes for nearer ones until the nearest have all answered.

Candidates are kept in exact XOR order, and whoever answers makes room for the next question at once: the stock crawler
waits for the slowest of each round, so one dead node held up everything.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from dht.model import NodeId
from dht.overlay.messages import Contact, distance

CANDIDATES_MAX: Final = 1000
Ask = Callable[[Contact], Awaitable[tuple[Contact, ...] | None]]
"""Asks a contact for its nearest; None when it did not answer."""


class Crawl:
    """One look-up of the `count` nodes nearest to the target. `enough` may end it early, after any answer."""

    def __init__(
        self,
        ask: Ask,
        target: NodeId,
        start: Iterable[Contact],
        own_id: NodeId,
        count: int,
        parallel: int,
        enough: Callable[[Contact], bool] | None = None,
    ) -> None:
        self._ask = ask
        self._target = target
        self._count = count
        self._parallel = parallel
        self._enough = enough
        self._known: set[NodeId] = {own_id}
        self._candidates: list[tuple[int, Contact]] = []
        self._asked: set[NodeId] = set()
        self._answered: dict[NodeId, Contact] = {}
        self._add(start)

    async def run(self) -> list[Contact]:
        """The nearest nodes that answered, nearest first."""
        asking: dict[asyncio.Task[tuple[Contact, ...] | None], Contact] = {}
        try:
            while True:
                nearest = self._candidates[: self._count]
                for _, contact in nearest:
                    if len(asking) >= self._parallel:
                        break
                    if contact.id not in self._asked:
                        self._asked.add(contact.id)
                        asking[asyncio.ensure_future(self._ask(contact))] = contact
                if not any(contact.id not in self._answered for _, contact in nearest):
                    break
                done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                if self._take(asking, done):
                    break
        finally:
            for task in asking:
                task.cancel()
        return [contact for _, contact in self._candidates if contact.id in self._answered][: self._count]

    def _take(
        self,
        asking: dict[asyncio.Task[tuple[Contact, ...] | None], Contact],
        done: set[asyncio.Task[tuple[Contact, ...] | None]],
    ) -> bool:
        for task in done:
            contact = asking.pop(task)
            found = task.result()
            if found is None:
                self._candidates = [entry for entry in self._candidates if entry[1].id != contact.id]
                continue
            self._answered[contact.id] = contact
            self._add(found)
            if self._enough is not None and self._enough(contact):
                return True
        return False

    def _add(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            if contact.id not in self._known and len(self._known) < CANDIDATES_MAX:
                self._known.add(contact.id)
                bisect.insort(
                    self._candidates, (distance(contact.id, self._target), contact), key=lambda entry: entry[0]
                )
