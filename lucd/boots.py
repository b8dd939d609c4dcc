"""Boot counters of the peers met: a copied or rolled-back data directory shows by them (DESIGN section 3)."""

from __future__ import annotations

import msgspec

from dht.errors import Conflict, StorageError
from dht.model import NodeId
from dht.world import Batch, Disk, Space

_decode = msgspec.msgpack.Decoder(tuple[int, bytes]).decode


class BootBook:
    """The highest boot counter met of each incarnation and the start that had it, kept in the node's file.

    It is written without waiting for the disk: losing the last entry in a crash only delays the refusal of a copy.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._met: dict[bytes, tuple[int, bytes]] = {}
        for key, value in disk.range(Space.PEER, b"", None):
            try:
                self._met[key] = _decode(value)
            except msgspec.MsgspecError as error:
                raise StorageError(
                    f"a peer's boot counter cannot be read ({error}); wipe the data directory and join again"
                ) from None

    def accept(self, node_id: NodeId, incarnation: bytes, boot: int, start_id: bytes) -> None:
        """Note a proven peer; raises Conflict when its incarnation was met with a higher counter or at another start.

        A counter is raised durably before a node speaks, so the same one at two starts means two copies of a directory.
        """
        key = node_id + incarnation
        known = self._met.get(key, (0, b""))
        if boot < known[0] or (boot == known[0] and start_id != known[1]):
            raise Conflict(
                f"node {node_id.hex()} says that this is start {boot} of its data directory, but {known[0]} was met "
                "before: the directory was copied or rolled back; wipe it and join again"
            )
        if boot > known[0]:
            self._met[key] = (boot, start_id)
            batch = Batch()
            batch.put(Space.PEER, key, msgspec.msgpack.encode((boot, start_id)))
            self._disk.submit(batch)
