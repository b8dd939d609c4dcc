"""What is measured: a name, how a client opens it, and the processes whose CPU counts as the server's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import Cluster

DATABASE = "nova_cell1"
RPC_DATABASE = "nova_cell2"
SERVER = "bench-host"


@dataclass(frozen=True)
class Peer:
    """`kind` and `url`: see `tests.bench.child`. `server_pids`: those alive now."""

    name: str
    kind: str
    url: str
    server_pids: Callable[[], list[int]]


def children(pid: int) -> list[int]:
    """The process and those that it started, now."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            pids += children(int(child))
    return pids


class Lucd:
    """Three daemons; the clients use the second, which also runs one worker of the RPC door."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.cluster = Cluster(directory, nodes=3)
        node = self.cluster.nodes[1]
        node.options = f"[nova]\nworkers = 1\nserver = {SERVER}\nmain_database = {RPC_DATABASE}\n"
        node.write_config()

    def start(self) -> None:
        self.cluster.__enter__()

    def stop(self) -> None:
        self.cluster.__exit__(None, None, None)

    def peers(self) -> list[Peer]:
        """Both doors of one daemon, each on a database of its own."""
        sql = Peer("SQL door", "sql", self.cluster.url(DATABASE, 1), self._pids)
        rpc = Peer("RPC door", "rpc", f"{self.cluster.nodes[1].socket}#{SERVER}", self._pids)
        return [sql, rpc]

    def rpc_database_url(self) -> str:
        """The RPC door's database by the SQL door, for making its schema."""
        return self.cluster.url(RPC_DATABASE, 1)

    def _pids(self) -> list[int]:
        return [pid for node in self.cluster.nodes for pid in children(node.pid)]
