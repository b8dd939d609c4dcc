"""Reads of `global` out of a copy: what may be read so, how old it may be, and what this node's clients saw before."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
import pytest

from dht.domain.copy import Copy
from dht.domain.messages import RegisterCopy
from dht.errors import Conflict, DhtError, Indeterminate, Invalid, Unavailable
from dht.model import (
    ZERO,
    Applied,
    Ballot,
    Change,
    Comparison,
    Constraint,
    FindQuery,
    FindResult,
    FoundRow,
    GroupKey,
    GroupRead,
    IndexSpec,
    NodeId,
    Op,
    Order,
    Part,
    Reading,
    Struct,
    TableSpec,
    Transaction,
)
from dht.register import catalog, copies
from dht.register import following as following_module
from dht.register.copies import CopiedRegistry
from dht.register.following import FollowedReads
from dht.register.seen import Seen
from dht.rows import encode_row, encode_value, encode_values, group_key, row_key
from dht.sim import loop as virtual
from dht.sim.clock import SimClock
from dht.storage.memory import MemoryDisk
from dht.storage.registers import Header

FLAVOR, KEYPAIR, USAGE, QUOTA = 1, 2, 3, 4
SPECS = tuple(
    TableSpec(table, (0,), (), read=read, groups=(encode_values((family,)),))
    for table, family, read in (
        (FLAVOR, "flavor", Reading.FOLLOW | Reading.SERVE_STALE),
        (KEYPAIR, "keypair", Reading.SERVE_STALE),
        (USAGE, "usage", 0),
        (QUOTA, "quota", Reading.FOLLOW),
    )
)
FLAVORS = group_key("api", "flavor", ())
KEYPAIRS = group_key("api", "keypair", ("u",))
USAGES = group_key("api", "usage", ("p",))
QUOTAS = group_key("api", "quota", ("p",))
CATALOG = catalog.catalog_group("api")
QUERY = FindQuery("api", FLAVOR, 1, (Constraint(1, Comparison.EQ, ("m1",)),))


def ballot(round: int) -> Ballot:
    return Ballot(1, 1, round, b"p", 1, round)


class Voters:
    """Domain `global`: every group at one ballot, newer than any copy; `cut` when it is out of reach."""

    def __init__(self) -> None:
        self.asked = 0
        self.round = 9
        self.cut = False
        self.refusal: DhtError | None = None

    def _answer(self) -> None:
        self.asked += 1
        if self.cut:
            raise Unavailable("domain global cannot be asked")
        if self.refusal is not None:
            raise self.refusal

    async def read(self, keys: Sequence[GroupKey], *_: object) -> tuple[GroupRead, ...]:
        self._answer()
        return tuple(GroupRead(key, ballot(self.round), {}) for key in keys)

    async def find(self, *_: object) -> FindResult:
        self._answer()
        return FindResult(())

    async def commit(self, transaction: Transaction, *_: object) -> Applied:
        self._answer()
        return Applied(tuple(ballot(self.round) for _ in transaction.parts))


class Following:
    """A copy, covered when the test says so."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.start_again()
        self.clock = SimClock()
        rows = {row_key(0, (0,)): encode_row({0: 1})}
        rows |= {row_key(0, (s.table,)): encode_row({0: msgspec.msgpack.encode(s)}) for s in SPECS}
        self.put(CATALOG, 1, rows)
        for table, key in ((FLAVOR, FLAVORS), (KEYPAIR, KEYPAIRS), (USAGE, USAGES), (QUOTA, QUOTAS)):
            self.put(key, 1, {row_key(table, (1,)): encode_row({0: 1, 1: "m1"})})
        self.cover()

    def start_again(self) -> None:
        """With what the file has."""
        self.copy = Copy(self.disk, 4)
        self.reads = FollowedReads(self.copy, self.disk)

    def put(self, key: GroupKey, round: int, rows: dict[bytes, bytes]) -> None:
        self.copy.install([RegisterCopy(key, Header(ZERO, ballot(round), ballot(round)), rows)])

    def cover(self, lag_s: float = 0.0) -> None:
        for tablet in range(4):
            self.copy.cover(tablet, self.clock.monotonic() - lag_s)


class Link:
    """To followers of this PoP by name."""

    def __init__(self, followers: dict[NodeId, Following]) -> None:
        self.followers = followers
        self.asked: list[tuple[NodeId, Struct]] = []

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        self.asked.append((to, message))
        following = self.followers[to]
        return copies.answer(following.reads, following.clock, message)


