"""Real nodes on loopback that answer a test's own requests over links."""

from __future__ import annotations

import asyncio
import contextlib

from dht.codec import Message, message
from dht.errors import Conflict, NotServing
from dht.requests import Done
from dht.wire.identity import Cluster, NodeIdentity
from dht.wire.links import LinkNetwork
from dht.wire.tls import LinkTls

CLUSTER = Cluster.found()
TLS = LinkTls()
"""Of whoever is no node."""
TURN_S = 0.01


@message
class Ask(Message, frozen=True, tag=99_001):
    text: str
    wait_s: float = 0.0


@message
class Told(Message, frozen=True, tag=99_002):
    text: str


class Node:
    def __init__(self, pop="lyon", cluster=CLUSTER, identity=None, *, tls=True):
        self.identity = identity or NodeIdentity.create(pop)
        self.id = self.identity.node_id
        self.boots = {}
        self.served = []
        self.go_on = asyncio.Event()
        """Until then requests that are held are not answered."""
        self.network = LinkNetwork(self.identity, cluster, self.accept_boot, LinkTls() if tls else None)
        self.network.serve(self.answer)

    def accept_boot(self, node_id, incarnation, boot, start_id):
        if boot < self.boots.get((node_id, incarnation), 0):
            raise Conflict(f"boot {boot} is older than {self.boots[node_id, incarnation]}")
        self.boots[node_id, incarnation] = boot

    async def answer(self, sender, asked):
        self.served.append(asked)
        match asked:
            case Ask("not serving"):
                raise NotServing("sealed", domain="lyon", tablet=3, roster_epoch=4)
            case Ask("bug"):
                raise ZeroDivisionError("bug")
            case Ask("held"):
                await self.go_on.wait()
                return Told("held")
            case Ask(text, wait_s):
                await asyncio.sleep(wait_s)
                return Told(text + " to " + sender.hex())
        return Done()

    async def start(self, port=0):
        await self.network.start("127.0.0.1", port)
        return self

    def knows(self, other):
        self.network.set_address(other.id, "127.0.0.1", other.network.port)


@contextlib.asynccontextmanager
async def nodes(count, others="lyon", *, tls=True):
    """`others`: the PoP of all but the first, which is of lyon."""
    made = [await Node(others if number else "lyon", tls=tls).start() for number in range(count)]
    try:
        yield made
    finally:
        for node in made:
            await node.network.stop()


def thin_way(port, *, back):
    """The port of a way to that one, on which bytes take long in one direction: `back`, from the listener."""
    return way(port, there=slow(0.0 if back else 0.02), back=slow(0.02 if back else 0.0))


def long_way(port, delay_s=0.25):
    """The same of one on which all take their time, in each direction."""

    async def late(writer, data):
        await asyncio.sleep(delay_s)
        writer.write(data)

    return way(port, there=late, back=late)


def slow(pause_s):
    async def carry(writer, data):
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(pause_s)

    return carry


@contextlib.asynccontextmanager
async def way(port, *, there, back):
    """A port that leads to that one. `there`, `back`: what carries a piece of what is sent."""
    ends = []

    async def carry_all(reader, writer, carry):
        with contextlib.suppress(OSError):
            while data := await reader.read(16 * 1024):
                await carry(writer, data)
        writer.close()

    async def connect(reader, writer):
        from_there, to = await asyncio.open_connection("127.0.0.1", port)
        ends.extend([to, writer])
        await asyncio.gather(carry_all(reader, to, there), carry_all(from_there, writer, back))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for end in ends:
            end.close()
        await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)


async def until(condition, timeout_s=5.0):
    """Return when it is so. The time is this process's own: what it stands still for is one turn, like a moment."""
    for _ in range(round(timeout_s / TURN_S)):
        if condition():
            return
        await asyncio.sleep(TURN_S)
    assert condition(), "the condition did not come true in time"
