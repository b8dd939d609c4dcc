"""One run: a cluster, clients, faults, and the verdict."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dht.sim import lives, oracles
from dht.sim import loop as virtual
from dht.sim.cluster import SETTLE_PATIENCE_S, Build, Cluster
from dht.sim.history import History
from dht.sim.keepers import Keeper, Tenant
from dht.sim.prepared import Prepared, prepared
from dht.sim.workload import ENTRY, LIST, OWNER, Bench, Client, Mix, read_everything, set_up

TIME_LIMIT_S: Final = 3600.0
RECOVERED_WITHOUT: Final = "was recovered without this node"
AFTERMATH_S: Final = 5.0
"""Beyond the clients' patience, until nothing that they began goes on."""

Script = Callable[["Run"], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Faults:
    """What the nemesis may do, as weights of its next step, and how often it steps (mean seconds)."""

    every_s: float = 0.4
    crash: float = 0.0
    crash_all: float = 0.0
    partition: float = 0.0
    one_way: float = 0.0
    loss: float = 0.0
    slow_disk: float = 0.0
    pause: float = 0.0
    stragglers: float = 0.0
    skew: float = 0.0
    wipe: float = 0.0
    join: float = 0.0
    drain: float = 0.0
    stillborn: float = 0.0
    down_at_once: int = 1
    lasts_s: float = 0.8
    joins: int = 0
    wipes: int = 0
    drains: int = 0
    stillborns: int = 0


@dataclass(frozen=True)
class Scenario:
    """`machines` start before the load does; `duplication`, `loss` hold all the time. Durations in virtual seconds.

    `operations`: the run ends after so many, if that is sooner. `variant`: begin with a cluster that stands already.
    `rules`, `domain_rules`, `follow_rules`: switches to turn off (planted bugs). `follows`: each machine follows the
    domain, too. `tablets`: of the domain; few make runs short. `keepers`: so many drop the database and create it again
    all the time (`dht.sim.keepers`).
    """

    name: str
    machines: int = 3
    clients: int = 4
    duration_s: float = 6.0
    mix: Mix = field(default_factory=Mix)
    faults: Faults = field(default_factory=Faults)
    loss: float = 0.0
    duplication: float = 0.0
    straggler: float = 0.01
    shuffle: bool = False
    tablets: int = 8
    timeout_s: float = 3.0
    remove_after_s: float = 600.0
    collect_every_s: float = 3600.0
    rules: tuple[str, ...] = ()
    domain_rules: tuple[str, ...] = ()
    follows: bool = False
    follow_rules: tuple[str, ...] = ()
    lying_disks: bool = False
    boots_checked: bool = True
    slowness: float = 1.0
    operations: int | None = None
    variant: int | None = None
    script: Script | None = None
    keepers: int = 0

    def without(self, *, rules: tuple[str, ...] = (), domain_rules: tuple[str, ...] = ()) -> Scenario:
        """The same with these rules switched off."""
        return replace(self, rules=self.rules + rules, domain_rules=self.domain_rules + domain_rules)


@dataclass
class Verdict:
    """Of one run. `trace` is the same for the same scenario and seed, everywhere."""

    scenario: str
    seed: int
    violations: list[str]
    undecided: int
    counts: dict[str, int]
    counters: dict[str, int]
    trace: list[str] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


@dataclass
class Run:
    """What a nemesis or a script has in its hands."""

    scenario: Scenario
    cluster: Cluster
    bench: Bench
    chance: random.Random
    joins: int = 0
    wipes: int = 0
    drains: int = 0
    stillborns: int = 0
    burying: bool = False
    starting: list[asyncio.Task[None]] = field(default_factory=list)
    clients: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, number: int) -> None:
        """Boot a machine without waiting for it."""
        self.starting = [task for task in self.starting if not task.done()]
        self.starting.append(asyncio.get_running_loop().create_task(_start_quietly(self.cluster, number)))


async def _start_quietly(cluster: Cluster, number: int) -> None:
    try:
        await cluster.start(number)
    except Exception as error:
        if cluster.machines[number].running:
            cluster.say(f"n{number} does not start: {type(error).__name__}: {error}")
            cluster.crash(number)


