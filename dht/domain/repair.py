"""Anti-entropy: a replica that missed writes catches up in the background (DESIGN section 5: one that is behind).

What is installed is exactly what an accept of that ballot would have brought, under an acceptor's own condition (the
ballot is not below the promise), so safety is that of CASPaxos: a late accept. Only values marked chosen, and only of
the tablet's present epoch, are taken; an older epoch's came with the initialisation. Where a higher promise stands in
the way, the next write or read through a proposer settles the register.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from dht.domain.asking import Ask
from dht.domain.chain import Chain
from dht.domain.messages import AskHeaders, AskRegisters, Headers, RegisterCopy, RegisterMark, Registers
from dht.domain.source import PAGE_KEYS_MAX
from dht.domain.tablets import Tablets
from dht.domain.watch import Watch
from dht.errors import DhtError
from dht.model import ZERO, NodeId
from dht.storage.registers import RegisterFile
from dht.world import Batch, Chance, Clock, Disk

log = logging.getLogger(__name__)
SWEEP_INTERVAL_S: Final = 600.0
TABLET_PAUSE_S: Final = 0.05
REPAIR_BYTES_PER_S: Final = 8 * 1024 * 1024


class Repair:
    """Sweeps over all tablets served here: at start, whenever a peer returns, and at long intervals."""

    def __init__(
        self,
        chain: Chain,
        tablets: Tablets,
        registers: RegisterFile,
        disk: Disk,
        clock: Clock,
        chance: Chance,
        ask: Ask,
        watch: Watch,
        node: NodeId,
    ) -> None:
        self._chain = chain
        self._tablets = tablets
        self._registers = registers
        self._disk = disk
        self._clock = clock
        self._chance = chance
        self._ask = ask
        self._watch = watch
        self._node = node
        self.repaired = 0
        """Registers brought up to date since the start."""

    async def run(self) -> None:
        """Until cancelled. The first sweep comes soon after the start: this node may have been away."""
        pause_s = 3.0
        while True:
            await self._clock.sleep(pause_s * self._chance.uniform(0.8, 1.2))
            pause_s = SWEEP_INTERVAL_S if await self.sweep() else 5.0
            if self._disk.failed is not None:
                return

    async def sweep(self) -> bool:
        """Once over all tablets, against one other replica each; False if some could not be compared."""
        complete = True
        for tablet in self._tablets.known():
            if self._tablets.serves(tablet):
                complete &= await self._tablet(tablet)
                await self._clock.sleep(TABLET_PAUSE_S)
        return complete

    async def _tablet(self, tablet: int) -> bool:
        """Against every other replica: the newest chosen value may rest on any majority."""
        newest = self._chain.newest
        if newest is None:
            return False
        replicas = newest.replicas(tablet)
        if replicas.epoch != self._tablets.serves(tablet):
            return False
        complete = True
        for node in replicas.nodes:
            if node == self._node:
                continue
            try:
                await self._against(tablet, replicas.epoch, node)
            except DhtError as error:
                log.debug("tablet %d is not compared with %s: %s", tablet, node.hex()[:12], error)
                complete = False
        return complete

    async def _against(self, tablet: int, epoch: int, node: NodeId) -> None:
        after, more = b"", True
        while more:
            page = await self._ask(node, AskHeaders(self._chain.domain, tablet, epoch, after, PAGE_KEYS_MAX, False))
            if not isinstance(page, Headers):
                return
            keys = [m.key for m in page.marks if self._behind(m, epoch)]
            while keys:
                reply = await self._ask(node, AskRegisters(self._chain.domain, tablet, epoch, tuple(keys), False))
                if not isinstance(reply, Registers) or not reply.copies:
                    return
                for copy in reply.copies:
                    await self._install(tablet, epoch, copy)
                keys = keys[len(reply.copies) :]
            more = page.more and bool(page.marks)
            after = page.marks[-1].key if page.marks else after

    def _behind(self, mark: RegisterMark, epoch: int) -> bool:
        if mark.chosen != mark.accepted or mark.accepted.epoch != epoch:
            return False
        own = self._registers.header(mark.key)
        floor = ZERO if own.accepted != ZERO else self._tablets.state(self._registers.tablet(mark.key)).floor
        return mark.accepted > own.accepted and mark.accepted >= max(own.promise, floor)

    async def _install(self, tablet: int, epoch: int, copy: RegisterCopy) -> None:
        """Check and submit without a wait in between, as an accept does."""
        header = copy.header
        mark = RegisterMark(copy.key, header.promise, header.accepted, header.chosen)
        if self._tablets.serves(tablet) != epoch or not self._behind(mark, epoch):
            return
        batch = Batch()
        self._registers.replace(batch, copy.key, msgspec.structs.replace(header, promise=header.accepted), copy.rows)
        number = self._disk.submit(batch)
        self.repaired += 1
        await self._disk.durable(number)
        await self._clock.sleep(header.size_bytes / REPAIR_BYTES_PER_S)
