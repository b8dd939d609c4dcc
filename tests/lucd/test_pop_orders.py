"""Orders to recover a PoP that cross one another, or members that come back: one domain goes on, and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from dht.domain.messages import AskCopyPage, CopyCovers
from dht.domain.restore import QUESTIONS, Restoration, hand_over
from dht.domain.roster import Member
from dht.errors import Conflict, DhtError, Invalid, NotFound, Unavailable
from dht.model import NodeId, PopClaim, Struct
from dht.register.catalog import recovering
from lucd.messages import RecoverDomain, RecoverPop, RecoverReply
from lucd.pop_recovery import PopRecoverer, _findings
from lucd.recovery import Recoverer
from tests.dht.domain.beside import Beside
from tests.dht.domain.small_world import World, key, play, value

HOLDER = b"holder" * 3 + b"xx"
KEYS = [key(i) for i in range(20)]
Meanwhile = Callable[[], Awaitable[None]]


class Claims:
    """Domain `global` with the claim of the one PoP. `moved`: awaited before it is told that the claim has moved."""

    def __init__(self, claim: PopClaim) -> None:
        self.claim = claim
        self.moved: Meanwhile | None = None

    async def pops(self) -> dict[str, PopClaim]:
        await asyncio.sleep(0)
        return {"one": self.claim}

    async def move_pop(self, pop: str, before: PopClaim, after: PopClaim) -> None:
        await asyncio.sleep(0)
        if self.claim != before:
            raise Conflict("the claim is another")
        self.claim = after
        if self.moved is not None:
            await self.moved()


async def salvage(timeout_s: float) -> tuple[str, ...]:
    return ()


class Seats:
    """Domain `global` with a seat of the node's. `power`: whether the daemon that frees it lives to see it freed."""

    def __init__(self, node: NodeId) -> None:
        member = Member(node, b"i" * 16, "one", "host", "h:1")
        self.chain = SimpleNamespace(newest=SimpleNamespace(members=(member,)))
        self.power = False
        self.freed: list[NodeId] = []

    async def leave(self, node: NodeId, *, drain: bool) -> int:
        if not self.power:
            raise PowerLoss
        self.freed.append(node)
        return 1


class PowerLoss(Exception):
    pass


class Lost:
    """A PoP of three, switched off, which machine 0 founded; a copy of it beside; new machines, cut off one another.

    `heard`: machines that the new ones have a link to. `meanwhile`: awaited before a page of groups is there.
    """

    def __init__(self, world: World, beside: Beside) -> None:
        founder = world.cluster.machines[0]
        self.world = world
        self.beside = beside
        self.claims = Claims(PopClaim(founder.node_id, founder.incarnation, 0))
        self.wide: object = SimpleNamespace(chain=SimpleNamespace(newest=None))
        self.heard: set[int] = set()
        self.holders = [HOLDER]
        self.silent: set[NodeId] = set()
        self.meanwhile: Meanwhile | None = None

    async def new(self) -> int:
        number = self.world.cluster.add()
        self.world.cluster.partition([number], list(range(number)))
        await self.world.cluster.start(number)
        return number

    def node_id(self, number: int) -> NodeId:
        return self.world.cluster.machines[number].node_id

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        if isinstance(message, QUESTIONS):
            if to in self.silent:
                raise Unavailable("not heard")
            if to != HOLDER:
                raise NotFound("there is no copy on this node")
            reply = hand_over(self.beside.follower, message)
            if isinstance(message, AskCopyPage) and reply.copies and self.meanwhile is not None:  # type: ignore[union-attr]
                meanwhile, self.meanwhile = self.meanwhile, None
                await meanwhile()
            return reply
        number = next(i for i in range(len(self.world.cluster.machines)) if self.node_id(i) == to)
        if not self.world.cluster.machines[number].answering:
            raise Unavailable("not heard")
        return await self.world.domain(number).answer(b"f" * 20, message)

    def recoverer(self, number: int) -> PopRecoverer:
        node = self.world.node(number)
        own = SimpleNamespace(
            domain=node.domain,
            registers=node.registers,
            disk=node.boot.disk,
            store=SimpleNamespace(salvage=salvage),
        )
        return PopRecoverer(
            own,  # type: ignore[arg-type]
            self.wide,  # type: ignore[arg-type]
            node.boot.incarnation,
            self,  # type: ignore[arg-type]
            lambda: self.claims,  # type: ignore[arg-type,return-value]
            lambda: self.holders,
            lambda: [self.node_id(i) for i in self.heard - {number}],
        )

    async def order(self, number: int, *, accept: bool = True) -> RecoverReply | DhtError:
        """What the human at that machine is told."""
        try:
            return await self.recoverer(number).order(RecoverPop("one", accept, 60.0))
        except DhtError as error:
            return error

    def took_the_claim(self, number: int) -> None:
        """An order on that machine broke off when the claim had moved."""
        boot = self.world.node(number).boot
        self.claims.claim = recovering(self.claims.claim, boot.node_id, boot.incarnation, 2)

    def serving(self) -> list[int]:
        """Machines that run and serve a recovered domain."""
        machines = range(len(self.world.cluster.machines))
        running = [n for n in machines if self.world.cluster.machines[n].answering]
        return [n for n in running if self.world.domain(n).joined and self.world.domain(n).generation > 1]


