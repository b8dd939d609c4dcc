"""oslo.messaging through real daemons of two PoPs, two in each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster
from tests.laboratory import wait_until
from tests.oslo_bus import Clients, Served, ThreadWorker, oslo_messaging

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
ASKER, NEAR, FAR, FARTHER = range(4)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("bus"), nodes=2) as started:
        started.add("lyon", [started.nodes[0].address]).start()
        # The bus does not wait for what a new member has to copy.
        started.add("lyon", [started.nodes[0].address]).start(wait_ready=False)
        wait_until(
            lambda: started.nodes[FAR].status()["members"] == 2, 30.0, "the nodes of lyon do not find each other"
        )
        yield started


@pytest.fixture(autouse=True)
def _quick_worker_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's wait() lasts until its idle worker threads look up, by default after a second."""
    monkeypatch.setattr(ThreadWorker, "MAX_IDLE_FOR", 0.05)


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = Clients()
    yield made
    made.close()


@contextlib.contextmanager
def served(cluster: Cluster, bus: str = "") -> Iterator[list[Served]]:
    """A server of the topic on each host, named host0 and so on."""
    with contextlib.ExitStack() as stack:
        servers = [Served(node.socket, f"host{n}", bus=bus) for n, node in enumerate(cluster.nodes)]
        yield [stack.enter_context(server) for server in servers]


def listeners_of(cluster: Cluster, number: int) -> int:
    return int(cluster.nodes[number].status()["counters"]["bus"]["listeners"])


def test_server_is_reached_on_whichever_host_by_whomever(cluster: Cluster, clients: Clients) -> None:
    with served(cluster):
        for node in cluster.nodes:
            asked = clients.of(node.socket)
            for n in range(len(cluster.nodes)):
                assert asked.prepare(server=f"host{n}").call({}, "ask") == f"host{n}"


def test_topic_is_asked_nearby_casts_come_once_and_fanouts_to_all(cluster: Cluster, clients: Clients) -> None:
    with served(cluster) as servers:
        asked = clients.of(cluster.nodes[ASKER].socket)
        assert {asked.call({}, "ask") for _ in range(5)} == {"host0"}
        asked.prepare(fanout=True).cast({}, "ask", n=77)
        wait_until(lambda: all(77 in server.got for server in servers), 30.0, "the fanout does not come")
        for n in range(100, 120):
            asked.prepare(server="host3").cast({}, "ask", n=n)
        wait_until(lambda: len(servers[FARTHER].got) >= 21, 30.0, "the casts do not come")
        time.sleep(0.5)
        assert sorted(servers[FARTHER].got) == [77, *range(100, 120)]
        assert all(server.got.count(77) == 1 for server in servers)


def test_other_hosts_and_pops_serve_a_topic_that_has_no_server_here(cluster: Cluster, clients: Clients) -> None:
    asked = clients.of(cluster.nodes[ASKER].socket, topic="far")

    def answering(known: set[str]) -> bool:
        """Whether the next twenty answers come from all of them; a loaded host may hear late of who listens."""
        return {asked.call({}, "ask") for _ in range(20)} == known

    with Served(cluster.nodes[FAR].socket, "a", "far"), Served(cluster.nodes[FARTHER].socket, "b", "far"):
        wait_until(lambda: answering({"a", "b"}), 30.0, "the other PoP's hosts do not take turns")
        with Served(cluster.nodes[NEAR].socket, "near", "far"):
            wait_until(lambda: answering({"near"}), 30.0, "another PoP is asked although there is a server nearby")


def test_cells_do_not_mix(cluster: Cluster, clients: Clients) -> None:
    with served(cluster, bus="cell1"):
        one = clients.of(cluster.nodes[ASKER].socket, bus="cell1")
        assert one.prepare(server="host3").call({}, "ask") == "host3"
        with pytest.raises(oslo_messaging.MessagingTimeout):
            clients.of(cluster.nodes[ASKER].socket, bus="cell2", timeout_s=0.5).call({}, "ask")


def test_call_before_its_server_is_there_waits_for_it(cluster: Cluster, clients: Clients) -> None:
    answers = []
    asked = clients.of(cluster.nodes[ASKER].socket, topic="late", timeout_s=30)
    thread = threading.Thread(target=lambda: answers.append(asked.call({}, "ask")))
    thread.start()
    time.sleep(0.5)
    with Served(cluster.nodes[FAR].socket, "late", "late") as late:
        thread.join(40)
        assert answers == ["late"]
        assert len(late.got) == 1


@pytest.mark.parametrize("victim", [NEAR, FARTHER])
def test_server_whose_daemon_is_killed_times_out_is_not_asked_twice_and_is_found_again(
    cluster: Cluster, clients: Clients, victim: int
) -> None:
    errors = []

    def ask() -> None:
        with pytest.raises(oslo_messaging.MessagingTimeout) as caught:
            clients.of(cluster.nodes[ASKER].socket, topic="dying", timeout_s=120).call({}, "hang")
        errors.append(str(caught.value))

    with Served(cluster.nodes[victim].socket, "dying", "dying") as dying:
        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: dying.got == ["hang"], 30.0, "the call does not come")
        cluster.nodes[victim].kill()
        cluster.nodes[victim].start(wait_ready=False)
        thread.join(90)
        assert errors, "the caller is not told"
        dying.go_on.set()
        # The server has subscribed again by itself.
        wait_until(lambda: listeners_of(cluster, victim) == 1, 30.0, "the server does not subscribe again")
        asked = clients.of(cluster.nodes[ASKER].socket, topic="dying", timeout_s=20)
        assert asked.prepare(server="dying").call({}, "ask", n=5) == "dying"
        assert dying.got == ["hang", 5]
        counters = cluster.nodes[ASKER].status()["counters"]
        assert counters["reach"]["far_calls"] == counters["bus"]["queued_bytes"] == 0
