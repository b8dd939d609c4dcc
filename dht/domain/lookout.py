"""The regular look at the other members: where they stand, which links they have, whether they are there at all.

One round a second while this node is a member, and one at once when somebody needs to know more. What is heard goes to
`dht.domain.watch`; a member that was silent is compared with (`dht.domain.repair`); newer links are fetched. Between
the rounds a node that is no member yet tries to join, and one that is mends the roster where that is its turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from dht.domain.asking import ask_each
from dht.domain.collection import Collection
from dht.domain.context import Context
from dht.domain.generations import Generations
from dht.domain.joining import Joining, Standing
from dht.domain.membership import Membership
from dht.domain.messages import AskJoin, AskStatus, Status
from dht.domain.repair import Repair
from dht.domain.roster import Roster
from dht.domain.wide import asked
from dht.errors import DhtError
from dht.model import NodeId

log = logging.getLogger(__name__)
STATUS_INTERVAL_S: Final = 1.0
RETURN_AFTER_S: Final = 2.5 * STATUS_INTERVAL_S
LEFT_OUT_ROUNDS: Final = 5
"""Every so many status rounds those are asked, too, that a recovery left out: they may have begun another one."""


class Lookout:
    """`changed`: views of the tablets are to be made anew."""

    def __init__(
        self,
        context: Context,
        standing: Standing,
        membership: Membership,
        joining: Joining,
        generations: Generations,
        repair: Repair,
        collection: Collection,
        changed: Callable[[], None],
    ) -> None:
        self._local = context.local.member()
        self._node = context.node
        self._standing = standing
        self._chain = context.chain
        self._tablets = context.tablets
        self._watch = context.watch
        self._membership = membership
        self._joining = joining
        self._generations = generations
        self._repair = repair
        self._collection = collection
        self._clock = context.clock
        self._chance = context.chance
        self._network = context.network
        self._disk = context.disk
        self._ask = context.ask
        self._catch_up = context.peers.catch_up
        self._changed = changed
        self._wide = context.wide
        self._rounds = 0
        self._now = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until cancelled, or the disk fails."""
        while True:
            try:
                if self._wide is not None and not self._standing.joined and not self._tablets.held():
                    await self._joining.look_on(self._wide)
                    if not self._standing.joined:
                        await self._pause()
                    continue
                await self._round(only_alive=False)
                if not self._standing.joined and not self._standing.removed:
                    await self._joining.join()
                    if self._standing.joined:
                        continue  # where the tablets stand is asked at once
                elif self._standing.joined:
                    await self._announce()
                    await self._membership.mend()
            except DhtError as error:
                if self._disk.failed is not None:
                    log.error("domain %s stops: %s", self._chain.domain, error)
                    return
                log.info("domain %s: %s", self._chain.domain, error)
            await self._pause()

    async def stop(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    def soon(self) -> None:
        """Do not wait for the next second: this node may be able to join now."""
        self._now.set()

    def refresh(self) -> asyncio.Task[None]:
        """A round to the members that are heard, beside the regular ones; shared by all who ask meanwhile."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._round(only_alive=True))
        return self._refreshing

    async def _pause(self) -> None:
        """Until the next status is due, or a node is met through which this one may join."""
        self._now.clear()
        pause = asyncio.ensure_future(self._clock.sleep(STATUS_INTERVAL_S * self._chance.uniform(0.8, 1.2)))
        met = asyncio.ensure_future(self._now.wait())
        try:
            await asyncio.wait((pause, met), return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            met.cancel()

    async def _round(self, *, only_alive: bool) -> None:
        """One question to each of the other members; links that they have and this node lacks are fetched."""
        newest = self._chain.newest
        if newest is None:
            return
        if not only_alive:
            self._rounds += 1
        others = list(self._asked(newest))
        if only_alive:
            others = [n for n in others if self._network.alive(n)] or others
        if self._generations.superseded:
            return
        if not only_alive and self._rounds % LEFT_OUT_ROUNDS == 0:
            others += [n for n in self._chain.left_out if n not in others and newest.member(n) is None]
        generation, branch = newest.generation, self._chain.branch
        question = AskStatus(self._chain.domain, self._chain.epoch, generation, branch)
        for node, status in (await ask_each(self._ask, others, question, Status)).items():
            if (status.generation, status.branch) != (self._chain.generation, branch) or newest.member(node) is None:
                if self._generations.is_higher(status.generation, status.branch):
                    self._generations.meet_soon(node, status.generation)
                continue
            now_s = self._clock.monotonic()
            if self._watch.silent_s(now_s).get(node, 0.0) > RETURN_AFTER_S:
                self._repair.returned(node)
            self._watch.heard(node, status, now_s)
            self._collection.hear(status.tablets)
            if status.epoch > self._chain.epoch:
                try:
                    await self._catch_up(status.epoch, node)
                except DhtError as error:
                    log.info("domain %s: %s", self._chain.domain, error)
        self._changed()

    def _asked(self, newest: Roster) -> tuple[NodeId, ...]:
        """The members to ask in this round: all, but in a large domain."""
        held = self._tablets.held()
        return asked(newest, self._node, held, self._rounds) if self._wide else newest.others(self._node)

    async def _announce(self) -> None:
        """Have the roster say where this node is now, if it says otherwise."""
        newest, own = self._chain.newest, self._local
        me = None if newest is None else newest.member(self._node)
        if me is None or (me.pop, me.failure_domain, me.address) == (own.pop, own.failure_domain, own.address):
            return
        await self._membership.join(self._node, AskJoin(self._chain.domain, own))
