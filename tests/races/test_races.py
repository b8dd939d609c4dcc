"""Races between clients of different daemons, through Nova's own functions (the store's promises 2 and 3)."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from nova_bridge.sql import rerun
from tests.cluster import Cluster
from tests.races.cells import fresh, in_lanes, new_instance, open_cells, together

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.nova,
    # Nova calls and_() without arguments.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]
ROUNDS = int(os.environ.get("LUCD_RACE_ROUNDS", "60"))
LANES = 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("races"), nodes=3) as started:
        yield started


@pytest.fixture(scope="module")
def cells(cluster: Cluster) -> list[Any]:
    return open_cells([cluster.url("nova_cell1", node) for node in range(3)])


def _claim(admin: Any, uuid: str, state: str) -> object:
    from nova.db.main import api as db

    return db.instance_update_and_get_original(
        fresh(admin), uuid, {"task_state": state, "expected_task_state": ["scheduling"]}
    )


def _races_of_one_instance(cells: list[Any], numbers: range) -> None:
    """Two daemons' clients claim the instance, the third's looks who won and frees it, again and again."""
    from nova import exception
    from nova.db.main import api as db

    uuid = new_instance(cells[0], task_state="scheduling")
    for number in numbers:
        racers = [cells[number % 3], cells[(number + 1) % 3]]
        results = together(*[partial(_claim, racer, uuid, f"won-{i}") for i, racer in enumerate(racers)])
        losers = [r for r in results if isinstance(r, Exception)]
        assert len(losers) == 1, (number, results)
        assert isinstance(losers[0], exception.UnexpectedTaskStateError), losers
        winner = next(i for i, r in enumerate(results) if not isinstance(r, Exception))
        stored = db.instance_get_by_uuid(fresh(cells[(number + 2) % 3]), uuid)
        assert stored["task_state"] == f"won-{winner}"
        db.instance_update_and_get_original(fresh(cells[number % 3]), uuid, {"task_state": "scheduling"})


def test_expected_task_state_two_daemons_race_exactly_one_wins(cells: list[Any]) -> None:
    in_lanes(LANES, ROUNDS, partial(_races_of_one_instance, cells))


def _updates_of_one_instance(cells: list[Any], numbers: range) -> None:
    """Two daemons' clients set a column each, the third daemon's client looks at both, again and again."""
    from nova.db.main import api as db

    uuid = new_instance(cells[0])
    for number in numbers:
        first, second = cells[number % 3], cells[(number + 1) % 3]

        def set_column(admin: Any, column: str, value: object) -> object:
            return db.instance_update_and_get_original(fresh(admin), uuid, {column: value})

        results = together(
            partial(set_column, first, "progress", number), partial(set_column, second, "display_name", f"n{number}")
        )
        assert not [r for r in results if isinstance(r, Exception)], (number, results)
        stored = db.instance_get_by_uuid(fresh(cells[(number + 2) % 3]), uuid)
        assert (stored["progress"], stored["display_name"]) == (number, f"n{number}")


def test_different_columns_two_daemons_update_both_hold_without_conflict(
    cells: list[Any],
) -> None:
    before = rerun.counters["rerun"]
    in_lanes(LANES, ROUNDS, partial(_updates_of_one_instance, cells))
    # Only the first instance's "default" security group may be met by several lanes.
    assert rerun.counters["rerun"] - before < LANES, "there were conflicts"


def test_service_create_thousand_calls_of_hundred_names_makes_hundred_rows(cells: list[Any]) -> None:
    from nova import exception
    from nova.db.main import api as db
    from oslo_db import exception as db_exception

    def create(number: int) -> object:
        values = {"host": f"host-{number // 10}", "binary": "nova-compute", "topic": "compute", "report_count": 0}
        return db.service_create(fresh(cells[number % 3]), values)

    # The row that is there holds both of its unique keys; either may be the one that refuses. At the INSERT Nova names
    # it, at the commit, when another was faster between the two, it is a duplicate.
    refusals = exception.ServiceBinaryExists | exception.ServiceTopicExists | db_exception.DBDuplicateEntry
    made: Counter[str] = Counter()
    refused = 0
    for begin in range(0, 1000, 50):
        # The ten calls of a name run at the same time, on all three daemons.
        for result in together(*[partial(create, number) for number in range(begin, begin + 50)]):
            if isinstance(result, Exception):
                assert isinstance(result, refusals), repr(result)
                refused += 1
            else:
                made[result["host"]] += 1  # type: ignore[index]
    assert (len(made), set(made.values()), refused) == (100, {1}, 900)
    for admin in cells:
        stored = [service["host"] for service in db.service_get_all(fresh(admin))]
        assert sorted(stored) == sorted(made)


def _count_up(admin: Any, uuids: list[str], stop: threading.Event, counts: Counter[str]) -> float:
    """Set the instances' progress to 1, 2, ... in turn; the longest update in seconds. Raises what Nova raises."""
    from nova.db.main import api as db

    longest_s = 0.0
    while not stop.is_set():
        for uuid in uuids:
            began_s = time.monotonic()
            db.instance_update_and_get_original(fresh(admin), uuid, {"progress": counts[uuid] + 1})
            counts[uuid] += 1
            longest_s = max(longest_s, time.monotonic() - began_s)
    return longest_s


def test_kill_of_a_daemon_novas_updates_through_the_others_go_on(cluster: Cluster, cells: list[Any]) -> None:
    from nova.db.main import api as db

    # Enough instances for the daemon that dies to be the coordinator of some.
    uuids = [new_instance(cells[0]) for _ in range(12)]
    counts: Counter[str] = Counter()
    stop, doomed = threading.Event(), cluster.nodes[2]

    def act() -> float:
        try:
            time.sleep(1.0)
            doomed.kill()
            time.sleep(3.0)
            doomed.start()
            cluster.wait_whole()
            time.sleep(1.0)
        finally:
            stop.set()
        return 0.0

    results = together(
        act, *[partial(_count_up, cells[n % 2], uuids[3 * n : 3 * n + 3], stop, counts) for n in range(4)]
    )
    assert not [r for r in results if isinstance(r, Exception)], results
    assert all(counts[uuid] > 2 for uuid in uuids)
    longest_s = max(r for r in results if not isinstance(r, Exception))
    print(f"\nkill -9 under Nova's updates: {counts.total()} acknowledged, longest {longest_s * 1000:.0f} ms")
    assert longest_s < 10.0
    for admin in cells:
        assert {uuid: db.instance_get_by_uuid(fresh(admin), uuid)["progress"] for uuid in uuids} == counts
