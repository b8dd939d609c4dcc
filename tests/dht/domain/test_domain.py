"""Domains on simulated machines: founding, growth, drain, replacement, wiped disks, catching up."""

from __future__ import annotations

import msgspec
import pytest

from dht.domain.domain import Domain
from dht.domain.messages import AskJoin
from dht.errors import Invalid, NotServing
from tests.dht.domain.small_world import World, key, outcome, play, value

KEYS = 60


async def fill(world: World, number: int, text: str, keys: int = KEYS) -> None:
    for i in range(keys):
        await world.put(number, key(i), f"{text}{i}")


async def check(world: World, number: int, text: str, keys: int = KEYS) -> None:
    for i in range(keys):
        assert await world.get(number, key(i)) == value(f"{text}{i}")


def test_found_one_node_serves_all_tablets_and_keeps_them_over_a_restart() -> None:
    async def story(world: World) -> None:
        await world.add(founds=True)
        await fill(world, 0, "a")
        world.cluster.crash(0)
        await world.cluster.start(0)
        await check(world, 0, "a")
        assert isinstance(await outcome(world.domain(0).found()), Invalid)

    play(story)


@pytest.mark.parametrize("seed", range(5))
def test_join_one_to_three_with_data_everybody_has_everything(seed: int) -> None:
    async def story(world: World) -> None:
        await world.add(founds=True)
        await fill(world, 0, "a")
        await world.add()
        await world.settled()
        await fill(world, 1, "b")
        await world.add()
        await world.settled()
        await check(world, 2, "b")
        roster = world.domain(0).roster
        assert len(roster.members) == 3
        assert len(roster.voters) == 3
        assert all(len(nodes) == 3 for nodes in roster.tablets)
        for node in world.running():
            for i in range(KEYS):
                assert node.registers.header(key(i)).accepted.epoch > 0
        await fill(world, 2, "c")
        await check(world, 0, "c")

    play(story, seed)


def test_join_two_at_once_both_come_in() -> None:
    async def story(world: World) -> None:
        await world.add(founds=True)
        await fill(world, 0, "a")
        await world.add()
        await world.add()
        await world.until(lambda: world.is_settled() and len(world.domain(0).roster.members) == 3)
        await check(world, 1, "a")

    play(story)


@pytest.mark.parametrize("seed", range(3))
def test_join_fourth_node_tablets_are_spread_and_left_ones_erased(seed: int) -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        await world.add()
        await world.until(
            lambda: (
                world.is_settled()
                and all(len(world.domain(0).roster.tablets_of(n.boot.node_id)) == 6 for n in world.running())
            )
        )
        await check(world, 3, "a")

        def erased() -> bool:
            return all(
                node.registers.keys(t) == []
                for node in world.running()
                for t in range(8)
                if t not in node.domain.roster.tablets_of(node.boot.node_id)
            )

        await world.until(erased, what="erasing")

    play(story, seed)


def test_drain_of_four_tablets_move_and_the_node_leaves() -> None:
    async def story(world: World) -> None:
        await world.grow(4)
        await fill(world, 0, "a")
        gone = world.cluster.machines[0].node_id
        await world.domain(2).leave(gone, drain=True)
        await world.until(lambda: world.domain(1).roster.member(gone) is None)
        await world.until(lambda: world.domain(0).removed)
        await check(world, 1, "a")
        world.cluster.crash(0)
        assert all(len(nodes) == 3 for nodes in world.domain(1).roster.tablets)
        await check(world, 2, "a")

    play(story)


def test_drain_of_the_only_voter_of_two_the_other_goes_on_alone() -> None:
    async def story(world: World) -> None:
        await world.grow(2)
        await fill(world, 1, "a")
        gone = world.cluster.machines[0].node_id
        await world.domain(1).leave(gone, drain=True)
        await world.until(lambda: world.domain(1).roster.member(gone) is None)
        world.cluster.crash(0)
        await check(world, 1, "a")
        assert isinstance(await outcome(world.domain(1).leave(world.cluster.machines[1].node_id, drain=True)), Invalid)

    play(story)


