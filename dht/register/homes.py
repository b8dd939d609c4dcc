"""Any node serves any database: where a database lives, and how what is asked of it gets there (DESIGN section 8).

A database lives in one domain, its home: that of a PoP, or `global`. Domain `global` keeps the list: name -> home; a
name is taken there first and created at its home then, so no two PoPs have a database of one name, and a creation that
broke off is finished by the next one. A home never changes while the database exists, so it is cached, and believed on
for as long as the list is out of reach, as is what the list said when it was read last, also by a node that starts
meanwhile, which noted it (`dht.register.noted_homes`); what lives in the own PoP is known there without it. Where a
database was dropped and created again in another PoP, a node may read the old one, which is empty, for some seconds
more.

A request for a database at home is served by this node's own store of that domain. Any other is passed on, whole, to
one member of its home, which serves it with its own rosters: one round trip between the PoPs, whatever it costs there.
Reads are asked of another node of the home when one is lost; a commit never is, once it may have been served: it is
Indeterminate, and whoever asked learns what became of it by its id. What is out of reach is Unavailable, never "not
found": absence is answered by the home alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Final, Protocol, TypeVar

from dht import requests
from dht.codec import Message
from dht.errors import (
    Conflict,
    DhtError,
    Indeterminate,
    Invalid,
    NotFound,
    NotServing,
    ProtocolError,
    StorageError,
    Unavailable,
)
from dht.limits import PEER_TIMEOUT_S, REQUEST_TIMEOUT_S
from dht.model import (
    GLOBAL,
    SPANNING,
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    NodeId,
    PopClaim,
    Struct,
    Transaction,
    TransactionId,
)
from dht.register import catalog
from dht.register.noted_homes import NotedHomes
from dht.register.reach import GRACE_S
from dht.register.rounds import expect
from dht.rows import split_group_key
from dht.storage.indexes import database_prefix
from dht.world import Clock, Network

HOMES_MAX: Final = 10_000
HOMES_KEPT_S: Final = 10.0
"""How long a home is believed before it is looked up again, beside the requests; out of reach of the list, for ever."""
HEARD_CHECK_S: Final = 0.1
"""How often who waits for a far node's answer looks whether that is still heard."""
NOTED_AFTER_S: Final = 1.0
"""How long a request waits for the list before it believes what that said last, be it before the start."""
OWN_FIRST_S: Final = 0.3
"""How long the own PoP is waited for before the list is asked as well."""
R = TypeVar("R", bound=Message)
T = TypeVar("T")
Gateways = Callable[[str], Awaitable[Sequence[NodeId]]]
"""Nodes of a PoP to pass requests on to, best first; empty when none is known."""


