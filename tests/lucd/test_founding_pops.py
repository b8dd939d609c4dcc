"""Nodes of new PoPs: the first founds its PoP's domain, whatever starts beside it; nobody founds one twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster
from tests.laboratory import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("founding"), nodes=1) as started:
        yield started


def started(cluster: Cluster, pop: str, bootstrap: LocalNode | None = None) -> LocalNode:
    node = cluster.add(pop, [(bootstrap or cluster.nodes[0]).address])
    node.start(wait_ready=False)
    return node


def test_two_nodes_that_start_together_in_a_new_pop_are_of_one_domain(cluster: Cluster) -> None:
    both = [started(cluster, "lyon") for _ in range(2)]
    for node in both:
        node.wait_ready()
    wait_until(lambda: [node.status()["members"] for node in both] == [2, 2], 30.0, "they do not find each other")
    assert sum("founded domain lyon, the first of PoP lyon" in node.log_text() for node in both) == 1


def test_pop_is_founded_through_a_node_of_any_pop(cluster: Cluster) -> None:
    through = started(cluster, "nice")
    through.wait_ready()
    late = started(cluster, "nantes", bootstrap=through)
    late.wait_ready()
    assert late.status()["members"] == 1
    assert late.store().homes() == cluster.nodes[0].store().homes()


def test_founder_that_starts_again_is_what_it_was(cluster: Cluster) -> None:
    node = started(cluster, "metz")
    node.wait_ready()
    node.store().create_database("kept")
    node.kill()
    node.start()
    assert node.status()["members"] == 1
    assert cluster.nodes[0].store().homes()["kept"] == "metz"


def test_pop_whose_founder_is_gone_is_not_founded_again(cluster: Cluster) -> None:
    first = started(cluster, "brest")
    first.wait_ready()
    founder = first.status()["node_id"]
    first.kill()
    second = started(cluster, "brest")
    why = f"PoP brest was founded by node {founder}, and no node of it is known here: start one"
    wait_until(lambda: why in second.log_text(), 60.0, "the second does not say what it waits for")
    assert second.status()["ready"] is False
    first.start()
    second.wait_ready()
    wait_until(lambda: first.status()["members"] == 2, 30.0, "the second does not join")
