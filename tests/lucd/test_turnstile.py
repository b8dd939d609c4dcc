"""Bounded work, turns between clients, refusal instead of collapse."""

from __future__ import annotations

import asyncio

import pytest

from dht.errors import Unavailable
from lucd import turnstile
from lucd.turnstile import Turnstile


async def enter(stile: Turnstile, client: str, log: list[str], leaves: asyncio.Event | None = None) -> None:
    ticket = await stile.enter(client)
    log.append(client)
    await (asyncio.sleep(0) if leaves is None else leaves.wait())
    stile.leave(ticket)


async def test_client_with_one_request_passes_the_hundreds_of_another():
    stile, log = Turnstile(at_once=2), []
    flood = [asyncio.ensure_future(enter(stile, "flood", log)) for _ in range(200)]
    await asyncio.sleep(0)
    await enter(stile, "other", log)
    assert log.index("other") <= 4
    await asyncio.gather(*flood)
    assert len(log) == 201
    assert stile.counters == {"waiting": 0, "waited": 199, "refused": 0}


async def test_no_more_than_so_many_are_inside():
    stile, inside, most = Turnstile(at_once=3), 0, 0

    async def one(client):
        nonlocal inside, most
        ticket = await stile.enter(client)
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.001)
        inside -= 1
        stile.leave(ticket)

    await asyncio.gather(*(one(i % 7) for i in range(100)))
    assert (inside, most) == (0, 3)


async def test_one_client_has_no_more_inside_than_its_share():
    stile, log, leaves = Turnstile(at_once=8, of_one=2), [], asyncio.Event()
    flood = [asyncio.ensure_future(enter(stile, "flood", log, leaves)) for _ in range(20)]
    await asyncio.sleep(0)
    assert log == ["flood"] * 2
    async with asyncio.timeout(10.0):
        await asyncio.gather(*(enter(stile, "other", log) for _ in range(2)))
    assert log.count("flood") == 2
    leaves.set()
    await asyncio.gather(*flood)
    assert log.count("flood") == 20
    assert stile.counters["waiting"] == 0


async def test_too_many_waiting_are_refused_at_once():
    stile, log = Turnstile(at_once=1, waiting=5), []
    work = [asyncio.ensure_future(enter(stile, "a", log)) for _ in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="overloaded") as caught:
        await stile.enter("b")
    assert caught.value.detail["sent"] is False
    await asyncio.gather(*work)
    assert len(log) == 6


async def test_long_wait_ends_as_unavailable_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(turnstile, "WAIT_S_MAX", 0.05)
    stile = Turnstile(at_once=1)
    ticket = await stile.enter("a")
    with pytest.raises(Unavailable, match="waited"):
        await stile.enter("b")
    assert stile.counters["waiting"] == 0
    stile.leave(ticket)
    stile.leave(await stile.enter("b"))


async def test_request_that_only_waits_gives_its_place_up(monkeypatch):
    monkeypatch.setattr(turnstile, "HELD_S_MAX", 0.05)
    stile = Turnstile(at_once=1)
    held = await stile.enter("slow")
    async with asyncio.timeout(10.0):
        second = await stile.enter("quick")
    stile.leave(held)
    stile.leave(second)
    async with asyncio.timeout(10.0):
        stile.leave(await stile.enter("quick"))


async def test_client_that_goes_away_gives_its_turn_up():
    stile, log = Turnstile(at_once=1), []
    ticket = await stile.enter("a")
    gone = asyncio.ensure_future(enter(stile, "b", log))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    stile.leave(ticket)
    async with asyncio.timeout(10.0):
        await enter(stile, "c", log)
    assert log == ["c"]
