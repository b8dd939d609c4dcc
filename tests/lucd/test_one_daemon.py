"""One real daemon: its doors, its stop and start, and what keeps it from starting."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dht.errors import Conflict, Duplicate, Invalid, NotFound
from dht.model import Change, FindQuery, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from dht.wire.blocking import SocketStore
from lucd import messages
from nova_bridge.rpc.bus_messages import Address, StopTaking, Subscribe
from tests.cluster import Cluster

pytestmark = pytest.mark.cluster
TABLE = 1


def inserted(number: int, text: str, database: str = "d") -> Transaction:
    """A transaction that makes the group of that number with one row."""
    change = Change(Op.INSERT, TABLE, (number,), {1: number, 2: text})
    return Transaction(os.urandom(16), database, 0, (Part(group_key(database, "f", (number,)), None, (change,)),))


def updated(number: int, before: str, after: str) -> Transaction:
    """A transaction that changes the row if it is as given."""
    change = Change(Op.UPDATE, TABLE, (number,), {2: after}, {2: before})
    return Transaction(os.urandom(16), "d", 0, (Part(group_key("d", "f", (number,)), None, (change,)),))


def text_of(store: BlockingStore, number: int) -> str | None:
    """The row's text as a read says now."""
    (found,) = store.read([group_key("d", "f", (number,))])
    assert found.rows is not None
    return next((str(decode_row(row)[2]) for row in found.rows.values()), None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("one"), nodes=1) as started:
        started.nodes[0].store().create_database("d")
        yield started


@pytest.fixture
def store(cluster: Cluster) -> SocketStore:
    return cluster.nodes[0].store()


def test_commit_read_find_through_the_socket(store: SocketStore) -> None:
    store.commit(inserted(1, "one"))
    assert text_of(store, 1) == "one"
    store.commit(updated(1, "one", "uno"))
    assert text_of(store, 1) == "uno"
    found = store.find(FindQuery("d", TABLE, 0))
    assert [decode_row(f.row)[1] for f in found.rows] == [1]


def test_commit_refusals_come_back_as_their_own_classes(store: SocketStore) -> None:
    store.commit(inserted(2, "two"))
    with pytest.raises(Duplicate):
        store.commit(inserted(2, "again"))
    with pytest.raises(Conflict):
        store.commit(updated(2, "three", "four"))
    with pytest.raises(NotFound):
        store.commit(inserted(3, "x", database="nowhere"))
    with pytest.raises(Invalid):
        store.commit(inserted(4, "x" * 5_000_000))
    assert text_of(store, 2) == "two"


def test_ids_are_given_out_once(store: SocketStore) -> None:
    first = store.reserve_ids("d", "t", 3)
    assert store.reserve_ids("d", "t", 1) >= first + 3
    assert store.reserve_ids("d", "t", 1, above=1000) > 1000


def test_client_that_disappears_in_the_middle_of_a_frame_harms_nobody(cluster: Cluster, store: SocketStore) -> None:
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(cluster.nodes[0].socket))
        rude.sendall(b"\x00\x00\x10\x00half")
    with socket.socket(socket.AF_UNIX) as garbage:
        garbage.connect(str(cluster.nodes[0].socket))
        garbage.sendall(os.urandom(4000))
        assert garbage.recv(100) == b""
    assert "d" in store.list_databases()
    assert cluster.nodes[0].status()["counters"]["local"]["garbage"] == 1


def test_admin_address_tells_the_state(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    assert node.get("/livez") == (200, "ok\n")
    assert node.get("/readyz") == (200, "ready\n")
    assert "lucd_disk_commits_total" in node.get("/metrics")[1]
    status = json.loads(node.get("/status")[1])
    assert status["members"] == 1
    assert any("add nodes" in warning for warning in status["warnings"])


def test_daemon_questions_over_the_socket(cluster: Cluster, store: SocketStore) -> None:
    store.commit(inserted(7, "seven"))
    where = store.client.call(messages.AskWhere(group_key("d", "f", (7,))))
    assert isinstance(where, messages.WhereReply)
    assert where.exists
    assert where.rows == 1
    with pytest.raises(NotFound, match="knows no domain mars"):
        store.client.call(messages.AskDomain("mars"))
    with pytest.raises(Invalid, match="no node id"):
        store.client.call(messages.DrainNode("me"))
    with pytest.raises(Invalid, match="last member"):
        store.client.call(messages.DrainNode(cluster.nodes[0].status()["node_id"]))


def test_socket_has_the_configured_mode(cluster: Cluster) -> None:
    assert cluster.nodes[0].socket.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_daemon_started_again_has_everything(cluster: Cluster, how: str) -> None:
    node = cluster.nodes[0]
    number = {"stop": 100, "kill": 200}[how]
    node.store().commit(inserted(number, how))
    boot = node.status()["boot"]
    listener = node.client().call(Subscribe((Address("ex", how),), False, False))
    if how == "stop":
        assert node.stop() == 0
        assert not node.socket.exists()
    else:
        node.kill()
    node.start()
    assert text_of(node.store(), number) == how
    assert node.status()["boot"] == boot + 1
    # What a client still holds of the former life names nothing of this one.
    with pytest.raises(NotFound):
        node.client().call(StopTaking(listener.listener))
    again = node.client().call(Subscribe((Address("ex", how),), False, False))
    assert abs(again.listener - listener.listener) > 1_000_000


def test_second_daemon_on_the_directory_fails_with_69(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    twin = cluster.add()
    twin.data_dir = node.data_dir
    twin.write_config()
    twin.start(wait_ready=False)
    assert twin.wait(120) == 69
    assert "in use by another lucd process" in twin.log_tail()
    cluster.nodes.remove(twin)


@pytest.mark.parametrize("port", ["port", "admin_port"])
def test_port_taken_fails_with_one_line(cluster: Cluster, port: str) -> None:
    twin = cluster.add()
    setattr(twin, port, getattr(cluster.nodes[0], port))
    twin.write_config()
    twin.start(wait_ready=False)
    assert twin.wait(120) in (64, 69)
    lines = [line for line in twin.log_text().splitlines() if line.startswith("lucd: ")]
    assert len(lines) == 1
    assert str(getattr(cluster.nodes[0], port)) in lines[0]
    assert "Traceback" not in twin.log_text()
    cluster.nodes.remove(twin)


def test_foreign_store_file_fails_with_74(cluster: Cluster, tmp_path: Path) -> None:
    twin = cluster.add()
    cluster.nodes[0].stop()
    twin.data_dir.joinpath("store.sqlite").write_bytes(cluster.nodes[0].data_dir.joinpath("store.sqlite").read_bytes())
    cluster.nodes[0].start()
    twin.start(wait_ready=False)
    assert twin.wait(120) == 74
    assert "belongs to another node" in twin.log_tail()
    cluster.nodes.remove(twin)
