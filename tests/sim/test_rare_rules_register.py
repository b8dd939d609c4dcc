"""Rules of the registers whose breaking random runs show too seldom: one hand-made schedule for each.

Every story is told with the rule and without it, and returns what a client saw. With the rule that is what the store
promises; without it the promise is broken, so that the test fails when the rule is taken out of the code.
"""

from __future__ import annotations

import asyncio

import pytest

from dht.errors import Conflict, DhtError, Indeterminate, Unavailable
from dht.limits import WINDOW_TRANSACTIONS
from dht.model import Part, Struct
from dht.register.group import WINDOW_SLACK_TRANSACTIONS
from dht.register.messages import Accept, Coordinate, Kind, Prepare
from dht.register.rules import Rules
from tests.sim.bench import Bench, failed, insert, play, update

FORGOTTEN_AFTER = WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS + 1
"""Writes of a group after which a transaction is no longer in its window."""
BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])


@BOTH
def test_promise_durable_forgotten_promise_loses_an_acknowledged_write(on: bool) -> None:
    """Two proposers and a restart between a promise and its accept.

    0 holds the promise of all three. 2 prepares a higher ballot at 1, whose disk is slow; 1 loses its power before the
    flush and comes back with 0's promise only. 0 writes column 0 with the votes of 0 and 1: acknowledged. Had 1 told
    its promise before it was durable, 2 now writes column 1 on the state before that, with the votes of 1 and 2.
    """

    async def story(bench: Bench) -> object:
        key = bench.key(0)
        await bench.propose(0, insert(key, {0: 0, 1: 0}))
        go_on = asyncio.Event()

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if 2 in (sender, to) and 0 in (sender, to):
                return go_on.is_set()
            if sender == 2 and isinstance(message, Accept):
                await go_on.wait()
            return True

        bench.gate = gate
        bench.flush(1, fast=False)
        other = asyncio.create_task(bench.propose(2, update(key, {1: 1}), 5.0))
        await asyncio.sleep(0.1)
        await bench.crash(1)
        bench.flush(1, fast=True)
        bench.start(1)
        await bench.propose(0, update(key, {0: 1}))
        go_on.set()
        await other
        return await bench.row(1, key)

    assert play(story, Rules(promise_durable=on)) == ({0: 1, 1: 1} if on else {0: 0, 1: 1})


@BOTH
def test_boot_in_ballot_two_values_at_one_ballot_read_differently(on: bool) -> None:
    """Two replicas, and a restart that begins with the ballots of the start before.

    It is a second lock: where both have to promise, they do not promise a ballot twice. So one is enough here, as it
    was for nodes of older versions.

    0's disk is slow: 1 alone promises and accepts the first value, and 0 loses its power. Cut off from 1, 0 prepares at
    itself alone, at the ballot of its first life if nothing tells the two apart, and accepts another value there. Both
    replicas now stand at one ballot, a reader takes them for agreed, and what it reads depends on where it asks.
    """

    async def story(bench: Bench) -> object:
        key = bench.key(0)
        bench.flush(0, fast=False)
        first = asyncio.create_task(failed(bench.propose(0, insert(key, {0: "first"}), 0.5)))
        await asyncio.sleep(0.1)
        await bench.crash(0)
        await first
        bench.flush(0, fast=True)
        bench.start(0)

        async def cut(sender: int, to: int, message: Struct) -> bool:
            return False

        connected, bench.gate = bench.gate, cut
        assert isinstance(await failed(bench.propose(0, insert(key, {0: "second"}), 0.5)), Indeterminate)
        await asyncio.sleep(2.0)
        bench.gate = connected
        return [await bench.row(number, key) for number in (0, 1, 0)]

    reads = play(story, Rules(boot_in_ballot=on, prepare_at_both=False), size=2)
    if on:
        assert reads[0] == reads[1] == reads[2]
    else:
        assert reads == [{0: "second"}, {0: "first"}, {0: "second"}]


