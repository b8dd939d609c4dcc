"""The local door: a Unix socket on which Nova's processes and the command line reach the daemon of their host.

Frames as in `dht.wire.frames`. Whoever may open the socket file (mode 0660, the daemon's group) is trusted like the
daemon itself. A client that disappears has its requests cancelled; one that sends garbage is cut off and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from dht import codec
from dht.codec import Message
from dht.errors import Indeterminate, Invalid, RemoteProtocolError, StorageError, Unavailable
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import Struct
from dht.wire import frames
from dht.wire.frames import FrameReader
from dht.wire.serving import answer_in_time

CONNECTIONS_MAX = 1_000
REFUSED_CONNECTIONS_MAX = 100
"""Beyond those: they are told why at their first request, or closed when none comes in REFUSED_WAIT_S."""
REFUSED_WAIT_S = 1.0
IN_FLIGHT_REQUESTS_MAX = 256
SOCKET_MODE = 0o660
SOCKET_PATH_BYTES_MAX = 107
WRITE_BUFFER_BYTES_MAX = 4 * 1024 * 1024
LISTEN_BACKLOG_CONNECTIONS = 256
STOP_WAIT_S = 1.0

log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """One client. `state` is free for whoever answers; `on_close` is called once, in order, when the client is gone.

    `peer_pid` is the client's process id as the kernel says, 0 if it does not.
    """

    def __init__(self, door: LocalDoor) -> None:
        self.state: dict[str, Any] = {}
        self.on_close: list[Callable[[], None]] = []
        self.peer_pid = 0
        self.refused = False
        """One too many: nothing that it asks is served."""
        self._door = door
        self._reader = FrameReader()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing can reach this client any more."""
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        """Cut the client off, after what was written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the client off at once."""
        if self._transport is not None:
            self._transport.abort()

    def tasks(self) -> list[asyncio.Task[None]]:
        """The requests being served."""
        return list(self._tasks.values())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self.peer_pid = _peer_pid(transport)
        self._door.joined(self)

    def data_received(self, data: bytes) -> None:
        try:
            for request_id, timeout_ms, raw in self._reader.feed(data):
                if self.refused:
                    text = f"{CONNECTIONS_MAX} connections to this daemon are open: close some, or have smaller pools"
                    self._reply(request_id, frames.failure_of(Unavailable(text, sent=False, closing=True)))
                    self.close()
                    return
                self._start(request_id, timeout_ms, raw)
        except RemoteProtocolError as error:
            self._door.garbage(self, error)

    def pause_writing(self) -> None:
        # Who does not read his replies gets no further requests read.
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for task in list(self._tasks.values()):
            task.cancel()
        callbacks, self.on_close = self.on_close, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("a callback for a closed local connection failed")
        self._door.left(self)

    def _start(self, request_id: int, timeout_ms: int, raw: msgspec.Raw) -> None:
        if timeout_ms == frames.REPLY or request_id in self._tasks:
            raise RemoteProtocolError(f"request {request_id} has no timeout or is already being served")
        try:
            message = codec.decode(memoryview(raw))
        except RemoteProtocolError as error:
            # The frame was whole, so its sender can still be told why (for example that the daemon is older).
            self._reply(request_id, frames.failure_of(error))
            raise
        if len(self._tasks) >= IN_FLIGHT_REQUESTS_MAX:
            text = f"this connection has {IN_FLIGHT_REQUESTS_MAX} requests in flight already: wait for replies"
            self._reply(request_id, frames.failure_of(Unavailable(text, sent=False)))
            return
        self._door.counters["requests"] += 1
        self._tasks[request_id] = asyncio.get_running_loop().create_task(
            self._serve(request_id, timeout_ms / 1000, message)
        )

    async def _serve(self, request_id: int, timeout_s: float, message: Message) -> None:
        try:
            reply = await answer_in_time(self._door.answer(self, message), message, timeout_s)
        finally:
            self._tasks.pop(request_id, None)
        self._reply(request_id, reply)

    def _reply(self, request_id: int, reply: Struct) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames.encode_reply(request_id, reply))


LocalAnswer = Callable[[Connection, Message], Awaitable[Struct]]
"""Serves one request of a local client. `dht.wire.frames.time_left_s()` says how long the client waits."""


