"""Daemons killed or stopped under a steady load: nothing acknowledged is lost, clients of the others meet no error.

Figures are printed; run with -s to see them. PAUSE_MAX_S only catches hangs: how long a pause may be is measured, not
asserted, because the machine of a test run is a busy one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lucd import messages
from tests.cluster import Cluster
from tests.faults import stepped_clock
from tests.faults.load import Clients, Load, Standstills, assert_whole, row_group

pytestmark = pytest.mark.cluster
PAUSE_MAX_S = 10.0
STOPPED_S = 4.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("kill"), nodes=3)
    made.nodes[1].launcher = [sys.executable, stepped_clock.__file__, str(clock_of(made))]
    with made as started:
        yield started


def clock_of(cluster: Cluster) -> Path:
    """The file that says by how much the second daemon's wall clock is off."""
    return cluster.path / "clock"


@pytest.fixture(scope="module")
def load(cluster: Cluster) -> Load:
    return Load(cluster.nodes[0].store())


def coordinators(cluster: Cluster, load: Load) -> dict[str, int]:
    """Node id -> how many of the load's rows it coordinates."""
    found: dict[str, int] = {}
    for row in range(load.rows):
        reply = cluster.nodes[0].client().call(messages.AskWhere(row_group(row)))
        assert isinstance(reply, messages.WhereReply)
        found[reply.coordinator] = found.get(reply.coordinator, 0) + 1
    return found


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_kill_of_one_loses_nothing_and_others_clients_meet_no_error(cluster: Cluster, load: Load, victim: int) -> None:
    cluster.wait_whole()
    doomed = cluster.nodes[victim]
    led = coordinators(cluster, load).get(doomed.status()["node_id"], 0)
    assert led > 0
    others = [node for node in cluster.nodes if node is not doomed]
    standstills = Standstills(others)
    with Clients(load, others * 2) as safe, Clients(load, [doomed], first=4, timeout_s=2.0) as hit:
        safe.wait_for(20)
        hit.wait_for(5)
        doomed.kill()
        safe.wait_for(100)
        hit.stop()
        doomed.start()
        safe.wait_for(50)
    print(f"\nkill -9 of daemon {doomed.number}, coordinator of {led} of {load.rows} groups: {safe.said()}")
    assert standstills.unexplained(safe.errors) == []
    assert [report.wrong for report in (*safe.reports, *hit.reports)] == [[]] * 5
    assert safe.pause_s < PAUSE_MAX_S
    cluster.wait_whole()
    assert_whole(load, cluster)


def test_kill_of_all_at_once_loses_nothing_acknowledged(cluster: Cluster, load: Load) -> None:
    cluster.wait_whole()
    with Clients(load, cluster.nodes * 2, timeout_s=1.0) as clients:
        clients.wait_for(30)
        for node in cluster.nodes:
            node.kill()
    before = load.acknowledged()
    cluster.start_together()
    assert_whole(load, cluster)
    with Clients(load, cluster.nodes) as again:
        again.wait_for(5)
    print(f"\nkill -9 of all three: {clients.said()}, all of {before} counted are there")
    assert [report.wrong for report in (*clients.reports, *again.reports)] == [[]] * 9
    assert [report.errors for report in again.reports] == [[]] * 3
    assert_whole(load, cluster)


def test_stopped_daemon_is_passed_by_and_serves_nothing_stale_afterwards(cluster: Cluster, load: Load) -> None:
    cluster.wait_whole()
    hung = cluster.nodes[1]
    others = [cluster.nodes[0], cluster.nodes[2]]
    standstills = Standstills(others)
    with (
        ExitStack() as resumed,
        Clients(load, others * 2) as safe,
        Clients(load, [hung, hung], first=4, timeout_s=2 * STOPPED_S) as hit,
    ):
        hit.wait_for(5)
        hung.pause()
        resumed.callback(hung.resume)
        began = time.monotonic()
        safe.wait_for(50)
        time.sleep(max(0.0, STOPPED_S - (time.monotonic() - began)))
        resumed.close()
        # Its own clients go on by themselves, and all that they read is checked against what others wrote meanwhile.
        hit.wait_for(30)
        safe.wait_for(10)
    print(f"\ndaemon 2 stopped for {STOPPED_S:.0f} s: {safe.said()}; its own clients: {hit.said()}")
    # A retry behind the pause may be more transactions late than the group's window keeps; nothing else may come.
    errors = [error for error in safe.errors if "has since forgotten so old a transaction" not in error]
    assert standstills.unexplained(errors) == []
    assert [report.wrong for report in (*safe.reports, *hit.reports)] == [[]] * 6
    assert safe.pause_s < PAUSE_MAX_S
    cluster.wait_whole()
    assert_whole(load, cluster)


def test_clock_stepped_by_hours_is_noticed_by_nobody(cluster: Cluster, load: Load) -> None:
    cluster.wait_whole()
    with Clients(load, cluster.nodes * 2) as clients:
        for hours in (7, -7, 24 * 400, 0):
            clock_of(cluster).write_text(str(3600 * hours))
            clients.wait_for(15)
    print(f"\nclock of daemon 2 stepped by 7 hours, back by 14, forward by 400 days, and right again: {clients.said()}")
    assert [report.errors for report in clients.reports] == [[]] * 6
    assert [report.wrong for report in clients.reports] == [[]] * 6
    assert all(node.status()["ready"] for node in cluster.nodes)
    assert_whole(load, cluster)
