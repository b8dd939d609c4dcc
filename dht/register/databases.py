"""Which databases there are, and what this node's indexes know of their tables.

The registry is one group; names are cached for a moment, so a database that is being dropped elsewhere may be written
for that long. A drop has three steps: the database is served no more, then its groups are emptied
(`dht.register.emptying`), then the name is free. The catalog of a database is a group too; a replica learns its
table specs when a commit or find names a version that it does not follow yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from dht.errors import Conflict, DhtError, Duplicate, Indeterminate, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.model import Ballot, NodeId, Part, PopClaim, TableSpec, Transaction, Value
from dht.register import catalog
from dht.register.acceptor import Acceptor
from dht.register.catalog import Registered
from dht.register.context import Context
from dht.register.emptying import Emptying
from dht.register.messages import Learn, ListGroups, ListGroupsReply
from dht.register.reader import Reader
from dht.register.routing import Router
from dht.register.transaction import Transactions
from dht.world import Batch

NAMES_KEPT_S = 2.0


class Databases:
    """Databases as this node sees them."""

    def __init__(
        self, context: Context, acceptor: Acceptor, router: Router, reader: Reader, transactions: Transactions
    ) -> None:
        self._context = context
        self._acceptor = acceptor
        self._router = router
        self._reader = reader
        self._transactions = transactions
        self._names: dict[str, Value] = {}
        self._dropping: frozenset[str] = frozenset()
        self._names_until = 0.0
        self._learning: dict[str, asyncio.Lock] = {}
        # The batch that made the indexes follow the version that they follow.
        self._following: dict[str, int] = {}

    # The registry.

    async def names(self, deadline: float) -> tuple[str, ...]:
        """All databases that are at home here, as the registry says now."""
        (group,) = await self._reader.read([catalog.REGISTRY_GROUP], None, deadline)
        self._names = catalog.databases_of(group.rows or {})
        self._dropping = catalog.dropping_of(group.rows or {})
        self._names_until = self._context.clock.monotonic() + NAMES_KEPT_S
        return catalog.at_home(group.rows or {})

    async def homes(self, deadline: float) -> dict[str, str]:
        """All databases that this domain's registry lists, each with its home; empty: this domain.

        Without those that are being dropped.
        """
        (group,) = await self._reader.read([catalog.REGISTRY_GROUP], None, deadline)
        return catalog.homes_of(group.rows or {})

    async def pops(self, deadline: float) -> dict[str, PopClaim]:
        """All PoPs, by index; listed in domain `global` alone."""
        (group,) = await self._reader.read([catalog.POPS_GROUP], None, deadline)
        return catalog.pops_of(group.rows or {})

    async def claim_pop(
        self, pop: str, node: NodeId, incarnation: bytes, deadline: float, index: int | None = None
    ) -> PopClaim:
        """Who may found the PoP's domain: the first that asked, which this one may be. `index`: what the PoP had.

        Raises Invalid when there are as many PoPs as there may be, or the index is another PoP's.
        """
        while True:
            (group,) = await self._reader.read([catalog.POPS_GROUP], None, deadline)
            rows = group.rows or {}
            if pop in (pops := catalog.pops_of(rows)):
                return pops[pop]
            generation = self._context.domain.generation
            wanted = catalog.next_pop_index(rows, index, generation)
            since = generation if index is None else None
            part = catalog.pop_claimed(pop, PopClaim(node, incarnation, wanted), since)
            with contextlib.suppress(Conflict):
                # Somebody else may have taken the name, or only the index: both are seen at the next look.
                await self._commit(part, "", deadline, group.ballot)

    async def move_pop(self, pop: str, before: PopClaim, after: PopClaim, deadline: float) -> None:
        """See `catalog.pop_moved`. Raises Conflict if somebody else has the claim by now."""
        await self._commit(catalog.pop_moved(pop, before, after), "", deadline)

    def mark(self, database: str) -> Value:
        """What tells a database, as last read of the registry, from one of the same name that was dropped."""
        return self._names.get(database)

    async def check(self, database: str, version: int, deadline: float) -> None:
        """Raise NotFound unless the database exists, SchemaChanged if its catalog is newer than the caller's."""
        known = database in self._names and self._context.clock.monotonic() < self._names_until
        if not known:
            await self.names(deadline)
        if database not in self._names:
            gone = catalog.being_dropped if database in self._dropping else catalog.no_such_database
            raise gone(database)
        followed = self._context.file.spec_version(database)
        if version and version < followed:
            # After a recovery that lost writes the catalog may be older than this node knows, so it has the word.
            current = await self.learn(database, version, deadline)
            if version < current:
                raise catalog.schema_changed(database, version, current)
        elif version > followed and not self._learns(database):
            # The announcement was lost. The commit need not wait: what it needs to know came with it.
            self._context.spawn(self.learn_soon(database, version))

    async def follow(self, database: str, version: int, deadline: float) -> None:
        """For whoever asks a find: know the table's primary key, which this node may have had no other cause to learn.

        Raises SchemaChanged if the catalog is newer than the caller's.
        """
        current = await self.learn(database, version, deadline)
        if version and version < current:
            raise catalog.schema_changed(database, version, current)

    async def create(self, name: str, deadline: float, home: str = "") -> bool:
        """False if it exists. With a PoP for its `home` only the name is taken: the database itself lives there.

        What is being dropped is dropped first, and so is a shard that a database of this name left behind, unless
        another shard is to be made.
        """
        catalog.check_database_name(name)
        while True:
            rows, seen = await self._registered(deadline)
            row = rows.get(name)
            if row is None:
                added = catalog.database_added(name, self._context.chance.randbytes(8), home)
                return await self._register(added, name, deadline)
            if not row.dropping and (home or not catalog.is_shard(row.home)):
                return False
            await self._drop(name, row, seen, deadline)

    async def drop(self, name: str, deadline: float, home: str | None = None) -> bool:
        """Delete the database. False if there is none of that name and, if one is given, of that home.

        Nobody serves it from the moment when the registry says that it is being dropped; the name becomes free when its
        groups are empty. Raises Unavailable when they could not be emptied in time: to drop it, or to create it, once
        more goes on with that, on any node.
        """
        rows, seen = await self._registered(deadline)
        row = rows.get(name)
        if row is None or home not in (None, row.home):
            return False
        return await self._drop(name, row, seen, deadline)

    async def _drop(self, name: str, row: Registered, seen: Ballot, deadline: float) -> bool:
        """Drop that creation of the database, or go on with it. False if it was gone already."""
        marked = row.dropping or await self._register(catalog.database_dropping(name, row.mark), name, deadline, seen)
        if not marked:
            return False

        async def still() -> bool:
            now = (await self._registered(deadline))[0].get(name)
            same = now is not None and now.dropping and now.mark == row.mark
            return same or not self._context.rules.drop_looks_again

        work = Emptying(self._context, self.list_groups, self.version, self._router, name)
        try:
            if not await work.run(still, deadline):
                return True  # somebody else has finished it
        except (Unavailable, Indeterminate) as error:
            raise Unavailable(
                f"database {name!r} is being dropped and serves nobody any more, but not all of it could be "
                f"emptied in time: {error.message}; drop it again, which goes on with that"
            ) from None
        if work.had_catalog:
            await self.announce(name)
        await self._register(catalog.database_removed(name, row.mark), name, deadline)
        return True

    async def _registered(self, deadline: float) -> tuple[dict[str, Registered], Ballot]:
        """The registry, and where it stands."""
        (group,) = await self._reader.read([catalog.REGISTRY_GROUP], None, deadline)
        return catalog.registered(group.rows or {}), group.ballot

    async def _register(self, part: Part, name: str, deadline: float, seen: Ballot | None = None) -> bool:
        """False if it is not as the part has it, or somebody else was faster."""
        self._names_until = 0.0
        while True:
            try:
                await self._commit(part, name, deadline, seen)
            except Duplicate:
                return False
            except Conflict as error:
                if error.detail.get("what") == "change":
                    return False
                if error.detail.get("what") != "window" or seen is None:
                    raise
                # The list has changed too often since it was read: certainly not applied.
                seen = None
            else:
                self._names_until = 0.0
                return True

    async def _commit(self, part: Part, database: str, deadline: float, seen: Ballot | None = None) -> None:
        """A change of a list, from where it stands: many change it, and one that is sent again is known by that."""
        if seen is None:
            (group,) = await self._reader.read([part.key], None, deadline)
            seen = group.ballot
        part = msgspec.structs.replace(part, seen=seen)
        await self._transactions.commit(
            Transaction(self._context.chance.randbytes(16), database, 0, (part,)), 0, deadline
        )

    # Catalogs.

    async def learn_soon(self, database: str, version: int) -> int:
        """`learn` for a peer's question: what cannot be learned in time is not followed, and said so."""
        try:
            return await self.learn(database, version, self._context.clock.monotonic() + PEER_TIMEOUT_S)
        except DhtError:
            self._context.count("catalogs_not_learned")
            return self._context.file.spec_version(database)

    def _learns(self, database: str) -> bool:
        lock = self._learning.get(database)
        return lock is not None and lock.locked()

    async def confirm(self, database: str, version: int) -> int:
        """Follow that version or a newer one durably, if it can be learned in time; the one that is followed then."""
        followed = self._context.file.spec_version(database)
        if followed < version:
            followed = await self.learn_soon(database, version)
        await self._context.disk.durable(self._following.get(database, 0))
        return followed

    async def list_groups(self, request: ListGroups) -> ListGroupsReply:
        """For a dropper. Raises Unavailable unless this node follows the catalog that it names."""
        if request.version and await self.confirm(request.database, request.version) < request.version:
            raise Unavailable(f"version {request.version} of the catalog of {request.database!r} cannot be learned yet")
        return self._acceptor.list_groups(request)

    async def version(self, database: str, deadline: float) -> int:
        """The catalog's, as it stands; 0: there is none."""
        (group,) = await self._reader.read([catalog.catalog_group(database)], None, deadline)
        return catalog.catalog_of(group.rows or {})[0]

    async def learn(self, database: str, version: int | None, deadline: float) -> int:
        """Make the indexes follow the catalog, unless they follow that version (0: any); the one that they follow then.

        A version that is not the caller's may be higher too.
        """
        file = self._context.file
        if version is not None and version in (0, file.spec_version(database)):
            return file.spec_version(database)
        async with self._learning.setdefault(database, asyncio.Lock()):
            if version is not None and version == file.spec_version(database):
                return version
            key, told = catalog.catalog_group(database), -1
            batch = Batch()
            while told != file.told_version(key):
                # What is read has the word, and lowers the version that promises name. Not below one that came with a
                # tablet meanwhile: the read may be older than that.
                told = file.told_version(key)
                if batch.writes:
                    self._context.disk.submit(batch)
                (group,) = await self._reader.read([key], None, deadline)
                current, specs = catalog.catalog_of(group.rows or {})
                batch = await self._filled(database, specs)
            if version is None or current != file.spec_version(database):
                file.set_specs(batch, database, current, specs, fill=self._context.rules.find_indexed)
                self._following[database] = self._context.disk.submit(batch)
                self._context.count("catalogs_learned")
            return file.spec_version(database)

    async def _filled(self, database: str, specs: Sequence[TableSpec]) -> Batch:
        """Fill the indexes that the specs add, piece by piece. The last one is returned: not submitted yet."""
        context = self._context
        batch = Batch()
        while context.rules.find_indexed and not context.file.fill(batch, database, specs):
            context.count("index_pieces")
            # The next piece waits for the disk, so that not all of it waits to be written; others have the loop.
            await context.disk.durable(context.disk.submit(batch))
            await asyncio.sleep(0)
            batch = Batch()
        return batch

    async def announce(self, database: str) -> None:
        """Follow the changed catalog here, and tell all members to."""
        context = self._context
        for member in context.domain.roster.members:
            if member.node_id != context.node:
                context.spawn(self._announce_to(member.node_id, database))
        try:
            await self.learn(database, None, context.clock.monotonic() + PEER_TIMEOUT_S)
        except DhtError:
            context.count("catalogs_not_learned")

    async def _announce_to(self, node: NodeId, database: str) -> None:
        try:
            await self._context.network.call(node, Learn(database), PEER_TIMEOUT_S)
        except DhtError:
            self._context.count("catalogs_not_learned")