def run(scenario: Scenario, seed: int, build: Build | None = None) -> Verdict:
    """Run it in virtual time. Deadlocks, time-outs and uncaught exceptions are violations like any other."""
    if build is None:
        from dht.sim.production import builder

        build = builder(
            scenario.rules,
            scenario.domain_rules,
            scenario.tablets,
            scenario.remove_after_s,
            scenario.collect_every_s,
            scenario.boots_checked,
            scenario.follow_rules if scenario.follows else None,
        )
    cluster = Cluster(f"{scenario.name}/{seed}", build)
    bench = Bench(cluster, scenario.mix, timeout_s=scenario.timeout_s, operations_max=scenario.operations)
    standing = None if scenario.variant is None else prepared(scenario.machines, scenario.tablets, scenario.variant)
    shuffle = cluster.chance("order") if scenario.shuffle else None
    violations: list[str] = []
    undecided = 0
    complaints = _Complaints()
    logging.getLogger("dht").addHandler(complaints)
    try:
        violations, undecided = virtual.run(
            _run(scenario, cluster, bench, standing), time_limit_s=TIME_LIMIT_S, shuffle=shuffle
        )
    except AssertionError as error:
        violations = [f"{type(error).__name__}: {error}"]
    except Exception as error:
        violations = [f"{type(error).__name__}: {error}\n{traceback.format_exc()}"]
    finally:
        logging.getLogger("dht").removeHandler(complaints)
    violations += complaints.lines
    return Verdict(
        scenario.name, seed, violations, undecided, bench.history.counts(), cluster.counters(), cluster.lines
    )


