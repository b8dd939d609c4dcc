"""Daemons for tests and benchmarks, spread over the sites of a WAN."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lucd.demo.daemons import LocalNode
from lucd.demo.wan.sites import Traffic, Wan, WanNode, why_not
from tests.cluster import Cluster

__all__ = ["Traffic", "Wan", "WanCluster", "WanNode", "fastest_s", "why_not"]


class WanCluster(Cluster):
    """`Cluster` whose daemons are spread over sites: `layout[n]` is the site of daemon n.

    `pops`: each site is a PoP of its own, pop0 and so on; else one PoP stretches over all of them.
    """

    def __init__(self, logs: Path, wan: Wan, layout: Sequence[int], *, pops: bool = False, options: str = "") -> None:
        self.wan = wan
        self.layout = list(layout)
        self.pops = pops
        super().__init__(logs, len(self.layout), "pop1", options)

    def make_node(self, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str) -> LocalNode:
        site = self.layout[number - 1]
        host = self.layout[: number - 1].count(site)
        return WanNode(self.wan, site, host, number, path, bootstrap, f"pop{site}" if self.pops else pop, options)


def fastest_s(ask: Callable[[], object], count: int = 10) -> float:
    """Of some: what the ways cost, whatever else the machine does."""
    took = []
    for _ in range(count):
        began_s = time.monotonic()
        ask()
        took.append(time.monotonic() - began_s)
    return min(took)
