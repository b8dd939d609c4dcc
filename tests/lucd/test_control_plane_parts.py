"""Parts of the demo's control plane by themselves: how its failures are told, and that they leave nothing running."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dht.errors import Unavailable
from lucd.demo.plane.rest import ComputeApi
from lucd.demo.plane.site import ControlPlane


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: nova-api's end, and the client's."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        yield theirs, ours


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", b"no HTTP\r\n"])
def test_api_that_ends_in_the_midst_of_an_answer_is_unavailable(
    ends: tuple[socket.socket, socket.socket], said: bytes
) -> None:
    theirs, ours = ends
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    api = ComputeApi(1, dial=lambda host, port, timeout_s: ours)
    with pytest.raises(Unavailable, match="nova-api does not answer GET /servers"):
        api.ask("GET", "/servers")


@pytest.mark.parametrize("cause", [Unavailable("nova-manage failed"), KeyboardInterrupt()])
def test_sync_that_breaks_off_leaves_no_command_behind(cause: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Command:
        def start(self) -> None:
            done.append("started")

        def stop(self) -> None:
            done.append("stopped")

    def fails(*arguments: str) -> None:
        raise cause

    plane = ControlPlane.__new__(ControlPlane)
    plane.path = Path("/nowhere")
    monkeypatch.setattr(plane, "_manage", lambda module, *arguments, config: Command())
    monkeypatch.setattr(plane, "manage", fails)
    with pytest.raises(type(cause)):
        plane.sync("db", "sync")
    assert done == ["started", "stopped"]
