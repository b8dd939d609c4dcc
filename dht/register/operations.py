"""What each kind of operation does to a group's state: pure (DESIGN section 7, and the single-group write).

A transaction over several groups leaves three kinds of the store's own rows:

* an intent (id) in every group but the primary: the changes to come, and where the primary is. It locks the group: no
  other write passes, so its guards, checked when it was stored, still hold when it is finished;
* a decision (id) in the primary, written with its changes: the commit point. It lists the other groups and stays until
  each has finished, whatever the window has forgotten by then;
* window entries: APPLIED, REFUSED or ABORTED, at the primary the abort record that a resolver needs, in the others the
  mark that stops a prepare which is still on its way.
"""

from __future__ import annotations

import msgspec

from dht.errors import Conflict, DhtError, Indeterminate, Invalid
from dht.model import SYSTEM_DECISION, ZERO, Ballot, GroupKey, NodeId, Part, RowKey, Struct, TransactionId
from dht.register import catalog, group
from dht.register.group import (
    ABORTED,
    APPLIED,
    FORGOTTEN,
    REFUSED,
    UNDECIDED,
    Delta,
    GroupState,
    decision_key,
    intent_key,
)
from dht.register.messages import Kind, Operation
from dht.register.rules import Rules
from dht.rows import decode_row, encode_row, split_group_key, table_prefix


class Intent(Struct, frozen=True):
    """What a group stores of a transaction that is not decided yet; column 0 of its row, in msgpack."""

    id: TransactionId
    primary: GroupKey
    primary_seen: Ballot | None
    part: Part
    part_index: int
    version: int = 0
    author: NodeId = b""


class Decision(Struct, frozen=True):
    """The commit point's record at the primary; column 0 of its row, in msgpack."""

    id: TransactionId
    ballot: Ballot
    others: tuple[GroupKey, ...]


class Blocked(DhtError):
    """Not an answer: the operation waits for the end of another transaction's intent.

    `sent`: the operation was in an accept before it was found blocked, so that it may yet turn out to be applied.
    `seen`: the ballot at which it saw the group then, of whoever named none himself.
    """

    def __init__(self, intent: Intent) -> None:
        super().__init__("another transaction holds the group", what="intent")
        self.intent = intent
        self.sent = False
        self.seen: Ballot | None = None


class Lost(Indeterminate):
    """The operation was in an accept of this node, whose end it does not know. `seen`: as in `Blocked`."""

    def __init__(self, message: str, seen: Ballot | None, **detail: object) -> None:
        super().__init__(message, **detail)
        self.seen = seen


_intent_decoder = msgspec.msgpack.Decoder(Intent)
_decision_decoder = msgspec.msgpack.Decoder(Decision)
_DECISION_PREFIX = table_prefix(SYSTEM_DECISION)


def decode_intent(row: bytes) -> Intent:
    return _intent_decoder.decode(decode_row(row)[0])  # type: ignore[arg-type]


def decisions(rows: dict[RowKey, bytes]) -> list[Decision]:
    """The decision records among a group's own rows."""
    found = [decode_row(row)[0] for key, row in rows.items() if key.startswith(_DECISION_PREFIX)]
    return [_decision_decoder.decode(data) for data in found]  # type: ignore[arg-type]


def perform(
    state: GroupState,
    operation: Operation,
    seen: Ballot | None,
    attempt: int,
    ballot: Ballot,
    rules: Rules,
    version: int = 0,
    *,
    chosen: bool = True,
) -> tuple[Delta, Ballot, int]:
    """(delta, ballot at which it is or was applied, outcome). Raises what refuses it, or Blocked.

    `version`: the newest catalog that the promise of the ballot named (`dht.register.fence`). `chosen`: the state is,
    as it stands, with nothing in it of what goes with this one, nor of a proposer who was not heard out.
    """
    match operation.kind:
        case Kind.COMMIT | Kind.COMMIT_PRIMARY:
            return _commit(state, operation, seen, attempt, ballot, rules, version)
        case Kind.PREPARE:
            return _prepare(state, operation, seen, attempt, ballot, rules, version)
        case Kind.FINISH | Kind.ROLL_BACK:
            return _end(state, operation, ballot, rules)
        case Kind.ABORT:
            return _abort(state, operation, seen, ballot)
        case Kind.FORGET:
            key = decision_key(operation.id)
            return ({key: None} if key in state.rows else {}), ballot, APPLIED
        case Kind.SETTLE:
            return {}, state.ballot, APPLIED
        case Kind.EMPTY:
            return _empty(state, operation, ballot, rules, chosen)


