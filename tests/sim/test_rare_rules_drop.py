"""Rules of a drop: hand-made schedules in which a dropper pauses, while others finish the drop and make the name anew.

With the rule nothing of the new database is lost; without it its first row is, which was acknowledged.
"""

from __future__ import annotations

import asyncio

import pytest

from dht.domain.roster import TabletReplicas
from dht.errors import DhtError, Indeterminate, NotServing, SchemaChanged, Unavailable
from dht.model import ZERO, Change, GroupKey, NodeId, Op, Part, Struct, Value
from dht.register import catalog
from dht.register.group import APPLIED, REFUSED
from dht.register.messages import Accept, Coordinate, Kind, ListGroups, Operation, Prepare, ReadReplica
from dht.register.rules import Rules
from dht.sim.clock import SimClock
from tests.dht.register.register_cluster import StaticDomain
from tests.sim.bench import TABLETS, Bench, Gate, failed, insert, play, update

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
OLD: dict[int, Value] = {0: "old"}
NEW: dict[int, Value] = {0: "new"}


class Pause:
    """Holds messages of one node until it is told to go on. `kind`: of operations that are passed on, of one group."""

    def __init__(self, sender: int, kind: Kind | None = None, key: GroupKey = b"") -> None:
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self._sender = sender
        self._kind = kind
        self._key = key

    def _held(self, message: Struct) -> bool:
        if self._kind is None:
            return isinstance(message, ListGroups)
        if not isinstance(message, Coordinate):
            return False
        return message.operation.kind == self._kind and message.operation.part.key == self._key

    @property
    def gate(self) -> Gate:
        async def hold(sender: int, to: int, message: Struct) -> bool:
            if sender == self._sender and self._held(message):
                self.begun.set()
                await self.over.wait()
            return True

        return hold


async def dropped_meanwhile(bench: Bench, pause: Pause, key: GroupKey, dropper: int, other: int) -> object:
    """The dropper pauses; the other one finishes the drop, creates the database again and commits a row: that row, as
    it is when the dropper has ended.
    """
    bench.gate = pause.gate
    work = asyncio.create_task(bench[dropper].drop_database("db", 60.0))
    return await made_anew(bench, pause, key, work, other)


async def made_anew(bench: Bench, pause: Pause, key: GroupKey, work: asyncio.Task[bool], other: int) -> object:
    """What `dropped_meanwhile` says, from where the dropper, whose `work` it is, pauses."""
    await pause.begun.wait()
    assert await bench[other].drop_database("db")
    assert await bench[other].create_database("db")
    await bench[other].commit(bench.transaction(insert(key, NEW)))
    pause.over.set()
    assert await work
    assert await bench[other].list_databases() == ("db",)
    return await bench.row(other, key)


@BOTH
def test_empty_bound_order_to_empty_comes_when_the_name_has_a_new_database(on: bool) -> None:
    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(1)
        await bench[0].commit(bench.transaction(insert(key, OLD)))
        return await dropped_meanwhile(bench, Pause(0, Kind.EMPTY, key), key, 0, 2)

    assert play(story, Rules(empty_bound=on)) == (NEW if on else None)


class Moving(StaticDomain):
    """Of four nodes. One tablet moves from 0, 1 and 2 to 1, 2 and 3, which a node `knows` of when it has refreshed."""

    def __init__(self, me: NodeId, ids: list[NodeId], moved: int) -> None:
        super().__init__(me, ids, 3, TABLETS)
        self.knows = False
        self._ids = tuple(ids)
        self._moved = moved

    def replicas(self, tablet: int) -> TabletReplicas:
        if tablet != self._moved:
            return super().replicas(tablet)
        return TabletReplicas(2, self._ids[1:]) if self.knows else TabletReplicas(1, self._ids[:3])

    def admit(self, tablet: int, epoch: int, accept: bool = False) -> None:
        replicas = self.replicas(tablet)
        if epoch != replicas.epoch or self.me not in replicas.nodes:
            raise NotServing("not here", roster_epoch=2)

    async def refresh(self, at_least: int | None = None) -> None:
        self.knows = True


