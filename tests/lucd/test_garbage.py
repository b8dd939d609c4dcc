"""Garbage at every door of a real daemon: counted, and nothing else."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, LocalNode
from tests.laboratory import wait_until

pytestmark = pytest.mark.cluster
LOTS = 10_000
AT_ONCE = 80
"""Datagrams that fit a daemon's buffer before it reads the first: what does not, the kernel drops and nobody counts."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    with Cluster(tmp_path_factory.mktemp("garbage"), nodes=1) as started:
        yield started.nodes[0]


def dropped(node: LocalNode) -> int:
    """Datagrams that the overlay dropped so far."""
    return sum(number for name, number in node.status()["counters"]["overlay"].items() if name.startswith("dropped"))


def test_ten_thousand_random_datagrams_are_counted(node: LocalNode) -> None:
    chance = random.Random(1)
    before = dropped(node)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for sent in range(AT_ONCE, LOTS + 1, AT_ONCE):
            for _ in range(AT_ONCE):
                sender.sendto(chance.randbytes(chance.randrange(1, 1400)), ("127.0.0.1", node.port))
            wait_until(lambda sent=sent: dropped(node) - before >= sent, 60.0, f"of {sent} some are not counted")  # type: ignore[misc]
    assert dropped(node) - before == LOTS
    assert node.get("/readyz")[0] == 200
    assert node.log_text().count("\n") < 20


def test_random_bytes_and_requests_at_the_link_port_are_counted(node: LocalNode) -> None:
    chance = random.Random(2)
    for number in range(200):
        with socket.create_connection(("127.0.0.1", node.port), timeout=5) as stranger:
            if number % 2:
                stranger.sendall(chance.randbytes(chance.randrange(1, 2000)) + b"\r\n\r\n")
            else:
                stranger.sendall(b"GET /link HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(OSError):
                stranger.shutdown(socket.SHUT_WR)
                stranger.recv(1000)
    links = node.status()["counters"]["links"]
    assert links["garbage"] >= 75
    assert links["refused"] >= 75, "who asks for a link in clear text is taken for a daemon without TLS"
    assert node.log_text().count("no link with 127.0.0.1: it speaks clear text") <= 4
    assert links["links"] == 0
    assert node.get("/readyz")[0] == 200
    assert "Traceback" not in node.log_text()


def test_random_frames_at_the_local_door_are_counted(node: LocalNode) -> None:
    chance = random.Random(3)
    before = node.status()["counters"]["local"]["garbage"]
    for _ in range(200):
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(node.socket))
            body = chance.randbytes(chance.randrange(1, 300))
            with contextlib.suppress(OSError):
                rude.sendall(len(body).to_bytes(4, "big") + body)
                rude.shutdown(socket.SHUT_WR)
                while rude.recv(1000):
                    pass
    assert node.status()["counters"]["local"]["garbage"] - before >= 150
    assert node.store().list_databases() == ()
    assert "Traceback" not in node.log_text()
