"""The other nodes of a domain: whom this one has to do with, how it asks them, and how it takes links from them.

Who they are is read off the newest roster. A member has to do with all the others; in a large domain
(`dht.domain.wide`) only with those that share its tablets or its PoP, and with the voters. It keeps links to these and
tells them its news; a voter keeps links to all. Members that a recovery left out are no strangers either: they may have
begun a generation of their own.

What is asked of this node itself is answered here, without the network, so that nobody who asks several nodes has to
know which of them it is.

The chain grows here by its next link only. A link may come ahead of those before it; who sent it has them, and they are
fetched first. Who sent a decided one is answered when that is on the disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from dht.codec import Message
from dht.domain.chain import Chain
from dht.domain.messages import (
    LINKS_PER_PAGE,
    AskHeaders,
    AskJoin,
    AskLeave,
    AskLinks,
    AskRegisters,
    DomainMessage,
    Links,
)
from dht.domain.roster import FIRST_EPOCH, Roster
from dht.domain.tablets import Tablets
from dht.domain.wide import Wide, is_large, neighbours
from dht.errors import RemoteProtocolError, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.model import NodeId, Struct
from dht.world import Network

JOIN_TIMEOUT_S: Final = 15.0
PAGE_TIMEOUT_S: Final = 10.0


class Peers:
    """`answer`: what this node answers to itself. `changed`: the chain has a link more."""

    def __init__(
        self,
        node: NodeId,
        chain: Chain,
        tablets: Tablets,
        network: Network,
        answer: Callable[[NodeId, Struct], Awaitable[Message]],
        changed: Callable[[], None],
        wide: Wide | None,
    ) -> None:
        self._node = node
        self._chain = chain
        self._tablets = tablets
        self._network = network
        self._answer = answer
        self._changed = changed
        self._wide = wide

    # ---- who they are

    def acquaintances(self) -> dict[NodeId, str]:
        """Addresses of all that this node may have to speak to: members, and those that a recovery left out.

        In a large domain only of those that it has to do with all the time.
        """
        newest = self._chain.newest
        if newest is None:
            return {}
        out = self._chain.left_out
        before = self._chain.link(self._chain.generation_epoch - 1).members if out else ()
        known = {m.node_id: m.address for m in before if m.node_id in out}
        all_of_them = self._wide is None or self._node in newest.voters
        near = newest.others(self._node) if all_of_them else self._near(newest)
        known.update({m.node_id: m.address for m in newest.members if m.node_id in near})
        known.pop(self._node, None)
        return known

    def to_tell(self) -> tuple[NodeId, ...]:
        """The other members that are not known to be away; those that just left, too, who may have to let go."""
        newest = self._chain.newest
        if newest is None:
            return ()
        before = self._chain.link(newest.epoch - 1).members if newest.epoch > FIRST_EPOCH else ()
        gone = [m.node_id for m in before if newest.member(m.node_id) is None and m.node_id != self._node]
        return tuple(n for n in (*self._near(newest), *gone) if self._network.alive(n))

    def unasked(self) -> frozenset[NodeId]:
        """The other members whose status this one never asks."""
        newest = self._chain.newest
        if newest is None or self._wide is None or self._node in newest.voters:
            return frozenset()
        return frozenset(newest.others(self._node)).difference(self._near(newest))

    def _near(self, newest: Roster) -> tuple[NodeId, ...]:
        """The other members that this one has to do with."""
        if self._wide is None or not is_large(newest):
            return newest.others(self._node)
        return tuple(sorted(neighbours(newest, self._node, self._tablets.held())))

    # ---- asking them

    async def ask(self, to: NodeId, message: DomainMessage) -> Message:
        """A request to any node, this one too."""
        if to == self._node:
            return await self._answer(to, message)
        match message:
            case AskJoin() | AskLeave():
                timeout_s = JOIN_TIMEOUT_S
            case AskHeaders() | AskRegisters():
                timeout_s = PAGE_TIMEOUT_S
            case _:
                timeout_s = PEER_TIMEOUT_S
        reply = await self._network.call(to, message, timeout_s)
        if not isinstance(reply, Message):
            raise RemoteProtocolError(f"a peer answered {type(message).__name__} with {type(reply).__name__}")
        return reply

    # ---- taking links from them

    async def learn(self, link: Roster, sender: NodeId) -> None:
        """Take a decided link, and those before it from the sender; durable when this returns.

        Raises Unavailable when the sender does not give what is missing.
        """
        await self.catch_up(link.epoch - 1, sender)
        if self._chain.append(link):
            self._changed()
        await self._chain.durable()

    async def catch_up(self, epoch: int, sender: NodeId) -> None:
        """Take the links up to that epoch from the sender; not durable yet when this returns.

        Raises Unavailable when the sender does not give them.
        """
        while self._chain.epoch < epoch:
            before = self._chain.epoch
            reply = await self.ask(sender, AskLinks(self._chain.domain, before, LINKS_PER_PAGE))
            if isinstance(reply, Links):
                for link in reply.links:
                    if self._chain.append(link):
                        self._changed()
            if self._chain.epoch == before:
                raise Unavailable(
                    f"links after {before} of domain {self._chain.domain} are needed and the peer does not give them; "
                    "another member is asked later"
                )
