"""What is measured: a name, how a client opens it, and the processes whose CPU counts as the server's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """`kind`: "sql" or "rpc", see `tests.bench.child`. `server_pids`: those alive now."""

    name: str
    kind: str
    url: str
    server_pids: Callable[[], list[int]]
