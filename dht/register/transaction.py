"""Commits: one group in one step, several groups of the domain in two rounds (DESIGN section 7).

Several groups: every group but the primary gets an intent, which checks its guards and locks it; then the primary is
written, which is the commit point; then the intents are finished in the background. The primary is the part with the
most changes, so that every attempt of the transaction chooses the same.

If a round fails, nothing is rolled back before the primary has recorded that the transaction is aborted, for an earlier
attempt of it may have committed there. Only then is the failure certain, and answered.
"""

from __future__ import annotations

from dht.errors import Conflict, DhtError, Indeterminate, NotServing, Unavailable
from dht.limits import WINDOW_TRANSACTIONS
from dht.model import Applied, Ballot, GroupKey, Part, Transaction
from dht.register.context import Context
from dht.register.group import APPLIED, FLOOR_KEY, FORGOTTEN, WINDOW_PREFIX
from dht.register.messages import Kind, Operation
from dht.register.reader import Reader
from dht.register.resolver import Resolver
from dht.register.routing import Router


class Transactions:
    """Commits for whoever asks at this node."""

    def __init__(self, context: Context, router: Router, reader: Reader, resolver: Resolver) -> None:
        self._context = context
        self._router = router
        self._reader = reader
        self._resolver = resolver

    async def commit(self, transaction: Transaction, attempt: int, deadline: float) -> Applied:
        """All parts or none. Raises Conflict, Duplicate, Unavailable (not applied) or Indeterminate."""
        self._context.count("writes")
        try:
            if len(transaction.parts) == 1:
                return Applied((await self._commit_one(transaction, attempt, deadline),))
            return await self._commit_all(transaction, attempt, deadline)
        except Conflict:
            self._context.count("conflicts")
            raise
        except Indeterminate as error:
            self._context.count("indeterminates")
            error.detail["id"] = transaction.id
            raise

    async def _commit_one(self, transaction: Transaction, attempt: int, deadline: float) -> Ballot:
        (part,) = transaction.parts
        blind = part.seen is None and not attempt
        if blind and not self._context.rules.seen_was_chosen:
            part = Part(part.key, self._context.file.header(part.key).accepted, part.changes, part.guards)
        elif blind and not self._router.coordinates(part.key) and self._soon_forgets(part.key):
            (part,) = await self._pinned((part,), deadline)
        while True:
            try:
                operation = Operation(Kind.COMMIT, transaction.id, part, version=transaction.catalog_version)
                return (await self._router.submit(operation, attempt, deadline)).ballot
            except Conflict as error:
                old = error.detail.get("what") == "window" and not error.detail.get("retried")
                if not blind or not old or self._context.remaining(deadline) <= 0:
                    raise
            # The group has forgotten transactions, so the write has to say from when on it counts: from now. Among
            # many others that may be too old again when its turn comes.
            (part,) = await self._pinned(transaction.parts, deadline)

    def _soon_forgets(self, key: GroupKey) -> bool:
        """Whether the group forgets transactions, as far as is known here, or may begin to before a retry comes.

        Where it forgets, the coordinator would refuse who does not say from when on he counts (see above); where it
        began to after a coordinator that hangs was asked, nobody could tell the retry what became of it.
        """
        file = self._context.file
        return file.row(key, FLOOR_KEY) is not None or file.holds(key, WINDOW_PREFIX, WINDOW_TRANSACTIONS // 2)

    async def _pinned(self, parts: tuple[Part, ...], deadline: float) -> tuple[Part, ...]:
        """The parts with the ballots that they see now, where they have seen none.

        A ballot that a majority agreed on: what an acceptor has accepted alone may be above the ballot that the write
        itself gets, if an older promise of the coordinator's is accepted elsewhere and finished later.
        """
        unseen = [part.key for part in parts if part.seen is None]
        if not unseen:
            return parts
        read = {group.key: group.ballot for group in await self._reader.read(unseen, None, deadline)}
        return tuple(Part(part.key, part.seen or read[part.key], part.changes, part.guards) for part in parts)

    async def _commit_all(self, transaction: Transaction, attempt: int, deadline: float) -> Applied:
        parts = transaction.parts if attempt else await self._pinned(transaction.parts, deadline)
        first = max(range(len(parts)), key=lambda index: (len(parts[index].changes), -index))
        primary = parts[first]
        others = tuple(part.key for index, part in enumerate(parts) if index != first)
        ballots: list[Ballot | None] = [None] * len(parts)
        version = transaction.catalog_version
        work = []
        for index, part in enumerate(parts):
            if index != first:
                step = Operation(
                    Kind.PREPARE,
                    transaction.id,
                    part,
                    index,
                    primary.key,
                    primary.seen,
                    version=version,
                    author=self._context.node,
                )
                work.append(self._context.spawn(self._prepare(step, attempt, deadline, ballots)))
        failures: list[DhtError] = []
        if self._context.rules.prepare_before_commit:
            failures = [error for task in work if (error := await task) is not None]
        if not failures:
            step = Operation(Kind.COMMIT_PRIMARY, transaction.id, primary, first, others=others, version=version)
            try:
                ballots[first] = (await self._router.submit(step, attempt, deadline)).ballot
            except DhtError as error:
                failures = [error]
        if failures:
            at = await self._give_up(transaction, primary, others, failures, attempt, deadline)
            ballots = [ballot or at for ballot in ballots]
        self._context.spawn(self._resolver.finish(primary.key, transaction.id, others, True))
        seen = ballots[first] or primary.seen
        return Applied(tuple(ballot or seen for ballot in ballots if ballot or seen))  # type: ignore[misc]

    async def _prepare(
        self, step: Operation, attempt: int, deadline: float, ballots: list[Ballot | None]
    ) -> DhtError | None:
        try:
            ballots[step.part_index] = (await self._router.submit(step, attempt, deadline)).ballot
        except DhtError as error:
            return error
        return None

    async def _give_up(
        self,
        transaction: Transaction,
        primary: Part,
        others: tuple[bytes, ...],
        failures: list[DhtError],
        attempt: int,
        deadline: float,
    ) -> Ballot:
        """End the transaction and raise why; return the primary's ballot if an earlier attempt had committed it."""
        for error in failures:
            if isinstance(error, Indeterminate) and error.detail.get("forgotten"):
                # A group no longer knows so old a transaction, so the primary's silence would prove nothing either.
                raise error
        committing = attempt > 0 or any(isinstance(e, Indeterminate) or e.detail.get("retried") for e in failures)
        step = Operation(Kind.ABORT, transaction.id, Part(primary.key, primary.seen))
        grace = self._context.clock.monotonic() + 0.5
        try:
            ended = await self._router.submit(step, 0, max(deadline, grace))
        except (Unavailable, Indeterminate) as error:
            if committing:
                raise Indeterminate(
                    f"the transaction's first group {primary.key.hex()} cannot be asked what became of it: "
                    f"{error.message}"
                ) from None
            # No attempt ever sent the commit, and none will: what is prepared ends by whoever meets it.
            raise _worst(failures) from None
        if ended.outcome == APPLIED:
            return ended.ballot
        if ended.outcome == FORGOTTEN and committing:
            raise Indeterminate(
                f"transaction {transaction.id.hex()} was tried before, and its first group {primary.key.hex()} has "
                "since forgotten so old a transaction; read the rows to see whether it was applied",
                forgotten=True,
            )
        self._context.spawn(self._resolver.finish(primary.key, transaction.id, others, False))
        raise _worst(failures)


def _worst(failures: list[DhtError]) -> DhtError:
    """What the caller is told of a transaction that certainly was not applied: a refusal before an absence."""
    for error in failures:
        if not isinstance(error, (Unavailable, Indeterminate, NotServing)):
            return error
    first = failures[0]
    return Unavailable(f"nothing was applied: {first.message}")