@BOTH
def test_listed_at_one_epoch_group_that_a_tablet_has_at_its_new_epoch_is_left_to_the_next_database(on: bool) -> None:
    """The group was made at 1 and 3 when its tablet had moved to 1, 2 and 3; 2 missed it. 0 knows nothing of the move.

    It drops the database and does not hear 1: 0 lists what the tablet had before, and 2 what it has now.
    """

    async def story(bench: Bench) -> object:
        tablet_of = bench.files[0].tablet
        others = map(tablet_of, (catalog.REGISTRY_GROUP, catalog.catalog_group("db")))
        moved = min({*range(0, TABLETS, 4)} - {*others})
        key = next(key for n in range(100) if tablet_of(key := bench.key(0, n)) == moved)
        domains = [Moving(node, bench.ids, moved) for node in bench.ids]
        for number, domain in enumerate(domains):
            bench[number]._context.domain = domain
        await bench.define()
        for number in (1, 2, 3):
            domains[number].knows = True

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate):
                return to != 2 or message.operation.part.key != key
            if isinstance(message, (Accept, Prepare)):
                return to != 2 or message.key != key
            return not (isinstance(message, ListGroups) and (sender, to) == (0, 1))

        bench.gate = gate
        await bench[3].commit(bench.transaction(insert(key, OLD)))
        assert await bench[0].drop_database("db", 60.0)
        assert await bench[3].create_database("db")
        return await bench.row(3, key)

    assert play(story, Rules(listed_at_one_epoch=on), 4) == (None if on else OLD)


@BOTH
def test_drop_looks_again_groups_of_the_new_database_are_listed_by_the_dropper_of_the_old_one(on: bool) -> None:
    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(1)
        await bench[0].commit(bench.transaction(insert(key, OLD)))
        return await dropped_meanwhile(bench, Pause(0), key, 0, 2)

    assert play(story, Rules(drop_looks_again=on)) == (NEW if on else None)


def test_name_of_the_new_database_stays_when_the_dropper_of_the_old_one_would_free_it() -> None:
    async def story(bench: Bench) -> object:
        await bench.define()
        first = bench.files[0].tablet(catalog.REGISTRY_GROUP) % 3
        dropper, other = (first + 1) % 3, (first + 2) % 3
        key = bench.key(1)
        await bench[dropper].commit(bench.transaction(insert(key, OLD)))
        # Its second change of the registry, after the one that says that the database is being dropped.
        pause = Pause(dropper, Kind.COMMIT, catalog.REGISTRY_GROUP)
        before = Pause(dropper)
        bench.gate = before.gate
        work = asyncio.create_task(bench[dropper].drop_database("db", 60.0))
        await before.begun.wait()
        bench.gate = pause.gate
        before.over.set()
        return await made_anew(bench, pause, key, work, other)

    assert play(story, Rules()) == NEW


def test_write_of_a_node_that_does_not_know_of_the_drop_yet_is_emptied_by_the_next_pass() -> None:
    """It comes after the listing: to a group whose order is on its way, and to one that was not there."""

    async def story(bench: Bench) -> object:
        await bench.define()
        listed, fresh = bench.key(1), bench.key(1, 1)
        await bench[2].commit(bench.transaction(insert(listed, OLD)))
        pause = Pause(0, Kind.EMPTY, listed)
        bench.gate = pause.gate
        work = asyncio.create_task(bench[0].drop_database("db", 60.0))
        await pause.begun.wait()
        await bench[2].commit(bench.transaction(update(listed, {1: "late"})))
        await bench[2].commit(bench.transaction(insert(fresh, OLD)))
        pause.over.set()
        assert await work
        assert await bench[1].create_database("db")
        return await bench.row(0, listed), await bench.row(0, fresh)

    assert play(story, Rules()) == (None, None)


