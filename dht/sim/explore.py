"""Every order of messages, flushes and one crash, in cases small enough for that: production classes, no chance.

Nothing happens by itself here. What a node sends, and what a disk has to flush, waits in a pool; whenever no code is
left to run, the next of the pool is taken, in the order in which it came, or a deviation happens: it is held back until
nothing else can happen (`HOLD`), or comes when the story is over (`LATE`: a message that was as good as lost), or the
node that it is for loses its power just before and starts again without what it had not flushed (`CRASH`). All runs
with up to so many deviations are made, one after the other, each from its beginning.

Two orders that give every node the same events in the same order lead to the same state, so a run ends where it comes
to a state that was met before with no more deviations used: all that can follow is known already.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final

import msgspec

from dht.codec import Failure, decode, encode
from dht.domain.context import LocalNode
from dht.domain.roster import Roster, found, successor
from dht.domain.rules import RULES as DOMAIN_RULES
from dht.domain.rules import DomainRules
from dht.errors import DhtError, Indeterminate, Unavailable, rebuild
from dht.model import Change, NodeId, Op, Part, Struct
from dht.register.messages import Kind, Operation
from dht.register.node import StoreNode
from dht.register.rules import RULES, Rules
from dht.rows import group_key, row_key
from dht.sim import loop as virtual
from dht.sim.clock import SimClock
from dht.sim.cluster import Boot
from dht.sim.disk import Content, SimDisk
from dht.sim.loop import Process, VirtualLoop
from dht.sim.production import ProductionNode
from dht.world import Answer, Batch

GO, HOLD, LATE, CRASH = range(4)
NAMES: Final = ("", "held back", "late", "crash before")
KEY: Final = group_key("db", "f", ("g",))
STORY_S: Final = 8.0
AFTER_S: Final = 60.0


@dataclass(frozen=True)
class Case:
    """A tablet on `sets[0]`, all initialised; then links with the other sets are decided. Writers, by machine.

    `writes`: so many, one after the other, each.
    """

    name: str
    machines: int
    sets: tuple[tuple[int, ...], ...]
    writers: tuple[int, ...]
    writes: int = 1
    crash: bool = True


CASES: Final = {
    case.name: case
    for case in (
        Case("two-writers", 3, ((0, 1, 2),), (0, 1)),
        Case("pair", 2, ((0, 1),), (0, 1)),
        Case("replaced", 3, ((0, 1), (0, 2)), (0, 1)),
        Case("moved", 2, ((0,), (1,)), (0, 1)),
        Case("empty-middle", 3, ((0,), (1,), (2,)), (0,)),
        Case("grown", 3, ((0,), (0, 1, 2)), (0, 1)),
    )
}
EXPLORED: Final = {
    "seal": "moved",
    "serve_only_initialised": "moved",
    "seal_before_init": "moved",
    "only_initialised_contribute": "empty-middle",
}
"""rule: the case in which one deviation shows that it is off."""


@dataclass(slots=True)
class _Item:
    """Something that can happen next to a machine. `label` says what, the same in every run."""

    machine: int
    label: tuple[Any, ...]
    act: Callable[[], None]
    movable: bool = True


class _Known(Exception):
    """The run came to a state from which everything has been explored."""


class _Forgetful(random.Random):
    def randint(self, a: int, b: int) -> int:
        return a


class _Disk(SimDisk):
    """Flushes when the explorer says so; of what it had not flushed a crash leaves nothing."""

    def __init__(self, world: World, machine: int) -> None:
        super().__init__(_Forgetful(0))
        self._world = world
        self._machine = machine

    def _start_flush(self) -> None:
        number = self._submitted
        handle = _Handle()
        self._flush = handle  # type: ignore[assignment]
        self._world.offer(
            _Item(self._machine, ("flush", number), lambda: None if handle.cancelled() else self._end_flush(number))
        )


class _Handle:
    gone = False

    def cancel(self) -> None:
        self.gone = True

    def cancelled(self) -> bool:
        return self.gone


class _Network:
    """`dht.world.Network` of one boot."""

    def __init__(self, world: World, machine: int, process: Process) -> None:
        self.world = world
        self.machine = machine
        self.process = process
        self.answer: Answer | None = None
        self.meet: object = None
        self.fabric = self
        self.once: tuple[type[Struct], ...] = ()
        self.identity: object = None

    def serve(self, answer: Answer) -> None:
        self.answer = answer

    def alive(self, node: NodeId) -> bool:
        return True

    def silent_s(self, node: NodeId) -> float:
        return 0.0

    def parted(self, node: NodeId) -> bool:
        return False

    def set_address(self, node: NodeId, host: str, port: int) -> None:
        pass

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[bytes] = loop.create_future()
        data = encode(message)
        world, target = self.world, world_number(to)
        if target >= len(world.boots):
            raise Unavailable("no such machine", sent=False)

        def arrive() -> None:
            boot = world.boots[target]
            world.spawn(target, boot.network.work(self, data, reply))

        world.offer(_Item(target, (type(message).__name__, self.machine, data), arrive))
        late = loop.call_later(timeout_s, _expire, reply)
        try:
            answer = decode(await reply)
        except TimeoutError:
            raise Indeterminate("no reply in time") from None
        finally:
            late.cancel()
        if isinstance(answer, Failure):
            raise rebuild(answer.code, answer.message, answer.detail)
        return answer

    async def work(self, caller: _Network, data: bytes, reply: asyncio.Future[bytes]) -> None:
        """Serve a request that has arrived at this boot; the answer goes into the pool."""
        answer: Struct
        try:
            assert self.answer is not None
            answer = await self.answer(self.world.ids[caller.machine], decode(data))
        except DhtError as error:
            answer = Failure(error.code, error.message, dict(error.detail))
        raw = encode(answer)

        def arrive() -> None:
            if not reply.done() and not caller.process.frozen:
                reply.set_result(raw)

        self.world.offer(_Item(caller.machine, ("reply", self.machine, data, raw), arrive))


def _expire(reply: asyncio.Future[bytes]) -> None:
    if not reply.done():
        reply.set_exception(TimeoutError())


def node_id(number: int) -> NodeId:
    return bytes([65 + number]) * 20


def world_number(node: NodeId) -> int:
    return node[0] - 65


class _Loop(VirtualLoop):
    """Before time passes, whatever can happen without it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def _run_once(self) -> None:
        while not self._ready and self.world.next():
            pass
        super()._run_once()


