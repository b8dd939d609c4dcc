"""Rules of reconfiguration whose breaking random runs show too seldom: one hand-made schedule for each.

Every story is told with the rule and without it. Domains run without their background work where a story has to move
each step itself; writes and reads go through the registers' own acceptor.
"""

from __future__ import annotations

import msgspec
import pytest

from dht.domain.decree import DecreeProposer
from dht.domain.messages import AskHeaders, AskRegisters, AskSeal
from dht.domain.roster import successor
from dht.domain.rules import DomainRules
from dht.domain.tablets import Tablets
from dht.errors import DhtError, NotServing, Unavailable
from dht.model import ZERO, Ballot, FindQuery, GroupKey, NodeId, Struct
from dht.register.acceptor import Acceptor
from dht.register.context import Context
from dht.register.find import FindServer
from dht.register.group import GroupState
from dht.register.messages import Accept, FindReplica, ReadItem, Verdict, Wanted
from dht.register.rules import Rules
from dht.rows import encode_row
from dht.storage.memory import MemoryDisk
from dht.world import Batch
from tests.dht.domain.small_world import ROW, World, key, outcome, play, value
from tests.dht.domain.test_transfer import Stage, staged

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])


async def accepts(stage: Stage, number: int, k: GroupKey, epoch: int, round: int, text: str) -> bool:
    """Whether the node accepts the value, as a proposer would ask it to."""
    node = stage.world.node(number)
    boot = node.boot
    context = Context(
        boot.node_id, boot.boot, boot.clock, boot.chance, boot.network, boot.disk, node.registers, node.domain
    )
    ballot = Ballot(1, epoch, round, b"p", 1, round)
    state = GroupState({ROW: encode_row({1: text})}, ballot)
    request = Accept(k, ballot, None, ZERO, True, dict(state.rows), state.digest.to_bytes(16, "big"), False)
    acceptor = Acceptor(context)
    try:
        reply, batch = acceptor.accept(request)
    except NotServing:
        return False
    await acceptor.durable(batch, k)
    return reply.verdict == Verdict.ACCEPTED


async def three_replicas(stage: Stage) -> None:
    stage.move(0, 1, 2)
    await stage.tell(0, 1, 2)
    for number in (0, 1, 2):
        assert await stage.initialise(number)


def late_accept(rules: DomainRules) -> bool:
    """Whether a write of the old epoch is acknowledged, and lost.

    Epoch 2 is {0, 1, 2}, epoch 3 is {0, 1, 3}. 3 and 1 initialise out of sealed replicas.

    Then the accepts of a proposer that was promised its ballot before the seals reach 0 and 2, which know epoch 2 well.
    Two of three would be a majority of epoch 2, but 1 and 3 are one of epoch 3, and they do not have the value.
    """
    lost: list[bool] = []

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        await three_replicas(stage)
        for number in (0, 1, 2):
            assert await accepts(stage, number, k, 2, 1, "old")
        stage.move(0, 1, 3)
        await stage.tell(0, 1, 3)
        assert await stage.initialise(3)
        assert await stage.initialise(1)
        votes = [await accepts(stage, number, k, 2, 2, "new") for number in (0, 2)]
        assert [stage.row(number, k) for number in (1, 3)] == [value("old")] * 2
        lost.append(all(votes))

    staged(story, 4, rules)
    return lost[0]


@BOTH
def test_seal_late_accept_of_the_old_epoch_is_acknowledged_and_lost(on: bool) -> None:
    assert late_accept(DomainRules(seal=on)) is not on


@BOTH
def test_seal_on_accept_late_accept_of_the_old_epoch_is_acknowledged_and_lost(on: bool) -> None:
    assert late_accept(DomainRules(seal_on_accept=on)) is not on


@BOTH
def test_seal_before_init_write_between_survey_and_seal_is_lost(on: bool) -> None:
    """Epoch 1 is {0}, epoch 2 is {1}. Just before 1's seal reaches 0, 0 acknowledges a write."""

    async def story(stage: Stage) -> None:
        k, fresh = stage.keys[:2]
        assert await accepts(stage, 0, k, 1, 1, "old")
        stage.move(1)
        await stage.tell(0, 1)
        transfer = stage.world.domain(1).transfer
        seal = transfer._seal

        async def late(*args: object) -> object:
            assert await accepts(stage, 0, k, 1, 2, "new")
            assert await accepts(stage, 0, fresh, 1, 1, "fresh")
            return await seal(*args)  # type: ignore[arg-type]

        transfer._seal = late  # type: ignore[method-assign,assignment]
        assert await stage.initialise(1)
        rows = [stage.row(1, k), stage.row(1, fresh)]
        assert rows == ([value("new"), value("fresh")] if on else [value("old"), None])

    staged(story, 2, DomainRules(seal_before_init=on))


