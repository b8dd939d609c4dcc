"""The WAN of the tests does what it is told: otherwise what is measured on it is worth nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lucd.demo.wan.router import NETWORK, WAITING_PACKETS_MAX, Router
from lucd.demo.wan.sites import Wan, why_not
from tests.laboratory import wait_until

ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 7))
print("open", flush=True)
while True:
    data, who = s.recvfrom(2000)
    s.sendto(data, who)
"""
ASK = """
import json, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(float(sys.argv[3]))
times, order = [], []
for n in range(int(sys.argv[2])):
    began = time.monotonic()
    s.sendto(b"%d" % n, (sys.argv[1], 7))
    try:
        order.append(int(s.recv(2000)))
        times.append((time.monotonic() - began) * 1000)
    except TimeoutError:
        pass
print(json.dumps([times, order]))
"""


@pytest.fixture(scope="module")
def wan() -> Iterator[Wan]:
    if reason := why_not():
        pytest.skip(reason)
    with Wan(3) as made:
        yield made


@contextmanager
def echo(wan: Wan, site: int) -> Iterator[None]:
    command = [*wan.enter(site), sys.executable, "-c", ECHO, wan.address(site)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield
        process.kill()


def ask(wan: Wan, site: int, other: int, count: int, timeout_s: float) -> list[float]:
    """Round trips of those that came back, in milliseconds."""
    command = [*wan.enter(site), sys.executable, "-c", ASK, wan.address(other), str(count), str(timeout_s)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    times, order = json.loads(done.stdout)
    assert order == sorted(order)
    return list(times)


def test_round_trip_is_what_was_ordered_for_the_pair_and_no_other(wan: Wan) -> None:
    wan.between([0, 1], 200.0)
    with echo(wan, 1):
        far, near = ask(wan, 0, 1, 10, 30.0), ask(wan, 2, 1, 10, 30.0)
        itself = ask(wan, 1, 1, 10, 30.0)
    assert len(far) == len(near) == len(itself) == 10
    # It may be late on a busy machine, never early.
    assert 200.0 <= min(far) < 300.0
    assert min(near) < 100.0
    assert min(itself) < 100.0


def test_cut_loses_everything_and_heal_brings_it_back(wan: Wan) -> None:
    wan.between(range(3), 1.0)
    with echo(wan, 1):
        wan.cut([0], [1, 2])
        before = wan.traffic()
        assert ask(wan, 0, 1, 3, 0.1) == []
        wait_until(lambda: (wan.traffic() - before).lost == 3, 30.0, "what is lost is not counted")
        assert len(ask(wan, 2, 1, 3, 30.0)) == 3
        wan.heal()
        assert len(ask(wan, 0, 1, 3, 30.0)) == 3


def test_one_way_cut_loses_the_replies_and_carries_the_requests(wan: Wan) -> None:
    wan.between(range(3), 1.0)
    with echo(wan, 1):
        wan.cut([1], [0], one_way=True)
        before = wan.traffic(0)
        assert ask(wan, 0, 1, 3, 0.1) == []

        def seen() -> tuple[int, int]:
            traffic = wan.traffic(0) - before
            return traffic.packets, traffic.lost

        wait_until(lambda: seen() == (3, 3), 30.0, "not the requests are carried and the replies lost")
        wan.heal()


def test_traffic_counts_what_crosses_and_not_what_stays_within_a_site(wan: Wan) -> None:
    wan.between(range(3), 1.0)
    with echo(wan, 1):
        before = wan.traffic()
        ask(wan, 1, 1, 5, 30.0)
        assert (wan.traffic() - before).packets == 0
        ask(wan, 0, 1, 5, 30.0)
        assert (wan.traffic() - before).packets == 10
        assert (wan.traffic(2) - before).packets <= 0


def test_connection_is_made_inside_a_site_and_the_thread_comes_out_again(wan: Wan) -> None:
    serve = "import socket; s = socket.create_server(('127.0.0.1', 7777)); print('open', flush=True); s.accept()"
    home = Path("/proc/thread-self/ns/net").readlink()
    with subprocess.Popen([*wan.enter(1), sys.executable, "-c", serve], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(ConnectionRefusedError):
            wan.sites[0].connect("127.0.0.1", 7777, 30.0)
        assert Path("/proc/thread-self/ns/net").readlink() == home
        with wan.sites[1].connect("127.0.0.1", 7777, 30.0):
            assert process.wait(30.0) == 0
    assert Path("/proc/thread-self/ns/net").readlink() == home


def packet(to: int, size: int = 60) -> bytes:
    head = bytearray(size)
    head[0] = 0x45
    head[16:20] = NETWORK + bytes((to, 1))
    return bytes(head)


class Sunk(Router):
    """A router whose packets stay in it. `due`: when each leaves, in the order in which they came."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__([3, 4], None, seed)  # type: ignore[arg-type]

    def due(self) -> list[float]:
        return [due_s for due_s, _, _, _ in sorted(self._waiting, key=lambda one: one[1])]


def test_jitter_delays_within_its_bound_and_keeps_the_order() -> None:
    router = Sunk()
    router.order({"ways": [[0, 1]], "set": {"delay_s": 0.01, "jitter_s": 0.005}})
    for n in range(1000):
        router.send(0, packet(1), n * 0.0001)
    due = router.due()
    late = [due_s - n * 0.0001 - 0.01 for n, due_s in enumerate(due)]
    assert due == sorted(due)
    assert min(late) >= 0.0
    assert 0.004 < max(late) <= 0.005


def test_loss_takes_its_share_and_is_counted() -> None:
    router = Sunk(seed=random.Random(7).getrandbits(32))
    router.order({"ways": [[0, 1]], "set": {"loss": 0.1}})
    for _ in range(10_000):
        router.send(0, packet(1), 0.0)
    way = router.ways[0, 1]
    assert way.packets + way.lost == 10_000
    assert 850 < way.lost < 1150
    assert way.bytes == way.packets * 60


def test_packets_for_nobody_are_counted_and_dropped() -> None:
    router = Sunk()
    for stray in (b"", b"\x60" + bytes(59), packet(7), packet(0), packet(1)[:19], bytes(60)):
        router.send(0, stray, 0.0)
    assert router.stray == 6
    assert not router.due()


def test_line_drops_what_exceeds_its_queue() -> None:
    router = Sunk()
    for _ in range(WAITING_PACKETS_MAX + 5):
        router.send(0, packet(1), 0.0)
    assert router.ways[0, 1].lost == 5
