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
from pathlib import Path

from dht.domain import restore
from dht.domain.envelope import DomainNetwork, InDomain
from dht.domain.roster import Member
from dht.domain.wide import GLOBAL_TABLETS, Wide
from dht.errors import DhtError, Invalid
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import GLOBAL, NodeId, Struct
from dht.overlay.messages import Contact
from dht.overlay.overlay import Overlay
from dht.register import copies
from dht.register.copies import CopiedRegistry
from dht.register.homes import FarStore, HomedStore, Registry
from dht.register.node import StoreNode
from dht.register.noted_homes import NotedHomes
from dht.register.places import FEW_POPS, Places
from dht.register.shards import Shard
from dht.register.spanning import SpanningStore
from dht.requests import ListPops, ListPopsReply
from dht.storage.disk import RESERVE_BYTES, SqliteDisk
from dht.wire.boots import BootBook
from dht.wire.handshake import PeerIdentity
from dht.wire.identity import Cluster, NodeIdentity
from dht.wire.links import LinkNetwork, format_address, parse_address
from dht.wire.local import LocalDoor
from dht.wire.tls import LinkTls
from lucd.admin import AdminDoor, port_error
from lucd.conf.settings import Settings
from lucd.counters import Counters, counters_of
from lucd.directory import OpenDirectory
from lucd.domain_node import DomainNode, note_boot, open_file
from lucd.door import Door
from lucd.followers import Followers
from lucd.hints import HintPublisher
from lucd.lists import Lists
from lucd.messages import AskCopies, AskWhere, CopiesReply
from lucd.pop_recovery import PopRecoverer
from lucd.pops import Pops
from lucd.report import Parts, Report
from lucd.workers import WorkerSupervisor
from lucd.world import LoopClock
from nova_bridge.rpc import worker
from nova_bridge.rpc.bus import Bus
from nova_bridge.rpc.reach import BUS_REQUESTS, Reach
from nova_bridge.sql.families import made_once