@BOTH
def test_drop_after_failed_accept_state_that_nobody_promised_on_loses_an_acknowledged_write(on: bool) -> None:
    """A coordinator that is cut off, goes on proposing, and comes back with the highest ballot.

    0's accepts reach nobody, each at the next round, while 2 prepares and writes column 1: acknowledged. Back again, 0
    must not propose on the state that it had, at a ballot that no quorum promised it.
    """

    async def story(bench: Bench) -> object:
        key = bench.key(0)
        await bench.propose(0, insert(key, {0: 0, 1: 0}))

        async def gate(sender: int, to: int, message: Struct) -> bool:
            return 0 not in (sender, to)

        connected, bench.gate = bench.gate, gate
        for value in range(1, 7):
            assert isinstance(await failed(bench.propose(0, update(key, {0: value}), 0.5)), DhtError)
            await asyncio.sleep(2.0)
        await bench.propose(2, update(key, {1: 1}), 5.0)
        bench.gate = connected
        await bench.propose(0, update(key, {0: 9}), 5.0)
        return await bench.row(1, key)

    assert play(story, Rules(drop_after_failed_accept=on)) == {0: 9, 1: 1 if on else 0}


@BOTH
def test_window_floor_transaction_that_was_forgotten_is_applied_again(on: bool) -> None:
    """A retry that comes after its transaction left the window.

    The client did not hear that its write of "first" was applied. More writes than the window holds follow, the last
    one "last", acknowledged. The retry finds no record; only the floor tells that there may have been one.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(0)
        await bench[0].commit(bench.transaction(insert(key, {0: "begin"})))
        (read,) = await bench[0].read([key])
        part = update(key, {0: "first"})
        unheard = bench.transaction(Part(key, read.ballot, part.changes))
        await bench[1].commit(unheard)
        for number in range(FORGOTTEN_AFTER):
            await bench.propose(0, update(key, {0: number}))
        await bench.propose(0, update(key, {0: "last"}))
        error = await failed(bench[1].commit(unheard, 1))
        return error, await bench.row(2, key)

    error, row = play(story, Rules(window_floor=on))
    if on:
        assert isinstance(error, Indeterminate)
        assert row == {0: "last"}
    else:
        assert error is None
        assert row == {0: "first"}


@BOTH
def test_applied_floor_retry_of_an_applied_transaction_is_told_that_it_was_not(on: bool) -> None:
    """The same, with "first" pushed out of the window by others that were applied.

    Below the floor nothing is applied any more. That the retry's first attempt was not either, the store may only say
    while it has forgotten nothing applied since then.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(0)
        await bench[0].commit(bench.transaction(insert(key, {0: "begin"})))
        (read,) = await bench[0].read([key])
        unheard = bench.transaction(Part(key, read.ballot, update(key, {0: "first"}).changes))
        await bench[1].commit(unheard)
        for number in range(FORGOTTEN_AFTER):
            await bench.propose(0, update(key, {1: number}))
        return await failed(bench[1].commit(unheard, 1)), await bench.row(2, key)

    error, row = play(story, Rules(applied_floor=on))
    assert row == {0: "first", 1: FORGOTTEN_AFTER - 1}
    assert isinstance(error, Indeterminate if on else Conflict)


@BOTH
def test_seen_was_chosen_write_below_an_unchosen_ballot_of_its_gateway_is_applied_again(on: bool) -> None:
    """A proposer holds an older promise than another's accept that reached nobody else.

    0 holds a promise; 1 prepares above it with 1 and 2, and its accept stays with 1, not chosen. 1's client writes, and
    0 does it: accepted at 0 alone, at the ballot of the older promise. 0 prepares anew with 0 and 2, finds that and
    finishes it. The answer is lost, and the window forgets the write as the newest that it evicts: the floor is that
    older promise's ballot, below what 1 had accepted before the write began.
    """

    async def story(bench: Bench) -> object:
        key = bench.key(0)
        await bench.define()
        await bench[0].commit(bench.transaction(insert(key, {0: "begin"})))
        for _ in range(WINDOW_SLACK_TRANSACTIONS - 1):
            await bench.propose(0, update(key, {0: "begun"}))
        apart, answered = True, asyncio.Event()

        async def forwarded(message: Coordinate) -> None:
            await bench[0].answer((1).to_bytes(20, "big"), message)
            answered.set()

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate) and (sender, to) == (1, 0):
                tasks.append(asyncio.create_task(forwarded(message)))
                return False
            if apart and isinstance(message, Prepare):
                return {sender, to} != {0, 1}
            return not (apart and isinstance(message, Accept) and sender == 1)

        tasks: list[asyncio.Task[None]] = []
        bench.gate = gate
        lost = asyncio.create_task(failed(bench.propose(1, update(key, {1: 1}), 0.5)))
        await asyncio.sleep(0.01)
        write = asyncio.create_task(failed(bench[1].commit(bench.transaction(update(key, {0: "first"})))))
        await answered.wait()
        assert await bench.row(0, key) == {0: "first"}
        await lost
        apart = False
        for _ in range(WINDOW_TRANSACTIONS):
            await bench.propose(0, update(key, {0: "last"}))
        bench.silent = lambda me, node: (me, node) == (bench.ids[1], bench.ids[0])
        error = await write
        bench.silent = lambda me, node: False
        return error, await bench.row(0, key)

    error, row = play(story, Rules(seen_was_chosen=on))
    if on:
        assert isinstance(error, Indeterminate)
        assert row == {0: "last"}
    else:
        assert error is None
        assert row == {0: "first"}


