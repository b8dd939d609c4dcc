"""A random search over reconfigurations: bare CASPaxos appends while members join, leave, crash and lose disks.

Each register is a list to which clients append unique elements. Every list that was acknowledged has to be a prefix of
the one found at the end. This looks at the rules of the domain only; `dht.sim` runs the whole store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dht.domain.domain import Domain
from dht.domain.roster import quorums
from dht.domain.rules import RULES, DomainRules
from dht.errors import DhtError
from dht.model import ZERO, Ballot, GroupKey, NodeId
from dht.sim import loop as virtual
from dht.sim.cluster import Cluster
from dht.storage.registers import Header
from dht.world import Batch
from tests.dht.domain.small_world import ROW, DomainNode, World, key

T = TypeVar("T")
STEP_TIMEOUT_S = 1.0


class Search:
    def __init__(self, world: World, seed: object, registers: int = 3) -> None:
        self.world = world
        self.chance = random.Random(f"{seed}/search")
        self.keys = [key(i) for i in range(registers)]
        self.acknowledged: dict[GroupKey, list[str]] = {k: [] for k in self.keys}
        self.rounds: dict[GroupKey, int] = {}
        self.operations = 0
        self.stopped = False

    # ---- one operation

    async def step(self, n: NodeId, act: Callable[[DomainNode], tuple[T, int]], results: dict[NodeId, T]) -> None:
        """`act` on the node after a delay; its result counts once durable, unless the node crashed meanwhile."""
        await asyncio.sleep(self.chance.uniform(0, 0.02))
        machine = next(m for m in self.world.cluster.machines if m.node_id == n)
        boots, wipes, node = machine.boots, machine.wipes, machine.node
        if not isinstance(node, DomainNode) or self.chance.random() < 0.03:
            return
        try:
            result, number = act(node)
            async with asyncio.timeout(STEP_TIMEOUT_S):
                await machine.disk.durable(number)
        except (DhtError, TimeoutError):
            return
        if machine.node is not None and (machine.boots, machine.wipes) == (boots, wipes):
            await asyncio.sleep(self.chance.uniform(0, 0.02))
            results[n] = result

    async def all(
        self, nodes: tuple[NodeId, ...], need: int, act: Callable[[DomainNode], tuple[T, int]]
    ) -> dict[NodeId, T]:
        """Results of at least `need` nodes, or fewer when they are all there is."""
        results: dict[NodeId, T] = {}
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(self.step(n, act, results)) for n in nodes]
        while len(results) < need and not all(t.done() for t in tasks):
            await asyncio.wait([t for t in tasks if not t.done()], return_when=asyncio.FIRST_COMPLETED)
        return dict(results)

    async def append(self, domain: Domain, k: GroupKey, element: str) -> str | None:
        """The acknowledged list, or None when nobody knows."""
        tablet = self.world.running()[0].registers.tablet(k)
        replicas = domain.replicas(tablet)
        accept_need, prepare_need = quorums(len(replicas.nodes))
        self.operations += 1
        self.rounds[k] = self.rounds.get(k, 0) + 1
        ballot = Ballot(1, replicas.epoch, self.rounds[k], domain.local.node_id, domain.local.boot, self.operations)

        def prepare(node: DomainNode) -> tuple[tuple[Ballot, str], int]:
            node.domain.admit(tablet, ballot.epoch)
            header = node.registers.header(k)
            if ballot <= header.promise:
                raise DhtError("refused")
            batch = Batch()
            node.registers.write(batch, k, Header(ballot, header.accepted, header.chosen, header.digest), {})
            row = node.registers.row(k, ROW)
            return (header.accepted, (row or b"").decode()), node.boot.disk.submit(batch)

        promises = await self.all(replicas.nodes, prepare_need, prepare)
        if len(promises) < prepare_need:
            return None
        text = max(promises.values())[1] + element + ","

        def accept(node: DomainNode) -> tuple[bool, int]:
            node.domain.admit(tablet, ballot.epoch, accept=True)
            if ballot < node.registers.header(k).promise:
                raise DhtError("refused")
            batch = Batch()
            node.registers.replace(batch, k, Header(ballot, ballot, ZERO, b"d" * 16), {ROW: text.encode()})
            return True, node.boot.disk.submit(batch)

        accepted = await self.all(replicas.nodes, accept_need, accept)
        return text if len(accepted) >= accept_need else None

    # ---- clients and faults

    async def client(self, name: str) -> None:
        count = 0
        while not self.stopped:
            count += 1
            running = self.world.running()
            if running:
                domain = self.chance.choice(running).domain
                await self.once(domain, self.chance.choice(self.keys), f"{name}{count}")
            await asyncio.sleep(self.chance.uniform(0, 0.1))

    async def once(self, domain: Domain, k: GroupKey, element: str) -> bool:
        text = None
        if domain.chain.newest is not None:
            text = await self.append(domain, k, element)
        if text is None:
            await asyncio.sleep(self.chance.uniform(0, 0.05))
            if domain in [n.domain for n in self.world.running()] and self.chance.random() < 0.5:
                await asyncio.wait([asyncio.create_task(domain.refresh())], timeout=1)
            return False
        self.acknowledged[k].append(text)
        return True

    async def fault(self) -> None:
        cluster, chance = self.world.cluster, self.chance
        running = cluster.numbers()
        victim = chance.choice(running)
        match chance.randrange(5):
            case 0 if len(cluster.machines) < 7:
                await self.world.add()
            case 1 if self.world.is_settled() and len(self.world.domain(victim).roster.members) > 2:
                other = chance.choice(running)
                await self.ignore(self.world.domain(other).leave(cluster.machines[victim].node_id, drain=True))
            case 2 | 3:
                cluster.crash(victim)
                await asyncio.sleep(chance.uniform(0, 3))
                await cluster.start(victim)
            case 4 if self.world.is_settled() and len(running) > 2:
                roster = self.world.domain(victim).roster
                # One lost disk is what a domain promises to bear: not the only voter's, not of a pair.
                if len(roster.voters) >= 3 and all(len(nodes) >= 3 for nodes in roster.tablets):
                    cluster.wipe(victim)
                    await asyncio.sleep(chance.uniform(0, 2))
                    await cluster.start(victim)
                    await self.quiet(victim)
            case _:
                cluster.fabric.weather.loss = chance.choice([0.0, 0.0, 0.1])

    async def quiet(self, victim: int) -> None:
        """A second disk is not lost before the first is made good."""
        for _ in range(600):
            running = self.world.cluster.machines[victim].running
            if running and self.world.domain(victim).joined and self.world.is_settled():
                return
            await asyncio.sleep(0.1)

    async def ignore(self, work: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(5):
                await work
        except (DhtError, TimeoutError):
            pass

    async def run(self, faults: int) -> list[str]:
        await self.world.add(founds=True)
        clients = [asyncio.create_task(self.client(name)) for name in "abc"]
        for _ in range(self.chance.choice([0, 1, 2, 3]) + (len(self.world.cluster.pops) > 1) * 3):
            await self.world.add()
            await asyncio.sleep(self.chance.uniform(0, 2))
        for _ in range(faults):
            await asyncio.sleep(self.chance.uniform(0, 1.5))
            await self.fault()
        self.stopped = True
        await asyncio.wait(clients)
        self.world.cluster.fabric.weather.loss = 0.0
        for number in self.world.cluster.numbers(answering=False):
            await self.world.cluster.start(number)
        return [v for k in self.keys for v in await self.verdict(k)]

    async def verdict(self, k: GroupKey) -> list[str]:
        for _ in range(400):
            running = self.world.running()
            domain = self.chance.choice([n.domain for n in running])
            if await self.once(domain, k, "end"):
                final = self.acknowledged[k][-1]
                return [
                    f"{a!r} was acknowledged, {final!r} found" for a in self.acknowledged[k] if not final.startswith(a)
                ][:1]
            await asyncio.sleep(0.2)
        return [f"register {k.hex()} never became available again"]


def search(seed: object, rules: DomainRules = RULES, faults: int = 12, pops: int = 1) -> tuple[list[str], int]:
    """(violations, acknowledged appends) of one run. With five `pops` and more, tablets have up to five replicas."""
    names = tuple(f"p{i}" for i in range(pops))
    cluster = Cluster(seed, lambda boot: DomainNode(boot, rules, domain="d"), names)
    world = World(cluster)
    one = Search(world, seed)
    violations = virtual.run(one.run(faults), time_limit_s=3000)
    return violations, sum(len(a) for a in one.acknowledged.values())
