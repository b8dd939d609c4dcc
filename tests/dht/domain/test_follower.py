"""A follower beside domains that move step by step: each of its rules, told with it and without."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from dht.codec import decode, encode
from dht.domain import copy as copy_module
from dht.domain.copy import NEVER_S
from dht.domain.follower import Follower
from dht.domain.messages import AskChanges
from dht.domain.rules import FOLLOW_RULES, RULES, FollowRules
from dht.errors import Unavailable
from dht.model import SYSTEM_INTENT, ZERO, Ballot, GroupKey, NodeId, Struct
from dht.rows import encode_row, row_key
from dht.sim.disk import SimDisk
from dht.storage.changes import ChangeLog
from dht.storage.registers import Header
from dht.world import Batch, Space
from tests.dht.domain.small_world import ROW, TABLETS, World, key, play, value
from tests.dht.domain.test_transfer import Stage, staged
from tests.sim.test_rare_rules_epochs import taken_over

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
INTENT = row_key(SYSTEM_INTENT, (b"t",))


class Line:
    """The follower's network: messages as bytes, to domains at once. `before` may act, or raise, first."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deaf: set[int] = set()
        self.after: Callable[[int, Struct], Awaitable[None]] | None = None

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        machines = self.world.cluster.machines
        number = next(i for i, machine in enumerate(machines) if machine.node_id == to)
        if number in self.deaf or not machines[number].answering:
            raise Unavailable("not heard", sent=False)
        reply = await self.world.domain(number).answer(b"f" * 20, decode(encode(message)))
        if self.after is not None:
            await self.after(number, message)
        return decode(encode(reply))

    def alive(self, node: NodeId) -> bool:
        return True

    def silent_s(self, node: NodeId) -> float:
        return 0.0

    def parted(self, node: NodeId) -> bool:
        return False

    def serve(self, answer: object) -> None:
        raise AssertionError("a follower is asked nothing, so it must not begin to serve")


class Beside:
    """A follower of the world's domain that makes a round when it is told to."""

    def __init__(self, world: World, rules: FollowRules = FOLLOW_RULES) -> None:
        self.world = world
        self.line = Line(world)
        self.disk = SimDisk(random.Random(1))
        self.rules = rules
        self.follower = self.begin()
        self.copy = self.follower.copy

    def begin(self) -> Follower:
        async def contacts() -> list[NodeId]:
            return [machine.node_id for machine in self.world.cluster.machines]

        clock = self.world.cluster.machines[0].clock
        name = self.world.running()[0].domain.name
        return Follower(name, clock, random.Random(2), self.line, self.disk, contacts, TABLETS, self.rules)

    def restart(self) -> None:
        self.follower = self.begin()
        self.copy = self.follower.copy

    async def rounds(self, count: int = 1) -> None:
        for _ in range(count):
            await self.follower.round()
            while self.follower._surveying is not None and not self.follower._surveying.done():
                await self.world.cluster.machines[0].clock.sleep(0.01)

    async def wait(self) -> float:
        """Some time passes; the time then."""
        await self.world.cluster.machines[0].clock.sleep(1.0)
        return self.world.cluster.machines[0].clock.monotonic()

    def row(self, k: GroupKey) -> bytes | None:
        return self.copy.registers.row(k, ROW)


async def three(stage: Stage, rules: FollowRules = FOLLOW_RULES) -> Beside:
    """The stage's tablet on machines 0, 1, 2, and a follower that has compared itself with them."""
    stage.move(0, 1, 2)
    await stage.tell(0, 1, 2)
    for number in (0, 1, 2):
        assert await stage.initialise(number)
    beside = Beside(stage.world, rules)
    await beside.rounds(3)
    assert beside.copy.covered_s(stage.keys[0]) > NEVER_S
    return beside


def write(stage: Stage, k: GroupKey, round: int, text: str, *numbers: int, chosen: bool = False) -> None:
    for number in numbers:
        stage.write(number, k, round, text, chosen=chosen, epoch=2)


