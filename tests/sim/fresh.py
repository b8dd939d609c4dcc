"""Runs in a process of their own, as the commands that replay them are: what other tests leave behind is not there."""

from __future__ import annotations

from dht.sim.scenario import Verdict, run
from dht.sim.scenarios import scenario


def verdict_of(name: str, seed: int) -> Verdict:
    return run(scenario(name, seed), seed)


def violations_of(name: str, seed: int) -> list[str]:
    return verdict_of(name, seed).violations
