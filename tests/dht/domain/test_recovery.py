"""Rule 8: a majority lost for good, and those that come back all the same."""

from __future__ import annotations

import asyncio

import pytest

from dht.domain.messages import AskRecovery, RecoveryVote
from dht.domain.recovery import majority_lives, recovered
from dht.domain.roster import Roster, check_step, successor
from dht.errors import Invalid, NotServing, RemoteProtocolError
from tests.dht.domain.small_world import ROW, TABLETS, World, key, outcome, play, value

KEYS = [key(i) for i in range(20)]


async def written(world: World, size: int) -> None:
    await world.grow(size)
    for i, k in enumerate(KEYS):
        await world.put(0, k, f"v{i}")


def node_id(world: World, number: int) -> bytes:
    return world.cluster.machines[number].node_id


async def recover(world: World, number: int, *named: int):
    return await world.domain(number).generations.recover([node_id(world, n) for n in named], accept_data_loss=True)


async def all_served(world: World) -> None:
    def done() -> bool:
        return all(
            d.tablets.serves(t) == d.roster.tablet_epochs[t]
            for d in (n.domain for n in world.running())
            if d.joined
            for t in d.roster.tablets_of(d.local.node_id)
        )

    await world.until(done, 30.0, "serving")


def test_last_survivor_of_three_serves_what_it_has_in_a_new_generation() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        before = world.domain(2).roster
        world.cluster.crash(0)
        world.cluster.crash(1)
        record = await recover(world, 2)
        await all_served(world)
        roster = world.domain(2).roster
        assert (roster.generation, roster.epoch) == (before.generation + 1, before.epoch + 1)
        assert (record.survivors, set(record.lost)) == (
            (node_id(world, 2),),
            {node_id(world, 0), node_id(world, 1)},
        )
        assert world.domain(2).generations.records() == (record,)
        for i, k in enumerate(KEYS):
            assert world.node(2).registers.row(k, ROW) == value(f"v{i}")
            assert world.domain(2).admit(world.node(2).registers.tablet(k), roster.epoch) is None

    play(story)


def test_survivors_contribute_the_highest_ballot_that_any_of_them_has() -> None:
    async def story(world: World) -> None:
        await world.grow(5)
        await world.cluster.machines[0].clock.sleep(60.0)
        await world.settled()
        roster = world.domain(0).roster
        for i, k in enumerate(KEYS):
            await world.put(0, k, f"v{i}")
        keep = (3, 4)
        expected = {}
        for k in KEYS:
            best = max(
                ((world.node(n).registers.header(k).accepted, world.node(n).registers.row(k, ROW)) for n in keep),
                key=lambda found: found[0],
            )
            expected[k] = best[1]
        for n in range(3):
            world.cluster.crash(n)
        record = await recover(world, 3, 3, 4)
        await all_served(world)
        assert world.domain(4).roster == world.domain(3).roster != roster
        for k, row in expected.items():
            assert world.node(3).registers.row(k, ROW) == world.node(4).registers.row(k, ROW) == row
        empty = [t for t in range(TABLETS) if not {node_id(world, n) for n in keep}.intersection(roster.tablets[t])]
        assert list(record.empty) == empty
        assert all(world.domain(3).roster.tablet_epochs[t] == record.epoch for t in range(TABLETS))
        assert len(empty) < TABLETS

    play(story, seed=5)


def test_recovery_is_refused_while_a_majority_lives_or_the_loss_is_not_accepted() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        generations = world.domain(0).generations
        world.cluster.crash(2)
        alive = await outcome(generations.recover([], accept_data_loss=True))
        assert isinstance(alive, Invalid)
        assert "majority" in alive.message
        world.cluster.crash(1)
        unsure = await outcome(generations.recover([], accept_data_loss=False))
        assert isinstance(unsure, Invalid)
        assert "--accept-data-loss" in unsure.message
        gone = await outcome(generations.recover([node_id(world, 1)], accept_data_loss=True))
        assert isinstance(gone, Invalid)
        assert node_id(world, 1).hex() in gone.message
        assert world.domain(0).generation == 1
        assert generations.records() == ()

    play(story)


def test_member_that_comes_back_stops_keeps_its_file_and_rejoins_wiped() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        world.cluster.crash(1)
        world.cluster.crash(2)
        await recover(world, 0)
        await all_served(world)
        await world.cluster.start(1)
        await world.until(lambda: world.domain(1).removed, 20.0)
        assert "recovered without this node" in world.domain(1).generations.stopped
        await world.cluster.machines[0].clock.sleep(30.0)
        late = world.node(1)
        assert all(late.registers.row(k, ROW) == value(f"v{i}") for i, k in enumerate(KEYS))
        for tablet in range(TABLETS):
            with pytest.raises(NotServing):
                late.domain.admit(tablet, world.domain(0).chain.link(3).tablet_epochs[tablet])
        world.cluster.wipe(1)
        await world.cluster.start(1)
        await world.until(lambda: world.domain(1).joined, 20.0)
        await all_served(world)
        assert world.domain(1).generation == 2

    play(story)


