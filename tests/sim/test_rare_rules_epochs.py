"""Rules of the registers across tablet epochs: what one left unfinished, and what a coordinator was promised in it.

Unfinished (`handed_over`): a majority that holds it has not chosen it. Epoch 2 is {0, 1, 2}. One proposer's accept
reached 2 alone ("low"), a later one's 0 alone ("high"); neither is chosen.
Epoch 3 is {1, 2, 3}: 1 and 2 seal each other and take "low" over, 3 hears 0 and 2 and takes "high" over. Two of three
stand at one accepted ballot now, and still the next prepare that asks 3 finds "high" and chooses it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest

from dht.domain.rules import RULES as DOMAIN_RULES
from dht.model import Ballot, Change, FindQuery, GroupKey, Op, Part
from dht.register.acceptor import Acceptor
from dht.register.context import Context
from dht.register.group import GroupState
from dht.register.messages import Accept, Coordinated, Kind, Operation, Verdict
from dht.register.node import StoreNode
from dht.register.rules import RULES, Rules
from dht.rows import decode_row, encode_row, row_key
from tests.dht.domain.small_world import ROW, value
from tests.dht.domain.test_transfer import Stage, staged
from tests.dht.register.register_cluster import Identity
from tests.sim.bench import insert, update
from tests.sim.test_rare_rules_domain import accepts, three_replicas

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
NEVER_SEEN = "nothing"
OTHER_ROW = row_key(2, (1,))


class Stores:
    """The registers of the stage's machines, beside domains that move step by step."""

    def __init__(self, stage: Stage, rules: Rules) -> None:
        self._stores: list[StoreNode] = []
        for number in range(len(stage.world.cluster.machines)):
            node = stage.world.node(number)
            boot = node.boot
            store = StoreNode(
                Identity(boot.node_id, boot.boot),
                boot.clock,
                random.Random(number),
                boot.network,
                boot.disk,
                node.domain,
                node.registers,
                rules,
            )
            boot.network.serve(store.answer)
            self._stores.append(store)

    def __getitem__(self, number: int) -> StoreNode:
        return self._stores[number]

    async def row(self, number: int, key: GroupKey) -> object:
        (read,) = await self._stores[number].read([key], timeout_s=20.0)
        return decode_row((read.rows or {})[ROW])

    async def read(self, number: int, key: GroupKey) -> object:
        (read,) = await self._stores[number].read([key], timeout_s=20.0)
        return decode_row((read.rows or {})[ROW])[1] if read.rows else NEVER_SEEN

    async def find(self, number: int, key: GroupKey) -> object:
        found = await self._stores[number]._finder.find(FindQuery("db", 1, 0), 20.0)
        rows = [decode_row(row.row)[1] for row in found.rows if row.group == key]
        return rows[0] if rows else NEVER_SEEN

    async def group(self, number: int, key: GroupKey) -> object:
        """The group's row of table 2, as a find in table 1 brings it along."""
        found = await self._stores[number]._finder.find(FindQuery("db", 1, 0, whole_groups=True), 20.0)
        return next(decode_row((one.rows or {})[OTHER_ROW])[1] for one in found.groups if one.key == key)

    async def propose(self, number: int, part: Part) -> Coordinated:
        """A write that this node itself coordinates, whoever is listed first."""
        store = self._stores[number]
        operation = Operation(Kind.COMMIT, store._context.chance.randbytes(16), part)
        deadline = store._context.clock.monotonic() + 20.0
        return await store._coordinator.run(operation, 0, True, deadline)

    async def stop(self) -> None:
        for store in self._stores:
            await store.stop()


async def taken_over(stage: Stage) -> None:
    """1 and 2 out of each other, 3 out of 0 and 2."""
    cluster = stage.world.cluster
    stage.move(1, 2, 3)
    await stage.tell(0, 1, 2, 3)
    cluster.partition([0], [1, 2])
    assert await stage.initialise(1)
    assert await stage.initialise(2)
    cluster.heal()
    cluster.partition([3], [1])
    assert await stage.initialise(3)
    cluster.heal()