async def lost(world: World) -> Lost:
    await world.grow(3)
    for i, k in enumerate(KEYS):
        await world.put(0, k, f"v{i}")
    beside = Beside(world)
    await beside.rounds(3)
    for number in range(3):
        world.cluster.shut(number)
    return Lost(world, beside)


BROKE_OFF = pytest.mark.parametrize("broke_off", [False, True], ids=["anew", "after one that broke off"])


@BROKE_OFF
def test_two_orders_at_once_on_nodes_that_do_not_hear_each_other_one_is_refused(broke_off: bool) -> None:
    """Also where the claim is the one's already: that it goes on, too, is seen by the other."""

    async def story(world: World) -> None:
        pop = await lost(world)
        one, other = await pop.new(), await pop.new()
        if broke_off:
            pop.took_the_claim(one)
        told = await asyncio.gather(pop.order(one), pop.order(other))
        assert sorted(type(reply).__name__ for reply in told) == ["Conflict", "RecoverReply"]
        (serving,) = pop.serving()
        assert pop.claims.claim.node == pop.node_id(serving)
        refused = next(reply for reply in told if isinstance(reply, Conflict))
        assert f"is being recovered on node {pop.node_id(serving).hex()}" in refused.message
        assert await world.get(serving, KEYS[0]) == value("v0")

    play(story)


def test_order_while_the_node_that_took_the_claim_has_not_begun_yet_is_refused() -> None:
    """It may begin, and acknowledge writes, at any moment."""

    async def story(world: World) -> None:
        pop = await lost(world)
        one, other = await pop.new(), await pop.new()
        pop.heard = {one, other}
        refusals = []

        async def meanwhile() -> None:
            pop.claims.moved = None
            refusals.append(await pop.order(other))

        pop.claims.moved = meanwhile
        assert isinstance(await pop.order(one), RecoverReply)
        (refused,) = refusals
        assert isinstance(refused, Invalid)
        assert f"is being recovered on node {pop.node_id(one).hex()}" in refused.message
        assert pop.serving() == [one]

    play(story)


@BROKE_OFF
def test_order_during_which_another_one_ends_is_refused(broke_off: bool) -> None:
    """It has read the claim before the other one took it, again or for the first time."""

    async def story(world: World) -> None:
        pop = await lost(world)
        one, other = await pop.new(), await pop.new()

        if broke_off:
            pop.took_the_claim(other)

        async def meanwhile() -> None:
            assert isinstance(await pop.order(other), RecoverReply)

        pop.meanwhile = meanwhile
        refused = await pop.order(one)
        assert isinstance(refused, Conflict)
        assert pop.serving() == [other]

    play(story)


