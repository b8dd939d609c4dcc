"""Small parts of the daemon: readiness, worker supervision, boot counters of peers, routing of local requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dht import requests
from dht.codec import Message
from dht.errors import Conflict, Invalid, NotFound, StorageError
from dht.model import Struct
from dht.register.places import FEW_POPS
from dht.requests import Store
from dht.storage.memory import MemoryDisk
from dht.wire.boots import BootBook
from dht.wire.local import Connection
from lucd import directory, messages, process, workers
from lucd.conf.settings import load
from lucd.daemon import Daemon
from lucd.door import Door
from lucd.notify import notify
from lucd.workers import WorkerSupervisor


def test_notify_sends_the_state_to_the_named_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(str(tmp_path / "n"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        notify("READY=1")
        assert door.recv(100) == b"READY=1"


def test_notify_without_a_manager_or_with_a_lost_one_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")


async def test_supervisor_starts_a_worker_again_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BACKOFF_MIN_S", 0.01)
    script = f"import os,pathlib,time; p=pathlib.Path({str(tmp_path)!r})/str(os.getpid()); p.touch(); time.sleep(60)"
    supervisor = WorkerSupervisor([sys.executable, "-S", "-c", script], 1)
    await supervisor.start()
    try:
        first = await one_more(tmp_path, set())
        os.kill(first, 9)
        second = await one_more(tmp_path, {first})
    finally:
        await supervisor.stop()
    assert supervisor.counters["starts"] == 2
    assert supervisor.counters["failures"] == 1
    assert supervisor.counters["running_now"] == 0
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


async def one_more(place: Path, known: set[int]) -> int:
    for _ in range(500):
        new = {int(name) for name in os.listdir(place)} - known
        if new:
            return new.pop()
        await asyncio.sleep(0.02)
    raise AssertionError("no process was started")


async def test_supervisor_backs_off_when_the_command_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BACKOFF_MIN_S", 10.0)
    supervisor = WorkerSupervisor(["/does/not/exist"], 2)
    await supervisor.start()
    async with asyncio.timeout(20.0):
        while supervisor.counters["failures"] < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert supervisor.counters == {"running_now": 0, "starts": 0, "failures": 2}
    await supervisor.stop()


async def test_boot_book_refuses_a_copied_or_rolled_back_directory_even_after_a_restart() -> None:
    disk = MemoryDisk()
    node, first, other = b"n" * 20, b"i" * 16, b"j" * 16
    book = BootBook(disk)
    book.accept(node, first, 3, b"start 3.")
    book.accept(node, first, 3, b"start 3.")
    book.accept(node, other, 1, b"start 1.")
    again = BootBook(disk)
    again.accept(node, first, 3, b"start 3.")
    for boot, start in ((2, b"start 2."), (3, b"a copy's")):
        with pytest.raises(Conflict, match="copied or rolled back"):
            again.accept(node, first, boot, start)
    again.accept(node, first, 4, b"start 4.")


class Recorder:
    """A store, a bus and a daemon that note what reached them."""

    def __init__(self) -> None:
        self.got: list[object] = []

    async def answer(self, connection: Connection | None, message: Message) -> Struct:
        self.got.append(("bus", message))
        return requests.Done()

    async def daemon(self, message: Message) -> Struct:
        self.got.append(("daemon", message))
        return requests.Done()

    async def list_databases(self, timeout_s: float | None = None) -> tuple[str, ...]:
        self.got.append("list")
        return ("a",)

    async def home(self, database: str) -> str:
        if database != "a":
            raise NotFound(f"no {database}")
        return "lyon"


def a_door(recorder: Recorder) -> Door:
    store: Store = recorder  # type: ignore[assignment]
    return Door(store, recorder, recorder.daemon, recorder.home)


async def test_door_routes_by_number() -> None:
    recorder = Recorder()
    door = a_door(recorder)
    nobody: Connection = None  # type: ignore[assignment]
    assert await door.answer(nobody, requests.ListDatabases()) == requests.ListDatabasesReply(("a",))
    assert await door.answer(nobody, messages.AskStatus()) == requests.Done()
    assert recorder.got == ["list", ("daemon", messages.AskStatus())]
    assert door.counters == {"listdatabases": 1, "askstatus": 1}


async def test_door_tells_the_home_of_a_database() -> None:
    nobody: Connection = None  # type: ignore[assignment]
    for name, home in {"a": "lyon", "b": ""}.items():
        assert await a_door(Recorder()).answer(nobody, requests.AskHome(name)) == requests.AskHomeReply(home)


async def test_door_refuses_what_is_not_for_it() -> None:
    nobody: Connection = None  # type: ignore[assignment]
    with pytest.raises(Invalid, match="not a request that a daemon's door serves"):
        await a_door(Recorder()).answer(nobody, requests.Done())
    with pytest.raises(Invalid, match="one for each key"):
        await a_door(Recorder()).answer(nobody, requests.ReadGroups((b"k",), ()))


async def test_daemon_that_cannot_become_ready_ends_with_the_error_and_not_as_if_asked_to_stop() -> None:
    async def failing() -> None:
        raise StorageError("the file is damaged")

    async def ready() -> None:
        return None

    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StorageError, match="damaged"):
        await process._first_of(failing(), never())
    assert await process._first_of(ready(), never()) is True
    assert await process._first_of(never(), ready()) is False


async def test_background_work_that_breaks_off_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("a bug")

    daemon = Daemon.__new__(Daemon)
    daemon._steps = contextlib.AsyncExitStack()
    daemon._spawn(broken())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await daemon._steps.aclose()
    assert "background work of the daemon broke off" in caplog.text


def daemon_in(tmp_path: Path) -> tuple[Daemon, directory.OpenDirectory]:
    """Not started."""
    config = tmp_path / "lucd.conf"
    config.write_text(f"[DEFAULT]\ndata_dir = {tmp_path}/data\nsocket_mode = 600\n")
    settings = load(config)
    directory.found(settings.data_dir)
    opened = directory.start(settings.data_dir, settings.pop)
    return Daemon(settings, opened), opened


async def test_daemon_needs_links_to_members_and_gateways_alone_and_its_door_makes_the_socket_with_its_mode(
    tmp_path: Path,
) -> None:
    """Before anybody can connect, that is."""
    daemon, opened = daemon_in(tmp_path)
    gateway, stranger = b"g" * 20, b"s" * 20
    daemon.pops._gateways["lyon"] = [gateway]
    assert (daemon.network.needed(gateway), daemon.network.needed(stranger)) == (True, False)
    await daemon.stop()
    opened.close()
    assert daemon._local.mode == 0o600


async def test_hints_are_kept_alive_where_there_are_many_pops_also_by_a_node_whose_clients_ask_for_none(
    tmp_path: Path,
) -> None:
    """It coordinates groups that others look for."""
    daemon, opened = daemon_in(tmp_path)
    asked = []
    for pops in (FEW_POPS, FEW_POPS + 1):
        newest = SimpleNamespace(members=[SimpleNamespace(pop=str(number)) for number in range(pops)] * 2)
        daemon.wide.domain.chain = SimpleNamespace(newest=newest)  # type: ignore[assignment]
        asked.append(daemon.hints._worth_it())
    assert asked == [False, True]
    await daemon.stop()
    opened.close()
