"""A node's part in the overlay: who is out there, who belongs to a PoP, where does a group live (DESIGN section 4).

Nothing here decides anything: a contact is a claim, a hint is a hint, and no read or write waits for either once
rosters are known.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kademlia.node import Node

from dht.errors import Invalid, LocalProtocolError
from dht.model import GroupKey, NodeId
from dht.overlay.crawl import Crawl
from dht.overlay.hints import HINT_KEYS_MAX, HintStore, genuine, hint_key, signed_hint
from dht.overlay.messages import (
    POP_CHARS_MAX,
    Contact,
    FindHint,
    FindNode,
    Frame,
    Hint,
    Hints,
    Nodes,
    Ping,
    StoreHint,
    distance,
    pop_prefix,
)
from dht.overlay.protocol import Address, OverlayProtocol
from dht.overlay.sealing import OverlayCounters, Sealing
from dht.overlay.state import load_contacts, save_contacts
from dht.overlay.table import ID_BITS

log = logging.getLogger(__name__)

LOST_MAX: Final = 64
PUBLISHED_MAX: Final = 100_000
HINT_REPLICAS: Final = 5
HINT_ANSWERS: Final = 3
WILDCARDS: Final = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class OverlaySettings:
    """`ping_interval_s`: how long a contact may be silent before it is asked; two misses in succession end it."""

    ksize: int = 20
    parallel: int = 4
    rpc_timeout_s: float = 0.7
    ping_interval_s: float = 8.0
    misses_max: int = 2
    refresh_interval_s: float = 60.0
    bootstrap_backoff_min_s: float = 0.5
    bootstrap_backoff_max_s: float = 30.0
    contacts_per_host_max: int = 64
    hint_keys_max: int = HINT_KEYS_MAX
    republish_interval_s: float = 1200.0
    republish_pause_s: float = 0.1
    save_interval_s: float = 60.0


class Overlay:
    """A Kademlia node. `address`: where other nodes reach this one (a wildcard: where its datagrams come from).

    `boot`: raised durably at each start, or peers refuse this node's datagrams. `on_contact` is called for each contact
    that answered, whenever its address is confirmed or new. Belongs to one loop; `stop` is final.
    """

    def __init__(
        self,
        node_id: NodeId,
        private_key: Ed25519PrivateKey,
        pop: str,
        cluster_key: bytes,
        address: Address,
        *,
        boot: int,
        state_path: Path | None = None,
        settings: OverlaySettings = OverlaySettings(),
        on_contact: Callable[[Contact], None] | None = None,
    ) -> None:
        if not 1 <= len(pop) <= POP_CHARS_MAX or node_id[:4] != pop_prefix(pop) or len(node_id) != 20:
            raise Invalid(f"node id {node_id.hex()} does not belong to PoP {pop!r}")
        self.node_id = node_id
        self.pop = pop
        self.counters = OverlayCounters()
        self._private_key = private_key
        self._address = address
        self._settings = settings
        self._state_path = state_path
        self._on_contact = on_contact
        self._hints = HintStore(settings.hint_keys_max)
        self._sealing = Sealing(node_id, cluster_key, boot, self.counters)
        self._transport: asyncio.DatagramTransport | None = None
        self._protocol: OverlayProtocol | None = None
        self._lost: OrderedDict[NodeId, Contact] = OrderedDict()
        self._published: OrderedDict[bytes, float] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._frame = Frame(bytes(8), "", 1, pop, Ping())

    async def start(self, host: str, port: int, bootstrap: Sequence[Address] = ()) -> None:
        """Listen, and keep looking for the bootstrap peers and the contacts of the last run until somebody answers.

        Returns when the socket is open; raises OSError if it cannot be, Invalid if this node's own address does not
        resolve. Port 0 takes a free one.
        """
        loop = asyncio.get_running_loop()
        own_host, own_port = self._address
        if own_host in WILDCARDS:
            own_host = ""
        else:
            try:
                own_host = await _resolve(own_host, own_port, ":" in host)
            except OSError as error:
                raise Invalid(
                    f"other nodes cannot be told to reach this one at {own_host}: {error.strerror}; give an address, "
                    "or a name that resolves here"
                ) from None
        # The port is known before the first datagram can be sent: the protocol reads the frame when it sends.
        opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            opened.setblocking(False)
            opened.bind((host, port))
        except OSError:
            opened.close()
            raise
        self._frame = Frame(bytes(8), own_host, own_port or opened.getsockname()[1], self.pop, Ping())
        self._transport, self._protocol = await loop.create_datagram_endpoint(self._create_protocol, sock=opened)
        if self._state_path is not None:
            for contact in load_contacts(self._state_path)[:LOST_MAX]:
                if contact.id != self.node_id:
                    self._lost[contact.id] = contact
        work = [self._keep_calling(address) for address in bootstrap]
        work += [self._keep_found(), self._keep_alive(), self._keep_fresh(), self._keep_published(), self._keep_saved()]
        self._tasks = [loop.create_task(one) for one in work]
        for task in self._tasks:
            task.add_done_callback(_report)

    async def stop(self) -> None:
        """Stop, and save the contacts for the next start."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._transport is not None:
            self._save()
            self._transport.close()
            # One turn of the loop, in which the transport closes its socket.
            await asyncio.sleep(0)

    @property
    def port(self) -> int:
        """The UDP port that this node listens on."""
        if self._transport is None:
            raise LocalProtocolError("the overlay is not running: start it first")
        return int(self._transport.get_extra_info("sockname")[1])

    def contacts(self) -> list[Contact]:
        """Nodes that answered lately, as far as this node keeps them."""
        return [] if self._protocol is None else [peer.contact for peer in self._protocol.router]

    async def lookup(self, node_id: NodeId) -> Contact | None:
        """The node, if it answers now."""
        protocol = self._running()
        known = protocol.router.get(node_id)
        if known is not None and await protocol.ping(known.contact):
            return known.contact
        found = await self._crawl(node_id, enough=lambda contact: contact.id == node_id)
        return next((contact for contact in found if contact.id == node_id), None)

    async def nodes_of_pop(self, pop: str) -> list[Contact]:
        """All other nodes of the PoP that answer, by id."""
        prefix = int.from_bytes(pop_prefix(pop), "big")
        found: dict[NodeId, Contact] = {}
        ranges = [(prefix, 32)]
        while ranges:
            value, bits = ranges.pop()
            target = (value << (ID_BITS - bits)).to_bytes(20, "big")
            near = await self._crawl(target)
            inside = [c for c in near if int.from_bytes(c.id, "big") >> (ID_BITS - bits) == value]
            found.update({contact.id: contact for contact in inside})
            # A full answer may have cut some off: look into both halves of the range.
            if len(inside) >= self._settings.ksize and bits < ID_BITS:
                ranges += [(value << 1, bits + 1), (value << 1 | 1, bits + 1)]
        return [found[node_id] for node_id in sorted(found) if found[node_id].pop == pop]

    async def publish_hint(self, group: GroupKey) -> int:
        """Tell the overlay that the group lives in this node's PoP, now and again; how many nodes took it."""
        key = hint_key(group)
        self._published[key] = asyncio.get_running_loop().time()
        self._published.move_to_end(key)
        while len(self._published) > PUBLISHED_MAX:
            self._published.popitem(last=False)
        return await self._publish(key)

    async def find_hint(self, group: GroupKey) -> str | None:
        """The PoP in which the group is said to live; None if nobody says. The newest of a few answers."""
        protocol = self._running()
        key = hint_key(group)
        answers = [protocol.hints.get(key, self._now())]
        await self._crawl(key, answers=answers)
        hints = [hint for answer in answers for hint in answer]
        return max(hints, key=lambda hint: hint.made_ms).pop if hints else None

    def _create_protocol(self) -> OverlayProtocol:
        return OverlayProtocol(
            self._frame,
            Node(self.node_id),
            self._hints,
            self._sealing,
            self.counters,
            ksize=self._settings.ksize,
            per_host_max=self._settings.contacts_per_host_max,
            timeout_s=self._settings.rpc_timeout_s,
            learned=self._learned,
        )

    def _learned(self, contact: Contact) -> None:
        self._lost.pop(contact.id, None)
        if self._on_contact is not None:
            self._on_contact(contact)

    def _running(self) -> OverlayProtocol:
        if self._protocol is None or self._transport is None or self._transport.is_closing():
            raise LocalProtocolError("the overlay is not running: start it first")
        return self._protocol

    async def _crawl(
        self,
        target: NodeId,
        *,
        enough: Callable[[Contact], bool] | None = None,
        answers: list[list[Hint]] | None = None,
        count: int | None = None,
    ) -> list[Contact]:
        """Look the target up; with `answers`, look for its hints, add them there and end when a few nodes had any."""
        protocol = self._running()
        request = FindNode(target) if answers is None else FindHint(target)

        async def ask(contact: Contact) -> tuple[Contact, ...] | None:
            answer = await protocol.ask(contact.address, request, contact.id)
            if answer is None:
                self._missed(contact)
                return None
            match answer[1]:
                case Nodes(contacts):
                    return protocol.usable(contacts)
                case Hints(hints) if answers is not None:
                    answers.append([hint for hint in hints if hint.key == target and genuine(hint)])
            return ()

        ends = enough if answers is None else lambda _: len(answers) > HINT_ANSWERS
        start = protocol.router.nearest(target, self._settings.ksize)
        crawl = Crawl(ask, target, start, self.node_id, count or self._settings.ksize, self._settings.parallel, ends)
        return await crawl.run()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _missed(self, contact: Contact) -> None:
        """A contact did not answer in time; a second time in succession, it is dropped."""
        protocol = self._protocol
        peer = None if protocol is None else protocol.router.get(contact.id)
        if protocol is None or peer is None or peer.contact != contact:
            return
        peer.misses += 1
        if peer.misses < self._settings.misses_max:
            return
        spare = protocol.router.forget(contact.id)
        self._lost[contact.id] = contact
        while len(self._lost) > LOST_MAX:
            self._lost.popitem(last=False)
        if spare is not None:
            protocol.welcome(spare.contact)

    async def _keep_alive(self) -> None:
        """Ask contacts that were silent for a while; the dead are gone after `misses_max` unanswered pings."""
        interval = self._settings.ping_interval_s
        while True:
            await asyncio.sleep(interval / 4 * random.uniform(0.9, 1.1))
            silent = [peer for peer in self._running().router if self._now() - peer.heard > interval]
            await asyncio.gather(*[self._check(peer.contact) for peer in silent])

    async def _check(self, contact: Contact) -> None:
        protocol = self._running()
        for _ in range(self._settings.misses_max):
            if await protocol.ping(contact):
                return
            self._missed(contact)

    async def _keep_calling(self, address: Address) -> None:
        """Look for a bootstrap peer: at growing intervals while silent, then slowly, so that parted halves meet."""
        settings = self._settings
        answering: bool | None = None
        backoff = settings.bootstrap_backoff_min_s
        while True:
            answered = await self._call_on(address)
            if answered is not answering:
                answering = answered
                backoff = settings.bootstrap_backoff_min_s
                if answered:
                    log.info("overlay: bootstrap peer %s:%d answers", *address)
                    await self._refresh(everywhere=True)
                else:
                    log.warning("overlay: bootstrap peer %s:%d does not answer; it is tried again and again", *address)
            else:
                backoff = min(backoff * 2, settings.bootstrap_backoff_max_s)
            await asyncio.sleep((settings.bootstrap_backoff_max_s if answered else backoff) * random.uniform(0.8, 1.2))

    async def _call_on(self, address: Address) -> bool:
        protocol = self._running()
        try:
            target = await _resolve(*address, protocol.family == 6), address[1]
        except OSError:
            return False
        if target == (self._frame.host, self._frame.port):
            return True
        return await protocol.ask(target, Ping()) is not None

    async def _keep_found(self) -> None:
        """Look for the contacts of the last run and those that fell silent: quickly while alone, then slowly."""
        settings = self._settings
        backoff = settings.bootstrap_backoff_min_s
        while True:
            alone = not self.contacts()
            answers = await asyncio.gather(*[self._running().ping(contact) for contact in list(self._lost.values())])
            if alone and any(answers):
                await self._refresh(everywhere=True)
            backoff = min(backoff * 2, settings.bootstrap_backoff_max_s) if self.contacts() or self._lost else backoff
            await asyncio.sleep(backoff * random.uniform(0.8, 1.2))

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_interval_s * random.uniform(0.8, 1.2))
            await self._refresh(everywhere=False)

    async def _refresh(self, *, everywhere: bool) -> None:
        """Look up this node itself, then an id in one bucket, or in each."""
        await self._crawl(self.node_id)
        buckets = list(self._running().router.buckets)
        for bucket in buckets if everywhere else [random.choice(buckets)]:
            # Deep buckets are mostly empty, because ids share their PoP's bits: a few nodes can tell.
            count = self._settings.ksize if bucket.depth() <= 5 else self._settings.parallel
            await self._crawl(random.randint(*bucket.range).to_bytes(20, "big"), count=count)

    async def _publish(self, key: bytes) -> int:
        protocol = self._running()
        hint = signed_hint(key, self.pop, int(time.time() * 1000), self.node_id, self._private_key)
        near = (await self._crawl(key))[:HINT_REPLICAS]
        taken = 0
        if len(near) < HINT_REPLICAS or distance(self.node_id, key) < distance(near[-1].id, key):
            near = near[: HINT_REPLICAS - 1]
            taken += protocol.hints.put(hint, self._now())
        answers = await asyncio.gather(
            *[protocol.ask(contact.address, StoreHint(hint), contact.id) for contact in near]
        )
        taken += sum(answer is not None for answer in answers)
        return taken

    async def _keep_published(self) -> None:
        """Publish each hint again before the nodes that keep it forget it; of more than there is time for, some later.

        Each costs a look-up, and a daemon that has been up for long has published as many as it remembers.
        """
        interval = self._settings.republish_interval_s
        while True:
            await asyncio.sleep(interval / 20)
            due = [key for key, at in self._published.items() if self._now() - at > interval]
            for key in due:
                if key in self._published:
                    self._published[key] = self._now()
                    await self._publish(key)
                    await asyncio.sleep(self._settings.republish_pause_s)

    async def _keep_saved(self) -> None:
        while True:
            await asyncio.sleep(self._settings.save_interval_s)
            self._save()

    def _save(self) -> None:
        contacts = self.contacts()
        if self._state_path is not None and contacts:
            save_contacts(self._state_path, contacts)


def _report(task: asyncio.Task[None]) -> None:
    """A background task ends only when it is cancelled; anything else is a bug, and somebody must hear of it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("overlay: background work ended: %r", error, exc_info=error)


async def _resolve(host: str, port: int, ipv6: bool) -> str:
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
    return str(found[0][4][0])
