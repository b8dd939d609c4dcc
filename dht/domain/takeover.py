"""When this node takes tablets over, and when it lets go of those that others keep now.

A replica that is new starts at once: it copies ahead, then seals. One that stays waits until a new one has sealed it,
so that the tablet is served meanwhile; if that takes too long, or nobody is new, it begins itself.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Final

from dht.domain.context import Context
from dht.domain.roster import TabletReplicas
from dht.domain.tablets import tablet_key
from dht.domain.transfer import Transfer
from dht.errors import DhtError
from dht.world import Batch, Space

log = logging.getLogger(__name__)
TRANSFERS_MAX: Final = 4
"""At once."""
PATIENCE_S: Final = 30.0
ERASE_KEYS: Final = 200


class Takeover:
    """In the domain of a PoP it begins no other tablet beside one that gets on.

    What is copied ahead beside a tablet that is sealed takes the processor from it, and its callers wait; between PoPs
    it is only time that passes. One that waits for replicas which do not answer does not hold up the others; as many as
    TRANSFERS_MAX do.
    """

    def __init__(self, context: Context, transfer: Transfer, on_change: Callable[[], None]) -> None:
        self._one_by_one = context.wide is None
        self._node = context.node
        self._chain = context.chain
        self._tablets = context.tablets
        self._registers = context.registers
        self._disk = context.disk
        self._clock = context.clock
        self._watch = context.watch
        self._transfer = transfer
        self._on_change = on_change
        self._running: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, int] = {}
        self._empty: set[int] = set()
        self._wake = asyncio.Event()
        self._pending_since_s: dict[int, tuple[int, float]] = {}

    def wake(self) -> None:
        """Something changed: look again."""
        self._wake.set()

    def pending(self) -> tuple[int, ...]:
        """Tablets that this node still has to initialise."""
        newest = self._chain.newest
        return tuple(t for t in range(len(newest.tablets)) if self._transfer.wanted(t)) if newest else ()

    async def run(self, interval_s: float) -> None:
        """Until cancelled: start what is due, at each wake and at intervals."""
        try:
            while True:
                self._wake.clear()
                self._start_due()
                await self._let_go()
                try:
                    async with asyncio.timeout(interval_s):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _start_due(self) -> None:
        """Those that were sealed first: their tablets are not served until a majority has taken them over."""
        due = [t for t in self.pending() if t not in self._running and self._due(t)]
        due.sort(key=lambda t: (not self._sealed_already(t), self._failed.get(t, 0), t))
        for tablet in due:
            gets_on = self._running.keys() - self._transfer.waiting if self._one_by_one else ()
            if (gets_on or len(self._running) >= TRANSFERS_MAX) and not self._sealed_already(tablet):
                break
            self._empty.discard(tablet)
            task = asyncio.create_task(self._transfer.initialise(tablet))
            self._running[tablet] = task
            task.add_done_callback(functools.partial(self._done, tablet))

    def _done(self, tablet: int, task: asyncio.Task[None]) -> None:
        self._running.pop(tablet, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Others first from now on: it may fail again and again.
            self._failed[tablet] = self._failed.get(tablet, 0) + 1
            log.error("tablet %d is not taken over, which is tried again: %s", tablet, error, exc_info=error)
            return
        self._on_change()

    def _before(self, tablet: int) -> TabletReplicas | None:
        newest = self._chain.newest
        epoch = newest.tablet_epochs[tablet] if newest is not None else 1
        if epoch <= max(1, self._chain.generation_epoch):
            return None  # nothing serves the tablet before this epoch
        return self._chain.link(epoch - 1).replicas(tablet)

    def _sealed_already(self, tablet: int) -> bool:
        before = self._before(tablet)
        return before is not None and self._tablets.state(tablet).sealed >= before.epoch

    def _due(self, tablet: int) -> bool:
        newest, before = self._chain.newest, self._before(tablet)
        if newest is None or before is None or self._sealed_already(tablet):
            return True
        if self._tablets.state(tablet).current != before.epoch:
            return True  # nothing of the old epoch is here: this is a new replica, or one as empty as a new one
        replicas = newest.replicas(tablet)
        if set(replicas.nodes) <= set(before.nodes) and not self._reborn(replicas, before):
            return True
        epoch, since_s = self._pending_since_s.get(tablet, (0, 0.0))
        now_s = self._clock.monotonic()
        if epoch != replicas.epoch:
            self._pending_since_s[tablet] = (replicas.epoch, now_s)
            return False
        return now_s - since_s >= PATIENCE_S

    def _reborn(self, replicas: TabletReplicas, before: TabletReplicas) -> bool:
        """Whether a replica kept its node but lost its disk."""
        old, new = self._chain.link(before.epoch), self._chain.link(replicas.epoch)
        incarnations = {m.node_id: m.incarnation for m in old.members}
        return any(m.node_id in replicas.nodes and incarnations.get(m.node_id) != m.incarnation for m in new.members)

    async def _let_go(self) -> None:
        """Erase tablets whose every present replica is initialised: nobody can need this node's copy any more.

        And what was copied ahead for a set of replicas that another one followed before it was sealed. Gives way to
        what there is to take over, as soon as something changed; the rest is erased when that is begun.
        """
        newest = self._chain.newest
        if newest is None:
            return
        for tablet, nodes in enumerate(newest.tablets):
            if self._node in nodes or tablet in self._running or tablet in self._empty:
                continue
            state = self._tablets.state(tablet)
            if newest.member(self._node) is None and state.current < self._chain.generation_epoch:
                continue  # left out of a recovery: kept for comparison
            if state.initialised:
                marks = [self._watch.marks.get(n, {}).get(tablet) for n in nodes]
                if not all(m is not None and m.initialised >= newest.tablet_epochs[tablet] for m in marks):
                    continue
                batch = Batch()
                self._tablets.drop(batch, tablet)
                self._tablets.submit(batch)
            await self._erase(tablet)
            if self._wake.is_set():
                return

    async def _erase(self, tablet: int) -> None:
        """In pages; a crash in between leaves registers that nobody reads, and the next start goes on."""
        try:
            while not self._empty_now(tablet):
                newest = self._chain.newest
                if newest is None or self._node in newest.replicas(tablet).nodes:
                    return  # a replica again: what is here may be of use, and the transfer erases the rest
                await self._disk.durable(self._erase_some(tablet))
                if self._wake.is_set():
                    return
        except DhtError as error:
            log.error("tablet %d is not erased: %s", tablet, error)

    def _empty_now(self, tablet: int) -> bool:
        """Whether nothing is here of the tablet; it stays so until a transfer of it begins."""
        if not self._registers.keys(tablet, limit=1) and not self._staged(tablet, 1):
            self._empty.add(tablet)
        return tablet in self._empty

    def _erase_some(self, tablet: int) -> int:
        """Submit a batch that erases a page of the tablet's registers, in place or staged; its number."""
        batch = Batch()
        for key in self._registers.keys(tablet, limit=ERASE_KEYS):
            self._registers.erase(batch, key)
        for key in self._staged(tablet, ERASE_KEYS):
            batch.delete(Space.STAGED, key)
        return self._disk.submit(batch)

    def _staged(self, tablet: int, limit: int) -> list[bytes]:
        pairs = self._disk.range(Space.STAGED, tablet_key(tablet), tablet_key(tablet + 1), limit=limit)
        return [key for key, _ in pairs]
