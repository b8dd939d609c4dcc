"""Single reads and writes at lucd's own door, without SQL: what the store itself adds for a row of another PoP."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import make_url

from dht.model import Change, Op, Part, Transaction
from dht.requests import BlockingStore
from dht.rows import group_key
from dht.wire.blocking import BlockingClient, SocketStore

WARM_TIMES = 3
TABLE = 30_000
"""No table of Nova's has this number."""


class Door:
    """One daemon, and a group of its own in the controller's database and in the next site's."""

    def __init__(self, name: str, url: str, far_url: str) -> None:
        parsed = make_url(url)
        self._store: BlockingStore = SocketStore(BlockingClient(str(parsed.query["socket"]), 20.0))
        databases = {"home": str(parsed.database), "far": str(make_url(far_url).database)}
        own = name, time.monotonic_ns()
        self._keys = {where: (name_of, group_key(name_of, "bench", own)) for where, name_of in databases.items()}
        for where in self._keys:
            self._write(where, Op.INSERT)

    def _write(self, where: str, op: Op = Op.UPDATE) -> None:
        database, key = self._keys[where]
        change = Change(op, TABLE, (1,), {0: time.monotonic_ns()})
        self._store.commit(Transaction(os.urandom(16), database, 0, (Part(key, None, (change,)),)))

    def measure(self, times: int) -> dict[str, list[float]]:
        """Wall ms of each kind of request. A cached read names the ballot that is known, and gets no data again."""
        home, far = self._keys["home"][1], self._keys["far"][1]
        (known,) = self._store.read([far])
        kinds: dict[str, Callable[[], Any]] = {
            "home_read": lambda: self._store.read([home]),
            "far_read": lambda: self._store.read([far]),
            "far_read_cached": lambda: self._store.read([far], [known.ballot]),
            "home_write": lambda: self._write("home"),
            "far_write": lambda: self._write("far"),
        }
        found = {}
        for kind, ask in kinds.items():
            for _ in range(WARM_TIMES):
                ask()
            found[kind] = []
            for _ in range(times):
                began_s = time.perf_counter()
                ask()
                found[kind].append((time.perf_counter() - began_s) * 1000)
        return found
