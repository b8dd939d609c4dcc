"""A follower beside domains that move step by step, for tests of it and of its copy."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from dht.codec import decode, encode
from dht.domain.copy import NEVER_S
from dht.domain.follower import Follower
from dht.domain.rules import FOLLOW_RULES, FollowRules
from dht.errors import Unavailable
from dht.model import SYSTEM_INTENT, Ballot, GroupKey, NodeId, Struct
from dht.rows import row_key
from dht.sim.disk import SimDisk
from dht.world import Batch
from tests.dht.domain.small_world import ROW, TABLETS, World
from tests.dht.domain.test_transfer import Stage

BOTH = pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
INTENT = row_key(SYSTEM_INTENT, (b"t",))


class Line:
    """The follower's network: messages as bytes, to domains at once. `before` may act, or raise, first."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deaf: set[int] = set()
        self.after: Callable[[int, Struct], Awaitable[None]] | None = None

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        machines = self.world.cluster.machines
        number = next(i for i, machine in enumerate(machines) if machine.node_id == to)
        if number in self.deaf or not machines[number].answering:
            raise Unavailable("not heard", sent=False)
        reply = await self.world.domain(number).answer(b"f" * 20, decode(encode(message)))
        if self.after is not None:
            await self.after(number, message)
        return decode(encode(reply))

    def alive(self, node: NodeId) -> bool:
        return True

    def silent_s(self, node: NodeId) -> float:
        return 0.0

    def parted(self, node: NodeId) -> bool:
        return False

    def serve(self, answer: object) -> None:
        raise AssertionError("a follower is asked nothing, so it must not begin to serve")


class Beside:
    """A follower of the world's domain that makes a round when it is told to."""

    def __init__(self, world: World, rules: FollowRules = FOLLOW_RULES) -> None:
        self.world = world
        self.line = Line(world)
        self.disk = SimDisk(random.Random(1))
        self.rules = rules
        self.follower = self.begin()
        self.copy = self.follower.copy

    def begin(self) -> Follower:
        async def contacts() -> list[NodeId]:
            return [machine.node_id for machine in self.world.cluster.machines]

        clock = self.world.cluster.machines[0].clock
        name = self.world.running()[0].domain.name
        return Follower(name, clock, random.Random(2), self.line, self.disk, contacts, TABLETS, self.rules)

    def restart(self) -> None:
        self.follower = self.begin()
        self.copy = self.follower.copy

    async def rounds(self, count: int = 1) -> None:
        for _ in range(count):
            await self.follower.round()
            while self.follower._surveying is not None and not self.follower._surveying.done():
                await self.world.cluster.machines[0].clock.sleep(0.01)

    async def wait(self) -> float:
        """Some time passes; the time then."""
        await self.world.cluster.machines[0].clock.sleep(1.0)
        return self.world.cluster.machines[0].clock.monotonic()

    def row(self, k: GroupKey) -> bytes | None:
        return self.copy.registers.row(k, ROW)


async def three(stage: Stage, rules: FollowRules = FOLLOW_RULES) -> Beside:
    """The stage's tablet on machines 0, 1, 2, and a follower that has compared itself with them."""
    stage.move(0, 1, 2)
    await stage.tell(0, 1, 2)
    for number in (0, 1, 2):
        assert await stage.initialise(number)
    beside = Beside(stage.world, rules)
    await beside.rounds(3)
    assert beside.copy.covered_s(stage.keys[0]) > NEVER_S
    return beside


def write(stage: Stage, k: GroupKey, round: int, text: str, *numbers: int, chosen: bool = False) -> None:
    for number in numbers:
        stage.write(number, k, round, text, chosen=chosen, epoch=2)


FLOOR = Ballot(1, 2, 9, b"", 0, 0)


def raised(stage: Stage, number: int) -> None:
    """The machine accepts nothing below the floor any more where there is no value."""
    tablets, batch = stage.world.node(number).domain.tablets, Batch()
    tablets.raise_floor(batch, stage.tablet, FLOOR)
    tablets.submit(batch)


def collected(stage: Stage, k: GroupKey, *numbers: int) -> None:
    """The register is erased everywhere, or at these machines, under a floor that all have."""
    for number in numbers or (0, 1, 2):
        node, batch = stage.world.node(number), Batch()
        node.domain.tablets.agree(batch, stage.tablet, FLOOR)
        node.registers.erase(batch, k)
        node.domain.tablets.submit(batch)


def follow_rules(**off: bool) -> FollowRules:
    return msgspec.structs.replace(FOLLOW_RULES, **off)


def stale(beside: Beside, k: GroupKey, acknowledged_s: float, wanted: bytes | None) -> bool:
    """Whether the copy promises what was acknowledged then, and does not have it."""
    return beside.copy.covered_s(k) > acknowledged_s and beside.row(k) != wanted
