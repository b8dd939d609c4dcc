"""Requests and replies by datagram. Whatever comes in is opened, checked and answered without a task of its own.

Nothing that a datagram holds can raise: it is sealed, decoded by type, and counted when it does not fit. A contact
enters the table only after it has answered a fresh request at the address that it claims.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from kademlia.node import Node
from kademlia.protocol import KademliaProtocol

from dht.model import NodeId
from dht.overlay.hints import HintStore
from dht.overlay.messages import (
    CONTACTS_PER_REPLY_MAX,
    REPLIES,
    Contact,
    FindHint,
    FindNode,
    Frame,
    Hints,
    Nodes,
    Ping,
    Pong,
    Reply,
    Request,
    StoreHint,
    decode_frame,
    encode,
)
from dht.overlay.sealing import MESSAGE_BYTES_MAX, OverlayCounters, Sealing
from dht.overlay.table import Table

OUTSTANDING_MAX: Final = 4096
VERIFYING_MAX: Final = 256
Address = tuple[str, int]


@dataclass(slots=True)
class Asked:
    """A request on its way. `expected`: who must answer; None while the node at the address is not known yet."""

    answer: asyncio.Future[tuple[Contact, Reply] | None]
    timeout: asyncio.TimerHandle
    expected: NodeId | None


class OverlayProtocol(KademliaProtocol):  # type: ignore[misc]
    """One UDP socket. `me`: what this node says of itself; an empty host lets peers take the datagrams' source."""

    def __init__(
        self,
        me: Frame,
        node: Node,
        hints: HintStore,
        sealing: Sealing,
        counters: OverlayCounters,
        *,
        ksize: int,
        per_host_max: int,
        timeout_s: float,
        learned: Callable[[Contact], None],
    ) -> None:
        super().__init__(node, hints, ksize)
        self.router: Table = Table(self, ksize, node, per_host_max)
        self.hints = hints
        self.counters = counters
        self.family = 4
        self._me = me
        self._sealing = sealing
        self._timeout_s = timeout_s
        self._learned = learned
        self._asked: dict[bytes, Asked] = {}
        self._verifying: dict[NodeId, asyncio.Task[Any]] = {}
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        # The base class would take any unknown name for a remote function.
        raise AttributeError(name)

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        self.transport = transport
        self.family = 6 if ":" in transport.get_extra_info("sockname")[0] else 4

    def connection_lost(self, exc: Exception | None) -> None:
        for asked in list(self._asked.values()):
            asked.timeout.cancel()
            if not asked.answer.done():
                asked.answer.set_result(None)
        self._asked.clear()
        for task in list(self._verifying.values()):
            task.cancel()

    def error_received(self, exc: OSError) -> None:
        # Mostly "connection refused" of a node that is gone: its silence says the same.
        self.counters.send_errors += 1

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        opened = self._sealing.open(data)
        if opened is None:
            return
        sender, message = opened
        try:
            frame = decode_frame(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.counters.dropped_malformed += 1
            return
        source = str(addr[0]).partition("%")[0], int(addr[1])
        host, port = (frame.host, frame.port) if frame.host else source
        contact = Contact(sender, host, port, frame.pop)
        if not contact.plausible(self.family):
            self.counters.dropped_malformed += 1
            return
        self.counters.received += 1
        if isinstance(frame.body, REPLIES):
            self._accept_reply(frame, contact)
        else:
            self._send(source, frame.id, self._answer(frame.body, contact))
            self.welcome(contact)

    async def ask(
        self, address: Address, body: Request, expected: NodeId | None = None, timeout_s: float | None = None
    ) -> tuple[Contact, Reply] | None:
        """The reply and who gave it; None after the timeout. With `expected`, only that node's reply counts."""
        if len(self._asked) >= OUTSTANDING_MAX or self.transport is None or self.transport.is_closing():
            return None
        request_id = os.urandom(8)
        answer: asyncio.Future[tuple[Contact, Reply] | None] = self._loop.create_future()
        timeout = self._loop.call_later(timeout_s or self._timeout_s, self._give_up, request_id)
        self._asked[request_id] = Asked(answer, timeout, expected)
        self._send(address, request_id, body)
        try:
            return await answer
        finally:
            timeout.cancel()
            self._asked.pop(request_id, None)

    async def ping(self, contact: Contact) -> bool:
        """Whether the very node answers at its address."""
        return await self.ask(contact.address, Ping(), contact.id) is not None

    def usable(self, contacts: tuple[Contact, ...]) -> tuple[Contact, ...]:
        """Those of a reply's contacts that can be true and can be reached from this socket."""
        fit = tuple([c for c in contacts if c.id != self._me_id and c.plausible(self.family)])
        self.counters.refused_contacts += len(contacts) - len(fit)
        return fit

    @property
    def _me_id(self) -> NodeId:
        own: bytes = self.source_node.id
        return own

    def _give_up(self, request_id: bytes) -> None:
        asked = self._asked.pop(request_id, None)
        if asked is not None and not asked.answer.done():
            self.counters.timeouts += 1
            asked.answer.set_result(None)

    def _accept_reply(self, frame: Frame, contact: Contact) -> None:
        asked = self._asked.get(frame.id)
        if asked is None or asked.answer.done() or asked.expected not in (None, contact.id):
            self.counters.dropped_unexpected += 1
            return
        if self.router.learn(contact, self._loop.time()):
            self._learned(contact)
        else:
            self.counters.refused_contacts += 1
        asked.answer.set_result((contact, frame.body))  # type: ignore[arg-type]

    def _answer(self, body: object, sender: Contact) -> Reply:
        match body:
            case FindNode(target):
                return self._nodes(target, sender.id)
            case FindHint(key):
                hints = self.hints.get(key, self._loop.time())
                return Hints(tuple(hints)) if hints else self._nodes(key, sender.id)
            case StoreHint(hint):
                if not self.hints.put(hint, self._loop.time()):
                    self.counters.refused_hints += 1
                return Pong()
            case _:
                return Pong()

    def _nodes(self, target: NodeId, asker: NodeId) -> Nodes:
        """As many of the nearest contacts as surely fit a datagram."""
        room = MESSAGE_BYTES_MAX - 160
        fit: list[Contact] = []
        for contact in self.router.nearest(target, CONTACTS_PER_REPLY_MAX, exclude=asker):
            room -= len(encode(contact))
            if room < 0:
                break
            fit.append(contact)
        return Nodes(tuple(fit))

    def _send(self, address: Address, request_id: bytes, body: Request | Reply) -> None:
        message = encode(Frame(request_id, self._me.host, self._me.port, self._me.pop, body))
        if len(message) > MESSAGE_BYTES_MAX or self.transport is None or self.transport.is_closing():
            self.counters.send_errors += 1
            return
        self.counters.sent += 1
        try:
            self.transport.sendto(self._sealing.seal(message), address)
        except (OSError, ValueError):
            # An address that the socket cannot send to, such as one of the other IP version.
            self.counters.send_errors += 1

    def welcome(self, contact: Contact) -> None:
        """Ask an unknown or moved node back at the address it claims; its reply makes it a contact."""
        known = self.router.get(contact.id)
        if known is not None and known.contact == contact:
            return
        if contact.id in self._verifying or len(self._verifying) >= VERIFYING_MAX:
            return
        task = self._loop.create_task(self.ping(contact))
        self._verifying[contact.id] = task
        task.add_done_callback(lambda _: self._verifying.pop(contact.id, None))
