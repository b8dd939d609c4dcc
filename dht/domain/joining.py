"""How a node becomes a member: it fetches the chain from whoever has it, and asks members for admission.

In a domain of one PoP every node wants to be one, at once. In one over all PoPs (`dht.domain.wide`) most nodes only
look on: they ask one node now and again for newer links, and for admission where their PoP has too few members.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from dht.domain.context import Context
from dht.domain.messages import LINKS_PER_PAGE, AskJoin, AskLeave, AskLinks, Links, Newest
from dht.domain.wide import Wide, has_room
from dht.errors import DhtError, Unavailable
from dht.model import NodeId

log = logging.getLogger(__name__)
LOOK_ON_INTERVAL_S: Final = 5.0
LOOK_ON_NODES_MAX: Final = 3
"""How often, and of how many nodes in turn, who looks on asks for newer links."""
JOIN_DELAY_S_MAX: Final = 0.1
"""How long such a node waits at most before it asks to join: many of one PoP may see the need at once."""


class Standing(Protocol):
    """Where this node stands in the domain (`dht.domain.domain.Domain`)."""

    @property
    def joined(self) -> bool: ...

    @property
    def removed(self) -> bool: ...


class Joining:
    """`contacts`: nodes to ask, best first."""

    def __init__(self, context: Context, standing: Standing, contacts: Callable[[], Sequence[NodeId]]) -> None:
        self._local = context.local.member()
        self._standing = standing
        self._chain = context.chain
        self._clock = context.clock
        self._chance = context.chance
        self._ask = context.ask
        self._contacts = contacts
        self._catch_up = context.peers.catch_up
        self._wide = context.wide
        self._look_on_s = float("-inf")

    async def join(self) -> None:
        """Fetch the chain, then ask members for admission, one after another."""
        newest = self._chain.newest
        known = [] if newest is None or self._wide is not None else [m.node_id for m in newest.members]
        me = self._local
        for node in dict.fromkeys([*known, *self._contacts()]):
            if node == me.node_id:
                continue
            try:
                await self._links_from(node)
                if self._chain.newest is None or self._chain.newest.member(node) is None:
                    continue
                reply = await self._ask(node, AskJoin(self._chain.domain, me))
                if isinstance(reply, Newest):
                    await self._catch_up(reply.epoch, node)
                if self._standing.joined:
                    log.info("this node joined domain %s by link %d", self._chain.domain, self._chain.epoch)
                    return
            except DhtError as error:
                log.info("domain %s cannot be joined by %s: %s", self._chain.domain, node.hex()[:12], error)

    async def look_on(self, wide: Wide) -> None:
        """No member: learn newer links from one node at a time, and ask to join where this node's PoP needs it."""
        if self._clock.monotonic() >= self._look_on_s:
            for node in self._contacts()[:LOOK_ON_NODES_MAX]:
                if await self._has_links(node):
                    self._look_on_s = self._clock.monotonic() + LOOK_ON_INTERVAL_S * self._chance.uniform(0.8, 1.2)
                    break
        if self._needed(wide):
            await self._clock.sleep(self._chance.uniform(0.0, JOIN_DELAY_S_MAX))
            if self._needed(wide):
                await self.join()

    def _needed(self, wide: Wide) -> bool:
        newest = self._chain.newest
        room = newest is not None and has_room(newest, self._local.pop)
        return room and wide.may_join() and not self._standing.removed

    async def _has_links(self, node: NodeId) -> bool:
        try:
            return await self._links_from(node) > 0
        except DhtError as error:
            log.info("domain %s: %s has no links for this node: %s", self._chain.domain, node.hex()[:12], error)
            return False

    async def _links_from(self, node: NodeId) -> int:
        """Take the links that the node has; the newest epoch that it holds."""
        reply = await self._ask(node, AskLinks(self._chain.domain, self._chain.epoch, LINKS_PER_PAGE))
        if not isinstance(reply, Links):
            return 0
        if reply.newest > self._chain.epoch:
            await self._catch_up(reply.newest, node)
        return reply.newest

    async def leave_through_a_member(self, request: AskLeave) -> Newest:
        """Have a member take a member out. Raises Unavailable where none is in reach."""
        newest = self._chain.newest
        for node in self._contacts():
            if newest is not None and newest.member(node) is not None:
                reply = await self._ask(node, request)
                if isinstance(reply, Newest):
                    return reply
        raise Unavailable(f"no member of domain {self._chain.domain} is in reach of this node; nothing was changed")
