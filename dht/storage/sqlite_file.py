"""The file under a `SqliteDisk`: opening, format, lock, reserve, checksums, and what went wrong in words.

One table `kv` (space, key, value), without rowid, in key order. A value rests behind the CRC-32 of its space, key and
content. Beside the file FILE lie FILE.lock (held while a process has it open; says whether there must be a log),
FILE-wal (the log) and FILE.reserve (space given back to a full file system, so that the node can be stopped and
started; taken again at the next start).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import apsw

from dht.errors import StorageError
from dht.storage.write_ahead_log import damaged_log, end_log, missing_log, note_log

FORMAT: Final = 1
"""Raised whenever an older program could not read the file. Version N also reads N - 1."""
APPLICATION_ID: Final = 0x6C756364
PAGE_BYTES: Final = 8192
CRC_BYTES: Final = 4
SPACE_MAX: Final = 999
WAL_KEPT_BYTES: Final = 64 * 1024 * 1024
_MAGIC: Final = b"SQLite format 3\x00"
_BUSY_TIMEOUT_MS: Final = 5000
_READER_CACHE_KIB: Final = 65536
_WRITER_CACHE_KIB: Final = 16384

# A writer's group of changes is one statement over one array. One step of SQLite gives up Python's interpreter lock
# once; a step per row would wait for a busy loop thread (5 ms) at each row: 85 ms for 20 rows, where this takes 7.
# The view is temporary: with one in the file, integrity_check looks at no page that no table refers to.
_TRIGGER: Final = """
CREATE TEMP VIEW changes AS SELECT space, key, value FROM kv;
CREATE TEMP TRIGGER change INSTEAD OF INSERT ON temp.changes BEGIN
  DELETE FROM kv WHERE NEW.value IS NULL AND space = NEW.space AND key = NEW.key;
  INSERT OR REPLACE INTO kv SELECT NEW.space, NEW.key, NEW.value WHERE NEW.value IS NOT NULL;
END"""
_APPLY: Final = """
INSERT INTO changes
SELECT CAST(substr(value, 1, 3) AS INTEGER), substr(value, 12, CAST(substr(value, 4, 8) AS INTEGER)),
       nullif(substr(value, 12 + CAST(substr(value, 4, 8) AS INTEGER)), x'')
FROM carray(?)"""
_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE kv (
  space INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (space, key)
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
COMMIT"""


Write = tuple[int, bytes, bytes | None]
"""(space, key, value); None deletes."""


def seal(space: int, key: bytes, value: bytes) -> bytes:
    """The value as it rests in the file."""
    return crc32(value, crc32(key, space)).to_bytes(CRC_BYTES, "big") + value


def intact(space: Any, key: Any, stored: Any) -> bool:
    """Whether a stored value is what was once written under that key. Damage may have made numbers or text of them."""
    if not (
        isinstance(stored, bytes) and isinstance(key, bytes) and isinstance(space, int) and len(stored) >= CRC_BYTES
    ):
        return False
    return 0 <= space <= SPACE_MAX and crc32(stored[CRC_BYTES:], crc32(key, space)) == int.from_bytes(
        stored[:CRC_BYTES], "big"
    )


def apply(writer: apsw.Connection, writes: Iterable[Write]) -> None:
    """Write all, in order, in one durable transaction. Raises apsw.Error; then nothing was written."""
    items = tuple(
        [
            b"%03d%08d" % (space, len(key)) + key + (b"" if value is None else seal(space, key, value))
            for space, key, value in writes
        ]
    )
    if items:
        writer.execute(_APPLY, (apsw.carray(items),))


