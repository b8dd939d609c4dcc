"""A disk in memory: durable at once, gone with the process. For tests, and for stores that need no file."""

from __future__ import annotations

from collections.abc import Sequence

from sortedcontainers import SortedDict

from dht.errors import StorageError
from dht.world import Batch, Flushed


class OrderedSpaces:
    """The reading half of `dht.world.Disk` over sorted dictionaries; the simulator's disk has it too."""

    def __init__(self) -> None:
        self._spaces: dict[int, SortedDict] = {}

    def get(self, space: int, key: bytes) -> bytes | None:
        pairs = self._spaces.get(space)
        return None if pairs is None else pairs.get(key)

    def range(
        self, space: int, low: bytes, high: bytes | None, *, reverse: bool = False, limit: int | None = None
    ) -> Sequence[tuple[bytes, bytes]]:
        pairs = self._spaces.get(space)
        if pairs is None or (high is not None and high <= low):
            return []
        out: list[tuple[bytes, bytes]] = []
        for key in pairs.irange(low, high, inclusive=(True, False), reverse=reverse):
            if limit is not None and len(out) >= limit:
                break
            out.append((key, pairs[key]))
        return out


class MemoryDisk(OrderedSpaces):
    """`dht.world.Disk` over sorted dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self._submitted = 0
        self._failed: str | None = None

    @property
    def failed(self) -> str | None:
        return self._failed

    def fail(self, reason: str) -> None:
        """Refuse everything from now on, as a real disk does after its first error."""
        self._failed = reason

    def submit(self, batch: Batch) -> int:
        if self._failed is not None:
            raise StorageError(self._failed)
        for space, key, value in batch.writes:
            pairs = self._spaces.get(space)
            if pairs is None:
                pairs = self._spaces[space] = SortedDict()
            if value is None:
                pairs.pop(key, None)
            else:
                pairs[key] = value
        self._submitted += 1
        return self._submitted

    async def durable(self, number: int) -> None:
        if self._failed is not None and number > self._submitted:
            raise StorageError(self._failed)

    def when_durable(self, number: int, then: Flushed) -> None:
        lost = self._failed is not None and number > self._submitted
        then(StorageError(self._failed or "") if lost else None)

    def clone(self) -> MemoryDisk:
        """An independent copy of the content, cheap enough to start each test from a prepared state."""
        other = MemoryDisk()
        other._spaces = {space: pairs.copy() for space, pairs in self._spaces.items()}
        other._submitted = self._submitted
        return other
