"""The proposer of a node: a queue, a cached state and a promise for each group that it writes (DESIGN section 6).

A write is one round trip: the state is cached, the ballot was promised with the accept before, so the coordinator
decides the waiting operations on the state and sends one accept. The rules that make the shortcut safe:

* one accept in flight per group; what arrives meanwhile goes into the next one together;
* state and promise are used only while a quorum stands there as far as known: after an accept without quorum, and when
  any reply names a higher ballot, both are dropped, and nothing is decided before a new prepare;
* an operation that was in an accept without quorum may yet be applied, if a later prepare finds that accept. It is
  decided again on the newly prepared state, where the window tells whether it was applied; its refusal is recorded, and
  so answered only when a write at a higher ballot is chosen, after which the lost accept can never be found again;
* no answer rests on a state that is not known to be chosen: applied operations are answered at the accept's quorum,
  and with them what was refused on the way; a batch that changes nothing is answered when a quorum confirms the cached
  ballot, or after an accept that finishes what an earlier proposer left;
* a promise never crosses a tablet epoch.

Whoever asked waits with his own deadline; an operation that nobody waits for any more is left out. It was certainly not
applied if it was in no accept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from dht.domain.roster import TabletReplicas
from dht.errors import DhtError, Indeterminate, NotServing, Unavailable
from dht.limits import GROUP_QUEUE_WRITES_MAX
from dht.model import Ballot, GroupKey
from dht.register import group, operations
from dht.register.context import Context
from dht.register.group import REFUSED, WRITE_OPERATIONS_MAX, Delta, GroupState
from dht.register.messages import Coordinated, Kind, Operation
from dht.register.operations import Blocked, Lost
from dht.register.reach import Reach
from dht.register.rounds import Rounds, Standing

CACHE_BYTES_MAX = 64 * 1024 * 1024
_GROUP_OVERHEAD_BYTES = 2_000


class _Waiting:
    """An operation in a group's queue. `sent`: it was in an accept, so it may be applied whatever comes."""

    __slots__ = ("answer", "attempt", "error", "first", "future", "operation", "seen", "sent")

    def __init__(self, operation: Operation, attempt: int, first: bool) -> None:
        self.operation = operation
        self.seen = operation.part.seen
        self.attempt = attempt
        self.first = first
        self.sent = False
        self.future: asyncio.Future[Coordinated] = asyncio.get_running_loop().create_future()
        self.answer: Coordinated | None = None
        self.error: DhtError | None = None

    def expire(self) -> None:
        """The time of whoever waits is over."""
        if self.future.done():
            return
        group = f"group {self.operation.part.key.hex()}"
        if self.sent:
            text = f"the write was sent to the replicas of {group} and no majority answered in time"
            self.future.set_exception(Indeterminate(text))
        else:
            self.future.set_exception(Unavailable(f"no majority of the replicas of {group} answered in time"))


class _Group:
    """A group's queue and standing."""

    __slots__ = ("queue", "running", "standing")

    def __init__(self, key: GroupKey) -> None:
        self.queue: list[_Waiting] = []
        self.running = False
        self.standing = Standing(key)