def test_removed_member_with_its_old_disk_join_is_refused() -> None:
    async def story(world: World) -> None:
        await world.grow(4)
        machine = world.cluster.machines[3]
        await world.domain(0).leave(machine.node_id, drain=True)
        await world.until(lambda: world.domain(0).roster.member(machine.node_id) is None)
        member = world.domain(3).local.member()
        refusal = await outcome(world.domain(0).answer(machine.node_id, AskJoin(machine.pop, member)))
        assert isinstance(refusal, Invalid)
        assert "wipe" in refusal.message
        world.cluster.wipe(3)
        await world.cluster.start(3)
        await world.until(lambda: world.domain(3).joined and world.is_settled())

    play(story)


@pytest.mark.parametrize("seed", range(5))
def test_lost_member_of_four_is_replaced_after_the_time(seed: int) -> None:
    async def story(world: World) -> None:
        await world.grow(4)
        await fill(world, 0, "a")
        world.cluster.crash(1)
        gone = world.cluster.machines[1].node_id
        await world.cluster.machines[0].clock.sleep(50)
        assert world.domain(0).roster.member(gone) is not None
        assert not world.domain(0).roster.member(gone).leaving  # type: ignore[union-attr]
        await world.until(lambda: world.domain(0).roster.member(gone) is None, 120)
        await world.settled()
        assert all(len(nodes) == 3 and gone not in nodes for nodes in world.domain(0).roster.tablets)
        await check(world, 2, "a")

    play(story, seed, remove_after_s=60.0)


def test_leave_of_a_lost_member_of_two_the_other_goes_on_alone() -> None:
    async def story(world: World) -> None:
        await world.grow(2)
        await fill(world, 0, "a")
        voter = world.domain(0).roster.voters[0]
        stays = next(i for i in (0, 1) if world.cluster.machines[i].node_id == voter)
        gone = world.cluster.machines[1 - stays].node_id
        assert isinstance(await outcome(world.domain(stays).leave(gone, drain=False)), Invalid)
        world.cluster.crash(1 - stays)
        await world.cluster.machines[0].clock.sleep(10)
        await world.domain(stays).leave(gone, drain=False)
        await world.until(lambda: world.domain(stays).roster.member(gone) is None)
        await world.settled()
        await check(world, stays, "a")
        await fill(world, stays, "b")

    play(story)


def test_lost_member_of_three_stays_and_comes_back_with_its_disk() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        world.cluster.crash(1)
        await world.cluster.machines[0].clock.sleep(200)
        assert not any(m.leaving for m in world.domain(0).roster.members)
        await fill(world, 0, "a")
        await world.cluster.start(1)
        await world.settled()
        await check(world, 1, "a")

    play(story, remove_after_s=60.0)


def test_cut_off_member_removes_nobody() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        world.cluster.partition([0], [1, 2])
        await world.cluster.machines[0].clock.sleep(200)
        assert len(world.domain(0).roster.members) == 3
        assert not any(m.leaving for m in world.domain(0).roster.members)

    play(story, remove_after_s=60.0)


@pytest.mark.parametrize("seed", range(5))
def test_wiped_node_of_three_comes_back_as_a_new_member_with_everything(seed: int) -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        for i in range(KEYS):
            await world.put(0, key(i), f"b{i}", skip=(1,))  # chosen by 0 and 2 only
        world.cluster.wipe(2)
        await world.cluster.start(2)
        await world.until(lambda: world.domain(2).joined and world.is_settled(), 120)
        assert len(world.domain(0).roster.members) == 3
        await check(world, 1, "b")
        world.cluster.crash(0)
        await check(world, 2, "b")

    play(story, seed)


def test_wiped_only_member_is_refused_by_nobody_and_waits() -> None:
    async def story(world: World) -> None:
        await world.grow(2)
        node = world.domain(0)
        roster = node.roster
        voter = next(i for i in (0, 1) if world.cluster.machines[i].node_id == roster.voters[0])
        world.cluster.wipe(1 - voter)
        await world.cluster.start(1 - voter)
        await world.until(lambda: world.domain(1 - voter).joined and world.is_settled(), 120)

    play(story)