def accepts_anew(operation: Operation, outcome: int, rules: Rules) -> bool:
    """Whether the operation's answer takes an accept, even of what stands there already, which promises nothing.

    Behind an order to empty a group nothing that was proposed before it comes to light (`dht.register.emptying`).
    """
    return operation.kind == Kind.EMPTY and outcome == APPLIED and rules.drop_accepts_anew


def must_record(operation: Operation, attempt: int, rules: Rules) -> bool:
    """Whether a refusal of the operation goes into the window before it is answered (dht.register.group).

    A primary's always does: it is what lets the intents be rolled back.
    """
    if operation.kind == Kind.COMMIT_PRIMARY:
        return True
    return attempt > 0 and operation.kind in (Kind.COMMIT, Kind.PREPARE) and rules.refusal_recorded_at_retry


def _recall(
    state: GroupState, operation: Operation, seen: Ballot | None, attempt: int, rules: Rules
) -> tuple[Ballot, int] | None:
    if not rules.window:
        return None
    if not rules.window_floor:
        seen = state.ballot
    applied_floor = state.applied_floor if rules.applied_floor else ZERO
    found = group.recall(state, operation.id, seen, attempt, applied_floor)
    if found is not None and found[1] == ABORTED:
        raise Conflict(
            "the transaction was ended by another that waited for it; run it again",
            part=operation.part_index,
            what="intent",
            index=0,
        )
    return found


def _check_free(state: GroupState, id: TransactionId) -> None:
    if state.intents:
        for key, row in state.intents.items():
            if key != intent_key(id):
                raise Blocked(decode_intent(row))


def _check_version(operation: Operation, version: int, rules: Rules) -> None:
    """Raise SchemaChanged for what was made under an older catalog; what is recorded as done was done before."""
    if 0 < operation.version < version and rules.version_with_promise:
        database = str(split_group_key(operation.part.key)[0])
        raise catalog.schema_changed(database, operation.version, version)


def _commit(
    state: GroupState,
    operation: Operation,
    seen: Ballot | None,
    attempt: int,
    ballot: Ballot,
    rules: Rules,
    version: int,
) -> tuple[Delta, Ballot, int]:
    found = _recall(state, operation, seen, attempt, rules)
    if found is not None:
        return {}, found[0], APPLIED
    _check_version(operation, version, rules)
    _check_free(state, operation.id)
    delta = group.evaluate(state, operation.part, operation.part_index)
    if rules.window:
        group.remember(state, delta, operation.id, ballot, APPLIED)
    if operation.others:
        decision = Decision(operation.id, ballot, operation.others)
        delta[decision_key(operation.id)] = encode_row({0: msgspec.msgpack.encode(decision)})
    return delta, ballot, APPLIED


def _prepare(
    state: GroupState,
    operation: Operation,
    seen: Ballot | None,
    attempt: int,
    ballot: Ballot,
    rules: Rules,
    version: int,
) -> tuple[Delta, Ballot, int]:
    found = _recall(state, operation, seen, attempt, rules)
    if found is not None:
        return {}, found[0], APPLIED
    _check_free(state, operation.id)
    key = intent_key(operation.id)
    if key in state.intents:
        return {}, state.ballot, APPLIED
    _check_version(operation, version, rules)
    group.evaluate(state, operation.part, operation.part_index)
    intent = Intent(
        operation.id,
        operation.primary,
        operation.primary_seen,
        operation.part,
        operation.part_index,
        operation.version,
        operation.author,
    )
    delta: Delta = {key: encode_row({0: msgspec.msgpack.encode(intent)})}
    # The intent goes when its changes come: the group never holds both.
    group.check_size(state, delta)
    return delta, ballot, APPLIED


