"""What a bus holds in memory: messages on their way, the queues where they wait, who listens there."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dht.wire.local import Connection
from nova_bridge.rpc.bus_messages import Address, Subscribe


@dataclass(eq=False, slots=True)
class Waiting:
    """A call whose caller waits until `until_s` on the loop's clock.

    `listener`: who has taken it; `told`: called at each sign of life of its server.
    """

    id: int
    monitor_s: float
    until_s: float
    answer: asyncio.Future[bytes]
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    listener: Listener | None = None
    told: Callable[[], None] | None = None

    def sign(self) -> None:
        """Its server is alive."""
        self.heard.set()
        if self.told is not None:
            self.told()


@dataclass(eq=False, slots=True)
class Envelope:
    """A message on its way. A call that nobody waits for any more is not delivered."""

    body: bytes
    call: Waiting | None = None

    @property
    def stale(self) -> bool:
        return self.call is not None and self.call.answer.done()


class Queue:
    """Messages of one address in order, and the listeners there, the one whose turn is next first."""

    def __init__(self) -> None:
        self.messages: deque[Envelope] = deque()
        self.listeners: OrderedDict[int, Listener] = OrderedDict()


class Listener:
    def __init__(self, number: int, connection: Connection, request: Subscribe) -> None:
        self.number = number
        self.connection = connection
        self.addresses = request.addresses
        self.fanout = request.fanout
        self.acknowledges = request.acknowledges
        self.copies: deque[Envelope] = deque()
        """What was fanned out to this listener alone."""
        self.waiter: asyncio.Future[None] | None = None
        self.stopped = False
        self.outstanding: dict[int, tuple[Address | None, Envelope]] = {}
        """Deliveries to be acknowledged, and the queues that they came from; None: copies for this listener alone."""
        self.outstanding_bytes = 0
        self.calls: dict[int, Waiting] = {}
        """Calls taken and not replied to."""

    @property
    def waits(self) -> bool:
        return self.waiter is not None and not self.waiter.done()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
