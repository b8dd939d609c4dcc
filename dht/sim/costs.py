"""What one write, one read and one find cost in a PoP of 3 to 50 nodes: messages, bytes, and CPU of all nodes together.

Nothing is lost or late, rosters do not change, and only one request runs at a time, so messages are exact and the same
in every run. CPU is process time, the simulator's own part in it; compare the sizes with each other.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from dht.codec import Message, decode, encode
from dht.domain.context import LocalNode
from dht.domain.roster import REPLICAS, Member, Roster, TabletReplicas
from dht.errors import NotServing, Unavailable
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import (
    ZERO,
    Ballot,
    Change,
    Columns,
    Comparison,
    Constraint,
    FindQuery,
    GroupKey,
    IndexSpec,
    NodeId,
    Op,
    Part,
    Struct,
    TableSpec,
    Transaction,
)
from dht.register.messages import Chosen
from dht.register.node import StoreNode
from dht.rows import group_key
from dht.sim import loop as virtual
from dht.sim.clock import SimClock
from dht.storage.memory import MemoryDisk
from dht.storage.registers import RegisterFile
from dht.world import Answer

SIZES: Final = (3, 5, 10, 20, 50)
GROUPS: Final = 100
HOSTS: Final = 10
_DATABASE: Final = "costs"
_TABLE: Final = 1
_PAYLOAD: Final = "x" * 300


def roster_in_turns(members: Sequence[Member], replicas: int, tablets: int, domain: str = "pop") -> Roster:
    """So many replicas for each tablet, the members in turns."""
    nodes = [member.node_id for member in members]
    turns = tuple(tuple(nodes[(t + i) % len(nodes)] for i in range(replicas)) for t in range(tablets))
    listed = tuple(sorted(members, key=lambda member: member.node_id))
    return Roster(domain, 1, 1, b"", listed, (nodes[0],), turns, (1,) * tablets)


class Settled:
    """A domain in which everything stands where it belongs, and stays there."""

    joined = True

    def __init__(self, me: NodeId, roster: Roster) -> None:
        self.me = me
        self.generation = 1
        self.roster = roster

    def replicas(self, tablet: int) -> TabletReplicas:
        return self.roster.replicas(tablet)

    def views(self) -> tuple[TabletReplicas, ...]:
        return tuple(map(self.replicas, range(len(self.roster.tablets))))

    def admit(self, tablet: int, epoch: int, accept: bool = False) -> None:
        if self.me not in self.roster.tablets[tablet]:
            raise NotServing("not here", roster_epoch=1)

    def admits(self, tablets: tuple[int, ...], epochs: tuple[int, ...]) -> bool:
        return False

    def floor(self, tablet: int) -> Ballot:
        return ZERO

    def agreed_floor(self, tablet: int) -> Ballot:
        return ZERO

    def pointed(self, refusal: NotServing) -> bool:
        return False

    async def refresh(self, at_least: int | None = None) -> None:
        pass

    async def answer(self, sender: NodeId, message: Struct) -> Message:
        raise Unavailable("this domain never changes")

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


@dataclass
class _Wires:
    """All links; `messages` counts requests and replies, those that only mark what is chosen apart."""

    stores: dict[NodeId, StoreNode] = field(default_factory=dict)
    messages: int = 0
    marks: int = 0
    bytes: int = 0


class _End:
    def __init__(self, wires: _Wires, node: NodeId) -> None:
        self._wires = wires
        self._node = node

    def serve(self, answer: Answer) -> None:
        pass

    def alive(self, node: NodeId) -> bool:
        return True

    def silent_s(self, node: NodeId) -> float:
        return 0.0

    def parted(self, node: NodeId) -> bool:
        return False

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        wires = self._wires
        request = encode(message)
        reply = encode(await wires.stores[to].answer(self._node, decode(request)))
        if isinstance(message, Chosen):
            wires.marks += 2
        else:
            wires.messages += 2
            wires.bytes += len(request) + len(reply)
        return decode(reply)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one request, on average."""

    messages: float
    bytes: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a PoP of `nodes`. `write`: at the group's coordinator; `forwarded`: at a node that does not have the group."""

    nodes: int
    write: Cost
    forwarded: Cost
    read: Cost
    read_elsewhere: Cost
    find: Cost