@BOTH
def test_end_is_not_first_write_that_is_forgotten_while_its_end_waits_is_told_as_not_applied(on: bool) -> None:
    """A write waits at 1 behind an accept, and more behind it than the group remembers. Somebody who lost its reply
    asks 1 what became of it: the window has nothing, so 1 is to end it, behind all of them.
    """

    async def story(bench: Bench) -> object:
        key = bench.key(1)
        await bench.define()
        await bench[1].commit(bench.transaction(insert(key, {0: "before"})))
        go_on = asyncio.Event()

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Accept) and message.key == key:
                await go_on.wait()
            return True

        bench.gate = gate
        write = bench.transaction(update(key, {0: "applied"}))
        rest = [bench.transaction(update(key, {2: n})) for n in range(2 * WINDOW_TRANSACTIONS)]
        first = asyncio.create_task(bench[1].commit(bench.transaction(update(key, {1: 1}))))
        await asyncio.sleep(0.01)
        work = [asyncio.create_task(bench[1].commit(transaction)) for transaction in (write, *rest)]
        await asyncio.sleep(0.01)
        asked = asyncio.create_task(bench[1].outcome(write.id, key))
        await asyncio.sleep(0.3)
        go_on.set()
        await asyncio.gather(first, *work)
        row = await bench.row(0, key)
        return await asked, row and row[0]

    assert play(story, Rules(end_is_not_first=on)) == ("unknown" if on else "not_applied", "applied")


@BOTH
def test_find_majority_replica_that_missed_the_write_answers_alone(on: bool) -> None:
    """A row is inserted with the votes of 0 and 1; then 2, which missed it, is cut off from both and is asked."""

    async def story(bench: Bench) -> object:
        await bench.define()

        async def without_2(sender: int, to: int, message: Struct) -> bool:
            return 2 not in (sender, to)

        bench.gate = without_2
        await bench.propose(0, insert(bench.key(0), {0: "row", 1: 5}))
        try:
            return await bench.found(2, 5)
        except Unavailable:
            return "unavailable"

    assert play(story, Rules(find_majority=on)) == ("unavailable" if on else [])


@BOTH
def test_find_indexed_row_from_before_the_index_is_missed(on: bool) -> None:
    """A row is written and told chosen; then its table gets the index that the find uses."""

    async def story(bench: Bench) -> object:
        await bench.propose(0, insert(bench.key(0), {0: "row", 1: 5}))
        await asyncio.sleep(1.0)
        await bench.define()
        return [await bench.found(number, 5) for number in range(3)]

    assert play(story, Rules(find_indexed=on)) == [["row"] if on else []] * 3


