"""Homes of databases in the node's own file: what it last heard, for a start while `global` is out of reach.

A node that starts in a PoP which is cut off must know that a database lives in several PoPs to serve the rows of it
that live in its own. The file follows every list that the node reads. It is believed like what a running node
remembers, and for as long: until the list can be read again. So nothing waits for it to be durable, and a note that is
wrong or lost costs what a node costs that looked the home up before it was cut off, or never did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import islice
from typing import Final

from dht.errors import StorageError
from dht.world import Batch, Disk, Space

HOMES_NOTED_MAX: Final = 10_000
_KEY: Final = b"home/"
_END: Final = b"home0"


class NotedHomes:
    """Of the file of this node's PoP."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        pairs = disk.range(Space.META, _KEY, _END)
        self._homes = {key.removeprefix(_KEY).decode(): home.decode() for key, home in pairs}

    def all(self) -> dict[str, str]:
        """Databases with their homes, as the file has them."""
        return dict(self._homes)

    def follow(self, listed: Mapping[str, str]) -> None:
        """Note what the list says now, and nothing else. On a disk that failed nothing is noted."""
        kept = dict(islice(listed.items(), HOMES_NOTED_MAX))
        batch = Batch()
        for name in self._homes.keys() - kept.keys():
            batch.delete(Space.META, _KEY + name.encode())
        for name, home in kept.items():
            if self._homes.get(name) != home:
                batch.put(Space.META, _KEY + name.encode(), home.encode())
        if batch.writes:
            with contextlib.suppress(StorageError):
                self._disk.submit(batch)
                self._homes = kept
