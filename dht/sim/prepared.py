"""Clusters that stand already: founding one would be most of a short run, so runs share what that leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dht.sim import loop as virtual
from dht.sim.cluster import Cluster
from dht.sim.disk import Content
from dht.sim.workload import Bench, Client, Mix, set_up

VARIANTS = 4
"""Different sets of node ids, and so of placements, for each size."""
_TIME_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class PreparedMachine:
    """What stays of a machine that was switched off after its cluster had settled."""

    node_id: bytes
    incarnation: bytes
    boots: int
    disk: Content


Prepared = tuple[PreparedMachine, ...]


@cache
def prepared(machines: int, tablets: int, variant: int) -> Prepared:
    """A settled cluster with its database, all machines switched off; the same whoever asks, and when."""
    from dht.sim.production import builder

    cluster = Cluster(f"prepared/{machines}/{tablets}/{variant}", builder((), (), tablets, 600.0, 3600.0))

    async def found() -> None:
        for number in range(machines):
            cluster.add(founds=number == 0)
        for number in range(machines):
            await cluster.start(number)
        await cluster.settle()
        bench = Bench(cluster, Mix())
        await set_up(bench, Client(bench, "setup", cluster.chance("setup")))
        for number in range(machines):
            cluster.shut(number)

    virtual.run(found(), time_limit_s=_TIME_LIMIT_S)
    return tuple(PreparedMachine(m.node_id, m.incarnation, m.boots, m.disk.content()) for m in cluster.machines)
