"""Who counts as alive, suspected or parted: links between real nodes on loopback, of which one falls silent."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time

import pytest
from wire_nodes import Ask, nodes, thin_way, until

from dht.errors import Indeterminate
from dht.wire import frames, handshake, link, tcp


async def test_silent_peer_is_not_alive_within_half_a_second():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        await asyncio.sleep(0.8)
        assert a.network.alive(b.id), "an idle link stays alive by its signs of life"
        b.network._ticking.cancel()
        await until(lambda: not a.network.alive(b.id), 0.6)


async def test_silent_peer_of_another_pop_is_not_alive_within_little_more_than_a_second():
    async with nodes(2, "oslo") as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        for _ in range(15):
            await asyncio.sleep(0.1)
            assert a.network.alive(b.id), "an idle link stays alive by its signs of life"
        b.network._ticking.cancel()
        await until(lambda: not a.network.alive(b.id), link.FAR_ALIVE_S + 0.2)
        assert a.network._peers[b.id].link is not None, "it is passed by before its link is given up"


@pytest.mark.parametrize(
    ("others", "level", "pause_s", "alive_s"),
    [("lyon", 3, 0.15, 0.4), ("oslo", 3, 0.5, 1.0), ("oslo", 2, 0.15, 0.4)],
)
async def test_idle_link_between_pops_says_less_and_expects_less(monkeypatch, others, level, pause_s, alive_s):
    """Unless one end is of a version that expects more."""
    monkeypatch.setattr(handshake, "FEATURE_LEVEL", level)
    async with nodes(2, others) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        for one, other in ((a, b), (b, a)):
            one.network._ticking.cancel()
            ours = one.network._peers[other.id].link
            monkeypatch.setattr(ours._socket, "get_extra_info", lambda name: Kernel((0, 0, 0, 0)))
            now_s = asyncio.get_running_loop().time()
            ours._sent_s = ours.heard_s = now_s
            ours.tick(now_s + pause_s - 0.02)
            assert ours._queue == []
            ours.tick(now_s + pause_s + 0.02)
            assert ours._queue == [b""]
            ours.heard_s = now_s - alive_s + 0.2
            assert ours.alive
            ours.heard_s = now_s - alive_s
            assert not ours.alive


@pytest.mark.parametrize("others", ["lyon", "oslo"])
async def test_peer_that_leaves_a_request_in_silence_is_suspected(monkeypatch, others):
    for name in ("ALIVE_S", "FAR_ALIVE_S", "SILENCE_MAX_S"):
        monkeypatch.setattr(link, name, 60.0)
    async with nodes(2, others) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        b.network._ticking.cancel()
        await asyncio.sleep(2 * link.SUSPECT_S)
        assert a.network.alive(b.id), "nobody waits for it"
        call = asyncio.ensure_future(a.network.call(b.id, Ask("held"), 60.0))
        await until(lambda: not a.network.alive(b.id), 1.0)
        b.go_on.set()
        await call
        assert a.network.alive(b.id), "it answered after all"


@pytest.mark.parametrize("limit", ["ALIVE_S", "SUSPECT_S", "GIVE_UP_S"])
async def test_far_peer_has_two_round_trips_more(monkeypatch, limit):
    """What was lost on the way is missed, and repeated, before its sender counts as silent."""
    short_s = getattr(link, limit)
    for far_us in (1000, 300_000):
        async with unheard(monkeypatch, (0, 0, far_us, 0)) as (ours, _):
            monkeypatch.setattr(link, limit, short_s)
            ours.heard_s = ours._asked_s = now_s = asyncio.get_running_loop().time()
            (waiter,) = ours._waiting.values()
            waiter.short = True
            ours.tick(now_s + short_s + 0.4)
            ours.heard_s -= short_s + 0.4
            assert (ours.alive and not waiter.done()) == (far_us == 300_000)
            waiter.cancel()


async def test_silent_peer_of_another_pop_has_four_round_trips_for_a_request(monkeypatch):
    """The request may be lost, or its reply, and the peer had no cause to say anything since long before."""
    for others, trips in (("lyon", 2), ("oslo", 4)):
        short_s = link.SUSPECT_S
        async with unheard(monkeypatch, (0, 0, 200_000, 0), others) as (ours, _):
            monkeypatch.setattr(link, "SUSPECT_S", short_s)
            ours._asked_s = now_s = asyncio.get_running_loop().time()
            ours.heard_s = now_s - 0.4
            ours.tick(now_s + short_s + trips * 0.2 - 0.05)
            assert ours.alive
            ours.tick(now_s + short_s + trips * 0.2 + 0.05)
            assert not ours.alive


@pytest.mark.parametrize("back", [False, True], ids=["request", "reply"])
async def test_peer_is_alive_while_a_large_message_is_on_a_thin_way(monkeypatch, back):
    """Nothing overtakes it: the listener has no request yet for which he would say more than an idle one."""
    monkeypatch.setattr(link, "SUSPECT_S", 0.6)
    for name in ("FAR_SIGN_OF_LIFE_S", "FAR_ALIVE_S", "GIVE_UP_S"):
        monkeypatch.setattr(link, name, 60.0)
    async with nodes(2, "oslo") as (a, b), thin_way(b.network.port, back=back) as port:
        a.network.set_address(b.id, "127.0.0.1", port)
        await a.network.call(b.id, Ask("x"), 3.0)
        call = asyncio.ensure_future(a.network.call(b.id, Ask("x" * 1_000_000), 20.0))
        looks = 0
        while not call.done():
            await asyncio.sleep(0.02)
            assert a.network.alive(b.id)
            looks += 1
        assert (await call).text
        assert looks > 40, "it took longer than a request may be left in silence"


class Kernel:
    """A link's socket as far as `dht.wire.tcp` asks it. `known`: what the kernel would say."""

    def __init__(self, known):
        self.known = known

    def getsockopt(self, *_):
        info = bytearray(104)
        for at, value in zip((24, 56, 68, 72), self.known, strict=True):
            struct.pack_into("I", info, at, value)
        return bytes(info)