@pytest.mark.parametrize("seed", range(3))
def test_node_that_was_away_catches_up_without_being_written_to(seed: int) -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        world.cluster.crash(2)
        await fill(world, 0, "b")
        await world.cluster.start(2)

        def caught_up() -> bool:
            return all(
                world.node(2).registers.row(key(i), b"") is None
                and (world.node(2).registers.header(key(i)).accepted == world.node(0).registers.header(key(i)).accepted)
                for i in range(KEYS)
            )

        await world.until(caught_up, what="repair")
        world.cluster.crash(0)
        await check(world, 2, "b")

    play(story, seed)


def test_node_behind_by_many_links_walks_the_chain() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        world.cluster.crash(2)
        before = world.domain(0).chain.epoch
        for _ in range(2):
            number = await world.add()
            await world.until(world.is_settled)
            gone = world.cluster.machines[number].node_id
            await world.domain(0).leave(gone, drain=True)
            await world.until(lambda gone=gone: world.domain(0).roster.member(gone) is None, 120)
            world.cluster.crash(number)
        assert world.domain(0).chain.epoch >= before + 4
        await world.cluster.start(2)
        await world.settled(120)
        await check(world, 2, "a")

    play(story)


def test_stale_sender_gets_not_serving_then_refreshes() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        tablet = world.node(0).registers.tablet(key(1))
        old = world.domain(0).replicas(tablet)
        await world.add()
        await world.until(
            lambda: (
                world.is_settled() and len(world.domain(3).roster.tablets_of(world.cluster.machines[3].node_id)) == 6
            )
        )
        moved = next(t for t, e in enumerate(world.domain(0).roster.tablet_epochs) if e > old.epoch)
        with pytest.raises(NotServing) as refusal:
            world.domain(0).admit(moved, old.epoch)
        assert refusal.value.detail["roster_epoch"] == world.domain(0).chain.epoch
        await world.domain(1).refresh(refusal.value.detail["roster_epoch"])  # type: ignore[arg-type]
        assert world.domain(1).replicas(moved).epoch == world.domain(1).roster.tablet_epochs[moved]

    play(story)


def test_seal_survives_a_crash() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await world.add()
        await world.until(lambda: any(n.domain.tablets.state(t).sealed >= 3 for n in world.running() for t in range(8)))
        for i in range(4):
            sealed = [world.domain(i).tablets.state(t).sealed for t in range(8)]
            await world.cluster.machines[i].clock.sleep(0.2)
            world.cluster.crash(i)
            await world.cluster.start(i)
            assert all(world.domain(i).tablets.state(t).sealed >= sealed[t] for t in range(8))

    play(story)


def test_address_change_reaches_the_roster() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        epochs = world.domain(0).roster.tablet_epochs
        local = world.domain(1).local
        world.domain(1)._lookout._local = msgspec.structs.replace(local, address="moved:1").member()
        await world.until(lambda: world.domain(0).roster.member(local.node_id).address == "moved:1")  # type: ignore[union-attr]
        assert world.domain(0).roster.tablet_epochs == epochs

    play(story)


@pytest.mark.parametrize("seed", range(6))
def test_growth_and_replacement_under_loss_and_crashes_nothing_is_lost(seed: int) -> None:
    async def story(world: World) -> None:
        world.cluster.fabric.weather.loss = 0.05
        world.cluster.fabric.weather.duplication = 0.05
        world.cluster.fabric.weather.straggler = 0.05
        await world.add(founds=True)
        await fill(world, 0, "a", 20)
        for text in "bcde":
            number = await world.add()
            await world.cluster.machines[0].clock.sleep(0.5)
            world.cluster.crash(0)
            await world.cluster.start(0)
            await world.until(lambda number=number: world.domain(number).joined and world.is_settled(), 300)
            await fill(world, number, text, 20)
        await check(world, 1, "e", 20)
        world.cluster.crash(0)
        world.cluster.fabric.weather.loss = 0.0
        await check(world, 1, "e", 20)

    play(story, seed)


