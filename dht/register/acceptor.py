"""A replica's side of the registers: promises, accepted states, chosen marks (DESIGN section 6).

Every decision is synchronous: header read, rule applied, batch submitted, nothing awaited in between. The number of the
batch goes back with the answer, and the answer leaves only when the disk has it: of what it wrote, and of what it
reveals but another request wrote a moment ago.

Rules: a ballot below the promise is refused, and the refusal names the promise. A delta goes on exactly its base and
must give the digest that the proposer named, otherwise the acceptor asks for the whole. An accept that carries `next`
is also a prepare of that ballot, answered by the accept itself, for whoever accepts stands at exactly this state: that
is what makes the next write one round trip. Nothing is promised or told in a tablet epoch that the domain does not
admit here.
"""

from __future__ import annotations

import asyncio
from functools import partial

from dht.codec import Message
from dht.errors import Invalid, NotServing, RemoteProtocolError, StorageError
from dht.limits import READ_GROUPS_MAX, ROUNDS_AHEAD_MAX
from dht.model import ZERO, Ballot, GroupKey, RowKey
from dht.register import catalog
from dht.register.context import Context
from dht.register.group import WINDOW_PREFIX, digest_after, digest_bytes
from dht.register.messages import (
    Accept,
    Accepted,
    Chosen,
    ListDoubtful,
    ListDoubtfulReply,
    ListGroups,
    ListGroupsReply,
    Prepare,
    Prepared,
    ReadItem,
    ReadReplica,
    ReadReplicaReply,
    ReplicaState,
    Verdict,
    Wanted,
)
from dht.rows import encode_value
from dht.storage.registers import Header
from dht.world import Batch, Flushed

_NOT_SERVING = ReplicaState(False, ZERO, 0)
_READ_BYTES_MAX = 16 * 1024 * 1024
_DOUBTFUL_SCANNED = 2_000
MARKS_KEPT_AFTER_S = 3.0
"""What a node that stops forgets of the chosen marks is at most so young."""


