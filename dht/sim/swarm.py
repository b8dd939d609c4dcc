"""Swarm testing: every seed is a scenario of its own, small, with a few kinds of load and a few kinds of fault.

A fault or a kind of load that is always there hides what shows only without it (Groce et al., 2012), and a short run
reaches most of what a long one reaches. A seed in thirty is long, for what needs time.
"""

from __future__ import annotations

import random
from typing import Any, Final

from dht.sim.prepared import VARIANTS
from dht.sim.scenario import Faults, Scenario
from dht.sim.workload import Mix

SWARM: Final = "swarm"
_LONG_ONE_IN: Final = 30
_CALM: Final = ("crash", "partition", "one_way", "loss", "slow_disk", "pause", "stragglers", "skew", "crash_all")
_MOVING: Final = ("join", "wipe", "drain", "stillborn")
_LOADS: Final = ("append", "cell", "bag", "transact", "owner")


def swarm(seed: int) -> Scenario:
    """The scenario of the seed."""
    chance = random.Random(f"swarm/{seed}")
    long = chance.random() < 1 / _LONG_ONE_IN
    moving = chance.random() < 0.4
    machines = chance.choice((1, 3, 4) if moving else (1, 2, 3, 3, 3, 3, 4, 5))
    return Scenario(
        SWARM,
        machines=machines,
        clients=chance.randint(2, 6),
        duration_s=30.0 if long else 3.0,
        operations=chance.randint(200, 800) if long else chance.randint(20, 100),
        variant=None if machines == 1 and chance.random() < 0.3 else chance.randrange(VARIANTS),
        mix=_mix(chance),
        faults=_faults(chance, long, moving),
        loss=chance.choice((0.0, 0.0, 0.01, 0.1)),
        duplication=chance.choice((0.0, 0.0, 0.02, 0.2)),
        straggler=chance.choice((0.0, 0.01, 0.1, 0.3)),
        shuffle=chance.random() < 0.3,
        tablets=chance.choice((1, 2, 4)),
        timeout_s=chance.choice((0.4, 1.0, 3.0)),
        collect_every_s=chance.choice((0.1, 0.4, 3600.0, 3600.0)),
        slowness=chance.choice((1.0, 1.0, 5.0, 20.0)),
    )


def _mix(chance: random.Random) -> Mix:
    weights: dict[str, Any] = dict.fromkeys((*_LOADS, "find", "draw"), 0.0)
    kinds = chance.sample(_LOADS, chance.choice((1, 1, 2, 3)))
    weights.update({kind: chance.choice((1.0, 3.0, 6.0)) for kind in kinds})
    if "bag" in kinds or "owner" in kinds:
        weights["find"] = chance.choice((0.0, 1.0, 6.0))
    if chance.random() < 0.1:
        weights["draw"] = 1.0
    return Mix(
        **weights,
        read=chance.choice((0.5, 2.0, 4.0)),
        lists=chance.randint(2, 3) if "transact" in kinds else chance.randint(1, 2),
        cells=chance.randint(1, 2),
        bags=chance.randint(1, 3),
        rows_per_bag=chance.randint(1, 3),
        owners=chance.randint(1, 3),
        names=chance.randint(1, 3),
        retry_after_s=chance.choice((0.01, 0.1, 0.3)),
        pace_s=chance.choice((0.002, 0.01, 0.02)),
    )


def _faults(chance: random.Random, long: bool, moving: bool) -> Faults:
    kinds = chance.sample(_CALM, chance.choice((0, 1, 2, 3) if moving else (1, 2, 2, 3, 4)))
    weights: dict[str, Any] = {kind: chance.choice((1.0, 3.0)) for kind in kinds}
    many = {}
    if moving:
        weights.update(dict.fromkeys(chance.sample(_MOVING, chance.choice((1, 1, 2, 3))), 3.0))
        many = {"joins": chance.randint(1, 2), "wipes": 1, "drains": 1, "stillborns": 1}
    return Faults(
        every_s=chance.choice((0.3, 0.6)) if long else chance.choice((0.03, 0.1, 0.2)),
        lasts_s=chance.choice((0.05, 0.2, 0.6)),
        **weights,
        **many,
    )
