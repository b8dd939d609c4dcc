"""Domains alone on simulated machines, with a bare write and read in place of the registers' protocols."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from dht.domain.context import LocalNode
from dht.domain.domain import Domain
from dht.domain.roster import quorums
from dht.domain.rules import RULES, DomainRules
from dht.domain.wide import Wide, Word
from dht.errors import DhtError, NotServing, Unavailable
from dht.model import ZERO, Ballot, GroupKey, NodeId, Struct
from dht.rows import encode_row, group_key, row_key
from dht.sim import loop as virtual
from dht.sim.cluster import Boot, Cluster
from dht.storage.registers import Header, RegisterFile
from dht.world import Batch

TABLETS = 8
ROW = row_key(1, (1,))


class DomainNode:
    """A node with nothing but a domain and its file. `word`: what its PoP says, in a domain over all PoPs."""

    def __init__(
        self,
        boot: Boot,
        rules: DomainRules = RULES,
        remove_after_s: float = 600.0,
        domain: str = "",
        wide: bool = False,
    ) -> None:
        self.boot = boot
        self.word = Word()
        self.contacts = boot.peers
        self.registers = RegisterFile(boot.disk, TABLETS)
        local = LocalNode(boot.node_id, boot.incarnation, boot.boot, boot.pop, f"host-{boot.address}", boot.address)
        self.domain = Domain(
            domain or boot.pop,
            local,
            boot.clock,
            boot.chance,
            boot.network,
            boot.disk,
            self.registers,
            lambda: self.contacts,
            rules,
            remove_after_s,
            wide=Wide(lambda: True, lambda nodes: self.word) if wide else None,
        )

    @property
    def store(self) -> Any:
        return self

    async def start(self) -> None:
        self.boot.network.serve(self.answer)
        if self.boot.founds and self.domain.chain.newest is None:
            await self.domain.found(TABLETS)
        await self.domain.start()

    async def stop(self) -> None:
        await self.domain.stop()

    async def answer(self, sender: NodeId, message: Struct) -> Struct:
        return await self.domain.answer(sender, message)


class World:
    """Machines by number; `put` and `get` act for a proposer beside machine 0 or another."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.round = 0

    def node(self, number: int) -> DomainNode:
        node = self.cluster.machines[number].node
        assert isinstance(node, DomainNode)
        return node

    def domain(self, number: int) -> Domain:
        return self.node(number).domain

    async def add(self, *, founds: bool = False) -> int:
        number = self.cluster.add(founds=founds)
        await self.cluster.start(number)
        return number

    async def grow(self, size: int) -> None:
        """Machines 0 to size - 1, joined one after another and settled."""
        await self.add(founds=True)
        for _ in range(1, size):
            await self.add()
            await self.settled()

    def running(self) -> list[DomainNode]:
        return [m.node for m in self.cluster.machines if isinstance(m.node, DomainNode) and not m.paused]

    async def until(self, condition: Callable[[], bool], within_s: float = 60.0, what: str = "it") -> None:
        clock = self.cluster.machines[0].clock
        end_s = clock.monotonic() + within_s
        while not condition():
            assert clock.monotonic() < end_s, f"{what} did not happen within {within_s} s"
            await clock.sleep(0.05)

    def is_settled(self) -> bool:
        """All that run hold one roster, are members, and every tablet is initialised at its newest epoch."""
        domains = [n.domain for n in self.running()]
        if len({d.chain.epoch for d in domains}) != 1 or domains[0].chain.newest is None:
            return False
        roster = domains[0].roster
        running = {d.local.node_id: d for d in domains}
        return all(d.joined or d.removed for d in domains) and all(
            running[n].tablets.serves(t) == roster.tablet_epochs[t]
            for t, nodes in enumerate(roster.tablets)
            for n in nodes
            if n in running
        )

    async def settled(self, within_s: float = 60.0) -> None:
        await self.until(self.is_settled, within_s, "settling")

    def _replicas(self, number: int, key: GroupKey) -> tuple[int, tuple[NodeId, ...], dict[NodeId, DomainNode]]:
        proposer = self.node(number)
        replicas = proposer.domain.replicas(proposer.registers.tablet(key))
        by_id = {m.node_id: m.node for m in self.cluster.machines if isinstance(m.node, DomainNode)}
        return replicas.epoch, replicas.nodes, by_id

    def try_put(
        self, number: int, key: GroupKey, value: str, skip: tuple[int, ...] = ()
    ) -> list[tuple[DomainNode, int]]:
        """Accept the value on every replica that lets us; raises NotServing short of a quorum."""
        epoch, nodes, by_id = self._replicas(number, key)
        self.round += 1
        proposer = self.node(number)
        ballot = Ballot(1, epoch, self.round, proposer.boot.node_id, proposer.boot.boot, self.round)
        skipped = [self.cluster.machines[i].node_id for i in skip]
        took: list[DomainNode] = []
        for n in nodes:
            node = by_id.get(n)
            if node is None or n in skipped:
                continue
            try:
                node.domain.admit(node.registers.tablet(key), epoch)
            except NotServing:
                continue
            if node.registers.header(key).promise <= ballot:
                batch = Batch()
                node.registers.replace(
                    batch, key, Header(ballot, ballot, ZERO, b"d" * 16), {ROW: encode_row({1: value})}
                )
                node.boot.disk.submit(batch)
                took.append(node)
        if len(took) < quorums(len(nodes))[0]:
            raise NotServing("no quorum")
        numbers = []
        for node in took:
            header = node.registers.header(key)
            batch = Batch()
            node.registers.write(batch, key, Header(ballot, ballot, ballot, header.digest), {})
            numbers.append((node, node.boot.disk.submit(batch)))
        return numbers

    async def put(self, number: int, key: GroupKey, value: str, skip: tuple[int, ...] = ()) -> None:
        for _ in range(100):
            try:
                numbers = self.try_put(number, key, value, skip)
            except NotServing:
                await self.domain(number).refresh()
                await self.cluster.machines[0].clock.sleep(0.05)
            else:
                for node, at in numbers:
                    await node.boot.disk.durable(at)
                return
        raise Unavailable("never a quorum")

    async def get(self, number: int, key: GroupKey) -> bytes | None:
        """The row at the highest accepted ballot of a quorum; as strong as a prepare, which nothing follows here."""
        for _ in range(100):
            epoch, nodes, by_id = self._replicas(number, key)
            found: list[tuple[Ballot, bytes | None]] = []
            for n in nodes:
                node = by_id.get(n)
                try:
                    if node is not None:
                        node.domain.admit(node.registers.tablet(key), epoch)
                        found.append((node.registers.header(key).accepted, node.registers.row(key, ROW)))
                except NotServing:
                    continue
            if len(found) >= quorums(len(nodes))[0]:
                return max(found, key=lambda f: f[0])[1]
            await self.domain(number).refresh()
            await self.cluster.machines[0].clock.sleep(0.05)
        raise Unavailable("never a quorum")


def key(i: int) -> GroupKey:
    return group_key("db", "family", (i,))


def value(text: str) -> bytes:
    return encode_row({1: text})


def play(
    story: Callable[[World], Coroutine[Any, Any, None]],
    seed: object = 1,
    rules: DomainRules = RULES,
    remove_after_s: float = 600.0,
    time_limit_s: float = 2000.0,
    domain: str = "",
    wide: bool = False,
    pops: Sequence[str] = ("one",),
) -> World:
    """Run the story in virtual time. `domain`: its name, if it is not that of the only PoP."""
    cluster = Cluster(seed, lambda boot: DomainNode(boot, rules, remove_after_s, domain, wide), pops)
    world = World(cluster)
    virtual.run(story(world), time_limit_s=time_limit_s)
    return world


async def outcome(work: Awaitable[object]) -> DhtError | None:
    try:
        await work
    except DhtError as error:
        return error
    return None
