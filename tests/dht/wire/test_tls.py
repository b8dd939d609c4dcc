"""TLS of the links, between real nodes on loopback and on both event loops: who is let in, who is refused and told.

A man in the middle here has a certificate of his own and all that goes over the network, but no key of the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import socket
import ssl

import aiohttp
import aiohttp.test_utils
import aiohttp.web
import msgspec
import pytest
import uvloop
from wire_nodes import TLS, Ask, Node, Told, nodes, until, way

from dht.errors import RemoteProtocolError, Unavailable
from dht.wire import dialing, entrance, links, strangers
from dht.wire.handshake import Hello, Proof, Refused
from dht.wire.tls import LinkTls, fingerprint_of

decode = msgspec.msgpack.Decoder(Hello | Proof | Refused).decode
encode = msgspec.msgpack.encode


def on_both_loops(test):
    """A daemon runs on uvloop, whose TLS is its own; tests elsewhere run on asyncio's loop."""

    @functools.wraps(test)
    def run(new_loop, **fixtures):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**fixtures))

    own = inspect.Parameter("new_loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([own, *inspect.signature(test).parameters.values()])
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return pytest.mark.parametrize("new_loop", loops.values(), ids=loops.keys())(run)


@contextlib.asynccontextmanager
async def pair(*, tls):
    """A node with TLS or without that knows another one, which is the other way."""
    a, b = await Node(tls=tls).start(), await Node(tls=not tls).start()
    try:
        yield a, b
    finally:
        await a.network.stop()
        await b.network.stop()


@contextlib.asynccontextmanager
async def man_in_the_middle(port, change=lambda data, to: data):
    """A port where TLS ends, and begins anew to that one. `change`: what becomes of a message to that end."""

    async def carry(reads, writes, to):
        async for message in reads:
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            await writes.send_bytes(change(message.data, to))
        await writes.close()

    async def serve(request):
        dialer = aiohttp.web.WebSocketResponse()
        await dialer.prepare(request)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"https://127.0.0.1:{port}/link", ssl=TLS.dialing) as listener,
        ):
            ways = [carry(dialer, listener, "listener"), carry(listener, dialer, "dialer")]
            with contextlib.suppress(OSError, aiohttp.ClientError):
                await asyncio.gather(*ways)
        return dialer

    app = aiohttp.web.Application()
    app.router.add_get(entrance.LINK_PATH, serve)
    server = aiohttp.test_utils.TestServer(app, scheme="https")
    await server.start_server(ssl=TLS.listening)
    try:
        yield server.port
    finally:
        await server.close()


def told(caplog, level, words):
    return [r for r in caplog.records if r.levelno == level and words in r.getMessage()]


# ---- what a link is


@on_both_loops
async def test_link_is_tls_1_3_and_nothing_that_is_said_is_seen_on_the_way():
    seen = bytearray()

    async def look(writer, data):
        seen.extend(data)
        writer.write(data)

    async with nodes(2) as (a, b), way(b.network.port, there=look, back=look) as port:
        a.network.set_address(b.id, "127.0.0.1", port)
        assert await a.network.call(b.id, Ask("a secret word"), 3.0) == Told("a secret word to " + a.id.hex())
        for one, other in ((a, b), (b, a)):
            channel = one.network._peers[other.id].link._socket.get_extra_info("ssl_object")
            assert channel.version() == "TLSv1.3"
    assert len(seen) > 1000
    for word in (b"secret", b"GET ", b"lyon", a.id, b.id):
        assert word not in seen


