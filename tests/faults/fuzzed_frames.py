"""Frames and datagrams of random damage at the doors of a node: each is counted and cut off, or is a whole message.

    python -m tests.faults.fuzzed_frames --frames 100000 --seed 1     all
    python -m tests.faults.fuzzed_frames --seed 1 --case 4711         one again

Each case is a function of the seed and its number. It makes a message of any kind with values of its types, breaks its
bytes, and gives them to a local connection, a handshake, a link's decoder or the overlay. A server that raises anything
else than the error that its reader counts, grows its memory or has an unhandled task error is a finding.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import resource
import sys
import time
from collections import Counter
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import inspect

import dht.domain.messages
import dht.register.messages
import lucd.messages
from dht import codec
from dht.errors import RemoteProtocolError
from dht.overlay.messages import (
    FindHint,
    FindNode,
    Frame,
    Hint,
    Hints,
    Nodes,
    Ping,
    Pong,
    StoreHint,
    encode,
    pop_prefix,
)
from dht.overlay.overlay import Overlay, OverlaySettings
from dht.overlay.sealing import OverlayCounters, Sealing
from dht.requests import Done
from dht.wire import frames
from dht.wire.handshake import Handshake, Role
from dht.wire.identity import Cluster, NodeIdentity
from dht.wire.local import Connection, LocalDoor

KEY = b"k" * 32
MESSAGES = (dht.domain.messages, dht.register.messages, lucd.messages)
"""Imported, so that the codec knows every message of a daemon."""
GROWTH_KIB_MAX = 200 * 1024
OVERLAY_BODIES = (Ping, Pong, FindNode, Nodes, FindHint, Hints, StoreHint, Hint)
INTEGERS = (0, 1, -1, 7, 2**31, 2**63 - 1, -(2**63), 2**64 - 1)


def made(chance: random.Random, kind: Any, depth: int = 0) -> Any:
    """A value of a type as msgspec describes it; now and then of another."""
    if chance.random() < 0.02 or depth > 6:
        return chance.choice([None, True, 1.5, "x", b"x", [], {}, chance.choice(INTEGERS)])
    match kind:
        case inspect.StructType(fields=fields, tag=tag):
            return ([] if tag is None else [tag]) + [made(chance, field.type, depth + 1) for field in fields]
        case inspect.NamedTupleType(fields=fields):
            return [made(chance, field.type, depth + 1) for field in fields]
        case inspect.EnumType(cls=enum):
            return chance.choice([*enum, 99])
        case inspect.IntType():
            return chance.choice(INTEGERS)
        case inspect.BytesType(min_length=low):
            return chance.randbytes(low or chance.randrange(40))
        case inspect.StrType():
            return chance.choice(["", "d", "pop1", "\x00", "x" * 300])
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.FloatType():
            return chance.choice([0.0, -1.0, float("nan"), float("inf")])
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item) | inspect.SetType(item_type=item):
            return [made(chance, item, depth + 1) for _ in range(chance.randrange(4))]
        case inspect.TupleType(item_types=items):
            return [made(chance, item, depth + 1) for item in items]
        case inspect.DictType(key_type=key, value_type=value):
            pairs = [(made(chance, key, depth + 1), made(chance, value, depth + 1)) for _ in range(chance.randrange(3))]
            return {k: v for k, v in pairs if not isinstance(k, list | dict)}
        case inspect.UnionType(types=types):
            return made(chance, chance.choice(types), depth + 1)
        case _:
            return None


def broken(chance: random.Random, data: bytes) -> bytes:
    """The bytes with a flip, a cut, more behind, a huge number, deep nesting, or as they are."""
    match chance.randrange(8):
        case 0 | 1:
            out = bytearray(data)
            for _ in range(chance.randrange(1, 6)):
                out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
            return bytes(out)
        case 2:
            return data[: chance.randrange(len(data))]
        case 3:
            return data + chance.randbytes(chance.randrange(1, 50))
        case 4:
            at = chance.randrange(len(data))
            return data[:at] + chance.choice(
                [b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff"]
            )
        case 5:
            return b"\x91" * chance.randrange(1, 5000) + data
        case 6:
            return chance.randbytes(len(data))
        case _:
            return data


class DeadEnd(asyncio.Transport):
    """A client that takes every reply."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def write(self, data: Any) -> None:
        pass

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass


