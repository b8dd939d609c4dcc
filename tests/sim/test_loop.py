import asyncio
import itertools
import random

import pytest

from dht.sim import loop as virtual
from dht.sim.loop import BackgroundFailure, Process, Stuck, VirtualLoop


def test_sleep_of_hours_takes_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(7200)
        return asyncio.get_running_loop().time()

    assert virtual.run(main(), time_limit_s=10_000) == pytest.approx(7200)


def test_timers_run_in_order_of_time_then_of_setting() -> None:
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for delay_s, name in ((2, "c"), (1, "a"), (1, "b")):
            loop.call_later(delay_s, seen.append, name)
        await asyncio.sleep(3)

    virtual.run(main(), time_limit_s=10)
    assert seen == ["a", "b", "c"]


def test_timeout_and_wait_for_use_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(50)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 7)
        return asyncio.get_running_loop().time()

    assert virtual.run(main(), time_limit_s=100) == pytest.approx(12)


def test_nothing_scheduled_is_reported_with_the_waiting_tasks() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        task = asyncio.create_task(wait_for_nobody(), name="hermit")
        await task

    with pytest.raises(Stuck, match=r"(?s)nothing is scheduled.*hermit: .*wait_for_nobody"):
        virtual.run(main(), time_limit_s=10)


def test_time_and_step_limits_end_a_run() -> None:
    async def forever() -> None:
        for _ in itertools.count():
            await asyncio.sleep(1)

    with pytest.raises(Stuck, match="virtual time passed"):
        virtual.run(forever(), time_limit_s=10)
    with pytest.raises(Stuck, match="steps"):
        virtual.run(forever(), time_limit_s=1e9, steps_max=1000)


def test_task_that_fails_unseen_fails_the_run() -> None:
    async def fails() -> None:
        raise KeyError("lost")

    async def main() -> None:
        asyncio.create_task(fails())  # noqa: RUF006
        await asyncio.sleep(1)

    with pytest.raises(BackgroundFailure, match="lost"):
        virtual.run(main(), time_limit_s=10)


def test_threads_are_refused() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.to_thread(print)

    virtual.run(main(), time_limit_s=1)


def test_frozen_process_runs_nothing_and_goes_on_where_it_was() -> None:
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(asyncio.get_running_loop().time())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        process = Process("p")
        task = loop.create_task(tick(), context=process.fresh_context())
        await asyncio.sleep(2.5)
        process.frozen = True
        await asyncio.sleep(10)
        assert ticks == [1, 2]
        loop.resume(process)
        await asyncio.sleep(2)
        task.cancel()

    virtual.run(main(), time_limit_s=100)
    assert ticks[:4] == pytest.approx([1, 2, 12.5, 13.5])


def test_dead_process_runs_no_cleanup_until_the_run_is_over() -> None:
    story: list[str] = []

    async def careful() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            story.append("cleaned up")

    async def main() -> None:
        process = Process("p")
        task = asyncio.get_running_loop().create_task(careful(), context=process.fresh_context())
        await asyncio.sleep(1)
        process.frozen = True
        task.cancel()
        await asyncio.sleep(200)
        story.append("over")

    virtual.run(main(), time_limit_s=1000)
    assert story == ["over", "cleaned up"]


def _shuffled(seed: int | None) -> list[int]:
    seen: list[int] = []

    async def one(i: int) -> None:
        await asyncio.sleep(1)
        seen.append(i)

    async def main() -> None:
        await asyncio.gather(*(one(i) for i in range(8)))

    virtual.run(main(), time_limit_s=10, shuffle=None if seed is None else random.Random(seed))
    return seen


def test_shuffled_order_depends_on_the_seed_alone() -> None:
    assert _shuffled(None) == list(range(8))
    assert _shuffled(1) == _shuffled(1)
    assert _shuffled(1) != _shuffled(2)
