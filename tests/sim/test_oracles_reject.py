"""Each oracle alone, on the smallest history that is wrong for it and on the same one put right."""

from __future__ import annotations

from dht.model import (
    ZERO,
    Change,
    Comparison,
    Constraint,
    FindQuery,
    FindResult,
    FoundRow,
    GroupKey,
    Op,
    Part,
    Transaction,
)
from dht.rows import encode_row, row_key
from dht.sim import oracles
from dht.sim.history import APPLIED, REFUSED, UNKNOWN, Commit, Content, Draw, Find, History, Raise, Read
from dht.sim.workload import BAG, DATABASE, ENTRY, LIST, OWNER, bag_group, entry_group, list_group, owner_group

A, B = list_group(0), list_group(1)


def listed(text: str) -> Content:
    return frozenset({((LIST, (0,)), frozenset({(0, text)}))})


def read(key: GroupKey, text: str, call: int, ret: int) -> Read:
    return Read("r", key, call, ret, listed(text))


def append(
    number: int, call: int, ret: int | None, *parts: tuple[GroupKey, str, str], outcome: str = APPLIED
) -> Commit:
    """Each part: group, list before, element."""
    made = tuple(Part(key, None, (Change(Op.UPDATE, LIST, (0,), {0: old + new}, {0: old}),)) for key, old, new in parts)
    return Commit("w", Transaction(number.to_bytes(16, "big"), DATABASE, 1, made), call, ret, outcome)


def created(number: int, call: int, ret: int, key: GroupKey) -> Commit:
    part = Part(key, None, (Change(Op.INSERT, LIST, (0,), {0: ""}),))
    return Commit("w", Transaction(number.to_bytes(16, "big"), DATABASE, 1, (part,)), call, ret, APPLIED)


def test_linearizable_read_that_began_after_a_write_and_misses_it_is_rejected() -> None:
    write = append(2, 3, 4, (A, "", "x,"))
    right = History(commits=[created(1, 1, 2, A), write], reads=[read(A, "x,", 5, 6)])
    assert oracles.linearizable(right) == ([], 0)
    stale = History(commits=right.commits, reads=[read(A, "", 5, 6)])
    (violation,), _ = oracles.linearizable(stale)
    assert "not linearizable" in violation


def test_linearizable_second_of_two_commits_on_the_same_version_is_rejected() -> None:
    """First committer wins: both extended the empty list, and both were told that they did."""
    both = [created(1, 1, 2, A), append(2, 3, 6, (A, "", "x,")), append(3, 4, 5, (A, "", "y,"))]
    assert oracles.linearizable(History(commits=both))[0]
    both[2].outcome = REFUSED
    assert oracles.linearizable(History(commits=both)) == ([], 0)


def test_linearizable_write_told_refused_although_it_would_have_passed_is_rejected() -> None:
    refused = append(2, 3, 4, (A, "", "x,"), outcome=REFUSED)
    assert oracles.linearizable(History(commits=[created(1, 1, 2, A), refused]))[0]


def test_appends_two_versions_of_which_none_is_a_prefix_are_a_fork() -> None:
    history = History(reads=[read(A, "x,y,", 1, 2), read(A, "x,z,", 3, 4)])
    assert any("fork" in violation for violation in oracles.appends(history, LIST, 0))
    assert oracles.appends(History(reads=[read(A, "x,", 1, 2), read(A, "x,z,", 3, 4)]), LIST, 0) == []


def test_appends_shorter_list_after_a_longer_one_is_a_lost_write() -> None:
    history = History(reads=[read(A, "x,y,", 1, 2), read(A, "x,", 3, 4)])
    assert any("was seen after" in violation for violation in oracles.appends(history, LIST, 0))
    overlapping = History(reads=[read(A, "x,y,", 1, 4), read(A, "x,", 3, 5)])
    assert oracles.appends(overlapping, LIST, 0) == []


def test_fractured_two_lists_that_order_two_transactions_differently_are_a_cycle() -> None:
    first = append(1, 1, 4, (A, "", "x,"), (B, "y,", "x2,"))
    second = append(2, 2, 3, (A, "x,", "y1,"), (B, "", "y,"))
    history = History(commits=[first, second], reads=[read(A, "x,y1,", 5, 6), read(B, "y,x2,", 5, 6)])
    (violation,) = oracles.fractured(history, LIST, 0)
    assert "cycle" in violation
    agreeing = History(
        commits=[append(1, 1, 2, (A, "", "x,"), (B, "", "x2,")), append(2, 3, 4, (A, "x,", "y,"), (B, "x2,", "y2,"))],
        reads=[read(A, "x,y,", 5, 6), read(B, "x2,y2,", 5, 6)],
    )
    assert oracles.fractured(agreeing, LIST, 0) == []


