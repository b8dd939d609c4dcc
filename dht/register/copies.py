"""Reads of domain `global` without a message to another PoP: from a follower's copy in this one (DESIGN section 8).

The tables' specs say what may be read so: `FOLLOW` tables from a copy that is covered up to `staleness_max_s` ago, else
from the voters; `SERVE_STALE` tables, and catalogs, from the voters, but from a copy of any age while those are out of
reach, also of one that the node left behind when it was started again. A group counts as its tables do that the spec
lists for its key; one that no spec lists is read from the voters.

A node that follows reads its own copy. Another asks a follower of its PoP, and says with the question what its clients
have seen already: ballots of groups, and how long ago a moment was that must be covered. Clocks of two nodes are not
compared: the age is subtracted from the time of arrival, which is later than that of the question.

A find is covered beyond the node's own last commit to the database, and tells no row older than it was seen here; that
a row is not there yet which the voters told of a moment ago is within the bound.

What the voters refuse because something changed (Conflict, another catalog) is reason not to believe a copy that is not
covered beyond that moment: whoever tries again sees what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from dht.codec import Message, message
from dht.domain.copy import NEVER_S
from dht.errors import Conflict, DhtError, Indeterminate, Invalid, NotServing, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.model import (
    Applied,
    Ballot,
    FindQuery,
    FindResult,
    GroupKey,
    GroupRead,
    NodeId,
    PopClaim,
    Reading,
    Struct,
    TableSpec,
    Transaction,
    TransactionId,
)
from dht.register import catalog
from dht.register.following import FollowedReads
from dht.register.homes import Registry
from dht.register.rounds import expect
from dht.register.seen import Seen
from dht.rows import encode_value
from dht.storage.indexes import database_prefix
from dht.world import Clock, Network

STALENESS_MAX_S: Final = 5.0
SPECS_KEPT_S: Final = 10.0
NO_SPECS_KEPT_S: Final = 1.0
"""A copy that does not know the database yet knows it a moment later."""
DATABASES_KEPT_MAX: Final = 1_000
FOUND_NOTED_MAX: Final = 1_000
ANY_AGE_S: Final = 1e9
STALE_TOLD_S: Final = 30.0
"""For so long after the last such answer the node's status says that there was one."""
_EVERYTHING: Final = Reading.FOLLOW | Reading.SERVE_STALE | Reading.PARTIAL_OK
R = TypeVar("R", bound=Message)


@message
class ReadCopy(Message, frozen=True, tag=130):
    """Groups of one database out of your copy, if they are covered beyond the moment `age_s` ago.

    `known`: as in `ReadGroups`. `seen`: the ballot below which the group is of no use; ZERO: any will do.
    """

    keys: tuple[GroupKey, ...]
    known: tuple[Ballot | None, ...]
    seen: tuple[Ballot, ...]
    age_s: float


@message
class ReadCopyReply(Message, frozen=True, tag=131):
    """`age_s`: up to how long ago the groups are covered."""

    groups: tuple[GroupRead, ...]
    age_s: float


@message
class FindInCopy(Message, frozen=True, tag=132):
    query: FindQuery
    age_s: float


@message
class FindInCopyReply(Message, frozen=True, tag=133):
    result: FindResult
    age_s: float


@message
class AskSpecs(Message, frozen=True, tag=134):
    """The specs of a database's tables, as your copy has them."""

    database: str


@message
class Specs(Message, frozen=True, tag=135):
    tables: tuple[TableSpec, ...]


QUESTIONS: Final = (ReadCopy, FindInCopy, AskSpecs)


def answer(reads: FollowedReads | None, clock: Clock, question: Struct) -> Message:
    """What a follower tells nodes of its PoP. Raises NotServing for what its copy does not cover."""
    if reads is None:
        raise NotServing("this node follows no domain: ask another one, or the voters")
    now_s = clock.monotonic()
    match question:
        case AskSpecs():
            return Specs(reads.specs(question.database))
        case ReadCopy():
            if not len(question.keys) == len(question.known) == len(question.seen):
                raise Invalid(f"{len(question.keys)} groups do not go with the ballots that are known of them")
            groups, covered_s = reads.read(question.keys, question.known)
            if covered_s == NEVER_S and question.age_s >= ANY_AGE_S:
                covered_s = _before_start_s(reads.noted_wall_s(question.keys), clock)
            old = [g for g, seen in zip(groups, question.seen, strict=True) if g.ballot < seen]
            if covered_s > now_s - question.age_s and not old:
                return ReadCopyReply(tuple(groups), now_s - covered_s)
        case FindInCopy():
            covered_s = reads.covered_s(question.query.database)
            if covered_s == NEVER_S and question.age_s >= ANY_AGE_S:
                covered_s = _before_start_s(reads.noted_database_wall_s(question.query.database), clock)
            result, covered_s = reads.find(question.query, covered_s)
            if result is not None and covered_s > now_s - question.age_s:
                return FindInCopyReply(result, now_s - covered_s)
    raise NotServing("the copy here is not covered as far as was asked for: ask the voters")


