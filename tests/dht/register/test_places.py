"""Groups of local families over several PoPs: where they are looked for, and what is said of what is out of reach."""

from __future__ import annotations

import asyncio
import os

import pytest
from spanning_cluster import Spanning

from dht.errors import Conflict, Duplicate, Indeterminate, Invalid, Unavailable
from dht.limits import IDS_APART, SPANNING_ID_MAX
from dht.model import (
    ZERO,
    Applied,
    Change,
    Comparison,
    Constraint,
    FindQuery,
    Op,
    Order,
    Part,
    Scope,
    Transaction,
)
from dht.register import catalog
from dht.register import places as places_module
from dht.rows import decode_row, group_key

TABLE = 16


@pytest.fixture
async def pops():
    """Each has a shard."""
    made = Spanning("a", "b", "c")
    for name in made.pops:
        part = Part(group_key("d", "~first", (name,)), None, (Change(Op.INSERT, 99, (1,), {}),))
        await made.places(name).commit(Transaction(os.urandom(16), "d", 0, (part,), (0,)))
    made.asked()
    made.made.clear()
    return made


def key_of(number):
    return group_key("d", "~f", (number,))


def part(number, op=Op.INSERT, value=0, **more):
    columns = {} if op is Op.DELETE else {1: number, 2: value} if op is Op.INSERT else {2: value}
    return Part(key_of(number), more.get("seen"), (Change(op, TABLE, (number,), columns),))


def transaction(*parts, created=None):
    made = [i for i, one in enumerate(parts) if one.changes[0].op is Op.INSERT] if created is None else created
    return Transaction(os.urandom(16), "d", 0, parts, tuple(made))


async def make(store, *numbers):
    return await store.commit(transaction(*(part(number, value=number) for number in numbers)))


async def value(store, number):
    (found,) = await store.read([key_of(number)])
    return [decode_row(row)[2] for row in found.rows.values()]


async def test_group_is_made_here_and_nobody_else_is_asked(pops):
    store = pops.places("a")
    await make(store, 1)
    assert await value(store, 1) == [1]
    assert set(pops.asked()) == {"a"}
    assert pops.made == [key_of(1)]


async def test_far_group_is_looked_for_everywhere_once_and_then_asked_of_its_pop(pops):
    await make(pops.places("a"), 1)
    store = pops.places("b")
    pops.asked()
    assert await value(store, 1) == [1]
    assert pops.asked() == {"a": ["read"], "b": ["read"], "c": ["read"]}
    (found,) = await store.read([key_of(1)])
    assert pops.asked() == {"a": ["read"]}
    (again,) = await store.read([key_of(1)], [found.ballot])
    assert (again.ballot, again.rows) == (found.ballot, None)
    assert pops.asked() == {"a": ["read"]}


async def test_far_write_is_one_message_to_the_groups_pop(pops):
    await make(pops.places("a"), 1)
    store = pops.places("b")
    await value(store, 1)
    pops.asked()
    await store.commit(transaction(part(1, Op.UPDATE, 9), created=()))
    assert pops.asked() == {"a": ["commit"]}
    assert await value(pops.places("c"), 1) == [9]


async def test_absence_is_told_when_every_pop_has_answered(pops):
    (found,) = await pops.places("a").read([key_of(1)])
    assert (found.ballot, found.rows) == (ZERO, {})
    assert set(pops.asked()) == {"a", "b", "c"}


@pytest.mark.parametrize("away", ["b", "c"])
async def test_absence_is_not_told_while_a_pop_is_out_of_reach(pops, away):
    store = pops.places("a")
    pops.cut(away)
    with pytest.raises(Unavailable, match=f"may be in {away}: {away} is cut off"):
        await store.read([key_of(1)])
    pops.heal()
    assert await value(store, 1) == []


async def test_group_in_reach_is_read_though_another_pop_and_the_list_are_not(pops):
    await make(pops.places("a"), 1)
    pops.cut("c")
    pops.home.away = Unavailable("global is cut off")
    assert await value(pops.places("b"), 1) == [1]


