"""Bandwidth of work in the background, shared by all that does it: however many copy, together they keep the rate."""

from __future__ import annotations

from dht.world import Clock


class Pace:
    """`bytes_per_s`: at most, on average; a single piece may be larger than a second's worth."""

    def __init__(self, clock: Clock, bytes_per_s: int) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def take(self, size_bytes: int) -> None:
        """Return when so much more may be copied."""
        now_s = self._clock.monotonic()
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_per_s
        await self._clock.sleep(self._free_s - now_s)