@BOTH
def test_init_durable_restart_initialises_again_and_loses_what_was_written_since(on: bool) -> None:
    """Epoch 1 is {0}, epoch 2 is {1}. 1 is initialised, acknowledges a write, and restarts.

    A replica that does not know any more that it was initialised takes the content of epoch 1 again.
    """

    async def story(stage: Stage) -> None:
        k, world = stage.keys[0], stage.world
        assert await accepts(stage, 0, k, 1, 1, "old")
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        assert await accepts(stage, 1, k, 2, 2, "new")
        world.cluster.crash(1)
        await world.cluster.start(1)
        await world.until(lambda: world.domain(1).tablets.serves(stage.tablet) == 2)
        assert stage.row(1, k) == value("new" if on else "old")

    staged(story, 2, DomainRules(init_durable=on))


@BOTH
def test_replace_content_row_deleted_while_a_replica_was_away_comes_back_with_it(on: bool) -> None:
    """Epochs {0}, {1}, {0}: while 1 has the tablet, the row is deleted and its tombstone collected.

    0 still has the row in its file when it takes the tablet over again.
    """

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        assert await accepts(stage, 0, k, 1, 1, "dead")
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        node = stage.world.node(1)
        batch = Batch()
        node.registers.erase(batch, k)
        await node.boot.disk.durable(node.boot.disk.submit(batch))
        stage.move(0)
        await stage.tell(0, 1)
        assert await stage.initialise(0)
        assert stage.row(0, k) == (None if on else value("dead"))

    staged(story, 2, DomainRules(replace_content=on))


@BOTH
def test_gate_on_majority_node_that_leaves_is_let_go_with_the_only_copy(on: bool) -> None:
    """Two members; the second cannot take anything over yet when the first, which has everything, is drained.

    The cluster says that it has let the first go, so its machine is taken away. Then the second may go on.
    """

    async def story(world: World) -> None:
        await world.add(founds=True)
        await world.put(0, key(0), "v")

        def blocked(sender: NodeId, to: NodeId, message: Struct) -> bool:
            return isinstance(message, (AskSeal, AskHeaders, AskRegisters))

        world.cluster.fabric.lost_to = blocked
        await world.add()
        await world.until(lambda: world.domain(1).joined)
        await world.domain(1).leave(world.domain(0).local.node_id, drain=True)
        clock = world.cluster.machines[0].clock
        await clock.sleep(30.0)
        assert world.domain(0).removed is not on
        if world.domain(0).removed:
            world.cluster.crash(0)
        world.cluster.fabric.lost_to = None
        if on:
            await world.until(lambda: world.domain(0).removed)
            assert await world.get(1, key(0)) == value("v")
        else:
            assert isinstance(await outcome(world.get(1, key(0))), Unavailable)

    play(story, rules=DomainRules(gate_on_majority=on))


@BOTH
def test_decided_by_previous_voters_member_that_is_gone_is_asked_for_the_next_link(on: bool) -> None:
    """Link 1 is {0}, link 2 is {1}: 0 has left and is switched off. 1 alone has to be able to decide link 3.

    There are no two chains to see here: all who hold link 2 agree on who votes, by either rule, and who is not listed
    there does not vote. What breaks is that the domain stands still for good, with all its members alive.
    """

    async def story(stage: Stage) -> None:
        first = stage.links[0]
        member = stage.member(1)
        link = successor(first, [member], [member.node_id], [[member.node_id]] * len(first.tablets))
        stage.links.append(link)
        await stage.tell(0, 1)
        stage.world.cluster.crash(0)
        domain = stage.world.domain(1)
        proposer = DecreeProposer(
            domain.chain, member.node_id, 1, domain._clock, domain._context.chance, domain.peers.ask, domain._rules
        )
        moved = msgspec.structs.replace(member, address="elsewhere:7000")
        wanted = successor(link, [moved], link.voters, link.tablets)
        decided: object = None
        try:
            decided = await proposer.propose(wanted)
        except DhtError as error:
            decided = type(error)
        assert decided == (wanted if on else Unavailable)

    staged(story, 2, DomainRules(decided_by_previous_voters=on))