def test_health_of_three_says_one_may_fail() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await world.until(lambda: world.domain(0).health()["tablets"] == {"whole": 8, "degraded": 0, "unavailable": 0})
        assert world.domain(0).health()["survivable"] == ["node", "failure_domain"]
        world.cluster.crash(2)
        await world.cluster.machines[0].clock.sleep(10)
        health = world.domain(0).health()
        assert health["tablets"] == {"whole": 0, "degraded": 8, "unavailable": 0}
        assert health["survivable"] == []

    play(story)


def test_refusal_of_a_sealed_replica_points_to_the_newer_ones_after_one_hop() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        stale, other = world.domain(0), world.domain(1)
        await world.add()
        await world.until(lambda: len(other.roster.tablets_of(world.cluster.machines[3].node_id)) == 6)
        await world.until(world.is_settled)
        tablet = next(t for t, e in enumerate(other.roster.tablet_epochs) if e == other.roster.epoch)
        old = stale.chain.link(stale.roster.tablet_epochs[tablet] - 1).replicas(tablet)
        # As one that has the link but has heard nothing of the take-over.
        stale.watch = type(stale.watch)(stale.local.node_id, 0.0)
        stale._views = tuple(old if t == tablet else view for t, view in enumerate(stale._views))
        hops = 0
        while stale.replicas(tablet).epoch != other.roster.tablet_epochs[tablet]:
            hops += 1
            with pytest.raises(NotServing) as refusal:
                other.admit(tablet, stale.replicas(tablet).epoch)
            assert stale.pointed(refusal.value)
        assert hops == 1

    play(story)


def test_refusal_from_a_longer_chain_is_followed_by_fetching_it() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        world.cluster.partition([0], [1, 2])
        await world.add()
        world.cluster.partition([0], [3])
        await world.until(lambda: len(world.domain(1).roster.members) == 4, 120.0)
        await world.until(lambda: len(world.domain(1).roster.tablets_of(world.cluster.machines[3].node_id)) > 0)
        await world.cluster.machines[1].clock.sleep(10.0)
        world.cluster.heal()
        stale, newer = world.domain(0), world.domain(1)
        tablet = newer.roster.tablets_of(world.cluster.machines[3].node_id)[0]
        assert stale.chain.epoch < newer.roster.tablet_epochs[tablet]
        refusal = await outcome(_admit(newer, tablet, stale.replicas(tablet).epoch))
        if isinstance(refusal, NotServing):
            assert not stale.pointed(refusal)
            await stale.refresh(refusal.detail["roster_epoch"])  # type: ignore[arg-type]
        assert stale.chain.epoch >= newer.roster.tablet_epochs[tablet]
        await world.settled(120.0)
        await check(world, 0, "a")

    play(story)


async def _admit(domain: Domain, tablet: int, epoch: int) -> None:
    domain.admit(tablet, epoch)


def test_first_voter_that_cannot_mend_does_not_stop_the_others() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        await fill(world, 0, "a")
        first = world.domain(0).roster.voters[0]
        number = next(i for i in range(3) if world.cluster.machines[i].node_id == first)
        membership = world.domain(number)._membership

        async def hang() -> None:
            await world.cluster.machines[number].clock.sleep(1000.0)

        membership.mend = hang  # type: ignore[method-assign]
        asked = next(i for i in range(3) if i != number)
        gone = next(m.node_id for m in world.domain(0).roster.members if m.node_id not in (first,))
        await world.add()
        await world.until(lambda: world.domain(asked).roster.member(world.cluster.machines[3].node_id) is not None)
        await world.domain(asked).leave(gone, drain=True)
        await world.until(lambda: world.domain(asked).roster.member(gone) is None, 120.0, "leaving")

    play(story)
