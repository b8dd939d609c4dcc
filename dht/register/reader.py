"""Linearizable reads of many groups at once (DESIGN section 6).

A majority of a group's replicas is asked, one for data and the others for their ballot, and all groups that a replica
keeps go into one frame. Where they do not agree, or one does not answer soon, the others are asked as well. A group is
read when a majority stands at one accepted ballot and data of exactly that ballot is at
hand: then that state is chosen, and was the newest chosen one at some time during the read. Where the majority is not
there (a write is on its way, or was left unfinished) the reader asks again, and then has the coordinator finish it.
A ballot of an earlier tablet epoch was not accepted by that majority but handed to it (`roster.proven`), so it takes a
chosen mark, or all replicas.

A node that is a replica asks the others for ballots only and loads its rows when the ballot is agreed on; a caller who
knows the ballot gets no rows at all.

An intent met on the way belongs to a transaction that may be decided already: the reader asks its primary. Decided, it
is finished before the group is read again; undecided, the value without it is the right answer, because the decision
will come after this moment.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from dht.domain.roster import proven, quorums
from dht.errors import DhtError, Invalid, Unavailable
from dht.limits import PEER_TIMEOUT_S, READ_GROUPS_MAX
from dht.model import SYSTEM_INTENT, ZERO, Ballot, GroupKey, GroupRead, NodeId, Part, RowKey, Struct
from dht.register.acceptor import Acceptor
from dht.register.context import Context
from dht.register.coordinator import Coordinator
from dht.register.messages import Kind, Operation, ReadItem, ReadReplica, ReadReplicaReply, ReplicaState, Wanted
from dht.register.operations import Intent, decode_intent
from dht.register.reach import Reach
from dht.register.routing import Router
from dht.rows import table_prefix

READ_AGAIN_MIN_S = 0.002
READ_AGAIN_MAX_S = 0.010
ROUNDS_BEFORE_SETTLING = 3
MAJORITY_WAIT_S = 0.03
"""How long the replicas asked first have, before the others are asked too."""
_INTENT_PREFIX = table_prefix(SYSTEM_INTENT)

Resolve = Callable[[GroupKey, Intent, float], Awaitable[bool]]
"""(group, intent, deadline) -> whether the group has to be read again because the transaction was decided."""


class _Want:
    """One group's read. `ballot` is set when a majority agrees and the rows (or their being known) are at hand."""

    __slots__ = (
        "ballot",
        "epoch",
        "intents",
        "key",
        "known",
        "nodes",
        "open",
        "quorum",
        "rows",
        "source",
        "states",
        "wanted",
    )

    def __init__(self, key: GroupKey, known: Ballot | None, wanted: Wanted) -> None:
        self.key = key
        self.known = known
        self.wanted = wanted
        self.source: NodeId | None = None
        self.ballot: Ballot | None = None
        self.rows: dict[RowKey, bytes] | None = None
        self.intents = 0

    def begin(self, epoch: int, nodes: tuple[NodeId, ...]) -> None:
        self.epoch = epoch
        self.nodes = nodes
        self.quorum = quorums(len(nodes))[0]
        self.open = len(nodes)
        self.states: dict[NodeId, ReplicaState] = {}

    @property
    def finished(self) -> bool:
        return self.ballot is not None or not self.open


