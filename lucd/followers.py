"""The copies that this node keeps of domains that it follows: `global`, and PoPs whose backup its own PoP is.

A member of `global` follows all of it, so that every PoP reads it without asking another one; and the members of
`global` in a PoP keep the copies of the PoPs that it backs up (`dht.domain.backups`). Each copy is a file of its own
in the data directory; the voting code never answers from one. A copy that is not wanted any more, because other PoPs
came, is deleted after a while, if its domain was there to be copied by those all the while, and they say that they
have it. Until then, and that of a PoP which is gone or lost its disks for ever, it is kept and handed over like the
others, after a restart too: it may be the only one. For the same reason a complete copy of a PoP that goes on in
another generation, as after a recovery, stays beside the one that is begun then until that is complete, if the file
system has room for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote, unquote

from dht.codec import Message
from dht.domain import restore
from dht.domain.backups import backups_of, followed_by
from dht.domain.domain import Domain
from dht.domain.follower import Follower
from dht.domain.messages import DomainMessage
from dht.domain.restore import BEFORE
from dht.domain.roster import Roster
from dht.domain.wide import GLOBAL_TABLETS
from dht.errors import DhtError
from dht.limits import PEER_TIMEOUT_S, TABLETS_PER_DOMAIN
from dht.model import GLOBAL, NodeId, Struct
from dht.register import copies
from dht.register.following import FollowedReads
from dht.storage.disk import SqliteDisk
from dht.storage.write_ahead_log import log_path
from dht.wire.identity import NodeIdentity
from dht.wire.links import parse_address
from dht.world import Batch, Chance, Clock, Network
from lucd.conf.settings import Settings
from lucd.counters import Counters
from lucd.domain_node import open_file
from lucd.messages import AskCopies, CopiesReply, CopyLine

log = logging.getLogger(__name__)
COPIES: Final = "copies"
COPY_RESERVE_BYTES: Final = 4 * 1024 * 1024
LOOK_EVERY_S: Final = 1.0
OPEN_AGAIN_S_MAX: Final = 300.0
"""Between two attempts to open a damaged file, at most: each looks the whole file through."""
UNWANTED_AFTER_S: Final = 600.0
ASKED_AGAIN_S: Final = 60.0
SILENT_AFTER_S: Final = 60.0
"""A copy that is not covered any further for so long is of a domain that nobody else can copy now either; humans are
told of it."""
_SUFFIX: Final = ".sqlite"

Contacts = Callable[[str], Awaitable[Sequence[NodeId]]]
"""Nodes that keep the domain of that name."""


class Addresses(Network, Protocol):
    """The part of `dht.wire.links.LinkNetwork` that is needed here."""

    def set_address(self, node_id: NodeId, host: str, port: int) -> None: ...

    def forget(self, node_id: NodeId) -> None: ...


@dataclass(slots=True)
class Kept:
    """One copy. `nodes`: those that it is pulled from, by address. `since_s`: kept by this process since then.

    Under the name of a domain with `BEFORE` behind it: what another generation has outlived; nobody is asked for more.
    """

    disk: SqliteDisk
    follower: Follower
    reads: FollowedReads
    nodes: dict[NodeId, str]
    since_s: float


@dataclass(slots=True)
class Failed:
    """Why a copy is not kept, since when, and when that was last tried (seconds of the monotonic clock)."""

    why: str
    since_s: float
    tried_s: float


class Followers:
    """`contacts`: see `Contacts`. `needed`: whether this node wants a link to that one anyway."""

    def __init__(
        self,
        directory: Path,
        identity: NodeIdentity,
        settings: Settings,
        clock: Clock,
        chance: Chance,
        network: Addresses,
        global_network: Network,
        wide: Domain,
        contacts: Contacts,
        needed: Callable[[NodeId], bool],
    ) -> None:
        self._directory = directory / COPIES
        self._identity = identity
        self._settings = settings
        self._clock = clock
        self._chance = chance
        self._network = network
        self._global_network = global_network
        self._wide = wide
        self._contacts = contacts
        self._needed = needed
        self._kept: dict[str, Kept] = {}
        self._failed: dict[str, Failed] = {}
        self._unwanted_s: dict[str, float] = {}
        self._not_set_aside: dict[str, None] = {}
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._run())
        self._looking.add_done_callback(_report_end)

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        for name in list(self._kept):
            await self._end(name)

    # ---- what is copied

    def kept(self, name: str) -> Kept | None:
        """The copy of the domain of that name."""
        return self._kept.get(name)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._kept))

    def reads(self) -> FollowedReads | None:
        """Of domain `global`."""
        kept = self._kept.get(GLOBAL)
        return None if kept is None else kept.reads

    def near(self) -> Sequence[NodeId]:
        """Other nodes of this PoP that follow `global`, those that are heard first."""
        newest = self._wide.chain.newest
        members = () if newest is None else newest.members
        own, pop = self._identity.node_id, self._settings.pop
        near = [m.node_id for m in members if m.pop == pop and m.node_id != own]
        return sorted(near, key=lambda node: not self._network.alive(node))

    def answer(self, question: Struct) -> Message:
        """Serve a node of this PoP that follows nothing."""
        return copies.answer(self.reads(), self._clock, question)

    def hand_over(self, question: DomainMessage) -> Message:
        """Serve a new node of a PoP that lost all its disks."""
        kept = self._kept.get(question.domain)
        return restore.hand_over(None if kept is None else kept.follower, question)

    def lines(self) -> tuple[CopyLine, ...]:
        """The copies, for humans."""
        node, pop = self._identity.node_id.hex(), self._settings.pop
        out = []
        for name, kept in sorted(self._kept.items()):
            if name.endswith(BEFORE):
                continue
            age_s, copy = self.age_s(name), kept.follower.copy
            shown = round(age_s, 1) if age_s < float("inf") else -1.0
            out.append(CopyLine(name, shown, copy.open_count(), copy.noted.generation, node, pop))
        return tuple(out)

    def acquainted(self, node: NodeId) -> bool:
        """Whether a copy is pulled from that node."""
        return any(node in kept.nodes for kept in self._kept.values())

    def age_s(self, name: str) -> float:
        """How old the least covered tablet of the copy is; infinite before all are covered."""
        kept = self._kept[name]
        return self._clock.monotonic() - kept.follower.copy.prefix_covered_s(b"")

    def warnings(self) -> list[str]:
        """Sentences for humans."""
        failed = [f"the copy of domain {name} is not kept: {f.why}" for name, f in sorted(self._failed.items())]
        return failed + [text for name in self.names() if (text := self._behind(name))]

    def _behind(self, name: str) -> str:
        """What is to be said of a copy that has not been covered for long; empty for any other."""
        kept, now_s = self._kept[name], self._clock.monotonic()
        if name.endswith(BEFORE):
            return ""
        copy = kept.follower.copy
        age_s = now_s - copy.tablets_covered_s()
        if min(age_s, now_s - kept.since_s) <= SILENT_AFTER_S:
            return ""
        if age_s < float("inf"):
            what = f"does not cover what was acknowledged in the last {age_s:.0f} s"
        elif wall_s := min(copy.noted.wall_s, default=0.0):
            moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s))
            what = f"does not cover what was acknowledged after {moment}"
        else:
            what = "was never complete"
            if name + BEFORE in self._kept:
                what += ", so that of a generation before is kept beside it"
        return f"the copy of domain {name} {what}: see whether its nodes can be reached from here"

    @property
    def counters(self) -> Counters:
        """Sums over the copies, and the age of that of `global` (seconds, -1 while it is not covered)."""
        total: dict[str, int | float] = {"copies": len(self._kept), "open": 0}
        for kept in self._kept.values():
            follower = kept.follower
            total["open"] += follower.copy.open_count()
            for name, value in {**follower.counters, **follower.copy.counters}.items():
                total[name] = total.get(name, 0) + value
        age_s = self.age_s(GLOBAL) if GLOBAL in self._kept else float("inf")
        total["global_age_s"] = round(age_s, 3) if age_s < float("inf") else -1
        return total

    # ---- which are

    def wanted(self) -> tuple[str, ...]:
        """Domains that this node is to follow; none while it is no member of `global`."""
        newest = self._wide.chain.newest
        if newest is None or not self._wide.joined:
            return ()
        pops = {m.pop for m in newest.members}
        return followed_by(self._settings.pop, pops, self._settings.backup_pops)

    async def _run(self) -> None:
        while True:
            # Members of `global` alone are asked for copies, also where their PoP is the only one that is left in it.
            for name in self._due():
                if name not in self._kept and self._may_begin(name):
                    await self._begin(name)
            try:
                await self._set_outlived_aside()
                await self._drop_before()
                await self._drop_unwanted()
            except OSError as error:
                log.error("a copy that is not wanted any more cannot be deleted: %s", error)
            await self._clock.sleep(LOOK_EVERY_S * self._chance.uniform(0.8, 1.2))

    def _due(self) -> list[str]:
        """What is to be kept now: what is wanted, what is there, and what follows on one of a generation before."""
        there = self._on_disk()
        every = dict.fromkeys((*self.wanted(), *there, *(name.removesuffix(BEFORE) for name in there)))
        return list(every) if self._wide.joined else []

    async def _drop_unwanted(self) -> None:
        """Copies of PoPs that others back up now; not that of a PoP which `global` knows no more, or whose domain
        answered nobody since: then nobody else has it.
        """
        wanted, newest = self.wanted(), self._wide.chain.newest
        if not wanted or newest is None:
            return
        pops = {m.pop for m in newest.members}
        now_s = self._clock.monotonic()
        unwanted = [n for n in self._kept if n not in wanted and n in pops]
        silent = [n for n in unwanted if self.age_s(n) > SILENT_AFTER_S]
        self._unwanted_s = {n: now_s if n in silent else self._unwanted_s.get(n, now_s) for n in unwanted}
        for name in unwanted:
            if now_s - self.age_s(name) - self._unwanted_s[name] >= UNWANTED_AFTER_S:
                if not await self._others_have(name, newest):
                    self._unwanted_s[name] += ASKED_AGAIN_S
                    continue
                log.info("domain %s is followed by other PoPs now; its copy here is deleted", name)
                await self._delete(name)
                await self._delete(name + BEFORE)

    async def _others_have(self, name: str, roster: Roster) -> bool:
        """Whether somebody in each PoP that is to keep the copy has all of it, and goes on with it."""
        keepers = backups_of(name, {m.pop for m in roster.members}, self._settings.backup_pops)
        asked = [m for m in roster.members if m.pop in keepers]
        answers = await asyncio.gather(*(self._has(m.node_id, m.address, name) for m in asked))
        return set(keepers) == {m.pop for m, has in zip(asked, answers, strict=True) if has}

    async def _has(self, node: NodeId, address: str, name: str) -> bool:
        if not self._network.alive(node):
            self._network.set_address(node, *parse_address(address))
        try:
            reply = await self._network.call(node, AskCopies(), PEER_TIMEOUT_S)
        except DhtError:
            return False
        lines = reply.copies if isinstance(reply, CopiesReply) else ()
        return any(line.domain == name and 0.0 <= line.age_s <= SILENT_AFTER_S for line in lines)

    async def _delete(self, name: str) -> None:
        if name in self._kept:
            await self._end(name)
        for path in self._directory.glob(f"{self._path(name).name}*"):
            path.unlink(missing_ok=True)

    # ---- what another generation has outlived

    def _may_set_aside(self, name: str) -> bool:
        """Nobody begins `global` anew with a copy; and of a full file system the node's own files have more need."""
        if name == GLOBAL or name in self._not_set_aside:
            return False
        try:
            return shutil.disk_usage(self._directory).free > 2 * self._path(name).stat().st_size
        except OSError:
            return False

    async def _set_outlived_aside(self) -> None:
        """Rename the files; the domain is followed into a new one then."""
        for name in [name for name, kept in self._kept.items() if kept.follower.outlived]:
            await self._end(name)
            path = self._path(name)
            log_file = log_path(path)
            if log_file.exists() and log_file.stat().st_size:
                log.error("the copy of domain %s cannot be set aside, for its log was not folded into it", name)
                self._not_set_aside[name] = None
                continue
            await self._delete(name + BEFORE)
            path.rename(self._path(name + BEFORE))
            log.warning("domain %s goes on in another generation; its copy is kept until the new one is complete", name)

    async def _drop_before(self) -> None:
        """The copy of a generation before goes when that of the present one is complete, and its file says so."""
        for name in [name for name in self._kept if name.endswith(BEFORE)]:
            follows = self._kept.get(name.removesuffix(BEFORE))
            if follows is None or follows.follower.outlived or not self._covers_all(follows):
                continue
            try:
                await follows.disk.durable(follows.disk.submit(Batch()))
            except DhtError:
                continue
            log.info("the copy of domain %s is complete; the one before is deleted", name.removesuffix(BEFORE))
            await self._delete(name)

    @staticmethod
    def _covers_all(kept: Kept) -> bool:
        copy = kept.follower.copy
        return copy.complete and all(copy.noted.open.values())

    def _on_disk(self) -> list[str]:
        return sorted(unquote(path.name.removesuffix(_SUFFIX)) for path in self._directory.glob(f"*{_SUFFIX}"))

    def _path(self, name: str) -> Path:
        return self._directory / f"{quote(name, safe='')}{_SUFFIX}"

    def _may_begin(self, name: str) -> bool:
        """A file that could not be opened is tried again after as long as that was so; one that is gone, at once."""
        failed = self._failed.get(name)
        if failed is None or not self._path(name).exists():
            return True
        pause_s = min(failed.tried_s - failed.since_s, OPEN_AGAIN_S_MAX)
        return self._clock.monotonic() - failed.tried_s >= pause_s

    async def _begin(self, name: str) -> None:
        """Follow the domain; a copy that cannot be is told, and the others are kept all the same."""
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            # Beside the loop: a large file takes long to be looked through.
            disk = await asyncio.to_thread(open_file, self._path(name), self._identity, 0, COPY_RESERVE_BYTES)
            try:
                kept = self._copy(name, disk)
                if not name.endswith(BEFORE):
                    await kept.follower.start()
            except BaseException:
                disk.close()
                raise
        except (DhtError, OSError) as error:
            if name not in self._failed:
                log.error("the copy of domain %s cannot be opened: %s", name, error)
            now_s = self._clock.monotonic()
            since_s = self._failed[name].since_s if name in self._failed else now_s
            self._failed[name] = Failed(str(error), since_s, now_s)
            return
        self._failed.pop(name, None)
        self._kept[name] = kept
        log.info("this node follows domain %s", name)

    def _copy(self, name: str, disk: SqliteDisk) -> Kept:
        """Raises StorageError for a file that cannot be read."""
        domain = name.removesuffix(BEFORE)
        nodes: dict[NodeId, str] = {}

        async def contacts() -> Sequence[NodeId]:
            return await self._contacts(domain)

        follower = Follower(
            domain,
            self._clock,
            self._chance,
            self._global_network if name == GLOBAL else self._network,
            disk,
            contacts,
            GLOBAL_TABLETS if name == GLOBAL else TABLETS_PER_DOMAIN,
            interval_s=self._settings.follow_interval_s,
            bytes_per_s=self._settings.copy_bytes_per_s,
            on_roster=lambda roster: self._acquaint(nodes, roster),
            sets_aside=lambda: self._may_set_aside(name),
        )
        return Kept(disk, follower, FollowedReads(follower.copy, disk), nodes, self._clock.monotonic())

    def _acquaint(self, nodes: dict[NodeId, str], roster: Roster) -> None:
        """Links to the members of a followed domain, for as long as they are members."""
        addresses = {m.node_id: m.address for m in roster.members if m.node_id != self._identity.node_id}
        for node, address in addresses.items():
            if nodes.get(node) != address:
                self._network.set_address(node, *parse_address(address))
        gone = [node for node in nodes if node not in addresses]
        nodes.clear()
        nodes.update(addresses)
        for node in gone:
            if not self._needed(node) and not self.acquainted(node):
                self._network.forget(node)

    async def _end(self, name: str) -> None:
        kept = self._kept.pop(name)
        with contextlib.suppress(DhtError):
            await kept.follower.stop()
        kept.disk.close()


def _report_end(task: asyncio.Task[None]) -> None:
    """What breaks off is a bug that must not pass in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("copies of other domains are begun and ended no more, restart this node: %r", error, exc_info=error)
