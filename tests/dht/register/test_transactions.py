"""Transactions over several groups: all or nothing, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from register_cluster import Cluster, eventually

from dht.errors import Conflict, DhtError, Duplicate, Indeterminate, Unavailable
from dht.model import Change, Guard, GuardKind, Op, Part, Transaction
from dht.register.messages import Coordinate, Kind, Operation
from dht.register.operations import perform
from dht.register.rules import RULES
from dht.rows import decode_row, group_key, row_key

ids = iter(range(1, 10**9))


def key(name) -> bytes:
    return group_key("db", "f", (name,))


def transaction(*parts: Part) -> Transaction:
    return Transaction(next(ids).to_bytes(16, "big"), "db", 0, parts)


def put(name, columns, op=Op.INSERT, guards=None) -> Part:
    return Part(key(name), changes=(Change(op, 1, (1,), columns, guards or {}),))


async def values(store, *names) -> list:
    reads = await store.read([key(name) for name in names])
    return [decode_row(g.rows[row_key(1, (1,))])[0] if g.rows else None for g in reads]


@pytest.fixture
async def cluster():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    yield cluster
    await cluster.stop()


def quiet(cluster: Cluster, *names) -> bool:
    """No intent anywhere, and no decision record."""
    for file in cluster.files.values():
        for name in names:
            if file.header(key(name)).intents:
                return False
    return all(
        not (held := store._coordinator.cached(key(n))) or not held.decisions
        for store in cluster.wire.nodes.values()
        for n in names
    )


async def test_parts_are_applied_together_and_seen_everywhere(cluster):
    applied = await cluster[0].commit(transaction(put("a", {0: 1}), put("b", {0: 2}), put("c", {0: 3})))
    assert len(applied.ballots) == 3
    for index in range(3):
        assert await values(cluster[index], "a", "b", "c") == [1, 2, 3]
    await eventually(lambda: quiet(cluster, "a", "b", "c"))


async def test_refusal_in_any_part_applies_none_and_names_it(cluster):
    await cluster[0].commit(transaction(put("b", {0: 0})))
    for order in (("a", "b"), ("b", "a")):
        with pytest.raises(Duplicate) as caught:
            await cluster[1].commit(transaction(*(put(name, {0: 1}) for name in order)))
        assert caught.value.detail["part"] == order.index("b")
    assert await values(cluster[2], "a", "b") == [None, 0]
    await eventually(lambda: quiet(cluster, "a", "b"))
    await cluster[2].commit(transaction(put("a", {0: 5})))


async def test_guard_of_another_group_refuses_the_whole(cluster):
    guard = Part(key("parent"), guards=(Guard(GuardKind.HAS, 1, (1,), fails_as="foreign_key"),))
    with pytest.raises(Conflict) as caught:
        await cluster[0].commit(transaction(put("child", {0: 1}), guard))
    assert caught.value.detail["fails_as"] == "foreign_key"
    await cluster[0].commit(transaction(put("parent", {0: 0})))
    await cluster[0].commit(transaction(put("child", {0: 1}), guard))
    assert await values(cluster[1], "child") == [1]


async def test_same_transaction_again_is_applied_once(cluster):
    both = transaction(put("a", {0: 1}), put("b", {0: 2}))
    await cluster[0].commit(both)
    await cluster[1].commit(both, 1)
    await cluster[2].commit(both, 2)
    assert await values(cluster[0], "a", "b") == [1, 2]
    assert await cluster[1].outcome(both.id, key("a")) == "applied"
    assert await cluster[1].outcome(both.id, key("b")) == "applied"


async def test_writer_that_meets_a_finished_transaction_goes_on_quickly(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.resolver.INTENT_TIMEOUT_S", 60.0)
    await cluster[0].commit(transaction(put("a", {0: 1}), put("b", {0: 2})))
    await cluster[1].commit(transaction(put("b", {0: 3}, Op.UPDATE, {0: 2})))
    assert await values(cluster[2], "b") == [3]


async def test_undecided_intent_is_read_past_and_ended_by_a_waiting_writer(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.resolver.INTENT_TIMEOUT_S", 0.2)
    await cluster[0].commit(transaction(put("a", {0: 0}), put("b", {0: 0})))
    await eventually(lambda: quiet(cluster, "a", "b"))

    def lose_primary(sender, to, message) -> bool:
        return isinstance(message, Coordinate) and message.operation.kind in (Kind.COMMIT_PRIMARY, Kind.ABORT)

    doomed = transaction(put("a", {0: 1}, Op.UPDATE), put("b", {0: 1}, Op.UPDATE))
    first = cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key("a"))).nodes[0]
    driver = next(store for node, store in cluster.wire.nodes.items() if node != first)
    cluster.wire.drop = lose_primary
    monkeypatch.setattr(driver._router, "_target", lambda replicas, tried: first)
    with pytest.raises((Indeterminate, Unavailable)):
        await driver.commit(doomed, timeout_s=0.2)
    cluster.wire.drop = lambda sender, to, message: False
    assert await values(cluster[0], "a", "b") == [0, 0]
    await cluster.wire.nodes[first].commit(transaction(put("b", {0: 7}, Op.UPDATE)))
    assert await values(cluster[0], "a", "b") == [0, 7]
    with pytest.raises(Conflict):
        await cluster.wire.nodes[first].commit(doomed, 1)
    assert await values(cluster[0], "a", "b") == [0, 7]


async def test_writer_does_not_wait_for_a_transaction_whose_node_fell_silent(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.resolver.INTENT_TIMEOUT_S", 60.0)
    await cluster[0].commit(transaction(put("a", {0: 0}), put("b", {0: 0})))
    await eventually(lambda: quiet(cluster, "a", "b"))

    def lose_primary(sender, to, message) -> bool:
        return isinstance(message, Coordinate) and message.operation.kind in (Kind.COMMIT_PRIMARY, Kind.ABORT)

    first = cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key("a"))).nodes[0]
    silent, driver = next((node, store) for node, store in cluster.wire.nodes.items() if node != first)
    cluster.wire.drop = lose_primary
    with monkeypatch.context() as doomed:
        doomed.setattr(driver._router, "_target", lambda replicas, tried: first)
        with pytest.raises((Indeterminate, Unavailable)):
            await driver.commit(transaction(put("a", {0: 1}, Op.UPDATE), put("b", {0: 1}, Op.UPDATE)), timeout_s=0.2)
    cluster.wire.drop = lambda sender, to, message: False
    writer = cluster.wire.nodes[first]
    with pytest.raises((Indeterminate, Unavailable)):
        await writer.commit(transaction(put("b", {0: 6}, Op.UPDATE)), timeout_s=0.3)
    cluster.wire.cut.add(silent)
    async with asyncio.timeout(20.0):
        await writer.commit(transaction(put("b", {0: 7}, Op.UPDATE)))
    assert await values(writer, "a", "b") == [0, 7]


async def test_two_transactions_that_cross_both_end(cluster):
    await cluster[0].commit(transaction(put("a", {0: 0}), put("b", {0: 0})))

    async def run(store, n, *names):
        for _ in range(20):
            try:
                await store.commit(transaction(*(put(name, {0: n}, Op.UPDATE) for name in names)))
                return 1
            except Conflict:
                await asyncio.sleep(0.001 * n)
        return 0

    done = await asyncio.gather(run(cluster[0], 1, "a", "b"), run(cluster[1], 2, "b", "a"))
    assert done == [1, 1]
    a, b = await values(cluster[2], "a", "b")
    assert a == b


async def test_decision_of_a_dead_driver_is_finished_by_whoever_reads(cluster, monkeypatch):
    await cluster[0].commit(transaction(put("a", {0: 0}), put("b", {0: 0})))
    await eventually(lambda: quiet(cluster, "a", "b"))
    driver = cluster[0]

    async def dead(*args) -> None:
        return None

    monkeypatch.setattr(driver._resolver, "finish", dead)
    await driver.commit(transaction(put("a", {0: 1}, Op.UPDATE), put("b", {0: 1}, Op.UPDATE)))
    assert await values(cluster[1], "a", "b") == [1, 1]


async def test_decision_of_a_dead_driver_is_forgotten_by_the_next_coordinator(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.resolver.INTENT_TIMEOUT_S", 0.05)
    driver = cluster[0]

    async def dead(*args) -> None:
        return None

    monkeypatch.setattr(driver._resolver, "finish", dead)
    await driver.commit(transaction(put("a", {0: 1}), put("b", {0: 1})))
    for node in list(cluster.ids):
        await cluster.crash(node)
        cluster.start(node)
    await cluster[0].commit(transaction(put("a", {0: 2}, Op.UPDATE)))
    await eventually(lambda: cluster.total("decisions_adopted") and quiet(cluster, "a", "b"))
    assert await values(cluster[1], "a", "b") == [2, 1]


@pytest.mark.parametrize("seed", range(4))
async def test_sums_are_kept_under_loss_and_delay(seed, monkeypatch):
    monkeypatch.setattr("dht.register.resolver.INTENT_TIMEOUT_S", 0.2)
    cluster = Cluster(3, seed=seed)
    names = ["a", "b", "c", "d"]
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(*(put(name, {0: 100}) for name in names)))
    cluster.wire.loss, cluster.wire.delay_s = 0.03, 0.003
    chance = random.Random(seed)
    applied = 0

    async def client(store):
        nonlocal applied
        for _ in range(8):
            source, target = chance.sample(names, 2)
            try:
                x, y = await values(store, source, target)
                await store.commit(
                    transaction(put(source, {0: x - 1}, Op.UPDATE, {0: x}), put(target, {0: y + 1}, Op.UPDATE, {0: y})),
                    timeout_s=3,
                )
                applied += 1
            except DhtError:
                await asyncio.sleep(0.002)

    await asyncio.gather(*(client(cluster[i]) for i in range(3)))
    cluster.wire.loss = 0
    assert sum(await values(cluster[0], *names)) == 400
    assert applied > 0
    await cluster.stop()


async def test_retry_of_a_forgotten_transaction_is_indeterminate_whatever_fails(cluster, monkeypatch):
    driver = cluster[0]
    both = transaction(put("a", {0: 1}), put("b", {0: 2}))
    await driver.commit(both)
    await eventually(lambda: quiet(cluster, "a", "b"))
    await asyncio.gather(*(driver.commit(transaction(put("a", {n: n}, Op.UPDATE))) for n in range(1, 200)))

    async def out_of_reach(*args) -> DhtError:
        return Unavailable("b has no majority now")

    monkeypatch.setattr(driver._transactions, "_prepare", out_of_reach)
    with pytest.raises(Indeterminate) as caught:
        await driver.commit(both, 1)
    assert caught.value.detail["forgotten"]
    assert await driver.outcome(both.id, key("a")) == "unknown"


async def test_many_refusals_do_not_hide_what_became_of_a_transaction(cluster):
    driver = cluster[0]
    await driver.commit(transaction(put("a", {0: 0}), put("b", {0: 0})))
    await eventually(lambda: quiet(cluster, "a", "b"))
    read = {group.key: group.ballot for group in await driver.read([key("a"), key("b")])}

    def since(part: Part) -> Part:
        return msgspec.structs.replace(part, seen=read[part.key])

    won, lost = (transaction(*(since(put(name, {0: n}, Op.UPDATE)) for name in "ab")) for n in (1, 2))
    await driver.commit(won)
    await eventually(lambda: quiet(cluster, "a", "b"))
    refused = (driver.commit(transaction(since(put("a", {0: n}))), 1) for n in range(200))
    assert {type(error) for error in await asyncio.gather(*refused, return_exceptions=True)} == {Duplicate, Conflict}
    with pytest.raises(Conflict) as caught:
        await driver.commit(lost, 1)
    assert caught.value.detail["what"] == "window"
    await eventually(lambda: quiet(cluster, "a", "b"))
    for name in "ab":
        assert await driver.outcome(lost.id, key(name), read[key(name)]) == "not_applied"
        assert await driver.outcome(won.id, key(name), read[key(name)]) == "applied"
    assert await driver.outcome(b"n" * 16, key("a"), read[key("a")]) == "not_applied"
    assert await driver.outcome(b"n" * 16, key("a"), None) == "unknown"
    assert len((await driver.commit(won, 1)).ballots) == 2
    assert await values(driver, "a", "b") == [1, 1]


async def test_commit_that_gave_way_after_a_lost_one_is_no_conflict_unless_the_abort_is_recorded(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.routing.PREPARE_WAIT_S", 0.02)
    await cluster[0].commit(transaction(put("a", {0: 0}), put("b", {0: 0})))
    await eventually(lambda: quiet(cluster, "a", "b"))
    replicas = cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key("a"))).nodes
    driver = cluster.wire.nodes[replicas[1]]
    holder = Operation(Kind.PREPARE, b"h" * 16, put("a", {0: 9}, Op.UPDATE), 0, key("far"), None)
    await driver._router.submit(holder, 0, driver._deadline(1.0))
    ending = False

    def drop(sender, to, message) -> bool:
        nonlocal ending
        if isinstance(message, Coordinate) and message.operation.part.key == key("a"):
            ending |= message.operation.kind == Kind.ABORT
            return True
        return ending

    cluster.wire.drop = drop
    with pytest.raises(Indeterminate):
        await driver.commit(transaction(put("a", {0: 1}, Op.UPDATE), put("b", {0: 1}, Op.UPDATE)), timeout_s=1.5)
    assert ending


async def test_decision_that_is_not_chosen_yet_is_not_adopted(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.resolver.INTENT_TIMEOUT_S", 0.0)
    await cluster[0].commit(transaction(put("a", {0: 0}), put("b", {0: 0})))
    await eventually(lambda: quiet(cluster, "a", "b"))
    coordinator = next(store for store in cluster.wire.nodes.values() if store._router.coordinates(key("a")))
    id = b"u" * 16
    pending = Operation(Kind.PREPARE, id, put("b", {0: 1}, Op.UPDATE), 1, key("a"), None)
    await coordinator._router.submit(pending, 0, coordinator._deadline(1.0))
    await coordinator.commit(transaction(put("a", {1: 1}, Op.UPDATE)))
    state = coordinator._coordinator.cached(key("a"))
    commit = Operation(Kind.COMMIT_PRIMARY, id, put("a", {0: 1}, Op.UPDATE), others=(key("b"),))
    delta, _, _ = perform(state, commit, state.ballot, 0, state.ballot, RULES)
    state.apply(delta)
    await coordinator._resolver.adopt(key("a"))
    assert await values(cluster[1], "b") == [0]
