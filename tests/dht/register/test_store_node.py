"""Writes and reads of single groups on three replicas."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from register_cluster import Cluster, eventually

from dht.errors import Conflict, Duplicate, Indeterminate, Invalid, NotFound, NotServing, Unavailable
from dht.model import ZERO, Change, Guard, GuardKind, Op, Part, Transaction
from dht.register.catalog import is_sequence, sequence_group, shard_home
from dht.register.messages import ListGroups
from dht.rows import decode_row, group_key, row_key

ids = iter(range(1, 10**9))


def key(name) -> bytes:
    return group_key("db", "f", (name,))


def transaction(*parts: Part, id: bytes | None = None) -> Transaction:
    return Transaction(id or next(ids).to_bytes(16, "big"), "db", 0, parts)


def insert(name, pk=(1,), columns=None, table=1) -> Part:
    return Part(key(name), changes=(Change(Op.INSERT, table, pk, columns or {}),))


def update(name, columns, guards=None, pk=(1,), seen=None) -> Part:
    return Part(key(name), seen, changes=(Change(Op.UPDATE, 1, pk, columns, guards or {}),))


async def rows(store, name) -> dict:
    (read,) = await store.read([key(name)])
    return {k: decode_row(v) for k, v in read.rows.items()}


async def row(store, name, pk=(1,)) -> dict | None:
    return (await rows(store, name)).get(row_key(1, pk))


@pytest.fixture(params=[1, 2, 3, 5])
async def any_size(request):
    cluster = Cluster(request.param, min(request.param, 5) if request.param != 5 else 5)
    await cluster[0].create_database("db")
    yield cluster
    await cluster.stop()


@pytest.fixture
async def cluster():
    cluster = Cluster(3)
    await cluster[0].create_database("db")
    yield cluster
    await cluster.stop()


async def test_write_is_read_at_every_node_whatever_the_size(any_size):
    for n, node in enumerate(any_size.ids):
        store = any_size.wire.nodes[node]
        applied = await store.commit(transaction(insert(n, columns={0: n})))
        for other in any_size.wire.nodes.values():
            (read,) = await other.read([key(n)])
            assert read.ballot == applied.ballots[0]
            assert decode_row(read.rows[row_key(1, (1,))]) == {0: n}


async def test_read_of_absent_group_is_empty_at_zero(cluster):
    (read,) = await cluster[1].read([key("no")])
    assert (read.ballot, read.rows) == (ZERO, {})


async def test_known_ballot_brings_no_rows(cluster):
    applied = await cluster[0].commit(transaction(insert("a")))
    (read,) = await cluster[1].read([key("a")], [applied.ballots[0]])
    assert read.rows is None


async def test_many_groups_take_one_frame_to_each_peer(cluster):
    for n in range(30):
        await cluster[0].commit(transaction(insert(n, columns={0: n})))
    cluster.wire.messages.clear()
    read = await cluster[0].read([key(n) for n in range(30)])
    assert [decode_row(next(iter(g.rows.values())))[0] for g in read] == list(range(30))
    assert cluster.wire.messages.get("ReadReplica") == 2


async def test_second_write_of_a_group_is_one_round_trip(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    cluster.wire.messages.clear()
    before = cluster.total("prepares")
    for n in range(5):
        await cluster[0].commit(transaction(update("a", {0: n})))
    assert cluster.total("prepares") == before
    assert "Prepare" not in cluster.wire.messages
    assert cluster.wire.messages["Accept"] == 10


async def test_concurrent_writes_are_batched_into_few_accepts(cluster):
    await cluster[0].commit(transaction(insert("a", columns={})))
    cluster.wire.messages.clear()
    await asyncio.gather(*(cluster[0].commit(transaction(update("a", {n: n}))) for n in range(50)))
    assert cluster.wire.messages["Accept"] <= 6
    assert await row(cluster[2], "a") == {n: n for n in range(50)}


async def test_compare_and_set_from_all_nodes_has_one_winner_each_round(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))

    async def try_it(store, n):
        try:
            await store.commit(transaction(update("a", {0: n + 1}, {0: n})))
        except Conflict:
            return 0
        return 1

    for n in range(30):
        assert sum(await asyncio.gather(*(try_it(cluster[i], n) for i in range(3)))) == 1


async def test_writers_of_different_columns_do_not_conflict(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0, 1: 0})))
    for n in range(20):
        await asyncio.gather(
            cluster[0].commit(transaction(update("a", {0: n + 1}, {0: n}))),
            cluster[1].commit(transaction(update("a", {1: n + 1}, {1: n}))),
        )
    assert await row(cluster[2], "a") == {0: 20, 1: 20}


async def test_duplicate_insert_is_refused_with_its_place(cluster):
    await cluster[0].commit(transaction(insert("a")))
    with pytest.raises(Duplicate) as caught:
        await cluster[2].commit(transaction(insert("a")))
    assert caught.value.detail["what"] == "change"


async def test_same_transaction_again_is_applied_once(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    again = transaction(update("a", {0: 1}, {0: 0}))
    first = await cluster[0].commit(again)
    assert await cluster[1].commit(again, 1) == first
    assert await cluster[2].outcome(again.id, key("a")) == "applied"


async def test_outcome_of_unknown_transaction_ends_it(cluster):
    late = transaction(insert("a"))
    assert await cluster[1].outcome(late.id, key("a")) == "not_applied"
    with pytest.raises(Conflict):
        await cluster[0].commit(late)
    assert await rows(cluster[0], "a") == {}


async def test_unknown_database_is_not_found():
    cluster = Cluster(3)
    with pytest.raises(NotFound):
        await cluster[0].commit(transaction(insert("a")))
    await cluster.stop()


async def test_guard_only_write_checks_and_changes_nothing(cluster):
    applied = await cluster[0].commit(transaction(insert("a")))
    await cluster[1].commit(transaction(Part(key("a"), guards=(Guard(GuardKind.HAS, 1, (1,)),))))
    with pytest.raises(Conflict):
        await cluster[1].commit(transaction(Part(key("a"), guards=(Guard(GuardKind.ABSENT, 1, (1,)),))))
    assert (await cluster[0].read([key("a")], [applied.ballots[0]]))[0].ballot >= applied.ballots[0]


async def test_one_node_down_changes_nothing_for_clients_of_the_others(cluster):
    for n in range(10):
        await cluster[0].commit(transaction(insert(n, columns={0: n})))
    await cluster.crash(cluster.ids[0])
    for n in range(10):
        assert await row(cluster[1], n) == {0: n}
        await cluster[2].commit(transaction(update(n, {0: n + 100})))
        assert await row(cluster[1], n) == {0: n + 100}


async def test_node_that_missed_writes_gets_the_whole_and_reads_are_right_meanwhile(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    for index in range(3):
        gone = cluster.ids[index]
        await cluster.crash(gone)
        rest = next(s for s in cluster.wire.nodes.values())
        for n in range(3):
            await rest.commit(transaction(update("a", {0: n + 10 * index})))
        back = cluster.start(gone)
        assert (await row(back, "a"))[0] == 2 + 10 * index
        await rest.commit(transaction(update("a", {1: index})))
        await eventually(lambda node=gone: len({f.header(key("a")).digest for f in cluster.files.values()}) == 1)


async def test_all_nodes_killed_and_started_again_keep_what_was_acknowledged(cluster):
    for n in range(20):
        await cluster[n % 3].commit(transaction(insert(n, columns={0: n})))
    for node in cluster.ids:
        await cluster.crash(node)
    for node in cluster.ids:
        cluster.start(node)
    for n in range(20):
        assert await row(cluster[(n + 1) % 3], n) == {0: n}


async def test_without_majority_write_and_read_are_unavailable(cluster):
    await cluster[0].commit(transaction(insert("a")))
    cluster.wire.cut.update(cluster.ids[1:])
    with pytest.raises(Unavailable):
        await cluster[0].read([key("a")], timeout_s=0.2)
    with pytest.raises((Unavailable, Indeterminate)):
        await cluster[0].commit(transaction(update("a", {0: 1})), timeout_s=0.2)


async def test_write_whose_accepts_are_lost_is_indeterminate_and_its_outcome_can_be_asked(cluster):
    name = next(
        n
        for n in range(100)
        if cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key(n))).nodes[0]
        == cluster.ids[0]
    )
    await cluster[0].commit(transaction(insert(name, columns={0: 0})))
    cluster.wire.drop = lambda sender, to, message: True
    lost = transaction(update(name, {0: 1}))
    with pytest.raises(Indeterminate) as caught:
        await cluster[0].commit(lost, timeout_s=0.2)
    assert caught.value.detail["id"] == lost.id
    cluster.wire.drop = lambda sender, to, message: False
    outcome = await cluster[1].outcome(lost.id, key(name))
    assert await row(cluster[2], name) == ({0: 1} if outcome == "applied" else {0: 0})


async def test_chosen_marks_settle_all_replicas(cluster):
    await cluster[0].commit(transaction(insert("a")))
    await eventually(lambda: all(f.header(key("a")).settled for f in cluster.files.values()))


async def test_unfinished_write_of_a_dead_coordinator_is_finished_or_dropped_before_it_is_read(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    first = cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key("a"))).nodes[0]
    cluster.wire.drop = lambda sender, to, message: type(message).__name__ == "Accept"
    with pytest.raises((Indeterminate, Unavailable)):
        await cluster.wire.nodes[first].commit(transaction(update("a", {0: 1})), timeout_s=0.1)
    cluster.wire.drop = lambda sender, to, message: False
    values = [(await row(store, "a"))[0] for store in cluster.wire.nodes.values() for _ in range(2)]
    assert len(set(values)) == 1


async def test_cached_promise_is_not_used_in_another_tablet_epoch(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    for domain in cluster.domains.values():
        domain.epoch = 2
    before = cluster.total("prepares")
    applied = await cluster[0].commit(transaction(update("a", {0: 1})))
    assert applied.ballots[0].epoch == 2
    assert cluster.total("prepares") == before + 1


async def test_group_that_lost_its_rows_is_a_tombstone(cluster):
    await cluster[0].commit(transaction(insert("a")))
    await cluster[1].commit(transaction(Part(key("a"), changes=(Change(Op.DELETE, 1, (1,)),))))
    assert await rows(cluster[2], "a") == {}
    await eventually(lambda: all(f.header(key("a")).deleted for f in cluster.files.values()))
    await cluster[2].commit(transaction(insert("a", columns={0: 5})))
    assert await row(cluster[0], "a") == {0: 5}


async def test_write_that_saw_nothing_of_a_much_written_group_is_applied_once(cluster):
    await cluster[0].commit(transaction(insert("a")))
    for n in range(100):
        await cluster[0].commit(transaction(update("a", {0: n})))
    for index in range(3):
        late = transaction(update("a", {1: index}))
        await cluster[index].commit(late)
        assert (await row(cluster[0], "a"))[1] == index


async def test_too_large_value_is_invalid(cluster):
    with pytest.raises(Invalid):
        await cluster[0].commit(transaction(insert("a", columns={0: b"x" * (5 * 1024 * 1024)})))


@pytest.mark.parametrize("seed", range(4))
async def test_counters_are_exact_under_loss_and_delay(seed):
    cluster = Cluster(3, seed=seed)
    await cluster[0].create_database("db")
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    cluster.wire.loss = 0.05
    cluster.wire.delay_s = 0.004
    done = {"applied": 0, "unknown": 0}

    async def client(store):
        for _ in range(12):
            value = (await row(store, "a"))[0]
            try:
                await store.commit(transaction(update("a", {0: value + 1}, {0: value})), timeout_s=4)
                done["applied"] += 1
            except (Conflict, Unavailable):
                pass
            except Indeterminate:
                done["unknown"] += 1

    await asyncio.gather(*(client(cluster[i]) for i in range(3)))
    cluster.wire.loss = 0
    final = (await row(cluster[0], "a"))[0]
    assert done["applied"] <= final <= done["applied"] + done["unknown"]
    assert done["applied"] > 0
    await cluster.stop()


async def test_more_writes_at_once_than_the_window_keeps_are_all_applied(cluster):
    await cluster[0].commit(transaction(insert("a", columns={})))
    name = key("a")
    coordinator = next(store for store in cluster.wire.nodes.values() if store._router.coordinates(name))
    await asyncio.gather(*(coordinator.commit(transaction(update("a", {n: n}))) for n in range(300)))
    assert await row(cluster[2], "a") == {n: n for n in range(300)}


@pytest.mark.parametrize("step", ["prepare", "accept"])
async def test_bug_in_a_round_is_an_error_and_leaves_the_group_usable(cluster, monkeypatch, step):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    name = key("a")
    coordinator = next(store for store in cluster.wire.nodes.values() if store._router.coordinates(name))

    def broken(request) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        for store in cluster.wire.nodes.values():
            patched.setattr(store._acceptor, step, broken)
        coordinator._coordinator.forget(name)
        with pytest.raises((Unavailable, Indeterminate)):
            await coordinator.commit(transaction(update("a", {0: 1})), timeout_s=0.2)
    await coordinator.commit(transaction(update("a", {1: 2})))


async def test_proposer_ahead_of_its_quorum_gets_the_rows_of_the_others(cluster):
    await cluster[0].commit(transaction(insert("a", columns={0: 0})))
    await eventually(lambda: all(f.header(key("a")).settled for f in cluster.files.values()))
    first = cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key("a"))).nodes[0]
    cluster.wire.drop = lambda sender, to, message: type(message).__name__ == "Accept"
    with pytest.raises((Indeterminate, Unavailable)):
        await cluster.wire.nodes[first].commit(transaction(update("a", {0: 1})), timeout_s=0.1)
    cluster.wire.drop = lambda sender, to, message: False
    ahead = cluster.wire.nodes[first]
    when_durable, waiting = ahead._acceptor.when_durable, []
    ahead._acceptor.when_durable = lambda *asked: waiting.append(asked)
    try:
        await ahead.commit(transaction(update("a", {1: 1})))
    finally:
        assert waiting
        for asked in waiting:
            when_durable(*asked)


async def test_groups_of_a_tablet_not_served_are_not_listed(cluster):
    cluster.domains[cluster.ids[1]].admit = _refuse
    with pytest.raises(NotServing):
        cluster[1]._acceptor.list_groups(ListGroups("db", 0, b"", 10, (), (1,)))
    assert await cluster[0].drop_database("db")


def _refuse(tablet: int, epoch: int) -> None:
    raise NotServing("not here")


async def test_groups_of_many_tablets_are_listed_up_to_one_that_is_not_served(cluster):
    for n in range(300):
        await cluster[0].commit(transaction(insert(n)))
    acceptor, file = cluster[0]._acceptor, cluster.files[cluster.ids[0]]
    of = {tablet: sorted(k for n in range(300) if file.tablet(k := key(n)) == tablet) for tablet in (5, 2, 9)}
    listed = acceptor.list_groups(ListGroups("db", 5, of[5][0], 10_000, (2, 9), (1, 1, 1)))
    assert (list(listed.keys), listed.last, listed.tablets) == ([*of[5][1:], *of[2], *of[9]], b"", 3)
    cut = acceptor.list_groups(ListGroups("db", 5, b"", len(of[5]) + 1, (2, 9), (1, 1, 1)))
    assert (list(cut.keys), cut.last, cut.tablets) == ([*of[5], of[2][0]], of[2][0], 2)
    cluster.domains[cluster.ids[0]].admit = lambda tablet, epoch: _refuse(tablet, epoch) if tablet == 2 else None
    ended = acceptor.list_groups(ListGroups("db", 5, b"", 10_000, (2, 9), (1, 1, 1)))
    assert (list(ended.keys), ended.last, ended.tablets) == (of[5], b"", 1)
    with pytest.raises(Invalid):
        acceptor.list_groups(ListGroups("db", 0, b"", 10, tuple(range(64)), (1,) * 65))


async def test_drop_asks_a_node_for_many_tablets_at_once_and_tells_of_no_catalog_where_there_was_none(cluster):
    await cluster[0].commit(transaction(insert("a")))
    cluster.wire.messages.clear()
    assert await cluster[0].drop_database("db")
    assert cluster.wire.messages["ListGroups"] == 2 * 2 * 4  # twice 64 tablets, 16 at once, of two others
    assert "Learn" not in cluster.wire.messages


async def test_drop_in_pages_with_a_tablet_that_one_node_does_not_serve_empties_all_groups(cluster, monkeypatch):
    monkeypatch.setattr("dht.register.emptying._LIST_GROUPS_MAX", 3)
    for n in range(100):
        await cluster[0].commit(transaction(insert(n)))
    domain = cluster.domains[cluster.ids[1]]
    served = domain.admit
    refused = dict.fromkeys([0, 7, 8, 15, 63])
    domain.admit = lambda tablet, epoch, accept=False: (_refuse if tablet in refused else served)(tablet, epoch)
    assert await cluster[1].drop_database("db")
    assert await cluster[1].create_database("db")
    for n in range(100):
        assert await rows(cluster[2], n) == {}


async def test_group_that_one_replica_alone_has_is_emptied_by_the_drop_of_its_database(cluster):
    cluster.wire.drop = lambda sender, to, message: type(message).__name__ == "Accept"
    first = cluster.domains[cluster.ids[0]].replicas(cluster.files[cluster.ids[0]].tablet(key("a"))).nodes[0]
    with pytest.raises((Indeterminate, Unavailable)):
        await cluster.wire.nodes[first].commit(transaction(insert("a")), timeout_s=0.1)
    cluster.wire.drop = lambda sender, to, message: False
    assert any(decode_row(r) == {} for r in cluster.files[first].rows(key("a")).values())
    assert await cluster.wire.nodes[first].drop_database("db")
    assert await cluster[0].create_database("db")
    assert await rows(cluster[0], "a") == {}


async def test_drop_without_a_majority_that_lists_its_groups_is_unavailable(cluster):
    await cluster[0].commit(transaction(insert("a")))
    cluster.wire.drop = lambda sender, to, message: type(message).__name__ == "ListGroups"
    with pytest.raises(Unavailable, match=r"cannot be listed: 1 of 3 answered"):
        await cluster[0].drop_database("db", timeout_s=0.3)


async def test_reply_about_more_tablets_than_were_asked_for_counts_for_none(cluster):
    answer = cluster[1].answer

    async def boastful(sender, message):
        reply = await answer(sender, message)
        return msgspec.structs.replace(reply, tablets=65) if isinstance(message, ListGroups) else reply

    cluster[1].answer = boastful
    cluster.wire.cut.add(cluster.ids[2])
    with pytest.raises(Unavailable, match=r"cannot be listed: 1 of 3 answered"):
        await cluster[0].drop_database("db", timeout_s=0.5)


async def test_shard_of_a_database_is_served_but_is_not_at_home_here():
    cluster = Cluster(3)
    assert await cluster[0].create_database("db", home=shard_home(b"mark"))
    assert await cluster[1].list_databases() == ()
    assert await cluster[1].homes() == {"db": shard_home(b"mark")}
    await cluster[2].commit(transaction(insert("a")))
    await cluster[1].drop_database("db")
    assert await cluster[0].homes() == {}
    await cluster.stop()


async def test_shard_left_behind_is_no_part_of_the_pops_own_database_of_that_name():
    cluster = Cluster(3)
    await cluster[0].create_database("db", home=shard_home(b"mark"))
    await cluster[2].commit(transaction(insert("a")))
    assert await cluster[1].create_database("db")
    assert await cluster[0].list_databases() == ("db",)
    (found,) = await cluster[1].read([transaction(insert("a")).parts[0].key])
    assert found.rows == {}
    await cluster.stop()


async def test_sequence_of_a_local_table_is_raised_by_a_recovery_like_any_other():
    assert is_sequence(sequence_group("db", "~16"))
    assert sequence_group("db", "~16") != sequence_group("db", "16")