FLOOR = Ballot(1, 2, 9, b"", 0, 0)


def raised(stage: Stage, number: int) -> None:
    """The machine accepts nothing below the floor any more where there is no value."""
    tablets, batch = stage.world.node(number).domain.tablets, Batch()
    tablets.raise_floor(batch, stage.tablet, FLOOR)
    tablets.submit(batch)


def collected(stage: Stage, k: GroupKey, *numbers: int) -> None:
    """The register is erased everywhere, or at these machines, under a floor that all have."""
    for number in numbers or (0, 1, 2):
        node, batch = stage.world.node(number), Batch()
        node.domain.tablets.agree(batch, stage.tablet, FLOOR)
        node.registers.erase(batch, k)
        node.domain.tablets.submit(batch)


def follow_rules(**off: bool) -> FollowRules:
    return msgspec.structs.replace(FOLLOW_RULES, **off)


def stale(beside: Beside, k: GroupKey, acknowledged_s: float, wanted: bytes | None) -> bool:
    """Whether the copy promises what was acknowledged then, and does not have it."""
    return beside.copy.covered_s(k) > acknowledged_s and beside.row(k) != wanted


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


def test_follower_that_stops_between_a_generations_link_and_beginning_again_begins_again_at_its_next_start() -> None:
    """The link is on its disk, so nobody tells it of the generation once more."""

    async def story(world: World) -> None:
        await world.grow(3)
        k = key(0)
        await world.put(0, k, "kept")
        beside = Beside(world)
        await beside.rounds(3)
        await world.put(0, k, "lost", skip=(2,))
        await beside.rounds()
        assert beside.row(k) == value("lost")
        world.cluster.crash(0)
        world.cluster.crash(1)
        await world.domain(2).generations.recover([], accept_data_loss=True)
        await world.until(lambda: all(world.domain(2).tablets.serves(t) for t in range(TABLETS)), what="serving")
        left: list[SimDisk] = []

        class LosesPower(SimDisk):
            def submit(self, batch: Batch) -> int:
                number = super().submit(batch)
                if not left and any(space == Space.ROSTER for space, _, _ in batch.writes):
                    left.append(SimDisk(random.Random(1)))
                    left[0].fill(self.content())
                return number

        beside.disk.__class__ = LosesPower
        await beside.rounds()
        (beside.disk,) = left
        beside.restart()
        assert beside.row(k) == value("lost")
        await beside.rounds(6)
        assert beside.row(k) == value("kept")
        assert beside.copy.noted.generation == 2

    play(story)


