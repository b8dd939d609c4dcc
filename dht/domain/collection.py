"""Collection of deleted registers (DESIGN section 5, rule 7).

A tombstone may go only when no replica can hold anything older of the register, and no accept that is still on its way
can bring it back. So in two steps, by a replica that has had the tombstone, chosen, for a whole interval:

    ask      every replica of the tablet raises its floor above the tombstones and all promises made for them, durably,
             and says which of the registers are this tombstone with it, or have no value; an accept below the floor is
             refused from now on wherever there is no value, and for these tombstones, which promise the floor
    collect  what all acknowledged is erased, where it is still the same, and the floor counts as agreed

The register's window of transactions goes with it. What takes its place is the agreed floor: a group that is begun anew
has it as its window's floor, and a reader who finds nothing is told it as the ballot that he has seen. The members tell
each other the agreed floors with their status, for whoever missed a `collect`.

A floor is the lowest ballot of the round after the highest that it has to exclude. No operation ever has that ballot,
so "seen at the floor" and "written at the floor" cannot be confused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from dht.domain.asking import ask_each
from dht.domain.context import Context
from dht.domain.messages import AskTombstones, Collect, Collected, TabletMark, Tombstones
from dht.domain.roster import TabletReplicas
from dht.domain.tablets import TabletState
from dht.errors import Invalid, NotServing
from dht.limits import ROUNDS_AHEAD_MAX
from dht.model import ZERO, Ballot, GroupKey
from dht.storage.registers import Header
from dht.world import Batch

log = logging.getLogger(__name__)
COLLECT_KEYS_MAX: Final = 1_000
SCAN_KEYS_MAX: Final = 2_000
FLOOR_ROUNDS_MAX: Final = 3


def above(ballot: Ballot) -> Ballot:
    """The lowest ballot of the next round; no operation has it."""
    return Ballot(ballot.generation, ballot.epoch, ballot.round + 1, b"", 0, 0)


class Collection:
    """Collects what this node holds, and serves others that collect. `collected`: registers erased since the start."""

    def __init__(self, context: Context, every_s: float) -> None:
        self._node = context.node
        self._chain = context.chain
        self._tablets = context.tablets
        self._registers = context.registers
        self._disk = context.disk
        self._clock = context.clock
        self._chance = context.chance
        self._ask = context.ask
        self._watch = context.watch
        self._every_s = every_s
        self._rules = context.rules
        self._seen: dict[int, dict[GroupKey, Ballot]] = {}
        self.collected = 0

    async def run(self) -> None:
        """Until cancelled: each tablet served here, once in an interval."""
        while True:
            await self._clock.sleep(self._every_s * self._chance.uniform(0.9, 1.1))
            await self.sweep()
            if self._disk.failed is not None:
                return

    async def sweep(self) -> None:
        """Collect what was a tombstone at the sweep before already, a batch per tablet."""
        for tablet in self._tablets.known():
            if self._tablets.serves(tablet):
                found = await self._tombstones(tablet)
                before = self._seen.get(tablet, {})
                self._seen[tablet] = found
                await self._collect(tablet, {key: at for key, at in found.items() if before.get(key) == at})
            else:
                self._seen.pop(tablet, None)

    async def _tombstones(self, tablet: int) -> dict[GroupKey, Ballot]:
        found: dict[GroupKey, Ballot] = {}
        after = b""
        while held := self._registers.headers(tablet, after, limit=SCAN_KEYS_MAX):
            for key, header in held:
                if header.deleted and header.settled and header.accepted != ZERO:
                    found[key] = header.accepted
                    if len(found) >= COLLECT_KEYS_MAX:
                        return found
            after = held[-1][0]
            await self._clock.sleep(0)
        return found

    async def _collect(self, tablet: int, tombstones: dict[GroupKey, Ballot]) -> None:
        newest = self._chain.newest
        if newest is None or not tombstones:
            return
        replicas = newest.replicas(tablet)
        near = self._watch.reachable(self._clock.monotonic())
        if replicas.epoch != self._tablets.serves(tablet):
            return
        if self._rules.collect_needs_all and not near.issuperset(replicas.nodes):
            return  # a floor that not all have would only be in the way
        agreed = await self._agree(tablet, replicas, tombstones)
        if agreed is None:
            return
        floor, keys = agreed
        request = Collect(
            self._chain.domain, tablet, replicas.epoch, floor, keys, tuple(tombstones[key] for key in keys)
        )
        await ask_each(self._ask, replicas.nodes, request, Collected)

    async def _agree(
        self, tablet: int, replicas: TabletReplicas, tombstones: dict[GroupKey, Ballot]
    ) -> tuple[Ballot, tuple[GroupKey, ...]] | None:
        """A floor above every promise, which all replicas have, and the registers that all of them gave up."""
        keys, ballots = tuple(tombstones), tuple(tombstones.values())
        highest = max([*ballots, *(self._promise(self._registers.header(key)) for key in keys)])
        for _ in range(FLOOR_ROUNDS_MAX):
            request = AskTombstones(self._chain.domain, tablet, replicas.epoch, above(highest), keys, ballots)
            replies = list((await ask_each(self._ask, replicas.nodes, request, Tombstones)).values())
            if self._rules.collect_needs_all and len(replies) < len(replicas.nodes):
                return None
            if all(reply.promise <= request.floor for reply in replies) or not self._rules.floor_keeps_promise:
                held = [all(len(r.held) > i and r.held[i] for r in replies) for i in range(len(keys))]
                if not self._rules.collect_needs_all:
                    held = [sum(r.held[i] for r in replies) * 2 > len(replicas.nodes) for i in range(len(keys))]
                return request.floor, tuple(key for key, all_have in zip(keys, held, strict=True) if all_have)
            highest = max(reply.promise for reply in replies)
        return None

    async def acknowledge(self, request: AskTombstones) -> Tombstones:
        """The floor is durable, and with it all that the answer tells, when this returns."""
        self._refuse_other_epoch(request.tablet, request.epoch)
        self._check_floor(request.tablet, request.floor)
        held, promise = [], ZERO
        batch = Batch()
        for key, ballot in zip(request.keys, request.ballots, strict=False):
            header = self._registers.header(key)
            unchanged = header.accepted == ZERO or (header.accepted == ballot and header.deleted)
            held.append(unchanged and self._registers.tablet(key) == request.tablet)
            if unchanged:
                promise = max(promise, header.promise)
            if unchanged and header.accepted != ZERO and self._promise(header) < request.floor:
                promised = Header(request.floor, header.accepted, header.chosen, header.digest, header.deleted)
                self._registers.write(batch, key, promised, {})
        self._tablets.raise_floor(batch, request.tablet, request.floor)
        await self._disk.durable(self._tablets.submit(batch))
        self._refuse_other_epoch(request.tablet, request.epoch)
        return Tombstones(tuple(held), promise)

    async def collect(self, request: Collect) -> Collected:
        """Erase what is unchanged: still this tombstone, and nothing promised that the floor would forget."""
        self._refuse_other_epoch(request.tablet, request.epoch)
        self._check_floor(request.tablet, request.floor)
        batch = Batch()
        self._tablets.agree(batch, request.tablet, request.floor)
        erased = 0
        for key, ballot in dict(zip(request.keys, request.ballots, strict=False)).items():
            header = self._registers.header(key)
            if header.accepted != ballot or not header.deleted or self._promise(header) > request.floor:
                continue
            self._registers.erase(batch, key)
            erased += 1
        self.collected += erased
        await self._disk.durable(self._tablets.submit(batch))
        return Collected(erased)

    def hear(self, marks: Sequence[TabletMark]) -> None:
        """Another member's agreed floors: of the same epoch, they are this node's too. True, remembered or not."""
        batch = Batch()
        for mark in marks:
            state = self._tablets.state(mark.tablet)
            if (
                mark.initialised == state.current > 0
                and mark.floor > state.agreed
                and self._possible(state, mark.floor)
            ):
                self._tablets.agree(batch, mark.tablet, mark.floor)
        if batch.writes:
            self._tablets.submit(batch)

    def _promise(self, header: Header) -> Ballot:
        return header.promise if self._rules.floor_keeps_promise else header.accepted

    def _possible(self, state: TabletState, floor: Ballot) -> bool:
        """Whether promises of today lead to such a floor. One from a defect would leave no ballots above it."""
        newest = self._chain.newest
        generation = 0 if newest is None else newest.generation
        ahead = floor.round - state.floor.round
        return floor.generation <= generation and floor.epoch <= state.current and ahead <= ROUNDS_AHEAD_MAX

    def _check_floor(self, tablet: int, floor: Ballot) -> None:
        if not self._possible(self._tablets.state(tablet), floor):
            raise Invalid(f"{tuple(floor)} cannot be a floor of tablet {tablet}")

    def _refuse_other_epoch(self, tablet: int, epoch: int) -> None:
        if not 0 < epoch == self._tablets.serves(tablet):
            raise NotServing(
                f"tablet {tablet} is not served here at epoch {epoch}; nothing of it is collected now",
                domain=self._chain.domain,
                tablet=tablet,
                roster_epoch=self._chain.epoch,
            )