@on_both_loops
async def test_certificate_of_each_start_is_another_and_each_end_names_the_listeners(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert LinkTls().fingerprint != LinkTls().fingerprint
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        dialed, accepted = (
            one.network._peers[other.id].link._socket.get_extra_info("ssl_object") for one, other in ((a, b), (b, a))
        )
        assert fingerprint_of(dialed.getpeercert(binary_form=True)) == b.network._tls.fingerprint
        assert a.network._tls.binding(dialed, dialed=True) == b.network._tls.binding(accepted, dialed=False)
    assert not list(tmp_path.iterdir())


@on_both_loops
async def test_nodes_without_tls_get_a_link():
    async with nodes(2, tls=False) as (a, b):
        a.knows(b)
        assert await a.network.call(b.id, Ask("x"), 3.0)
        assert a.network._peers[b.id].link._socket.get_extra_info("ssl_object") is None


def test_connection_without_tls_has_no_binding_where_links_have_it():
    for dialed in (True, False):
        with pytest.raises(RemoteProtocolError, match="without TLS"):
            TLS.binding(None, dialed=dialed)


def test_node_with_an_aiohttp_that_would_dial_without_tls_says_so_and_does_not_start(monkeypatch):
    monkeypatch.delattr(aiohttp.TCPConnector, "_create_connection")
    with pytest.raises(Unavailable, match="links cannot have TLS with it: install one"):
        Node()
    Node(tls=False)


# ---- a man in the middle


@on_both_loops
async def test_man_in_the_middle_who_passes_all_on_is_refused_by_both_ends_and_told(caplog):
    async with nodes(2) as (a, b), man_in_the_middle(b.network.port) as port:
        with pytest.raises(RemoteProtocolError, match="another TLS at its end") as caught:
            await a.network.greet("127.0.0.1", port)
        assert caught.value.detail["their_reason"] == "channel"
        await until(lambda: b.network.counters["refused"] == 1)
        assert a.network.counters["refused"] == 1
        assert not a.network.peers()
        assert not b.network.peers()
        await until(lambda: len(told(caplog, logging.WARNING, "another TLS at its end")) == 1)


@on_both_loops
async def test_man_in_the_middle_who_keeps_what_the_listener_says_of_him_to_himself_is_refused_by_the_dialer():
    def change(data, to):
        hello = decode(data)
        if to == "listener" and isinstance(hello, Hello):
            return encode(msgspec.structs.replace(hello, channel=fingerprints[0]))
        return data

    fingerprints = []
    async with nodes(2) as (a, b), man_in_the_middle(b.network.port, change) as port:
        fingerprints.append(b.network._tls.fingerprint)
        with pytest.raises(RemoteProtocolError, match="another TLS at its end") as caught:
            await a.network.greet("127.0.0.1", port)
        assert caught.value.detail["reason"] == "channel"
        await until(lambda: b.network.counters["refused"] == 1)
        assert not a.network.peers()
        assert not b.network.peers()


def liar(dialers, listeners):
    """Changes each Hello so that it names the certificate that its reader expects."""

    def change(data, to):
        message = decode(data)
        if not isinstance(message, Hello):
            return data
        return encode(msgspec.structs.replace(message, channel=dialers if to == "dialer" else listeners()))

    return change


@on_both_loops
async def test_man_in_the_middle_who_changes_what_is_said_of_the_channel_is_refused_by_both_ends(caplog):
    async with nodes(2) as (a, b):
        change = liar(TLS.fingerprint, lambda: b.network._tls.fingerprint)
        async with man_in_the_middle(b.network.port, change) as port:
            with pytest.raises(RemoteProtocolError, match="somebody on the way changes") as caught:
                await a.network.greet("127.0.0.1", port)
            assert caught.value.detail["their_reason"] == "wrong_key"
            await until(lambda: b.network.counters["refused"] == 1)
            assert a.network.counters["refused"] == 1
            assert not a.network.peers()
            assert not b.network.peers()
            await until(lambda: told(caplog, logging.WARNING, "somebody on the way changes"))


@on_both_loops
async def test_without_the_binding_the_man_in_the_middle_is_let_in(monkeypatch):
    """A planted bug: what the tests above do is refused for nothing else."""
    monkeypatch.setattr(LinkTls, "binding", lambda self, channel, *, dialed: b"")
    async with nodes(2) as (a, b), man_in_the_middle(b.network.port) as port:
        await a.network.greet("127.0.0.1", port)
        assert await a.network.call(b.id, Ask("x"), 3.0)


# ---- who speaks clear text, or another TLS


@pytest.mark.parametrize("tls", [True, False])
@on_both_loops
async def test_dialer_of_another_link_tls_is_refused_and_both_are_told(caplog, tls):
    async with pair(tls=tls) as (a, b):
        with pytest.raises(RemoteProtocolError, match="link_tls alike on all nodes") as caught:
            await a.network.greet("127.0.0.1", b.network.port)
        assert caught.value.detail["reason"] == "link_tls"
        words = ("clear text", "link_tls = true") if tls else ("have TLS", "link_tls = false")
        assert all(word in caught.value.message for word in words)
        assert a.network.counters["refused"] == b.network.counters["refused"] == 1
        assert b.network.counters["garbage"] == 0
        (line,) = told(caplog, logging.WARNING, "set link_tls alike")
        assert ("begins TLS" if tls else "speaks clear text") in line.getMessage()
        assert not a.network.peers()
        assert not b.network.peers()


@pytest.mark.parametrize("tls", [True, False])
@on_both_loops
async def test_node_of_another_link_tls_that_is_dialled_again_and_again_is_told_once(caplog, tls):
    async with pair(tls=tls) as (a, b):
        a.knows(b)
        await until(lambda: b.network.counters["refused"] >= 3)
        lines = [r.getMessage() for r in told(caplog, logging.WARNING, "set link_tls alike")]
        assert len([line for line in lines if f"node {b.id.hex()}" in line]) == 1
        assert len([line for line in lines if "no link with 127.0.0.1:" in line]) == 1
        with pytest.raises(Unavailable, match="set link_tls alike"):
            await a.network.call(b.id, Ask("x"), 1.0)


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", bytes(50)])
@on_both_loops
async def test_stranger_that_speaks_clear_text_is_answered_counted_and_told_once(caplog, begin):
    caplog.set_level(logging.INFO)
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
            writer.write(begin)
            async with asyncio.timeout(5):
                assert b" 426 " in await reader.read()
            writer.close()
        assert (b.network.counters["garbage"], b.network.counters["refused"]) == (3, 0)
        assert len(told(caplog, logging.INFO, "it speaks clear text")) == 1
        assert not told(caplog, logging.WARNING, "")
        assert await a.network.call(b.id, Ask("still"), 3.0)


@on_both_loops
async def test_stranger_with_older_tls_or_garbage_in_its_place_is_counted_and_told(caplog):
    caplog.set_level(logging.INFO)
    older = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    older.check_hostname, older.verify_mode = False, ssl.CERT_NONE
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    async with nodes(1) as (b,):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", b.network.port, ssl=older)
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        writer.write(b"\x16" + bytes(200))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        await until(lambda: b.network.counters["garbage"] == 2)
        assert len(told(caplog, logging.INFO, "its TLS failed")) == 1


@on_both_loops
async def test_health_check_that_connects_and_goes_is_nothing(caplog):
    caplog.set_level(logging.INFO)
    async with nodes(1) as (b,):
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
            writer.close()
            await writer.wait_closed()
        await until(lambda: not b.network._entrance._tasks)
        assert (b.network.counters["garbage"], b.network.counters["refused"]) == (0, 0)
        assert not told(caplog, logging.INFO, "")


# ---- what is under way


@pytest.mark.parametrize("begin", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
@on_both_loops
async def test_connection_that_does_not_go_on_is_turned_out(monkeypatch, begin):
    async with nodes(2) as (a, b):
        a.knows(b)
        await a.network.call(b.id, Ask("x"), 3.0)
        monkeypatch.setattr(strangers, "STRANGER_S", 0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        writer.write(begin)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                assert await reader.read() == b""
        writer.close()
        await until(lambda: b.network.counters["refused"] == 1)
        assert a.network.alive(b.id)


@on_both_loops
async def test_host_that_floods_the_port_before_tls_keeps_no_other_one_out(monkeypatch):
    monkeypatch.setattr(strangers, "STRANGERS_MAX", 4)
    monkeypatch.setattr(strangers, "STRANGER_S", 60.0)
    async with nodes(1) as (b,), contextlib.AsyncExitStack() as flood:
        readers = []
        for _ in range(6):
            reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port, local_addr=("127.0.0.9", 0))
            flood.callback(writer.close)
            readers.append(reader)
        await until(lambda: b.network.counters["refused"] == 2)
        a = await Node().start()
        try:
            a.knows(b)
            assert await a.network.call(b.id, Ask("x"), 5.0)
        finally:
            await a.network.stop()
        async with asyncio.timeout(5):
            assert await readers[0].read() == b"", "the oldest of them made room"


@on_both_loops
async def test_strangers_that_end_tls_and_ask_for_nothing_count_as_well(monkeypatch):
    monkeypatch.setattr(strangers, "STRANGERS_MAX", 4)
    monkeypatch.setattr(strangers, "STRANGER_S", 60.0)
    async with nodes(1) as (b,), contextlib.AsyncExitStack() as flood:
        held = []
        for number in range(6):
            try:
                held.append(await asyncio.open_connection("127.0.0.1", b.network.port, ssl=TLS.dialing))
            except ConnectionError:
                assert number >= 4
            else:
                flood.callback(held[-1][1].transport.abort)
        assert len(held) == 4
        assert b.network.counters["refused"] == 2


@on_both_loops
async def test_time_that_a_stranger_takes_for_tls_is_part_of_his_time(monkeypatch):
    monkeypatch.setattr(strangers, "STRANGER_S", 1.0)
    async with nodes(1) as (b,):
        began_s = asyncio.get_running_loop().time()
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        await asyncio.sleep(0.7)
        await writer.start_tls(TLS.dialing)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                assert await reader.read() == b""
        writer.transport.abort()
        assert asyncio.get_running_loop().time() - began_s < 1.5


@on_both_loops
async def test_many_that_dial_at_once_wait_for_their_turn_and_none_is_sent_away(monkeypatch):
    monkeypatch.setattr(strangers, "HANDSHAKES_MAX", 2)
    async with nodes(13) as (b, *others):
        for other in others:
            other.knows(b)
        await until(lambda: b.network.counters["links"] == len(others))
        assert [other.network.counters["dials"] for other in others] == [1] * len(others)
        assert (b.network.counters["refused"], b.network.counters["garbage"]) == (0, 0)
        assert not b.network._strangers._at_work._guests
        assert not b.network._strangers._all._guests


@on_both_loops
async def test_connection_has_one_turn(monkeypatch):
    async with nodes(1) as (b,):
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port, ssl=TLS.dialing)
        for status in (b" 400 ", b" 503 "):
            writer.write(f"GET {entrance.LINK_PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert status in head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.transport.abort()


@on_both_loops
async def test_who_left_before_his_turn_is_not_served(monkeypatch):
    monkeypatch.setattr(strangers, "HANDSHAKES_MAX", 1)
    monkeypatch.setattr(strangers, "STRANGER_S", 60.0)
    made = []
    comes = strangers.Strangers.comes
    monkeypatch.setattr(strangers.Strangers, "comes", lambda *given: (made.append(given), comes(*given)))
    async with nodes(1) as (b,):
        _reader, first = await asyncio.open_connection("127.0.0.1", b.network.port, ssl=TLS.dialing)
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.open_connection("127.0.0.1", b.network.port, ssl=TLS.dialing)
        assert len(b.network._entrance._tasks) == 3
        first.transport.abort()
        await until(lambda: not b.network._entrance._tasks)
        assert len(made) == 1


@on_both_loops
async def test_dial_given_up_within_tls_lets_go_of_its_connection():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(5)
        async with nodes(1) as (a,):
            with pytest.raises(Unavailable, match="does not answer"):
                await a.network._connect(("127.0.0.1", mute.getsockname()[1]), None, 0.2)
            end, _ = await asyncio.to_thread(mute.accept)
            with end, contextlib.suppress(ConnectionResetError):
                end.settimeout(5)
                while await asyncio.to_thread(end.recv, 4096):
                    pass


@on_both_loops
async def test_peer_that_ends_the_connection_within_tls_is_named():
    async def hang_up(reader, writer):
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with nodes(1) as (a,):
        with pytest.raises(Unavailable, match="cannot be reached: it ended the connection within TLS"):
            await a.network.greet("127.0.0.1", server.sockets[0].getsockname()[1])
    server.close()


@on_both_loops
async def test_dial_of_a_peer_that_takes_the_connection_and_ends_it_at_once_fails_at_once(monkeypatch):
    """As one does that has no room; uvloop begins TLS on a connection that is closed, and nobody hears of it."""
    create = aiohttp.TCPConnector._create_connection

    async def connected_and_ended(*given):
        protocol = await create(*given)
        await until(lambda: protocol.transport is None or protocol.transport.is_closing())
        return protocol

    async def hang_up(reader, writer):
        writer.close()

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", connected_and_ended)
    failed = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.append(context))
    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with nodes(1) as (a,), asyncio.timeout(2):
        with pytest.raises(Unavailable, match="cannot be reached: it ended the connection within TLS"):
            await a.network.greet("127.0.0.1", server.sockets[0].getsockname()[1])
    server.close()
    assert not failed


@on_both_loops
async def test_peer_that_sends_the_dialer_elsewhere_is_refused_and_nobody_else_is_asked():
    asked = []

    async def elsewhere(request):
        asked.append(request.path)
        raise aiohttp.web.HTTPFound(f"http://127.0.0.1:{request.url.port}/secret")

    app = aiohttp.web.Application()
    app.router.add_get("/{path:.*}", elsewhere)
    server = aiohttp.test_utils.TestServer(app, scheme="https")
    await server.start_server(ssl=TLS.listening)
    try:
        async with nodes(1) as (a,):
            with pytest.raises(RemoteProtocolError, match="sending this node to http"):
                await a.network.greet("127.0.0.1", server.port)
    finally:
        await server.close()
    assert asked == [entrance.LINK_PATH]


@on_both_loops
async def test_limit_of_a_dials_tcp_is_not_that_of_its_tls(monkeypatch):
    """Of whose round trip comes on top."""
    monkeypatch.setattr(dialing, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(links, "HANDSHAKE_TIMEOUT_S", 60.0)
    monkeypatch.setattr(strangers, "STRANGER_S", 60.0)

    async def late(writer, data):
        await asyncio.sleep(0.15)
        writer.write(data)

    async with nodes(2) as (a, b), way(b.network.port, there=late, back=late) as port:
        assert (await a.network.greet("127.0.0.1", port, 60.0)).node_id == b.id


@on_both_loops
async def test_port_closes_with_all_that_came_in_by_it():
    b = await Node().start()
    held = []
    for begin in (b"", b"\x16\x03\x01"):
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        writer.write(begin)
        held.append((reader, writer))
    await until(lambda: len(b.network._entrance._tasks) == 2)
    await b.network.stop()
    for reader, writer in held:
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                assert await reader.read() == b""
        writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", b.network.port)


@on_both_loops
async def test_many_large_calls_at_once_are_all_answered():
    async with nodes(2) as (a, b):
        a.knows(b)
        text = "z" * 300_000
        replies = await asyncio.gather(*(a.network.call(b.id, Ask(text), 60.0) for _ in range(40)))
        assert {len(reply.text) for reply in replies} == {300_000 + 44}