class Bed:
    def __init__(self, *, beside: int = 0) -> None:
        """`beside`: this node follows nothing; so many others of its PoP do."""
        self.clock = SimClock()
        self.voters = Voters()
        self.own = Following()
        self.link = Link({bytes([65 + i]) * 20: Following() for i in range(beside)})
        self.store = CopiedRegistry(
            self.clock,
            self.link,  # type: ignore[arg-type]
            lambda: self.voters,  # type: ignore[arg-type,return-value]
            lambda: None if beside else self.own.reads,
            lambda: list(self.link.followers),
        )

    async def round_of(self, *keys: GroupKey) -> int:
        return min(group.ballot.round for group in await self.store.read(keys))

    async def asked_of_voters(self, work: Coroutine[Any, Any, Any]) -> bool:
        before = self.voters.asked
        await work
        return self.voters.asked > before


def play(story: Coroutine[Any, Any, None]) -> None:
    virtual.run(story, time_limit_s=1000.0)


def update(key: GroupKey) -> Transaction:
    return Transaction(b"t" * 16, "api", 1, (Part(key, None, (Change(Op.UPDATE, 1, (1,), {1: "x"}),)),))


def test_followed_table_is_read_from_the_copy_within_the_bound_and_from_the_voters_past_it() -> None:
    async def story() -> None:
        bed = Bed()
        assert await bed.round_of(FLAVORS) == 1
        assert len((await bed.store.find(QUERY)).rows) == 1
        assert bed.voters.asked == 0
        await asyncio.sleep(copies.STALENESS_MAX_S + 0.1)
        assert await bed.round_of(FLAVORS) == 9
        assert await bed.asked_of_voters(bed.store.find(QUERY))

    play(story())


@pytest.mark.parametrize("key", [KEYPAIRS, USAGES, CATALOG, group_key("api", "other", (1,))])
def test_other_tables_and_catalogs_are_read_from_the_voters(key: GroupKey) -> None:
    async def story() -> None:
        bed = Bed()
        assert await bed.round_of(key) == 9
        assert await bed.round_of(FLAVORS, key) == 9

    play(story())


def test_group_written_or_read_here_is_never_older_from_the_copy() -> None:
    async def story() -> None:
        bed = Bed()
        bed.voters.round = 2
        await bed.store.commit(update(FLAVORS))
        assert await bed.round_of(FLAVORS) == 2
        assert await bed.round_of(QUOTAS) == 1, "a group that nobody touched is read from the copy all the same"
        bed.own.put(FLAVORS, 2, {})
        before = bed.voters.asked
        assert await bed.round_of(FLAVORS) == 2
        assert bed.voters.asked == before

    play(story())


def test_find_after_a_commit_waits_until_the_copy_covers_it() -> None:
    async def story() -> None:
        bed = Bed()
        await bed.store.find(QUERY)
        await bed.store.commit(update(FLAVORS))
        assert await bed.asked_of_voters(bed.store.find(QUERY))
        bed.own.put(FLAVORS, 9, {row_key(FLAVOR, (1,)): encode_row({0: 1, 1: "m1"})})
        await asyncio.sleep(0.1)
        bed.own.cover()
        assert not await bed.asked_of_voters(bed.store.find(QUERY))

    play(story())


def test_row_found_in_the_copy_below_a_ballot_seen_here_is_not_told() -> None:
    async def story() -> None:
        bed = Bed()
        bed.voters.round = 5
        await bed.store.commit(update(FLAVORS))
        await asyncio.sleep(0.1)
        bed.own.cover()
        assert await bed.asked_of_voters(bed.store.find(QUERY)), "covered, and yet behind: the node's clients saw more"

    play(story())


def test_conflict_at_a_commit_sends_the_next_read_to_the_voters() -> None:
    async def story() -> None:
        bed = Bed()
        bed.voters.refusal = Conflict("a guard failed")
        with pytest.raises(Conflict):
            await bed.store.commit(update(FLAVORS))
        bed.voters.refusal = None
        assert await bed.round_of(QUOTAS) == 9
        await asyncio.sleep(0.1)
        bed.own.cover()
        assert await bed.round_of(group_key("api", "quota", ("q",))) == 0

    play(story())


def test_voters_out_of_reach_stale_tables_and_the_catalog_are_served_others_are_not() -> None:
    async def story() -> None:
        bed = Bed()
        await asyncio.sleep(60.0)
        bed.voters.cut = True
        assert await bed.round_of(FLAVORS) == 1
        assert await bed.round_of(KEYPAIRS) == 1
        assert await bed.round_of(CATALOG) == 1
        assert len((await bed.store.find(QUERY)).rows) == 1
        assert 59.0 < bed.store.counters["stale_s_most"] < 61.0
        for key in (QUOTAS, USAGES):
            with pytest.raises(Unavailable):
                await bed.store.read([key])

    play(story())


