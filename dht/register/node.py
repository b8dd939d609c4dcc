"""A node's store: every part of the registers, composed, behind the interface that clients see (dht.requests.Store)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dht.codec import Message
from dht.errors import Unavailable
from dht.limits import PEER_TIMEOUT_S, REQUEST_TIMEOUT_S
from dht.model import (
    ZERO,
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    NodeId,
    Part,
    PopClaim,
    Struct,
    Transaction,
    TransactionId,
)
from dht.register import catalog, operations
from dht.register.acceptor import Acceptor
from dht.register.admission import check_query, check_transaction
from dht.register.context import Context, Identity, Tablets
from dht.register.coordinator import Coordinator
from dht.register.databases import Databases
from dht.register.fence import Fence
from dht.register.find import Finder, FindServer
from dht.register.group import APPLIED, FORGOTTEN, UNDECIDED, intent_key
from dht.register.laggards import Laggards
from dht.register.messages import (
    Accept,
    AskFence,
    Chosen,
    ChosenReply,
    Coordinate,
    FindReplica,
    Kind,
    Learn,
    LearnReply,
    ListDoubtful,
    ListGroups,
    Operation,
    Prepare,
    ReadReplica,
)
from dht.register.reach import Reach
from dht.register.reader import Reader
from dht.register.resolver import Resolver, below_applied_floor, below_floor
from dht.register.rounds import Rounds
from dht.register.routing import Router
from dht.register.rules import RULES, Rules
from dht.register.salvage import Salvage
from dht.register.sequence import Sequences
from dht.register.transaction import Transactions
from dht.storage.registers import RegisterFile
from dht.world import Chance, Clock, Disk, Network


class StoreNode:
    """`dht.requests.Store` on this node, and the answers to its peers. The domain starts and stops with it.

    `counters`: for metrics, growing only.
    """

    def __init__(
        self,
        identity: Identity,
        clock: Clock,
        chance: Chance,
        network: Network,
        disk: Disk,
        domain: Tablets,
        registers: RegisterFile,
        rules: Rules = RULES,
    ) -> None:
        context = Context(identity.node_id, identity.boot, clock, chance, network, disk, registers, domain, rules)
        self._context = context
        self._acceptor = acceptor = Acceptor(context)
        laggards = Laggards(context)
        laggards.settle = self._settle_at
        rounds = Rounds(context, acceptor, laggards)
        reach = Reach(context)
        self._coordinator = Coordinator(context, rounds, reach)
        self._router = Router(context, self._coordinator, reach)
        self._reader = Reader(context, acceptor, self._coordinator, self._router, reach)
        self._resolver = Resolver(context, self._coordinator, self._router, self._reader)
        self._router.unblock = self._resolver.unblock
        self._reader.resolve = self._resolver.resolve
        self._coordinator.adopt = self._resolver.adopt
        self._transactions = Transactions(context, self._router, self._reader, self._resolver)
        self._databases = Databases(context, acceptor, self._router, self._reader, self._transactions)
        self._sequences = Sequences(context, self._reader, self._transactions, self._databases.mark)
        self._salvage = Salvage(context, acceptor, self._reader, self._resolver, self._transactions)
        self._fence = Fence(context, rounds, self._resolver, self._databases.confirm)
        self._find_server = FindServer(context, acceptor, self._databases.learn_soon)
        self._finder = Finder(context, self._find_server, self._reader, rounds, reach)
        self._answers: dict[type[Struct], Callable[[Any], Awaitable[Message]]] = {
            Prepare: self._prepare,
            Accept: self._accept,
            ReadReplica: self._read_replica,
            Chosen: self._chosen,
            Coordinate: self._router.serve,
            FindReplica: self._find_server.serve,
            ListGroups: self._list_groups,
            Learn: self._learn,
            ListDoubtful: self._list_doubtful,
            AskFence: self._fence.serve,
        }

    async def start(self) -> None:
        """Begin the domain's background work; the registers need none."""
        await self._context.domain.start()

    async def stop(self) -> None:
        """End all work. What was answered is durable; what was not has no promised outcome."""
        await self._context.domain.stop()
        tasks = list(self._context.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def counters(self) -> dict[str, int]:
        return self._context.counters

    def dump(self) -> dict[str, object]:
        """What the node holds in memory, for debugging."""
        return {"counters": dict(self.counters), "groups": self._coordinator.dump(), "tasks": len(self._context.tasks)}

    # Peers.

    def answer(self, sender: NodeId, message: Struct) -> Awaitable[Message]:
        """Serve a peer's request, of the registers or of the domain (`dht.world.Answer`)."""
        serve = self._answers.get(type(message))
        if serve is None:
            return self._context.domain.answer(sender, message)
        return serve(message)

    def _prepare(self, request: Prepare) -> Awaitable[Message]:
        return self._acceptor.told(*self._acceptor.prepare(request), request.key)

    def _accept(self, request: Accept) -> Awaitable[Message]:
        return self._acceptor.told(*self._acceptor.accept(request), request.key)

    def _read_replica(self, request: ReadReplica) -> Awaitable[Message]:
        return self._acceptor.told(*self._acceptor.read(request))

    def _chosen(self, request: Chosen) -> Awaitable[Message]:
        self._acceptor.chosen(request)
        return self._acceptor.told(ChosenReply(), 0)

    async def _list_groups(self, request: ListGroups) -> Message:
        return await self._databases.list_groups(request)

    async def _list_doubtful(self, request: ListDoubtful) -> Message:
        return self._acceptor.list_doubtful(request)

    async def _learn(self, request: Learn) -> Message:
        await self._databases.learn(request.database, None, self._deadline(PEER_TIMEOUT_S))
        return LearnReply()

    # Clients.

    def _deadline(self, timeout_s: float | None) -> float:
        limit = REQUEST_TIMEOUT_S if timeout_s is None else timeout_s
        return self._context.clock.monotonic() + limit

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        return await self._reader.read(keys, known, self._deadline(timeout_s))

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        check_query(query)
        deadline = self._deadline(timeout_s)
        await self._databases.check(query.database, query.catalog_version, deadline)
        await self._databases.follow(query.database, query.catalog_version, deadline)
        return await self._finder.find(query, deadline)

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        check_transaction(transaction)
        deadline = self._deadline(timeout_s)
        await self._databases.check(transaction.database, transaction.catalog_version, deadline)
        applied = await self._transactions.commit(transaction, attempt, deadline)
        key = catalog.catalog_group(transaction.database)
        if any(part.key == key for part in transaction.parts):
            await self._databases.announce(transaction.database)
        return applied

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        deadline = self._deadline(timeout_s)
        await self._databases.check(database, 0, deadline)
        return await self._sequences.reserve(database, name, count, above, deadline)

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        deadline = self._deadline(timeout_s)
        await self._databases.check(database, 0, deadline)
        await self._sequences.raise_to(database, name, above, deadline)

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        """ "applied", "not_applied" (and never will be) or "unknown" (the window no longer covers it).

        `key` is any of the transaction's groups. Raises Unavailable when the group cannot be asked.
        """
        deadline = self._deadline(timeout_s)
        while True:
            ballot, rows = await self._reader.system_rows(key, deadline)
            found = operations.outcome(rows, id)
            if found is None and intent_key(id) in rows:
                intent = operations.decode_intent(rows[intent_key(id)])
                found = await self._resolver.outcome(intent, deadline)
                found = await self._resolver.abort(intent, deadline) if found is None else found
            elif found is None and (below_floor(rows, seen or ZERO) or (not rows and (seen or ZERO) < ballot)):
                # Forgotten, or collected with its group; unless only what was not applied is forgotten.
                return "unknown" if not rows or below_applied_floor(rows, seen) else "not_applied"
            elif found is None:
                # An attempt may still be on its way: it must find the transaction ended.
                step = Operation(Kind.ABORT, id, Part(key, seen))
                found = (await self._router.submit(step, 0, deadline)).outcome
            if found == FORGOTTEN:
                return "unknown"
            if found != UNDECIDED:
                return "applied" if found == APPLIED else "not_applied"
            if self._context.remaining(deadline) <= 0:
                raise Unavailable(f"what became of transaction {id.hex()} cannot be learned in time; ask again")

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self._fence.raise_to(database, version, prefixes, first, self._deadline(timeout_s))

    async def settle(self, key: GroupKey) -> None:
        """Have this node, a replica of the group, finish what its replicas hold, and so stand there itself."""
        await self._settle_at(self._context.node, key)

    async def _settle_at(self, node: NodeId, key: GroupKey) -> None:
        operation = Operation(Kind.SETTLE, self._context.chance.randbytes(16), Part(key))
        await self._router.submit_to(node, operation, self._deadline(PEER_TIMEOUT_S))

    async def salvage(self, timeout_s: float) -> tuple[str, ...]:
        """After the domain's recovery: end the intents, raise the sequences; what was done, in sentences."""
        return await self._salvage.run(self._deadline(timeout_s))

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return await self._databases.names(self._deadline(timeout_s))

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        """What this domain's registry says of where databases live (`dht.register.homes`)."""
        return await self._databases.homes(self._deadline(timeout_s))

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        """See `Databases.pops`."""
        return await self._databases.pops(self._deadline(timeout_s))

    async def claim_pop(
        self, pop: str, node: NodeId, incarnation: bytes, timeout_s: float | None = None, index: int | None = None
    ) -> PopClaim:
        """See `Databases.claim_pop`."""
        return await self._databases.claim_pop(pop, node, incarnation, self._deadline(timeout_s), index)

    async def move_pop(self, pop: str, before: PopClaim, after: PopClaim, timeout_s: float | None = None) -> None:
        """See `Databases.move_pop`."""
        await self._databases.move_pop(pop, before, after, self._deadline(timeout_s))

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        return await self._databases.create(name, self._deadline(timeout_s), home)

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        dropped = await self._databases.drop(name, self._deadline(timeout_s), home)
        self._sequences.forget(name)
        return dropped