class _Complaints(logging.Handler):
    """What the production code logs as an error is a bug of it: faults alone never are."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if RECOVERED_WITHOUT in record.getMessage():
            return  # that is what a recovery means to those who were left out
        cause = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"logged: {record.getMessage()}" + (f": {cause!r}" if cause else ""))


async def _run(scenario: Scenario, cluster: Cluster, bench: Bench, standing: Prepared | None) -> tuple[list[str], int]:
    for number in range(scenario.machines):
        if standing is None:
            cluster.add(founds=number == 0)
        else:
            one = standing[number]
            cluster.adopt(one.node_id, one.incarnation, one.boots, one.disk)
    for machine in cluster.machines:
        machine.disk.lies = scenario.lying_disks
        machine.disk.slowness = scenario.slowness
    for number in range(scenario.machines):
        await cluster.start(number)
    await cluster.settle()
    if standing is None:
        await set_up(bench, Client(bench, "setup", cluster.chance("setup")))
    weather = cluster.fabric.weather
    weather.loss, weather.duplication, weather.straggler = scenario.loss, scenario.duplication, scenario.straggler
    now = Run(scenario, cluster, bench, cluster.chance("nemesis"))
    loop = asyncio.get_running_loop()
    kind = Tenant if scenario.keepers else Client
    clients = now.clients = [
        loop.create_task(kind(bench, f"c{i}", cluster.chance(f"client {i}")).run()) for i in range(scenario.clients)
    ]
    keepers = [Keeper(bench, f"k{i}", cluster.chance(f"keeper {i}"), now.start) for i in range(scenario.keepers)]
    clients += [loop.create_task(keeper.run()) for keeper in keepers]
    clients += [loop.create_task(keeper.watch()) for keeper in keepers[:1]]
    if scenario.script is not None:
        await scenario.script(now)
    else:
        await nemesis(now)
    bench.stopping = True
    cluster.say("the faults end")
    await recover(now)
    await asyncio.gather(*clients)
    keeper = Keeper(bench, "keeper", cluster.chance("keeper"), now.start) if keepers else None
    reader = Client(bench, "final", cluster.chance("final"))
    standing_still = await _standing(bench, reader, keeper)
    if standing_still:
        # A transaction whose client gave up may have been decided between the reads of two of its groups.
        await cluster.machines[0].clock.sleep(scenario.timeout_s + AFTERMATH_S)
        standing_still = await _standing(bench, reader, keeper)
    broken, undecided = lives.judge(bench.history, LIST) if keepers else _judged(bench.history)
    return bench.errors + standing_still + broken, undecided


async def _standing(bench: Bench, reader: Client, keeper: Keeper | None) -> list[str]:
    """What is wrong with everything as it is read now."""
    if keeper is not None:
        await keeper.settle()
    final = await read_everything(bench, reader)
    history = bench.history
    if keeper is not None:
        await keeper.look()
        history = lives.newest(history)
    return oracles.atomic(history, final, LIST, 0) + oracles.unique_entries(final, OWNER, 0, ENTRY)


def _judged(history: History) -> tuple[list[str], int]:
    violations = oracles.appends(history, LIST, 0) + oracles.sequences(history) + oracles.finds(history)
    broken, undecided = oracles.linearizable(history)
    return violations + broken, undecided


async def recover(now: Run) -> None:
    """End every fault and start every machine."""
    cluster = now.cluster
    weather = cluster.fabric.weather
    weather.loss = weather.duplication = weather.straggler = 0.0
    cluster.heal()
    for number, machine in enumerate(cluster.machines):
        machine.disk.slowness = 1.0
        cluster.resume(number)
    for number, machine in enumerate(cluster.machines):
        if not machine.running:
            await _start_quietly(cluster, number)
    try:
        async with asyncio.timeout(SETTLE_PATIENCE_S):
            await asyncio.gather(*now.starting)
    except TimeoutError:
        raise AssertionError(
            f"a start or a drain did not end within {SETTLE_PATIENCE_S:.0f} s without faults"
        ) from None
    await cluster.settle()


async def nemesis(now: Run) -> None:
    """Random faults until the run's time is over."""
    cluster, faults, chance = now.cluster, now.scenario.faults, now.chance
    clock = cluster.machines[0].clock
    end_s = clock.monotonic() + now.scenario.duration_s
    steps: list[tuple[float, Callable[[Run], Coroutine[Any, Any, None]]]] = [
        (faults.crash, _crash_one),
        (faults.crash_all, _crash_all),
        (faults.partition, _partition),
        (faults.one_way, _cut_one_way),
        (faults.loss, _lose),
        (faults.slow_disk, _slow_disk),
        (faults.pause, _pause),
        (faults.stragglers, _delay),
        (faults.skew, _skew),
        (faults.wipe, _wipe),
        (faults.join, _join),
        (faults.drain, _drain),
        (faults.stillborn, _bury),
    ]
    weights = [weight for weight, _ in steps]
    acting: list[asyncio.Task[None]] = []
    while clock.monotonic() < end_s and not now.bench.over:
        await clock.sleep(min(chance.expovariate(1 / faults.every_s), end_s - clock.monotonic() + 0.001))
        if sum(weights):
            act = chance.choices(steps, weights)[0][1]
            acting = [task for task in acting if not task.done()]
            acting.append(asyncio.get_running_loop().create_task(act(now)))
    for task in acting:
        task.cancel()
    await asyncio.gather(*acting, return_exceptions=True)


def _lasts_s(now: Run) -> float:
    return now.chance.expovariate(1 / now.scenario.faults.lasts_s)


async def _crash_one(now: Run) -> None:
    cluster = now.cluster
    down = cluster.numbers(answering=False)
    if len(down) >= now.scenario.faults.down_at_once or not cluster.numbers():
        return
    victim = now.chance.choice(cluster.numbers())
    lasts_s = _lasts_s(now)
    cluster.crash(victim)
    await cluster.machines[0].clock.sleep(lasts_s)
    now.start(victim)


async def _crash_all(now: Run) -> None:
    cluster = now.cluster
    victims = list(range(len(cluster.machines)))
    now.chance.shuffle(victims)
    lasts_s = _lasts_s(now) / 2
    for number in victims:
        cluster.crash(number)
    await cluster.machines[0].clock.sleep(lasts_s)
    for number in victims:
        now.start(number)


async def _partition(now: Run) -> None:
    cluster = now.cluster
    numbers = list(range(len(cluster.machines)))
    now.chance.shuffle(numbers)
    cut = now.chance.randint(1, max(1, len(numbers) - 1))
    lasts_s = _lasts_s(now)
    cluster.partition(numbers[:cut], numbers[cut:])
    await cluster.machines[0].clock.sleep(lasts_s)
    cluster.heal()


