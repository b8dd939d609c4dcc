"""The simulator's clients on real daemons: `dht.sim.workload` asks through Unix sockets, its oracles judge the answers.

All clients of a run live in one process, so that one counter orders their calls and returns.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dht import requests
from dht.model import Applied, Ballot, Change, FindQuery, FindResult, GroupKey, GroupRead, Op, Part, Transaction
from dht.rows import group_key
from dht.sim import oracles, workload
from dht.sim.history import APPLIED, Content, History
from dht.sim.workload import CELL, ENTRY, LIST, OWNER, Bench, Client, Mix, read_everything, set_up
from dht.wire.local import AsyncClient
from lucd.demo.daemons import LocalNode

T = TypeVar("T")
ACCOUNTS = 4
BALANCE = 100
AFTERMATH_S = 3.0


class DoorStore:
    """`dht.requests.Store` through a daemon's local door."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def _ask(self, message: Any, timeout_s: float | None) -> Any:
        return await self._client.call(message, timeout_s or 10.0)

    async def read(
        self, keys: Sequence[GroupKey], known: Sequence[Ballot | None] | None = None, timeout_s: float | None = None
    ) -> tuple[GroupRead, ...]:
        ballots = (None,) * len(keys) if known is None else tuple(known)
        groups: tuple[GroupRead, ...] = (await self._ask(requests.ReadGroups(tuple(keys), ballots), timeout_s)).groups
        return groups

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        result: FindResult = (await self._ask(requests.Find(query), timeout_s)).result
        return result

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        applied: Applied = (await self._ask(requests.Commit(transaction, attempt), timeout_s)).applied
        return applied

    async def reserve_ids(self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None):
        return (await self._ask(requests.ReserveIds(database, name, count, above), timeout_s)).first

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self._ask(requests.RaiseSequence(database, name, above), timeout_s)

    async def outcome(self, id: bytes, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None):
        return (await self._ask(requests.AskOutcome(id, key, seen), timeout_s)).outcome

    async def create_database(self, name: str, timeout_s: float | None = None) -> bool:
        return (await self._ask(requests.CreateDatabase(name), timeout_s)).changed


class _Clock:
    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


class _Machine:
    """A daemon as the simulator's clients see one. `answering`: neither killed nor stopped by the run."""

    def __init__(self, node: LocalNode) -> None:
        self.node = node
        self.client = AsyncClient(node.socket)
        self.clock = _Clock()
        self.answering = True


class RealCluster:
    """What `dht.sim.workload` needs of `dht.sim.cluster.Cluster`."""

    def __init__(self, nodes: Sequence[LocalNode]) -> None:
        self.machines = [_Machine(node) for node in nodes]

    def numbers(self) -> list[int]:
        return [i for i, machine in enumerate(self.machines) if machine.answering]

    async def ask(self, number: int, ask: Callable[[Any], Awaitable[T]], timeout_s: float) -> T:
        return await ask(DoorStore(self.machines[number].client))

    def say(self, line: str) -> None:
        """The simulator's trace; real runs have none."""

    async def close(self) -> None:
        for machine in self.machines:
            await machine.client.close()


def account_group(i: int) -> GroupKey:
    return group_key(workload.DATABASE, "account", (i,))


class Teller(Client):
    """A client that also moves money between accounts: two groups, all or nothing, and the sum stays."""

    async def transact(self) -> None:
        if self.chance.random() < 0.5:
            await super().transact()
            return
        keys = [account_group(i) for i in self.chance.sample(range(ACCOUNTS), 2)]
        got = await self.read(keys)
        if not got:
            return
        amount = self.chance.randrange(1, 10)
        parts = []
        for key, (content, seen), sign in zip(keys, got, (-1, 1), strict=True):
            ((name, columns),) = content
            balance = dict(columns)[1]
            change = Change(Op.UPDATE, CELL, name[1], {1: balance + sign * amount}, {1: balance})
            parts.append(Part(key, seen, (change,)))
        await self.commit(parts)

    async def open_accounts(self) -> None:
        for i in range(ACCOUNTS):
            part = Part(account_group(i), None, (Change(Op.INSERT, CELL, (0,), {10: 0, 1: BALANCE}),))
            assert await self.commit([part]) == APPLIED


class Round:
    """One round: a database of its own, so that histories stay short enough to be judged exactly."""

    def __init__(self, cluster: RealCluster, number: int, seed: int, clients: int, mix: Mix, timeout_s: float) -> None:
        # The simulator has one database for each run; this run has one for each round, and gives the name back.
        self._simulated = workload.DATABASE
        workload.DATABASE = f"round{number}"  # type: ignore[misc]
        self.bench = Bench(cluster, mix, timeout_s=timeout_s)  # type: ignore[arg-type]
        self._chance = random.Random(f"{seed}/{number}")
        self._clients = [Teller(self.bench, f"c{i}", random.Random(f"{seed}/{number}/{i}")) for i in range(clients)]
        self._first = Teller(self.bench, "first", random.Random(f"{seed}/{number}/first"))
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def history(self) -> History:
        return self.bench.history

    async def start(self) -> None:
        await set_up(self.bench, self._first)
        await self._first.open_accounts()
        for i, client in enumerate(self._clients):
            client.machine = i % len(self.bench.cluster.machines)
            self._tasks.append(asyncio.create_task(client.run()))

    async def finish(self) -> Evidence:
        """Stop the clients and read everything at every daemon, which all have to run."""
        try:
            return await self._evidence()
        finally:
            workload.DATABASE = self._simulated  # type: ignore[misc]

    async def _evidence(self) -> Evidence:
        self.bench.stopping = True
        await asyncio.gather(*self._tasks)
        final = await self._read_all()
        if standing(self.bench.history, final):
            # A transaction whose client gave up may have been decided between the reads of two of its groups.
            await asyncio.sleep(self.bench.timeout_s + AFTERMATH_S)
            final = await self._read_all()
        accounts = tuple(final[account_group(i)] for i in range(ACCOUNTS))
        return Evidence(self.bench.history, final, accounts, tuple(self.bench.errors))

    async def _read_all(self) -> dict[GroupKey, Content]:
        final = await read_everything(self.bench, self._first)
        for key in map(account_group, range(ACCOUNTS)):
            for _ in range(100):
                if got := await self._first.read([key]):
                    final[key] = got[0][0]
                    break
                await asyncio.sleep(0.1)
        return final


@dataclass(frozen=True)
class Evidence:
    """What a round leaves to be judged, by another process if so wished."""

    history: History
    final: dict[GroupKey, Content]
    accounts: tuple[Content, ...]
    errors: tuple[str, ...]


def standing(history: History, final: dict[GroupKey, Content]) -> list[str]:
    """What is wrong with the state at the end."""
    return oracles.atomic(history, final, LIST, 0) + oracles.unique_entries(final, OWNER, 0, ENTRY)


def judge(evidence: Evidence) -> tuple[list[str], int]:
    """(violations, components on which the search for an order gave up), by the simulator's oracles."""
    history = evidence.history
    violations = [*evidence.errors, *standing(history, evidence.final)]
    violations += oracles.appends(history, LIST, 0)
    violations += oracles.sequences(history)
    violations += oracles.finds(history)
    balances = [dict(columns)[1] for content in evidence.accounts for _, columns in content]
    if len(balances) != ACCOUNTS or sum(balances) != ACCOUNTS * BALANCE:
        violations.append(f"the accounts hold {balances}, not {ACCOUNTS * BALANCE} together")
    broken, undecided = oracles.linearizable(history)
    return violations + broken, undecided