async def test_group_known_in_a_pop_that_is_out_of_reach_is_unavailable(pops):
    store = pops.places("b")
    await make(pops.places("a"), 1)
    await value(store, 1)
    pops.cut("a")
    for ask in (store.read([key_of(1)]), store.commit(transaction(part(1, Op.UPDATE, 2), created=()))):
        with pytest.raises(Unavailable, match="a is cut off"):
            await ask


async def test_shard_that_is_new_is_asked_before_absence_is_told(pops):
    pops.known = ["a", "b"]
    store = pops.places("a")
    await make(pops.places("c"), 1)
    assert await value(store, 1) == [1]
    pops.known = []
    assert [row.group for row in (await pops.places("a").find(query())).rows] == [key_of(1)]


async def test_pop_that_never_made_a_row_is_not_needed():
    """It may have been claimed, and never founded. Also where another database of the name had rows there."""
    pops = Spanning("a", "b", "c")
    pops.known = ["a", "c"]
    await make(pops.places("a"), 1)
    await make(pops.places("b"), 2)
    pops.cut("c")
    assert await value(pops.places("a"), 3) == []
    assert len((await pops.places("a").find(query())).rows) == 2


async def test_absence_is_not_told_while_the_list_of_pops_is_out_of_reach(pops):
    pops.home.away = Unavailable("domain global cannot be asked")
    with pytest.raises(Unavailable, match="domain global"):
        await pops.places("a").read([key_of(1)])


async def test_group_that_moved_is_found_where_it_is_now(pops):
    store, other = pops.places("c"), pops.places("b")
    await make(pops.places("a"), 1)
    assert await value(store, 1) == [1]
    await pops.places("a").commit(transaction(part(1, Op.DELETE), created=()))
    await make(other, 1)
    assert await value(store, 1) == [1]
    assert store.known_place(key_of(1)) == "b"
    await other.commit(transaction(part(1, Op.DELETE), created=()))
    assert await value(store, 1) == []
    assert store.known_place(key_of(1)) is None


@pytest.mark.parametrize("deletes_itself", [True, False])
async def test_group_of_a_key_that_is_made_once_is_gone_where_its_pop_says_so_though_others_are_away(
    pops, deletes_itself
):
    store = pops.places("a", made_once=True)
    await make(store, 1, 2)
    pops.cut("b", "c")
    await (store if deletes_itself else pops.places("a")).commit(transaction(part(1, Op.DELETE), created=()))
    for _ in range(2):
        assert await value(store, 1) == []
    assert await value(store, 2) == [2]
    with pytest.raises(Unavailable, match="may be in b, c"):
        await store.read([key_of(3)])  # never seen here: it may have been made there


async def test_group_of_a_key_that_is_made_once_is_asked_of_its_pop_alone_even_when_it_is_gone(pops):
    far = pops.places("b", made_once=True)
    await make(pops.places("a"), 1)
    assert await value(far, 1) == [1]
    await pops.places("a").commit(transaction(part(1, Op.DELETE), created=()))
    pops.asked()
    assert await value(far, 1) == []
    assert set(pops.asked()) == {"a"}
    pops.cut("a")
    with pytest.raises(Unavailable, match="a is cut off"):
        await far.read([key_of(1)])


async def test_ballot_of_an_absent_group_is_not_taken_for_rows(pops):
    here, far = pops.places("a"), pops.places("b")
    await make(here, 1)
    await value(far, 1)
    # Somebody else deletes it, and this node still believes that it is there.
    applied = await here.commit(transaction(part(1, Op.DELETE), created=()))
    await make(pops.places("c"), 1)
    (found,) = await far.read([key_of(1)], [applied.ballots[0]])
    assert found.rows, "the tombstone's ballot stood for the group"


async def test_ballot_of_ones_own_delete_is_not_taken_for_rows(pops):
    await make(pops.places("a"), 1)
    store = pops.places("b")
    await value(store, 1)
    applied = await store.commit(transaction(part(1, Op.DELETE), created=()))
    await make(pops.places("c"), 1)
    (found,) = await store.read([key_of(1)], [applied.ballots[0]])
    assert found.rows