def test_voters_out_of_reach_of_a_node_that_starts_stale_tables_are_served_as_its_file_has_them() -> None:
    async def story() -> None:
        bed = Bed()
        now_s = bed.clock.monotonic()
        bed.own.copy.note(now_s, bed.clock.wall())
        await asyncio.sleep(60.0)
        bed.own.start_again()
        assert await bed.round_of(QUOTAS) == 9, "nothing is known to be within the bound"
        bed.voters.cut = True
        for key in (FLAVORS, KEYPAIRS, CATALOG):
            assert await bed.round_of(key) == 1
        assert len((await bed.store.find(QUERY)).rows) == 1
        assert 59.0 < bed.store.counters["stale_s_most"] < 61.0
        with pytest.raises(Unavailable):
            await bed.store.read([QUOTAS])

    play(story())


@pytest.mark.parametrize("noted", [False, True])
def test_voters_out_of_reach_of_a_node_that_starts_what_was_never_covered_is_not_said_to_be_absent(noted: bool) -> None:
    async def story() -> None:
        bed = Bed()
        bed.voters.cut = True
        bed.own.copy.as_of_s.pop(bed.own.copy.registers.tablet(FLAVORS))
        if noted:
            bed.own.copy.note(bed.clock.monotonic(), bed.clock.wall())
        bed.own.start_again()
        for ask in (bed.store.read([FLAVORS]), bed.store.find(QUERY)):
            with pytest.raises(Unavailable):
                await ask

    play(story())


def test_copy_left_behind_is_covered_by_its_file_up_to_where_an_open_register_was() -> None:
    async def story() -> None:
        bed = Bed()
        copy = bed.own.copy
        await asyncio.sleep(10.0)
        copy.open(FLAVORS, doubtful=True)
        await asyncio.sleep(10.0)
        bed.own.cover()
        wall_s = bed.clock.wall()
        copy.note(bed.clock.monotonic(), wall_s)
        assert (copy.noted_wall_s(FLAVORS), copy.noted_wall_s(KEYPAIRS)) == (wall_s - 20.0, wall_s)
        assert copy.noted_prefix_wall_s(encode_value("api")) == wall_s - 20.0
        assert copy.noted_prefix_wall_s(encode_value("other")) == wall_s

    play(story())


def test_commit_that_does_not_reach_the_voters_takes_no_stale_table_away() -> None:
    async def story() -> None:
        bed = Bed()
        bed.voters.cut = True
        with pytest.raises(Unavailable):
            await bed.store.commit(update(FLAVORS))
        assert await bed.round_of(KEYPAIRS) == 1
        bed.voters.cut, bed.voters.refusal = False, Indeterminate("it may have been applied")
        with pytest.raises(Indeterminate):
            await bed.store.commit(update(FLAVORS))
        bed.voters.cut = True
        with pytest.raises(Unavailable):
            await bed.store.read([KEYPAIRS])

    play(story())


def test_voters_out_of_reach_nothing_older_than_what_was_seen_is_served() -> None:
    async def story() -> None:
        bed = Bed()
        assert await bed.round_of(KEYPAIRS) == 9
        bed.voters.cut = True
        with pytest.raises(Unavailable):
            await bed.store.read([KEYPAIRS])

    play(story())


def test_register_that_the_copy_heard_more_of_is_read_from_the_voters_when_it_is_too_old() -> None:
    async def story() -> None:
        bed = Bed()
        bed.own.copy.open(FLAVORS, doubtful=True)
        assert await bed.round_of(FLAVORS) == 1
        await asyncio.sleep(copies.STALENESS_MAX_S + 0.1)
        bed.own.cover()
        assert await bed.round_of(FLAVORS) == 9
        assert await bed.round_of(QUOTAS) == 1
        assert await bed.asked_of_voters(bed.store.find(QUERY))

    play(story())


def test_node_that_follows_nothing_asks_a_follower_of_its_pop_and_says_what_was_seen() -> None:
    async def story() -> None:
        bed = Bed(beside=2)
        assert await bed.round_of(FLAVORS) == 1
        assert bed.voters.asked == 0
        assert {type(message) for _, message in bed.link.asked} == {copies.AskSpecs, copies.ReadCopy}
        bed.voters.round = 2
        await bed.store.commit(update(FLAVORS))
        assert await bed.round_of(FLAVORS) == 2
        for following in list(bed.link.followers.values())[1:]:
            following.put(FLAVORS, 2, {})
        before = bed.voters.asked
        assert await bed.round_of(FLAVORS) == 2
        assert bed.voters.asked == before, "the second follower has it"

    play(story())


