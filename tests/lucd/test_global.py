"""Domain `global` in one PoP of four: who is no member serves it through those that are, and takes a free place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from dht.model import GLOBAL, Change, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from lucd.cli.main import main
from tests.cluster import Cluster, LocalNode
from tests.laboratory import wait_until

pytestmark = pytest.mark.cluster
KEY = group_key("shared", "f", (1,))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("global"), nodes=4) as started:
        yield started


def onlooker(cluster: Cluster) -> LocalNode:
    (found,) = [node for node in cluster.nodes if not node.status()["global_domain"]["joined"]]
    return found


def write(store: BlockingStore, number: int, op: Op = Op.UPDATE) -> None:
    change = Change(op, 1, (1,), {0: number})
    store.commit(Transaction(os.urandom(16), "shared", 0, (Part(KEY, None, (change,)),)))


def read(store: BlockingStore) -> object:
    (found,) = store.read([KEY])
    (row,) = (found.rows or {}).values()
    return decode_row(row)[0]


def test_three_of_four_nodes_are_members_and_all_serve_what_lives_there(cluster: Cluster) -> None:
    outside = onlooker(cluster).store()
    assert outside.create_database("shared", home=GLOBAL) is True
    write(outside, 1, Op.INSERT)
    for number, node in enumerate(cluster.nodes, 2):
        write(node.store(), number)
        assert [read(other.store()) for other in cluster.nodes] == [number] * 4
    assert [(pop, claim.index) for pop, claim in outside.pops().items()] == [("pop1", 0)]


def test_what_is_at_home_in_the_pop_asks_global_nothing(cluster: Cluster) -> None:
    node = onlooker(cluster)
    node.store().create_database("own")
    part = Part(group_key("own", "f", (1,)), None, (Change(Op.INSERT, 1, (1,), {0: 1}),))
    before = node.status()["counters"]
    node.store().commit(Transaction(os.urandom(16), "own", 0, (part,)))
    for _ in range(20):
        node.store().read([part.key])
    after = node.status()["counters"]
    assert after["homes"]["passed_on"] == before["homes"]["passed_on"]
    assert after["global_store"] == before["global_store"]


def test_global_is_shown_by_every_node(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for node in cluster.nodes:
        main(["domain", "show", GLOBAL, "-f", "json", "--socket", str(node.socket)])
        shown = json.loads(capsys.readouterr().out)
        assert (shown["name"], len(shown["members"]), len(shown["tablets"])) == (GLOBAL, 3, 16)
    assert f"lucd_global_joined {float(node.status()['global_domain']['joined'])}" in node.get("/metrics")[1]


def test_drained_node_leaves_both_domains_and_another_takes_its_place(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = onlooker(cluster)
    leaving = next(node for node in cluster.nodes[1:] if node is not outside)
    node_id = leaving.status()["node_id"]
    write(cluster.nodes[0].store(), 50)
    main(["node", "drain", node_id, "--timeout", "60", "--socket", str(cluster.nodes[0].socket)])
    assert "left the roster; stop it" in capsys.readouterr().out
    leaving.close_clients()
    leaving.stop()
    cluster.nodes.remove(leaving)
    wait_until(lambda: outside.status()["global_domain"]["joined"], 30.0, "nobody takes the free place")
    cluster.wait_whole()
    assert [read(node.store()) for node in cluster.nodes] == [50] * 3
    killed = next(node for node in cluster.nodes[1:] if node is not outside)
    killed.kill()
    write(outside.store(), 51)
    assert read(cluster.nodes[0].store()) == 51
