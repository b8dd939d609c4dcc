"""The production classes on a simulated machine: what the daemon composes, with the simulator's world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from dht.domain.context import LocalNode
from dht.domain.domain import Domain
from dht.domain.follower import Follower
from dht.domain.roster import REPLICAS
from dht.domain.rules import FOLLOW_RULES, DomainRules, FollowRules
from dht.domain.rules import RULES as DOMAIN_RULES
from dht.model import NodeId
from dht.register.following import FollowedReads
from dht.register.messages import Coordinate
from dht.register.node import StoreNode
from dht.register.rules import RULES, Rules
from dht.requests import Store
from dht.sim.cluster import Boot, Build, Node
from dht.storage.registers import RegisterFile
from dht.wire.boots import BootBook

FOLLOW_INTERVAL_S: Final = 0.05


class ProductionNode:
    """One boot of a node of one domain, all of whose members are in one PoP."""

    def __init__(
        self,
        boot: Boot,
        rules: Rules,
        domain_rules: DomainRules,
        tablets: int,
        remove_after_s: float,
        collect_every_s: float,
        boots_checked: bool = True,
        follow_rules: FollowRules | None = None,
    ) -> None:
        # A forward that is refused at its first delivery is not recorded: a link must not deliver it again.
        boot.network.fabric.once = (Coordinate,)
        if boots_checked:
            boot.network.meet = BootBook(boot.disk).accept
        registers = RegisterFile(boot.disk, tablets)
        local = LocalNode(boot.node_id, boot.incarnation, boot.boot, boot.pop, boot.name, boot.address)
        self._boot = boot
        self._tablets = tablets
        self.domain = Domain(
            boot.pop,
            local,
            boot.clock,
            boot.chance,
            boot.network,
            boot.disk,
            registers,
            lambda: boot.peers,
            domain_rules,
            remove_after_s,
            collect_every_s,
        )
        self.registers = registers
        self._store = StoreNode(local, boot.clock, boot.chance, boot.network, boot.disk, self.domain, registers, rules)
        self.domain.repair.settle = self._store.settle
        self._follower: Follower | None = None
        self._followed: FollowedReads | None = None
        if follow_rules is not None:
            self._follow(boot, follow_rules)

    def _follow(self, boot: Boot, rules: FollowRules) -> None:
        async def contacts() -> Sequence[NodeId]:
            return boot.peers

        follower = self._follower = Follower(
            boot.pop,
            boot.clock,
            boot.chance,
            boot.network,
            boot.copy_disk,
            contacts,
            self._tablets,
            rules,
            FOLLOW_INTERVAL_S,
        )
        self._followed = FollowedReads(follower.copy, boot.copy_disk)

    @property
    def followed(self) -> FollowedReads | None:
        return self._followed

    @property
    def store(self) -> Store:
        return self._store

    @property
    def counters(self) -> Mapping[str, int]:
        own = {**self._store.counters, "collected": self.domain.collection.collected}
        if self._follower is None:
            return own
        return {**own, **self._follower.counters, **self._follower.copy.counters}

    @property
    def settled(self) -> bool:
        domain = self.domain
        if not domain.joined:
            return domain.removed
        roster = domain.roster
        wanted = min(REPLICAS, sum(not m.leaving for m in roster.members))
        me = self._boot.node_id
        return all(
            len(nodes) == wanted and (me not in nodes or domain.tablets.serves(tablet) == epoch)
            for tablet, (nodes, epoch) in enumerate(zip(roster.tablets, roster.tablet_epochs, strict=True))
        ) and not any(m.leaving for m in roster.members)

    @property
    def joined(self) -> bool:
        return self.domain.joined

    @property
    def serving(self) -> bool:
        return any(self.domain.tablets.serves(tablet) for tablet in range(self._tablets))

    async def recover(self, *, salvage: bool) -> None:
        if self.domain.roster.members != (self.domain.local.member(),):
            await self.domain.generations.recover([self._boot.node_id], accept_data_loss=True)
        while not self.settled:
            await self._boot.clock.sleep(0.1)
        if salvage:
            await self._store.salvage(60.0)

    @property
    def left(self) -> bool:
        return self.domain.removed

    async def leave(self, node: NodeId) -> None:
        await self.domain.leave(node, drain=True)

    async def start(self) -> None:
        self._boot.network.serve(self._store.answer)
        if self._boot.founds and self.domain.chain.newest is None:
            await self.domain.found(self._tablets)
        await self._store.start()
        if self._follower is not None:
            await self._follower.start()

    async def stop(self) -> None:
        if self._follower is not None:
            await self._follower.stop()
        await self._store.stop()


def builder(
    off: Sequence[str],
    domain_off: Sequence[str],
    tablets: int,
    remove_after_s: float,
    collect_every_s: float,
    boots_checked: bool = True,
    follow_off: Sequence[str] | None = None,
) -> Build:
    """Builds nodes with these rules switched off. `follow_off`: nodes that follow their own domain, too."""
    rules = msgspec.structs.replace(RULES, **dict.fromkeys(off, False))
    domain_rules = msgspec.structs.replace(DOMAIN_RULES, **dict.fromkeys(domain_off, False))

    follow_rules = None
    if follow_off is not None:
        follow_rules = msgspec.structs.replace(FOLLOW_RULES, **dict.fromkeys(follow_off, False))

    def build(boot: Boot) -> Node:
        return ProductionNode(
            boot, rules, domain_rules, tablets, remove_after_s, collect_every_s, boots_checked, follow_rules
        )

    return build
