"""Anti-entropy: a replica that missed writes catches up in the background (DESIGN section 5: one that is behind).

What a tablet's epoch before left unfinished is finished soon after this node has taken the tablet over: until then a
majority that holds it proves nothing (`roster.proven`), so who reads it would have to, and a follower would wait. What
could not be finished then, or was forgotten by a restart, is found by the next sweep. Finishing goes on beside the
comparing: neither waits for the other, each of which may take minutes.

What is installed is exactly what an accept of that ballot would have brought, under an acceptor's own condition (the
ballot is not below the promise), so safety is that of CASPaxos: a late accept. Only values marked chosen, and only of
the tablet's present epoch, are taken; an older epoch's came with the initialisation. Where a higher promise stands in
the way, a proposer here finishes the register (`settle`), which leaves this replica with the newest value.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

import msgspec

from dht.domain.context import Context
from dht.domain.messages import AskHeaders, AskRegisters, Headers, RegisterCopy, RegisterMark, Registers
from dht.domain.pace import Pace
from dht.domain.source import PAGE_KEYS_MAX
from dht.errors import DhtError, RemoteProtocolError
from dht.model import ZERO, GroupKey, NodeId, Struct
from dht.storage.registers import ABSENT, Header
from dht.world import Batch

log = logging.getLogger(__name__)
SWEEP_INTERVAL_S: Final = 600.0
TABLET_PAUSE_S: Final = 0.05
START_PAUSE_S: Final = 1.5
TAKEN_OVER_PAUSE_S: Final = (0.3, 0.9)
RETURN_PAUSE_S: Final = 0.005
RETURN_AGAIN_S: Final = (0.5, 1.0, 2.0, 4.0)
"""Pauses before further looks at a peer that returned. It may hear us later than we hear it, so a write that it has not
sent us yet may come behind the first look: there is always a second one, and more of the tablets that differed."""
TABLETS_AT_ONCE: Final = 8
"""After a cut or an absence many writes were missed, so it is not the time to be slow."""
SETTLED_AT_ONCE: Final = 16
LOOKED_AT_ONCE: Final = 500
BEHIND_MAX: Final = 20_000
"""So many of a tablet are noted at a time; the rest is found by the next look."""


class _Look(Struct, frozen=True):
    """When to look at a peer that returned, for which time, and at which tablets: None is all."""

    due_s: float
    turn: int
    tablets: list[int] | None


class Repair:
    """Sweeps over all tablets served here: at start, against a peer that returns, and at long intervals.

    `settle`: makes this node finish a register; set where the node is composed, else such registers wait.
    """

    def __init__(self, context: Context, bytes_per_s: int) -> None:
        self._chain = context.chain
        self._tablets = context.tablets
        self._registers = context.registers
        self._disk = context.disk
        self._clock = context.clock
        self._chance = context.chance
        self._ask = context.ask
        self._watch = context.watch
        self._node = context.node
        self.settle: Callable[[GroupKey], Awaitable[None]] | None = None
        self._returned: dict[NodeId, _Look] = {}
        self._inherited: dict[int, float] = {}
        """Tablets that were taken over, or are swept, and when to finish what is unfinished of them."""
        self._sweep_due_s = math.inf
        self._look_again = asyncio.Event()
        self._finish_again = asyncio.Event()
        self._pace = Pace(context.clock, bytes_per_s)
        self._compared: dict[int, None] = {}
        self.remaining: dict[int, tuple[int, int]] = {}
        """Registers known to be behind, and their bytes, by tablet."""
        self.counters = {"repaired": 0, "repaired_bytes": 0}
        """Registers brought up to date since the start."""

    async def run(self) -> None:
        """Until cancelled, or the disk fails."""
        # The first sweep comes soon: this node may have been away.
        self._sweep_due_s = self._clock.monotonic() + 3.0 * self._chance.uniform(0.8, 1.2)
        # First this node serves; all its peers "return" to it at its start.
        await self._clock.sleep(START_PAUSE_S)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._keep_comparing())
            both.create_task(self._keep_finishing())

    async def _keep_comparing(self) -> None:
        """With peers that returned, and with all at intervals."""
        while self._disk.failed is None:
            await self._first_of(lambda: (self._sweep_due_s, *self._looks_due_s()), self._look_again)
            if min(self._looks_due_s(), default=math.inf) > self._clock.monotonic():
                pause_s = SWEEP_INTERVAL_S if await self.sweep() else 5.0
                self._sweep_due_s = self._clock.monotonic() + pause_s * self._chance.uniform(0.8, 1.2)
                continue
            await self._look_at_returned()

    async def _keep_finishing(self) -> None:
        """What earlier epochs left of tablets that were taken over, when it is time to."""
        while self._disk.failed is None:
            await self._first_of(self._inherited.values, self._finish_again)
            await self._finish_inherited()

    def returned(self, node: NodeId) -> None:
        """A peer is heard again: it or this node has missed writes, so compare with it soon."""
        self._returned[node] = _Look(self._clock.monotonic(), 0, None)
        self._look_again.set()

    def _looks_due_s(self) -> list[float]:
        return [look.due_s for look in self._returned.values()]

    async def _first_of(self, times_s: Callable[[], Iterable[float]], again: asyncio.Event) -> None:
        """Wait until the first of these times is reached; `again`: they have changed."""
        while (left_s := min(times_s(), default=math.inf) - self._clock.monotonic()) > 0:
            again.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s if left_s < math.inf else None):
                    await again.wait()

    async def _look_at_returned(self) -> None:
        """The looks that are due, and what they lead to."""
        while due := [node for node, look in self._returned.items() if look.due_s <= self._clock.monotonic()]:
            look = self._returned.pop(due[0])
            differed = await self._compare_with(due[0], look.tablets)
            if due[0] in self._returned or look.turn >= len(RETURN_AGAIN_S) or not (differed or look.turn == 0):
                continue
            tablets = None if look.turn == 0 else differed
            due_s = self._clock.monotonic() + RETURN_AGAIN_S[look.turn]
            self._returned[due[0]] = _Look(due_s, look.turn + 1, tablets)

    async def _compare_with(self, node: NodeId, only: list[int] | None) -> list[int]:
        """Fetch what this replica lacks of the node's tablets (`only` these); those that differed or gave no answer."""
        newest = self._chain.newest
        if newest is None or node == self._node:
            return []
        both = [t for t in self._tablets.known() if node in newest.replicas(t).nodes and self._tablets.serves(t)]
        if only is not None:
            both = [t for t in both if t in only]
        behind: dict[int, list[RegisterMark]] = {}
        differed: list[int] = []
        # All are surveyed first: what remains is known before the copying, which has a bandwidth, begins.
        for at in range(0, len(both), TABLETS_AT_ONCE):
            chunk = both[at : at + TABLETS_AT_ONCE]
            surveys = [self._survey(t, newest.replicas(t).epoch, node) for t in chunk]
            for tablet, found in zip(chunk, await asyncio.gather(*surveys, return_exceptions=True), strict=True):
                if isinstance(found, BaseException):
                    if not isinstance(found, DhtError):
                        raise found
                    differed.append(tablet)
                    continue
                marks, stuck = found
                if marks:
                    behind[tablet] = marks
                if marks or stuck:
                    differed.append(tablet)
            await self._clock.sleep(RETURN_PAUSE_S)
        tablets = list(behind)
        for at in range(0, len(tablets), TABLETS_AT_ONCE):
            chunk = tablets[at : at + TABLETS_AT_ONCE]
            await asyncio.gather(*(self._try_fetch(t, newest.replicas(t).epoch, node, behind[t]) for t in chunk))
        return differed

    def unchecked(self) -> int:
        """How many tablets with other replicas are served here, but were not compared with one since the start."""
        newest = self._chain.newest
        if newest is None:
            return 0
        return sum(
            self._tablets.serves(t) > 0 and len(nodes) > 1 and t not in self._compared
            for t, nodes in enumerate(newest.tablets)
        )

    def initialised(self, tablet: int) -> None:
        """The tablet came from a quorum of the others a moment ago."""
        self._compared[tablet] = None
        # The others take it over in these moments too, and whoever comes first finishes for all.
        self._inherited[tablet] = self._clock.monotonic() + self._chance.uniform(*TAKEN_OVER_PAUSE_S)
        self._finish_again.set()

    async def _finish_inherited(self) -> None:
        """Of the tablets that are due."""
        while taken := [t for t, due_s in self._inherited.items() if due_s <= self._clock.monotonic()]:
            for tablet in taken:
                del self._inherited[tablet]
            await self._finish(frozenset(taken))

    async def _finish(self, tablets: Collection[int]) -> None:
        """Finish what earlier epochs left of the tablets; in pieces, for there may be many, and callers wait."""
        keys = [key for key in self._registers.all_unsettled() if self._registers.tablet(key) in tablets]
        for at in range(0, len(keys), LOOKED_AT_ONCE):
            await self._settle([key for key in keys[at : at + LOOKED_AT_ONCE] if self._unfinished(key)])
            await self._clock.sleep(RETURN_PAUSE_S)

    def _unfinished(self, key: GroupKey) -> bool:
        """Whether the register, of a tablet served here, was left by an earlier epoch, and may not be chosen."""
        header = self._registers.header(key)
        epoch = self._tablets.serves(self._registers.tablet(key))
        return 0 < header.accepted.epoch < epoch and header.chosen != header.accepted

    async def sweep(self) -> bool:
        """Once over all tablets, against one other replica each; False if some could not be compared."""
        complete = True
        now_s = self._clock.monotonic()
        for tablet in filter(self._tablets.serves, self._tablets.known()):
            self._inherited.setdefault(tablet, now_s)
        self._finish_again.set()
        for tablet in self._tablets.known():
            if self._tablets.serves(tablet):
                complete &= await self._tablet(tablet)
                await self._clock.sleep(TABLET_PAUSE_S)
            await self._look_at_returned()
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
            complete &= await self._try_against(tablet, replicas.epoch, node)
        return complete

    async def _try_against(self, tablet: int, epoch: int, node: NodeId) -> bool:
        if self._tablets.serves(tablet) != epoch:
            return False
        try:
            behind, _ = await self._survey(tablet, epoch, node)
            await self._fetch(tablet, epoch, node, behind)
        except DhtError as error:
            log.debug("tablet %d is not compared with %s: %s", tablet, node.hex()[:12], error)
            return False
        return True

    async def _survey(self, tablet: int, epoch: int, node: NodeId) -> tuple[list[RegisterMark], bool]:
        """What this replica lacks of what the node has. What is merely stuck is settled by the way: whether any was."""
        behind: list[RegisterMark] = []
        any_stuck = False
        after, more = b"", True
        while more and len(behind) < BEHIND_MAX:
            page = await self._ask(node, AskHeaders(self._chain.domain, tablet, epoch, after, PAGE_KEYS_MAX, False))
            if not isinstance(page, Headers):
                raise RemoteProtocolError(f"a peer answered with {type(page).__name__} where headers were asked for")
            last = page.marks[-1].key if page.marks else after
            held = self._held(tablet, after, [mark.key for mark in page.marks])
            both = [(mark, held.get(mark.key, ABSENT)) for mark in page.marks]
            behind += [mark for mark, own in both if self._behind(mark, own, epoch)]
            self._note(tablet, behind)
            stuck = [mark.key for mark, own in both if self._stuck(mark, own, epoch)]
            any_stuck |= bool(stuck)
            await self._settle(stuck)
            more = page.more and bool(page.marks)
            after = last
        self._compared[tablet] = None
        return behind, any_stuck

    def _held(self, tablet: int, after: GroupKey, keys: list[GroupKey]) -> dict[GroupKey, Header]:
        """This node's headers of the keys, which ascend from behind `after`; none of what is not here.

        One look at the disk gives them all, unless the peer has few where this node has many: those are not looked
        through, which would take as long as there are many.
        """
        if not keys:
            return {}
        limit = 2 * len(keys)
        near = self._registers.headers(tablet, after, keys[-1], limit)
        held = dict(near)
        if len(near) == limit:
            held.update((key, self._registers.header(key)) for key in keys if key > near[-1][0])
        return held

    async def _try_fetch(self, tablet: int, epoch: int, node: NodeId, marks: list[RegisterMark]) -> None:
        try:
            await self._fetch(tablet, epoch, node, marks)
        except DhtError as error:
            log.debug("tablet %d is not repaired from %s: %s", tablet, node.hex()[:12], error)

    async def _fetch(self, tablet: int, epoch: int, node: NodeId, marks: list[RegisterMark]) -> None:
        left, left_bytes = len(marks), sum(m.size_bytes for m in marks)
        sizes = {m.key: m.size_bytes for m in marks}
        try:
            while left > 0:
                keys = tuple(m.key for m in marks[len(marks) - left :][:PAGE_KEYS_MAX])
                reply = await self._ask(node, AskRegisters(self._chain.domain, tablet, epoch, keys, False))
                if not isinstance(reply, Registers) or not reply.copies:
                    return
                for copy in reply.copies:
                    await self._install(tablet, epoch, copy)
                    left, left_bytes = left - 1, left_bytes - sizes.get(copy.key, 0)
                    self.remaining[tablet] = (left, left_bytes)
        finally:
            self.remaining.pop(tablet, None)

    def _note(self, tablet: int, marks: list[RegisterMark]) -> None:
        if marks:
            self.remaining[tablet] = (len(marks), sum(m.size_bytes for m in marks))

    def _behind(self, mark: RegisterMark, own: Header, epoch: int) -> bool:
        """Whether what the peer has is to be installed here, where the register stands so."""
        if mark.chosen != mark.accepted or mark.accepted.epoch != epoch:
            return False
        floor = ZERO if own.accepted != ZERO else self._tablets.state(self._registers.tablet(mark.key)).floor
        return mark.accepted > own.accepted and mark.accepted >= max(own.promise, floor)

    def _stuck(self, mark: RegisterMark, own: Header, epoch: int) -> bool:
        """Whether the two differ in what cannot be installed: a promise stands in the way, or nobody finished it."""
        if own.accepted == mark.accepted or mark.accepted.epoch != epoch or self._behind(mark, own, epoch):
            return False
        if mark.chosen == mark.accepted and own.accepted < mark.accepted:
            return mark.accepted < own.promise
        return own.accepted != own.chosen or mark.accepted != mark.chosen

    async def _settle(self, keys: list[GroupKey]) -> None:
        if self.settle is None:
            return
        for at in range(0, len(keys), SETTLED_AT_ONCE):
            await asyncio.gather(*map(self.settle, keys[at : at + SETTLED_AT_ONCE]), return_exceptions=True)

    async def _install(self, tablet: int, epoch: int, copy: RegisterCopy) -> None:
        """Check and submit without a wait in between, as an accept does."""
        header = copy.header
        mark = RegisterMark(copy.key, header.promise, header.accepted, header.chosen)
        if self._tablets.serves(tablet) != epoch or not self._behind(mark, self._registers.header(copy.key), epoch):
            return
        batch = Batch()
        self._registers.replace(batch, copy.key, msgspec.structs.replace(header, promise=header.accepted), copy.rows)
        number = self._disk.submit(batch)
        self.counters["repaired"] += 1
        self.counters["repaired_bytes"] += header.size_bytes
        await self._disk.durable(number)
        await self._pace.take(header.size_bytes)
