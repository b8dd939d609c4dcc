"""The daemon's side of the `lucd://` transport: messages between the processes of one host, kept in memory.

A topic, a server of a topic and a pool of a topic each have a queue; a listener waits at several. Calls are answered
on the caller's own connection. As with RabbitMQ and its transient queues, what waits here is lost with the daemon:
callers learn of it at once, because their connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dht.codec import Message
from dht.errors import Indeterminate, Invalid, NotFound, Unavailable
from dht.model import Struct
from dht.requests import Done
from dht.wire.frames import time_left_s
from dht.wire.local import Connection
from nova_bridge.rpc.bus_messages import (
    Acknowledge,
    Address,
    Answered,
    Call,
    Cast,
    Delivery,
    Heartbeat,
    Reply,
    Requeue,
    StopTaking,
    Subscribe,
    Subscribed,
    Take,
    Taken,
)

QUEUES_MAX = 10_000
QUEUE_MESSAGES_MAX = 10_000
UNHEARD_MESSAGES_MAX = 1_000
"""How many messages a queue without listeners keeps; the oldest go first."""
QUEUED_BYTES_MAX = 256 * 1024 * 1024
LISTENERS_MAX = 10_000
ADDRESSES_PER_LISTENER_MAX = 1_000
TAKEN_MESSAGES_MAX = 1_000
TAKEN_BYTES_MAX = 8 * 1024 * 1024


@dataclass(eq=False, slots=True)
class _Waiting:
    """A call whose caller waits. `listener`: who has taken it."""

    id: int
    monitor_s: float
    answer: asyncio.Future[bytes]
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    listener: _Listener | None = None


@dataclass(eq=False, slots=True)
class _Envelope:
    """A message on its way. A call that nobody waits for any more is not delivered."""

    body: bytes
    call: _Waiting | None = None

    @property
    def stale(self) -> bool:
        return self.call is not None and self.call.answer.done()


class _Queue:
    """Messages of one address in order, and the listeners there, the one whose turn is next first."""

    def __init__(self) -> None:
        self.messages: deque[_Envelope] = deque()
        self.listeners: OrderedDict[int, _Listener] = OrderedDict()


class _Listener:
    def __init__(self, number: int, connection: Connection, request: Subscribe) -> None:
        self.number = number
        self.connection = connection
        self.addresses = request.addresses
        self.fanout = request.fanout
        self.acknowledges = request.acknowledges
        self.copies: deque[_Envelope] = deque()
        """What was fanned out to this listener alone."""
        self.waiter: asyncio.Future[None] | None = None
        self.stopped = False
        self.outstanding: dict[int, tuple[_Queue | None, _Envelope]] = {}
        """Deliveries to be acknowledged, and the queues that they came from."""
        self.calls: dict[int, _Waiting] = {}
        """Calls taken and not replied to."""

    @property
    def waits(self) -> bool:
        return self.waiter is not None and not self.waiter.done()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Bus:
    """Routes messages between the local door's connections.

    `counters` since the start: casts, calls, delivered, replies, dropped (too old or too many for a queue that nobody
    listens to), and now: listeners, queued_messages, queued_bytes.
    """

    def __init__(self) -> None:
        self.counters = dict.fromkeys(
            ("casts", "calls", "delivered", "replies", "dropped", "listeners", "queued_messages", "queued_bytes"), 0
        )
        self._queues: dict[Address, _Queue] = {}
        self._pools: dict[tuple[str, str], dict[Address, None]] = {}
        self._fanouts: dict[tuple[str, str], dict[int, _Listener]] = {}
        self._listeners: dict[int, _Listener] = {}
        self._calls: dict[int, _Waiting] = {}
        self._numbers = itertools.count(1)

    async def answer(self, connection: Connection, message: Message) -> Struct:
        """Serve one request of a local client. Raises Invalid, NotFound, Unavailable (full) and for a call
        Indeterminate (its server died, or showed no sign of life)."""
        match message:
            case Cast():
                return self._cast(message)
            case Call():
                return await self._call(message)
            case Subscribe():
                return self._subscribe(connection, message)
            case Take():
                return await self._take(connection, message)
            case StopTaking(number):
                listener = self._listener(number)
                listener.stopped = True
                listener.wake()
                return Done()
            case Acknowledge(listener, delivery):
                return Done(self._settle(listener, delivery, again=False))
            case Requeue(listener, delivery):
                return Done(self._settle(listener, delivery, again=True))
            case Reply(call, body):
                return Done(self._reply(call, body))
            case Heartbeat(call):
                return Done(self._heartbeat(call))
            case _:
                raise Invalid(f"{type(message).__name__} is not a request to the bus")

    def _cast(self, message: Cast) -> Done:
        self.counters["casts"] += 1
        if not message.fanout:
            return Done(self._route(message.address, _Envelope(message.body)))
        listeners = list(self._fanouts.get((message.address.exchange, message.address.topic), {}).values())
        for listener in listeners:
            if len(listener.copies) >= QUEUE_MESSAGES_MAX:
                self._unqueued(listener.copies.popleft())
                self.counters["dropped"] += 1
            self._queued(_Envelope(message.body), listener.copies)
            listener.wake()
        return Done(bool(listeners))

    async def _call(self, message: Call) -> Answered:
        self.counters["calls"] += 1
        call = _Waiting(next(self._numbers), message.monitor_ms / 1000, asyncio.get_running_loop().create_future())
        self._calls[call.id] = call
        try:
            self._route(message.address, _Envelope(message.body, call))
            if not call.monitor_s:
                return Answered(await call.answer)
            return Answered(await self._monitored(call))
        finally:
            # Also when the caller disappears: the envelope is stale from now on.
            call.answer.cancel()
            del self._calls[call.id]
            if call.listener is not None:
                call.listener.calls.pop(call.id, None)

    async def _monitored(self, call: _Waiting) -> bytes:
        while True:
            call.heard.clear()
            heard = asyncio.ensure_future(call.heard.wait())
            try:
                waits = (call.answer, heard)
                done, _ = await asyncio.wait(waits, timeout=call.monitor_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                heard.cancel()
            if call.answer in done:
                return call.answer.result()
            if not done:
                raise Indeterminate(f"the call's server showed no sign of life for {call.monitor_s:.1f} s")

    def _route(self, address: Address, envelope: _Envelope) -> bool:
        """Queue the message at its address, and a copy in each pool. Returns whether somebody listens there."""
        targets = [address]
        if not address.server and envelope.call is None:
            pools = list(self._pools.get((address.exchange, address.topic), ()))
            targets = [address, *pools] if address in self._queues or not pools else pools
        heard = False
        for target in targets:
            queue = self._queue(target)
            if len(queue.messages) >= (QUEUE_MESSAGES_MAX if queue.listeners else UNHEARD_MESSAGES_MAX):
                self._make_room(target, queue)
            self._queued(envelope, queue.messages)
            heard = heard or bool(queue.listeners)
            self._wake_one(queue)
        return heard

    def _make_room(self, address: Address, queue: _Queue) -> None:
        if queue.listeners:
            where = f"topic {address.topic}" + (f", server {address.server}" if address.server else "")
            raise Unavailable(
                f"{len(queue.messages)} messages wait for {where} already: its listeners are too slow; try later",
                sent=False,
            )
        self._unqueued(queue.messages.popleft())
        self.counters["dropped"] += 1

    def _queued(self, envelope: _Envelope, messages: deque[_Envelope]) -> None:
        if self.counters["queued_bytes"] + len(envelope.body) > QUEUED_BYTES_MAX:
            raise Unavailable(f"{self.counters['queued_bytes']} bytes wait in the bus already: try later", sent=False)
        messages.append(envelope)
        self._count_queued(envelope)

    def _count_queued(self, envelope: _Envelope) -> None:
        self.counters["queued_messages"] += 1
        self.counters["queued_bytes"] += len(envelope.body)

    def _unqueued(self, envelope: _Envelope) -> None:
        self.counters["queued_messages"] -= 1
        self.counters["queued_bytes"] -= len(envelope.body)

    def _wake_one(self, queue: _Queue) -> None:
        for number, listener in queue.listeners.items():
            if listener.waits:
                queue.listeners.move_to_end(number)
                listener.wake()
                return

    def _queue(self, address: Address) -> _Queue:
        queue = self._queues.get(address)
        if queue is None:
            if len(self._queues) >= QUEUES_MAX:
                self._forget_unheard()
            queue = self._queues[address] = _Queue()
            if address.pool:
                self._pools.setdefault((address.exchange, address.topic), {})[address] = None
        return queue

    def _forget_unheard(self) -> None:
        """Give up the oldest queue to which nobody listens."""
        for address, queue in self._queues.items():
            if not queue.listeners:
                self._drop_queue(address, queue)
                return
        raise Unavailable(f"the bus has {QUEUES_MAX} topics with listeners: no more can be made", sent=False)

    def _drop_queue(self, address: Address, queue: _Queue) -> None:
        for envelope in queue.messages:
            self._unqueued(envelope)
            self.counters["dropped"] += not envelope.stale
        del self._queues[address]
        pools = self._pools.get((address.exchange, address.topic))
        if pools is not None and pools.pop(address, 0) is None and not pools:
            del self._pools[address.exchange, address.topic]

    def _subscribe(self, connection: Connection, message: Subscribe) -> Subscribed:
        if not 0 < len(message.addresses) <= ADDRESSES_PER_LISTENER_MAX:
            raise Invalid(f"a listener has 1 to {ADDRESSES_PER_LISTENER_MAX} addresses, not {len(message.addresses)}")
        if len(self._listeners) >= LISTENERS_MAX:
            raise Unavailable(f"the bus has {LISTENERS_MAX} listeners: stop some", sent=False)
        listener = _Listener(next(self._numbers), connection, message)
        self._listeners[listener.number] = listener
        for address in listener.addresses:
            self._queue(address).listeners[listener.number] = listener
            if listener.fanout:
                self._fanouts.setdefault((address.exchange, address.topic), {})[listener.number] = listener
        connection.on_close.append(lambda: self._gone(listener))
        self.counters["listeners"] = len(self._listeners)
        return Subscribed(listener.number)

    def _gone(self, listener: _Listener) -> None:
        """A listener's connection ended: what it held goes to others, and its callers hear that it died."""
        del self._listeners[listener.number]
        self.counters["listeners"] = len(self._listeners)
        for address in listener.addresses:
            queue = self._queues.get(address)
            if queue is not None:
                queue.listeners.pop(listener.number, None)
            fanned = self._fanouts.get((address.exchange, address.topic), {})
            if fanned.pop(listener.number, None) is not None and not fanned:
                del self._fanouts[address.exchange, address.topic]
        for envelope in listener.copies:
            self._unqueued(envelope)
        for queue, envelope in reversed(list(listener.outstanding.values())):
            if queue is not None:
                queue.messages.appendleft(envelope)
                self._count_queued(envelope)
        for call in listener.calls.values():
            if not call.answer.done():
                call.answer.set_exception(Indeterminate("the server that had taken the call died before it replied"))
        for address in listener.addresses:
            queue = self._queues.get(address)
            if queue is not None and queue.messages:
                # It may have been woken for one of these and died before it took it.
                self._wake_one(queue)
            elif queue is not None and not queue.listeners:
                self._drop_queue(address, queue)

    def _listener(self, number: int) -> _Listener:
        listener = self._listeners.get(number)
        if listener is None:
            raise NotFound(f"there is no listener {number}: subscribe again")
        return listener

    async def _take(self, connection: Connection, message: Take) -> Taken:
        listener = self._listener(message.listener)
        if listener.connection is not connection or listener.waits:
            raise Invalid("a listener takes on the connection that subscribed, one request at a time")
        count = max(1, min(message.count, TAKEN_MESSAGES_MAX))
        deliveries = self._deliveries(listener, count)
        wait_s = min(message.wait_ms / 1000, time_left_s())
        if not deliveries and wait_s > 0 and not listener.stopped:
            listener.waiter = asyncio.get_running_loop().create_future()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await listener.waiter
            finally:
                listener.waiter = None
            deliveries = self._deliveries(listener, count)
        return Taken(tuple(deliveries))

    def _deliveries(self, listener: _Listener, count: int) -> list[Delivery]:
        taken: list[Delivery] = []
        size = 0
        for queue, envelope in self._waiting_for(listener):
            number = next(self._numbers)
            call = envelope.call
            if call is not None:
                call.listener = listener
                listener.calls[call.id] = call
            if listener.acknowledges:
                listener.outstanding[number] = queue, envelope
            monitor_ms = int(call.monitor_s * 1000) if call is not None else 0
            taken.append(Delivery(number, envelope.body, call.id if call is not None else 0, monitor_ms))
            size += len(envelope.body)
            if len(taken) >= count or size >= TAKEN_BYTES_MAX:
                break
        self.counters["delivered"] += len(taken)
        return taken

    def _waiting_for(self, listener: _Listener) -> Iterator[tuple[_Queue | None, _Envelope]]:
        """Take messages off the listener's queues, one of each in turn, as long as the caller asks for more."""
        queues = [self._queues[address] for address in listener.addresses if address in self._queues]
        found = True
        while found:
            found = False
            if listener.copies:
                found = True
                envelope = listener.copies.popleft()
                self._unqueued(envelope)
                yield None, envelope
            for queue in queues:
                while queue.messages:
                    envelope = queue.messages.popleft()
                    self._unqueued(envelope)
                    if not envelope.stale:
                        found = True
                        yield queue, envelope
                        break

    def _settle(self, number: int, delivery: int, *, again: bool) -> bool:
        listener = self._listeners.get(number)
        queue, envelope = listener.outstanding.pop(delivery, (None, None)) if listener is not None else (None, None)
        if listener is None or envelope is None:
            return False
        if again:
            if envelope.call is not None:
                listener.calls.pop(envelope.call.id, None)
                envelope.call.listener = None
            self._count_queued(envelope)
            if queue is None:
                listener.copies.append(envelope)
                listener.wake()
            else:
                queue.messages.append(envelope)
                self._wake_one(queue)
        return True

    def _reply(self, number: int, body: bytes) -> bool:
        call = self._calls.get(number)
        if call is None or call.answer.done():
            return False
        self.counters["replies"] += 1
        call.answer.set_result(body)
        return True

    def _heartbeat(self, number: int) -> bool:
        call = self._calls.get(number)
        if call is None:
            return False
        call.heard.set()
        return True