def test_find_at_another_follower_than_before_is_not_older_than_what_that_one_may_have_told() -> None:
    async def story() -> None:
        bed = Bed(beside=2)
        first, second = bed.link.followers
        assert await bed.asked_of_voters(bed.store.find(QUERY)), "nothing is known of who told what before"
        await asyncio.sleep(0.1)
        for following in bed.link.followers.values():
            following.cover()
        assert not await bed.asked_of_voters(bed.store.find(QUERY))
        newer = bed.link.followers[first]
        newer.put(group_key("api", "flavor", ("new",)), 3, {row_key(FLAVOR, (2,)): encode_row({0: 2, 1: "m1"})})
        assert len((await bed.store.find(QUERY)).rows) == 2
        del bed.link.followers[first]
        assert await bed.asked_of_voters(bed.store.find(QUERY))
        await asyncio.sleep(0.1)
        bed.link.followers[second].cover()
        assert not await bed.asked_of_voters(bed.store.find(QUERY))

    play(story())


def test_finds_in_a_row_stay_with_one_follower_until_it_is_covered() -> None:
    async def story() -> None:
        bed = Bed(beside=2)
        asked = 0
        for _ in range(30):
            for following in bed.link.followers.values():
                following.cover(lag_s=0.35)
            asked += await bed.asked_of_voters(bed.store.find(QUERY))
            await asyncio.sleep(0.1)
        assert asked == 4, "from then on the first one is covered beyond the first find"

    play(story())


def test_find_goes_to_another_follower_when_one_is_not_covered_for_longer_than_the_bound() -> None:
    async def story() -> None:
        bed = Bed(beside=2)
        second = list(bed.link.followers.values())[1]
        for _ in range(100):
            await asyncio.sleep(0.1)
            second.cover()
            await bed.store.find(QUERY)
        assert not await bed.asked_of_voters(bed.store.find(QUERY))

    play(story())


def test_database_made_a_moment_ago_is_soon_read_from_a_follower() -> None:
    async def story() -> None:
        bed = Bed(beside=1)
        (following,) = bed.link.followers.values()
        specs, following.reads.specs = following.reads.specs, lambda database: ()  # type: ignore[method-assign]
        assert await bed.asked_of_voters(bed.store.read([QUOTAS]))
        following.reads.specs = specs  # type: ignore[method-assign]
        await asyncio.sleep(copies.NO_SPECS_KEPT_S + 0.1)
        assert await bed.asked_of_voters(bed.store.read([QUOTAS])), "what they told until now was not noted"
        await asyncio.sleep(0.1)
        following.put(QUOTAS, 9, {})
        following.cover()
        assert not await bed.asked_of_voters(bed.store.read([QUOTAS]))

    play(story())


def test_find_of_another_catalog_version_is_asked_of_the_voters() -> None:
    async def story() -> None:
        bed = Bed()
        assert await bed.asked_of_voters(bed.store.find(msgspec.structs.replace(QUERY, catalog_version=2)))

    play(story())


def test_new_index_of_a_copy_is_filled_a_piece_at_each_find_and_used_when_it_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dht.storage.indexes.FILL_ROWS_MAX", 2)

    async def story() -> None:
        following = Following()
        following.put(FLAVORS, 2, {row_key(FLAVOR, (n,)): encode_row({0: n, 1: "m1"}) for n in range(8)})
        indexed = msgspec.structs.replace(SPECS[0], indexes=(IndexSpec(1, (1,)),))
        rows = {row_key(0, (s.table,)): encode_row({0: msgspec.msgpack.encode(s)}) for s in (indexed, *SPECS[1:])}
        following.put(CATALOG, 2, {row_key(0, (0,)): encode_row({0: 2}), **rows})
        following.cover()
        answers = [following.reads.find(msgspec.structs.replace(QUERY, catalog_version=2))[0] for _ in range(8)]
        assert answers[:3] == [None] * 3, "all at once"
        assert answers[-1] is not None
        assert len(answers[-1].rows) == 8

    play(story())


def test_finds_that_the_voters_answered_do_not_keep_the_next_ones_from_the_copy() -> None:
    async def story() -> None:
        bed = Bed()
        await asyncio.sleep(copies.STALENESS_MAX_S + 0.1)
        assert await bed.asked_of_voters(bed.store.find(QUERY))
        bed.own.cover()
        await asyncio.sleep(1.0)
        assert await bed.asked_of_voters(bed.store.find(QUERY)) is False

    play(story())


