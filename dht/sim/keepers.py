"""Clients that drop the database and create it again, and clients that use it meanwhile.

Keepers know nothing of each other: two may drop at once, one create what the other is dropping. Beside the scenario's
faults there are two stories that chance alone would tell too seldom. A daemon is stopped in the middle of a drop, and
goes on when somebody else has finished that, created the database anew, and others write to it. Or a daemon's
power goes in the middle of a write, and it is back when the database is another one. The registry is read all the time,
and the history notes which creation of the database it told of: the oracles rely on that alone (`dht.sim.lives`).

Tenants do what clients do, under the catalog version that they know; refused, they read the catalog again, as the SQL
door does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from dht.errors import Conflict, DhtError, Indeterminate, NotFound, SchemaChanged, Unavailable
from dht.model import CATALOG_TABLE, Change, Columns, GroupKey, Op, Part, Transaction
from dht.register import catalog
from dht.register.messages import Accept
from dht.sim.history import NOTHING, UNKNOWN, Commit, Keeping, Listed, Missed, Published
from dht.sim.workload import DATABASE, SPECS, Bench, Client

LIFE_S: Final = 0.8
"""Mean time that a keeper leaves the database alone; all of them together, and what a drop takes, make its lives."""
KEEPING_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 1.0
PATIENCE_S: Final = 60.0
STRANDED_WRITERS: Final = 3
READ_BACK_MAX: Final = 5
_HEAD: Final = (0,)
_LOST: Final = (Unavailable, Indeterminate)


class Tenant(Client):
    """A client of a database that may be another one of the same name by now."""

    def __init__(self, bench: Bench, name: str, chance: random.Random) -> None:
        super().__init__(bench, name, chance)
        self.sequence = (DATABASE, f"ids{self.version}")
        self.refused = False
        self.asked = 0
        self.written: GroupKey | None = None
        self.leaves = True

    def choose_machine(self) -> None:
        super().choose_machine()
        self.asked = self.bench.history.tick()

    async def commit(self, parts: Sequence[Part]) -> str:
        self.written = parts[0].key
        if self.refused:
            await self.learn()
        return await super().commit(parts)

    async def find(self) -> None:
        if self.refused:
            await self.learn()
        await super().find()

    async def attempt(self, record: Commit, attempt: int) -> str:
        """A refusal by the registry or the catalog is certain of this attempt only; an earlier one may be applied."""
        record.until_s = asyncio.get_running_loop().time() + self.bench.timeout_s
        self.asked = self.bench.history.tick()
        self.refused = False
        outcome = await super().attempt(record, attempt)
        return outcome if not self.refused else UNKNOWN if attempt else NOTHING

    def failed(self, what: str, error: DhtError, allowed: tuple[type[DhtError], ...]) -> None:
        if isinstance(error, (NotFound, SchemaChanged)):
            self.refused = True
            allowed = (*allowed, type(error))
        if isinstance(error, NotFound):
            history = self.bench.history
            history.missed.append(Missed(self.name, what, self.asked, history.tick()))
        super().failed(what, error, allowed)
        if self.leaves and self.chance.random() < 0.5:
            self.machine = self.chance.choice(self.bench.cluster.numbers() or [self.machine])

    async def learn(self) -> None:
        """The catalog's version, if it has tables."""
        key = catalog.catalog_group(DATABASE)
        try:
            (group,) = await self.bench.cluster.ask(
                self.machine, lambda s: s.read([key], None, READ_TIMEOUT_S), READ_TIMEOUT_S + 1
            )
        except DhtError as error:
            self.failed("catalog", error, (DhtError,))
            return
        version, specs = catalog.catalog_of(group.rows or {})
        if specs:
            self.version = version
            self.sequence = (DATABASE, f"ids{version}")


