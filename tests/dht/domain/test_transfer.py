"""Rules 1 to 4 and 6, step by step: domains without their background work, and links made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dht.domain.messages import AskHeaders, AskSeal, RegisterCopy, Sealed
from dht.domain.roster import Member, Roster, successor
from dht.domain.rules import RULES, DomainRules
from dht.domain.tablets import Tablets, TabletState
from dht.domain.transfer import Staging
from dht.errors import NotServing, RemoteProtocolError, StorageError, Unavailable
from dht.model import ZERO, Ballot, NodeId
from dht.storage.memory import MemoryDisk
from dht.storage.registers import Header
from dht.world import Batch, Space
from tests.dht.domain.small_world import ROW, World, key, outcome, play, value

TABLET_KEYS = list(range(200))


class Stage:
    """Machine 0 founds; the links that follow are made by hand and told to whom the story says."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tablet = 0
        self.links: list[Roster] = []
        self.keys: list[bytes] = []

    async def build(self, machines: int) -> None:
        await self.world.add(founds=True)
        await self.world.domain(0).stop()
        for _ in range(1, machines):
            number = self.world.cluster.add()
            await self.world.cluster.start(number)
            await self.world.domain(number).stop()
        self.links = [self.world.domain(0).roster]
        registers = self.world.node(0).registers
        self.tablet = registers.tablet(key(0))
        self.keys = [key(i) for i in TABLET_KEYS if registers.tablet(key(i)) == self.tablet]

    def member(self, number: int) -> Member:
        return self.world.domain(number).local.member()

    def move(self, *numbers: int) -> Roster:
        """The next link, with the tablet on these machines; not told to anybody."""
        last = self.links[-1]
        members = {m.node_id: m for m in last.members}
        for number in numbers:
            members[self.member(number).node_id] = self.member(number)
        tablets = list(last.tablets)
        tablets[self.tablet] = tuple(self.member(n).node_id for n in numbers)
        self.links.append(successor(last, list(members.values()), last.voters, tablets))
        return self.links[-1]

    async def tell(self, *numbers: int) -> None:
        for number in numbers:
            for link in self.links:
                await self.world.domain(number).peers.learn(link, self.world.domain(0).local.node_id)

    def write(self, number: int, k: bytes, round: int, text: str, *, chosen: bool = True, epoch: int = 1) -> None:
        node = self.world.node(number)
        ballot = Ballot(1, epoch, round, b"p", 1, round)
        batch = Batch()
        header = Header(ballot, ballot, ballot if chosen else ZERO, b"d" * 16)
        node.registers.replace(batch, k, header, {ROW: value(text)})
        node.boot.disk.submit(batch)

    async def initialise(self, number: int, within_s: float = 5.0) -> bool:
        """False when it is not done in time."""
        try:
            async with asyncio.timeout(within_s):
                await self.world.domain(number).transfer.initialise(self.tablet)
        except TimeoutError:
            return False
        return self.world.domain(number).tablets.serves(self.tablet) == self.links[-1].tablet_epochs[self.tablet]

    def row(self, number: int, k: bytes) -> bytes | None:
        return self.world.node(number).registers.row(k, ROW)


def staged(story: Callable[[Stage], Coroutine[Any, Any, None]], machines: int, rules: DomainRules = RULES) -> None:
    async def run(world: World) -> None:
        stage = Stage(world)
        await stage.build(machines)
        await story(stage)

    play(run, rules=rules)


async def empty_middle(stage: Stage) -> None:
    """E1={0} holds a value; E2={1} decided; E3={2} before 1 was initialised: the shortest way to lose it."""
    stage.write(0, stage.keys[0], 1, "v")
    stage.move(1)
    stage.move(2)
    await stage.tell(0, 1, 2)


def test_initialise_no_initialised_replica_in_the_epoch_before_recurses() -> None:
    async def story(stage: Stage) -> None:
        await empty_middle(stage)
        assert await stage.initialise(2)
        assert stage.row(2, stage.keys[0]) == value("v")
        state = stage.world.domain(0).tablets.state(stage.tablet)
        assert state.sealed == 1

    staged(story, 3)


def test_initialise_planted_bug_uninitialised_contribute_loses_the_value() -> None:
    async def story(stage: Stage) -> None:
        await empty_middle(stage)
        assert await stage.initialise(2)
        assert stage.row(2, stage.keys[0]) is None

    staged(story, 3, DomainRules(only_initialised_contribute=False))


