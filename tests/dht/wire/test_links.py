"""Links between real nodes on loopback: calls, dials, who is refused, limits and garbage."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import aiohttp
import aiohttp.test_utils
import aiohttp.web
import pytest
from wire_nodes import TLS, Ask, Node, Told, long_way, nodes, until

from dht.errors import DhtError, Indeterminate, Invalid, NotServing, RemoteProtocolError, Unavailable
from dht.requests import Done, ListDatabases, ListDatabasesReply, ReadGroups
from dht.wire import entrance, frames, link, links, strangers
from dht.wire.identity import Cluster, NodeIdentity


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
        with pytest.raises(DhtError, match="ZeroDivisionError: bug") as caught:
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
        with pytest.raises(Unavailable, match="cannot be reached") as caught:
            async with asyncio.timeout(10.0):
                await a.network.call(bytes(20), Ask("x"), 60.0)
        assert caught.value.detail["sent"] is False
        assert not a.network.alive(bytes(20))


async def test_call_without_reply_in_time_is_indeterminate():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("first"), 5.0)
        begin = time.monotonic()
        with pytest.raises(Indeterminate, match="did not reply in"):
            async with asyncio.timeout(10.0):
                await a.network.call(b.id, Ask("held"), 0.2)
        assert time.monotonic() - begin > 0.15
        assert await a.network.call(b.id, Ask("next"), 3.0)


async def test_answer_that_goes_on_by_itself_is_sent_when_it_ends():
    async with nodes(2) as (a, b):
        a.knows(b)
        answers = []

        def answer(sender, asked):
            answers.append(asyncio.get_running_loop().create_future())
            if asked == Ask("at once"):
                answers[-1].set_result(Told("done"))
            return answers[-1]

        b.network.serve(answer)
        assert await a.network.call(b.id, Ask("at once"), 3.0) == Told("done")
        call = a.network.call(b.id, Ask("later"), 3.0)
        await until(lambda: len(answers) == 2)
        assert b.network._peers[a.id].link.busy
        answers[1].set_result(Told("later"))
        assert await call == Told("later")
        call = a.network.call(b.id, Ask("fails"), 3.0)
        await until(lambda: len(answers) == 3)
        answers[2].set_exception(NotServing("sealed", tablet=3))
        with pytest.raises(NotServing, match="sealed"):
            await call
        assert not b.network._peers[a.id].link.busy


@pytest.mark.parametrize("error", [NotServing("sealed"), ZeroDivisionError("bug")])
async def test_answer_that_fails_before_it_begins_is_told(error):
    async with nodes(2) as (a, b):
        a.knows(b)

        def answer(sender, asked):
            raise error

        b.network.serve(answer)
        for _ in range(2):
            with pytest.raises(DhtError, match=str(error)):
                await a.network.call(b.id, Ask("x"), 3.0)


async def test_request_that_nobody_waits_for_any_more_is_forgotten_at_once():
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("first"), 3.0)
        link = a.network._peers[b.id].link
        call = asyncio.ensure_future(a.network.call(b.id, Ask("slow", 0.2), 3.0))
        waiting = asyncio.create_task(asyncio.wait_for(a.network.call(b.id, Ask("slow", 0.2), 3.0), 3.0))
        await until(lambda: len(b.served) == 3)
        assert link.busy
        call.cancel()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not link.busy
        assert await a.network.call(b.id, Ask("next"), 3.0)


async def test_lost_link_makes_calls_indeterminate_and_is_replaced():
    async with nodes(2) as (a, b):
        a.knows(b)
        call = asyncio.ensure_future(a.network.call(b.id, Ask("held"), 60.0))
        await until(lambda: b.served)
        b.network._peers[a.id].link.close()
        with pytest.raises(Indeterminate, match="was lost before its reply"):
            await asyncio.wait_for(call, 10.0)
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


async def test_peer_that_restarted_before_its_old_link_was_missed_is_told_as_a_new_link():
    async with nodes(2) as (a, b):
        met = []
        a.network.on_link.append(lambda peer: met.append(peer.start_id))
        a.knows(b)
        await until(lambda: met)
        # The old process says no goodbye: its host lost its power.
        again = await Node(identity=b.identity.next_boot()).start()
        try:
            again.knows(a)
            await until(lambda: a.network.peers()[0].start_id == again.identity.start_id)
            assert met == [b.identity.start_id, again.identity.start_id]
        finally:
            await again.network.stop()


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


async def test_host_that_answers_nothing_is_dialled_again_before_a_dial_s_whole_time(monkeypatch):
    """As while the network is cut: what is lost on the way is repeated late, and the one dial keeps off the next."""
    monkeypatch.setattr(links, "DIAL_TIMEOUT_S", 30.0)
    async with contextlib.AsyncExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):
            # The kernel drops what comes to a port where nobody accepts, once its queue is full.
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        (a,) = await stack.enter_async_context(nodes(1))
        a.network.set_address(bytes(20), *full.getsockname())
        await until(lambda: a.network.counters["dials"] >= 3, 10.0)


async def test_nodes_at_the_other_end_of_the_world_get_a_link():
    """Where a round trip takes half a second, and a handshake four."""
    async with nodes(2) as (a, b), long_way(b.network.port) as port:
        a.network.set_address(b.id, "127.0.0.1", port)
        await until(lambda: a.network.alive(b.id), 15.0)


async def test_two_nodes_that_dial_at_once_keep_one_link(monkeypatch):
    monkeypatch.setattr(links, "RETIRED_WAIT_S", 0.2)
    for _ in range(3):
        async with nodes(2) as (a, b):
            a.knows(b)
            b.knows(a)
            calls = [x.network.call(y.id, Ask("x"), 10.0) for _ in range(20) for x, y in ((a, b), (b, a))]
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


async def test_node_that_is_silent_for_long_and_needed_by_nobody_is_dialled_no_more(monkeypatch):
    monkeypatch.setattr(links, "UNNEEDED_AFTER_S", 0.2)
    async with nodes(2) as (a, b):
        gone, away = b"g" * 20, b"a" * 20
        a.network.needed = lambda node: node == away
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        for node in (gone, away):
            a.network.set_address(node, "127.0.0.1", 1)
        await until(lambda: gone not in a.network.addresses())
        assert set(a.network.addresses()) == {away, b.id}, "a member that is away may come back"
        a.network.set_address(gone, "127.0.0.1", b.network.port)
        assert gone in a.network.addresses(), "where it is heard of again it is dialled again"


async def test_taken_port_is_a_clear_error():
    async with nodes(1) as (a,):
        with pytest.raises(Invalid, match="cannot listen on"):
            await Node().start(a.network.port)


async def test_full_queue_refuses_before_sending(monkeypatch):
    monkeypatch.setattr(link, "QUEUE_BYTES_MAX", 100_000)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        calls = [a.network.call(b.id, Ask("y" * 10_000), 10.0) for _ in range(30)]
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
        replies = await asyncio.gather(*(a.network.call(b.id, Ask(text), 60.0) for _ in range(40)))
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
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        monkeypatch.setattr(strangers, "STRANGER_S", 0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
        assert b.network.counters["refused"] == 1
        assert a.network.alive(b.id), "a link stays as long as it likes"


@contextlib.asynccontextmanager
async def upgraded(node, source="127.0.0.1"):
    """A stranger's WebSocket to the node, of which the handshake has not begun."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", node.network.port, local_addr=(source, 0), ssl=TLS.dialing
    )
    head = "Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    writer.write(f"GET {entrance.LINK_PATH} HTTP/1.1\r\n{head}\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
    try:
        yield reader, writer, await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_stranger_that_sends_more_than_a_handshake_is_turned_out_before_it_is_held_in_memory(monkeypatch):
    """A message may be as large as a frame for a proven peer only."""
    monkeypatch.setattr(links, "HANDSHAKE_TIMEOUT_S", 60.0)
    monkeypatch.setattr(strangers, "STRANGER_S", 60.0)
    async with nodes(1) as (b,), upgraded(b) as (reader, writer, _):
        writer.write(b"\x82\xff" + (20 * 1024 * 1024).to_bytes(8, "big") + bytes(4))
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                writer.write(bytes(32 * 1024))
                await writer.drain()
            async with asyncio.timeout(5):
                await reader.read()
        await until(lambda: b.network.counters["refused"] == 1)


