"""Rules of one group: guards, changes, the once-only window, digests, limits."""

from __future__ import annotations

import random

import pytest

from dht.errors import Conflict, Duplicate, Indeterminate, Invalid
from dht.limits import GROUP_BYTES_MAX, WINDOW_TRANSACTIONS
from dht.model import ZERO, Ballot, Change, Guard, GuardKind, Op, Part, Transaction
from dht.register import group
from dht.register.admission import check_operation, check_transaction
from dht.register.group import APPLIED, REFUSED, WRITE_OPERATIONS_MAX, GroupState
from dht.register.messages import Kind, Operation
from dht.rows import decode_row, encode_row, group_key, row_digest, row_key

KEY = group_key("db", "f", ("g",))


def ballot(n: int) -> Ballot:
    return Ballot(1, 1, n, b"n", 1, n)


def state_of(*rows: tuple[int, tuple, dict]) -> GroupState:
    return GroupState({row_key(t, pk): encode_row(columns) for t, pk, columns in rows}, ballot(1))


def insert(pk, columns, table=1):
    return Part(KEY, changes=(Change(Op.INSERT, table, pk, columns),))


def update(pk, columns, guards=None, table=1):
    return Part(KEY, changes=(Change(Op.UPDATE, table, pk, columns, guards or {}),))


def write(state: GroupState, id: bytes, part: Part, n: int) -> None:
    delta = group.evaluate(state, part)
    group.remember(state, delta, id, ballot(n), APPLIED)
    state.apply(delta)
    state.ballot = ballot(n)


def test_insert_of_existing_row_is_duplicate_and_names_the_change():
    state = state_of((1, (7,), {0: 7}))
    with pytest.raises(Duplicate) as caught:
        group.evaluate(state, insert((7,), {0: 7}), 3)
    assert caught.value.detail == {"part": 3, "what": "change", "index": 0}


def test_update_of_one_column_leaves_the_others():
    state = state_of((1, (7,), {0: 7, 1: "a", 2: None}))
    delta = group.evaluate(state, update((7,), {2: "x"}, {1: "a"}))
    assert decode_row(delta[row_key(1, (7,))]) == {0: 7, 1: "a", 2: "x"}


def test_update_with_wrong_guard_is_conflict_and_names_columns():
    state = state_of((1, (7,), {0: 7, 1: "a"}))
    with pytest.raises(Conflict) as caught:
        group.evaluate(state, update((7,), {2: "x"}, {1: "b", 5: None}))
    assert caught.value.detail["columns"] == [1]
    assert not isinstance(caught.value, Duplicate)


@pytest.mark.parametrize("op", [Op.UPDATE, Op.DELETE])
def test_change_of_absent_row_is_conflict(op):
    with pytest.raises(Conflict):
        group.evaluate(state_of(), Part(KEY, changes=(Change(op, 1, (7,)),)))


def test_delete_then_insert_of_the_same_row_in_one_part_replaces_it():
    state = state_of((1, (7,), {0: 7}))
    part = Part(KEY, changes=(Change(Op.DELETE, 1, (7,)), Change(Op.INSERT, 1, (7,), {0: 8})))
    assert decode_row(group.evaluate(state, part)[row_key(1, (7,))]) == {0: 8}


@pytest.mark.parametrize(
    ("guard", "holds"),
    [
        (Guard(GuardKind.HAS, 1, (7,)), True),
        (Guard(GuardKind.HAS, 1, (7,), {1: "a"}), True),
        (Guard(GuardKind.HAS, 1, (7,), {1: "b"}), False),
        (Guard(GuardKind.HAS, 1, (8,)), False),
        (Guard(GuardKind.ABSENT, 1, (8,)), True),
        (Guard(GuardKind.ABSENT, 1, (7,)), False),
        (Guard(GuardKind.UNIQUE, 1, (), {1: "a"}), False),
        (Guard(GuardKind.UNIQUE, 1, (7,), {1: "a"}), True),
        (Guard(GuardKind.UNIQUE, 2, (), {1: "a"}), True),
    ],
)
def test_guard_holds_or_fails(guard, holds):
    state = state_of((1, (7,), {0: 7, 1: "a"}))
    if holds:
        assert group.evaluate(state, Part(KEY, guards=(guard,))) == {}
    else:
        with pytest.raises(Conflict) as caught:
            group.evaluate(state, Part(KEY, guards=(guard,)))
        assert caught.value.detail["what"] == "guard"


def test_unique_guard_is_checked_after_the_changes():
    state = state_of((1, (7,), {1: "a"}))
    part = Part(
        KEY,
        changes=(Change(Op.DELETE, 1, (7,)), Change(Op.INSERT, 1, (8,), {1: "a"})),
        guards=(Guard(GuardKind.UNIQUE, 1, (8,), {1: "a"}, "duplicate"),),
    )
    assert set(group.evaluate(state, part)) == {row_key(1, (7,)), row_key(1, (8,))}


