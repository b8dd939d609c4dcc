"""Stories of a whole run that chance alone would hardly tell: the load and small faults go on around them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from dht.sim.workload import Client

if TYPE_CHECKING:
    from dht.sim.scenario import Run

SETTLE_BETWEEN_S: Final = 60.0
_LARGEST: Final = 5


async def sizes(now: Run) -> None:
    """A domain grows from one member to five and shrinks to one again: 1-2-3-4-5-4-3-2-1."""
    cluster = now.cluster
    noise = asyncio.get_running_loop().create_task(_noise(now))
    while len(cluster.machines) < _LARGEST:
        await _calm(now)
        await cluster.start(cluster.add())
    for number in now.chance.sample(range(_LARGEST), _LARGEST - 1):
        await _calm(now)
        cluster.say(f"n{number} is asked to leave")
        await cluster.drain(number)
    noise.cancel()


async def _calm(now: Run) -> None:
    """Now and then wait until everything is where it should be; else go on in the middle of the last change."""
    clock = now.cluster.machines[0].clock
    await clock.sleep(now.chance.expovariate(4.0))
    patience_s = SETTLE_BETWEEN_S if now.chance.random() < 0.5 else 0.0
    end_s = clock.monotonic() + patience_s
    while not now.cluster.settled() and clock.monotonic() < end_s:
        await clock.sleep(0.1)


async def _noise(now: Run) -> None:
    """Short crashes and pauses of one machine at a time."""
    cluster, chance = now.cluster, now.chance
    clock = cluster.machines[0].clock
    while True:
        await clock.sleep(chance.expovariate(1.5))
        running = cluster.numbers()
        if len(running) < 2 or cluster.numbers(answering=False):
            continue
        victim = chance.choice(running)
        if chance.random() < 0.5:
            cluster.pause(victim)
            await clock.sleep(chance.expovariate(3.0))
            cluster.resume(victim)
        else:
            cluster.crash(victim)
            await clock.sleep(chance.expovariate(3.0))
            now.start(victim)


async def rolled_back(now: Run) -> None:
    """An old copy of a member's directory is put in its place while the only other member with all writes is away.

    Its peers have met a later start of it, so they want nothing to do with it; it is wiped in the end.
    """
    cluster, chance = now.cluster, now.chance
    clock = cluster.machines[0].clock
    victim, away = chance.sample(range(len(cluster.machines)), 2)
    copied = cluster.machines[victim]
    await clock.sleep(chance.uniform(0.05, 0.3))
    cluster.shut(victim)
    disk, boots = copied.disk.content(), copied.boots
    await cluster.start(victim)
    await cluster.settle()
    await clock.sleep(chance.uniform(2.0, 3.0))  # until it has met each of its peers
    others = [number for number in range(len(cluster.machines)) if number not in (victim, away)]
    cluster.partition(others, [victim, away])
    await clock.sleep(chance.uniform(0.2, 0.6))
    cluster.crash(away)
    cluster.roll_back(victim, disk, boots)
    cluster.heal()
    now.start(victim)
    await clock.sleep(chance.uniform(0.2, 0.6))
    cluster.wipe(victim)
    now.start(away)
    await clock.sleep(0.5)
    now.start(victim)


async def recovered(now: Run) -> None:
    """Two of three members are gone for good, with the newest ids of a sequence; the third goes on by order (rule 8).

    The survivor has all that was written, and missed the blocks of ids that the others gave out since: those must not
    be given out again, neither before the data is seen to nor after. One of the lost comes back with its disk, serves
    nothing, and is wiped.
    """
    cluster, bench = now.cluster, now.bench
    clock = cluster.machines[0].clock
    await clock.sleep(now.chance.uniform(0.2, 0.5))
    bench.stopping = True
    await asyncio.gather(*now.clients)
    drawer = Client(bench, "drawer", cluster.chance("drawer"))
    while not any(draw.first is not None for draw in bench.history.draws):
        await drawer.draw()  # of a sequence that the survivor has never heard of, nothing can be known
    await clock.sleep(2.0)
    survivor, *lost = now.chance.sample(range(len(cluster.machines)), len(cluster.machines))
    cluster.partition([survivor], lost)
    for _ in range(4):
        drawer.machine = now.chance.choice(lost)
        await drawer.draw()
    for number in lost:
        cluster.crash(number)
    cluster.heal()
    await clock.sleep(1.0)
    drawer.machine = survivor
    for salvage in (False, True):
        await cluster.recover(survivor, salvage=salvage)
        for _ in range(2):
            await drawer.draw()
    await cluster.start(lost[0])
    for number in lost:
        cluster.wipe(number)
        await cluster.start(number)
    await cluster.settle()
    bench.stopping = False
    loop = asyncio.get_running_loop()
    now.clients += [loop.create_task(Client(bench, f"e{i}", cluster.chance(f"later {i}")).run()) for i in range(3)]
    await clock.sleep(now.chance.uniform(0.2, 0.5))
