"""What the oslo.messaging driver and the daemon's bus say to each other over the local socket (numbers 150-199)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from dht.codec import Message, message
from dht.model import Struct

NAME_CHARS_MAX = 255
Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS_MAX)]


class Address(Struct, frozen=True):
    """Where messages wait: a topic of an exchange, one server of the topic, or one pool of a topic's listeners.

    `bus`: as RabbitMQ's virtual host; what is of two buses never meets.
    """

    exchange: Name
    topic: Name
    server: Name = ""
    pool: Name = ""
    bus: Name = ""

    @property
    def topic_key(self) -> tuple[str, str, str]:
        """What all addresses of one topic have in common."""
        return self.bus, self.exchange, self.topic


@message
class Cast(Message, frozen=True, tag=150):
    """Hand a message over for one listener of the address, or with `fanout` a copy to every one. Reply: Done.

    `notification`: for one listener of each pool of the topic, and one that is in none.
    """

    address: Address
    body: bytes
    fanout: bool = False
    notification: bool = False


@message
class Call(Message, frozen=True, tag=151):
    """Hand a message over for one listener and wait for its reply: Answered.

    `monitor_ms`: fail when the server shows no sign of life for so long; 0: wait for as long as the request may take.
    """

    address: Address
    body: bytes
    monitor_ms: int = 0


@message
class Answered(Message, frozen=True, tag=152):
    body: bytes


@message
class Subscribe(Message, frozen=True, tag=153):
    """Listen at the addresses for as long as this connection lives. Reply: Subscribed.

    `fanout`: take copies of what is fanned out to the addresses' topics. `acknowledges`: every delivery is given back
    with Acknowledge or Requeue, and goes to another listener if this one dies before; else it is gone once taken.
    """

    addresses: tuple[Address, ...]
    fanout: bool
    acknowledges: bool


@message
class Subscribed(Message, frozen=True, tag=154):
    listener: int


@message
class Take(Message, frozen=True, tag=155):
    """The next messages, at most `count`; if there are none, wait up to `wait_ms` for one. Reply: Taken.

    Only on the connection that subscribed, one at a time.
    """

    listener: int
    count: int
    wait_ms: int


class Delivery(Struct, frozen=True):
    """`call`: what a Reply names, 0 for a cast. `monitor_ms`: how often at least the caller wants a Heartbeat, or 0."""

    id: int
    body: bytes
    call: int = 0
    monitor_ms: int = 0


@message
class Taken(Message, frozen=True, tag=156):
    """Empty after the wait and after StopTaking, and sometimes before, where another listener was faster."""

    deliveries: tuple[Delivery, ...]


@message
class StopTaking(Message, frozen=True, tag=157):
    """End the listener's wait, for good: its later Takes are empty, and messages go to others. Reply: Done.

    From any connection. What it has taken it may still acknowledge.
    """

    listener: int


@message
class Acknowledge(Message, frozen=True, tag=158):
    """The delivery was processed. Reply: Done (not changed: it was not outstanding any more)."""

    listener: int
    delivery: int


@message
class Requeue(Message, frozen=True, tag=159):
    """Give the delivery back, to the end of its queue. Reply as for Acknowledge."""

    listener: int
    delivery: int


@message
class Reply(Message, frozen=True, tag=160):
    """The answer to a call. Reply: Done (not changed: nobody waits for it any more)."""

    call: int
    body: bytes


@message
class Heartbeat(Message, frozen=True, tag=161):
    """The call is being worked on. Reply: Done (not changed: nobody waits for it any more)."""

    call: int
