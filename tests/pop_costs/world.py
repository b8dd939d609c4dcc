"""PoPs of ten nodes in one process and in virtual time, and whose message is whose.

Every node is the production overlay (its routing table is filled as if it had met everybody; a newcomer's is not, it
joins), and the production stores as the daemon composes them: the registers of its PoP's
domain and, on some, of `global`, homes, places, shards, gateways. Not here are what the numbers below do not depend on:
disks (writes are durable at once), changes of rosters (each tablet has its replicas, for good), followers, and sockets.
Links carry the encoded messages; one that is not there yet takes LINK_ROUND_TRIPS to come up.

All distances are the same: NEAR_S for a round trip inside a PoP, FAR_S between two. Nothing is lost, late, or waits in
a queue, so the time that somebody waits says how many round trips he waited for. A message belongs to the operation in
whose context it was sent or that caused it; what belongs to none is background.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dht.codec import decode, encode
from dht.domain.context import LocalNode
from dht.domain.envelope import DomainNetwork, InDomain
from dht.domain.roster import REPLICAS, REPLICAS_WIDE, Member, Roster
from dht.domain.wide import GLOBAL_TABLETS, members_wanted, neighbours
from dht.errors import Indeterminate, Unavailable
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import GLOBAL, GroupKey, NodeId, Struct
from dht.overlay.messages import Contact, pop_prefix
from dht.overlay.overlay import Overlay, OverlaySettings
from dht.register.homes import FarStore, HomedStore
from dht.register.messages import Chosen
from dht.register.node import StoreNode
from dht.register.noted_homes import NotedHomes
from dht.register.places import Places
from dht.register.shards import Shard
from dht.register.spanning import SpanningStore
from dht.sim.clock import SimClock
from dht.sim.costs import Settled, roster_in_turns
from dht.storage.memory import MemoryDisk
from dht.storage.registers import RegisterFile
from dht.wire.links import format_address
from lucd.domain_node import DomainNode
from lucd.pops import Pops
from tests.dht.overlay.churn import UdpLoop

NODES_PER_POP: Final = 10
NEAR_S: Final = 0.0005
FAR_S: Final = 0.05
LINK_ROUND_TRIPS: Final = 5
"""TCP, TLS, the HTTP upgrade, the Hellos, the Proofs (dht.wire.handshake)."""
SETTINGS: Final = OverlaySettings(
    ping_interval_s=10_000.0,
    refresh_interval_s=10_000.0,
    bootstrap_backoff_max_s=10_000.0,
)
"""Production's, but nobody asks in the background whether the others live: all do."""
_KEY: Final = b"k" * 32


@dataclass(slots=True)
class Traffic:
    """Messages between two PoPs and inside of one; marks of what is chosen are apart. `last_s`: when the last came."""

    far: int = 0
    near: int = 0
    marks: int = 0
    last_s: float = 0.0

    def note(self, far: bool, count: int = 1) -> None:
        if far:
            self.far += count
        else:
            self.near += count