def test_copy_that_begins_again_forgets_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would keep the node from everything else meanwhile, and wait in its memory for the disk."""
    monkeypatch.setattr(copy_module, "ERASE_KEYS", 3)

    async def story(stage: Stage) -> None:
        beside = await three(stage)
        for k in stage.keys[:10]:
            write(stage, k, 1, "text", 0, 1, 2, chosen=True)
        await beside.rounds()
        waiting = [0]

        class Counts(SimDisk):
            def submit(self, batch: Batch) -> int:
                waiting.append(sum(space == Space.REGISTER for space, _, _ in batch.writes))
                return super().submit(batch)

            async def durable(self, number: int) -> None:
                await super().durable(number)
                waiting.append(-sum(waiting))

        beside.disk.__class__ = Counts
        await beside.copy.begin_again(2)
        assert max(itertools.accumulate(waiting)) == 2 * 3
        assert not any(beside.copy.registers.keys(tablet) for tablet in range(TABLETS))
        assert beside.copy.noted.generation == 2

    staged(story, 3)


def test_other_branch_that_counts_more_is_followed_and_the_copy_begins_again() -> None:
    """Two begin a generation each. The follower goes with the one that it hears, then hears the other, which wins."""

    async def story(world: World) -> None:
        await world.grow(3)
        k = key(0)
        await world.put(0, k, "old")
        beside = Beside(world)
        await beside.rounds(3)
        world.cluster.partition([0], [1, 2])
        await world.cluster.machines[0].clock.sleep(8.0)
        world.cluster.crash(1)
        first, second = 0, 2
        beside.line.deaf = {second}
        await world.domain(first).generations.recover([], accept_data_loss=True)
        await world.domain(second).generations.recover([], accept_data_loss=True)
        winner = max((first, second), key=lambda n: world.domain(n).chain.branch)
        loser = first if winner == second else second
        beside.line.deaf = {winner}
        await beside.rounds(3)
        beside.line.deaf = {loser}
        await world.put(winner, k, "winner")
        await beside.rounds(6)
        assert beside.follower.chain.branch == world.domain(winner).chain.branch
        assert beside.row(k) == value("winner")

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


def test_tombstone_that_was_collected_reads_as_the_floor() -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        floor = Ballot(1, 2, 9, b"", 0, 0)
        for number in (0, 1, 2):
            node, batch = stage.world.node(number), Batch()
            node.domain.tablets.agree(batch, stage.tablet, floor)
            node.domain.tablets.submit(batch)
        await beside.rounds()
        assert beside.copy.standing(stage.keys[0]) == ZERO
        assert beside.copy.floors[stage.tablet] == floor

    staged(story, 3)


@pytest.mark.parametrize("restarted", [False, True], ids=["goes on", "restarted"])
def test_group_that_was_collected_during_the_round_is_told_at_the_floor_and_not_below_where_it_stood(
    restarted: bool,
) -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        k = stage.keys[0]
        write(stage, k, 1, "old", 0, 1, 2, chosen=True)
        await beside.rounds()
        stood = beside.copy.standing(k)
        asked: set[int] = set()

        async def after(number: int, message: Struct) -> None:
            if isinstance(message, AskChanges):
                asked.add(number)
            if asked == {0, 1, 2}:
                asked.add(-1)
                collected(stage, k)

        beside.line.after = after
        beside.copy.open(k, doubtful=True)
        await beside.rounds()
        if restarted:
            beside.restart()
            await beside.rounds(4)
        assert beside.row(k) is None
        assert beside.copy.told_at(k) == FLOOR > stood
        await beside.rounds()
        assert (beside.copy.standing(k), beside.copy.told_at(k)) == (ZERO, FLOOR)

    staged(story, 3)


def test_group_that_is_not_here_yet_is_not_told_at_a_floor_above_what_was_heard_of_it() -> None:
    """It was made before the floor was raised; the follower knows the floor, but not yet whether it is chosen."""

    async def story(stage: Stage) -> None:
        beside = await three(stage)
        k, other = stage.keys[:2]
        write(stage, k, 1, "new", 0)
        collected(stage, other)
        beside.line.deaf = {1}
        await beside.rounds()
        assert beside.copy.floors[stage.tablet] == FLOOR
        told = beside.copy.told_at(k)
        write(stage, k, 1, "new", 1)
        beside.line.deaf = set()
        await beside.rounds()
        assert beside.row(k) == value("new")
        assert told <= beside.copy.told_at(k) < FLOOR

    staged(story, 3)


def test_coverage_is_noted_and_survives_a_restart_with_its_open_registers() -> None:
    async def story(stage: Stage) -> None:
        beside = await three(stage)
        a, b = stage.keys[:2]
        clock = stage.world.cluster.machines[0].clock
        write(stage, a, 1, "chosen", 0, 1, 2, chosen=True)
        await beside.rounds()
        before = beside.copy.covered_s(a)
        write(stage, b, 1, "perhaps", 0)
        beside.line.deaf = {1}
        await beside.wait()
        await beside.rounds()
        beside.copy.note(clock.monotonic(), clock.wall())
        ahead_s = clock.wall() - clock.monotonic()
        beside.restart()
        beside.copy.note(clock.monotonic(), clock.wall())
        noted = beside.copy.noted
        assert noted.wall_s[stage.tablet] > before + ahead_s
        assert noted.open == {b: pytest.approx(before + ahead_s)}

    staged(story, 3)


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
