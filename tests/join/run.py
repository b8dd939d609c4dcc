"""Nodes join three real daemons that hold many groups, under load in every tablet: what do the callers notice?

    make join-run INSTANCES=10000

A tablet's pause is the longest time that a call to one of its groups took, from its start to its end, while the node
joined and until every tablet had its replicas. The same is measured before the join: what is there without one is the
noise of the machine. A call that raises anything is a failed one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from dht.errors import DhtError
from dht.limits import TABLETS_PER_DOMAIN
from dht.model import Change, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key, tablet_of
from dht.wire.blocking import BlockingClient, SocketStore
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster

DATABASE = "d"
TABLE = 1
COUNTER, FILLING = 2, 3
QUIET_S = 4.0
JOIN_WAIT_S = 120.0


@dataclass
class Calls:
    """What one client met. `longest_s`: by tablet, since the last `reset`."""

    number: int = 0
    failed: list[str] = field(default_factory=list)
    longest_s: dict[int, float] = field(default_factory=dict)

    def reset(self) -> None:
        self.longest_s = {}


def group(number: int) -> bytes:
    return group_key(DATABASE, "f", (number,))


def write(store: BlockingStore, number: int, op: Op, columns: dict[int, int | str], guards: dict[int, int]) -> None:
    change = Change(op, TABLE, (number,), columns, guards)
    store.commit(Transaction(os.urandom(16), DATABASE, 0, (Part(group(number), None, (change,)),)))


class Clients:
    """`count` threads; each writes and reads groups of its own, tablet after tablet, through the given daemons."""

    def __init__(self, nodes: Sequence[LocalNode], groups: int, count: int) -> None:
        self.calls = [Calls() for _ in range(count)]
        self.values: list[dict[int, int]] = [{} for _ in range(count)]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(i, nodes[i % len(nodes)], range(i, groups, count)))
            for i in range(count)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def reset(self) -> None:
        for calls in self.calls:
            calls.reset()

    def pauses_s(self) -> dict[int, float]:
        """The longest call of each tablet."""
        longest: dict[int, float] = {}
        for calls in self.calls:
            for tablet, seconds in dict(calls.longest_s).items():
                longest[tablet] = max(seconds, longest.get(tablet, 0.0))
        return longest

    def _run(self, client: int, node: LocalNode, mine: range) -> None:
        calls, values, chance = self.calls[client], self.values[client], random.Random(client)
        by_tablet: dict[int, list[int]] = {}
        for number in mine:
            by_tablet.setdefault(tablet_of(group(number), TABLETS_PER_DOMAIN), []).append(number)
        with closing(BlockingClient(node.socket, 10.0)) as opened:
            store = SocketStore(opened)
            tablets = sorted(by_tablet)
            while not self._stop.is_set():
                chance.shuffle(tablets)
                for tablet in tablets:
                    self._call(store, calls, values, tablet, chance.choice(by_tablet[tablet]), chance.random() < 0.3)

    @staticmethod
    def _call(
        store: BlockingStore, calls: Calls, values: dict[int, int], tablet: int, number: int, reads: bool
    ) -> None:
        value = values.get(number, 0)
        began_s = time.monotonic()
        try:
            if reads:
                (found,) = store.read([group(number)])
                (row,) = (found.rows or {}).values()
                if decode_row(row)[COUNTER] != value:
                    calls.failed.append(f"group {number} is {decode_row(row)[COUNTER]}, not {value}")
            else:
                write(store, number, Op.UPDATE, {COUNTER: value + 1}, {COUNTER: value})
                values[number] = value + 1
        except (DhtError, ValueError) as error:
            calls.failed.append(f"{type(error).__name__}: {error}")
        took_s = time.monotonic() - began_s
        calls.number += 1
        calls.longest_s[tablet] = max(took_s, calls.longest_s.get(tablet, 0.0))


def fill(nodes: Sequence[LocalNode], groups: int) -> None:
    """Insert the groups, about 1 KiB each, through all daemons at once."""

    def some(node: LocalNode, numbers: range) -> None:
        with closing(BlockingClient(node.socket, 10.0)) as opened:
            store = SocketStore(opened)
            for number in numbers:
                write(store, number, Op.INSERT, {COUNTER: 0, FILLING: "x" * 900}, {})

    threads = [threading.Thread(target=some, args=(nodes[i % len(nodes)], range(i, groups, 12))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass
class Joined:
    """One join, as the callers saw it. `calls` and `failed` of the join alone; `sealed`: the daemons' own figures."""

    ready_s: float
    whole_s: float
    calls: int
    failed: list[str]
    pauses_s: dict[int, float]
    quiet_pauses_s: dict[int, float]
    sealed: list[str]


