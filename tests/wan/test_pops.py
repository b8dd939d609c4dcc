"""Three PoPs with a WAN between them: each keeps its own databases, and any node serves them all.

Times are of the ways between the PoPs, which are long here, so that nothing else matters. Figures are printed; run with
-s to see them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from dht.errors import Conflict, Unavailable
from dht.model import Change, FindQuery, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from lucd import messages
from nova_bridge.sql import dbapi
from nova_bridge.sql.database import Database
from tests.laboratory import wait_until
from tests.oslo_bus import Clients, Served, oslo_messaging
from tests.wan.sites import Wan, WanCluster, fastest_s, why_not

pytestmark = pytest.mark.cluster
RTT_S = 0.2
"""Far more than what a loaded machine takes for the rest."""
FOUNDING, HOME, OTHER = 0, 3, 4
"""Daemons: one of the three of pop0, the one of pop1 and the one of pop2."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WanCluster]:
    if reason := why_not():
        pytest.skip(reason)
    with (
        Wan(3, RTT_S * 1000) as wan,
        WanCluster(tmp_path_factory.mktemp("pops"), wan, [0, 0, 0, 1, 2], pops=True) as started,
    ):
        started.nodes[OTHER].store().create_database("far", home="pop1")
        write(started.nodes[HOME].store(), 0, Op.INSERT)
        yield started


def write(store: BlockingStore, number: int, op: Op = Op.UPDATE) -> None:
    change = Change(op, 1, (1,), {0: number})
    store.commit(Transaction(os.urandom(16), "far", 0, (Part(group_key("far", "f", (1,)), None, (change,)),)))


def read(store: BlockingStore) -> object:
    (found,) = store.read([group_key("far", "f", (1,))])
    assert found.rows, "an acknowledged row is not there"
    (row,) = found.rows.values()
    return decode_row(row)[0]


def passed_on(cluster: WanCluster, number: int) -> int:
    return int(cluster.nodes[number].status()["counters"]["homes"]["passed_on"])


def test_every_pop_was_founded_by_its_first_node_and_has_its_own_members(cluster: WanCluster) -> None:
    seen = [(node.status()["pop"], node.status()["members"]) for node in cluster.nodes]
    assert seen == [("pop0", 3), ("pop0", 3), ("pop0", 3), ("pop1", 1), ("pop2", 1)]


def test_list_of_databases_is_the_same_everywhere(cluster: WanCluster) -> None:
    cluster.nodes[FOUNDING].store().create_database("founded")
    cluster.nodes[OTHER].store().create_database("others")
    for node in cluster.nodes:
        homes = node.store().homes()
        assert {name: homes[name] for name in ("far", "founded", "others")} == {
            "far": "pop1",
            "founded": "pop0",
            "others": "pop2",
        }


def test_name_of_another_pop_is_taken(cluster: WanCluster) -> None:
    for node in cluster.nodes:
        store = node.store()
        assert store.create_database("far", home="pop1") is store.create_database("far") is False
        with pytest.raises(Conflict, match="exists already, in PoP pop1"):
            store.create_database("far", home="pop2")
        with pytest.raises(Conflict, match="exists already, in PoP pop1"):
            store.create_database("far", home="pop0")


def test_at_home_nothing_waits_for_another_pop(cluster: WanCluster) -> None:
    store = cluster.nodes[HOME].store()
    before = passed_on(cluster, HOME)
    took_s = fastest_s(lambda: (write(store, 1), read(store)))
    print(f"a write and a read at home: {took_s * 1000:.1f} ms")
    assert took_s < RTT_S
    assert passed_on(cluster, HOME) == before


def test_far_read_and_far_write_take_one_round_trip_more_than_at_home(cluster: WanCluster) -> None:
    home, far = cluster.nodes[HOME].store(), cluster.nodes[OTHER].store()
    reads = fastest_s(lambda: read(far)), fastest_s(lambda: read(home))
    writes = fastest_s(lambda: write(far, 2)), fastest_s(lambda: write(home, 2))
    print(
        f"far and home, ms: reads {[round(s * 1000, 1) for s in reads]}, writes {[round(s * 1000, 1) for s in writes]}"
    )
    assert RTT_S <= reads[0] < reads[1] + 1.5 * RTT_S
    assert RTT_S <= writes[0] < writes[1] + 1.5 * RTT_S
    assert read(home) == 2