class Acceptor:
    """The acceptor of all registers of a node."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._file = context.file
        self._disk = context.disk
        # The batch that holds the newest promise or state of a group, while it may not be durable yet.
        self._pending: dict[GroupKey, int] = {}
        self._keeping = False

    def admit(self, key: GroupKey, ballot: Ballot, *, accept: bool = False) -> None:
        """Raise NotServing unless the ballot's tablet epoch and generation are the ones served here."""
        domain = self._context.domain
        if ballot.generation != domain.generation:
            raise NotServing(
                f"generation {ballot.generation} is not the domain's, {domain.generation}; fetch the roster",
                roster_epoch=domain.roster.epoch,
            )
        domain.admit(self._file.tablet(key), ballot.epoch, accept)

    def _header(self, key: GroupKey) -> Header:
        """The register's header; where it has no value, with the promise that collected registers left at least."""
        header = self._file.header(key)
        if header.accepted == ZERO:
            return Header(max(header.promise, self._context.domain.floor(self._file.tablet(key))))
        return header

    def _check_rounds(self, header: Header, *ballots: Ballot) -> None:
        for ballot in ballots:
            if not 0 <= ballot.round <= header.promise.round + ROUNDS_AHEAD_MAX:
                raise Invalid(f"round {ballot.round} is out of bounds: the promise here is of {header.promise.round}")

    def _window_floor(self, key: GroupKey, accepted: Ballot) -> Ballot:
        """Below it nothing is known of a register without a value: it may have been collected."""
        return self._context.domain.agreed_floor(self._file.tablet(key)) if accepted == ZERO else ZERO

    def prepare(self, request: Prepare) -> tuple[Prepared, int]:
        """The answer, and the batch that must be durable before it leaves."""
        key, ballot = request.key, request.ballot
        self.admit(key, ballot)
        header = self._header(key)
        self._check_rounds(header, ballot)
        ok = ballot > header.promise or not self._context.rules.refuse_lower_ballot
        number = self._pending.get(key, 0)
        if ok:
            header = self._with_promise(header, ballot)
            number = self._write(key, header, {})
        rows = None
        if ok and header.accepted not in (ZERO, request.known):
            rows = self._file.rows(key)
        if not self._context.rules.promise_durable:
            number = 0
        floor = self._window_floor(key, header.accepted)
        return Prepared(ok, header.promise, header.accepted, rows, floor, self._file.told_version(key)), number

    def accept(self, request: Accept) -> tuple[Accepted, int]:
        """The answer, and the batch that must be durable before it leaves."""
        key, ballot = request.key, request.ballot
        self.admit(key, ballot, accept=True)
        header = self._header(key)
        self._check_rounds(header, *((ballot,) if request.next is None else (ballot, request.next)))
        if ballot < header.promise and self._context.rules.refuse_lower_ballot:
            return Accepted(Verdict.REFUSED, header.promise, header.accepted), self._pending.get(key, 0)
        batch = Batch()
        promise = ballot if request.next is None else request.next
        new = Header(promise, ballot, header.chosen, request.digest, request.deleted)
        if request.whole:
            rows = {rowkey: row for rowkey, row in request.rows.items() if row is not None}
            if digest_bytes(digest_after(0, ((rowkey, None, row) for rowkey, row in rows.items()))) != request.digest:
                raise RemoteProtocolError(f"the rows sent for group {key.hex()} do not give their digest")
            self._file.replace(batch, key, new, rows)
        else:
            was = self._changed_rows(header, request)
            if not self._fits(header, request, was):
                self._context.count("wholes_asked")
                return Accepted(Verdict.NEED_WHOLE, header.promise, header.accepted), self._pending.get(key, 0)
            self._file.write(batch, key, new, request.rows, was)
        number = self._submit(key, batch)
        if not self._context.rules.accept_durable:
            number = 0
        return Accepted(Verdict.ACCEPTED, promise, ballot, self._file.told_version(key)), number

    def _changed_rows(self, header: Header, request: Accept) -> dict[RowKey, bytes | None]:
        """The rows that the delta changes, as they are here.

        A register without a value has none, and an entry of the window is written once. So these are not looked for on
        the disk: if one were there, the digest would not fit, and the whole would come.
        """
        key, row = request.key, self._file.row
        if header.accepted == ZERO:
            return dict.fromkeys(request.rows)
        return {
            rowkey: None if new is not None and rowkey.startswith(WINDOW_PREFIX) else row(key, rowkey)
            for rowkey, new in request.rows.items()
        }

    def _fits(self, header: Header, request: Accept, was: dict[RowKey, bytes | None]) -> bool:
        """Whether the delta is on the state held here and leads to the digest."""
        if not self._context.rules.delta_base_checked:
            return True
        if header.accepted != request.base:
            return False
        changed = [(rowkey, was[rowkey], new) for rowkey, new in request.rows.items()]
        return digest_bytes(digest_after(int.from_bytes(header.digest, "big"), changed)) == request.digest

    def chosen(self, request: Chosen) -> None:
        """Keep the marks that are of the states held here. Not awaited: a mark is true, remembered or not."""
        marks = zip(request.keys, request.ballots, strict=False)
        if sum([self._file.mark(key, ballot) for key, ballot in marks]) and not self._keeping:
            self._keeping = True
            self._context.spawn(self._keep_marks_soon())

    async def _keep_marks_soon(self) -> None:
        """A group that is written again meanwhile has its mark on the disk for nothing; the others share a commit."""
        try:
            await self._context.clock.sleep(MARKS_KEPT_AFTER_S)
        finally:
            self._keeping = False
        batch = Batch()
        if self._disk.failed is None:
            self._file.keep_marks(batch)
        if batch.writes:
            self._disk.submit(batch)

    def read(self, request: ReadReplica) -> tuple[ReadReplicaReply, int]:
        """The state of each group here, and the batch that must be durable before it is told."""
        number = 0
        room = _READ_BYTES_MAX
        states = []
        for item in request.items:
            state = self.state(item)
            if state.rows is not None:
                size = self._file.header(item.key).size_bytes
                if size > room and room < _READ_BYTES_MAX:
                    # What does not fit the frame is told without its rows; the reader asks again.
                    state = ReplicaState(True, state.accepted, state.intents, chosen=state.chosen)
                room -= size
            number = max(number, self._pending.get(item.key, 0))
            states.append(state)
        return ReadReplicaReply(tuple(states), self._context.domain.roster.epoch), number

    def state(self, item: ReadItem) -> ReplicaState:
        """One group as it is here, durable or not (see `pending`)."""
        try:
            self._context.domain.admit(self._file.tablet(item.key), item.epoch)
        except NotServing:
            if self._context.rules.serving_only:
                return _NOT_SERVING
        header = self._file.header(item.key)
        rows: dict[RowKey, bytes] | None = None
        if item.wanted and item.known != header.accepted:
            rows = self.rows(item.key, item.wanted) if header.accepted != ZERO else {}
        floor = self._window_floor(item.key, header.accepted)
        return ReplicaState(True, header.accepted, header.intents, rows, floor, header.accepted == header.chosen)

    def rows(self, key: GroupKey, wanted: Wanted) -> dict[RowKey, bytes]:
        """The application's rows or the store's own."""
        return self._file.rows(key, system=wanted == Wanted.SYSTEM)

    def pending(self, key: GroupKey) -> int:
        """The batch that must be durable before the group's state here is told; 0 when it is."""
        return self._pending.get(key, 0)

    def list_groups(self, request: ListGroups) -> ListGroupsReply:
        """Groups of a database in some tablets, as far as they are known here.

        Raises NotServing where the first tablet is not served at the epoch that was asked for: what is here may lack
        some then. One of the others that is not served ends the list.
        """
        if not 1 <= request.limit <= READ_GROUPS_MAX:
            raise Invalid(f"{request.limit} groups were asked for; it is between 1 and {READ_GROUPS_MAX}")
        if len(request.others) >= (count := len(self._context.domain.roster.tablets)):
            raise Invalid(f"{1 + len(request.others)} tablets were asked for; there are {count}")
        if len(request.epochs) != 1 + len(request.others):
            raise Invalid(f"{1 + len(request.others)} tablets do not go with {len(request.epochs)} epochs")
        prefix = encode_value(request.database)
        keys = self._list(request.tablet, request.epochs[0], prefix, request.after, request.limit)
        tablets = 1
        for tablet, epoch in zip(request.others, request.epochs[1:], strict=True):
            if len(keys) >= request.limit:
                break
            try:
                keys += self._list(tablet, epoch, prefix, b"", request.limit - len(keys))
            except NotServing:
                break
            tablets += 1
        headers = [self._file.header(key) for key in keys]
        ballots = tuple(header.accepted for header in headers)
        gone = tuple(map(self._gone, headers))
        promises = tuple(header.promise for header in headers)
        last = keys[-1] if len(keys) == request.limit else b""
        return ListGroupsReply(tuple(keys), last, tablets, ballots, gone, promises)

    def _gone(self, header: Header) -> bool:
        promised = header.promise > header.accepted and self._context.rules.drop_accepts_anew
        return header.deleted and header.settled and not promised

    def _list(self, tablet: int, epoch: int, prefix: bytes, after: GroupKey, limit: int) -> list[GroupKey]:
        domain = self._context.domain
        domain.admit(tablet, epoch if self._context.rules.listed_at_one_epoch else domain.replicas(tablet).epoch)
        return self._file.keys_with(tablet, prefix, after, limit)

    def list_doubtful(self, request: ListDoubtful) -> ListDoubtfulReply:
        """Groups of one tablet with intents, and sequences. Raises NotServing where the tablet is not served."""
        domain = self._context.domain
        domain.admit(request.tablet, domain.replicas(request.tablet).epoch)
        held = self._file.headers(request.tablet, request.after, limit=_DOUBTFUL_SCANNED)
        intents = tuple(key for key, header in held if header.intents)
        sequences = tuple(key for key, _ in held if catalog.is_sequence(key))
        return ListDoubtfulReply(intents, sequences, held[-1][0] if len(held) == _DOUBTFUL_SCANNED else b"")

    async def durable(self, number: int, key: GroupKey | None = None) -> None:
        """Wait for the batch; the group's own is then no longer pending."""
        if not number:
            return
        await self._disk.durable(number)
        self._not_pending(number, key)

    def when_durable(self, number: int, key: GroupKey | None, then: Flushed) -> None:
        """`durable` for who needs no task to wait (`dht.world.Disk.when_durable`)."""
        if not number:
            then(None)
        else:
            self._disk.when_durable(number, partial(self._flushed, number, key, then))

    def _flushed(self, number: int, key: GroupKey | None, then: Flushed, error: StorageError | None) -> None:
        if error is None:
            self._not_pending(number, key)
        then(error)

    def _not_pending(self, number: int, key: GroupKey | None) -> None:
        if key is not None and self._pending.get(key) == number:
            del self._pending[key]

    def told(self, reply: Message, number: int, key: GroupKey | None = None) -> asyncio.Future[Message]:
        """The reply, once the batch is durable on which it rests."""
        told: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if not number:
            told.set_result(reply)
        else:
            self._disk.when_durable(number, partial(self._tell, told, reply, number, key))
        return told

    def _tell(
        self,
        told: asyncio.Future[Message],
        reply: Message,
        number: int,
        key: GroupKey | None,
        error: StorageError | None,
    ) -> None:
        if error is None:
            self._not_pending(number, key)
        if told.done():
            return
        if error is None:
            told.set_result(reply)
        else:
            told.set_exception(error)

    @staticmethod
    def _with_promise(header: Header, ballot: Ballot) -> Header:
        return Header(ballot, header.accepted, header.chosen, header.digest, header.deleted)

    def _write(self, key: GroupKey, header: Header, delta: dict[RowKey, bytes | None]) -> int:
        batch = Batch()
        self._file.write(batch, key, header, delta)
        return self._submit(key, batch)

    def _submit(self, key: GroupKey, batch: Batch) -> int:
        number = self._disk.submit(batch)
        self._pending[key] = number
        return number
