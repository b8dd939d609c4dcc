"""Who may come in, and whose turn it is."""

from __future__ import annotations

import asyncio

import pytest

from dht.wire.strangers import Room


class Guest:
    closed = False

    def force_close(self) -> None:
        self.closed = True


async def waiting(room: Room, host: str) -> tuple[Guest, asyncio.Task[None]]:
    guest = Guest()
    task = asyncio.ensure_future(room.wait(guest, host))
    await asyncio.sleep(0)
    return guest, task


async def test_who_waits_comes_in_behind_those_who_waited_before() -> None:
    room = Room(1)
    first, task = await waiting(room, "a")
    assert task.done()
    second, following = await waiting(room, "b")
    third, last = await waiting(room, "c")
    room.end(first)
    await following
    assert second in room
    assert not last.done()
    room.end(second)
    await last
    room.end(third)
    assert room.begin(Guest(), "d")


@pytest.mark.parametrize("granted", ["before", "meanwhile", "after"])
async def test_turn_of_who_gives_up_waiting_goes_to_the_next(granted: str) -> None:
    room = Room(1)
    first, _ = await waiting(room, "a")
    second, given_up = await waiting(room, "b")
    third, following = await waiting(room, "c")
    if granted == "before":
        room.end(first)
    given_up.cancel()
    if granted == "meanwhile":
        room.end(first)
    await asyncio.wait([given_up])
    assert given_up.cancelled()
    if granted == "after":
        room.end(first)
    await following
    assert second not in room
    assert third in room


async def test_host_that_has_more_gives_way_to_another_and_not_to_itself() -> None:
    room = Room(3)
    guests = [(await waiting(room, host))[0] for host in ("a", "a", "b")]
    _, more = await waiting(room, "a")
    assert not more.done()
    assert (await waiting(room, "c"))[1].done()
    assert [guest.closed for guest in guests] == [True, False, False]
    more.cancel()
    await asyncio.wait([more])
