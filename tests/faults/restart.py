"""How long a daemon with thousands of instances takes from its start to its first write: one of three, then all three.

    python -m tests.faults.restart --groups 10000

Prints seconds of the clock and of the processor. Groups are of the size of an instance with all that belongs to it.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import os
import random
import tempfile
import time
from pathlib import Path

from dht.errors import DhtError
from dht.model import Change, Op, Part, Transaction
from dht.requests import Commit
from dht.rows import group_key
from dht.wire.local import AsyncClient
from lucd.demo.daemons import LocalNode
from tests.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
DATABASE = "restart"
IN_FLIGHT = 24
SERVED_WAIT_S = 60.0
ROWS = {1: 45, 2: 6, 3: 4}
"""Table -> columns, of the single rows: instance, extra, info cache. Beside them 22 rows of metadata."""


def instance(number: int) -> Transaction:
    """The insert of one instance: 25 rows, some 9 KB."""
    chance = random.Random(number)
    changes = [
        Change(Op.INSERT, table, (number,), {c: chance.randbytes(8).hex() for c in range(columns)})
        for table, columns in ROWS.items()
    ]
    changes[1].columns[99] = chance.randbytes(1200).hex()
    changes[2].columns[99] = chance.randbytes(1500).hex()
    changes += [Change(Op.INSERT, 4, (number, i), {0: number, 1: f"key{i}", 2: f"value {i}"}) for i in range(22)]
    part = Part(group_key(DATABASE, "instance", (number,)), None, tuple(changes))
    return Transaction(os.urandom(16), DATABASE, 0, (part,))


async def fill(nodes: list[LocalNode], groups: int) -> None:
    """Insert the instances through all daemons at once."""
    clients = [AsyncClient(node.socket) for node in nodes]
    numbers = iter(range(groups))

    async def work(client: AsyncClient) -> None:
        for number in numbers:
            await client.call(Commit(instance(number)), 30.0)

    await asyncio.gather(*(work(clients[i % len(clients)]) for i in range(IN_FLIGHT)))
    for client in clients:
        await client.close()


def until_served(node: LocalNode, number: int, began_s: float) -> float:
    """Seconds from then until the daemon has a write of its client acknowledged."""
    part = Part(group_key(DATABASE, "instance", (number,)), None, (Change(Op.UPDATE, 1, (number,), {0: "again"}),))
    store = node.store(2.0)
    while time.monotonic() - began_s < SERVED_WAIT_S:
        try:
            store.commit(Transaction(os.urandom(16), DATABASE, 0, (part,)))
        except DhtError:
            time.sleep(0.01)
            continue
        return time.monotonic() - began_s
    raise AssertionError(f"daemon {node.number} served nothing for {SERVED_WAIT_S:.0f} s: {node.log_tail()}")


def processor_s(node: LocalNode) -> float:
    """What the process has used so far."""
    fields = Path(f"/proc/{node.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def restart_one(node: LocalNode) -> tuple[float, float]:
    """kill -9 and start: (seconds until it serves, of the processor by then)."""
    node.kill()
    node.close_clients()
    began_s = time.monotonic()
    node.start(wait_ready=False)
    return until_served(node, 7, began_s), processor_s(node)


def restart_all(nodes: list[LocalNode]) -> list[float]:
    """All at once: for each, the seconds until it serves."""
    for node in nodes:
        node.kill()
        node.close_clients()
    began_s = time.monotonic()
    for node in nodes:
        node.start(wait_ready=False)
    return [until_served(node, 11 + node.number, began_s) for node in nodes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10_000)
    given = parser.parse_args()
    # As pip leaves an installed lucd; an environment that writes no bytecode would compile 100 modules at each start.
    for package in ("dht", "lucd", "nova_bridge"):
        compileall.compile_dir(ROOT / package, quiet=1)
    with tempfile.TemporaryDirectory() as logs, Cluster(Path(logs), nodes=3) as cluster:
        cluster.nodes[0].store().create_database(DATABASE)
        began_s = time.monotonic()
        asyncio.run(fill(cluster.nodes, given.groups))
        size = sum(file.stat().st_size for file in cluster.nodes[0].data_dir.iterdir() if file.is_file())
        print(f"{given.groups} groups in {time.monotonic() - began_s:.1f} s, {size / 1e6:.0f} MB a daemon", flush=True)
        for node in cluster.nodes:
            clock_s, used_s = restart_one(node)
            print(f"daemon {node.number} restarted: serves after {clock_s:.2f} s ({used_s:.2f} of the processor)")
            cluster.wait_whole()
        print("all restarted: serve after " + ", ".join(f"{s:.2f}" for s in restart_all(cluster.nodes)) + " s")


if __name__ == "__main__":
    main()
