"""Beginning a new generation with the survivors, and meeting one that began elsewhere (DESIGN section 5, rule 8)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from dht.domain.asking import ask_each
from dht.domain.context import Context
from dht.domain.messages import (
    LINKS_PER_PAGE,
    AskLinks,
    AskRecovery,
    AskStatus,
    Links,
    Newest,
    RecoveryVote,
    Status,
    TellLink,
)
from dht.domain.recovery import (
    Recovery,
    bereft_tablets,
    keep_record,
    keep_vote,
    majority_lives,
    mark_superseded,
    records,
    recovered,
    superseded_by,
    vote,
)
from dht.domain.roster import Roster, check_step
from dht.errors import DhtError, Invalid, Unavailable
from dht.model import NodeId

log = logging.getLogger(__name__)


class Generations:
    """`superseded`: the generation that was begun without what this node holds, 0 if none is known."""

    def __init__(self, context: Context, refresh: Callable[[], Awaitable[None]], on_change: Callable[[], None]) -> None:
        self._wide = context.wide is not None
        self._node = context.node
        self._incarnation = context.local.incarnation
        self._chain = context.chain
        self._disk = context.disk
        self._clock = context.clock
        self._ask = context.ask
        self._refresh = refresh
        self._learn = context.peers.learn
        self._on_change = on_change
        self.superseded = superseded_by(context.disk, context.chain.domain)
        self.meeting: asyncio.Task[None] | None = None

    # ---- beginning one

    def records(self) -> tuple[Recovery, ...]:
        """The audit records of the recoveries that were ordered at this node, oldest first."""
        return records(self._disk, self._chain.domain)

    async def survivors(self) -> tuple[NodeId, ...]:
        """Members that answer now, with the disks that the roster knows; this one too."""
        await self._refresh()
        roster = self._roster()
        asked = AskStatus(roster.domain, roster.epoch, roster.generation)
        replies = await ask_each(self._ask, [m.node_id for m in roster.members], asked, Status)
        return tuple(n for n, status in replies.items() if roster.lists(n, status.incarnation))

    def _roster(self) -> Roster:
        newest = self._chain.newest
        if newest is None or self.superseded or not newest.lists(self._node, self._incarnation):
            raise Invalid(f"this node is no member of domain {self._chain.domain}; recover it at one that is")
        return newest

    async def recover(self, named: Sequence[NodeId], *, accept_data_loss: bool) -> Recovery:
        """Begin the next generation with the survivors alone (none named: all that answer). Once, at one of them.

        Raises Invalid without `accept_data_loss`, where a majority is alive, or for a survivor that does not answer.
        What only the others had is lost; they stop when they meet the new generation.
        """
        answering = await self.survivors()
        roster = self._roster()
        chosen = self._chosen(roster, answering, named)
        lost = tuple(m.node_id for m in roster.members if m.node_id not in chosen)
        if not accept_data_loss:
            raise Invalid(
                f"recovering domain {roster.domain} with {len(chosen)} of its members loses whatever only the other "
                f"{len(lost)} have, acknowledged writes too; be sure that they are gone, then say --accept-data-loss"
            )
        link = recovered(roster, chosen)
        empty = tuple(t for t, nodes in enumerate(roster.tablets) if not set(nodes).intersection(chosen))
        bereft = bereft_tablets(roster, chosen)
        record = Recovery(self._clock.wall(), self._node, link.generation, link.epoch, chosen, lost, bereft, empty)
        await self._ask_votes(link, chosen)
        await self._keep(record)
        log.warning(
            "domain %s is recovered, data loss accepted: generation %d begins at link %d with %d members, without %s",
            roster.domain,
            link.generation,
            link.epoch,
            len(chosen),
            ", ".join(n.hex() for n in lost),
        )
        await self._learn(link, self._node)
        others = [n for n in chosen if n != self._node]
        await ask_each(self._ask, others, TellLink(roster.domain, link), Newest)
        return record

    def _chosen(self, roster: Roster, answering: Sequence[NodeId], named: Sequence[NodeId]) -> tuple[NodeId, ...]:
        if majority_lives(roster, answering):
            raise Invalid(
                f"a majority of domain {roster.domain} is alive ({len(answering)} of {len(roster.members)} members "
                "answer): nothing is lost for good; replace dead members instead (`lucd node drain`)"
            )
        if silent := [n.hex() for n in named if n not in answering]:
            raise Invalid(f"{', '.join(silent)} does not answer, or has another disk now; name only who survived")
        chosen = tuple(named) or tuple(answering)
        if self._node not in chosen:
            raise Invalid(f"this node, {self._node.hex()}, is not among the survivors named; recover at one of them")
        return chosen

    async def _ask_votes(self, link: Roster, survivors: Sequence[NodeId]) -> None:
        """Raises Invalid unless every survivor takes part in this order and in no other one.

        One after the other in a fixed order: of two orders among the same survivors one is refused by the first of
        them, before it has any vote.
        """
        for node in sorted(survivors):
            found = (await ask_each(self._ask, [node], AskRecovery(link.domain, link), RecoveryVote)).get(node)
            if found is None or not found.granted:
                why = "it does not answer" if found is None else found.why
                raise Invalid(f"node {node.hex()} does not take part in this recovery: {why}; nothing was changed")

    async def grant(self, sender: NodeId, request: AskRecovery) -> RecoveryVote:
        """This node's vote on an order, durable when this returns. Two orders with a common survivor never both begin;
        of two without one, which a cut can cause, all but the highest (generation, branch) stop when they meet.
        """
        link, newest = request.link, self._roster()
        if link.generation != newest.generation + 1:
            return RecoveryVote(False, f"it holds generation {newest.generation} already")
        check_step(newest, link)
        if (other := vote(self._disk, link, sender)) is not None:
            return RecoveryVote(False, f"it takes part in the one that was ordered at node {other.ordered_at.hex()}")
        await self._disk.durable(keep_vote(self._disk, link, sender))
        return RecoveryVote(True)

    def is_higher(self, generation: int, branch: bytes) -> bool:
        """Whether a generation that was met counts more than the one here. Of equal ones any fixed order will do."""
        newest = self._chain.newest
        own = 0 if newest is None else newest.generation
        return (generation, branch) > (own, self._chain.branch)

    async def note(self, record: Recovery, findings: Sequence[str]) -> Recovery:
        """Add to the audit record what was done to the data."""
        record = msgspec.structs.replace(record, findings=(*record.findings, *findings))
        await self._keep(record)
        return record

    async def _keep(self, record: Recovery) -> None:
        await self._disk.durable(keep_record(self._disk, self._chain.domain, record))

    # ---- meeting one

    def meet_soon(self, node: NodeId, generation: int) -> None:
        """A member of a higher generation was heard: follow it, or stop, if it began without what this node holds."""
        if generation > self.superseded and (self.meeting is None or self.meeting.done()):
            self.meeting = asyncio.get_running_loop().create_task(self._try_meet(node, generation))

    async def _try_meet(self, node: NodeId, generation: int) -> None:
        try:
            await self._meet(node, generation)
        except DhtError as error:
            log.info("domain %s: generation %d is not followed yet: %s", self._chain.domain, generation, error)

    async def _meet(self, node: NodeId, generation: int) -> None:
        chain, after, more = self._chain, 0, True
        while more:
            reply = await self._ask(node, AskLinks(chain.domain, after, LINKS_PER_PAGE))
            if not isinstance(reply, Links):
                raise Unavailable("the peer gives no links")
            for link in reply.links:
                if link.epoch <= chain.epoch and chain.link(link.epoch) != link:
                    await self._stop(generation)
                    return
                if chain.append(link):
                    self._on_change()
            more = len(reply.links) == LINKS_PER_PAGE
            after = reply.links[-1].epoch if reply.links else after
        await chain.durable()
        if self.stopped:
            log.error("%s", self.stopped)

    async def _stop(self, generation: int) -> None:
        """Serve nothing any more, after a restart neither. The file stays as it is, for comparison."""
        self.superseded = generation
        log.error("%s", self.stopped)
        number = mark_superseded(self._disk, self._chain.domain, generation)
        self._on_change()
        await self._disk.durable(number)

    @property
    def stopped(self) -> str:
        """What a human has to know and do, where a generation began without this node; else empty."""
        chain = self._chain
        newest = chain.newest
        left_out = False
        if newest is not None and not newest.lists(self._node, self._incarnation):
            left_out = any(
                chain.link(link.epoch - 1).lists(self._node, self._incarnation)
                and not link.lists(self._node, self._incarnation)
                for link in chain.recoveries()
            )
        if not self.superseded and not left_out:
            return ""
        generation = max(self.superseded, 0 if newest is None else newest.generation)
        if self._wide:
            # Two members of a PoP that were wiped together would take the majority of their PoP's own domain with them.
            return (
                f"domain {chain.domain} was recovered without this node, which serves nothing of it in generation "
                f"{generation}, but its PoP as ever. For it to be a member again: `lucd node drain`, keep the data "
                "directory elsewhere for comparison, join with an empty one; one node of the PoP after another"
            )
        return (
            f"domain {chain.domain} was recovered without this node, which serves nothing in generation {generation}: "
            "keep its data directory elsewhere for comparison, then join with an empty one"
        )
