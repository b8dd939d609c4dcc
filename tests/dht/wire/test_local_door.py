"""The Unix socket's server and its asynchronous client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat

import pytest

from dht.errors import Conflict, DhtError, Indeterminate, Invalid, Unavailable
from dht.requests import CreateDatabase, Done, DropDatabase, ListDatabases, ListDatabasesReply, RaiseSequence
from dht.wire import frames, local
from dht.wire.blocking import BlockingClient
from dht.wire.local import AsyncClient, LocalDoor


class Answers:
    """Serves: a list with the connection's number of requests; waits for a DropDatabase until told."""

    def __init__(self):
        self.go_on = asyncio.Event()
        self.cancelled = 0
        self.waiting = 0
        self.closed = []

    async def __call__(self, connection, message):
        match message:
            case ListDatabases():
                connection.state["n"] = connection.state.get("n", 0) + 1
                if connection.state["n"] == 1:
                    connection.on_close.append(lambda: self.closed.append(connection.state["n"]))
                return ListDatabasesReply((str(connection.state["n"]), str(connection.peer_pid == os.getpid())))
            case CreateDatabase("conflict"):
                raise Conflict("guard", part=0, key=b"k", odd=object)
            case CreateDatabase("left"):
                return ListDatabasesReply((str(frames.time_left_s()),))
            case CreateDatabase(_):
                raise KeyError("bug")
            case DropDatabase():
                try:
                    self.waiting += 1
                    await self.go_on.wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
        return Done()


@contextlib.asynccontextmanager
async def door_and_client(path):
    answers = Answers()
    door = LocalDoor(path, answers)
    await door.start()
    client = AsyncClient(path)
    try:
        yield door, client, answers
    finally:
        await client.close()
        await door.stop()


