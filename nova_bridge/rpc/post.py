"""Asking a node of any PoP: over the link to it, or through a gateway of its PoP that has one.

Nodes of one PoP have links to each other; of another PoP a node has links to a few, its gateways. What is for a third
one there goes through a gateway, one hop more within its PoP, so the links that a node keeps up grow with the PoPs and
not with their hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dht import codec
from dht.codec import Message
from dht.errors import DhtError, Indeterminate, Invalid, RemoteProtocolError, Unavailable
from dht.model import NodeId, Struct
from dht.wire.frames import time_left_s
from dht.wire.handshake import PeerIdentity
from dht.world import Network
from nova_bridge.rpc.peer_messages import AskCalls, Carry, FarReply, FarSign, Relay

FEATURE_LEVEL_MIN = 2
"""Peers of an older version do not know these messages."""
RELAYED_BYTES_MAX = 64 * 1024 * 1024
GATEWAYS_TRIED_MAX = 3
LOOK_UP_S = 2.0
"""How long a PoP is looked for of which no node is known or heard."""
_RELAYED = (Carry, FarReply, FarSign, AskCalls)


@dataclass(frozen=True, slots=True)
class Where:
    """A daemon: its node and its PoP. `boot`: the start that is meant, 0 if any is."""

    node: NodeId
    pop: str
    boot: int = 0


class Links(Network, Protocol):
    """The part of `dht.wire.links.LinkNetwork` that is needed here."""

    def peers(self) -> list[PeerIdentity]: ...


class Ways(Protocol):
    """The part of `lucd.pops.Pops` that is needed here."""

    def others(self) -> set[str]:
        """The other PoPs, as far as this node knows."""
        ...

    async def gateways(self, pop: str) -> Sequence[NodeId]: ...


class Post:
    """`relayed`: messages passed on for others, since the start."""

    def __init__(self, pop: str, links: Links, ways: Ways) -> None:
        self.relayed = 0
        self._pop = pop
        self._links = links
        self._ways = ways
        self._relayed_bytes = 0

    def near(self) -> list[PeerIdentity]:
        """The nodes of this PoP to which there is a link."""
        return [p for p in self._links.peers() if p.pop == self._pop and p.feature_level >= FEATURE_LEVEL_MIN]

    def alive(self, node: NodeId) -> bool:
        return self._links.alive(node)

    async def ask(self, where: Where, message: Struct, timeout_s: float, via: NodeId | None = None) -> Struct:
        """The node's reply. `via`: who has a link to it. Errors as in `dht.world.Network.call`."""
        if where.pop == self._pop or self._links.alive(where.node):
            return await self._links.call(where.node, message, timeout_s)
        gateways = [node for node in await self._gateways(where.pop) if node != via]
        if via is not None and self._links.alive(via):
            gateways.insert(0, via)
        relay = Relay(where.node, codec.encode(message))
        why = "none of its nodes is known"
        for node in gateways:
            try:
                if node == where.node:
                    return await self._links.call(node, message, timeout_s)
                return await self._links.call(node, relay, timeout_s)
            except Unavailable as error:
                why = error.message
        raise Unavailable(f"node {where.node.hex()} of PoP {where.pop} cannot be reached: {why}", sent=False)

    async def _gateways(self, pop: str) -> list[NodeId]:
        older = {peer.node_id for peer in self._links.peers() if peer.feature_level < FEATURE_LEVEL_MIN}
        try:
            async with asyncio.timeout(LOOK_UP_S):
                found = await self._ways.gateways(pop)
        except TimeoutError:
            found = []
        return [node for node in found if node not in older][:GATEWAYS_TRIED_MAX]

    async def relay(self, message: Relay) -> Struct:
        """Serve a Relay for another node. Raises Invalid for what is not to be relayed, and what the node raises."""
        inner = relayed(message)
        size = len(message.body)
        if self._relayed_bytes and self._relayed_bytes + size > RELAYED_BYTES_MAX:
            raise Unavailable(f"{self._relayed_bytes} bytes are being relayed already: try later", sent=False)
        self._relayed_bytes += size
        self.relayed += 1
        try:
            return await self._links.call(message.to, inner, max(0.001, time_left_s()))
        finally:
            self._relayed_bytes -= size

    async def ask_gateway(self, pop: str, message: Struct, timeout_s: float) -> Struct:
        """The reply of any one node of the PoP to a question. Raises Unavailable or Indeterminate if none replies."""
        error: DhtError = Unavailable(f"none of the nodes of PoP {pop} is known", sent=False)
        for node in await self._gateways(pop):
            try:
                return await self._links.call(node, message, timeout_s)
            except (Unavailable, Indeterminate) as failure:
                error = failure
        raise error

    async def gateways(self, pop: str) -> list[Where]:
        """Nodes of the PoP to which there is a link; looking for them makes some."""
        boots = {peer.node_id: peer.boot for peer in self._links.peers()}
        return [Where(node, pop, boots[node]) for node in await self._gateways(pop) if node in boots]


def relayed(message: Relay) -> Message:
    """What is to be relayed. Raises Invalid if that is nothing that is."""
    try:
        inner = codec.decode(message.body)
    except RemoteProtocolError as error:
        raise Invalid(f"what was to be relayed cannot be read: {error.message}") from None
    if not isinstance(inner, _RELAYED):
        raise Invalid(f"{type(inner).__name__} is not a message that is relayed")
    return inner