class LocalDoor:
    """The listening socket. `counters`: connections (now), requests, garbage, refused, since the start."""

    def __init__(self, path: str | os.PathLike[str], answer: LocalAnswer, mode: int = SOCKET_MODE) -> None:
        self.path = os.fspath(path)
        self.mode = mode
        self.answer = answer
        self.counters = {"connections": 0, "requests": 0, "garbage": 0, "refused": 0}
        self._connections: dict[int, Connection] = {}
        self._server: asyncio.Server | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Listen. A stale socket file is replaced; Invalid or StorageError says why it cannot be done."""
        listener = _bind(self.path, self.mode)
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: Connection(self), sock=listener, backlog=LISTEN_BACKLOG_CONNECTIONS
        )

    async def stop(self) -> None:
        """Stop listening, remove the socket file and cut the clients off; their requests are cancelled."""
        if self._server is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._server.close()
        self._server = None
        connections = list(self._connections.values())
        tasks = [task for connection in connections for task in connection.tasks()]
        for connection in connections:
            connection.close()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_WAIT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_WAIT_S):
                await self._empty.wait()
        for connection in list(self._connections.values()):
            connection.abort()

    def joined(self, connection: Connection) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            self.counters["refused"] += 1
            connection.refused = True
            if len(self._connections) >= CONNECTIONS_MAX + REFUSED_CONNECTIONS_MAX:
                connection.close()
            asyncio.get_running_loop().call_later(REFUSED_WAIT_S, connection.close)
        self._connections[id(connection)] = connection
        self._empty.clear()
        self.counters["connections"] = len(self._connections)

    def left(self, connection: Connection) -> None:
        self._connections.pop(id(connection), None)
        if not self._connections:
            self._empty.set()
        self.counters["connections"] = len(self._connections)

    def garbage(self, connection: Connection, error: RemoteProtocolError) -> None:
        self.counters["garbage"] += 1
        log.debug("local client (process %s) cut off: %s", connection.peer_pid, error)
        connection.close()


def _peer_pid(transport: asyncio.BaseTransport) -> int:
    peer = transport.get_extra_info("socket")
    try:
        pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    except (OSError, AttributeError):
        return 0
    return int(pid)


def _bind(path: str, mode: int) -> socket.socket:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise Invalid(f"socket path {path} is longer than {SOCKET_PATH_BYTES_MAX} bytes: choose a shorter one")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        # Nobody can connect before listen(), so the file is never open to more than the mode says.
        os.chmod(path, mode)
    except OSError as error:
        listener.close()
        raise StorageError(f"cannot make the socket {path}: {error.strerror}; check the directory's owner") from error
    listener.setblocking(False)
    return listener


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise Invalid(f"{path} exists and is not a socket: remove it or choose another socket path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as error:
            raise Invalid(
                f"{path} is in use or not ours ({error}): stop who serves it or choose another path"
            ) from None
    raise Invalid(f"another process serves {path}: stop it or choose another socket path")


class _ClientProtocol(asyncio.Protocol):
    def __init__(self) -> None:
        self.reader = FrameReader()
        self.waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            replies = self.reader.feed(data)
        except RemoteProtocolError:
            if self.transport is not None:
                self.transport.close()
            return
        for request_id, _, raw in replies:
            waiter = self.waiting.pop(request_id, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(raw)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        for waiter in self.waiting.values():
            if not waiter.done():
                waiter.set_exception(Indeterminate("the daemon closed the local socket before it replied"))
        self.waiting.clear()


class AsyncClient:
    """A client of the local door for tools: one connection, many requests at once, opened again when it was lost."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._protocol: _ClientProtocol | None = None
        self._next_id = 0
        self._connecting = asyncio.Lock()

    async def call(self, message: Struct, timeout_s: float = REQUEST_TIMEOUT_S) -> Message:
        """The reply. Errors as in `dht.world.Network.call`."""
        protocol = await self._connect(timeout_s)
        self._next_id += 1
        request_id = self._next_id
        frame = frames.encode_frame(request_id, frames.timeout_ms(timeout_s), message)
        if protocol.transport is None or protocol.transport.is_closing():
            raise Unavailable(f"the daemon closed {self.path}: try again", sent=False)
        waiter: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        protocol.waiting[request_id] = waiter
        protocol.transport.write(frame)
        try:
            raw = await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            raise Indeterminate(
                f"{type(message).__name__}: no reply from the daemon in {timeout_s:.3f} s; it may have been served"
            ) from None
        finally:
            protocol.waiting.pop(request_id, None)
        return frames.read_reply(raw)

    async def close(self) -> None:
        """Close the connection; requests in flight end as Indeterminate."""
        if self._protocol is not None and self._protocol.transport is not None:
            self._protocol.transport.close()
            await asyncio.sleep(0)
        self._protocol = None

    async def _connect(self, timeout_s: float) -> _ClientProtocol:
        async with self._connecting:
            protocol = self._protocol
            if protocol is None or protocol.transport is None or protocol.transport.is_closing():
                loop = asyncio.get_running_loop()
                try:
                    async with asyncio.timeout(timeout_s):
                        _, protocol = await loop.create_unix_connection(_ClientProtocol, self.path)
                except (OSError, TimeoutError) as error:
                    raise Unavailable(
                        f"no daemon answers on {self.path} ({error}): is lucd running?", sent=False
                    ) from None
                self._protocol = protocol
            return protocol
