"""The other PoPs as this node sees them: who to ask there, which of them founded the cluster, and founding one's own.

A PoP is founded by its first node, once: the node claims the PoP where the cluster was founded, and only the claim that
came first may found the domain; later ones are told who that was. So two nodes that start at the same time in a new
PoP, or in one whose members are all away, cannot make two domains of one name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

from dht import requests
from dht.codec import Message
from dht.errors import DhtError, Invalid, Unavailable
from dht.limits import PEER_TIMEOUT_S, REQUEST_TIMEOUT_S
from dht.model import NodeId, Struct
from dht.overlay.messages import Contact
from dht.register.homes import FarStore
from dht.register.node import StoreNode
from dht.register.rounds import expect
from dht.wire.frames import time_left_s
from dht.wire.handshake import PeerIdentity
from dht.world import Batch, Clock, Disk, Network, Space
from lucd.door import ask_store

log = logging.getLogger(__name__)
GATEWAYS_MAX: Final = 3
"""Nodes of another PoP that this node keeps links to, once it had cause to ask that PoP."""
LOOK_AGAIN_S: Final = 30.0
LOOK_SOON_S: Final = 1.0
"""How often a PoP's nodes are looked up at most, while one of its gateways is heard, and while none is."""
ASK_PAUSE_S: Final = 0.2
_FOUNDING_KEY: Final = b"founding_pop"
_FAR_REQUESTS: Final = (
    requests.ReadGroups,
    requests.Find,
    requests.Commit,
    requests.ReserveIds,
    requests.RaiseSequence,
    requests.AskOutcome,
    requests.RaiseFence,
    requests.ListDatabases,
    requests.ListHomes,
    requests.CreateDatabase,
    requests.DropDatabase,
)


class Lookups(Protocol):
    """The part of `dht.overlay.overlay.Overlay` that is needed here."""

    def contacts(self) -> list[Contact]: ...

    async def nodes_of_pop(self, pop: str) -> list[Contact]: ...


class Links(Network, Protocol):
    """The part of `dht.wire.links.LinkNetwork` that is needed here."""

    def peers(self) -> list[PeerIdentity]: ...

    def set_address(self, node_id: NodeId, host: str, port: int) -> None: ...

    def forget(self, node_id: NodeId) -> None: ...


