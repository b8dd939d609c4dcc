"""What changed here a moment ago is told to the other members at once, so that nobody waits for the next status.

A tablet that is sealed, or initialised, has other replicas to talk to from now on. Told in batches; lost or late, it is
in the next status anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from dht.domain.asking import Ask, ask_each
from dht.domain.messages import Newest, Status, TabletMark, TellTablets
from dht.model import NodeId
from dht.world import Clock

TELL_AFTER_S: Final = 0.005


class News:
    """`told`: messages sent since the start."""

    def __init__(
        self,
        domain: str,
        clock: Clock,
        ask: Ask,
        status: Callable[[], Status],
        others: Callable[[], Sequence[NodeId]],
    ) -> None:
        self._domain = domain
        self._clock = clock
        self._ask = ask
        self._status = status
        self._others = others
        self._known: dict[int, tuple[int, int]] = {}
        self._telling: asyncio.Task[None] | None = None
        self.told = 0

    def look(self, marks: Sequence[TabletMark]) -> None:
        """Tell soon what is new in these, if anything."""
        if any(self._known.get(m.tablet) != (m.initialised, m.sealed) for m in marks) and self._telling is None:
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def stop(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    async def _tell(self) -> None:
        try:
            await self._clock.sleep(TELL_AFTER_S)
        finally:
            self._telling = None
        status = self._status()
        news = tuple(m for m in status.tablets if self._known.get(m.tablet) != (m.initialised, m.sealed))
        self._known.update({m.tablet: (m.initialised, m.sealed) for m in news})
        others = self._others()
        if news and others:
            self.told += len(others)
            message = TellTablets(self._domain, status.epoch, status.generation, news)
            await ask_each(self._ask, others, message, Newest)
