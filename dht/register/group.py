"""What a write does to one group: pure rules, no I/O (DESIGN sections 6 and 7).

A group is a map of rows, those of the application and, under negative table numbers, the store's own. A write is
decided by whoever proposes (the coordinator) on the state that a prepare or the last chosen write gave him; acceptors
only store the result. So everything that must hold at commit is decided here, once, on one state:

* The once-only window. Beside its rows a group keeps the last transactions that touched it: id -> ballot, outcome. When
  the oldest are evicted, the ballot of the newest evicted one becomes the floor. Every write names the ballot at which
  its transaction first saw the group; the transaction's own write is above that ballot. Hence: id found, the recorded
  outcome is the answer; id absent and that ballot not below the floor, it was never applied; id absent and below the
  floor, it is not applied, and never will be: Conflict at a first attempt, which certainly was not applied before;
  Indeterminate at a retry, for an earlier attempt may have been.
* What was applied is remembered longer than what was refused or aborted: where many writers race for one group, nearly
  all lose, and their refusals would push the few that won out of the window within a moment. None is forgotten before
  32 more were applied, and the newest that was has a floor of its own, the applied floor. A retry below the floor, but
  not below the applied floor, certainly was not applied, and no attempt of it ever will be: Conflict.
* A refused first attempt leaves no trace. A refused retry records its refusal, and is answered when that record is
  chosen: an earlier attempt that is still on its way can then no longer apply after the Conflict was reported.
* Guards compare by value with the row as it is now; columns that are not set are never touched. Part guards hold
  before the changes, UNIQUE guards after them. Changes run in order, each on what the one before left.

A row of the application begins with a number >= 0, a row of the store with a negative one; the second byte of the key
tells them apart because the encoding keeps a number's sign there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from dht.errors import Conflict, DhtError, Duplicate, Indeterminate, Invalid, rebuild
from dht.limits import GROUP_BYTES_MAX, WINDOW_TRANSACTIONS
from dht.model import (
    SYSTEM_DECISION,
    SYSTEM_INTENT,
    SYSTEM_META,
    SYSTEM_WINDOW,
    ZERO,
    Ballot,
    Change,
    Columns,
    Guard,
    GuardKind,
    Op,
    Part,
    Row,
    RowKey,
    TransactionId,
    Value,
)
from dht.rows import (
    decode_row,
    encode_row,
    encode_value,
    row_digest,
    row_key,
    split_row_key,
    table_prefix,
)

Delta = dict[RowKey, bytes | None]

WINDOW_SLACK_TRANSACTIONS = 16
"""The window is cut back to its size only when it is this much longer: one eviction in 16 writes, not one in each."""
WINDOW_REFUSALS_FIRST = WINDOW_TRANSACTIONS // 2
"""With so many in it that were not applied, the window forgets the oldest of these, not the oldest of all."""
WRITE_OPERATIONS_MAX = WINDOW_TRANSACTIONS // 2
"""Of one write of a group. What it adds to the window must not push out what it adds as well (later operations of it
would be refused for a floor at their own ballot), nor all that was applied before."""

UNDECIDED, APPLIED, REFUSED, ABORTED, FORGOTTEN = 0, 1, 2, 3, 4
"""Outcomes; APPLIED, REFUSED and ABORTED stand in the window. REFUSED: by a guard, whose error is kept. ABORTED: by a
resolver or a rollback. FORGOTTEN: no record and below the floor. It will never be applied, but it may have been."""

_DIGEST_MODULUS = 1 << 128
WINDOW_PREFIX = table_prefix(SYSTEM_WINDOW)
_INTENT_PREFIX = table_prefix(SYSTEM_INTENT)
_DECISION_PREFIX = table_prefix(SYSTEM_DECISION)
FLOOR_KEY = row_key(SYSTEM_META, ())
_ballot_encoder = msgspec.msgpack.Encoder()
_ballot_decoder = msgspec.msgpack.Decoder(Ballot)


def pack_ballot(ballot: Ballot) -> bytes:
    """A ballot as a column's value."""
    return _ballot_encoder.encode(ballot)


def unpack_ballot(data: object) -> Ballot:
    """The ballot of `pack_ballot`. Raises Invalid on anything else."""
    try:
        return _ballot_decoder.decode(data)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, TypeError) as error:
        raise Invalid(f"not a ballot: {error}") from None


