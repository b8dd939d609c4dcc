"""A daemon's clocks where the benchmark slows them."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.wan_bench import slow_clock
from tests.wan_bench.slow_clock import Pace, SlowClock, loop_on

TIMES = 4


@pytest.fixture
def pace(tmp_path):
    return Pace(tmp_path / "pace")


def test_clocks_are_the_machines_until_they_are_slowed(pace):
    clock = SlowClock(pace.file)
    assert clock.monotonic() == pytest.approx(time.monotonic(), abs=0.05)
    assert clock.wall() == pytest.approx(time.time(), abs=0.05)


@pytest.mark.parametrize("ended", [False, True])
def test_slowed_clocks_of_all_daemons_lose_the_same_and_keep_it(pace, monkeypatch, ended):
    now = [100.0]
    monkeypatch.setattr(slow_clock, "_monotonic", lambda: now[0])
    monkeypatch.setattr(slow_clock, "_wall", lambda: now[0] + 5_000)
    clocks = [SlowClock(pace.file) for _ in range(2)]
    pace.slow(TIMES)
    now[0] += 8.0
    if ended:
        pace.end()
        now[0] += 3.0
    assert [clock.monotonic() for clock in clocks] == [105.0 if ended else 102.0] * 2
    assert [clock.wall() - clock.monotonic() for clock in clocks] == [5_000.0] * 2
    assert [clock.times() for clock in clocks] == [1 if ended else TIMES] * 2


def test_sleeps_and_timeouts_of_a_slowed_loop_take_as_long_by_its_own_clock(pace):
    clock = SlowClock(pace.file)

    async def live() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        began, real_s = loop.time(), time.monotonic()
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.Event().wait()
        return loop.time() - began, time.monotonic() - real_s

    pace.slow(TIMES)
    with asyncio.Runner(loop_factory=loop_on(clock)) as runner:
        own_s, real_s = runner.run(live())
    assert own_s >= 0.099
    assert real_s == pytest.approx(TIMES * own_s, rel=0.2)
