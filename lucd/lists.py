"""What lives in this PoP stays in the lists of domain `global`, whatever befalls those.

A recovery of `global` may lose rows of them: a database that nobody else finds, a PoP whose name and index would be
given away. The PoP itself still knows. So its members of `global` compare now and again, and each node at its start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from dht.errors import DhtError
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import NodeId
from dht.register.homes import HomedStore, Registry
from dht.world import Chance, Clock
from lucd.pops import Pops

log = logging.getLogger(__name__)
COMPARE_INTERVAL_S: Final = 600.0
FIRST_PAUSE_S: Final = 1.0


class Lists:
    """`serving`: whether this node is a member of its PoP's domain; `keeps`: whether it is one of `global`."""

    def __init__(
        self,
        homed: HomedStore,
        registry: Callable[[], Registry],
        pops: Pops,
        node: NodeId,
        incarnation: bytes,
        clock: Clock,
        chance: Chance,
        serving: Callable[[], bool],
        keeps: Callable[[], bool],
    ) -> None:
        self._homed = homed
        self._registry = registry
        self._pops = pops
        self._node = node
        self._incarnation = incarnation
        self._clock = clock
        self._chance = chance
        self._serving = serving
        self._keeps = keeps

    async def run(self) -> None:
        """Until cancelled: compare until it is done once; then at long intervals, where this node keeps the lists."""
        compared = False
        while True:
            pause_s = COMPARE_INTERVAL_S if compared else FIRST_PAUSE_S
            await self._clock.sleep(pause_s * self._chance.uniform(0.8, 1.2))
            if self._serving() and (self._keeps() or not compared):
                try:
                    await self.compare()
                    compared = True
                except DhtError as error:
                    log.debug("the lists of domain global are not compared yet: %s", error.message)

    async def compare(self) -> None:
        """Learn the PoP's index, or claim it again; enter what is missing of its databases."""
        pop = self._pops.name
        claims = await self._registry().pops(REQUEST_TIMEOUT_S)
        known = self._pops.noted_index()
        if pop not in claims:
            # Of two nodes that do it one is first; both have the same index to claim, or none.
            claim = await self._registry().claim_pop(pop, self._node, self._incarnation, REQUEST_TIMEOUT_S, known)
            log.warning("PoP %s was missing in the list of PoPs; it is in it again with index %d", pop, claim.index)
            claims = {pop: claim}
        if known is None:
            self._pops.note_index(claims[pop].index)
        elif known != claims[pop].index:
            log.error(
                "PoP %s has index %d, but is listed with %d: its ids may be given twice", pop, known, claims[pop].index
            )
        for name in await self._homed.relist(REQUEST_TIMEOUT_S):
            log.warning("database %s lives in PoP %s and was missing in the list; it is in it again", name, pop)