async def handed_over(stage: Stage) -> GroupKey:
    """The beginning of each story; the group."""
    key = stage.keys[0]
    await three_replicas(stage)
    assert await accepts(stage, 2, key, 2, 1, "low")
    assert await accepts(stage, 0, key, 2, 2, "high")
    await taken_over(stage)
    assert [stage.row(number, key) for number in (1, 2, 3)] == [value("low"), value("low"), value("high")]
    return key


async def seen_twice(stage: Stage, rules: Rules, look: Callable[[Stores], Callable[..., Awaitable[object]]]) -> object:
    """What is seen at 1 while 3 is not heard, and then at 3 while 1 is not."""
    key = await handed_over(stage)
    stores, cluster = Stores(stage, rules), stage.world.cluster
    cluster.partition([3], [1, 2])
    first = await look(stores)(1, key)
    cluster.heal()
    cluster.partition([1], [2, 3])
    second = await stores.read(3, key)
    await stores.stop()
    return first, second


def sees(look: Callable[[Stores], Callable[..., Awaitable[object]]], *, on: bool) -> object:
    seen: list[object] = []

    async def story(stage: Stage) -> None:
        seen.append(await seen_twice(stage, Rules(inherited_marked=on), look))

    staged(story, 4, DOMAIN_RULES)
    return seen[0]


@BOTH
def test_inherited_marked_read_tells_what_the_next_prepare_does_not_find(on: bool) -> None:
    assert sees(lambda stores: stores.read, on=on) == ("low", "low" if on else "high")


@BOTH
def test_inherited_marked_find_tells_what_the_next_prepare_does_not_find(on: bool) -> None:
    assert sees(lambda stores: stores.find, on=on) == ("low", "low" if on else "high")


async def accepts_row(stage: Stage, number: int, key: GroupKey, round: int, text: str) -> None:
    """A proposer's accept of one row of table 2, on what the replica holds."""
    node = stage.world.node(number)
    boot = node.boot
    base = node.registers.header(key).accepted
    state = GroupState(node.registers.rows(key), base)
    delta = {OTHER_ROW: encode_row({1: text})}
    state.apply(dict(delta))
    ballot = Ballot(1, 2, round, b"p", 1, round)
    request = Accept(key, ballot, None, base, False, dict(delta), state.digest.to_bytes(16, "big"), False)
    acceptor = Acceptor(
        Context(boot.node_id, boot.boot, boot.clock, boot.chance, boot.network, boot.disk, node.registers, node.domain)
    )
    reply, batch = acceptor.accept(request)
    await acceptor.durable(batch, key)
    assert reply.verdict == Verdict.ACCEPTED


def test_find_with_whole_groups_tells_no_unfinished_row_of_another_table() -> None:
    """As above, but the two accepts wrote a row of table 2, and it is table 1 that is searched.

    The group is settled as far as that table goes, so no replica has to name it; that is no mark of its ballot.
    """
    told: list[object] = []

    async def story(stage: Stage) -> None:
        key, cluster = stage.keys[0], stage.world.cluster
        await three_replicas(stage)
        stores = Stores(stage, RULES)
        rows = (Change(Op.INSERT, 1, (1,), {1: "one"}), Change(Op.INSERT, 2, (1,), {1: "first"}))
        await stores.propose(0, Part(key, changes=rows))
        await cluster.machines[0].clock.sleep(1.0)
        assert all(stage.world.node(number).registers.header(key).settled for number in (0, 1, 2))
        await accepts_row(stage, 2, key, 10, "low")
        await accepts_row(stage, 0, key, 11, "high")
        await taken_over(stage)
        cluster.partition([3], [1, 2])
        told.extend([await stores.group(number, key) for number in (1, 2)])
        cluster.heal()
        cluster.partition([1], [2, 3])
        told.append(await stores.group(3, key))
        await stores.stop()

    staged(story, 4, DOMAIN_RULES)
    assert told == ["low", "low", "low"]


