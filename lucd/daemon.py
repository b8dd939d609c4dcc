"""One node, composed: disk, links, domain, registers, local door, bus, workers, admin address (DESIGN section 2).

Order of start: what can refuse (directory, disk, ports) before what speaks to others; the local door last. A stop goes
the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from dht.codec import Message
from dht.domain.domain import Domain, LocalNode
from dht.errors import DhtError, StorageError
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import NodeId, Struct
from dht.overlay.messages import Contact
from dht.overlay.overlay import Overlay
from dht.register.homes import HomedStore
from dht.register.node import StoreNode
from dht.rows import tablet_of
from dht.storage.disk import SqliteDisk
from dht.storage.registers import RegisterFile
from dht.wire.boots import BootBook
from dht.wire.handshake import PeerIdentity
from dht.wire.identity import Cluster, NodeIdentity
from dht.wire.links import LinkNetwork, format_address, parse_address
from dht.wire.local import LocalDoor
from dht.world import Batch, Space
from lucd.admin import AdminDoor, port_error
from lucd.conf.settings import Settings
from lucd.directory import OpenDirectory
from lucd.door import Door
from lucd.pops import Pops
from lucd.report import Counters, Parts, Report, counters_of
from lucd.workers import WorkerSupervisor
from lucd.world import LoopClock
from nova_bridge.rpc import worker
from nova_bridge.rpc.bus import Bus

log = logging.getLogger(__name__)
_OWNER_KEY = b"node"
_BOOT_KEY = b"boot"
READY_POLL_S = 0.05


class Daemon:
    """`start` returns when the doors are open; `ready` when the node also serves its domain."""

    def __init__(self, settings: Settings, opened: OpenDirectory) -> None:
        self.settings = settings
        self.identity = NodeIdentity.load(settings.pop, opened.private_key, opened.incarnation.bytes, opened.boot)
        self.node_id: NodeId = self.identity.node_id
        self._opened = opened
        self._state = "starting"
        self._steps = contextlib.AsyncExitStack()
        self._met: dict[NodeId, None] = {}
        clock, chance = LoopClock(), random.SystemRandom()
        self.disk = SqliteDisk(opened.store_file)
        self._steps.callback(self.disk.close)
        _refuse_foreign_file(self.disk, self.identity)
        _refuse_older_file(self.disk, opened)
        registers = RegisterFile(self.disk, TABLETS_PER_DOMAIN)
        cluster = Cluster(opened.cluster.cluster_id, opened.cluster.secret)
        self.network = LinkNetwork(self.identity, cluster, BootBook(self.disk).accept)
        local = LocalNode(
            self.node_id,
            self.identity.incarnation,
            self.identity.boot,
            settings.pop,
            settings.failure_domain,
            str(settings.advertise),
        )
        self.domain = Domain(
            settings.pop,
            local,
            clock,
            chance,
            self.network,
            self.disk,
            registers,
            contacts=self._contacts,
            remove_after_s=settings.remove_after_s,
            copy_bytes_per_s=settings.copy_bytes_per_s,
            repair_bytes_per_s=settings.repair_bytes_per_s,
        )
        self.store = StoreNode(self.identity, clock, chance, self.network, self.disk, self.domain, registers)
        self.domain.repair.settle = self.store.settle
        self.overlay = Overlay(
            self.node_id,
            self.identity.private_key,
            settings.pop,
            cluster.key,
            (settings.advertise.host, settings.advertise.port),
            boot=self.identity.boot,
            state_path=opened.path / "overlay.state",
            on_contact=self._heard_of,
        )
        self.pops = Pops(settings.pop, opened.founder, clock, self.disk, self.network, self.overlay)
        self.homed = HomedStore(settings.pop, clock, self.store, self.pops.store, self.pops.founding)
        self.network.serve(self._answer_peer)
        self.network.on_link.append(self._met_peer)
        self.domain.on_change.append(self._update_addresses)
        self._report = Report(
            Parts(
                identity=self.identity,
                cluster_id=cluster.cluster_id,
                address=str(settings.advertise),
                failure_domain=settings.failure_domain,
                state=lambda: self._state,
                domain=self.domain,
                tablet_of=lambda key: tablet_of(key, TABLETS_PER_DOMAIN),
                store=self.store,
                home=self.homed.home,
                alive=self.network.alive,
                disk_failed=lambda: self.disk.failed,
                contacts=lambda: {c.id: (c.pop, format_address(c.host, c.port)) for c in self.overlay.contacts()},
                counters=self._counters,
                warnings=self._warnings,
                salvage=self.store.salvage,
            )
        )
        self._bus = Bus()
        self._workers = WorkerSupervisor(self._worker_command(), settings.nova.workers)
        self._door = Door(self.homed, self._bus, self._report.answer)
        self._local = LocalDoor(settings.socket, self._door.answer)

    async def start(self) -> None:
        """Raises a DhtError, after which `stop` is due, when this node cannot start as configured."""
        settings = self.settings
        await self._note_boot()
        await self._keep(AdminDoor(settings.admin, self._report.status))
        await self.network.start(settings.listen.host, settings.listen.port, str(settings.advertise))
        self._steps.push_async_callback(self.network.stop)
        await self._start_overlay()
        if self.domain.chain.newest is None and self._opened.founder:
            await self.domain.found()
            log.info("founded domain %s", self.domain.name)
        self._update_addresses()
        await self._keep(self.store)
        self._spawn(self._meet_bootstrap())
        self._spawn(self.pops.learn_founding())
        self._steps.push_async_callback(self.pops.stop)
        self._steps.push_async_callback(self.homed.stop)
        await self._keep(self._local)
        settings.socket.chmod(settings.socket_mode)
        await self._keep(self._workers)
        self._state = ""

    async def _note_boot(self) -> None:
        """In the file, durably, then in the directory, before this node speaks to anybody."""
        batch = Batch()
        batch.put(Space.META, _BOOT_KEY, self._opened.boot.to_bytes(8, "big"))
        await self.disk.durable(self.disk.submit(batch))
        self._opened.note_stored()

    async def ready(self) -> None:
        """Return when this node serves; says in the log what it waits for."""
        said = ""
        while not (status := self._report.status()).ready:
            if status.state != said:
                said = status.state
                log.info("not ready: %s", said)
            await asyncio.sleep(READY_POLL_S)

    async def stop(self) -> None:
        """Close everything that was opened, last first. What was acknowledged is on the disk already."""
        self._state = "stopping"
        await self._steps.aclose()

    async def _start_overlay(self) -> None:
        listen = self.settings.listen
        self._steps.push_async_callback(self.overlay.stop)
        try:
            await self.overlay.start(listen.host, listen.port, self.settings.bootstrap)
        except OSError as error:
            raise port_error("listen (UDP)", listen, error) from None

    def _worker_command(self) -> list[str]:
        nova, socket = self.settings.nova, self.settings.socket
        command: list[str] = worker.command(
            transport_url=nova.transport_url,
            connection=f"lucd:///{nova.main_database}?socket={socket}",
            api_connection=f"lucd:///{nova.api_database}?socket={socket}",
            server=nova.server,
            threads=nova.worker_threads,
            config_files=[nova.config_file] if nova.config_file else [],
        )
        return command

    async def _keep(self, part: AdminDoor | StoreNode | LocalDoor | WorkerSupervisor) -> None:
        """Start a part, and stop it when the daemon stops."""
        self._steps.push_async_callback(part.stop)
        await part.start()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._steps.push_async_callback(end)

    # ---- who is out there

    async def _answer_peer(self, sender: NodeId, message: Struct) -> Message:
        reply = await self.pops.answer(self.store, message)
        return await self.store.answer(sender, message) if reply is None else reply

    def _contacts(self) -> Sequence[NodeId]:
        """Nodes to ask for the domain's roster: all that were met."""
        return [node for node in self._met if self.network.alive(node)]

    def _met_peer(self, peer: PeerIdentity) -> None:
        if peer.pop == self.settings.pop:
            self._met[peer.node_id] = None
            self.domain.met(peer.node_id)

    def _heard_of(self, contact: Contact) -> None:
        """A node answered in the overlay: dial it if it is of this PoP without a link. The handshake proves it."""
        self.pops.heard_of(contact)
        if contact.pop == self.settings.pop and not self.network.alive(contact.id):
            self.network.set_address(contact.id, contact.host, contact.port)

    def _update_addresses(self) -> None:
        """The address book follows the roster."""
        known = self.network.addresses()
        for node, address in self.domain.acquaintances().items():
            host, port = parse_address(address)
            if known.get(node) != (host, port):
                self.network.set_address(node, host, port)

    async def _meet_bootstrap(self) -> None:
        """Dial the bootstrap nodes until this node is a member; tell the log when what is the case changes."""
        said = ""
        while not self.domain.joined:
            problems = [await self._greet(where.host, where.port) for where in self.settings.bootstrap]
            if self.domain.chain.newest is None and not all(problems):
                why = await self._found_pop()
                if not why:
                    return
                if not self._met:
                    problems.append(why)
            text = "; ".join(p for p in problems if p)
            if not self.settings.bootstrap and self.domain.chain.newest is None:
                text = "this node is new and no bootstrap is configured: set bootstrap = HOST:PORT of a member"
            if text and text != said:
                log.warning("cannot join yet, trying again every %.1f s: %s", self.settings.bootstrap_retry_s, text)
            elif said and not text:
                log.info("the bootstrap nodes answer")
            said = text
            await asyncio.sleep(self.settings.bootstrap_retry_s)

    async def _greet(self, host: str, port: int) -> str:
        """Dial one; the reason why not, else empty."""
        try:
            await self.network.greet(host, port)
        except DhtError as error:
            return f"{host}:{port}: {error.message}" if str(port) not in error.message else error.message
        return ""

    async def _found_pop(self) -> str:
        """Found the domain of this node's PoP if it is the first one there; else why not.

        Asked also where others of the PoP were met: they may be as new as this one.
        """
        why = await self.pops.may_found(self.node_id, self.identity.incarnation)
        if not why:
            await self.domain.found()
            log.info("founded domain %s, the first of PoP %s", self.domain.name, self.settings.pop)
        return why

    def _warnings(self) -> list[str]:
        missing = self._workers.count - self._workers.counters["running_now"]
        return (
            [f"{missing} of {self._workers.count} workers of the RPC door do not run; see the log"] if missing else []
        )

    def _counters(self) -> dict[str, Counters]:
        parts: dict[str, Callable[[], Counters]] = {
            "disk": lambda: counters_of(self.disk),
            "overlay": lambda: counters_of(self.overlay),
            "links": lambda: counters_of(self.network),
            "store": lambda: counters_of(self.store),
            "domain": lambda: counters_of(self.domain),
            "door": lambda: counters_of(self._door),
            "bus": lambda: counters_of(self._bus),
            "workers": lambda: counters_of(self._workers),
            "local": lambda: counters_of(self._local),
            "turnstile": lambda: counters_of(self._door.turnstile),
            "homes": lambda: counters_of(self.homed),
        }
        return {name: counters() for name, counters in parts.items()}


def _refuse_foreign_file(disk: SqliteDisk, identity: NodeIdentity) -> None:
    """The file notes whose promises it holds; another node's file must not be answered from."""
    owner = identity.node_id + identity.incarnation
    noted = disk.get(Space.META, _OWNER_KEY)
    if noted is None:
        batch = Batch()
        batch.put(Space.META, _OWNER_KEY, owner)
        disk.submit(batch)
    elif noted != owner:
        raise StorageError(
            "store.sqlite in the data directory belongs to another node or incarnation; put the right file back, or "
            "wipe the directory and join again"
        )


def _refuse_older_file(disk: SqliteDisk, opened: OpenDirectory) -> None:
    """Peers see a rolled-back directory by its boot counter; a file put back alone is seen here."""
    noted = int.from_bytes(disk.get(Space.META, _BOOT_KEY) or b"", "big")
    if noted < opened.stored_boot:
        raise StorageError(
            f"{opened.store_file} is an older copy: its last start is number {noted}, but number {opened.stored_boot} "
            "was noted in it already, and what it promised since is gone; wipe the directory and join again"
        )
