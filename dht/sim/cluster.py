"""A cluster of simulated machines: each has a disk that survives, and boots of one node that do not."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

from dht.errors import DhtError, Indeterminate, Unavailable
from dht.model import NodeId
from dht.register.following import FollowedReads
from dht.requests import Store
from dht.sim.clock import SimClock
from dht.sim.disk import Content, SimDisk
from dht.sim.loop import Process, VirtualLoop
from dht.sim.network import Fabric, SimNetwork

T = TypeVar("T")
TRACE_LINES_MAX = 200_000
SETTLE_PATIENCE_S = 300.0
SETTLE_LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Boot:
    """What a node is given when it starts: who it is, and its world."""

    name: str
    node_id: NodeId
    incarnation: bytes
    boot: int
    pop: str
    address: str
    clock: SimClock
    chance: random.Random
    network: SimNetwork
    disk: SimDisk
    copy_disk: SimDisk
    """For the copy of a follower."""
    founds: bool
    peers: tuple[NodeId, ...]
    """Where to ask for admission: the other machines, nearest first."""


class Node(Protocol):
    """A running node: the production classes, or a toy of the simulator's own tests."""

    @property
    def store(self) -> Store: ...

    @property
    def counters(self) -> Mapping[str, int]:
        """What the node counted, for the report of the run."""
        ...

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do: it belongs to the cluster, and serves all that it is to serve."""
        ...

    @property
    def joined(self) -> bool:
        """Whether the cluster counts it as a member."""
        ...

    @property
    def serving(self) -> bool:
        """Whether it votes on any tablet."""
        ...

    async def start(self) -> None: ...

    async def leave(self, node: NodeId) -> None:
        """Ask the cluster to move everything away from the node and to let it go."""
        ...

    async def recover(self, *, salvage: bool) -> None:
        """Begin a new generation with this node alone, a majority being lost for good; `salvage`: repair the data."""
        ...

    @property
    def left(self) -> bool:
        """Whether the cluster has let this node go."""
        ...

    async def stop(self) -> None: ...


@runtime_checkable
class FollowingNode(Protocol):
    """A node that follows its own domain, too."""

    @property
    def followed(self) -> FollowedReads | None: ...


Build = Callable[[Boot], Node]


@dataclass(slots=True)
class Machine:
    """`incarnation` changes with the disk, `boots` counts its starts as the disk knows them, `starts` all of them."""

    name: str
    node_id: NodeId
    pop: str
    disk: SimDisk
    copy_disk: SimDisk
    clock: SimClock
    incarnation: bytes
    founds: bool = False
    boots: int = 0
    starts: int = 0
    wipes: int = 0
    process: Process | None = None
    node: Node | None = None
    paused: bool = False
    retired: bool = False
    asked: dict[asyncio.Future[object], None] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        return self.node is not None

    @property
    def answering(self) -> bool:
        return self.node is not None and not self.paused


class Cluster:
    """Machines by number. All randomness comes from the seed; `trace` tells the story of the run."""

    def __init__(self, seed: object, build: Build, pops: Sequence[str] = ("one",)) -> None:
        self.seed = seed
        self.build = build
        self.pops = tuple(pops)
        self.machines: list[Machine] = []
        self.lines: list[str] = []
        self.booted: list[Node] = []
        self.fabric = Fabric(self.chance("network"), self.say)

    def chance(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that one part's draws do not shift another's."""
        return random.Random(f"{self.seed}/{purpose}")

    def say(self, line: str) -> None:
        """Add to the trace."""
        if len(self.lines) < TRACE_LINES_MAX:
            self.lines.append(f"{asyncio.get_running_loop().time():10.6f} {line}")

    def add(self, *, founds: bool = False) -> int:
        """A new machine with an empty disk, not yet started; returns its number."""
        number = len(self.machines)
        name = f"n{number}"
        pop = self.pops[number % len(self.pops)]
        node_id = hashlib.sha1(pop.encode()).digest()[:4] + hashlib.sha1(f"{self.seed}/{name}".encode()).digest()[:16]
        disk, copy_disk = SimDisk(self.chance(f"disk {name}")), SimDisk(self.chance(f"copy {name}"))
        incarnation = hashlib.md5(f"{self.seed}/{name}/0".encode()).digest()
        self.machines.append(Machine(name, node_id, pop, disk, copy_disk, SimClock(), incarnation, founds))
        return number

    def adopt(self, node_id: NodeId, incarnation: bytes, boots: int, disk: Content) -> int:
        """A machine that was a member already, with its disk, switched off; returns its number."""
        number = self.add()
        machine = self.machines[number]
        machine.node_id, machine.incarnation, machine.boots = node_id, incarnation, boots
        machine.disk.fill(disk)
        return number

    async def start(self, number: int) -> None:
        """Boot the machine's node; returns when its start has ended."""
        machine = self.machines[number]
        if machine.running or machine.retired:
            return
        machine.boots += 1
        machine.starts += 1
        machine.process = process = Process(f"{machine.name}.{machine.boots}")
        network = self.fabric.attach(machine.node_id, machine.name, process)
        network.identity = machine.node_id, machine.incarnation, machine.boots, machine.starts.to_bytes(16, "big")
        boot = Boot(
            name=machine.name,
            node_id=machine.node_id,
            incarnation=machine.incarnation,
            boot=machine.boots,
            pop=machine.pop,
            address=f"{machine.name}:7000",
            clock=machine.clock,
            chance=self.chance(f"{process.name} {machine.wipes}"),
            network=network,
            disk=machine.disk,
            copy_disk=machine.copy_disk,
            founds=machine.founds and machine.wipes == 0,
            peers=tuple(m.node_id for m in self.machines if m is not machine),
        )
        self.say(f"{machine.name} boots ({machine.boots})")
        machine.paused = False
        node = machine.node = process.fresh_context().run(self.build, boot)
        self.booted.append(node)
        await self._inside(machine, node.start, "start")

    def crash(self, number: int) -> None:
        """Power off: nothing of the node runs any more, and its disk forgets what it had not flushed."""
        machine = self.machines[number]
        if machine.process is None or not machine.running:
            return
        machine.process.frozen = True
        machine.node = None
        lost = machine.disk.crash()
        machine.copy_disk.crash()
        self.fabric.detach(machine.node_id)
        self.say(f"{machine.name} crashes, {lost} batches lost")
        asked, machine.asked = machine.asked, {}
        for future in asked:
            if not future.done():
                future.set_exception(Indeterminate(f"{machine.name} crashed during the request"))

    def shut(self, number: int) -> None:
        """As `crash`, but the disk has everything that the node wrote."""
        self.machines[number].disk.flush()
        self.machines[number].copy_disk.flush()
        self.crash(number)

    def roll_back(self, number: int, disk: Content, boots: int) -> None:
        """Crash, and an old copy of the disk in its place: all that was promised since is forgotten."""
        self.crash(number)
        machine = self.machines[number]
        machine.disk.wipe()
        machine.disk.fill(disk)
        machine.boots = boots
        machine.wipes += 1
        self.say(f"{machine.name} has a copy of its disk from start {boots}")

    def wipe(self, number: int) -> None:
        """Crash, and an empty disk in the place of the old one: a new incarnation."""
        self.crash(number)
        machine = self.machines[number]
        machine.disk.wipe()
        machine.copy_disk.wipe()
        machine.wipes += 1
        machine.boots = 0
        machine.incarnation = hashlib.md5(f"{self.seed}/{machine.name}/{machine.wipes}".encode()).digest()
        self.say(f"{machine.name} has a new disk")

    def pause(self, number: int) -> None:
        """Stop the process as SIGSTOP does: its peers wait, its disk and its timers' time go on."""
        machine = self.machines[number]
        if machine.process is not None and machine.answering:
            machine.process.frozen = True
            machine.paused = True
            self.say(f"{machine.name} pauses")

    def resume(self, number: int) -> None:
        machine = self.machines[number]
        if machine.process is not None and machine.paused and machine.running:
            machine.paused = False
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.resume(machine.process)
            self.say(f"{machine.name} goes on")

    def partition(self, side: Sequence[int], other: Sequence[int], *, one_way: bool = False) -> None:
        """Cut the links from `side` to `other`, and back unless `one_way`."""
        a, b = ([self.machines[i].node_id for i in part] for part in (side, other))
        (self.fabric.cut if one_way else self.fabric.partition)(a, b)
        self.say(
            f"cut {[self.machines[i].name for i in side]} {'->' if one_way else '|'} "
            f"{[self.machines[i].name for i in other]}"
        )

    def heal(self) -> None:
        self.fabric.heal()
        self.say("links are whole")

    def counters(self) -> dict[str, int]:
        """The sum over all boots of all nodes."""
        total: dict[str, int] = {}
        for node in self.booted:
            for name, n in node.counters.items():
                total[name] = total.get(name, 0) + n
        return dict(sorted(total.items()))

    def numbers(self, *, answering: bool = True) -> list[int]:
        """Machines that run and are not paused (or those that do not); retired ones are left out."""
        return [i for i, machine in enumerate(self.machines) if machine.answering == answering and not machine.retired]

    def settled(self) -> bool:
        """Whether every machine runs, and its node has nothing left to do."""
        return all(m.retired or (m.node is not None and m.answering and m.node.settled) for m in self.machines)

    async def settle(self, patience_s: float = SETTLE_PATIENCE_S) -> None:
        """Wait until every node belongs to the cluster and serves what it should."""
        clock = self.machines[0].clock
        deadline_s = clock.monotonic() + patience_s
        while not self.settled():
            if clock.monotonic() > deadline_s:
                raise AssertionError(f"the cluster did not settle within {patience_s:.0f} s without faults")
            await clock.sleep(SETTLE_LOOK_EVERY_S)
        self.say("settled")

    async def recover(self, number: int, *, salvage: bool = True) -> None:
        """Order the machine's node to go on alone; asked until it is done."""
        machine = self.machines[number]
        self.say(f"{machine.name} is told to go on without the others, data loss accepted")
        while True:
            assert machine.node is not None
            try:
                return await self._inside(machine, partial(machine.node.recover, salvage=salvage), "recover")
            except DhtError as error:
                self.say(f"{machine.name} does not recover yet: {error.message[:160]}")
            await machine.clock.sleep(0.5)

    async def drain(self, number: int) -> None:
        """Have the machine's node leave; retire the machine when it is out. Asks until that is so."""
        leaving = self.machines[number]
        while leaving.node is None or not leaving.node.left:
            others = [i for i in self.numbers() if i != number]
            if others:
                through = self.machines[self.chance("drain").choice(others)]
                assert through.node is not None
                try:
                    async with asyncio.timeout(5.0):
                        await self._inside(through, partial(through.node.leave, leaving.node_id), "drain")
                except (DhtError, TimeoutError) as error:
                    self.say(f"{leaving.name} does not leave yet: {error}")
            await asyncio.sleep(1.0)
        self.say(f"{leaving.name} has left")
        self.crash(number)
        leaving.retired = True

    async def ask(self, number: int, request: Callable[[Store], Awaitable[T]], timeout_s: float) -> T:
        """What a client on the machine gets from its daemon. Raises the store's errors, and those of the socket."""
        machine = self.machines[number]
        if machine.node is None:
            raise Unavailable(f"{machine.name} is down", sent=False)
        store = machine.node.store
        try:
            async with asyncio.timeout(timeout_s):
                return await self._inside(machine, partial(request, store), "ask")
        except TimeoutError:
            raise Indeterminate(f"{machine.name} gave no answer within {timeout_s} s") from None

    async def _inside(self, machine: Machine, work: Callable[[], Awaitable[T]], name: str) -> T:
        """Run in the machine's process; raises Indeterminate if it dies meanwhile."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        machine.asked[outcome] = None  # type: ignore[index]

        async def attend() -> None:
            try:
                result = await work()
            except DhtError as error:
                if not outcome.done():
                    outcome.set_exception(error)
            else:
                if not outcome.done():
                    outcome.set_result(result)

        assert machine.process is not None
        task = loop.create_task(attend(), name=name, context=machine.process.fresh_context())
        try:
            return await outcome
        finally:
            machine.asked.pop(outcome, None)  # type: ignore[arg-type]
            if not machine.process.frozen and not task.done():
                task.cancel()