@BOTH
def test_refuse_stale_init_epoch_below_a_seal_is_not_initialised(on: bool) -> None:
    """The local answer only: a node initialises nothing but the newest epoch that it knows, and a seal brings the link
    that replaces the sealed epoch before it is written. So no order of messages leads a node to ask for a stale epoch,
    and the rule is a second lock on a door that the chain keeps shut.
    """
    tablets = Tablets(MemoryDisk(), DomainRules(refuse_stale_init=on))
    tablets.seal(0, 3)
    assert [tablets.may_initialise(0, epoch) for epoch in (2, 3, 4)] == [not on, not on, True]
    batch = Batch()
    tablets.initialise(batch, 0, 5, 3, ZERO)
    tablets.submit(batch)
    assert [tablets.may_initialise(0, epoch) for epoch in (4, 5, 6)] == [not on, not on, True]


@BOTH
def test_incarnation_checked_wiped_replica_passes_for_the_one_it_was_and_a_write_is_lost(on: bool) -> None:
    """Epoch 1 is {0}, epoch 2 is {0, 1, 2}, all initialised. 1 and 2 acknowledge a write that 0 misses.

    Then 2 loses its disk. With its old name it reads in the link that it is a replica, and that 0 alone had everything
    before. So 0 and 2 are a majority without the write.
    """

    async def story(stage: Stage) -> None:
        k, world = stage.keys[0], stage.world
        assert await accepts(stage, 0, k, 1, 1, "old")
        await three_replicas(stage)
        for number in (1, 2):
            assert await accepts(stage, number, k, 2, 2, "new")
        world.cluster.wipe(2)
        await world.cluster.start(2)
        await world.domain(2).stop()
        await stage.tell(2)
        serves = await stage.initialise(2)
        assert serves is not on
        assert [stage.row(number, k) for number in (0, 2)] == [value("old"), None if on else value("old")]

    staged(story, 3, DomainRules(incarnation_checked=on))


@BOTH
def test_epoch_checked_proposer_with_a_stale_roster_is_enough_for_itself(on: bool) -> None:
    """Epoch 1 is {0}, epoch 2 is {0, 1, 2}, all initialised. Somebody who has only heard of epoch 1 proposes there.

    0 alone is a majority of epoch 1, and none of epoch 2: 1 and 2 answer a read without it.
    """

    async def story(stage: Stage) -> None:
        k = stage.keys[0]
        assert await accepts(stage, 0, k, 1, 1, "old")
        await three_replicas(stage)
        acknowledged = await accepts(stage, 0, k, 1, 2, "new")
        assert acknowledged is not on
        assert [stage.row(number, k) for number in (1, 2)] == [value("old")] * 2

    staged(story, 3, DomainRules(epoch_checked=on))


@BOTH
def test_serving_only_sealed_replica_answers_a_read_and_a_find(on: bool) -> None:
    """Epoch 1 is {0}, epoch 2 is {1}, which acknowledges a write. Somebody who knows epoch 1 only reads at 0."""

    async def story(stage: Stage) -> None:
        k, node = stage.keys[0], stage.world.node(0)
        assert await accepts(stage, 0, k, 1, 1, "old")
        stage.move(1)
        await stage.tell(0, 1)
        assert await stage.initialise(1)
        assert await accepts(stage, 1, k, 2, 2, "new")
        boot = node.boot
        context = Context(
            boot.node_id,
            boot.boot,
            boot.clock,
            boot.chance,
            boot.network,
            boot.disk,
            node.registers,
            node.domain,
            Rules(serving_only=on),
        )
        acceptor = Acceptor(context)
        state = acceptor.state(ReadItem(k, 1, Wanted.DATA, None))
        assert state.serving is not on
        assert state.rows == (None if on else {ROW: value("old")})

        async def learned(database: str, version: int) -> int:
            return version

        query = FindQuery("db", 1, 0)
        asked = FindReplica(query, (stage.tablet,), (1,), (True,), 10)
        reply = await FindServer(context, acceptor, learned).serve(asked)
        assert [row.row for row in reply.rows] == ([] if on else [value("old")])

    staged(story, 2)