def _end(state: GroupState, operation: Operation, ballot: Ballot, rules: Rules) -> tuple[Delta, Ballot, int]:
    """FINISH applies the intent, ROLL_BACK drops it; both leave the outcome in the window.

    A rollback leaves it even where no intent was, for a prepare may be on its way. A decided transaction without an
    intent here was finished before.
    """
    finish = operation.kind == Kind.FINISH
    key = intent_key(operation.id)
    row = state.intents.get(key)
    if row is None and (finish or operation.id in state.window or not rules.rollback_recorded):
        return {}, state.ballot, APPLIED
    delta: Delta = {}
    if row is not None and finish:
        intent = decode_intent(row)
        delta = group.evaluate(state, intent.part, intent.part_index, limited=False)
    if row is not None:
        delta[key] = None
    group.remember(state, delta, operation.id, ballot, APPLIED if finish else ABORTED)
    return delta, ballot, APPLIED


def _abort(state: GroupState, operation: Operation, seen: Ballot | None, ballot: Ballot) -> tuple[Delta, Ballot, int]:
    """At the primary: the transaction's outcome, which is ABORTED from now on unless it was applied before.

    FORGOTTEN, when it is so old that the window tells nothing: its commit will be refused for the floor, so it needs
    no record of its own, and an intent of it that is still there is void (an applied one's record stays until all are
    finished). Who tried to commit it before cannot tell. Below the floor, but not below the applied floor, it needs no
    record either, and ABORTED is certain.
    Asked of a group that holds the transaction's intent, and so is not its primary: UNDECIDED, and nothing is done.
    """
    known = outcome(state.rows, operation.id)
    if known is not None:
        return {}, ballot, known
    if intent_key(operation.id) in state.intents:
        return {}, ballot, UNDECIDED
    delta: Delta = {}
    if state.floor != ZERO and (seen is None or seen < state.floor):
        if state.ballot == ZERO:
            # Nothing is chosen here yet, and another majority may know a lower floor: this one has to be chosen, or
            # the transaction could still commit there after its intents were dropped.
            group.pin_floor(state, delta)
        return delta, ballot, FORGOTTEN if seen is None or seen < state.applied_floor else ABORTED
    group.remember(state, delta, operation.id, ballot, ABORTED)
    return delta, ballot, ABORTED


def _empty(
    state: GroupState, operation: Operation, ballot: Ballot, rules: Rules, chosen: bool
) -> tuple[Delta, Ballot, int]:
    """Delete the rows, if the group stands no higher than when it was listed (`dht.register.emptying`).

    Else REFUSED, unless nothing is left anyway. What is not chosen yet counts as higher, whatever its ballot: it may be
    of an older promise than a ballot that was listed, and begun after it. What is applied is accepted at the ballot,
    were the group empty before (`accepts_anew`).
    """
    seen = operation.part.seen
    delta: Delta = catalog.emptied(operation.part.key, state.data())
    stands = state.ballot if chosen else ballot
    if rules.empty_bound:
        if seen is None:
            raise Invalid("a group is emptied up to a ballot, and this order names none; its sender is another version")
        if not chosen or stands > seen:
            refused = delta or state.intents
            return {}, stands if refused or not rules.drop_accepts_anew else ballot, REFUSED if refused else APPLIED
    _check_free(state, operation.id)
    return delta, ballot if delta or rules.drop_accepts_anew else stands, APPLIED


def outcome(rows: dict[RowKey, bytes], id: TransactionId) -> int | None:
    """What a primary's own rows say of a transaction: APPLIED, ABORTED, or None: undecided (or forgotten)."""
    if decision_key(id) in rows:
        return APPLIED
    entry = rows.get(group.window_key(id))
    if entry is None:
        return None
    return APPLIED if decode_row(entry)[1] == APPLIED else ABORTED
