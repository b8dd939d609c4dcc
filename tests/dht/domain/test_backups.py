"""Who backs up whom: other PoPs, few of which change when PoPs come and go."""

from __future__ import annotations

import pytest

from dht.domain.backups import backups_of, followed_by
from dht.model import GLOBAL

POPS = [f"pop{i}" for i in range(20)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_backups_are_so_many_other_pops_and_each_of_them_follows(count: int) -> None:
    for pop in POPS:
        backups = backups_of(pop, POPS, count)
        assert len(set(backups)) == count
        assert pop not in backups
        assert all(pop in followed_by(backup, POPS, count) for backup in backups)
    assert sum(len(followed_by(pop, POPS, count)) - 1 for pop in POPS) == count * len(POPS)


def test_backups_of_two_pops_are_each_other() -> None:
    assert backups_of("a", ["a", "b"], 2) == ("b",)
    assert followed_by("a", ["a", "b"], 1) == (GLOBAL, "b")


def test_backups_pop_that_is_alone_follows_nothing() -> None:
    assert backups_of("a", ["a"], 1) == ()
    assert followed_by("a", ["a"], 1) == ()


def test_backups_pop_more_moves_few_copies() -> None:
    before = {pop: backups_of(pop, POPS, 1) for pop in POPS}
    after = {pop: backups_of(pop, [*POPS, "new"], 1) for pop in POPS}
    moved = [pop for pop in POPS if before[pop] != after[pop]]
    assert all(after[pop] == ("new",) for pop in moved)
    assert len(moved) < len(POPS) / 3
