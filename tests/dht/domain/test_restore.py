"""A domain without any of its disks begins anew with a follower's copy; whoever comes back all the same stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from dht.domain.messages import AskCopy, AskCopyPage, CopyCovers, DomainMessage
from dht.domain.restore import BEFORE, STANDING_S_MAX, Restoration, find_copies, floors_after, hand_over
from dht.domain.roster import check_step
from dht.errors import Invalid, NotFound, NotServing, RemoteProtocolError, Unavailable
from dht.model import Ballot, NodeId, Struct
from dht.world import Batch
from tests.dht.domain.beside import Beside
from tests.dht.domain.small_world import ROW, TABLETS, World, key, outcome, play, value
from tests.dht.domain.test_recovery import link

KEYS = [key(i) for i in range(20)]


async def fetched(
    world: World, number: int, *besides: Beside, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> Restoration:
    """Machine `number`, which is new, fetches these copies. `meanwhile`: before it has the second page with groups."""
    pages = 0

    async def ask(node: NodeId, question: DomainMessage) -> Struct:
        nonlocal pages
        reply = hand_over(besides[node[0]].follower, question)
        if isinstance(question, AskCopyPage) and reply.copies:  # type: ignore[union-attr]
            pages += 1
            if pages == 2 and meanwhile is not None:
                await meanwhile()
        return reply

    node = world.node(number)
    found = await find_copies(node.domain.name, ask, [bytes([i]) * 20 for i in range(len(besides))])
    await found.fetch(node.registers, node.boot.disk, node.domain.check_unknown)
    return found


async def restore(world: World, number: int, *besides: Beside) -> None:
    """Machine `number`, which is new, restores the domain out of these copies."""
    found = await fetched(world, number, *besides)
    before = await found.links()
    await world.domain(number).restore(before, floors_after(before[-1]), found.heard + 1)


async def destroyed(world: World) -> tuple[Beside, int]:
    """Three members with data, all switched off; a follower that has it; a new machine."""
    await world.grow(3)
    for i, k in enumerate(KEYS):
        await world.put(0, k, f"v{i}")
    beside = Beside(world)
    await beside.rounds(3)
    for number in range(3):
        world.cluster.shut(number)
    number = world.cluster.add()
    await world.cluster.start(number)
    return beside, number


def test_restore_new_node_serves_what_the_copy_has_and_others_join_it() -> None:
    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        old = beside.follower.chain.newest
        assert old is not None
        await restore(world, number, beside)
        domain = world.domain(number)
        assert domain.joined
        assert (domain.generation, domain.chain.epoch) == (old.generation + 1, old.epoch + 1)
        for i, k in enumerate(KEYS):
            assert await world.get(number, k) == value(f"v{i}")
        other = world.cluster.add()
        await world.cluster.start(other)
        await world.until(lambda: world.domain(other).joined, what="joining")
        await world.put(other, KEYS[0], "after")
        assert await world.get(number, KEYS[0]) == value("after")

    play(story)


def test_restore_that_broke_off_is_not_taken_for_a_new_pop_that_may_be_founded() -> None:
    """The claim is this node's by then, so nothing else keeps it from founding a domain in the old generation."""

    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        node = world.node(number)
        await fetched(world, number, beside)
        with pytest.raises(Invalid, match="pop recover"):
            await node.domain.found(TABLETS)
        assert node.domain.chain.newest is None
        await restore(world, number, beside)
        assert await world.get(number, KEYS[0]) == value("v0")

    play(story)


def test_restore_during_which_members_come_back_overwrites_nothing_that_the_node_took_over_from_them() -> None:
    async def story(world: World) -> None:
        await world.grow(1)
        for i, k in enumerate(KEYS):
            await world.put(0, k, f"v{i}")
        beside = Beside(world)
        await beside.rounds(3)
        world.cluster.shut(0)
        number = await world.add()

        async def back() -> None:
            await world.cluster.start(0)
            await world.settled()
            for i, k in enumerate(KEYS):
                await world.put(0, k, f"w{i}")

        with pytest.raises(Invalid, match="nothing of it was overwritten"):
            await fetched(world, number, beside, meanwhile=back)
        node = world.node(number)
        assert [node.registers.row(k, ROW) for k in KEYS] == [value(f"w{i}") for i in range(len(KEYS))]
        before = list(beside.follower.chain.after(0, 100))
        with pytest.raises(Invalid, match="nothing of it was overwritten"):
            await node.domain.restore(before, floors_after(before[-1]))

    play(story)


