"""A PoP whose disks are gone begins anew with what another one copied; a node that was only cut off stops."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dht.errors import DhtError, Invalid
from dht.model import GLOBAL, Change, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from lucd import messages
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster
from tests.laboratory import wait_until

pytestmark = pytest.mark.cluster
KEYS = [group_key("cell", "f", (i,)) for i in range(20)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("recovered"), nodes=1) as started:
        for pop in ("nice", "lyon"):
            add(started, pop).wait_ready()
        yield started


def add(cluster: Cluster, pop: str) -> LocalNode:
    node = cluster.add(pop, [cluster.nodes[0].address])
    node.start(wait_ready=False)
    return node


def write(store: BlockingStore, key: bytes, op: Op, number: int) -> None:
    part = Part(key, None, (Change(op, 1, (1,), {0: number}),))
    store.commit(Transaction(os.urandom(16), "cell", 0, (part,)))


def read(store: BlockingStore, key: bytes) -> object:
    (found,) = store.read([key])
    (row,) = (found.rows or {}).values()
    return decode_row(row)[0]


def pops(node: LocalNode) -> dict[str, messages.PopLine]:
    reply = node.client().call(messages.AskPops())
    assert isinstance(reply, messages.PopsReply)
    return {line.name: line for line in reply.pops}


def seats(node: LocalNode) -> list[str]:
    """Those of lyon in `global`."""
    return [member.node_id for member in pops(node)["lyon"].members]


def recover(node: LocalNode, *, accept: bool, pop: str = "lyon") -> messages.RecoveryLine:
    reply = node.client().call(messages.RecoverPop(pop, accept, 60.0), timeout_s=120.0)
    assert isinstance(reply, messages.RecoverReply)
    return reply.recovery


def wait_covered(node: LocalNode, failing: str) -> None:
    """Return when a backup of lyon has whatever was written before this call."""
    written_s = time.monotonic()

    def covered() -> bool:
        # Of an age that is rounded to a tenth.
        younger_s = time.monotonic() - written_s - 0.1
        return any(0 <= line.age_s < younger_s and not line.open for line in pops(node)["lyon"].backups)

    wait_until(covered, 60.0, failing)


def test_destroyed_pop_begins_anew_on_a_new_node_and_the_old_one_stops_when_it_comes_back(cluster: Cluster) -> None:
    first, _, old = cluster.nodes
    store = old.store()
    store.create_database("cell")
    for i, key in enumerate(KEYS):
        write(store, key, Op.INSERT, i)
    ids = store.reserve_ids("cell", "s", 5)
    wait_covered(first, "nobody backs lyon up")
    assert {line.pop for line in pops(first)["lyon"].backups} <= {"pop1", "nice"}
    with pytest.raises(Invalid, match="knows domain lyon already"):
        recover(old, accept=True)
    wait_covered(first, "the backup does not go on")
    dead = str(old.status()["node_id"])
    old.kill()

    new = add(cluster, "lyon")
    wait_until(lambda: "PoP lyon was founded by node" in new.log_text(), 60.0, "it does not say what it waits for")
    with pytest.raises(Invalid, match="own"):
        recover(new, accept=True, pop="nice")
    with pytest.raises(Invalid, match="accept-data-loss"):
        recover(new, accept=False)
    line = recover(new, accept=True)
    assert any(text.startswith("every write acknowledged before ") for text in line.findings)
    assert line.generation == 2
    assert f"node {dead} was taken out of domain global: a new one takes its seat" in line.findings
    new.wait_ready()
    wait_until(lambda: seats(first) == [new.status()["node_id"]], 60.0, "the seat in global was not taken over")
    for node in (new, first):
        wait_until(lambda node=node: _reads(node), 30.0, "what was recovered cannot be read")  # type: ignore[misc]
        assert [read(node.store(), key) for key in KEYS] == list(range(len(KEYS)))
    assert new.store().reserve_ids("cell", "s", 1) >= ids + 5
    assert pops(first)["lyon"].founder == new.status()["node_id"]

    aside = "its copy is kept until the new one is complete"
    wait_until(lambda: any(aside in node.log_text() for node in cluster.nodes), 60.0, "what it began with is not kept")
    wait_covered(first, "nobody backs lyon up again")
    left = "*~before*"
    wait_until(lambda: not any(list(n.path.rglob(left)) for n in cluster.nodes), 30.0, "it is kept for ever")

    write(new.store(), KEYS[0], Op.UPDATE, 100)
    old.start(wait_ready=False)
    wait_until(
        lambda: "recovered without this node" in str(old.status().get("state")), 60.0, "the old node does not stop"
    )
    assert old.status()["ready"] is False
    assert next(old.path.rglob("store.sqlite")).stat().st_size > 0
    expected = 100
    with contextlib.suppress(DhtError):
        # It votes on nothing; what it may do is pass the write on to those that do.
        write(old.store(), KEYS[0], Op.UPDATE, 200)
        expected = 200
    assert [read(node.store(), KEYS[0]) for node in (first, new)] == [expected] * 2

    second = add(cluster, "lyon")
    second.wait_ready()
    with pytest.raises(Invalid, match="knows domain lyon already"):
        recover(second, accept=True)


def test_one_of_two_pops_is_destroyed_and_the_other_started_again_and_the_copy_is_there(
    tmp_path: Path,
) -> None:
    """`global` has no majority then; recovered, it knows the other PoP alone, which keeps the copy all the same."""
    with Cluster(tmp_path, nodes=1) as cluster:
        first, old = cluster.nodes[0], add(cluster, "lyon")
        old.wait_ready()
        old.store().create_database("cell")
        for i, key in enumerate(KEYS):
            write(old.store(), key, Op.INSERT, i)
        wait_covered(first, "nobody backs lyon up")
        old.kill()
        reply = first.client().call(messages.RecoverDomain((), True, 60.0, GLOBAL), timeout_s=120.0)
        assert isinstance(reply, messages.RecoverReply)
        first.close_clients()
        first.stop()
        first.start()
        new = add(cluster, "lyon")
        wait_until(lambda: "PoP lyon was founded by node" in new.log_text(), 60.0, "it does not say what it waits for")
        assert recover(new, accept=True).generation == 2
        new.wait_ready()
        for node in (new, first):
            wait_until(lambda node=node: _reads(node), 30.0, "what was recovered cannot be read")  # type: ignore[misc]
            assert [read(node.store(), key) for key in KEYS] == list(range(len(KEYS)))


def _reads(node: LocalNode) -> bool:
    try:
        read(node.store(), KEYS[0])
    except DhtError:
        return False
    return True
