"""The routing table and the look-up, without sockets."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from kademlia.node import Node

from dht.overlay.crawl import Crawl
from dht.overlay.messages import Contact, distance, pop_prefix
from dht.overlay.table import Table

OWN = pop_prefix("p0") + bytes(16)
IDS = st.builds(
    lambda pop, tail: pop_prefix(f"p{pop}") + tail.to_bytes(2, "big") + bytes(14),
    st.integers(0, 3),
    st.integers(0, 200),
)


def contact(node_id: bytes, host: str = "10.0.0.1", port: int = 1) -> Contact:
    return Contact(node_id, host, port, "p")


def table(ksize: int = 3, per_host_max: int = 1000) -> Table:
    return Table(None, ksize, Node(OWN), per_host_max)


@given(
    st.lists(
        st.tuples(st.booleans(), IDS.filter(lambda i: i != OWN), st.integers(0, 2), st.integers(1, 2)), max_size=150
    ),
    st.integers(1, 60),
)
@settings(max_examples=80, deadline=None)
def test_table_after_any_learning_and_forgetting_agrees_with_its_buckets(steps, per_host_max) -> None:
    made = table(per_host_max=per_host_max)
    now = 0.0
    for learns, node_id, host, port in steps:
        now += 1.0
        if learns:
            if made.learn(contact(node_id, f"10.0.0.{host}", port), now):
                assert made.get(node_id).contact.port == port
        else:
            made.forget(node_id)
            assert made.get(node_id) is None
    in_buckets = [peer for bucket in made.buckets for peer in bucket.get_nodes()]
    assert {peer.id for peer in in_buckets} == {peer.id for peer in made}
    assert len(in_buckets) == len(made)
    assert all(
        bucket.range[0] <= peer.long_id <= bucket.range[1] for bucket in made.buckets for peer in bucket.get_nodes()
    )
    assert made.buckets[0].range[0] == 0
    assert made.buckets[-1].range[1] == 2**160 - 1
    assert all(a.range[1] + 1 == b.range[0] for a, b in zip(made.buckets, made.buckets[1:], strict=False))
    assert made._hosts == Counter(peer.contact.host for peer in made)


def test_nearest_is_in_exact_exclusive_or_order() -> None:
    made = table(ksize=20)
    chance = random.Random(2)
    for _ in range(300):
        made.learn(contact(chance.randbytes(20)), 0.0)
    target = chance.randbytes(20)
    everybody = sorted((peer.contact for peer in made), key=lambda c: distance(c.id, target))
    assert made.nearest(target, 20) == everybody[:20]
    assert made.nearest(target, 20, exclude=everybody[0].id) == everybody[1:21]


def test_three_hundred_nodes_that_share_a_pop_make_few_buckets() -> None:
    made = table(ksize=20)
    chance = random.Random(3)
    for n in range(300):
        made.learn(contact(pop_prefix(f"p{n % 6}") + chance.randbytes(16)), 0.0)
    assert len(made.buckets) < 60
    assert len(made) > 100


def test_forgotten_contact_gives_its_place_to_a_spare_that_must_answer_first() -> None:
    made = table(ksize=1)
    far = [bytes([255, n]) + bytes(18) for n in range(40)]
    taken = [node_id for node_id in far if made.learn(contact(node_id), 0.0)]
    assert len(taken) < len(far)
    spares = [made.forget(node_id) for node_id in taken]
    assert any(spare is not None and spare.id not in taken for spare in spares)
    assert len(made) == 0


def test_one_host_with_many_ids_has_only_its_share() -> None:
    made = table(ksize=20, per_host_max=8)
    for _ in range(400):
        made.learn(contact(os.urandom(20), "10.0.0.66"), 0.0)
        made.learn(contact(os.urandom(20), f"10.0.1.{random.randrange(250)}"), 0.0)
    assert sum(peer.contact.host == "10.0.0.66" for peer in made) == 8


class SmallWorld:
    """Nodes that know some others; the dead never answer, the slow take their time."""

    def __init__(self, size: int, seed: int) -> None:
        chance = random.Random(seed)
        self.ids = [chance.randbytes(20) for _ in range(size)]
        self.tables = {}
        for node_id in self.ids:
            made = Table(None, 8, Node(node_id), 10_000)
            for other in chance.sample(self.ids, size):
                if other != node_id:
                    made.learn(contact(other), 0.0)
            self.tables[node_id] = made
        self.dead: set[bytes] = set()
        self.slow: set[bytes] = set()
        self.asked: list[bytes] = []

    async def crawl(self, start: bytes, target: bytes, count: int = 8) -> list[bytes]:
        async def ask(asked: Contact) -> tuple[Contact, ...] | None:
            self.asked.append(asked.id)
            await asyncio.sleep(0.05 if asked.id in self.slow or asked.id in self.dead else 0)
            if asked.id in self.dead:
                return None
            return tuple(self.tables[asked.id].nearest(target, count))

        first = self.tables[start].nearest(target, count)
        return [c.id for c in await Crawl(ask, target, first, start, count, 3).run()]


async def test_crawl_finds_the_nearest_of_all_in_order_with_few_questions() -> None:
    world = SmallWorld(200, 1)
    for n in range(10):
        target = random.Random(n).randbytes(20)
        nearest = sorted((i for i in world.ids if i != world.ids[n]), key=lambda i: distance(i, target))[:8]
        world.asked.clear()
        assert await world.crawl(world.ids[n], target) == nearest
        assert len(world.asked) == len(set(world.asked)) < 40


async def test_crawl_past_dead_nodes_gives_the_nearest_living() -> None:
    world = SmallWorld(100, 2)
    target = world.ids[7]
    ranked = sorted(world.ids, key=lambda i: distance(i, target))
    world.dead = set(ranked[:4])
    start = ranked[50]
    assert (await world.crawl(start, target))[:3] == [i for i in ranked[4:] if i != start][:3]


async def test_crawl_does_not_wait_for_a_slow_node_before_it_asks_others() -> None:
    world = SmallWorld(100, 3)
    target = os.urandom(20)
    start = world.ids[0]
    world.slow = {world.tables[start].nearest(target, 1)[0].id}
    loop = asyncio.get_running_loop()
    began = loop.time()
    await world.crawl(start, target)
    assert loop.time() - began < 0.2


async def test_crawl_without_anybody_to_ask_finds_nobody() -> None:
    world = SmallWorld(1, 4)
    assert await world.crawl(world.ids[0], os.urandom(20)) == []
