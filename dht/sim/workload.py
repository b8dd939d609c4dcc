"""Seeded clients: what Nova does to the store, in small. Every request and answer goes into the history.

Tables: LIST one text that grows by unique elements, always written with its old value as guard; CELL three columns that
clients set without guards, each its own; BAG rows that come and go, found by an indexed colour; OWNER rows with a
unique name that an entry in a group of its own reserves.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from dht.domain.copy import NEVER_S
from dht.errors import Conflict, DhtError, Indeterminate, Unavailable
from dht.model import (
    CATALOG_FAMILY,
    CATALOG_TABLE,
    ZERO,
    Ballot,
    Change,
    Comparison,
    Constraint,
    FindQuery,
    GroupKey,
    Guard,
    GuardKind,
    IndexSpec,
    Op,
    Order,
    Part,
    TableSpec,
    Transaction,
    Value,
)
from dht.requests import Store
from dht.rows import group_key
from dht.sim.cluster import Cluster, FollowingNode
from dht.sim.history import (
    APPLIED,
    EMPTY,
    NOTHING,
    REFUSED,
    UNKNOWN,
    Commit,
    Content,
    Draw,
    Find,
    History,
    Raise,
    Read,
    content_of,
)
from dht.sim.oracles import group_name, show_commit

DATABASE: Final = "sim"
LIST, CELL, BAG, OWNER, ENTRY = 1, 2, 3, 4, 5
CATALOG_VERSION: Final = 1
COLOURS: Final = ("red", "green", "blue")
CELL_COLUMNS: Final = (1, 2, 3)

SPECS: Final = (
    TableSpec(LIST, (10,)),
    TableSpec(CELL, (10,)),
    TableSpec(BAG, (10,), (IndexSpec(1, (0,)),)),
    TableSpec(OWNER, (10,), (IndexSpec(1, (0,)),)),
    TableSpec(ENTRY, (10,)),
)
"""Column 10 holds the primary key again, as the SQL door stores it."""


@dataclass(frozen=True)
class Mix:
    """How often a client does what, as weights; and on how many groups."""

    append: float = 4
    read: float = 4
    cell: float = 2
    bag: float = 2
    find: float = 1
    transact: float = 1
    owner: float = 1
    draw: float = 0.3
    follow: float = 0
    lists: int = 3
    cells: int = 2
    bags: int = 3
    rows_per_bag: int = 3
    owners: int = 4
    names: int = 3
    retry_after_s: float = 0.3
    pace_s: float = 0.01


@dataclass
class Bench:
    """What the clients of a run share."""

    cluster: Cluster
    mix: Mix
    history: History = field(default_factory=History)
    errors: list[str] = field(default_factory=list)
    timeout_s: float = 3.0
    operations_max: int | None = None
    """After so many operations the clients stop by themselves."""
    followed: dict[tuple[FollowingNode, GroupKey], Ballot] = field(default_factory=dict)
    """Where groups stood in the copies of followers when they were read there last."""
    operations: int = 0
    stopping: bool = False

    @property
    def over(self) -> bool:
        return self.stopping or (self.operations_max is not None and self.operations >= self.operations_max)


def list_group(i: int) -> GroupKey:
    return group_key(DATABASE, "list", (i,))


def cell_group(i: int) -> GroupKey:
    return group_key(DATABASE, "cell", (i,))


def bag_group(i: int) -> GroupKey:
    return group_key(DATABASE, "bag", (i,))


def owner_group(i: int) -> GroupKey:
    return group_key(DATABASE, "owner", (i,))


def entry_group(name: str) -> GroupKey:
    return group_key(DATABASE, "unique", (OWNER, name))


def all_groups(mix: Mix) -> list[GroupKey]:
    return [
        *(list_group(i) for i in range(mix.lists)),
        *(cell_group(i) for i in range(mix.cells)),
        *(bag_group(i) for i in range(mix.bags)),
        *(owner_group(i) for i in range(mix.owners)),
        *(entry_group(f"name{i}") for i in range(mix.names)),
    ]


class Client:
    """One client: one request at a time, at a daemon that it changes now and then."""

    def __init__(self, bench: Bench, name: str, chance: random.Random) -> None:
        self.bench = bench
        self.name = name
        self.chance = chance
        self.machine = 0
        self.serial = 0
        self.version = CATALOG_VERSION
        self.attempts_max = 4
        self.asks_outcome = 0.7
        self.sequence = (DATABASE, "ids")
        self.cache: dict[GroupKey, tuple[Content, Ballot]] = {}

    async def run(self) -> None:
        """Until the bench stops."""
        mix = self.bench.mix
        kinds: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (mix.append, self.append),
            (mix.read, self.read_any),
            (mix.cell, self.cell),
            (mix.bag, self.bag),
            (mix.find, self.find),
            (mix.transact, self.transact),
            (mix.owner, self.owner),
            (mix.draw, self.draw),
            (mix.follow, self.follow),
        ]
        weights = [weight for weight, _ in kinds]
        clock = self.bench.cluster.machines[0].clock
        while not self.bench.over:
            self.bench.operations += 1
            self.choose_machine()
            await self.chance.choices(kinds, weights)[0][1]()
            await clock.sleep(self.chance.expovariate(1 / mix.pace_s))

    def choose_machine(self) -> None:
        cluster = self.bench.cluster
        if self.chance.random() < 0.1 or not cluster.machines[self.machine].answering:
            self.machine = self.chance.choice(cluster.numbers() or [self.machine])

    # Requests, recorded.

    async def read(self, keys: Sequence[GroupKey]) -> list[tuple[Content, Ballot]] | None:
        """The groups' content and ballots, None if that failed. What is cached is named by its ballot, sometimes."""
        history, cluster = self.bench.history, self.bench.cluster
        cached = [self.cache.get(key) if self.chance.random() < 0.5 else None for key in keys]
        known = [None if one is None else one[1] for one in cached]
        call = history.tick()
        records = [Read(self.name, key, call) for key in keys]
        history.reads += records
        timeout_s = self.bench.timeout_s
        try:
            groups = await cluster.ask(self.machine, lambda s: s.read(keys, known, timeout_s), timeout_s + 1)
        except DhtError as error:
            self.failed("read", error, (Unavailable, Indeterminate))
            return None
        out = []
        for record, group, one in zip(records, groups, cached, strict=True):
            record.ret = history.tick()
            if group.rows is None and (one is None or one[1] != group.ballot):
                self.bench.errors.append(f"{self.name} read {group_name(record.key)}: no rows, and the ballot is new")
            record.content = one[0] if group.rows is None and one is not None else content_of(group.rows or {})
            self.cache[record.key] = record.content, group.ballot
            out.append(self.cache[record.key])
        return out

    def failed(self, what: str, error: DhtError, allowed: tuple[type[DhtError], ...]) -> None:
        self.bench.cluster.say(f"{self.name}@{self.machine} {what} fails: {error.code}: {error.message[:120]}")
        if not isinstance(error, allowed):
            self.bench.errors.append(f"{self.name} {what}: unexpected {type(error).__name__}: {error.message}")

    async def commit(self, parts: Sequence[Part]) -> str:
        """One transaction with its retries; returns the outcome."""
        history, cluster = self.bench.history, self.bench.cluster
        transaction = Transaction(self.chance.randbytes(16), DATABASE, self.version, tuple(parts))
        record = Commit(self.name, transaction, history.tick())
        history.commits.append(record)
        outcome, attempt = UNKNOWN, 0
        while True:
            outcome = await self.attempt(record, attempt)
            if outcome != UNKNOWN or attempt + 1 == self.attempts_max or self.chance.random() < 0.3:
                break
            attempt += 1
            self.choose_machine()
            await cluster.machines[0].clock.sleep(self.chance.choice((0.0, 0.01, self.bench.mix.retry_after_s)))
        if outcome == UNKNOWN and self.chance.random() < self.asks_outcome:
            outcome = await self.ask_outcome(transaction)
        record.outcome = outcome
        record.ret = history.tick()
        cluster.say(f"{self.name}@{self.machine} {show_commit(record)}")
        return outcome

    async def attempt(self, record: Commit, attempt: int) -> str:
        timeout_s = self.bench.timeout_s
        try:
            await self.bench.cluster.ask(
                self.machine, lambda s: s.commit(record.transaction, attempt, timeout_s), timeout_s + 1
            )
        except Conflict as error:
            if error.detail.get("what") in ("change", "guard"):
                part = error.detail.get("part")
                record.refused_part = part if isinstance(part, int) else 0
                return REFUSED
            self.failed("commit", error, (Conflict,))
            return NOTHING
        except Unavailable as error:
            self.failed("commit", error, (Unavailable,))
            return UNKNOWN if attempt else NOTHING
        except DhtError as error:
            self.failed("commit", error, (Indeterminate,))
            return UNKNOWN
        return APPLIED

    async def ask_outcome(self, transaction: Transaction) -> str:
        """What the store itself says of a transaction whose answer was lost; final, if it says anything."""
        part = transaction.parts[0]
        timeout_s = self.bench.timeout_s
        try:
            answer = await self.bench.cluster.ask(
                self.machine, lambda s: s.outcome(transaction.id, part.key, part.seen, timeout_s), timeout_s + 1
            )
        except DhtError as error:
            self.failed("outcome", error, (Unavailable, Indeterminate))
            return UNKNOWN
        return {"applied": APPLIED, "not_applied": NOTHING}.get(answer, UNKNOWN)

    # What clients do.

    def element(self) -> str:
        self.serial += 1
        return f"{self.name}.{self.serial},"

    def append_part(self, key: GroupKey, content: Content, seen: Ballot | None) -> Part:
        for (table, pk), columns in content:
            if table == LIST:
                old = str(dict(columns)[0])
                return Part(key, seen, (Change(Op.UPDATE, LIST, pk, {0: old + self.element()}, {0: old}),))
        return Part(key, seen, (Change(Op.INSERT, LIST, (0,), {0: self.element(), 10: 0}),))

    async def append(self) -> None:
        key = list_group(self.chance.randrange(self.bench.mix.lists))
        if got := await self.read([key]):
            await self.commit([self.append_part(key, *got[0])])

    async def transact(self) -> None:
        """Append to two or three lists, all or none."""
        count = min(self.bench.mix.lists, self.chance.choice((2, 2, 3)))
        keys = [list_group(i) for i in self.chance.sample(range(self.bench.mix.lists), count)]
        got = await self.read(keys)
        if not got:
            return
        parts = [self.append_part(key, *one) for key, one in zip(keys, got, strict=True)]
        last = parts[-1]
        if self.chance.random() < 0.2 and last.changes[0].op == Op.UPDATE:
            # The last list stays as it is, and only has to be what was read.
            parts[-1] = Part(last.key, last.seen, (), (Guard(GuardKind.HAS, LIST, (0,), last.changes[0].guards),))
        await self.commit(parts)

    async def read_any(self) -> None:
        groups = all_groups(self.bench.mix)
        await self.read(self.chance.sample(groups, min(len(groups), self.chance.choice((1, 1, 2)))))

    async def cell(self) -> None:
        """Set one column and leave the others alone; half of the time unseen."""
        key = cell_group(self.chance.randrange(self.bench.mix.cells))
        got = await self.read([key])
        if not got:
            return
        content, seen = got[0]
        self.serial += 1
        value = f"{self.name}.{self.serial}"
        if content == EMPTY:
            change = Change(Op.INSERT, CELL, (0,), {10: 0, **dict.fromkeys(CELL_COLUMNS, value)})
        else:
            change = Change(Op.UPDATE, CELL, (0,), {self.chance.choice(CELL_COLUMNS): value})
        await self.commit([Part(key, seen, (change,))])

    async def bag(self) -> None:
        """Insert, recolour or delete a row."""
        mix = self.bench.mix
        key = bag_group(self.chance.randrange(mix.bags))
        pk = (self.chance.randrange(mix.rows_per_bag),)
        got = await self.read([key])
        if not got:
            return
        content, seen = got[0]
        here = {name: dict(columns) for name, columns in content}.get((BAG, pk))
        self.serial += 1
        colour: str | None = self.chance.choice((*COLOURS, None))
        label = f"{self.name}.{self.serial}"
        if here is None:
            change = Change(Op.INSERT, BAG, pk, {0: colour, 1: label, 10: pk[0]})
        elif self.chance.random() < 0.4:
            change = Change(Op.DELETE, BAG, pk, {}, {1: here[1]})
        else:
            change = Change(Op.UPDATE, BAG, pk, {0: colour, 1: label})
        guards: tuple[Guard, ...] = ()
        if colour is not None and change.op != Op.DELETE and self.chance.random() < 0.3:
            guards = (Guard(GuardKind.UNIQUE, BAG, pk, {0: colour}, "duplicate"),)
        await self.commit([Part(key, seen, (change,), guards)])

    async def owner(self) -> None:
        """Take, swap or give back a unique name: the row's group and one or two entries' groups."""
        mix = self.bench.mix
        i = self.chance.randrange(mix.owners)
        name = f"name{self.chance.randrange(mix.names)}"
        key = owner_group(i)
        got = await self.read([key])
        if not got:
            return
        content, seen = got[0]
        here = {n: dict(columns) for n, columns in content}.get((OWNER, (i,)))
        take = Part(entry_group(name), None, (Change(Op.INSERT, ENTRY, (name,), {0: i, 10: name}),))
        if here is None:
            parts = [Part(key, seen, (Change(Op.INSERT, OWNER, (i,), {0: name, 10: i}),)), take]
        else:
            old = str(here[0])
            give = Part(entry_group(old), None, (Change(Op.DELETE, ENTRY, (old,), {}, {0: i}),))
            if self.chance.random() < 0.5 or old == name:
                parts = [Part(key, seen, (Change(Op.DELETE, OWNER, (i,), {}, {0: old}),)), give]
            else:
                parts = [Part(key, seen, (Change(Op.UPDATE, OWNER, (i,), {0: name}, {0: old}),)), give, take]
        await self.commit(parts)

    async def find(self) -> None:
        history, cluster, mix = self.bench.history, self.bench.cluster, self.bench.mix
        tables = [
            (weight, table) for weight, table in ((mix.bag, BAG), (mix.owner, OWNER), (mix.owner, ENTRY)) if weight
        ]
        table = self.chance.choices([t for _, t in tables], [w for w, _ in tables])[0] if tables else BAG
        values: tuple[Value, ...] = COLOURS
        if table == OWNER:
            values = tuple(f"name{i}" for i in range(mix.names))
        elif table == ENTRY:
            values = tuple(range(mix.owners))
        constraints: tuple[Constraint, ...] = self.chance.choice(
            (
                (),
                (Constraint(0, Comparison.EQ, (self.chance.choice(values),)),),
                (Constraint(0, Comparison.IN, values[:2]),),
                (Constraint(0, Comparison.IS_NULL),),
                (Constraint(0, Comparison.GT, (values[0],)),),
            )
        )
        ordered = self.chance.random() < 0.3
        query = FindQuery(
            DATABASE,
            table,
            self.version,
            constraints,
            Order((10,), self.chance.random() < 0.5) if ordered else None,
            2 if ordered else None,
            self.chance.random() < 0.2,
        )
        record = Find(self.name, query, history.tick())
        history.finds.append(record)
        timeout_s = self.bench.timeout_s
        try:
            record.result = await cluster.ask(self.machine, lambda s: s.find(query, timeout_s), timeout_s + 1)
        except DhtError as error:
            self.failed("find", error, (Unavailable, Indeterminate))
        record.ret = history.tick()
        for group in record.result.groups if record.result is not None else ():
            history.reads.append(
                Read(f"{self.name} find", group.key, record.call, record.ret, content_of(group.rows or {}))
            )

    async def follow(self) -> None:
        """Read a group, or find rows, out of the machine's copy: as old as it says, and never older than before."""
        history, node = self.bench.history, self.bench.cluster.machines[self.machine].node
        if not isinstance(node, FollowingNode) or (followed := node.followed) is None:
            return
        if self.chance.random() < 0.3:
            constraints = self.chance.choice(((), (Constraint(0, Comparison.EQ, (self.chance.choice(COLOURS),)),)))
            query = FindQuery(DATABASE, BAG, CATALOG_VERSION, constraints)
            result, covered_s = followed.find(query)
            if result is not None:
                call = history.moment_of(covered_s)
                history.finds.append(Find(f"{self.name} copy", query, call, history.tick(), result))
            return
        key = self.chance.choice(all_groups(self.bench.mix))
        (group,), covered_s = followed.read([key], None)
        if covered_s == NEVER_S:
            return
        before = self.bench.followed.get((node, key), ZERO)
        if group.ballot < before:
            self.bench.errors.append(f"{self.name} read {group_name(key)} in a copy that stood at a higher ballot")
        self.bench.followed[node, key] = group.ballot
        call = history.moment_of(covered_s)
        history.reads.append(Read(f"{self.name} copy", key, call, history.tick(), content_of(group.rows or {})))

    async def draw(self) -> None:
        """Take ids, or raise the sequence above an explicit one."""
        history, cluster = self.bench.history, self.bench.cluster
        sequence = self.sequence
        timeout_s = self.bench.timeout_s
        highest = max((d.first or 0 for d in history.draws), default=0)
        if self.chance.random() < 0.2:
            raised = Raise(self.name, self.machine, sequence, highest + self.chance.randrange(300), history.tick())
            history.raises.append(raised)
            try:
                await cluster.ask(
                    self.machine, lambda s: s.raise_sequence(*sequence, raised.above, timeout_s), timeout_s + 1
                )
                raised.done = True
            except DhtError as error:
                self.failed("raise", error, (Unavailable, Indeterminate))
            raised.ret = history.tick()
            return
        above = highest if self.chance.random() < 0.3 else 0
        record = Draw(self.name, self.machine, sequence, self.chance.choice((1, 1, 5, 120)), above, history.tick())
        history.draws.append(record)
        try:
            record.first = await cluster.ask(
                self.machine, lambda s: s.reserve_ids(*sequence, record.count, above, timeout_s), timeout_s + 1
            )
        except DhtError as error:
            self.failed("draw", error, (Unavailable, Indeterminate))
        record.ret = history.tick()


