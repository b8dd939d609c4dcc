"""What joining, looking up, hinting, writing and reading far away cost among 3 to 100 PoPs of ten nodes each.

    python -m tests.pop_costs.run --pops 3 10 30 100 --seed 1 --write docs/benchmarks/pop-costs.md

One operation at a time; each figure is the mean of REPEATS, by other nodes and of other groups each time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from dht.model import Change, Columns, GroupKey, Op, Part, TableSpec, Transaction
from dht.rows import group_key
from dht.sim.loop import run
from tests.pop_costs.world import (
    NODES_PER_POP,
    Cost,
    Loop,
    Node,
    World,
    cost_of,
    measured,
    snapshot,
    traced,
)

SIZES: Final = (3, 10, 30, 100)
REPEATS: Final = 10
JOINS: Final = 5
JOINED_S: Final = 20.0
"""After which a newcomer's first look-ups are over, while its first ping in the background is still to come."""
MARK: Final = "<!-- the table, by tests.pop_costs.run -->"
TABLE: Final = 1
LOCAL: Final = "shared"
OPERATIONS: Final = {
    "join": "join the overlay",
    "nodes_of_pop": "look up a PoP's nodes",
    "publish": "publish a location hint",
    "find_hint": "find a location hint",
    "write": "write at home, at the coordinator",
    "write_forwarded": "write at home, elsewhere in the PoP",
    "far_read_first": "far read, the first in that PoP",
    "far_read": "far read",
    "far_write": "far write",
    "local_first": "local row, the daemon's first in the database",
    "local_read": "local row, its PoP not known",
    "local_again": "local row, its PoP known",
    "absent_first": "local row that is nowhere, the daemon's first",
    "absent": "local row that is nowhere",
}


@dataclass
class Costs:
    """Of so many PoPs, by operation. `contacts`: of a node, on average."""

    pops: int
    of: dict[str, list[Cost]] = field(default_factory=dict)
    contacts: float = 0.0
    searched: int = 0

    def mean(self, name: str) -> Cost:
        costs = self.of[name]
        return Cost(*(sum(column) / len(costs) for column in zip(*map(astuple, costs), strict=True)))