@dataclass(slots=True)
class _Booted:
    node: ProductionNode
    network: _Network


@dataclass
class World:
    """One run. `plan`: what to choose at first; then nothing deviates. `taken`: (choice, how many there were)."""

    case: Case
    rules: Rules
    domain_rules: DomainRules
    plan: Sequence[int]
    deviations_max: int
    seen: dict[int, int]
    taken: list[tuple[int, int]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    used: int = 0
    crashes: int = 0
    over: bool = False
    pool: deque[_Item] = field(default_factory=deque)
    held: list[_Item] = field(default_factory=list)
    late: list[_Item] = field(default_factory=list)
    boots: list[_Booted] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    known: bool = False

    def __post_init__(self) -> None:
        self.ids = [node_id(number) for number in range(self.case.machines)]
        self.disks = [_Disk(self, number) for number in range(self.case.machines)]
        self.histories = [0] * self.case.machines
        self.acknowledged: list[int] = []
        self.loop: _Loop

    # What happens next.

    def offer(self, item: _Item) -> None:
        self.pool.append(item)

    def next(self) -> bool:
        """Let one thing happen; False when only time can go on."""
        if not self.pool:
            if not self.held:
                return False
            self.pool.extend(self.held)
            self.held.clear()
        item = self.pool.popleft()
        choice = self._choose(item)
        if choice:
            self.used += 1
            self.story.append(f"{NAMES[choice]} {self._name(item)}")
        if choice == HOLD:
            self.held.append(item)
            return True
        if choice == LATE:
            self.late.append(item)
            return True
        if choice == CRASH:
            self.crash(item.machine)
        self.histories[item.machine] = hash((self.histories[item.machine], choice, item.label))
        item.act()
        return True

    def _choose(self, item: _Item) -> int:
        options = [GO]
        if not self.over and self.used < self.deviations_max and item.movable:
            options += [HOLD, LATE]
            if self.case.crash and not self.crashes:
                options.append(CRASH)
        at = len(self.taken)
        if at >= len(self.plan) and not self.over:
            state = hash(
                (
                    tuple(self.histories),
                    tuple(one.label for one in (item, *self.pool)),
                    tuple(one.label for one in self.held),
                    tuple(one.label for one in self.late),
                    self.crashes,
                    self.loop.time(),
                )
            )
            if self.seen.get(state, 1 << 30) <= self.used:
                self.known = True
                raise _Known
            self.seen[state] = self.used
        choice = self.plan[at] if at < len(self.plan) else 0
        self.taken.append((choice, len(options)))
        return options[choice]

    def _name(self, item: _Item) -> str:
        return f"{item.label[0]} for {item.machine}" + (f" from {item.label[1]}" if len(item.label) > 2 else "")

    # Machines.

    def boot(self, number: int) -> None:
        process = Process(f"n{number}.{self.starts[number]}")
        network = _Network(self, number, process)
        boot = Boot(
            f"n{number}",
            self.ids[number],
            b"i" * 16,
            self.starts[number],
            "one",
            f"n{number}:1",
            SimClock(),
            random.Random(number),
            network,  # type: ignore[arg-type]
            self.disks[number],
            SimDisk(random.Random(number)),
            False,
            (),
        )
        node = process.fresh_context().run(ProductionNode, boot, self.rules, self.domain_rules, 1, 1e9, 1e9, False)
        network.serve(node.store.answer)  # type: ignore[attr-defined]
        self.boots[number] = _Booted(node, network)

    def crash(self, number: int) -> None:
        self.crashes += 1
        self.boots[number].network.process.frozen = True
        self.disks[number].crash()
        self.starts[number] += 1
        self.boot(number)
        self.spawn(number, self.take_over(number))

    def spawn(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        """In the machine's process, until it crashes."""
        task = self.loop.create_task(work, context=self.boots[number].network.process.fresh_context())
        self.tasks.append(task)

    # The story.

    async def take_over(self, number: int) -> None:
        """What a domain's background work does: initialise what the newest link gives this machine."""
        domain = self.boots[number].node.domain
        if domain.transfer.wanted(0):
            await domain.transfer.initialise(0)

    async def learn(self, number: int, links: Sequence[Roster]) -> None:
        domain = self.boots[number].node.domain
        for link in links:
            await domain.peers.learn(link, self.ids[number])
        await self.take_over(number)

    async def write(self, number: int, first: int) -> None:
        store = self.boots[number].node.store
        assert isinstance(store, StoreNode)
        for row in range(first, first + self.case.writes):
            part = Part(KEY, changes=(Change(Op.INSERT, 1, (row,), {0: row}),))
            deadline = self.loop.time() + STORY_S / 2
            operation = Operation(Kind.COMMIT, row.to_bytes(16, "big"), part)
            try:
                await store._coordinator.run(operation, 0, True, deadline)
            except DhtError as error:
                self.story.append(f"write of {row} at {number}: {error.code}")
            else:
                self.story.append(f"write of {row} at {number} is acknowledged")
                self.acknowledged.append(row)

    async def main(self) -> list[str]:
        """The violations of the run."""
        start = prepared_case(self.case)
        for number in range(self.case.machines):
            self.disks[number].fill(start.disks[number])
            self.starts.append(1)
            self.boots.append(None)  # type: ignore[arg-type]
            self.boot(number)
        for index, number in enumerate(self.case.writers):
            self._begin(number, ("write", index), partial(self.write, number, 10 * index + 1))
        for at, nodes in enumerate(self.case.sets[1:], 1):
            for number in nodes:
                self._begin(number, ("link", at), partial(self.learn, number, start.links[: at + 1]))
        await asyncio.sleep(STORY_S)
        self.over = True
        self.pool.extend(self.held)
        self.pool.extend(self.late)
        self.held.clear()
        self.late.clear()
        await asyncio.sleep(AFTER_S)
        return await self._judge(start.links)

    def _begin(self, number: int, label: tuple[Any, ...], work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """One more thing that may happen: the machine begins this work."""

        def begin() -> None:
            self.spawn(number, work())

        self.offer(_Item(number, label, begin))

    async def _judge(self, links: Sequence[Roster]) -> list[str]:
        newest = self.case.sets[-1]
        for number in range(self.case.machines):
            domain = self.boots[number].node.domain
            for link in links:
                await domain.peers.learn(link, self.ids[number])
        for number in newest:
            self.spawn(number, self.take_over(number))
        await asyncio.sleep(AFTER_S)
        seen: list[list[bytes]] = []
        for number in newest:
            store = self.boots[number].node.store
            try:
                (read,) = await store.read([KEY], None, AFTER_S)
            except DhtError as error:
                return [f"nothing can be read at {number} in the end: {error.message}"]
            seen.append(sorted(read.rows or {}))
        out = [
            f"row {row} was acknowledged and is gone: {newest[i]} reads {len(rows)} rows"
            for row in self.acknowledged
            for i, rows in enumerate(seen)
            if row_key(1, (row,)) not in rows
        ]
        if any(rows != seen[0] for rows in seen):
            out.append(f"machines {newest} read differently in the end")
        return out


@dataclass(frozen=True)
class _Start:
    links: tuple[Roster, ...]
    disks: tuple[Content, ...]


@cache
def prepared_case(case: Case) -> _Start:
    """What is on the disks before the story: the links up to the first set, its members initialised."""
    members = [LocalNode(node_id(n), b"i" * 16, 1, "one", f"n{n}", f"n{n}:1").member() for n in range(case.machines)]
    first = found("one", members[case.sets[0][0]], 1)
    links = [first]
    sets = list(case.sets)
    if sets[0] != (sets[0][0],) or case.machines > 1:
        links.append(successor(first, members, first.voters, [[node_id(n) for n in sets[0]]]))
    base = len(links)
    for nodes in sets[1:]:
        links.append(successor(links[-1], members, links[-1].voters, [[node_id(n) for n in nodes]]))

    async def fill() -> list[Content]:
        contents = []
        for number in range(case.machines):
            world = World(case, RULES, DOMAIN_RULES, (), 0, {})
            world.loop = asyncio.get_running_loop()  # type: ignore[assignment]
            world.starts = [1] * case.machines
            world.boots = [None] * case.machines  # type: ignore[list-item]
            world.boot(number)
            domain = world.boots[number].node.domain
            for link in links[:base]:
                domain.chain.append(link)
            if number in sets[0]:
                batch = Batch()
                domain.tablets.found(batch, 0, links[base - 1].tablet_epochs[0])
                domain.tablets.submit(batch)
            contents.append(world.disks[number].content())
        return contents

    contents = virtual.run(fill(), time_limit_s=60.0)
    return _Start(tuple(links[base - 1 :]), tuple(contents))


# All runs of a case.


@dataclass(slots=True)
class Explored:
    """`complete`: there are no more runs with so many deviations."""

    case: str
    runs: int = 0
    cut_short: int = 0
    complete: bool = False
    violations: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


def explore(
    case: Case, deviations_max: int, off: Sequence[str] = (), runs_max: int | None = None, *, stop: bool = True
) -> Explored:
    """Run them all, or up to the first violation."""
    rules = msgspec.structs.replace(RULES, **{r: False for r in off if r in Rules.__struct_fields__})
    domain_rules = msgspec.structs.replace(
        DOMAIN_RULES, **{r: False for r in off if r in DomainRules.__struct_fields__}
    )
    prepared_case(case)
    out = Explored(case.name)
    seen: dict[int, int] = {}
    plan: list[int] | None = []
    while plan is not None and (runs_max is None or out.runs < runs_max):
        world = World(case, rules, domain_rules, plan, deviations_max, seen)
        violations = _run(world)
        out.runs += 1
        out.cut_short += world.known
        if violations:
            out.violations, out.story = violations, world.story
            if stop:
                return out
        plan = _following(world.taken)
    out.complete = plan is None
    return out


def _following(taken: Sequence[tuple[int, int]]) -> list[int] | None:
    """The next plan in depth-first order, None after the last."""
    for at in range(len(taken) - 1, -1, -1):
        choice, options = taken[at]
        if choice + 1 < options:
            return [*(c for c, _ in itertools.islice(taken, at)), choice + 1]
    return None


def _run(world: World) -> list[str]:
    loop = world.loop = _Loop(world)
    try:
        return virtual.run(world.main(), time_limit_s=1e6, loop=loop)
    except _Known:
        return []
    except AssertionError as error:
        return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