@pytest.mark.parametrize(("fails_as", "error"), [("duplicate", Duplicate), ("foreign_key", Conflict)])
def test_guard_fails_as_asked(fails_as, error):
    with pytest.raises(error) as caught:
        group.evaluate(state_of(), Part(KEY, guards=(Guard(GuardKind.HAS, 1, (1,), fails_as=fails_as),)))
    assert caught.value.detail["fails_as"] == fails_as


def test_group_over_its_size_is_invalid_and_may_shrink():
    state = state_of((1, (1,), {1: "x" * (GROUP_BYTES_MAX - 100)}))
    with pytest.raises(Invalid, match="finer family"):
        group.evaluate(state, insert((2,), {1: "y" * 200}))
    assert group.evaluate(state, Part(KEY, changes=(Change(Op.DELETE, 1, (1,)),)))


def test_digest_size_and_counts_after_deltas_equal_those_of_a_fresh_load():
    state = state_of()
    for n in range(200):
        write(state, n.to_bytes(16, "big"), insert((n,), {0: n}) if n % 3 else insert((-n - 1,), {0: "t" * n}), n + 2)
        if n % 7 == 0:
            write(state, (1000 + n).to_bytes(16, "big"), update((-1,), {1: n}), n + 2)
    fresh = GroupState(dict(state.rows), state.ballot)
    assert (state.digest, state.size_bytes, state.data_rows) == (fresh.digest, fresh.size_bytes, fresh.data_rows)
    assert sum(row_digest(k, r) for k, r in state.rows.items()) % 2**128 == state.digest
    assert state.window == fresh.window
    assert state.floor == fresh.floor != ZERO


def test_window_keeps_at_least_its_size_and_floor_is_the_newest_evicted():
    state = state_of()
    for n in range(300):
        write(state, n.to_bytes(16, "big"), insert((n,), {}), n + 2)
        assert len(state.window) >= min(n + 1, WINDOW_TRANSACTIONS)
        evicted = n - len(state.window)
        assert state.floor == (ballot(evicted + 2) if evicted >= 0 else ZERO)


def test_recall_of_applied_transaction_tells_its_ballot():
    state = state_of()
    write(state, b"a" * 16, insert((1,), {}), 5)
    assert group.recall(state, b"a" * 16, None, 1) == (ballot(5), APPLIED)
    assert group.recall(state, b"b" * 16, None, 1) is None


def test_recall_of_recorded_refusal_raises_it_again():
    state = state_of()
    delta = {}
    group.remember(state, delta, b"a" * 16, ballot(2), REFUSED, Duplicate("there", part=1, what="change", index=4))
    state.apply(delta)
    with pytest.raises(Duplicate, match="there") as caught:
        group.recall(state, b"a" * 16, None, 2)
    assert caught.value.detail == {"part": 1, "what": "change", "index": 4}


def test_recall_below_the_floor_is_conflict_at_first_and_indeterminate_at_a_retry():
    state = state_of()
    for n in range(100):
        write(state, n.to_bytes(16, "big"), insert((n,), {}), n + 2)
    id = b"z" * 16
    with pytest.raises(Conflict) as caught:
        group.recall(state, id, ballot(2), 0)
    assert caught.value.detail["what"] == "window"
    for seen in (ballot(2), None):
        with pytest.raises(Indeterminate):
            group.recall(state, id, seen, 1)
    assert group.recall(state, id, state.floor, 1) is None


def refuse(state: GroupState, id: bytes, n: int) -> None:
    delta = {}
    group.remember(state, delta, id, ballot(n), REFUSED, Conflict("no", what="change", index=0))
    state.apply(delta)
    state.ballot = ballot(n)


