"""Groups of local families: in which PoP one is, and reads, commits and finds over all of them (DESIGN section 8).

Such a group lives in the PoP that made it, and nothing but looking tells which that is. This node asks where it last
saw the group, else its own PoP, and then all others at once, of many PoPs first the one that a hint names. What was
found is remembered; neither memory nor hint is trusted for content: a PoP that has no rows of the group sends the
reader on to all others. Absence is told when every PoP was asked that has a shard of the database, and none has the
group; the list of shards is read after the question began, beside the asking, so that one made a moment ago is not
missed. A PoP out of reach makes what the others do not have Unavailable.

A ballot that the asker holds is passed on only if rows were seen at it: of an absent group the same ballot may be held
in many PoPs.

Of some groups the key is made once, ever. Where this node saw such a group, and that PoP has it no more, it is gone,
and nobody else is asked: a PoP that is cut off can tell that of what it made.

A commit goes whole to the one PoP that has its groups; one over several is refused and says where each of its parts
lives. A group that the transaction makes, as `created` says, comes into being here, and nobody else is asked. That is
right as long as no two clients make a group of one key, which random keys see to. If they do, each PoP keeps its own: a
read finds the one that it meets first, a find shows both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from dht.errors import Conflict, Indeterminate, Invalid, Unavailable
from dht.limits import FIND_ROWS_MAX, REQUEST_TIMEOUT_S
from dht.model import (
    ZERO,
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    Op,
    Part,
    Scope,
    Transaction,
    TransactionId,
)
from dht.overlay.messages import pop_prefix
from dht.register import catalog
from dht.register.local_ids import LocalIds
from dht.requests import Store
from dht.rows import group_name, split_group_key
from dht.storage.search import row_order
from dht.world import Clock

PLACES_MAX: Final = 100_000
SENT_MAX: Final = 4_096
DATABASES_MAX: Final = 1_000
FEW_POPS: Final = 8
"""Up to so many PoPs are asked at once for what is in none that was known; of more, a hint's first."""
HINTS_AT_ONCE: Final = 64
FENCE_ORDINAL: Final = 1 << 16
T = TypeVar("T")


class Place(NamedTuple):
    """`ballot`: at which rows of the group were last seen there."""

    pop: str
    ballot: Ballot


