"""What every part of a node's registers needs: identity, world, files, domain, rules, counters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from dht.codec import Message
from dht.domain.roster import Roster, TabletReplicas
from dht.errors import DhtError, Indeterminate, NotServing
from dht.limits import BACKOFF_MAX_S, BACKOFF_MIN_S
from dht.model import Ballot, GroupKey, NodeId, Struct
from dht.register.rules import RULES, Rules
from dht.storage.registers import RegisterFile
from dht.world import Chance, Clock, Disk, Network

log = logging.getLogger(__name__)

Heard = Callable[[Struct | DhtError], None]
"""Gets what came of a question."""


class Tablets(Protocol):
    """What the registers need of a domain (`dht.domain.domain.Domain`)."""

    @property
    def generation(self) -> int: ...

    @property
    def roster(self) -> Roster: ...

    def replicas(self, tablet: int) -> TabletReplicas: ...

    def views(self) -> tuple[TabletReplicas, ...]:
        """`replicas` of all tablets; the same object until one of them changes."""
        ...

    def admit(self, tablet: int, epoch: int, accept: bool = False) -> None: ...

    def admits(self, tablets: tuple[int, ...], epochs: tuple[int, ...]) -> bool:
        """Whether `admit` takes each of them. False: one or another, ask it of each."""
        ...

    def floor(self, tablet: int) -> Ballot:
        """The promise of the tablet's registers that have no value here."""
        ...

    def agreed_floor(self, tablet: int) -> Ballot:
        """A floor that all replicas of the tablet have (`dht.domain.collection`)."""
        ...

    async def refresh(self, at_least: int | None = None) -> None: ...

    def pointed(self, refusal: NotServing) -> bool:
        """Take what a replica's refusal says of the tablet; whether there are other replicas to ask now."""
        ...

    def answer(self, sender: NodeId, message: Struct) -> Awaitable[Message]:
        """Messages that are not of the registers."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Identity(Protocol):
    """`boot` grows durably at each start of the node."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def boot(self) -> int: ...


@dataclass(slots=True)
class Context:
    """Shared by the parts of one node. `tasks` holds what runs in the background until it ends."""

    node: NodeId
    boot: int
    clock: Clock
    chance: Chance
    network: Network
    disk: Disk
    file: RegisterFile
    domain: Tablets
    rules: Rules = RULES
    counters: dict[str, int] = field(default_factory=dict)
    tasks: dict[asyncio.Future[Any], None] = field(default_factory=dict)
    operations: int = 0

    def count(self, name: str, by: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run in the background; an unexpected error is logged, not lost."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self.count("background_errors")
        log.error("a background step of the registers failed", exc_info=error)

    def ask(self, node: NodeId, message: Struct, timeout_s: float, heard: Heard) -> None:
        """Ask a peer; `heard` gets the reply, or the error that came of it, a little later, unless this node stops.

        For what is asked all the time: a task for each question costs more than the question.
        """
        try:
            asked = asyncio.ensure_future(self.network.call(node, message, timeout_s))
        except DhtError as error:
            asyncio.get_running_loop().call_soon(heard, error)
            return
        self.tasks[asked] = None
        asked.add_done_callback(partial(self._heard, heard))

    def _heard(self, heard: Heard, asked: asyncio.Future[Struct]) -> None:
        self.tasks.pop(asked, None)
        if asked.cancelled():
            return
        error = asked.exception()
        if error is not None and not isinstance(error, DhtError):
            self._failed(error)
            error = Indeterminate(f"asking it failed: {error!r}")
        try:
            heard(asked.result() if error is None else error)
        except Exception as bug:
            self._failed(bug)

    def replicas(self, key: GroupKey) -> TabletReplicas:
        return self.domain.replicas(self.file.tablet(key))

    def ballot(self, epoch: int, round: int) -> Ballot:
        """A ballot that no other operation has."""
        self.operations += 1
        boot = self.boot if self.rules.boot_in_ballot else 0
        operation = self.operations if self.rules.op_in_ballot else 0
        return Ballot(self.domain.generation, epoch, round, self.node, boot, operation)

    async def back_off(self) -> None:
        await self.clock.sleep(self.chance.uniform(BACKOFF_MIN_S, BACKOFF_MAX_S))

    async def catch_up(self, error: NotServing) -> None:
        """A replica refused us for its roster: go where it points to, or learn the newer links."""
        if self.domain.pointed(error):
            self.count("pointers_followed")
            return
        epoch = error.detail.get("roster_epoch")
        await self.domain.refresh(epoch if isinstance(epoch, int) else None)

    def remaining(self, deadline: float) -> float:
        """Seconds left, 0 when none."""
        return max(0.0, deadline - self.clock.monotonic())
