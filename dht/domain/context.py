"""What every part of a node's domain needs: who the node is, its world, its files, what it holds and whom it hears."""

from __future__ import annotations

from dataclasses import dataclass

from dht.domain.asking import Ask
from dht.domain.chain import Chain
from dht.domain.peers import Peers
from dht.domain.roster import Member
from dht.domain.rules import DomainRules
from dht.domain.tablets import Tablets
from dht.domain.watch import Watch
from dht.domain.wide import Wide
from dht.model import NodeId, Struct
from dht.storage.registers import RegisterFile
from dht.world import Chance, Clock, Disk, Network


class LocalNode(Struct, frozen=True):
    """This node as it describes itself to a roster; `boot` grows durably at each start."""

    node_id: NodeId
    incarnation: bytes
    boot: int
    pop: str
    failure_domain: str
    address: str

    def member(self) -> Member:
        return Member(self.node_id, self.incarnation, self.pop, self.failure_domain, self.address)


@dataclass(frozen=True, slots=True)
class Context:
    """`wide`: of a domain over all PoPs, beside which the node has one of its own PoP; None: that one."""

    local: LocalNode
    clock: Clock
    chance: Chance
    network: Network
    disk: Disk
    registers: RegisterFile
    rules: DomainRules
    wide: Wide | None
    chain: Chain
    tablets: Tablets
    peers: Peers
    watch: Watch

    @property
    def node(self) -> NodeId:
        return self.local.node_id

    @property
    def ask(self) -> Ask:
        return self.peers.ask