def unpack_floors(row: bytes) -> tuple[Ballot, Ballot]:
    """The floor and the applied floor of a group's row of them; one alone stands for both."""
    floors = decode_row(row)
    floor = unpack_ballot(floors[0])
    return floor, unpack_ballot(floors[1]) if 1 in floors else floor


def is_system(key: RowKey) -> bool:
    """Whether the row is the store's own."""
    return key[1] < 0x80


def window_key(id: TransactionId) -> RowKey:
    return WINDOW_PREFIX + encode_value(id)


def intent_key(id: TransactionId) -> RowKey:
    return _INTENT_PREFIX + encode_value(id)


def decision_key(id: TransactionId) -> RowKey:
    return _DECISION_PREFIX + encode_value(id)


def digest_bytes(digest: int) -> bytes:
    return digest.to_bytes(16, "big")


class GroupState:
    """All rows of a group at one ballot, with what is derived from them kept current by `apply`.

    `floor`: of the window, for a group without rows whose predecessor may have been collected; `pin_floor` keeps it.
    `applied_floor`: never above it, and the same where nobody knows better. `not_applied`: those of the window.
    """

    __slots__ = (
        "applied_floor",
        "ballot",
        "data_rows",
        "decisions",
        "digest",
        "floor",
        "intents",
        "not_applied",
        "rows",
        "size_bytes",
        "window",
    )

    def __init__(self, rows: dict[RowKey, bytes], ballot: Ballot, floor: Ballot = ZERO) -> None:
        self.rows = rows
        self.ballot = ballot
        self.digest = 0
        self.size_bytes = 0
        self.data_rows = 0
        self.window: dict[TransactionId, Ballot] = {}
        self.not_applied: dict[TransactionId, None] = {}
        self.floor = self.applied_floor = floor
        self.intents: dict[RowKey, bytes] = {}
        self.decisions: dict[RowKey, bytes] = {}
        for key, row in rows.items():
            self.digest += row_digest(key, row)
            self._count(key, row, 1)
        self.digest %= _DIGEST_MODULUS
        self.window = dict(sorted(self.window.items(), key=lambda entry: (entry[1], entry[0])))

    def _count(self, key: RowKey, row: bytes, sign: int) -> None:
        self.size_bytes += sign * (len(key) + len(row))
        if not is_system(key):
            self.data_rows += sign
            return
        if key.startswith(WINDOW_PREFIX):
            id = split_row_key(key)[1][0]
            assert isinstance(id, bytes)
            if sign < 0:
                self.window.pop(id, None)
                self.not_applied.pop(id, None)
            else:
                entry = decode_row(row)
                self.window[id] = unpack_ballot(entry[0])
                if entry[1] != APPLIED:
                    self.not_applied[id] = None
        elif key.startswith(_INTENT_PREFIX):
            _keep(self.intents, key, row, sign)
        elif key.startswith(_DECISION_PREFIX):
            _keep(self.decisions, key, row, sign)
        elif key == FLOOR_KEY:
            self.floor, self.applied_floor = unpack_floors(row) if sign > 0 else (ZERO, ZERO)

    @property
    def deleted(self) -> bool:
        """Nothing but window and floor is left: the register becomes a tombstone."""
        return not self.data_rows and not self.intents and not self.decisions

    def apply(self, delta: Mapping[RowKey, bytes | None]) -> None:
        """Take the delta over; the ballot is the caller's to set."""
        rows = self.rows
        for key, row in delta.items():
            old = rows.get(key)
            if old is not None:
                self.digest -= row_digest(key, old)
                self._count(key, old, -1)
            if row is None:
                rows.pop(key, None)
            else:
                rows[key] = row
                self.digest += row_digest(key, row)
                self._count(key, row, 1)
        self.digest %= _DIGEST_MODULUS

    def data(self) -> dict[RowKey, bytes]:
        """The application's rows."""
        return {key: row for key, row in self.rows.items() if key[1] >= 0x80}


def _keep(into: dict[RowKey, bytes], key: RowKey, row: bytes, sign: int) -> None:
    if sign > 0:
        into[key] = row
    else:
        into.pop(key, None)


def digest_after(digest: int, changed: Iterable[tuple[RowKey, bytes | None, bytes | None]]) -> int:
    """The digest after (key, old row, new row) of each changed row; for acceptors, who hold no state in memory."""
    for key, old, new in changed:
        if old is not None:
            digest -= row_digest(key, old)
        if new is not None:
            digest += row_digest(key, new)
    return digest % _DIGEST_MODULUS


