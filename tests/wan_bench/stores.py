"""The three stores of the WAN benchmark, each over the sites of one WAN.

What a controller of a site sees of a store is two URLs: the database that its site's Nova cell works on, and where it
finds the rows of the next site. On lucd each site has a cell database of its own, homed in its PoP, and its daemons
serve the next site's as well. MariaDB stands in site 0 and Galera has a node in each site: all sites work on one
database there, by the server in reach.

All three write each commit to disk before they answer (InnoDB: flush at each commit).
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dht.errors import DhtError
from lucd.demo.processes import cpu_of
from tests.bench.mariadb import MariaDB
from tests.bench.peers import children
from tests.laboratory import wait_until
from tests.wan.sites import Wan, WanCluster
from tests.wan_bench import slow_clock

DATABASE = "nova_cell"
USER = "nova"
PORT = 3306
TIMEOUT_S = 120
GALERA_WAIT_S = 60.0
GALERA_TIMEOUTS_S = {
    "evs.suspect_timeout": 5,
    "evs.inactive_timeout": 15,
    "evs.install_timeout": 7.5,
    "gmcast.peer_timeout": 3,
}
"""Its defaults."""
OWNER = "mysql"
"""Whom Galera's servers run as: what transfers their state gives up root's rights."""
LIBRARY = Path("/usr/lib/galera/libgalera_smm.so")


class Store(Protocol):
    """`name`: as results name it. `shared`: whether all sites work on one database."""

    name: str
    shared: bool

    def start(self) -> None: ...

    def url(self, site: int, of: int, number: int = 0) -> str:
        """For a controller of the site, its `number`: the database that holds the rows of site `of`."""
        ...

    def pids(self) -> list[int]:
        """All servers' processes, now."""
        ...

    def state(self) -> dict[str, object]:
        """What the store says of itself, for the results; equal before and after nothing happened."""
        ...

    def whole(self) -> bool:
        """Whether all sites are together again."""
        ...

    def slow(self) -> None:
        """The WAN gets so many times slower as the store was made for: slow down what its servers do by the clock."""
        ...

    def stop(self) -> None: ...


def cpu_ms(store: Store) -> float:
    """That all servers have used so far."""
    return 1000 * sum(map(cpu_of, store.pids()))


class LucdStore:
    """`daemons` daemons in each site, which is a PoP, but `last_daemons` in the last one; controllers use those of
    their site in turn. `slowed`: how many times, when `slow` is asked for.
    """

    name = "lucd"
    shared = False

    def __init__(self, directory: Path, wan: Wan, daemons: int, last_daemons: int, slowed: int) -> None:
        self.daemons = daemons
        last = len(wan.sites) - 1
        self._at = [*[daemons] * last, last_daemons]
        self.cluster = WanCluster(
            directory, wan, [site for site, at in enumerate(self._at) for _ in range(at)], pops=True
        )
        self._pace, self._slowed = slow_clock.Pace(directory / "pace"), slowed
        for node in self.cluster.nodes if slowed > 1 else ():
            node.launcher = [*node.launcher, sys.executable, slow_clock.__file__, str(self._pace.file)]

    def start(self) -> None:
        self.cluster.__enter__()
        for site in range(len(self.cluster.wan.sites)):
            self.cluster.nodes[site * self.daemons].store(30.0).create_database(self.database(site), home=f"pop{site}")

    @staticmethod
    def database(site: int) -> str:
        return f"{DATABASE}_pop{site}"

    def url(self, site: int, of: int, number: int = 0) -> str:
        return self.cluster.url(self.database(of), site * self.daemons + number % self._at[site])

    def pids(self) -> list[int]:
        return [pid for node in self.cluster.nodes for pid in children(node.pid)]

    def state(self) -> dict[str, object]:
        """With one daemon in each site, `link_frames` all go to other PoPs; signs of life are none."""
        counters = [node.status()["counters"] for node in self.cluster.nodes]
        return {
            "requests_passed_on": sum(int(each["homes"]["passed_on"]) for each in counters),
            "link_frames": sum(int(each["links"]["frames_out"]) for each in counters),
        }

    def whole(self) -> bool:
        """Whether every daemon gets the list of databases, which the PoP that was founded first keeps."""
        try:
            return all(len(node.store(5.0).homes()) >= len(self.cluster.wan.sites) for node in self.cluster.nodes)
        except DhtError:
            return False

    def slow(self) -> None:
        self._pace.slow(self._slowed)

    def stop(self) -> None:
        self._pace.end()
        self.cluster.__exit__(None, None, None)


def _site_options(wan: Wan, site: int) -> list[str]:
    return [f"--bind-address={wan.address(site)}", f"--port={PORT}", "--skip-name-resolve", "--max-connections=500"]


def _let_in(server: MariaDB) -> None:
    for statement in (
        f"CREATE USER '{USER}'@'%' IDENTIFIED BY '{USER}'",
        f"GRANT ALL ON *.* TO '{USER}'@'%'",
        f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb3",
    ):
        done = server.sql(statement)
        if done.returncode:
            raise SystemExit(f"bench-wan: {statement}: {done.stderr.decode()}")


