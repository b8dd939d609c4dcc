"""Calls whose caller and server are on different hosts.

The caller's daemon hands the call over as it does a cast, and waits; the server's daemon sends the answer as a message
of its own, again and again until it is taken or the caller's time is over. So no request stays open between two daemons
for as long as a call lasts, and a short cut in between costs nothing but time. Meanwhile the caller's daemon asks now
and then whether the other still knows the call: who has started again does not, and then nobody knows what became of
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from dht.errors import DhtError, Indeterminate, Invalid, Unavailable
from dht.model import NodeId
from dht.requests import Done
from dht.world import Clock
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.peer_messages import (
    CALLS_ASKED_MAX,
    AskCalls,
    CallsReply,
    Carry,
    FarReply,
    FarSign,
    Origin,
)
from nova_bridge.rpc.post import Post, Where
from nova_bridge.rpc.queues import Envelope, Waiting

FAR_CALLS_MAX = 10_000
REPLIES_BYTES_MAX = 256 * 1024 * 1024
ASK_TIMEOUT_S = 3.0
RETRY_PAUSE_S = 0.2
PROBE_PAUSE_S = 2.0
LOST_S = 10.0
"""A call whose server's daemon cannot be asked for so long has failed."""


class Here(Protocol):
    """The part of `nova_bridge.rpc.bus.Bus` that calls need."""

    def begin_call(self, monitor_s: float, left_s: float) -> Waiting: ...

    def end_call(self, call: Waiting) -> None: ...

    def accept(self, address: Address, envelope: Envelope) -> None: ...

    def reply(self, number: int, body: bytes) -> bool: ...

    def fail(self, number: int, why: str) -> bool: ...

    def sign(self, number: int) -> bool: ...


