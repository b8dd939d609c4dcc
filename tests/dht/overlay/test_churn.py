"""A small part of `make churn`."""

from __future__ import annotations

from tests.dht.overlay.churn import FORGET_S_MAX, churn


def test_lookups_stay_right_while_half_of_the_nodes_are_replaced() -> None:
    outcome = churn(nodes=20, minutes=0.5, seed=2)
    assert outcome.wrong == []
    assert outcome.replaced == 8
    assert outcome.moved == 2
    assert outcome.forget_s < FORGET_S_MAX