async def test_refusal_names_the_group_for_humans(pops):
    pops.cut("b")
    with pytest.raises(Unavailable, match=r"group d/~f/1 is in no PoP that can be asked"):
        await pops.places("a").read([key_of(1)])


async def test_commit_over_two_pops_is_refused_and_says_where_its_parts_live(pops):
    await make(pops.places("a"), 1)
    await make(pops.places("b"), 2)
    store = pops.places("c")
    both = transaction(part(1, Op.UPDATE, 8), part(2, Op.UPDATE, 8), created=())
    with pytest.raises(Invalid, match="live in a and b") as refused:
        await store.commit(both)
    assert refused.value.detail["homes"] == ["a", "b"]
    assert (await value(store, 1), await value(store, 2)) == ([1], [2])


async def test_commit_of_groups_not_seen_before_finds_them_first(pops):
    await make(pops.places("a"), 1)
    store = pops.places("c")
    await store.commit(transaction(part(1, Op.UPDATE, 5), created=()))
    assert await value(store, 1) == [5]
    assert pops.pops["a"].asked.count("commit") == 2
    pops.cut("b")
    with pytest.raises(Unavailable):
        await store.commit(transaction(part(7, Op.UPDATE, 5), created=()))


async def test_cut_off_pop_makes_and_changes_its_own(pops):
    store = pops.places("a")
    await make(store, 1)
    pops.cut("b", "c")
    pops.home.away = Unavailable("cut")
    await make(store, 2)
    await store.commit(transaction(part(1, Op.UPDATE, 3), created=()))
    assert (await value(store, 1), await value(store, 2)) == ([3], [2])


async def test_group_made_that_this_node_knows_elsewhere_is_a_duplicate_there(pops):
    await make(pops.places("a"), 1)
    store = pops.places("b")
    await value(store, 1)
    with pytest.raises(Duplicate):
        await make(store, 1)
    assert await value(store, 1) == [1]
    assert not (await pops.shards["b"].read([key_of(1)]))[0].rows


async def test_retry_and_outcome_go_where_the_first_attempt_went(pops):
    store = pops.places("b")
    await make(pops.places("a"), 1)
    await value(store, 1)
    sent = transaction(part(1, Op.UPDATE, 6), created=())
    pops.pops["a"].lost = True
    with pytest.raises(Indeterminate):
        await store.commit(sent)
    pops.pops["a"].lost = False
    store._places.clear()
    pops.asked()
    assert await store.outcome(sent.id, key_of(1)) == "applied"
    await store.commit(sent, 1)
    assert pops.asked() == {"a": ["outcome", "commit"]}


async def test_outcome_that_this_node_knows_nothing_of_is_asked_of_all(pops):
    await make(pops.places("a"), 1)
    sent = transaction(part(1, Op.UPDATE, 6), created=())
    await pops.places("a").commit(sent)
    assert await pops.places("b").outcome(sent.id, key_of(1)) == "applied"
    assert await pops.places("b").outcome(b"n" * 16, key_of(1)) == "not_applied"
    pops.cut("c")
    with pytest.raises(Unavailable):
        await pops.places("b").outcome(b"n" * 16, key_of(1))


async def deleted_and_made_elsewhere(pops):
    """What b sent, the reply of which was lost, and b, which knows only where the group is by now."""
    store = pops.places("b")
    await make(pops.places("a"), 1)
    await value(store, 1)
    sent = transaction(part(1, Op.DELETE), created=())
    pops.pops["a"].lost = True
    with pytest.raises(Indeterminate):
        await store.commit(sent)
    pops.pops["a"].lost = False
    await make(pops.places("c"), 1)
    store = pops.places("b")
    assert await value(store, 1) == [1]
    assert store.known_place(key_of(1)) == "c"
    return sent, store


async def test_outcome_is_not_told_by_the_pop_that_made_the_group_anew(pops):
    sent, store = await deleted_and_made_elsewhere(pops)
    assert await store.outcome(sent.id, key_of(1)) == "applied"


