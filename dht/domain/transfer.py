"""A replica becomes one of a new tablet epoch (DESIGN section 5, rules 1 to 4 and 6).

    copy ahead   while the old replicas still serve: pages of headers, whole registers into Space.STAGED, bounded in
                 bandwidth; only where this node has nothing of its own
    seal         a prepare-and-seal quorum of the old replicas; nobody among them initialised: of those before, too
    survey       the headers of every initialised one of them: per register the highest accepted ballot, and marks
    fetch        what neither the staged nor the own content has at exactly that ballot; ballots are unique, so equal
                 ballots are equal registers and need no second look
    flip         one batch: content, seal of the epoch before, initialised epoch

A replica that stays in the set goes the same way; its own registers are the copy. Everything before the flip may be
lost and done again. A tablet that was never initialised here is copied to its final place at once, so that the flip
stays small; nobody sees its registers before. Key in Space.STAGED: tablet (2 bytes), epoch (8 bytes), group key; value:
the copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from dht.domain.asking import ask_each
from dht.domain.context import Context
from dht.domain.messages import (
    AskHeaders,
    AskRegisters,
    AskSeal,
    Headers,
    RegisterCopy,
    RegisterMark,
    Registers,
    Sealed,
)
from dht.domain.pace import Pace
from dht.domain.roster import Roster, TabletReplicas, quorums
from dht.domain.source import PAGE_KEYS_MAX
from dht.domain.tablets import tablet_key
from dht.errors import DhtError, RemoteProtocolError, Unavailable
from dht.model import ZERO, Ballot, GroupKey, NodeId, Struct
from dht.storage.registers import Header
from dht.world import Batch, Disk, Space

log = logging.getLogger(__name__)
COPY_PASSES_MAX: Final = 3
COPY_DIFFERENCES_ENOUGH: Final = 64
RETRY_S: Final = 0.2

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RegisterCopy).decode
R = TypeVar("R", bound=Struct)


class Overtaken(Exception):
    """The tablet has a newer set of replicas, or is initialised already: this work is void."""


class Best:
    """Per register the highest accepted ballot among the contributors, who has it, and the highest marks."""

    def __init__(self, highest: bool = True, promises: bool = True) -> None:
        self._promises = promises
        self.versions: dict[bytes, int] = {}
        self.marks: dict[GroupKey, tuple[RegisterMark, NodeId]] = {}
        self.floor = ZERO
        self._highest = highest

    def add(self, source: NodeId, mark: RegisterMark) -> None:
        """One that was only promised has no content, but that there was a promise matters (`dht.register.fence`)."""
        if mark.accepted == ZERO and not self._promises:
            return
        known = self.marks.get(mark.key)
        if known is None:
            self.marks[mark.key] = (mark, source)
            return
        old, old_source = known
        wins = mark.accepted > old.accepted if self._highest else False
        self.marks[mark.key] = (
            RegisterMark(
                mark.key,
                max(mark.promise, old.promise),
                mark.accepted if wins else old.accepted,
                max(mark.chosen, old.chosen),
            ),
            source if wins else old_source,
        )


class Staging:
    """The staged copies of one tablet at one epoch."""

    def __init__(self, disk: Disk, tablet: int, epoch: int) -> None:
        self._disk = disk
        self._prefix = tablet_key(tablet) + epoch.to_bytes(8, "big")
        self._accepted: dict[GroupKey, Ballot] = {}
        self._discard_others(tablet_key(tablet))
        for key, value in disk.range(Space.STAGED, self._prefix, _after(self._prefix)):
            self._accepted[key[len(self._prefix) :]] = _decode(value).header.accepted

    def accepted(self, key: GroupKey) -> Ballot | None:
        return self._accepted.get(key)

    def copy(self, key: GroupKey) -> RegisterCopy:
        value = self._disk.get(Space.STAGED, self._prefix + key)
        if value is None:
            raise Unavailable("a staged register vanished; the transfer begins again")
        return _decode(value)

    def keep(self, copies: Sequence[RegisterCopy]) -> int:
        """Submit the copies; returns the batch's number."""
        batch = Batch()
        for copy in copies:
            batch.put(Space.STAGED, self._prefix + copy.key, _encode(copy))
            self._accepted[copy.key] = copy.header.accepted
        return self._disk.submit(batch)

    def discard(self, batch: Batch) -> None:
        """Into the batch: all copies gone."""
        for key in self._accepted:
            batch.delete(Space.STAGED, self._prefix + key)

    def _discard_others(self, tablet: bytes) -> None:
        batch = Batch()
        for key, _ in self._disk.range(Space.STAGED, tablet, _after(tablet)):
            if not key.startswith(self._prefix):
                batch.delete(Space.STAGED, key)
        if batch.writes:
            self._disk.submit(batch)