@contextlib.asynccontextmanager
async def silenced(monkeypatch, known, others="lyon"):
    """Two nodes and a link of the first whose peer says nothing.

    The kernel says `known`: segments on their way, ms since anything came back, us of a round trip, of its deviation.
    """
    for name in ("ALIVE_S", "FAR_ALIVE_S", "SUSPECT_S", "GIVE_UP_S", "SILENCE_MAX_S"):
        monkeypatch.setattr(link, name, 60.0)
    async with nodes(2, others) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        b.network._ticking.cancel()
        ours = a.network._peers[b.id].link
        monkeypatch.setattr(ours._socket, "get_extra_info", lambda name: Kernel(known))
        yield a, b


@contextlib.asynccontextmanager
async def unheard(monkeypatch, known, others="lyon"):
    """The same, without ticks but those of the test: (the link, when a request was about to leave on it)."""
    async with silenced(monkeypatch, known, others) as (a, b):
        a.network._ticking.cancel()
        ours = a.network._peers[b.id].link
        left_s = asyncio.get_running_loop().time()
        call = asyncio.ensure_future(ours.call(Ask("slow", 5.0), 10.0))
        try:
            await until(lambda: len(b.served) > 1)
            yield ours, left_s
        finally:
            call.cancel()


@pytest.mark.parametrize("others", ["lyon", "oslo"])
async def test_peer_whose_host_acknowledges_nothing_is_parted_and_its_short_requests_fail(monkeypatch, others):
    monkeypatch.setattr(link, "PEER_TIMEOUT_S", 60.0)
    async with silenced(monkeypatch, (1, 900, 1000, 0), others) as (a, b):
        call = asyncio.ensure_future(a.network.call(b.id, Ask("held"), 60.0))
        await until(lambda: a.network.parted(b.id), 1.0)
        assert not a.network.alive(b.id)
        with pytest.raises(Indeterminate, match="fell silent"):
            await asyncio.wait_for(call, 10.0)
        b.network._tick()
        await until(lambda: a.network.alive(b.id))
        assert not a.network.parted(b.id), "it was heard again"


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ((0, 900, 1000, 0), "nothing is on its way"),
        ((1, 50, 1000, 0), "acknowledged a moment ago"),
        ((1, 450, 300_000, 0), "far away"),
        ((1, 450, 50_000, 70_000), "round trips of very different length"),
    ],
)
async def test_silent_peer_whose_host_acknowledges_is_alive(monkeypatch, known, why):
    async with silenced(monkeypatch, known) as (a, b):
        await asyncio.sleep(3 * link.PARTED_S)
        assert a.network.alive(b.id), why
        assert not a.network.parted(b.id), why


