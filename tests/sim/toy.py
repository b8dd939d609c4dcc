"""A cluster in name only: every node serves one store in memory. Correct unless a bug is planted.

It lets the simulator's own parts (clients, faults, oracles) be tested apart from the protocols.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from dht.codec import Message, message
from dht.errors import Indeterminate, Invalid, Unavailable
from dht.model import Applied, Ballot, FindQuery, FindResult, GroupKey, GroupRead, Struct, Transaction
from dht.register.memory import MemoryStore
from dht.sim.cluster import Boot


@message
class Echo(Message, frozen=True, tag=9_001):
    """For the network's tests."""

    text: str


class ToyNode:
    """`bug`: what it gets wrong, now and then."""

    def __init__(self, boot: Boot, shared: MemoryStore, bug: str | None = None) -> None:
        self.boot = boot
        self.shared = shared
        self.bug = bug
        self.chance: random.Random = boot.chance
        self.old: dict[GroupKey, GroupRead] = {}

    @property
    def store(self) -> ToyNode:
        return self

    settled = True
    left = True
    counters: Mapping[str, int] = {}

    async def leave(self, node: bytes) -> None:
        pass

    async def start(self) -> None:
        self.boot.network.serve(self.answer)

    async def stop(self) -> None:
        pass

    async def answer(self, sender: bytes, request: Struct) -> Struct:
        return request

    async def late(self) -> None:
        await self.boot.clock.sleep(self.chance.uniform(0.0005, 0.01))

    def errs(self, bug: str, share: float = 0.1) -> bool:
        return self.bug == bug and self.chance.random() < share

    async def read(
        self, keys: Sequence[GroupKey], known: Sequence[Ballot | None] | None = None, timeout_s: float | None = None
    ) -> tuple[GroupRead, ...]:
        await self.late()
        if self.bug == "falls_silent" and self.boot.clock.monotonic() > 2:
            raise Unavailable("not today")
        groups = list(self.shared.read(keys, known))
        for i, group in enumerate(groups):
            if self.errs("stale_read") and group.key in self.old:
                groups[i] = self.old[group.key]
            elif self.chance.random() < 0.3:
                self.old[group.key] = group
        await self.late()
        return tuple(groups)

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        await self.late()
        result = self.shared.find(query)
        if self.errs("find_misses_a_row") and result.rows:
            result = FindResult(result.rows[1:], result.groups)
        await self.late()
        return result

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        await self.late()
        if self.errs("lost_write", 0.03):
            return Applied(tuple(part.seen or Ballot(0, 0, 0, b"", 0, 0) for part in transaction.parts))
        if len(transaction.parts) > 1 and self.errs("torn_transaction", 0.2):
            transaction = Transaction(
                transaction.id, transaction.database, transaction.catalog_version, transaction.parts[:1]
            )
        if self.errs("no_guards", 0.3):
            parts = tuple(
                type(p)(p.key, p.seen, tuple(type(c)(c.op, c.table, c.pk, c.columns) for c in p.changes), p.guards)
                for p in transaction.parts
            )
            transaction = Transaction(transaction.id, transaction.database, transaction.catalog_version, parts)
        applied = self.shared.commit(transaction, attempt)
        if self.errs("applied_reported_as_refused", 0.03):
            raise Invalid("never mind")
        if self.chance.random() < 0.05:
            raise Indeterminate("the answer was lost", id=transaction.id)
        await self.late()
        return applied

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        await self.late()
        first = self.shared.reserve_ids(database, name, count, above)
        return max(1, first - 1) if self.errs("repeated_id", 0.3) else first

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self.late()
        self.shared.raise_sequence(database, name, above)

    async def outcome(
        self, id: bytes, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        return self.shared.outcome(id, key, seen)

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        return self.shared.fence(database, version, prefixes, first)

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return self.shared.list_databases()

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        return dict.fromkeys(self.shared.list_databases(), "")

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        return self.shared.create_database(name)

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        return self.shared.drop_database(name)