class Keeper(Client):
    """Drops the database and creates it again. `start`: boots a machine without waiting for it."""

    def __init__(self, bench: Bench, name: str, chance: random.Random, start: Callable[[int], None]) -> None:
        super().__init__(bench, name, chance)
        self.start = start
        self.stranded: list[Tenant] = []

    async def run(self) -> None:
        """Until the bench stops."""
        clock = self.bench.cluster.machines[0].clock
        while not self.bench.over:
            self.choose_machine()
            await self.look()
            await self.publish()
            await clock.sleep(self.chance.expovariate(1 / LIFE_S))
            if self.bench.over:
                return
            self.choose_machine()
            await self.look()
            await self.replace()

    async def watch(self) -> None:
        """Note what the registry says, all the time, at one daemon after the other."""
        cluster = self.bench.cluster
        while not self.bench.over:
            self.machine = self.chance.choice(cluster.numbers() or [self.machine])
            await self.look()
            await cluster.machines[0].clock.sleep(self.chance.expovariate(1 / 0.03))

    async def replace(self) -> None:
        """Drop, and create; the one or the other may fail, or have been done by somebody else."""
        cluster = self.bench.cluster
        story = self.chance.choice((None, self.stall, self.strand, self.strand))
        number = self.machine
        beside = None if story is None else asyncio.get_running_loop().create_task(story(number))
        if story == self.strand and beside is not None:
            await beside
        await self.keep(drops=True)
        if beside is not None:
            await beside
        if story == self.strand or self.chance.random() < 0.8:  # else somebody else creates it
            await cluster.machines[0].clock.sleep(self.chance.choice((0.0, 0.0, 0.01, 0.3)))
            self.choose_machine()
            await self.renew()
        if story == self.strand:
            self.start(number)
            await self.read_back(number)

    def failed(self, what: str, error: DhtError, allowed: tuple[type[DhtError], ...]) -> None:
        super().failed(what, error, allowed)
        self.machine = self.chance.choice(self.bench.cluster.numbers() or [self.machine])

    async def renew(self) -> None:
        if await self.keep(drops=False) is not None:
            await self.look()
            await self.publish()

    async def stall(self, number: int) -> None:
        """Stop the daemon that drops, somewhere in the middle, until the database is another one, or for a while."""
        cluster = self.bench.cluster
        clock = cluster.machines[0].clock
        await clock.sleep(self.chance.uniform(0.0, 0.03))
        if cluster.numbers(answering=False) or len(others := cluster.numbers()) < 3:
            return
        cluster.pause(number)
        other = Keeper(self.bench, f"{self.name}'", self.chance, self.start)
        other.machine = self.chance.choice([one for one in others if one != number])
        await other.renew()
        await clock.sleep(self.chance.expovariate(5.0))
        cluster.resume(number)

    async def strand(self, number: int) -> None:
        """A daemon's power goes in the middle of writes, of which nobody else has heard more than their prepares.

        Their clients have given up when this one turns to another daemon.
        """
        cluster = self.bench.cluster
        clock, node = cluster.machines[0].clock, cluster.machines[number].node_id
        others = [one for one in cluster.numbers() if one != number]
        if len(others) < 2 or cluster.numbers(answering=False) or cluster.fabric.lost_to is not None:
            return
        writers = [Tenant(self.bench, f"{self.name}.{self.serial + i}", self.chance) for i in range(STRANDED_WRITERS)]
        self.serial += STRANDED_WRITERS
        for writer in writers:
            writer.machine, writer.attempts_max, writer.asks_outcome = number, 1, 0.0
            await writer.learn()
        cluster.fabric.lost_to = lambda sender, to, message: sender == node and isinstance(message, Accept)
        writing = [asyncio.get_running_loop().create_task(writer.cell()) for writer in writers]
        await clock.sleep(self.chance.uniform(0.02, 0.2))
        cluster.crash(number)
        cluster.fabric.lost_to = None
        await asyncio.gather(*writing)
        await clock.sleep(self.bench.timeout_s)
        self.stranded = writers
        self.machine = self.chance.choice(others)
        await self.look()

    async def read_back(self, number: int) -> None:
        """The clients of the daemon whose power had gone look what became of their writes, at the same one."""
        clock = self.bench.cluster.machines[0].clock
        stranded, self.stranded = self.stranded, []
        for writer in stranded:
            writer.machine, writer.leaves = number, False
            for _ in range(READ_BACK_MAX):
                await clock.sleep(self.chance.uniform(0.0, 0.1))
                if writer.written is None or await writer.read([writer.written]) is not None:
                    break

    async def keep(self, *, drops: bool) -> bool | None:
        """Drop or create the database; the answer, None if nobody knows."""
        history, cluster = self.bench.history, self.bench.cluster
        record = Keeping(self.name, drops, history.tick())
        history.keepings.append(record)
        try:
            record.changed = await cluster.ask(
                self.machine,
                lambda s: (s.drop_database if drops else s.create_database)(DATABASE, KEEPING_TIMEOUT_S),
                KEEPING_TIMEOUT_S + 1,
            )
        except DhtError as error:
            self.failed("drop" if drops else "create", error, _LOST)
        record.ret = history.tick()
        cluster.say(f"{self.name}@{self.machine} {'drop' if drops else 'create'}: {record.changed}")
        return record.changed

    async def look(self) -> bool | None:
        """Note what the registry says of the database; whether it is there, None if that cannot be read."""
        history, cluster = self.bench.history, self.bench.cluster
        call = history.tick()
        try:
            (group,) = await cluster.ask(
                self.machine, lambda s: s.read([catalog.REGISTRY_GROUP], None, READ_TIMEOUT_S), READ_TIMEOUT_S + 1
            )
        except DhtError as error:
            self.failed("look", error, _LOST)
            return None
        row = catalog.registered(group.rows or {}).get(DATABASE)
        mark, dropping = (None, False) if row is None else (row.mark, row.dropping)
        history.listed.append(Listed(self.name, call, history.tick(), mark, dropping))
        return row is not None and not row.dropping

    async def publish(self) -> bool:
        """Give the database its tables, unless it has them; whether it has them now."""
        history, cluster = self.bench.history, self.bench.cluster
        key = catalog.catalog_group(DATABASE)
        call = history.tick()
        try:
            (group,) = await cluster.ask(
                self.machine, lambda s: s.read([key], None, READ_TIMEOUT_S), READ_TIMEOUT_S + 1
            )
            version, specs = catalog.catalog_of(group.rows or {})
            if specs:
                return True
            guards: Columns = {0: version} if version else {}
            head = Change(Op.UPDATE if version else Op.INSERT, CATALOG_TABLE, _HEAD, {0: version + 1}, guards)
            rows = [Change(Op.INSERT, CATALOG_TABLE, (s.table,), {0: msgspec.msgpack.encode(s)}) for s in SPECS]
            work = Transaction(self.chance.randbytes(16), DATABASE, 0, (Part(key, group.ballot, (head, *rows)),))
            await cluster.ask(self.machine, lambda s: s.commit(work, 0, READ_TIMEOUT_S), READ_TIMEOUT_S + 1)
        except DhtError as error:
            self.failed("publish", error, (*_LOST, Conflict, NotFound))
            return False
        history.published.append(Published(version + 1, call, history.tick()))
        return True

    async def settle(self) -> None:
        """After the faults: until the database is there, and has its tables."""
        clock = self.bench.cluster.machines[0].clock
        end_s = clock.monotonic() + PATIENCE_S
        while True:
            self.choose_machine()
            if await self.keep(drops=False) is not None and await self.look() and await self.publish():
                return
            if clock.monotonic() > end_s:
                raise AssertionError(f"the database cannot be made again within {PATIENCE_S:.0f} s without faults")
            await clock.sleep(0.2)
