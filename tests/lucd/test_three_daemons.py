"""Three real daemons: joining, replication, kill -9 of one and of all, and who is kept out."""

from __future__ import annotations

import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dht.errors import Conflict, DhtError
from lucd import directory, messages
from lucd.demo.daemons import LocalNode, free_port
from tests.cluster import Cluster
from tests.faults.load import Standstills
from tests.lucd.test_one_daemon import inserted, text_of, updated

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("three"), nodes=3) as started:
        started.nodes[0].store().create_database("d")
        yield started


PAUSE_MAX_S = 10.0
"""Only catches hangs: the machine of a test run is a busy one."""


def eventually(what: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return when it is the case."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never was the case"
        time.sleep(0.05)


class Load:
    """Threads that write through some of the daemons until told to stop; remembers what was acknowledged."""

    def __init__(self, nodes: list[LocalNode], first: int) -> None:
        self.acknowledged: dict[int, str] = {}
        self.errors: list[str] = []
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(node, first + 1000 * number))
            for number, node in enumerate(nodes)
        ]

    def _write(self, node: LocalNode, number: int) -> None:
        store = node.store()
        while not self._stop.is_set():
            began_s = time.monotonic()
            try:
                store.commit(inserted(number, "new"))
                store.commit(updated(number, "new", "old"))
                self.acknowledged[number] = "old"
            except DhtError as error:
                self.errors.append(f"{type(error).__name__}: {error.message}")
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            number += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Return when that many more writes were acknowledged."""
        goal = len(self.acknowledged) + more
        eventually(lambda: len(self.acknowledged) >= goal)

    def missing(self, node: LocalNode) -> list[int]:
        """What was acknowledged and is not read through the node."""
        return [number for number, text in self.acknowledged.items() if text_of(node.store(), number) != text]


def test_joined_nodes_are_voters_and_hold_every_tablet(cluster: Cluster) -> None:
    for node in cluster.nodes:
        reply = node.client().call(messages.AskDomain())
        assert isinstance(reply, messages.DomainReply)
        assert {line.role for line in reply.members} == {"voter"}
        assert all(len(tablet.replicas) == 3 and tablet.serving for tablet in reply.tablets)
        assert reply.survivable == ("node", "failure_domain")
    status = cluster.nodes[0].status()
    assert status["warnings"] == []


def test_write_on_one_is_read_on_all(cluster: Cluster) -> None:
    for number, node in enumerate(cluster.nodes):
        node.store().commit(inserted(number, "x"))
        assert [text_of(other.store(), number) for other in cluster.nodes] == ["x"] * 3


def test_guard_holds_across_daemons(cluster: Cluster) -> None:
    first, second, _ = cluster.nodes
    first.store().commit(inserted(50, "a"))
    second.store().commit(updated(50, "a", "b"))
    with pytest.raises(Conflict):
        first.store().commit(updated(50, "a", "c"))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_kill_of_one_loses_nothing_and_the_others_go_on(cluster: Cluster, victim: int) -> None:
    others = [node for number, node in enumerate(cluster.nodes) if number != victim]
    standstills = Standstills(others)
    with Load(others, 10_000 * (victim + 1)) as load:
        load.wait_for(20)
        cluster.nodes[victim].kill()
        time.sleep(2.0)
        load.wait_for(20)
        cluster.nodes[victim].start()
        load.wait_for(20)
    assert standstills.unexplained(load.errors) == []
    assert load.longest_s < PAUSE_MAX_S
    cluster.wait_whole()
    for node in cluster.nodes:
        assert load.missing(node) == []


def test_restarted_node_alone_with_one_other_serves_what_it_missed(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    third.kill()
    for number in range(500, 520):
        first.store().commit(inserted(number, "while you were away"))
    third.start()
    cluster.wait_whole()
    first.kill()
    assert [text_of(third.store(), number) for number in range(500, 520)] == ["while you were away"] * 20
    second.store().commit(inserted(530, "two of three"))
    first.start()
    cluster.wait_whole()


def test_kill_of_all_at_once_loses_nothing_acknowledged(cluster: Cluster) -> None:
    with Load(cluster.nodes, 100_000) as load:
        load.wait_for(20)
        for node in cluster.nodes:
            node.kill()
        load._stop.set()
    cluster.start_together()
    for node in cluster.nodes:
        assert load.missing(node) == []


def test_majority_gone_reads_and_writes_are_refused_not_wrong(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    second.kill()
    third.kill()
    with pytest.raises(DhtError) as caught:
        first.store(2.0).commit(inserted(700, "alone"), timeout_s=2.0)
    assert caught.value.code in ("unavailable", "indeterminate")
    eventually(lambda: first.get("/readyz")[0] == 503)
    assert first.get("/livez")[0] == 200
    cluster.start_together()
    assert text_of(first.store(), 700) in (None, "alone")


def test_full_disk_of_one_stops_its_votes_and_nothing_else(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    # As small a file as a file can be: the next write fails like one on a full disk.
    resource.prlimit(third.pid, resource.RLIMIT_FSIZE, (1, 1))
    for number in range(800, 830):
        [first, second][number % 2].store().commit(inserted(number, "kept"))
    eventually(lambda: third.get("/readyz")[0] == 503)
    status = third.status()
    assert "store.sqlite" in status["state"]
    assert status["warnings"][0] == status["state"]
    with Load([third], 40_000) as load:
        time.sleep(1.0)
    assert all("Unavailable" in e or "Storage" in e or "Indeterminate" in e for e in load.errors), load.errors
    assert load.missing(first) == []
    third.kill()
    third.start()
    cluster.wait_whole()
    assert [text_of(third.store(), number) for number in range(800, 830)] == ["kept"] * 30


def test_node_with_another_port_is_listed_at_it_in_both_domains(cluster: Cluster) -> None:
    moved, other = cluster.nodes[0], cluster.nodes[1]
    moved.close_clients()
    moved.stop()
    moved.port = free_port()
    moved.write_config()
    moved.start()

    def listed(domain: str) -> bool:
        reply = other.client().call(messages.AskDomain(domain), repeatable=True)
        assert isinstance(reply, messages.DomainReply)
        return moved.address in {member.address for member in reply.members if member.reachable}

    eventually(lambda: listed("") and listed("global"))
    cluster.wait_whole()


def test_rolled_back_directory_is_kept_out_and_says_so(cluster: Cluster) -> None:
    third = cluster.nodes[2]
    assert third.stop() == 0
    backup = third.path / "backup"
    shutil.copytree(third.data_dir, backup)
    third.start()
    cluster.wait_whole()
    cluster.nodes[0].store().commit(inserted(900, "after the backup"))
    third.kill()
    newer = third.data_dir.rename(third.path / "newer")
    backup.rename(third.data_dir)
    third.start(wait_ready=False)
    eventually(lambda: "was copied or rolled back" in third.log_text())
    assert third.get("/readyz")[0] == 503
    third.kill()
    shutil.rmtree(third.data_dir)
    newer.rename(third.data_dir)
    third.start()
    cluster.wait_whole()
    assert text_of(third.store(), 900) == "after the backup"


def test_wrong_cluster_key_is_kept_out_and_says_so(cluster: Cluster, tmp_path: Path) -> None:
    stranger = cluster.add()
    cluster.nodes.remove(stranger)
    key = stranger.data_dir / "cluster.key"
    own = directory.ClusterKey.parse(key.read_text(), "key")
    key.write_text(directory.ClusterKey(own.cluster_id, bytes(32)).text() + "\n")
    try:
        stranger.start(wait_ready=False)
        eventually(lambda: "does not hold the cluster's key" in stranger.log_text())
        assert stranger.get("/readyz")[0] == 503
        assert cluster.nodes[0].status()["members"] == 3
        assert "Traceback" not in stranger.log_text()
    finally:
        stranger.stop()


def test_other_cluster_is_kept_out_and_says_so(cluster: Cluster) -> None:
    stranger = LocalNode(9, cluster.path / "other", [cluster.nodes[0].address], "pop1")
    cluster_key = directory.found(cluster.path / "elsewhere")
    stranger.make_directory(cluster_key)
    try:
        stranger.start(wait_ready=False)
        eventually(lambda: "belongs to cluster" in stranger.log_text())
        assert stranger.get("/readyz")[0] == 503
    finally:
        stranger.stop()


def test_other_pop_does_not_join_the_domain_and_founds_its_own(cluster: Cluster) -> None:
    foreigner = cluster.add(pop="rome")
    cluster.nodes.remove(foreigner)
    try:
        foreigner.start()
        eventually(lambda: "founded domain rome, the first of PoP rome" in foreigner.log_text())
        assert foreigner.status()["members"] == 1
        assert cluster.nodes[0].status()["members"] == 3
        eventually(lambda: foreigner.status()["global_domain"]["joined"])
        node_id = foreigner.status()["node_id"]
    finally:
        foreigner.stop()
    # Gone for good: of a PoP that is gone nobody is left to say so but a human.
    assert cluster.nodes[0].client(30.0).call(messages.DrainNode(node_id, lost=True)) is not None
    eventually(lambda: cluster.nodes[0].status()["global_domain"]["members"] == 3, 40.0)
    cluster.wait_whole()


def test_unreachable_bootstrap_keeps_trying_says_so_once_and_joins(cluster: Cluster) -> None:
    port = free_port()
    late = cluster.add(bootstrap=[f"localhost:{port}"], options="[limits]\nbootstrap_retry_s = 0.2\n")
    cluster.nodes.remove(late)
    try:
        late.start(wait_ready=False)
        eventually(lambda: "cannot join yet" in late.log_text())
        time.sleep(1.5)
        assert late.log_text().count("cannot join yet") == 1
        state = late.get("/readyz")
        assert state[0] == 503
        assert "joining" in state[1]
        assert late.stop() == 0
        late.bootstrap = [f"127.0.0.1:{port}", cluster.nodes[1].address]
        late.write_config()
        late.start()
        assert late.status()["members"] == 4
        drained = cluster.nodes[0].client(30.0).call(messages.DrainNode(late.status()["node_id"]))
        assert drained is not None
        eventually(lambda: cluster.nodes[0].status()["members"] == 3, 40.0)
    finally:
        late.close_clients()
        late.stop()
    cluster.wait_whole()
