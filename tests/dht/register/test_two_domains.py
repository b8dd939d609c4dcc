"""Two domains on the same nodes and links: what is meant for one is never done in the other."""

from __future__ import annotations

import os
import random

import pytest

from dht.codec import encode
from dht.domain.envelope import DomainNetwork, InDomain
from dht.errors import NotFound, RemoteProtocolError, Unavailable
from dht.model import GLOBAL, Change, Op, Part, Transaction
from dht.register.messages import ReadReplica, ReadReplicaReply
from dht.register.node import StoreNode
from dht.rows import decode_row, group_key
from dht.storage.memory import MemoryDisk
from dht.storage.registers import RegisterFile
from tests.dht.register.register_cluster import Cluster, Identity, LoopClock, StaticDomain, WireEnd

KEY = group_key("d", "f", (1,))
SHARED_TABLETS = 16


class Both:
    """A node's two stores, composed as in the daemon. `begun`: members to which a link was wanted."""

    def __init__(self, cluster: Cluster, node: bytes) -> None:
        self.begun: list[bytes] = []
        self.own = cluster.wire.nodes[node]
        self.network = DomainNetwork(GLOBAL, WireEnd(cluster.wire, node), self.begun.append)
        domain, disk = StaticDomain(node, cluster.ids, 3, SHARED_TABLETS), MemoryDisk()
        file = RegisterFile(disk, SHARED_TABLETS)
        self.wide = StoreNode(Identity(node, 1), LoopClock(), random.Random(2), self.network, disk, domain, file)
        self.network.serve(self.wide.answer)
        cluster.wire.nodes[node] = self

    async def answer(self, sender: bytes, message):
        if isinstance(message, InDomain):
            return await self.network.open(sender, message)
        return await self.own.answer(sender, message)

    async def stop(self) -> None:
        await self.own.stop()
        await self.wide.stop()


@pytest.fixture
async def nodes():
    cluster = Cluster()
    both = [Both(cluster, node) for node in cluster.ids]
    yield both
    await cluster.stop()


async def write(store: StoreNode, number: int, op: Op) -> None:
    change = Change(op, 1, (1,), {0: number})
    await store.commit(Transaction(os.urandom(16), "d", 0, (Part(KEY, None, (change,)),)))


async def read(store: StoreNode) -> object:
    (found,) = await store.read([KEY])
    return [decode_row(row)[0] for row in (found.rows or {}).values()]


async def test_group_of_one_name_is_another_one_in_each_domain(nodes: list[Both]) -> None:
    for store in (nodes[0].own, nodes[0].wide):
        await store.create_database("d")
    await write(nodes[0].own, 1, Op.INSERT)
    assert await read(nodes[1].wide) == []
    await write(nodes[1].wide, 2, Op.INSERT)
    for number in range(3, 9):
        await write(nodes[number % 3].own, number, Op.UPDATE)
        await write(nodes[number % 3].wide, 10 * number, Op.UPDATE)
    for node in nodes:
        assert await read(node.own) == [8]
        assert await read(node.wide) == [80]


async def test_database_dropped_in_one_domain_stays_in_the_other(nodes: list[Both]) -> None:
    for store in (nodes[0].own, nodes[0].wide):
        await store.create_database("d")
        await write(store, 1, Op.INSERT)
    await nodes[2].own.drop_database("d")
    assert await nodes[1].own.list_databases() == ()
    assert await nodes[1].wide.list_databases() == ("d",)
    assert await read(nodes[1].wide) == [1]


async def test_envelope_is_opened_by_its_domain_only_and_garbage_in_it_is_refused(nodes: list[Both]) -> None:
    question = encode(ReadReplica(()))
    sender = b"s" * 20
    assert isinstance(await nodes[0].network.open(sender, InDomain(GLOBAL, question)), ReadReplicaReply)
    with pytest.raises(NotFound, match="domain lyon is not kept on this node"):
        await nodes[0].network.open(sender, InDomain("lyon", question))
    with pytest.raises(RemoteProtocolError):
        await nodes[0].network.open(sender, InDomain(GLOBAL, b"garbage"))


async def test_link_to_a_member_is_begun_when_it_is_needed_and_not_heard() -> None:
    cluster = Cluster()
    both = [Both(cluster, node) for node in cluster.ids]
    heard, away = both[1].own._context.node, both[2].own._context.node
    cluster.wire.cut.add(away)
    await both[0].network.call(heard, ReadReplica(()), 1.0)
    assert both[0].network.alive(away) is False
    assert both[0].begun == []
    both[0].network.silent_s(away)
    with pytest.raises(Unavailable):
        await both[0].network.call(away, ReadReplica(()), 1.0)
    assert both[0].begun == [away, away]
    await cluster.stop()
