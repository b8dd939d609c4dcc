"""Where the replicas of registers stand, read from the daemons' files while they run."""

from __future__ import annotations

import apsw
import msgspec

from dht.model import Ballot
from dht.storage.registers import Header
from dht.storage.sqlite_file import CRC_BYTES
from dht.world import Space
from lucd.demo.daemons import LocalNode

_decode = msgspec.msgpack.Decoder(Header).decode
_TABLET_BYTES = 2


def standings(node: LocalNode) -> dict[bytes, tuple[Ballot, bytes]]:
    """Group -> (accepted ballot, digest) of every register that the daemon has on its disk."""
    connection = apsw.Connection(str(node.data_dir / "store.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(5000)
        rows = connection.execute("SELECT key, value FROM kv WHERE space = ?", (Space.REGISTER,)).fetchall()
    finally:
        connection.close()
    headers = {bytes(key[_TABLET_BYTES:]): _decode(value[CRC_BYTES:]) for key, value in rows}
    return {key: (header.accepted, header.digest) for key, header in headers.items()}


def differing(nodes: list[LocalNode]) -> list[bytes]:
    """Groups on which not all daemons stand at one ballot with one content."""
    seen = [standings(node) for node in nodes]
    keys = dict.fromkeys(key for one in seen for key in one)
    return [key for key in keys if any(one.get(key) != seen[0].get(key) for one in seen)]