def test_member_with_a_longer_chain_of_the_old_generation_is_superseded_for_good() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        world.cluster.crash(0)
        old = world.domain(1).roster
        secret = successor(old, old.members, old.voters[::-1], old.tablets)
        await world.domain(1).peers.learn(secret, node_id(world, 1))
        await world.domain(1).peers.learn(
            successor(secret, secret.members, secret.voters[::-1], secret.tablets), node_id(world, 1)
        )
        world.cluster.crash(1)
        await world.domain(2).stop()
        record = await recover(world, 2)
        await world.domain(2).start()
        assert record.epoch == old.epoch + 1
        await world.cluster.start(1)
        await world.until(lambda: world.domain(1).generations.superseded == 2, 20.0)
        world.cluster.crash(1)
        await world.cluster.start(1)
        assert world.domain(1).generations.superseded == 2
        assert not world.domain(1).joined
        assert isinstance(
            await outcome(_admit(world, 1)),
            NotServing,
        )

    play(story)


async def _admit(world: World, number: int) -> None:
    domain = world.domain(number)
    domain.admit(0, domain.roster.tablet_epochs[0])


def test_recovered_domain_grows_and_loses_again() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        world.cluster.crash(1)
        world.cluster.crash(2)
        await recover(world, 0)
        for _ in range(2):
            await world.add()
        await world.until(
            lambda: all(len(nodes) == 3 for nodes in world.domain(0).roster.tablets), 60.0, "three replicas"
        )
        await all_served(world)
        assert world.node(4).registers.row(KEYS[3], ROW) == value("v3")
        world.cluster.crash(0)
        world.cluster.crash(3)
        record = await recover(world, 4)
        await all_served(world)
        assert (record.generation, world.domain(4).generation) == (3, 3)
        assert world.node(4).registers.row(KEYS[3], ROW) == value("v3")

    play(story)


def link(world_link: Roster, generation: int, **changes) -> Roster:
    fields = {name: getattr(world_link, name) for name in Roster.__struct_fields__}
    return Roster(**{**fields, "generation": generation, **changes})


def test_first_link_of_a_generation_with_old_epochs_or_strangers_is_refused() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        old = world.domain(0).roster
        good = recovered(old, [node_id(world, 0)])
        check_step(old, good)
        with pytest.raises(RemoteProtocolError):
            check_step(old, link(good, 2, tablet_epochs=(1, *good.tablet_epochs[1:])))
        with pytest.raises(RemoteProtocolError):
            check_step(good, link(good, 3, epoch=good.epoch + 1))
        with pytest.raises(Invalid):
            recovered(old, [b"nobody"])
        assert majority_lives(old, [m.node_id for m in old.members][:2])
        assert not majority_lives(old, [node_id(world, 0)])

    play(story)


def test_two_orders_with_a_common_survivor_only_one_begins() -> None:
    async def story(world: World) -> None:
        await world.grow(5)
        for i, k in enumerate(KEYS):
            await world.put(0, k, f"v{i}")
        for n in (0, 1, 2):
            world.cluster.crash(n)
        ordered = [asyncio.ensure_future(recover(world, n, 3, 4)) for n in (3, 4)]
        done = await asyncio.gather(*ordered, return_exceptions=True)
        assert len([r for r in done if isinstance(r, Invalid)]) == 1
        await all_served(world)
        await world.until(lambda: world.domain(3).roster == world.domain(4).roster)
        assert world.domain(3).generation == 2

    play(story)


@pytest.mark.parametrize("seed", range(3))
def test_two_recoveries_behind_a_cut_one_wins_and_the_other_stops_for_good(seed: int) -> None:
    async def story(world: World) -> None:
        await world.grow(5)
        for i, k in enumerate(KEYS):
            await world.put(0, k, f"v{i}")
        world.cluster.crash(0)
        world.cluster.partition([1, 2], [3, 4])
        await world.cluster.machines[0].clock.sleep(10.0)
        await recover(world, 1, 1, 2)
        await recover(world, 3, 3, 4)
        await all_served(world)
        assert world.domain(1).generation == world.domain(3).generation == 2
        wins = 1 if world.domain(1).chain.branch > world.domain(3).chain.branch else 3
        loses = 4 - wins
        world.cluster.heal()
        both = (loses, loses + 1)
        await world.until(lambda: all(world.domain(n).generations.superseded == 2 for n in both), 60.0, "stopping")
        await world.cluster.machines[0].clock.sleep(20.0)
        assert all(world.domain(n).joined for n in (wins, wins + 1))
        assert not any(world.domain(n).joined for n in both)
        assert isinstance(await outcome(_admit(world, loses)), NotServing)
        before = [world.node(loses).registers.row(k, ROW) for k in KEYS]
        world.cluster.crash(loses)
        await world.cluster.start(loses)
        assert world.domain(loses).generations.superseded == 2
        assert [world.node(loses).registers.row(k, ROW) for k in KEYS] == before
        world.cluster.wipe(loses)
        await world.cluster.start(loses)
        await world.until(lambda: world.domain(loses).joined, 60.0, "joining wiped")

    play(story, seed)


def test_vote_for_an_order_whose_orderer_is_gone_does_not_stand_in_the_way() -> None:
    async def story(world: World) -> None:
        await written(world, 3)
        link = recovered(world.domain(0).roster, [node_id(world, 0), node_id(world, 1)])
        voted = await world.domain(1).answer(node_id(world, 0), AskRecovery("one", link))
        assert voted == RecoveryVote(True)
        again = await world.domain(1).answer(node_id(world, 2), AskRecovery("one", link))
        assert isinstance(again, RecoveryVote)
        assert not again.granted
        assert node_id(world, 0).hex() in again.why
        world.cluster.crash(0)
        world.cluster.crash(2)
        await recover(world, 1, 1)
        await all_served(world)
        assert world.domain(1).generation == 2

    play(story)
