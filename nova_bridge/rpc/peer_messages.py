"""What the buses of different hosts say to each other over the daemons' links (numbers 170-199).

The sender of each is a proven member, whose defects are still not ours: everything is bounded, and checked as it is
decoded.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from dht.codec import Message, message
from dht.model import Struct
from dht.wire.frames import TIMEOUT_MS_MAX
from nova_bridge.rpc.bus_messages import Address, Name

ADDRESSES_TOLD_MAX = 10_000
ADDRESSES_ASKED_MAX = 100
LISTENERS_NAMED_MAX = 16
"""Nodes of one PoP that are named for one address; more share no load better."""
POOLS_NAMED_MAX = 1_000
POPS_NAMED_MAX = 256
CALLS_ASKED_MAX = 1_000

Node = Annotated[bytes, msgspec.Meta(min_length=20, max_length=20)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
_Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=TIMEOUT_MS_MAX)]
_PopNames = Annotated[tuple[Name, ...], msgspec.Meta(max_length=POPS_NAMED_MAX)]


class Heard(Struct, frozen=True):
    """Somebody listens at the address; `fanout`: and takes what is fanned out to its topic."""

    address: Address
    fanout: bool


@message
class Listens(Message, frozen=True, tag=170):
    """Where somebody listens on the sender's host: all of it, to each node of its PoP. Reply: Done.

    `version` grows by every change within one start of the sender. `pops`: those that it knows.
    """

    version: _Count
    heard: Annotated[tuple[Heard, ...], msgspec.Meta(max_length=ADDRESSES_TOLD_MAX)]
    pops: _PopNames


@message
class AskListeners(Message, frozen=True, tag=171):
    """Where in the asked node's PoP does somebody listen at the addresses?"""

    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=ADDRESSES_ASKED_MAX)]


class Listening(Struct, frozen=True):
    """A node, and the number of its start at which somebody listened there."""

    node: Node
    boot: _Count


_Nodes = Annotated[tuple[Listening, ...], msgspec.Meta(max_length=LISTENERS_NAMED_MAX)]


@message
class ListenersReply(Message, frozen=True, tag=172):
    """`nodes[i]`: for the i-th address asked for. `pools`: of the topics asked for. `pops`: as in Listens."""

    nodes: Annotated[tuple[_Nodes, ...], msgspec.Meta(max_length=ADDRESSES_ASKED_MAX)]
    pools: Annotated[tuple[Address, ...], msgspec.Meta(max_length=POOLS_NAMED_MAX)]
    pops: _PopNames


class Origin(Struct, frozen=True):
    """The daemon whose client sent the message, and the number of its start."""

    node: Node
    boot: _Count
    pop: Name


@message
class Carry(Message, frozen=True, tag=173):
    """Take this message for one listener of the address, with `fanout` for all of your host. Reply: Carried.

    `number`: of the message at its origin, the same at each attempt, with `again` from the second on; `to_boot`: the
    start of the addressee that the first attempt was meant for. `spread`: and for all hosts of your PoP. `call`: the
    call to answer, 0 for a cast, with `monitor_ms` as in Call and `left_ms` that its caller still waits.
    """

    origin: Origin
    number: _Count
    again: bool
    to_boot: _Count
    address: Address
    body: bytes
    fanout: bool = False
    spread: bool = False
    call: _Count = 0
    monitor_ms: _Milliseconds = 0
    left_ms: _Milliseconds = 0


class Outcome(enum.IntEnum):
    """What became of a Carry. Only TAKEN and UNKNOWN may have reached a listener."""

    TAKEN = 1
    NOBODY = 2
    FULL = 3
    UNKNOWN = 4


@message
class Carried(Message, frozen=True, tag=174):
    """`why`: for a human, if not taken."""

    outcome: Outcome
    why: str = ""


@message
class FarReply(Message, frozen=True, tag=175):
    """The answer to a call of the asked node's start `boot`; `failed`: there will be none, and why. Reply: Done."""

    call: _Count
    boot: _Count
    body: bytes
    failed: str = ""


@message
class FarSign(Message, frozen=True, tag=176):
    """The call is being worked on. Reply: Done."""

    call: _Count
    boot: _Count


@message
class AskCalls(Message, frozen=True, tag=177):
    """Which of these calls of `origin` does the asked node know nothing of? Reply: CallsReply."""

    origin: Origin
    calls: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=CALLS_ASKED_MAX)]


@message
class CallsReply(Message, frozen=True, tag=178):
    unknown: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=CALLS_ASKED_MAX)]


@message
class Relay(Message, frozen=True, tag=179):
    """Ask the node `to`, with which you have a link, this message, and reply what it replies."""

    to: Node
    body: bytes