async def _cut_one_way(now: Run) -> None:
    cluster = now.cluster
    a, b = now.chance.choices(range(len(cluster.machines)), k=2)
    lasts_s = _lasts_s(now)
    cluster.partition([a], [b], one_way=True)
    await cluster.machines[0].clock.sleep(lasts_s)
    cluster.heal()


async def _lose(now: Run) -> None:
    weather = now.cluster.fabric.weather
    lasts_s = _lasts_s(now)
    weather.loss = now.chance.choice((0.05, 0.2, 0.4))
    await now.cluster.machines[0].clock.sleep(lasts_s)
    weather.loss = now.scenario.loss


async def _delay(now: Run) -> None:
    weather = now.cluster.fabric.weather
    lasts_s = _lasts_s(now)
    weather.straggler = now.chance.choice((0.1, 0.3))
    await now.cluster.machines[0].clock.sleep(lasts_s)
    weather.straggler = now.scenario.straggler


async def _slow_disk(now: Run) -> None:
    machine = now.chance.choice(now.cluster.machines)
    lasts_s = _lasts_s(now)
    machine.disk.slowness = now.chance.choice((10.0, 100.0, 1000.0))
    now.cluster.say(f"{machine.name} has a slow disk ({machine.disk.slowness:.0f} times)")
    await machine.clock.sleep(lasts_s)
    machine.disk.slowness = 1.0


async def _pause(now: Run) -> None:
    cluster = now.cluster
    running = cluster.numbers()
    if len(running) <= len(cluster.machines) - now.scenario.faults.down_at_once:
        return
    victim = now.chance.choice(running)
    lasts_s = _lasts_s(now)
    cluster.pause(victim)
    await cluster.machines[0].clock.sleep(lasts_s)
    cluster.resume(victim)


async def _skew(now: Run) -> None:
    now.chance.choice(now.cluster.machines).clock.wall_skew_s = now.chance.uniform(-86400.0, 86400.0)


def _whole(now: Run, machines: int) -> bool:
    """Whether so many machines run, settled, and none is on its way in or out: one may be lost for good then.

    A newcomer that is about to be buried counts as lost: it may be a voter already.
    """
    busy = now.burying or any(not task.done() for task in now.starting)
    return not busy and now.cluster.settled() and len(now.cluster.numbers()) >= machines


async def _wipe(now: Run) -> None:
    """One machine loses its disk and comes back as a new incarnation."""
    cluster = now.cluster
    if now.wipes >= now.scenario.faults.wipes or not _whole(now, machines=3):
        return
    now.wipes += 1
    victim = now.chance.choice(cluster.numbers())
    lasts_s = _lasts_s(now)
    cluster.wipe(victim)
    await cluster.machines[0].clock.sleep(lasts_s)
    now.start(victim)


async def _join(now: Run) -> None:
    """A new machine asks to be admitted."""
    if now.joins < now.scenario.faults.joins:
        now.joins += 1
        now.start(now.cluster.add())


async def _bury(now: Run) -> None:
    """A new machine loses its disk when it is a member, and before it has taken anything over."""
    cluster = now.cluster
    if now.stillborns >= now.scenario.faults.stillborns or not _whole(now, machines=1):
        return
    now.stillborns += 1
    now.burying = True
    number = cluster.add()
    now.start(number)
    machine = cluster.machines[number]
    while (node := machine.node) is None or not node.joined:
        await machine.clock.sleep(0.001)
    await machine.clock.sleep(now.chance.choice((0.0, 0.002, 0.01)))
    if not node.serving:
        cluster.wipe(number)
        await machine.clock.sleep(_lasts_s(now))
    now.start(number)
    now.burying = False


async def _drain(now: Run) -> None:
    """A machine's tablets move to the others, and it leaves. Goes on after the faults end."""
    if now.drains < now.scenario.faults.drains and _whole(now, machines=4):
        now.drains += 1
        victim = now.chance.choice(now.cluster.numbers())
        now.cluster.say(f"n{victim} is asked to leave")
        now.starting.append(asyncio.get_running_loop().create_task(now.cluster.drain(victim)))
