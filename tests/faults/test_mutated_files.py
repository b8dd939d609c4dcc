"""A small part of `make fuzz`: frames and data files damaged at random; what a log that is not all there looks like."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from dht.errors import StorageError
from dht.storage.disk import SqliteDisk
from dht.storage.sqlite_file import seal
from dht.storage.write_ahead_log import log_path
from dht.world import Batch
from tests.faults import fuzzed_frames
from tests.faults.mutated_files import run_cases


def test_mutated_files_are_refused_or_right() -> None:
    totals = run_cases(seed=1, first=0, count=60)
    assert totals.total() == 60
    assert sum(times for kind, times in totals.items() if kind.endswith("refused")) > 20


async def test_fuzzed_frames_and_datagrams_are_counted_and_nothing_else() -> None:
    totals = await fuzzed_frames.run_cases(seed=1, first=0, count=2000)
    assert totals["handshake: refused"] > 400
    assert totals["datagram: received"] > 10


def killed(path: Path, commits: int = 6) -> Path:
    """A copy of the files of a node in the middle of its life, as kill -9 leaves them."""

    async def write() -> None:
        for number in range(commits):
            batch = Batch()
            batch.put(1, b"last", b"%d" % number)
            batch.put(2, b"%d" % number, bytes(3000))
            await disk.durable(disk.submit(batch))

    disk = SqliteDisk(path / "a", reserve_bytes=0)
    asyncio.run(write())
    (path / "copy").mkdir()
    for file in path.glob("a*"):
        shutil.copyfile(file, path / "copy" / file.name)
    disk.close()
    return path / "copy" / "a"


def test_log_removed_after_a_crash_is_noticed(tmp_path: Path) -> None:
    file = killed(tmp_path)
    log_path(file).unlink()
    with pytest.raises(StorageError, match=r"write-ahead log is gone.*wipe"):
        SqliteDisk(file, reserve_bytes=0)


def test_log_that_is_not_needed_after_a_stop_may_go(tmp_path: Path) -> None:
    killed(tmp_path)
    log_path(tmp_path / "a").unlink(missing_ok=True)
    disk = SqliteDisk(tmp_path / "a", reserve_bytes=0)
    assert disk.get(1, b"last") == b"5"
    disk.close()


def test_frame_damaged_before_the_last_commit_is_no_torn_write(tmp_path: Path) -> None:
    file = killed(tmp_path)
    data = bytearray(log_path(file).read_bytes())
    data[32 + 24 + 8192 + 24 + 100] ^= 1
    log_path(file).write_bytes(data)
    with pytest.raises(StorageError, match=r"log is damaged behind frame \d+.*wipe"):
        SqliteDisk(file, reserve_bytes=0)


def test_start_that_fails_keeps_the_log_and_its_note(tmp_path: Path) -> None:
    file = killed(tmp_path)
    with pytest.raises(StorageError, match="cannot keep a reserve"):
        SqliteDisk(file, reserve_bytes=1 << 60)
    disk = SqliteDisk(file, reserve_bytes=0)
    assert disk.get(1, b"last") == b"5"
    disk.close()


@pytest.mark.parametrize("damage", ["value = 'text'", "value = 7", "key = 'text'", "value = x'01'", "space = -1"])
def test_value_of_another_type_is_damage(tmp_path: Path, damage: str) -> None:
    killed(tmp_path)
    disk = SqliteDisk(tmp_path / "a", reserve_bytes=0)
    disk._file.writer.execute(f"UPDATE kv SET {damage} WHERE space = 1 AND key = x'6c617374'")
    disk._file.writer.execute("INSERT INTO kv VALUES (3, ?, ?)", (b"whole", seal(3, b"whole", b"1")))
    disk.close()
    with pytest.raises(StorageError, match=r"checksum of key .* does not match.*wipe"):
        SqliteDisk(tmp_path / "a", reserve_bytes=0)
    disk = SqliteDisk(tmp_path / "a", reserve_bytes=0, check=False)
    assert disk.get(3, b"whole") == b"1"
    if damage.startswith("value"):
        with pytest.raises(StorageError, match="checksum"):
            disk.get(1, b"last")
    disk.close()
