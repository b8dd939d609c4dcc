"""Links to peers over aiohttp WebSockets and TLS: `dht.world.Network` for production (DESIGN section 10).

One link per pair of nodes. Links to all nodes of the address book are kept up: dialled at once, and again with growing
pauses when lost, for as long as they are needed. If both nodes dial at the same time, the link that the node with the
smaller id dialled stays; the other takes no new requests and closes when its last are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from dht.codec import Failure
from dht.errors import DhtError, Invalid, RemoteProtocolError, Unavailable
from dht.model import NodeId, Struct
from dht.wire import dialing, frames
from dht.wire.dialing import CONNECT_TIMEOUT_S
from dht.wire.entrance import Entrance
from dht.wire.handshake import AcceptBoot, Handshake, PeerIdentity, Role
from dht.wire.identity import Cluster, NodeIdentity
from dht.wire.link import (
    ALIVE_S,
    CLOSE_WAIT_S,
    MESSAGE_BYTES_MAX,
    TICK_S,
    DialedSocket,
    Link,
    WebSocket,
    awake_until_s,
)
from dht.wire.refusals import Refusals
from dht.wire.serving import answer_in_time
from dht.wire.strangers import Strangers
from dht.wire.tls import LinkTls
from dht.world import Answer

HANDSHAKE_TIMEOUT_S = 2.5
"""Four round trips, of which each may take half a second, with some room: TLS, HTTP's upgrade, Hellos, Proofs."""
DIAL_TIMEOUT_S = CONNECT_TIMEOUT_S + HANDSHAKE_TIMEOUT_S
ADDRESSES_MAX = 10_000
REDIAL_MIN_S = 0.05
REDIAL_MAX_S = 0.5
"""Short, because it is what a healed network waits for; a dial that nobody answers costs next to nothing."""
FAILURES_BEFORE_REFUSAL = 2
"""After so many failed dials nobody waits for the next: messages to the peer are refused at once."""
UNNEEDED_AFTER_S = 600.0
"""Who was not alive for so long, and is not needed any more, is dialled no more: nodes are replaced for years."""
RETIRED_WAIT_S = 1.0
RETIRED_ROUNDS_MAX = 30
FAR_LEVEL_MIN = 3
"""Feature level of a node that expects few signs of life from another PoP."""
ANY_HOST = ("0.0.0.0", "::", "")