class Coordinator:
    """Decides operations on groups of which this node is a replica.

    `adopt` finishes decisions whose node is gone; set where the node is composed.
    """

    def __init__(self, context: Context, rounds: Rounds, reach: Reach) -> None:
        self._context = context
        self._reach = reach
        self._rounds = rounds
        self._groups: OrderedDict[GroupKey, _Group] = OrderedDict()
        self._adopting: dict[GroupKey, None] = {}
        self.adopt: Callable[[GroupKey], Awaitable[None]]
        self._cached_bytes = 0

    async def run(self, operation: Operation, attempt: int, first: bool, deadline: float) -> Coordinated:
        """The operation's outcome. `first`: this is certainly the first time that any node sees it.

        Raises what refused it; Blocked when another transaction's intent holds the group (not applied by this call);
        Unavailable when it was certainly not applied by this call, Indeterminate when it may have been.
        """
        key = operation.part.key
        held = self._groups.get(key)
        if held is None:
            held = self._groups[key] = _Group(key)
            self._cached_bytes += _GROUP_OVERHEAD_BYTES
        if len(held.queue) >= GROUP_QUEUE_WRITES_MAX:
            raise Unavailable(f"{len(held.queue)} writes wait for group {key.hex()}; try again later")
        waiting = _Waiting(operation, attempt, first)
        held.queue.append(waiting)
        if not held.running:
            held.running = True
            self._context.spawn(self._work(held))
        timer = asyncio.get_running_loop().call_later(self._context.remaining(deadline), waiting.expire)
        try:
            return await waiting.future
        finally:
            timer.cancel()

    def cached(self, key: GroupKey) -> GroupState | None:
        """The state held of the group, whatever its worth: compare its ballot with a quorum's before use."""
        held = self._groups.get(key)
        return None if held is None else held.standing.state

    def dump(self) -> list[dict[str, object]]:
        """What is held of each group, for the status commands."""
        return [
            {
                "group": key.hex(),
                "queue": len(held.queue),
                "running": held.running,
                "ballot": None if held.standing.state is None else tuple(held.standing.state.ballot),
                "promised": held.standing.promised is not None,
                "bytes": held.standing.size_bytes,
            }
            for key, held in self._groups.items()
        ]

    def forget(self, key: GroupKey) -> None:
        """Drop what is cached of an idle group, so that its next operation begins with a prepare."""
        held = self._groups.get(key)
        if held is not None and not held.running:
            held.standing.drop()

    async def _work(self, held: _Group) -> None:
        """Serve the queue until it is empty; the only place that proposes for the group."""
        batch: list[_Waiting] = []
        try:
            while waiting := [one for one in batch + held.queue if not one.future.done()]:
                count = _together(waiting) if self._context.rules.empty_bound else WRITE_OPERATIONS_MAX
                batch, held.queue = waiting[:count], waiting[count:]
                self._groups.move_to_end(held.standing.key)
                if not await self._round(held.standing, batch):
                    await self._context.back_off()
        except DhtError as error:
            self._fail(held, batch, error)
        except BaseException:
            # A bug here, or the end of the node: what was decided and not accepted must not stay in the state.
            self._fail(held, batch, Unavailable("it failed or was stopped in the middle"))
            raise
        finally:
            held.queue = []
            held.running = False
            self._account(held)

    def _fail(self, held: _Group, batch: list[_Waiting], error: DhtError) -> None:
        """The own disk failed, or the tablet is not ours: this node can decide nothing here."""
        held.standing.drop()
        for waiting in {id(waiting): waiting for waiting in batch + held.queue}.values():
            if not waiting.future.done():
                text = f"this node cannot coordinate the group: {error.message}"
                lost = Lost(text, waiting.seen, **error.detail) if waiting.sent else Unavailable(text, **error.detail)
                waiting.future.set_exception(lost)

    async def _round(self, standing: Standing, batch: list[_Waiting]) -> bool:
        """Decide the batch. False: nothing was decided, wait and try again with what is still waited for."""
        context = self._context
        replicas = context.replicas(standing.key)
        if context.node not in replicas.nodes:
            raise NotServing(f"this node is no replica of group {standing.key.hex()}")
        self._reach.check(replicas.nodes, f"group {standing.key.hex()} cannot be written")
        fresh = False
        if not self._usable(standing, replicas):
            standing.drop()
            if not await self._rounds.prepare(standing, replicas):
                standing.drop()
                return False
            fresh = True
            if standing.state is not None and standing.state.decisions:
                self._adopt_soon(standing.key)
        state, ballot = standing.state, standing.promised
        assert state is not None
        assert ballot is not None
        base = state.ballot
        delta = self._decide(standing, state, ballot, batch)
        decided = [waiting for waiting in batch if waiting.answer is not None or waiting.error is not None]
        if not decided:
            return True
        anew = any(
            operations.accepts_anew(waiting.operation, waiting.answer.outcome, context.rules)
            for waiting in decided
            if waiting.answer is not None
        )
        if not delta and standing.settled and not anew:
            if not fresh and context.rules.confirm_refusal and not await self._rounds.confirm(standing, replicas):
                standing.drop()
                _reopen(decided)
                return False
        else:
            if not delta:
                # What finishes a group without rows is its first accept too: its floor must outlive it.
                group.pin_floor(state, delta)
                state.apply(delta)
            if not await self._accept(standing, replicas, base, delta, decided, promise=not anew):
                return False
        _answer(decided)
        return True

    def _adopt_soon(self, key: GroupKey) -> None:
        """A decision came with a state that was not ours: its transaction's node may be gone, so look again later."""
        if key not in self._adopting:
            self._adopting[key] = None
            self._context.spawn(self._adopt(key))

    async def _adopt(self, key: GroupKey) -> None:
        try:
            await self.adopt(key)
        finally:
            self._adopting.pop(key, None)

    def _usable(self, standing: Standing, replicas: TabletReplicas) -> bool:
        promised = standing.promised
        if standing.state is None or promised is None or standing.heard > promised:
            return False
        generation = self._context.domain.generation
        if promised.epoch == replicas.epoch and promised.generation == generation:
            return True
        if self._context.rules.promise_not_across_epochs:
            return False
        standing.promised = promised._replace(epoch=replicas.epoch)
        return True

    def _decide(self, standing: Standing, state: GroupState, ballot: Ballot, batch: list[_Waiting]) -> Delta:
        """Give each operation its answer or error, on the state that the ones before it leave; the merged delta."""
        delta: Delta = {}
        rules = self._context.rules
        for waiting in batch:
            operation = waiting.operation
            waiting.answer = waiting.error = None
            if waiting.future.done():
                # His time ran out during the prepare, and he was told that the write is certainly not applied.
                continue
            ends = operation.kind == Kind.ABORT and rules.end_is_not_first
            if waiting.seen is None and waiting.first and not waiting.sent and not ends:
                # Nobody else has seen this operation, so what it sees first is the state as it is now. Who ends a
                # transaction speaks of what others sent before, and may have been forgotten since.
                waiting.seen = max(state.ballot, state.floor)
            step: Delta = {}
            try:
                step, at, outcome = operations.perform(
                    state,
                    operation,
                    waiting.seen,
                    waiting.attempt,
                    ballot,
                    rules,
                    standing.version,
                    chosen=standing.settled and not delta,
                )
                waiting.answer = Coordinated(at, outcome)
            except Blocked as blocked:
                blocked.sent, blocked.seen = waiting.sent, waiting.seen
                waiting.future.set_exception(blocked)
                continue
            except DhtError as error:
                waiting.error = error
                if operations.must_record(operation, waiting.attempt, rules) and _certain(error):
                    step = {}
                    if operation.id not in state.window:
                        group.remember(state, step, operation.id, ballot, REFUSED, error)
            if step:
                group.pin_floor(state, step)
                state.apply(step)
                delta.update(step)
        return delta

    async def _accept(
        self,
        standing: Standing,
        replicas: TabletReplicas,
        base: Ballot,
        delta: Delta,
        decided: list[_Waiting],
        *,
        promise: bool,
    ) -> bool:
        """`promise`: the accept brings the promise of the next ballot along."""
        state, ballot = standing.state, standing.promised
        assert state is not None
        assert ballot is not None
        following = self._context.ballot(ballot.epoch, ballot.round + 1) if promise else None
        state.ballot = ballot
        standing.promised = None
        for waiting in decided:
            waiting.sent = True
        if not self._context.rules.one_accept_in_flight:
            standing.promised = following
            self._context.spawn(self._rounds.accept(standing, replicas, base, delta, following))
            return True
        if await self._rounds.accept(standing, replicas, base, delta, following):
            standing.promised = following
            standing.settled = self._context.file.header(standing.key).accepted == ballot
            self._context.count("accepts")
            return True
        self._context.count("accepts_failed")
        if self._context.rules.drop_after_failed_accept:
            standing.drop()
        else:
            standing.promised = following
        for waiting in decided:
            waiting.attempt = max(1, waiting.attempt)
        _reopen(decided)
        return False

    def _account(self, held: _Group) -> None:
        """Keep the cache within its bytes: the groups used longest ago go first, busy ones stay."""
        state = held.standing.state
        size = state.size_bytes if state is not None else 0
        self._cached_bytes += size - held.standing.size_bytes
        held.standing.size_bytes = size
        while self._cached_bytes > CACHE_BYTES_MAX:
            oldest = next((key for key, other in self._groups.items() if not other.running), None)
            if oldest is None:
                return
            self._cached_bytes -= self._groups.pop(oldest).standing.size_bytes + _GROUP_OVERHEAD_BYTES


def _certain(error: DhtError) -> bool:
    """Whether the error says that the operation is not applied (an Indeterminate from the window does not)."""
    return not isinstance(error, Indeterminate)


def _together(waiting: list[_Waiting]) -> int:
    """How many of the first go into one accept: nothing behind an order to empty the group.

    The order's answer is the accept's ballot, up to which its sender takes the group for empty.
    """
    orders = [one.operation.kind == Kind.EMPTY for one in waiting[:WRITE_OPERATIONS_MAX]]
    return next((at for at in range(1, len(orders)) if orders[at - 1] and not orders[at]), len(orders))


def _reopen(decided: list[_Waiting]) -> None:
    for waiting in decided:
        waiting.answer = waiting.error = None


def _answer(decided: list[_Waiting]) -> None:
    for waiting in decided:
        if waiting.future.done():
            continue
        if waiting.error is not None:
            waiting.future.set_exception(waiting.error)
        elif waiting.answer is not None:
            waiting.future.set_result(waiting.answer)
