"""One decree: contention, votes that outlive a crash, who may vote."""

from __future__ import annotations

import asyncio

import pytest

from dht.domain.asking import Ask
from dht.domain.decree import DecreeAcceptor, DecreeProposer
from dht.domain.messages import DecreeAccept, DecreePrepare, DomainMessage
from dht.domain.roster import Roster, successor
from dht.domain.rules import RULES, DomainRules
from dht.errors import DhtError, NotServing, RemoteProtocolError
from dht.model import Ballot, NodeId, Struct
from tests.dht.domain.small_world import World, play


def candidate(world: World, i: int) -> Roster:
    """The next link with machine i's address changed, so that every proposer wants another one."""
    roster = world.domain(0).roster
    members = tuple(
        type(m)(m.node_id, m.incarnation, m.pop, m.failure_domain, f"candidate:{i}") for m in roster.members
    )
    return successor(roster, members, roster.voters, roster.tablets)


@pytest.mark.parametrize("seed", range(10))
def test_propose_under_contention_and_loss_all_see_one_link(seed: int) -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        for i in range(3):
            await world.domain(i).stop()
        world.cluster.fabric.weather.loss = 0.2
        decided: list[Roster] = []

        async def propose(i: int) -> None:
            domain = world.domain(i % 3)
            proposer = DecreeProposer(
                domain.chain,
                domain.local.node_id,
                100 + i,
                domain._clock,
                domain._context.chance,
                domain.peers.ask,
                RULES,
            )
            for _ in range(5):
                try:
                    decided.append(await proposer.propose(candidate(world, i)))
                    return
                except DhtError:
                    continue

        await asyncio.gather(*(propose(i) for i in range(6)))
        assert decided
        assert all(link == decided[0] for link in decided)

    play(story, seed)


def acceptor(world: World, i: int) -> DecreeAcceptor:
    domain = world.domain(i)
    return DecreeAcceptor(domain.chain, domain._context.disk, domain.local.node_id, domain.local.incarnation, RULES)


def ballot(round: int, node: NodeId = b"p") -> Ballot:
    return Ballot(1, 4, round, node, 1, round)


def test_accept_below_the_promise_is_refused_also_after_a_restart() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        for i in range(3):
            await world.domain(i).stop()
        link = candidate(world, 1)
        await acceptor(world, 0).prepare(DecreePrepare("one", link.epoch, ballot(5)))
        reply = await acceptor(world, 0).accept(DecreeAccept("one", link.epoch, ballot(4), link))
        assert reply.promised == ballot(5)
        reply = await acceptor(world, 0).accept(DecreeAccept("one", link.epoch, ballot(6), link))
        assert reply.promised == ballot(6)
        promise = await acceptor(world, 0).prepare(DecreePrepare("one", link.epoch, ballot(7)))
        assert promise.link == link
        assert promise.accepted == ballot(6)

    play(story)


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_ballot_promised_once_wiped_proposer_comes_to_a_ballot_of_the_one_it_was(on: bool) -> None:
    """2 proposes a link and loses its disk while its accepts are on their way; its first ballot is the same again.

    It proposes another link, which the two others accept. Then one of them gets the accept of before.
    """

    async def story(world: World) -> None:
        await world.grow(3)
        for i in range(3):
            await world.domain(i).stop()
        before, rules = candidate(world, 1), DomainRules(ballot_promised_once=on)
        late: list[DecreeAccept] = []

        def proposer(i: int, ask: Ask) -> DecreeProposer:
            domain = world.domain(i)
            node, boot = domain.local.node_id, domain.local.boot
            return DecreeProposer(domain.chain, node, boot, domain._clock, domain._context.chance, ask, rules)

        async def hold(to: NodeId, message: DomainMessage) -> Struct:
            if isinstance(message, DecreeAccept):
                late.append(message)
                await asyncio.sleep(1e3)
            return await world.domain(2).peers.ask(to, message)

        lost = asyncio.create_task(proposer(2, hold).propose(before))
        await world.until(lambda: bool(late))
        world.cluster.wipe(2)
        lost.cancel()
        await world.cluster.start(2)
        await world.domain(2).stop()
        me, other = (world.domain(i).local.node_id for i in (2, 0))
        await world.domain(2).peers.learn(world.domain(0).roster, other)
        decided = await proposer(2, world.domain(2).peers.ask).propose(candidate(world, 2))
        first = min((0, 1), key=lambda i: before.voters.index(world.domain(i).local.node_id))
        await world.domain(first).answer(me, late[0])
        again = await proposer(1 - first, world.domain(1 - first).peers.ask).propose(candidate(world, 3))
        assert (again == decided) is on
        assert again in (decided, before)

    play(story, rules=DomainRules(ballot_promised_once=on))


def test_vote_without_the_link_before_or_with_another_incarnation_is_refused() -> None:
    async def story(world: World) -> None:
        await world.grow(3)
        for i in range(3):
            await world.domain(i).stop()
        domain = world.domain(0)
        link = candidate(world, 1)
        with pytest.raises(NotServing):
            await acceptor(world, 0).prepare(DecreePrepare("one", link.epoch + 1, ballot(1)))
        reborn = DecreeAcceptor(domain.chain, domain._context.disk, domain.local.node_id, b"other", RULES)
        with pytest.raises(NotServing):
            await reborn.prepare(DecreePrepare("one", link.epoch, ballot(1)))
        bad = successor(link, link.members, link.voters, link.tablets)
        with pytest.raises(RemoteProtocolError):
            await acceptor(world, 0).accept(DecreeAccept("one", link.epoch, ballot(9), bad))

    play(story)