def test_restore_of_a_copy_that_goes_on_or_begins_again_meanwhile_is_refused() -> None:
    """The copy is of several moments then, or has gaps, and somebody is there whom the new node does not hear."""

    async def story(world: World) -> None:
        beside, number = await destroyed(world)

        async def goes_on() -> None:
            for old in range(3):
                await world.cluster.start(old)
            await world.cluster.machines[number].clock.sleep(STANDING_S_MAX)
            await beside.rounds(3)

        async def begins_again() -> None:
            await beside.copy.begin_again(beside.copy.noted.generation)

        world.cluster.partition([number], [0, 1, 2])
        for meanwhile in (goes_on, begins_again):
            with pytest.raises(Invalid, match="went on while it was fetched"):
                await fetched(world, number, beside, meanwhile=meanwhile)
            assert world.domain(number).chain.newest is None

    play(story)


@pytest.mark.parametrize("batches_kept", range(3))
def test_restore_that_loses_power_has_begun_with_its_record_or_not_at_all(batches_kept: int) -> None:
    """Tablets without the chain would be served in the chain of whoever comes back; a chain alone could do nothing."""

    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        found = await fetched(world, number, beside)
        before = await found.links()
        disk = world.node(number).boot.disk
        begun = asyncio.ensure_future(world.domain(number).restore(before, floors_after(before[-1]), 0, ["found"]))
        await asyncio.sleep(0)
        disk._chance = SimpleNamespace(randint=lambda low, high: min(batches_kept, high), uniform=lambda a, b: a)  # type: ignore[assignment]
        world.cluster.crash(number)
        begun.cancel()
        await world.cluster.start(number)
        domain = world.domain(number)
        if not batches_kept:
            assert domain.chain.newest is None
            assert domain.tablets.known() == ()
            await restore(world, number, beside)
        assert domain.joined
        assert domain.generations.records()[-1].generation == domain.generation
        assert domain.generations.records()[-1].findings == (("found",) if batches_kept else ())
        assert await world.get(number, KEYS[0]) == value("v0")

    play(story)


def test_restore_begins_a_generation_above_any_that_a_copy_has_heard_of() -> None:
    """A copy that is not complete may be of a generation whose members come back: they are to stop, not this node."""

    async def story(world: World) -> None:
        await world.grow(2)
        for i, k in enumerate(KEYS):
            await world.put(0, k, f"v{i}")
        complete, later = Beside(world), Beside(world)
        await complete.rounds(3)
        world.cluster.shut(1)
        node_id = world.cluster.machines[0].node_id
        await world.domain(0).generations.recover([node_id], accept_data_loss=True)
        await later.follower.round()
        assert not all(later.follower.noted().wall_s)
        world.cluster.shut(0)
        number = await world.add()
        await restore(world, number, complete, later)
        assert world.domain(number).generation == 3
        await world.cluster.start(0)
        world.domain(number).met(node_id)
        await world.until(lambda: bool(world.domain(0).generations.stopped), 60.0, "stopping")
        assert world.domain(number).joined

    play(story)


def test_restore_of_a_domain_that_is_lost_again_before_it_was_copied_takes_the_copy_of_before() -> None:
    async def story(world: World) -> None:
        await world.grow(1)
        for i, k in enumerate(KEYS):
            await world.put(0, k, f"v{i}")
        old, new = Beside(world), Beside(world)
        await old.rounds(3)
        old.follower._sets_aside = lambda: True
        world.cluster.shut(0)
        second = await world.add()
        await restore(world, second, old)
        await old.rounds(2)
        await new.follower.round()
        assert old.follower.outlived
        world.cluster.shut(second)
        third = await world.add()

        async def ask(node: NodeId, question: DomainMessage) -> Struct:
            return hand_over((old if question.domain.endswith(BEFORE) else new).follower, question)

        node = world.node(third)
        asked = AskCopy(node.domain.name + BEFORE)
        found = await find_copies(node.domain.name, ask, [b"h" * 20])
        assert (found.generation, found.heard) == (1, 2)
        await found.fetch(node.registers, node.boot.disk, node.domain.check_unknown)
        alone = Restoration(node.domain.name, ask, {}, before={b"h" * 20: hand_over(old.follower, asked)})  # type: ignore[dict-item]
        before = await alone.links()
        assert (alone.generation, alone.heard) == (1, 2), "also where nobody follows the new one yet"
        await world.domain(third).restore(before, floors_after(before[-1]), found.heard + 1)
        assert world.domain(third).generation == 3
        for i, k in enumerate(KEYS):
            assert await world.get(third, k) == value(f"v{i}")

    play(story)


