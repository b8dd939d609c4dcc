"""The scenarios by name. Each stresses one thing; `everything` all at once."""

from __future__ import annotations

from typing import Final

from dht.sim.scenario import Faults, Scenario
from dht.sim.scripts import recovered, rolled_back, sizes
from dht.sim.swarm import SWARM, swarm
from dht.sim.workload import Mix

_ONE_LIST: Final = Mix(append=5, read=3, cell=0, bag=0, find=0, transact=0, owner=0, draw=0, lists=1)
_FOLLOWED: Final = Mix(follow=12, read=1, find=0, transact=2, owner=1.5, draw=0, bag=4, owners=3, bags=2)
_DROPPED: Final = Mix(cells=24, owner=0.5, transact=0.5, pace_s=0.02)

SCENARIOS: Final[dict[str, Scenario]] = {
    s.name: s
    for s in (
        Scenario("steady", duration_s=4.0, faults=Faults(stragglers=1, loss=1)),
        Scenario("single", machines=1, duration_s=5.0, faults=Faults(crash=3, slow_disk=1, pause=1, lasts_s=0.3)),
        Scenario("pair", machines=2, duration_s=5.0, faults=Faults(crash=2, partition=1, pause=1, lasts_s=0.4)),
        Scenario("crash", faults=Faults(crash=4, crash_all=1, slow_disk=2, skew=1, pause=1)),
        Scenario(
            "flush",
            clients=6,
            duration_s=8.0,
            slowness=5.0,
            straggler=0.2,
            mix=_ONE_LIST,
            faults=Faults(crash=4, one_way=1, loss=1, every_s=0.4, lasts_s=0.12),
        ),
        Scenario(
            "network",
            loss=0.02,
            straggler=0.05,
            faults=Faults(partition=3, one_way=2, loss=2, stragglers=2),
        ),
        Scenario("order", shuffle=True, straggler=0.1, faults=Faults(crash=2, pause=2, stragglers=2, loss=1)),
        Scenario(
            "transactions",
            mix=Mix(append=1, read=3, cell=0, bag=0, find=2, transact=5, owner=4, draw=0, lists=3, owners=3, names=2),
            faults=Faults(crash=3, partition=1, pause=2, loss=1),
        ),
        Scenario(
            "finds",
            mix=Mix(append=0, read=1, cell=0, bag=5, find=6, transact=0, owner=3, draw=0, bags=4),
            faults=Faults(crash=3, partition=2, pause=1, loss=1, stragglers=1),
        ),
        Scenario(
            "halves",
            clients=6,
            duration_s=12.0,
            loss=0.1,
            straggler=0.1,
            mix=Mix(append=0, read=1, cell=0, bag=5, find=6, transact=0, owner=0, draw=0, bags=2, rows_per_bag=2),
            faults=Faults(crash=3, loss=2, one_way=1, every_s=0.3, lasts_s=0.4),
        ),
        Scenario(
            "window",
            clients=6,
            straggler=0.05,
            mix=Mix(append=1, read=1, cell=6, bag=2, find=0, transact=0, owner=0, draw=1, lists=1, cells=1, bags=1),
            faults=Faults(loss=3, stragglers=3, crash=1, pause=1),
        ),
        Scenario(
            "late",
            duration_s=8.0,
            timeout_s=0.6,
            mix=Mix(
                append=0,
                read=1,
                cell=0,
                bag=8,
                find=0,
                transact=0,
                owner=0,
                draw=0,
                bags=1,
                rows_per_bag=2,
                retry_after_s=0.1,
            ),
            faults=Faults(pause=3, stragglers=1, every_s=0.8, lasts_s=1.2),
        ),
        Scenario(
            "collect",
            clients=6,
            collect_every_s=0.4,
            mix=Mix(append=1, read=2, cell=0, bag=4, find=2, transact=0, owner=6, draw=0, owners=3, names=3, bags=2),
            faults=Faults(crash=2, partition=1, pause=1, loss=2, stragglers=2, wipe=1, wipes=1),
        ),
        Scenario(
            "grow",
            machines=1,
            duration_s=10.0,
            faults=Faults(join=3, crash=1, loss=1, joins=2, every_s=0.7, lasts_s=0.4),
        ),
        Scenario(
            "replace",
            machines=4,
            duration_s=12.0,
            faults=Faults(wipe=2, crash=1, partition=1, loss=1, wipes=1, every_s=0.7),
        ),
        Scenario(
            "drain",
            machines=4,
            duration_s=12.0,
            faults=Faults(drain=2, crash=1, loss=1, pause=1, drains=1, every_s=0.7),
        ),
        Scenario(
            "follow",
            follows=True,
            straggler=0.05,
            collect_every_s=0.5,
            mix=_FOLLOWED,
            faults=Faults(crash=3, partition=2, one_way=1, pause=1, loss=2, stragglers=2),
        ),
        Scenario(
            "follow-moves",
            machines=4,
            duration_s=12.0,
            follows=True,
            collect_every_s=0.5,
            mix=_FOLLOWED,
            faults=Faults(drain=2, join=2, wipe=1, crash=2, loss=1, joins=2, drains=1, wipes=1, every_s=0.6),
        ),
        Scenario(
            "drops",
            keepers=2,
            duration_s=10.0,
            tablets=4,
            timeout_s=0.5,
            mix=_DROPPED,
            faults=Faults(crash=3, partition=3, one_way=1, pause=1, loss=1, stragglers=1, every_s=1.5, lasts_s=0.8),
        ),
        Scenario(
            "drops-moves",
            machines=4,
            keepers=2,
            duration_s=12.0,
            tablets=4,
            timeout_s=0.5,
            collect_every_s=0.5,
            mix=_DROPPED,
            faults=Faults(drain=2, join=2, wipe=1, crash=2, loss=1, joins=2, drains=1, wipes=1, every_s=0.7),
        ),
        Scenario("sizes", machines=1, duration_s=30.0, tablets=4, mix=Mix(pace_s=0.05), script=sizes),
        Scenario("rolled-back", tablets=4, duration_s=5.0, script=rolled_back),
        Scenario("recovered", tablets=4, duration_s=5.0, script=recovered),
        Scenario(
            "everything",
            machines=4,
            duration_s=15.0,
            loss=0.01,
            faults=Faults(
                crash=3,
                crash_all=0.5,
                partition=2,
                one_way=1,
                loss=2,
                slow_disk=1,
                pause=1,
                stragglers=1,
                skew=0.5,
                wipe=1,
                join=2,
                drain=1,
                joins=2,
                wipes=1,
                drains=1,
            ),
        ),
    )
}

NAMES: Final = (SWARM, *SCENARIOS)


def scenario(name: str, seed: int) -> Scenario:
    """What runs under this name with this seed: of the swarm, every seed is a scenario of its own."""
    return swarm(seed) if name == SWARM else SCENARIOS[name]