_operation: ContextVar[Traffic | None] = ContextVar("operation", default=None)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one operation. Round trips: those that the asker waited for, one after the other."""

    far: float
    near: float
    far_trips: float
    near_trips: float


class Loop(UdpLoop):
    """Datagrams take as long as the way is; the PoP is in the address."""

    def __init__(self) -> None:
        super().__init__()
        self.background = Traffic()

    async def create_datagram_endpoint(self, factory: Any, *, sock: Any) -> Any:  # type: ignore[override]
        made = await super().create_datagram_endpoint(factory, sock=sock)
        sock.close()  # one for each of a thousand nodes, and none is ever read from
        return made

    def carry(self, data: bytes, source: Any, target: Any) -> None:
        self.sent += 1
        far = source[0].split(".")[1] != target[0].split(".")[1]
        traffic = _operation.get() or self.background
        traffic.note(far)
        traffic.last_s = self.time() + (FAR_S if far else NEAR_S) / 2
        self.call_later((FAR_S if far else NEAR_S) / 2, self.deliver, data, source, target)


async def measured(work: Callable[[], Awaitable[object]], settle_s: float = 1.0) -> Cost:
    """What the work costs; whatever it left under way is waited for and counted, but not in the round trips."""
    traffic, waited_s = await traced(work)
    await asyncio.sleep(settle_s)
    return cost_of(traffic, waited_s)


async def traced(work: Callable[[], Awaitable[object]]) -> tuple[Traffic, float]:
    loop = asyncio.get_running_loop()
    traffic, context = Traffic(), copy_context()
    context.run(_operation.set, traffic)
    began_s = loop.time()
    await loop.create_task(_run(work), context=context)
    return traffic, loop.time() - began_s


async def _run(work: Callable[[], Awaitable[object]]) -> object:
    return await work()


def cost_of(traffic: Traffic, waited_s: float) -> Cost:
    far_trips = int((waited_s + NEAR_S / 10) / FAR_S)
    near_trips = round((waited_s - far_trips * FAR_S) / NEAR_S, 3)
    return Cost(traffic.far, traffic.near, far_trips, near_trips)


class Wires:
    """All links. Nodes of one PoP have theirs from the beginning, others when they want them."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self.links: dict[frozenset[NodeId], asyncio.Task[None]] = {}

    def far(self, a: NodeId, b: NodeId) -> bool:
        return a[:4] != b[:4]

    def up(self, a: NodeId, b: NodeId) -> bool:
        link = self.links.get(frozenset((a, b)))
        return not self.far(a, b) or (link is not None and link.done())

    def begin(self, a: NodeId, b: NodeId) -> None:
        if self.far(a, b) and frozenset((a, b)) not in self.links:
            self.links[frozenset((a, b))] = asyncio.ensure_future(self._dial())

    async def ready(self, a: NodeId, b: NodeId) -> None:
        if not self.up(a, b):
            self.begin(a, b)
            await asyncio.shield(self.links[frozenset((a, b))])

    async def _dial(self) -> None:
        for _ in range(LINK_ROUND_TRIPS):
            traffic_now().note(True, 2)
            await asyncio.sleep(FAR_S)


def traffic_now() -> Traffic:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    return _operation.get() or loop.background


class End:
    """One node's links: what `lucd.pops.Links` has."""

    def __init__(self, wires: Wires, node: NodeId) -> None:
        self._wires = wires
        self._node = node

    def serve(self, answer: object) -> None:
        pass

    def peers(self) -> list[Any]:
        return []

    def set_address(self, node_id: NodeId, host: str, port: int) -> None:
        self._wires.begin(self._node, node_id)

    def forget(self, node_id: NodeId) -> None:
        raise AssertionError("nobody falls silent here")

    def alive(self, node: NodeId) -> bool:
        return self._wires.up(self._node, node)

    def silent_s(self, node: NodeId) -> float:
        return 0.0

    def parted(self, node: NodeId) -> bool:
        return False

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        if to == self._node:
            return await self._wires.nodes[to].answer(to, message)
        sent = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._wires.ready(self._node, to)
                sent = True
                return await self._carry(to, message)
        except TimeoutError:
            if sent:
                raise Indeterminate("no reply in time") from None
            raise Unavailable("no link in time", sent=False) from None

    async def _carry(self, to: NodeId, message: Struct) -> Struct:
        far, traffic = self._wires.far(self._node, to), traffic_now()
        way_s = (FAR_S if far else NEAR_S) / 2
        if isinstance(message, Chosen):
            traffic.marks += 2
        else:
            traffic.note(far, 2)
        await asyncio.sleep(way_s)
        # In a task of its own, as on a link: the asker's deadline ends the waiting, not the serving.
        reply = await asyncio.ensure_future(self._wires.nodes[to].answer(self._node, decode(encode(message))))
        await asyncio.sleep(way_s)
        return decode(encode(reply))


class Kept(DomainNode):
    """`lucd.domain_node.DomainNode` as it answers, on registers in memory and a domain that stays as it is."""

    def __init__(self, name: str, local: LocalNode, roster: Roster, network: Any) -> None:
        disk = MemoryDisk()
        self.name, self.tablets = name, len(roster.tablets)
        self.registers = RegisterFile(disk, self.tablets)
        self.domain = Settled(local.node_id, roster)
        chance = random.Random(local.node_id + name.encode())
        self.store = StoreNode(local, SimClock(), chance, network, disk, self.domain, self.registers)
        self.shard = None