class Doors:
    """One of each door of a node, without the node: whole requests are answered with Done."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kinds = [inspect.type_info(kind) for kind in codec._types.values()]
        self.bodies = [inspect.type_info(kind) for kind in OVERLAY_BODIES]
        self.served = 0
        self.failures: list[str] = []
        self.totals: Counter[str] = Counter()
        self.door = LocalDoor("/nonexistent", self._answer)
        self.cluster = Cluster.found()
        self.identity, self.peer = NodeIdentity.create("a"), NodeIdentity.create("a")
        private = Ed25519PrivateKey.generate()
        self.overlay = Overlay(
            self.identity.node_id, private, "a", KEY, ("127.0.0.1", 0), boot=1, settings=OverlaySettings()
        )
        self.member = pop_prefix("a") + os.urandom(16)
        self.sealing = Sealing(self.member, KEY, 1, OverlayCounters())
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.failures.append(str(context)))

    async def _answer(self, connection: Connection, message: codec.Message) -> Done:
        self.served += 1
        return Done()

    async def run_case(self, number: int) -> str:
        chance = random.Random(f"{self.seed}/{number}")
        match number % 4:
            case 0:
                return await self._local(chance)
            case 1:
                return self._decoder(chance)
            case 2:
                return self._handshake(chance)
            case _:
                return self._datagram(chance)

    def _frame(self, chance: random.Random) -> bytes:
        message = msgspec.msgpack.encode(made(chance, chance.choice(self.kinds)))
        body = msgspec.msgpack.encode((chance.choice([0, 1, 2, 2**40]), chance.choice([0, 1, 5000, 2**50])))
        body = b"\x93" + body[1:] + message
        return len(body).to_bytes(4, "big") + body

    async def _local(self, chance: random.Random) -> str:
        """Two frames at once, now and then the same."""
        connection, before = Connection(self.door), dict(self.door.counters)
        connection.connection_made(DeadEnd())
        frame = self._frame(chance)
        connection.data_received(broken(chance, frame + (frame if chance.random() < 0.2 else b"")))
        await asyncio.sleep(0)
        closed = connection.closed
        connection.connection_lost(None)
        counted = self.door.counters["garbage"] - before["garbage"]
        assert counted == int(closed), "cut off and not counted, or the other way round"
        return f"local: {'cut off' if closed else 'taken or waiting'}"

    def _decoder(self, chance: random.Random) -> str:
        try:
            for _, _, raw in frames.split(broken(chance, self._frame(chance))):
                message = codec.decode(memoryview(raw))
                # Whatever is taken is a message whose every field fits its type.
                assert codec.decode(codec.encode(message)) is not None
        except RemoteProtocolError:
            return "link: refused"
        return "link: whole"

    def _handshake(self, chance: random.Random) -> str:
        """A dialer of this cluster or another whose messages are broken on the way: only whole ones prove anything."""
        ours = chance.random() < 0.5
        cluster = self.cluster if ours else Cluster.found()
        listener = Handshake(Role.LISTENER, self.identity, self.cluster, "x:1", lambda *_: None)
        dialer = Handshake(Role.DIALER, self.peer, cluster, "y:2", lambda *_: None)
        touched = False
        try:
            to_listener = dialer.start()
            while to_listener and listener.peer is None:
                sent = broken(chance, to_listener[0])
                touched |= sent != to_listener[0]
                back = listener.receive(sent)
                to_listener = dialer.receive(back[0]) if back else []
        except RemoteProtocolError as error:
            listener.farewell(error)
        assert listener.peer is None or (ours and not touched), "a broken handshake proved a peer"
        return f"handshake: {'refused' if listener.peer is None else 'whole'}"

    def _datagram(self, chance: random.Random) -> str:
        counters = self.overlay.counters
        protocol = self.overlay._protocol
        assert protocol is not None
        before = {name: getattr(counters, name) for name in counters.__slots__}
        body = made(chance, chance.choice(self.bodies))
        message = encode(Frame(os.urandom(8), "127.0.0.1", 9, "a", Ping()))
        if chance.random() < 0.8:
            message = msgspec.msgpack.encode([chance.randbytes(8), "127.0.0.1", 9, "a", body])
        sealing = self.sealing if chance.random() < 0.7 else Sealing(self.member, b"x" * 32, 2, OverlayCounters())
        inside = chance.random() < 0.5
        data = sealing.seal(broken(chance, message)[:1200] if inside else message[:1200])
        data = data if inside else broken(chance, data)
        for _ in range(chance.choice([1, 1, 2])):
            protocol.datagram_received(data, ("127.0.0.1", 9))
        assert len(self.overlay.contacts()) == 0, "a datagram made a contact of a node that never answered"
        names = ("received", *[name for name in before if name.startswith("dropped")])
        changed = [name for name in names if getattr(counters, name) != before[name]]
        assert changed, "a datagram was not counted"
        return f"datagram: {changed[0]}"


async def run_cases(seed: int, first: int, count: int) -> Counter[str]:
    doors = Doors(seed)
    await doors.overlay.start("127.0.0.1", 0)
    try:
        began_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            try:
                doors.totals[await doors.run_case(number)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed} case {number}: {type(error).__name__}: {error}") from error
            assert not doors.failures, f"seed {seed} case {number}: {doors.failures[0]}"
        await asyncio.sleep(0.05)
        assert not doors.failures, doors.failures[0]
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began_kib
        assert grown_kib < GROWTH_KIB_MAX, f"{grown_kib} KiB more memory"
        doors.totals["memory grown by KiB"] = grown_kib
    finally:
        await doors.overlay.stop()
    return doors.totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    first, count = (0, given.frames) if given.case is None else (given.case, 1)
    print(f"{count} frames and datagrams, seed {given.seed}; one again: --seed {given.seed} --case NUMBER", flush=True)
    began = time.monotonic()
    totals = asyncio.run(run_cases(given.seed, first, count))
    for kind, times in sorted(totals.items()):
        print(f"{times:7d}  {kind}")
    print(f"no crash, no acceptance in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
