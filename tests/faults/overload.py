"""More work than three daemons can do: what they still do, how long it takes, what they refuse, what memory it costs.

    python -m tests.faults.overload --seconds 5   # more and more clients, a flood, a stopped peer
    python -m tests.faults.overload --soak 60      # minutes of steady load, and the memory of each daemon

Each client has a connection and one request at a time: an update of a row of its own, or a read of it, by turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dht.errors import DhtError
from dht.model import Change, Op, Part, Transaction
from dht.requests import Commit, ReadGroups
from dht.rows import group_key
from dht.wire.local import IN_FLIGHT_REQUESTS_MAX, AsyncClient
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster

DATABASE = "overload"
TIMEOUT_S = 5.0


def key_of(row: int) -> bytes:
    return group_key(DATABASE, "f", (row,))


def change(row: int, op: Op, value: int) -> Commit:
    columns = {0: value, 1: "x" * 400}
    return Commit(
        Transaction(os.urandom(16), DATABASE, 0, (Part(key_of(row), None, (Change(op, 1, (row,), columns),)),))
    )


@dataclass
class Seen:
    """What clients met in a while."""

    seconds: float = 0.0
    took_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return len(self.took_s) / self.seconds

    def line(self) -> str:
        took = sorted(self.took_s) or [0.0]
        p50, p99 = (took[int(len(took) * part)] * 1000 for part in (0.5, 0.99))
        refused = f", errors {dict(self.errors)}" if self.errors else ""
        return f"{self.rate:.0f} requests/s, p50 {p50:.1f}, p99 {p99:.1f}, longest {took[-1] * 1000:.0f} ms{refused}"


async def client(node: LocalNode, row: int, end_s: float, seen: Seen) -> None:
    """One request after the other until then."""
    door = AsyncClient(node.socket)
    turn = 0
    while (began_s := time.monotonic()) < end_s:
        turn += 1
        message = change(row, Op.UPDATE, turn) if turn % 2 else ReadGroups((key_of(row),), (None,))
        try:
            await door.call(message, TIMEOUT_S)
        except DhtError as error:
            seen.errors[type(error).__name__] += 1
            await asyncio.sleep(0.01)
        else:
            seen.took_s.append(time.monotonic() - began_s)
    await door.close()


async def load(nodes: Sequence[LocalNode], clients: int, seconds: float) -> Seen:
    """So many clients, spread over the daemons."""
    seen = Seen()
    began_s = time.monotonic()
    await asyncio.gather(*(client(nodes[i % len(nodes)], i, began_s + seconds, seen) for i in range(clients)))
    seen.seconds = time.monotonic() - began_s
    return seen


async def flood(node: LocalNode, seconds: float) -> Seen:
    """One connection that keeps as many requests in flight as it may."""
    seen, end_s = Seen(seconds), time.monotonic() + seconds
    door = AsyncClient(node.socket)

    async def one(row: int) -> None:
        while (began_s := time.monotonic()) < end_s:
            try:
                await door.call(change(row, Op.UPDATE, 1), TIMEOUT_S)
                seen.took_s.append(time.monotonic() - began_s)
            except DhtError as error:
                seen.errors[type(error).__name__] += 1
                await asyncio.sleep(0.01)

    await asyncio.gather(*(one(row) for row in range(1, IN_FLIGHT_REQUESTS_MAX)))
    await door.close()
    return seen


def memory_mb(node: LocalNode) -> float:
    """Resident memory of the process."""
    pages = int(Path(f"/proc/{node.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(nodes: Sequence[LocalNode]) -> str:
    return ", ".join(f"{memory_mb(node):.0f}" for node in nodes) + " MB"


async def fill(node: LocalNode, rows: int) -> None:
    door = AsyncClient(node.socket)
    for row in range(rows):
        await door.call(change(row, Op.INSERT, 0), 30.0)
    await door.close()


async def measure(nodes: Sequence[LocalNode], seconds: float, most: int) -> None:
    await fill(nodes[0], max(most, IN_FLIGHT_REQUESTS_MAX))
    await load(nodes, 4, 1.0)
    clients = 3
    while clients <= most:
        seen = await load(nodes, clients, seconds)
        print(f"{clients} clients: {seen.line()}; memory {memory(nodes)}", flush=True)
        clients *= 2
    alone = await load(nodes[:1], 1, seconds)
    print(f"one client alone: {alone.line()}", flush=True)
    flooding, beside = await asyncio.gather(flood(nodes[0], seconds), load(nodes[:1], 1, seconds))
    print(
        f"beside one connection with {IN_FLIGHT_REQUESTS_MAX} in flight: {beside.line()}; the flood: {flooding.line()}"
    )
    whole = await load(nodes[:2], 12, seconds)
    nodes[2].pause()
    try:
        stopped = await load(nodes[:2], 12, max(seconds, 5.0))
        text = f"12 clients of two daemons: {whole.line()}; while the third is stopped: {stopped.line()}"
        print(f"{text}; memory {memory(nodes[:2])}", flush=True)
    finally:
        nodes[2].resume()
    for node in nodes:
        counters = node.status()["counters"]
        print(f"daemon {node.number}: turnstile {counters['turnstile']}, shed {counters['links']['shed']}")


async def soak(nodes: Sequence[LocalNode], minutes: float) -> None:
    await fill(nodes[0], 48)
    print(f"at the start: memory {memory(nodes)}", flush=True)
    end_s = time.monotonic() + 60 * minutes
    while time.monotonic() < end_s:
        seen = await load(nodes, 24, min(30.0, end_s - time.monotonic() + 0.1))
        left_min = (end_s - time.monotonic()) / 60
        print(f"{left_min:5.1f} min left: {seen.line()}; memory {memory(nodes)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=192, help="the most")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of steady load instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as logs, Cluster(Path(logs), nodes=3) as cluster:
        cluster.nodes[0].store().create_database(DATABASE)
        if given.soak:
            asyncio.run(soak(cluster.nodes, given.soak))
        else:
            asyncio.run(measure(cluster.nodes, given.seconds, given.clients))


if __name__ == "__main__":
    main()
