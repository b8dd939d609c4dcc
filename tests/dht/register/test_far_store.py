"""Requests that are passed on to another PoP: what is repeated, what never is, whose answer is waited for."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from dht import requests
from dht.errors import Conflict, Indeterminate, Invalid, NotFound, RemoteProtocolError, StorageError, Unavailable
from dht.model import Applied, FindQuery, FindResult, Part, Transaction
from dht.register import homes as homes_module
from dht.register.homes import FarStore
from dht.rows import group_key

A, B = b"a" * 20, b"b" * 20
KEY = group_key("d", "f", (1,))
WRITE = Transaction(b"t" * 16, "d", 0, (Part(KEY),))


class Slow(NamedTuple):
    """An answer that takes its time."""

    reply: requests.Message
    takes_s: float


class World:
    """A clock that stands still unless it is set, and peers that answer as they are told."""

    def __init__(self):
        self.now_s = 0.0
        self.heard = {A, B}
        self.gone = set()
        self.says = {}
        self.asked = []

    def monotonic(self):
        return self.now_s

    def alive(self, node):
        return node in self.heard

    def parted(self, node):
        return node in self.gone

    def silent_s(self, node):
        return 0.3 if node not in self.heard else 0.0

    async def call(self, node, message, timeout_s):
        self.asked.append((node, type(message), timeout_s))
        said = self.says[node]
        if isinstance(said, Exception):
            raise said
        if isinstance(said, Slow):
            if said.takes_s > timeout_s:
                raise Indeterminate(f"no reply in {timeout_s} s")
            await asyncio.sleep(said.takes_s)
            return said.reply
        return said(message) if callable(said) else said

    async def gateways(self, pop):
        return [A, B]

    def far(self, pop="lyon"):
        return FarStore(pop, self, self, self.gateways)


@pytest.fixture
def world():
    return World()


@pytest.mark.parametrize(
    "lost",
    [
        Indeterminate("lost"),
        Unavailable("gone", sent=False),
        Unavailable("cut off"),
        StorageError("its disk is full"),
        RemoteProtocolError("it is older"),
    ],
)
async def test_far_read_whose_node_is_lost_is_asked_of_another(world, lost):
    world.says = {A: lost, B: requests.ReadGroupsReply(())}
    assert await world.far().read([KEY]) == ()
    assert [node for node, _, _ in world.asked] == [A, B]


async def test_far_answer_that_takes_long_is_waited_for_while_its_node_is_heard(world, monkeypatch):
    monkeypatch.setattr(homes_module, "PEER_TIMEOUT_S", 0.01)
    monkeypatch.setattr(homes_module, "HEARD_CHECK_S", 0.01)
    world.says = {A: Slow(requests.FindReply(FindResult(())), 0.05), B: Indeterminate("not asked")}
    assert await world.far().find(FindQuery("d", 1, 0), 10.0) == FindResult(())
    assert [node for node, _, _ in world.asked] == [A]


async def test_far_node_that_takes_half_of_the_time_leaves_the_rest_to_another(world):
    world.says = {A: Slow(requests.ReadGroupsReply(()), 6.0), B: requests.ReadGroupsReply(())}
    assert await world.far().read([KEY], None, 10.0) == ()
    assert [timeout_s for _, _, timeout_s in world.asked] == [5.0, 10.0], "the test's clock stands still"


async def test_far_node_that_falls_silent_is_given_up_before_its_time(world, monkeypatch):
    monkeypatch.setattr(homes_module, "HEARD_CHECK_S", 0.01)

    world.says = {A: Slow(requests.ReadGroupsReply(()), 4.0), B: requests.ReadGroupsReply(())}
    asking = asyncio.ensure_future(world.far().read([KEY], None, 10.0))
    await asyncio.sleep(0)
    world.heard = {B}
    assert await asyncio.wait_for(asking, 2.0) == ()
    assert [node for node, _, _ in world.asked] == [A, B]


@pytest.mark.parametrize("gone", [False, True])
async def test_far_node_beside_which_none_is_heard_is_forgiven_a_moment_of_silence_unless_its_link_broke(
    world, monkeypatch, gone
):
    monkeypatch.setattr(homes_module, "HEARD_CHECK_S", 0.01)
    world.says = {A: Slow(requests.ReadGroupsReply(()), 0.2), B: Unavailable("no link", sent=False)}
    world.heard = {A}
    asking = asyncio.ensure_future(world.far().read([KEY], None, 10.0))
    await asyncio.sleep(0)
    world.heard, world.gone = set(), {A} if gone else set()
    if gone:
        with pytest.raises(Unavailable):
            await asking
    else:
        assert await asking == ()


async def test_far_node_has_all_of_the_time_where_none_behind_it_is_heard(world):
    world.heard = {A}
    world.says = {A: Slow(requests.ReadGroupsReply(()), 0.0), B: Unavailable("no link", sent=False)}
    assert await world.far().read([KEY], None, 10.0) == ()
    assert [timeout_s for _, _, timeout_s in world.asked] == [10.0]


async def test_far_commit_that_may_have_been_served_is_never_sent_again(world):
    world.says = {A: Indeterminate("lost"), B: requests.CommitReply(Applied(()))}
    with pytest.raises(Indeterminate):
        await world.far().commit(WRITE)
    assert [node for node, _, _ in world.asked] == [A]


async def test_far_commit_that_was_certainly_not_served_is_asked_of_another(world):
    world.says = {A: Unavailable("no link", sent=False), B: requests.CommitReply(Applied(()))}
    assert await world.far().commit(WRITE) == Applied(())


@pytest.mark.parametrize("refusal", [Conflict("guard"), NotFound("no"), Invalid("bad")])
async def test_far_refusal_is_the_answer(world, refusal):
    world.says = {A: refusal, B: requests.CommitReply(Applied(()))}
    with pytest.raises(type(refusal)):
        await world.far().commit(WRITE)
    assert len(world.asked) == 1


async def test_far_pop_of_which_nobody_answers_is_unavailable_and_named(world):
    world.says = {A: Unavailable("silent"), B: Indeterminate("lost")}
    with pytest.raises(Unavailable, match="PoP lyon cannot be asked: lost; try again when it is up and the network"):
        await world.far().read([KEY])


async def test_far_node_that_is_not_heard_gets_only_the_time_of_a_link(world):
    world.heard = {B}
    world.says = {A: Unavailable("no link", sent=False), B: requests.CommitReply(Applied(()))}
    await world.far().commit(WRITE, 0, 8.0)
    assert [timeout_s for _, _, timeout_s in world.asked] == [1.0, 8.0]


async def test_far_pop_whose_nodes_are_not_found_in_time_is_unavailable(world):
    world.gateways = lambda pop: asyncio.Event().wait()
    with pytest.raises(Unavailable, match="PoP lyon cannot be asked: its nodes were not found in time"):
        await asyncio.wait_for(world.far().read([KEY], None, 0.01), 5.0)