def test_order_during_which_a_member_comes_back_is_refused_before_the_claim_moves() -> None:
    async def story(world: World) -> None:
        pop = await lost(world)
        number = await pop.new()
        before = pop.claims.claim

        async def meanwhile() -> None:
            await world.cluster.start(0)
            pop.heard.add(0)

        pop.meanwhile = meanwhile
        refused = await pop.order(number)
        assert isinstance(refused, Invalid)
        assert "answers: nothing is lost for good" in refused.message
        assert (pop.claims.claim, pop.serving()) == (before, [])

    play(story)


def test_node_that_recovered_the_pop_before_stops_when_it_comes_back_and_the_later_one_keeps_its_writes() -> None:
    """The copy had not heard of its generation, so the next one out of the copy would be the same."""

    async def story(world: World) -> None:
        pop = await lost(world)
        one, other = await pop.new(), await pop.new()
        assert isinstance(await pop.order(one), RecoverReply)
        world.cluster.shut(one)
        assert isinstance(await pop.order(other), RecoverReply)
        assert world.domain(other).generation == 3
        await world.put(other, KEYS[0], "acknowledged")
        world.cluster.heal()
        await world.cluster.start(one)
        world.domain(other).met(pop.node_id(one))
        await world.until(lambda: bool(world.domain(one).generations.stopped), 60.0, "stopping")
        assert pop.serving() == [other]
        assert await world.get(other, KEYS[0]) == value("acknowledged")

    play(story)


def test_order_that_broke_off_after_the_claim_moved_is_given_again() -> None:
    async def story(world: World) -> None:
        pop = await lost(world)
        number = await pop.new()

        async def powerless() -> None:
            raise Unavailable("the reply is lost")

        pop.claims.moved = powerless
        assert isinstance(await pop.order(number), Unavailable)
        assert pop.claims.claim.node == pop.node_id(number)
        pop.claims.moved = None
        world.cluster.crash(number)
        await world.cluster.start(number)
        reply = await pop.order(number)
        assert isinstance(reply, RecoverReply)
        assert world.domain(number).generations.records()[-1].generation == reply.recovery.generation
        assert await world.get(number, KEYS[0]) == value("v0")

    play(story)


def test_seats_that_an_order_which_broke_off_left_taken_are_freed_by_the_one_that_goes_on() -> None:
    async def story(world: World) -> None:
        pop = await lost(world)
        number = await pop.new()
        seats = pop.wide = Seats(pop.node_id(0))
        with pytest.raises(PowerLoss):
            await pop.order(number)
        world.cluster.crash(number)
        await world.cluster.start(number)
        seats.power = True
        domain, free_seats = world.domain(number), pop.recoverer(number).free_seats
        reply = await Recoverer(domain, salvage, free_seats).order(RecoverDomain((), True, 60.0))
        assert seats.freed == [pop.node_id(0)]
        assert f"node {seats.freed[0].hex()} was taken out of domain global" in "; ".join(reply.recovery.findings)
        assert await world.get(number, KEYS[0]) == value("v0")

    play(story)


def test_order_says_who_may_have_a_copy_that_covers_more_and_did_not_answer() -> None:
    """Started first, that one is asked: what only its copy covers is lost once the generation has begun."""
    away, without = b"away" * 5, b"without copy" + b"." * 8

    async def story(world: World) -> None:
        pop = await lost(world)
        pop.holders, pop.silent = [away, HOLDER, without], {away}
        number = await pop.new()
        refused = await pop.order(number, accept=False)
        assert isinstance(refused, Invalid)
        assert f"if one of them has a copy, that may cover more: {away.hex()}; " in refused.message
        assert "Start those that did not answer" in refused.message
        assert without.hex() not in refused.message
        done = await pop.order(number)
        assert isinstance(done, RecoverReply)
        assert away.hex() in "; ".join(done.recovery.findings)
        pop.silent.clear()
        again = await pop.order(await pop.new(), accept=False)
        assert "did not answer" not in str(again)

    play(story)


def test_findings_say_that_a_generation_of_which_no_copy_is_complete_is_not_covered() -> None:
    found = {HOLDER: CopyCovers(1, 1, (5.0,), {})}
    told, silent = ("; ".join(_findings(Restoration("one", None, found, heard))) for heard in (2, 1))  # type: ignore[arg-type]
    assert "no copy of generation 2 is complete" in told
    assert "generation" not in silent