@BOTH
def test_empty_bound_order_behind_a_write_of_the_same_batch_leaves_it(on: bool) -> None:
    """The group's ballot is still the listed one, though what the order is applied to has the write in it."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(1)
        await bench[0].commit(bench.transaction(insert(key, OLD)))
        (read,) = await bench[1].read([key])
        order = Operation(Kind.EMPTY, b"e" * 16, Part(key, read.ballot))
        write = Operation(Kind.COMMIT, b"w" * 16, update(key, NEW))
        until = SimClock().monotonic() + 5.0
        _, answer = await asyncio.gather(
            bench[1]._coordinator.run(write, 0, True, until), bench[1]._coordinator.run(order, 0, True, until)
        )
        return answer.outcome, await bench.row(0, key)

    assert play(story, Rules(empty_bound=on)) == ((REFUSED, NEW) if on else (APPLIED, None))


@BOTH
def test_empty_bound_write_behind_an_order_in_one_batch_stands_above_what_the_order_says_is_empty(on: bool) -> None:
    """A node that has not heard of the drop writes when the order waits for the group already."""

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(1)
        order = Operation(Kind.EMPTY, b"e" * 16, Part(key, ZERO))
        write = Operation(Kind.COMMIT, b"w" * 16, insert(key, NEW))
        until = SimClock().monotonic() + 5.0
        emptied, written = await asyncio.gather(
            bench[1]._coordinator.run(order, 0, True, until), bench[1]._coordinator.run(write, 0, True, until)
        )
        outcomes = emptied.outcome, written.outcome
        return outcomes, emptied.ballot < bench.files[1].header(key).accepted, await bench.row(0, key)

    assert play(story, Rules(empty_bound=on)) == ((APPLIED, APPLIED), on, NEW)


@BOTH
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "when the write is carried on"])
def test_empty_bound_order_leaves_a_write_that_is_below_an_unchosen_ballot_of_the_listing(
    on: bool, together: bool
) -> None:
    """1 prepared with 2 and has accepted b alone, which is listed; then the name has a new database.

    A client of that writes through 0, whose promise is older than b: 0 alone accepts it, prepares anew with 2, finds it
    and carries it on. Where the order comes in between, the state with the write in it still stands below b.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(0)
        await bench[0].commit(bench.transaction(insert(key, OLD)))
        sent, go_on = asyncio.Event(), asyncio.Event()

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Accept) and sender == 0:
                sent.set()
                await go_on.wait()
            if isinstance(message, Prepare):
                return {sender, to} != {0, 1}
            return not (isinstance(message, Accept) and sender == 1)

        bench.gate = gate
        await failed(bench.propose(1, update(key, {1: "lost"}), 0.2))
        listed = bench.files[1].header(key).accepted
        assert listed > bench.files[0].header(key).accepted
        until = SimClock().monotonic() + 5.0
        write = Operation(Kind.COMMIT, b"w" * 16, update(key, NEW))
        written = asyncio.create_task(bench[0]._coordinator.run(write, 0, True, until))
        if not together:
            await sent.wait()
        order = Operation(Kind.EMPTY, b"e" * 16, Part(key, listed))
        emptied = asyncio.create_task(bench[0]._coordinator.run(order, 0, True, until))
        go_on.set()
        await written
        return (await emptied).outcome, await bench.row(0, key)

    assert play(story, Rules(empty_bound=on)) == ((REFUSED, NEW) if on else (APPLIED, None))