log = logging.getLogger(__name__)


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[ipv6]:port". Raises Invalid."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise Invalid(f"{text!r} is not host:port")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The text that `parse_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Peer:
    """What is known of one other node: where it is, the link to it, the attempt to get one."""

    __slots__ = ("address", "alive_s", "dialing", "failures", "link", "proven", "timer", "why")

    def __init__(self, now_s: float) -> None:
        self.alive_s = now_s
        """When the peer was last seen alive, or first heard of."""
        self.why = ""
        """What the last dial failed for."""
        self.address: tuple[str, int] | None = None
        self.link: Link | None = None
        self.dialing: asyncio.Task[Link] | None = None
        self.failures = 0
        self.proven: PeerIdentity | None = None
        self.timer: asyncio.TimerHandle | None = None


class LinkNetwork:
    """The network of one node. `tls`: None where links have none, which has to be the same on all nodes.

    Raises Unavailable where TLS cannot be with the aiohttp that is installed.

    `counters` since the start: links (now), frames_in, frames_out, bytes_in, bytes_out, dials, lost, refused
    (handshakes, and dials that had none because one end has TLS and the other not), garbage, shed (messages not taken
    because the peer is too slow), pauses (in which this process stood still for so long that peers took it for gone).
    `on_link` callbacks get each proven peer when a link to it comes up, and when one to
    its next start takes the place of a link that was not missed yet.
    """

    def __init__(self, identity: NodeIdentity, cluster: Cluster, accept_boot: AcceptBoot, tls: LinkTls | None) -> None:
        if tls is not None:
            dialing.check_aiohttp()
        self.identity = identity
        names = "links frames_in frames_out bytes_in bytes_out dials lost refused garbage shed pauses"
        self.counters = dict.fromkeys(names.split(), 0)
        self.on_link: list[Callable[[PeerIdentity], None]] = []
        self.needed: Callable[[NodeId], bool] = lambda node: True
        """Whether this node has, or will have, to do with that one; asked of those that are silent for long."""
        self._cluster = cluster
        self._accept_boot = accept_boot
        self._answer: Answer | None = None
        self._advertised = ""
        self._peers: dict[NodeId, _Peer] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._retired: dict[Link, None] = {}
        self._tls = tls
        self._strangers = Strangers()
        self._refusals = Refusals()
        self._entrance: Entrance | None = None
        self._session: aiohttp.ClientSession | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._ticked_s = 0.0
        self._started_s = 0.0
        self.port = 0

    def serve(self, answer: Answer) -> None:
        """Set what answers the peers' requests."""
        self._answer = answer

    async def start(self, host: str, port: int, advertise: str | None = None) -> None:
        """Listen (port 0: any free one, see `port`) and dial the address book.

        `advertise`: the host:port at which peers reach this node, if not host:port. Raises Invalid when the address
        cannot be listened on.
        """
        context = None if self._tls is None else self._tls.listening
        entrance = Entrance(self._accept, context, self._strangers, self._refusals, self.counters)
        try:
            self.port = await entrance.open(host, port)
        except (OSError, socket.gaierror) as error:
            text = f"cannot listen on {format_address(host, port)}: {error.strerror or error}"
            raise Invalid(f"{text}; stop who uses it or choose another address") from None
        self._entrance = entrance
        self._advertised = advertise or format_address(host, self.port)
        self._session = dialing.session(None if self._tls is None else self._tls.dialing)
        self._started_s = asyncio.get_running_loop().time()
        self._tick()
        for node_id in list(self._peers):
            self._dial(node_id)

    async def stop(self) -> None:
        """Close all links and stop listening."""
        if self._entrance is None or self._session is None:
            return
        entrance, self._entrance = self._entrance, None
        session, self._session = self._session, None
        if self._ticking is not None:
            self._ticking.cancel()
        for peer in self._peers.values():
            if peer.timer is not None:
                peer.timer.cancel()
            if peer.link is not None:
                peer.link.close()
        for link in list(self._retired):
            link.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_WAIT_S)
        await session.close()
        await entrance.close()

    def set_address(self, node_id: NodeId, host: str, port: int) -> None:
        """Enter or correct a node's address; the link to it is kept up from now on."""
        if node_id == self.identity.node_id:
            return
        if node_id not in self._peers and len(self._peers) >= ADDRESSES_MAX:
            raise Unavailable(f"the address book holds {ADDRESSES_MAX} nodes: forget some first", sent=False)
        peer = self._peers.setdefault(node_id, _Peer(asyncio.get_running_loop().time()))
        if peer.address != (host, port):
            peer.address = (host, port)
            peer.failures = 0
            if self._session is not None:
                self._dial(node_id)

    def forget(self, node_id: NodeId) -> None:
        """Take a node out of the address book and close the link to it."""
        peer = self._peers.pop(node_id, None)
        if peer is None:
            return
        if peer.timer is not None:
            peer.timer.cancel()
        if peer.dialing is not None:
            peer.dialing.cancel()
        if peer.link is not None:
            peer.link.close()

    def addresses(self) -> dict[NodeId, tuple[str, int]]:
        """The address book."""
        return {node_id: peer.address for node_id, peer in self._peers.items() if peer.address is not None}

    def peers(self) -> list[PeerIdentity]:
        """The nodes to which there is a link."""
        return [peer.link.peer for peer in self._peers.values() if peer.link is not None]

    def alive(self, node: NodeId) -> bool:
        """Whether the node was heard lately (`dht.wire.link.Link.alive`)."""
        if node == self.identity.node_id:
            return True
        peer = self._peers.get(node)
        return peer is not None and peer.link is not None and peer.link.alive

    def silent_s(self, node: NodeId) -> float:
        """As `dht.world.Network.silent_s`."""
        peer = self._peers.get(node)
        if self.alive(node):
            return 0.0
        until_s = awake_until_s(asyncio.get_running_loop().time(), self._ticked_s)
        return max(0.0, until_s - (self._started_s if peer is None else peer.alive_s))

    def parted(self, node: NodeId) -> bool:
        """As `dht.world.Network.parted`. A link that is closed tells nothing: its peer may be starting again."""
        peer = self._peers.get(node)
        return peer is not None and peer.link is not None and peer.link.parted

    def call(self, to: NodeId, message: Struct, timeout_s: float) -> Awaitable[Struct]:
        """As `dht.world.Network.call`. Where there is a link the request leaves at once."""
        peer = self._peers.get(to)
        if peer is not None and peer.link is not None:
            return peer.link.call(message, timeout_s)
        if to == self.identity.node_id:
            return self._call_itself(message, timeout_s)
        return self._call_over_new_link(to, message, timeout_s)

    async def _call_over_new_link(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        deadline = asyncio.get_running_loop().time() + timeout_s
        link = await self._link_to(to, message, timeout_s)
        return await link.call(message, max(0.001, deadline - asyncio.get_running_loop().time()))

    async def greet(self, host: str, port: int, timeout_s: float = DIAL_TIMEOUT_S) -> PeerIdentity:
        """Dial an address whose node is not known yet (a bootstrap peer), and keep the link; one that is there will do.

        Raises Unavailable when nobody answers and RemoteProtocolError when one refuses the other.
        """
        for peer in self._peers.values():
            if peer.address == (host, port) and peer.link is not None and peer.link.alive:
                return peer.link.peer
        link = await self._connect((host, port), None, timeout_s)
        self._peers[link.peer.node_id].address = (host, port)
        return link.peer

    async def _call_itself(self, message: Struct, timeout_s: float) -> Struct:
        # A task of its own: the deadline of the request inside is not that of the request outside.
        reply: Struct = await self._spawn(answer_in_time(self._serve_itself(message), message, timeout_s))
        if isinstance(reply, Failure):
            raise frames.error_of(reply)
        return reply

    async def _link_to(self, to: NodeId, message: Struct, timeout_s: float) -> Link:
        peer = self._peers.get(to)
        name = type(message).__name__
        if peer is None or peer.address is None or self._session is None:
            raise Unavailable(f"{name} was not sent: the address of node {to.hex()} is not known", sent=False)
        if peer.failures >= FAILURES_BEFORE_REFUSAL:
            # It is dialled again and again by itself; waiting calls would only pile up.
            text = f"{name} was not sent: no link to node {to.hex()} at {format_address(*peer.address)}: {peer.why}"
            raise Unavailable(text, sent=False)
        dialing = self._dial(to)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(dialing)
        except asyncio.CancelledError:
            if not dialing.cancelled():
                raise
            error: Exception = Unavailable("this node is stopping")
        except TimeoutError:
            error = Unavailable(f"none within {timeout_s:.3f} s")
        except DhtError as failure:
            error = failure
        where = format_address(*peer.address)
        raise Unavailable(f"{name} was not sent: no link to node {to.hex()} at {where}: {error}", sent=False) from None

    def _dial(self, node_id: NodeId) -> asyncio.Task[Link]:
        """The attempt that is under way, or a new one."""
        peer = self._peers[node_id]
        if peer.dialing is None:
            if peer.timer is not None:
                peer.timer.cancel()
                peer.timer = None
            peer.dialing = self._spawn(self._dial_once(node_id, peer))
            peer.dialing.add_done_callback(_retrieve)
        return peer.dialing

    async def _dial_once(self, node_id: NodeId, peer: _Peer) -> Link:
        try:
            if peer.link is not None:
                return peer.link
            if peer.address is None:
                raise Unavailable("its address is not known", sent=False)
            return await self._connect(peer.address, node_id, DIAL_TIMEOUT_S)
        except DhtError as error:
            peer.failures += 1
            peer.why = error.message
            if isinstance(error, RemoteProtocolError) and peer.address is not None:
                self._refusals.tell(f"node {node_id.hex()} at {format_address(*peer.address)}", error)
            elif peer.failures == 1:
                log.info("no link to node %s at %s: %s", node_id.hex(), peer.address, error.message)
            raise
        finally:
            peer.dialing = None
            self._redial_later(node_id)

    def _redial_later(self, node_id: NodeId) -> None:
        peer = self._peers.get(node_id)
        if peer is None or self._session is None or peer.address is None or peer.timer is not None:
            return
        if peer.link is None and peer.dialing is None:
            silent_s = asyncio.get_running_loop().time() - peer.alive_s
            if silent_s > UNNEEDED_AFTER_S and not self.needed(node_id):
                self.forget(node_id)
                return
            pause_s = min(REDIAL_MAX_S, REDIAL_MIN_S * 2.0 ** min(peer.failures, 10)) * random.uniform(0.7, 1.3)
            peer.timer = asyncio.get_running_loop().call_later(pause_s, self._redial, node_id, peer)

    def _redial(self, node_id: NodeId, peer: _Peer) -> None:
        peer.timer = None
        if self._session is not None and peer.link is None and self._peers.get(node_id) is peer:
            self._dial(node_id)

    async def _connect(self, address: tuple[str, int], expected: NodeId | None, timeout_s: float) -> Link:
        host, port = address
        session = self._session
        if session is None:
            raise Unavailable("this node is not started", sent=False)
        self.counters["dials"] += 1
        where = format_address(host, port)
        try:
            async with asyncio.timeout(timeout_s):
                ws = await self._open(session, host, port)
                try:
                    peer = await self._shake(ws, Role.DIALER, expected)
                except BaseException:
                    ws.release()
                    raise
        except RemoteProtocolError:
            raise
        except (OSError, aiohttp.ClientError, ValueError) as error:
            raise dialing.failure(where, error, timeout_s) from None
        link = self._link(ws, peer, dialed=True)
        self._spawn(link.run())
        return self._register(link)

    async def _open(self, session: aiohttp.ClientSession, host: str, port: int) -> DialedSocket:
        try:
            return await dialing.web_socket(session, host, port)
        except RemoteProtocolError:
            self.counters["refused"] += 1
            raise

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        connection = request.protocol
        if not self._strangers.begin(connection):
            self.counters["refused"] += 1
            raise web.HTTPServiceUnavailable(text="this connection had its handshake: come again by another one")
        ws = web.WebSocketResponse(compress=False, max_msg_size=MESSAGE_BYTES_MAX, timeout=CLOSE_WAIT_S)
        try:
            await ws.prepare(request)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                peer = await self._shake(ws, Role.LISTENER, None)
        except RemoteProtocolError as error:
            self._refusals.tell(request.remote or "?", error)
            return ws
        except (TimeoutError, OSError):
            return ws
        except web.HTTPException:
            raise
        except Exception:
            log.exception("a handshake failed unexpectedly")
            return ws
        finally:
            self._strangers.end(connection)
        if self._session is None:
            return ws
        link = self._link(ws, peer, dialed=False)
        self._strangers.proven(connection)
        self._register(link)
        try:
            await link.run()
        finally:
            self._strangers.ended(connection)
        return ws

    async def _shake(self, ws: WebSocket, role: Role, expected: NodeId | None) -> PeerIdentity:
        """Run the handshake to its end. A refusal is counted, told to the other side, and raised."""
        shake = Handshake(
            role,
            self.identity,
            self._cluster,
            self._advertised,
            self._accept_boot,
            expected=expected,
            channel_binding=self._channel_binding(ws, role),
        )
        try:
            for data in shake.start():
                await ws.send_bytes(data)
            while shake.peer is None:
                message = await ws.receive()
                if message.type is not WSMsgType.BINARY:
                    if message.type is WSMsgType.TEXT:
                        self.counters["garbage"] += 1
                    raise RemoteProtocolError("the connection ended within the handshake", reason="ended")
                replies = shake.receive(message.data)
                if shake.peer is not None:
                    self._check_start(shake.peer)
                for data in replies:
                    await ws.send_bytes(data)
        except RemoteProtocolError as error:
            self.counters["refused"] += 1
            if error.detail.get("reason") == "garbage":
                self.counters["garbage"] += 1
            with contextlib.suppress(OSError, RuntimeError, TimeoutError):
                if error.detail.get("reason") not in ("refused", "ended"):
                    await ws.send_bytes(shake.farewell(error))
                async with asyncio.timeout(CLOSE_WAIT_S):
                    await ws.close()
            raise
        return shake.peer

    def _channel_binding(self, ws: WebSocket, role: Role) -> bytes:
        if self._tls is None:
            return b""
        return self._tls.binding(ws.get_extra_info("ssl_object"), dialed=role is Role.DIALER)

    def _check_start(self, met: PeerIdentity) -> None:
        """Refuse a second process with the same incarnation and boot counter: a copied data directory."""
        known = self._peers[met.node_id].proven if met.node_id in self._peers else None
        if known is None or (known.incarnation, known.boot) != (met.incarnation, met.boot):
            return
        if known.start_id != met.start_id:
            text = f"boot {met.boot} of this incarnation was met as another process: a data directory was copied"
            raise RemoteProtocolError(text, reason="boot")

    def _link(self, ws: WebSocket, peer: PeerIdentity, *, dialed: bool) -> Link:
        # Both ends have to think the same of it: who expects more signs of life takes the other for silent.
        far = peer.pop != self.identity.pop and peer.feature_level >= FAR_LEVEL_MIN
        return Link(ws, peer, dialed, far, self._serve, self.counters, self._closed)

    def _register(self, link: Link) -> Link:
        """Make the link the pair's one, or retire it; returns the one to use."""
        node_id = link.peer.node_id
        peer = self._peers.setdefault(node_id, _Peer(asyncio.get_running_loop().time()))
        old = peer.link
        if old is not None and not self._replaces(link, old):
            self._retire(link)
            return old
        peer.link = link
        peer.failures = 0
        if old is not None:
            self._retire(old)
        peer.proven = link.peer
        if peer.address is None or not link.dialed:
            with contextlib.suppress(Invalid):
                host, port = parse_address(link.peer.address)
                peer.address = (host, port) if host not in ANY_HOST else peer.address
        self._count_links()
        # A peer that started again may be here before its former link is missed: it knows nothing of what that one was
        # told.
        if old is None or old.peer.start_id != link.peer.start_id:
            for callback in list(self.on_link):
                try:
                    callback(link.peer)
                except Exception:
                    log.exception("a callback for a new link failed")
        return link

    def _replaces(self, new: Link, old: Link) -> bool:
        if old.closed or not old.alive or old.peer.start_id != new.peer.start_id or new.dialed == old.dialed:
            # The peer has restarted, or its end of the old link is gone: who dials has none.
            return True
        return new.dialed == (self.identity.node_id < new.peer.node_id)

    def _retire(self, link: Link, rounds: int = RETIRED_ROUNDS_MAX) -> None:
        """Close the link when nobody waits for anything on it any more; both nodes retire it at about the same time."""
        self._retired[link] = None
        asyncio.get_running_loop().call_later(RETIRED_WAIT_S, self._close_retired, link, rounds)

    def _close_retired(self, link: Link, rounds: int) -> None:
        if link.busy and rounds and not link.closed:
            self._retire(link, rounds - 1)
        else:
            link.close()

    def _closed(self, link: Link) -> None:
        self._retired.pop(link, None)
        peer = self._peers.get(link.peer.node_id)
        if peer is not None and peer.link is link:
            peer.link = None
            self.counters["lost"] += 1
            self._count_links()
            self._redial_later(link.peer.node_id)

    def _count_links(self) -> None:
        self.counters["links"] = sum(peer.link is not None for peer in self._peers.values())

    async def _serve_itself(self, message: Struct) -> Struct:
        return await self._serve(self.identity.node_id, message)

    def _serve(self, sender: NodeId, message: Struct) -> Awaitable[Struct]:
        if self._answer is None:
            raise Unavailable("this node has just started and does not answer yet: try again")
        return self._answer(sender, message)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        own_pause_s = now_s - self._ticked_s - TICK_S if self._ticked_s else 0.0
        self.counters["pauses"] += own_pause_s > ALIVE_S
        for peer in self._peers.values():
            if peer.link is not None:
                if own_pause_s > TICK_S:
                    peer.link.pardon(own_pause_s)
                peer.link.tick(now_s)
            if own_pause_s > TICK_S:
                peer.alive_s += own_pause_s
            if peer.link is not None and peer.link.alive:
                peer.alive_s = now_s
        accepted = self._entrance.connections if self._entrance is not None else ()
        self.counters["refused"] += self._strangers.turn_out(accepted, now_s)
        self._ticked_s = now_s
        self._ticking = loop.call_later(TICK_S, self._tick)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task


def _retrieve(task: asyncio.Task[Link]) -> None:
    """Look at the task's error, so that asyncio does not complain when nobody waited for it."""
    if not task.cancelled():
        task.exception()
