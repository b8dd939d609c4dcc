"""One round to a group's replicas: prepare, accept, or confirm, counted until its quorum is there or out of reach.

All replicas are asked at once, the own one like the others, its disk beside theirs. The round ends at the quorum, or
when those that could still make it one have fallen silent; what comes later is still taken note of: a refusal names a
ballot that the coordinator must beat, a replica on another base gets the whole state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from dht.codec import Message
from dht.domain.roster import TabletReplicas, proven, quorums
from dht.errors import DhtError, NotServing, RemoteProtocolError, StorageError
from dht.limits import PEER_TIMEOUT_S, ROUNDS_AHEAD_MAX
from dht.model import ZERO, Ballot, GroupKey, NodeId, RowKey, Struct
from dht.register.acceptor import Acceptor
from dht.register.context import Context, Heard
from dht.register.group import GroupState
from dht.register.laggards import Laggards
from dht.register.messages import (
    Accept,
    Accepted,
    Chosen,
    Prepare,
    Prepared,
    ReadItem,
    ReadReplica,
    ReadReplicaReply,
    Verdict,
    Wanted,
)

T = TypeVar("T", bound=Struct)

MARKS_DELAY_S = 0.1
"""Marks are hints, and finds count ballots where they are late: one message and one commit for all of a while."""
MARKS_GROUPS_MAX = 1_000
SILENCE_CHECK_S = 0.02


class Tally:
    """Votes of one round. `done` is True at the quorum, False when it is out of reach."""

    __slots__ = ("_watch", "done", "missing", "open")

    def __init__(self, voters: Sequence[NodeId], quorum: int, watch: Callable[[Tally], None]) -> None:
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.missing = quorum
        self.open = dict.fromkeys(voters)
        self._watch: Callable[[Tally], None] | None = watch

    def vote(self, node: NodeId, yes: bool) -> None:
        del self.open[node]
        self.missing -= yes
        if not self.done.done():
            if self.missing <= 0:
                self.done.set_result(True)
            elif self.missing > len(self.open):
                self.done.set_result(False)
            elif not yes and self._watch is not None:
                # Now it hangs on one who may be silent.
                watch, self._watch = self._watch, None
                watch(self)


class Standing:
    """What a coordinator holds of one group. The rules of its use are in `dht.register.coordinator`.

    `state` and `promised` belong together: a quorum promised that ballot on that state. `heard`: the highest ballot
    that anybody named, but for absurd ones. `behind`: replicas that need the whole state next time. `version`: the
    newest catalog that the promises named (`dht.register.fence`).
    """

    __slots__ = ("behind", "heard", "key", "promised", "settled", "size_bytes", "state", "version")

    def __init__(self, key: GroupKey) -> None:
        self.key = key
        self.state: GroupState | None = None
        self.promised: Ballot | None = None
        self.heard = ZERO
        self.settled = False
        self.behind: dict[NodeId, None] = {}
        self.size_bytes = 0
        self.version = 0

    def drop(self) -> None:
        """Forget state and promise: nothing is proposed before the next prepare."""
        self.state = None
        self.promised = None
        self.settled = False

    def hear(self, ballot: Ballot) -> None:
        if ballot.round <= self.heard.round + ROUNDS_AHEAD_MAX:
            self.heard = max(self.heard, ballot)


class Rounds:
    """Conversations of a proposer with the replicas of a group."""

    def __init__(self, context: Context, acceptor: Acceptor, laggards: Laggards) -> None:
        self._context = context
        self._acceptor = acceptor
        self._laggards = laggards
        self._marks: dict[NodeId, dict[GroupKey, Ballot]] = {}

    # Prepare.

    async def prepare(self, standing: Standing, replicas: TabletReplicas) -> bool:
        """Get a quorum's promise and the newest state among it. False: refused or out of reach; back off.

        Of two replicas both are asked for it, though one could tell the newest state: nothing is accepted without the
        other, and what is proposed has left a promise at whichever of them a third one takes the tablet over from
        (`dht.register.fence`).
        """
        context = self._context
        context.count("prepares")
        key = standing.key
        held = context.file.header(key)
        floor = context.domain.floor(context.file.tablet(key)) if held.accepted == ZERO else ZERO
        round = max(standing.heard.round, held.promise.round, floor.round) + 1
        ballot = context.ballot(replicas.epoch, round)
        known = held.accepted if context.node in replicas.nodes else None
        accept_quorum, quorum = quorums(len(replicas.nodes))
        if context.rules.prepare_at_both:
            quorum = max(accept_quorum, quorum)
        tally = Tally(replicas.nodes, quorum, self._watch)
        replies: dict[NodeId, Prepared] = {}
        for node in self._own_last(replicas):
            request = Prepare(key, ballot, None if node == context.node else known)
            self._ask(node, request, key, partial(self._prepared, standing, node, tally, replies))
        if not await tally.done:
            return False
        best = max(replies.values(), key=lambda reply: (reply.accepted, reply.rows is not None))
        rows = best.rows
        if rows is None and best.accepted != ZERO:
            rows = self._own_rows(key, best.accepted)
            if rows is None:
                return False
        window_floor = max(reply.floor for reply in replies.values()) if best.accepted == ZERO else ZERO
        standing.state = GroupState(rows or {}, best.accepted, window_floor)
        standing.promised = ballot
        # What these promises say, and no more: after a recovery that lost the newest catalog an older one has the word.
        standing.version = max(reply.version for reply in replies.values())
        standing.behind.clear()
        same = [reply for reply in replies.values() if reply.accepted == best.accepted]
        # A chosen mark would prove as much, but a reader needs a majority that stands there; and if this replica itself
        # does not, the readers that hear only it and one other would wait for ever, and no repair would bring it along.
        own = context.file.header(key)
        standing.settled = (
            len(same) >= accept_quorum
            and (context.node not in replicas.nodes or own.accepted == best.accepted)
            and (
                proven(best.accepted, replicas.epoch, len(same), len(replicas.nodes))
                or own.chosen == best.accepted
                or not context.rules.inherited_marked
            )
        )
        if standing.settled and own.chosen != best.accepted and context.rules.inherited_marked:
            # Who finishes what an earlier epoch left finds that all stand there: without a mark he would come again.
            self.mark(replicas, key, best.accepted)
        return True

    def _own_rows(self, key: GroupKey, accepted: Ballot) -> dict[RowKey, bytes] | None:
        """The rows of this replica, if it still stands where the peers' newest state is."""
        if self._context.file.header(key).accepted != accepted:
            return None
        return self._context.file.rows(key)

    def _prepared(
        self,
        standing: Standing,
        node: NodeId,
        tally: Tally,
        replies: dict[NodeId, Prepared],
        told: Struct | DhtError,
    ) -> None:
        ok = False
        try:
            reply = _expect_told(told, Prepared)
            standing.hear(reply.promise)
            if reply.ok and not tally.done.done():
                replies[node] = reply
            ok = reply.ok
        except DhtError as error:
            self._failed(error)
        finally:
            # Whatever comes, a bug too: the round, and with it the group, must not wait for ever.
            tally.vote(node, ok)

    # Accept.

    async def accept(
        self,
        standing: Standing,
        replicas: TabletReplicas,
        base: Ballot,
        delta: Mapping[RowKey, bytes | None],
        next: Ballot | None,
    ) -> bool:
        """Have a quorum accept `standing.state` at its ballot; `delta` leads to it from `base`. False: unknown."""
        context = self._context
        state = standing.state
        assert state is not None
        request = Accept(
            standing.key,
            state.ballot,
            next,
            base,
            False,
            dict(delta),
            state.digest.to_bytes(16, "big"),
            state.deleted,
        )
        quorum, _ = quorums(len(replicas.nodes))
        tally = Tally(replicas.nodes, quorum if context.rules.chosen_before_answer else 1, self._watch)
        for node in self._own_last(replicas):
            whole = self._whole(standing, request) if node in standing.behind else None
            heard = partial(self._accepted, standing, node, request, tally, False)
            self._ask(node, whole or request, request.key, heard)
        accepted = await tally.done
        if accepted:
            self.mark(replicas, standing.key, request.ballot)
        return accepted

    def _accepted(
        self,
        standing: Standing,
        node: NodeId,
        request: Accept,
        tally: Tally,
        last: bool,
        told: Struct | DhtError,
    ) -> None:
        """`last`: all rows were sent because the replica had asked for them; it is not asked again."""
        try:
            vote = self._vote_of(standing, node, request, tally, last, told)
        except BaseException:
            tally.vote(node, False)
            raise
        if vote is not None:
            tally.vote(node, vote)

    def _vote_of(
        self,
        standing: Standing,
        node: NodeId,
        request: Accept,
        tally: Tally,
        last: bool,
        told: Struct | DhtError,
    ) -> bool | None:
        """None: it is asked once more, with all rows."""
        try:
            reply = _expect_told(told, Accepted)
        except DhtError as error:
            self._failed(error)
            # A replica that does not serve the tablet, or has no disk, has nothing to finish the group with.
            if not isinstance(error, NotServing | StorageError) and self._context.network.alive(node):
                self._laggards.note(node, request.key, request.ballot)
            return False
        if reply.verdict == Verdict.NEED_WHOLE and not last:
            whole = self._whole(standing, request)
            if whole is not None:
                self._ask(node, whole, request.key, partial(self._accepted, standing, node, request, tally, True))
                return None
            # The state has moved on meanwhile; the next accept brings this replica the whole.
            standing.behind[node] = None
        standing.hear(reply.promise)
        if reply.verdict == Verdict.ACCEPTED:
            standing.behind.pop(node, None)
            standing.version = max(standing.version, reply.version)
        else:
            self._laggards.note(node, request.key, request.ballot)
        return reply.verdict == Verdict.ACCEPTED

    async def send_accept(self, node: NodeId, request: Accept) -> Accepted:
        """The replica's reply; this node's own is durable then, too."""
        if node == self._context.node:
            reply, number = self._acceptor.accept(request)
            await self._acceptor.durable(number, request.key)
            return reply
        return expect(await self._context.network.call(node, request, PEER_TIMEOUT_S), Accepted)

    def _whole(self, standing: Standing, request: Accept) -> Accept | None:
        """The same accept with all rows, if the coordinator still holds just that state."""
        state = standing.state
        if state is None or state.ballot != request.ballot:
            return None
        self._context.count("wholes_sent")
        rows: dict[RowKey, bytes | None] = dict(state.rows)
        return Accept(
            request.key, request.ballot, request.next, request.base, True, rows, request.digest, request.deleted
        )

    # Confirm.

    async def confirm(self, standing: Standing, replicas: TabletReplicas) -> bool:
        """Whether a quorum stands at the cached state now, so that it is the newest chosen one."""
        state = standing.state
        assert state is not None
        quorum, _ = quorums(len(replicas.nodes))
        tally = Tally(replicas.nodes, quorum, self._watch)
        request = ReadReplica((ReadItem(standing.key, replicas.epoch, Wanted.BALLOT),))
        for node in self._own_last(replicas):
            self._ask(node, request, None, partial(self._confirmed, node, state.ballot, tally))
        return await tally.done

    def _confirmed(self, node: NodeId, ballot: Ballot, tally: Tally, told: Struct | DhtError) -> None:
        same = False
        try:
            reply = _expect_told(told, ReadReplicaReply)
            same = len(reply.items) == 1 and reply.items[0].serving and reply.items[0].accepted == ballot
        except DhtError as error:
            self._failed(error)
        finally:
            tally.vote(node, same)

    # One replica.

    def _own_last(self, replicas: TabletReplicas) -> list[NodeId]:
        """Whom to ask, in order: what the others are asked is on its way while this node's own decides."""
        own = self._context.node
        return sorted(replicas.nodes, key=own.__eq__)

    def _ask(self, node: NodeId, request: Prepare | Accept | ReadReplica, key: GroupKey | None, heard: Heard) -> None:
        """Ask a replica, the own one like the others: what it tells is durable then. `key`: what may be written."""
        if node != self._context.node:
            self._context.ask(node, request, PEER_TIMEOUT_S, heard)
            return
        reply: Message
        try:
            match request:
                case Prepare():
                    reply, number = self._acceptor.prepare(request)
                case Accept():
                    reply, number = self._acceptor.accept(request)
                case ReadReplica():
                    reply, number = self._acceptor.read(request)
        except DhtError as error:
            heard(error)
            return
        self._acceptor.when_durable(number, key, lambda error: heard(reply if error is None else error))

    def _watch(self, tally: Tally) -> None:
        self._context.spawn(self._end_if_silent(tally))

    async def _end_if_silent(self, tally: Tally) -> None:
        """End the round without a quorum when nobody is left who could make it one."""
        while not tally.done.done():
            if not any(map(self._context.network.alive, tally.open)):
                self._context.count("rounds_given_up")
                tally.done.set_result(False)
                return
            await self._context.clock.sleep(SILENCE_CHECK_S)

    def _failed(self, error: DhtError) -> None:
        if isinstance(error, NotServing):
            # Beside the round: its vote must not wait for the chain.
            self._context.spawn(self._catch_up(error))

    async def _catch_up(self, error: NotServing) -> None:
        try:
            await self._context.catch_up(error)
        except DhtError:
            self._context.count("refreshes_failed")

    # Chosen marks.

    def mark(self, replicas: TabletReplicas, key: GroupKey, ballot: Ballot) -> None:
        """Tell the replicas, soon and in batches, that the ballot is chosen."""
        for node in replicas.nodes:
            marks = self._marks.get(node)
            if marks is None:
                self._marks[node] = {key: ballot}
                self._context.spawn(self._send_marks(node))
            elif len(marks) < MARKS_GROUPS_MAX:
                marks[key] = ballot

    async def _send_marks(self, node: NodeId) -> None:
        await self._context.clock.sleep(MARKS_DELAY_S)
        marks = self._marks.pop(node)
        message = Chosen(tuple(marks), tuple(marks.values()))
        try:
            if node == self._context.node:
                self._acceptor.chosen(message)
            else:
                await self._context.network.call(node, message, PEER_TIMEOUT_S)
        except DhtError:
            self._context.count("marks_lost")


def expect(answer: Struct, kind: type[T]) -> T:
    """The answer as the type that the protocol says. Raises RemoteProtocolError."""
    if not isinstance(answer, kind):
        raise RemoteProtocolError(f"a peer answered with {type(answer).__name__} where {kind.__name__} was due")
    return answer


def _expect_told(told: Struct | DhtError, kind: type[T]) -> T:
    """The same of what `Context.ask` has told. Raises the error that came instead."""
    if isinstance(told, DhtError):
        raise told
    return expect(told, kind)
