"""Domain `global` over three PoPs: what lives there is everybody's, and bears the loss of any one PoP."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dht.errors import DhtError, Unavailable
from dht.model import GLOBAL, Change, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key
from lucd import messages
from tests.laboratory import wait_until
from tests.wan.sites import Wan, WanCluster, why_not

pytestmark = pytest.mark.cluster
RTT_MS = 20.0
CUT_OFF = 2
KEY = group_key("flavors", "f", (1,))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WanCluster]:
    if reason := why_not():
        pytest.skip(reason)
    with (
        Wan(3, RTT_MS) as wan,
        WanCluster(tmp_path_factory.mktemp("global"), wan, [0, 1, 2], pops=True) as started,
    ):
        started.nodes[1].store().create_database("flavors", home=GLOBAL)
        write(started.nodes[2].store(), 0, Op.INSERT)
        yield started


def write(store: BlockingStore, number: int, op: Op = Op.UPDATE) -> None:
    change = Change(op, 1, (1,), {0: number})
    store.commit(Transaction(os.urandom(16), "flavors", 0, (Part(KEY, None, (change,)),)))


def read(store: BlockingStore) -> object:
    (found,) = store.read([KEY])
    assert found.rows, "an acknowledged row is not there"
    (row,) = found.rows.values()
    return decode_row(row)[0]


def number_read(store: BlockingStore) -> object:
    try:
        return read(store)
    except DhtError as error:
        return error


def test_pops_have_indexes_in_the_order_in_which_they_were_founded(cluster: WanCluster) -> None:
    for node in cluster.nodes:
        claims = node.store().pops()
        assert [(pop, claim.index) for pop, claim in claims.items()] == [("pop0", 0), ("pop1", 1), ("pop2", 2)]
        assert [claim.node.hex() for claim in claims.values()] == [n.status()["node_id"] for n in cluster.nodes]


def test_each_tablet_has_a_replica_in_each_pop(cluster: WanCluster) -> None:
    def spread() -> bool:
        reply = cluster.nodes[0].client().call(messages.AskDomain(GLOBAL))
        assert isinstance(reply, messages.DomainReply)
        pops = {line.node_id: line.pop for line in reply.members}
        return {tuple(sorted(pops[n] for n in t.replicas)) for t in reply.tablets} == {("pop0", "pop1", "pop2")}

    wait_until(spread, 30.0, "a tablet has no replica in a PoP")


def test_database_of_domain_global_is_written_and_read_in_each_pop(cluster: WanCluster) -> None:
    for number, node in enumerate(cluster.nodes, 1):
        assert node.store().homes()["flavors"] == GLOBAL
        write(node.store(), number)
        assert [read(other.store()) for other in cluster.nodes] == [number] * 3
    there = cluster.nodes[0].client().call(messages.AskWhere(KEY))
    assert isinstance(there, messages.WhereReply)
    assert (there.domain, there.exists, len(there.replicas)) == (GLOBAL, True, 3)


def test_cut_off_pop_is_told_why_while_the_others_go_on(cluster: WanCluster) -> None:
    others = [n for n in range(3) if n != CUT_OFF]
    cut_off = cluster.nodes[CUT_OFF].store()
    cut_off.create_database("own")
    cluster.wan.cut([CUT_OFF], others)
    try:
        wait_until(lambda: isinstance(number_read(cut_off), Unavailable), 60.0, "the cut is not noticed")
        for ask in (lambda: read(cut_off), lambda: write(cut_off, 99), lambda: cut_off.create_database("new")):
            with pytest.raises(Unavailable, match=r"of its 3 replicas this node hears 1|domain global cannot be asked"):
                ask()
        for number in others:
            write(cluster.nodes[number].store(), 10 + number)
            assert read(cluster.nodes[1 - number].store()) == 10 + number
        assert cluster.nodes[0].store().create_database("meanwhile") is True
        own = Part(group_key("own", "f", (1,)), None, (Change(Op.INSERT, 1, (1,), {0: 1}),))
        cut_off.commit(Transaction(os.urandom(16), "own", 0, (own,)))
        wait_until(
            lambda: any("domain global" in text for text in cluster.nodes[CUT_OFF].status()["warnings"]),
            60.0,
            "its status does not say that global is out of reach",
        )
        assert cluster.nodes[CUT_OFF].status()["ready"] is True
    finally:
        cluster.wan.heal()
    wait_until(lambda: number_read(cut_off) == 11, 60.0, "the healed PoP does not read what was written meanwhile")
    write(cut_off, 20)
    assert read(cluster.nodes[0].store()) == 20