def test_initialise_without_a_seal_quorum_waits() -> None:
    async def story(stage: Stage) -> None:
        await empty_middle(stage)
        stage.world.cluster.crash(0)
        assert not await stage.initialise(2)
        assert stage.world.domain(2).tablets.state(stage.tablet).initialised == ()

    staged(story, 3)


def test_initialise_highest_accepted_ballot_wins_with_its_mark_and_leftovers_go() -> None:
    async def story(stage: Stage) -> None:
        k, gone = stage.keys[:2]
        stage.move(0, 1, 2)
        await stage.tell(0, 1, 2)
        for number in (0, 1, 2):
            assert await stage.initialise(number)
        stage.write(0, k, 1, "old", epoch=2)
        stage.write(1, k, 2, "new", epoch=2, chosen=False)
        stage.write(3, gone, 9, "leftover", epoch=1)
        stage.write(3, k, 9, "leftover", epoch=1)
        stage.world.cluster.crash(2)
        stage.move(0, 1, 3)
        await stage.tell(0, 1, 3)
        for number in (3, 0, 1):
            assert await stage.initialise(number)
            assert stage.row(number, k) == value("new")
            header = stage.world.node(number).registers.header(k)
            assert header.accepted.round == 2
            assert header.chosen.round == 1
        assert stage.row(3, gone) is None
        assert stage.world.node(3).registers.header(gone) == Header()
        assert stage.world.node(3).boot.disk.range(Space.STAGED, b"", None) == []

    staged(story, 4)


def test_initialise_replica_that_stays_keeps_the_mark_that_only_it_had() -> None:
    """It begins out of the two others, which hold the value too, and do not know yet that it is chosen."""

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        stage.move(0, 1, 2)
        await stage.tell(0, 1, 2)
        for number in (0, 1, 2):
            assert await stage.initialise(number)
            stage.write(number, k, 1, "v", epoch=2, chosen=number == 2)
        stage.move(1, 2, 3)
        await stage.tell(0, 1, 2)
        transfer = stage.world.domain(2).transfer
        ask = transfer._ask

        async def slow_to_itself(to: NodeId, message: Any) -> Any:
            if to == stage.member(2).node_id:
                await asyncio.sleep(1.0)
            return await ask(to, message)

        transfer._ask = slow_to_itself
        assert await stage.initialise(2)
        header = stage.world.node(2).registers.header(k)
        assert header.chosen == header.accepted

    staged(story, 4)


def test_initialise_returning_replica_stages_and_its_old_content_counts_for_others_until_then() -> None:
    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        stage.write(0, k, 1, "v")
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        stage.write(1, k, 2, "w", epoch=2)
        stage.move(0)
        await stage.tell(0, 1)
        assert await stage.initialise(0)
        assert stage.row(0, k) == value("w")
        assert stage.world.domain(0).tablets.state(stage.tablet).initialised == (1, 3)

    staged(story, 2)


def test_let_go_copy_of_a_transfer_that_was_overtaken_before_the_seal_is_erased() -> None:
    """The node was a replica by a link that the next one took back; what it copied ahead, nobody asks it for."""

    async def story(stage: Stage) -> None:
        for i, k in enumerate(stage.keys):
            stage.write(0, k, i + 1, f"w{i}")
        stage.move(1)
        await stage.tell(0, 1, 2)
        domain, disk = stage.world.domain(1), stage.world.node(1).boot.disk

        async def unsealed(*_: object) -> None:
            raise Unavailable("nobody seals now")

        domain.transfer._seal = unsealed  # type: ignore[method-assign, assignment]
        assert not await stage.initialise(1, within_s=1.0)
        assert stage.row(1, stage.keys[0]) == value("w0")
        await domain._takeover._let_go()
        assert stage.row(1, stage.keys[0]) == value("w0"), "it is a replica, and will go on with that"
        stage.move(2)
        await stage.tell(0, 1, 2)
        # Of a tablet that was served here before, the copies would be staged.
        other, copies = Staging(disk, stage.tablet, 2), [RegisterCopy(stage.keys[0], Header(), {ROW: value("w0")})]
        other.keep(copies)
        await domain._takeover._let_go()
        assert stage.world.node(1).registers.keys(stage.tablet) == []
        assert disk.range(Space.STAGED, b"", None) == []
        assert stage.row(0, stage.keys[0]) == value("w0")
        stage.move(1)
        await stage.tell(0, 1, 2)
        del domain.transfer._seal
        assert await stage.initialise(1)
        assert [stage.row(1, k) for k in stage.keys] == [value(f"w{i}") for i in range(len(stage.keys))]

    staged(story, 3)