log = logging.getLogger(__name__)
GLOBAL_RESERVE_BYTES = 4 * 1024 * 1024
GLOBAL_WAIT_S = 1.0
"""How long a new node waits for the roster of `global` before it says that it cannot ask it."""
READY_POLL_S = 0.05
_NODES_REQUESTS = frozenset((ListPops, AskWhere, AskCopies, *BUS_REQUESTS, *copies.QUESTIONS, *restore.QUESTIONS))
"""What one node asks another beside the domains that both keep."""


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
        tls = LinkTls() if settings.link_tls else None
        clock, chance = LoopClock(), random.SystemRandom()
        disk = self._open(opened.store_file, settings.pop, opened.stored_boot)
        global_disk = self._open(
            opened.global_file, GLOBAL, opened.stored_boot if opened.global_stored else 0, GLOBAL_RESERVE_BYTES
        )
        cluster = Cluster(opened.cluster.cluster_id, opened.cluster.secret)
        self.network = LinkNetwork(self.identity, cluster, BootBook(disk).accept, tls)
        world = self.identity, settings, clock, chance
        self.own = DomainNode(settings.pop, TABLETS_PER_DOMAIN, disk, *world, self.network, self._contacts)
        self._global_network = DomainNetwork(GLOBAL, self.network, self._begin_link)
        self.wide = DomainNode(
            GLOBAL,
            GLOBAL_TABLETS,
            global_disk,
            *world,
            self._global_network,
            self._global_contacts,
            Wide(lambda: self.own.domain.joined, self.own.domain.word),
        )
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
        self.pops = Pops(
            settings.pop, clock, chance, disk, self.network, self.overlay, self._registry, self._members, self._needed
        )
        self._far_global = FarStore(GLOBAL, clock, self._global_network, self.pops.gateways, self.pops.refused)
        self.hints = HintPublisher(clock, self.overlay.publish_hint, self.own.coordinated, self._hints_are_asked)
        self.own.shard = shard = Shard(settings.pop, self.own.store, self._registry, clock, chance)
        self.places = Places(
            settings.pop,
            clock,
            shard,
            self.pops.store,
            self._registry,
            self.pops.index,
            self.overlay.find_hint,
            self.hints.made,
            made_once,
        )
        self.followers = Followers(
            opened.path,
            self.identity,
            settings,
            clock,
            chance,
            self.network,
            self._global_network,
            self.wide.domain,
            self._followed_contacts,
            self._kept_anyway,
        )
        self.copied = CopiedRegistry(
            clock,
            self.network,
            self._registry,
            self.followers.reads,
            self.followers.near,
            settings.staleness_max_s,
        )
        spanning = SpanningStore(lambda: self.copied, self.places, self.own.store)
        far, noted = self.pops.store, NotedHomes(disk)
        self.homed = HomedStore(settings.pop, clock, self.own.store, far, self._registry, noted, spanning)
        self._lists = Lists(
            self.homed,
            self._registry,
            self.pops,
            self.node_id,
            self.identity.incarnation,
            clock,
            chance,
            lambda: self.own.domain.joined,
            lambda: self.wide.domain.joined,
            self._contacts,
        )
        self.network.serve(self._answer_peer)
        self._global_network.serve(self.wide.answer)
        self.network.on_link.append(self._met_peer)
        self.network.needed = lambda node: self._needed(node) or self.pops.passes_on_to(node)
        self.own.domain.on_change.append(self._roster_changed)
        self._global_known = asyncio.Event()
        self.wide.domain.on_change.append(self._global_changed)
        self._report = Report(self._parts(cluster.cluster_id))
        # Drawn at each start, and with room for a thousand million million numbers below what a message may carry.
        self._bus = Bus(int.from_bytes(self.identity.start_id) >> 3)
        self._reach = Reach(self.node_id, self.identity.boot, settings.pop, clock, self.network, self.pops, self._bus)
        self.network.on_link.append(self._reach.met)
        self._workers = WorkerSupervisor(self._worker_command(), settings.nova.workers)
        self._door = Door(self.homed, self._bus, self._report.answer, self.homed.home)
        self._local = LocalDoor(settings.socket, self._door.answer, settings.socket_mode)

    def _parts(self, cluster_id: str) -> Parts:
        """Where the report reads, and whom it has do what it is ordered."""
        settings, pop_recoverer = self.settings, self._pop_recoverer()
        return Parts(
            identity=self.identity,
            cluster_id=cluster_id,
            address=str(settings.advertise),
            failure_domain=settings.failure_domain,
            state=lambda: self._state,
            own=self.own,
            wide=self.wide,
            store=self.homed,
            home=self.homed.home,
            locate=self.places.locate,
            hint=self.overlay.find_hint,
            far=self.pops.store,
            recover_pop=pop_recoverer.order,
            free_seats=pop_recoverer.free_seats,
            copies=self.followers.lines,
            ask=self.network.call,
            holders=lambda: self._holders(self._members()),
            alive=self.network.alive,
            contacts=lambda: {c.id: (c.pop, format_address(c.host, c.port)) for c in self.overlay.contacts()},
            counters=self._counters,
            warnings=self._warnings,
        )

    async def start(self) -> None:
        """Raises a DhtError, after which `stop` is due, when this node cannot start as configured."""
        settings = self.settings
        await note_boot((self.own.disk, self.wide.disk), self._opened)
        await self._keep(AdminDoor(settings.admin, self._report.status))
        if not settings.link_tls:
            log.warning("link_tls = false: links to the other nodes are not encrypted by lucd")
        await self.network.start(settings.listen.host, settings.listen.port, str(settings.advertise))
        self._steps.push_async_callback(self.network.stop)
        await self._start_overlay()
        if self.wide.domain.chain.newest is None and self._opened.founder:
            await self.wide.found()
            log.info("founded domain %s", self.wide.name)
        self._update_addresses()
        await self._keep(self.wide.store)
        await self._keep(self.own.store)
        await self._keep(self.followers)
        self._spawn(self._meet_bootstrap())
        self._spawn(self._lists.run())
        self._spawn(self.hints.run())
        self._spawn(self.hints.again())
        self._steps.push_async_callback(self.pops.stop)
        self._steps.push_async_callback(self.homed.stop)
        await self._keep(self._reach)
        await self._keep(self._local)
        await self._keep(self._workers)
        self._state = ""

    def _open(self, path: Path, domain: str, noted_boot: int, reserve_bytes: int = RESERVE_BYTES) -> SqliteDisk:
        disk = open_file(path, self.identity, noted_boot, reserve_bytes, domain)
        self._steps.callback(disk.close)
        return disk

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

    async def _keep(self, part: AdminDoor | StoreNode | LocalDoor | Reach | WorkerSupervisor | Followers) -> None:
        """Start a part, and stop it when the daemon stops."""
        self._steps.push_async_callback(part.stop)
        await part.start()

    def _spawn(self, work: Awaitable[None]) -> None:
        """Work beside the requests, which ends with the daemon or by itself."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(_report_end)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._steps.push_async_callback(end)

    # ---- who is out there

    def _answer_peer(self, sender: NodeId, message: Struct) -> Awaitable[Struct]:
        if isinstance(message, InDomain):
            return self._global_network.open(sender, message)
        if type(message) in _NODES_REQUESTS:
            return self._answer_other(sender, message)
        return self.own.answer(sender, message)

    async def _answer_other(self, sender: NodeId, message: Struct) -> Struct:
        if isinstance(message, ListPops):
            return ListPopsReply(self.pops.told())
        if isinstance(message, AskWhere):
            return await self._report.where_here(message.key)
        if type(message) in BUS_REQUESTS:
            answered: Struct = await self._reach.answer(sender, message)
            return answered
        if isinstance(message, copies.QUESTIONS):
            return self.followers.answer(message)
        if isinstance(message, restore.QUESTIONS):
            return self.followers.hand_over(message)
        return CopiesReply(self.followers.lines())

    def _hints_are_asked(self) -> bool:
        """Somewhere, of what lives here: this node need not have clients that ask."""
        return len({member.pop for member in self._members()}) > FEW_POPS

    def _registry(self) -> Registry:
        """Domain `global`'s store: this node's own where it is a member, else through one that is."""
        return self.wide.store if self.wide.domain.joined else self._far_global

    def _members(self) -> Sequence[Member]:
        newest = self.wide.domain.chain.newest
        return () if newest is None else newest.members

    def _begin_link(self, node: NodeId) -> None:
        newest = self.wide.domain.chain.newest
        member = None if newest is None else newest.member(node)
        if member is not None:
            self.network.set_address(node, *parse_address(member.address))

    def _holders(self, members: Sequence[Member]) -> Sequence[NodeId]:
        """These members of `global`, who may keep copies; links to them are begun."""
        for member in members:
            if not self.network.alive(member.node_id):
                self.network.set_address(member.node_id, *parse_address(member.address))
        return [member.node_id for member in members]

    def _pop_recoverer(self) -> PopRecoverer:
        def others() -> Sequence[NodeId]:
            return self._holders([m for m in self._members() if m.pop != self.settings.pop])

        wide, own = self.wide.domain, self.identity.incarnation
        return PopRecoverer(self.own, wide, own, self.network, self._registry, others, self._contacts)

    def _contacts(self) -> Sequence[NodeId]:
        """Nodes to ask for the domain's roster: all that were met."""
        return [node for node in self._met if self.network.alive(node)]

    def _global_contacts(self) -> Sequence[NodeId]:
        """The same for `global`, which nodes of any PoP know; its members first."""
        known = [*self.pops.global_gateways(), *(peer.node_id for peer in self.network.peers())]
        return [node for node in dict.fromkeys(known) if self.network.alive(node)]

    async def _followed_contacts(self, name: str) -> Sequence[NodeId]:
        return self._global_contacts() if name == GLOBAL else await self.pops.gateways(name)

    def _needed(self, node: NodeId) -> bool:
        return self._kept_anyway(node) or self.followers.acquainted(node)

    def _kept_anyway(self, node: NodeId) -> bool:
        """Whether a domain of this node's own has the link."""
        return node in self.wide.domain.acquaintances() or node in self.own.domain.acquaintances()

    def _met_peer(self, peer: PeerIdentity) -> None:
        self.wide.domain.met(peer.node_id)
        if peer.pop == self.settings.pop:
            self._met[peer.node_id] = None
            self.own.domain.met(peer.node_id)

    def _heard_of(self, contact: Contact) -> None:
        """A node answered in the overlay: dial it if it is of this PoP without a link. The handshake proves it."""
        self.pops.heard_of(contact)
        if contact.pop == self.settings.pop and not self.network.alive(contact.id):
            self.network.set_address(contact.id, contact.host, contact.port)

    def _global_changed(self) -> None:
        self._global_known.set()
        self._update_addresses()

    def _roster_changed(self) -> None:
        self._update_addresses()
        self.wide.domain.look()

    def _update_addresses(self) -> None:
        """The address book follows the rosters: of the PoP, and of `global` where this node is a member."""
        known = self.network.addresses()
        wanted = self.wide.domain.acquaintances() if self.wide.domain.joined else {}
        for node, address in {**wanted, **self.own.domain.acquaintances()}.items():
            host, port = parse_address(address)
            if known.get(node) != (host, port):
                self.network.set_address(node, host, port)

    async def _meet_bootstrap(self) -> None:
        """Dial the bootstrap nodes until this node is a member; tell the log when what is the case changes."""
        said = ""
        domain = self.own.domain
        while not domain.joined:
            problems = [await self._greet(where.host, where.port) for where in self.settings.bootstrap]
            somebody = not all(problems) or self.wide.domain.joined
            if domain.chain.newest is None and somebody:
                why = await self._found_pop()
                if not why:
                    return
                if not self._met:
                    problems.append(why)
            text = "; ".join(p for p in problems if p)
            if not self.settings.bootstrap and domain.chain.newest is None and not somebody:
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
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GLOBAL_WAIT_S):
                await self._global_known.wait()
        why = await self.pops.may_found(self.node_id, self.identity.incarnation)
        if not why:
            try:
                await self.own.found()
            except Invalid as error:
                return error.message
            log.info("founded domain %s, the first of PoP %s", self.own.name, self.settings.pop)
        return why

    def _warnings(self) -> list[str]:
        missing = self._workers.count - self._workers.counters["running_now"]
        found = (
            [f"{missing} of {self._workers.count} workers of the RPC door do not run; see the log"] if missing else []
        )
        own = [*self._lists.warnings(), *self.places.ids.warnings()]
        return [*found, *own, *self.followers.warnings(), *self.copied.warnings()]

    def _counters(self) -> dict[str, Counters]:
        parts: dict[str, Callable[[], Counters]] = {
            "overlay": lambda: counters_of(self.overlay),
            "links": lambda: counters_of(self.network),
            "door": lambda: counters_of(self._door),
            "bus": lambda: counters_of(self._bus),
            "reach": lambda: counters_of(self._reach),
            "workers": lambda: counters_of(self._workers),
            "local": lambda: counters_of(self._local),
            "turnstile": lambda: counters_of(self._door.turnstile),
            "homes": lambda: counters_of(self.homed),
            "places": lambda: counters_of(self.places),
            "hints": lambda: counters_of(self.hints),
            "copies": lambda: {**counters_of(self.copied), **counters_of(self.followers)},
        }
        counted = {name: counters() for name, counters in parts.items()}
        return {**self.own.counters(), **counted, **self.wide.counters("global_")}


def _report_end(task: asyncio.Future[None]) -> None:
    """What breaks off is a bug that must not pass in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background work of the daemon broke off, restart it: %r", error, exc_info=error)
