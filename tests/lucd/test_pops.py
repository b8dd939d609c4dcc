"""Which nodes of another PoP are asked, and how often it is looked for them."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from dht import requests
from dht.domain.roster import Member
from dht.errors import Invalid, NotServing, Unavailable
from dht.model import GLOBAL, PopClaim, Struct
from dht.overlay.messages import Contact
from dht.register.catalog import recovering
from dht.register.homes import FarStore
from dht.storage.memory import MemoryDisk
from lucd import pops as pops_module
from lucd.daemon import Daemon
from lucd.lists import Lists
from lucd.pops import Pops


def contact(number: int, pop: str = "lyon") -> Contact:
    return Contact(bytes([number]) * 20, "127.0.0.1", 1000 + number, pop)


class World:
    """A clock, links and an overlay. `alive`: who is heard; `there`: who answers a look-up."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.heard: set[bytes] = set()
        self.cut: set[bytes] = set()
        self.there: list[Contact] = []
        self.addresses: dict[bytes, int] = {}
        self.crawls = 0
        self.members: list[Member] = []
        self.needs: set[bytes] = set()
        self.claims: dict[str, PopClaim] = {}
        self.away = False
        self.keeps = False
        self.relisted = 0
        self.listed = 0
        self.left: tuple[str, ...] = ()
        self.slept_s: list[float] = []
        self.serving: set[bytes] = set()
        self.asked: list[bytes] = []
        self.mates: dict[bytes, Pops] = {}
        self.turn = asyncio.Event()
        self.slow: asyncio.Event | None = None

    def peers(self) -> list[Any]:
        return []

    def pops_on(self, disk: MemoryDisk) -> Pops:
        stand_in: Any = self
        return Pops(
            "nice",
            stand_in,
            random.Random(1),
            disk,
            stand_in,
            stand_in,
            lambda: stand_in,
            lambda: self.members,
            lambda node: node in self.needs,
        )

    def lists_on(self, disk: MemoryDisk, pops: Pops | None = None) -> Lists:
        stand_in: Any = self
        return Lists(
            stand_in,
            lambda: stand_in,
            pops or self.pops_on(disk),
            b"n" * 20,
            b"i" * 16,
            stand_in,
            random.Random(1),
            lambda: True,
            lambda: self.keeps,
            lambda: list(self.mates),
        )

    async def pops(self, timeout_s: float | None = None) -> dict[str, PopClaim]:
        if self.away:
            raise Unavailable("cut off")
        return self.claims

    async def claim_pop(
        self, pop: str, node: bytes, incarnation: bytes, timeout_s: float | None = None, index: int | None = None
    ) -> PopClaim:
        if index in {claim.index for name, claim in self.claims.items() if name != pop}:
            raise Invalid(f"index {index} was given to another")
        return self.claims.setdefault(pop, PopClaim(node, incarnation, index or 0))

    async def relist(self, timeout_s: float | None = None) -> tuple[str, ...]:
        self.relisted += 1
        return ()

    async def left_behind(self, timeout_s: float | None = None) -> tuple[str, ...]:
        return self.left

    async def homes(self, timeout_s: float | None = None) -> dict[str, str]:
        self.listed += 1
        return {}

    async def sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        await self.turn.wait()
        self.turn.clear()

    async def turns(self, count: int) -> None:
        """Let whoever sleeps go on, so many times."""
        for _ in range(count):
            await asyncio.sleep(0)
            self.turn.set()
            for _ in range(5):
                await asyncio.sleep(0)

    async def call(self, node: bytes, message: Struct, timeout_s: float) -> Struct:
        self.asked.append(node)
        if isinstance(message, requests.ListPops):
            daemon: Any = SimpleNamespace(pops=self.mates[node])
            return await Daemon._answer_other(daemon, b"n" * 20, message)
        if node not in self.serving:
            raise NotServing("this node is no member of domain lyon; ask one that is")
        return requests.ListDatabasesReply(("cell",))

    def monotonic(self) -> float:
        return self.now_s

    def alive(self, node: bytes) -> bool:
        return node in self.heard

    def parted(self, node: bytes) -> bool:
        return node in self.cut

    def set_address(self, node: bytes, host: str, port: int) -> None:
        self.addresses[node] = port

    def forget(self, node: bytes) -> None:
        del self.addresses[node]

    def contacts(self) -> list[Contact]:
        return []

    async def nodes_of_pop(self, pop: str) -> list[Contact]:
        self.crawls += 1
        await (asyncio.sleep(0.01) if self.slow is None else self.slow.wait())
        return [one for one in self.there if one.pop == pop]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def pops(world: World) -> Pops:
    return world.pops_on(MemoryDisk())