async def test_holder_that_does_not_say_whether_it_has_the_copy_of_before_is_told_as_silent() -> None:
    """Its copy may be the one that covers most."""

    async def ask(node: NodeId, question: DomainMessage) -> Struct:
        if question.domain.endswith(BEFORE):
            raise Unavailable("it does not answer") if node == b"silent" else NotFound("it has none")
        return CopyCovers(3, 1, (5.0,), {})

    found = await find_copies("one", ask, [b"silent", b"heard"])
    assert found.silent == (b"silent",)


def test_restore_old_members_that_come_back_stop_and_keep_their_files() -> None:
    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        await restore(world, number, beside)
        for old in (0, 1):
            await world.cluster.start(old)
        await world.until(lambda: all(world.domain(n).generations.stopped for n in (0, 1)), 60.0, "stopping")
        tablet = world.node(0).registers.tablet(KEYS[0])
        with pytest.raises(NotServing):
            world.domain(0).admit(tablet, beside.follower.chain.epoch)
        assert world.node(0).registers.row(KEYS[0], ROW) == value("v0")
        await world.put(number, KEYS[0], "after")
        assert await world.get(number, KEYS[0]) == value("after")

    play(story)


def test_restore_member_that_joined_after_the_copy_saw_the_roster_stops_too() -> None:
    """The copy's newest link does not list it, so nobody knows that it is to be told; it is told when it is met."""

    async def story(world: World) -> None:
        await world.grow(1)
        beside = Beside(world)
        await beside.rounds(3)
        late = await world.add()
        await world.settled()
        world.cluster.shut(0)
        world.cluster.shut(late)
        number = world.cluster.add()
        await world.cluster.start(number)
        await restore(world, number, beside)
        await world.cluster.start(late)
        world.domain(number).met(world.cluster.machines[late].node_id)
        await world.until(lambda: bool(world.domain(late).generations.stopped), 60.0, "stopping")

    play(story)


def test_restore_takes_each_tablet_from_the_copy_that_covers_it_furthest() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        older, newer = Beside(world), Beside(world)
        k = KEYS[0]
        await world.put(0, k, "deleted since")
        for beside in (older, newer):
            await beside.rounds(3)
        await world.cluster.machines[0].clock.sleep(5.0)
        for number in range(3):
            node, batch = world.node(number), Batch()
            tablet = node.registers.tablet(k)
            node.domain.tablets.agree(batch, tablet, Ballot(1, node.domain.tablets.serves(tablet), 999, b"", 0, 0))
            node.registers.erase(batch, k)
            node.domain.tablets.submit(batch)
        newer.restart()
        await newer.rounds(4)
        for number in range(3):
            world.cluster.shut(number)
        number = world.cluster.add()
        await world.cluster.start(number)
        await restore(world, number, older, newer)
        assert await world.get(number, k) is None

    play(story)


def test_restore_without_a_complete_copy_or_on_a_member_is_refused() -> None:
    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        assert isinstance(await outcome(restore(world, number)), Invalid)
        empty = Beside(world)
        assert isinstance(await outcome(restore(world, number, empty)), Invalid)
        await restore(world, number, beside)
        before = list(beside.follower.chain.after(0, 100))
        assert isinstance(await outcome(world.domain(number).restore(before, floors_after(before[-1]))), Invalid)

    play(story)


def test_restore_again_after_it_broke_off_leaves_nothing_of_the_first_attempt() -> None:
    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        node, batch = world.node(number), Batch()
        stray = key(999)
        header = beside.copy.registers.header(KEYS[0])
        node.registers.replace(batch, stray, header, {ROW: value("stray")})
        node.boot.disk.submit(batch)
        await restore(world, number, beside)
        assert await world.get(number, stray) is None
        assert len(world.domain(number).roster.tablets) == TABLETS

    play(story)


def test_first_link_of_a_generation_with_several_new_members_is_refused() -> None:
    async def story(world: World) -> None:
        beside, number = await destroyed(world)
        await restore(world, number, beside)
        old = beside.follower.chain.newest
        new = world.domain(number).roster
        assert old is not None
        check_step(old, new)
        members = tuple(sorted((*new.members, old.members[0]), key=lambda m: m.node_id))
        with pytest.raises(RemoteProtocolError):
            check_step(old, link(new, 2, members=members))

    play(story)
