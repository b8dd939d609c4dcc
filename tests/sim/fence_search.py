"""Random search for a row that a fence let slip: `python -m tests.sim.fence_search 1 200 [rule to switch off ...]`.

Production nodes in virtual time, with crashes, cuts and loss. Writers insert rows; those who know version v of the
catalog give each row an entry for every unique rule up to v. Meanwhile one client after the other publishes a version,
raises a fence and gives the rows that it finds their entries. At the end every row has the entries of every rule that
was finished, whoever made it and whatever became of the attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import Sequence
from functools import partial

import msgspec

from dht.domain.rules import DomainRules
from dht.errors import Conflict, DhtError, Duplicate, SchemaChanged
from dht.model import Change, FindQuery, GroupKey, Guard, GuardKind, NodeId, Op, Part, Struct, TableSpec, Transaction
from dht.register.messages import AskFence, FindReplica, Learn
from dht.rows import decode_row, group_key, row_key
from dht.sim import loop as virtual
from dht.sim.cluster import Cluster
from dht.sim.production import builder

TABLETS = 4
VERSIONS = 2
CATALOG = group_key("db", "catalog", ())
FENCED = (group_key("db", "f", ()),)


def row_group(number: int) -> GroupKey:
    return group_key("db", "f", (number // 3,))


def entry_group(version: int, number: int) -> GroupKey:
    return group_key("db", "unique", (version, number))


class Search:
    """One run."""

    def __init__(self, seed: int, off: Sequence[str]) -> None:
        domain_off = [rule for rule in off if rule in DomainRules.__struct_fields__]
        rules_off = [rule for rule in off if rule not in domain_off]
        self.cluster = Cluster(seed, builder(rules_off, domain_off, TABLETS, 1e6, 1e6))
        self.chance = random.Random(f"{seed}/search")
        self.ids = iter(range(1, 10**9))
        self.rows = iter(range(10**9))
        self.finished: list[int] = []
        self.there = 0
        self.over = False
        self.deaf: NodeId = b""

    def transaction(self, version: int, *parts: Part) -> Transaction:
        return Transaction(next(self.ids).to_bytes(16, "big"), "db", version, parts)

    async def version(self, node: int) -> int:
        (read,) = await self.cluster.ask(node, lambda store: store.read([CATALOG]), 5.0)
        return int(decode_row((read.rows or {})[row_key(0, (0,))])[0])  # type: ignore[arg-type]

    def deaf_to(self, sender: NodeId, to: NodeId, message: Struct) -> bool:
        """One node hears nothing of new catalogs, but from those who refuse what it proposes."""
        return to == self.deaf and isinstance(message, (Learn, AskFence, FindReplica))

    async def write(self, node: int) -> None:
        """A client that learns of a newer catalog only by being refused."""
        known = 1
        while not self.over:
            number = next(self.rows)
            parts = [Part(row_group(number), changes=(Change(Op.INSERT, 1, (number,), {0: number}),))]
            for version in range(2, known + 1):
                change = Change(Op.INSERT, 2, (), {0: number})
                parts.append(Part(entry_group(version, number), changes=(change,)))
            if self.chance.random() < 0.3:
                # The commit point is elsewhere, in a group that no fence is raised for.
                other = [Change(Op.INSERT, 3, (number, i), {0: i}) for i in range(3)]
                parts.append(Part(group_key("db", "g", (number % 5,)), changes=tuple(other)))
            work = self.transaction(known, *parts)
            try:
                await self.cluster.ask(node, lambda store, work=work: store.commit(work, 0, 3.0), 4.0)
            except SchemaChanged:
                with contextlib.suppress(DhtError):
                    known = await self.version(node)
            except DhtError:
                pass
            await asyncio.sleep(self.chance.expovariate(8.0))

    async def somewhere(self, request: object, timeout_s: float = 20.0) -> object:
        """Ask one node after the other until one does it; refusals are answers."""
        while True:
            node = self.chance.choice(range(len(self.cluster.machines)))
            try:
                return await self.cluster.ask(node, request, timeout_s)  # type: ignore[arg-type]
            except Conflict:
                raise
            except DhtError:
                await asyncio.sleep(0.2)

    async def change(self, version: int) -> None:
        """Publish, fence, build."""
        part = Part(CATALOG, changes=(Change(Op.UPDATE, 0, (0,), {0: version}, {0: version - 1}),))
        work = self.transaction(0, part)
        with contextlib.suppress(Conflict):  # of an attempt whose answer was lost
            await self.somewhere(lambda store: store.commit(work, 1, 5.0), 6.0)
        following = 0
        while following >= 0:
            ask = partial(lambda store, first: store.fence("db", version, FENCED, first, 15.0), first=following)
            following = await self.somewhere(ask)  # type: ignore[assignment]
        query = FindQuery("db", 1, version)
        result = await self.somewhere(lambda store: store.find(query, 5.0), 6.0)
        for row in result.rows:  # type: ignore[attr-defined]
            number = int(decode_row(row.row)[0])  # type: ignore[arg-type]
            entry = Part(entry_group(version, number), changes=(Change(Op.INSERT, 2, (), {0: number}),))
            guard = Part(row_group(number), None, (), (Guard(GuardKind.HAS, 1, (number,), {}),))
            while True:
                work = self.transaction(version, guard, entry)
                try:
                    await self.somewhere(lambda store, work=work: store.commit(work, 0, 3.0), 4.0)
                    break
                except Duplicate:
                    break
                except Conflict:
                    await asyncio.sleep(0.1)
        self.finished.append(version)

    async def trouble(self) -> None:
        """Crashes, cuts and loss, one after the other."""
        cluster, chance = self.cluster, self.chance
        while not self.over:
            await asyncio.sleep(chance.uniform(0.05, 0.6))
            number = chance.randrange(len(cluster.machines))
            rest = [i for i in range(len(cluster.machines)) if i != number]
            match chance.randrange(4):
                case 0:
                    cluster.crash(number)
                    await asyncio.sleep(chance.uniform(0.1, 1.5))
                    await cluster.start(number)
                case 1:
                    cluster.partition([number], rest, one_way=chance.random() < 0.3)
                    await asyncio.sleep(chance.uniform(0.1, 1.5))
                    cluster.heal()
                case 2:
                    cluster.partition([number], [chance.choice(rest)])
                    await asyncio.sleep(chance.uniform(0.1, 1.5))
                    cluster.heal()
                case _:
                    cluster.fabric.weather.loss = chance.choice([0.0, 0.05, 0.2])

    async def run(self) -> list[str]:
        cluster = self.cluster
        for number in range(3):
            await cluster.start(cluster.add(founds=not number))
            await asyncio.sleep(12.0)
        await cluster.ask(0, lambda store: store.create_database("db"), 5.0)
        spec = msgspec.msgpack.encode(TableSpec(1, (0,), ()))
        head = (Change(Op.INSERT, 0, (0,), {0: 1}), Change(Op.INSERT, 0, (1,), {0: spec}))
        first = self.transaction(0, Part(CATALOG, changes=head))
        await cluster.ask(0, lambda store: store.commit(first), 5.0)
        work = [asyncio.ensure_future(self.write(i % 3)) for i in range(4)]
        work.append(asyncio.ensure_future(self.trouble()))
        if self.chance.random() < 0.5:
            work.append(asyncio.ensure_future(self.grow()))
        cluster.fabric.lost_to = self.deaf_to
        for version in range(2, VERSIONS + 1):
            await asyncio.sleep(self.chance.uniform(0.5, 2.0))
            self.deaf = cluster.machines[self.chance.randrange(3)].node_id
            await self.change(version)
        await asyncio.sleep(2.0)
        cluster.fabric.lost_to = None
        self.over = True
        await asyncio.gather(*work)
        cluster.heal()
        cluster.fabric.weather.loss = 0.0
        for number in range(len(cluster.machines)):
            await cluster.start(number)
        await cluster.settle()
        return await self.slipped()

    async def grow(self) -> None:
        """A fourth machine, so that tablets move."""
        await asyncio.sleep(self.chance.uniform(0.0, 3.0))
        await self.cluster.start(self.cluster.add())

    async def slipped(self) -> list[str]:
        """Rows without an entry of a rule that was finished."""
        found = []
        count = next(self.rows)
        keys = [row_group(number) for number in range(0, count, 3)]
        keys += [entry_group(version, number) for version in self.finished for number in range(count)]
        read = {}
        for at in range(0, len(keys), 500):
            part = keys[at : at + 500]
            groups = await self.somewhere(lambda store, part=part: store.read(part, None, 60.0), 90.0)
            read.update({group.key: group.rows or {} for group in groups})  # type: ignore[attr-defined]
        for number in range(count):
            if row_key(1, (number,)) in read[row_group(number)]:
                self.there += 1
                missing = [version for version in self.finished if not read[entry_group(version, number)]]
                found += [f"row {number} has no entry of version {version}" for version in missing]
        return found


def search(seed: int, *off: str) -> list[str]:
    """What went wrong in a run."""
    return virtual.run(Search(seed, off).run(), time_limit_s=10_000.0)


if __name__ == "__main__":
    first, last, *off = sys.argv[1:]
    bad = 0
    for seed in range(int(first), int(last) + 1):
        if slipped := search(seed, *off):
            bad += 1
            print(f"seed {seed}: {slipped[0]}, {len(slipped)} in all", flush=True)
    print(f"{bad} of {int(last) - int(first) + 1} runs")