async def test_many_requests_at_once_look_once(world: World, pops: Pops) -> None:
    world.there = [contact(1)]
    found = await asyncio.gather(*(pops.gateways("lyon") for _ in range(20)))
    assert found == [[contact(1).id]] * 20
    assert world.crawls == 1


async def test_pop_of_which_nobody_is_heard_is_looked_for_again_but_not_at_each_request(
    world: World, pops: Pops
) -> None:
    for _ in range(5):
        assert await pops.gateways("lyon") == []
    assert world.crawls == 1
    world.there = [contact(1)]
    world.now_s += pops_module.LOOK_SOON_S + 0.1
    assert await pops.gateways("lyon") == [contact(1).id]


async def test_who_is_heard_comes_first_and_who_is_cut_off_is_left_out(world: World, pops: Pops) -> None:
    world.there = [contact(1), contact(2), contact(3), contact(4)]
    await pops.gateways("lyon")
    assert sorted(world.addresses.values()) == [1001, 1002, 1003]
    world.heard, world.cut = {contact(2).id}, {contact(3).id}
    assert await pops.gateways("lyon") == [contact(2).id, contact(1).id]


async def test_gateways_that_are_gone_make_room_for_others(world: World, pops: Pops) -> None:
    world.there = [contact(1), contact(2), contact(3)]
    await pops.gateways("lyon")
    world.there = [contact(4), contact(5)]
    world.now_s += pops_module.LOOK_SOON_S + 0.1
    assert await pops.gateways("lyon") == [contact(4).id, contact(5).id, contact(1).id]
    assert sorted(world.addresses.values()) == [1001, 1004, 1005]


async def test_gateway_that_is_heard_again_is_asked_while_the_overlay_is_still_looked_through(
    world: World, pops: Pops
) -> None:
    """Whom the look-up asks may be cut off, too: it takes seconds to end."""
    world.there = [contact(1)]
    await pops.gateways("lyon")
    world.now_s += pops_module.LOOK_SOON_S + 0.1
    world.slow = asyncio.Event()
    asked = asyncio.ensure_future(pops.gateways("lyon"))
    await asyncio.sleep(0.01)
    assert not asked.done()
    world.heard = {contact(1).id}
    async with asyncio.timeout(10.0):
        assert await asked == [contact(1).id]
    world.slow.set()


def member(number: int, pop: str) -> Member:
    return Member(bytes([number]) * 20, b"i" * 16, pop, "host", f"127.0.0.1:{1000 + number}")


async def test_members_of_global_in_the_own_pop_are_asked_first_and_others_not_at_all(world: World, pops: Pops) -> None:
    world.members = [member(1, "lyon"), member(2, "nice"), member(3, "nice")]
    world.heard = {member(1, "lyon").node_id, member(3, "nice").node_id}
    assert await pops.gateways(GLOBAL) == [member(3, "nice").node_id, member(2, "nice").node_id]


async def test_gateway_that_serves_its_pop_no_more_keeps_its_link_as_that_of_global(world: World, pops: Pops) -> None:
    """A recovery of its PoP's domain left it out; requests to `global` are under way on the link."""
    world.members = [member(1, "lyon")]
    assert await pops.gateways(GLOBAL) == [contact(1).id]
    world.there = [contact(1)]
    world.heard = {contact(1).id}
    assert await pops.gateways("lyon") == [contact(1).id]
    pops.refused("lyon", contact(1).id)
    world.there = [contact(2), contact(3), contact(4)]
    world.now_s += pops_module.LOOK_SOON_S + 0.1
    assert contact(1).id not in await pops.gateways("lyon")
    assert contact(1).id in world.addresses


async def test_global_is_none_of_the_other_pops(world: World, pops: Pops) -> None:
    world.members = [member(1, "lyon")]
    world.there = [contact(1)]
    await pops.gateways(GLOBAL)
    await pops.gateways("lyon")
    assert pops.others() == {"lyon"}


async def test_few_members_of_global_elsewhere_are_asked_where_the_own_pop_has_none(world: World, pops: Pops) -> None:
    world.members = [member(n, f"pop{n}") for n in range(1, 20)]
    first = await pops.gateways(GLOBAL)
    assert len(first) == pops_module.GATEWAYS_MAX == len(world.addresses)
    world.heard = {first[0]}
    assert await pops.gateways(GLOBAL) == first
    world.heard, world.cut = set(), set(first)
    second = await pops.gateways(GLOBAL)
    assert len(second) == pops_module.GATEWAYS_MAX
    assert not set(first).intersection(second)


