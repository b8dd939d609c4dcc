"""Who listens in other PoPs: asked when somebody wants to know, and remembered for a while.

One gateway of each PoP is asked, at the same time; it knows its whole PoP. The first that knows a listener is enough,
so a PoP that is cut off delays nobody who is listened to elsewhere. Only what was found is remembered, never that
nothing was. What was found is taken for true until a node says that nobody listens there any more, which costs one more
way; it is asked for again in the background while it is used.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from dht.errors import DhtError
from dht.model import GLOBAL, NodeId
from dht.world import Clock
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.listeners import TopicKey
from nova_bridge.rpc.peer_messages import ADDRESSES_ASKED_MAX, POPS_NAMED_MAX, AskListeners, ListenersReply
from nova_bridge.rpc.post import Post, Ways, Where

FRESH_S = 5.0
"""What is older is asked for again, beside its use."""
STALE_S = 60.0
"""What is older is not used."""
ASK_TIMEOUT_S = 1.0
ADDRESSES_KEPT_MAX = 10_000


class _Found:
    """By PoP, when it answered last that somebody listens, and where."""

    __slots__ = ("asked_s", "pops")

    def __init__(self) -> None:
        self.asked_s = float("-inf")
        self.pops: dict[str, tuple[float, tuple[Where, ...]]] = {}


class Finder:
    """`asked`: questions to other PoPs, since the start."""

    def __init__(self, pop: str, clock: Clock, post: Post, ways: Ways) -> None:
        self.asked = 0
        self._pop = pop
        self._clock = clock
        self._post = post
        self._ways = ways
        self._found: OrderedDict[Address, _Found] = OrderedDict()
        self._pools: OrderedDict[TopicKey, tuple[float, dict[str, set[Address]]]] = OrderedDict()
        self._looks: dict[Address, set[asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told_pops: set[str] = set()

    async def stop(self) -> None:
        """End the questions that are under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def pops(self) -> list[str]:
        """The other PoPs, as far as this node and those that it spoke with know."""
        return sorted(self._ways.others() | self._told_pops)[:POPS_NAMED_MAX]

    def told_pops(self, pops: Collection[str]) -> None:
        """Another node knows these PoPs."""
        if len(self._told_pops) < POPS_NAMED_MAX:
            self._told_pops.update(pop for pop in pops if pop and pop not in (self._pop, GLOBAL))

    def remembered(self, address: Address, without: Collection[NodeId] = ()) -> list[Where]:
        """Where somebody listened in other PoPs when it was asked last."""
        found = self._found.get(address)
        now_s = self._clock.monotonic()
        known = [] if found is None else [w for at_s, ws in found.pops.values() if now_s - at_s < STALE_S for w in ws]
        return sorted((where for where in known if where.node not in without), key=lambda where: where.node)

    async def find(self, address: Address, without: Collection[NodeId] = ()) -> list[Where]:
        """Where somebody listens in other PoPs; empty if no PoP that answered has one."""
        known = self.remembered(address, without)
        if known:
            if self._clock.monotonic() - self._found[address].asked_s > FRESH_S:
                self._look(address)
            return known
        tasks = self._look(address)
        while pending := [task for task in tasks if not task.done()]:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if known := self.remembered(address, without):
                return known
        return self.remembered(address, without)

    def lost(self, address: Address, node: NodeId) -> None:
        """The node says that nobody listens there any more."""
        found = self._found.get(address)
        for pop, (at_s, nodes) in list(found.pops.items()) if found is not None else []:
            rest = tuple(where for where in nodes if where.node != node)
            if found is not None and len(rest) < len(nodes):
                found.pops[pop] = at_s, rest

    async def find_many(self, addresses: Sequence[Address]) -> None:
        """Ask for all of them, to be `remembered`; returns when every PoP has answered or cannot be asked."""
        for first in range(0, len(addresses), ADDRESSES_ASKED_MAX):
            some = tuple(addresses[first : first + ADDRESSES_ASKED_MAX])
            await asyncio.gather(*(self._ask(pop, some) for pop in self.pops()))

    async def pools(self, address: Address) -> set[Address]:
        """The pools that the address's topic has in other PoPs, as of FRESH_S ago at most, if it is asked often."""
        at_s, _ = self._pools.get(address.topic_key, (float("-inf"), {}))
        age_s = self._clock.monotonic() - at_s
        if age_s > FRESH_S:
            tasks = self._look(address)
            if age_s > STALE_S and tasks:
                await asyncio.wait(tasks)
        _, pops = self._pools.get(address.topic_key, (0.0, {}))
        return set().union(*pops.values())

    def _look(self, address: Address) -> set[asyncio.Task[None]]:
        """The questions about the address that are under way, or new ones."""
        tasks = self._looks.get(address)
        if tasks is None:
            tasks = {self._spawn(self._ask(pop, (address,))) for pop in self.pops()}
            if tasks:
                self._looks[address] = tasks
                for task in tasks:
                    task.add_done_callback(lambda _: self._looked(address))
        return tasks

    def _looked(self, address: Address) -> None:
        if all(task.done() for task in self._looks.get(address, ())):
            self._looks.pop(address, None)

    async def _ask(self, pop: str, addresses: tuple[Address, ...]) -> None:
        self.asked += 1
        try:
            reply = await self._post.ask_gateway(pop, AskListeners(addresses), ASK_TIMEOUT_S)
        except DhtError:
            return
        if isinstance(reply, ListenersReply) and len(reply.nodes) == len(addresses):
            self._note(pop, addresses, reply)

    def _note(self, pop: str, addresses: tuple[Address, ...], reply: ListenersReply) -> None:
        now_s = self._clock.monotonic()
        self.told_pops(reply.pops)
        for address, nodes in zip(addresses, reply.nodes, strict=True):
            found = self._found.get(address)
            if found is None and not nodes:
                continue
            if found is None:
                found = self._found[address] = _Found()
            self._found.move_to_end(address)
            found.asked_s = now_s
            found.pops[pop] = now_s, tuple(Where(one.node, pop, one.boot) for one in nodes)
            if not any(wheres for _, wheres in found.pops.values()):
                del self._found[address]
        for address in addresses:
            _, pools = self._pools.pop(address.topic_key, (0.0, {}))
            pools[pop] = {pool for pool in reply.pools if pool.topic_key == address.topic_key}
            self._pools[address.topic_key] = now_s, pools
        while len(self._found) > ADDRESSES_KEPT_MAX:
            self._found.popitem(last=False)
        while len(self._pools) > ADDRESSES_KEPT_MAX:
            self._pools.popitem(last=False)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
