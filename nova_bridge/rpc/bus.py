"""The daemon's side of the `lucd://` transport: messages of this host's processes, kept in memory.

A topic, a server of a topic and a pool of a topic each have a queue; a listener waits at several. Calls are answered
on the caller's own connection. As with RabbitMQ and its transient queues, what waits here is lost with the daemon:
callers learn of it at once, because their connection ends.

A message for which somebody listens on this host stays here. Else it is handed to a daemon where somebody does
(`nova_bridge.rpc.reach`), and waits here while there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

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
from nova_bridge.rpc.queues import Envelope, Listener, Queue, Waiting

QUEUES_MAX = 10_000
QUEUE_MESSAGES_MAX = 10_000
UNHEARD_MESSAGES_MAX = 1_000
"""How many messages a queue without listeners keeps; the oldest go first."""
QUEUED_BYTES_MAX = 256 * 1024 * 1024
LISTENERS_MAX = 10_000
ADDRESSES_PER_LISTENER_MAX = 1_000
TAKEN_MESSAGES_MAX = 1_000
TAKEN_BYTES_MAX = 8 * 1024 * 1024
OUTSTANDING_MESSAGES_MAX = 1_000
OUTSTANDING_BYTES_MAX = 64 * 1024 * 1024
"""A listener with so much to acknowledge gets no more: what its process holds back waits in the queues, within their
limits."""


TopicKey = tuple[str, str, str]
"""`Address.topic_key`."""


class Elsewhere(Protocol):
    """The daemons of other hosts, as a bus sees them."""

    def changed(self) -> None:
        """Who listens here has changed."""
        ...

    async def told(self) -> None:
        """Return when the others know who listens here, or after a bounded wait."""
        ...

    async def deliver(self, address: Address, envelope: Envelope) -> bool:
        """Hand the message to one daemon where somebody listens. False: there is none; nothing was delivered.

        Raises Unavailable (they are too slow; nothing was delivered) and Indeterminate (nobody knows).
        """
        ...

    def fan_out(self, address: Address, body: bytes) -> None:
        """Bring a copy to every daemon where somebody takes what is fanned out, in the background."""
        ...

    async def pools(self, address: Address, far: bool) -> set[Address]:
        """The pools that the topic has elsewhere; `far`: in other PoPs too."""
        ...

    def hold(self, address: Address) -> None:
        """Messages wait here for a listener of the address: have them fetched when there is one."""
        ...


class Bus:
    """Routes messages between the local door's connections.

    `first_number`: of its calls, deliveries and listeners; no two starts of a daemon may give out the same. A client
    outlives the daemon and may answer what it got of the one before.

    `counters` since the start: casts, calls, delivered, replies, dropped (too old or too many for a queue that nobody
    listens to), and now: listeners, queued_messages, queued_bytes.
    """

    def __init__(self, first_number: int) -> None:
        self.counters = dict.fromkeys(
            ("casts", "calls", "delivered", "replies", "dropped", "listeners", "queued_messages", "queued_bytes"), 0
        )
        self.elsewhere: Elsewhere | None = None
        """None: this host alone."""
        self._queues: dict[Address, Queue] = {}
        self._pools: dict[TopicKey, dict[Address, None]] = {}
        self._fanouts: dict[TopicKey, dict[int, Listener]] = {}
        self._listeners: dict[int, Listener] = {}
        self._calls: dict[int, Waiting] = {}
        self._numbers = itertools.count(max(1, first_number))  # Call 0 is none.

    async def answer(self, connection: Connection, message: Message) -> Struct:
        """Serve one request of a local client. Raises Invalid, NotFound, Unavailable (full) and for a call
        Indeterminate (its server died, or showed no sign of life)."""
        match message:
            case Cast():
                return await self._cast(message)
            case Call():
                return await self._call(message)
            case Subscribe():
                subscribed = self._subscribe(connection, message)
                if self.elsewhere is not None:
                    await self.elsewhere.told()
                return subscribed
            case Take():
                return await self._take(connection, message)
            case StopTaking(number):
                self._stop(self._listener(number))
                return Done()
            case Acknowledge(listener, delivery):
                return Done(self._settle(listener, delivery, again=False))
            case Requeue(listener, delivery):
                return Done(self._settle(listener, delivery, again=True))
            case Reply(call, body):
                return Done(self.reply(call, body))
            case Heartbeat(call):
                return Done(self.sign(call))
            case _:
                raise Invalid(f"{type(message).__name__} is not a request to the bus")

    async def _cast(self, message: Cast) -> Done:
        self.counters["casts"] += 1
        if message.fanout:
            heard = self.copy(message.address, message.body)
            if self.elsewhere is not None:
                self.elsewhere.fan_out(message.address, message.body)
            return Done(heard)
        if message.address.server:
            return Done(await self._send(message.address, Envelope(message.body)))
        return Done(await self._publish(message))

    def copy(self, address: Address, body: bytes) -> bool:
        """Give each listener of this host that takes what is fanned out to the topic a copy; are there any?"""
        listeners = list(self._fanouts.get(address.topic_key, {}).values())
        for listener in listeners:
            if len(listener.copies) >= QUEUE_MESSAGES_MAX:
                self._unqueued(listener.copies.popleft())
                self.counters["dropped"] += 1
            self._queued(Envelope(body), listener.copies)
            listener.wake()
        return bool(listeners)

    async def _call(self, message: Call) -> Answered:
        self.counters["calls"] += 1
        call = self.begin_call(message.monitor_ms / 1000, time_left_s())
        try:
            await self._send(message.address, Envelope(message.body, call))
            if not call.monitor_s:
                return Answered(await call.answer)
            return Answered(await self._monitored(call))
        finally:
            # Also when the caller disappears: the envelope is stale from now on.
            self.end_call(call)

    def begin_call(self, monitor_s: float, left_s: float) -> Waiting:
        """A call whose answer is waited for until `end_call`, in `left_s` at the latest."""
        loop = asyncio.get_running_loop()
        call = Waiting(next(self._numbers), monitor_s, loop.time() + left_s, loop.create_future())
        self._calls[call.id] = call
        return call

    def end_call(self, call: Waiting) -> None:
        """Nobody waits for it any more."""
        if not call.answer.cancel() and not call.answer.cancelled():
            call.answer.exception()  # Else asyncio complains of an error that nobody waited for.
        self._calls.pop(call.id, None)
        if call.listener is not None:
            call.listener.calls.pop(call.id, None)

    async def _monitored(self, call: Waiting) -> bytes:
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

    async def _publish(self, message: Cast) -> bool:
        """A message to a topic: for one of its listeners, and for one in each of its pools."""
        address = message.address
        pools = dict.fromkeys(self._pools.get(address.topic_key, ()))
        if self.elsewhere is not None:
            pools |= dict.fromkeys(await self.elsewhere.pools(address, message.notification))
        if not pools:
            return await self._send(address, Envelope(message.body))
        sends = [self._send(address, Envelope(message.body), keep=False)]
        sends += [self._send(pool, Envelope(message.body)) for pool in pools]
        results = await asyncio.gather(*sends, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results):
            raise errors[0]
        # Sent again for those that did not get it, the others would get it twice.
        self.counters["dropped"] += len(errors)
        return any(result is True for result in results)

    async def _send(self, address: Address, envelope: Envelope, keep: bool = True) -> bool:
        """Bring the message to one listener; where there is none, `keep` it. Returns whether somebody listens."""
        queue = self._queues.get(address)
        if (queue is None or not (queue.listeners or queue.messages)) and self.elsewhere is not None:
            if await self.elsewhere.deliver(address, envelope):
                return True
            queue = self._queues.get(address)
        if queue is None and not keep:
            return False
        queue = self._queue(address)
        self._enqueue(address, queue, envelope)
        if not queue.listeners and self.elsewhere is not None:
            self.elsewhere.hold(address)
        return bool(queue.listeners)

    def _enqueue(self, address: Address, queue: Queue, envelope: Envelope) -> None:
        if len(queue.messages) >= (QUEUE_MESSAGES_MAX if queue.listeners else UNHEARD_MESSAGES_MAX):
            self._make_room(address, queue)
        self._queued(envelope, queue.messages)
        self._wake_one(queue)

    # ---- for and from the daemons of other hosts

    def listening(self) -> dict[Address, bool]:
        """Where somebody listens on this host, and whether what is fanned out to the topic is taken there."""
        heard: dict[Address, bool] = {}
        for listener in self._listeners.values():
            for address in () if listener.stopped else listener.addresses:
                heard[address] = heard.get(address, False) or listener.fanout
        return heard

    def accept(self, address: Address, envelope: Envelope) -> None:
        """Take a message for a listener of this host. Raises NotFound if there is none, Unavailable if it is slow."""
        queue = self._queues.get(address)
        if queue is None or not queue.listeners:
            raise NotFound(f"nobody listens to topic {address.topic} here")
        self._enqueue(address, queue, envelope)

    def unheard(self, address: Address, count: int) -> list[Envelope]:
        """Take messages that wait for a listener of this host although there is none; stale ones are left out."""
        taken: list[Envelope] = []
        queue = self._queues.get(address)
        while queue is not None and not queue.listeners and queue.messages and len(taken) < count:
            envelope = queue.messages.popleft()
            self._unqueued(envelope)
            if not envelope.stale:
                taken.append(envelope)
        if queue is not None and not queue.listeners and not queue.messages:
            self._drop_queue(address, queue)
        return taken

    def give_back(self, address: Address, envelopes: Iterable[Envelope]) -> None:
        """Put what `unheard` gave and nobody took to where it was."""
        queue = self._queue(address)
        for envelope in reversed(list(envelopes)):
            queue.messages.appendleft(envelope)
            self._count_queued(envelope)
            self._wake_one(queue)

    def _make_room(self, address: Address, queue: Queue) -> None:
        if queue.listeners:
            where = f"topic {address.topic}" + (f", server {address.server}" if address.server else "")
            raise Unavailable(
                f"{len(queue.messages)} messages wait for {where} already: its listeners are too slow; try later",
                sent=False,
            )
        self._unqueued(queue.messages.popleft())
        self.counters["dropped"] += 1

    def _queued(self, envelope: Envelope, messages: deque[Envelope]) -> None:
        if self.counters["queued_bytes"] + len(envelope.body) > QUEUED_BYTES_MAX:
            raise Unavailable(f"{self.counters['queued_bytes']} bytes wait in the bus already: try later", sent=False)
        messages.append(envelope)
        self._count_queued(envelope)

    def _count_queued(self, envelope: Envelope) -> None:
        self.counters["queued_messages"] += 1
        self.counters["queued_bytes"] += len(envelope.body)

    def _unqueued(self, envelope: Envelope) -> None:
        self.counters["queued_messages"] -= 1
        self.counters["queued_bytes"] -= len(envelope.body)

    def _wake_one(self, queue: Queue) -> None:
        for number, listener in queue.listeners.items():
            if listener.waits and not self._full(listener):
                queue.listeners.move_to_end(number)
                listener.wake()
                return

    def _queue(self, address: Address) -> Queue:
        queue = self._queues.get(address)
        if queue is None:
            if len(self._queues) >= QUEUES_MAX:
                self._forget_unheard()
            queue = self._queues[address] = Queue()
            if address.pool:
                self._pools.setdefault(address.topic_key, {})[address] = None
        return queue

    def _forget_unheard(self) -> None:
        """Give up the oldest queue to which nobody listens."""
        for address, queue in self._queues.items():
            if not queue.listeners:
                self._drop_queue(address, queue)
                return
        raise Unavailable(f"the bus has {QUEUES_MAX} topics with listeners: no more can be made", sent=False)

    def _drop_queue(self, address: Address, queue: Queue) -> None:
        for envelope in queue.messages:
            self._unqueued(envelope)
            self.counters["dropped"] += not envelope.stale
        del self._queues[address]
        pools = self._pools.get(address.topic_key)
        if pools is not None and pools.pop(address, 0) is None and not pools:
            del self._pools[address.topic_key]

    def _subscribe(self, connection: Connection, message: Subscribe) -> Subscribed:
        if not 0 < len(message.addresses) <= ADDRESSES_PER_LISTENER_MAX:
            raise Invalid(f"a listener has 1 to {ADDRESSES_PER_LISTENER_MAX} addresses, not {len(message.addresses)}")
        if len(self._listeners) >= LISTENERS_MAX:
            raise Unavailable(f"the bus has {LISTENERS_MAX} listeners: stop some", sent=False)
        listener = Listener(next(self._numbers), connection, message)
        self._listeners[listener.number] = listener
        try:
            for address in listener.addresses:
                self._queue(address).listeners[listener.number] = listener
                if listener.fanout:
                    self._fanouts.setdefault(address.topic_key, {})[listener.number] = listener
        except Unavailable:
            self._gone(listener)
            raise
        connection.on_close.append(lambda: self._gone(listener))
        self._listeners_changed()
        return Subscribed(listener.number)

    def _listeners_changed(self) -> None:
        self.counters["listeners"] = len(self._listeners)
        if self.elsewhere is not None:
            self.elsewhere.changed()

    def _stop(self, listener: Listener) -> None:
        """It takes no more: what waits, and what is still to come, is for others. What it has it may acknowledge."""
        if listener.stopped:
            return
        listener.stopped = True
        self._listeners_changed()
        for address in listener.addresses:
            queue = self._queues.get(address)
            if queue is not None:
                queue.listeners.pop(listener.number, None)
            fanned = self._fanouts.get(address.topic_key, {})
            if fanned.pop(listener.number, None) is not None and not fanned:
                del self._fanouts[address.topic_key]
        while listener.copies:
            self._unqueued(listener.copies.popleft())
        for address in listener.addresses:
            self._leave_to_others(address)
        listener.wake()

    def _gone(self, listener: Listener) -> None:
        """A listener's connection ended: what it held goes to others, and its callers hear that it died."""
        del self._listeners[listener.number]
        if listener.stopped:
            self._listeners_changed()
        self._stop(listener)
        for address, envelope in reversed(list(listener.outstanding.values())):
            if address is not None:
                self._put_back(address, envelope, first=True)
        for call in list(listener.calls.values()):
            self.fail(call.id, "the server that had taken the call died before it replied")
        for address in listener.addresses:
            self._leave_to_others(address)

    def _leave_to_others(self, address: Address) -> None:
        """See to a queue that one listener less waits at, who may have been woken for a message and not have taken it.

        Without messages and listeners it goes.
        """
        queue = self._queues.get(address)
        if queue is not None and queue.messages:
            self._wake_one(queue)
            if not queue.listeners and self.elsewhere is not None:
                self.elsewhere.hold(address)
        elif queue is not None and not queue.listeners:
            self._drop_queue(address, queue)

    def _put_back(self, address: Address, envelope: Envelope, *, first: bool) -> None:
        """What a listener took and gives up. Its queue may be gone since, if the listener had stopped."""
        try:
            queue = self._queue(address)
        except Unavailable:
            self.counters["dropped"] += 1
            return
        (queue.messages.appendleft if first else queue.messages.append)(envelope)
        self._count_queued(envelope)

    def _listener(self, number: int) -> Listener:
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

    def _deliveries(self, listener: Listener, count: int) -> list[Delivery]:
        taken: list[Delivery] = []
        size = 0
        count = min(count, OUTSTANDING_MESSAGES_MAX - len(listener.outstanding))
        if listener.stopped or self._full(listener):
            return taken
        for address, envelope in self._waiting_for(listener):
            number = next(self._numbers)
            call = envelope.call
            if call is not None:
                call.listener = listener
                listener.calls[call.id] = call
            if listener.acknowledges:
                listener.outstanding[number] = address, envelope
                listener.outstanding_bytes += len(envelope.body)
            monitor_ms = int(call.monitor_s * 1000) if call is not None else 0
            taken.append(Delivery(number, envelope.body, call.id if call is not None else 0, monitor_ms))
            size += len(envelope.body)
            if len(taken) >= count or size >= TAKEN_BYTES_MAX:
                break
        self.counters["delivered"] += len(taken)
        return taken

    def _full(self, listener: Listener) -> bool:
        """Whether it has as much to acknowledge as it may."""
        messages, size = len(listener.outstanding), listener.outstanding_bytes
        return messages >= OUTSTANDING_MESSAGES_MAX or size >= OUTSTANDING_BYTES_MAX

    def _waiting_for(self, listener: Listener) -> Iterator[tuple[Address | None, Envelope]]:
        """Take messages off the listener's queues, one of each in turn, as long as the caller asks for more."""
        queues = {address: self._queues[address] for address in listener.addresses if address in self._queues}
        found = True
        while found:
            found = False
            if listener.copies:
                found = True
                envelope = listener.copies.popleft()
                self._unqueued(envelope)
                yield None, envelope
            for address, queue in queues.items():
                while queue.messages:
                    envelope = queue.messages.popleft()
                    self._unqueued(envelope)
                    if not envelope.stale:
                        found = True
                        yield address, envelope
                        break

    def _settle(self, number: int, delivery: int, *, again: bool) -> bool:
        listener = self._listeners.get(number)
        address, envelope = listener.outstanding.pop(delivery, (None, None)) if listener is not None else (None, None)
        if listener is None or envelope is None:
            return False
        listener.outstanding_bytes -= len(envelope.body)
        if again:
            if envelope.call is not None:
                listener.calls.pop(envelope.call.id, None)
                envelope.call.listener = None
            if address is not None:
                self._put_back(address, envelope, first=False)
                self._leave_to_others(address)
            elif not listener.stopped:
                listener.copies.append(envelope)
                self._count_queued(envelope)
                listener.wake()
        # It may have been full, and waited beside messages.
        if any(queue.messages for address in listener.addresses if (queue := self._queues.get(address)) is not None):
            listener.wake()
        return True

    def reply(self, number: int, body: bytes) -> bool:
        """The answer to the call; False: nobody waits for it."""
        call = self._calls.get(number)
        if call is None or call.answer.done():
            return False
        self.counters["replies"] += 1
        call.answer.set_result(body)
        return True

    def fail(self, number: int, why: str) -> bool:
        """Nobody knows what became of the call; False: nobody waits for it."""
        call = self._calls.get(number)
        if call is None or call.answer.done():
            return False
        call.answer.set_exception(Indeterminate(why))
        return True

    def sign(self, number: int) -> bool:
        """The call is being worked on; False: nobody waits for it."""
        call = self._calls.get(number)
        if call is None:
            return False
        call.sign()
        return True
