"""The random search finds nothing against the rules, and finds planted bugs; `dht.sim` searches wider."""

from __future__ import annotations

import pytest

from dht.domain.rules import DomainRules
from tests.dht.domain.search import search


@pytest.mark.parametrize("seed", range(12))
def test_search_rules_hold_nothing_acknowledged_is_lost(seed: int) -> None:
    violations, acknowledged = search(seed)
    assert violations == []
    assert acknowledged > 20


@pytest.mark.parametrize("seed", range(6))
def test_search_up_to_five_replicas_nothing_acknowledged_is_lost(seed: int) -> None:
    violations, acknowledged = search(seed, pops=7)
    assert violations == []
    assert acknowledged > 20


@pytest.mark.parametrize(
    ("rules", "first"),
    [
        (DomainRules(seal=False), 0),
        (DomainRules(seal_on_accept=False), 0),
        (DomainRules(highest_ballot_wins=False), 20),
    ],
    ids=["seal", "seal_on_accept", "highest_ballot_wins"],
)
def test_search_planted_bug_is_found(rules: DomainRules, first: int) -> None:
    assert any(search(seed, rules)[0] for seed in range(first, first + 12))
