"""A follower beside domains that move step by step: each of its rules, told with it and without."""

from __future__ import annotations

import asyncio

import msgspec

from dht.domain.copy import NEVER_S
from dht.domain.messages import AskChanges
from dht.domain.rules import RULES
from dht.model import ZERO, Ballot, NodeId, Struct
from dht.rows import encode_row
from dht.storage.changes import ChangeLog
from dht.storage.registers import Header
from dht.world import Batch
from tests.dht.domain.beside import (
    BOTH,
    FLOOR,
    INTENT,
    Beside,
    collected,
    follow_rules,
    raised,
    stale,
    three,
    write,
)
from tests.dht.domain.small_world import TABLETS, World, key, play, value
from tests.dht.domain.test_transfer import Stage, staged
from tests.sim.test_rare_rules_epochs import taken_over


def test_follower_of_a_tablet_has_what_a_quorum_named_or_marked_and_goes_on_over_a_restart() -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        a, b, c = stage.keys[:3]
        write(stage, a, 1, "marked", 0, chosen=True)
        write(stage, b, 1, "agreed", 0, 2)
        await beside.rounds()
        assert (beside.row(a), beside.row(b), beside.row(c)) == (value("marked"), value("agreed"), None)
        assert beside.copy.open_count() == 0
        beside.follower.copy.note(0.0, 0.0)
        write(stage, b, 2, "newer", 0, 1)
        beside.restart()
        assert beside.copy.covered_s(a) == NEVER_S
        await beside.rounds(3)
        assert (beside.row(a), beside.row(b)) == (value("marked"), value("newer"))
        assert beside.copy.covered_s(b) > NEVER_S

    staged(story, 3)


@BOTH
def test_follow_chosen_only_value_of_a_minority_is_not_applied(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(follow_chosen_only=on))
        k = stage.keys[0]
        write(stage, k, 1, "chosen", 0, 1, 2, chosen=True)
        await beside.rounds()
        write(stage, k, 2, "perhaps", 0)
        await beside.rounds(2)
        assert beside.row(k) == value("chosen" if on else "perhaps")

    staged(story, 3)


@BOTH
def test_follow_inherited_marked_value_that_most_were_handed_is_not_applied(on: bool) -> None:
    """Two accepts of one replica each; two of the next epoch's replicas took the lower one over, and one the higher.

    See tests.sim.test_rare_rules_epochs: the next prepare may choose either.
    """

    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(follow_inherited_marked=on))
        k = stage.keys[0]
        write(stage, k, 1, "low", 2)
        write(stage, k, 2, "high", 0)
        await taken_over(stage)
        beside.line.deaf = {0, 3}
        await beside.rounds(3)
        assert beside.row(k) == (None if on else value("low"))
        opened = beside.copy.opened(k)
        assert (opened is not None) is on

    staged(story, 4)


@BOTH
def test_cover_by_quorum_one_replica_that_missed_a_write_covers_nothing(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(cover_by_quorum=on))
        k = stage.keys[0]
        write(stage, k, 1, "new", 1, 2, chosen=True)
        at_s = await beside.wait()
        beside.line.deaf = {1, 2}
        await beside.rounds()
        assert stale(beside, k, at_s - 1.0, value("new")) is not on

    staged(story, 3)


@BOTH
def test_cover_from_begin_write_during_the_round_is_not_promised(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(cover_from_begin=on))
        k = stage.keys[0]
        asked: set[int] = set()
        acknowledged_s = 0.0

        async def after(number: int, message: Struct) -> None:
            nonlocal acknowledged_s
            if isinstance(message, AskChanges):
                asked.add(number)
                if asked == {0, 1, 2} and not acknowledged_s:
                    write(stage, k, 1, "new", 0, 1, 2, chosen=True)
                    acknowledged_s = beside.world.cluster.machines[0].clock.monotonic()
                    await beside.wait()

        beside.line.after = after
        await beside.rounds()
        assert acknowledged_s
        assert stale(beside, k, acknowledged_s, value("new")) is not on

    staged(story, 3)


@BOTH
def test_open_is_older_register_of_which_more_was_heard_is_not_promised(on: bool) -> None:
    """The value was chosen by 0 and 1; the follower hears 0, which does not know that, and 2, which has it not."""

    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(open_is_older=on))
        k = stage.keys[0]
        write(stage, k, 1, "new", 0, 1)
        at_s = await beside.wait()
        beside.line.deaf = {1}
        await beside.rounds()
        assert beside.copy.open_count() == 1
        assert beside.copy.covered_s(stage.keys[1]) >= at_s
        assert stale(beside, k, at_s - 1.0, value("new")) is not on
        prefix_covered_s = beside.copy.prefix_covered_s(k[:3])
        assert (prefix_covered_s >= at_s) is not on
        beside.line.deaf = set()
        await beside.rounds()
        assert beside.row(k) == value("new")
        assert beside.copy.open_count() == 0

    staged(story, 3)


@BOTH
def test_intents_stay_open_transaction_that_may_be_decided_is_not_promised(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(intents_stay_open=on))
        k = stage.keys[0]
        ballot = Ballot(1, 2, 1, b"p", 1, 1)
        for number in (0, 1, 2):
            node, batch = stage.world.node(number), Batch()
            node.registers.replace(batch, k, Header(ballot, ballot, ballot, b"d" * 16), {INTENT: encode_row({0: 1})})
            node.boot.disk.submit(batch)
        at_s = await beside.wait()
        await beside.rounds(2)
        assert beside.copy.standing(k) == ballot
        assert (beside.copy.covered_s(k) < at_s) is on
        write(stage, k, 2, "finished", 0, 1, 2, chosen=True)
        await beside.rounds()
        assert beside.copy.covered_s(k) >= at_s

    staged(story, 3)


