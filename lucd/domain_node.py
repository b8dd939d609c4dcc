"""One domain as a node keeps it: its file, its registers, the domain, the store on them.

A node keeps two, each in a file of its own: its PoP's, and `global` (DESIGN section 5). Before a file is answered from
it is made sure that it is this node's, and not an older copy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from dht import requests
from dht.codec import Message
from dht.domain.context import LocalNode
from dht.domain.domain import Domain
from dht.domain.wide import Wide
from dht.errors import Invalid, NotServing, StorageError
from dht.model import GLOBAL, GroupKey, NodeId, Struct
from dht.overlay.messages import pop_prefix
from dht.register.node import StoreNode
from dht.register.shards import is_about_shard
from dht.rows import is_local
from dht.storage.disk import RESERVE_BYTES, SqliteDisk
from dht.storage.registers import RegisterFile
from dht.wire.frames import time_left_s
from dht.wire.identity import NodeIdentity
from dht.world import Batch, Chance, Clock, Disk, Network, Space
from lucd.conf.settings import Settings
from lucd.counters import Counters, counters_of
from lucd.directory import OpenDirectory
from lucd.door import ask_store

_OWNER_KEY = b"node"
_BOOT_KEY = b"boot"
_DOMAIN_KEY = b"domain"
_CLIENTS_REQUESTS = frozenset(
    (
        requests.ReadGroups,
        requests.Find,
        requests.Commit,
        requests.ReserveIds,
        requests.RaiseSequence,
        requests.AskOutcome,
        requests.RaiseFence,
        requests.ListDatabases,
        requests.ListHomes,
        requests.ListPops,
        requests.CreateDatabase,
        requests.DropDatabase,
        requests.ClaimPop,
        requests.MovePop,
    )
)
"""What nodes that are no members of a domain ask its members, as a client of theirs would."""


class DomainNode:
    """Raises StorageError for a file that is not to be answered from. `tablets`: of the domain, fixed for ever.

    `shard`: serves what is about groups of local families, in a PoP's domain.
    """

    def __init__(
        self,
        name: str,
        tablets: int,
        disk: SqliteDisk,
        identity: NodeIdentity,
        settings: Settings,
        clock: Clock,
        chance: Chance,
        network: Network,
        contacts: Callable[[], Sequence[NodeId]],
        wide: Wide | None = None,
    ) -> None:
        self.name = name
        self.tablets = tablets
        self.disk = disk
        self.registers = registers = RegisterFile(disk, tablets)
        local = LocalNode(
            identity.node_id,
            identity.incarnation,
            identity.boot,
            settings.pop,
            settings.failure_domain,
            str(settings.advertise),
        )
        self.domain = Domain(
            name,
            local,
            clock,
            chance,
            network,
            disk,
            registers,
            contacts=contacts,
            remove_after_s=settings.remove_after_s,
            copy_bytes_per_s=settings.copy_bytes_per_s,
            repair_bytes_per_s=settings.repair_bytes_per_s,
            wide=wide,
        )
        self.store = StoreNode(identity, clock, chance, network, disk, self.domain, registers)
        self.domain.repair.settle = self.store.settle
        self.shard: requests.Store | None = None

    def answer(self, sender: NodeId, message: Struct) -> Awaitable[Message]:
        """Serve a peer: of this domain, or a client's request that it passes on."""
        if type(message) in _CLIENTS_REQUESTS and isinstance(message, Message):
            return self._answer_client(sender, message)
        return self.store.answer(sender, message)

    async def _answer_client(self, sender: NodeId, message: Message) -> Message:
        if not self.domain.joined:
            raise NotServing(f"this node is no member of domain {self.name}; ask one that is")
        if isinstance(message, requests.ClaimPop | requests.MovePop) and self.name != GLOBAL:
            raise Invalid(f"PoP {message.pop} is not for PoP {self.name} to give away")
        if isinstance(message, requests.MovePop):
            await self.store.move_pop(message.pop, message.before, message.after, time_left_s())
            return requests.Done()
        if isinstance(message, requests.ClaimPop):
            if sender != message.node or not sender.startswith(pop_prefix(message.pop)):
                raise Invalid(f"PoP {message.pop} is claimed by its own nodes, each for itself")
            wanted = message.pop, message.node, message.incarnation
            claim = await self.store.claim_pop(*wanted, time_left_s(), message.index)
            return requests.ClaimPopReply(claim)
        store = self.shard if self.shard is not None and is_about_shard(message) else self.store
        return await ask_store(store, message, time_left_s())

    def coordinated(self) -> Iterator[list[GroupKey]]:
        """The groups of local families that this node coordinates, tablet by tablet."""
        for tablet in range(self.tablets if self.domain.joined else 0):
            if self.domain.replicas(tablet).nodes[0] == self.domain.local.node_id:
                yield [key for key, header in self.registers.headers(tablet) if is_local(key) and not header.deleted]

    async def found(self) -> None:
        """Found the domain with this node as its only member."""
        await self.domain.found(self.tablets)

    def counters(self, prefix: str = "") -> dict[str, Counters]:
        """By part, for metrics."""
        return {
            f"{prefix}disk": counters_of(self.disk),
            f"{prefix}store": counters_of(self.store),
            f"{prefix}domain": counters_of(self.domain),
        }