def test_find_in_the_copy_gives_no_more_rows_than_one_answer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "FIND_ROWS_MAX", 3)

    async def story() -> None:
        following = Following()
        following.put(FLAVORS, 2, {row_key(FLAVOR, (n,)): encode_row({0: n, 1: "m1"}) for n in range(5)})
        for limit, rows in ((2, 2), (4, None), (1_000_000, None)):
            result, _ = following.reads.find(msgspec.structs.replace(QUERY, order=Order((0,)), limit=limit))
            assert (None if result is None else len(result.rows)) == rows

    play(story())


def test_find_that_is_not_well_formed_is_invalid_in_the_copy_as_at_the_voters() -> None:
    async def story() -> None:
        following = Following()
        for wrong in (Constraint(1, Comparison.LT), Constraint(1, Comparison.NE, ("a", "b"))):
            with pytest.raises(Invalid, match="takes 1 values"):
                following.reads.find(msgspec.structs.replace(QUERY, constraints=(wrong,)))

    play(story())


def test_seen_what_was_forgotten_of_a_group_counts_for_its_database() -> None:
    seen = Seen(groups_max=1)
    seen.note(FLAVORS, ballot(2), 5.0)
    seen.note(FLAVORS, ballot(1), 6.0)
    assert (seen.ballot(FLAVORS), seen.beyond_s(encode_value("api"))) == (ballot(2), float("-inf"))
    seen.note(group_key("other", "f", ()), ballot(1), 7.0)
    assert (seen.ballot(FLAVORS), seen.beyond_s(encode_value("api"))) == (ZERO, 7.0)
    assert seen.beyond_s(encode_value("other")) == float("-inf")


def test_seen_databases_that_were_forgotten_count_for_all() -> None:
    seen = Seen(databases_max=1)
    seen.note_database(b"a", 5.0)
    seen.note_database(b"b", 4.0)
    assert (seen.beyond_s(b"a"), seen.beyond_s(b"b"), seen.beyond_s(b"c")) == (5.0, 5.0, 5.0)


def test_row_found_in_the_copy_is_not_read_older_from_another_follower() -> None:
    async def story() -> None:
        bed = Bed(beside=2)
        first = next(iter(bed.link.followers))
        await bed.store.find(QUERY)
        await asyncio.sleep(0.1)
        for following in bed.link.followers.values():
            following.cover()
        bed.link.followers[first].put(FLAVORS, 3, {row_key(FLAVOR, (1,)): encode_row({0: 1, 1: "m1"})})
        before = bed.voters.asked
        (found,) = (await bed.store.find(QUERY)).rows
        assert (found.ballot.round, bed.voters.asked) == (3, before)
        del bed.link.followers[first]
        assert await bed.round_of(FLAVORS) >= 3

    play(story())


def test_what_the_voters_told_before_it_was_known_to_be_followed_is_not_read_older_from_a_copy() -> None:
    async def story() -> None:
        bed = Bed(beside=1)
        (following,) = bed.link.followers.values()
        specs, following.reads.specs = following.reads.specs, lambda database: ()  # type: ignore[method-assign]
        await bed.store.read([KEYPAIRS])
        await asyncio.sleep(copies.NO_SPECS_KEPT_S - 0.1)
        assert await bed.round_of(QUOTAS) == 9
        following.reads.specs = specs  # type: ignore[method-assign]
        following.cover(lag_s=0.2)
        await asyncio.sleep(0.2)
        assert await bed.round_of(QUOTAS) == 9

    play(story())


def test_rows_of_a_long_find_at_the_voters_are_not_read_older_from_the_copy() -> None:
    async def story() -> None:
        bed = Bed()
        rows = tuple(
            FoundRow(FLAVORS if n == copies.FOUND_NOTED_MAX else group_key("api", "flavor", (n,)), ballot(9), b"", b"")
            for n in range(copies.FOUND_NOTED_MAX + 1)
        )

        async def find(*_: object) -> FindResult:
            bed.voters.asked += 1
            return FindResult(rows)

        bed.voters.find = find  # type: ignore[method-assign]
        await asyncio.sleep(copies.STALENESS_MAX_S + 0.1)
        assert await bed.asked_of_voters(bed.store.find(QUERY))
        bed.own.cover(lag_s=1.0)
        assert await bed.round_of(FLAVORS) == 9

    play(story())