class Places:
    """This node's view of them.

    `own`: the PoP's shard (`dht.register.shards`); `far`: that of another. `registry`: domain `global` as it is reached
    from here now. `index`: the own PoP's; raises Unavailable. `hint`: awaits the PoP that the overlay believes a group
    to be in. `made`: told of the groups made here. `made_once`: whether nobody makes a group of that key again,
    once it is deleted. `counters`: requests to other PoPs, PoPs left out.
    """

    def __init__(
        self,
        pop: str,
        clock: Clock,
        own: Store,
        far: Callable[[str], Store],
        registry: Callable[[], Store],
        index: Callable[[], int],
        hint: Callable[[GroupKey], Awaitable[str | None]],
        made: Callable[[GroupKey], None],
        made_once: Callable[[GroupKey], bool] = lambda key: False,
    ) -> None:
        self.counters = {"asked_far": 0, "searched": 0, "hinted": 0, "partial_finds": 0, "pops_left_out": 0}
        self._pop = pop
        self._clock = clock
        self._own = own
        self._far = far
        self._registry = registry
        self.ids = LocalIds(pop, own, index)
        self._hint = hint
        self._made = made
        self._made_once = made_once
        self._places: OrderedDict[GroupKey, Place] = OrderedDict()
        self._sent: OrderedDict[TransactionId, str] = OrderedDict()
        self._shards: dict[str, tuple[Ballot, tuple[str, ...]]] = {}

    async def _pops(self, database: str, timeout_s: float) -> tuple[str, ...]:
        """All that have a shard of the database, as listed after the call began."""
        ballot, known = self._shards.get(database, (None, ()))
        try:
            (found,) = await self._registry().read([catalog.shards_group(database)], [ballot], timeout_s)
        except (Unavailable, Indeterminate) as error:
            raise Unavailable(
                f"domain global cannot be asked which PoPs have rows of {database}: {error.message}"
            ) from None
        if found.rows is None:
            return known
        if len(self._shards) >= DATABASES_MAX:
            self._shards.clear()
        pops = catalog.shards_of(found.rows)
        self._shards[database] = found.ballot, pops
        return pops

    def _known_pops(self, database: str) -> tuple[str, ...]:
        """Those that the last answer named."""
        return self._shards[database][1] if database in self._shards else ()

    async def locate(self, key: GroupKey) -> str:
        """The PoP that has the group now, or the own one, where it would be made."""
        await self.read([key])
        return self.known_place(key) or self._pop

    def known_place(self, key: GroupKey) -> str | None:
        """The PoP where the group was last seen."""
        place = self._places.get(key)
        return None if place is None else place.pop

    def _remember(self, key: GroupKey, pop: str, ballot: Ballot) -> None:
        self._places[key] = Place(pop, ballot)
        self._places.move_to_end(key)
        if len(self._places) > PLACES_MAX:
            self._places.popitem(last=False)

    def _store(self, pop: str) -> Store:
        if pop == self._pop:
            return self._own
        self.counters["asked_far"] += 1
        return self._far(pop)

    def _left_s(self, deadline: float) -> float:
        return max(0.0, deadline - self._clock.monotonic())

    def _deadline(self, timeout_s: float | None) -> float:
        return self._clock.monotonic() + (REQUEST_TIMEOUT_S if timeout_s is None else timeout_s)

    # Reads.

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        """Raises Unavailable for a group that no PoP within reach has, while others are out of reach."""
        if near:
            return await self._own.read(keys, known, timeout_s)
        deadline = self._deadline(timeout_s)
        ballots = dict(zip(keys, known, strict=True)) if known is not None else {}
        search = _Search(keys)
        await self._ask_known(search, ballots, deadline)
        if search.open:
            database = split_group_key(keys[0])[0]
            if database not in self._shards:
                # Whether there are many is not known yet; whoever asks all has to wait for the list as well.
                with contextlib.suppress(Unavailable):
                    await self._pops(database, self._left_s(deadline) / 2)
            if len(self._known_pops(database)) > FEW_POPS:
                await self._ask_hinted(search, deadline)
            if search.open:
                await self._ask_all(search, database, deadline)
        return tuple(search.found[key] for key in keys)

    async def _ask_known(self, search: _Search, ballots: dict[GroupKey, Ballot | None], deadline: float) -> None:
        """Where the groups were last seen; in the own PoP what was seen nowhere."""
        asked: dict[str, list[GroupKey]] = {}
        for key in search.open:
            place = self._places.get(key)
            asked.setdefault(self._pop if place is None else place.pop, []).append(key)
        if len(asked) == 1:
            await self._ask(search, *asked.popitem(), ballots, deadline)
        else:
            await asyncio.gather(*(self._ask(search, pop, of, ballots, deadline) for pop, of in asked.items()))

    async def _ask_hinted(self, search: _Search, deadline: float) -> None:
        keys = list(search.open)[:HINTS_AT_ONCE]
        hints = await self._hints(keys, self._left_s(deadline) / 2)
        asked: dict[str, list[GroupKey]] = {}
        for key, pop in zip(keys, hints, strict=True):
            if pop is not None and pop not in search.asked[key]:
                asked.setdefault(pop, []).append(key)
        self.counters["hinted"] += len(asked)
        await asyncio.gather(*(self._ask(search, pop, of, {}, deadline) for pop, of in asked.items()))

    async def _hints(self, keys: Sequence[GroupKey], limit_s: float) -> list[str | None]:
        """Those that are found by then: a hint only saves asking, so it never takes the time that asking needs."""
        looking = [asyncio.ensure_future(self._hint(key)) for key in keys]
        try:
            await asyncio.wait(looking, timeout=limit_s)
            return [look.result() if look.done() else None for look in looking]
        finally:
            for look in looking:
                look.cancel()
            await asyncio.gather(*looking, return_exceptions=True)

    async def _ask_all(self, search: _Search, database: str, deadline: float) -> None:
        """All PoPs that were not asked yet, until every group is found or all have answered.

        If the list turns out to have grown from few to many since this node read it, a hint's first of the new ones.
        """
        self.counters["searched"] += 1
        known = self._known_pops(database)
        hinting: list[asyncio.Future[None]] = []

        async def ask(pop: str) -> None:
            if len(known) <= FEW_POPS < len(self._known_pops(database)) and pop not in (self._pop, *known):
                if not hinting:
                    hinting.append(asyncio.ensure_future(self._ask_hinted(search, deadline)))
                await asyncio.shield(hinting[0])
            of = [key for key in search.open if pop not in search.asked[key]]
            if of:
                await self._ask(search, pop, of, {}, deadline)

        listed: tuple[str, ...] = ()
        unlisted = None
        try:
            listed = await self._over_pops(database, ask, lambda: not search.open, deadline)
        except Unavailable as error:
            unlisted = error
        finally:
            for each in hinting:
                each.cancel()
            await asyncio.gather(*hinting, return_exceptions=True)
        for key in list(search.open):
            silent = search.silent[key]
            missing = {pop: why for pop, why in silent.items() if unlisted or pop in listed or pop == self._pop}
            if missing:
                where = ", ".join(sorted(missing))
                raise Unavailable(
                    f"group {group_name(key)} is in no PoP that can be asked, and it may be in {where}: "
                    f"{next(iter(missing.values()))}",
                    pops=sorted(missing),
                )
            if unlisted is not None:
                raise unlisted
            search.absent(key, self._pop)

    async def _over_pops(
        self,
        database: str,
        ask: Callable[[str], Coroutine[Any, Any, None]],
        done: Callable[[], bool],
        deadline: float,
    ) -> tuple[str, ...]:
        """Ask this PoP and each that has a shard, those that are known at once, unless all is `done` before.

        Returns the PoPs that are listed to have one; none if that was not waited for. Raises what asking raises, and
        Unavailable if the list cannot be read while it is needed.
        """
        begun: dict[str, asyncio.Task[None]] = {}

        def begin(pops: Sequence[str]) -> None:
            for pop in (self._pop, *pops):
                if pop not in begun:
                    begun[pop] = asyncio.ensure_future(ask(pop))

        begin(self._known_pops(database))
        listing = asyncio.ensure_future(self._pops(database, self._left_s(deadline)))
        listed = False
        try:
            while not done():
                waiting: list[asyncio.Future[Any]] = [task for task in (*begun.values(), listing) if not task.done()]
                if waiting:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in begun.values():
                    if task.done():
                        task.result()
                if not listed and listing.done() and listing.exception() is None:
                    listed = True
                    begin(listing.result())
                elif all(task.done() for task in (*begun.values(), listing)):
                    return () if done() else listing.result()
            return ()
        finally:
            for each in (*begun.values(), listing):
                each.cancel()
            await asyncio.gather(*begun.values(), listing, return_exceptions=True)

    async def _ask(
        self,
        search: _Search,
        pop: str,
        keys: list[GroupKey],
        ballots: dict[GroupKey, Ballot | None],
        deadline: float,
    ) -> None:
        """One PoP for these groups; what it has is found. Raises what is no matter of reach."""
        seen: list[Ballot | None] = []
        for key in keys:
            search.asked[key].add(pop)
            place = self._places.get(key)
            held = ballots.get(key)
            seen.append(held if place is not None and place == (pop, held) else None)
        try:
            reads = await self._store(pop).read(keys, seen, self._left_s(deadline))
        except (Unavailable, Indeterminate) as error:
            for key in keys:
                search.silent[key][pop] = error.message
            return
        for key, read in zip(keys, reads, strict=True):
            if read.rows is None or read.rows:
                if key in search.open:
                    search.take(key, read)
                    self._remember(key, pop, read.ballot)
            else:
                search.none[key][pop] = read
                if (place := self._places.get(key)) is None or place.pop != pop:
                    continue
                if not self._made_once(key):
                    del self._places[key]
                elif key in search.open:
                    search.take(key, read)
                    self._remember(key, pop, ZERO)

    # Commits.

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        """Raises Invalid where the parts live in several PoPs: `homes` of its detail has that of each part."""
        deadline = self._deadline(timeout_s)
        pop = self._sent.get(transaction.id)
        if pop is None and attempt:
            return await self._ended(transaction, deadline)
        if pop is None:
            homes = await self.homes_of(transaction, transaction.parts, self._left_s(deadline))
            if len(set(homes.values())) > 1:
                raise spans_domains(transaction.database, [homes[part.key] for part in transaction.parts])
            pop = homes[transaction.parts[0].key]
        self._sent[transaction.id] = pop
        if len(self._sent) > SENT_MAX:
            self._sent.popitem(last=False)
        applied = await self._store(pop).commit(self._as_seen_in(pop, transaction), attempt, self._left_s(deadline))
        for part, ballot in zip(transaction.parts, applied.ballots, strict=True):
            self._note(part, pop, ballot)
        if pop == self._pop:
            for number in transaction.created:
                self._made(transaction.parts[number].key)
        return applied

    def _as_seen_in(self, pop: str, transaction: Transaction) -> Transaction:
        """Without the ballots at which groups were seen in another PoP, before they were deleted and made there."""
        parts = tuple(msgspec.structs.replace(p, seen=self._seen_in(pop, p.seen)) for p in transaction.parts)
        return transaction if parts == transaction.parts else msgspec.structs.replace(transaction, parts=parts)

    def _seen_in(self, pop: str, seen: Ballot | None) -> Ballot | None:
        """None for a ballot of another domain: it says nothing of what was forgotten in this one.

        Floors name no node. They are told of groups that nobody has, as the own PoP has them.
        """
        if seen is None or (seen.node.startswith(pop_prefix(pop)) if seen.node else pop == self._pop):
            return seen
        return None

    def _note(self, part: Part, pop: str, ballot: Ballot) -> None:
        """After a change of rows some are there; after a DELETE perhaps none."""
        if any(change.op is Op.DELETE for change in part.changes):
            if self._made_once(part.key):
                self._remember(part.key, pop, ZERO)
            else:
                self._places.pop(part.key, None)
        elif part.changes:
            self._remember(part.key, pop, ballot)

    async def homes_of(
        self, transaction: Transaction, parts: Sequence[Part], timeout_s: float | None
    ) -> dict[GroupKey, str]:
        """The PoP of each of these parts, all of them of local groups; what nobody has is made here."""
        created = {transaction.parts[number].key for number in transaction.created}
        homes: dict[GroupKey, str] = {}
        unknown = []
        for part in parts:
            place = self._places.get(part.key)
            if part.key in created and (place is None or place.pop == self._pop):
                homes[part.key] = self._pop
            elif place is not None and part.key not in created:
                homes[part.key] = place.pop
            else:
                unknown.append(part.key)
        if unknown:
            await self.read(unknown, None, timeout_s)
            homes |= {key: self.known_place(key) or self._pop for key in unknown}
        return homes

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        """Where the transaction was sent; where that is not known any more, every PoP is asked.

        The group may be elsewhere by now, if it was deleted and made again: there nothing is known of it.
        """
        deadline = self._deadline(timeout_s)
        pop = self._sent.get(id)
        if pop is not None:
            return await self._store(pop).outcome(id, key, self._seen_in(pop, seen), self._left_s(deadline))
        said: dict[str, str] = {}
        silent: dict[str, Unavailable] = {}

        async def ask(pop: str) -> None:
            try:
                said[pop] = await self._store(pop).outcome(id, key, self._seen_in(pop, seen), self._left_s(deadline))
            except Unavailable as error:
                silent[pop] = error

        await self._over_pops(split_group_key(key)[0], ask, lambda: "applied" in said.values(), deadline)
        if silent and "applied" not in said.values():
            raise next(iter(silent.values()))
        for outcome in ("applied", "unknown"):
            if outcome in said.values():
                return outcome
        return "not_applied"

    async def _ended(self, transaction: Transaction, deadline: float) -> Applied:
        """A retry, and this node has forgotten where the first attempt went: nothing is sent a second time.

        What is applied was so at ballots that are not known: they are ZERO, which no cache believes.
        """
        witness = transaction.witness
        try:
            outcome = await self.outcome(transaction.id, witness.key, witness.seen, self._left_s(deadline))
        except Unavailable as error:
            raise Indeterminate(f"what became of an earlier attempt cannot be asked: {error.message}") from None
        if outcome == "applied":
            return Applied((ZERO,) * len(transaction.parts))
        if outcome == "not_applied":
            raise Conflict(
                "the transaction was interrupted, and was ended in all PoPs without being applied; run it again",
                part=0,
                what="intent",
                index=0,
            )
        raise Indeterminate(
            f"nobody knows any more what became of transaction {transaction.id.hex()}; read the rows to see whether it "
            "was applied",
            forgotten=True,
        )

    # Finds.

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        """Rows of all PoPs in the asked order, else by primary key.

        A PoP out of reach is left out and counted if the query's scope allows it; else Unavailable is raised.
        """
        if query.scope is Scope.NEAR:
            return await self._own.find(query, timeout_s)
        deadline = self._deadline(timeout_s)
        results: dict[str, FindResult] = {}
        silent: dict[str, str] = {}

        async def ask(pop: str) -> None:
            try:
                results[pop] = await self._store(pop).find(query, self._left_s(deadline))
            except (Unavailable, Indeterminate) as error:
                silent[pop] = error.message

        try:
            listed = await self._over_pops(query.database, ask, lambda: False, deadline)
            silent = {pop: why for pop, why in silent.items() if pop in listed}
        except Unavailable as error:
            # The list is out of reach, and with it a shard that is new.
            silent["the list of shards"] = error.message
        if silent and (query.scope is Scope.POPS or not results):
            raise Unavailable(
                f"table {query.table} of {query.database} cannot be searched in {', '.join(sorted(silent))}: "
                f"{next(iter(silent.values()))}",
                pops=sorted(silent),
            )
        if silent:
            self.counters["partial_finds"] += 1
            self.counters["pops_left_out"] += len(silent)
        for pop, result in results.items():
            for row in result.rows:
                self._remember(row.group, pop, row.ballot)
        return _merged(query, list(results.values()))

    # Ids, fences, the end.

    async def drop(self, database: str, shard: str, timeout_s: float | None = None) -> tuple[str, ...]:
        """Drop the shards. Raises Unavailable that names a PoP out of reach; some may be gone then.

        `shard`: their home in the PoPs' registries. Until no other one is listed meanwhile. Returns the PoPs, for
        `drop_again`, when the list is gone too.
        """
        deadline = self._deadline(timeout_s)
        dropped: dict[str, None] = {}
        while new := [pop for pop in await self._pops(database, self._left_s(deadline)) if pop not in dropped]:
            await self.drop_again(database, new, shard, self._left_s(deadline))
            dropped |= dict.fromkeys(new)
        return tuple(dropped)

    async def drop_again(self, database: str, pops: Sequence[str], shard: str, timeout_s: float | None = None) -> None:
        await asyncio.gather(*(self._store(pop).drop_database(database, timeout_s, shard) for pop in pops))
        self._places.clear()
        self._shards.pop(database, None)
        self.ids.forget(database)

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self.ids.reserve(database, name, count, above, timeout_s)

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self.ids.raise_to(database, name, above, timeout_s)

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        """PoP by PoP, in the order of their names. Raises Unavailable that names the one that is out of reach.

        A shard made meanwhile takes its catalog from the database's home, where the version is published already.
        A name that comes in between only makes a PoP's turn come twice.
        """
        deadline = self._deadline(timeout_s)
        pops = await self._pops(database, self._left_s(deadline))
        at, tablet = divmod(first, FENCE_ORDINAL)
        if at < len(pops):
            tablet = await self._store(pops[at]).fence(database, version, prefixes, tablet, self._left_s(deadline))
            if tablet >= 0:
                return at * FENCE_ORDINAL + tablet
            at += 1
        return at * FENCE_ORDINAL if at < len(pops) else -1


