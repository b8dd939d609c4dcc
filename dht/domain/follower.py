"""A node that follows a domain without voting: it pulls chosen states into a copy of its own (DESIGN section 8).

In rounds, about one a second, each replica is asked what changed behind a cursor. What they name is merged:

* the highest ballot named of a register is chosen if it is marked so, or a quorum of the tablet's replicas names it at
  one tablet epoch, its own (or all of them, `roster.proven`); its state is fetched from one that named it;
* of any other register all replicas are asked where it stands, as a reader asks them: a quorum at one ballot is what is
  chosen, a quorum without anything means that it was deleted and collected. Where neither is the case the register
  stays open, and what is here of it counts as old as the tablet was before.

A tablet is covered up to the begin of the round if a quorum of its replicas answered it that serve the tablet at one
tablet epoch, with all that changed. Why nothing is missed: a write acknowledged before the round began was accepted by
a quorum, so one of them named it, then or before; had it been accepted at a later epoch, a quorum of these replicas
would have been sealed by then, and one that is sealed does not say that it serves.

What changed is kept by a replica in memory, as far back as there is room. One that started again, or forgot too much,
is compared with as a whole, page by page, and counts for nothing until that is done. So it is with all of them when the
follower starts. A recovered domain goes on without some of what it had: the copy begins again. Where it is asked to,
the follower ends instead with the copy as it is, and is `outlived`: until another one is complete, that may be the only
one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from dht.domain.chain import Chain
from dht.domain.copy import Copy, Coverage, is_chosen
from dht.domain.messages import (
    LINKS_PER_PAGE,
    AskChanges,
    AskHeaders,
    AskLinks,
    AskMarks,
    AskRegisters,
    Changes,
    DomainMessage,
    Headers,
    Links,
    Marks,
    RegisterMark,
    Registers,
    Served,
)
from dht.domain.pace import Pace
from dht.domain.roster import FIRST_EPOCH, Roster, TabletReplicas, digest, proven, quorums
from dht.domain.rules import FOLLOW_RULES, FollowRules
from dht.domain.source import PAGE_KEYS_MAX
from dht.errors import DhtError, RemoteProtocolError, Unavailable
from dht.limits import COPY_BYTES_PER_S, PEER_TIMEOUT_S
from dht.model import ZERO, Ballot, GroupKey, NodeId, Struct
from dht.world import Batch, Chance, Clock, Disk, Network, Space

log = logging.getLogger(__name__)
FOLLOW_INTERVAL_S: Final = 1.0
HURRIED_S: Final = 0.1
HURRIED_ROUNDS_MAX: Final = 3
"""After a round that left registers in doubt the next ones come sooner: most are chosen a moment later."""
PAGE_TIMEOUT_S: Final = 10.0
MARKS_ASKED_MAX: Final = 500
SURVEYED_AT_ONCE: Final = 8
NOTED_EVERY_S: Final = 5.0
R = TypeVar("R", bound=Struct)
Contacts = Callable[[], Awaitable[Sequence[NodeId]]]
"""Nodes that may keep the domain, to ask while no member is known or none answers."""


class Follower:
    """Of the domain `name`, into a disk of its own. `on_roster`: told of every newer link.

    `sets_aside`: whether a copy that is complete is to stay as it is when its domain goes on in another generation.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        chance: Chance,
        network: Network,
        disk: Disk,
        contacts: Contacts,
        tablets: int,
        rules: FollowRules = FOLLOW_RULES,
        interval_s: float = FOLLOW_INTERVAL_S,
        bytes_per_s: int = COPY_BYTES_PER_S,
        on_roster: Callable[[Roster], None] = lambda roster: None,
        sets_aside: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.outlived = False
        self.chain = Chain(name, disk)
        self.copy = Copy(disk, tablets, rules)
        self.counters = {"rounds": 0, "surveys": 0, "examined": 0, "begun_again": 0}
        self._clock = clock
        self._chance = chance
        self._network = network
        self._disk = disk
        self._contacts = contacts
        self._rules = rules
        self._interval_s = interval_s
        self._pace = Pace(clock, bytes_per_s)
        self._on_roster = on_roster
        self._sets_aside = sets_aside
        self._cursors: dict[NodeId, tuple[bytes, int]] = {}
        self._served: dict[NodeId, dict[int, Served]] = {}
        self._surveyed: dict[NodeId, set[int]] = {}
        self._resets: dict[NodeId, int] = {}
        self._surveying: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._noted_s = clock.monotonic()
        self._hurried = 0

    # ---- life

    async def start(self) -> None:
        if self.chain.newest is not None:
            self._on_roster(self.chain.newest)
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        tasks = [task for task in (self._running, self._surveying) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._disk.failed is None:
            self.copy.note(self._clock.monotonic(), self._clock.wall())

    async def _run(self) -> None:
        while self._disk.failed is None and not self.outlived:
            try:
                await self.round()
            except DhtError as error:
                log.info("domain %s is not followed now: %s", self.name, error)
            await self._clock.sleep(self._pause_s())
        if self.outlived:
            return
        log.error("domain %s is followed no more: %s", self.name, self._disk.failed)

    def _pause_s(self) -> float:
        if self.copy.doubtful() and self._hurried < HURRIED_ROUNDS_MAX:
            self._hurried += 1
            return min(HURRIED_S, self._interval_s)
        self._hurried = 0
        return self._interval_s * self._chance.uniform(0.8, 1.2)

    def noted(self) -> Coverage:
        """What the copy covers by wall-clock time, as of now."""
        self.copy.note(self._clock.monotonic(), self._clock.wall())
        return self.copy.noted

    # ---- a round

    async def round(self) -> None:
        """Ask every replica once, and take in what they name."""
        self.counters["rounds"] += 1
        if self._rules.generation_begins_again and self.copy.noted.generation < self._generation():
            # The link that begins the generation came to the disk, and the node stopped before all was forgotten.
            if self._outlives():
                return
            await self._begin_again(self._generation())
        begin_s = self._clock.monotonic()
        nodes = self._replicas()
        answers = await asyncio.gather(*(self._try_changes(node) for node in nodes))
        told = {node: answer for node, answer in zip(nodes, answers, strict=True) if answer is not None}
        if not told:
            await self._meet()
            return
        await self._follow_links(told)
        newest = self.chain.newest
        if newest is None or self.outlived:
            return
        heard = {node: answer for node, answer in told.items() if answer[-1].generation == newest.generation}
        for node, answer in heard.items():
            self._count_on(node, answer)
        named = {node: [m for page in answer for m in page.marks] for node, answer in heard.items()}
        await self._bring(named, (), votes=True)
        await self._examine()
        end_s = self._clock.monotonic()
        for tablet in range(self.copy.tablets):
            self._cover(tablet, heard, begin_s if self._rules.cover_from_begin else end_s)
        self._survey_soon(list(heard))
        if end_s - self._noted_s >= NOTED_EVERY_S:
            self._noted_s = end_s
            self.copy.note(end_s, self._clock.wall())

    def _sets(self, tablet: int) -> tuple[TabletReplicas, ...]:
        """The replicas that may serve the tablet: the newest, and those before them, until they are sealed."""
        newest = self.chain.newest
        if newest is None:
            return ()
        replicas = newest.replicas(tablet)
        if replicas.epoch <= max(FIRST_EPOCH, self.chain.generation_epoch):
            return (replicas,)
        return replicas, self.chain.link(replicas.epoch - 1).replicas(tablet)

    def _replicas(self) -> list[NodeId]:
        sets = [replicas for tablet in range(self.copy.tablets) for replicas in self._sets(tablet)]
        return list(dict.fromkeys(node for replicas in sets for node in replicas.nodes))

    async def _try_changes(self, node: NodeId) -> list[Changes] | None:
        """All pages of what changed at the node, or None."""
        instance, after = self._cursors.get(node, (b"", 0))
        pages: list[Changes] = []
        try:
            while not pages or pages[-1].more:
                page = await self._ask(node, AskChanges(self.name, instance, after, PAGE_KEYS_MAX), Changes)
                if pages and not page.kept:
                    return None  # it started again meanwhile, or forgot: the next round sees that at its first page
                pages.append(page)
                instance, after = page.instance, page.upto
        except DhtError:
            self._served.pop(node, None)
            return None
        return pages

    def _count_on(self, node: NodeId, pages: Sequence[Changes]) -> None:
        """Go on behind what the node told; what it told is taken in before anything else is awaited."""
        if not pages[0].kept and (self._rules.overflow_surveyed or node not in self._surveyed):
            self._surveyed[node] = set()
            self._resets[node] = self._resets.get(node, 0) + 1
        self._cursors[node] = pages[-1].instance, pages[-1].upto
        self._served[node] = {served.tablet: served for served in pages[-1].served}

    def _cover(self, tablet: int, heard: Mapping[NodeId, Sequence[Changes]], until_s: float) -> None:
        for replicas in self._sets(tablet):
            answered = [n for n in replicas.nodes if n in heard and tablet in self._surveyed.get(n, ())]
            serving = [n for n in answered if self._serves(n, tablet) == replicas.epoch]
            need = quorums(len(replicas.nodes))[0] if self._rules.cover_by_quorum else 1
            if len(serving) >= need:
                # The least: below a higher one there may be a group that was made since the others answered.
                floors = [self._served[node][tablet].floor for node in serving]
                self.copy.cover(tablet, until_s, (min if self._rules.floor_of_all else max)(floors))

    def _serves(self, node: NodeId, tablet: int) -> int:
        """At which epoch the node served the tablet when it answered last, 0 if it did not."""
        served = self._served.get(node, {}).get(tablet)
        return 0 if served is None else served.epoch

    # ---- taking in what was named

    async def _bring(
        self, named: Mapping[NodeId, Sequence[RegisterMark]], gone: Sequence[GroupKey], *, votes: bool
    ) -> None:
        """All that is named is opened before anything is awaited.

        `gone`: registers of the copy of which a replica has nothing. `votes`: what is named is durable there, and
        counts to a quorum.
        """
        best: dict[GroupKey, dict[NodeId, RegisterMark]] = {}
        missing = dict.fromkeys(gone)
        for node, marks in named.items():
            for mark in marks:
                standing = self.copy.standing(mark.key)
                if mark.accepted > standing:
                    others = best.setdefault(mark.key, {})
                    highest = max((m.accepted for m in others.values()), default=ZERO)
                    if mark.accepted > highest:
                        others.clear()
                    if mark.accepted >= highest:
                        others[node] = mark
                elif mark.accepted == ZERO and standing != ZERO:
                    missing[mark.key] = None
        for key in missing:
            if self._rules.gone_is_erased:
                self.copy.open(key, doubtful=True)
        wanted: dict[tuple[NodeId, int], list[GroupKey]] = {}
        ballots: dict[GroupKey, Ballot] = {}
        for key, marks_of in best.items():
            tablet = self.copy.registers.tablet(key)
            chosen = self._is_chosen(tablet, marks_of, votes)
            self.copy.open(key, doubtful=not chosen)
            if chosen:
                node, mark = next(iter(marks_of.items()))
                ballots[key] = mark.accepted
                wanted.setdefault((node, tablet), []).append(key)
        for (node, tablet), keys in wanted.items():
            await self._fetch(node, tablet, self._serves(node, tablet), keys, ballots)

    def _is_chosen(self, tablet: int, marks: Mapping[NodeId, RegisterMark], votes: bool) -> bool:
        """Whether the state that these replicas name, all at one ballot, is chosen."""
        if any(mark.accepted == mark.chosen for mark in marks.values()) or not self._rules.follow_chosen_only:
            return True
        for replicas in self._sets(tablet) if votes else ():
            agreeing = [n for n in replicas.nodes if n in marks and self._serves(n, tablet) == replicas.epoch]
            ballot = max(mark.accepted for mark in marks.values())
            if self._proven(ballot, replicas, len(agreeing)):
                return True
        return False

    def _proven(self, ballot: Ballot, replicas: TabletReplicas, holders: int) -> bool:
        if not self._rules.follow_inherited_marked:
            return holders >= quorums(len(replicas.nodes))[0]
        return proven(ballot, replicas.epoch, holders, len(replicas.nodes))

    async def _fetch(
        self,
        node: NodeId,
        tablet: int,
        epoch: int,
        keys: Sequence[GroupKey],
        ballots: Mapping[GroupKey, Ballot],
        *,
        settles: bool = False,
    ) -> None:
        """Take chosen states from a node that has them. `settles`: also where a register was in doubt before."""
        while keys:
            try:
                asked = AskRegisters(self.name, tablet, epoch, tuple(keys[:PAGE_KEYS_MAX]), False)
                copies = (await self._ask(node, asked, Registers, PAGE_TIMEOUT_S)).copies
            except DhtError:
                copies = ()
            if not copies or [copy.key for copy in copies] != list(keys[: len(copies)]):
                for key in keys:
                    self.copy.open(key, doubtful=True)
                return
            chosen = [c for c in copies if is_chosen(c, ballots[c.key]) or not self._rules.follow_chosen_only]
            self.copy.install(chosen)
            for copy in copies:
                opened = self.copy.opened(copy.key)
                if copy not in chosen:
                    self.copy.open(copy.key, doubtful=True)
                elif opened is not None and (settles or not opened.doubtful):
                    self.copy.close(copy.key)
            keys = keys[len(copies) :]
            await self._pace.take(sum(copy.header.size_bytes for copy in copies))

    async def _examine(self) -> None:
        """Ask the replicas of registers in doubt where they stand."""
        for tablet, keys in self.copy.doubtful().items():
            for replicas in self._sets(tablet):
                serving = [n for n in replicas.nodes if self._serves(n, tablet) == replicas.epoch]
                if len(serving) < quorums(len(replicas.nodes))[0]:
                    continue
                for at in range(0, len(keys), MARKS_ASKED_MAX):
                    await self._examine_some(tablet, replicas, serving, keys[at : at + MARKS_ASKED_MAX])
                break

    async def _examine_some(
        self, tablet: int, replicas: TabletReplicas, serving: Sequence[NodeId], keys: Sequence[GroupKey]
    ) -> None:
        self.counters["examined"] += len(keys)
        question = AskMarks(self.name, tablet, replicas.epoch, tuple(keys))
        answers = await asyncio.gather(*(self._try_marks(node, question) for node in serving))
        told = {node: reply.marks for node, reply in zip(serving, answers, strict=True) if reply is not None}
        need = quorums(len(replicas.nodes))[0]
        if len(told) < need:
            return
        floors = sorted(reply.floor for reply in answers if reply is not None)
        wanted: dict[NodeId, list[GroupKey]] = {}
        ballots: dict[GroupKey, Ballot] = {}
        for at, key in enumerate(keys):
            marks = {node: marks[at] for node, marks in told.items()}
            highest = max(mark.accepted for mark in marks.values())
            holders = [node for node, mark in marks.items() if mark.accepted == highest]
            marked = any(marks[node].chosen == highest for node in holders)
            chosen = marked or self._proven(highest, replicas, len(holders))
            standing = self.copy.standing(key)
            if highest == ZERO:
                if standing == ZERO or self.copy.collect(key, floors):
                    self.copy.close(key)
            elif chosen and highest == standing:
                self.copy.close(key)
            elif chosen and highest > standing:
                ballots[key] = highest
                wanted.setdefault(holders[0], []).append(key)
        for node, some in wanted.items():
            await self._fetch(node, tablet, replicas.epoch, some, ballots, settles=True)

    async def _try_marks(self, node: NodeId, question: AskMarks) -> Marks | None:
        try:
            reply = await self._ask(node, question, Marks)
        except DhtError:
            return None
        return reply if [mark.key for mark in reply.marks] == list(question.keys) else None

    # ---- comparing with a node as a whole

    def _survey_soon(self, nodes: Sequence[NodeId]) -> None:
        due = [n for n in nodes if self._unsurveyed(n)]
        if due and (self._surveying is None or self._surveying.done()):
            self._surveying = asyncio.get_running_loop().create_task(self._survey_each(due))

    def _unsurveyed(self, node: NodeId) -> list[int]:
        """Tablets that the node serves as one of their replicas and that it was not compared on."""
        done = self._surveyed.get(node, set())
        return [
            t
            for t, served in self._served.get(node, {}).items()
            if t not in done and any(node in r.nodes and r.epoch == served.epoch for r in self._sets(t))
        ]

    async def _survey_each(self, nodes: Sequence[NodeId]) -> None:
        for node in nodes:
            tablets = self._unsurveyed(node)
            for at in range(0, len(tablets), SURVEYED_AT_ONCE):
                chunk = tablets[at : at + SURVEYED_AT_ONCE]
                if not all(await asyncio.gather(*(self._try_survey(node, tablet) for tablet in chunk))):
                    break

    async def _try_survey(self, node: NodeId, tablet: int) -> bool:
        reset = self._resets.get(node, 0)
        try:
            await self._survey(node, tablet, self._serves(node, tablet))
        except DhtError as error:
            log.info("tablet %d of domain %s is not compared with a replica: %s", tablet, self.name, error)
            return False
        if self._resets.get(node, 0) == reset:
            self._surveyed.setdefault(node, set()).add(tablet)
            self.counters["surveys"] += 1
        return True

    async def _survey(self, node: NodeId, tablet: int, epoch: int) -> None:
        after, more = b"", True
        while more:
            asked = AskHeaders(self.name, tablet, epoch, after, PAGE_KEYS_MAX, False)
            page = await self._ask(node, asked, Headers, PAGE_TIMEOUT_S)
            more = page.more and bool(page.marks)
            named = {mark.key for mark in page.marks}
            until = page.marks[-1].key if more else None
            here = self.copy.registers.keys(tablet, after)
            gone = [key for key in here if key not in named and (until is None or key <= until)]
            await self._bring({node: page.marks}, gone, votes=False)
            after = until or b""

    # ---- links

    async def _meet(self) -> None:
        """Look for a node that has the chain: no member is known, or none answered."""
        for node in await self._contacts():
            try:
                reply = await self._ask(node, AskLinks(self.name, self.chain.epoch, LINKS_PER_PAGE), Links)
                if reply.newest > self.chain.epoch:
                    await self._learn(node, reply.newest)
                else:
                    await self._compare_chain(node)
            except DhtError as error:
                log.debug("domain %s: %s", self.name, error)

    async def _follow_links(self, told: Mapping[NodeId, Sequence[Changes]]) -> None:
        for node, pages in told.items():
            try:
                if pages[-1].epoch > self.chain.epoch:
                    await self._learn(node, pages[-1].epoch)
                if pages[-1].generation > self._generation():
                    await self._compare_chain(node)
            except DhtError as error:
                log.info("domain %s: %s", self.name, error)

    def _generation(self) -> int:
        newest = self.chain.newest
        return 0 if newest is None else newest.generation

    async def _learn(self, node: NodeId, epoch: int) -> None:
        while self.chain.epoch < epoch:
            before = self.chain.epoch
            reply = await self._ask(node, AskLinks(self.name, before, LINKS_PER_PAGE), Links)
            try:
                for link in reply.links:
                    await self._take(link)
            except RemoteProtocolError:
                await self._compare_chain(node)
                return
            if self.chain.epoch == before:
                raise Unavailable(f"links after {before} are needed and the peer does not give them")
        await self.chain.durable()

    async def _take(self, link: Roster) -> None:
        """Append a link; where it begins a generation, the copy begins again."""
        if len(link.tablets) != self.copy.tablets:
            raise RemoteProtocolError(
                f"domain {link.domain} has {len(link.tablets)} tablets, {self.copy.tablets} expected"
            )
        higher = link.generation > max(self._generation(), self.copy.noted.generation)
        if self.chain.append(link):
            if higher and self._rules.generation_begins_again and not self._outlives():
                await self._begin_again(link.generation)
            self._on_roster(link)

    async def _compare_chain(self, node: NodeId) -> None:
        """Take the node's chain in place of this one, if it is another one and counts more, as members compare them."""
        links: list[Roster] = []
        while True:
            reply = await self._ask(node, AskLinks(self.name, links[-1].epoch if links else 0, LINKS_PER_PAGE), Links)
            links += reply.links
            if len(reply.links) < LINKS_PER_PAGE:
                break
        if not links or (links[-1].generation, branch_of(links)) <= (self._generation(), self.chain.branch):
            return
        log.warning("domain %s goes on in generation %d; its copy begins again", self.name, links[-1].generation)
        if self._outlives():
            return
        await self._begin_again(0)
        batch = Batch()
        for key, _ in self._disk.range(Space.ROSTER, b"", None):
            batch.delete(Space.ROSTER, key)
        self._disk.submit(batch)
        self.chain = Chain(self.name, self._disk)
        for link in links:
            await self._take(link)
        await self.chain.durable()

    def _outlives(self) -> bool:
        """Whether this copy stays as it is from now on, because the domain goes on in another generation."""
        if not self.outlived and self._sets_aside():
            self.noted()
            self.outlived = self.copy.complete
            if self.outlived and self._surveying is not None:
                self._surveying.cancel()
        return self.outlived

    async def _begin_again(self, generation: int) -> None:
        if self.copy.noted.generation:
            self.counters["begun_again"] += 1
        if self._surveying is not None:
            self._surveying.cancel()  # what it has asked for is of the generation before
        self._cursors.clear()
        self._served.clear()
        self._surveyed.clear()
        for node in self._resets:
            self._resets[node] += 1
        await self.copy.begin_again(generation)

    async def _ask(self, node: NodeId, message: DomainMessage, kind: type[R], timeout_s: float = PEER_TIMEOUT_S) -> R:
        reply = await self._network.call(node, message, timeout_s)
        if not isinstance(reply, kind):
            raise RemoteProtocolError(f"a peer answered {type(message).__name__} with {type(reply).__name__}")
        return reply


def branch_of(links: Sequence[Roster]) -> bytes:
    """`Chain.branch` of these links, all from the first on."""
    begun = [b for a, b in itertools.pairwise(links) if b.generation > a.generation]
    return digest(begun[-1]) if begun else b""
