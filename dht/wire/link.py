"""One link to a proven peer: frames in both directions over one WebSocket.

Frames that are queued in the same turn of the loop leave as one WebSocket message. An empty message is a sign of life,
sent when nothing else was for a while, more often while a request of the peer is being served: so silence towards
somebody who waits means more than silence towards one who does not. Who hears nothing himself says so in place of the
sign of life, for a link that carries one way only is of no use to either side. A peer whose process is slow, stopped or
busy still has a kernel that acknowledges what arrives: where nothing is acknowledged, the network is cut. That can be
told much sooner than that a process hangs, so such a peer is passed by early, and a little later given up.

A large message takes its time on a thin way, and nothing overtakes it. So a peer counts as heard while more of one
arrives, and is told that this node lives as often as if a request of his were being served: it may be one.

Between PoPs an idle link says less: what a PoP is asked from outside may wait a moment for the news that it is silent,
and ways between PoPs may be thin, and many. Who has asked something learns that as soon as within a PoP: the peer that
serves it tells more often, and what is not acknowledged counts the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from aiohttp import ClientResponse, ClientWebSocketResponse, WSMsgType, web

from dht import codec
from dht.codec import Message
from dht.errors import DhtError, Indeterminate, RemoteProtocolError, Unavailable
from dht.limits import FRAME_BYTES_MAX, PEER_TIMEOUT_S
from dht.model import Struct
from dht.wire import frames, tcp
from dht.wire.handshake import PeerIdentity
from dht.wire.serving import answer_in_time, failure_for, outcome_of
from dht.world import Answer


class DialedSocket(ClientWebSocketResponse):
    """The dialer's end. aiohttp's own lets go of the connection only at an orderly close, for which two are needed."""

    def __init__(
        self, reader: Any, writer: Any, protocol: str | None, response: ClientResponse, *rest: Any, **more: Any
    ) -> None:
        super().__init__(reader, writer, protocol, response, *rest, **more)
        self._dialed = response

    def release(self) -> None:
        """Close the connection at once, whatever is on its way."""
        self._dialed.close()


WebSocket = DialedSocket | web.WebSocketResponse


class _Waiter(asyncio.Future[Message]):
    """The reply to a request. Who gives up waiting for it takes it off the link. `short`: see `Link.tick`."""

    __slots__ = ("link", "request_id", "short", "timer")

    def __init__(self, link: Link, request_id: int, short: bool, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.link = link
        self.request_id = request_id
        self.short = short
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        self.link.forget(self.request_id)
        return super().cancel(msg)

    def fail(self, error: DhtError) -> None:
        if not self.done():
            self.set_exception(error)


QUEUE_BYTES_MAX = 64 * 1024 * 1024
SILENT_QUEUE_BYTES_MAX = 1024 * 1024
"""Of a peer that is not alive; what it missed it gets in another way."""
MESSAGE_BYTES_TARGET = 1024 * 1024
"""A WebSocket message takes further frames until it has this size."""
MESSAGE_BYTES_MAX = FRAME_BYTES_MAX + MESSAGE_BYTES_TARGET
SERVING_REQUESTS_MAX = 4096
SIGN_OF_LIFE_S = 0.15
SIGN_WHILE_SERVING_S = 0.04
ALIVE_S = 0.4
"""Who was not heard for so long, and two round trips, does not count as alive: one for what was lost on the way to be
missed, and one for its repetition."""
FAR_SIGN_OF_LIFE_S = 0.5
FAR_ALIVE_S = 1.0
"""The same two of peers of another PoP."""
SUSPECT_S = 0.2
"""Nor does who was not heard for so long, and two round trips, while a request to him waits; four in another PoP, who
may have said nothing since before it: the request may be lost, or the reply."""
GIVE_UP_S = 0.6
"""Short requests to who was not heard for so long, and two round trips, or does not hear this node, fail then; to whom
there is no way, at once."""
MUTE_S = 0.1
"""Nor does he to whom something is on its way for so long, and two round trips with their jitter, while not even his
host acknowledges anything: longer than a kernel puts that off, and time for a second message, if one was lost."""
PARTED_S = 0.2
"""To whom that goes on for so long, and a round trip with its jitter, there is no way. Longer than to be passed
by, because who has no way to a majority refuses."""
ROUND_TRIP_MAX_S = 0.5
DEAF = b"\0"
"""The message of a peer that does not hear this node."""
TICK_S = 0.05
"""How often a link is looked at."""
SILENCE_MAX_S = 3.0
"""Who was not heard for so long loses the link."""
CLOSE_WAIT_S = 0.5

log = logging.getLogger(__name__)


def awake_until_s(now_s: float, ticked_s: float) -> float:
    """Until when this process can say what it did not hear: now, unless it stood still since it looked last.

    What is asked first after such a pause is asked before what arrived meanwhile is read, and before anybody is
    pardoned: by the clock all peers would be silent then, and a node that hears all would refuse.
    """
    return min(now_s, ticked_s + 2 * TICK_S)


class Link:
    """Sends, matches replies to requests and serves the peer's requests, from `run` until it returns.

    `dialed`: whether this node opened it. `far`: both ends say little while idle. `counters` are the network's.
    """

    def __init__(
        self,
        web_socket: WebSocket,
        peer: PeerIdentity,
        dialed: bool,
        far: bool,
        answer: Answer,
        counters: dict[str, int],
        on_close: Callable[[Link], None],
    ) -> None:
        self.peer = peer
        self.dialed = dialed
        self.far = far
        self.closed = False
        self.parted = False
        """Whether the network between is cut, or the peer's host down, as far as the kernel can tell."""
        self.mute = False
        """Whether it looks like that."""
        self._owed_s: float | None = None
        """When the first message left since the peer was heard, if one did and is not acknowledged."""
        self.deaf = False
        """Whether the peer says that it hears nothing."""
        self._deaf_s = 0.0
        self._suspected = False
        self._round_trip_s = 0.0
        """As the kernel measured it when the peer was last silent for a moment."""
        self._arrived = 0.0, 0
        """When the peer had been heard at the last look at the kernel, and the bytes that had come by then."""
        self._loop = asyncio.get_running_loop()
        self._socket = web_socket
        self._answer = answer
        self._counters = counters
        self._on_close = on_close
        self._reader: asyncio.Task[Any] | None = None
        self._waiting: dict[int, _Waiter] = {}
        self._serving: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._queue: list[bytes] = []
        self._queue_bytes = 0
        self._wakeup: asyncio.Future[None] | None = None
        self.heard_s = self._sent_s = self._asked_s = self._ticked_s = self._loop.time()

    @property
    def alive(self) -> bool:
        """Whether the peer was heard lately, hears this node, and leaves nothing in silence."""
        unheard = self.closed or self.deaf or self._suspected or self.mute
        return not unheard and self._heard_lately(awake_until_s(self._loop.time(), self._ticked_s) - self.heard_s)

    def _heard_lately(self, silent_s: float) -> bool:
        return silent_s < (FAR_ALIVE_S if self.far else ALIVE_S) + 2 * self._round_trip_s

    @property
    def busy(self) -> bool:
        """Whether somebody waits for something on this link."""
        return bool(self._waiting or self._serving or self._queue)

    def call(self, message: Struct, timeout_s: float) -> asyncio.Future[Message]:
        """As `dht.world.Network.call`, on this link: asked at once. Raises nothing itself."""
        self._next_id += 1
        request_id = self._next_id
        waiter = _Waiter(self, request_id, timeout_s <= PEER_TIMEOUT_S, self._loop)
        try:
            self._enqueue(frames.encode_frame(request_id, frames.timeout_ms(timeout_s), message))
        except DhtError as error:
            waiter.set_exception(error)
            return waiter
        if not self._waiting:
            self._asked_s = self._loop.time()
        self._waiting[request_id] = waiter
        waiter.timer = self._loop.call_later(timeout_s, self._expire, waiter, type(message).__name__, timeout_s)
        return waiter

    def forget(self, request_id: int) -> _Waiter | None:
        """Nobody waits for this reply any more; who did, if anybody."""
        waiter = self._waiting.pop(request_id, None)
        if waiter is not None and waiter.timer is not None:
            waiter.timer.cancel()
        return waiter

    async def run(self) -> None:
        """Receive until the link ends, whoever ends it; afterwards every request in flight is Indeterminate."""
        self._reader = asyncio.current_task()
        sender = self._loop.create_task(self._send())
        try:
            while not self.closed:
                message = await self._socket.receive()
                if message.type is not WSMsgType.BINARY:
                    if message.type in (WSMsgType.TEXT, WSMsgType.ERROR):
                        self._counters["garbage"] += 1
                    break
                self._hear(self._loop.time())
                deaf = message.data == DEAF
                if deaf and not self.deaf:
                    self._deaf_s = self.heard_s
                self.deaf = deaf
                if message.data and not deaf:
                    self._receive(message.data)
        except RemoteProtocolError as error:
            self._counters["garbage"] += 1
            log.debug("link to %s closed: %s", self.peer.node_id.hex(), error)
        except (OSError, RuntimeError) as error:
            log.debug("link to %s lost: %s", self.peer.node_id.hex(), error)
        except Exception:
            log.exception("the link to %s failed unexpectedly", self.peer.node_id.hex())
        except asyncio.CancelledError:
            if not self.closed or self._reader is None:
                raise
            # close() woke this task up, nobody wants it gone.
            self._reader.uncancel()
        finally:
            self._reader = None
            self.close()
            sender.cancel()
            with contextlib.suppress(OSError, RuntimeError):
                await self._socket.close()

    def tick(self, now_s: float) -> None:
        """Called every few hundredths of a second: signs of life, suspicion, the end of a link that has gone silent."""
        self._ticked_s = now_s
        silent_s = now_s - self.heard_s
        if silent_s > SILENCE_MAX_S:
            self.close()
            return
        arrives = overdue = False
        if silent_s > SIGN_WHILE_SERVING_S:
            known = tcp.read(tcp.socket_of(self._socket))
            arrives = self._take_note_of_arrival(known.received_bytes, now_s)
            overdue = self._echo_is_overdue(known, now_s)
            silent_s = now_s - self.heard_s
        trips_s = 2 * self._round_trip_s
        waited_s = min(silent_s, now_s - self._asked_s) if self._waiting else 0.0
        self._suspected |= waited_s > SUSPECT_S + (2 * trips_s if self.far else trips_s)
        deaf_s = now_s - max(self._deaf_s, self._asked_s) if self.deaf and self._waiting else 0.0
        if self.parted or max(waited_s, deaf_s) > GIVE_UP_S + trips_s:
            self._give_up()
        hears = self._heard_lately(silent_s) and not self.mute
        # A further message, should the first be lost: its acknowledgement comes at once, and tells a loss from a cut.
        often = self._serving or arrives or not hears or overdue
        pause_s = SIGN_WHILE_SERVING_S if often else FAR_SIGN_OF_LIFE_S if self.far else SIGN_OF_LIFE_S
        if now_s - self._sent_s > pause_s and not self._queue:
            sign = b"" if hears else DEAF
            self._queue.append(sign)
            self._queue_bytes += len(sign)
            self._wake()

    def _give_up(self) -> None:
        """Fail the short requests: who asks a majority need not wait their time-out for each silent replica."""
        text = f"node {self.peer.node_id.hex()} fell silent before its reply: the request may have been served"
        for waiter in [waiter for waiter in self._waiting.values() if waiter.short]:
            self.forget(waiter.request_id)
            waiter.fail(Indeterminate(text))

    def _take_note_of_arrival(self, received_bytes: int, now_s: float) -> bool:
        """Whether more of a message, which is not complete yet, came since the last look; the peer is heard then."""
        heard_s, before_bytes = self._arrived
        arrives = heard_s == self.heard_s and received_bytes > before_bytes
        if arrives:
            self._hear(now_s)
        self._arrived = self.heard_s, received_bytes
        return arrives

    def _hear(self, now_s: float) -> None:
        self.heard_s = now_s
        self._suspected = self.mute = self.parted = False
        self._owed_s = None

    def _echo_is_overdue(self, known: tcp.Tcp, now_s: float) -> bool:
        """Whether the peer's host should have acknowledged something by now; sets `mute` and `parted`.

        Both clocks must say it: after a pause of this host, or of this process, one of the two is wrong.
        """
        self._round_trip_s = min(ROUND_TRIP_MAX_S, known.round_trip_s)
        if not known.unacknowledged:
            self._owed_s = None
            self.mute = self.parted = False
            return False
        # What left before the peer was last heard, and is not acknowledged, has been without an echo since then.
        owed_s = self.heard_s if self._owed_s is None else self._owed_s
        echoless_s = min(known.last_ack_s, now_s - owed_s)
        echo_s = min(ROUND_TRIP_MAX_S, known.echo_max_s)
        self.mute = echoless_s > MUTE_S + 2 * echo_s
        self.parted = self.mute and echoless_s > PARTED_S + echo_s
        return echoless_s > echo_s

    def pardon(self, own_pause_s: float) -> None:
        """This process stood still for so long, so it could not hear anybody."""
        self.heard_s += own_pause_s
        if self._owed_s is not None:
            self._owed_s += own_pause_s

    def close(self) -> None:
        """End the link now. Requests in flight become Indeterminate; what is being served goes on unheard."""
        if self.closed:
            return
        self.closed = True
        self._queue.clear()
        text = f"the link to node {self.peer.node_id.hex()} was lost before its reply: it may have been served"
        for waiter in list(self._waiting.values()):
            self.forget(waiter.request_id)
            waiter.fail(Indeterminate(text))
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._on_close(self)

    def drop_for_garbage(self) -> None:
        """Count the peer's violation of the protocol and end the link."""
        self._counters["garbage"] += 1
        self.close()

    def _expire(self, waiter: _Waiter, asked: str, timeout_s: float) -> None:
        self._waiting.pop(waiter.request_id, None)
        text = f"{asked}: node {self.peer.node_id.hex()} did not reply in {timeout_s:.3f} s"
        waiter.fail(Indeterminate(f"{text}; it may have been served"))

    def _enqueue(self, frame: bytes) -> None:
        if self.closed:
            raise Unavailable(f"the link to node {self.peer.node_id.hex()} is closed: try again", sent=False)
        waiting = self._queue_bytes
        if waiting and waiting + len(frame) > (limit := QUEUE_BYTES_MAX if self.alive else SILENT_QUEUE_BYTES_MAX):
            self._counters["shed"] += 1
            text = f"{waiting} bytes wait to be sent to node {self.peer.node_id.hex()}, which is too slow"
            raise Unavailable(f"{text} ({limit} is the limit): try later", sent=False)
        self._queue.append(frame)
        self._queue_bytes += len(frame)
        self._counters["frames_out"] += 1
        self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def _send(self) -> None:
        try:
            while not self.closed:
                if not self._queue:
                    self._wakeup = self._loop.create_future()
                    await self._wakeup
                    continue
                data = self._take_message()
                if self._owed_s is None:
                    self._owed_s = self._loop.time()
                await self._socket.send_bytes(data)
                # Counted until it left, so that the limit holds for what the transport has taken but not sent.
                self._queue_bytes -= len(data)
                self._sent_s = self._loop.time()
                self._counters["bytes_out"] += len(data)
        except (OSError, RuntimeError) as error:
            log.debug("cannot send to %s: %s", self.peer.node_id.hex(), error)
            self.close()

    def _take_message(self) -> bytes:
        queue = self._queue
        size = taken = 0
        for frame in queue:
            # DEAF is a message of its own, and no frame: what was queued behind it goes with the next one.
            if taken and (size + len(frame) > MESSAGE_BYTES_TARGET or queue[0] is DEAF):
                break
            size += len(frame)
            taken += 1
        data = queue[0] if taken == 1 else b"".join(queue[:taken])
        del queue[:taken]
        return data

    def _receive(self, data: bytes) -> None:
        self._counters["bytes_in"] += len(data)
        for request_id, timeout_ms, raw in frames.split(data):
            self._counters["frames_in"] += 1
            if timeout_ms == frames.REPLY:
                self._take_reply(request_id, raw)
            elif request_id in self._serving:
                raise RemoteProtocolError(f"request {request_id} is being served already")
            elif len(self._serving) >= SERVING_REQUESTS_MAX:
                text = f"{SERVING_REQUESTS_MAX} requests of this peer are being served: try later"
                self._reply(request_id, frames.failure_of(Unavailable(text, sent=False)))
            else:
                self._begin(request_id, timeout_ms / 1000, codec.decode(memoryview(raw)))
            if self.closed:
                return

    def _take_reply(self, request_id: int, raw: msgspec.Raw) -> None:
        waiter = self.forget(request_id)
        if waiter is None or waiter.done():
            return
        try:
            waiter.set_result(frames.read_reply(raw))
        except RemoteProtocolError as error:
            waiter.set_exception(error)
            self.drop_for_garbage()
        except DhtError as error:
            waiter.set_exception(error)

    def _begin(self, request_id: int, timeout_s: float, message: Message) -> None:
        """Begin to serve a request: in a task of its own, unless all that it takes is done or goes on by itself."""
        try:
            answer = self._answer(self.peer.node_id, message)
        except Exception as error:
            self._reply(request_id, failure_for(error, message))
            return
        if not isinstance(answer, asyncio.Future):
            self._serving[request_id] = self._loop.create_task(self._serve(request_id, timeout_s, message, answer))
        elif answer.done():
            self._reply(request_id, outcome_of(answer, message))
        else:
            self._serving[request_id] = answer
            answer.add_done_callback(partial(self._answered, request_id, message))

    def _answered(self, request_id: int, message: Message, answer: asyncio.Future[Struct]) -> None:
        del self._serving[request_id]
        if not answer.cancelled():
            self._reply(request_id, outcome_of(answer, message))

    async def _serve(self, request_id: int, timeout_s: float, message: Message, answer: Awaitable[Struct]) -> None:
        try:
            reply = await answer_in_time(answer, message, timeout_s)
        finally:
            del self._serving[request_id]
        self._reply(request_id, reply)

    def _reply(self, request_id: int, reply: Struct) -> None:
        if self.closed:
            return
        try:
            self._enqueue(frames.encode_reply(request_id, reply))
        except Unavailable:
            # A peer that asks and does not read: it will take its requests for Indeterminate, as they are.
            self.close()
