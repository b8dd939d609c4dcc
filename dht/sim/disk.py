"""A node's disk in virtual time: it forgets at a crash what it had not yet flushed.

Batches are flushed as the production writer does it: one flush at a time, and each takes all batches that wait. A
crash keeps the batches of a random prefix beyond the last finished flush (the machine may have written them, nobody was
told), and drops the rest whole: a torn batch does not exist, because the production file is transactional.
"""

from __future__ import annotations

import asyncio
import random

from sortedcontainers import SortedDict

from dht.errors import StorageError
from dht.sim.loop import NOWHERE
from dht.storage.memory import OrderedSpaces
from dht.world import Batch, Flushed

FLUSH_MIN_S, FLUSH_MAX_S = 0.000_05, 0.002

_Undo = list[tuple[int, bytes, bytes | None]]
Content = dict[int, list[tuple[bytes, bytes]]]
"""Everything on a disk, by key space."""


class SimDisk(OrderedSpaces):
    """`dht.world.Disk` that outlives its node. `slowness` multiplies the time of a flush."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self._unflushed: list[tuple[int, _Undo]] = []
        self._submitted = 0
        self._flushed = 0
        self._flush: asyncio.TimerHandle | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._failed: str | None = None
        self.slowness = 1.0
        self.lies = False
        """Planted bug: `durable` returns at once, before the flush."""

    @property
    def failed(self) -> str | None:
        return self._failed

    def fail(self, reason: str) -> None:
        """Refuse everything from now on; whoever waits for a flush is told."""
        self._failed = reason
        waiting, self._waiting = self._waiting, []
        for _, waiter in waiting:
            if not waiter.done():
                waiter.set_exception(StorageError(reason))

    def submit(self, batch: Batch) -> int:
        if self._failed is not None:
            raise StorageError(self._failed)
        undo: _Undo = []
        for space, key, value in batch.writes:
            undo.append((space, key, self.get(space, key)))
            self._put(space, key, value)
        self._submitted += 1
        self._unflushed.append((self._submitted, undo))
        if self._flush is None:
            self._start_flush()
        return self._submitted

    async def durable(self, number: int) -> None:
        if number <= self._flushed or self.lies:
            return
        if self._failed is not None:
            raise StorageError(self._failed)
        await self._waiter(number)

    def when_durable(self, number: int, then: Flushed) -> None:
        if number <= self._flushed or self.lies:
            then(None)
        elif self._failed is not None:
            then(StorageError(self._failed))
        else:
            # Told in the context of who asks: of a node that is paused, when it goes on.
            self._waiter(number).add_done_callback(lambda waiter: then(_error_of(waiter)))

    def _waiter(self, number: int) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((number, waiter))
        return waiter

    def crash(self) -> int:
        """The machine or the process dies; returns how many batches are lost. Those who waited are never told."""
        kept = self._chance.randint(0, len(self._unflushed))
        lost = self._unflushed[kept:]
        for _, undo in reversed(lost):
            for space, key, value in reversed(undo):
                self._put(space, key, value)
        self._unflushed, self._waiting = [], []
        self._flushed = self._submitted
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        return len(lost)

    def flush(self) -> None:
        """End the flush that goes on, and whatever waits for the next, now."""
        if self._flush is not None:
            self._flush.cancel()
            self._end_flush(self._submitted)

    def content(self) -> Content:
        """All that it holds, flushed or not."""
        return {space: list(pairs.items()) for space, pairs in self._spaces.items()}

    def fill(self, content: Content) -> None:
        """Put this onto an empty disk."""
        self._spaces = {space: SortedDict(pairs) for space, pairs in content.items()}

    def wipe(self) -> None:
        """An empty disk in the old one's place."""
        self.crash()
        self._spaces.clear()
        self._failed = None

    def _put(self, space: int, key: bytes, value: bytes | None) -> None:
        pairs = self._spaces.get(space)
        if pairs is None:
            pairs = self._spaces[space] = SortedDict()
        if value is None:
            pairs.pop(key, None)
        else:
            pairs[key] = value

    def _start_flush(self) -> None:
        delay_s = self._chance.uniform(FLUSH_MIN_S, FLUSH_MAX_S) * self.slowness
        # an empty context: a flush goes on while the node that asked for it is paused
        self._flush = asyncio.get_running_loop().call_later(delay_s, self._end_flush, self._submitted, context=NOWHERE)

    def _end_flush(self, number: int) -> None:
        self._flush = None
        if self._failed is not None:
            return
        self._flushed = number
        self._unflushed = [(n, undo) for n, undo in self._unflushed if n > number]
        waiting, self._waiting = self._waiting, []
        for n, waiter in waiting:
            if n > number:
                self._waiting.append((n, waiter))
            elif not waiter.done():
                waiter.set_result(None)
        if self._unflushed:
            self._start_flush()


def _error_of(waiter: asyncio.Future[None]) -> StorageError | None:
    error = waiter.exception()
    assert error is None or isinstance(error, StorageError)
    return error