async def test_retry_whose_first_attempt_is_forgotten_is_not_sent_where_the_group_is_now(pops):
    sent, store = await deleted_and_made_elsewhere(pops)
    assert await store.commit(sent, 1) == Applied((ZERO,))
    assert await value(store, 1) == [1]


async def test_retry_whose_first_attempt_never_arrived_is_a_conflict(pops):
    store = pops.places("b")
    await make(pops.places("a"), 1)
    with pytest.raises(Conflict, match="without being applied") as refused:
        await store.commit(transaction(part(1, Op.UPDATE, 6), created=()), 1)
    assert refused.value.detail["what"] == "intent"
    assert await value(store, 1) == [1]
    pops.cut("a")
    with pytest.raises(Indeterminate, match="a is cut off"):
        await store.commit(transaction(part(1, Op.UPDATE, 6), created=()), 1)


async def test_outcome_that_one_pop_knows_needs_no_other(pops):
    await make(pops.places("a"), 1)
    sent = transaction(part(1, Op.UPDATE, 6), created=())
    await pops.places("a").commit(sent)
    pops.cut("c")
    assert await pops.places("b").outcome(sent.id, key_of(1)) == "applied"


def query(order=None, limit=None, scope=Scope.POPS, **more):
    return FindQuery("d", TABLE, 0, more.get("constraints", ()), order, limit, scope=scope)


async def test_find_merges_all_pops_in_order_and_cuts_at_the_limit(pops):
    for name, numbers in {"a": (1, 4, 7), "b": (2, 5), "c": (3, 6)}.items():
        await make(pops.places(name), *numbers)
    store = pops.places("b")

    async def numbers(*arguments, **named):
        return [decode_row(row.row)[1] for row in (await store.find(query(*arguments, **named))).rows]

    assert await numbers() == [1, 2, 3, 4, 5, 6, 7]
    assert await numbers(Order((2,), True), 3) == [7, 6, 5]
    assert await numbers(Order((2,)), 2) == [1, 2]
    assert await numbers(constraints=(Constraint(2, Comparison.GT, (5,)),)) == [6, 7]
    assert await numbers(scope=Scope.NEAR) == [2, 5]
    pops.asked()
    await store.read([key_of(7)])
    assert pops.asked() == {"a": ["read"]}, "what a find met is known"


async def test_find_leaves_a_pop_out_only_where_it_may_and_counts_it(pops):
    for name, number in {"a": 1, "b": 2}.items():
        await make(pops.places(name), number)
    pops.cut("b")
    store = pops.places("a")
    with pytest.raises(Unavailable, match="cannot be searched in b"):
        await store.find(query())
    assert len((await store.find(query(scope=Scope.REACHABLE))).rows) == 1
    assert (store.counters["partial_finds"], store.counters["pops_left_out"]) == (1, 1)
    pops.home.away = Unavailable("cut")
    pops.cut("c")
    assert len((await store.find(query(scope=Scope.REACHABLE))).rows) == 1
    pops.cut("a")
    with pytest.raises(Unavailable):
        await store.find(query(scope=Scope.REACHABLE))


async def test_ids_of_two_pops_are_never_the_same_and_go_on_above_what_is_there(pops):
    a, b = pops.places("a"), pops.places("b")
    first, second = await a.reserve_ids("d", "~16", 3), await b.reserve_ids("d", "~16", 3)
    assert (first % IDS_APART, second % IDS_APART) == (0, 1)
    assert await a.reserve_ids("d", "~16", 1) == first + 3 * IDS_APART
    assert 100_000 < await b.reserve_ids("d", "~16", 1, above=100_000) < 100_000 + 2 * IDS_APART
    await a.raise_sequence("d", "~16", 200_001)
    assert 200_001 < await a.reserve_ids("d", "~16", 1) < 200_001 + 2 * IDS_APART


