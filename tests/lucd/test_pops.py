"""Which nodes of another PoP are asked, and how often it is looked for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dht.errors import Invalid
from dht.overlay.messages import Contact
from dht.requests import AskFoundingPop, ClaimPop
from dht.storage.memory import MemoryDisk
from lucd import pops as pops_module
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
        await asyncio.sleep(0.01)
        return [one for one in self.there if one.pop == pop]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def pops(world: World) -> Pops:
    stand_in: Any = world
    return Pops("nice", False, stand_in, MemoryDisk(), stand_in, stand_in)


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


async def test_pop_is_given_away_by_the_founding_one_alone(world: World, pops: Pops) -> None:
    store: Any = None
    assert (await pops.answer(store, AskFoundingPop())).pop == ""  # type: ignore[union-attr]
    with pytest.raises(Invalid, match="not for PoP nice to give away"):
        await pops.answer(store, ClaimPop("lyon", b"n" * 20, b"i" * 16))


async def test_founder_remembers_that_it_founded(world: World) -> None:
    stand_in: Any = world
    disk = MemoryDisk()
    assert await Pops("nice", True, stand_in, disk, stand_in, stand_in).founding() == "nice"
    assert await Pops("nice", False, stand_in, disk, stand_in, stand_in).founding() == "nice"
