"""Changing the roster: joins, leaves, address changes, replacement of lost members, balance (DESIGN section 5).

Any member may propose; the decree makes it safe. To keep contention low, only the first reachable voter mends the
roster on its own; joins and leaves are proposed by whoever is asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Final

import msgspec

from dht.domain.asking import ask_each
from dht.domain.context import Context
from dht.domain.decree import DecreeProposer
from dht.domain.messages import AskJoin, AskLeave, AskStatus, Newest, Status, TellLink
from dht.domain.plan import Readiness, joined, left, lost, next_link, readiness
from dht.domain.roster import Member, Roster
from dht.domain.watch import REACHABLE_S, VOTER_SILENT_S
from dht.domain.wide import check_room, is_large, leaving, said
from dht.errors import Invalid, NotFound, Unavailable
from dht.model import NodeId

log = logging.getLogger(__name__)
CHANGE_ATTEMPTS_MAX: Final = 5
MEND_PATIENCE_S: Final = 10.0


class Membership:
    def __init__(
        self,
        context: Context,
        proposer: DecreeProposer,
        status: Callable[[], Status],
        remove_after_s: float,
    ) -> None:
        self._node = context.node
        self._chain = context.chain
        self._watch = context.watch
        self._proposer = proposer
        self._clock = context.clock
        self._ask = context.ask
        self._status = status
        self._learn = context.peers.learn
        self._remove_after_s = remove_after_s
        self._rules = context.rules
        self._wide = context.wide is not None
        self._changing = asyncio.Lock()
        self._unchanged = (0, 0.0)

    async def join(self, sender: NodeId, request: AskJoin) -> Newest:
        """Make the sender a member as it describes itself.

        Raises Invalid for a member that was removed and kept its disk (rule 6), or where its PoP has enough of them,
        Unavailable while the change has to wait.
        """
        member = request.member
        if sender != member.node_id and not (self._wide and self._newest().member(sender)):
            raise Invalid("a node can ask for its own membership only")
        if not request.passed_on and self._passes_on():
            return await self._ask_a_voter(request)
        async with self._changing:
            for _ in range(CHANGE_ATTEMPTS_MAX):
                roster = self._newest()
                old = roster.member(member.node_id)
                if old is not None and old.incarnation == member.incarnation:
                    member = Member(
                        member.node_id,
                        member.incarnation,
                        member.pop,
                        member.failure_domain,
                        member.address,
                        old.leaving,
                    )
                    if old == member:
                        return Newest(roster.epoch)
                elif self._chain.was_member(member.node_id, member.incarnation):
                    raise Invalid(
                        f"this node was removed from domain {roster.domain}; wipe its data directory, then it may join "
                        "again"
                    )
                if self._wide and old is None:
                    check_room(roster, member)
                await self._change(roster, joined(roster, member), newcomer=member.node_id)
        raise Unavailable(f"domain {self._chain.domain} changes too fast; the join is tried again")

    async def leave(self, request: AskLeave) -> Newest:
        """Mark the member as leaving; its tablets move, then it goes. Idempotent."""
        if not request.passed_on and self._passes_on():
            return await self._ask_a_voter(request)
        async with self._changing:
            for _ in range(CHANGE_ATTEMPTS_MAX):
                roster = self._newest()
                member = roster.member(request.node)
                if member is None:
                    if any(link.member(request.node) for link in self._chain.after(0, self._chain.epoch)):
                        return Newest(roster.epoch)
                    raise NotFound(f"node {request.node.hex()} is no member of domain {roster.domain}")
                if member.leaving:
                    return Newest(roster.epoch)
                if all(m.leaving or m.node_id == request.node for m in roster.members):
                    raise Invalid(
                        f"node {request.node.hex()} is the last member of domain {roster.domain}; add another one first"
                    )
                asked = AskStatus(roster.domain, roster.epoch)
                if not request.drain and await ask_each(self._ask, [request.node], asked, Status):
                    raise Invalid(f"node {request.node.hex()} answers; drain it, or stop it first")
                await self._change(roster, left(roster, [request.node]))
        raise Unavailable(f"domain {self._chain.domain} changes too fast; ask again")

    def _passes_on(self) -> bool:
        """Whether this member does not see all others, so that a voter should propose."""
        roster = self._newest()
        return self._wide and is_large(roster) and self._node not in roster.voters

    async def _ask_a_voter(self, request: AskJoin | AskLeave) -> Newest:
        """Who gets it does it, also where its own roster is another: so it is not sent to and fro."""
        request = msgspec.structs.replace(request, passed_on=True)
        near = self._watch.reachable(self._clock.monotonic())
        for voter in self._newest().voters:
            if voter in near:
                reply = await self._ask(voter, request)
                if isinstance(reply, Newest):
                    return reply
        raise Unavailable(f"no voter of domain {self._chain.domain} is in reach; ask again")

    async def mend(self) -> None:
        """One step towards what the roster should be, if this node is the one to take it and a step is due."""
        roster = self._chain.newest
        now_s = self._clock.monotonic()
        if roster is None or self._changing.locked() or now_s - self._watch.started_s < REACHABLE_S:
            return
        reachable = self._watch.reachable(now_s)
        if not self._my_turn(roster, reachable, now_s):
            return
        gone = self._gone(roster, reachable, now_s)
        members = left(roster, gone) if gone else roster.members
        if not self._due(roster, members, now_s):
            return
        async with self._changing:
            await self._change(roster, members)
        for node in gone:
            log.warning("member %s of domain %s is lost and is being replaced", node.hex()[:12], roster.domain)

    def _gone(self, roster: Roster, reachable: Collection[NodeId], now_s: float) -> tuple[NodeId, ...]:
        """Members to be replaced."""
        silent = {n: s for n, s in self._watch.reported_silence.items() if n in reachable}
        silent[self._node] = self._watch.silent_s(now_s)
        if not self._wide:
            return lost(roster, self._node, silent, self._remove_after_s)
        words = {n: word for n, word in self._watch.words.items() if n in reachable}
        word = said(roster, {**words, self._node: self._status().word})
        unreached = lost(roster, self._node, silent, self._remove_after_s, word.unreached)
        return leaving(roster, {*unreached, *word.let_go})

    def _due(self, roster: Roster, members: Sequence[Member], now_s: float) -> bool:
        """Whether a step is due by what was heard last; only then is everybody asked anew."""
        marks = {n: self._watch.marks.get(n, {}) for n in self._watch.reachable(now_s) if roster.member(n)}
        marks[self._node] = {m.tablet: m for m in self._status().tablets}
        ready = readiness(roster, marks) if self._rules.gate_on_majority else Readiness(frozenset(), frozenset())
        return self._step(roster, members, now_s, frozenset(), ready) is not None

    def _my_turn(self, roster: Roster, reachable: Collection[NodeId], now_s: float) -> bool:
        """The first reachable voter acts at once, the next ones when that had time and left the roster as it is.

        The first may be unable to: it may not reach a majority that others reach, or hang in a disk.
        """
        near = [v for v in roster.voters if v in reachable]
        if self._node not in near:
            return False
        if self._unchanged[0] != roster.epoch:
            self._unchanged = (roster.epoch, now_s)
        return now_s - self._unchanged[1] >= near.index(self._node) * MEND_PATIENCE_S

    async def _change(self, roster: Roster, members: Sequence[Member], newcomer: NodeId | None = None) -> None:
        """Propose one step, and tell everybody what was decided."""
        ready = await self._readiness(roster)
        extra = frozenset() if newcomer is None else frozenset([newcomer])
        link = self._step(roster, members, self._clock.monotonic(), extra, ready)
        if link is None or self._chain.epoch != roster.epoch:
            return
        decided = await self._proposer.propose(link)
        await self._learn(decided, self._node)
        log.info(
            "domain %s: link %d decided, %d members, %d voters, %d tablets change",
            decided.domain,
            decided.epoch,
            len(decided.members),
            len(decided.voters),
            sum(e == decided.epoch for e in decided.tablet_epochs),
        )
        both = {m.node_id: None for m in (*decided.members, *roster.members) if m.node_id != self._node}
        near = self._watch.reachable(self._clock.monotonic()) | extra
        told = [n for n in both if n in near]
        await ask_each(self._ask, told, TellLink(decided.domain, decided), Newest)

    def _step(
        self,
        roster: Roster,
        members: Sequence[Member],
        now_s: float,
        extra: frozenset[NodeId],
        ready: Readiness,
    ) -> Roster | None:
        near, voting = self._watch.reachable(now_s), self._watch.reachable(now_s, VOTER_SILENT_S)
        return next_link(roster, members, near | extra, ready, voting | extra)

    async def _readiness(self, roster: Roster) -> Readiness:
        """Rule 5: asked anew, because the marks of the last round may be older than the roster."""
        if not self._rules.gate_on_majority:
            return Readiness(frozenset(), frozenset())
        near = self._watch.reachable(self._clock.monotonic())
        others = [m.node_id for m in roster.members if m.node_id in near and m.node_id != self._node]
        request = AskStatus(roster.domain, roster.epoch)
        replies = await ask_each(self._ask, others, request, Status)
        marks = {n: {m.tablet: m for m in r.tablets} for n, r in replies.items()}
        marks[self._node] = {m.tablet: m for m in self._status().tablets}
        return readiness(roster, marks)

    def _newest(self) -> Roster:
        roster = self._chain.newest
        if roster is None:
            raise Unavailable(f"this node has not joined domain {self._chain.domain} yet; ask another member")
        return roster
