"""All orders with one deviation in the smallest cases; `make explore` goes further."""

import pytest

from dht.sim.explore import CASES, EXPLORED, explore


@pytest.mark.parametrize("name", CASES)
def test_case_with_every_single_deviation_has_no_violation(name: str) -> None:
    found = explore(CASES[name], 1)
    assert found.violations == [], found.story
    assert found.complete
    assert found.runs > 20


@pytest.mark.parametrize("rule", EXPLORED)
def test_planted_bug_is_found_by_one_deviation(rule: str) -> None:
    found = explore(CASES[EXPLORED[rule]], 1, (rule,))
    assert found.violations
    assert found.story


def test_exploration_without_deviations_is_one_run() -> None:
    found = explore(CASES["two-writers"], 0)
    assert (found.runs, found.complete, found.violations) == (1, True, [])
