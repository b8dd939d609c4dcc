"""The world that protocol code gets as arguments: clock, randomness, network, disk.

In production: the running loop, `random.SystemRandom`, WebSocket links and one SQLite file. In `dht.sim`:
virtual time, a seeded generator and simulated links and disks. Protocol code must take time, chance, peers and files
from here and from nowhere else; it may use asyncio (tasks, futures, wait), because both worlds run on an event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from dht.errors import StorageError
from dht.model import NodeId, Struct

Answer = Callable[[NodeId, Struct], Awaitable[Struct]]
"""Serves one request of a peer: (sender, message) -> reply. A DhtError that it raises travels back as that error.

An answer that is a Future goes on by itself: what little there was to do is done. Anything else takes a task.
"""


class Clock(Protocol):
    """Seconds. `monotonic` never goes back and is the only one for protocol decisions; `wall` is for humans."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...

    async def sleep(self, delay_s: float) -> None: ...


class Chance(Protocol):
    """Randomness; random.Random fits."""

    def random(self) -> float: ...

    def uniform(self, a: float, b: float) -> float: ...

    def randbytes(self, n: int) -> bytes: ...


class Network(Protocol):
    """Requests to peers. At most once delivery; a reply may be lost after the request was served."""

    def call(self, to: NodeId, message: Struct, timeout_s: float) -> Awaitable[Struct]:
        """The peer's reply; what is no Future begins only when it is awaited.

        Raises, once awaited, the peer's DhtError as its own class; `Unavailable` with detail sent=False when the
        request certainly did not leave; `Indeterminate` when it may have been served (no reply in time, link lost).
        """
        ...

    def alive(self, node: NodeId) -> bool:
        """Whether the node answered lately, as far as known; a hint for choosing, never a proof."""
        ...

    def silent_s(self, node: NodeId) -> float:
        """For how long the node has not been alive, 0 while it is; a hint like `alive`."""
        ...

    def parted(self, node: NodeId) -> bool:
        """Whether not even its host acknowledges what is sent: the network is cut, or the host down; a hint too.

        A node that is slow, stopped or starting again is not parted.
        """
        ...

    def serve(self, answer: Answer) -> None:
        """Set what answers the peers' requests."""
        ...


class Batch:
    """Writes that become durable together or not at all. A None value deletes."""

    __slots__ = ("writes",)

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes, bytes | None]] = []

    def put(self, space: int, key: bytes, value: bytes) -> None:
        self.writes.append((space, key, value))

    def delete(self, space: int, key: bytes) -> None:
        self.writes.append((space, key, None))


Flushed = Callable[[StorageError | None], None]
"""Told that what was submitted is durable, or why it never will be."""


class Disk(Protocol):
    """Ordered key/value spaces with atomic batches.

    A submitted batch is visible to `get` and `range` at once and durable later, in order of submission. Whoever
    tells anybody what he read or wrote first awaits `durable` of the number that `submit` gave: a forgotten promise is
    a lost write.
    """

    def get(self, space: int, key: bytes) -> bytes | None: ...

    def range(
        self, space: int, low: bytes, high: bytes | None, *, reverse: bool = False, limit: int | None = None
    ) -> Sequence[tuple[bytes, bytes]]:
        """Pairs with low <= key < high (None: to the end of the space), in key order, as they are now."""
        ...

    def submit(self, batch: Batch) -> int:
        """Queue the batch; returns its number (1, 2, ...), or, of an empty one, perhaps that of the one before.

        Raises StorageError once the disk has failed.
        """
        ...

    async def durable(self, number: int) -> None:
        """Return when all batches up to the number are on the disk. Raises StorageError if they never will be."""
        ...

    def when_durable(self, number: int, then: Flushed) -> None:
        """`durable` for who needs no task to wait: `then` is called once, before this returns if they are there."""
        ...

    @property
    def failed(self) -> str | None:
        """Why this disk no longer accepts batches; None while it does."""
        ...


class Space:
    """The key spaces of a node's file. Numbers are part of the format and never reused."""

    META = 1
    ROSTER = 2
    DECREE = 3
    TABLET = 4
    REGISTER = 5
    ROW = 6
    INDEX = 7
    STAGED = 8
    PEER = 9
    SPEC = 10