def test_refusals_push_each_other_out_of_the_window_and_what_was_applied_stays():
    state = state_of()
    won = [b"won%13d" % n for n in range(12)]
    for n in range(600):
        if n % 50:
            refuse(state, n.to_bytes(16, "big"), n + 2)
        else:
            write(state, won[n // 50], insert((n,), {}), n + 2)
        assert min(n + 1, WINDOW_TRANSACTIONS) <= len(state.window) <= WINDOW_TRANSACTIONS + 16
    assert [group.recall(state, id, ballot(1), 1) for id in won] == [(ballot(50 * n + 2), APPLIED) for n in range(12)]
    fresh = GroupState(dict(state.rows), state.ballot)
    assert (fresh.floor, fresh.applied_floor, fresh.not_applied) == (state.floor, ZERO, state.not_applied)
    assert state.floor > ballot(400)
    with pytest.raises(Conflict) as caught:
        group.recall(state, b"lost" * 4, ballot(400), 1)
    assert caught.value.detail["what"] == "window"
    assert caught.value.detail["retried"]


def test_applied_floor_is_the_newest_applied_transaction_that_was_forgotten():
    state = state_of()
    applied: list[int] = []
    for n in range(2, 900):
        if n % 3:
            write(state, n.to_bytes(16, "big"), insert((n,), {}), n)
            applied.append(n)
        else:
            refuse(state, n.to_bytes(16, "big"), n)
        gone = [a for a in applied if a.to_bytes(16, "big") not in state.window]
        assert state.applied_floor == (ballot(gone[-1]) if gone else ZERO)
        assert state.applied_floor <= state.floor
    id = b"z" * 16
    with pytest.raises(Indeterminate):
        group.recall(state, id, ballot(gone[-1] - 1), 1)
    with pytest.raises(Conflict):
        group.recall(state, id, ballot(gone[-1]), 1)


@pytest.mark.parametrize("won", [0.05, 0.2, 0.5, 0.8])
def test_applied_transaction_is_not_forgotten_before_32_more_were_applied(won: float):
    chance = random.Random(1)
    state = state_of()
    applied: list[bytes] = []
    for n in range(2, 200):
        for of in range(chance.choice((1, 1, 8, WRITE_OPERATIONS_MAX))):
            id = b"%08d%08d" % (n, of)
            if chance.random() < won:
                write(state, id, insert((n, of), {}), n)
                applied.append(id)
            else:
                refuse(state, id, n)
            assert all(id in state.window for id in applied[-32:])
    assert applied[0] not in state.window
    assert len(state.window) <= WINDOW_TRANSACTIONS + 16


@pytest.mark.parametrize("before", [0, 40, 79, 80])
def test_write_of_as_many_operations_as_one_may_have_forgets_none_of_its_own(before: int):
    state = state_of()
    for n in range(before):
        write(state, n.to_bytes(16, "big"), insert((n,), {}), n + 2)
    base = state.ballot
    ids = [b"b" + n.to_bytes(15, "big") for n in range(WRITE_OPERATIONS_MAX)]
    for id in ids:
        assert group.recall(state, id, base, 0) is None
        refuse(state, id, 500)
    assert all(id in state.window for id in ids)
    assert state.floor <= base


def test_floor_without_an_applied_one_beside_it_stands_for_both():
    delta = {}
    group.pin_floor(GroupState({}, ZERO, ballot(7)), delta)
    state = GroupState({}, ballot(8))
    state.apply(delta)
    assert (state.floor, state.applied_floor) == (ballot(7), ballot(7))
    with pytest.raises(Indeterminate):
        group.recall(state, b"z" * 16, ballot(6), 1)


def test_group_without_data_is_deleted_but_keeps_its_window():
    state = state_of()
    write(state, b"a" * 16, insert((1,), {}), 2)
    assert not state.deleted
    write(state, b"b" * 16, Part(KEY, changes=(Change(Op.DELETE, 1, (1,)),)), 3)
    assert state.deleted
    assert list(state.window) == [b"a" * 16, b"b" * 16]
    assert state.data() == {}


def transaction(*parts: Part, id: bytes = b"i" * 16, database: str = "db") -> Transaction:
    return Transaction(id, database, 0, parts)


@pytest.mark.parametrize(
    "wrong",
    [
        transaction(),
        transaction(insert((1,), {}), id=b"short"),
        transaction(insert((1,), {}), database=""),
        transaction(insert((1,), {}), database="other"),
        transaction(insert((1,), {}), insert((2,), {})),
        transaction(insert((1,), {}, table=-1)),
        transaction(insert((1,), {0: True})),
        transaction(insert((1,), {0: float("nan")})),
        transaction(insert((2**63,), {})),
        transaction(insert((1,), {0: [1]})),
        transaction(insert((1,), {0: b"x" * (17 * 1024 * 1024)})),
        transaction(Part(KEY, guards=(Guard(GuardKind.HAS, 1, fails_as="maybe"),))),
        transaction(Part(KEY, changes=(Change(Op.INSERT, 1, (1,), {}, {0: 1}),))),
    ],
)
def test_malformed_transaction_is_invalid(wrong):
    with pytest.raises(Invalid):
        check_transaction(wrong)


@pytest.mark.parametrize(
    ("id", "part"),
    [
        (b"short", Part(KEY)),
        (b"t" * 16, insert((None,), {}, table=-1)),
        (b"t" * 16, Part(KEY, guards=(Guard(GuardKind.HAS, -2, (1,)),))),
    ],
)
def test_step_of_a_peers_that_no_transaction_has_is_refused(id: bytes, part: Part) -> None:
    with pytest.raises(Invalid):
        check_operation(Operation(Kind.COMMIT_PRIMARY, id, part))


def test_step_of_a_peers_without_changes_is_served() -> None:
    check_operation(Operation(Kind.SETTLE, b"t" * 16, Part(KEY)))
