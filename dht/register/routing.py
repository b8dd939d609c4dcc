"""The way of an operation to the coordinator of its group, and what comes of it (DESIGN section 6).

The coordinator is the first live replica in the tablet's list. Whoever else has an operation forwards it; a receiver
that is not the coordinator either passes it on, once; whoever gets it passed on does it, for any replica may propose.
A forward of unknown outcome is tried at the next replica as the next attempt of the same transaction, which the group's
window makes safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dht.domain.roster import TabletReplicas
from dht.errors import (
    Conflict,
    DhtError,
    Indeterminate,
    NotServing,
    RemoteProtocolError,
    StorageError,
    Unavailable,
)
from dht.model import GroupKey, NodeId
from dht.register.admission import check_operation
from dht.register.context import Context
from dht.register.coordinator import Coordinator
from dht.register.messages import Coordinate, Coordinated, Kind, Operation
from dht.register.operations import Blocked, Intent, Lost
from dht.register.reach import Reach
from dht.register.rounds import expect

FORWARD_TIMEOUT_S = 3.0
FORWARD_REPLY_S = 0.25
"""How much earlier than its asker a coordinator gives up, for its reply to be in time: what only waited in its queue
was certainly not applied, and must not be tried elsewhere as what may have been."""
FORWARD_CHECK_S = 0.02
"""How often a waiting forward looks whether its coordinator still answers anything at all."""
FORWARD_TO_SILENT_S = 0.25
"""How long a coordinator that is silent already is given to prove that it is not."""
PREPARE_WAIT_S = 0.25
"""How long a step of a transaction waits, with intents of its own elsewhere, before it gives way: two that wait for
each other must not both wait for the intent timeout."""

Unblock = Callable[[GroupKey, Intent, float], Awaitable[None]]


class Router:
    """Brings operations to coordinators. `unblock` waits for an intent or ends it; set where the node is composed."""

    def __init__(self, context: Context, coordinator: Coordinator, reach: Reach) -> None:
        self._context = context
        self._reach = reach
        self._coordinator = coordinator
        self.unblock: Unblock

    async def submit(self, operation: Operation, attempt: int, deadline: float) -> Coordinated:
        """Do the operation wherever it belongs.

        Raises what refused it; Unavailable when it was certainly not applied, Indeterminate when it may have been.
        """
        context = self._context
        key = operation.part.key
        tried: dict[NodeId, None] = {}
        elsewhere = uncertain = cut_off = False
        refused = 0
        """By how many that were tried since the last pause, because they hear no majority."""
        last: DhtError | None = None
        while (left := context.remaining(deadline)) > 0:
            replicas = context.replicas(key)
            try:
                self._reach.check_any(replicas.nodes, f"group {key.hex()} cannot be written")
            except Unavailable as error:
                last, cut_off = error, True
                break
            target = self._target(replicas, tried)
            try:
                if target == context.node:
                    return await self.execute(operation, attempt, not attempt and not elsewhere, deadline)
                elsewhere = True
                timeout_s = min(left, FORWARD_TIMEOUT_S)
                context.count("forwards")
                request = Coordinate(operation, attempt, False, _served_ms(timeout_s))
                return await self._forward(target, request, timeout_s)
            except NotServing as error:
                last = error
                await self._catch_up(error)
            except Unavailable as error:
                last = error
                refused += bool(error.detail.get("cut_off"))
            except (Indeterminate, RemoteProtocolError, StorageError) as error:
                # A reply that cannot be understood, or a disk that failed on the way, tells nothing either.
                if error.detail.get("forgotten"):
                    raise  # the window's own answer; nobody will know more
                last = error
                uncertain = True
                attempt += 1
                if isinstance(error, Lost) and context.rules.seen_kept:
                    operation = operation.seeing(error.seen)
            tried[target] = None
            nodes = context.replicas(key).nodes
            if refused and refused >= self._reach.heard(nodes):
                # Whoever of them is heard hears no majority; the silent ones need not be tried for that.
                cut_off = True
                break
            if len(tried) >= len(nodes):
                tried.clear()
                refused = 0
                await context.back_off()
        raise _unwritten(operation, last.message if last else "no time was left", uncertain, cut_off)

    async def submit_to(self, target: NodeId, operation: Operation, deadline: float) -> Coordinated:
        """The same at that replica, whoever is the coordinator, once."""
        if target == self._context.node:
            return await self.execute(operation, 0, True, deadline)
        timeout_s = self._context.remaining(deadline)
        return await self._forward(target, Coordinate(operation, 0, True, _served_ms(timeout_s)), timeout_s)

    async def _forward(self, target: NodeId, request: Coordinate, timeout_s: float) -> Coordinated:
        """The coordinator's answer. A coordinator that hangs is given up when it falls silent, not at the timeout.

        Raises Indeterminate then: it may still do it, and the next attempt finds that in the window.
        """
        network = self._context.network
        if not network.alive(target):
            return expect(await network.call(target, request, min(timeout_s, FORWARD_TO_SILENT_S)), Coordinated)
        call = asyncio.ensure_future(network.call(target, request, timeout_s))
        try:
            while not (await asyncio.wait((call,), timeout=FORWARD_CHECK_S))[0]:
                if not network.alive(target):
                    self._context.count("forwards_given_up")
                    raise Indeterminate(f"coordinator {target.hex()} fell silent before it answered")
            return expect(call.result(), Coordinated)
        finally:
            call.cancel()

    def coordinates(self, key: GroupKey) -> bool:
        """Whether this node is the coordinator of the group, as far as it knows."""
        return self._target(self._context.replicas(key), {}) == self._context.node

    def _target(self, replicas: TabletReplicas, tried: dict[NodeId, None]) -> NodeId:
        """The first live replica that was not tried, else the first that was not tried, else the first."""
        rest = [node for node in replicas.nodes if node not in tried]
        for node in rest:
            if node == self._context.node or self._context.network.alive(node):
                return node
        return rest[0] if rest else replicas.nodes[0]

    async def serve(self, request: Coordinate) -> Coordinated:
        """A peer's forward."""
        check_operation(request.operation)
        context = self._context
        operation = request.operation
        deadline = context.clock.monotonic() + request.timeout_ms / 1000
        replicas = context.replicas(operation.part.key)
        target = self._target(replicas, {})
        mine = context.node in replicas.nodes
        if mine and (request.passed or target == context.node):
            return await self.execute(operation, request.attempt, False, deadline)
        if request.passed:
            raise NotServing("this node is no replica of the group", roster_epoch=context.domain.roster.epoch)
        context.count("passed_on")
        timeout_s = request.timeout_ms / 1000
        onward = Coordinate(operation, request.attempt, True, _served_ms(timeout_s))
        try:
            return await self._forward(target, onward, timeout_s)
        except NotServing:
            raise
        except Unavailable:
            if not mine:
                raise
        return await self.execute(operation, request.attempt, False, deadline)

    async def execute(self, operation: Operation, attempt: int, first: bool, deadline: float) -> Coordinated:
        """Do it here, as coordinator, waiting for the intents of others."""
        context = self._context
        began = context.clock.monotonic()
        patience = PREPARE_WAIT_S * (1 + context.chance.random())
        sent = False
        while True:
            try:
                return await self._coordinator.run(operation, attempt, first, deadline)
            except Blocked as blocked:
                context.count("blocked")
                if blocked.sent:
                    sent, first, attempt = True, False, max(1, attempt)
                    if context.rules.seen_kept:
                        operation = operation.seeing(blocked.seen)
                holds_others = operation.kind in (Kind.PREPARE, Kind.COMMIT_PRIMARY)
                if holds_others and not sent and context.clock.monotonic() - began > patience:
                    # Not recorded, so it does not end an attempt that may still be on its way at another coordinator.
                    raise Conflict(
                        "another transaction holds one of the groups; run the transaction again",
                        part=operation.part_index,
                        what="intent",
                        index=0,
                        retried=attempt > 0,
                    ) from None
                try:
                    await self.unblock(operation.part.key, blocked.intent, deadline)
                except (Unavailable, Indeterminate) as error:
                    if context.remaining(deadline) <= 0:
                        raise _undecided(operation, sent, error) from None
                    await context.back_off()
                if context.remaining(deadline) <= 0:
                    raise _undecided(operation, sent, blocked) from None
            except Unavailable as error:
                if sent:
                    raise _undecided(operation, sent, error) from None
                raise

    async def _catch_up(self, error: NotServing) -> None:
        try:
            await self._context.catch_up(error)
        except DhtError:
            self._context.count("refreshes_failed")


def _served_ms(timeout_s: float) -> int:
    """The time that a coordinator is given by who waits so long for it."""
    return int(1000 * max(timeout_s - FORWARD_REPLY_S, timeout_s / 2))


def _unwritten(operation: Operation, why: str, uncertain: bool, cut_off: bool) -> DhtError:
    """What is told when nobody did it. `uncertain`: somebody may have."""
    group = operation.part.key.hex()
    if uncertain:
        return Indeterminate(f"the outcome of a write to group {group} is not known: {why}", id=operation.id)
    if cut_off:
        return Unavailable(f"nothing was applied: {why}", cut_off=True)
    return Unavailable(f"group {group} cannot be written now, nothing was applied: {why}")


def _undecided(operation: Operation, sent: bool, why: DhtError) -> DhtError:
    text = f"group {operation.part.key.hex()} is held by another transaction: {why.message}"
    return Lost(text, operation.part.seen) if sent else Unavailable(text)
