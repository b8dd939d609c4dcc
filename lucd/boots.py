"""Boot counters of the peers met: a copied or rolled-back data directory shows by them (DESIGN section 3)."""

from __future__ import annotations

import msgspec

from dht.errors import Conflict, StorageError
from dht.model import NodeId
from dht.world import Batch, Disk, Space

_decode = msgspec.msgpack.Decoder(int).decode


class BootBook:
    """Highest boot counter met of each incarnation, kept in the node's file.

    It is written without waiting for the disk: losing the last entry in a crash only delays the refusal of a copy.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._boots: dict[bytes, int] = {}
        for key, value in disk.range(Space.PEER, b"", None):
            try:
                self._boots[key] = _decode(value)
            except msgspec.MsgspecError as error:
                raise StorageError(
                    f"a peer's boot counter cannot be read ({error}); wipe the data directory and join again"
                ) from None

    def accept(self, node_id: NodeId, incarnation: bytes, boot: int) -> None:
        """Note a proven peer; raises Conflict when its incarnation was met with a higher counter."""
        key = node_id + incarnation
        known = self._boots.get(key, 0)
        if boot < known:
            raise Conflict(
                f"node {node_id.hex()} says that this is start {boot} of its data directory, but start {known} was met "
                "before: the directory was copied or rolled back; wipe it and join again"
            )
        if boot > known:
            self._boots[key] = boot
            batch = Batch()
            batch.put(Space.PEER, key, msgspec.msgpack.encode(boot))
            self._disk.submit(batch)