# The once-only window.


def recall(
    state: GroupState, id: TransactionId, seen: Ballot | None, attempt: int, applied_floor: Ballot | None = None
) -> tuple[Ballot, int] | None:
    """The recorded (ballot, outcome) of the transaction, or None when it certainly was not applied here.

    A recorded refusal is raised as the error that it was. Raises Conflict or Indeterminate (module docstring) when the
    window no longer covers the transaction. `seen` None counts as older than any floor; whoever may let it pass (a
    first delivery) puts the state's own ballot there. `applied_floor` None: the state's own.
    """
    ballot = state.window.get(id)
    if ballot is not None:
        entry = decode_row(state.rows[window_key(id)])
        outcome = entry[1]
        if outcome == REFUSED:
            raise _recorded_refusal(entry)
        return ballot, int(outcome)  # type: ignore[arg-type]
    if state.floor != ZERO and (seen is None or seen < state.floor):
        applied_floor = state.applied_floor if applied_floor is None else applied_floor
        if attempt and (seen is None or seen < applied_floor):
            raise Indeterminate(
                f"transaction {id.hex()} was tried before, and its group has since forgotten so old a transaction; "
                "read the rows to see whether it was applied",
                id=id,
                forgotten=True,
            )
        raise Conflict(
            "the group changed too often since the transaction first read it; run the transaction again",
            what="window",
            index=0,
            retried=attempt > 0,
        )
    return None


def _recorded_refusal(entry: Row) -> DhtError:
    detail = msgspec.msgpack.decode(entry[4])  # type: ignore[arg-type]
    return rebuild(str(entry[2]), str(entry[3]), detail)


def remember(
    state: GroupState,
    delta: Delta,
    id: TransactionId,
    ballot: Ballot,
    outcome: int,
    refusal: DhtError | None = None,
) -> None:
    """Add the window entry to the delta, and what it evicts. Evictions raise the floors in the same delta."""
    entry: Row = {0: pack_ballot(ballot), 1: outcome}
    if refusal is not None:
        entry |= {2: refusal.code, 3: refusal.message, 4: msgspec.msgpack.encode(refusal.detail)}
    delta[window_key(id)] = encode_row(entry)
    if len(state.window) < WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS:
        return
    floor, applied_floor = state.floor, state.applied_floor
    for old_id, old_ballot in _evicted(state, ballot):
        delta[window_key(old_id)] = None
        floor = max(floor, old_ballot)
        if old_id not in state.not_applied:
            applied_floor = max(applied_floor, old_ballot)
    delta[FLOOR_KEY] = encode_row({0: pack_ballot(floor), 1: pack_ballot(applied_floor)})


def _evicted(state: GroupState, now: Ballot) -> list[tuple[TransactionId, Ballot]]:
    """What a full window forgets when the write at ballot `now` adds to it: nothing of that write itself."""
    known = list(state.window.items())
    if len(state.not_applied) >= WINDOW_REFUSALS_FIRST:
        refused = [entry for entry in known if entry[0] in state.not_applied and entry[1] < now]
        known = refused + [entry for entry in known if entry[0] not in state.not_applied]
    return known[: WINDOW_SLACK_TRANSACTIONS + 1]


def pin_floor(state: GroupState, delta: Delta) -> None:
    """Into the first delta of a group without rows: the floor that its tablet has, else nobody would know it later."""
    if state.floor != ZERO and FLOOR_KEY not in state.rows and FLOOR_KEY not in delta:
        delta[FLOOR_KEY] = encode_row({0: pack_ballot(state.floor)})


# Guards and changes.


class _Draft:
    """The rows as they would be: a delta over a state."""

    __slots__ = ("delta", "state")

    def __init__(self, state: GroupState) -> None:
        self.state = state
        self.delta: Delta = {}

    def row(self, key: RowKey) -> bytes | None:
        if key in self.delta:
            return self.delta[key]
        return self.state.rows.get(key)

    def rows_of(self, table: int) -> Iterable[tuple[RowKey, bytes]]:
        prefix = table_prefix(table)
        for key, row in self.state.rows.items():
            if key.startswith(prefix) and key not in self.delta:
                yield key, row
        for key, new in self.delta.items():
            if new is not None and key.startswith(prefix):
                yield key, new


