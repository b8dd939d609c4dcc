"""Real daemons on loopback, each with its directory, ports, configuration and log, ended by process id.

The demo, the tests and the benchmark use it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dht.domain.wide import members_wanted
from dht.errors import Unavailable
from dht.wire.blocking import BlockingClient, SocketStore
from lucd import directory
from lucd.directory import ClusterKey

HOST = "127.0.0.1"
PORT_MIN, PORT_MAX = 15_000, 32_000
START_WAIT_S = 120.0
"""Of a busy machine; it takes a few seconds where there is nothing else to do."""
STOP_WAIT_S = 15.0


def free_port() -> int:
    """A number that is free for TCP and UDP right now.

    Below the range from which systems take the ports of outgoing connections: one of those would take it before a
    daemon is started on it.
    """
    while True:
        port = random.SystemRandom().randrange(PORT_MIN, PORT_MAX)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        ):
            try:
                tcp.bind((HOST, port))
                udp.bind((HOST, port))
            except OSError:
                continue
            return port


class LocalNode:
    """One daemon. Its directory must be short: the path of a Unix socket has at most 107 bytes."""

    def __init__(self, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str = "") -> None:
        self.number = number
        self.path = path
        self.pop = pop
        self.port = free_port()
        self.admin_port = free_port()
        self.data_dir = path / "data"
        self.socket = path / "s"
        self.log = path / "log"
        self.config = path / "lucd.conf"
        self.bootstrap = list(bootstrap)
        self.options = options
        self.launcher: list[str] = []
        """What the daemon's command line begins with, if it is not started as it is."""
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: dict[float, BlockingClient] = {}
        path.mkdir(parents=True)
        self.write_config()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def write_config(self) -> None:
        """(Re)write the configuration from the attributes."""
        self.config.write_text(
            f"[DEFAULT]\ndata_dir = {self.data_dir}\nlisten = {self.address}\nadmin = {HOST}:{self.admin_port}\n"
            f"socket = {self.socket}\npop = {self.pop}\nfailure_domain = host{self.number}\n"
            f"bootstrap = {','.join(self.bootstrap)}\n{self.options}"
        )

    def make_directory(self, cluster: ClusterKey | None) -> ClusterKey:
        """Found a cluster (None) or become a node of one."""
        if cluster is None:
            return directory.found(self.data_dir)
        directory.join(self.data_dir, cluster)
        return cluster

    def start(self, wait_ready: bool = True) -> None:
        """Start the process; raises Unavailable with its log's end when it ends or is not ready in time."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.launcher, sys.executable, "-m", "lucd.cli.main", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait_ready:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = START_WAIT_S) -> None:
        """Return when /readyz says so."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise Unavailable(f"daemon {self.number} ended at its start: {self.log_tail()}")
            if self.get("/readyz")[0] == 200:
                return
            time.sleep(0.05)
        raise Unavailable(f"daemon {self.number} is not ready after {timeout_s:.0f} s: {self.log_tail()}")

    def get(self, path: str) -> tuple[int, str]:
        """(status, text) of the admin address; (0, reason) while nothing answers there."""
        connection = http.client.HTTPConnection(HOST, self.admin_port, timeout=5.0)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        except OSError as error:
            return 0, str(error)
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """/status as it is now; empty while nothing answers."""
        code, text = self.get("/status")
        found: dict[str, Any] = json.loads(text) if code == 200 else {}
        return found

    def url(self, database: str, scheme: str = "lucd") -> str:
        """The daemon's SQL door for SQLAlchemy."""
        return f"{scheme}:///{database}?socket={self.socket}"

    @property
    def pid(self) -> int:
        """The running process; 0 if there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code. A daemon that does not end in STOP_WAIT_S is killed."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def wait(self, timeout_s: float) -> int:
        """The exit code of a process that ends by itself."""
        return self._process.wait(timeout_s) if self._process is not None else 0

    def pause(self) -> None:
        """Stop the process without ending it (SIGSTOP): it looks hung to its peers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def client(self, timeout_s: float = 10.0) -> BlockingClient:
        """A client of the daemon, one for each timeout; closed by `close_clients`."""
        if timeout_s not in self._clients:
            self._clients[timeout_s] = BlockingClient(self.socket, timeout_s)
        return self._clients[timeout_s]

    def store(self, timeout_s: float = 10.0) -> SocketStore:
        return SocketStore(self.client(timeout_s))

    def close_clients(self) -> None:
        while self._clients:
            self._clients.popitem()[1].close()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self) -> str:
        """The last lines of the log, in one."""
        return " | ".join(self.log_text().splitlines()[-4:]) or "its log is empty"


