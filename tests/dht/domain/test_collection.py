"""Rule 7: what is collected stays gone, and what was promised for it stays promised."""

from __future__ import annotations

import msgspec

from dht.domain.collection import above
from dht.domain.messages import Collect
from dht.domain.rules import RULES, DomainRules
from dht.errors import NotServing
from dht.model import ZERO, Ballot
from dht.storage.registers import Header
from dht.world import Batch
from tests.dht.domain.small_world import ROW, World, key, outcome, play, value

K = key(0)


class Graveyard:
    """Three domains, and one register written by hand on each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.epoch = 0
        self.tablet = world.node(0).registers.tablet(K)

    def ballot(self, round: int) -> Ballot:
        self.epoch = self.epoch or self.world.domain(0).roster.tablet_epochs[self.tablet]
        return Ballot(1, self.epoch, round, b"p", 1, round)

    def keep(self, number: int, round: int, promise: int = 0, *, deleted: bool = True) -> None:
        """A tombstone of that round, chosen, or a living value."""
        node = self.world.node(number)
        at = self.ballot(round)
        header = Header(self.ballot(promise or round), at, at, b"d" * 16, deleted)
        batch = Batch()
        node.registers.replace(batch, K, header, {} if deleted else {ROW: value("lives")})
        node.boot.disk.submit(batch)

    def header(self, number: int) -> Header:
        return self.world.node(number).registers.header(K)

    async def sweep(self, number: int = 0, times: int = 2) -> None:
        for _ in range(times):
            await self.world.domain(number).collection.sweep()


def bury(story, rules: DomainRules = RULES) -> None:
    async def told(world: World) -> None:
        await world.grow(3)
        await world.cluster.machines[0].clock.sleep(3.0)
        await story(Graveyard(world))

    play(told, rules=rules)


def test_tombstone_of_all_replicas_is_erased_at_the_second_sweep_and_leaves_a_floor() -> None:
    async def story(g: Graveyard) -> None:
        for number in range(3):
            g.keep(number, 7)
        await g.sweep(times=1)
        assert g.header(0).accepted == g.ballot(7)
        await g.sweep(times=1)
        for number in range(3):
            assert g.header(number) == Header()
            assert g.world.domain(number).floor(g.tablet) == above(g.ballot(7))
            assert g.world.domain(number).agreed_floor(g.tablet) == above(g.ballot(7))

    bury(story)


def resurrected(rules: DomainRules) -> bool:
    """Two replicas hold a tombstone, the third still what lived before: whether collection brings that back."""
    out = []

    async def story(g: Graveyard) -> None:
        g.keep(0, 7)
        g.keep(1, 7)
        g.keep(2, 3, deleted=False)
        await g.sweep()
        out.append(await g.world.get(0, K) == value("lives"))

    bury(story, rules)
    return out[0]


def test_replica_without_the_tombstone_keeps_the_others_from_erasing_it() -> None:
    assert not resurrected(RULES)


def test_replica_without_the_tombstone_brings_the_dead_back_when_a_majority_is_enough() -> None:
    assert resurrected(msgspec.structs.replace(RULES, collect_needs_all=False))


def promise_after(rules: DomainRules) -> tuple[Ballot, Ballot]:
    """(what was promised for a register above its tombstone, what its tablet promises when it is collected)."""
    out = []

    async def story(g: Graveyard) -> None:
        g.keep(0, 7, promise=8)
        g.keep(1, 7, promise=30)
        g.keep(2, 7, promise=8)
        await g.sweep()
        assert g.header(1) == Header()
        out.append((g.ballot(30), g.world.domain(1).floor(g.tablet)))

    bury(story, rules)
    return out[0]


def test_collected_register_leaves_what_was_promised_for_it() -> None:
    promised, floor = promise_after(RULES)
    assert floor > promised


def test_collected_register_forgets_its_promise_without_the_rule() -> None:
    promised, floor = promise_after(msgspec.structs.replace(RULES, floor_keeps_promise=False))
    assert floor < promised


def floor_at_a_new_replica(rules: DomainRules) -> Ballot:
    """After a fourth node has taken the tablet over from the three that collected."""
    out = []

    async def story(g: Graveyard) -> None:
        for number in range(3):
            g.keep(number, 7)
        await g.sweep()
        await g.world.add()
        await g.world.settled()
        newcomer = g.world.domain(3)
        tablets = newcomer.roster.tablets_of(newcomer.local.node_id)
        for number in range(3):
            if g.tablet not in tablets:
                await g.world.domain(0).leave(g.world.domain(number).local.node_id, drain=True)
                await g.world.until(lambda: g.tablet in newcomer.roster.tablets_of(newcomer.local.node_id))
                break
        await g.world.settled()
        assert newcomer.agreed_floor(g.tablet) == newcomer.floor(g.tablet)
        out.append(newcomer.floor(g.tablet))

    bury(story, rules)
    return out[0]


def test_floor_is_carried_to_a_new_replica() -> None:
    assert floor_at_a_new_replica(RULES) > ZERO


def test_floor_is_lost_at_a_new_replica_without_the_rule() -> None:
    assert floor_at_a_new_replica(msgspec.structs.replace(RULES, floor_carried=False)) == ZERO


def test_replica_that_missed_the_collection_gives_up_its_tombstone_at_the_next() -> None:
    async def story(g: Graveyard) -> None:
        g.keep(2, 7)
        await g.sweep(number=2)
        assert g.header(2) == Header()

    bury(story)


def test_register_written_again_meanwhile_is_not_erased() -> None:
    async def story(g: Graveyard) -> None:
        for number in range(3):
            g.keep(number, 7)
        await g.sweep(times=1)
        for number in range(3):
            g.keep(number, 9, deleted=False)
        await g.sweep(times=2)
        request = Collect("one", g.tablet, g.epoch, above(g.ballot(7)), (K,), (g.ballot(7),))
        await g.world.domain(1).collection.collect(request)
        assert all(g.header(number).accepted == g.ballot(9) for number in range(3))

    bury(story)


def test_collection_of_another_epoch_is_refused() -> None:
    async def story(g: Graveyard) -> None:
        g.keep(1, 7)
        request = Collect("one", g.tablet, g.epoch - 1, above(g.ballot(7)), (K,), (g.ballot(7),))
        assert isinstance(await outcome(g.world.domain(1).collection.collect(request)), NotServing)
        assert g.header(1).deleted

    bury(story)


def test_agreed_floor_reaches_who_missed_it_with_the_status() -> None:
    async def story(g: Graveyard) -> None:
        floor = above(g.ballot(7))
        await g.world.domain(0).collection.collect(Collect("one", g.tablet, g.epoch, floor, (), ()))
        await g.world.until(lambda: g.world.domain(2).agreed_floor(g.tablet) == floor, 10.0)
        assert g.world.domain(2).floor(g.tablet) == floor

    bury(story)