async def test_peer_whose_host_has_just_fallen_silent_is_passed_by_but_not_given_up(monkeypatch):
    async with unheard(monkeypatch, (1, 150, 1000, 0)) as (ours, left_s):
        ours.tick(left_s + 50.0)
        assert not ours.alive
        assert not ours.parted


async def test_silence_of_a_host_is_counted_from_the_message_that_it_does_not_acknowledge(monkeypatch):
    """Not from before it: an idle peer has nothing to say. And not from the first look at it."""
    async with unheard(monkeypatch, (1, 5_000, 1000, 0)) as (ours, left_s):
        ours.heard_s -= 5.0
        ours.tick(left_s + 0.9 * link.MUTE_S)
        assert ours.alive
    async with unheard(monkeypatch, (1, 5_000, 1000, 0)) as (ours, left_s):
        ours.tick(left_s + 50.0)
        assert not ours.alive
        assert ours.parted


async def test_silence_of_a_host_is_counted_from_what_came_after_the_message_was_sent(monkeypatch):
    """It had left already, and what was heard then did not acknowledge it."""
    async with unheard(monkeypatch, (1, 5_000, 1000, 0)) as (ours, left_s):
        ours.heard_s, ours._owed_s = left_s, None
        ours.tick(left_s + 0.9 * link.MUTE_S)
        assert ours.alive
        ours.tick(left_s + 1.1 * link.MUTE_S)
        assert not ours.alive


async def test_host_that_owes_an_acknowledgement_is_sent_more_to_acknowledge(monkeypatch):
    """The first message may have been lost, and its repetition comes late."""
    monkeypatch.setattr(link, "SIGN_OF_LIFE_S", 60.0)
    async with unheard(monkeypatch, (1, 60, 1000, 0)) as (ours, left_s):
        ours.tick(left_s + 50.0)
        assert ours._queue == [b""]
    for known in ((0, 60, 1000, 0), (1, 60, 80_000, 0)):
        async with unheard(monkeypatch, known) as (ours, left_s):
            ours.tick(left_s + 50.0)
            assert ours._queue == [], "it is acknowledged, or the peer is far away"


async def test_peer_whose_host_is_not_heard_is_told_so(monkeypatch):
    """It may hear this node; the sooner it knows, the likelier that the message still gets through."""
    async with unheard(monkeypatch, (1, 150, 1000, 0)) as (ours, left_s):
        ours.tick(left_s + 50.0)
        assert ours._queue == [link.DEAF]


async def test_peer_is_told_that_it_is_not_heard_beside_what_is_sent_in_the_same_moment(monkeypatch):
    """Its word for that is no frame: sent in one message with some, it would end the link."""
    async with silenced(monkeypatch, (1, 150, 1000, 0)) as (a, b):
        a.network._ticking.cancel()
        ours, theirs = (one.network._peers[other.id].link for one, other in ((a, b), (b, a)))
        ours.tick(asyncio.get_running_loop().time() + 50.0)
        ours._enqueue(frames.encode_frame(77, 1000, Ask("more")))
        assert ours._queue[0] == link.DEAF
        await until(lambda: Ask("more") in b.served or theirs.closed)
        assert not theirs.closed
        assert b.network.counters["garbage"] == 0
        await until(lambda: not ours._queue_bytes)