def test_atomic_transaction_in_one_of_its_two_lists_is_torn() -> None:
    history = History(commits=[append(1, 1, None, (A, "", "x,"), (B, "", "x2,"), outcome=UNKNOWN)])
    torn = oracles.atomic(history, {A: listed("x,"), B: listed("")}, LIST, 0)
    assert [("stands in 1 of its 2 lists" in violation) for violation in torn] == [True]
    for whole in ({A: listed("x,"), B: listed("x2,")}, {A: listed(""), B: listed("")}):
        assert oracles.atomic(history, whole, LIST, 0) == []


def test_atomic_acknowledged_transaction_that_is_nowhere_is_lost() -> None:
    history = History(commits=[append(1, 1, 2, (A, "", "x,"))])
    (violation,) = oracles.atomic(history, {A: listed("")}, LIST, 0)
    assert "was acknowledged and is gone" in violation


def test_atomic_refused_transaction_that_stands_is_reported() -> None:
    history = History(commits=[append(1, 1, 2, (A, "", "x,"), outcome=REFUSED)])
    (violation,) = oracles.atomic(history, {A: listed("x,")}, LIST, 0)
    assert "certainly not applied and stands" in violation


def owner(i: int, name: str) -> Content:
    return frozenset({((OWNER, (i,)), frozenset({(0, name)}))})


def entry(name: str, i: int) -> Content:
    return frozenset({((ENTRY, (name,)), frozenset({(0, i)}))})


def test_unique_entries_value_of_two_rows_and_entry_without_row_are_reported() -> None:
    right = {owner_group(1): owner(1, "a"), entry_group("a"): entry("a", 1)}
    assert oracles.unique_entries(right, OWNER, 0, ENTRY) == []
    twice = {**right, owner_group(2): owner(2, "a")}
    assert any("is in 2 rows" in violation for violation in oracles.unique_entries(twice, OWNER, 0, ENTRY))
    orphan = {**right, entry_group("b"): entry("b", 2)}
    assert any("which has it not" in violation for violation in oracles.unique_entries(orphan, OWNER, 0, ENTRY))
    missing = {owner_group(1): owner(1, "a")}
    assert any("its entry names None" in violation for violation in oracles.unique_entries(missing, OWNER, 0, ENTRY))


def test_sequences_repeated_id_id_not_above_and_id_below_a_raise_are_reported() -> None:
    ids = ("db", "ids")
    right = [Draw("c", 0, ids, 5, 0, 1, 2, 1), Draw("c", 0, ids, 1, 5, 3, 4, 6)]
    assert oracles.sequences(History(draws=right)) == []
    assert oracles.sequences(History(draws=[*right, Draw("d", 1, ids, 1, 0, 5, 6, 5)]))
    assert oracles.sequences(History(draws=[Draw("c", 0, ids, 1, 9, 1, 2, 9)]))
    raised = Raise("c", 0, ids, 50, 1, 2, True)
    assert oracles.sequences(History(draws=[Draw("d", 0, ids, 1, 0, 3, 4, 7)], raises=[raised]))


def test_finds_row_committed_before_it_and_missing_and_row_of_nobody_are_reported() -> None:
    key = bag_group(0)
    columns = {0: "red", 10: 1}
    part = Part(key, None, (Change(Op.INSERT, BAG, (1,), columns),))
    commit = Commit("w", Transaction(b"t" * 16, DATABASE, 1, (part,)), 1, 2, APPLIED)
    query = FindQuery(DATABASE, BAG, 1, (Constraint(0, Comparison.EQ, ("red",)),))

    def told(*pks: int, call: int = 3) -> list[str]:
        rows = tuple(FoundRow(key, ZERO, row_key(BAG, (pk,)), encode_row(columns)) for pk in pks)
        return oracles.finds(History(commits=[commit], finds=[Find("f", query, call, 9, FindResult(rows, ()))]))

    assert told(1) == []
    assert any("settled as" in violation for violation in told())
    assert any("nobody wrote" in violation for violation in told(1, 2))
    assert told(call=1) == []  # it began before the commit had returned
