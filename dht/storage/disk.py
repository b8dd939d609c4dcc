"""One SQLite file as a `dht.world.Disk`: batches grouped into durable commits by a writer thread (DESIGN section 9).

All methods belong to the loop's thread. A submitted batch is put into an overlay, which reads look at first, and
handed to the writer; the writer takes whatever waits, writes it as one transaction (one fdatasync) and tells the loop
once. After the first error nothing is accepted or answered any more: what a damaged disk says may be wrong, and
a batch that was lost leaves later ones without ground.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import apsw

from dht.errors import StorageError
from dht.storage.pending import Pending
from dht.storage.sqlite_file import CRC_BYTES, SqliteFile, Write, apply, intact, shown
from dht.world import Batch, Flushed

log = logging.getLogger(__name__)

RESERVE_BYTES: Final = 16 * 1024 * 1024
PENDING_BYTES_MAX: Final = 256 * 1024 * 1024
"""Of batches that wait, each counted up to GROUP_BYTES_MAX."""
GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
CACHE_BYTES_MAX: Final = 32 * 1024 * 1024
CACHED_WRITES_MAX: Final = 100
"""Of one batch."""
_ENTRY_BYTES: Final = 100
"""What a pending write or a cached value costs beside its key and value, roughly."""
_NOT_CACHED: Final = b"not cached"

_GET: Final = "SELECT value FROM kv WHERE space = ? AND key = ?"
_RANGE: Final = "SELECT key, value FROM kv WHERE space = ? AND key >= ? AND key < ? ORDER BY key LIMIT ?"
_RANGE_REVERSE: Final = "SELECT key, value FROM kv WHERE space = ? AND key >= ? AND key < ? ORDER BY key DESC LIMIT ?"
_TAIL: Final = "SELECT key, value FROM kv WHERE space = ? AND key >= ? ORDER BY key LIMIT ?"
_TAIL_REVERSE: Final = "SELECT key, value FROM kv WHERE space = ? AND key >= ? ORDER BY key DESC LIMIT ?"


@dataclass(slots=True)
class _Submitted:
    """A batch on its way to the file."""

    number: int
    writes: list[Write]
    size_bytes: int
    counted_bytes: int
    """What it adds to a backlog. One batch may be larger than any backlog may get: a new index of a large table."""


class _Cache:
    """What `get` read or a small batch wrote lately, absence too: who writes a register reads its header and rows.

    Two halves: when the younger is full, it becomes the older, and what was in that and not asked for since is gone.
    """

    __slots__ = ("_old", "_young", "_young_bytes")

    def __init__(self) -> None:
        self._young: dict[tuple[int, bytes], bytes | None] = {}
        self._old: dict[tuple[int, bytes], bytes | None] = {}
        self._young_bytes = 0

    def get(self, place: tuple[int, bytes]) -> bytes | None:
        """The value, None if the disk has none there, or `_NOT_CACHED` itself."""
        value = self._young.get(place, _NOT_CACHED)
        if value is _NOT_CACHED:
            value = self._old.get(place, _NOT_CACHED)
            if value is not _NOT_CACHED:
                self.put(place, value)
        return value

    def put(self, place: tuple[int, bytes], value: bytes | None) -> None:
        self._young[place] = value
        self._young_bytes += len(place[1]) + _ENTRY_BYTES + (0 if value is None else len(value))
        if self._young_bytes > CACHE_BYTES_MAX // 2:
            self._old, self._young, self._young_bytes = self._young, {}, 0

    def take(self, writes: list[Write], *, only_known: bool) -> int:
        """These are the values now. `only_known`: what is not cached stays so. The bytes of all, about."""
        size_bytes = 0
        for space, key, value in writes:
            place = (space, key)
            entry_bytes = len(key) + _ENTRY_BYTES + (0 if value is None else len(value))
            size_bytes += entry_bytes
            if not only_known or place in self._young or place in self._old:
                self._young[place] = value
                self._young_bytes += entry_bytes
        if self._young_bytes > CACHE_BYTES_MAX // 2:
            self._old, self._young, self._young_bytes = self._young, {}, 0
        return size_bytes


@dataclass(slots=True)
class DiskCounters:
    """For metrics; `commit_s` sums the time of the commits, `pending_bytes` is what waits now."""

    batches: int = 0
    commits: int = 0
    written_bytes: int = 0
    commit_s: float = 0.0
    pending_bytes: int = 0


class SqliteDisk:
    """Opens or creates the file; raises StorageError, in words for an operator, if it cannot.

    `reserve_bytes`: space kept beside the file for the day the file system is full. `check`: look at the start whether
    the file's pages are whole and its keys in order (about 1 s a GB; a value's own checksum is verified at each read).
    """

    def __init__(self, path: str | Path, *, reserve_bytes: int = RESERVE_BYTES, check: bool = True) -> None:
        self._file = SqliteFile(Path(path), reserve_bytes, check)
        self.counters = DiskCounters()
        self._reader = self._file.reader
        self._overlay: dict[int, Pending] = {}
        self._cache = _Cache()
        self._waiting: dict[int, list[Flushed]] = {}
        self._submitted = 0
        self._durable = 0
        self._backlog_bytes = 0
        self._failed: str | None = None
        self._closed = False
        self._handing: list[_Submitted] = []
        self._queue: queue.SimpleQueue[list[_Submitted] | None] = queue.SimpleQueue()
        self._finished: deque[list[_Submitted]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._write, name="lucd-disk", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> str | None:
        return self._failed

    def get(self, space: int, key: bytes) -> bytes | None:
        if self._failed is not None:
            raise StorageError(self._failed)
        place = (space, key)
        value = self._cache.get(place)
        return self._read(space, key, place) if value is _NOT_CACHED else value

    def _read(self, space: int, key: bytes, place: tuple[int, bytes]) -> bytes | None:
        pending = self._overlay.get(space)
        if pending is not None and (entry := pending.get(key)) is not None:
            value = entry[1]
        else:
            try:
                found = self._reader.execute(_GET, place).fetchall()
            except (apsw.Error, UnicodeDecodeError) as error:
                raise self._fail(error, "read") from error
            value = self._opened(space, key, found[0][0]) if found else None
        self._cache.put(place, value)
        return value

    def range(
        self, space: int, low: bytes, high: bytes | None, *, reverse: bool = False, limit: int | None = None
    ) -> Sequence[tuple[bytes, bytes]]:
        self._refuse_if_failed()
        if (high is not None and high <= low) or limit == 0:
            return []
        pending = self._overlay.get(space)
        newer = [] if pending is None else pending.range(low, high, reverse)
        try:
            if not newer:
                return [
                    (key, self._opened(space, key, value))
                    for key, value in self._stored(space, low, high, reverse, limit)
                ]
            spare = None if limit is None else limit + len(newer)
            stored = self._stored(space, low, high, reverse, spare)
            merged = _overlaid(stored, newer, reverse)
            return [
                (key, self._opened(space, key, value) if on_disk else value)
                for key, value, on_disk in itertools.islice(merged, limit)
            ]
        except (apsw.Error, UnicodeDecodeError) as error:
            raise self._fail(error, "read") from error

    def submit(self, batch: Batch) -> int:
        self._refuse_if_failed()
        if self._finished:
            self._settle()
        writes = batch.writes
        if not writes:
            # Who submits nothing wants to know when all before is durable: no work for the writer, and no commit.
            return self._submitted
        self._submitted = number = self._submitted + 1
        # What a request writes is read at the next one; what is copied or built by the thousand is not.
        size_bytes = self._cache.take(writes, only_known=len(writes) > CACHED_WRITES_MAX)
        overlay = self._overlay
        for space, key, value in writes:
            pending = overlay.get(space)
            if pending is None:
                pending = overlay[space] = Pending()
            pending.put(key, number, value)
        counted_bytes = min(size_bytes, GROUP_BYTES_MAX)
        submitted = _Submitted(number, writes, size_bytes, counted_bytes)
        self.counters.batches += 1
        self.counters.pending_bytes += size_bytes
        self._backlog_bytes += counted_bytes
        self._hand_over_soon(submitted)
        if self._backlog_bytes > PENDING_BYTES_MAX:
            self._failed = (
                f"cannot write {self._file.path}: the disk did not keep up, {self.counters.pending_bytes} bytes wait "
                "to be written. Check the disk and the system's log, then start the node again"
            )
            # The writer may have nothing more to tell: what it had in hand is not written any more.
            self._notify()
            raise StorageError(self._failed)
        return number

    async def durable(self, number: int) -> None:
        if number <= self._durable:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.when_durable(number, partial(_end, waiter))
        await waiter

    def when_durable(self, number: int, then: Flushed) -> None:
        """As `dht.world.Disk.when_durable`; `then` is called from the loop."""
        if self._finished:
            self._settle()
        if number <= self._durable:
            then(None)
        elif self._failed is not None:
            then(StorageError(self._failed))
        elif number > self._submitted:
            raise ValueError(f"batch {number} was never submitted; the newest is {self._submitted}")
        else:
            self._waiting.setdefault(number, []).append(then)
            if (loop := asyncio.get_running_loop()) is not self._loop:
                self._loop = loop
                self._hand_over()
                # The writer may have finished between the first look and the moment it could know of this loop.
                self._settle()

    def _hand_over_soon(self, submitted: _Submitted) -> None:
        """Not at once: what is submitted meanwhile shares a commit, and what is to be sent meanwhile is on its way.

        The writer that is woken up wants the interpreter, which sending lets go of for a moment: it would wait for it
        then, and the sender for the writer.
        """
        self._handing.append(submitted)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._hand_over()
            return
        if len(self._handing) == 1 or loop is not self._loop:
            self._loop = loop
            loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        if self._handing:
            handed, self._handing = self._handing, []
            self._queue.put(handed)

    def close(self) -> None:
        """Write what was submitted, close the file, release the lock. Idempotent; blocks for the last commit."""
        if self._closed:
            return
        self._closed = True
        self._hand_over()
        self._queue.put(None)
        self._thread.join()
        self._settle()
        self._failed = self._failed or f"cannot use {self._file.path}: it was closed"
        self._settle()
        self._file.close()

    def _opened(self, space: int, key: bytes, stored: Any) -> bytes:
        if not intact(space, key, stored):
            damage = apsw.CorruptError(f"checksum of key {shown(key)} in space {space} does not match")
            raise self._fail(damage, "read")
        value: bytes = stored[CRC_BYTES:]
        return value

    def _stored(
        self, space: int, low: bytes, high: bytes | None, reverse: bool, limit: int | None
    ) -> list[tuple[Any, ...]]:
        most = -1 if limit is None else limit
        if high is None:
            return self._reader.execute(_TAIL_REVERSE if reverse else _TAIL, (space, low, most)).fetchall()
        return self._reader.execute(_RANGE_REVERSE if reverse else _RANGE, (space, low, high, most)).fetchall()

    def _refuse_if_failed(self) -> None:
        if self._failed is not None:
            raise StorageError(self._failed)

    def _fail(self, error: Exception, doing: str) -> StorageError:
        """Remember the first failure; the error to raise for it. Called from both threads."""
        if self._failed is None:
            self._failed = self._file.explain(error, doing)
        self._notify()
        return StorageError(self._failed)

    def _settle(self, tell_now: bool = False) -> None:
        """Take notice of finished commits: forget their part of the overlay, tell who waits for them.

        `tell_now`: called by the loop itself. Else whoever calls is in the middle of something, and they are told soon.
        """
        while self._finished:
            group = self._finished.popleft()
            for submitted in group:
                number = submitted.number
                for space, key, _ in submitted.writes:
                    self._overlay[space].forget(key, number)
                self.counters.pending_bytes -= submitted.size_bytes
                self._backlog_bytes -= submitted.counted_bytes
                self._durable = number
                if number in self._waiting:
                    self._tell(number, None, tell_now)
        if self._failed is not None and self._waiting:
            for number in list(self._waiting):
                self._tell(number, self._failed, tell_now)

    def _tell(self, number: int, failed: str | None, now: bool) -> None:
        for then in self._waiting.pop(number, ()):
            error = None if failed is None else StorageError(failed)
            if now:
                try:
                    then(error)
                except Exception:
                    # A bug of one who waits is not to keep the others waiting.
                    log.exception("what was to follow a commit failed")
            elif self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon(then, error)

    def _notify(self) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._settle, True)
            except RuntimeError:
                # The loop is closed: nobody waits any more.
                self._loop = None

    def _write(self) -> None:
        """The writer thread: one commit for all that waits, in order, until told to stop or the first error."""
        stopping = False
        while not stopping:
            group, stopping = self._next_group()
            if not group or self._failed is not None:
                continue
            started = time.perf_counter()
            try:
                apply(self._file.writer, _latest(group))
            except Exception as error:
                # Whatever it was: a writer that died silently would leave everybody waiting.
                if isinstance(error, apsw.FullError):
                    self._file.give_reserve()
                self._fail(error, "write")
                continue
            self.counters.commits += 1
            self.counters.written_bytes += sum(submitted.size_bytes for submitted in group)
            self.counters.commit_s += time.perf_counter() - started
            self._finished.append(group)
            self._notify()

    def _next_group(self) -> tuple[list[_Submitted], bool]:
        group: list[_Submitted] = []
        size_bytes = 0
        handed = self._queue.get()
        while handed is not None:
            group += handed
            size_bytes += sum([submitted.size_bytes for submitted in handed])
            if size_bytes >= GROUP_BYTES_MAX:
                return group, False
            try:
                handed = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True


def _latest(group: list[_Submitted]) -> Sequence[Write]:
    """What the batches leave, each key once at most for each of them."""
    if len(group) == 1:
        return group[0].writes
    latest = {(space, key): value for submitted in group for space, key, value in submitted.writes}
    return [(space, key, value) for (space, key), value in latest.items()]


def _end(waiter: asyncio.Future[None], error: StorageError | None) -> None:
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)


def _overlaid(
    stored: Iterable[tuple[Any, ...]], pending: list[tuple[bytes, bytes | None]], reverse: bool
) -> Iterator[tuple[bytes, bytes, bool]]:
    """Both in key order, the pending value winning and hiding what it deletes; and whether it is from the disk."""
    newer = dict(pending)
    return heapq.merge(
        [(key, value, True) for key, value in stored if key not in newer],
        [(key, value, False) for key, value in pending if value is not None],
        key=lambda entry: entry[0],
        reverse=reverse,
    )