def _before_start_s(wall_s: float, clock: Clock) -> float:
    """The moment by the monotonic clock, if nobody set the other one since; -inf for never."""
    return min(clock.monotonic(), clock.monotonic() - clock.wall() + wall_s) if wall_s else NEVER_S


class CopiedRegistry:
    """The store of domain `global` as this node's clients see it.

    `voters`: how the domain itself is reached now. `own`: this node's copy, None where it follows nothing. `followers`:
    others of the PoP to ask then. `counters`: answers by where they came from; `stale_s_most`: the greatest age of an
    answer that was given because the voters were out of reach.
    """

    def __init__(
        self,
        clock: Clock,
        network: Network,
        voters: Callable[[], Registry],
        own: Callable[[], FollowedReads | None],
        followers: Callable[[], Sequence[NodeId]],
        staleness_max_s: float = STALENESS_MAX_S,
    ) -> None:
        self.counters: dict[str, int | float] = dict.fromkeys(
            ("copy_reads", "copy_finds", "voter_reads", "stale_reads", "stale_s_most"), 0
        )
        self.stale_at_s = NEVER_S
        self._clock = clock
        self._network = network
        self._voters = voters
        self._own = own
        self._followers = followers
        self._staleness_max_s = staleness_max_s
        self._seen = Seen()
        self._found_at: NodeId | None = None
        self._found_since_s = NEVER_S
        self._specs: dict[str, tuple[float, tuple[TableSpec, ...]]] = {}
        self._specs_seen: dict[str, tuple[TableSpec, ...]] = {}
        self._starts: dict[str, tuple[tuple[TableSpec, ...], dict[bytes, int]]] = {}

    def warnings(self) -> list[str]:
        """Sentences for humans."""
        if self._clock.monotonic() - self.stale_at_s > STALE_TOLD_S:
            return []
        return [
            "domain global is out of reach; tables that may be are read from this PoP's copy, whatever its age "
            f"(up to {self.counters['stale_s_most']:.0f} s so far)"
        ]

    # ---- reads

    async def read(
        self,
        keys: Sequence[GroupKey],
        known: Sequence[Ballot | None] | None = None,
        timeout_s: float | None = None,
        near: bool = False,
    ) -> tuple[GroupRead, ...]:
        prefix = database_prefix(keys[0]) if keys else b""
        allowed = await self._allowed(prefix, keys)
        specs = self._specs_now(keys)
        if Reading.FOLLOW in allowed:
            groups = await self._read_copy(prefix, keys, known, self._staleness_max_s)
            if groups is not None:
                self.counters["copy_reads"] += 1
                return groups
        try:
            groups = await self._voters().read(keys, known, timeout_s)
        except (Unavailable, Indeterminate):
            stale = (
                await self._read_copy(prefix, keys, known, ANY_AGE_S) if self._stale_allowed(allowed, keys) else None
            )
            if stale is None:
                raise
            self.counters["stale_reads"] += 1
            return stale
        self.counters["voter_reads"] += 1
        if allowed or self._is_catalog(keys) or self._specs_now(keys) is not specs:
            now_s = self._clock.monotonic()
            for group in groups:
                self._seen.note(group.key, group.ballot, now_s)
        return groups

    async def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        prefix = encode_value(query.database)
        allowed = next(
            (Reading(s.read) for s in await self._specs_of(query.database) if s.table == query.table), Reading(0)
        )
        if Reading.FOLLOW in allowed:
            result = await self._find_in_copy(prefix, query, self._staleness_max_s)
            if result is not None:
                self.counters["copy_finds"] += 1
                return result
        try:
            result = await self._voters().find(query, timeout_s)
        except (Unavailable, Indeterminate):
            stale = await self._find_in_copy(prefix, query, ANY_AGE_S) if Reading.SERVE_STALE in allowed else None
            if stale is None:
                raise
            self.counters["stale_reads"] += 1
            return stale
        except Conflict:
            self._distrust(prefix)
            raise
        self.counters["voter_reads"] += 1
        if allowed:
            self._note_found(prefix, result)
        return result

    def _note_found(self, prefix: bytes, result: FindResult) -> None:
        """The ballots of what was found; of more than are noted, the moment."""
        now_s = self._clock.monotonic()
        for row in result.rows[:FOUND_NOTED_MAX]:
            self._seen.note(row.group, row.ballot, now_s)
        if len(result.rows) > FOUND_NOTED_MAX:
            self._distrust(prefix)

    async def _read_copy(
        self, prefix: bytes, keys: Sequence[GroupKey], known: Sequence[Ballot | None] | None, age_max_s: float
    ) -> tuple[GroupRead, ...] | None:
        ballots = (None,) * len(keys) if known is None else tuple(known)
        seen = tuple(self._seen.ballot(key) for key in keys)
        asked = await self._ask_copy(
            ReadCopy(tuple(keys), ballots, seen, self._age_s(prefix, age_max_s)), ReadCopyReply, age_max_s
        )
        if asked is None or [group.key for group in asked.groups] != list(keys):
            return None
        now_s = self._clock.monotonic()
        for group in asked.groups:
            self._seen.note(group.key, group.ballot, now_s)
        return asked.groups

    async def _find_in_copy(self, prefix: bytes, query: FindQuery, age_max_s: float) -> FindResult | None:
        since_s = self._clock.monotonic() - self._found_since_s
        age_s = min(self._age_s(prefix, age_max_s), self._age_s(_found(prefix), age_max_s), since_s)
        asked = await self._ask_copy(FindInCopy(query, age_s), FindInCopyReply, age_max_s)
        if asked is None or any(row.ballot < self._seen.ballot(row.group) for row in asked.result.rows):
            return None
        if self._own() is None:
            # The next question may go to another follower; this node's own copy never goes back.
            self._note_found(prefix, asked.result)
        return asked.result

    def _age_s(self, prefix: bytes, age_max_s: float) -> float:
        """How old an answer may be: within the bound, and covering what was seen here."""
        return max(0.0, min(age_max_s, self._clock.monotonic() - self._seen.beyond_s(prefix)))

    async def _ask_copy(self, question: Message, kind: type[R], age_max_s: float) -> R | None:
        """From this node's copy, or that of another node of the PoP; None where none is covered as far."""
        own = self._own()
        others = () if own is not None else sorted(self._followers(), key=lambda node: node != self._found_at)
        for node in [None] if own is not None else others:
            if isinstance(question, FindInCopy) and node != self._found_at:
                # What is newer in one copy than it is covered may not be in another one yet.
                self._found_at, self._found_since_s = node, self._clock.monotonic()
                return None
            try:
                if node is None:
                    reply = expect(answer(own, self._clock, question), kind)
                else:
                    reply = expect(await self._network.call(node, question, PEER_TIMEOUT_S), kind)
            except NotServing:
                if isinstance(question, FindInCopy) and self._clock.monotonic() - self._found_since_s < age_max_s:
                    # It will be covered that far. Going to and fro, finds would never meet with one that is.
                    return None
                continue
            except DhtError:
                continue
            if age_max_s >= ANY_AGE_S and isinstance(reply, ReadCopyReply | FindInCopyReply):
                self.stale_at_s = self._clock.monotonic()
                self.counters["stale_s_most"] = max(self.counters["stale_s_most"], reply.age_s)
            return reply
        return None

    # ---- what may be read so

    async def _allowed(self, prefix: bytes, keys: Sequence[GroupKey]) -> Reading:
        if not keys:
            return Reading(0)
        database = catalog.database_of(keys[0])
        specs = await self._specs_of(database)
        known, starts = self._starts.get(database, ((), {}))
        if known is not specs:
            starts = {prefix + group: s.read for s in specs if s.read for group in s.groups}
            # Where tables share groups, what one of them does not allow is not allowed.
            for start in starts:
                for s in specs:
                    if any(start.startswith(prefix + g) or (prefix + g).startswith(start) for g in s.groups):
                        starts[start] &= s.read
            if len(self._starts) >= DATABASES_KEPT_MAX:
                self._starts.clear()
            self._starts[database] = specs, starts
        allowed = int(_EVERYTHING)
        for key in keys:
            allowed &= next((read for start, read in starts.items() if key.startswith(start)), 0)
            if not allowed:
                break
        return Reading(allowed)

    async def _specs_of(self, database: str) -> tuple[TableSpec, ...]:
        """As a copy has them. When they change, no copy is believed that is not covered beyond that moment.

        For what the voters told before of a table that was not known to be followed was not noted.
        """
        specs = await self._copied_specs(database)
        seen = self._specs_seen.get(database)
        if seen is not specs:
            if seen is not None and seen != specs:
                self._distrust(encode_value(database))
            if len(self._specs_seen) >= DATABASES_KEPT_MAX:
                self._specs_seen.clear()
                self._seen.note_all(self._clock.monotonic())
            self._specs_seen[database] = specs
        return specs

    def _specs_now(self, keys: Sequence[GroupKey]) -> tuple[TableSpec, ...] | None:
        """Those of the groups' database that were heard last."""
        return self._specs_seen.get(catalog.database_of(keys[0])) if keys else None

    async def _copied_specs(self, database: str) -> tuple[TableSpec, ...]:
        """Kept for some seconds, so for so long a new table may be read from the voters."""
        own = self._own()
        if own is not None:
            return own.specs(database)
        until_s, specs = self._specs.get(database, (NEVER_S, ()))
        now_s = self._clock.monotonic()
        if now_s >= until_s:
            asked = await self._ask_copy(AskSpecs(database), Specs, 0.0)
            specs = specs if asked is None else asked.tables
            if len(self._specs) >= DATABASES_KEPT_MAX:
                self._specs.clear()
            self._specs[database] = now_s + (SPECS_KEPT_S if specs else NO_SPECS_KEPT_S), specs
        return specs

    @staticmethod
    def _is_catalog(keys: Sequence[GroupKey]) -> bool:
        return bool(keys) and all(key == catalog.catalog_group(catalog.database_of(key)) for key in keys)

    def _stale_allowed(self, allowed: Reading, keys: Sequence[GroupKey]) -> bool:
        """Without its catalog a service cannot begin to read the tables that it may read."""
        return Reading.SERVE_STALE in allowed or self._is_catalog(keys)

    def _distrust(self, prefix: bytes) -> None:
        self._seen.note_database(prefix, self._clock.monotonic())

    # ---- everything else is the voters'

    async def commit(self, transaction: Transaction, attempt: int = 0, timeout_s: float | None = None) -> Applied:
        prefix = encode_value(transaction.database)
        try:
            applied = await self._voters().commit(transaction, attempt, timeout_s)
        except Unavailable:
            # Nothing was applied, and nothing is known to be otherwise than the copy has it.
            raise
        except DhtError:
            self._distrust(prefix)
            raise
        now_s = self._clock.monotonic()
        for part, ballot in zip(transaction.parts, applied.ballots, strict=False):
            if part.changes:
                self._seen.note(part.key, ballot, now_s)
        self._seen.note_database(_found(prefix), now_s)
        return applied

    async def reserve_ids(
        self, database: str, name: str, count: int, above: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self._voters().reserve_ids(database, name, count, above, timeout_s)

    async def raise_sequence(self, database: str, name: str, above: int, timeout_s: float | None = None) -> None:
        await self._voters().raise_sequence(database, name, above, timeout_s)

    async def outcome(
        self, id: TransactionId, key: GroupKey, seen: Ballot | None = None, timeout_s: float | None = None
    ) -> str:
        outcome = await self._voters().outcome(id, key, seen, timeout_s)
        self._distrust(database_prefix(key))
        return outcome

    async def fence(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int = 0, timeout_s: float | None = None
    ) -> int:
        return await self._voters().fence(database, version, prefixes, first, timeout_s)

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return await self._voters().list_databases(timeout_s)

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        return await self._voters().homes(timeout_s)

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        return await self._voters().pops(timeout_s)

    async def create_database(self, name: str, timeout_s: float | None = None, home: str = "") -> bool:
        return await self._voters().create_database(name, timeout_s, home)

    async def drop_database(self, name: str, timeout_s: float | None = None, home: str | None = None) -> bool:
        dropped = await self._voters().drop_database(name, timeout_s, home)
        self._distrust(encode_value(name))
        return dropped


def _found(prefix: bytes) -> bytes:
    """Finds of a database have a moment of their own to be covered beyond: they name no group that is not there yet."""
    return prefix + b"?"
