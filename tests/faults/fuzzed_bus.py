"""Whole bus messages with senseless values, as requests and as replies: the bus serves on, and keeps nothing of them.

    python -m tests.faults.fuzzed_bus --messages 20000 --seed 1

They come from proven members of the PoP, as from ones with a defect. What such a member may do to its own clients is
not judged: that a host's bus does not fail unexpectedly, hang, leak, or lose what honest hosts send is.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
from collections import Counter
from typing import Any

import msgspec
from msgspec import inspect

from dht import codec
from dht.codec import Message
from dht.errors import DhtError
from dht.model import Struct
from dht.requests import Done
from nova_bridge.rpc import peer_messages
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.peer_messages import AskCalls, Carry, Origin, Relay
from nova_bridge.rpc.reach import BUS_REQUESTS
from tests.faults.fuzzed_frames import made
from tests.faults.fuzzed_requests import main
from tests.nova_bridge.rpc.bus_hosts import Lab

PLANE = {"a": 3, "b": 2}
LIARS = ("a1", "a2")
HONEST = ("b0", "b1")
ANSWER_S_MAX = 40.0
TAKEN = (Address("ex", "t"), Address("ex", "t", "server-a0"), Address("ex", "mute"))
LEFT_MS = (0, 1, 100, 3_000)
LIES = 0.2
OVER_S = 700.0
"""After which whatever the bus keeps trying is over (`nova_bridge.rpc.reach.HELD_KEEP_S`)."""


class Target:
    """Host a0, to whose bus the liars of its PoP speak, and who is told lies when it asks while `lying`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.lab: Any = Lab(seed, PLANE)
        self.host = self.lab["a0"]
        kinds = [kind for kind in codec._types.values() if kind.__module__ == peer_messages.__name__]
        self.kinds = {kind: inspect.type_info(kind) for kind in [*kinds, Done]}
        self.requests = sorted(BUS_REQUESTS, key=lambda kind: kind.__name__)
        self.totals: Counter[str] = Counter()
        self.looked = 0
        self.lying = False
        self.chance = random.Random(f"{seed}/lies")
        self.unhandled: list[str] = []

    async def begin(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.unhandled.append(str(context)))
        for name in ("a0", *HONEST):
            await self.lab[name].listener(server=f"server-{name}")
        # Takes calls and never answers, so that many are open at once.
        await self.host.listener(topic="mute", mute=True)
        honest, self.host.call = self.host.call, self._call
        self._honest_call = honest

    async def _call(self, to: bytes, message: Message, timeout_s: float) -> Struct:
        if self.lying and self.chance.random() < LIES:
            lie = self.message(self.chance, self.chance.choice(list(self.kinds)))
            if lie is not None:
                return lie
        reply: Struct = await self._honest_call(to, message, timeout_s)
        return reply

    def message(self, chance: random.Random, kind: type[Message]) -> Message | None:
        """One of that kind, whose values are of its types if not more; None where they are not even that."""
        body = made(chance, self.kinds[kind])
        if isinstance(body, list) and body:
            body = [body[0], *(self._sane(chance, field) for field in body[1:])]
        try:
            message = msgspec.convert(body, kind, builtin_types=(bytes,), strict=True)
        except msgspec.ValidationError:
            return None
        if isinstance(message, Relay) and chance.random() < 0.8:
            inner = self.message(chance, chance.choice(self.requests))
            message = msgspec.structs.replace(message, body=codec.encode(inner or message))
        if (isinstance(message, Carry | AskCalls) and chance.random() < 0.9) or self._names_honest(message):
            # Who says that he is another one is beyond defects.
            origin = Origin(self.lab[chance.choice(LIARS)].node, 1, "a")
            message = msgspec.structs.replace(message, origin=origin)
        if isinstance(message, Carry):
            number = chance.choice([message.number, chance.randrange(10**6)])
            left_ms, call = chance.choice(LEFT_MS), chance.choice([0, 1, 2, 3])
            monitor_ms = chance.choice([0, 500])
            message = msgspec.structs.replace(message, number=number, left_ms=left_ms, call=call, monitor_ms=monitor_ms)
        if isinstance(message, Carry) and chance.random() < 0.7:
            message = msgspec.structs.replace(message, address=chance.choice(TAKEN))
        return message

    def _names_honest(self, message: Message) -> bool:
        honest = [self.lab[name].node for name in ("a0", *HONEST)]
        return isinstance(message, Carry | AskCalls) and message.origin.node in honest

    def _sane(self, chance: random.Random, value: object) -> object:
        """Some values as they could be: nodes, starts, topics and PoPs that there are, calls of today."""
        if isinstance(value, bytes) and chance.random() < 0.7:
            return chance.choice(self.lab.hosts).node
        if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.97:
            return chance.choice([0, 1, 1, 1, 2, chance.randrange(200)])
        if isinstance(value, str) and chance.random() < 0.9:
            return chance.choice(["", "", "ex", "t", "server-a0", "a", "b", "global"])
        if isinstance(value, list):
            return [self._sane(chance, item) for item in value]
        return value

    async def send(self, number: int) -> None:
        chance = random.Random(f"{self.seed}/{number}")
        kind = Carry if chance.random() < 0.4 else chance.choice(self.requests)
        sender = self.lab[chance.choice(LIARS)]
        message = self.message(chance, kind)
        if message is None:
            self.totals["no message"] += 1
            return
        self.lying = True
        if chance.random() < 0.1:
            # The host has something to send itself meanwhile.
            work = self.host.cast(b"x", fanout=chance.random() < 0.5, server=chance.choice(["", "server-b0", "nobody"]))
            self.host.spawn(_let_fail(work))
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                reply = await self.host.spawn(self.host.reach.answer(sender.node, message))
            self.totals[f"{kind.__name__}: {type(reply).__name__}"] += 1
        except DhtError as error:
            self.totals[f"{kind.__name__}: {type(error).__name__}"] += 1

    async def look(self) -> None:
        """Honest hosts reach the one that was lied to, and it reaches them; copies come once."""
        self.lying = False
        await asyncio.sleep(OVER_S)
        self.looked += 1
        for name in HONEST:
            assert await self.lab[name].call_to(b"ask", server="server-a0") == b"server-a0"
            assert await self.host.call_to(b"ask", server=f"server-{name}") == f"server-{name}".encode()
        copy = b"copy %d" % self.looked
        await self.lab["b0"].cast(copy, fanout=True)
        await asyncio.sleep(5.0)
        assert sorted(self.lab.got(copy)) == ["server-a0", "server-b0", "server-b1"], "a copy came not, or twice"
        gc.collect()
        assert not self.unhandled, self.unhandled[0]
        assert not (kept := {name: left for name, left in self.kept().items() if left}), f"kept for nothing: {kept}"

    async def end(self) -> None:
        await self.lab.stop()

    def kept(self) -> dict[str, int]:
        """What is to be nothing when nobody sends anything."""
        reach, bus = self.host.reach, self.host.bus
        return {
            "far calls": reach.counters["far_calls"],
            "calls": len(bus._calls),
            "signs": len(reach._calls._signing),
            "bytes of replies": reach._calls._replies_bytes,
            "bytes on their way": reach._carrying_bytes,
            "bytes relayed": reach._post._relayed_bytes,
            "copies": reach._copies,
            "tasks of calls": len(reach._calls._tasks),
            "questions": len(reach._finder._looks),
        }


async def _let_fail(work: Any) -> None:
    with contextlib.suppress(DhtError, TimeoutError):
        await work


if __name__ == "__main__":
    sys.exit(main(Target, __doc__))
