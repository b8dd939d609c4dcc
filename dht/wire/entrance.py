"""The port of the links: who connects is looked at by his first bytes, then led through TLS to HTTP, or told why not.

The bytes are only peeked at, so that TLS, or HTTP where links have none, reads them all. A daemon whose `link_tls` is
another than this one's is answered in clear text, which it understands: plain HTTP tells a plain one why, and to one
that begins TLS it says that there is none here. Both are told in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.web_protocol import RequestHandler

from dht.errors import RemoteProtocolError
from dht.wire import strangers, tcp
from dht.wire.handshake import HANDSHAKE_BYTES_MAX
from dht.wire.link import CLOSE_WAIT_S
from dht.wire.refusals import Refusals
from dht.wire.strangers import Strangers, close_now

LINK_PATH = "/link"
OTHER_TLS_STATUS = 426
"""Upgrade Required, as in RFC 2817."""
BACKLOG_CONNECTIONS = 512
"""Who does not fit is not heard at all, and has waited half a second for that."""
TAKEN_AT_ONCE_MAX = 128
FULL_PAUSE_S = 1.0
_PEEKED_BYTES = 64
_TLS_RECORD = b"\x16"
"""Every TLS connection begins with a record of this kind, and no request of HTTP does."""
_DAEMON_REQUEST = f"GET {LINK_PATH} ".encode()

log = logging.getLogger(__name__)
_http_log = logging.getLogger(__name__ + ".http")
# aiohttp reports every malformed request as an error with its bytes; here they are counted, and nothing else.
_http_log.setLevel(logging.CRITICAL)


class _Guest:
    """A connection that is not proven: first led in by a task, then with HTTP."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.handler: RequestHandler | None = None

    def force_close(self) -> None:
        if self.task is not None and not self.task.done():
            self.task.cancel()
        elif self.handler is not None:
            close_now(self.handler)


