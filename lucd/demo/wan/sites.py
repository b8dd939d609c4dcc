"""A WAN on one machine: sites with network namespaces of their own, and what lies between them.

A site is one namespace with many addresses, so within a site packets travel as fast as the machine lets them; between
sites they pass through `lucd.demo.wan.router`, with the latency, the jitter, the loss and the cuts that each pair of
sites is given. netem would do the same, where the kernel has it. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import TracebackType

from lucd.demo.daemons import Daemons, LocalNode
from lucd.demo.wan.namespaces import InsideNode, Namespace

SITES_MAX = 64
HOSTS_PER_SITE_MAX = 200
DEVICE = "wan"
ORDER_TIMEOUT_S = 20.0
_OPEN_DEVICE = f"""
import fcntl, os, socket, struct
device = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", b"{DEVICE}", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
socket.send_fds(socket.socket(fileno=0), [b"."], [device])
"""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was carried, and what was lost, between all sites since the start."""

    packets: int
    bytes: int
    lost: int

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.packets - other.packets, self.bytes - other.bytes, self.lost - other.lost)


class Wan:
    """`sites` sites, numbered from 0. Every pair is `rtt_ms` apart until `between` says otherwise."""

    def __init__(self, sites: int, rtt_ms: float = 0.0) -> None:
        if not 1 <= sites <= SITES_MAX:
            raise ValueError(f"{sites} sites: there may be 1 to {SITES_MAX}")
        self.sites: list[Namespace] = []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.settimeout(ORDER_TIMEOUT_S)
        self._answers = self._control.makefile("r")
        self._router: subprocess.Popen[bytes] | None = None
        try:
            for site in range(sites):
                self.sites.append(Namespace())
                self._connect(site)
            command = [sys.executable, "-m", "lucd.demo.wan.router", str(sites)]
            self._router = subprocess.Popen(command, stdin=theirs.fileno())
            if self._answer() != "ready":
                raise RuntimeError("the router of the WAN does not start; see its error above")
            self.between(range(sites), rtt_ms)
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()

    def _connect(self, site: int) -> None:
        done = subprocess.run(
            [*self.sites[site].enter, sys.executable, "-c", _OPEN_DEVICE],
            stdin=self._control.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"no TUN device could be made ({done.stderr.strip().splitlines()[-1]}): run as root")
        addresses = [f"ip address add {self.address(site, host)}/32 dev lo" for host in range(1)]
        self.sites[site].run(
            "ip link set lo up",
            *addresses,
            f"ip link set {DEVICE} up",
            f"ip route add 10.80.0.0/16 dev {DEVICE} src {self.address(site)}",
            # bbr, the default of some systems, adds to small exchanges.
            "echo reno > /proc/sys/net/ipv4/tcp_congestion_control",
        )

    def __enter__(self) -> Wan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def address(site: int, host: int = 0) -> str:
        """Of a host of the site; `open_host` makes all but the first."""
        return f"10.80.{site}.{host + 1}"

    def open_host(self, site: int, host: int) -> str:
        """One more address of the site."""
        assert 0 < host < HOSTS_PER_SITE_MAX
        self.sites[site].run(f"ip address replace {self.address(site, host)}/32 dev lo")
        return self.address(site, host)

    def enter(self, site: int) -> list[str]:
        """What a command begins with that is to run at the site."""
        return list(self.sites[site].enter)

    def between(self, sites: Iterable[int], rtt_ms: float, jitter_ms: float = 0.0, loss: float = 0.0) -> None:
        """How far the sites are from each other. `jitter_ms`: at most so much more, each way; `loss`: 0 to 1."""
        half_s = rtt_ms / 2000
        self._set(_both_ways(combinations(sites, 2)), delay_s=half_s, jitter_s=jitter_ms / 1000, loss=loss)

    def cut(self, side: Sequence[int], other: Sequence[int], *, one_way: bool = False) -> None:
        """Lose every packet from one side to the other, and back unless `one_way`; what is on its way arrives."""
        pairs = [(a, b) for a in side for b in other if a != b]
        self._set(pairs if one_way else _both_ways(pairs), cut=True)

    def heal(self) -> None:
        """Carry packets between all sites again."""
        self._set(_both_ways(combinations(range(len(self.sites)), 2)), cut=False)

    def traffic(self, site: int | None = None) -> Traffic:
        """Of one site in both directions, or of all."""
        ways = self._order({})
        assert isinstance(ways, list)
        mine = [way for way in ways if site is None or site in way[:2]]
        return Traffic(*(sum(way[at] for way in mine) for at in (2, 3, 4)))

    def _set(self, ways: Iterable[tuple[int, int]], **changes: float) -> None:
        answer = self._order({"ways": list(ways), "set": changes})
        assert answer == "done", answer

    def _order(self, order: dict[str, object]) -> object:
        self._control.sendall(json.dumps(order).encode() + b"\n")
        return self._answer()

    def _answer(self) -> object:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the router of the WAN has ended; see its error above")
        return json.loads(line)

    def close(self) -> None:
        """End the router, then the sites and with them whatever still runs there."""
        self._answers.close()
        self._control.close()
        if self._router is not None:
            self._router.wait(ORDER_TIMEOUT_S)
            self._router = None
        for site in self.sites:
            site.close()
        self.sites = []


def _both_ways(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [way for a, b in pairs for way in ((a, b), (b, a))]


def why_not() -> str:
    """Why there can be no WAN on this machine; empty if there can."""
    if os.geteuid():
        return "a WAN needs root: /dev/net/tun is for nobody else"
    try:
        Wan(1).close()
    except (RuntimeError, OSError) as error:
        return f"a WAN needs network namespaces and TUN devices: {error}"
    return ""


class WanNode(InsideNode):
    """A daemon at a site, on an address of its own."""

    def __init__(
        self, wan: Wan, site: int, host: int, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str
    ) -> None:
        self.site = site
        self._host = wan.open_host(site, host) if host else wan.address(site)
        super().__init__(number, path, bootstrap, pop, options)
        self.launcher = wan.enter(site)

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"


class WanDaemons(Daemons):
    """`per_pop` daemons at each site, which is a PoP of its own: pop0 and so on. `stop` ends the WAN, too."""

    def __init__(self, path: Path, wan: Wan, per_pop: int, options: str = "") -> None:
        self.wan = wan
        self.per_pop = per_pop
        super().__init__(path, len(wan.sites) * per_pop, options=options)

    def make_node(self, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str) -> LocalNode:
        site, host = divmod(number - 1, self.per_pop)
        return WanNode(self.wan, site, host, number, path, bootstrap, f"pop{site}", options)

    def stop(self) -> None:
        super().stop()
        self.wan.close()
