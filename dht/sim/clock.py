"""A node's clock in virtual time."""

from __future__ import annotations

import asyncio

WALL_START_S = 1_700_000_000.0


class SimClock:
    """`dht.world.Clock`. `wall_skew_s` may be set at any time: the wall clock jumps, `monotonic` does not."""

    def __init__(self, wall_skew_s: float = 0.0) -> None:
        self.wall_skew_s = wall_skew_s

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return WALL_START_S + asyncio.get_running_loop().time() + self.wall_skew_s

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