@BOTH
def test_promise_not_across_epochs_write_acknowledged_in_the_new_one_is_overwritten(on: bool) -> None:
    """0 is cut off with a promise of epoch 2, and 2 goes past it with 1: acknowledged. Epoch 3 is {0, 1, 3}.

    Taken along, the promise would be a ballot of the new epoch, above all that was accepted in the one before.
    """
    rows: list[object] = []

    async def story(stage: Stage) -> None:
        key, cluster = stage.keys[0], stage.world.cluster
        await three_replicas(stage)
        stores = Stores(stage, Rules(promise_not_across_epochs=on))
        await stores.propose(0, insert(key, {1: "first", 2: "first"}))
        cluster.partition([0], [1, 2])
        await stores.propose(2, update(key, {2: "acknowledged"}))
        cluster.heal()
        stage.move(0, 1, 3)
        await stage.tell(0, 1, 2, 3)
        for number in (0, 1, 3):
            assert await stage.initialise(number)
        await stores.propose(0, update(key, {1: "last"}))
        rows.append(await stores.row(1, key))
        await stores.stop()

    staged(story, 4, DOMAIN_RULES)
    assert rows == [{1: "last", 2: "acknowledged" if on else "first"}]


def test_inherited_ballot_that_all_replicas_hold_is_read_without_a_write() -> None:
    """All three took it over, so there is nothing else to be found."""

    async def story(stage: Stage) -> None:
        key = stage.keys[0]
        await three_replicas(stage)
        for number in (0, 1, 2):
            assert await accepts(stage, number, key, 2, 1, "same")
        stage.move(1, 2, 3)
        await stage.tell(0, 1, 2, 3)
        for number in (1, 2, 3):
            assert await stage.initialise(number)
        stores = Stores(stage, RULES)
        assert await stores.read(1, key) == "same"
        await stores.stop()
        assert {stage.world.node(n).registers.header(key).accepted.epoch for n in (1, 2, 3)} == {2}

    staged(story, 4, DOMAIN_RULES)


def test_inherited_ballot_at_which_both_of_two_stand_unmarked_is_marked_by_who_finishes_it() -> None:
    """Else the register would count as unfinished in each sweep, and a tombstone would never be collected."""

    async def story(stage: Stage) -> None:
        key = stage.keys[0]
        await three_replicas(stage)
        for number in (0, 1, 2):
            assert await accepts(stage, number, key, 2, 1, "same")
        stage.move(1, 2)
        await stage.tell(0, 1, 2)
        for number in (1, 2):
            assert await stage.initialise(number)
        files = [stage.world.node(number).registers for number in (1, 2)]
        assert not any(file.header(key).settled for file in files)
        stores = Stores(stage, RULES)
        await stores[1].settle(key)
        await stage.world.cluster.machines[0].clock.sleep(1.0)
        assert all(file.header(key).settled for file in files)
        await stores.stop()

    staged(story, 4, DOMAIN_RULES)


def test_unfinished_register_of_the_epoch_before_is_finished_after_the_take_over() -> None:
    """What repair finishes by itself, so that neither readers nor followers wait for it."""

    async def story(stage: Stage) -> None:
        key = await handed_over(stage)
        repair = stage.world.domain(1).repair
        finished: list[GroupKey] = []

        async def settle(group: GroupKey) -> None:
            finished.append(group)

        repair.settle = settle
        assert stage.tablet in repair._inherited
        await stage.world.cluster.machines[0].clock.sleep(1.0)
        await repair._finish_inherited()
        assert finished == [key]
        assert not repair._inherited

    staged(story, 4, DOMAIN_RULES)


def test_unfinished_register_of_the_epoch_before_is_finished_after_a_restart_right_behind_the_take_over() -> None:
    """The node does not know any more that it has just taken the tablet over."""

    async def story(stage: Stage) -> None:
        key = await handed_over(stage)
        cluster, finished = stage.world.cluster, list[GroupKey]()
        cluster.crash(1)
        await cluster.start(1)

        async def settle(group: GroupKey) -> None:
            finished.append(group)

        stage.world.domain(1).repair.settle = settle
        await cluster.machines[0].clock.sleep(5.0)
        assert finished == [key]
        await stage.world.domain(1).stop()

    staged(story, 4, DOMAIN_RULES)
