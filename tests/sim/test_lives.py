"""The oracles of a database that is dropped and created again, each on the smallest history that is wrong for it."""

from __future__ import annotations

import pytest

from dht.model import Change, Op, Part, Transaction
from dht.sim import lives
from dht.sim.history import (
    APPLIED,
    NOTHING,
    UNKNOWN,
    Commit,
    Content,
    Draw,
    History,
    Keeping,
    Listed,
    Missed,
    Published,
    Read,
)
from dht.sim.workload import CELL, DATABASE, LIST, cell_group

OLD, NEW = b"old", b"new"
KEY = cell_group(0)


def two_lives() -> History:
    """The old one is there from 2 to 20, the new one from 40 to 80; a moment lasts a second."""
    history = History(times_s=[float(moment) for moment in range(1, 101)])
    history.listed = [Listed("k", 1, 2, OLD), Listed("k", 20, 21, OLD)]
    history.keepings = [Keeping("k", True, 22, 25, True), Keeping("k", False, 30, 35, True)]
    history.listed += [Listed("k", 39, 40, NEW), Listed("k", 80, 81, NEW)]
    return history


def insert(value: str, call: int, ret: int | None, outcome: str = APPLIED, until_s: float = 0.0) -> Commit:
    part = Part(KEY, None, (Change(Op.INSERT, CELL, (0,), {1: value}),))
    return Commit("w", Transaction(value.encode().ljust(16), DATABASE, 1, (part,)), call, ret, outcome, 0, until_s)


def cell(value: str) -> Content:
    return frozenset({((CELL, (0,)), frozenset({(1, value)}))})


def read(value: str | None, call: int = 60, ret: int = 61) -> Read:
    return Read("r", KEY, call, ret, frozenset() if value is None else cell(value))


def judged(history: History) -> list[str]:
    violations, undecided = lives.judge(history, LIST)
    assert undecided == 0
    return violations


def test_lives_are_told_by_their_marks_and_seen_from_one_read_to_another() -> None:
    assert lives.lives(two_lives()) == [lives.Life(OLD, 2, 20), lives.Life(NEW, 40, 80)]


def test_write_acknowledged_in_the_new_life_is_there() -> None:
    history = two_lives()
    history.commits = [insert("a", 50, 51)]
    history.reads = [read("a")]
    assert judged(history) == []
    history.reads = [read(None)]
    assert any("not linearizable" in violation for violation in judged(history))


def test_write_acknowledged_in_the_old_life_is_not_seen_in_the_new_one() -> None:
    history = two_lives()
    history.commits = [insert("a", 10, 11)]
    history.reads = [read("a", 12, 13), read(None)]
    assert judged(history) == []
    history.reads = [read("a", 12, 13), read("a")]
    assert any("of another life" in violation for violation in judged(history))


@pytest.mark.parametrize(
    ("until_s", "may_be_seen"), [(19.0, False), (21.0, True)], ids=["had ended", "was still on its way"]
)
def test_write_of_unknown_outcome_is_seen_in_the_new_life_only_where_somebody_was_at_work_on_it(
    until_s: float, may_be_seen: bool
) -> None:
    history = two_lives()
    history.commits = [insert("a", 10, 15, UNKNOWN, until_s)]
    history.reads = [read("a")]
    assert (judged(history) == []) == may_be_seen


@pytest.mark.parametrize(("call", "ret"), [(10, 30), (25, 30), (25, 45)])
def test_write_whose_time_reaches_out_of_the_window_may_be_of_the_new_life_or_not(call: int, ret: int) -> None:
    history = two_lives()
    history.commits = [insert("a", call, ret)]
    for value in ("a", None):
        history.reads = [read(value)]
        assert judged(history) == []


def test_write_that_was_certainly_not_applied_is_seen_in_no_life() -> None:
    history = two_lives()
    history.commits = [insert("a", 30, 45, NOTHING)]
    history.reads = [read("a")]
    assert judged(history)


