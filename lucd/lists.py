"""What lives in this PoP stays in the lists of domain `global`, whatever befalls those.

A recovery of `global` may lose rows of them: a database that nobody else finds, a PoP whose name and index would be
given away. The PoP itself still knows. So its members of `global` compare now and again, and each node at its start.
A node that is new while the lists are out of reach learns the index from another node of the PoP, and gives out ids.

If the index was given away before that, the list cannot be mended: two PoPs would give out the same ids. Every node
looks now and again whether that is so, and gives out none then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from dht.errors import DhtError, Indeterminate, Invalid, Unavailable
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import NodeId
from dht.register.homes import HomedStore, Registry
from dht.world import Chance, Clock
from lucd.pops import Pops

log = logging.getLogger(__name__)
COMPARE_INTERVAL_S: Final = 600.0
FIRST_PAUSE_S: Final = 1.0
REFUSED_PAUSE_S: Final = 30.0
_REMEDY: Final = "replace its nodes, one after another, by ones with empty data directories, which take a new index"


class Lists:
    """`serving`: whether this node is a member of its PoP's domain; `keeps`: whether it is one of `global`.

    `mates`: nodes of the PoP that are heard.
    """

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
        mates: Callable[[], Iterable[NodeId]],
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
        self._mates = mates
        self._refusal = ""
        self._left: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """What a human should know: why the lists cannot be mended, and what only he can decide on."""
        left = [
            f"PoP {self._pops.name} has rows of database {name}, which domain global lists no more: a drop left them "
            f"behind, or a recovery of global lost it; `lucd database drop {name} --yes` in this PoP empties them"
            for name in self._left
        ]
        return [self._refusal, *left] if self._refusal else left

    async def run(self) -> None:
        """Until cancelled: compare until it is done once; then at long intervals, databases where they are kept. Nodes
        that do not keep them read the list.

        What is refused is an error in the log once, and a warning as long as it is so.
        """
        compared = False
        pause_s = FIRST_PAUSE_S
        while True:
            await self._clock.sleep(pause_s * self._chance.uniform(0.8, 1.2))
            if not self._serving():
                continue
            try:
                refusal = await self.compare_index()
                if self._keeps() or self._left or not compared:
                    await self.compare_databases()
                else:
                    # It is noted, for the time when it is out of reach.
                    await self._homed.homes(REQUEST_TIMEOUT_S)
                compared = True
            except (Unavailable, Indeterminate) as error:
                log.debug("the lists of domain global are not compared yet: %s", error.message)
                continue
            except DhtError as error:
                refusal = error.message
            if refusal and refusal != self._refusal:
                log.error("the lists of domain global cannot be mended: %s", refusal)
            self._refusal = refusal
            pause_s = REFUSED_PAUSE_S if refusal or self._left else COMPARE_INTERVAL_S

    async def compare_index(self) -> str:
        """Learn the PoP's index, or claim it again. If it is another's, no ids are given out; returns why, else "".

        Raises Unavailable where the list is out of reach; the index is learned from another node of the PoP then.
        """
        pop = self._pops.name
        try:
            claims = await self._registry().pops(REQUEST_TIMEOUT_S)
        except (Unavailable, Indeterminate):
            if self._pops.noted_index() is None:
                await self._pops.ask_index(self._mates())
            raise
        known = self._pops.noted_index()
        if pop not in claims:
            # Of two nodes that do it one is first; both have the same index to claim, or none.
            try:
                claim = await self._registry().claim_pop(pop, self._node, self._incarnation, REQUEST_TIMEOUT_S, known)
            except Invalid as error:
                return self._doubted(error.message)
            log.warning("PoP %s was missing in the list of PoPs; it is in it again with index %d", pop, claim.index)
            claims = {pop: claim}
        listed = claims[pop].index
        if known is None:
            self._pops.note_index(listed)
        elif known != listed:
            return self._doubted(f"it has index {known}, but is listed with {listed}: its ids may be given twice")
        self._pops.doubt_index("")
        return ""

    def _doubted(self, why: str) -> str:
        text = f"no ids are given out in PoP {self._pops.name}: {why}; {_REMEDY}"
        self._pops.doubt_index(text)
        return text

    async def compare_databases(self) -> None:
        """Enter what is missing of the PoP's databases; note of which others a shard was left behind."""
        pop = self._pops.name
        for name in await self._homed.relist(REQUEST_TIMEOUT_S):
            log.warning("database %s lives in PoP %s and was missing in the list; it is in it again", name, pop)
        self._left = await self._homed.left_behind(REQUEST_TIMEOUT_S)
