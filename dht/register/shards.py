"""A PoP's shard of a database whose rows may live in several PoPs (DESIGN section 8).

Groups of local families live in the domain of the PoP that made them. That domain knows such a database as it knows one
of its own: by its name in its registry and by a catalog, here a copy of the one at the database's home. So commits,
finds, fences and indexes of a PoP work as ever, and go on when it is cut off.

Who is older fetches first: a request that names a newer catalog than the shard has waits until the newer one is copied.
It is installed by compare-and-set on the version, so a copy never goes back; behind a fence, which is raised in every
PoP, an older one changes nothing. A shard is made by the first commit in its PoP, after the PoP was listed at the
database's home: a PoP that is not listed has no rows. Where there is no shard a search finds nothing.

A shard notes of which creation of the database it is: one that a drop left behind is emptied before a database of the
same name uses it. The last version of a catalog, which a drop leaves, is never taken for a copy: the home's is raised
above it, so that the PoP never knows one version with two contents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar
from weakref import WeakValueDictionary

import msgspec

from dht import requests
from dht.codec import Message
from dht.errors import Conflict, Duplicate, Invalid, NotFound, Unavailable
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import (
    CATALOG_TABLE,
    Applied,
    Ballot,
    Change,
    Columns,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    Op,
    Part,
    PopClaim,
    RowKey,
    Scope,
    Transaction,
    TransactionId,
)
from dht.register import catalog
from dht.requests import Store
from dht.rows import decode_row, is_local, split_row_key
from dht.world import Chance, Clock

SHARDS_KNOWN_MAX: Final = 1_000
INSTALL_ATTEMPTS: Final = 10
_HEAD: Final = (0,)
T = TypeVar("T")


class Shard:
    """What is asked of this PoP's part of such databases.

    `store`: the PoP's own domain; `registry`: domain `global`, as it is reached from here now.
    """

    def __init__(self, pop: str, store: Store, registry: Callable[[], Store], clock: Clock, chance: Chance) -> None:
        self._pop = pop
        self._store = store
        self._registry = registry
        self._clock = clock
        self._chance = chance
        self._versions: dict[str, int] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Only of names that are being followed: anybody may ask for names, as many as he likes."""

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        """Also without a shard: what nobody made is not there."""
        return await self._store.read(keys, known, timeout_s)

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        try:
            left_s = await self._follow(query.database, query.catalog_version, timeout_s, create=False)
            return await self._store.find(query, left_s)
        except NotFound as error:
            if error.detail.get("database") != query.database:
                raise
            self._versions.pop(query.database, None)
            return FindResult(())

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        return await self._in_shard(
            transaction.database,
            transaction.catalog_version,
            timeout_s,
            lambda left_s: self._store.commit(transaction, attempt, left_s),
        )

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self._in_shard(
            database, 0, timeout_s, lambda left_s: self._store.reserve_ids(database, name, count, above, left_s)
        )

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self._in_shard(
            database, 0, timeout_s, lambda left_s: self._store.raise_sequence(database, name, above, left_s)
        )

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        return await self._store.outcome(id, key, seen, timeout_s)

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        left_s = await self._follow(database, version, timeout_s)
        return await self._store.fence(database, version, prefixes, first, left_s)

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return await self._store.list_databases(timeout_s)

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        return await self._store.homes(timeout_s)

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        return await self._store.pops(timeout_s)

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        return await self._store.create_database(name, timeout_s, home)

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        self._versions.pop(name, None)
        return await self._store.drop_database(name, timeout_s, home)

    async def _in_shard(
        self, database: str, version: int, timeout_s: float | None, ask: Callable[[float], Awaitable[T]]
    ) -> T:
        """Ask the shard, which is made where there is none."""
        left_s = await self._follow(database, version, timeout_s)
        try:
            return await ask(left_s)
        except NotFound:
            # Dropped with its database, which may have been created again.
            self._versions.pop(database, None)
            return await ask(await self._follow(database, version, left_s))

    # The copy of the catalog.

    async def _follow(self, database: str, version: int, timeout_s: float | None, *, create: bool = True) -> float:
        """Have the shard, with that version of the catalog or a newer one; the seconds that are left.

        Raises NotFound if there is no shard and none is to be made, or no such database; Unavailable if its home, where
        a newer catalog is, is out of reach.
        """
        limit_s = REQUEST_TIMEOUT_S if timeout_s is None else timeout_s
        if self._versions.get(database, -1) >= version:
            return limit_s
        deadline = self._clock.monotonic() + limit_s
        lock = self._locks.get(database)
        if lock is None:
            lock = self._locks[database] = asyncio.Lock()
        async with lock:
            if self._versions.get(database, -1) < version:
                current = await self._copied(database, version, deadline, create)
                if len(self._versions) >= SHARDS_KNOWN_MAX:
                    self._versions.clear()
                self._versions[database] = current
        return deadline - self._clock.monotonic()

    async def _copied(self, database: str, version: int, deadline: float, create: bool) -> int:
        key = catalog.catalog_group(database)
        shard = (await self._store.homes(self._left_s(deadline))).get(database)
        believed = catalog.is_shard(shard)
        for _ in range(INSTALL_ATTEMPTS):
            (here,) = await self._store.read([key], None, self._left_s(deadline))
            current = _version_of(here.rows or {})
            if believed and current >= version and catalog.has_tables(here.rows or {}):
                return current
            if shard is None and not create:
                raise catalog.no_such_database(database)
            mark, home = await self._home_catalog(database, self._left_s(deadline))
            newest = _version_of(home.rows or {})
            if newest < version:
                raise catalog.schema_changed(database, version, newest)
            await self._list(database, deadline)
            if shard != catalog.shard_home(mark):
                await self._make(database, mark, shard, here, deadline)
                shard, believed = (await self._store.homes(self._left_s(deadline))).get(database), False
                continue
            changes = _difference(here.rows or {}, home.rows or {})
            if (
                newest <= current
                and catalog.has_tables(home.rows or {})
                and any(change.pk != _HEAD for change in changes)
            ):
                # A drop left this version here, and the replicas know it as one without tables.
                await self._raise_version(database, home, current + 1, deadline)
                continue
            if newest <= current or not changes:
                return current
            try:
                part = Part(key, here.ballot, changes)
                transaction = Transaction(self._chance.randbytes(16), database, 0, (part,))
                await self._store.commit(transaction, 0, self._left_s(deadline))
            except Conflict:
                continue  # another node of this PoP was faster
            return newest
        raise Unavailable(f"the catalog of {database} keeps changing; try again")

    async def _make(self, database: str, mark: bytes, shard: str | None, here: GroupRead, deadline: float) -> None:
        """Make the shard, in place of what the registry has. Raises Invalid rather than drop a database of the PoP."""
        if shard is not None and not catalog.is_shard(shard) and catalog.has_tables(here.rows or {}):
            raise Invalid(
                f"PoP {self._pop} has a database {database!r} of its own, which domain global does not list: drop the "
                "one that is listed, so that this one is entered into the list again"
            )
        if shard is not None:
            # Nothing but that one: another node of this PoP may be faster, and somebody may have rows in the new one.
            await self._store.drop_database(database, self._left_s(deadline), shard)
        await self._store.create_database(database, self._left_s(deadline), catalog.shard_home(mark))

    async def _raise_version(self, database: str, home: GroupRead, version: int, deadline: float) -> None:
        """At the database's home, whose catalog stays the same but for its version."""
        raised = Change(Op.UPDATE, CATALOG_TABLE, _HEAD, {0: version}, {0: _version_of(home.rows or {})})
        part = Part(catalog.catalog_group(database), home.ballot, (raised,))
        with contextlib.suppress(Conflict):
            transaction = Transaction(self._chance.randbytes(16), database, 0, (part,))
            await self._registry().commit(transaction, 0, self._left_s(deadline))

    async def _list(self, database: str, deadline: float) -> None:
        """Before the shard is made; and again with each new version, should a recovery have lost it."""
        part = catalog.shard_listed(database, self._pop)
        (group,) = await self._registry().read([part.key], None, self._left_s(deadline))
        if self._pop in catalog.shards_of(group.rows or {}):
            return
        part = msgspec.structs.replace(part, seen=group.ballot)
        with contextlib.suppress(Duplicate):
            transaction = Transaction(self._chance.randbytes(16), database, 0, (part,))
            await self._registry().commit(transaction, 0, self._left_s(deadline))

    async def _home_catalog(self, database: str, timeout_s: float) -> tuple[bytes, GroupRead]:
        """(mark of the database's creation, its catalog), as they are at its home now. Raises NotFound, Unavailable."""
        keys = [catalog.REGISTRY_GROUP, catalog.catalog_group(database)]
        registry, found = await self._registry().read(keys, None, timeout_s)
        mark = catalog.databases_of(registry.rows or {}).get(database)
        if not isinstance(mark, bytes):
            raise catalog.no_such_database(database)
        return mark, found

    def _left_s(self, deadline: float) -> float:
        left_s = deadline - self._clock.monotonic()
        if left_s <= 0:
            raise Unavailable("the catalog could not be copied into this PoP in time; try again")
        return left_s


