"""The random search finds no row that a fence let slip, and finds one when a rule is switched off."""

from __future__ import annotations

import pytest

from tests.sim.fence_search import search


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_search_no_row_slips_through_a_fence(seed: int) -> None:
    assert search(seed) == []


def test_search_without_the_rules_a_row_slips() -> None:
    off = ("fence_settles_groups", "version_with_promise")
    assert any(search(seed, *off) for seed in range(1, 21))