def test_where_a_group_of_another_pop_is_kept_is_asked_there(cluster: WanCluster) -> None:
    question = messages.AskWhere(group_key("far", "f", (1,)))
    for number in (HOME, OTHER, FOUNDING):
        there = cluster.nodes[number].client().call(question)
        assert isinstance(there, messages.WhereReply)
        assert (there.home, there.domain, there.exists, len(there.replicas)) == ("pop1", "pop1", True, 1)


def test_sql_door_serves_the_tables_of_another_pop(cluster: WanCluster) -> None:
    notes = sa.Table(
        "notes", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.String(20))
    )
    databases = [Database(cluster.nodes[number].store(), "far") for number in (OTHER, HOME)]
    here, there = (
        sa.create_engine("lucd:///far", creator=lambda one=one: dbapi.Connection(one, "", foreign_keys=True))
        for one in databases
    )
    notes.create(here)
    with here.begin() as connection:
        connection.execute(notes.insert(), [{"text": "one"}, {"text": "two"}])
    with there.begin() as connection:
        connection.execute(notes.update().where(notes.c.text == "one").values(text="uno"))
    with here.connect() as connection:
        assert connection.execute(sa.select(notes).order_by(notes.c.id)).all() == [(1, "uno"), (2, "two")]
    for engine in (here, there):
        engine.dispose()


def test_cut_off_pop_goes_on_with_its_own_and_is_unavailable_never_empty_to_the_others(cluster: WanCluster) -> None:
    home, other, third = (cluster.nodes[number].store() for number in (HOME, OTHER, FOUNDING))
    assert read(third) == read(other)
    write(other, 10)
    cluster.wan.cut([1], [0, 2])
    try:
        time.sleep(1.0)
        assert fastest_s(lambda: (write(home, 11), read(home))) < RTT_S
        for store in (other, third):
            for ask in (
                lambda store=store: read(store),
                lambda store=store: write(store, 12),
                lambda store=store: store.find(FindQuery("far", 1, 0)),
            ):
                began_s = time.monotonic()
                with pytest.raises(Unavailable, match="PoP pop1 cannot be asked"):
                    ask()
                took_s = time.monotonic() - began_s
                print(f"refused after {took_s:.2f} s")
                assert took_s < 5.0
        # What the others own is theirs to change all the while.
        assert cluster.nodes[OTHER].store().create_database("meanwhile") is True
    finally:
        cluster.wan.heal()
    wait_until(lambda: answers(other) and answers(third), 60.0, "the healed PoP is not asked again")
    assert read(other) == read(third) == 11


def answers(store: BlockingStore) -> bool:
    try:
        return read(store) == 11
    except Unavailable:
        return False


def test_database_dropped_and_created_in_another_pop_is_found_there(cluster: WanCluster) -> None:
    third = cluster.nodes[FOUNDING].store()
    third.create_database("moved", home="pop1")
    assert cluster.nodes[OTHER].store().drop_database("moved") is True
    assert "moved" not in cluster.nodes[HOME].store().list_databases()
    assert cluster.nodes[HOME].store().create_database("moved", home="pop2") is True
    assert third.homes()["moved"] == "pop2"
    assert third.drop_database("moved") is True
    assert third.drop_database("moved") is False


@pytest.mark.filterwarnings("ignore")
def test_bus_brings_calls_to_another_pop_and_goes_on_after_a_cut(cluster: WanCluster) -> None:
    clients = Clients()
    with Served(cluster.nodes[HOME].socket, "home", "wan"), Served(cluster.nodes[OTHER].socket, "other", "wan"):
        asked, theirs = (clients.of(cluster.nodes[number].socket, "wan") for number in (FOUNDING, HOME))
        far = asked.prepare(server="home")
        assert far.call({}, "ask") == "home"
        took_s = fastest_s(lambda: far.call({}, "ask"), 5)
        print(f"a call to another PoP: {took_s * 1000:.1f} ms")
        assert took_s >= RTT_S
        cluster.wan.cut([1], [0, 2])
        try:
            time.sleep(1.0)
            assert theirs.call({}, "ask") == "home"
            assert asked.prepare(server="other").call({}, "ask") == "other"
            waits = far.prepare(timeout=1)
            with pytest.raises(oslo_messaging.MessagingTimeout):
                waits.call({}, "ask")
        finally:
            cluster.wan.heal()
        wait_until(lambda: far.prepare(timeout=20).call({}, "ask") == "home", 60.0, "the healed PoP is not reached")
    clients.close()