async def test_few_members_of_global_are_dialled_at_a_time_however_long_none_is_heard(world: World, pops: Pops) -> None:
    """A PoP whose own members are away is cut off, and asks again and again."""
    world.members = [member(n, f"pop{n}") for n in range(1, 100)]
    tried = set()
    for _ in range(600):
        tried |= set(await pops.gateways(GLOBAL))
        assert len(world.addresses) <= pops_module.GATEWAYS_MAX
        world.now_s += 0.1
    assert len(tried) > 50, "whoever is back first may be any of them"


async def test_gateways_that_serve_nothing_any_more_stand_back_for_nodes_that_do(world: World, pops: Pops) -> None:
    """A PoP that was cut off was recovered elsewhere meanwhile: its nodes are heard, and have stopped."""
    stopped = [contact(1), contact(2), contact(3)]
    world.there, world.heard = stopped, {one.id for one in stopped}
    with pytest.raises(Unavailable, match="PoP lyon cannot be asked: this node is no member"):
        await pops.store("lyon").list_databases()
    world.there, world.serving = [*stopped, contact(4)], {contact(4).id}
    world.now_s += pops_module.LOOK_SOON_S + 0.1
    assert await pops.store("lyon").list_databases() == ("cell",)
    world.heard.add(contact(4).id)
    world.asked.clear()
    assert await pops.store("lyon").list_databases() == ("cell",)
    assert world.asked == [contact(4).id]
    assert contact(1).id in await pops.gateways("lyon")
    world.serving.add(contact(1).id)
    world.heard.remove(contact(4).id)
    assert await pops.store("lyon").list_databases() == ("cell",), "they are asked where nobody else is heard"


async def test_members_of_global_in_the_own_pop_that_serve_it_no_more_send_nobody_away(
    world: World, pops: Pops
) -> None:
    """The other PoPs went on without this one, which was cut off; this node has not heard of that yet."""
    near, far = member(2, "nice").node_id, member(1, "lyon").node_id
    world.members = [member(1, "lyon"), member(2, "nice")]
    world.heard, world.serving = {near, far}, {far}
    store = FarStore(GLOBAL, pops._clock, pops._network, pops.gateways, pops.refused)
    with pytest.raises(Unavailable):
        await store.list_databases()
    assert await store.list_databases() == ("cell",)


async def test_gateway_that_another_part_needs_keeps_its_link(world: World, pops: Pops) -> None:
    world.there = [contact(1), contact(2), contact(3)]
    await pops.gateways("lyon")
    world.needs = {contact(3).id}
    world.there = [contact(4), contact(5), contact(6)]
    world.now_s += pops_module.LOOK_SOON_S + 0.1
    await pops.gateways("lyon")
    assert sorted(world.addresses.values()) == [1003, 1004, 1005, 1006]


async def test_index_is_learned_once_and_kept_in_the_file(world: World) -> None:
    disk = MemoryDisk()
    with pytest.raises(Unavailable, match="index of PoP nice is not known"):
        world.pops_on(disk).index()
    world.claims = {"lyon": PopClaim(b"n" * 20, b"i" * 16, 0), "nice": PopClaim(b"m" * 20, b"i" * 16, 7)}
    await world.lists_on(disk).compare_index()
    assert world.pops_on(disk).index() == 7
    assert world.claims["nice"].node == b"m" * 20


async def test_node_that_joins_a_pop_which_is_cut_off_learns_the_index_from_another_node_of_it(world: World) -> None:
    new, doubting, old = (world.pops_on(MemoryDisk()) for _ in range(3))
    doubting.note_index(9)
    doubting.doubt_index("another PoP has it")
    world.mates = {b"n" * 20: world.pops_on(MemoryDisk()), b"d" * 20: doubting}
    world.away = True
    lists = world.lists_on(MemoryDisk(), new)
    with pytest.raises(Unavailable):
        await lists.compare_index()
    with pytest.raises(Unavailable, match="not known here yet"):
        new.index()
    old.note_index(7)
    world.mates[b"o" * 20] = old
    with pytest.raises(Unavailable):
        await lists.compare_index()
    assert new.index() == 7
    world.asked.clear()
    with pytest.raises(Unavailable):
        await lists.compare_index()
    assert world.asked == []
    world.away, world.claims = False, {"nice": PopClaim(b"m" * 20, b"i" * 16, 8)}
    assert "it has index 7, but is listed with 8" in await lists.compare_index()


