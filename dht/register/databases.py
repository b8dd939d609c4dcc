"""Which databases there are, and what this node's indexes know of their tables.

The registry is one group; names are cached for a moment, so a database that was just dropped elsewhere may be written
for that long, into groups that nobody reads any more. The catalog of a database is a group too; a replica learns its
table specs when a commit or find names a version that it does not follow yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from dht.errors import Conflict, DhtError, Duplicate, NotServing, RemoteProtocolError, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.model import Ballot, GroupKey, NodeId, Part, PopClaim, Transaction, Value
from dht.register import catalog
from dht.register.acceptor import Acceptor
from dht.register.context import Context
from dht.register.messages import Kind, Learn, ListGroups, ListGroupsReply, Operation
from dht.register.reader import Reader
from dht.register.rounds import expect
from dht.register.routing import Router
from dht.register.transaction import Transactions
from dht.world import Batch

NAMES_KEPT_S = 2.0
_LIST_GROUPS_MAX = 1_000
_TABLETS_LISTED_AT_ONCE = 16
"""Of a database that is dropped: their groups' keys are held in memory."""
_EMPTIED_AT_ONCE = 64


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
        self._names_until = 0.0
        self._learning: dict[str, asyncio.Lock] = {}
        # The batch that made the indexes follow the version that they follow.
        self._following: dict[str, int] = {}

    # The registry.

    async def names(self, deadline: float) -> tuple[str, ...]:
        """All databases that are at home here, as the registry says now."""
        (group,) = await self._reader.read([catalog.REGISTRY_GROUP], None, deadline)
        self._names = catalog.databases_of(group.rows or {})
        self._names_until = self._context.clock.monotonic() + NAMES_KEPT_S
        return catalog.at_home(group.rows or {})

    async def homes(self, deadline: float) -> dict[str, str]:
        """All databases that this domain's registry lists, each with its home; empty: this domain."""
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
            raise catalog.no_such_database(database)
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
        """False if it exists. With a PoP for its `home` only the name is taken: the database itself lives there."""
        catalog.check_database_name(name)
        if not home and catalog.is_shard((await self.homes(deadline)).get(name)):
            # Left behind by a database of this name that was dropped: its rows are not this one's.
            await self.drop(name, deadline)
        added = catalog.database_added(name, self._context.chance.randbytes(8), home)
        return await self._register(added, name, deadline)

    async def drop(self, name: str, deadline: float) -> bool:
        """Take the name out of the registry, then empty the groups. False if there is no such database.

        Raises Unavailable when some groups could not be emptied; the name is free then all the same, so it should be
        created and dropped again before it is used for something else.
        """
        if not await self._register(catalog.database_removed(name), name, deadline):
            return False
        count = len(self._context.domain.roster.tablets)
        had_catalog = False
        for first in range(0, count, _TABLETS_LISTED_AT_ONCE):
            tablets = range(first, min(first + _TABLETS_LISTED_AT_ONCE, count))
            keys = await self._groups(name, tablets, deadline)
            had_catalog = had_catalog or catalog.catalog_group(name) in keys
            for at in range(0, len(keys), _EMPTIED_AT_ONCE):
                await asyncio.gather(*(self._empty(key, deadline) for key in keys[at : at + _EMPTIED_AT_ONCE]))
        if had_catalog:
            await self.announce(name)
        return True

    async def _empty(self, key: GroupKey, deadline: float) -> None:
        operation = Operation(Kind.EMPTY, self._context.chance.randbytes(16), Part(key))
        await self._router.submit(operation, 0, deadline)

    async def _register(self, part: Part, name: str, deadline: float) -> bool:
        self._names_until = 0.0
        try:
            await self._commit(part, name, deadline)
        except Duplicate:
            return False
        except Conflict as error:
            if error.detail.get("what") != "change":
                raise
            return False
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

    async def _groups(self, database: str, tablets: Sequence[int], deadline: float) -> list[GroupKey]:
        """Groups of the database in the tablets, as any of their replicas knows them; of each, a majority answers."""
        keys: dict[GroupKey, None] = {}
        waiting = list(tablets)
        while True:
            heard: dict[int, int] = dict.fromkeys(waiting, 0)
            replicas = {tablet: self._context.domain.replicas(tablet).nodes for tablet in waiting}
            asked: dict[NodeId, list[int]] = {}
            for tablet, nodes in replicas.items():
                for node in nodes:
                    asked.setdefault(node, []).append(tablet)
            await asyncio.gather(*(self._list_at(node, database, of, keys, heard) for node, of in asked.items()))
            waiting = [tablet for tablet in waiting if heard[tablet] * 2 <= len(replicas[tablet])]
            if not waiting:
                return list(keys)
            if self._context.remaining(deadline) <= 0:
                raise Unavailable(
                    f"the groups of tablet {waiting[0]} cannot be listed: {heard[waiting[0]]} of "
                    f"{len(replicas[waiting[0]])} answered"
                )
            await self._context.back_off()

    async def _list_at(
        self, node: NodeId, database: str, tablets: list[int], keys: dict[GroupKey, None], heard: dict[int, int]
    ) -> None:
        """Add the groups that one node has in its tablets, and count those of the tablets that it told all of."""
        after = b""
        while tablets:
            request = ListGroups(database, tablets[0], after, _LIST_GROUPS_MAX, tuple(tablets[1:]))
            try:
                reply = await self._ask_groups(node, request)
            except DhtError as error:
                self._context.count("lists_failed")
                if not isinstance(error, NotServing):
                    return
                tablets, after = tablets[1:], b""
                continue
            keys.update(dict.fromkeys(reply.keys))
            told, after = reply.tablets - bool(reply.last), reply.last
            for tablet in tablets[:told]:
                heard[tablet] += 1
            tablets = tablets[told:]

    async def _ask_groups(self, node: NodeId, request: ListGroups) -> ListGroupsReply:
        if node == self._context.node:
            return self._acceptor.list_groups(request)
        reply = expect(await self._context.network.call(node, request, PEER_TIMEOUT_S), ListGroupsReply)
        if not 1 <= reply.tablets <= 1 + len(request.others):
            raise RemoteProtocolError(f"{reply.tablets} tablets were told of, {1 + len(request.others)} were asked for")
        return reply

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
            (group,) = await self._reader.read([catalog.catalog_group(database)], None, deadline)
            current, specs = catalog.catalog_of(group.rows or {})
            if version is None or current != file.spec_version(database):
                batch = Batch()
                file.set_specs(batch, database, current, specs, fill=self._context.rules.find_indexed)
                self._following[database] = self._context.disk.submit(batch)
                self._context.count("catalogs_learned")
            return file.spec_version(database)

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