@BOTH
def test_overflow_surveyed_changes_that_were_forgotten_are_found_by_comparing(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(overflow_surveyed=on))
        for number in (0, 1, 2):
            registers = stage.world.node(number).registers
            log = registers.changes
            registers.changes = ChangeLog(2)
            registers.changes.count = registers.changes.forgotten = log.count
        for i, k in enumerate(stage.keys[:5]):
            write(stage, k, 1, f"v{i}", 0, 1, 2, chosen=True)
        at_s = await beside.wait()
        await beside.rounds()
        assert stale(beside, stage.keys[0], at_s - 1.0, value("v0")) is not on
        await beside.rounds(2)
        assert beside.copy.covered_s(stage.keys[0]) >= at_s
        assert (beside.row(stage.keys[0]) == value("v0")) is on

    staged(story, 3)


@BOTH
def test_gone_is_erased_group_that_was_deleted_and_collected_unseen_leaves_the_copy(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(gone_is_erased=on))
        k = stage.keys[0]
        write(stage, k, 1, "old", 0, 1, 2, chosen=True)
        await beside.rounds()
        assert beside.row(k) == value("old")
        collected(stage, k)
        at_s = await beside.wait()
        beside.restart()
        await beside.rounds(4)
        assert beside.copy.covered_s(k) >= at_s
        assert beside.row(k) == (None if on else value("old"))
        if on:
            assert (beside.copy.standing(k), beside.copy.told_at(k)) == (ZERO, FLOOR)

    staged(story, 3)


@BOTH
def test_generation_begins_again_write_that_the_recovery_lost_leaves_the_copy(on: bool) -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        k = key(0)
        await world.put(0, k, "kept")
        beside = Beside(world, follow_rules(generation_begins_again=on))
        await beside.rounds(3)
        await world.put(0, k, "lost", skip=(2,))
        await beside.rounds()
        assert beside.row(k) == value("lost")
        world.cluster.crash(0)
        world.cluster.crash(1)
        await world.domain(2).generations.recover([], accept_data_loss=True)
        await world.until(lambda: all(world.domain(2).tablets.serves(t) for t in range(TABLETS)), what="serving")
        await beside.rounds(6)
        assert beside.follower.chain.newest is not None
        assert beside.follower.chain.newest.generation == 2
        assert beside.row(k) == value("kept" if on else "lost")

    play(story)


@BOTH
def test_followed_served_only_sealed_replica_covers_nothing(on: bool) -> None:
    """The tablet went from 0 to 1 and was written there; the follower knows the first link, and asks 0."""

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        stage.write(0, k, 1, "old")
        beside = Beside(stage.world)
        await beside.rounds(3)
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        stage.write(1, k, 2, "new", epoch=2)
        at_s = await beside.wait()
        beside.line.deaf = {1}
        await beside.rounds(2)
        assert stale(beside, k, at_s - 1.0, value("new")) is not on

    staged(story, 2, msgspec.structs.replace(RULES, followed_served_only=on))


@BOTH
def test_followed_durable_value_that_its_replica_forgets_is_not_told(on: bool) -> None:
    async def story(stage: Stage) -> None:
        beside = Beside(stage.world)
        await beside.rounds(3)
        k = stage.keys[0]
        disk = stage.world.cluster.machines[0].disk
        disk.slowness = 1e5
        stage.write(0, k, 1, "forgotten", chosen=False)
        following = asyncio.create_task(beside.rounds())
        await beside.wait()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert beside.row(k) == (None if on else value("forgotten"))

    staged(story, 1, msgspec.structs.replace(RULES, followed_durable=on))


def test_change_log_forgets_the_oldest_and_tells_how_far_it_reaches_back() -> None:
    log = ChangeLog(3)
    for name in (b"a", b"b", b"a", b"c", b"d"):
        log.note(name)
    assert (log.count, log.forgotten) == (5, 2)
    assert log.after(2, 10) == ([b"a", b"c", b"d"], 5, False)
    assert log.after(2, 2) == ([b"a", b"c"], 4, True)
    assert log.after(5, 2) == ([], 5, False)


@BOTH
def test_floor_of_all_group_made_since_a_replica_answered_is_not_told_above_its_ballot(on: bool) -> None:
    """It is made after two replicas answered, and the third hears of a floor above its ballot before it answers."""

    async def story(stage: Stage) -> None:
        beside = await three(stage, follow_rules(floor_of_all=on))
        k = stage.keys[0]
        answered: set[int] = set()
        call = beside.line.call

        async def third_comes_last(to: NodeId, message: Struct, timeout_s: float) -> Struct:
            number = next(i for i, machine in enumerate(stage.world.cluster.machines) if machine.node_id == to)
            if number == 0 and not answered.issuperset({0}) and isinstance(message, AskChanges):
                while answered != {1, 2}:
                    await beside.wait()
                write(stage, k, 3, "new", 1, 2)
                for other in (1, 2):
                    raised(stage, other)
                collected(stage, stage.keys[1], 0)
            reply = await call(to, message, timeout_s)
            answered.add(number)
            return reply

        beside.line.call = third_comes_last  # type: ignore[method-assign]
        before = beside.copy.told_at(k)
        await beside.rounds()
        written = stage.world.node(1).registers.header(k).accepted
        assert before < written < FLOOR
        assert beside.row(k) is None
        assert (beside.copy.told_at(k) < written) is on
        await beside.rounds()
        assert beside.row(k) == value("new")
        assert beside.copy.told_at(k) == written

    staged(story, 3)