class FarCalls:
    """Both ends of the calls between this host and others."""

    def __init__(self, origin: Origin, clock: Clock, post: Post, bus: Here) -> None:
        self._origin = origin
        self._clock = clock
        self._post = post
        self._bus = bus
        self._ours: dict[int, tuple[Waiting, Where, float]] = {}
        """Calls of this host's clients: where they were taken, and when that was said last."""
        self._theirs: dict[tuple[NodeId, int, int], Waiting] = {}
        self._replies_bytes = 0
        self._signing: set[tuple[NodeId, int, int]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._probing: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Let go of all calls."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        """Calls of both kinds that are not over."""
        return len(self._ours) + len(self._theirs)

    # ---- the caller's side

    def taken(self, call: Waiting, where: Where) -> None:
        """The call was handed over; watch it until it is over."""
        if call.answer.done():
            return
        self._ours[call.id] = call, where, self._clock.monotonic()
        call.answer.add_done_callback(lambda _: self._ours.pop(call.id, None))
        if self._probing is None or self._probing.done():
            self._probing = self._spawn(self._probe())

    def replied(self, message: FarReply) -> Done:
        """Serve a FarReply."""
        if message.boot != self._origin.boot:
            return Done(False)
        if message.failed:
            return Done(self._bus.fail(message.call, message.failed))
        return Done(self._bus.reply(message.call, message.body))

    def signed(self, message: FarSign) -> Done:
        """Serve a FarSign."""
        return Done(message.boot == self._origin.boot and self._bus.sign(message.call))

    async def _probe(self) -> None:
        while self._ours:
            await self._clock.sleep(PROBE_PAUSE_S)
            now_s = self._clock.monotonic()
            at: dict[Where, list[int]] = {}
            for number, (_, where, since_s) in self._ours.items():
                if now_s - since_s >= PROBE_PAUSE_S / 2:
                    at.setdefault(where, []).append(number)
            await asyncio.gather(*(self._probe_one(where, numbers) for where, numbers in at.items()))

    async def _probe_one(self, where: Where, numbers: list[int]) -> None:
        for first in range(0, len(numbers), CALLS_ASKED_MAX):
            some = tuple(numbers[first : first + CALLS_ASKED_MAX])
            try:
                reply = await self._post.ask(where, AskCalls(self._origin, some), ASK_TIMEOUT_S)
            except DhtError:
                self._silent(where, some)
                continue
            unknown = reply.unknown if isinstance(reply, CallsReply) else ()
            for number in some:
                if number in unknown:
                    text = f"node {where.node.hex()}, which had taken the call, does not know it any more"
                    self._bus.fail(number, f"{text}: it started again")
                elif number in self._ours:
                    call, _, _ = self._ours[number]
                    self._ours[number] = call, where, self._clock.monotonic()

    def _silent(self, where: Where, numbers: tuple[int, ...]) -> None:
        now_s = self._clock.monotonic()
        for number in numbers:
            if number in self._ours and now_s - self._ours[number][2] > LOST_S:
                text = (
                    f"node {where.node.hex()} of PoP {where.pop}, which had taken the call, has been out of reach for"
                )
                self._bus.fail(number, f"{text} {LOST_S:.0f} s")

    # ---- the server's side

    def accept(self, sender: NodeId, message: Carry) -> None:
        """Take a call for a listener of this host.

        Raises as `Bus.accept`, Unavailable when there are too many, and Invalid for one that is open here already.
        """
        if len(self._theirs) >= FAR_CALLS_MAX:
            raise Unavailable(f"{FAR_CALLS_MAX} calls from other hosts are open here: try later", sent=False)
        key = message.origin.node, message.origin.boot, message.call
        if key in self._theirs:
            raise Invalid(f"call {message.call} of node {message.origin.node.hex()} was handed over here before")
        call = self._bus.begin_call(message.monitor_ms / 1000, message.left_ms / 1000)
        if message.monitor_ms:
            call.told = lambda: self._sign(key, sender, message.origin)
        try:
            self._bus.accept(message.address, Envelope(message.body, call))
        except DhtError:
            self._bus.end_call(call)
            raise
        self._theirs[key] = call
        self._spawn(self._serve(key, call, sender, message))

    def asked(self, message: AskCalls) -> CallsReply:
        """Serve an AskCalls."""
        origin = message.origin
        keys = ((origin.node, origin.boot, number) for number in message.calls)
        return CallsReply(tuple(key[2] for key in keys if key not in self._theirs))

    async def _serve(self, key: tuple[NodeId, int, int], call: Waiting, via: NodeId, message: Carry) -> None:
        origin = message.origin
        until_s = self._clock.monotonic() + message.left_ms / 1000
        try:
            try:
                async with asyncio.timeout(message.left_ms / 1000):
                    reply = FarReply(message.call, origin.boot, await call.answer)
            except TimeoutError:
                return
            except Indeterminate as error:
                reply = FarReply(message.call, origin.boot, b"", error.message)
            if self._replies_bytes and self._replies_bytes + len(reply.body) > REPLIES_BYTES_MAX:
                text = f"{self._replies_bytes} bytes of replies wait to be sent already"
                reply = FarReply(message.call, origin.boot, b"", text)
            await self._bring(reply, Where(origin.node, origin.pop), via, until_s)
        finally:
            del self._theirs[key]
            self._bus.end_call(call)

    async def _bring(self, reply: FarReply, where: Where, via: NodeId, until_s: float) -> None:
        """Send the reply until it is taken, or nobody waits for it any more."""
        size = len(reply.body)
        self._replies_bytes += size
        try:
            while (left_s := until_s - self._clock.monotonic()) > 0:
                try:
                    await self._post.ask(where, reply, min(ASK_TIMEOUT_S, left_s), via)
                    return
                except Invalid as error:
                    if reply.failed:
                        return
                    reply = FarReply(reply.call, reply.boot, b"", error.message)
                except DhtError:
                    await self._clock.sleep(RETRY_PAUSE_S)
        finally:
            self._replies_bytes -= size

    def _sign(self, key: tuple[NodeId, int, int], via: NodeId, origin: Origin) -> None:
        """Pass a sign of life on; one at a time for each call."""
        if key not in self._signing:
            self._signing.add(key)
            self._spawn(self._send_sign(key, via, origin))

    async def _send_sign(self, key: tuple[NodeId, int, int], via: NodeId, origin: Origin) -> None:
        try:
            where = Where(origin.node, origin.pop)
            await self._post.ask(where, FarSign(key[2], origin.boot), ASK_TIMEOUT_S, via)
        except DhtError:
            # The next one may get through; the caller's own patience decides.
            pass
        finally:
            self._signing.discard(key)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
