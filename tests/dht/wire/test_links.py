"""Links between real nodes on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time

import aiohttp
import aiohttp.test_utils
import aiohttp.web
import pytest

from dht.codec import Message, message
from dht.errors import Conflict, DhtError, Indeterminate, Invalid, NotServing, RemoteProtocolError, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.requests import Done, ListDatabases, ListDatabasesReply, ReadGroups
from dht.wire import frames, link, links, tcp
from dht.wire.identity import Cluster, NodeIdentity
from dht.wire.links import LinkNetwork

CLUSTER = Cluster.found()


@message
class Ask(Message, frozen=True, tag=99_001):
    text: str
    wait_s: float = 0.0


@message
class Told(Message, frozen=True, tag=99_002):
    text: str


class Node:
    def __init__(self, pop="lyon", cluster=CLUSTER, identity=None):
        self.identity = identity or NodeIdentity.create(pop)
        self.id = self.identity.node_id
        self.boots = {}
        self.served = []
        self.network = LinkNetwork(self.identity, cluster, self.accept_boot)
        self.network.serve(self.answer)

    def accept_boot(self, node_id, incarnation, boot, start_id):
        if boot < self.boots.get((node_id, incarnation), 0):
            raise Conflict(f"boot {boot} is older than {self.boots[node_id, incarnation]}")
        self.boots[node_id, incarnation] = boot

    async def answer(self, sender, asked):
        self.served.append(asked)
        match asked:
            case Ask("not serving"):
                raise NotServing("sealed", domain="lyon", tablet=3, roster_epoch=4)
            case Ask("bug"):
                raise ZeroDivisionError("bug")
            case Ask(text, wait_s):
                await asyncio.sleep(wait_s)
                return Told(text + " to " + sender.hex())
        return Done()

    async def start(self, port=0):
        await self.network.start("127.0.0.1", port)
        return self

    def knows(self, other):
        self.network.set_address(other.id, "127.0.0.1", other.network.port)


@contextlib.asynccontextmanager
async def nodes(count):
    made = [await Node().start() for _ in range(count)]
    try:
        yield made
    finally:
        for node in made:
            await node.network.stop()


async def until(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


async def test_call_returns_the_peers_reply():
    async with nodes(2) as (a, b):
        a.knows(b)
        assert await a.network.call(b.id, Ask("hello"), 3.0) == Told("hello to " + a.id.hex())
        # The link serves both directions.
        assert await b.network.call(a.id, Ask("and back"), 3.0) == Told("and back to " + b.id.hex())
        assert a.network.alive(b.id)
        assert b.network.alive(a.id)
        assert a.network.counters["links"] == b.network.counters["links"] == 1


async def test_peers_error_comes_back_as_its_class():
    async with nodes(2) as (a, b):
        a.knows(b)
        with pytest.raises(NotServing) as caught:
            await a.network.call(b.id, Ask("not serving"), 3.0)
        assert caught.value.detail == {"domain": "lyon", "tablet": 3, "roster_epoch": 4}


async def test_unexpected_exception_is_logged_and_told(caplog):
    async with nodes(2) as (a, b):
        a.knows(b)
        with pytest.raises(Exception, match="ZeroDivisionError: bug") as caught:
            await a.network.call(b.id, Ask("bug"), 3.0)
        assert caught.value.code == "error"
        assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_call_without_address_is_not_sent():
    async with nodes(1) as (a,):
        with pytest.raises(Unavailable) as caught:
            await a.network.call(bytes(20), Ask("x"), 3.0)
        assert caught.value.detail["sent"] is False


async def test_call_to_nobody_is_not_sent():
    async with nodes(1) as (a,):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            a.network.set_address(bytes(20), "127.0.0.1", free.getsockname()[1])
        begin = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await a.network.call(bytes(20), Ask("x"), 3.0)
        assert caught.value.detail["sent"] is False
        assert time.monotonic() - begin < 0.9
        assert not a.network.alive(bytes(20))


async def test_call_without_reply_in_time_is_indeterminate():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("first"), 5.0)
        begin = time.monotonic()
        with pytest.raises(Indeterminate):
            await a.network.call(b.id, Ask("slow", 2.0), 0.2)
        assert 0.15 < time.monotonic() - begin < 1.0
        assert await a.network.call(b.id, Ask("next"), 3.0)


async def test_lost_link_makes_calls_indeterminate_and_is_replaced():
    async with nodes(2) as (a, b):
        a.knows(b)
        call = asyncio.ensure_future(a.network.call(b.id, Ask("slow", 5.0), 10.0))
        await until(lambda: b.served)
        b.network._peers[a.id].link.close()
        begin = time.monotonic()
        with pytest.raises(Indeterminate):
            await call
        assert time.monotonic() - begin < 0.5
        assert await a.network.call(b.id, Ask("again"), 3.0)


async def test_link_comes_back_after_the_peer_restarted():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        port = b.network.port
        await b.network.stop()
        await until(lambda: not a.network.alive(b.id), 1.0)
        again = await Node(identity=b.identity.next_boot()).start(port)
        try:
            await until(lambda: a.network.alive(b.id))
            assert await a.network.call(b.id, Ask("x"), 3.0)
        finally:
            await again.network.stop()


async def test_silent_peer_is_not_alive_within_half_a_second():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        await asyncio.sleep(0.8)
        assert a.network.alive(b.id), "an idle link stays alive by its signs of life"
        b.network._ticking.cancel()
        await until(lambda: not a.network.alive(b.id), 0.6)


async def test_peer_that_leaves_a_request_in_silence_is_suspected(monkeypatch):
    monkeypatch.setattr(link, "ALIVE_S", 60.0)
    monkeypatch.setattr(link, "SILENCE_MAX_S", 60.0)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        b.network._ticking.cancel()
        await asyncio.sleep(2 * link.SUSPECT_S)
        assert a.network.alive(b.id), "nobody waits for it"
        call = asyncio.ensure_future(a.network.call(b.id, Ask("slow", 2.0), 5.0))
        await until(lambda: not a.network.alive(b.id), 1.0)
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
            ours._short = dict.fromkeys(ours._waiting)
            (waiter,) = ours._waiting.values()
            ours.tick(now_s + short_s + 0.4)
            ours.heard_s -= short_s + 0.4
            assert (ours.alive and not waiter.done()) == (far_us == 300_000)
            waiter.cancel()


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
async def silenced(monkeypatch, known):
    """Two nodes and a link of the first whose peer says nothing.

    The kernel says `known`: segments on their way, ms since anything came back, us of a round trip, of its deviation.
    """
    for name in ("ALIVE_S", "SUSPECT_S", "GIVE_UP_S", "SILENCE_MAX_S"):
        monkeypatch.setattr(link, name, 60.0)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        b.network._ticking.cancel()
        ours = a.network._peers[b.id].link
        monkeypatch.setattr(ours._socket, "get_extra_info", lambda name: Kernel(known))
        yield a, b


@contextlib.asynccontextmanager
async def unheard(monkeypatch, known):
    """The same, without ticks but those of the test: (the link, when a request was about to leave on it)."""
    async with silenced(monkeypatch, known) as (a, b):
        a.network._ticking.cancel()
        ours = a.network._peers[b.id].link
        left_s = asyncio.get_running_loop().time()
        call = asyncio.ensure_future(ours.call(Ask("slow", 5.0), 10.0))
        try:
            await until(lambda: len(b.served) > 1)
            yield ours, left_s
        finally:
            call.cancel()


async def test_peer_whose_host_acknowledges_nothing_is_parted_and_its_short_requests_fail(monkeypatch):
    async with silenced(monkeypatch, (1, 900, 1000, 0)) as (a, b):
        call = asyncio.ensure_future(a.network.call(b.id, Ask("slow", 2.0), PEER_TIMEOUT_S))
        await until(lambda: a.network.parted(b.id), 1.0)
        assert not a.network.alive(b.id)
        with pytest.raises(Indeterminate, match="fell silent"):
            await asyncio.wait_for(call, 0.3)
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
        assert time.monotonic() - a.network._peers[b.id].link.heard_s < link.ALIVE_S, "it is heard all the time"
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


async def test_calls_to_a_peer_that_cannot_be_dialled_do_not_wait(monkeypatch):
    monkeypatch.setattr(links, "DIAL_TIMEOUT_S", 0.1)
    async with nodes(1) as (a,):
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(1)
            a.network.set_address(bytes(20), "127.0.0.1", deaf.getsockname()[1])
            await until(lambda: a.network._peers[bytes(20)].failures >= links.FAILURES_BEFORE_REFUSAL)
            monkeypatch.setattr(links, "DIAL_TIMEOUT_S", 30.0)
            with pytest.raises(Unavailable, match="does not answer") as caught:
                async with asyncio.timeout(1.0):
                    await a.network.call(bytes(20), Ask("x"), 10.0)
            assert caught.value.detail["sent"] is False


async def test_two_nodes_that_dial_at_once_keep_one_link(monkeypatch):
    monkeypatch.setattr(links, "RETIRED_WAIT_S", 0.2)
    for _ in range(3):
        async with nodes(2) as (a, b):
            a.knows(b)
            b.knows(a)
            calls = [x.network.call(y.id, Ask("x"), 2.0) for _ in range(20) for x, y in ((a, b), (b, a))]
            await asyncio.gather(*calls)
            await until(lambda a=a, b=b: not a.network._retired and not b.network._retired)
            assert a.network.counters["links"] == b.network.counters["links"] == 1
            assert a.network._peers[b.id].link.dialed != b.network._peers[a.id].link.dialed
            assert await a.network.call(b.id, Ask("x"), 3.0)


async def test_greet_learns_who_listens():
    async with nodes(2) as (a, b):
        peer = await a.network.greet("127.0.0.1", b.network.port)
        assert (peer.node_id, peer.pop) == (b.id, "lyon")
        assert await a.network.call(b.id, Ask("x"), 3.0)
        assert b.network.addresses()[a.id] == ("127.0.0.1", a.network.port)


async def test_greet_again_keeps_the_link():
    async with nodes(2) as (a, b):
        await a.network.greet("127.0.0.1", b.network.port)
        old = a.network._peers[b.id].link
        await a.network.greet("127.0.0.1", b.network.port)
        assert a.network._peers[b.id].link is old
        assert a.network.counters["dials"] == 1


async def test_retired_link_waits_for_its_last_reply(monkeypatch):
    monkeypatch.setattr(links, "RETIRED_WAIT_S", 0.05)
    async with nodes(2) as (a, b):
        a.knows(b)
        slow = asyncio.ensure_future(a.network.call(b.id, Ask("slow", 0.5), 5.0))
        await until(lambda: b.served)
        await a.network._connect(("127.0.0.1", b.network.port), b.id, 3.0)
        assert await a.network.call(b.id, Ask("on the new link"), 3.0)
        assert await slow
        await until(lambda: not a.network._retired and not b.network._retired)
        assert len(a.network.peers()) == 1


async def test_greet_of_nobody_or_of_itself_is_refused():
    async with nodes(1) as (a,):
        with pytest.raises(Unavailable):
            await a.network.greet("127.0.0.1", 1)
        with pytest.raises(RemoteProtocolError, match="own id"):
            await a.network.greet("127.0.0.1", a.network.port)


async def test_node_of_another_cluster_is_refused_and_told():
    async with nodes(1) as (a,):
        stranger = await Node(cluster=Cluster.found()).start()
        try:
            with pytest.raises(RemoteProtocolError, match="belongs to cluster"):
                await stranger.network.greet("127.0.0.1", a.network.port)
            assert a.network.counters["refused"] == 1
            assert a.network.counters["links"] == 0
        finally:
            await stranger.network.stop()


async def test_copy_of_a_running_node_is_refused():
    async with nodes(2) as (a, b):
        await b.network.greet("127.0.0.1", a.network.port)
        same = b.identity
        copied = NodeIdentity.load(same.pop, same.private_bytes(), same.incarnation, same.boot)
        copy = await Node(identity=copied).start()
        try:
            with pytest.raises(RemoteProtocolError, match="copied"):
                await copy.network.greet("127.0.0.1", a.network.port)
        finally:
            await copy.network.stop()


async def test_older_boot_of_a_node_is_refused():
    async with nodes(1) as (a,):
        identity = NodeIdentity.create("lyon")
        for boot, refused in ((identity.next_boot(), False), (identity, True)):
            node = await Node(identity=boot).start()
            try:
                if refused:
                    with pytest.raises(RemoteProtocolError, match="older"):
                        await node.network.greet("127.0.0.1", a.network.port)
                else:
                    await node.network.greet("127.0.0.1", a.network.port)
            finally:
                await node.network.stop()


async def test_taken_port_is_a_clear_error():
    async with nodes(1) as (a,):
        with pytest.raises(Invalid, match="cannot listen on"):
            await Node().start(a.network.port)


async def test_full_queue_refuses_before_sending(monkeypatch):
    monkeypatch.setattr(link, "QUEUE_BYTES_MAX", 100_000)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        calls = [a.network.call(b.id, Ask("y" * 10_000), 2.0) for _ in range(30)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [o for o in outcomes if isinstance(o, Unavailable)]
        assert len(refused) == 21
        assert all(o.detail["sent"] is False for o in refused)
        assert len([o for o in outcomes if isinstance(o, Told)]) == 9
        assert a.network.counters["shed"] == 21


async def test_queue_to_a_silent_peer_is_short(monkeypatch):
    monkeypatch.setattr(link, "SILENT_QUEUE_BYTES_MAX", 100_000)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        a.network._peers[b.id].link.deaf = True
        calls = [a.network.call(b.id, Ask("y" * 10_000), 2.0) for _ in range(30)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert len([o for o in outcomes if isinstance(o, Unavailable)]) == 21


async def test_many_large_calls_at_once_are_all_answered():
    async with nodes(2) as (a, b):
        a.knows(b)
        text = "z" * 300_000
        replies = await asyncio.gather(*(a.network.call(b.id, Ask(text), 10.0) for _ in range(40)))
        assert {len(reply.text) for reply in replies} == {300_000 + 44}


async def test_frame_over_the_limit_is_invalid(monkeypatch):
    monkeypatch.setattr(frames, "FRAME_BYTES_MAX", 1000)
    async with nodes(2) as (a, b):
        a.knows(b)
        with pytest.raises(Invalid, match="larger than a frame may be"):
            await a.network.call(b.id, Ask("x" * 1000), 3.0)


async def test_garbage_on_the_port_is_counted_and_nothing_else(chance, caplog):
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(chance.randbytes(chance.randrange(1, 200)))
                writer.write(b"\r\n\r\n")
                await writer.drain()
                async with asyncio.timeout(5):
                    await reader.read()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert b.network.counters["garbage"] == 100
        assert await a.network.call(b.id, Ask("still"), 3.0)
        assert not caplog.records


async def test_connection_that_says_nothing_is_turned_out(monkeypatch):
    monkeypatch.setattr(links, "STRANGER_S", 0.2)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        async with asyncio.timeout(2):
            assert await reader.read() == b""
        writer.close()
        assert b.network.counters["refused"] == 1
        assert a.network.alive(b.id), "a link stays as long as it likes"


async def test_dial_given_up_within_the_handshake_lets_go_of_its_connection():
    ended = asyncio.Event()

    async def says_nothing(request):
        ws = aiohttp.web.WebSocketResponse()
        await ws.prepare(request)
        try:
            while (await ws.receive()).type is aiohttp.WSMsgType.BINARY:
                pass
        finally:
            ended.set()
        return ws

    app = aiohttp.web.Application()
    app.router.add_get(links.LINK_PATH, says_nothing)
    server = aiohttp.test_utils.TestServer(app)
    await server.start_server()
    async with nodes(1) as (a,):
        # What holds on to the error, as a log may, holds on to the socket.
        with pytest.raises(Unavailable, match="does not answer") as held:
            await a.network._connect(("127.0.0.1", server.port), None, 0.2)
        async with asyncio.timeout(2):
            await ended.wait()
        assert held.value.__context__ is not None
    await server.close()


async def test_garbage_instead_of_a_handshake_is_counted(chance, caplog):
    async with nodes(1) as (a,), aiohttp.ClientSession() as session:
        for n in range(200):
            ws = await session.ws_connect(f"http://127.0.0.1:{a.network.port}/link")
            await ws.send_bytes(chance.randbytes(n))
            async with asyncio.timeout(5):
                await ws.receive()
                await ws.close()
        assert a.network.counters["garbage"] == 200
        assert not caplog.records


async def test_garbage_of_a_proven_peer_costs_it_the_link(chance):
    async with nodes(2) as (a, b):
        a.knows(b)
        for n in range(20):
            await a.network.call(b.id, Ask("x"), 3.0)
            old = a.network._peers[b.id].link
            await old._socket.send_bytes(chance.randbytes(5 + n))
            await until(lambda old=old: old.closed)
        assert b.network.counters["garbage"] == 20


async def test_forgotten_node_loses_its_link():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        a.network.forget(b.id)
        await until(lambda: not b.network.peers())
        with pytest.raises(Unavailable):
            await a.network.call(b.id, Ask("x"), 0.5)


async def test_call_to_itself_is_served():
    async with nodes(1) as (a,):
        assert await a.network.call(a.id, Ask("self"), 3.0) == Told("self to " + a.id.hex())
        with pytest.raises(NotServing):
            await a.network.call(a.id, Ask("not serving"), 3.0)


def test_random_frames_are_frames_or_protocol_errors(chance):
    good = frames.encode_frame(7, 1000, ReadGroups((b"k",), (None,)))
    for _ in range(10_000):
        data = bytearray(good if chance.random() < 0.7 else chance.randbytes(40))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        # A mutated reply may well be a Failure: then the error is the one that it carries.
        with contextlib.suppress(DhtError):
            for _, _, raw in frames.split(bytes(data)):
                frames.read_reply(raw)


def test_frames_cut_anywhere_come_out_whole(chance):
    wanted = [ListDatabasesReply(("n" * chance.randrange(1, 3000),)) for _ in range(50)]
    stream = b"".join(frames.encode_frame(n, frames.REPLY, reply) for n, reply in enumerate(wanted))
    reader, found = frames.FrameReader(), []
    while stream:
        size = chance.randrange(1, 2000)
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert [request_id for request_id, _, _ in found] == list(range(50))
    assert [frames.read_reply(raw) for _, _, raw in found] == wanted
    assert reader.pending_bytes == 0
    assert ListDatabases() != Done()