def spread(cluster: Cluster) -> bool:
    """Whether all daemons hold one roster with balanced tablets, every replica initialised."""
    statuses = [node.status() for node in cluster.nodes if node.pid]
    return all(
        s
        and s["members"] == len(statuses)
        and s["tablets"]["whole"] == sum(s["tablets"].values())
        and not s["to_copy"]
        and s["roster_epoch"] == statuses[0]["roster_epoch"]
        for s in statuses
    )


def join_one(cluster: Cluster, clients: Clients) -> Joined:
    clients.reset()
    time.sleep(QUIET_S)
    quiet = clients.pauses_s()
    before = sum(calls.number for calls in clients.calls), sum(len(calls.failed) for calls in clients.calls)
    clients.reset()
    began_s = time.monotonic()
    node = cluster.add()
    node.start()
    ready_s = time.monotonic() - began_s
    settled = 0
    while settled < 3:
        time.sleep(0.5)
        settled = settled + 1 if spread(cluster) else 0
        if time.monotonic() - began_s > JOIN_WAIT_S:
            raise AssertionError(f"not whole {JOIN_WAIT_S:.0f} s after the join: {node.log_tail()}")
    whole_s = time.monotonic() - began_s
    failed = [text for calls in clients.calls for text in calls.failed][before[1] :]
    number = sum(calls.number for calls in clients.calls) - before[0]
    sealed = [f"daemon {n.number}: {n.status().get('counters', {}).get('domain')}" for n in cluster.nodes]
    return Joined(ready_s, whole_s, number, failed, clients.pauses_s(), quiet, sealed)


def run(logs: Path, groups: int, joins: int, count: int) -> list[Joined]:
    """One after another; afterwards every group has what its client wrote last, through every daemon."""
    with Cluster(logs, nodes=3) as cluster, ExitStack() as stack:
        cluster.nodes[0].store().create_database(DATABASE)
        cluster.nodes[0].close_clients()
        fill(cluster.nodes, groups)
        clients = stack.enter_context(Clients(cluster.nodes, groups, count))
        joined = [join_one(cluster, clients) for _ in range(joins)]
        clients.__exit__()
        values: dict[int, int] = {}
        for of in clients.values:
            values.update(of)
        with closing(BlockingClient(cluster.nodes[-1].socket, 10.0)) as opened:
            for number, value in values.items():
                (found,) = SocketStore(opened).read([group(number)])
                (row,) = (found.rows or {}).values()
                assert decode_row(row)[COUNTER] == value, f"group {number}"
        return joined


def main() -> None:
    parser = argparse.ArgumentParser(description="Join nodes under load and measure what callers notice.")
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--joins", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as logs:
        joined = run(Path(logs), chosen.groups, chosen.joins, chosen.clients)
    failed = 0
    for number, one in enumerate(joined, 4):
        worst = max(one.pauses_s, key=lambda t: one.pauses_s[t])
        ordered = sorted(one.pauses_s.values())
        failed += len(one.failed)
        print(
            f"node {number} joins {chosen.groups} groups: ready after {one.ready_s:.2f} s, all tablets whole after "
            f"{one.whole_s:.1f} s; {one.calls} calls, {len(one.failed)} failed; longest pause of a tablet "
            f"{one.pauses_s[worst] * 1000:.0f} ms (tablet {worst}; median of the {len(ordered)} tablets "
            f"{ordered[len(ordered) // 2] * 1000:.0f} ms); without a join "
            f"{max(one.quiet_pauses_s.values()) * 1000:.0f} ms"
        )
        for text in [*one.sealed, *one.failed[:5]]:
            print(f"  {text}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