def test_read_while_the_database_is_dropped_or_created_proves_nothing() -> None:
    history = two_lives()
    history.commits = [insert("a", 10, 11)]
    history.reads = [read("a", 22, 23), read(None, 19, 22), read("a", 30, 41)]
    assert judged(history) == []


def test_database_that_is_there_is_not_told_to_be_absent() -> None:
    history = two_lives()
    history.missed = [Missed("c", "commit", 15, 22), Missed("c", "commit", 35, 41)]
    assert judged(history) == []
    history.missed = [Missed("c", "commit", 50, 51)]
    assert judged(history) == ["life 2 (40-80): told at 50-51 that there is none"]


def test_ids_repeat_in_two_lives_but_not_in_one() -> None:
    history = two_lives()
    history.published = [Published(1, 4, 5), Published(3, 42, 43)]
    first = Draw("c", 0, (DATABASE, "ids1"), 5, 0, 6, 7, 1)
    history.draws = [first, Draw("c", 0, (DATABASE, "ids1"), 5, 0, 50, 51, 1)]
    assert judged(history) == []
    history.draws = [first, Draw("c", 1, (DATABASE, "ids1"), 1, 0, 8, 9, 3)]
    assert any("overlap" in violation for violation in judged(history))


# The registry.


def registry(*keepings: Keeping, listed: tuple[Listed, ...] = ()) -> bool:
    """Whether it can be so, from a database that is there."""
    return lives.registry(History(keepings=list(keepings), listed=list(listed))) == ([], 0)


def drop(call: int, ret: int | None, changed: bool | None = True) -> Keeping:
    return Keeping("k", True, call, ret, changed)


def create(call: int, ret: int | None, changed: bool | None = True) -> Keeping:
    return Keeping("k", False, call, ret, changed)


def test_creation_that_says_exists_where_the_name_is_free_is_rejected() -> None:
    assert not registry(drop(1, 2), create(3, 4, False))
    assert registry(drop(1, 4), create(3, 5, False))
    assert registry(drop(1, 2, None), create(3, 4, False))


def test_second_creation_without_a_drop_is_rejected() -> None:
    assert not registry(create(1, 2))
    assert not registry(drop(1, 2), create(3, 4), create(5, 6))
    assert registry(drop(1, 2), create(3, 4), drop(5, 6, None), create(7, 8))


def test_drop_that_says_absent_where_the_database_is_there_is_rejected() -> None:
    assert not registry(drop(1, 2, False))
    assert registry(drop(1, 2), drop(3, 4, False))
    assert registry(drop(1, 4), create(2, 6), drop(3, 5, False))


def test_drop_that_was_acknowledged_leaves_the_name_free() -> None:
    assert not registry(drop(1, 2), listed=(Listed("r", 3, 4, OLD, dropping=True),))
    assert not registry(drop(1, 2), listed=(Listed("r", 3, 4, OLD),))
    assert registry(drop(1, 2), listed=(Listed("r", 3, 4, None),))
    assert registry(drop(1, 2, None), listed=(Listed("r", 3, 4, OLD, dropping=True), Listed("r", 5, 6, None)))


def test_two_drops_of_one_creation_are_both_done() -> None:
    assert registry(drop(1, 5), drop(2, 6), create(7, 8))
    assert registry(drop(1, 9), drop(2, 4), create(5, 6), listed=(Listed("r", 7, 8, NEW), Listed("r", 10, 11, NEW)))
    assert not registry(drop(1, 2), drop(3, 4))


def test_creation_that_is_gone_does_not_come_back() -> None:
    seen = (Listed("r", 1, 2, OLD), Listed("r", 7, 8, OLD))
    assert not registry(drop(3, 4), create(5, 6), listed=seen)
    assert not registry(drop(3, 4, None), listed=(Listed("r", 5, 6, OLD, dropping=True), seen[1]))