class _Search:
    """Groups that are looked for. `none`: PoPs without rows of one; `silent`: those that did not answer, and why."""

    def __init__(self, keys: Sequence[GroupKey]) -> None:
        self.open: dict[GroupKey, None] = dict.fromkeys(keys)
        self.found: dict[GroupKey, GroupRead] = {}
        self.asked: dict[GroupKey, set[str]] = {key: set() for key in keys}
        self.none: dict[GroupKey, dict[str, GroupRead]] = {key: {} for key in keys}
        self.silent: dict[GroupKey, dict[str, str]] = {key: {} for key in keys}

    def take(self, key: GroupKey, read: GroupRead) -> None:
        del self.open[key]
        self.found[key] = read

    def absent(self, key: GroupKey, own: str) -> None:
        """As the own PoP has it, where it would be made."""
        self.take(key, self.none[key][own])


def spans_domains(database: str, homes: Sequence[str]) -> Invalid:
    """The refusal of a transaction over several domains. `homes`: of its parts, in their order."""
    return Invalid(
        f"a transaction of {database} changes groups that live in {' and '.join(sorted(set(homes)))}; one transaction "
        "changes groups of one PoP, or of domain global: commit it in pieces",
        homes=list(homes),
    )


def _merged(query: FindQuery, results: Sequence[FindResult]) -> FindResult:
    rows = [row for result in results for row in result.rows]
    if len(results) > 1:
        order = row_order(query, ())
        descending = query.order is not None and query.order.descending
        rows.sort(key=lambda row: order((row.group, row.key, row.row)), reverse=descending)
    if query.order is not None and query.limit is not None:
        rows = rows[: query.limit]
    if len(rows) > FIND_ROWS_MAX:
        raise Invalid(f"{len(rows)} rows match in all PoPs, at most {FIND_ROWS_MAX} can be had at once; ask for less")
    kept = {row.group for row in rows}
    groups = tuple(group for result in results for group in result.groups if group.key in kept)
    return FindResult(tuple(rows), groups)