async def test_peer_is_not_silent_for_a_pause_of_this_process_also_before_anything_else_runs():
    """What is asked first after a pause is asked before what arrived meanwhile is read."""
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        time.sleep(1.0)  # noqa: ASYNC251 (the pause)
        assert a.network.alive(b.id)
        assert a.network.silent_s(b.id) == 0.0
        b.network._ticking.cancel()
        await until(lambda: not a.network.alive(b.id), 0.6)
        silent_s = a.network.silent_s(b.id)
        time.sleep(1.0)  # noqa: ASYNC251 (the pause)
        assert not a.network.alive(b.id)
        assert a.network.silent_s(b.id) < silent_s + 0.2, "who is silent is no longer silent for it"


async def test_pause_of_this_process_is_counted_if_peers_took_it_for_gone_meanwhile():
    async with nodes(1) as (a,):
        a.network._ticking.cancel()
        counted = []
        for pause_s in (0.2, 0.6):
            a.network._ticked_s = asyncio.get_running_loop().time() - link.TICK_S - pause_s
            a.network._tick()
            a.network._ticking.cancel()
            counted.append(a.network.counters["pauses"])
        assert counted[1] - counted[0] == 1


async def test_peer_is_not_parted_for_a_pause_of_this_host(monkeypatch):
    """The kernel's clock went on while nothing ran: what was sent before has had no time to be acknowledged."""
    async with silenced(monkeypatch, (1, 60_000, 1000, 0)) as (a, b):
        a.network._ticking.cancel()
        ours = a.network._peers[b.id].link
        now_s = asyncio.get_running_loop().time()
        ours.heard_s = now_s - 5.1
        ours._owed_s = a.network._ticked_s = now_s - 5.05
        a.network._tick()
        assert ours.alive
        assert not ours.parted


async def test_kernel_knows_of_a_real_connection_that_all_is_acknowledged():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        connection = a.network._peers[b.id].link._socket.get_extra_info("socket")
        await until(lambda: tcp.read(connection).unacknowledged == 0)
        known = tcp.read(connection)
        assert 0 < known.round_trip_s < 1
        assert known.last_ack_s < 5


async def test_peer_that_is_slow_to_answer_is_not_suspected(monkeypatch):
    monkeypatch.setattr(link, "SIGN_OF_LIFE_S", 0.7 * link.ALIVE_S)
    async with nodes(2) as (a, b):
        a.knows(b)
        call = asyncio.ensure_future(a.network.call(b.id, Ask("slow", 1.0), 5.0))
        await until(lambda: b.served)
        while not call.done():
            assert a.network.alive(b.id)
            await asyncio.sleep(0.02)


async def test_peer_that_does_not_hear_this_node_is_not_alive(monkeypatch):
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        sending = a.network._peers[b.id].link._socket

        async def lose(data):
            pass

        monkeypatch.setattr(sending, "send_bytes", lose)
        await until(lambda: not b.network.alive(a.id), 2.0)
        await until(lambda: not a.network.alive(b.id), 1.0)
        ours = a.network._peers[b.id].link
        awake_s = link.awake_until_s(asyncio.get_running_loop().time(), ours._ticked_s)
        assert awake_s - ours.heard_s < link.ALIVE_S, "it is heard all the time"
        monkeypatch.undo()
        await until(lambda: a.network.alive(b.id) and b.network.alive(a.id))


async def test_silence_is_counted_from_the_last_sign_of_life():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        assert a.network.silent_s(b.id) == 0.0
        await b.network.stop()
        await until(lambda: a.network.silent_s(b.id) > 0.3)
        assert a.network.silent_s(b.id) < 5.0