class Measuring:
    def __init__(self, pops: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.world = World(pops)
        self.costs = Costs(pops)
        self.serial = 0
        self.came: list[Node] = []

    async def run(self) -> Costs:
        await self.world.begin(self.chance)
        await self.define()
        await self.in_overlay()
        await self.in_databases()
        await self.of_local_rows()
        await self.joins()
        everybody = self.world.everybody()
        self.costs.searched = sum(node.places.counters["searched"] for node in everybody)
        self.costs.contacts = sum(len(node.overlay.contacts()) for node in everybody) / len(everybody)
        for node in self.came:
            await node.overlay.stop()
        await self.world.end()
        return self.costs

    # What is there.

    def some(self, *but: str) -> Node:
        """A node of another PoP than these."""
        while True:
            node = self.chance.choice(self.chance.choice(self.world.nodes))
            if node.pop not in but:
                return node

    def transaction(self, database: str, part: Part, version: int = 1, created: tuple[int, ...] = ()) -> Transaction:
        self.serial += 1
        return Transaction(self.serial.to_bytes(16, "big"), database, version, (part,), created)

    async def define(self) -> None:
        """A database in each PoP with one group, and one over all PoPs with a local group made in each."""
        first = self.world.nodes[0][0]
        await first.homed.create_database(LOCAL, home="local")
        await self.make_table(first, LOCAL)
        for pop in self.world.nodes:
            # Reads open the links to those whom the writes below are for.
            await pop[0].homed.homes()
            await pop[0].places._pops(LOCAL, 10.0)
            await asyncio.sleep(1.0)
            await pop[0].homed.create_database(pop[0].pop)
            await self.make_table(pop[0], pop[0].pop)
            await pop[0].homed.commit(self.transaction(pop[0].pop, inserted(group_of(pop[0].pop))))
            await pop[0].homed.commit(self.transaction(LOCAL, inserted(local_group(pop[0].pop)), created=(0,)))
        await asyncio.sleep(5.0)

    async def make_table(self, node: Node, database: str) -> None:
        spec = msgspec.msgpack.encode(TableSpec(TABLE, (0,)))
        changes = (Change(Op.INSERT, 0, (0,), {0: 1}), Change(Op.INSERT, 0, (1,), {0: spec}))
        part = Part(group_key(database, "catalog", ()), changes=changes)
        await node.homed.commit(self.transaction(database, part))

    async def take(self, name: str, work: Callable[[], Awaitable[object]]) -> None:
        self.costs.of.setdefault(name, []).append(await measured(work))

    # What is measured.

    async def in_overlay(self) -> None:
        for number in range(REPEATS):
            asker = self.some()
            wanted = self.some(asker.pop).pop
            await self.take("nodes_of_pop", lambda a=asker, w=wanted: found_all(a, w))
            group = group_key(LOCAL, "~hint", (number,))
            await self.take("publish", lambda a=asker, g=group: a.overlay.publish_hint(g))
            finder = self.some(asker.pop)
            await self.take("find_hint", lambda f=finder, g=group, p=asker.pop: hinted(f, g, p))

    async def in_databases(self) -> None:
        for _ in range(REPEATS):
            home = self.chance.choice(self.world.nodes)
            database, group = home[0].pop, group_of(home[0].pop)
            first = home[0].own.domain.roster.tablets[home[0].own.registers.tablet(group)]
            coordinator = next(node for node in home if node.id == first[0])
            forwarder = next(node for node in home if node.id not in first)
            asker = self.some(database)
            for node in (coordinator, forwarder, asker):
                await node.homed.home(database)
            await self.take("far_read_first", lambda a=asker, g=group: a.homed.read([g]))
            await self.take("far_read", lambda a=asker, g=group: a.homed.read([g]))
            for name, node in (("write", coordinator), ("write_forwarded", forwarder), ("far_write", asker)):
                for _ in range(2):
                    write = self.transaction(database, updated(group, self.serial))
                    await node.homed.home(database)
                    cost = await measured(lambda n=node, w=write: n.homed.commit(w))
                # What each node asks once in a while, the catalog's version, is not part of it.
                self.costs.of.setdefault(name, []).append(cost)

    async def of_local_rows(self) -> None:
        for number in range(REPEATS):
            maker = self.some()
            groups = [group_key(LOCAL, "~rows", (number, at)) for at in range(2)]
            for group in groups:
                await maker.homed.commit(self.transaction(LOCAL, inserted(group), created=(0,)))
                assert maker.made[-1] == group
                await maker.overlay.publish_hint(group)
            asker = self.some(maker.pop)
            await asker.homed.home(LOCAL)
            for name, group in zip(("local_first", "local_read", "local_again"), (*groups, groups[1]), strict=True):
                await asker.homed.home(LOCAL)
                await self.take(name, lambda a=asker, g=group: found_one(a, g))
            nowhere = group_key(LOCAL, "~none", (number,))
            for name in ("absent_first", "absent"):
                await self.take(name, lambda a=asker, g=nowhere: a.homed.read([g]))

    async def joins(self) -> None:
        """One after the other; they stay."""
        loop = asyncio.get_running_loop()
        for number in range(JOINS):
            mate, other = self.some(), self.some()
            newcomer = Node(self.world, mate.pop_number, NODES_PER_POP + number)
            began_s = loop.time()
            traffic, _ = await traced(lambda n=newcomer, m=mate, o=other: n.join(m, o))
            await asyncio.sleep(JOINED_S)
            so_far = snapshot(traffic)
            self.costs.of.setdefault("join", []).append(cost_of(so_far, so_far.last_s - began_s))
            self.came.append(newcomer)


def group_of(database: str) -> GroupKey:
    return group_key(database, "f", ("g",))


def local_group(pop: str) -> GroupKey:
    return group_key(LOCAL, "~first", (pop,))


def inserted(group: GroupKey) -> Part:
    row: Columns = {0: 1, 1: 0, 2: "x" * 300}
    return Part(group, changes=(Change(Op.INSERT, TABLE, (1,), row),))


def updated(group: GroupKey, value: int) -> Part:
    return Part(group, changes=(Change(Op.UPDATE, TABLE, (1,), {1: value}),))


async def found_all(asker: Node, pop: str) -> None:
    found = await asker.overlay.nodes_of_pop(pop)
    assert len(found) >= NODES_PER_POP, f"{len(found)} nodes of {pop} were found"


async def hinted(finder: Node, group: GroupKey, pop: str) -> None:
    found = await finder.overlay.find_hint(group)
    assert found == pop, f"{found} is hinted, not {pop}"


async def found_one(asker: Node, group: GroupKey) -> None:
    (found,) = await asker.homed.read([group])
    assert found.rows


def costs(pops: int, seed: int = 1) -> Costs:
    """Measure so many PoPs."""
    random.seed(seed)
    return run(Measuring(pops, seed).run(), time_limit_s=1e6, steps_max=10**10, loop=Loop())


def cell(cost: Cost) -> str:
    far, near, far_trips, near_trips = (f"{number:.1f}".removesuffix(".0") for number in astuple(cost))
    return f"{far} + {near}; {far_trips} + {near_trips}"


def table(measured_costs: list[Costs]) -> str:
    """Markdown: a line for each operation, a column for each size."""
    sizes = [f"{one.pops} PoPs, {one.pops * NODES_PER_POP} nodes" for one in measured_costs]
    lines = ["| operation | " + " | ".join(sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
    for name, title in OPERATIONS.items():
        lines.append(f"| {title} | " + " | ".join(cell(one.mean(name)) for one in measured_costs) + " |")
    contacts = " | ".join(f"{one.contacts:.3g}" for one in measured_costs)
    return "\n".join([*lines, f"| contacts of a node | {contacts} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pops", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", help="put the table into this page, in place of the one that it has")
    given = parser.parse_args()
    measured_costs = []
    for pops in given.pops:
        began = time.monotonic()
        measured_costs.append(costs(pops, given.seed))
        print(f"{pops} PoPs: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        print(table(measured_costs), flush=True)
    if given.write:
        page = Path(given.write)
        kept = [line for line in page.read_text().split("\n") if not line.startswith("| ")]
        at = kept.index(MARK) + 1
        page.write_text("\n".join([*kept[:at], "", table(measured_costs), *kept[at:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