class Pops:
    """`founder`: whether this node founded the cluster, so that its own PoP is the one that keeps the list."""

    def __init__(self, pop: str, founder: bool, clock: Clock, disk: Disk, network: Links, overlay: Lookups) -> None:
        self._pop = pop
        self._clock = clock
        self._disk = disk
        self._network = network
        self._overlay = overlay
        self._stores: dict[str, FarStore] = {}
        self._gateways: dict[str, list[NodeId]] = {}
        self._looked_s: dict[str, float] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._known = asyncio.Event()
        self._founding = (disk.get(Space.META, _FOUNDING_KEY) or b"").decode()
        if founder and not self._founding:
            self._note_founding(pop)
        if self._founding:
            self._known.set()

    async def stop(self) -> None:
        """End the look-ups that are under way."""
        for looking in self._looking.values():
            looking.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)

    # ---- the PoP that founded the cluster

    def _note_founding(self, pop: str) -> None:
        batch = Batch()
        batch.put(Space.META, _FOUNDING_KEY, pop.encode())
        self._disk.submit(batch)
        self._founding = pop
        self._known.set()

    async def founding(self) -> str:
        """Its name. Raises Unavailable while no node that knows it was met."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S / 2):
                await self._known.wait()
        except TimeoutError:
            raise Unavailable(
                "no node was met yet that knows which PoP founded this cluster, so it cannot be said where a database "
                "lives that is not known here; see whether the nodes of bootstrap run"
            ) from None
        return self._founding

    async def learn_founding(self) -> None:
        """Ask the nodes that were met, until one knows."""
        while not self._known.is_set():
            for peer in self._network.peers():
                try:
                    asked = await self._network.call(peer.node_id, requests.AskFoundingPop(), PEER_TIMEOUT_S)
                    pop = expect(asked, requests.AskFoundingPopReply).pop
                except DhtError:
                    continue
                if pop and not self._known.is_set():
                    self._note_founding(pop)
            if not self._known.is_set():
                await asyncio.sleep(ASK_PAUSE_S)

    # ---- asking other PoPs

    def store(self, pop: str) -> FarStore:
        """The store of another PoP."""
        found = self._stores.get(pop)
        if found is None:
            found = self._stores[pop] = FarStore(pop, self._clock, self._network, self.gateways)
        return found

    async def gateways(self, pop: str) -> Sequence[NodeId]:
        """Nodes of the PoP to ask, those that are heard first. Looks for some where none is."""
        nodes = self._gateways.get(pop, [])
        heard = any(self._network.alive(node) for node in nodes)
        if not heard or len(nodes) < GATEWAYS_MAX:
            pause_s = LOOK_AGAIN_S if heard else LOOK_SOON_S
            if self._clock.monotonic() - self._looked_s.get(pop, float("-inf")) > pause_s:
                self._looked_s[pop] = self._clock.monotonic()
                self._looking[pop] = asyncio.ensure_future(self._look(pop))
            if not heard:
                # All who ask meanwhile wait for the one that looks.
                await asyncio.shield(self._looking[pop])
        unparted = [node for node in self._gateways.get(pop, []) if not self._network.parted(node)]
        return sorted(unparted, key=lambda node: not self._network.alive(node))

    async def _look(self, pop: str) -> None:
        """Find nodes of the PoP in the overlay; those that are not heard make room for those that answered now."""
        found = [c for c in self._overlay.contacts() if c.pop == pop] or await self._overlay.nodes_of_pop(pop)
        before = self._gateways.get(pop, [])
        heard = [node for node in before if self._network.alive(node)]
        nodes = list(dict.fromkeys([*heard, *(contact.id for contact in found), *before]))[:GATEWAYS_MAX]
        for contact in found:
            if contact.id in nodes:
                self._network.set_address(contact.id, contact.host, contact.port)
        for node in before:
            if node not in nodes:
                self._network.forget(node)
        self._gateways[pop] = nodes

    def heard_of(self, contact: Contact) -> None:
        """A node answered in the overlay: a gateway may have another address now."""
        if contact.id in self._gateways.get(contact.pop, []) and not self._network.alive(contact.id):
            self._network.set_address(contact.id, contact.host, contact.port)

    # ---- being asked, and founding a PoP

    async def answer(self, store: StoreNode, message: Struct) -> Message | None:
        """The reply to what nodes of other PoPs ask; None if the message is nothing of that kind."""
        if isinstance(message, _FAR_REQUESTS):
            return await ask_store(store, message, time_left_s())
        match message:
            case requests.AskFoundingPop():
                return requests.AskFoundingPopReply(self._founding)
            case requests.ClaimPop():
                if self._founding != self._pop or message.pop == self._pop:
                    raise Invalid(f"PoP {message.pop} is not for PoP {self._pop} to give away")
                claimed = await store.claim_pop(message.pop, message.node, message.incarnation, time_left_s())
                return requests.ClaimPopReply(*claimed)
            case _:
                return None

    async def may_found(self, node: NodeId, incarnation: bytes) -> str:
        """Claim this node's PoP: empty if this node may found it now, else why not."""
        if not self._known.is_set():
            return "no node that was met knows which PoP founded the cluster"
        if self._founding == self._pop:
            return f"none of the nodes of PoP {self._pop}, which founded the cluster, is known here: start one"
        try:
            first = await self.store(self._founding).claim_pop(self._pop, node, incarnation, REQUEST_TIMEOUT_S)
        except DhtError as error:
            return error.message
        if first != (node, incarnation):
            return (
                f"PoP {self._pop} was founded by node {first[0].hex()}, and no node of it is known here: start one, "
                "or join with an empty data_dir and the right pop"
            )
        return ""
