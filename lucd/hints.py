"""Location hints of the local groups that this node looks after, published in the background (DESIGN section 8).

A group is published when it is made here, and again from time to time by the node that coordinates it, so that a hint
outlives the daemon that gave it. Hints are few datagrams each and cost time only where they are wrong or missing, so
they are published at a bounded rate, and what does not fit the queue waits for the next round.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from dht.errors import DhtError
from dht.model import GroupKey
from dht.world import Clock

log = logging.getLogger(__name__)
WAITING_MAX: Final = 10_000
PUBLISHED_PER_S: Final = 10.0
ROUND_EVERY_S: Final = 1_800.0
"""Half of what a hint lives."""


class HintPublisher:
    """`publish`: of the overlay; `kept`: the local groups that this node coordinates now, in pieces.

    `worth_it`: whether there are so many PoPs that anybody asks for hints; groups made here are published in any case.
    `counters`: since the start.
    """

    def __init__(
        self,
        clock: Clock,
        publish: Callable[[GroupKey], Awaitable[int]],
        kept: Callable[[], Iterable[Iterable[GroupKey]]],
        worth_it: Callable[[], bool],
    ) -> None:
        self.counters = {"published": 0, "failed": 0, "left_out": 0}
        self._clock = clock
        self._publish = publish
        self._kept = kept
        self._worth_it = worth_it
        self._waiting: OrderedDict[GroupKey, None] = OrderedDict()
        self._wake = asyncio.Event()

    def made(self, group: GroupKey) -> None:
        """The group was made here: publish it soon."""
        if len(self._waiting) >= WAITING_MAX:
            self.counters["left_out"] += 1
            return
        self._waiting[group] = None
        self._wake.set()

    async def run(self) -> None:
        """Publish what waits; never ends."""
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._one(self._waiting.popitem(last=False)[0])

    async def again(self) -> None:
        """Publish all that this node coordinates, round after round; never ends."""
        while True:
            try:
                for piece in self._kept() if self._worth_it() else ():
                    for group in piece:
                        await self._one(group)
            except DhtError as error:
                log.warning("the groups to publish hints of cannot be listed: %s", error.message)
            await self._clock.sleep(ROUND_EVERY_S)

    async def _one(self, group: GroupKey) -> None:
        try:
            await self._publish(group)
            self.counters["published"] += 1
        except DhtError as error:
            self.counters["failed"] += 1
            log.debug("a location hint was not published: %s", error.message)
        await self._clock.sleep(1 / PUBLISHED_PER_S)