async def test_node_that_reaches_the_list_asks_no_other_for_the_index(world: World) -> None:
    """That one may not have heard yet that another PoP was given it."""
    old, new = world.pops_on(MemoryDisk()), world.pops_on(MemoryDisk())
    old.note_index(7)
    world.mates = {b"o" * 20: old}
    world.claims = {"nice": PopClaim(b"m" * 20, b"i" * 16, 8)}
    assert await world.lists_on(MemoryDisk(), new).compare_index() == ""
    assert (new.index(), world.asked) == (8, [])


async def test_pop_that_is_missing_in_the_list_is_entered_with_the_index_that_it_had(world: World) -> None:
    disk = MemoryDisk()
    world.pops_on(disk).note_index(7)
    await world.lists_on(disk).compare_index()
    assert world.claims == {"nice": PopClaim(b"n" * 20, b"i" * 16, 7)}


async def test_lists_are_compared_until_it_is_done_and_then_by_those_only_that_keep_them(world: World) -> None:
    world.away = True
    task = asyncio.ensure_future(world.lists_on(MemoryDisk()).run())
    await world.turns(3)
    assert (world.relisted, world.slept_s[-1] < 2.0) == (0, True)
    world.away = False
    await world.turns(3)
    assert (world.relisted, world.slept_s[-1] > 400.0) == (1, True)
    assert world.listed > 0, "the others read the list, for the time when it is out of reach"
    world.keeps = True
    await world.turns(1)
    assert world.relisted > 1
    task.cancel()


async def test_shards_that_a_drop_left_behind_are_told_until_a_human_has_dropped_them(world: World) -> None:
    lists = world.lists_on(MemoryDisk())
    world.left = ("old",)
    task = asyncio.ensure_future(lists.run())
    await world.turns(3)
    (text,) = lists.warnings()
    assert "has rows of database old, which" in text
    assert "`lucd database drop old --yes`" in text
    assert 10.0 < world.slept_s[-1] < 100.0
    world.left = ()
    await world.turns(2)
    assert lists.warnings() == []
    task.cancel()


@pytest.mark.parametrize("listed", [{}, {"nice": PopClaim(b"m" * 20, b"i" * 16, 8)}])
async def test_no_ids_are_given_out_while_the_index_may_be_another_pops(
    world: World, listed: dict[str, PopClaim], caplog: pytest.LogCaptureFixture
) -> None:
    pops = world.pops_on(disk := MemoryDisk())
    pops.note_index(7)
    lists = world.lists_on(disk, pops)
    task = asyncio.ensure_future(lists.run())
    await world.turns(1)
    assert (pops.index(), lists.warnings()) == (7, [])
    world.claims = {"lyon": PopClaim(b"x" * 20, b"i" * 16, 7), **listed}
    await world.turns(3)
    with pytest.raises(Unavailable, match=r"no ids are given out in PoP nice: .*index 7"):
        pops.index()
    assert ["index 7" in text for text in lists.warnings()] == [True]
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert world.relisted == 1, "databases are compared all the same"
    assert 10.0 < world.slept_s[-1] < 100.0, "it does not ask each second what is refused"
    world.claims = {"nice": PopClaim(b"m" * 20, b"i" * 16, 7)}
    await world.turns(2)
    assert (pops.index(), lists.warnings()) == (7, [])
    task.cancel()


@pytest.mark.parametrize("other", [(b"x" * 20, b"i" * 16), (b"m" * 20, b"old disk........")])
async def test_only_who_claimed_the_pop_first_may_found_it(world: World, other: tuple[bytes, bytes]) -> None:
    world.claims = {"nice": PopClaim(b"m" * 20, b"i" * 16, 3)}
    pops = world.pops_on(MemoryDisk())
    assert await pops.may_found(b"m" * 20, b"i" * 16) == ""
    assert "PoP nice was founded by node 6d6d" in await pops.may_found(*other)


async def test_claim_of_a_recovery_is_not_one_to_found_a_domain_by(world: World) -> None:
    """Not by its own node either: an order that broke off when the claim had moved, of copies without groups."""
    pops = world.pops_on(MemoryDisk())
    world.claims = {"nice": recovering(PopClaim(b"m" * 20, b"i" * 16, 0), b"n" * 20, b"j" * 16, 2)}
    for node, incarnation in ((b"n" * 20, b"j" * 16), (b"m" * 20, b"i" * 16)):
        assert "lucd pop recover nice --accept-data-loss" in await pops.may_found(node, incarnation)
