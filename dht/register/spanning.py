"""Databases whose home is `global` or `local`: who is asked for what, domain `global` or PoPs (DESIGN section 8).

Their catalog, and the groups of all families that are not local, live in domain `global`; groups of local families live
where they were made (`dht.register.places`). Which of them a group is of can be told from its key, so nothing is looked
up. A read may ask for both; a commit that changes both is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dht.errors import Unavailable
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import (
    GLOBAL,
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    PopClaim,
    Scope,
    Transaction,
    TransactionId,
)
from dht.register import catalog
from dht.register.places import Places, spans_domains
from dht.requests import Store
from dht.rows import LOCAL_MARK, is_local, split_group_key


class SpanningStore:
    """`dht.requests.Store` of such databases. `registry`: domain `global`; `own`: the domain of this node's PoP."""

    def __init__(self, registry: Callable[[], Store], places: Places, own: Store) -> None:
        self._registry = registry
        self._places = places
        self._own = own

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        local = [is_local(key) for key in keys]
        if all(local):
            return await self._places.read(keys, known, timeout_s, near)
        if not any(local):
            return await self._read_global(keys, known, timeout_s)
        ballots = (None,) * len(keys) if known is None else known
        asked = list(zip(keys, ballots, local, strict=True))
        in_pops, in_global = ([(key, held) for key, held, of in asked if of is kind] for kind in (True, False))
        groups = await asyncio.gather(
            self._places.read([key for key, _ in in_pops], [held for _, held in in_pops], timeout_s, near),
            self._read_global([key for key, _ in in_global], [held for _, held in in_global], timeout_s),
        )
        found = {group.key: group for of in groups for group in of}
        return tuple(found[key] for key in keys)

    async def _read_global(
        self, keys: Sequence[GroupKey], known: Sequence[Ballot | None] | None, timeout_s: float | None
    ) -> tuple[GroupRead, ...]:
        """A catalog out of reach is read from the PoP's copy, so that a PoP that is cut off can start its services."""
        try:
            return await self._registry().read(keys, known, timeout_s)
        except Unavailable:
            database = split_group_key(keys[0])[0]
            if list(keys) != [catalog.catalog_group(database)]:
                raise
            if not catalog.is_shard((await self._own.homes(timeout_s)).get(database)):
                raise
            copy = await self._own.read(keys, None, timeout_s)
            if not catalog.has_tables(copy[0].rows or {}):
                # Its maker stopped half way: that is no catalog to start with.
                raise
            return copy

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        if query.scope is Scope.HOME:
            return await self._registry().find(query, timeout_s)
        return await self._places.find(query, timeout_s)

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        """Raises Invalid for groups in several domains: `homes` of its detail has that of each part."""
        local = [is_local(part.key) for part in transaction.parts]
        if not any(local):
            return await self._registry().commit(transaction, attempt, timeout_s)
        if all(local):
            return await self._places.commit(transaction, attempt, timeout_s)
        homes = await self._places.homes_of(
            transaction, [part for part, of in zip(transaction.parts, local, strict=True) if of], timeout_s
        )
        raise spans_domains(transaction.database, [homes.get(part.key, GLOBAL) for part in transaction.parts])

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        store: Places | Store = self._places if name.startswith(LOCAL_MARK) else self._registry()
        return await store.reserve_ids(database, name, count, above, timeout_s)

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        store: Places | Store = self._places if name.startswith(LOCAL_MARK) else self._registry()
        await store.raise_sequence(database, name, above, timeout_s)

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        store: Places | Store = self._places if is_local(key) else self._registry()
        return await store.outcome(id, key, seen, timeout_s)

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        """The prefixes are of one table, which is local or is not."""
        store: Places | Store = self._places if all(map(is_local, prefixes)) else self._registry()
        return await store.fence(database, version, prefixes, first, timeout_s)

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return await self._registry().list_databases(timeout_s)

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        return await self._registry().homes(timeout_s)

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        return await self._registry().pops(timeout_s)

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        """The name is taken and the database is there in one step; shards come with the first commits."""
        return await self._registry().create_database(name, timeout_s, home)

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        """Needs all PoPs that have rows of it. Shards go while the name is held; one made meanwhile, after it.

        Of one that somebody creates meanwhile the shards are not touched: they say whose they are.
        """
        limit_s = REQUEST_TIMEOUT_S if timeout_s is None else timeout_s
        (registry,) = await self._registry().read([catalog.REGISTRY_GROUP], None, limit_s)
        row = catalog.registered(registry.rows or {}).get(name)
        if row is None or not isinstance(row.mark, bytes) or home not in (None, row.home):
            return False
        shard = catalog.shard_home(row.mark)
        pops = await self._places.drop(name, shard, limit_s)
        dropped = await self._registry().drop_database(name, limit_s, row.home)
        await self._places.drop_again(name, pops, shard, limit_s)
        return dropped
