"""What becomes of an intent that somebody meets (DESIGN section 7).

The truth is at the transaction's primary: a decision record or window entry says applied, a window entry says aborted,
neither says undecided, and a ballot below the primary's floor says that its commit can no longer pass. A primary that
was collected has forgotten its transactions, which are over: who read an intent of one before that must read again. Who
waits for an undecided one waits for a while, unless the node that carries it out has fallen silent. A resolver never
touches an intent before the primary says applied or aborted; if it says neither for too long, the resolver has
"aborted" written there first, which loses against a commit that was faster.
"""

from __future__ import annotations

from dht.errors import DhtError
from dht.limits import INTENT_TIMEOUT_S, REQUEST_TIMEOUT_S
from dht.model import ZERO, Ballot, GroupKey, Part, RowKey, TransactionId
from dht.register import operations
from dht.register.context import Context
from dht.register.coordinator import Coordinator
from dht.register.group import ABORTED, APPLIED, FLOOR_KEY, FORGOTTEN, intent_key, unpack_floors
from dht.register.messages import Kind, Operation
from dht.register.operations import Intent
from dht.register.reader import Reader
from dht.register.routing import Router

GRACE_S = 0.004
"""Most transactions finish by themselves within this; asking sooner only adds messages."""
_SEEN_MAX = 10_000


class Resolver:
    """Ends the intents of transactions whose own node does not."""

    def __init__(self, context: Context, coordinator: Coordinator, router: Router, reader: Reader) -> None:
        self._context = context
        self._coordinator = coordinator
        self._router = router
        self._reader = reader
        self._first_seen: dict[tuple[GroupKey, TransactionId], float] = {}

    async def unblock(self, key: GroupKey, intent: Intent, deadline: float) -> None:
        """For a write that waits: return when it is worth trying again. The intent may still be there then."""
        context = self._context
        now = context.clock.monotonic()
        if len(self._first_seen) >= _SEEN_MAX:
            self._first_seen.clear()
        seen = self._first_seen.setdefault((key, intent.id), now)
        if now - seen < GRACE_S:
            await context.clock.sleep(GRACE_S)
            return
        outcome = await self.outcome(intent, deadline)
        if outcome is None:
            gone = intent.author and not context.network.alive(intent.author)
            if not gone and now - seen < INTENT_TIMEOUT_S:
                await context.back_off()
                return
            outcome = await self.abort(intent, deadline)
        await self.end(key, intent.id, outcome == APPLIED, deadline)
        self._first_seen.pop((key, intent.id), None)
        self._coordinator.forget(key)

    async def resolve(self, key: GroupKey, intent: Intent, deadline: float) -> bool:
        """For a read: finish the intent if its transaction is decided. Whether it was."""
        outcome = await self.outcome(intent, deadline)
        if outcome is None:
            return False
        await self.end(key, intent.id, outcome == APPLIED, deadline)
        return True

    async def open_intent(self, key: GroupKey, id: TransactionId, deadline: float) -> Intent | None:
        """The transaction's intent in the group, if it is there."""
        _, rows = await self._reader.system_rows(key, deadline)
        row = rows.get(intent_key(id))
        return None if row is None else operations.decode_intent(row)

    async def outcome(self, intent: Intent, deadline: float) -> int | None:
        """APPLIED, ABORTED, or None: the primary has not decided."""
        ballot, rows = await self._reader.system_rows(intent.primary, deadline)
        known = operations.outcome(rows, intent.id)
        if known is None and below_floor(rows, intent.primary_seen):
            return ABORTED
        seen = intent.primary_seen or ZERO
        if known is None and not rows and seen < ballot and self._context.rules.collected_primary_asked:
            # Collected with what it knew, and so ended; or never written, and only some replicas know of a higher
            # floor. A write there tells which, a read does not.
            return await self.abort(intent, deadline)
        return known

    async def abort(self, intent: Intent, deadline: float) -> int:
        """The outcome of a transaction whose intent is there: ABORTED from now on unless it was applied."""
        if not self._context.rules.abort_before_touching_intent:
            return ABORTED
        self._context.count("aborts")
        part = Part(intent.primary, intent.primary_seen)
        ended = await self._router.submit(Operation(Kind.ABORT, intent.id, part), 0, deadline)
        return ABORTED if ended.outcome == FORGOTTEN else ended.outcome

    async def end(self, key: GroupKey, id: TransactionId, applied: bool, deadline: float) -> None:
        """Apply or drop the transaction's intent in the group. Doing it twice does no harm."""
        kind = Kind.FINISH if applied else Kind.ROLL_BACK
        await self._router.submit(Operation(kind, id, Part(key)), 0, deadline)

    async def finish(self, primary: GroupKey, id: TransactionId, others: tuple[GroupKey, ...], applied: bool) -> None:
        """End the intents in all groups, then forget the decision; tried until it is done or hopeless.

        What is left undone is found by whoever meets an intent, and by `adopt`.
        """
        context = self._context
        if not context.rules.decision_kept and applied:
            await self._try_forget(primary, id)
        rest = list(others)
        for _ in range(6):
            rest = await self._end_all(rest, id, applied)
            if not rest:
                break
            await context.back_off()
        if applied and not rest:
            await self._try_forget(primary, id)

    async def _end_all(self, keys: list[GroupKey], id: TransactionId, applied: bool) -> list[GroupKey]:
        """The groups that did not acknowledge."""
        work = [self._context.spawn(self._try_end(key, id, applied)) for key in keys]
        return [key for key, task in zip(keys, work, strict=True) if not await task]

    async def _try_end(self, key: GroupKey, id: TransactionId, applied: bool) -> bool:
        try:
            await self.end(key, id, applied, self._context.clock.monotonic() + REQUEST_TIMEOUT_S)
        except DhtError:
            self._context.count("finishes_failed")
            return False
        return True

    async def _try_forget(self, primary: GroupKey, id: TransactionId) -> None:
        deadline = self._context.clock.monotonic() + REQUEST_TIMEOUT_S
        try:
            await self._router.submit(Operation(Kind.FORGET, id, Part(primary)), 0, deadline)
        except DhtError:
            self._context.count("finishes_failed")

    async def adopt(self, key: GroupKey) -> None:
        """Finish the decisions that were found in a group and are still there after a while: their node is gone.

        They are read, not taken from the coordinator's cache, which holds what is not chosen yet, and may never be.
        """
        context = self._context
        await context.clock.sleep(INTENT_TIMEOUT_S)
        try:
            _, rows = await self._reader.system_rows(key, context.clock.monotonic() + REQUEST_TIMEOUT_S)
        except DhtError:
            context.count("finishes_failed")
            return
        for decision in operations.decisions(rows):
            context.count("decisions_adopted")
            await self.finish(key, decision.id, decision.others, True)


def below_floor(rows: dict[RowKey, bytes], seen: Ballot | None) -> bool:
    """Whether a transaction that first saw the group at that ballot may be forgotten there."""
    floor = rows.get(FLOOR_KEY)
    return floor is not None and seen is not None and seen < unpack_floors(floor)[0]


def below_applied_floor(rows: dict[RowKey, bytes], seen: Ballot | None) -> bool:
    """Whether such a transaction may have been applied there before it was forgotten, or may be yet.

    One that named no ballot counts from when it is first decided, which may be still to come.
    """
    floor = rows.get(FLOOR_KEY)
    return floor is not None and (seen is None or seen < unpack_floors(floor)[1])