async def test_peer_that_has_proven_itself_may_send_a_whole_frame():
    async with nodes(2) as (a, b):
        a.knows(b)
        for _ in range(3):
            assert await a.network.call(b.id, Ask("x" * (4 * strangers.STRANGER_BYTES_MAX)), 5.0)
            await asyncio.sleep(2 * links.TICK_S)
        assert b.network.counters["refused"] == 0


async def test_host_that_floods_the_port_with_handshakes_keeps_no_other_one_out(monkeypatch):
    monkeypatch.setattr(strangers, "HANDSHAKES_MAX", 4)
    monkeypatch.setattr(links, "HANDSHAKE_TIMEOUT_S", 60.0)
    monkeypatch.setattr(strangers, "STRANGER_S", 60.0)
    async with nodes(1) as (b,), contextlib.AsyncExitStack() as flood:
        began = [await flood.enter_async_context(upgraded(b, "127.0.0.9")) for _ in range(4)]
        waiting = []
        for _ in range(2):
            # Without a turn TLS does not begin.
            waiting.append(await asyncio.open_connection("127.0.0.1", b.network.port, local_addr=("127.0.0.9", 0)))
            waiting[-1][1].write(b"\x16")
            flood.callback(waiting[-1][1].transport.abort)
        a = await Node().start()
        try:
            a.knows(b)
            assert await a.network.call(b.id, Ask("x"), 5.0)
        finally:
            await a.network.stop()
        async with asyncio.timeout(5):
            assert await began[0][0].read() == b"", "the oldest of them made room"


async def test_dial_given_up_within_the_handshake_lets_go_of_its_connection():
    began, ended = asyncio.Event(), asyncio.Event()

    async def says_nothing(request):
        ws = aiohttp.web.WebSocketResponse()
        await ws.prepare(request)
        began.set()
        try:
            while (await ws.receive()).type is aiohttp.WSMsgType.BINARY:
                pass
        finally:
            ended.set()
        return ws

    app = aiohttp.web.Application()
    app.router.add_get(entrance.LINK_PATH, says_nothing)
    server = aiohttp.test_utils.TestServer(app, scheme="https")
    await server.start_server(ssl=TLS.listening)
    async with nodes(1) as (a,):
        within_s = 0.2
        while not began.is_set():
            # What holds on to the error, as a log may, holds on to the socket.
            with pytest.raises(Unavailable, match="does not answer") as held:
                await a.network._connect(("127.0.0.1", server.port), None, within_s)
            # On a loaded machine it may not have come so far.
            within_s *= 2
        async with asyncio.timeout(10):
            await ended.wait()
        assert held.value.__context__ is not None
    await server.close()


async def test_garbage_instead_of_a_handshake_is_counted(chance, caplog, monkeypatch):
    monkeypatch.setattr(links, "HANDSHAKE_TIMEOUT_S", 60.0)
    async with nodes(1) as (a,), aiohttp.ClientSession() as session:
        for n in range(200):
            ws = await session.ws_connect(f"https://127.0.0.1:{a.network.port}/link", ssl=TLS.dialing)
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
