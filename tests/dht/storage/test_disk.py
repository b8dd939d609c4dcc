"""SqliteDisk: what is durable survives, what is damaged is refused, and the overlay is never seen through."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.errors import StorageError
from dht.storage import disk as disk_module
from dht.storage.disk import SqliteDisk
from dht.storage.memory import MemoryDisk
from dht.storage.sqlite_file import FORMAT
from dht.world import Batch, Disk

RESERVE = 65536


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.db"


@pytest.fixture
def disk(path: Path) -> Iterator[SqliteDisk]:
    disk = SqliteDisk(path, reserve_bytes=RESERVE)
    yield disk
    disk.close()


def batch_of(*writes: tuple[int, bytes, bytes | None]) -> Batch:
    batch = Batch()
    batch.writes.extend(writes)
    return batch


async def test_get_and_range_before_and_after_durable_give_what_was_submitted(disk: SqliteDisk) -> None:
    number = 0
    for n in range(100):
        number = disk.submit(batch_of((1, b"k%02d" % n, b"v%d" % n), (2, b"x", b"%d" % n)))
        assert disk.get(1, b"k%02d" % n) == b"v%d" % n
    assert [k for k, _ in disk.range(1, b"k10", b"k13")] == [b"k10", b"k11", b"k12"]
    await disk.durable(number)
    assert disk.get(2, b"x") == b"99"
    assert [k for k, _ in disk.range(1, b"k10", b"k90", reverse=True, limit=2)] == [b"k89", b"k88"]
    assert disk.range(1, b"k98", None) == [(b"k98", b"v98"), (b"k99", b"v99")]
    assert disk.range(3, b"", None) == []
    assert disk.get(3, b"") is None


async def test_get_of_cached_and_forgotten_values_and_absences_gives_what_was_submitted(
    disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "CACHE_BYTES_MAX", 1500)
    chance = random.Random(1)
    model: dict[bytes, bytes] = {}
    for n in range(600):
        key = b"k%02d" % chance.randrange(20)
        assert disk.get(1, key) == model.get(key)
        value = None if chance.random() < 0.3 else b"v%d" % n
        model.pop(key, None)
        if value is not None:
            model[key] = value
        number = disk.submit(batch_of((1, key, value)))
        if n % 7 == 0:
            await disk.durable(number)
        key = b"k%02d" % chance.randrange(20)
        assert disk.get(1, key) == model.get(key)


async def test_empty_batch_and_value_and_key_are_kept_apart_from_absence(disk: SqliteDisk) -> None:
    await disk.durable(disk.submit(Batch()))
    await disk.durable(disk.submit(batch_of((1, b"", b""), (255, b"\x00", b"\x00"))))
    assert disk.get(1, b"") == b""
    assert disk.range(1, b"", None) == [(b"", b"")]
    await disk.durable(disk.submit(batch_of((1, b"", None))))
    assert disk.get(1, b"") is None
    assert disk.get(255, b"\x00") == b"\x00"


async def test_empty_batch_is_durable_when_what_came_before_it_is_and_makes_no_commit(disk: SqliteDisk) -> None:
    number = disk.submit(batch_of((1, b"k", b"v")))
    await disk.durable(disk.submit(Batch()))
    assert disk._durable == number
    for _ in range(5):
        await disk.durable(disk.submit(Batch()))
    assert (disk.counters.batches, disk.counters.commits) == (1, 1)


async def test_batches_that_are_submitted_in_one_turn_of_the_loop_share_a_commit(disk: SqliteDisk) -> None:
    for n in range(5):
        number = disk.submit(batch_of((1, b"k%d" % n, b"v")))
    await disk.durable(number)
    assert (disk.counters.batches, disk.counters.commits) == (5, 1)


async def test_who_waits_without_a_task_is_told_once_when_the_batch_is_durable(disk: SqliteDisk) -> None:
    told: list[StorageError | None] = []
    number = disk.submit(batch_of((1, b"k", b"v")))
    disk.when_durable(number, told.append)
    assert not told
    await disk.durable(number)
    assert told == [None]
    disk.when_durable(number, told.append)
    assert told == [None, None]
    disk._fail(apsw.IOError("gone"), "write")
    disk.when_durable(number, told.append)
    disk.when_durable(number + 1, told.append)
    assert told[:3] == [None] * 3
    assert isinstance(told[3], StorageError)


async def test_who_waits_without_a_task_is_told_that_the_disk_has_failed(
    disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise apsw.IOError("gone")

    monkeypatch.setattr(disk_module, "apply", broken)
    told: list[StorageError | None] = []
    number = disk.submit(batch_of((1, b"k", b"v")))
    disk.when_durable(number, told.append)
    with pytest.raises(StorageError):
        await disk.durable(number)
    assert len(told) == 1
    assert isinstance(told[0], StorageError)


async def test_who_fails_when_he_is_told_keeps_nobody_else_waiting(disk: SqliteDisk) -> None:
    def broken(error: StorageError | None) -> None:
        raise RuntimeError("a bug")

    number = disk.submit(batch_of((1, b"k", b"v")))
    disk.when_durable(number, broken)
    await asyncio.wait_for(disk.durable(number), 10.0)
    await asyncio.wait_for(disk.durable(disk.submit(batch_of((1, b"k", b"w")))), 10.0)


def test_batch_of_a_loop_that_has_ended_is_written_for_the_next_one(disk: SqliteDisk) -> None:
    async def submit() -> int:
        return disk.submit(batch_of((1, b"k", b"v")))

    number = asyncio.run(submit())
    asyncio.run(asyncio.wait_for(disk.durable(number), 10.0))
    assert disk.counters.commits == 1


async def test_reopened_file_holds_all_and_numbers_start_again(path: Path) -> None:
    disk = SqliteDisk(path, reserve_bytes=RESERVE)
    disk.submit(batch_of((1, b"a", b"1"), (1, b"b", b"2")))
    disk.submit(batch_of((1, b"a", None)))
    disk.close()
    disk.close()
    with pytest.raises(StorageError, match="closed"):
        disk.submit(Batch())
    again = SqliteDisk(path, reserve_bytes=RESERVE)
    assert again.range(1, b"", None) == [(b"b", b"2")]
    assert again.submit(batch_of((1, b"c", b"3"))) == 1
    again.close()


async def test_many_waiting_batches_become_few_commits(disk: SqliteDisk) -> None:
    async def write(n: int) -> None:
        await disk.durable(disk.submit(batch_of((1, b"%d" % n, b"v"))))

    await asyncio.gather(*[write(n) for n in range(1000)])
    assert disk.counters.batches == 1000
    assert disk.counters.commits < 100
    assert disk.counters.pending_bytes == 0
    assert len(disk.range(1, b"", None)) == 1000


async def test_one_batch_larger_than_any_backlog_is_written(disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new index of a large table, or a tablet that is taken over, is one batch; the disk is as fast as ever."""
    monkeypatch.setattr(disk_module, "PENDING_BYTES_MAX", 100_000)
    monkeypatch.setattr(disk_module, "GROUP_BYTES_MAX", 10_000)
    large = disk.submit(batch_of(*((1, b"%08d" % n, b"x" * 1000) for n in range(500))))
    small = disk.submit(batch_of((2, b"a", b"1")))
    await disk.durable(large)
    await disk.durable(small)
    assert len(disk.range(1, b"", None)) == 500
    assert disk.failed is None
    assert disk.counters.pending_bytes == 0


