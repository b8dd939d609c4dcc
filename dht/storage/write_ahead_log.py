"""Whether a file's write-ahead log is all there: SQLite takes a log up to its first damaged frame and says nothing.

For SQLite a missing log is an empty one and a damaged frame is the end: both silently take back commits that were
acknowledged. Here FILE.lock notes, from the first commit of a run until all of the log is in the file, that there must
be a log; and what it must look like follows from how it is written: each commit is synced before the next one's first
frame, so only the last commit can be torn. A later commit's frame behind the point up to which SQLite reads means
damage, not a crash.

What cannot be told from a crash: the last commit damaged, or the log cut off behind a commit.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import apsw

_LOG_BEGUN: Final = b"log\n"
_MAGICS: Final = {0x377F0682: "<", 0x377F0683: ">"}
_HEADER: Final = struct.Struct(">IIII8s8s")
_FRAME: Final = struct.Struct(">II8s8s")
_WORDS_CHECKED: Final = 6


def log_path(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def note_log(lock: int, writer: apsw.Connection, version: int) -> None:
    """Begin the log, then note durably that there must be one."""
    writer.pragma("user_version", version)
    if os.pread(lock, len(_LOG_BEGUN), 0) != _LOG_BEGUN:
        os.pwrite(lock, _LOG_BEGUN, 0)
        os.fsync(lock)


def end_log(lock: int, writer: apsw.Connection) -> None:
    """Put all of the log into the file, whose only open connection this is, and note that no log is needed."""
    writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    os.ftruncate(lock, 0)
    os.fsync(lock)


def missing_log(path: Path, lock: int) -> str | None:
    """What is wrong with the log before SQLite looks at it, None if nothing is."""
    if os.pread(lock, len(_LOG_BEGUN), 0) != _LOG_BEGUN:
        return None
    try:
        with log_path(path).open("rb") as file:
            header = file.read(_HEADER.size)
    except FileNotFoundError:
        return "its write-ahead log is gone: removed, or another program opened the file after a crash"
    return None if _intact_header(header) else "the header of its write-ahead log is damaged"


def damaged_log(path: Path, writer: apsw.Connection) -> str | None:
    """What is wrong with the log that SQLite has read, None if nothing is."""
    taken, _ = writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    with log_path(path).open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        _, _, page_bytes, _, salts, _ = _HEADER.unpack(header)
        at = _HEADER.size + max(taken, 0) * (_FRAME.size + page_bytes)
        committed = False
        while len(frame := os.pread(file.fileno(), _FRAME.size, at)) == _FRAME.size:
            _, pages_after_commit, frame_salts, _ = _FRAME.unpack(frame)
            if frame_salts == salts:
                if committed:
                    return f"its write-ahead log is damaged behind frame {taken}"
                committed = bool(pages_after_commit)
            at += _FRAME.size + page_bytes
    # What a torn commit left behind the point must not be taken for damage when the next one is torn, too: the log
    # begins anew.
    writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    return None


def _intact_header(header: bytes) -> bool:
    if len(header) < _HEADER.size:
        return False
    magic, _, _, _, _, checksum = _HEADER.unpack(header)
    order = _MAGICS.get(magic)
    if order is None:
        return False
    words = struct.unpack(f"{order}{_WORDS_CHECKED}I", header[: 4 * _WORDS_CHECKED])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return struct.pack(">II", first, second) == bytes(checksum)