class FarStore:
    """`dht.requests.Store` of another PoP, or of a domain that this node is no member of, through any of its nodes.

    `refused`: told of a node that was asked and serves the domain no more, or not yet.
    """

    def __init__(
        self,
        pop: str,
        clock: Clock,
        network: Network,
        gateways: Gateways,
        refused: Callable[[str, NodeId], None] = lambda pop, node: None,
    ) -> None:
        self.pop = pop
        self._name = "domain global" if pop == GLOBAL else f"PoP {pop}"
        self._clock = clock
        self._network = network
        self._gateways = gateways
        self._refused = refused

    async def ask(self, message: Message, kind: type[R], timeout_s: float | None, *, repeatable: bool = True) -> R:
        """One node's reply. `repeatable`: another is asked when one is lost after it may have served the request.

        Some answers take long: a node that is heard has half of the time that is left, the last such one all of it.
        """
        deadline = self._clock.monotonic() + (REQUEST_TIMEOUT_S if timeout_s is None else timeout_s)
        why = "none of its nodes is known here"
        nodes = await self._nodes(deadline)
        for at, node in enumerate(nodes):
            others = any(map(self._network.alive, nodes[at + 1 :]))
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                break
            limit_s = left_s
            if not self._network.alive(node):
                # The time of a link to come up.
                limit_s = PEER_TIMEOUT_S
            elif repeatable and others:
                limit_s = max(left_s / 2, PEER_TIMEOUT_S)
            limit_s = min(left_s, limit_s)
            try:
                call = self._network.call(node, message, limit_s)
                reply = await (self._while_heard(node, call, limit_s, patient=not others) if repeatable else call)
                return expect(reply, kind)
            except Unavailable as error:
                if isinstance(error, NotServing):
                    self._refused(self.pop, node)
                why = error.message
            except (Indeterminate, StorageError, ProtocolError) as error:
                # The latter two are about that node: its disk has failed, or one of the two versions is too old.
                if not repeatable:
                    raise
                why = error.message
        raise self._unavailable(why)

    async def _while_heard(self, node: NodeId, asked: Awaitable[Struct], timeout_s: float, *, patient: bool) -> Struct:
        """The node's reply. Raises Indeterminate when the node falls silent, long before a long timeout.

        `patient`: a moment's silence, as of a busy node, is forgiven, for there is no other one to ask.
        """
        if timeout_s <= PEER_TIMEOUT_S:
            # Short requests end by themselves when a link falls silent.
            return await asked
        call = asyncio.ensure_future(asked)
        try:
            while not (await asyncio.wait((call,), timeout=HEARD_CHECK_S))[0]:
                if not self._network.alive(node) and not (patient and self._forgiven(node)):
                    raise Indeterminate(f"node {node.hex()} fell silent before it answered")
            return call.result()
        finally:
            call.cancel()

    def _forgiven(self, node: NodeId) -> bool:
        return not self._network.parted(node) and self._network.silent_s(node) <= GRACE_S

    async def _nodes(self, deadline: float) -> Sequence[NodeId]:
        try:
            async with asyncio.timeout(deadline - self._clock.monotonic()):
                return await self._gateways(self.pop)
        except TimeoutError:
            raise self._unavailable("its nodes were not found in time") from None

    def _unavailable(self, why: str) -> Unavailable:
        again = "try again when it is up and the network to it is whole"
        return Unavailable(f"{self._name} cannot be asked: {why}; {again}", pop=self.pop)

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        ballots = (None,) * len(keys) if known is None else tuple(known)
        return (
            await self.ask(requests.ReadGroups(tuple(keys), ballots, near), requests.ReadGroupsReply, timeout_s)
        ).groups

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        return (await self.ask(requests.Find(query), requests.FindReply, timeout_s)).result

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        message = requests.Commit(transaction, attempt)
        return (await self.ask(message, requests.CommitReply, timeout_s, repeatable=False)).applied

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        message = requests.ReserveIds(database, name, count, above)
        return (await self.ask(message, requests.ReserveIdsReply, timeout_s)).first

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self.ask(requests.RaiseSequence(database, name, above), requests.Done, timeout_s)

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        return (await self.ask(requests.AskOutcome(id, key, seen), requests.AskOutcomeReply, timeout_s)).outcome

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        message = requests.RaiseFence(database, version, tuple(prefixes), first)
        return (await self.ask(message, requests.RaiseFenceReply, timeout_s)).following

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return (await self.ask(requests.ListDatabases(), requests.ListDatabasesReply, timeout_s)).names

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        return (await self.ask(requests.ListHomes(), requests.ListHomesReply, timeout_s)).homes

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        message = requests.CreateDatabase(name, home)
        return (await self.ask(message, requests.Done, timeout_s, repeatable=False)).changed

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        return (await self.ask(requests.DropDatabase(name, home), requests.Done, timeout_s, repeatable=False)).changed

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        return (await self.ask(requests.ListPops(), requests.ListPopsReply, timeout_s)).pops

    async def claim_pop(
        self, pop: str, node: NodeId, incarnation: bytes, timeout_s: float | None = None, index: int | None = None
    ) -> PopClaim:
        """See `Databases.claim_pop`; asked again without harm, for the first claim stays the first."""
        message = requests.ClaimPop(pop, node, incarnation, index)
        return (await self.ask(message, requests.ClaimPopReply, timeout_s)).claim

    async def move_pop(self, pop: str, before: PopClaim, after: PopClaim, timeout_s: float | None = None) -> None:
        """See `Databases.move_pop`."""
        await self.ask(requests.MovePop(pop, before, after), requests.Done, timeout_s, repeatable=False)


class Registry(requests.Store, Protocol):
    """The store of domain `global`, which keeps the lists of databases and of PoPs."""

    async def claim_pop(
        self, pop: str, node: NodeId, incarnation: bytes, timeout_s: float | None = None, index: int | None = None
    ) -> PopClaim: ...

    async def move_pop(self, pop: str, before: PopClaim, after: PopClaim, timeout_s: float | None = None) -> None: ...