class Entrance:
    """`accept` serves who asks for a link. `context`: None where links have no TLS. `counters` are the network's."""

    def __init__(
        self,
        accept: Callable[[web.Request], Awaitable[web.StreamResponse]],
        context: ssl.SSLContext | None,
        guests: Strangers,
        refusals: Refusals,
        counters: dict[str, int],
    ) -> None:
        app = web.Application(client_max_size=HANDSHAKE_BYTES_MAX)
        app.router.add_get(LINK_PATH, accept)

        class CountBadRequests(AbstractAccessLogger):
            def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
                if response.status >= 400:
                    counters["garbage"] += 1

        self._runner = web.AppRunner(
            app, access_log_class=CountBadRequests, logger=_http_log, shutdown_timeout=CLOSE_WAIT_S
        )
        self._context = context
        self._guests = guests
        self._refusals = refusals
        self._counters = counters
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._sockets: list[socket.socket] = []

    @property
    def connections(self) -> Collection[RequestHandler]:
        """Those that HTTP serves."""
        server = self._runner.server
        return () if server is None else server.connections

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when that address cannot be listened on."""
        await self._runner.setup()
        try:
            for family, address in await _addresses(host, port):
                with _unless_without(family):
                    listening = socket.create_server(address, family=family, backlog=BACKLOG_CONNECTIONS)
                    listening.setblocking(False)
                    self._sockets.append(listening)
            if not self._sockets:
                raise OSError(errno.EADDRNOTAVAIL, "this host has no such address")
        except OSError:
            await self.close()
            raise
        for listening in self._sockets:
            self._listen(listening)
        return int(self._sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Close the port and every connection that came in by it."""
        listened, self._sockets = self._sockets, []
        for listening in listened:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_WAIT_S)
        await self._runner.cleanup()

    def _listen(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._take, listening)

    def _take(self, listening: socket.socket) -> None:
        """Take in who waits, so many within one turn of the loop."""
        for _ in range(TAKEN_AT_ONCE_MAX):
            try:
                connection, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                # No file descriptors are left, or no memory: they come back when connections end.
                log.error("cannot take a connection at the links' port: %s", error.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listening)
                loop.call_later(FULL_PAUSE_S, self._listen, listening)
                return
            connection.setblocking(False)
            self._enter(connection, str(address[0]))

    def _enter(self, connection: socket.socket, host: str) -> None:
        guest = _Guest()
        if not self._guests.enter(guest, host):
            self._counters["refused"] += 1
            connection.close()
            return
        task = guest.task = asyncio.get_running_loop().create_task(self._lead_in(connection, guest, host))
        self._tasks[task] = None

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.pop(done, None)
            if done.cancelled():
                self._counters["refused"] += 1
            if guest.handler is None:
                connection.close()
                self._guests.leave(guest)

        task.add_done_callback(ended)

    async def _lead_in(self, connection: socket.socket, guest: _Guest, host: str) -> None:
        """Whoever it was not handed on for is closed when this is over."""
        since_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(strangers.STRANGER_S):
                begin = await _first_bytes(connection)
                if begin and self._is_understood(begin):
                    await self._guests.turn(guest, host)
                    if not tcp.is_leaving(connection):
                        await self._hand_on(connection, guest, since_s)
                elif begin:
                    self._count(host, begin)
                    await _answer_in_clear(connection, self._mismatch())
        except ssl.SSLError as error:
            self._counters["garbage"] += 1
            text = f"its TLS failed ({error.reason or error}): it is no daemon of lucd, or of another version"
            self._refusals.tell(host, RemoteProtocolError(text, reason="tls"))
        except TimeoutError:
            self._counters["refused"] += 1
        except OSError as error:
            log.debug("the connection from %s ended before a handshake: %s", host, error)
        except Exception:
            log.exception("a connection from %s failed unexpectedly", host)

    def _is_understood(self, begin: bytes) -> bool:
        return begin.startswith(_TLS_RECORD) == (self._context is not None)

    async def _hand_on(self, connection: socket.socket, guest: _Guest, since_s: float) -> None:
        """To HTTP, through TLS if there is any; the connection is closed by these."""
        server = self._runner.server
        if server is None:
            return
        guest.handler = handler = server()
        # It may be asked for a link before this goes on.
        self._guests.comes(handler, guest, since_s)
        shutdown_s = None if self._context is None else CLOSE_WAIT_S
        try:
            # How long TLS's handshake may take is the caller's business.
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: handler, connection, ssl=self._context, ssl_shutdown_timeout=shutdown_s
            )
        except BaseException:
            self._guests.lost(handler)
            raise
        self._guests.came(handler)

    def _count(self, host: str, begin: bytes) -> None:
        """Only a daemon begins TLS where there is none, or asks for a link without: others are strangers."""
        if begin.startswith((_TLS_RECORD, _DAEMON_REQUEST)):
            self._counters["refused"] += 1
            self._refusals.tell(host, RemoteProtocolError(f"it {self._mismatch()}", reason="link_tls"))
        else:
            self._counters["garbage"] += 1
            text = "it speaks clear text where links have TLS, and asks for no link: it is no daemon of lucd"
            self._refusals.tell(host, RemoteProtocolError(text, reason="stranger"))

    def _mismatch(self) -> str:
        if self._context is None:
            return "begins TLS, and this node's links have none (link_tls = false): set link_tls alike on all nodes"
        return "speaks clear text, and this node's links have TLS (link_tls = true): set link_tls alike on all nodes"


async def _addresses(host: str, port: int) -> Sequence[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return tuple(dict.fromkeys((family, address) for family, _, _, _, address in found))


@contextlib.contextmanager
def _unless_without(family: socket.AddressFamily) -> Iterator[None]:
    """A host may have no IPv6, or no IPv4."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise


async def _first_bytes(connection: socket.socket) -> bytes:
    """What the other end begins with, left where it is; nothing if it went away."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return connection.recv(_PEEKED_BYTES, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            pass
        readable = loop.create_future()
        loop.add_reader(connection, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(connection)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _answer_in_clear(connection: socket.socket, text: str) -> None:
    """Tell it, and give it a moment to read: what is left unread when a connection closes takes the answer with it."""
    body = f"this connection {text}\n".encode()
    head = f"HTTP/1.1 {OTHER_TLS_STATUS} Upgrade Required\r\nUpgrade: TLS/1.3\r\nConnection: Upgrade, close\r\n"
    rest = f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.send(head.encode() + rest.encode() + body)
    connection.shutdown(socket.SHUT_WR)
    loop, left_bytes = asyncio.get_running_loop(), strangers.STRANGER_BYTES_MAX
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_WAIT_S):
            while left_bytes > 0 and (data := await loop.sock_recv(connection, 4096)):
                left_bytes -= len(data)