class Reader:
    """Reads groups for whoever asks at this node."""

    def __init__(
        self, context: Context, acceptor: Acceptor, coordinator: Coordinator, router: Router, reach: Reach
    ) -> None:
        self._context = context
        self._reach = reach
        self._acceptor = acceptor
        self._coordinator = coordinator
        self._router = router
        self.resolve: Resolve

    async def read(
        self, keys: Sequence[GroupKey], known: Sequence[Ballot | None] | None, deadline: float
    ) -> tuple[GroupRead, ...]:
        """Each group at one ballot. Raises Unavailable when a group has no majority in time."""
        if len(keys) > READ_GROUPS_MAX:
            raise Invalid(f"{len(keys)} groups were asked for, at most {READ_GROUPS_MAX} can be read at once")
        if known is not None and len(known) != len(keys):
            raise Invalid(f"{len(keys)} groups and {len(known)} known ballots were given")
        self._context.count("reads")
        wants = [_Want(key, known[i] if known else None, Wanted.DATA) for i, key in enumerate(keys)]
        open_wants = wants
        while True:
            await self._agree(open_wants, deadline)
            if not self._context.rules.reads_resolve_intents:
                break
            open_wants = [want for want in open_wants if want.intents and await self._decided(want, deadline)]
            if not open_wants:
                break
            for want in open_wants:
                want.ballot = None
        return tuple(GroupRead(want.key, want.ballot or ZERO, want.rows) for want in wants)

    async def system_rows(self, key: GroupKey, deadline: float) -> tuple[Ballot, dict[RowKey, bytes]]:
        """The store's own rows of a group, read like any others."""
        want = _Want(key, None, Wanted.SYSTEM)
        await self._agree([want], deadline)
        return want.ballot or ZERO, want.rows or {}

    async def _decided(self, want: _Want, deadline: float) -> bool:
        """Whether the group must be read again: one of its intents is decided, or it moved meanwhile."""
        ballot, rows = await self.system_rows(want.key, deadline)
        if ballot != want.ballot:
            return True
        again = False
        for key, row in rows.items():
            if key.startswith(_INTENT_PREFIX):
                again |= await self.resolve(want.key, decode_intent(row), deadline)
        return again

    async def _agree(self, wants: list[_Want], deadline: float) -> None:
        context = self._context
        rounds = 0
        while True:
            for nodes, want in {context.replicas(want.key).nodes: want for want in wants}.items():
                self._reach.check(nodes, f"group {want.key.hex()} cannot be read")
            link = await self._round(wants, deadline)
            wants = [want for want in wants if want.ballot is None]
            if not wants:
                return
            rounds += 1
            if context.remaining(deadline) <= 0:
                raise Unavailable(
                    f"no majority of the replicas of group {wants[0].key.hex()} agreed in time ({len(wants)} groups "
                    "are not readable); try again when more nodes are reachable"
                )
            if link is not None:
                await self._catch_up(link)
            if rounds >= ROUNDS_BEFORE_SETTLING:
                await self._settle(wants, rounds - ROUNDS_BEFORE_SETTLING, deadline)
            else:
                context.count("reads_again")
                await context.clock.sleep(context.chance.uniform(READ_AGAIN_MIN_S, READ_AGAIN_MAX_S))

    async def _catch_up(self, link: int) -> None:
        try:
            await self._context.domain.refresh(link)
        except DhtError:
            self._context.count("refreshes_failed")

    async def _settle(self, wants: list[_Want], turn: int, deadline: float) -> None:
        """Have the coordinators finish what keeps the replicas apart; where that does not help, each replica in turn.

        The coordinator may stand with a majority that this node does not hear all of. A replica that finishes a write
        brings itself up to date with it, so sooner or later those that are heard agree.
        """
        context = self._context
        context.count("reads_settled", len(wants))
        work = []
        for want in wants[:64]:
            operation = Operation(Kind.SETTLE, context.chance.randbytes(16), Part(want.key))
            until = min(deadline, context.clock.monotonic() + 1.0)
            nodes = [node for node in context.replicas(want.key).nodes if context.network.alive(node)]
            at = nodes[turn % (len(nodes) + 1) - 1] if nodes and turn % (len(nodes) + 1) else None
            work.append(context.spawn(self._settle_one(operation, at, until)))
        await asyncio.wait(work)
        await context.clock.sleep(context.chance.uniform(0, READ_AGAIN_MAX_S))

    async def _settle_one(self, operation: Operation, at: NodeId | None, deadline: float) -> None:
        """At the coordinator, or at that replica."""
        try:
            if at is None:
                await self._router.submit(operation, 0, deadline)
            else:
                await self._router.submit_to(at, operation, deadline)
        except DhtError:
            self._context.count("settles_failed")

    # One round.

    async def _round(self, wants: list[_Want], deadline: float) -> int | None:
        """Ask the replicas of all groups once; the link to catch up with if any of them refused, else None.

        Ends at the deadline, whoever has answered by then.
        """
        context = self._context
        frames: dict[NodeId, list[_Want]] = {}
        rest: dict[NodeId, list[_Want]] = {}
        for want in wants:
            replicas = context.replicas(want.key)
            want.begin(replicas.epoch, replicas.nodes)
            if not context.rules.read_majority:
                want.quorum = 1
            if want.source not in replicas.nodes:
                want.source = self._source(replicas.nodes)
            first = self._first(replicas.nodes, want.source, want.quorum)
            for node in replicas.nodes:
                (frames if node in first else rest).setdefault(node, []).append(want)
        gathering = _Gathering(len(wants), len(frames), rest)
        gathering.unheard.update(dict.fromkeys(frames))
        for node, asked in frames.items():
            self._ask(node, asked, gathering)
        self._look_soon(gathering, deadline, MAJORITY_WAIT_S if rest else math.inf)
        try:
            return await gathering.done
        finally:
            gathering.timer.cancel()

    def _look_soon(self, gathering: _Gathering, deadline: float, pause_s: float) -> None:
        loop, left_s = asyncio.get_running_loop(), self._context.remaining(deadline)
        if left_s <= pause_s:
            gathering.timer = loop.call_later(left_s, gathering.expire)
        else:
            gathering.timer = loop.call_later(pause_s, self._look, gathering, deadline)

    def _look(self, gathering: _Gathering, deadline: float) -> None:
        """Those asked first, or those that are left, have not answered yet."""
        self._ask_rest(gathering)
        self._look_soon(gathering, deadline, MAJORITY_WAIT_S)

    def _ask_rest(self, gathering: _Gathering) -> None:
        """Ask the replicas that were not asked at first of the groups that are not read yet.

        Where the first two do not agree it hangs on a third. If he is silent the round ends: what keeps them apart may
        be gone the next time, or is settled.
        """
        rest, gathering.rest = gathering.rest, {}
        for node, asked in rest.items():
            if not gathering.done.done() and (wants := [want for want in asked if not want.finished]):
                gathering.unheard[node] = None
                self._ask(node, wants, gathering)
        if not gathering.done.done() and not any(map(self._context.network.alive, gathering.unheard)):
            self._context.count("reads_given_up")
            gathering.end()

    def _source(self, nodes: tuple[NodeId, ...]) -> NodeId:
        if self._context.node in nodes:
            return self._context.node
        return next((node for node in nodes if self._context.network.alive(node)), nodes[0])

    def _first(self, nodes: tuple[NodeId, ...], source: NodeId | None, quorum: int) -> list[NodeId]:
        """A majority with the source in it, those that live before the others, the coordinator before its followers."""
        others = [node for node in nodes if node != source]
        if len(others) >= quorum:
            others.sort(key=lambda node: node != self._context.node and not self._context.network.alive(node))
        return [*([source] if source is not None else []), *others][:quorum]

    def _ask(self, node: NodeId, wants: list[_Want], gathering: _Gathering) -> None:
        """Begin to ask one replica; what the own one has, and may tell already, is taken at once."""
        own = node == self._context.node
        items = tuple(
            ReadItem(
                want.key,
                want.epoch,
                want.wanted if node == want.source and not own else Wanted.BALLOT,
                want.known if want.wanted == Wanted.DATA else None,
            )
            for want in wants
        )
        request = ReadReplica(items)
        heard = partial(self._heard, node, wants, gathering)
        if not own:
            self._context.ask(node, request, PEER_TIMEOUT_S, heard)
            return
        try:
            reply, number = self._acceptor.read(request)
        except DhtError as error:
            heard(error)
            return
        self._acceptor.when_durable(number, None, lambda error: heard(reply if error is None else error))

    def _heard(self, node: NodeId, wants: list[_Want], gathering: _Gathering, reply: Struct | DhtError) -> None:
        """One replica's reply, or what came instead of one."""
        states: Sequence[ReplicaState | None] = [None] * len(wants)
        if not isinstance(reply, ReadReplicaReply):
            self._context.count("read_replies_lost")
        else:
            gathering.link = max(gathering.link, reply.link)
            if len(reply.items) == len(wants):
                states = reply.items
        gathering.unheard.pop(node, None)
        for want, state in zip(wants, states, strict=True):
            self._take(node, want, state, gathering)
        gathering.asked -= 1
        if not gathering.asked and gathering.rest:
            self._ask_rest(gathering)

    def _take(self, node: NodeId, want: _Want, state: ReplicaState | None, gathering: _Gathering) -> None:
        if want.finished or gathering.done.done():
            return
        want.open -= 1
        if state is not None and state.serving:
            want.states[node] = state
            self._try(want)
        elif state is not None:
            gathering.refused = True
        if want.finished:
            gathering.one_less()

    def _try(self, want: _Want) -> None:
        """Finish the want if a majority agrees and its data is here."""
        if len(want.states) < want.quorum:
            return
        votes: dict[Ballot, int] = {}
        for state in want.states.values():
            votes[state.accepted] = votes.get(state.accepted, 0) + 1
        ballot = max(votes, key=lambda accepted: votes[accepted])
        rules = self._context.rules
        if not rules.read_same_ballot:
            source = want.states.get(want.source or b"")
            ballot = source.accepted if source is not None else ballot
        elif votes[ballot] < want.quorum or not self._chosen(want, ballot, votes[ballot]):
            if rules.read_writes_back:
                return
            ballot = max(votes)
        self._finish(want, ballot)

    def _chosen(self, want: _Want, ballot: Ballot, holders: int) -> bool:
        """Whether the ballot at which a majority stands is chosen."""
        if not self._context.rules.inherited_marked or proven(ballot, want.epoch, holders, len(want.nodes)):
            return True
        return any(state.chosen for state in want.states.values() if state.accepted == ballot)

    def _finish(self, want: _Want, ballot: Ballot) -> None:
        agreeing = [node for node, state in want.states.items() if state.accepted == ballot]
        intents = want.states[agreeing[0]].intents if agreeing else 0
        rows: dict[RowKey, bytes] | None = None
        if ballot == ZERO:
            # What may have been collected was below the floor, so a transaction begins to count from there.
            ballot = max((want.states[node].floor for node in agreeing), default=ZERO)
            rows = {} if want.wanted == Wanted.SYSTEM or want.known != ballot else None
        elif want.wanted == Wanted.SYSTEM or want.known != ballot:
            rows = self._rows(want, ballot)
            if rows is None:
                # The majority stands where the source does not, or it is silent: next time another gives the data.
                if agreeing:
                    want.source = agreeing[0]
                return
        want.ballot, want.rows, want.intents = ballot, rows, intents

    def _rows(self, want: _Want, ballot: Ballot) -> dict[RowKey, bytes] | None:
        """Rows of exactly that ballot: a peer's, the coordinator's cached ones, or those of the own file."""
        for state in want.states.values():
            if state.rows is not None and (state.accepted == ballot or not self._context.rules.read_exact_data):
                return state.rows
        if self._context.node in want.states:
            cached = self._coordinator.cached(want.key)
            if cached is not None and cached.ballot == ballot and want.wanted == Wanted.DATA:
                return cached.data()
            if self._context.file.header(want.key).accepted == ballot:
                return self._acceptor.rows(want.key, want.wanted)
        return None


class _Gathering:
    """The end of a round: all wants finished. `link`: the newest roster link that a replica told.

    `refused`: a replica did not serve a tablet as we asked, so our view of it is old. `asked`: frames at first that are
    not answered; `rest`: what the other replicas can be asked; `unheard`: who was asked and did not answer.
    """

    __slots__ = ("_open", "asked", "done", "link", "refused", "rest", "timer", "unheard")

    def __init__(self, wants: int, asked: int, rest: dict[NodeId, list[_Want]]) -> None:
        self.asked = asked
        self.rest = rest
        self.done: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.unheard: dict[NodeId, None] = {}
        self.link = 0
        self.refused = False
        self._open = wants
        self.timer: asyncio.TimerHandle
        if not wants:
            self.done.set_result(None)

    def one_less(self) -> None:
        self._open -= 1
        if not self._open:
            self.end()

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(self.link if self.refused else None)

    def expire(self) -> None:
        """No time is left for anything that was learned."""
        self.refused = False
        self.end()
