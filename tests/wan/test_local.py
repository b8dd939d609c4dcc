"""Rows that live in the PoP that made them, in three PoPs with a WAN between: read, changed, listed, one PoP cut off.

Times are of the ways between the PoPs, which are long here, so that nothing else matters. Figures are printed; run with
-s to see them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dht.model import GLOBAL, LOCAL
from dht.rows import group_key
from lucd import messages
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database
from tests.laboratory import wait_until
from tests.wan.sites import Wan, WanCluster, fastest_s, why_not

pytestmark = pytest.mark.cluster
RTT_S = 0.2
"""Far more than what a loaded machine takes for the rest."""
TIMES = 8
A, B, C = 0, 1, 2
CELLS = "CREATE TABLE cell_mappings (id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL UNIQUE)"
MAPPINGS = """CREATE TABLE instance_mappings (id INTEGER PRIMARY KEY, instance_uuid VARCHAR(36) NOT NULL UNIQUE,
    cell_id INTEGER REFERENCES cell_mappings(id), project_id VARCHAR(255))"""
INSERT = "INSERT INTO instance_mappings (instance_uuid, cell_id, project_id) VALUES (?, 1, 'p')"
UPDATE = "UPDATE instance_mappings SET project_id = ? WHERE instance_uuid = ?"
ONE = "SELECT project_id FROM instance_mappings WHERE instance_uuid = ?"
ALL = """SELECT m.instance_uuid, c.uuid FROM instance_mappings m LEFT JOIN cell_mappings c ON m.cell_id = c.id
    WHERE m.project_id LIKE 'p%'"""
"""Local rows, and global ones that each PoP has a copy of."""


class Doors:
    """A connection to the daemon of each PoP."""

    def __init__(self, cluster: WanCluster) -> None:
        self.cluster = cluster
        self.connections = [Connection(Database(node.store(), "api"), "", True) for node in cluster.nodes]

    def ask(self, pop: int, sql: str, *parameters: object) -> list[Any]:
        connection = self.connections[pop]
        try:
            found = connection.execute(sql, parameters).fetchall()
            connection.commit()
        except BaseException:
            connection.rollback()
            raise
        return found

    def listed(self, pop: int) -> list[str]:
        found = self.ask(pop, ALL)
        assert {cell for _, cell in found} == {"cell"}
        return sorted(uuid for uuid, _ in found)

    def places(self, pop: int) -> dict[str, int]:
        counters: dict[str, int] = self.cluster.nodes[pop].status()["counters"]["places"]
        return counters


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    if reason := why_not():
        pytest.skip(reason)
    with (
        Wan(3, RTT_S * 1000) as wan,
        WanCluster(tmp_path_factory.mktemp("local"), wan, [A, B, C], pops=True) as started,
    ):
        started.nodes[C].store().create_database("api", home=GLOBAL)
        made = Doors(started)
        made.ask(C, CELLS)
        made.ask(C, MAPPINGS)
        made.ask(C, "INSERT INTO cell_mappings (id, uuid) VALUES (1, 'cell')")
        for pop in (A, B, C):
            made.ask(pop, INSERT, f"first-{pop}")
        yield made


def test_row_made_in_one_pop_is_read_and_changed_from_another_and_listed_from_the_third(doors: Doors) -> None:
    doors.ask(A, INSERT, "one")
    assert doors.ask(B, ONE, "one") == [("p",)]
    doors.ask(B, UPDATE, "p2", "one")
    assert doors.ask(A, ONE, "one") == doors.ask(C, ONE, "one") == [("p2",)]
    assert doors.listed(C) == doors.listed(A) == ["first-0", "first-1", "first-2", "one"]
    assert doors.ask(C, ONE, "nobody") == []
    ids = [number for (number,) in doors.ask(B, "SELECT id FROM instance_mappings")]
    assert {number % 256 for number in ids} == {A, B, C}


def test_where_a_local_group_lives_is_told_everywhere(doors: Doors) -> None:
    wait_until(lambda: where(doors, A).hint == "pop1", 60.0, "no hint was published")
    for pop in (A, B, C):
        reply = where(doors, pop)
        assert (reply.home, reply.domain, reply.exists, len(reply.replicas)) == (GLOBAL, "pop1", True, 1)


def where(doors: Doors, pop: int) -> messages.WhereReply:
    key = group_key("api", "instance_mapping", ("first-1",))
    reply = doors.cluster.nodes[pop].client().call(messages.AskWhere(key))
    assert isinstance(reply, messages.WhereReply)
    return reply


def test_own_rows_ask_no_other_pop_and_far_ones_take_one_round_trip(doors: Doors) -> None:
    numbers = iter(range(1000))
    doors.ask(A, ONE, "first-1")
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "made here": (lambda: doors.ask(A, INSERT, f"q{next(numbers)}"), 0),
        "own read": (lambda: doors.ask(A, ONE, "first-0"), 0),
        "own write": (lambda: doors.ask(A, UPDATE, f"p{next(numbers)}", "first-0"), 0),
        "far read": (lambda: doors.ask(A, ONE, "first-1"), 1),
        "far read and write": (lambda: doors.ask(A, UPDATE, f"p{next(numbers)}", "first-1"), 2),
    }
    for name, (ask, trips) in cases.items():
        before = doors.places(A)["asked_far"]
        took_s = fastest_s(ask, TIMES)
        print(f"{name}: {took_s * 1000:.1f} ms")
        assert doors.places(A)["asked_far"] - before == trips * TIMES, name
        assert trips * RTT_S <= took_s < (trips + 0.9) * RTT_S, name
    print(f"far read, place not known: {fastest_s(lambda: doors.ask(A, ONE, f'first-{C}'), 1) * 1000:.1f} ms")
    doors.ask(A, "DELETE FROM instance_mappings WHERE instance_uuid LIKE 'q%'")


def test_cut_off_pop_goes_on_with_its_own_and_nothing_is_said_to_be_gone(doors: Doors) -> None:
    doors.ask(B, ONE, "first-0")
    doors.cluster.wan.cut([A], [B, C])
    try:
        time.sleep(1.0)
        doors.ask(A, INSERT, "meanwhile-a")
        doors.ask(A, UPDATE, "p3", "first-0")
        doors.ask(A, "DELETE FROM instance_mappings WHERE instance_uuid = 'one'")
        doors.ask(B, INSERT, "meanwhile-b")
        doors.ask(B, UPDATE, "p3", "first-2")
        assert doors.listed(A) == ["first-0", "meanwhile-a"]
        assert doors.listed(C) == ["first-1", "first-2", "meanwhile-b"]
        assert doors.places(A)["pops_left_out"] > 0
        for pop, sql, parameters in (
            (A, ONE, ("first-1",)),
            (A, ONE, ("nobody",)),
            (B, ONE, ("first-0",)),
            (C, ONE, ("nobody",)),
            (B, UPDATE, ("p4", "first-0")),
            (C, "DELETE FROM instance_mappings WHERE project_id LIKE 'p%'", ()),
        ):
            began_s = time.monotonic()
            with pytest.raises(sqlite3.OperationalError, match=r"PoP pop\d cannot be asked|domain global"):
                doors.ask(pop, sql, *parameters)
            took_s = time.monotonic() - began_s
            print(f"refused after {took_s:.2f} s")
            assert took_s < 5.0
    finally:
        doors.cluster.wan.heal()
    wait_until(lambda: heard(doors), 60.0, "the healed PoP is not asked again")
    for pop in (A, B, C):
        assert doors.listed(pop) == ["first-0", "first-1", "first-2", "meanwhile-a", "meanwhile-b"]
        assert doors.ask(pop, ONE, "first-0") == [("p3",)]
        assert doors.ask(pop, ONE, "one") == []


def heard(doors: Doors) -> bool:
    try:
        return all(doors.ask(pop, ONE, "nobody") == [] for pop in (A, B, C))
    except sqlite3.OperationalError:
        return False


def test_killed_daemon_that_starts_again_in_a_cut_off_pop_serves_what_is_homed_there(doors: Doors) -> None:
    cluster, node = doors.cluster, doors.cluster.nodes[A]
    doors.ask(A, INSERT, "before")
    cluster.wan.cut([A], [B, C])
    try:
        node.kill()
        node.start()
        began_s = time.monotonic()
        # A service that starts as well: nothing is left of what the old one knew.
        doors.connections[A] = Connection(Database(node.store(), "api"), "", True)
        assert doors.ask(A, ONE, "before") == [("p",)]
        print(f"the first row after the start: {time.monotonic() - began_s:.2f} s")
        doors.ask(A, UPDATE, "p4", "before")
        doors.ask(A, INSERT, "after")
        assert doors.ask(A, ONE, "before") == [("p4",)]
        assert doors.ask(A, ONE, "after") == [("p",)]
        with pytest.raises(sqlite3.OperationalError, match=r"PoP pop\d cannot be asked|domain global"):
            doors.ask(A, ONE, "first-1")
    finally:
        cluster.wan.heal()
    wait_until(lambda: heard(doors), 60.0, "the healed PoP is not asked again")
    assert doors.ask(B, ONE, "before") == [("p4",)]
    assert doors.ask(C, ONE, "after") == [("p",)]


def test_database_whose_rows_all_live_where_they_were_made(doors: Doors) -> None:
    store = doors.cluster.nodes[B].store(60.0)
    assert store.create_database("all", home=LOCAL)
    there, here = (Connection(Database(node.store(), "all"), "", True) for node in doors.cluster.nodes[:2])
    here.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, text VARCHAR(20))")
    for connection, text in ((here, "here"), (there, "there")):
        connection.execute("INSERT INTO notes (text) VALUES (?)", (text,))
        connection.commit()
    assert sorted(here.execute("SELECT text FROM notes").fetchall()) == [("here",), ("there",)]
    assert store.drop_database("all")
    assert "all" not in doors.cluster.nodes[A].store().homes()