def evaluate(state: GroupState, part: Part, part_index: int = 0, *, limited: bool = True) -> Delta:
    """The rows that the part changes. Raises Conflict or Duplicate (detail: part, what, index) or Invalid (size).

    `limited`: the group's size is checked; not where the change is decided already.
    """
    draft = _Draft(state)
    holders: _Holders = {}
    for index, guard in enumerate(part.guards):
        if guard.kind != GuardKind.UNIQUE:
            _check_guard(draft, guard, part_index, index, holders)
    for index, change in enumerate(part.changes):
        _make_change(draft, change, part_index, index)
    for index, guard in enumerate(part.guards):
        if guard.kind == GuardKind.UNIQUE:
            _check_guard(draft, guard, part_index, index, holders)
    if limited:
        check_size(state, draft.delta)
    return draft.delta


def check_size(state: GroupState, delta: Mapping[RowKey, bytes | None]) -> None:
    """Raise Invalid if the delta makes the group larger than a group may be; shrinking always works."""
    growth = 0
    for key, row in delta.items():
        old = state.rows.get(key)
        growth += (len(key) + len(row) if row is not None else 0) - (len(key) + len(old) if old is not None else 0)
    if growth > 0 and state.size_bytes + growth > GROUP_BYTES_MAX:
        raise Invalid(
            f"the group would grow to {state.size_bytes + growth} bytes, a group holds at most {GROUP_BYTES_MAX}; "
            "delete rows of it or choose a finer family key"
        )


def _make_change(draft: _Draft, change: Change, part_index: int, index: int) -> None:
    key = row_key(change.table, change.pk)
    current = draft.row(key)
    if change.op == Op.INSERT:
        if current is not None:
            raise Duplicate(
                f"row {change.pk} of table {change.table} exists", part=part_index, what="change", index=index
            )
        draft.delta[key] = encode_row(change.columns)
        return
    if current is None:
        raise Conflict(
            f"row {change.pk} of table {change.table} is gone", part=part_index, what="change", index=index, columns=[]
        )
    if change.op == Op.DELETE and not change.guards:
        draft.delta[key] = None
        return
    row = decode_row(current)
    if wrong := _differing(row, change.guards):
        raise Conflict(
            f"row {change.pk} of table {change.table} was changed by another transaction (columns {wrong})",
            part=part_index,
            what="change",
            index=index,
            columns=wrong,
        )
    if change.op == Op.DELETE:
        draft.delta[key] = None
    else:
        row.update(change.columns)
        draft.delta[key] = encode_row(row)


def _differing(row: Row, expected: Columns) -> list[int]:
    return [column for column, value in expected.items() if row.get(column) != value]


_Holders = dict[tuple[int, tuple[int, ...]], dict[tuple[Value, ...], list[RowKey]]]
"""(table, columns) -> values -> the rows that have them, made once for all UNIQUE guards of a part."""


def _holders_of(draft: _Draft, guard: Guard, known: _Holders) -> Sequence[RowKey]:
    columns = tuple(guard.columns)
    found = known.get((guard.table, columns))
    if found is None:
        found = known[guard.table, columns] = {}
        for key, data in draft.rows_of(guard.table):
            row = decode_row(data)
            found.setdefault(tuple([row.get(column) for column in columns]), []).append(key)
    return found.get(tuple(guard.columns.values()), ())


def _check_guard(draft: _Draft, guard: Guard, part_index: int, index: int, holders: _Holders) -> None:
    match guard.kind:
        case GuardKind.HAS:
            row = draft.row(row_key(guard.table, guard.pk))
            holds = row is not None and (not guard.columns or not _differing(decode_row(row), guard.columns))
            wanted = "is needed and is absent or different"
        case GuardKind.ABSENT:
            holds = draft.row(row_key(guard.table, guard.pk)) is None
            wanted = "has to be absent and exists"
        case GuardKind.UNIQUE:
            except_key = row_key(guard.table, guard.pk) if guard.pk else None
            holds = all(key == except_key for key in _holders_of(draft, guard, holders))
            wanted = f"has to be the only one with its values in columns {sorted(guard.columns)} and is not"
    if holds:
        return
    text = f"row {guard.pk} of table {guard.table} {wanted}"
    detail = {"part": part_index, "what": "guard", "index": index, "fails_as": guard.fails_as}
    raise (Duplicate if guard.fails_as == "duplicate" else Conflict)(text, **detail)