async def test_backlog_beyond_the_limit_fails_whoever_waits_though_the_writer_has_nothing_more_to_tell(
    disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_group, taken, goes_on = disk._next_group, threading.Event(), threading.Event()

    def held() -> object:
        group, stopping = next_group()
        if any(submitted.writes == [(1, b"held", b"1")] for submitted in group):
            taken.set()
            goes_on.wait(10)
        return group, stopping

    monkeypatch.setattr(disk, "_next_group", held)
    await disk.durable(disk.submit(batch_of((1, b"first", b"1"))))
    waiter = asyncio.create_task(disk.durable(disk.submit(batch_of((1, b"held", b"1")))))
    await asyncio.sleep(0)
    assert taken.wait(10)
    monkeypatch.setattr(disk_module, "PENDING_BYTES_MAX", 1000)
    with pytest.raises(StorageError, match="did not keep up"):
        disk.submit(batch_of((1, b"b", b"x" * 1000)))
    goes_on.set()
    with pytest.raises(StorageError, match="did not keep up"):
        async with asyncio.timeout(10):
            await waiter


async def test_durable_when_a_waiter_is_cancelled_still_wakes_the_others(disk: SqliteDisk) -> None:
    number = disk.submit(batch_of((1, b"a", b"1")))
    tasks = [asyncio.create_task(disk.durable(number)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    done, pending = await asyncio.wait(tasks, timeout=5)
    assert not pending
    assert sum(task.cancelled() for task in done) <= 1
    with pytest.raises(ValueError, match="never submitted"):
        await disk.durable(number + 1)


def test_file_is_opened_with_full_synchronous_write_ahead_log(disk: SqliteDisk) -> None:
    assert disk._file.writer.pragma("synchronous") == 2
    assert disk._file.writer.pragma("journal_mode") == "wal"


OPERATIONS = st.one_of(
    st.tuples(
        st.just("write"),
        st.lists(
            st.tuples(st.integers(1, 2), st.binary(max_size=2), st.none() | st.binary(max_size=3)),
            max_size=5,
        ),
    ),
    st.tuples(st.just("durable"), st.just(None)),
    st.tuples(
        st.just("range"),
        st.tuples(
            st.integers(1, 2),
            st.binary(max_size=2),
            st.none() | st.binary(max_size=2),
            st.booleans(),
            st.none() | st.integers(0, 4),
        ),
    ),
)


def model_range(model: dict, space: int, low: bytes, high: bytes | None, reverse: bool, limit: int | None) -> list:
    pairs = sorted((k, v) for (s, k), v in model.items() if s == space and k >= low and (high is None or k < high))
    return (pairs[::-1] if reverse else pairs)[:limit]


@given(st.lists(OPERATIONS, max_size=30), st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_operations_equal_a_dict(tmp_path_factory, operations, in_memory) -> None:
    path = tmp_path_factory.mktemp("disk") / "node.db"
    disk: Disk = MemoryDisk() if in_memory else SqliteDisk(path, reserve_bytes=0)

    async def run() -> None:
        model: dict[tuple[int, bytes], bytes] = {}
        number = 0
        for kind, what in operations:
            if kind == "write":
                number = disk.submit(batch_of(*what))
                for space, key, value in what:
                    model.pop((space, key), None)
                    if value is not None:
                        model[space, key] = value
                    assert disk.get(space, key) == model.get((space, key)) or what.count((space, key)) != 1
            elif kind == "durable":
                await disk.durable(number)
            else:
                space, low, high, reverse, limit = what
                assert list(disk.range(space, low, high, reverse=reverse, limit=limit)) == model_range(model, *what)
        for space in (1, 2):
            assert dict(disk.range(space, b"", None)) == {k: v for (s, k), v in model.items() if s == space}

    asyncio.run(run())
    if isinstance(disk, SqliteDisk):
        disk.close()
        shutil.rmtree(path.parent)


WRITER = """
import asyncio, sys
from dht.storage.disk import SqliteDisk
from dht.world import Batch
async def main():
    disk = SqliteDisk(sys.argv[1], reserve_bytes=0)
    number = 0
    async def write(n):
        batch = Batch()
        batch.put(1, b"%08d" % n, b"x" * (n % 5000))
        batch.put(2, b"last", b"%08d" % n)
        await disk.durable(disk.submit(batch))
        print(n, flush=True)
    while True:
        await asyncio.gather(*[write(number + i) for i in range(7)])
        number += 7
asyncio.run(main())
"""


def prefix_kept(path: Path) -> int:
    """How many batches of WRITER the file holds; fails unless they are exactly the first ones, whole."""
    disk = SqliteDisk(path, reserve_bytes=0)
    pairs = disk.range(1, b"", None)
    assert [key for key, _ in pairs] == [b"%08d" % n for n in range(len(pairs))]
    assert all(len(value) == n % 5000 for n, (_, value) in enumerate(pairs))
    last = disk.get(2, b"last")
    assert last == (b"%08d" % (len(pairs) - 1) if pairs else None)
    disk.close()
    return len(pairs)


def test_killed_process_keeps_every_acknowledged_batch_and_only_a_prefix(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(300)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    process.stdout.close()
    assert prefix_kept(path) >= max(acknowledged) + 1


def test_log_cut_anywhere_keeps_a_prefix_of_whole_batches(path: Path, tmp_path: Path) -> None:
    disk = SqliteDisk(path, reserve_bytes=0)

    async def write() -> None:
        for n in range(12):
            await disk.durable(disk.submit(batch_of((1, b"%08d" % n, b"x" * n), (2, b"last", b"%08d" % n))))

    asyncio.run(write())
    log = path.with_name(path.name + "-wal").read_bytes()
    database = path.read_bytes()
    disk.close()
    kept = []
    for cut in range(0, len(log) + 1, max(1, len(log) // 40)):
        copy = tmp_path / f"cut{cut}" / "node.db"
        copy.parent.mkdir()
        copy.write_bytes(database)
        copy.with_name("node.db-wal").write_bytes(log[:cut])
        kept.append(prefix_kept(copy))
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] >= 11


def filled(path: Path) -> None:
    disk = SqliteDisk(path, reserve_bytes=0)
    for n in range(50):
        disk.submit(batch_of((1, b"key-%04d" % n, b"value-%04d" % n * 20)))
    disk.close()


def flip(path: Path, what: bytes) -> None:
    """Flip one bit in each copy of `what`; stale copies in free parts of pages would not be noticed."""
    data = path.read_bytes()
    assert what in data
    path.write_bytes(data.replace(what, bytes([what[0] ^ 1]) + what[1:]))


def test_flipped_byte_in_value_raises_storage_error_and_stops_the_disk(path: Path) -> None:
    filled(path)
    flip(path, b"value-0007")
    with pytest.raises(StorageError, match=r"checksum.*wipe"):
        SqliteDisk(path, reserve_bytes=0)
    disk = SqliteDisk(path, reserve_bytes=0, check=False)
    assert disk.get(1, b"key-0008") == b"value-0008" * 20
    number = disk.submit(batch_of((1, b"a", b"b")))
    with pytest.raises(StorageError, match=r"damaged.*wipe"):
        disk.get(1, b"key-0007")
    assert disk.failed is not None
    for action in (lambda: disk.submit(Batch()), lambda: disk.get(1, b"key-0008"), lambda: disk.range(1, b"", None)):
        with pytest.raises(StorageError, match="checksum"):
            action()
    assert number == 1
    disk.close()


def test_flipped_byte_in_key_is_found_at_the_start_or_when_read(path: Path) -> None:
    filled(path)
    flip(path, b"key-0007")
    with pytest.raises(StorageError, match="damaged"):
        SqliteDisk(path, reserve_bytes=0)
    disk = SqliteDisk(path, reserve_bytes=0, check=False)
    with pytest.raises(StorageError, match="checksum"):
        disk.range(1, b"", None)
    disk.close()


def test_zeroed_page_raises_storage_error(path: Path) -> None:
    filled(path)
    data = path.read_bytes()
    path.write_bytes(data[:8192] + bytes(len(data) - 8192))
    with pytest.raises(StorageError, match="damaged"):
        SqliteDisk(path, reserve_bytes=0)


async def test_full_disk_fails_waiters_gives_the_reserve_and_starts_again(path: Path) -> None:
    disk = SqliteDisk(path, reserve_bytes=RESERVE)
    await disk.durable(disk.submit(batch_of((1, b"kept", b"1"))))
    reserve = path.with_name("node.db.reserve")
    assert reserve.stat().st_size == RESERVE
    disk._file.writer.pragma("max_page_count", disk._file.writer.pragma("page_count") + 1)
    number = disk.submit(batch_of((1, b"lost", b"x" * 100_000)))
    with pytest.raises(StorageError, match=r"full.*free space"):
        await disk.durable(number)
    with pytest.raises(StorageError, match="full"):
        disk.submit(Batch())
    assert not reserve.exists()
    disk.close()
    again = SqliteDisk(path, reserve_bytes=RESERVE)
    assert again.range(1, b"", None) == [(b"kept", b"1")]
    assert reserve.stat().st_size == RESERVE
    again.close()


FILLER = """
import asyncio, sys
from dht.errors import StorageError
from dht.storage.disk import SqliteDisk
from dht.world import Batch
async def main():
    disk = SqliteDisk(sys.argv[1], reserve_bytes=0)
    for n in range(1000):
        batch = Batch()
        batch.put(1, b"%08d" % n, b"x" * (n % 5000))
        batch.put(2, b"last", b"%08d" % n)
        try:
            await disk.durable(disk.submit(batch))
        except StorageError as error:
            print(n, error.message)
            break
    disk.close()
asyncio.run(main())
"""


def test_write_beyond_the_file_size_limit_fails_and_loses_nothing_acknowledged(path: Path) -> None:
    limit = 512 * 1024
    result = subprocess.run(
        [sys.executable, "-c", FILLER, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    number, message = result.stdout.split(" ", 1)
    assert "cannot write" in message
    assert prefix_kept(path) >= int(number)


def test_reserve_that_does_not_fit_refuses_the_start_with_what_to_do(path: Path) -> None:
    script = (
        "import sys\nfrom dht.storage.disk import SqliteDisk\nfrom dht.errors import StorageError\n"
        "try: SqliteDisk(sys.argv[1], reserve_bytes=1 << 22)\nexcept StorageError as error: print(error.message)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert "reserve" in result.stdout
    assert "free" in result.stdout
    assert not path.with_name("node.db.reserve").exists()


def test_second_open_of_the_same_file_is_refused(disk: SqliteDisk, path: Path) -> None:
    with pytest.raises(StorageError, match="another process has it open"):
        SqliteDisk(path)
    assert disk.failed is None


@pytest.mark.parametrize("content", [b"short", b"not a database at all" * 1000])
def test_garbage_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match="not a lucd database"):
        SqliteDisk(path)
    assert path.read_bytes() == content


def test_sqlite_header_followed_by_garbage_is_refused(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\x00" + b"garbage" * 5000)
    with pytest.raises(StorageError, match="damaged"):
        SqliteDisk(path)


def test_foreign_sqlite_file_is_refused(path: Path) -> None:
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE mine (a)")
    other.close()
    with pytest.raises(StorageError, match="another program"):
        SqliteDisk(path)


def test_file_of_newer_format_is_refused(path: Path) -> None:
    SqliteDisk(path, reserve_bytes=0).close()
    other = apsw.Connection(str(path))
    other.pragma("user_version", FORMAT + 1)
    other.close()
    with pytest.raises(StorageError, match="newer lucd"):
        SqliteDisk(path)


def test_directory_that_is_missing_or_path_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="directory exists"):
        SqliteDisk(tmp_path / "missing" / "node.db")
    (tmp_path / "dir.db").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        SqliteDisk(tmp_path / "dir.db")


def test_empty_file_left_by_a_crash_at_creation_is_taken(path: Path) -> None:
    path.touch()
    disk = SqliteDisk(path, reserve_bytes=0)
    assert disk.range(1, b"", None) == []
    disk.close()


def test_refused_open_leaves_no_thread_and_no_lock(path: Path) -> None:
    path.write_bytes(b"garbage" * 10)
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(StorageError, match="not a lucd database"):
            SqliteDisk(path)
    assert threading.active_count() == before
    os.unlink(path)
    SqliteDisk(path, reserve_bytes=0).close()