def _version_of(rows: Mapping[RowKey, bytes]) -> int:
    for key, data in rows.items():
        if split_row_key(key) == (CATALOG_TABLE, _HEAD):
            version = decode_row(data).get(0)
            return version if isinstance(version, int) else 0
    return 0


def _difference(here: Mapping[RowKey, bytes], home: Mapping[RowKey, bytes]) -> tuple[Change, ...]:
    """What makes the copy equal to the original, if the copy's version is still the same."""
    changes = []
    for key in {**home, **here}:
        table, pk = split_row_key(key)
        old = decode_row(here[key]) if key in here else None
        new = decode_row(home[key]) if key in home else None
        if old == new and pk != _HEAD:
            continue
        if new is None:
            changes.append(Change(Op.DELETE, table, pk))
        elif old is None:
            changes.append(Change(Op.INSERT, table, pk, new))
        else:
            columns: Columns = {**dict.fromkeys(old), **new}
            guards: Columns = {0: old.get(0)} if pk == _HEAD else {}
            changes.append(Change(Op.UPDATE, table, pk, columns, guards))
    return tuple(changes)


def is_about_shard(message: Message) -> bool:
    """Whether a request that came from another PoP is about groups of local families, as all its groups are then."""
    match message:
        case requests.ReadGroups():
            return any(map(is_local, message.keys[:1]))
        case requests.Find():
            return message.query.scope is not Scope.HOME
        case requests.Commit():
            return any(is_local(part.key) for part in message.transaction.parts[:1])
        case requests.AskOutcome():
            return is_local(message.key)
        case requests.RaiseFence():
            return any(map(is_local, message.prefixes[:1]))
        case _:
            return False
