"""Messages are exact in virtual time: a write and a read cost as many in a large PoP as in a small one."""

import pytest

from dht.sim.costs import Costs, costs, page, table


@pytest.fixture(scope="module")
def measured() -> dict[int, Costs]:
    return {nodes: costs(nodes) for nodes in (3, 10, 50)}


def test_write_of_one_group_costs_the_same_messages_at_50_nodes_as_at_3(measured: dict[int, Costs]) -> None:
    assert [one.write.messages for one in measured.values()] == [4.0] * 3
    assert [one.forwarded.messages for one in measured.values()] == [6.0] * 3
    assert len({round(one.write.bytes, -1) for one in measured.values()}) == 1


def test_read_of_one_group_costs_the_same_messages_at_50_nodes_as_at_10(measured: dict[int, Costs]) -> None:
    assert [one.read.messages for one in measured.values()] == [2.0] * 3
    assert [one.read_elsewhere.messages for one in measured.values()] == [2.0, 4.0, 4.0]


def test_find_asks_each_node_at_most_once(measured: dict[int, Costs]) -> None:
    for nodes, one in measured.items():
        assert one.find.messages <= 2 * nodes


def test_page_has_a_line_for_each_size(measured: dict[int, Costs]) -> None:
    text = page(table(list(measured.values())))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()] == [
        "3",
        "10",
        "50",
    ]
