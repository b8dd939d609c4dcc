"""What nodes of the overlay say to each other, and who they say they are."""

from __future__ import annotations

import hashlib
import ipaddress
from functools import lru_cache
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from dht.model import NodeId, Struct

POP_CHARS_MAX: Final = 64
CONTACTS_PER_REPLY_MAX: Final = 20
HINTS_PER_KEY_MAX: Final = 4

Id = Annotated[bytes, Meta(min_length=20, max_length=20)]
RequestId = Annotated[bytes, Meta(min_length=8, max_length=8)]
Host = Annotated[str, Meta(max_length=45)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Pop = Annotated[str, Meta(min_length=1, max_length=POP_CHARS_MAX)]


@lru_cache(maxsize=1024)
def pop_prefix(pop: str) -> bytes:
    """What the ids of a PoP's nodes begin with (DESIGN section 3)."""
    return hashlib.sha1(pop.encode(), usedforsecurity=False).digest()[:4]


@lru_cache(maxsize=4096)
def address_version(host: str) -> int:
    """4 or 6, or 0 for what is no address literal."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0


class Contact(Struct, frozen=True):
    """A node and where it is reached, by UDP and TCP alike. A claim until a link's handshake proves it."""

    id: Id
    host: Host
    port: Port
    pop: Pop

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def plausible(self, family: int) -> bool:
        """Whether the host is an address literal of the IP version and the id belongs to the PoP."""
        return address_version(self.host) == family and self.id[:4] == pop_prefix(self.pop)


class Hint(Struct, frozen=True):
    """A node's signed word that a group lives in its PoP. `key`: SHA-1 of the group key; `made_ms`: wall clock."""

    key: Id
    pop: Pop
    made_ms: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    node_id: Id
    public_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class Ping(Struct, frozen=True, tag=1):
    """Are you there?"""


class Pong(Struct, frozen=True, tag=2):
    """Yes; also the answer to StoreHint."""


class FindNode(Struct, frozen=True, tag=3):
    """Which nodes do you know nearest to the target?"""

    target: Id


class Nodes(Struct, frozen=True, tag=4):
    """Nearest first, as many as fit the datagram."""

    contacts: Annotated[tuple[Contact, ...], Meta(max_length=CONTACTS_PER_REPLY_MAX)]


class FindHint(Struct, frozen=True, tag=5):
    """Which hints do you hold under the key? If none, which nodes are nearest to it?"""

    key: Id


class Hints(Struct, frozen=True, tag=6):
    hints: Annotated[tuple[Hint, ...], Meta(max_length=HINTS_PER_KEY_MAX)]


class StoreHint(Struct, frozen=True, tag=7):
    hint: Hint


Request = Ping | FindNode | FindHint | StoreHint
Reply = Pong | Nodes | Hints
REPLIES: Final = (Pong, Nodes, Hints)


class Frame(Struct, frozen=True):
    """A request, or the reply with the request's id. The sender's id is in the datagram's header.

    `host` and `port`: where the sender wants to be reached; an empty host means where this datagram came from.
    """

    id: RequestId
    host: Host
    port: Port
    pop: Pop
    body: Ping | Pong | FindNode | Nodes | FindHint | Hints | StoreHint


encode = msgspec.msgpack.Encoder().encode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
decode_contacts = msgspec.msgpack.Decoder(tuple[Contact, ...]).decode


def distance(a: NodeId, b: NodeId) -> int:
    return int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