async def test_id_that_no_column_holds_is_refused(pops):
    store = pops.places("a")
    with pytest.raises(Invalid, match=r"ids of table 16 of d are used up in PoP a: .*make new rows in another PoP"):
        await store.reserve_ids("d", "~16", 1, above=SPANNING_ID_MAX - 1)
    assert ["100 % of the ids of table 16 of d" in text for text in store.ids.warnings()] == [True]


async def test_last_id_that_columns_hold_is_given_out(pops):
    assert await pops.places("a").reserve_ids("d", "~16", 1, above=SPANNING_ID_MAX - IDS_APART) <= SPANNING_ID_MAX


async def test_ids_that_come_to_an_end_are_warned_of_while_a_quarter_is_left(pops):
    store = pops.places("a")
    await store.reserve_ids("d", "~16", 1)
    assert store.ids.warnings() == []
    await store.reserve_ids("d", "~17", 1, above=SPANNING_ID_MAX // 4 * 3)
    (text,) = store.ids.warnings()
    assert text.startswith("75 % of the ids of table 17 of d are used up in PoP a, 2,097,1")
    await store.drop_again("d", ["a"], "")
    assert store.ids.warnings() == []


async def test_fence_is_raised_in_every_pop_and_names_the_one_that_is_out_of_reach(pops):
    store = pops.places("a")
    following, calls = 0, 0
    while following >= 0:
        following = await store.fence("d", 0, (key_of(1)[:4],), following)
        calls += 1
    assert calls == 3
    assert {name for name, asked in pops.asked().items() if "fence" in asked} == {"a", "b", "c"}
    pops.cut("c")
    with pytest.raises(Unavailable, match="c is cut off"):
        await store.fence("d", 0, (), 2 * places_module.FENCE_ORDINAL)


async def test_of_many_pops_the_hinted_one_is_asked_first_and_a_wrong_hint_is_no_answer():
    pops = Spanning(*(f"p{n}" for n in range(12)))
    await make(pops.places("p7"), 1)
    await make(pops.places("p8"), 2)
    pops.hints = {key_of(1): "p7", key_of(2): "p3"}
    pops.asked()
    store = pops.places("p0")
    assert await value(store, 1) == [1]
    assert set(pops.asked()) == {"p0", "p7"}
    assert await value(store, 2) == [2]
    assert len(pops.asked()) == 12


async def test_hint_that_is_not_found_in_time_leaves_time_to_ask_all():
    pops = Spanning(*(f"p{n}" for n in range(12)))
    await make(pops.places("p7"), 1, 2)
    store = pops.places("p0")

    async def hint(key):
        if key == key_of(1):
            await asyncio.Event().wait()
        return "p7"

    store._hint = hint
    begun_s = asyncio.get_running_loop().time()
    reads = await asyncio.wait_for(store.read([key_of(1), key_of(2)], None, 0.4), 5.0)
    assert all(read.rows for read in reads)
    assert asyncio.get_running_loop().time() - begun_s >= 0.19, "the hint had its time"
    assert store.counters["hinted"] == 1


async def test_first_look_of_a_node_at_a_database_of_many_pops_asks_for_the_list_and_not_all_of_them():
    pops = Spanning(*(f"p{n}" for n in range(12)))
    for name in pops.pops:
        await make(pops.places(name), name)
    pops.hints = {key_of("p7"): "p7"}
    pops.asked()
    store = pops.places("p0")
    store._shards.clear()
    assert await value(store, "p7") == ["p7"]
    assert set(pops.asked()) == {"p0", "p7"}
    assert store.counters["searched"] == 0


async def test_node_that_knew_few_pops_asks_of_the_many_that_came_since_only_the_hinted_one():
    pops = Spanning(*(f"p{n}" for n in range(12)))
    for name in pops.pops:
        await make(pops.places(name), name)
    pops.hints = {key_of("p7"): "p7", key_of("p8"): "p3"}
    pops.known = ["p0", "p1", "p2"]
    store = pops.places("p0")
    pops.asked()
    assert await value(store, "p7") == ["p7"]
    assert set(pops.asked()) == {"p0", "p1", "p2", "p7"}
    pops.known = ["p0", "p1", "p2"]
    assert await value(pops.places("p0"), "p8") == ["p8"], "a wrong hint is no answer"
    assert len(pops.asked()) == 12


async def test_first_look_at_a_database_finds_an_own_group_though_the_list_is_out_of_reach(pops):
    await make(pops.places("a"), 1)
    store = pops.places("a")
    store._shards.clear()
    pops.home.away = Unavailable("global is cut off")
    assert await value(store, 1) == [1]
    with pytest.raises(Unavailable, match="cannot be asked which PoPs have rows"):
        await value(store, 2)


async def test_shard_that_is_made_while_the_others_are_dropped_is_dropped_too():
    pops = Spanning("a", "b", "c")
    for name in ("a", "b"):
        await make(pops.places(name), name)
    drop = pops.shards["b"].drop_database

    mark = catalog.databases_of(pops.home.memory.read([catalog.REGISTRY_GROUP])[0].rows)["d"]

    async def meanwhile(database, timeout_s=None, home=None):
        pops.shards["b"].drop_database = drop
        await make(pops.places("c"), "c")
        return await drop(database, timeout_s, home)

    pops.shards["b"].drop_database = meanwhile
    assert sorted(await pops.places("a").drop("d", catalog.shard_home(mark))) == ["a", "b", "c"]
    assert ["d" in pop.memory.list_databases() for pop in pops.pops.values()] == [False] * 3


async def test_memory_of_places_is_bounded(pops, monkeypatch):
    monkeypatch.setattr(places_module, "PLACES_MAX", 5)
    monkeypatch.setattr(places_module, "SENT_MAX", 5)
    store = pops.places("a")
    for number in range(20):
        await make(store, number)
    assert len(store._places) == len(store._sent) == 5


async def test_refusal_of_a_guard_is_the_answer(pops):
    store = pops.places("b")
    await make(pops.places("a"), 1)
    gone = Change(Op.UPDATE, TABLE, (9,), {2: 1})
    with pytest.raises(Conflict):
        await store.commit(Transaction(os.urandom(16), "d", 0, (Part(key_of(1), None, (gone,)),)))


async def forgotten_where_its_group_is_now(pops, store):
    """What c sent to a, applied and forgotten there since; c had seen the group in b, whose ballots are far higher."""
    for _ in range(500):
        pops.pops["b"].memory._next_ballot()
    await make(pops.places("b"), 1)
    (seen,) = await store.read([key_of(1)])
    await pops.places("b").commit(transaction(part(1, Op.DELETE), created=()))
    await make(pops.places("a"), 1)
    assert await value(store, 1) == [1]
    sent = transaction(part(1, Op.UPDATE, 6, seen=seen.ballot), created=())
    pops.pops["a"].lost = True
    with pytest.raises(Indeterminate):
        await store.commit(sent)
    pops.pops["a"].lost = False
    for number in range(100):
        await pops.places("a").commit(transaction(part(1, Op.UPDATE, number), created=()))
    return sent, seen.ballot


@pytest.mark.parametrize("known", [True, False], ids=["sent to that PoP", "sent to nobody knows which"])
async def test_outcome_of_a_write_that_saw_its_group_in_another_pop_is_not_told_for_not_applied(pops, known):
    """Its ballot says nothing of the window of the PoP where the group is by now."""
    store = pops.places("c")
    sent, seen = await forgotten_where_its_group_is_now(pops, store)
    if not known:
        store = pops.places("c")
    assert await store.outcome(sent.id, key_of(1), seen) == "unknown"
    with pytest.raises(Indeterminate):
        await store.commit(sent, 1)
    assert await value(store, 1) == [99]


async def test_write_says_in_its_groups_pop_at_which_ballot_it_was_seen_there(pops):
    store = pops.places("c")
    await make(pops.places("a"), 1)
    (seen,) = await store.read([key_of(1)])
    for number in range(100):
        await pops.places("a").commit(transaction(part(1, Op.UPDATE, number), created=()))
    with pytest.raises(Conflict, match="changed too often"):
        await store.commit(transaction(part(1, Op.UPDATE, 6, seen=seen.ballot), created=()))
