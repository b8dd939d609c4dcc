"""`make bench`: a boot's hot calls and the API's list of servers on lucd's two doors beside MariaDB, in one run.

    python -m tests.bench.run                       # with 20, with 1,000 and with 10,000 instances
    python -m tests.bench.run --instances 1000

Every call is repeated in rounds; in each round the peers take turns, so a machine that slows down slows all of them.
The table gives the median wall and the mean CPU milliseconds of one call (CPU: client and all servers), and the
ratios to MariaDB. Figures of one run on one machine: compare the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.calls import CALLS, LISTS
from tests.bench.mariadb import MariaDB
from tests.bench.peers import Lucd, Peer

SIZES = (20, 1000, 10_000)
"""Instances in the cell: hardly any, one full list of the API, a large cell."""
LIST_TIMES = 3
"""Repetitions of a list in a round: one takes as long as a hundred of the other calls."""
_TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


def cpu_ms(pid: int) -> float:
    """User and system time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_MS


@dataclass
class Client:
    """A child process on one peer, and what was measured there."""

    peer: Peer
    process: subprocess.Popen[str]
    walls: dict[str, list[float]] = field(default_factory=dict)
    cpus: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, peer: Peer) -> Client:
        command = [sys.executable, "-m", "tests.bench.child", peer.kind, peer.url]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        client = cls(peer, process)
        client._answer()
        return client

    def _answer(self) -> dict[str, object]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: the client of {self.peer.name} ended; see its error above")
        return dict(json.loads(line))

    def order(self, **what: object) -> dict[str, object]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def measure(self, call: str, times: int) -> None:
        before = sum(map(cpu_ms, self.peer.server_pids()))
        result = self.order(call=call, times=times)
        servers = sum(map(cpu_ms, self.peer.server_pids())) - before
        walls, client_cpu = result["wall_ms"], result["cpu_ms"]
        assert isinstance(walls, list)
        assert isinstance(client_cpu, float)
        self.walls.setdefault(call, []).extend(walls)
        self.cpus.setdefault(call, []).append((client_cpu + servers) / times)


def table(clients: list[Client]) -> list[str]:
    """Markdown rows: p50 wall and mean CPU per call and peer, ratio to the first peer."""
    base = clients[0]
    head = "| call |" + "".join(f" {c.peer.name} wall ms | cpu ms |" for c in clients)
    head += "".join(f" {c.peer.name} / {base.peer.name} wall | cpu |" for c in clients[1:])
    rows = [head, "|" + " --- |" * (head.count("|") - 1)]
    for call in (*CALLS, *LISTS):
        wall = {c.peer.name: statistics.median(c.walls[call]) for c in clients}
        cpu = {c.peer.name: statistics.mean(c.cpus[call]) for c in clients}
        row = f"| {call} |" + "".join(f" {wall[c.peer.name]:.2f} | {cpu[c.peer.name]:.2f} |" for c in clients)
        for c in clients[1:]:
            row += f" {wall[c.peer.name] / wall[base.peer.name]:.2f} | {cpu[c.peer.name] / cpu[base.peer.name]:.2f} |"
        rows.append(row)
    return rows


def fill(clients: list[Client], instances: int) -> None:
    """As many instances in each store; the stores are filled at the same time, which is not measured."""
    print(f"filling up to {instances} instances", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(lambda client: client.order(fill=instances), clients))


def measure(clients: list[Client], rounds: int, times: int) -> None:
    """All calls in turns; what was measured of another number of instances is forgotten, and so is a first round."""
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}{' (not counted)' * (number == 0)}", file=sys.stderr, flush=True)
        if number <= 1:
            for client in clients:
                client.walls.clear()
                client.cpus.clear()
        for call in (*CALLS, *LISTS):
            for client in clients:
                client.measure(call, 3 if not number else LIST_TIMES if call in LISTS else times)


def main() -> None:
    """Measure and print; `--out` also writes the table with the run's conditions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=20, help="repetitions of a call in a round")
    parser.add_argument("--instances", type=int, action="append", help="in the cell when measuring (20, 1000, 10000)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    MariaDB.install()
    with tempfile.TemporaryDirectory(prefix="lucd-bench-") as name:
        directory = Path(name)
        mariadb = MariaDB(directory)
        mariadb.start()
        lucd = Lucd(directory / "lucd")
        lines: list[str] = []
        try:
            lucd.start()
            peers = [Peer("MariaDB", "sql", mariadb.create("nova_cell1"), lambda: [mariadb.process.pid])]  # type: ignore[union-attr]
            peers += lucd.peers()
            clients = [Client.start(peer) for peer in peers]
            clients[1].order(sync=lucd.rpc_database_url())
            for instances in sorted(options.instances or SIZES):
                fill(clients, instances)
                measure(clients, options.rounds, options.times)
                load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
                section = [f"### {instances:,} instances", "", load, "", *table(clients), ""]
                print("\n".join(section), flush=True)
                lines += section
            for client in clients:
                client.process.stdin.close()  # type: ignore[union-attr]
                client.process.wait(30)
        finally:
            lucd.stop()
            mariadb.stop()
    if options.out:
        options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
