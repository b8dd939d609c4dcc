"""Placement's three calls of a boot, on MariaDB and on three daemons of lucd, in one run.

    python -m tests.bench.placement --providers 200 --rounds 5 --times 20

Prints a table: p50 wall time, CPU time of Placement's process and of the database together, ratio to MariaDB.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lucd.demo.daemons import Daemons
from lucd.demo.processes import cpu_of
from tests.bench.mariadb import MariaDB
from tests.placement import Placement

CANDIDATES = "/allocation_candidates?resources=VCPU:1,MEMORY_MB:64&required=COMPUTE_NODE&limit=1000"
CALLS = ("allocation candidates", "claim", "delete")


@dataclass
class Bench:
    """One Placement and what stands behind it."""

    name: str
    placement: Placement
    database_cpu_s: Callable[[], float]
    providers: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    walls: dict[str, list[float]] = field(default_factory=lambda: {call: [] for call in CALLS})
    cpus: dict[str, list[float]] = field(default_factory=lambda: {call: [] for call in CALLS})

    def fill(self, providers: int) -> None:
        ask = self.placement.ask
        inventories = {"VCPU": {"total": 64}, "MEMORY_MB": {"total": 65536}, "DISK_GB": {"total": 1000}}
        for _ in range(providers):
            provider = str(uuid.uuid4())
            path = f"/resource_providers/{provider}"
            made = [
                ask("POST", "/resource_providers", {"name": provider, "uuid": provider}),
                ask("PUT", f"{path}/inventories", {"resource_provider_generation": 0, "inventories": inventories}),
                ask("PUT", f"{path}/traits", {"resource_provider_generation": 1, "traits": ["COMPUTE_NODE"]}),
            ]
            assert [status for status, _ in made] == [200] * 3, made
            self.providers.append(provider)

    def measure(self, call: str, times: int) -> None:
        cpu_s = self.placement.program.cpu_s() + self.database_cpu_s()
        for number in range(times):
            began_s = time.perf_counter()
            self._do(call, number)
            self.walls[call].append((time.perf_counter() - began_s) * 1000)
        cpu_s = self.placement.program.cpu_s() + self.database_cpu_s() - cpu_s
        self.cpus[call].append(cpu_s * 1000 / times)

    def _do(self, call: str, number: int) -> None:
        ask = self.placement.ask
        match call:
            case "allocation candidates":
                status, found = ask("GET", CANDIDATES)
                assert len(found["provider_summaries"]) == min(1000, len(self.providers)), status
            case "claim":
                self.claims.append(str(uuid.uuid4()))
                resources = {"resources": {"VCPU": 1, "MEMORY_MB": 64}}
                body = {
                    "allocations": {self.providers[number % len(self.providers)]: resources},
                    "project_id": "project",
                    "user_id": "user",
                    "consumer_generation": None,
                }
                status, found = ask("PUT", f"/allocations/{self.claims[-1]}", body)
                assert status == 204, found
            case _:
                status, found = ask("DELETE", f"/allocations/{self.claims.pop()}")
                assert status == 204, found


def table(benches: list[Bench]) -> list[str]:
    """Markdown, the first bench being the measure."""
    base = benches[0]
    lines = [
        "| call |" + "".join(f" {b.name} wall ms | cpu ms |" for b in benches) + " wall ratio | cpu ratio |",
        "|" + " --- |" * (3 + 2 * len(benches)),
    ]
    for call in CALLS:
        wall = [statistics.median(b.walls[call]) for b in benches]
        cpu = [statistics.mean(b.cpus[call]) for b in benches]
        figures = "".join(f" {w:.1f} | {c:.1f} |" for w, c in zip(wall, cpu, strict=True))
        lines.append(f"| {call} |{figures} {wall[-1] / wall[0]:.2f} | {cpu[-1] / cpu[0]:.2f} |")
    return [f"{len(base.providers)} resource providers", "", *lines]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=20, help="repetitions of a call in a round")
    options = parser.parse_args()
    MariaDB.install()
    with tempfile.TemporaryDirectory(prefix="lucd-bench-") as name:
        path = Path(name)
        mariadb = MariaDB(path)
        mariadb.start()
        daemons = Daemons(path, 3)
        benches: list[Bench] = []
        try:
            daemons.start()
            server = mariadb.process
            assert server is not None
            benches = [
                Bench("MariaDB", Placement(path / "m", mariadb.create("placement")), lambda: cpu_of(server.pid)),
                Bench(
                    "lucd",
                    Placement(path / "l", daemons.url("placement")),
                    lambda: sum(cpu_of(node.pid) for node in daemons.nodes),
                ),
            ]
            for bench in benches:
                bench.placement.sync()
                bench.placement.program.start()
                bench.placement.wait()
                bench.fill(options.providers)
            for number in range(options.rounds + 1):
                for call in CALLS:
                    for bench in benches:
                        bench.measure(call, options.times)
                        if number == 0:
                            bench.walls[call].clear()
                            bench.cpus[call].clear()
            print("\n".join(table(benches)))
        finally:
            for bench in benches:
                bench.placement.program.stop()
            daemons.stop()
            mariadb.stop()


if __name__ == "__main__":
    main()