@BOTH
def test_find_lists_unsettled_write_that_is_not_durable_yet_is_told_and_lost(on: bool) -> None:
    """A find between an accept and its flush, which the machine does not live to see.

    The write moves the row out of the condition. Its group does not match any more, so only the list of unsettled
    groups makes the find wait for the flush; else the row is gone for one find and back for the next.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(0)
        await bench.propose(0, insert(key, {0: "row", 1: 5}))
        await asyncio.sleep(1.0)
        bench.flush(0, fast=False)
        move = asyncio.create_task(failed(bench.propose(0, update(key, {1: 6}), 1.0)))
        await asyncio.sleep(0.1)
        asked = asyncio.create_task(bench.found(0, 5, 0.5))
        await asyncio.sleep(0.7)
        told = asked.result() if asked.done() and asked.exception() is None else "nothing"
        await bench.crash(0)
        await asyncio.gather(asked, move, return_exceptions=True)
        bench.flush(0, fast=True)
        bench.start(0)
        return told, await bench.found(0, 5)

    assert play(story, Rules(find_lists_unsettled=on), size=1) == ("nothing" if on else [], ["row"])


@BOTH
def test_abort_before_touching_intent_transaction_is_applied_by_half(on: bool) -> None:
    """The commit of the primary is on its way for longer than a writer waits for the intent of the other group.

    The writer at node 2 ends the intent. If the primary does not know of it, the commit passes there after all, is
    acknowledged, and finds nothing left to finish in the other group.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        primary, other = bench.key(1), bench.key(2)
        for key in (primary, other):
            await bench[0].commit(bench.transaction(insert(key, {0: 0, 1: 0})))
        go_on = asyncio.Event()

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate) and message.operation.kind == Kind.COMMIT_PRIMARY:
                await go_on.wait()
            return True

        bench.gate = gate
        both = bench.transaction(update(primary, {0: 1}), update(other, {0: 1}))
        slow = asyncio.create_task(failed(bench[0].commit(both, timeout_s=9.0)))
        await asyncio.sleep(0.1)
        writer = bench.transaction(update(other, {1: 1}))
        await bench[2].commit(writer, timeout_s=9.0)
        go_on.set()
        error = await slow
        await asyncio.sleep(5.0)
        return error, [await bench.row(1, key) for key in (primary, other)]

    error, rows = play(story, Rules(abort_before_touching_intent=on))
    assert isinstance(error, Conflict) if on else error is None
    assert rows == [{0: 0 if on else 1, 1: 0}, {0: 0, 1: 1}]


@BOTH
def test_decision_kept_committed_transaction_loses_a_group(on: bool) -> None:
    """The transaction's node dies after the commit and before the other group heard of it.

    The primary is then written so often that its window forgets the transaction. Whoever meets the intent asks the
    primary: the decision record is all that still says that it was applied, and acknowledged.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        primary, other = bench.key(1), bench.key(2)
        for key in (primary, other):
            await bench[1].commit(bench.transaction(insert(key, {0: 0, 1: 0})))

        async def gate(sender: int, to: int, message: Struct) -> bool:
            return not (isinstance(message, Coordinate) and message.operation.kind == Kind.FINISH)

        connected, bench.gate = bench.gate, gate
        await bench[0].commit(bench.transaction(update(primary, {0: 1}), update(other, {0: 1})))
        await asyncio.sleep(0.2)
        await bench.crash(0)
        bench.gate = connected
        for number in range(FORGOTTEN_AFTER):
            await bench.propose(1, update(primary, {1: number}))
        await bench[2].commit(bench.transaction(update(other, {1: 1})), timeout_s=9.0)
        return [(await bench.row(1, key))[0] for key in (primary, other)]

    assert play(story, Rules(decision_kept=on)) == [1, 1 if on else 0]


@BOTH
def test_rollback_recorded_prepare_that_comes_after_the_abort_leaves_an_intent(on: bool) -> None:
    """A transaction is given up while its prepare of the other group is on its way; then the prepare arrives.

    Nobody will ever finish that intent by itself: it blocks the group until somebody meets it and asks around.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        primary, other = bench.key(1), bench.key(2)
        for key in (primary, other):
            await bench[0].commit(bench.transaction(insert(key, {0: 0})))
        go_on = asyncio.Event()
        late: list[asyncio.Task[object]] = []

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate) and message.operation.kind == Kind.PREPARE:

                async def deliver() -> object:
                    await go_on.wait()
                    return await failed(bench[to].answer(bench.ids[sender], message))

                late.append(asyncio.create_task(deliver()))
                return False
            return not (isinstance(message, Prepare) and sender == 0)

        bench.gate = gate
        both = bench.transaction(update(primary, {0: 1}), update(other, {0: 1}))
        error = await failed(bench[0].commit(both, timeout_s=3.0))
        assert isinstance(error, DhtError)
        await asyncio.sleep(1.0)
        go_on.set()
        await asyncio.gather(*late)
        return [bench.files[2].header(key).intents for key in (primary, other)]

    assert play(story, Rules(rollback_recorded=on)) == [0, 0 if on else 1]


@BOTH
def test_op_in_ballot_two_operations_of_one_start_share_a_ballot(on: bool) -> None:
    """Locally only: a proposer is a replica and keeps its own promise, so that its next round is higher anyway.

    The rule is a second lock: it holds even if two rounds of one node on one group should ever run side by side.
    """

    async def story(bench: Bench) -> object:
        context = bench[0]._context
        return context.ballot(1, 7) == context.ballot(1, 7)

    assert play(story, Rules(op_in_ballot=on)) is not on