@BOTH
@pytest.mark.parametrize("deleted", [False, True], ids=["never written", "deleted"])
def test_drop_accepts_anew_write_that_only_a_replica_that_is_away_has_comes_to_light_in_the_next_database(
    on: bool, deleted: bool
) -> None:
    """2 alone accepts a row, which its client is told is unknown, of a group that is absent, and is away.

    The others know that they promised it something. They drop the database and make it again. Then 2 is back and 0 is
    away, so that 1 has to go on from what 2 has.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(2)
        if deleted:
            await bench.propose(2, insert(key, OLD))
            await bench.propose(2, Part(key, changes=(Change(Op.DELETE, 1, (1,), {}),)))
            await asyncio.sleep(1.0)
            assert all(file.header(key).settled and file.header(key).deleted for file in bench.files.values())

        async def lonely(sender: int, to: int, message: Struct) -> bool:
            return not (sender == 2 and to != 2 and isinstance(message, Accept))

        bench.gate = lonely
        told = await failed(bench.propose(2, insert(key, {0: "late"}), 0.2))
        bench.gate = away(2)
        await asyncio.sleep(5.0)
        assert await bench[0].drop_database("db", 60.0)
        assert await bench[0].create_database("db")
        assert await bench.row(1, key) is None
        bench.gate = away(0)
        return type(told), await bench.row(1, key)

    assert play(story, Rules(drop_accepts_anew=on)) == (Indeterminate, None if on else {0: "late"})


@BOTH
def test_drop_confirms_version_write_behind_the_last_listing_is_left_to_the_next_database(on: bool) -> None:
    """Each listing of 0 waits for 1, which does not hear it, when 0 and 2 have told what they have.

    2 read the registry before the drop, and takes a write for a client of its own while the last one waits.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        listed, fresh = bench.key(1), bench.key(1, 1)
        await bench[2].commit(bench.transaction(insert(listed, OLD), version=1))

        async def gate(sender: int, to: int, message: Struct) -> bool:
            return not (isinstance(message, ListGroups) and (sender, to) == (0, 1))

        bench.gate = gate
        work = asyncio.create_task(bench[0].drop_database("db", 60.0))
        await asyncio.sleep(1.5)
        told = await failed(bench[2].commit(bench.transaction(insert(fresh, OLD), version=1)))
        assert await work
        assert await bench[1].create_database("db")
        return None if told is None else type(told), await bench.row(0, fresh)

    assert play(story, Rules(drop_confirms_version=on)) == ((SchemaChanged, None) if on else (None, OLD))


@BOTH
def test_drop_sees_promises_write_promised_before_the_last_listing_is_accepted_behind_it(on: bool) -> None:
    """2 has not heard of the drop, and 0 does not hear it. It is promised a write by 0 and 1 when their group is empty
    already and the dropped catalog not known to them yet; its accepts come when the drop has ended.
    """

    async def story(bench: Bench) -> object:
        await bench.define()
        key = bench.key(2)
        await bench[2].commit(bench.transaction(insert(key, OLD), version=1))
        emptied, sent, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
        writing: list[asyncio.Task[DhtError | None]] = []

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, ListGroups) and to == 2:
                raise Unavailable("no link", sent=False)
            if isinstance(message, Coordinate) and message.operation.kind == Kind.EMPTY:
                emptied.set()
            elif isinstance(message, ReadReplica) and sender == 0 and emptied.is_set() and not writing:
                # The dropper reads the catalog's version, with which it lists again.
                late = bench[2].commit(bench.transaction(insert(key, {0: "late"}), version=1))
                writing.append(asyncio.create_task(failed(late)))
                await sent.wait()
            elif isinstance(message, Accept) and sender == 2 and message.key == key and writing:
                sent.set()
                await go_on.wait()
            return True

        bench.gate = gate
        assert await bench[0].drop_database("db", 60.0)
        assert await bench[1].create_database("db")
        go_on.set()
        told = await writing[0]
        return told is None, await bench.row(0, key)

    assert play(story, Rules(drop_sees_promises=on)) == ((False, None) if on else (True, {0: "late"}))


def away(number: int) -> Gate:
    """Nothing goes to the node or comes from it."""

    async def gate(sender: int, to: int, message: Struct) -> bool:
        return number not in (sender, to)

    return gate
