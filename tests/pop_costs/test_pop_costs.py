"""What a request costs does not depend on how many PoPs there are; `make pop-costs` measures up to 100 of them."""

from __future__ import annotations

import pytest

from tests.pop_costs.run import REPEATS, Costs, costs, table


@pytest.fixture(scope="module")
def measured() -> dict[int, Costs]:
    return {pops: costs(pops) for pops in (3, 6, 10)}


def each(measured: dict[int, Costs], name: str) -> set[tuple[float, float]]:
    """(messages between PoPs, round trips between PoPs that were waited for) of every single operation."""
    return {(cost.far, cost.far_trips) for one in measured.values() for cost in one.of[name]}


def test_write_at_home_leaves_the_pop_in_none_of_the_sizes(measured: dict[int, Costs]) -> None:
    assert each(measured, "write") == each(measured, "write_forwarded") == {(0.0, 0.0)}
    for one in measured.values():
        assert {(cost.near, cost.near_trips) for cost in one.of["write"]} == {(4.0, 1.0)}
        assert {(cost.near, cost.near_trips) for cost in one.of["write_forwarded"]} == {(6.0, 2.0)}


def test_far_read_and_far_write_are_one_round_trip_between_pops_in_each_size(measured: dict[int, Costs]) -> None:
    assert each(measured, "far_read") == each(measured, "far_write") == each(measured, "local_again") == {(2.0, 1.0)}
    for one in measured.values():
        assert max(cost.near for cost in one.of["far_read"]) <= 4.0
        assert max(cost.near for cost in one.of["far_write"]) <= 6.0


def test_local_row_is_asked_of_all_of_few_pops_and_of_the_hinted_one_of_many(measured: dict[int, Costs]) -> None:
    """Of many PoPs all are asked only for what is nowhere."""
    assert {pops: one.searched for pops, one in measured.items()} == {3: 4 * REPEATS, 6: 4 * REPEATS, 10: 2 * REPEATS}


def test_table_has_a_column_for_each_size(measured: dict[int, Costs]) -> None:
    head = table(list(measured.values())).split("\n")[0]
    assert head == "| operation | 3 PoPs, 30 nodes | 6 PoPs, 60 nodes | 10 PoPs, 100 nodes |"