async def set_up(bench: Bench, client: Client, patience_s: float = 60.0) -> None:
    """Create the database and its catalog; retried, because the cluster is just starting."""
    cluster = bench.cluster
    clock = cluster.machines[0].clock
    deadline_s = clock.monotonic() + patience_s
    key = group_key(DATABASE, CATALOG_FAMILY, ())
    changes = [Change(Op.INSERT, CATALOG_TABLE, (0,), {0: CATALOG_VERSION})]
    changes += [Change(Op.INSERT, CATALOG_TABLE, (s.table,), {0: msgspec.msgpack.encode(s)}) for s in SPECS]
    transaction = Transaction(client.chance.randbytes(16), DATABASE, 0, (Part(key, None, tuple(changes)),))
    attempt = 0
    while True:
        try:
            await cluster.ask(client.machine, lambda s: s.create_database(DATABASE, 5.0), 6.0)
            await cluster.ask(client.machine, partial(_commit_catalog, transaction, attempt), 6.0)
        except (Unavailable, Indeterminate) as error:
            if clock.monotonic() > deadline_s:
                raise AssertionError(f"the cluster did not come up within {patience_s} s: {error.message}") from error
            cluster.say(f"set-up waits: {error.code}: {error.message[:160]}")
            attempt += 1
            await clock.sleep(0.2)
        else:
            return


async def _commit_catalog(transaction: Transaction, attempt: int, store: Store) -> None:
    await store.commit(transaction, attempt, 5.0)


async def read_everything(bench: Bench, client: Client, patience_s: float = 60.0) -> dict[GroupKey, Content]:
    """Every group once more, through every machine; retried until the cluster has recovered."""
    cluster = bench.cluster
    clock = cluster.machines[0].clock
    final: dict[GroupKey, Content] = {}
    for key in all_groups(bench.mix):
        for number in cluster.numbers():
            deadline_s = clock.monotonic() + patience_s
            client.machine = number
            while (got := await client.read([key])) is None:
                if clock.monotonic() > deadline_s:
                    patience_s = 0.0  # one is enough
                    bench.errors.append(f"group {group_name(key)} cannot be read at n{number} after the faults ended")
                    break
                await clock.sleep(0.2)
            else:
                final[key] = got[0][0]
    return final
