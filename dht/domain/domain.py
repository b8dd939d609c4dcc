"""A node's part in one domain: who keeps which tablet, and whether this node may answer for it (DESIGN section 5).

Composition of the parts of this package. `replicas`, `admit` and `refresh` are what the registers use; `answer` serves
the other members (`dht.domain.answers`), who are asked through `dht.domain.peers`; the background work joins, watches,
takes tablets over and mends the roster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dht.codec import Message
from dht.domain import roster as rosters
from dht.domain.answers import Answers
from dht.domain.asking import ask_each
from dht.domain.chain import Chain
from dht.domain.collection import Collection
from dht.domain.context import Context, LocalNode
from dht.domain.decree import DecreeAcceptor, DecreeProposer
from dht.domain.followed import Followed
from dht.domain.generations import Generations
from dht.domain.health import health
from dht.domain.joining import Joining
from dht.domain.lookout import STATUS_INTERVAL_S, Lookout
from dht.domain.membership import Membership
from dht.domain.messages import AskLeave, AskStatus, Status, TabletMark
from dht.domain.news import News
from dht.domain.peers import Peers
from dht.domain.recovery import Recovery, put_record, restored
from dht.domain.repair import Repair
from dht.domain.roster import Roster, TabletReplicas
from dht.domain.rules import RULES, DomainRules
from dht.domain.source import Source
from dht.domain.tablets import Tablets
from dht.domain.takeover import Takeover
from dht.domain.transfer import Transfer
from dht.domain.watch import Watch
from dht.domain.wide import Wide, Word, rounds_for_all, word_of_pop
from dht.errors import Invalid, NotServing, Unavailable
from dht.limits import (
    COLLECT_INTERVAL_S,
    COPY_BYTES_PER_S,
    REMOVE_AFTER_S,
    REPAIR_BYTES_PER_S,
    TABLETS_PER_DOMAIN,
)
from dht.model import Ballot, NodeId, Struct
from dht.storage.registers import RegisterFile
from dht.world import Batch, Chance, Clock, Disk, Network


class Domain:
    """`contacts`: nodes to ask while this one has no roster yet. `remove_after_s`, `collect_every_s`: see `limits`.

    `on_change` callbacks run whenever the roster, or what this node serves, has changed. `wide`: of a domain over all
    PoPs, of which this node need not be a member.
    """

    def __init__(
        self,
        name: str,
        local: LocalNode,
        clock: Clock,
        chance: Chance,
        network: Network,
        disk: Disk,
        registers: RegisterFile,
        contacts: Callable[[], Sequence[NodeId]] = tuple,
        rules: DomainRules = RULES,
        remove_after_s: float = REMOVE_AFTER_S,
        collect_every_s: float = COLLECT_INTERVAL_S,
        copy_bytes_per_s: int = COPY_BYTES_PER_S,
        repair_bytes_per_s: int = REPAIR_BYTES_PER_S,
        wide: Wide | None = None,
    ) -> None:
        self.name = name
        self.local = local
        self.on_change: list[Callable[[], None]] = []
        self.chain = Chain(name, disk)
        self.tablets = Tablets(disk, rules)
        self.watch = Watch(local.node_id, clock.monotonic())
        node, chain, tablets = local.node_id, self.chain, self.tablets
        peers = self.peers = Peers(node, chain, tablets, network, self.answer, self._changed, wide)
        context = self._context = Context(
            local, clock, chance, network, disk, registers, rules, wide, chain, tablets, peers, self.watch
        )
        self._clock, self._rules, self._wide = clock, rules, wide
        self._remove_after_s = remove_after_s
        self._tasks: list[asyncio.Task[None]] = []
        self._greeting: asyncio.Task[None] | None = None
        self._views: tuple[TabletReplicas, ...] = ()
        self.transfer = Transfer(context, self._taken_over, copy_bytes_per_s)
        self._takeover = Takeover(context, self.transfer, self._changed)
        proposer = DecreeProposer(chain, node, local.boot, clock, chance, peers.ask, rules)
        self._membership = Membership(context, proposer, self.status, remove_after_s)
        self.repair = Repair(context, repair_bytes_per_s)
        self.generations = Generations(context, self.refresh, self._changed)
        self.collection = Collection(context, collect_every_s)
        self._joining = Joining(context, self, contacts)
        self._lookout = Lookout(
            context,
            self,
            self._membership,
            self._joining,
            self.generations,
            self.repair,
            self.collection,
            self._looked,
        )
        self._answers = Answers(
            context,
            self,
            DecreeAcceptor(chain, disk, node, local.incarnation, rules),
            Source(context, self._sealed),
            Followed(context, self.admit),
            self._membership,
            self.generations,
            self.collection,
            self.transfer,
            self.repair,
            self._lookout,
            self._looked,
        )
        self._news = News(name, clock, peers.ask, self.status, peers.to_tell)
        self._changed()

    # ---- what the registers use

    @property
    def joined(self) -> bool:
        """Whether the newest link held lists this node, with this incarnation."""
        newest = self.chain.newest
        listed = newest is not None and newest.lists(self.local.node_id, self.local.incarnation)
        return listed and not self.generations.superseded

    @property
    def removed(self) -> bool:
        """Whether this node was a member and is none any more: its directory has to be wiped before it joins again."""
        return not self.joined and self.chain.was_member(self.local.node_id, self.local.incarnation)

    @property
    def roster(self) -> Roster:
        """The newest link held. Raises Unavailable before the first."""
        newest = self.chain.newest
        if newest is None:
            raise Unavailable(f"this node has not joined domain {self.name} yet; it keeps trying")
        return newest

    @property
    def generation(self) -> int:
        return self.chain.generation

    def replicas(self, tablet: int) -> TabletReplicas:
        """Those to talk to now: the newest set, or the one before it while that is not known to be sealed."""
        if 0 <= tablet < len(self._views):
            return self._views[tablet]
        return self.roster.replicas(tablet)

    def views(self) -> tuple[TabletReplicas, ...]:
        """`replicas` of all tablets; the same object until one of them changes. Raises Unavailable before the first."""
        return self._views or tuple(map(self.roster.replicas, range(len(self.roster.tablets))))

    def admits(self, tablets: tuple[int, ...], epochs: tuple[int, ...]) -> bool:
        """Whether `admit` takes each of them; False where it takes to look at each."""
        if self.generations.superseded or not epochs or min(epochs) < max(1, self.chain.generation_epoch):
            return False
        return tuple(map(self.tablets.serves, tablets)) == epochs

    def admit(self, tablet: int, epoch: int, accept: bool = False) -> None:
        """Raise NotServing unless this node is an initialised, unsealed replica of exactly that tablet epoch.

        `accept`: the question is an accept (only the planted bug behind `seal_on_accept` tells it apart).
        """
        over = self.generations.superseded or epoch < self.chain.generation_epoch
        if self.tablets.serves(tablet) == epoch and epoch > 0 and not over:
            return
        state = self.tablets.state(tablet)
        newest = self.chain.newest
        if not self._rules.epoch_checked and self.tablets.serves(tablet) > 0 and not self.generations.superseded:
            return
        if not self._rules.seal_on_accept and not over and accept and epoch in state.initialised:
            return
        if newest is not None and not over and not self._rules.serve_only_initialised and state.sealed < epoch:
            replicas = newest.replicas(tablet)
            if replicas.epoch == epoch and self.local.node_id in replicas.nodes:
                return
        if newest is None or epoch > newest.epoch:
            self._lookout.refresh()
        raise NotServing(
            f"tablet {tablet} of domain {self.name} is not served here at epoch {epoch} (initialised at "
            f"{state.current}, sealed at {state.sealed}); fetch the roster and ask its replicas",
            domain=self.name,
            tablet=tablet,
            roster_epoch=self.chain.epoch,
            initialised=self.tablets.serves(tablet),
            sealed=state.sealed,
        )

    def pointed(self, refusal: NotServing) -> bool:
        """Take what a sealed replica says of the tablet in its refusal; whether that shows other replicas to ask.

        A hint like all of `watch`: a link that is missing here is fetched by `refresh`.
        """
        tablet, epoch = refusal.detail.get("tablet"), refusal.detail.get("roster_epoch")
        initialised, sealed = refusal.detail.get("initialised"), refusal.detail.get("sealed")
        if not (isinstance(tablet, int) and isinstance(initialised, int) and isinstance(sealed, int)):
            return False
        if refusal.detail.get("domain") != self.name or epoch != self.chain.epoch:
            return False
        before = self.replicas(tablet).epoch
        self.watch.saw(TabletMark(tablet, initialised, sealed))
        self._changed(announce=False)
        return self.replicas(tablet).epoch != before

    def floor(self, tablet: int) -> Ballot:
        """The promise of the tablet's registers that have no value here (rule 7)."""
        return self.tablets.state(tablet).floor

    def agreed_floor(self, tablet: int) -> Ballot:
        """A floor that all replicas of the tablet have: what was collected was seen and written below it."""
        return self.tablets.state(tablet).agreed

    async def refresh(self, at_least: int | None = None) -> None:
        """Learn newer links, and where tablets stand, from the members that answer.

        One round at a time, shared by all callers. Returns also when nothing newer was found; raises nothing.
        """
        for _ in range(1 if at_least is None or at_least <= self.chain.epoch else 2):
            await asyncio.shield(self._lookout.refresh())
            if at_least is None or self.chain.epoch >= at_least:
                return

    # ---- life

    async def found(self, tablets: int = TABLETS_PER_DOMAIN) -> None:
        """Found the domain with this node as its only member; once, by `lucd init`."""
        if self.chain.newest is not None:
            raise Invalid(f"domain {self.name} exists already; this node holds its link {self.chain.epoch}")
        if any(self._context.registers.keys(tablet, b"", 1) for tablet in range(tablets)):
            raise Invalid(
                f"this node's file has groups of domain {self.name}, of a recovery that broke off: give the order "
                f"`lucd pop recover {self.name}` here again"
            )
        batch = Batch()
        for tablet in range(tablets):
            self.tablets.found(batch, tablet, rosters.FIRST_EPOCH)
        self.tablets.submit(batch)
        self.chain.append(rosters.found(self.name, self.local.member(), tablets))
        await self.chain.durable()
        self._changed()

    def check_unknown(self) -> None:
        """Raise Invalid if this node knows the domain: then nothing is put into its file but by the domain itself."""
        if self.chain.newest is not None:
            raise Invalid(
                f"a node of domain {self.name} has come back, and this one knows the domain from it: nothing is lost "
                "for good, and nothing of it was overwritten; see `lucd status`, for this node joins it"
            )

    async def restore(
        self, before: Sequence[Roster], floors: Sequence[Ballot], generation: int = 0, findings: Sequence[str] = ()
    ) -> Recovery:
        """Begin the next generation alone, with what was put into this new node's file out of a copy (rule 8).

        `before`: the domain's links so far; `floors`: of each tablet; `generation`: the least that it is to be. A human
        says that nobody of them is left. One batch has all of it, the audit record with the `findings` too: tablets
        without the chain would be served in whatever chain this node joins, and without the record nobody would know
        that the data is not repaired yet.
        """
        self.check_unknown()
        if not before:
            raise Invalid(f"domain {self.name} cannot be restored from a copy that has none of its links")
        last, member = before[-1], self.local.member()
        link = restored(last, member, generation)
        lost, survivors = tuple(m.node_id for m in last.members), (member.node_id,)
        every = tuple(range(len(last.tablets)))
        record = Recovery(
            self._clock.wall(),
            member.node_id,
            link.generation,
            link.epoch,
            survivors,
            lost,
            every,
            (),
            tuple(findings),
            from_copies=True,
        )
        batch = Batch()
        for tablet, floor in enumerate(floors):
            self.tablets.initialise(batch, tablet, link.epoch, last.tablet_epochs[tablet], floor)
        put_record(batch, self.name, record)
        self.chain.begin_with((*before, link), batch, self.tablets.submit)
        await self.chain.durable()
        self._changed()
        return record

    async def start(self) -> None:
        """Begin the background work. `answer` works before, too."""
        loop = asyncio.get_running_loop()
        work: list[Coroutine[Any, Any, None]] = [
            self._lookout.run(),
            self._takeover.run(STATUS_INTERVAL_S),
            self.repair.run(),
            self.collection.run(),
        ]
        self._tasks = [loop.create_task(w) for w in work]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Background work ends by `stop` or with the disk; anything else is a bug that must not pass in silence."""
        if not task.cancelled() and (error := task.exception()) is not None and self._context.disk.failed is None:
            message = f"background work of domain {self.name} broke off; restart this node"
            task.get_loop().call_exception_handler({"message": message, "exception": error, "task": task})

    async def stop(self) -> None:
        """End it. Nothing durable is half done."""
        await self._news.stop()
        await self._lookout.stop()
        tasks = [*self._tasks, *(t for t in (self._greeting, self.generations.meeting) if t is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []

    def met(self, node: NodeId) -> None:
        """A link to the node came up: see at once whether one of the two has missed writes, or a generation."""
        newest = self.chain.newest
        if newest is not None and newest.member(node) is not None:
            self.repair.returned(node)
        elif self.joined and self.chain.generation_epoch:
            # It may be one that this generation began without, and that no link known here lists.
            self._greeting = asyncio.get_running_loop().create_task(self._greet(node))
        self.look()

    async def _greet(self, node: NodeId) -> None:
        asked = AskStatus(self.name, self.chain.epoch, self.generation, self.chain.branch)
        await ask_each(self.peers.ask, [node], asked, Status)

    def look(self) -> None:
        """What this node was waiting for to join may be the case now."""
        if not self.joined and not self.removed:
            self._lookout.soon()

    def word(self, nodes: Sequence[NodeId]) -> Word:
        """What this domain of one PoP, as far as this node can tell, says of these nodes of it."""
        if not self.joined:
            return Word()
        now_s = self._clock.monotonic()
        silent = {n: s for n, s in self.watch.reported_silence.items() if n in self.watch.reachable(now_s)}
        silent[self.local.node_id] = self.watch.silent_s(now_s)
        return word_of_pop(self.roster, self.chain.knows, nodes, silent, self._remove_after_s)

    async def leave(self, node: NodeId, *, drain: bool) -> int:
        """Take a member out: `drain` moves its tablets first, else it is treated as lost. Returns the link's epoch."""
        request = AskLeave(self.name, node, drain)
        if self._wide is None or self.joined:
            return (await self._membership.leave(request)).epoch
        return (await self._joining.leave_through_a_member(request)).epoch

    def acquaintances(self) -> dict[NodeId, str]:
        """Addresses of all that this node may have to speak to: members, and those that a recovery left out.

        In a large domain only of those that it has to do with all the time.
        """
        return self.peers.acquaintances()

    def health(self) -> dict[str, object]:
        """For status commands and metrics; see `dht.domain.health`."""
        node, unchecked = self.local.node_id, self.repair.unchecked()
        unasked = self.peers.unasked()
        return health(self.chain.newest, node, self.status(), self.watch, self._clock, unchecked, unasked)

    @property
    def counters(self) -> dict[str, int | float]:
        """For metrics, since the start."""
        news = {"told": self._news.told, "collected": self.collection.collected}
        return {**self.transfer.counters, **self.repair.counters, **news}

    # ---- peers

    async def answer(self, sender: NodeId, message: Struct) -> Message:
        """Serve a peer. Raises NotFound for another domain, RemoteProtocolError for what is no domain message."""
        return await self._answers.answer(sender, message)

    def status(self) -> Status:
        """What the other members are told about this one."""
        return self._answers.status()

    def _taken_over(self, tablet: int) -> None:
        self.repair.initialised(tablet)
        self._changed()

    def _sealed(self, tablet: int) -> None:
        self.transfer.sealed(tablet)
        self._changed()

    def _looked(self) -> None:
        self._changed(announce=False)

    def _changed(self, *, announce: bool = True) -> None:
        """The chain, a tablet or what is known of others changed: new views, look for work, tell the registers."""
        newest = self.chain.newest
        if newest is None:
            return
        self.watch.follow(newest, self._clock.monotonic())
        self.watch.patience_s = 0.0 if self._wide is None else (rounds_for_all(newest) - 1) * STATUS_INTERVAL_S * 1.2
        marks = self.status().tablets
        for mark in marks:
            self.watch.saw(mark)
        if self._tasks:
            self._news.look(marks)
        views = []
        for tablet in range(len(newest.tablets)):
            replicas = newest.replicas(tablet)
            first = max(rosters.FIRST_EPOCH, self.chain.generation_epoch)
            old = replicas.epoch > first and self._rules.serve_only_initialised
            before = self.chain.link(replicas.epoch - 1).replicas(tablet) if old else None
            views.append(self.watch.in_use(tablet, replicas, before))
        same = tuple(views) == self._views
        if not same:
            self._views = tuple(views)
        self._takeover.wake()
        if announce or not same:
            for callback in list(self.on_change):
                callback()