def _whole(domain: dict[str, Any], pops: list[str]) -> bool:
    """Whether `global` has the members that it should have of these nodes' PoPs, and misses no replica."""
    each = members_wanted(len(set(pops)))
    wanted = sum(min(each, pops.count(pop)) for pop in set(pops))
    if domain["members"] < wanted:
        return False
    tablets = domain["tablets"]
    return not domain["joined"] or not (tablets["degraded"] or tablets["unavailable"] or domain["to_copy"])


class Daemons:
    """`nodes` daemons of one cluster and PoP; the first founds it, the others join through it.

    As a context manager it starts them one after the other and ends them all.
    """

    def __init__(self, path: Path, nodes: int = 3, pop: str = "pop1", options: str = "") -> None:
        self.path = path
        self.cluster: ClusterKey | None = None
        self.nodes: list[LocalNode] = []
        self._pop = pop
        self._options = options
        self._made = 0
        for _ in range(nodes):
            self.add()

    def add(self, pop: str | None = None, bootstrap: Sequence[str] | None = None, options: str = "") -> LocalNode:
        """One more node with its directory made, not started."""
        if bootstrap is None:
            bootstrap = [self.nodes[0].address] if self.nodes else []
        self._made += 1
        number = self._made
        node = self.make_node(number, self.path / f"n{number}", bootstrap, pop or self._pop, self._options + options)
        self.cluster = node.make_directory(self.cluster)
        self.nodes.append(node)
        return node

    def make_node(self, number: int, path: Path, bootstrap: Sequence[str], pop: str, options: str) -> LocalNode:
        """Where a subclass has its daemons elsewhere."""
        return LocalNode(number, path, bootstrap, pop, options)

    def start(self) -> None:
        """Start all that do not run, in order, and wait until every tablet has all its replicas."""
        for node in self.nodes:
            if not node.pid:
                node.start()
        self.wait_whole()

    def wait_whole(self, timeout_s: float = START_WAIT_S) -> None:
        """Return when every running node sees as many members of its PoP as run, and no tablet misses a replica."""
        deadline = time.monotonic() + timeout_s
        running = [node for node in self.nodes if node.pid]
        for node in running:
            while True:
                status = node.status()
                tablets = status.get("tablets", {})
                if (
                    status.get("reachable", 0) >= sum(other.pop == node.pop for other in running)
                    and tablets
                    and not (tablets["degraded"] or tablets["unavailable"] or status["to_copy"])
                    and _whole(status["global_domain"], [other.pop for other in running])
                ):
                    break
                if time.monotonic() > deadline:
                    raise Unavailable(f"daemon {node.number} sees {tablets} after {timeout_s:.0f} s: {node.log_tail()}")
                time.sleep(0.05)

    def start_together(self) -> None:
        """Start all that do not run at once, then wait for all: after a power cut."""
        for node in self.nodes:
            if not node.pid:
                node.start(wait_ready=False)
        for node in self.nodes:
            node.wait_ready()
        self.wait_whole()

    def stop(self) -> None:
        """SIGTERM to all at once, then wait."""
        for node in self.nodes:
            if node.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(node.pid, signal.SIGTERM)
        for node in self.nodes:
            node.close_clients()
            node.stop()

    def url(self, database: str, node: int = 0, scheme: str = "lucd") -> str:
        """The SQL door of the node (counted from 0) for SQLAlchemy."""
        return self.nodes[node].url(database, scheme)

    def __enter__(self) -> Daemons:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
