"""Store nodes in virtual time whose messages and flushes obey the story: hand-made schedules for single rules.

Nothing here is random: messages arrive at once unless the story drops or holds them, and a disk flushes at once unless
the story makes it slow; a slow disk that loses its power forgets all that it has not flushed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from dht.codec import decode, encode
from dht.errors import DhtError, Indeterminate, Unavailable
from dht.model import (
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
from dht.register.messages import Coordinated, Kind, Operation
from dht.register.node import StoreNode
from dht.register.rules import Rules
from dht.rows import decode_row, group_key, row_key
from dht.sim import loop as virtual
from dht.sim.clock import SimClock
from dht.sim.disk import SimDisk
from dht.storage.registers import RegisterFile
from tests.dht.register.register_cluster import Identity, StaticDomain

TABLETS = 8
NEVER_S = 1e6
Gate = Callable[[int, int, Struct], Awaitable[bool]]


class _Forgetful(random.Random):
    """A disk's chance: of what it has not flushed, it keeps nothing."""

    def randint(self, a: int, b: int) -> int:
        return a


class _End:
    """`dht.world.Network` of one node."""

    def __init__(self, bench: Bench, number: int) -> None:
        self._bench = bench
        self._number = number

    def serve(self, answer: object) -> None:
        pass

    def alive(self, node: NodeId) -> bool:
        bench = self._bench
        return node in bench.running and not bench.silent(bench.ids[self._number], node)

    def silent_s(self, node: NodeId) -> float:
        return 0.0

    def parted(self, node: NodeId) -> bool:
        return False

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        bench = self._bench
        try:
            async with asyncio.timeout(timeout_s):
                if not await bench.gate(self._number, bench.ids.index(to), message):
                    await asyncio.sleep(NEVER_S)
                store = bench.running.get(to)
                if store is None:
                    raise Unavailable("no link", sent=False)
                return decode(encode(await store.answer(self._number.to_bytes(20, "big"), decode(encode(message)))))
        except TimeoutError:
            raise Indeterminate("no reply in time") from None


async def _deliver(sender: int, to: int, message: Struct) -> bool:
    return True


class Bench:
    """Nodes by number. `gate` decides of each message whether it arrives, and when: (from, to, message).

    `silent`: whether a running node has fallen silent for another: (who listens, to whom).
    """

    def __init__(self, rules: Rules, size: int = 3) -> None:
        self.rules = rules
        self.ids = [bytes([65 + number]) * 20 for number in range(size)]
        self.disks = [SimDisk(_Forgetful(number)) for number in range(size)]
        self.boots = [0] * size
        self.running: dict[NodeId, StoreNode] = {}
        self.files: dict[int, RegisterFile] = {}
        self.gate: Gate = _deliver
        self.silent: Callable[[NodeId, NodeId], bool] = lambda me, node: False
        self._transactions = itertools.count(1)
        for number in range(size):
            self.flush(number, fast=True)
            self.start(number)

    def __getitem__(self, number: int) -> StoreNode:
        return self.running[self.ids[number]]

    def start(self, number: int) -> None:
        self.boots[number] += 1
        node = self.ids[number]
        domain = StaticDomain(node, self.ids, len(self.ids), TABLETS)
        disk = self.disks[number]
        file = self.files[number] = RegisterFile(disk, TABLETS)
        identity = Identity(node, self.boots[number])
        chance = random.Random(number)
        self.running[node] = StoreNode(identity, SimClock(), chance, _End(self, number), disk, domain, file, self.rules)

    async def crash(self, number: int) -> None:
        """Power off; what the disk had not flushed is gone."""
        store = self.running.pop(self.ids[number])
        self.disks[number].crash()
        await store.stop()

    def flush(self, number: int, *, fast: bool) -> None:
        """Whether the disk flushes at once or, for the rest of the story, never. For batches from now on."""
        self.disks[number].slowness = 1.0 if fast else NEVER_S

    def key(self, coordinator: int, nth: int = 0) -> GroupKey:
        """A group whose tablet lists this node first."""
        names = (group_key("db", "f", (f"g{i}",)) for i in itertools.count())
        mine = (key for key in names if self.files[0].tablet(key) % len(self.ids) == coordinator)
        return next(itertools.islice(mine, nth, None))

    def transaction(self, *parts: Part, version: int = 0) -> Transaction:
        return Transaction(next(self._transactions).to_bytes(16, "big"), "db", version, parts)

    async def propose(self, number: int, part: Part, timeout_s: float = 1.0) -> Coordinated:
        """A write of one group that this node itself coordinates, whoever else is alive."""
        operation = Operation(Kind.COMMIT, next(self._transactions).to_bytes(16, "big"), part)
        return await self[number]._coordinator.run(operation, 0, True, SimClock().monotonic() + timeout_s)

    async def row(self, number: int, key: GroupKey) -> Columns | None:
        """The group's only row, read at a node as any client does."""
        (read,) = await self[number].read([key])
        row = (read.rows or {}).get(row_key(1, (1,)))
        return None if row is None else decode_row(row)

    async def define(self) -> None:
        """Database `db` with an index on column 1 of table 1, known everywhere."""
        await self[0].create_database("db")
        spec = msgspec.msgpack.encode(TableSpec(1, (0,), (IndexSpec(1, (1,)),)))
        catalog = Part(
            group_key("db", "catalog", ()),
            changes=(Change(Op.INSERT, 0, (0,), {0: 1}), Change(Op.INSERT, 0, (1,), {0: spec})),
        )
        await self[0].commit(self.transaction(catalog, version=1))
        for number in range(len(self.ids)):
            await self.found(number, 0)

    async def found(self, number: int, value: int, timeout_s: float = 2.0) -> list[object]:
        """Column 0 of the rows whose column 1 has the value."""
        query = FindQuery("db", 1, 1, (Constraint(1, Comparison.EQ, (value,)),))
        return [decode_row(row.row)[0] for row in (await self[number].find(query, timeout_s)).rows]


def insert(key: GroupKey, columns: Columns) -> Part:
    return Part(key, changes=(Change(Op.INSERT, 1, (1,), columns),))


def update(key: GroupKey, columns: Columns) -> Part:
    return Part(key, changes=(Change(Op.UPDATE, 1, (1,), columns),))


async def failed(work: Awaitable[object]) -> DhtError | None:
    """The error of the work, None when it succeeded."""
    try:
        await work
    except DhtError as error:
        return error
    return None


def play(story: Callable[[Bench], Coroutine[Any, Any, Any]], rules: Rules, size: int = 3) -> Any:
    """Run the story in virtual time; what it returns."""

    async def told() -> Any:
        bench = Bench(rules, size)
        try:
            return await story(bench)
        finally:
            for store in list(bench.running.values()):
                await store.stop()

    return virtual.run(told(), time_limit_s=10 * NEVER_S)