class Transfer:
    """`initialise` does one tablet; the caller decides when, and runs it once per tablet at a time."""

    def __init__(self, context: Context, on_flip: Callable[[int], None], copy_bytes_per_s: int) -> None:
        self._node = context.node
        self._incarnation = context.local.incarnation
        self._chain = context.chain
        self._tablets = context.tablets
        self._registers = context.registers
        self._disk = context.disk
        self._clock = context.clock
        self._ask = context.ask
        self._alive = context.network.alive
        self._on_flip = on_flip
        self._rules = context.rules
        self.remaining: dict[int, tuple[int, int]] = {}
        """Registers still to copy and their bytes, by tablet under way."""
        self.waiting: set[int] = set()
        """Tablets under way whose last attempt failed."""
        self._sealed_s: dict[int, float] = {}
        self._one_seal = asyncio.Lock()
        self._pace = Pace(context.clock, copy_bytes_per_s)
        self.counters: dict[str, int | float] = dict.fromkeys(
            ("taken_over", "copied_registers", "copied_bytes", "sealed_ms_most", "sealed_ms_sum", "sealed_trips_sum"), 0
        )
        """Since the start. `sealed`: from the seal, as this node knew of it, until it served the tablet again; `trips`:
        how many times it waited for a peer or the disk in between."""

    def sealed(self, tablet: int) -> None:
        """The tablet was sealed here a moment ago, or is about to be."""
        if self.wanted(tablet):
            self._sealed_s.setdefault(tablet, self._clock.monotonic())

    def _count_window(self, tablet: int, trips: int) -> None:
        took_ms = (self._clock.monotonic() - self._sealed_s.pop(tablet, self._clock.monotonic())) * 1000
        counters = self.counters
        counters["taken_over"] += 1
        counters["sealed_ms_sum"] += took_ms
        counters["sealed_ms_most"] = max(counters["sealed_ms_most"], took_ms)
        counters["sealed_trips_sum"] += trips

    async def initialise(self, tablet: int) -> None:
        """Make this node an initialised replica of the tablet's newest epoch; tries until done or overtaken."""
        try:
            while True:
                try:
                    await self._attempt(tablet)
                    return
                except Overtaken:
                    return
                except DhtError:
                    if self._disk.failed is not None:
                        raise
                    self.waiting.add(tablet)
                    await self._clock.sleep(RETRY_S)
        finally:
            self.waiting.discard(tablet)
            self.remaining.pop(tablet, None)
            self._sealed_s.pop(tablet, None)

    def wanted(self, tablet: int) -> bool:
        """Whether this node has to initialise the tablet's newest epoch and may (rule 3).

        A wiped node is not the replica that the link lists under its name (rule 6): it waits for a link of its own.
        """
        newest = self._chain.newest
        if newest is None:
            return False
        if self._rules.incarnation_checked and not newest.lists(self._node, self._incarnation):
            return False
        replicas = newest.replicas(tablet)
        state = self._tablets.state(tablet)
        return (
            self._node in replicas.nodes
            and replicas.epoch not in state.initialised
            and self._tablets.may_initialise(tablet, replicas.epoch)
        )

    async def _attempt(self, tablet: int) -> None:
        target = self._target(tablet)
        history = self._chain.history(tablet, target.epoch)
        staging = Staging(self._disk, tablet, target.epoch)
        if not history:
            raise Overtaken  # the first epoch has no old replicas: its founder began initialised
        served_meanwhile = self._chain.survivors(history[0].epoch, target.epoch) is None
        if served_meanwhile and self._tablets.state(tablet).current != history[0].epoch:
            await self._copy_ahead(tablet, target, history[0], staging)
        early = None if self._rules.seal_before_init else await self._survey_unsealed(tablet, target, history[0])
        if tablet not in self._sealed_s:
            # It is this node that ends the old replicas' service: one tablet at a time, so that each pause is short.
            async with self._one_seal:
                self._check(tablet, target)
                self.sealed(tablet)
                await self._take(tablet, target, history, staging, early)
        else:
            await self._take(tablet, target, history, staging, early)
        self._on_flip(tablet)

    async def _take(
        self,
        tablet: int,
        target: TabletReplicas,
        history: Sequence[TabletReplicas],
        staging: Staging,
        early: Best | None,
    ) -> None:
        """Seal, survey, fetch, flip: what the tablet's callers wait for."""
        versions: dict[bytes, int] = {}
        contributors, floor = await self._seal(tablet, target, history, versions)
        best = early or await self._survey(tablet, target, contributors, sealed=True)
        best.floor = max(best.floor, floor)
        best.versions = versions
        pages = await self._fetch(
            tablet, target, best, dict.fromkeys(history[0].nodes, history[0].epoch) | contributors, staging
        )
        number = self._flip(tablet, target, history[0].epoch, best, staging)
        await self._tablets.confirm(tablet, number)
        self._count_window(tablet, 3 + pages)  # the seal, the survey, the disk

    def _target(self, tablet: int) -> TabletReplicas:
        newest = self._chain.newest
        if newest is None or not self.wanted(tablet):
            raise Overtaken
        return newest.replicas(tablet)

    def _check(self, tablet: int, target: TabletReplicas) -> None:
        """Stop working for an epoch that is not the newest any more."""
        if self._target(tablet).epoch != target.epoch:
            raise Overtaken

    # ---- copy ahead

    async def _copy_ahead(self, tablet: int, target: TabletReplicas, old: TabletReplicas, staging: Staging) -> None:
        """Best effort: without it the transfer is as right, only the pause is longer."""
        for _ in range(COPY_PASSES_MAX):
            differences: int | None = None
            for source in sorted(old.nodes, key=lambda n: not self._alive(n)):
                if source == self._node:
                    continue
                try:
                    differences = await self._copy_pass(tablet, target, old.epoch, source, staging)
                    break
                except DhtError:
                    continue
            if differences is None or differences <= COPY_DIFFERENCES_ENOUGH:
                return

    async def _copy_pass(
        self, tablet: int, target: TabletReplicas, epoch: int, source: NodeId, staging: Staging
    ) -> int:
        differences, after, more = 0, b"", True
        while more:
            self._check(tablet, target)
            page = _expect(
                await self._ask(source, AskHeaders(self._chain.domain, tablet, epoch, after, PAGE_KEYS_MAX, False)),
                Headers,
            )
            wanted = [m for m in page.marks if not self._has(m.key, m.accepted, staging)]
            differences += len(wanted)
            await self._copy(tablet, epoch, source, wanted, staging, sealed=False)
            more = page.more and bool(page.marks)
            after = page.marks[-1].key if page.marks else after
        return differences

    def _has(self, key: GroupKey, accepted: Ballot, staging: Staging) -> bool:
        return accepted in (staging.accepted(key), self._registers.header(key).accepted)

    async def _copy(
        self, tablet: int, epoch: int, source: NodeId, marks: list[RegisterMark], staging: Staging, *, sealed: bool
    ) -> int:
        """Returns how many pages it took."""
        keys, pages = [m.key for m in marks], 0
        left_bytes = sum(m.size_bytes for m in marks)
        while keys:
            if not sealed:
                # Callers wait for the tablet that is sealed now; this work can wait for them.
                async with self._one_seal:
                    pass
            pages += 1
            self.remaining[tablet] = (len(keys), max(0, left_bytes))
            request = AskRegisters(self._chain.domain, tablet, epoch, tuple(keys[:PAGE_KEYS_MAX]), sealed)
            copies = _expect(await self._ask(source, request), Registers).copies
            if not copies or [c.key for c in copies] != keys[: len(copies)]:
                raise RemoteProtocolError(f"a page of tablet {tablet} does not hold the registers asked for")
            await self._disk.durable(self._keep(tablet, copies, staging))
            size_bytes = sum(c.header.size_bytes for c in copies)
            self.counters["copied_registers"] += len(copies)
            self.counters["copied_bytes"] += size_bytes
            left_bytes -= size_bytes
            if not sealed:
                await self._pace.take(size_bytes)
            keys = keys[len(copies) :]
        self.remaining[tablet] = (0, 0)
        return pages

    def _keep(self, tablet: int, copies: Sequence[RegisterCopy], staging: Staging) -> int:
        """Staged while older content of the tablet may still be asked of this node; else in their final place at once.

        Nobody sees registers of a tablet that was never initialised here, so the flip need not move them: it stays
        small however large the tablet is.
        """
        if self._tablets.state(tablet).initialised:
            return staging.keep(copies)
        batch = Batch()
        for copy in copies:
            self._registers.replace(batch, copy.key, copy.header, copy.rows)
        return self._disk.submit(batch)

    # ---- seal

    async def _seal(
        self, tablet: int, target: TabletReplicas, history: Sequence[TabletReplicas], versions: dict[bytes, int]
    ) -> tuple[dict[NodeId, int], Ballot]:
        """Initialised replicas of sealed quorums, each with the epoch that it may be asked at; and their highest floor.

        Into `versions`: the newest catalogs that any of those sealed told, initialised or not.
        Raises Unavailable while a quorum does not answer.
        """
        link = self._chain.link(target.epoch)
        for listed in history:
            old, (_, need) = listed, quorums(len(listed.nodes))
            if (recovery := self._chain.survivors(listed.epoch, target.epoch)) is not None:
                old = self._left_of(listed, recovery)
                need = len(old.nodes)
            replies = await self._ask_seals(AskSeal(self._chain.domain, tablet, old.epoch, link), old, need)
            if len(replies) < need:
                raise Unavailable(
                    f"tablet {tablet} cannot move to epoch {target.epoch}: {len(replies)} of {need} needed replicas of "
                    f"epoch {old.epoch} sealed it; it goes on when more of them are reachable"
                )
            for reply in replies.values():
                for database, version in reply.versions.items():
                    versions[database] = max(version, versions.get(database, 0))
            contributors = {n: old.epoch for n, r in replies.items() if r.initialised}
            if contributors:
                return contributors, max(r.floor for r in replies.values() if r.initialised)
        if self._chain.generation_epoch:
            log.error("tablet %d of domain %s begins empty: no survivor has anything of it", tablet, link.domain)
            return {}, ZERO
        raise Unavailable(
            f"tablet {tablet} has no initialised replica among those that answered, back to its first epoch; it goes "
            "on when more of them are reachable"
        )

    def _left_of(self, old: TabletReplicas, recovery: Roster) -> TabletReplicas:
        """Rule 8: of replicas before a recovery, the survivors, with the disks that they had; each has to answer."""
        members = self._chain.link(old.epoch).members
        same = [m.node_id for m in members if recovery.lists(m.node_id, m.incarnation)]
        return TabletReplicas(old.epoch, tuple(n for n in old.nodes if n in same))

    async def _ask_seals(self, request: AskSeal, old: TabletReplicas, need: int) -> dict[NodeId, Sealed]:
        """Replies of those that are still the incarnations which the old link lists."""
        incarnations = {m.node_id: m.incarnation for m in self._chain.link(old.epoch).members}

        def counted(replies: Mapping[NodeId, Sealed]) -> dict[NodeId, Sealed]:
            if not self._rules.incarnation_checked:
                return dict(replies)
            return {n: r for n, r in replies.items() if r.incarnation == incarnations[n]}

        return counted(await ask_each(self._ask, old.nodes, request, Sealed, lambda r: len(counted(r)) >= need))

    # ---- survey, fetch, flip

    async def _survey(
        self, tablet: int, target: TabletReplicas, contributors: Mapping[NodeId, int], *, sealed: bool
    ) -> Best:
        """The contributors are asked side by side, and told of in order, so that equal ballots have one source."""
        best = Best(self._rules.highest_ballot_wins, self._rules.promises_carried)
        surveys = [self._headers(tablet, target, node, epoch, sealed) for node, epoch in contributors.items()]
        found = await asyncio.gather(*surveys, return_exceptions=True)
        for node, pages in zip(contributors, found, strict=True):
            if isinstance(pages, BaseException):
                raise pages
            for page in pages:
                for mark in page.marks:
                    best.add(node, mark)
                best.floor = max(best.floor, page.floor)
        return best

    async def _headers(
        self, tablet: int, target: TabletReplicas, node: NodeId, epoch: int, sealed: bool
    ) -> list[Headers]:
        pages: list[Headers] = []
        after, more = b"", True
        while more:
            self._check(tablet, target)
            request = AskHeaders(self._chain.domain, tablet, epoch, after, PAGE_KEYS_MAX, sealed)
            page = _expect(await self._ask(node, request), Headers)
            pages.append(page)
            more = page.more and bool(page.marks)
            after = page.marks[-1].key if page.marks else after
        return pages

    async def _survey_unsealed(self, tablet: int, target: TabletReplicas, old: TabletReplicas) -> Best:
        """The planted bug behind `seal_before_init`: what is accepted between this and the seal is lost."""
        best = Best()
        for node in old.nodes:
            try:
                found = await self._survey(tablet, target, {node: old.epoch}, sealed=False)
            except DhtError:
                continue
            for mark, source in found.marks.values():
                best.add(source, mark)
        return best

    async def _fetch(
        self, tablet: int, target: TabletReplicas, best: Best, contributors: Mapping[NodeId, int], staging: Staging
    ) -> int:
        """Stage what is missing; how many pages it took. A register that moved on since the survey comes newer."""
        missing: dict[NodeId, list[RegisterMark]] = {}
        pages = 0
        for key, (mark, source) in best.marks.items():
            if mark.accepted != ZERO and not self._has(key, mark.accepted, staging):
                missing.setdefault(source, []).append(mark)
        for source, marks in missing.items():
            self._check(tablet, target)
            pages += await self._copy(
                tablet, contributors[source], source, marks, staging, sealed=self._rules.seal_before_init
            )
            keys = [m.key for m in marks]
            for key in keys:
                accepted = staging.accepted(key) or self._registers.header(key).accepted
                mark, _ = best.marks[key]
                if accepted < mark.accepted:
                    raise Unavailable(f"a register of tablet {tablet} was collected meanwhile; the survey is repeated")
                # A replica never holds a value above its promise: an older proposer could undo it here.
                promise = max(mark.promise, accepted)
                best.marks[key] = (msgspec.structs.replace(mark, accepted=accepted, promise=promise), source)
        return pages

    def _flip(self, tablet: int, target: TabletReplicas, before: int, best: Best, staging: Staging) -> int:
        """Rule 3, in one batch and without a wait between check and submit."""
        self._check(tablet, target)
        batch = Batch()
        for key, (mark, _) in best.marks.items():
            own = self._registers.header(key)
            if not self._rules.replace_content and own.accepted > mark.accepted:
                continue
            if own.accepted == mark.accepted:
                marked = msgspec.structs.replace(own, promise=mark.promise, chosen=max(own.chosen, mark.chosen))
                if marked != own:
                    self._registers.write(batch, key, marked, {})
            elif mark.accepted == ZERO:
                self._registers.replace(batch, key, Header(mark.promise), {})
            elif staging.accepted(key) == mark.accepted:
                copy = staging.copy(key)
                header = msgspec.structs.replace(
                    copy.header,
                    promise=max(mark.promise, copy.header.promise),
                    chosen=max(mark.chosen, copy.header.chosen),
                )
                self._registers.replace(batch, key, header, copy.rows)
            else:
                raise Unavailable(f"tablet {tablet} changed here while it was sealed; the survey is repeated")
        if self._rules.replace_content:
            for key in self._registers.keys(tablet):
                if key not in best.marks:
                    self._registers.erase(batch, key)
        staging.discard(batch)
        if self._rules.versions_carried:
            self._registers.tell_versions(batch, best.versions)
        self._tablets.initialise(batch, tablet, target.epoch, before, best.floor)
        return self._tablets.flip(batch, tablet)


def _after(prefix: bytes) -> bytes | None:
    """The first key behind all that begin with the prefix."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


def _expect(reply: Struct, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise RemoteProtocolError(f"a peer answered with {type(reply).__name__} where {kind.__name__} was asked for")
    return reply