class _Pop:
    def __init__(self, nodes: int) -> None:
        self.ids = [number.to_bytes(20, "big") for number in range(1, nodes + 1)]
        self.wires = _Wires()
        self.files: list[RegisterFile] = []
        members = [Member(node, b"i" * 16, "pop", node.hex(), "h:1") for node in self.ids]
        roster = roster_in_turns(members, REPLICAS, TABLETS_PER_DOMAIN)
        for number, node in enumerate(self.ids):
            disk = MemoryDisk()
            file = RegisterFile(disk, TABLETS_PER_DOMAIN)
            local = LocalNode(node, b"i" * 16, 1, "pop", "h", "h:1")
            domain = Settled(node, roster)
            end = _End(self.wires, node)
            self.files.append(file)
            self.wires.stores[node] = StoreNode(local, SimClock(), random.Random(number), end, disk, domain, file)
        self.serial = 0

    def store(self, number: int) -> StoreNode:
        return self.wires.stores[self.ids[number % len(self.ids)]]

    def first(self, key: GroupKey) -> int:
        """The number of the group's coordinator."""
        return self.files[0].tablet(key) % len(self.ids)

    def far(self, key: GroupKey) -> int:
        """The number of the node that is farthest from the group's replicas; the last replica where all have it."""
        return (self.first(key) - 1) % len(self.ids)

    def transaction(self, part: Part, version: int = 1) -> Transaction:
        self.serial += 1
        return Transaction(self.serial.to_bytes(16, "big"), _DATABASE, version, (part,))

    async def define(self) -> None:
        await self.store(0).create_database(_DATABASE)
        spec = msgspec.msgpack.encode(TableSpec(_TABLE, (0,), (IndexSpec(1, (1,)),)))
        changes = (Change(Op.INSERT, 0, (0,), {0: 1}), Change(Op.INSERT, 0, (1,), {0: spec}))
        await self.store(0).commit(self.transaction(Part(group_key(_DATABASE, "catalog", ()), changes=changes)))
        await self.quiet()

    async def quiet(self) -> None:
        """Until all marks are out."""
        await asyncio.sleep(5.0)

    async def measure(self, requests: list[Callable[[], Awaitable[object]]]) -> Cost:
        wires = self.wires
        await self.quiet()
        for request in requests:
            await request()  # what each node asks once in a while, the catalog's version, is not part of it
        messages, size, started = wires.messages, wires.bytes, time.process_time()
        for request in requests:
            await request()
        cpu_s, count = time.process_time() - started, len(requests)
        return Cost((wires.messages - messages) / count, (wires.bytes - size) / count, cpu_s / count * 1e6)


def costs(nodes: int) -> Costs:
    """Measure a PoP of so many nodes."""
    return virtual.run(_costs(nodes), time_limit_s=1e6)


async def _costs(nodes: int) -> Costs:
    pop = _Pop(nodes)
    await pop.define()
    keys = [group_key(_DATABASE, "f", (f"g{i}",)) for i in range(GROUPS)]
    for i, key in enumerate(keys):
        row: Columns = {0: i, 1: i % HOSTS, 2: _PAYLOAD, 3: 0}
        change = Change(Op.INSERT, _TABLE, (i,), row)
        await pop.store(pop.first(key)).commit(pop.transaction(Part(key, changes=(change,))))

    def write(i: int, number: int) -> Callable[[], Awaitable[object]]:
        change = Change(Op.UPDATE, _TABLE, (i,), {3: number + 1})
        return lambda: pop.store(number).commit(pop.transaction(Part(keys[i], changes=(change,))))

    def read(key: GroupKey, number: int) -> Callable[[], Awaitable[object]]:
        return lambda: pop.store(number).read([key])

    def find(i: int) -> Callable[[], Awaitable[object]]:
        query = FindQuery(_DATABASE, _TABLE, 1, (Constraint(1, Comparison.EQ, (i % HOSTS,)),))
        return lambda: pop.store(i).find(query)

    for number in range(nodes):
        await find(number)()  # each node has learned the catalog
    out = Costs(
        nodes,
        await pop.measure([write(i, pop.first(key)) for i, key in enumerate(keys)]),
        await pop.measure([write(i, pop.far(key)) for i, key in enumerate(keys)]),
        await pop.measure([read(key, pop.first(key)) for key in keys]),
        await pop.measure([read(key, pop.far(key)) for key in keys]),
        await pop.measure([find(i) for i in range(GROUPS)]),
    )
    await pop.quiet()
    return out


def table(measured: list[Costs]) -> str:
    """Markdown: messages, bytes and CPU of each request, by size."""
    kinds = ("write", "forwarded", "read", "read_elsewhere", "find")
    titles = ("write", "write, forwarded", "read", "read elsewhere", f"find of {GROUPS // HOSTS} rows")
    lines = [
        "| nodes | " + " | ".join(titles) + " |",
        "| --- " * (len(kinds) + 1) + "|",
    ]
    for one in measured:
        cells = []
        for kind in kinds:
            cost: Cost = getattr(one, kind)
            cells.append(f"{cost.messages:g} messages, {cost.bytes:.0f} B, {cost.cpu_us:.0f} us")
        lines.append(f"| {one.nodes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The document around the table."""
    return f"""# What one request costs, 3 to 50 nodes in one PoP

`python -m dht.sim costs` measures this: {GROUPS} groups of one row with {len(_PAYLOAD)} bytes of payload, one request
at a time, no loss, the mean of {GROUPS} requests of each kind, made for the second time. Messages are requests and
replies together, without the marks of what is chosen (ten batches a second for each node, whatever the number of
writes); they are exact. CPU is process time of all nodes and of the simulator, on a machine that others used as well:
it is for comparing the sizes with each other.

- write: one column of one row, asked of the group's coordinator. Forwarded: asked of another node.
- read: one group, asked of one of its replicas. Elsewhere: of a node that does not have it (with 3 nodes each has it).
- find: by an index; it asks as few nodes as cover every tablet, and the others (group, ballot) for a majority.

{text}
"""
