import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from dht.errors import StorageError
from dht.sim import loop as virtual
from dht.sim.disk import SimDisk
from dht.world import Batch


def run(body: Callable[[SimDisk], Awaitable[None]], seed: int = 1) -> None:
    async def main() -> None:
        await body(SimDisk(random.Random(seed)))

    virtual.run(main(), time_limit_s=100)


def put(disk: SimDisk, **values: str | None) -> int:
    batch = Batch()
    for key, value in values.items():
        batch.writes.append((1, key.encode(), None if value is None else value.encode()))
    return disk.submit(batch)


def test_submitted_batch_is_visible_at_once_and_durable_later() -> None:
    async def body(disk: SimDisk) -> None:
        number = put(disk, a="1", b="2")
        assert disk.get(1, b"a") == b"1"
        assert list(disk.range(1, b"a", None)) == [(b"a", b"1"), (b"b", b"2")]
        await disk.durable(number)
        assert asyncio.get_running_loop().time() > 0

    run(body)


def test_crash_keeps_what_was_durable_and_a_prefix_of_the_rest() -> None:
    kept: set[int] = set()

    async def body(disk: SimDisk) -> None:
        await disk.durable(put(disk, a="0"))
        for i in range(1, 5):
            put(disk, a=str(i), **{f"k{i}": "x"})
        disk.crash()
        newest = int(disk.get(1, b"a") or b"-1")
        assert [disk.get(1, f"k{i}".encode()) is not None for i in range(1, 5)] == [i <= newest for i in range(1, 5)]
        kept.add(newest)

    for seed in range(40):
        run(body, seed)
    assert kept == {0, 1, 2, 3, 4}


def test_crash_restores_deleted_and_overwritten_values() -> None:
    async def body(disk: SimDisk) -> None:
        await disk.durable(put(disk, a="old", b="old"))
        put(disk, a="new", b=None)
        lost = disk.crash()
        assert (disk.get(1, b"a"), disk.get(1, b"b")) == ((b"old", b"old") if lost else (b"new", None))

    for seed in range(10):
        run(body, seed)


def test_waiter_of_a_crashed_disk_is_never_told() -> None:
    async def body(disk: SimDisk) -> None:
        waiting = asyncio.create_task(disk.durable(put(disk, a="1")))
        await asyncio.sleep(0)
        disk.crash()
        await asyncio.sleep(50)
        assert not waiting.done()
        waiting.cancel()

    run(body)


def test_slow_disk_flushes_late_and_in_groups() -> None:
    async def body(disk: SimDisk) -> None:
        disk.slowness = 1000.0
        first = put(disk, a="1")
        numbers = [put(disk, **{f"k{i}": "1"}) for i in range(5)]
        await disk.durable(first)
        await disk.durable(numbers[0])
        before = asyncio.get_running_loop().time()
        await disk.durable(numbers[-1])
        assert asyncio.get_running_loop().time() == before

    run(body)


def test_failed_disk_refuses_batches_and_tells_waiters() -> None:
    async def body(disk: SimDisk) -> None:
        waiting = asyncio.create_task(disk.durable(put(disk, a="1")))
        await asyncio.sleep(0)
        disk.fail("disk full")
        with pytest.raises(StorageError, match="disk full"):
            await waiting
        with pytest.raises(StorageError, match="disk full"):
            put(disk, a="2")

    run(body)


def test_wiped_disk_is_empty() -> None:
    async def body(disk: SimDisk) -> None:
        await disk.durable(put(disk, a="1"))
        disk.wipe()
        assert disk.get(1, b"a") is None
        assert list(disk.range(1, b"", None)) == []

    run(body)
