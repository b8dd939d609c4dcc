"""Networks for tests: every host has a network namespace of its own, and one router between them loses what it is told.

Packets are dropped in the router, without a word to either side, as a cable that was pulled out drops them: by
direction, and datagrams alone if so wished. The namespaces belong to processes that sleep and end with the laboratory;
nothing of the machine's own network is touched. Needs iproute2 and util-linux, and the right to make namespaces: root,
or a system that lets every user have them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lucd.demo.daemons import LocalNode
from lucd.demo.wan.namespaces import InsideNode, Namespace
from tests.cluster import Cluster

_RULES_FROM = 100
"""Priorities of the router's rules that drop packets; the system's own are 0 and above 32,000."""


class Laboratory:
    """`hosts` hosts, numbered from 0, each with one address, behind one router."""

    def __init__(self, hosts: int) -> None:
        self.router = Namespace()
        self.hosts: list[Namespace] = []
        self._rules = 0
        try:
            self.router.run("ip link set lo up", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            for _ in range(hosts):
                self.add()
        except BaseException:
            self.close()
            raise

    def add(self) -> int:
        """One more host; its number."""
        number = len(self.hosts)
        host = Namespace(self.router)
        self.hosts.append(host)
        self.router.run(
            f"ip link add r{number} type veth peer name e netns {host.pid}",
            f"ip address add {self._gateway(number)}/24 dev r{number}",
            f"ip link set r{number} up",
        )
        host.run(
            "ip link set lo up",
            f"ip address add {self.address(number)}/24 dev e",
            "ip link set e up",
            f"ip route add default via {self._gateway(number)}",
            # bbr, the default of some systems, adds to small exchanges.
            "echo reno > /proc/sys/net/ipv4/tcp_congestion_control",
        )
        return number

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.{host}.2"

    @staticmethod
    def _gateway(host: int) -> str:
        return f"10.77.{host}.1"

    def cut(self, side: Sequence[int], other: Sequence[int], *, one_way: bool = False, datagrams: bool = False) -> None:
        """Lose all packets from one side to the other, and back unless `one_way`; `datagrams`: only UDP."""
        pairs = [(a, b) for a in side for b in other]
        if not one_way:
            pairs += [(b, a) for a, b in pairs]
        kind = "ipproto udp " if datagrams else ""
        lines = []
        for a, b in pairs:
            self._rules += 1
            where = f"from {self.address(a)} to {self.address(b)}"
            lines.append(f"ip rule add priority {_RULES_FROM + self._rules} {where} {kind}blackhole")
        self.router.run(*lines)

    def heal(self) -> None:
        """Carry every packet again."""
        self.router.run(*(f"ip rule delete priority {_RULES_FROM + n + 1}" for n in range(self._rules)))
        self._rules = 0

    def close(self) -> None:
        for host in [*self.hosts, self.router]:
            host.close()


class LaboratoryNode(InsideNode):
    """A daemon on a host of its own."""

    def __init__(
        self, laboratory: Laboratory, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str
    ) -> None:
        self.host = number - 1
        self._laboratory = laboratory
        super().__init__(number, path, bootstrap, pop, options)
        self.launcher = laboratory.hosts[self.host].enter

    @property
    def address(self) -> str:
        return f"{self._laboratory.address(self.host)}:{self.port}"


class LaboratoryCluster(Cluster):
    """`Cluster` whose daemons have hosts of their own. `laboratory` cuts and heals; daemons count from 0 there."""

    def __init__(self, logs: Path, nodes: int = 3, pop: str = "pop1", options: str = "") -> None:
        self.laboratory = Laboratory(nodes)
        try:
            super().__init__(logs, nodes, pop, options)
        except BaseException:
            self.laboratory.close()
            raise

    def make_node(self, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str) -> LocalNode:
        while len(self.laboratory.hosts) < number:
            self.laboratory.add()
        return LaboratoryNode(self.laboratory, number, path, bootstrap, pop, options)

    def _clean(self, keep_logs: bool) -> None:
        self.laboratory.close()
        super()._clean(keep_logs)


def wait_until(condition: Any, timeout_s: float, what: str, pause_s: float = 0.02) -> float:
    """Seconds until the condition held; raises AssertionError when it does not in time."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(pause_s)
    return time.monotonic() - began_s
