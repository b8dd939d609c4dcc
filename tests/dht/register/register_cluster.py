"""Three to five store nodes in one process: real coroutines on the ordinary loop, a network with loss and delay."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from dht.codec import Message, decode, encode
from dht.domain.roster import Member, Roster, TabletReplicas
from dht.errors import DhtError, Indeterminate, NotServing, Unavailable
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import ZERO, Ballot, NodeId, Struct
from dht.register.node import StoreNode
from dht.register.rules import RULES, Rules
from dht.storage.memory import MemoryDisk
from dht.storage.registers import RegisterFile


class LoopClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


class Wire:
    """All links. Messages are encoded and decoded as on a real one. `loss` and `delay_s` apply to each direction."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.nodes: dict[NodeId, StoreNode] = {}
        self.loss = 0.0
        self.delay_s = 0.0
        self.cut: set[NodeId] = set()
        self.hung: set[NodeId] = set()
        """Nodes that answer nothing and are not missed by their links."""
        self.silent_s = 0.0
        """For how long those that are not alive are not, as the links see it."""
        self.parted_from: set[NodeId] = set()
        """Those of them whose hosts acknowledge nothing."""
        self.drop = lambda sender, to, message: False
        self.messages: dict[str, int] = {}
        self.encoded = True

    def hand(self, message: Struct) -> Message:
        return decode(encode(message)) if self.encoded else message


class WireEnd:
    """`dht.world.Network` of one node."""

    def __init__(self, wire: Wire, node: NodeId) -> None:
        self.wire = wire
        self.node = node

    def alive(self, node: NodeId) -> bool:
        gone = self.wire.cut | self.wire.hung
        return node in self.wire.nodes and node not in gone and self.node not in self.wire.cut

    def serve(self, answer) -> None:
        pass

    def silent_s(self, node: NodeId) -> float:
        return 0.0 if self.alive(node) else self.wire.silent_s

    def parted(self, node: NodeId) -> bool:
        return node in self.wire.parted_from and not self.alive(node)

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        wire = self.wire
        name = type(message).__name__
        wire.messages[name] = wire.messages.get(name, 0) + 1
        if to in wire.hung:
            await asyncio.sleep(timeout_s)
            raise Indeterminate("no reply in time")
        if not self.alive(to):
            raise Unavailable("no link", sent=False)
        if wire.delay_s:
            await asyncio.sleep(wire.random.uniform(0, wire.delay_s))
        if wire.random.random() < wire.loss or wire.drop(self.node, to, message):
            await asyncio.sleep(min(timeout_s, 0.03))
            raise Indeterminate("lost on the way")
        if to not in wire.nodes:
            raise Indeterminate("link lost")
        try:
            async with asyncio.timeout(timeout_s):
                reply = await wire.nodes[to].answer(self.node, wire.hand(message))
        except TimeoutError:
            raise Indeterminate("no reply in time") from None
        if wire.delay_s:
            await asyncio.sleep(wire.random.uniform(0, wire.delay_s))
        if wire.random.random() < wire.loss or to in wire.cut:
            await asyncio.sleep(min(timeout_s, 0.03))
            raise Indeterminate("reply lost")
        return wire.hand(reply)


class StaticDomain:
    """A roster that never changes unless a test says so."""

    def __init__(self, me: NodeId, nodes: list[NodeId], replicas: int, tablets: int) -> None:
        self.me = me
        self.generation = 1
        self.epoch = 1
        self.floors = ZERO
        members = tuple(Member(n, b"i", "pop", n.hex(), "h:1") for n in sorted(nodes))
        count = min(replicas, len(nodes))
        turns = [tuple(nodes[(t + i) % len(nodes)] for i in range(count)) for t in range(tablets)]
        self.roster = Roster("pop", 1, 1, b"", members, (nodes[0],), tuple(turns), (1,) * tablets)

    def replicas(self, tablet: int) -> TabletReplicas:
        return TabletReplicas(self.epoch, self.roster.tablets[tablet])

    def admit(self, tablet: int, epoch: int, accept: bool = False) -> None:
        if epoch != self.epoch or self.me not in self.roster.tablets[tablet]:
            raise NotServing("not here", roster_epoch=self.roster.epoch)

    def views(self) -> tuple[TabletReplicas, ...]:
        return tuple(map(self.replicas, range(len(self.roster.tablets))))

    def admits(self, tablets: tuple[int, ...], epochs: tuple[int, ...]) -> bool:
        return False

    def floor(self, tablet: int) -> Ballot:
        return self.floors

    def agreed_floor(self, tablet: int) -> Ballot:
        return self.floors

    def pointed(self, refusal: NotServing) -> bool:
        return False

    async def refresh(self, at_least: int | None = None) -> None:
        pass

    async def answer(self, sender: NodeId, message: Struct) -> Message:
        raise Unavailable("not a register message")

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


@dataclass
class Identity:
    node_id: NodeId
    boot: int


class Cluster:
    """`replicas` of each tablet among `size` nodes."""

    def __init__(
        self,
        size: int = 3,
        replicas: int = 3,
        seed: int = 1,
        rules: Rules = RULES,
        tablets: int = TABLETS_PER_DOMAIN,
    ) -> None:
        self.wire = Wire(seed)
        self.rules = rules
        self.tablets = tablets
        self.replicas = replicas
        self.ids = [bytes([65 + i]) * 20 for i in range(size)]
        self.disks = {node: MemoryDisk() for node in self.ids}
        self.boots = dict.fromkeys(self.ids, 0)
        self.domains: dict[NodeId, StaticDomain] = {}
        self.files: dict[NodeId, RegisterFile] = {}
        for node in self.ids:
            self.start(node)

    def start(self, node: NodeId) -> StoreNode:
        self.boots[node] += 1
        domain = self.domains[node] = StaticDomain(node, self.ids, self.replicas, self.tablets)
        disk = self.disks[node]
        file = self.files[node] = RegisterFile(disk, self.tablets)
        chance = random.Random(self.wire.random.random())
        identity = Identity(node, self.boots[node])
        store = StoreNode(identity, LoopClock(), chance, WireEnd(self.wire, node), disk, domain, file, self.rules)
        self.wire.nodes[node] = store
        return store

    async def crash(self, node: NodeId) -> None:
        await self.wire.nodes.pop(node).stop()

    async def stop(self) -> None:
        for store in list(self.wire.nodes.values()):
            await store.stop()

    def __getitem__(self, index: int) -> StoreNode:
        return self.wire.nodes[self.ids[index]]

    def total(self, counter: str) -> int:
        return sum(store.counters.get(counter, 0) for store in self.wire.nodes.values())


async def eventually(check, timeout_s: float = 20.0):
    """Wait until `check` (a plain or async function) gives something true."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            got = check()
            if asyncio.iscoroutine(got):
                got = await got
            if got:
                return got
        except DhtError:
            pass
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.005)