def _url(host: str) -> str:
    limits = f"connect_timeout=10&read_timeout={TIMEOUT_S}&write_timeout={TIMEOUT_S}"
    return f"mysql+pymysql://{USER}:{USER}@{host}:{PORT}/{DATABASE}?charset=utf8mb3&{limits}"


class CentralStore:
    """One MariaDB in site 0; every site is its client."""

    name = "mariadb"
    shared = True

    def __init__(self, directory: Path, wan: Wan) -> None:
        MariaDB.install()
        self._wan = wan
        self._server = MariaDB(directory, wan.enter(0), _site_options(wan, 0))

    def start(self) -> None:
        self._server.start()
        _let_in(self._server)

    def url(self, site: int, of: int, number: int = 0) -> str:
        return _url(self._wan.address(0))

    def pids(self) -> list[int]:
        return [self._server.process.pid] if self._server.process else []

    def state(self) -> dict[str, object]:
        return {"servers": 1}

    def whole(self) -> bool:
        return True

    def slow(self) -> None:
        """It does nothing by the clock that a client would notice."""

    def stop(self) -> None:
        self._server.stop()


class GaleraStore:
    """A node of one Galera cluster in each site; a site's controllers use theirs."""

    name = "galera"
    shared = True

    def __init__(self, directory: Path, wan: Wan, slowed: int) -> None:
        install_galera()
        self._wan = wan
        directory.chmod(0o755)
        self._servers: list[MariaDB] = []
        sites = range(len(wan.sites))
        # Not to take for dead who is only slowed.
        patience = ";".join(f"{name}=PT{seconds * slowed}S" for name, seconds in GALERA_TIMEOUTS_S.items())
        members = ",".join(wan.address(site) for site in sites)
        for site in sites:
            path = directory / f"galera{site}"
            path.mkdir()
            shutil.chown(path, OWNER, OWNER)
            options = [
                *_site_options(wan, site),
                "--binlog-format=ROW",
                "--innodb-autoinc-lock-mode=2",
                "--wsrep-on=ON",
                f"--wsrep-provider={LIBRARY}",
                "--wsrep-cluster-name=bench",
                f"--wsrep-cluster-address=gcomm://{members if site else ''}",
                f"--wsrep-node-address={wan.address(site)}",
                f"--wsrep-node-name=site{site}",
                f"--wsrep-provider-options=gcache.size=32M;gmcast.listen_addr=tcp://{wan.address(site)}:4567;{patience}",
                "--wsrep-slave-threads=4",
            ]
            self._servers.append(MariaDB(path, wan.enter(site), options, OWNER))

    def start(self) -> None:
        first, *others = self._servers
        first.start()
        _let_in(first)
        first.stop()
        # Each begins with the state that the first has: nothing is left to transfer.
        for server in others:
            subprocess.run(["cp", "-a", str(first.data), str(server.data)], check=True)
        for site, server in enumerate(self._servers):
            server.run()
            wait_until(self._joined(site, site + 1), GALERA_WAIT_S, f"Galera's node of site {site}", 0.2)

    def _joined(self, site: int, size: int):
        def joined() -> bool:
            status = self._status(site)
            return (status.get("wsrep_cluster_size"), status.get("wsrep_local_state_comment")) == (str(size), "Synced")

        return joined

    def _status(self, site: int) -> dict[str, str]:
        lines = self._servers[site].sql("SHOW STATUS LIKE 'wsrep%'").stdout.decode().splitlines()
        return dict(line.split("\t", 1) for line in lines if "\t" in line)

    def url(self, site: int, of: int, number: int = 0) -> str:
        return _url(self._wan.address(site))

    def pids(self) -> list[int]:
        return [server.process.pid for server in self._servers if server.process]

    def state(self) -> dict[str, object]:
        return {"servers": len(self._servers), "aborts": sum(self._aborts(s) for s in range(len(self._servers)))}

    def _aborts(self, site: int) -> int:
        status = self._status(site)
        return int(status.get("wsrep_local_cert_failures", 0)) + int(status.get("wsrep_local_bf_aborts", 0))

    def whole(self) -> bool:
        return all(self._joined(site, len(self._servers))() for site in range(len(self._servers)))

    def slow(self) -> None:
        """Its timeouts are longer from its start on; signs of life that are sent more often cost next to nothing."""

    def stop(self) -> None:
        # All at once: a member that leaves is waited for by the rest, and this cluster ends anyway.
        for server in self._servers:
            if server.process:
                server.process.kill()
        for server in self._servers:
            if server.process:
                server.process.wait()
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(server.data)


def install_galera() -> None:
    """MariaDB with Galera, from Debian when they are missing (needs root)."""
    MariaDB.install()
    if not LIBRARY.exists():
        subprocess.run(["apt-get", "install", "-y", "-qq", "galera-4"], check=True)


def make_store(kind: str, directory: Path, wan: Wan, daemons: int, last_daemons: int, slowed: int) -> Store:
    """`kind`: one of `KINDS`. The rest: see `LucdStore`."""
    match kind:
        case "lucd":
            return LucdStore(directory, wan, daemons, last_daemons, slowed)
        case "mariadb":
            return CentralStore(directory, wan)
        case _:
            return GaleraStore(directory, wan, slowed)


KINDS: Sequence[str] = ("mariadb", "galera", "lucd")
