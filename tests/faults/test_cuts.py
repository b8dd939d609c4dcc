"""Three daemons on hosts of their own, and a network that loses what it is told, under a steady load at all three.

The side with the majority goes on; the other refuses at once and says why, and shows nothing old; after the heal all
replicas are alike. Figures are printed; run with -s to see them. What is asserted of times only catches hangs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest

from dht.errors import Unavailable
from dht.model import FindQuery, Op
from tests.faults.kill_run import KillRun
from tests.faults.load import DATABASE, FIRST_COLUMN, TABLE, Clients, Load, assert_whole, changed, counters
from tests.faults.replicas import differing
from tests.laboratory import Laboratory, LaboratoryCluster, wait_until

pytestmark = pytest.mark.cluster
CUT_S = 4.0
"""Longer than a silent link lasts."""
SHORT_CUT_S = 2.0
HANG_S = 10.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaboratoryCluster]:
    try:
        Laboratory(1).close()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"cuts need network namespaces: {error}")
    with LaboratoryCluster(tmp_path_factory.mktemp("cuts"), nodes=3) as started:
        yield started


@pytest.fixture(scope="module")
def load(cluster: LaboratoryCluster) -> Load:
    return Load(cluster.nodes[0].store())


def refusals(cluster: LaboratoryCluster, number: int) -> dict[str, float]:
    """Seconds in which a daemon refuses each kind of question with the reason and what to do."""
    store = cluster.nodes[number].store(2 * HANG_S)
    asked = {
        "write": lambda: store.commit(changed(0, Op.UPDATE, {FIRST_COLUMN + 7: 1}, {})),
        "read": lambda: counters(store, 0),
        "find": lambda: store.find(FindQuery(DATABASE, TABLE, 0)),
    }
    took = {}
    for kind, ask in asked.items():
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match=r"hears 1, it takes .* this host is cut off: mend its network"):
            ask()
        took[kind] = time.monotonic() - began_s
    return took


def beyond_the_window(clients: Clients) -> list[str]:
    """Errors but for one: on a loaded machine a retry may come more transactions late than the group's window keeps."""
    errors = [error for report in clients.reports for error in report.errors]
    return [error for error in errors if "has since forgotten so old a transaction" not in error]


def test_cut_off_daemon_refuses_while_the_others_go_on_and_is_like_them_after_the_heal(
    cluster: LaboratoryCluster, load: Load
) -> None:
    cluster.wait_whole()
    lonely, others = cluster.nodes[2], cluster.nodes[:2]
    with Clients(load, others * 2) as safe, Clients(load, [lonely, lonely], first=4) as hit:
        safe.wait_for(30)
        hit.wait_for(10)
        cluster.laboratory.cut([2], [0, 1])
        cut_s = time.monotonic()
        first_s = wait_until(lambda: any(report.errors for report in hit.reports), HANG_S, "the first refusal")
        both_s = wait_until(lambda: all(report.errors for report in hit.reports), HANG_S, "a refusal of each")
        took = refusals(cluster, 2)
        time.sleep(max(0.0, CUT_S - (time.monotonic() - cut_s)))
        refused = sum(len(report.errors) for report in hit.reports)
        safe.wait_for(5)
        cluster.laboratory.heal()
        healed_s = time.monotonic()
        hit.wait_for(1)
        served_s = time.monotonic() - healed_s
    wait_until(lambda: not differing(cluster.nodes), HANG_S, "replicas alike", pause_s=0.1)
    alike_s = time.monotonic() - healed_s
    print(
        f"\none of three cut off for {CUT_S:.0f} s: majority: {safe.said()}; its own clients: first refused after "
        f"{first_s:.2f} s (the other, which may have been in flight, {first_s + both_s:.2f} s), "
        f"{refused} refusals, then each in "
        + ", ".join(f"{kind} {seconds * 1000:.0f} ms" for kind, seconds in took.items())
        + f"; after the heal served again in {served_s:.2f} s, replicas alike after {alike_s:.2f} s"
    )
    assert beyond_the_window(safe) == []
    assert [report.wrong for report in (*safe.reports, *hit.reports)] == [[]] * 6
    assert max(took.values()) < HANG_S / 2
    assert_whole(load, cluster)


def test_cut_in_one_direction_stops_nobody_who_hears_and_is_heard_by_a_majority(
    cluster: LaboratoryCluster, load: Load
) -> None:
    """One daemon is heard by the next and does not hear it; each has a link to the third."""
    cluster.wait_whole()
    with Clients(load, cluster.nodes * 2) as clients:
        clients.wait_for(20)
        cluster.laboratory.cut([2], [1], one_way=True)
        try:
            time.sleep(SHORT_CUT_S)
            clients.wait_for(5)
        finally:
            cluster.laboratory.heal()
        clients.wait_for(5)
    print(f"\ndaemon 2 does not hear daemon 3 for {SHORT_CUT_S:.0f} s: {clients.said()}")
    assert beyond_the_window(clients) == []
    assert [report.wrong for report in clients.reports] == [[]] * 6
    assert clients.pause_s < HANG_S
    assert_whole(load, cluster)


def test_cut_of_the_overlays_datagrams_stops_nobody(cluster: LaboratoryCluster, load: Load) -> None:
    cluster.wait_whole()
    with Clients(load, cluster.nodes) as clients:
        cluster.laboratory.cut([0], [1, 2], datagrams=True)
        cluster.laboratory.cut([1], [2], datagrams=True)
        try:
            time.sleep(SHORT_CUT_S)
            clients.wait_for(5)
        finally:
            cluster.laboratory.heal()
    print(f"\nno datagrams for {SHORT_CUT_S:.0f} s: {clients.said()}")
    assert [report.errors for report in clients.reports] == [[]] * 3
    assert [report.wrong for report in clients.reports] == [[]] * 3
    assert_whole(load, cluster)


def test_random_kills_stops_and_cuts_violate_nothing(cluster: LaboratoryCluster, load: Load) -> None:
    """The run of `make kill-run`, short."""
    seed = random.SystemRandom().randrange(1 << 32)
    outcome = asyncio.run(KillRun(cluster, seed, True, load).run(6.0, lambda line: None))
    print(f"\nseed {seed}", *outcome.lines(3), sep="\n")
    assert outcome.violations == [], f"seed {seed}"
    assert outcome.operations["commits_applied"] > 0
