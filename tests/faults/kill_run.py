"""Daemons killed and stopped at random under load, and everything that clients saw judged by the simulator's oracles.

    python -m tests.faults.kill_run --minutes 10 --seed 1 --cuts

A run goes in rounds of some seconds. In each the simulator's clients (lists, cells, rows that come and go, unique
names, transfers between accounts, finds, sequences) work on a database of their own, one of threads counts rows up
through every daemon all the time, and one daemon after the other, sometimes two or all, is killed (SIGKILL) or stopped
(SIGSTOP) for a while, or cut off. Then everything runs again, is read at every daemon, and judged. Same seed, same
faults; what the machine makes of them differs. The exit code is 0 if nothing was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dht.sim.workload import Mix
from tests.cluster import Cluster
from tests.faults.load import Clients, Load, Report
from tests.faults.real_cluster import RealCluster, Round, judge
from tests.laboratory import LaboratoryCluster

ROUND_S = 12.0
EVERY_S = 2.5
LASTS_S = (0.2, 3.5)
CLIENTS = 6
TIMEOUT_S = 3.0
PACE_S = 0.04
MIX = Mix(append=4, read=4, cell=2, bag=2, find=1.5, transact=3, owner=2, draw=0.3, pace_s=PACE_S)
SHOWN_MAX = 20


@dataclass(frozen=True)
class Fault:
    """`victims`: numbers of daemons from 0. `began_s` to `ended_s`: until they ran and served again."""

    kind: str
    victims: tuple[int, ...]
    began_s: float
    ended_s: float


@dataclass
class Outcome:
    """What a run comes to."""

    violations: list[str] = field(default_factory=list)
    undecided: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    pause_s: float = 0.0
    """Longest pause of writes at daemons that were well while one other was not."""

    def lines(self, nodes: int) -> list[str]:
        kinds = Counter(f"{fault.kind} {len(fault.victims)}" for fault in self.faults)
        done = self.operations
        counted = sum(report.acknowledged for report in self.reports)
        errors = Counter(error.split(":")[0] for report in self.reports for error in report.errors)
        pauses = ", ".join(f"{report.pause_s:.2f}" for report in self.reports)
        return [
            f"faults: {', '.join(f'{kind} of {nodes}: {count}' for kind, count in sorted(kinds.items()))}",
            f"clients with histories: {done['operations']} operations, {done['commits_applied']} commits acknowledged, "
            f"{done['commits_unknown']} unknown, {done['commits_nothing']} unavailable or given way, "
            f"{done['commits_refused']} refused by a guard; {done['reads']} reads, {done['reads_failed']} unavailable; "
            f"{done['finds']} finds, {done['finds_failed']} unavailable; {done['draws']} draws of ids",
            f"clients that count: {counted} writes acknowledged, {sum(r.unknown for r in self.reports)} unknown, "
            f"errors: {dict(errors)}; longest pause of each: {pauses} s",
            f"longest pause at daemons that were well while one other was not: {self.pause_s:.2f} s",
            f"components without a verdict (too entangled): {self.undecided}",
            f"violations: {len(self.violations)}",
            *(f"  {violation}" for violation in self.violations[:SHOWN_MAX]),
        ]


class KillRun:
    """One run on a cluster that stands.

    `cuts`: the cluster is one of a laboratory, and its network fails too. `load`: rows that are there already.
    """

    def __init__(self, cluster: Cluster, seed: int, cuts: bool = False, load: Load | None = None) -> None:
        self.outcome = Outcome()
        self._cluster = cluster
        self._load = load
        self._laboratory = cluster.laboratory if cuts and isinstance(cluster, LaboratoryCluster) else None
        self._seed = seed
        self._chance = random.Random(f"kill run {seed}")
        self._real = RealCluster(cluster.nodes)

    async def run(self, seconds: float, say: Callable[[str], None] = print) -> Outcome:
        """Rounds until the time is over, at least one."""
        nodes = self._cluster.nodes
        load = self._load or await asyncio.to_thread(Load, nodes[0].store())
        spawn = multiprocessing.get_context("spawn")
        judging = []
        end_s = time.monotonic() + seconds
        with (
            concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=os.nice, initargs=(10,)) as judges,
            Clients(load, nodes, timeout_s=TIMEOUT_S, keep_gaps=True) as counting,
        ):
            number = 0
            while number == 0 or time.monotonic() < end_s - ROUND_S / 2:
                number += 1
                one = Round(self._real, number, self._seed, CLIENTS, MIX, TIMEOUT_S)
                await one.start()
                await self._faults(min(ROUND_S, end_s - time.monotonic()))
                await asyncio.to_thread(self._cluster.wait_whole)
                evidence = await one.finish()
                judging.append(judges.submit(judge, evidence))
                self.outcome.operations.update(evidence.history.counts())
                self.outcome.operations["operations"] += one.bench.operations
                say(f"round {number}: {one.bench.operations} operations, {len(self.outcome.faults)} faults so far")
            await asyncio.to_thread(counting.stop)
            for verdict in judging:
                violations, undecided = await asyncio.wrap_future(verdict)
                self.outcome.violations += violations
                self.outcome.undecided += undecided
        await self._real.close()
        self.outcome.reports = counting.reports
        self.outcome.violations += [wrong for report in counting.reports for wrong in report.wrong]
        for node in nodes:
            lost = await asyncio.to_thread(load.verify, node.store())
            self.outcome.violations += [f"through daemon {node.number}: {what}" for what in lost]
        self.outcome.pause_s = self._pause_of_the_well(counting.reports)
        return self.outcome

    async def _faults(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, self._chance.expovariate(1 / EVERY_S)))
            if time.monotonic() < end_s:
                await self._fault()

    async def _fault(self) -> None:
        chance = self._chance
        kind = chance.choice(("kill", "stop", "cut", "one-way cut") if self._laboratory else ("kill", "stop"))
        count = 1 if kind not in ("kill", "stop") else chance.choices((1, 2, 3), (8, 1, 1))[0]
        victims = tuple(sorted(chance.sample(range(len(self._cluster.nodes)), count)))
        lasts_s = chance.uniform(*LASTS_S)
        began_s = time.monotonic()
        for victim in victims:
            self._real.machines[victim].answering = False
        if kind == "kill":
            await self._kill(victims, lasts_s)
        elif kind == "stop":
            await self._stop(victims, lasts_s)
        else:
            await self._cut(victims[0], kind != "cut", lasts_s)
        for victim in victims:
            self._real.machines[victim].answering = True
        # So that the next fault meets a cluster that can bear it.
        await asyncio.to_thread(self._cluster.wait_whole)
        self.outcome.faults.append(Fault(kind, victims, began_s, time.monotonic()))

    async def _kill(self, victims: tuple[int, ...], lasts_s: float) -> None:
        nodes = [self._cluster.nodes[victim] for victim in victims]
        for node in nodes:
            await asyncio.to_thread(node.kill)
        await asyncio.sleep(lasts_s)
        for node in nodes:
            node.start(wait_ready=False)
        for node in nodes:
            await asyncio.to_thread(node.wait_ready)

    async def _stop(self, victims: tuple[int, ...], lasts_s: float) -> None:
        for victim in victims:
            self._cluster.nodes[victim].pause()
        try:
            await asyncio.sleep(lasts_s)
        finally:
            for victim in victims:
                self._cluster.nodes[victim].resume()

    async def _cut(self, victim: int, one_way: bool, lasts_s: float) -> None:
        assert self._laboratory is not None
        others = [number for number in range(len(self._cluster.nodes)) if number != victim]
        await asyncio.to_thread(self._laboratory.cut, [victim], others, one_way=one_way)
        try:
            await asyncio.sleep(lasts_s)
        finally:
            await asyncio.to_thread(self._laboratory.heal)

    def _pause_of_the_well(self, reports: list[Report]) -> float:
        longest = 0.0
        for number, report in enumerate(reports):
            for begin_s, end_s in report.gaps:
                met = [fault for fault in self.outcome.faults if fault.began_s < end_s and begin_s < fault.ended_s]
                if all(len(fault.victims) == 1 and number not in fault.victims for fault in met):
                    longest = max(longest, end_s - begin_s)
        return longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the faults; one of its own if not given")
    parser.add_argument("--cuts", action="store_true", help="daemons on hosts of their own, whose network fails too")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}, {given.minutes:g} minutes", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="lucd-kill-run-") as logs,
        (LaboratoryCluster if given.cuts else Cluster)(Path(logs), nodes=3) as cluster,
    ):
        run = KillRun(cluster, seed, given.cuts)
        outcome = asyncio.run(run.run(60 * given.minutes, lambda line: print(line, flush=True)))
    print(f"seed {seed}", *outcome.lines(3), sep="\n")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