class HomedStore:
    """`dht.requests.Store` of all PoPs and of `global`. `registry`: how that is reached from here now.

    `noted`: homes in this node's file, which follow those that it reads.
    `counters`: requests passed on, and homes looked up, since the start.
    """

    def __init__(
        self,
        pop: str,
        clock: Clock,
        own: requests.Store,
        far: Callable[[str], FarStore],
        registry: Callable[[], Registry],
        noted: NotedHomes,
        spanning: requests.Store | None = None,
    ) -> None:
        self.counters = {"passed_on": 0, "homes_looked_up": 0}
        self._pop = pop
        self._clock = clock
        self._own = own
        self._far = far
        self._registry = registry
        self._noted = noted
        self._spanning = spanning
        self._homes: dict[str, tuple[str, float]] = {}
        self._listed = noted.all()
        """As the list was read last, at first before the start; without those that were looked up since."""
        self._names: dict[bytes, str] = {}
        self._looking: dict[asyncio.Task[None], None] = {}

    async def home(self, database: str) -> str:
        """The PoP that the database lives in, or "global".

        Raises NotFound if the list has no such name, Unavailable without it.
        """
        known = self._homes.get(database)
        if known is None:
            listed = self._listed.get(database)
            return await (self._look_anew(database) if listed is None else self._look_first(database, listed))
        home, until_s = known
        if self._clock.monotonic() >= until_s:
            # Beside the requests: none of them waits for what is known, least of all where the list is out of reach.
            self._homes[database] = home, self._clock.monotonic() + HOMES_KEPT_S
            task = asyncio.get_running_loop().create_task(self._look_again(database))
            self._looking[task] = None
            task.add_done_callback(lambda done: self._looking.pop(done, None))
        return home

    async def _look_anew(self, database: str) -> str:
        """What this node never heard of. Out of reach of the list a shard in the own PoP tells what it is one of."""
        try:
            return await self._look_up(database)
        except (Unavailable, Indeterminate):
            if not catalog.is_shard((await self._own.homes()).get(database)):
                raise
            self._homes[database] = GLOBAL, self._clock.monotonic()
            return GLOBAL

    async def _look_first(self, database: str, before: str) -> str:
        """As listed now, else as it was `before`; whoever asks next has it looked up again."""
        try:
            async with asyncio.timeout(NOTED_AFTER_S):
                return await self._look_up(database)
        except NotFound:
            self._listed.pop(database, None)
            raise
        except (DhtError, TimeoutError):
            if self._listed.pop(database, None) is None:
                # Another request has looked it up meanwhile, has found it gone, or believes what was listed.
                return await self.home(database)
            self._homes[database] = before, self._clock.monotonic()
            return before

    async def _look_again(self, database: str) -> None:
        try:
            await self._look_up(database)
        except NotFound:
            self._homes.pop(database, None)
        except DhtError:
            pass  # out of reach: believed on

    async def _look_up(self, database: str) -> str:
        """In the own PoP, which knows what lives there without anybody else; what is not there, in the list."""
        self.counters["homes_looked_up"] += 1
        own = asyncio.ensure_future(self._own.list_databases())
        try:
            await asyncio.wait((own,), timeout=OWN_FIRST_S)
            told = own.done() and own.exception() is None
            home = self._pop if told and database in own.result() else await self._elsewhere(database, own)
        finally:
            own.cancel()
            await asyncio.gather(own, return_exceptions=True)
        if len(self._homes) >= HOMES_MAX:
            self._homes.clear()
        self._homes[database] = home, self._clock.monotonic() + HOMES_KEPT_S
        self._listed.pop(database, None)
        return home

    async def _elsewhere(self, database: str, own: asyncio.Future[tuple[str, ...]]) -> str:
        """As listed. An own PoP without a majority hides nothing of that; that a database is nowhere takes its word."""
        try:
            home = (await self.homes()).get(database)
            unlisted: DhtError = catalog.no_such_database(database)
        except (Unavailable, Indeterminate) as error:
            home, unlisted = None, error
        if home is not None:
            return home
        if database in await own:
            return self._pop
        raise unlisted

    async def stop(self) -> None:
        """End the look-ups that are under way."""
        for task in list(self._looking):
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        """Every database with its home, as `global` says now."""
        homes = await self._registry().homes(timeout_s)
        self._noted.follow(homes)
        unused = ((name, home) for name, home in homes.items() if name not in self._homes)
        self._listed = dict(islice(unused, HOMES_MAX))
        return homes

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        """Every PoP, as `global` says now."""
        return await self._registry().pops(timeout_s)

    async def relist(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Enter into the list what lives in the own PoP and is not in it; which those were.

        The list is read first: what is created meanwhile is in it before it is at home, what is dropped after.
        """
        listed = await self.homes(timeout_s)
        here = await self._own.homes(timeout_s)
        missing = tuple(name for name, home in here.items() if not home and name not in listed)
        for name in missing:
            await self._registry().create_database(name, timeout_s, self._pop)
        return missing

    async def left_behind(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """Databases that the list has no more, and of which this PoP still has a shard.

        It was made while the database was dropped; or a recovery of `global` lost the database, of which these rows are
        left then. Which of the two only a human knows, so only his order drops it. The list is read last: a name is in
        it before there is a shard.
        """
        here = await self._own.homes(timeout_s)
        listed = await self.homes(timeout_s)
        return tuple(name for name, home in here.items() if catalog.is_shard(home) and name not in listed)

    def _at(self, home: str) -> requests.Store:
        if home == self._pop:
            return self._own
        if home in SPANNING:
            return self._spanning or self._registry()
        self.counters["passed_on"] += 1
        return self._far(home)

    async def _ask(self, database: str, ask: Callable[[requests.Store], Awaitable[T]]) -> T:
        home = await self.home(database)
        try:
            return await ask(self._at(home))
        except NotFound as error:
            if error.detail.get("database") != database or self._homes.pop(database, None) is None:
                raise
            # Dropped since, and perhaps created again somewhere else.
            again = await self.home(database)
            if again == home:
                raise
            return await ask(self._at(again))

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        prefix = database_prefix(keys[0]) if keys else b""
        if not all(key.startswith(prefix) for key in keys):
            raise Invalid("the groups of one read belong to different databases; ask for each by itself")
        database = self._names.get(prefix)
        if database is None:
            database = split_group_key(keys[0])[0] if keys else ""
            self._names = {**(self._names if len(self._names) < HOMES_MAX else {}), prefix: database}
        if not database:
            return await self._own.read(keys, known, timeout_s)
        try:
            home = await self.home(database)
        except NotFound:
            # Known to be nowhere; what is read of it here is as empty as it is.
            return await self._own.read(keys, known, timeout_s)
        return await self._at(home).read(keys, known, timeout_s, near)

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        return await self._ask(query.database, lambda store: store.find(query, timeout_s))

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        return await self._ask(transaction.database, lambda store: store.commit(transaction, attempt, timeout_s))

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self._ask(database, lambda store: store.reserve_ids(database, name, count, above, timeout_s))

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self._ask(database, lambda store: store.raise_sequence(database, name, above, timeout_s))

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        return await self._ask(split_group_key(key)[0], lambda store: store.outcome(id, key, seen, timeout_s))

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self._ask(database, lambda store: store.fence(database, version, prefixes, first, timeout_s))

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        """All, wherever they live. Raises Unavailable where `global` cannot be asked."""
        return tuple(await self.homes(timeout_s))

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        """Take the name in `global`, then create it at its home. False if it exists, wherever it lives.

        Raises Conflict if another home was asked for than it has, NotFound for a home that there is not, Unavailable
        that says so where the name was taken and no more.
        """
        catalog.check_database_name(name)
        wanted = home or self._pop
        if wanted not in (self._pop, *SPANNING) and wanted not in await self.pops(timeout_s):
            raise NotFound(f"there is no PoP {wanted} for database {name} to live in; nothing was changed")
        created = await self._registry().create_database(name, timeout_s, wanted)
        lives = wanted if created else (await self.homes(timeout_s)).get(name, wanted)
        if lives != wanted and home:
            where = f"its home is {lives}" if lives in SPANNING else f"in PoP {lives}"
            raise Conflict(f"database {name} exists already, {where}; nothing was changed", what="database")
        if lives in SPANNING:
            return created
        try:
            # Also where it is listed already: a creation may have broken off in between.
            return await self._at(lives).create_database(name, timeout_s)
        except Unavailable as error:
            raise Unavailable(
                f"database {name} has its name in the list, but is not in PoP {lives} yet: {error.message}; create it "
                "again then, on any node, which goes on with that",
                pop=lives,
            ) from None

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        """At its home first, then from the list: what broke off in between is finished by dropping it again.

        Of what is in no list, a shard that was left behind in this PoP. `home`: only if it has that one.
        """
        lives = (await self.homes(timeout_s)).get(name)
        self._homes.pop(name, None)
        if lives is None:
            # The list may have it as being dropped: its home comes first, so all that is left to do is there.
            left = home is None and name in await self.left_behind(timeout_s)
            finished = await self._at(GLOBAL).drop_database(name, timeout_s, home)
            return (left and await self._own.drop_database(name, timeout_s)) or finished
        if home not in (None, lives):
            return False
        if lives in SPANNING:
            return await self._at(lives).drop_database(name, timeout_s, lives)
        dropped = await self._at(lives).drop_database(name, timeout_s)
        return await self._registry().drop_database(name, timeout_s, lives) or dropped