class Node:
    """Composed as in `lucd.daemon`. `made`: the local groups that were made here."""

    def __init__(self, world: World, pop: int, number: int) -> None:
        self.pop_number, self.pop = pop, pop_name(pop)
        seed = (pop * 1000 + number + 1).to_bytes(32, "big")
        self.key = Ed25519PrivateKey.from_private_bytes(seed)
        public = self.key.public_key().public_bytes_raw()
        self.id = pop_prefix(self.pop) + hashlib.sha1(public, usedforsecurity=False).digest()[:16]
        self.host = f"127.{pop + 1}.0.{number + 1}"
        self.member = Member(self.id, b"i" * 16, self.pop, self.host, format_address(self.host, 7400))
        self.overlay = Overlay(self.id, self.key, self.pop, _KEY, (self.host, 0), boot=1, settings=SETTINGS)
        self.made: list[GroupKey] = []
        self._world = world

    async def join(self, *peers: Node) -> None:
        await self.overlay.start(self.host, 0, [(peer.host, peer.overlay.port) for peer in peers])

    def compose(self, own_roster: Roster, global_roster: Roster) -> None:
        """Give it its stores."""
        wires, clock, chance = self._world.wires, SimClock(), random.Random(self.id)
        self.network = network = End(wires, self.id)
        local = LocalNode(self.id, b"i" * 16, 1, self.pop, self.host, self.member.address)
        self.own = Kept(self.pop, local, own_roster, network)
        self._global_network = DomainNetwork(GLOBAL, network, lambda node: wires.begin(self.id, node))
        self.wide: Kept | None = None
        if global_roster.member(self.id) is not None:
            self.wide = Kept(GLOBAL, local, global_roster, self._global_network)
            self._global_network.serve(self.wide.answer)
        self.pops = pops = Pops(
            self.pop,
            clock,
            chance,
            MemoryDisk(),
            network,
            self.overlay,
            self._registry,
            lambda: global_roster.members,
            lambda node: True,
        )
        self._far_global = FarStore(GLOBAL, clock, self._global_network, pops.gateways)
        self.own.shard = shard = Shard(self.pop, self.own.store, self._registry, clock, chance)
        self.places = Places(
            self.pop,
            clock,
            shard,
            pops.store,
            self._registry,
            pops.index,
            self.overlay.find_hint,
            self.made.append,
        )
        spanning = SpanningStore(self._registry, self.places, self.own.store)
        noted = NotedHomes(MemoryDisk())
        self.homed = HomedStore(self.pop, clock, self.own.store, pops.store, self._registry, noted, spanning)

    def _registry(self) -> Any:
        return self._far_global if self.wide is None else self.wide.store

    async def answer(self, sender: NodeId, message: Struct) -> Struct:
        if isinstance(message, InDomain):
            return await self._global_network.open(sender, message)
        return await self.own.answer(sender, message)


def pop_name(pop: int) -> str:
    return f"pop{pop:02}"


@dataclass
class World:
    """So many PoPs, begun one node after the other. `nodes[p][i]`: node i of PoP p."""

    pops: int
    wires: Wires = field(default_factory=Wires)
    nodes: list[list[Node]] = field(default_factory=list)

    def everybody(self) -> list[Node]:
        return [node for pop in self.nodes for node in pop]

    async def begin(self, chance: random.Random) -> None:
        """All nodes, with the contacts that they would have after having met everybody in some order."""
        self.nodes = [[Node(self, pop, number) for number in range(NODES_PER_POP)] for pop in range(self.pops)]
        for node in self.everybody():
            await node.join()
        contacts = [Contact(node.id, node.host, node.overlay.port, node.pop) for node in self.everybody()]
        for node in self.everybody():
            for contact in chance.sample(contacts, len(contacts)):
                if contact.id != node.id:
                    node.overlay._running().router.learn(contact, 0.0)
        count = members_wanted(self.pops)
        wide = [pop[number].member for number in range(count) for pop in self.nodes]
        replicas = REPLICAS_WIDE if self.pops >= REPLICAS_WIDE else REPLICAS
        global_roster = roster_in_turns(wide, replicas, GLOBAL_TABLETS, GLOBAL)
        for pop in self.nodes:
            own = roster_in_turns([node.member for node in pop], REPLICAS, TABLETS_PER_DOMAIN, pop[0].pop)
            for node in pop:
                node.compose(own, global_roster)
                self.wires.nodes[node.id] = node
        for member in global_roster.members:
            for node_id in neighbours(global_roster, member.node_id, ()):
                self.wires.begin(member.node_id, node_id)
        await asyncio.sleep(30.0)

    async def end(self) -> None:
        for node in self.everybody():
            await node.pops.stop()
            await node.homed.stop()
            await node.overlay.stop()


def snapshot(traffic: Traffic) -> Traffic:
    """As it is now, while more comes in."""
    return replace(traffic)
