"""The real world for the protocol code: the running loop's time."""

from __future__ import annotations

import asyncio
import time


class LoopClock:
    """`dht.world.Clock` of a production node."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