async def soon(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true in 5 s")


async def test_connection_keeps_state_and_knows_its_process(socket_path):
    async with door_and_client(socket_path) as (_, client, answers):
        assert await client.call(ListDatabases()) == ListDatabasesReply(("1", "True"))
        assert await client.call(ListDatabases()) == ListDatabasesReply(("2", "True"))
        await client.close()
        await soon(lambda: answers.closed == [2])


async def test_socket_file_is_for_owner_and_group_and_goes_with_the_door(socket_path):
    async with door_and_client(socket_path):
        assert stat.S_IMODE(os.stat(socket_path).st_mode) == 0o660
    assert not os.listdir(os.path.dirname(socket_path))


async def test_stale_socket_file_is_replaced(socket_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(socket_path)
    async with door_and_client(socket_path) as (_, client, _):
        assert await client.call(ListDatabases())


async def test_live_socket_and_foreign_file_are_refused(socket_path, tmp_path):
    async with door_and_client(socket_path) as (_, client, answers):
        with pytest.raises(Invalid, match="another process serves"):
            await LocalDoor(socket_path, answers).start()
        assert await client.call(ListDatabases())
        file = tmp_path / "f"
        file.write_text("precious")
        with pytest.raises(Invalid, match="not a socket"):
            await LocalDoor(file, answers).start()
        with pytest.raises(Invalid, match="longer than"):
            await LocalDoor("/tmp/" + "x" * 200, answers).start()
        with pytest.raises(DhtError, match="cannot make the socket"):
            await LocalDoor(tmp_path / "no" / "s", answers).start()


async def test_errors_keep_their_class_and_detail(socket_path, caplog):
    async with door_and_client(socket_path) as (_, client, _):
        with pytest.raises(Conflict) as caught:
            await client.call(CreateDatabase("conflict"))
        assert caught.value.detail["part"] == 0
        assert caught.value.detail["key"] == b"k"
        assert not caplog.records
        with pytest.raises(DhtError, match="KeyError: 'bug'"):
            await client.call(CreateDatabase("bug"))
        assert len(caplog.records) == 1


async def test_request_knows_how_long_its_client_waits(socket_path):
    async with door_and_client(socket_path) as (_, client, _):
        reply = await client.call(CreateDatabase("left"), timeout_s=100.0)
        assert 90 < float(reply.names[0]) <= 100


async def test_request_over_its_deadline_is_cancelled(socket_path):
    async with door_and_client(socket_path) as (_, client, answers):
        with pytest.raises(Indeterminate):
            await client.call(DropDatabase("x"), timeout_s=0.1)
        await soon(lambda: answers.cancelled == 1)


async def test_client_that_disappears_has_its_requests_cancelled(socket_path):
    async with door_and_client(socket_path) as (door, client, answers):
        calls = [asyncio.ensure_future(client.call(DropDatabase("x"))) for _ in range(5)]
        await soon(lambda: answers.waiting == 5)
        await client.close()
        for call in calls:
            with pytest.raises(Indeterminate):
                await call
        await soon(lambda: answers.cancelled == 5)
        assert door.counters["connections"] == 0


async def test_requests_in_flight_are_bounded(socket_path, monkeypatch):
    monkeypatch.setattr(local, "IN_FLIGHT_REQUESTS_MAX", 3)
    async with door_and_client(socket_path) as (_, client, answers):
        calls = [asyncio.ensure_future(client.call(DropDatabase("x"))) for _ in range(5)]
        await soon(lambda: answers.waiting == 3)
        await soon(lambda: sum(call.done() for call in calls) == 2)
        assert [type(call.exception()) for call in calls if call.done()] == [Unavailable] * 2
        answers.go_on.set()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_connection_too_many_is_told_why_and_nothing_is_served(socket_path, monkeypatch):
    monkeypatch.setattr(local, "CONNECTIONS_MAX", 1)
    async with door_and_client(socket_path) as (door, client, _):
        await client.call(ListDatabases())
        other = BlockingClient(socket_path)
        for _ in range(2):
            with pytest.raises(Unavailable, match="connections to this daemon are open") as caught:
                await asyncio.to_thread(other.call, DropDatabase("x"))
            assert caught.value.detail["sent"] is False
        assert door.counters["refused"] == 2
        assert door.counters["requests"] == 1
        await soon(lambda: door.counters["connections"] == 1)
        await client.call(ListDatabases())
        await client.close()
        await soon(lambda: door.counters["connections"] == 0)
        assert await asyncio.to_thread(other.call, ListDatabases())
        other.close()


async def test_connection_too_many_that_asks_nothing_is_closed(socket_path, monkeypatch):
    monkeypatch.setattr(local, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(local, "REFUSED_WAIT_S", 0.05)
    async with door_and_client(socket_path) as (door, client, _):
        await client.call(ListDatabases())
        reader, writer = await asyncio.open_unix_connection(socket_path)
        assert await reader.read() == b""
        writer.close()
        monkeypatch.setattr(local, "REFUSED_CONNECTIONS_MAX", 0)
        monkeypatch.setattr(local, "REFUSED_WAIT_S", 60.0)
        reader, writer = await asyncio.open_unix_connection(socket_path)
        assert await reader.read() == b"", "those that wait for the refusal are bounded too"
        writer.close()
        assert door.counters["refused"] == 2
        await client.call(ListDatabases())


async def test_garbage_is_counted_and_nothing_else(socket_path, chance, caplog):
    async with door_and_client(socket_path) as (door, client, _):
        await client.call(ListDatabases())
        good = frames.encode_frame(1, 1000, RaiseSequence("db", "n", 5))
        for _ in range(10_000):
            data = bytearray(good if chance.random() < 0.5 else chance.randbytes(chance.randrange(4, 60)))
            data[chance.randrange(4)] = chance.randrange(256)
            data[chance.randrange(len(data))] = chance.randrange(256)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(socket_path)
                sock.send(data)
            await asyncio.sleep(0)
        await soon(lambda: door.counters["connections"] == 1)
        assert door.counters["garbage"] > 1_000
        assert await client.call(ListDatabases())
        assert not caplog.records


async def test_unknown_message_is_told_why_before_the_connection_ends(socket_path):
    async with door_and_client(socket_path) as (door, _, _):
        reader, writer = await asyncio.open_unix_connection(socket_path)
        body = b"\x93\x05\x64\x91\xcd\x7f\xff"
        writer.write(len(body).to_bytes(4, "big") + body)
        (reply,) = frames.FrameReader().feed(await reader.read())
        with pytest.raises(DhtError, match="not a message"):
            frames.read_reply(reply[2])
        writer.close()
        assert door.counters["garbage"] == 1


async def test_client_without_daemon_is_not_sent(socket_path):
    with pytest.raises(Unavailable) as caught:
        await AsyncClient(socket_path).call(ListDatabases(), timeout_s=0.5)
    assert caught.value.detail["sent"] is False


async def test_client_connects_again_after_a_restart(socket_path):
    async with door_and_client(socket_path) as (door, client, _):
        await client.call(ListDatabases())
        await door.stop()
        await door.start()
        await soon(lambda: client._protocol.transport is None)
        assert await client.call(ListDatabases())