def open_file(
    path: Path, identity: NodeIdentity, noted_boot: int, reserve_bytes: int = RESERVE_BYTES, domain: str = ""
) -> SqliteDisk:
    """The file, made sure of. `noted_boot`: the newest start that is known to be noted in it, 0 for a new file.

    `domain`: the one that the node votes in by what the file holds.
    """
    disk = SqliteDisk(path, reserve_bytes=reserve_bytes)
    try:
        _refuse_foreign_file(disk, path, identity)
        if domain:
            _refuse_other_domains_file(disk, path, domain)
        _refuse_older_file(disk, path, noted_boot)
    except BaseException:
        disk.close()
        raise
    return disk


async def note_boot(disks: Sequence[Disk], opened: OpenDirectory) -> None:
    """In the files, durably, then in the directory, before this node speaks to anybody."""
    for disk in disks:
        batch = Batch()
        batch.put(Space.META, _BOOT_KEY, opened.boot.to_bytes(8, "big"))
        await disk.durable(disk.submit(batch))
    opened.note_stored()


def _refuse_foreign_file(disk: Disk, path: Path, identity: NodeIdentity) -> None:
    """The file notes whose promises it holds; another node's file must not be answered from."""
    owner = identity.node_id + identity.incarnation
    noted = disk.get(Space.META, _OWNER_KEY)
    if noted is None:
        batch = Batch()
        batch.put(Space.META, _OWNER_KEY, owner)
        disk.submit(batch)
    elif noted != owner:
        raise StorageError(
            f"{path.name} in the data directory belongs to another node or incarnation; put the right file back, or "
            "wipe the directory and join again"
        )


def _refuse_other_domains_file(disk: Disk, path: Path, domain: str) -> None:
    """A node has two files, each with the promises of one domain: exchanged, both would be forgotten."""
    noted = disk.get(Space.META, _DOMAIN_KEY)
    if noted is None:
        batch = Batch()
        batch.put(Space.META, _DOMAIN_KEY, domain.encode())
        disk.submit(batch)
    elif noted != domain.encode():
        raise StorageError(
            f"{path} is the file of domain {noted.decode()}, and the one of {domain} is expected there: put the right "
            "file back, or wipe the directory and join again"
        )


def _refuse_older_file(disk: Disk, path: Path, noted_boot: int) -> None:
    """Peers see a rolled-back directory by its boot counter; a file put back alone is seen here."""
    noted = int.from_bytes(disk.get(Space.META, _BOOT_KEY) or b"", "big")
    if noted < noted_boot:
        raise StorageError(
            f"{path} is an older copy: its last start is number {noted}, but number {noted_boot} was noted in it "
            "already, and what it promised since is gone; wipe the directory and join again"
        )
