"""The same control plane on two kinds of database: three daemons of lucd, or one MariaDB."""

from __future__ import annotations

from pathlib import Path

from lucd.demo.daemons import Daemons, LocalNode
from lucd.demo.plane.site import DATABASES, ControlPlane
from lucd.demo.processes import cpu_of
from tests.bench.mariadb import MariaDB

NODES = 3


class LucdStack:
    """Controller 0 and 1 each at a daemon of its own; the second one is the bus of all."""

    name = "lucd"

    def __init__(self, path: Path, computes: int) -> None:
        self.daemons = Daemons(path, NODES)
        bus = self.daemons.nodes[1]
        self.plane = ControlPlane(path / "nova", self.daemons.url, f"lucd://{bus.socket}", computes)

    def start(self) -> None:
        """Whatever was started is ended by `stop`, also when this raises."""
        self.daemons.start()

    def database_cpu_s(self) -> float:
        """CPU time of the three daemons, one of which carries the bus. A daemon that was killed takes its own along."""
        return sum(cpu_of(node.pid) for node in self.daemons.nodes if node.pid)

    def victim(self) -> LocalNode:
        """The daemon that may die without taking the bus with it, and whose death the controllers notice."""
        return self.daemons.nodes[0]

    def stop(self) -> None:
        self.plane.stop()
        self.daemons.stop()


class MariaDBStack:
    """One MariaDB for both controllers. The bus is a daemon of lucd that keeps no database: the buses are alike."""

    name = "mariadb"

    def __init__(self, path: Path, computes: int) -> None:
        self.server = MariaDB(path)
        self.bus = Daemons(path, 1)
        self.plane = ControlPlane(
            path / "nova", lambda name, _: self.server.url(name), f"lucd://{self.bus.nodes[0].socket}", computes
        )

    def start(self) -> None:
        """Whatever was started is ended by `stop`, also when this raises."""
        MariaDB.install()
        self.server.start()
        self.bus.start()
        for name in DATABASES:
            self.server.create(name)

    def database_cpu_s(self) -> float:
        """CPU time of MariaDB and of the daemon that is the bus."""
        server = self.server.process
        return cpu_of(self.bus.nodes[0].pid) + (cpu_of(server.pid) if server else 0.0)

    def victim(self) -> None:
        """There is no second one that would go on."""

    def stop(self) -> None:
        self.plane.stop()
        self.bus.stop()
        self.server.stop()


Stack = LucdStack | MariaDBStack
STACKS = {"lucd": LucdStack, "mariadb": MariaDBStack}