class SqliteFile:
    """An open file. `writer` belongs to the writing thread, `reader` to the loop's. Raises StorageError if unusable."""

    def __init__(self, path: Path, reserve_bytes: int, check: bool) -> None:
        self.path = path
        self.reserve_path = path.with_name(path.name + ".reserve")
        self._reserve_bytes = reserve_bytes
        self._lock = _lock(path)
        connections: list[apsw.Connection] = []
        try:
            _refuse_foreign(path)
            if (problem := missing_log(path, self._lock)) is not None:
                raise apsw.CorruptError(problem)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self.writer = apsw.Connection(str(path))
            connections.append(self.writer)
            # Closing after an error must not fold the log and take it away: its note stays, too.
            self.writer.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self._prepare(check)
            self._take_reserve()
            note_log(self._lock, self.writer, FORMAT)
            self.reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            connections.append(self.reader)
            self.reader.set_busy_timeout(_BUSY_TIMEOUT_MS)
            self.reader.pragma("cache_size", -_READER_CACHE_KIB)
        except (apsw.Error, OSError, StorageError, UnicodeDecodeError) as error:
            for connection in connections:
                with contextlib.suppress(apsw.Error):
                    connection.close()
            os.close(self._lock)
            if isinstance(error, StorageError):
                raise
            raise StorageError(self.explain(error, "open")) from error

    def _prepare(self, check: bool) -> None:
        writer = self.writer
        writer.set_busy_timeout(_BUSY_TIMEOUT_MS)
        if not self.path.stat().st_size:
            writer.pragma("page_size", PAGE_BYTES)
        self._check_format()
        if writer.pragma("journal_mode", "wal") != "wal":
            raise StorageError(
                f"cannot open {self.path}: its file system does not support SQLite's write-ahead log (shared memory); "
                "put the data directory on a local disk"
            )
        if (problem := damaged_log(self.path, writer)) is not None:
            raise apsw.CorruptError(problem)
        writer.pragma("synchronous", "full")
        writer.pragma("journal_size_limit", WAL_KEPT_BYTES)
        writer.pragma("temp_store", "memory")
        writer.pragma("cache_size", -_WRITER_CACHE_KIB)
        if writer.pragma("user_version") == 0:
            writer.execute(_SCHEMA)
            _sync_directory(self.path.parent)
        elif check:
            self._check_content()
        writer.execute(_TRIGGER)

    def _check_content(self) -> None:
        """Pages, order and checksums: a key that was changed in place would be an absence when it is asked for."""
        with ThreadPoolExecutor(1) as beside:
            # SQLite's own check leaves the interpreter to ours; a restart waits for both.
            pages = beside.submit(_check_pages, self.path)
            try:
                for (space,) in self.writer.execute("SELECT DISTINCT space FROM kv").fetchall():
                    self._check_space(space)
            finally:
                # What is wrong with the pages explains what is wrong with their content.
                pages.result()

    def _check_space(self, space: Any) -> None:
        """`intact` of each value, written out: a restart waits for half a million of them."""
        sums, count = crc32, CRC_BYTES
        key: Any = b""
        try:
            if not 0 <= space <= SPACE_MAX:
                raise TypeError
            for key, stored in self.writer.execute("SELECT key, value FROM kv WHERE space = ?", (space,)):
                if sums(stored[count:], sums(key, space)).to_bytes(count, "big") != stored[:count]:
                    raise TypeError
        except TypeError:
            # Damage makes numbers or text of what was bytes, too.
            raise apsw.CorruptError(f"checksum of key {shown(key)} in space {space} does not match") from None

    def _check_format(self) -> None:
        application, version = self.writer.pragma("application_id"), self.writer.pragma("user_version")
        tables = self.writer.execute("SELECT count(*) FROM sqlite_schema").fetchall()[0][0]
        if application == 0 and version == 0 and tables == 0:
            return
        if application != APPLICATION_ID:
            raise StorageError(
                f"cannot open {self.path}: it is an SQLite database of another program; give lucd a data directory of "
                "its own"
            )
        if version > FORMAT:
            raise StorageError(
                f"cannot open {self.path}: it has format {version}, written by a newer lucd; this one reads up to "
                f"format {FORMAT}; start the newer lucd, or wipe the directory and let the node join again"
            )

    def _take_reserve(self) -> None:
        if not self._reserve_bytes:
            return
        try:
            handle = os.open(self.reserve_path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if os.fstat(handle).st_size < self._reserve_bytes:
                    os.posix_fallocate(handle, 0, self._reserve_bytes)
            finally:
                os.close(handle)
        except OSError as error:
            self.give_reserve()
            raise StorageError(
                f"cannot keep a reserve of {self._reserve_bytes} bytes in {self.reserve_path}: {error.strerror}; free "
                "at least twice that much on the file system, then start the node again"
            ) from None

    def give_reserve(self) -> None:
        """Return the reserved space to the file system."""
        with contextlib.suppress(OSError):
            self.reserve_path.unlink()

    def explain(self, error: Exception, doing: str) -> str:
        """What was asked, what is the case, what to do."""
        what = f"cannot {doing} {self.path}: "
        match error:
            case apsw.FullError():
                return what + (
                    "the file system is full. The node's reserve was given back to it: free space, then start the node "
                    "again; nothing that was acknowledged is lost"
                )
            case apsw.CorruptError() | apsw.NotADBError() | UnicodeDecodeError():
                return what + (
                    f"the file is damaged ({error}). Keep a copy if you need one, wipe this node's data directory and "
                    "start the node again: it is rebuilt from the other replicas"
                )
            case apsw.CantOpenError() | apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.AuthError():
                return what + f"{error}. Check that the directory exists and that lucd's user may write to it"
            case _:
                return what + f"{error}. Check the disk and the system's log, then start the node again"

    def close(self) -> None:
        """Fold the log into the file if the disk allows, and release the lock."""
        with contextlib.suppress(apsw.Error, OSError):
            self.reader.close()
            end_log(self._lock, self.writer)
        for connection in (self.reader, self.writer):
            with contextlib.suppress(apsw.Error):
                connection.close()
        os.close(self._lock)


def _check_pages(path: Path) -> None:
    reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        reader.set_busy_timeout(_BUSY_TIMEOUT_MS)
        problem = reader.execute("PRAGMA integrity_check(1)").fetchall()[0][0]
    finally:
        reader.close()
    if problem != "ok":
        raise apsw.CorruptError(str(problem))


def shown(key: Any) -> str:
    """A key for a message, whatever damage made of it."""
    return key.hex() if isinstance(key, bytes) else repr(key)


def _lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    try:
        handle = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"cannot open {path}: {lock_path} cannot be created ({error.strerror}). Check that the directory exists "
            "and that lucd's user may write to it"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise StorageError(
            f"cannot open {path}: another process has it open. Stop that one, or give this node a directory of its own"
        ) from None
    return handle


def _refuse_foreign(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"cannot open {path}: {error.strerror}. Check what it is and that lucd's user may read and write it"
        ) from None
    if start and start != _MAGIC:
        raise StorageError(
            f"cannot open {path}: it is not a lucd database (it begins with {start!r}). Move it away, or wipe the data "
            "directory and let the node join again"
        )


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