def test_let_go_of_a_large_tablet_gives_way_to_one_that_is_to_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose callers wait, while nobody waits for what is erased."""
    monkeypatch.setattr("dht.domain.takeover.ERASE_KEYS", 1)

    async def story(stage: Stage) -> None:
        stage.move(1)
        await stage.tell(0, 1, 2)
        for i, k in enumerate(stage.keys):
            stage.write(1, k, i + 1, "copied ahead")
        stage.move(2)
        await stage.tell(0, 1, 2)
        takeover, other = stage.world.domain(1)._takeover, stage.tablet ^ 1
        erase_some, events = takeover._erase_some, list[str]()

        def erase_page(tablet: int) -> int:
            events.append("erased")
            if len(events) == 2:
                monkeypatch.setattr(takeover, "pending", lambda: (other,))
                takeover.wake()
            return erase_some(tablet)

        async def initialise(tablet: int) -> None:
            events.append("begun")
            monkeypatch.setattr(takeover, "pending", lambda: ())

        monkeypatch.setattr(takeover, "_erase_some", erase_page)
        monkeypatch.setattr(takeover._transfer, "initialise", initialise)
        running = asyncio.create_task(takeover.run(interval_s=1000.0))
        await stage.world.cluster.machines[0].clock.sleep(5.0)
        assert events.index("begun") <= 3
        assert events.count("erased") == len(stage.keys) > 10
        assert stage.world.node(1).registers.keys(stage.tablet) == []
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    staged(story, 3)


def test_sealed_replica_admits_nothing_at_or_below_and_says_where_to_look() -> None:
    async def story(stage: Stage) -> None:
        domain = stage.world.domain(0)
        domain.admit(stage.tablet, 1)
        link = stage.move(1)
        reply = await stage.world.domain(1).peers.ask(domain.local.node_id, AskSeal("one", stage.tablet, 1, link))
        assert isinstance(reply, Sealed)
        assert reply.initialised
        with pytest.raises(NotServing) as refusal:
            domain.admit(stage.tablet, 1)
        assert refusal.value.detail["roster_epoch"] == 2
        stage.world.cluster.crash(0)
        await stage.world.cluster.start(0)
        assert stage.world.domain(0).tablets.state(stage.tablet).sealed == 1
        with pytest.raises(NotServing):
            stage.world.domain(0).admit(stage.tablet, 1)

    staged(story, 2)


def test_seal_with_a_link_that_does_not_move_the_tablet_or_is_not_decided_is_refused() -> None:
    async def story(stage: Stage) -> None:
        domain = stage.world.domain(0)
        link = stage.move(1)
        other = next(t for t in range(8) if t != stage.tablet)
        asked = domain.answer(b"x" * 20, AskSeal("one", other, 1, link))
        assert isinstance(await outcome(asked), RemoteProtocolError)
        stage.links.pop()
        forged = stage.move(0, 1)
        asked = domain.answer(b"x" * 20, AskSeal("one", stage.tablet, 1, forged))
        assert isinstance(await outcome(asked), RemoteProtocolError)
        domain.admit(stage.tablet, 1)

    staged(story, 2)


def test_headers_of_an_unsealed_or_uninitialised_replica_are_refused() -> None:
    async def story(stage: Stage) -> None:
        domain = stage.world.domain(0)
        asked = domain.answer(b"x" * 20, AskHeaders("one", stage.tablet, 1, b"", 10, True))
        assert isinstance(await outcome(asked), NotServing)
        asked = domain.answer(b"x" * 20, AskHeaders("one", stage.tablet, 2, b"", 10, False))
        assert isinstance(await outcome(asked), NotServing)

    staged(story, 1)


def test_wiped_node_under_its_old_name_neither_seals_nor_initialises() -> None:
    async def story(stage: Stage) -> None:
        stage.move(0, 1, 2)
        await stage.tell(0, 1, 2)
        for number in (0, 1, 2):
            assert await stage.initialise(number)
        stage.world.cluster.wipe(1)
        await stage.world.cluster.start(1)
        await stage.world.domain(1).stop()
        await stage.tell(1)
        assert not stage.world.domain(1).transfer.wanted(stage.tablet)
        link = stage.move(0, 2, 3)
        asked = stage.world.domain(1).answer(stage.member(0).node_id, AskSeal("one", stage.tablet, 2, link))
        assert isinstance(await outcome(asked), NotServing)

    staged(story, 4)


def test_initialise_interrupted_by_a_crash_goes_on_and_is_whole() -> None:
    async def story(stage: Stage) -> None:
        for i, k in enumerate(stage.keys):
            stage.write(0, k, i + 1, f"v{i}")
        stage.move(1)
        await stage.tell(0, 1)
        world = stage.world
        task = asyncio.create_task(stage.initialise(1))
        await asyncio.sleep(0.006)
        world.cluster.crash(1)
        task.cancel()
        await asyncio.wait([task])
        await world.cluster.start(1)
        await world.until(lambda: world.domain(1).tablets.serves(stage.tablet) == 2)
        for i, k in enumerate(stage.keys):
            assert stage.row(1, k) == value(f"v{i}")

    staged(story, 2)


def test_initialise_replica_whose_disk_failed_seals_nothing_and_keeps_nobody_from_taking_over() -> None:
    """It answers faster than the others, which wait for their disks, but nothing can be read from it."""

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        stage.move(0, 1, 2)
        await stage.tell(0, 1, 2)
        for number in (0, 1, 2):
            assert await stage.initialise(number)
            stage.write(number, k, 1, "v", epoch=2)
        link = stage.move(1, 2, 3)
        await stage.tell(0, 1, 2, 3)
        stage.world.node(0).boot.disk.fail("full")  # type: ignore[attr-defined]
        for _ in range(2):
            asked = stage.world.domain(0).answer(stage.member(3).node_id, AskSeal("one", stage.tablet, 2, link))
            assert isinstance(await outcome(asked), StorageError)
        assert stage.world.domain(0).tablets.state(stage.tablet).sealed == 1
        transfer = stage.world.domain(3).transfer
        ask = transfer._ask

        async def slow_but_for_one(to: NodeId, message: Any) -> Any:
            if to != stage.member(0).node_id:
                await asyncio.sleep(0.05)
            return await ask(to, message)

        transfer._ask = slow_but_for_one
        assert await stage.initialise(3)
        assert stage.row(3, k) == value("v")

    staged(story, 4)


def test_flip_that_the_disk_does_not_take_is_told_to_nobody() -> None:
    """The old replicas let go of the tablet when its new ones say that they are initialised."""
    disk = MemoryDisk()
    tablets = Tablets(disk, RULES)
    batch = Batch()
    tablets.initialise(batch, 0, 2, 1, ZERO)
    disk.fail("full")
    with pytest.raises(StorageError):
        tablets.flip(batch, 0)
    assert tablets.state(0) == TabletState()
    assert tablets.serves(0) == 0


def test_initialise_again_after_it_is_done_changes_nothing() -> None:
    async def story(stage: Stage) -> None:
        stage.write(0, stage.keys[0], 1, "v")
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        stage.write(1, stage.keys[0], 2, "w", epoch=2)
        assert await stage.initialise(1)
        assert stage.row(1, stage.keys[0]) == value("w")

    staged(story, 2)


def test_floor_is_carried_over() -> None:
    async def story(stage: Stage) -> None:
        floor = Ballot(1, 1, 7, b"p", 1, 7)
        domain = stage.world.domain(0)
        batch = Batch()
        domain.tablets.raise_floor(batch, stage.tablet, floor)
        domain.tablets.submit(batch)
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        assert stage.world.domain(1).floor(stage.tablet) == floor

    staged(story, 2)


def test_initialise_from_a_source_that_moves_on_meanwhile_never_promises_less_than_it_accepted() -> None:
    async def story(stage: Stage) -> None:
        stage.move(0, 1, 2)
        await stage.tell(0, 1, 2)
        assert await stage.initialise(0)
        transfer = stage.world.domain(2).transfer
        survey = transfer._survey

        async def busy(*args: Any, **more: Any) -> Any:
            stage.write(0, stage.keys[0], 5, "old", epoch=2)
            best = await survey(*args, **more)
            stage.write(0, stage.keys[0], 9, "new", epoch=2)
            return best

        transfer._survey = busy  # type: ignore[method-assign]
        assert await stage.initialise(2)
        header = stage.world.node(2).registers.header(stage.keys[0])
        assert header.accepted.round == 9
        assert header.promise >= header.accepted

    staged(story, 3)
